"""What tuples mean: sizes, ids, words and checks, against plain Python and NumPy."""

import itertools
import math
from dataclasses import FrozenInstanceError
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcg_flatpolicy import ActionSpec, Entity, Index, OneOf, Primary, Role
from tcg_flatpolicy.spec import Part
from tests.strategies import INTEGERS, actions_below, actions_of, plain_roles, roles, specs

ALLY, ENEMY, HAND = Entity("ally", 6), Entity("enemy", 6), Entity("hand", 30)
TARGET = OneOf(Index("none", 1), ENEMY, ALLY)
GAME = ActionSpec(
    [
        Primary("end_turn"),
        Primary("attack", ALLY, ENEMY),
        Primary("ability", ALLY, Index("which", 5), TARGET),
        Primary("attach_weapon", HAND, ALLY, Index("use_token", 2), id=7),
        Primary("concede"),
        Primary("draw", id=4),
        Primary("discard", HAND),
    ],
    noop=(0, 0, 0, 0),
)


def words_of(role: Index | Entity | OneOf) -> list[str]:
    """What each value of a role is called."""
    parts = role.roles if isinstance(role, OneOf) else [role]
    return [f"{part.name}[{value}]" for part in parts for value in range(part.size)]


# ---- what is derived from the declaration


def test_sizes_and_ids_of_a_game() -> None:
    names = {number: primary.name for number, primary in GAME.primaries.items()}
    assert list(names.items()) == [
        (0, "end_turn"),
        (1, "attack"),
        (2, "ability"),
        (4, "draw"),
        (5, "discard"),
        (7, "attach_weapon"),
        (8, "concede"),
    ]
    assert GAME.slots == 3
    assert GAME.nvec.tolist() == [9, 30, 6, 13]
    assert GAME.nvec.dtype == GAME.limits.dtype == GAME.noop.dtype == np.int64
    assert GAME.noop.tolist() == [0, 0, 0, 0]
    assert GAME.limits.tolist() == [
        [1, 1, 1, 1],
        [2, 6, 6, 1],
        [3, 6, 5, 13],
        [0, 0, 0, 0],
        [5, 1, 1, 1],
        [6, 30, 1, 1],
        [0, 0, 0, 0],
        [8, 30, 6, 2],
        [9, 1, 1, 1],
    ]
    assert repr(GAME) == "ActionSpec(7 primaries, nvec=[9, 30, 6, 13])"


def test_action_space_is_gymnasiums() -> None:
    space = GAME.action_space
    assert type(space) is gymnasium.spaces.MultiDiscrete
    assert space.dtype == np.int64
    assert space.nvec.tolist() == [9, 30, 6, 13]
    assert space.contains(np.array([8, 29, 5, 12]))
    assert not space.contains(np.array([8, 29, 5, 13]))


def test_declaring_does_not_change_the_primaries_given() -> None:
    primary = Primary("pass")
    spec = ActionSpec([Primary("end", id=3), primary])
    assert primary.id is None
    assert spec.primaries[4] == Primary("pass", id=4)


def test_numbers_may_be_numpys() -> None:
    spec = ActionSpec(
        [Primary("a", Index("x", np.int32(3)), id=np.int64(2))],  # type: ignore[arg-type]
        noop=np.array([2, 1], dtype=np.uint8),  # type: ignore[arg-type]
    )
    assert spec == ActionSpec([Primary("a", Index("x", 3), id=2)], noop=[2, 1])
    assert spec.noop.dtype == np.int64
    assert type(spec.primaries[2].id) is int


@given(specs())
def test_limits_and_sizes(spec: ActionSpec) -> None:
    most = [max(spec.primaries)] + [0] * spec.slots
    for number, row in enumerate(spec.limits.tolist()):
        primary = spec.primaries.get(number)
        if primary is None:
            assert row == [0] * (1 + spec.slots)
            continue
        sizes = [len(words_of(role)) for role in primary.slots]
        sizes += [1] * (spec.slots - len(sizes))
        assert row == [number + 1, *sizes]
        most = [max(m, size - 1) for m, size in zip(most, [0, *sizes], strict=True)]
    assert len(spec.limits) == max(spec.primaries) + 1
    assert spec.slots == max(len(primary.slots) for primary in spec.primaries.values())
    assert spec.nvec.tolist() == [m + 1 for m in most]


