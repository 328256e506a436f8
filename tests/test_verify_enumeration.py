"""enumerate_legal against brute force, how much it asks, and differences of lists in words."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tcg_flatpolicy as fp
from tcg_flatpolicy.verify import enumeration
from tcg_flatpolicy.verify.enumeration import (
    compare_enumerations,
    enumerate_legal,
    list_from_head_masks,
    whole,
)
from tests.strategies import Action, actions_of, specs

SPEC = fp.ActionSpec(
    [
        fp.Primary("rest"),
        fp.Primary("attack", fp.Entity("ally", 4), fp.Entity("enemy", 4)),
        fp.Primary("play", fp.Index("card", 5), fp.Index("place", 3), id=4),
    ]
)


def candidates(spec: fp.ActionSpec) -> list[Action]:
    """By brute force: every tuple of the whole space that the spec does not object to."""
    everything = itertools.product(*(range(size) for size in spec.nvec.tolist()))
    return [action for action in everything if spec.explain(action) is None]


def tuples(array: Any) -> list[Action]:
    return [tuple(action) for action in array.tolist()]


class Known:
    """Knows a set of legal tuples, answers about prefixes of any length, counts what it is asked.

    ``from_length`` is the shortest prefix that it can tell anything about.
    """

    def __init__(self, legal: Any, from_length: int = 1) -> None:
        self.prefixes = {action[:j] for action in legal for j in range(1, len(action) + 1)}
        self.from_length = from_length
        self.asked: list[list[Action]] = []

    def __call__(self, prefixes: np.ndarray) -> np.ndarray:
        assert prefixes.dtype == np.int64
        asked = tuples(prefixes)
        self.asked.append(asked)
        prefixes[:] = -1  # it is its own to write to
        known = [len(one) < self.from_length or one in self.prefixes for one in asked]
        return np.array(known, dtype=bool)


@st.composite
def spec_and_legal(draw: Any) -> tuple[fp.ActionSpec, list[Action]]:
    spec = draw(specs())
    return spec, draw(st.lists(actions_of(spec), max_size=12))


@given(spec_and_legal(), st.integers(1, 4), st.sampled_from([1, 2, 3, 7, 2**16]))
def test_against_brute_force(
    case: tuple[fp.ActionSpec, list[Action]], from_length: int, block: int
) -> None:
    spec, legal = case
    width = len(spec.nvec)
    known = Known(legal, min(from_length, width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(enumeration, "BLOCK", block)
        found = enumerate_legal(spec, known)
    assert found.dtype == np.int64
    assert found.shape == (len(set(legal)), width)
    assert tuples(found) == sorted(set(legal))
    assert all(0 < len(asked) <= block for asked in known.asked)
    everything = candidates(spec)
    for length in range(1, width + 1):
        asked = [one for block_ in known.asked for one in block_ if len(one) == length]
        parents = {
            one[: length - 1]
            for one in everything
            if length - 1 < known.from_length or one[: length - 1] in known.prefixes
        }
        wanted = {one[:length] for one in everything if one[: length - 1] in parents}
        assert sorted(asked) == sorted(wanted)  # each once, and none below what was refused


@given(specs(), st.randoms(use_true_random=False))
def test_whole_predicates_against_brute_force(spec: fp.ActionSpec, random: Any) -> None:
    legal = {action for action in candidates(spec) if random.random() < 0.4}
    widths = []

    def vectorised(actions: np.ndarray) -> Any:
        widths.append(actions.shape[1])
        return torch.tensor([action in legal for action in tuples(actions)], dtype=torch.bool)

    assert tuples(enumerate_legal(spec, whole(vectorised))) == sorted(legal)
    assert set(widths) == {len(spec.nvec)}
    assert tuples(enumerate_legal(spec, whole(lambda action: action in legal, each=True))) == (
        sorted(legal)
    )
    assert tuples(enumerate_legal(spec, lambda p: np.ones(len(p), bool))) == candidates(spec)


def test_a_refusal_cuts_all_that_is_below() -> None:
    """Of 3,000,000 candidates, one branch is followed."""
    spec = fp.ActionSpec.from_nvec([24, 50, 50, 50])
    goal = [3, 49, 0, 17]
    asked = []

    def is_legal(prefixes: np.ndarray) -> np.ndarray:
        asked.append(len(prefixes))
        return prefixes[:, -1] == goal[prefixes.shape[1] - 1]

    assert enumerate_legal(spec, is_legal).tolist() == [goal]
    assert asked == [24, 50, 50, 50]


def test_three_million_candidates_a_block_at_a_time() -> None:
    spec = fp.ActionSpec.from_nvec([24, 50, 50, 50])
    asked = []

    def is_legal(actions: np.ndarray) -> np.ndarray:
        asked.append(len(actions))
        return actions.sum(axis=1) == 100

    tracemalloc.start()
    found = enumerate_legal(spec, whole(is_legal))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(asked) == 3_000_000
    assert max(asked) <= enumeration.BLOCK
    assert len(asked) < 2 * math.ceil(3_000_000 / enumeration.BLOCK)
    assert peak < 60e6
    values = np.indices([24, 50, 50, 50]).reshape(4, -1).T
    assert np.array_equal(found, values[values.sum(axis=1) == 100])


def test_a_slot_wider_than_a_block() -> None:
    spec = fp.ActionSpec.from_nvec([2, 3 * enumeration.BLOCK + 5])
    asked = []

    def is_legal(prefixes: np.ndarray) -> np.ndarray:
        asked.append(len(prefixes))
        return prefixes[:, -1] % enumeration.BLOCK == 1

    found = enumerate_legal(spec, is_legal)
    assert found.tolist() == [[1, 1 + i * enumeration.BLOCK] for i in range(4)]
    assert max(asked) == enumeration.BLOCK


def test_nothing_is_legal() -> None:
    found = enumerate_legal(SPEC, lambda prefixes: np.zeros(len(prefixes), bool))
    assert found.shape == (0, 3)
    assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (
            True,
            ValueError,
            r"3 prefixes of 1 values, an array .*must answer \(3,\) bool, got \(\)",
        ),
        ([True], ValueError, r"got \(1,\)"),
        (np.ones((3, 1), bool), ValueError, r"got \(3, 1\)"),
        (np.ones(3, int), TypeError, r"must answer \(3,\) bool, got int64"),
        (torch.ones(3), TypeError, "got float32"),
        (None, TypeError, "got object"),
        ([[True], [True, False]], ValueError, r"got \[\[True\]"),
    ],
)
def test_answers_that_are_none(answer: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words + r".*; if it takes one tuple at a time, give whole\("):
        enumerate_legal(SPEC, lambda prefixes: answer)


def of_one_tuple(action: Any) -> bool:
    primary, i, j = action
    return primary == 1 and i == j


LEGAL = {(1, 2, 3), (4, 0, 1)}
OF_ONE_TUPLE = [
    of_one_tuple,  # cannot be unpacked
    lambda action: action[0] == 1 and action[1] == action[2],  # no second prefix, or no truth value
    lambda action: tuple(action) in LEGAL,  # rows are not hashable
    lambda action: action in LEGAL,  # nor is the array
    lambda action: bool(sum(action) < 3),
    lambda action: isinstance(action, tuple),  # one answer for all
]


@pytest.mark.parametrize("predicate", OF_ONE_TUPLE)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_predicate_of_one_tuple_is_told_of_whole(predicate: Any, wrapped: bool) -> None:
    hint = r"if it takes one tuple at a time, give whole\(is_legal, each=True\)$"
    with pytest.raises((TypeError, ValueError), match=hint) as raised:
        enumerate_legal(SPEC, whole(predicate) if wrapped else predicate)
    cause = raised.value.__cause__
    assert cause is None or f"it raised {type(cause).__name__}: {cause}; if" in str(raised.value)
    enumerate_legal(SPEC, whole(predicate, each=True))


def test_a_predicate_of_one_tuple_is_asked_about_fewer_prefixes_than_it_has_values() -> None:
    spec = fp.ActionSpec.from_nvec([2, 3, 3])

    def is_legal(action: Any) -> bool:
        return bool(action[2] == 1)

    with pytest.raises(TypeError, match=r"it raised IndexError: .*; if it takes one tuple"):
        enumerate_legal(spec, is_legal)
    assert len(enumerate_legal(spec, whole(is_legal, each=True))) == 6


def test_what_a_predicate_of_one_tuple_raises_is_its_own() -> None:
    def broken(action: Any) -> bool:
        raise IndexError("no such unit")

    with pytest.raises(IndexError, match=r"^no such unit$"):
        enumerate_legal(SPEC, whole(broken, each=True))


def test_a_plain_predicate_must_say_true_or_false() -> None:
    with pytest.raises(TypeError, match=r"True or False to \(0, 0, 0\), got 1"):
        enumerate_legal(SPEC, whole(lambda action: 1, each=True))
    assert tuples(enumerate_legal(SPEC, whole(lambda a: np.bool_(a[1] == 3), each=True))) == [
        *((1, 3, enemy) for enemy in range(4)),
        *((4, 3, place) for place in range(3)),
    ]


# ---- masks


@given(spec_and_legal())
def test_to_masks_and_back(case: tuple[fp.ActionSpec, list[Action]]) -> None:
    spec, legal = case
    lists = fp.LegalActions.from_lists([legal], slots=spec.slots, noop=spec.noop.tolist())
    flat = fp.LegalActions.from_mask(lists.to_mask(spec), spec)
    assert flat.to_lists()[0] == sorted(set(legal))
    known = Known(legal)
    found = list_from_head_masks(lists.head_masks(spec.nvec), known, spec)
    assert tuples(found) == sorted(set(legal))
    masks = [mask[0].tolist() for mask in lists.head_masks(spec.nvec)]
    for asked in known.asked:  # only about what is unmasked
        for one in asked:
            assert all(masks[slot][value] for slot, value in enumerate(one))


def test_head_masks_leave_combinations_to_the_predicate() -> None:
    masks = [np.array([0, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 0], bool)]
    masks.append(np.array([1, 1, 0, 0], bool))
    every = list_from_head_masks(masks, lambda prefixes: np.ones(len(prefixes), bool), SPEC)
    assert tuples(every) == [(p, i, j) for p in (1, 4) for i in (0, 2) for j in (0, 1)]
    some = list_from_head_masks(masks, whole(lambda a: a[1] != a[2], each=True), SPEC)
    assert tuples(some) == [a for a in tuples(every) if a[1] != a[2]]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda masks: masks[:2], ValueError, "3 masks are needed, got 2"),
        (lambda masks: [*masks[:2], np.ones(5, bool)], ValueError, r"slot 2 must be \(4,\), got"),
        (lambda masks: [*masks[:2], np.ones((2, 4), bool)], ValueError, r"got \(2, 4\)"),
        (lambda masks: [*masks[:2], np.ones(4)], TypeError, "slot 2 must be bool, got float64"),
    ],
)
def test_masks_that_do_not_fit(change: Any, error: type[Exception], words: str) -> None:
    masks = [np.ones(int(size), bool) for size in SPEC.nvec]
    with pytest.raises(error, match=words):
        list_from_head_masks(change(masks), lambda prefixes: np.ones(len(prefixes), bool), SPEC)


# ---- comparison


@given(spec_and_legal(), st.data())
def test_comparison_as_sets(case: tuple[fp.ActionSpec, list[Action]], data: Any) -> None:
    spec, a = case
    b = data.draw(st.lists(st.sampled_from(a) if a else actions_of(spec), max_size=6))
    b += data.draw(st.lists(actions_of(spec), max_size=3))
    compared = compare_enumerations(a, b, spec)
    assert tuples(compared.only_a) == sorted(set(a) - set(b))
    assert tuples(compared.only_b) == sorted(set(b) - set(a))
    assert tuples(compared.both) == sorted(set(a) & set(b))
    assert tuples(compared.repeated_a) == sorted({x for x in a if a.count(x) > 1})
    assert tuples(compared.repeated_b) == sorted({x for x in b if b.count(x) > 1})
    assert compared.ok == (sorted(a) == sorted(set(b)) and sorted(b) == sorted(set(a)))
    for action in [*compared.only_a[:1].tolist(), *compared.only_b[:1].tolist()]:
        assert spec.describe(action) in str(compared)
    array = np.array(b, dtype=np.int16).reshape(len(b), len(spec.nvec))
    legal = fp.LegalActions.from_lists([a], slots=spec.slots)
    assert str(compare_enumerations(legal, array, spec)) == str(compared)
    assert str(compare_enumerations(legal, torch.tensor(array), spec)) == str(compared)


def test_the_difference_in_words() -> None:
    ours = [(0, 0, 0), (1, 0, 1), (4, 0, 0), (4, 0, 0), (9, 0, 0)]
    engine = [(0, 0, 0), *((1, 3, enemy) for enemy in range(4)), (4, 0, 0), (1, 0, 7)]
    compared = compare_enumerations(ours, engine, SPEC, names=("ours", "the engine's"))
    assert not compared.ok
    assert str(compared) == (
        "ours and the engine's differ: 2 tuples only in ours, 5 only in the engine's, "
        "2 in both\n"
        "  attack:\n"
        "    1 only in ours: attack(ally[0], enemy[1]) (1, 0, 1)\n"
        "    5 only in the engine's: (1, 0, 7) (outside the spec: slot 2: 7 is outside 0..3, the "
        "range of enemy of attack), attack(ally[3], enemy[0]) (1, 3, 0), "
        "attack(ally[3], enemy[1]) (1, 3, 1) and 2 more\n"
        "  primary 9:\n"
        "    1 only in ours: (9, 0, 0) (outside the spec: slot 0 (primary): 9 is not a primary of "
        "this spec)\n"
        "  ours lists 1 tuple more than once: play(card[0], place[0]) (4, 0, 0)"
    )


def test_the_same_in_words_and_repeats_are_not_ok() -> None:
    a = [(0, 0, 0), (1, 2, 3)]
    same = compare_enumerations(a, a[::-1])
    assert same.ok
    assert str(same) == "a and b list the same 2 tuples"
    twice = compare_enumerations(a, a + a[:1])
    assert not twice.ok
    assert str(twice) == (
        "a and b list the same 2 tuples\n  b lists 1 tuple more than once: (0, 0, 0)"
    )


@given(st.lists(actions_of(SPEC), min_size=1, max_size=12))
def test_swapped_slots_are_explained(a: list[Action]) -> None:
    b = [(p, j, i) if p == 1 else (p, i, j) for p, i, j in a]
    compared = compare_enumerations(a, b, SPEC)
    only = {action for action in a if action not in b}
    if not only:
        assert compared.explanations == ()
    elif "plus 1" not in str(compared) and "minus 1" not in str(compared):  # as good, for few
        assert compared.explanations == ("attack: with slots 1 and 2 swapped, a is b",)


def test_swapped_slots_of_one_primary() -> None:
    a = [(0, 0, 0), (1, 0, 1), (1, 0, 3), (1, 2, 2), (4, 0, 2)]
    b = [(0, 0, 0), (1, 1, 0), (1, 3, 0), (1, 2, 2), (4, 0, 2)]
    compared = compare_enumerations(a, b, SPEC)
    assert str(compared).endswith("\n  attack: with slots 1 and 2 swapped, a is b")
    b += [(4, 1, 1)]  # now there is more to it
    assert compare_enumerations(a, b, SPEC).explanations == ()


def test_three_slots_moved_round() -> None:
    a = np.array([(1, 0, 1, 5), (1, 2, 3, 7), (1, 2, 2, 9)])
    compared = compare_enumerations(a, a[:, [0, 3, 1, 2]], names=("ours", "theirs"))
    assert compared.explanations == (
        "primary 1: with slots moved (3 to 1, 1 to 2, 2 to 3), ours is theirs",
    )


@pytest.mark.parametrize(("step", "words"), [(1, "plus"), (-1, "minus")])
@pytest.mark.parametrize("slot", [0, 1, 2])
def test_an_offset_by_one_is_explained(step: int, words: str, slot: int) -> None:
    a = np.array([(1, 1, 1), (1, 2, 1), (1, 2, 3), (4, 1, 2), (4, 3, 1)])
    b = a.copy()
    b[:, slot] += step
    compared = compare_enumerations(a, b, SPEC if slot else None)
    where = "the primary" if slot == 0 else f"slot {slot}"
    told = f"b's {where} is a's {words} 1 throughout"
    assert compared.explanations == ((told,) if slot == 0 else (f"attack, play: {told}",))
    if slot:  # of one primary only
        b[a[:, 0] == 4] = a[a[:, 0] == 4]
        assert compare_enumerations(a, b, SPEC).explanations == (f"attack: {told}",)


def test_values_too_wide_to_pack() -> None:
    big = 2**62
    a = [(0, big, big, 0), (1, 0, 0, big), (0, big, big, 0)]
    compared = compare_enumerations(a, [(1, 0, 0, big), (0, big, big, 1)])
    assert tuples(compared.only_a) == [(0, big, big, 0)]
    assert tuples(compared.only_b) == [(0, big, big, 1)]
    assert tuples(compared.both) == [(1, 0, 0, big)]
    assert tuples(compared.repeated_a) == [(0, big, big, 0)]
    most = 2**32 - 1  # three of these wrap round to the last two
    compared = compare_enumerations([(0, 0, 0, 0), (0, most, most, most)], [(0, most, 0, 0)])
    assert len(compared.only_a) == 2
    assert tuples(compared.only_b) == [(0, most, 0, 0)]


def test_empty_lists() -> None:
    assert compare_enumerations([], []).ok
    assert str(compare_enumerations([], [], SPEC)) == "a and b list the same 0 tuples"
    compared = compare_enumerations([], [(1, 2)])
    assert tuples(compared.only_b) == [(1, 2)]
    assert compared.explanations == ()
    noops = fp.LegalActions.from_lists([[]], slots=1)
    assert tuples(compare_enumerations([(1, 2)], noops).only_a) == [(1, 2)]


@pytest.mark.parametrize(
    ("a", "b", "error", "words"),
    [
        ([(1, 2)], [(1, 2, 3)], ValueError, r"b lists \(1, 2, 3\), of 3 values, not 2"),
        ([(1, 2), (1,)], [(1, 2)], ValueError, r"a lists \(1,\), of 1 values, not 2"),
        (np.zeros((2, 2)), [(1, 2)], TypeError, "a must list integers, got float64"),
        ([(1.5, 2)], [(1, 2)], TypeError, "a must list integers, got float64"),
        (np.zeros((2, 2), int), np.zeros((2, 3), int), ValueError, r"b must be \(N, 2\), got"),
        (
            fp.LegalActions.from_lists([[(1, 2)], [(1, 2)]]),
            [(1, 2)],
            ValueError,
            "a has 2 rows: compare one state at a time",
        ),
    ],
)
def test_what_cannot_be_compared(a: Any, b: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        compare_enumerations(a, b)


def test_the_games_list_is_the_specs_candidates_under_the_engines_mask() -> None:
    """The engine's mask of 542 actions, asked by prefix, against the environment's own list."""
    game = pytest.importorskip("tcg_flatpolicy.games.essence_wars")
    env = game.EssenceWars(num_games=4, seed=3)
    env.reset(3)
    rng = np.random.default_rng(3)
    assert tuples(enumerate_legal(game.SPEC, lambda p: np.ones(len(p), bool))) == sorted(
        tuples(game.INDEX_TO_TUPLE)
    )
    states = 0
    for _ in range(15):
        legal = env.legal_layout.read(torch.as_tensor(env.observations))
        for row, listed in enumerate(legal.to_lists()):
            mask = env._mask[row]

            def by_mask(actions: np.ndarray, mask: np.ndarray = mask) -> np.ndarray:
                return mask[game.TUPLE_TO_INDEX[game.SPEC.ravel(actions)]]

            found = enumerate_legal(game.SPEC, whole(by_mask))
            compared = compare_enumerations(found, listed, game.SPEC, ("the engine", "the list"))
            assert compared.ok, str(compared)
            assert tuples(found) == sorted(listed)
            states += 1
        drawn = legal.starts + torch.as_tensor(rng.integers(0, legal.counts.numpy()))
        env.step(legal.actions[drawn].numpy())
    assert states >= 50