@given(specs())
def test_parts_take_each_one_of_apart(spec: ActionSpec) -> None:
    expected = []
    for number, primary in sorted(spec.primaries.items()):
        for slot, role in enumerate(primary.slots):
            for part in role.roles if isinstance(role, OneOf) else (role,):
                before = [p for p in expected if (p.primary, p.slot) == (number, slot)]
                start = sum(p.role.size for p in before)
                expected.append(Part(number, slot, start, part))
    assert spec.parts == expected
    for part in spec.parts:
        role = spec.primaries[part.primary].slots[part.slot]
        there = words_of(role)[part.start : part.start + part.role.size]
        assert there == words_of(part.role)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_from_nvec_knows_sizes_alone(nvec: list[int], data: st.DataObject) -> None:
    noop = data.draw(actions_below(nvec))
    spec = ActionSpec.from_nvec(nvec, noop=noop)
    assert spec.nvec.tolist() == nvec
    assert spec.noop.tolist() == list(noop)
    assert ActionSpec.from_nvec(np.array(nvec)).noop.tolist() == [0] * len(nvec)  # type: ignore[arg-type]
    assert list(spec.primaries) == list(range(nvec[0]))
    assert all(spec.explain(a) is None for a in itertools.product(*map(range, nvec)))
    assert {part.role for part in spec.parts} == {
        Index(f"sub{slot}", size) for slot, size in enumerate(nvec[1:], start=1)
    }


# ---- ids


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_ids_count_through_the_tuples_in_order(nvec: list[int]) -> None:
    spec = ActionSpec.from_nvec(nvec)
    every = np.array(list(itertools.product(*map(range, nvec))))
    assert (spec.ravel(every) == np.arange(len(every))).all()
    assert (spec.unravel(np.arange(len(every))) == every).all()


@given(specs(), st.lists(st.integers(0, 3), max_size=3), st.sampled_from(INTEGERS), st.data())
def test_ravel_and_unravel_are_numpys(
    spec: ActionSpec, shape: list[int], dtype: str, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    nvec = spec.nvec.tolist()
    actions = rng.integers(0, nvec, (*shape, len(nvec))).astype(dtype)
    ids = np.ravel_multi_index(tuple(np.moveaxis(actions, -1, 0)), nvec)

    ravelled = spec.ravel(actions)
    assert isinstance(ravelled, np.ndarray)
    assert ravelled.dtype == np.int64
    np.testing.assert_array_equal(ravelled, ids, strict=True)
    of_tensor = spec.ravel(torch.from_numpy(actions))
    assert isinstance(of_tensor, torch.Tensor)
    assert of_tensor.dtype == torch.int64
    np.testing.assert_array_equal(of_tensor.numpy(), ids, strict=True)

    back = spec.unravel(ids)
    assert back.dtype == np.int64
    np.testing.assert_array_equal(back, actions.astype(np.int64), strict=True)
    np.testing.assert_array_equal(
        back, np.stack(np.unravel_index(ids, nvec), axis=-1).reshape(back.shape), strict=True
    )
    tensor_back = spec.unravel(torch.from_numpy(np.asarray(ids)))
    assert isinstance(tensor_back, torch.Tensor)
    np.testing.assert_array_equal(tensor_back.numpy(), back, strict=True)
    if math.prod(nvec) <= np.iinfo(dtype).max:
        np.testing.assert_array_equal(spec.unravel(np.asarray(ids).astype(dtype)), back)


def test_ids_do_not_share_the_memory_of_actions() -> None:
    spec = ActionSpec.from_nvec([5])
    actions = torch.tensor([[3], [4]])
    spec.ravel(actions)[0] = 0
    assert actions.tolist() == [[3], [4]]


def test_ids_reach_the_end_of_int64() -> None:
    spec = ActionSpec([Primary("a", Index("x", 2**63 - 1))])
    assert spec.ravel([0, 2**63 - 2]) == 2**63 - 2
    assert spec.unravel(2**63 - 2).tolist() == [0, 2**63 - 2]
    wide = ActionSpec([Primary("a", Index("x", 2**31), Index("y", 2**32))])
    for call in (lambda: wide.ravel([0, 0, 0]), lambda: wide.unravel(0)):
        with pytest.raises(ValueError, match=r"\[1, 2147483648, 4294967296\] has more ids than"):
            call()


def test_ravel_takes_whatever_numpy_takes() -> None:
    spec = ActionSpec.from_nvec([3, 4, 5])
    assert spec.ravel([[1, 2, 3], [2, 3, 4]]).tolist() == [33, 59]
    assert spec.ravel((2, 3, 4)).shape == ()
    assert spec.ravel(np.array([[1, 2, 3], [2, 3, 4]], order="F")).tolist() == [33, 59]
    assert spec.ravel(np.zeros((0, 3), dtype=int)).shape == (0,)
    assert spec.unravel([33, 59]).tolist() == [[1, 2, 3], [2, 3, 4]]
    assert spec.unravel(np.zeros((0, 2), dtype=int)).shape == (0, 2, 3)


def test_ravel_takes_arrays_that_run_backwards() -> None:
    spec = ActionSpec.from_nvec([3, 4, 5])
    actions = np.array([[1, 2, 3], [2, 3, 4]])
    assert spec.ravel(actions[::-1]).tolist() == [59, 33]
    assert spec.unravel(np.array([33, 59])[::-1]).tolist() == [[2, 3, 4], [1, 2, 3]]


def test_ravel_takes_arrays_of_either_byte_order() -> None:
    spec = ActionSpec.from_nvec([3, 4, 5])
    for order in "<>":
        actions = np.array([[1, 2, 3], [2, 3, 4]], dtype=f"{order}i4")
        assert spec.ravel(actions).tolist() == [33, 59]
        assert spec.unravel(np.array([33, 59], dtype=f"{order}i8")).tolist() == actions.tolist()


@pytest.mark.usefixtures("_every_warning")
def test_ravel_takes_read_only_arrays_without_a_warning() -> None:
    spec = ActionSpec.from_nvec([3, 4, 5])
    actions, ids = np.array([[1, 2, 3], [2, 3, 4]]), np.array([33, 59])
    actions.flags.writeable = ids.flags.writeable = False
    assert spec.ravel(actions).tolist() == [33, 59]
    assert spec.unravel(ids).tolist() == [[1, 2, 3], [2, 3, 4]]


# ---- words


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ((0, 0, 0, 0), "end_turn"),
        ((1, 0, 3, 0), "attack(ally[0], enemy[3])"),
        ((2, 5, 4, 0), "ability(ally[5], which[4], none[0])"),
        ((2, 0, 0, 1), "ability(ally[0], which[0], enemy[0])"),
        ((2, 0, 0, 6), "ability(ally[0], which[0], enemy[5])"),
        ((2, 0, 0, 7), "ability(ally[0], which[0], ally[0])"),
        ((2, 1, 2, 12), "ability(ally[1], which[2], ally[5])"),
        ((5, 29, 0, 0), "discard(hand[29])"),
        ((7, 29, 5, 1), "attach_weapon(hand[29], ally[5], use_token[1])"),
    ],
)
def test_describe(action: tuple[int, ...], words: str) -> None:
    assert GAME.describe(action) == words
    assert GAME.describe(np.array(action, dtype=np.uint8)) == words
    assert GAME.describe(torch.tensor(action)) == words


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        ((3, 0, 0, 0), "slot 0 (primary): 3 is not a primary of this spec"),
        ((-1, 0, 0, 0), "slot 0 (primary): -1 is not a primary of this spec"),
        ((9, 0, 0, 0), "slot 0 (primary): 9 is not a primary of this spec"),
        ((1, 6, 0, 0), "slot 1: 6 is outside 0..5, the range of ally of attack"),
        ((1, 0, -2, 0), "slot 2: -2 is outside 0..5, the range of enemy of attack"),
        (
            (2, 0, 0, 13),
            "slot 3: 13 is outside 0..12, the range of OneOf(none, enemy, ally) of ability",
        ),
        ((1, 0, 0, 4), "slot 3: 4, but attack does not use this slot, so it must be 0"),
        ((5, 0, -1, 0), "slot 2: -1, but discard does not use this slot, so it must be 0"),
    ],
)
def test_explain_says_what_is_wrong(action: tuple[int, ...], problem: str) -> None:
    assert GAME.explain(action) == problem
    with pytest.raises(ValueError, match="means nothing here") as refusal:
        GAME.describe(action)
    assert str(refusal.value) == f"{action} means nothing here: {problem}"


@given(specs(), st.data())
def test_what_has_no_meaning_has_no_words(spec: ActionSpec, data: st.DataObject) -> None:
    any_action = st.tuples(*(st.integers(-1, int(size)) for size in spec.nvec))
    action = data.draw(actions_of(spec) | any_action)
    words = None
    if action[0] in spec.primaries:
        primary = spec.primaries[action[0]]
        choices = [words_of(role) for role in primary.slots]
        choices += [[""]] * (spec.slots - len(choices))
        if all(0 <= v < len(choice) for v, choice in zip(action[1:], choices, strict=True)):
            said = [choice[v] for v, choice in zip(action[1:], choices, strict=True) if choice[v]]
            words = f"{primary.name}({', '.join(said)})" if said else primary.name
    assert (spec.explain(action) is None) == (words is not None)
    in_limits = 0 <= action[0] < len(spec.limits) and min(action) >= 0
    in_limits = in_limits and bool((np.array(action) < spec.limits[action[0]]).all())
    assert in_limits == (words is not None)
    if words is not None:
        assert spec.describe(action) == words


# ---- equality


@given(specs(), st.data())
def test_specs_are_equal_when_they_mean_the_same(spec: ActionSpec, data: st.DataObject) -> None:
    again = ActionSpec(
        data.draw(st.permutations(list(spec.primaries.values()))), noop=spec.noop.tolist()
    )
    assert again == spec
    assert hash(again) == hash(spec)
    assert {spec: 1}[again] == 1

    first, *rest = spec.primaries.values()
    more = ActionSpec([*again.primaries.values(), Primary("one more", id=99)], spec.noop.tolist())
    renamed = ActionSpec([Primary("z", *first.slots, id=first.id), *rest], spec.noop.tolist())
    moved = ActionSpec([Primary(first.name, *first.slots, id=98), *rest])
    assert spec not in (more, renamed, moved)
    if first.slots:
        role = data.draw((roles() | plain_roles()).filter(lambda role: role != first.slots[0]))
        other = ActionSpec([Primary(first.name, role, *first.slots[1:], id=first.id), *rest])
        assert other != ActionSpec(list(spec.primaries.values()))
    if spec.nvec.prod() > 1:
        noop = data.draw(actions_below(spec.nvec.tolist()).filter(lambda a: a != tuple(spec.noop)))
        assert ActionSpec(list(spec.primaries.values()), noop) != spec


def test_a_spec_is_not_equal_to_other_things() -> None:
    assert GAME != "GAME"
    assert GAME.__eq__(GAME.nvec) is NotImplemented
    assert Index("a", 2) != Entity("a", 2)


def test_roles_cannot_be_changed() -> None:
    for thing, name in ((ALLY, "size"), (Index("x", 2), "name"), (TARGET, "parts")):
        with pytest.raises(FrozenInstanceError):
            setattr(thing, name, 3)
    with pytest.raises(FrozenInstanceError):
        Primary("a").id = 3  # type: ignore[misc]


def test_sizes_are_python_ints() -> None:
    role = OneOf(Index("x", np.uint8(200)), Index("y", np.uint8(100)))  # type: ignore[arg-type]
    assert role.size == 300
    assert type(role.size) is type(Index("z", np.int64(3)).size) is int  # type: ignore[arg-type]
    assert ActionSpec([Primary("a", role)]).nvec.tolist() == [1, 300]


def test_a_one_of_may_hold_another() -> None:
    role = OneOf(Index("none", 1), OneOf(ALLY, Index("which", 2)))
    assert [(start, part.name) for start, part in role.parts()] == [
        (0, "none"),
        (1, "ally"),
        (7, "which"),
    ]
    assert [role.describe(value) for value in (0, 1, 6, 8)] == [
        "none[0]",
        "ally[0]",
        "ally[5]",
        "which[1]",
    ]


# ---- errors


class Wordless(Role):
    """Says nothing of how it is embedded."""


class Both(Role):
    encoded, rows = True, 2


def pair() -> ActionSpec:
    return ActionSpec.from_nvec([3, 4])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Index("", 2), TypeError, r"^Index needs a non-empty name, got ''$"),
        (lambda: Entity(5, 2), TypeError, r"^Entity needs a non-empty name, got 5$"),  # type: ignore[arg-type]
        (lambda: Index("x", 0), ValueError, r"^Index\('x'\) needs at least one value, got 0$"),
        (lambda: Entity("x", -3), ValueError, r"^Entity\('x'\) needs at least one value, got -3$"),
        (lambda: Index("x", 2.0), TypeError, r"^Index\('x'\) needs a whole number of .* got 2\.0$"),  # type: ignore[arg-type]
        (lambda: Entity("x", True), TypeError, r"^Entity\('x'\) needs a whole .* got True$"),
        (lambda: OneOf(), ValueError, r"^OneOf needs at least one role$"),
        (lambda: OneOf(ALLY, 3), TypeError, r"^OneOf takes roles .*, got 3$"),  # type: ignore[arg-type]
        (
            lambda: Index("x", 2**70),
            ValueError,
            r"^Index\('x'\) needs at most 9223372036854775807 values, .*: num",
        ),
        (
            lambda: OneOf(Index("x", 2**63 - 1), Entity("y", 1)),
            ValueError,
            r"^OneOf\(x, y\) needs at most 9223372036854775807 values, got 9",
        ),
        (lambda: Primary(""), TypeError, r"^Primary needs a non-empty name, got ''$"),
        (lambda: Primary("a", ALLY, 6), TypeError, r"^Primary\('a'\): a slot is a role .*, not 6$"),  # type: ignore[arg-type]
        (lambda: Primary("a", id=-1), ValueError, r"^Primary\('a'\): id must not be neg.* -1$"),
        (lambda: Primary("a", id=1.0), TypeError, r"^Primary\('a'\): id must be a whole .* 1\.0$"),  # type: ignore[arg-type]
        (lambda: Primary("a", id=True), TypeError, r"^Primary\('a'\): id must be a .* got True$"),
        (
            lambda: Primary("a", id=2**40),
            ValueError,
            r"^Primary\('a'\): id must be below 1048576, got",
        ),
        (
            lambda: ActionSpec(Primary("a")),
            TypeError,
            r"^ActionSpec takes a list of primaries: write ActionSpec\(\[P",
        ),  # type: ignore[arg-type]
        (
            lambda: Wordless("x", 3),
            TypeError,
            r"^Wordless says neither that the encoder embeds its v",
        ),
        (
            lambda: Both("x", 3),
            TypeError,
            r"^Both says both that the encoder embeds its values and",
        ),
        (lambda: ActionSpec([]), ValueError, r"^ActionSpec needs at least one Primary$"),
        (lambda: ActionSpec(["a"]), TypeError, r"^ActionSpec takes Primary objects, got 'a'$"),  # type: ignore[list-item]
        (
            lambda: ActionSpec([Primary("a", id=1), Primary("b", id=0), Primary("c")]),
            ValueError,
            r"^id 1 is used by 'a' and 'c'; give one of them another id=$",
        ),
        (
            lambda: ActionSpec([Primary("a"), Primary("a")]),
            ValueError,
            r"^two primaries are named 'a'; names must be unique$",
        ),
        (
            lambda: ActionSpec([Primary("a", ALLY)], noop=(0,)),
            ValueError,
            r"^noop must be 2 whole numbers, got \(0,\)$",
        ),
        (
            lambda: ActionSpec([Primary("a", ALLY)], noop=(0, 0.5)),  # type: ignore[arg-type]
            ValueError,
            r"^noop must be 2 whole numbers, got \(0, 0\.5\)$",
        ),
        (
            lambda: ActionSpec([Primary("a", ALLY)], noop=(0, 6)),
            ValueError,
            r"^noop \(0, 6\) is outside MultiDiscrete sizes \[1, 6\]$",
        ),
        (lambda: ActionSpec([Primary("a", ALLY)], noop=(0, -1)), ValueError, r"^noop \(0, -1\) is"),
        (lambda: ActionSpec.from_nvec([]), ValueError, r"^nvec must be .* at least 1, got \[\]$"),
        (lambda: ActionSpec.from_nvec([3, 0]), ValueError, r"^nvec must be .* got \[3, 0\]$"),
        (lambda: pair().describe([0]), ValueError, r"^\[0\] has 1 values, .* tuples have 2$"),
        (lambda: pair().ravel([[0.0, 1.0]]), TypeError, r"^ravel takes integers, got torch\.fl"),
        (lambda: pair().ravel([[True, False]]), TypeError, r"^ravel takes integers, .*\.bool$"),
        (lambda: pair().ravel(torch.zeros(2)), TypeError, r"^ravel takes integers, got .*float32$"),
        (lambda: pair().ravel([0, 1, 2]), ValueError, r"^actions of shape \(3,\) must end in 2 v"),
        (lambda: pair().ravel(3), ValueError, r"^actions of shape \(\) must end in 2 values$"),
        (
            lambda: pair().ravel([[0, 1], [2, 4]]),
            ValueError,
            r"^action value 4 at index \(1, 1\) is outside 0\.\.3$",
        ),
        (lambda: pair().ravel([0, -1]), ValueError, r"value -1 at index \(1,\) is outside 0\.\.3$"),
        (lambda: pair().ravel([3, 0]), ValueError, r"value 3 at index \(0,\) is outside 0\.\.2$"),
        (lambda: pair().unravel([0.0]), TypeError, r"^unravel takes integers, got .*float64$"),
        (lambda: pair().unravel([True]), TypeError, r"^unravel takes integers, got torch\.bool$"),
        (lambda: pair().unravel([0, 12]), ValueError, r"^id 12 is outside 0\.\.11$"),
        (lambda: pair().unravel(-1), ValueError, r"^id -1 is outside 0\.\.11$"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_values_that_are_not_whole_are_not_cut() -> None:
    with pytest.raises(TypeError, match="float"):
        ActionSpec.from_nvec([2.7, 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="float"):
        ActionSpec.from_nvec([3, 3]).describe([1.7, 0])  # type: ignore[list-item]
