"""Packed legal lists against plain Python lists and sets."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tcg_flatpolicy import ActionSpec, Entity, Index, LegalActions, OneOf, Primary
from tests.strategies import (
    FLOATS,
    INTEGERS,
    Action,
    Lists,
    actions_below,
    actions_of,
    legal_lists,
    specs,
    thousands,
)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@st.composite
def batches(draw: Any, max_rows: int = 6) -> tuple[list[int], Lists, Action]:
    """Sizes, lists within them, and a no-op."""
    nvec = draw(SIZES)
    return nvec, draw(legal_lists(actions_below(nvec), max_rows)), draw(actions_below(nvec))


def packed(batch: tuple[list[int], Lists, Action]) -> LegalActions:
    nvec, lists, noop = batch
    return LegalActions.from_lists(lists, slots=len(nvec) - 1, noop=noop)


def playable(lists: Lists, noop: Action) -> list[set[Action]]:
    """What may be played in each row."""
    return [set(row) or {noop} for row in lists]


def padded(lists: Lists, width: int, room: int, padding: np.ndarray) -> np.ndarray:
    """(B, room, width) of the lists, with ``padding`` (same shape) where they end."""
    array = padding.copy()
    for row, actions in enumerate(lists):
        for place, action in enumerate(actions):
            array[row, place] = action
    assert array.shape == (len(lists), room, width)
    return array


BIG = thousands(np.random.default_rng(0), [24, 50, 50, 50], rows=300, longest=2000)
MANY_REPEATS = thousands(np.random.default_rng(1), [3, 4, 5], rows=200, longest=300)

# ---- packing


@given(batches())
def test_packing_is_the_lists_end_to_end(batch: tuple[list[int], Lists, Action]) -> None:
    nvec, lists, noop = batch
    legal = packed(batch)
    assert legal.to_lists() == lists
    flat = [action for row in lists for action in row]
    assert legal.actions.tolist() == [list(action) for action in flat]
    assert legal.actions.shape == (len(flat), len(nvec))
    assert legal.rows.tolist() == [row for row, actions in enumerate(lists) for _ in actions]
    assert legal.counts.tolist() == [len(actions) for actions in lists]
    assert legal.starts.tolist() == [sum(map(len, lists[:row])) for row in range(len(lists))]
    assert legal.noop.tolist() == list(noop)
    assert len(legal) == len(lists)
    assert legal.slots == len(nvec) - 1
    for tensor in (legal.actions, legal.rows, legal.counts, legal.starts, legal.noop):
        assert tensor.dtype == torch.int64


@pytest.mark.parametrize("lists", [[], [[]], [[], [], []]])
def test_no_legal_action_anywhere(lists: Lists) -> None:
    legal = LegalActions.from_lists(lists, noop=(1, 2))
    assert legal.to_lists() == lists
    assert legal.actions.shape == (0, 2)
    assert legal.distinct().to_lists() == lists
    assert legal.ids.shape == (0,)
    assert legal.contains(torch.tensor([1, 2]).expand(len(lists), 2)).tolist() == [True] * len(
        lists
    )
    assert not legal.contains(torch.zeros(len(lists), 2, dtype=torch.int64)).any()
    assert [mask.shape for mask in legal.head_masks([2, 3])] == [(len(lists), 2), (len(lists), 3)]
    assert LegalActions.from_lists(lists, slots=2).noop.tolist() == [0, 0, 0]
    legal.validate(ActionSpec.from_nvec([2, 3]))


def test_rows_may_be_arrays() -> None:
    legal = LegalActions.from_lists([np.array([[1, 2], [3, 4]], dtype=np.uint8), [], [[5, 6]]])  # type: ignore[list-item]
    assert legal.to_lists() == [[(1, 2), (3, 4)], [], [(5, 6)]]
    assert legal.noop.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_the_constructor_takes_any_integers(dtype: str) -> None:
    kind = getattr(torch, dtype)
    actions = torch.tensor([[1, 2], [3, 4], [5, 6]]).to(kind)
    legal = LegalActions(actions, torch.tensor([2, 0, 1]).to(kind), torch.tensor([7, 8]).to(kind))
    assert legal.to_lists() == [[(1, 2), (3, 4)], [], [(5, 6)]]
    assert legal.noop.tolist() == [7, 8]
    assert legal.actions.dtype == legal.counts.dtype == legal.noop.dtype == torch.int64
    assert LegalActions(actions, torch.tensor([3])).noop.tolist() == [0, 0]


@given(
    batches(),
    st.sampled_from(INTEGERS),
    st.sampled_from(INTEGERS),
    st.booleans(),
    st.integers(0, 99),
)
def test_padding_does_not_matter(
    batch: tuple[list[int], Lists, Action],
    dtype: str,
    count_dtype: str,
    as_tensor: bool,
    seed: int,
) -> None:
    nvec, lists, noop = batch
    rng = np.random.default_rng(seed)
    room = max(map(len, lists), default=0) + int(rng.integers(3))
    info = np.iinfo(dtype)
    shape = (len(lists), room, len(nvec))
    noise = rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
    actions: Any = padded(lists, len(nvec), room, noise)
    counts: Any = np.array([len(row) for row in lists], dtype=count_dtype)
    if as_tensor:
        actions, counts = torch.from_numpy(actions), torch.from_numpy(counts)
    legal = LegalActions.from_padded(actions, counts, torch.tensor(noop))
    assert legal.to_lists() == lists
    assert legal.noop.tolist() == list(noop)
    assert legal.actions.dtype == torch.int64
    assert LegalActions.from_padded(actions, counts).noop.tolist() == [0] * len(nvec)


def test_padded_arrays_may_be_views() -> None:
    array = np.arange(24).reshape(2, 4, 3)
    expected = [[(0, 1, 2), (3, 4, 5)], [(12, 13, 14)]]
    counts = np.array([2, 1])
    assert LegalActions.from_padded(array[:, :2], counts).to_lists() == expected
    other_way = np.asfortranarray(array)
    assert LegalActions.from_padded(other_way, counts).to_lists() == expected
    assert LegalActions.from_padded(torch.tensor(array)[:, :2], counts).to_lists() == expected


def test_padded_arrays_may_run_backwards() -> None:
    array, counts = np.arange(24).reshape(2, 4, 3), np.array([2, 1])
    expected = [[(9, 10, 11), (6, 7, 8)], [(21, 22, 23)]]
    assert LegalActions.from_padded(array[:, ::-1], counts).to_lists() == expected
    assert LegalActions.from_padded(array[:, ::-1].copy(), counts[::-1][::-1]).to_lists() == (
        expected
    )


@pytest.mark.usefixtures("_every_warning")
def test_padded_arrays_may_be_read_only() -> None:
    array, counts = np.arange(24).reshape(2, 4, 3), np.array([2, 1])
    array.flags.writeable = counts.flags.writeable = False
    legal = LegalActions.from_padded(array, counts)
    assert legal.to_lists() == [[(0, 1, 2), (3, 4, 5)], [(12, 13, 14)]]


# ---- masks


@given(specs(max_primaries=2, max_slots=2, max_size=3), st.data())
def test_masks_and_lists_are_the_same_thing(spec: ActionSpec, data: st.DataObject) -> None:
    nvec = spec.nvec.tolist()
    every = list(itertools.product(*map(range, nvec)))
    lists = data.draw(legal_lists(actions_below(nvec)))
    mask = np.array([[action in row for action in every] for row in lists], dtype=bool)
    mask = mask.reshape(len(lists), len(every))

    to_mask = LegalActions.from_lists(lists, slots=spec.slots).to_mask(spec)
    assert to_mask.dtype == torch.bool
    np.testing.assert_array_equal(to_mask.numpy(), mask, strict=True)

    for given_mask in (mask, torch.from_numpy(mask)):
        legal = LegalActions.from_mask(given_mask, spec)
        assert legal.to_lists() == [sorted(set(row)) for row in lists]
        assert legal.noop.tolist() == spec.noop.tolist()
        assert torch.equal(legal.to_mask(spec), to_mask)
        # What a mask gives is checked for bounds and repeats nowhere else:
        probes = torch.tensor(every)[:, None, :].expand(-1, len(lists), -1)
        expected = [[a in row for row in playable(lists, tuple(spec.noop))] for a in every]
        assert legal.contains(probes).tolist() == expected
        assert legal.distinct().to_lists() == legal.to_lists()


# ---- what is listed


def probes_of(data: st.DataObject, nvec: list[int], lists: Lists, noop: Action) -> np.ndarray:
    """(*S, B, H) int64: listed actions, the no-op, others within the sizes, and outside them."""
    outside = st.tuples(*(st.integers(-2, size + 1) for size in nvec))
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=2)))
    drawn = [
        data.draw(st.sampled_from([*row, noop]) | actions_below(nvec) | outside)
        for _ in range(int(np.prod(shape)))
        for row in lists
    ]
    return np.array(drawn, dtype=np.int64).reshape(*shape, len(lists), len(nvec))


@given(batches(), st.data())
def test_contains_and_find(batch: tuple[list[int], Lists, Action], data: st.DataObject) -> None:
    nvec, lists, noop = batch
    legal = packed(batch)
    probes = probes_of(data, nvec, lists, noop)
    where = legal.find(torch.tensor(probes))
    contains = legal.contains(torch.tensor(probes))
    assert where.dtype == torch.int64
    assert contains.dtype == torch.bool
    assert where.shape == contains.shape == probes.shape[:-1]
    for place in np.ndindex(*probes.shape[:-1]):
        row, action = place[-1], tuple(probes[place].tolist())
        assert contains[place].item() == (action in playable(lists, noop)[row])
        position = int(where[place])
        assert (position >= 0) == (action in lists[row])
        if position >= 0:
            assert int(legal.rows[position]) == row
            assert tuple(legal.actions[position].tolist()) == action
        else:
            assert position == -1


@given(batches(), st.sampled_from([*INTEGERS, *FLOATS, "bfloat16"]), st.data())
def test_contains_takes_whole_numbers_of_any_dtype(
    batch: tuple[list[int], Lists, Action], dtype: str, data: st.DataObject
) -> None:
    nvec, lists, noop = batch
    probes = probes_of(data, nvec, lists, noop)
    cast = torch.tensor(probes).to(getattr(torch, dtype))  # in unsigned ones, -1 becomes the top
    contains = packed(batch).contains(cast)
    for place in np.ndindex(*probes.shape[:-1]):
        expected = tuple(probes[place].tolist()) in playable(lists, noop)[place[-1]]
        assert contains[place].item() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "broken", [0.5, 1.5, -0.5, -1.0, float("nan"), float("inf"), -float("inf"), 6e4, 3.0]
)
def test_a_float_that_is_no_listed_number_is_not_contained(
    dtype: torch.dtype, broken: float
) -> None:
    every = list(itertools.product(range(3), range(2)))
    legal = LegalActions.from_lists([every, []], noop=(1, 1))
    fine = torch.tensor([[2, 1], [1, 1]], dtype=dtype)
    assert legal.contains(fine).tolist() == [True, True]
    for slot in range(2):
        actions = fine.clone()
        actions[:, slot] = broken
        assert legal.contains(actions).tolist() == [False, False]


def test_numbers_too_large_for_int64_are_not_contained() -> None:
    legal = LegalActions.from_lists([[(0, 0), (1, 0)], []])
    for huge in (1e19, 2.0**63, 2.0**64, -(2.0**63), 1e300):
        assert not legal.contains(torch.tensor([[huge, 0.0]] * 2, dtype=torch.float64)).any()
    top = torch.tensor([[2**64 - 1, 0]] * 2, dtype=torch.uint64)
    assert not legal.contains(top).any()


def test_a_tuple_outside_the_sizes_is_not_mistaken_for_a_listed_one() -> None:
    """In mixed radix (0, 3) and (1, 0) of sizes (2, 3) would be the same number."""
    row = [(1, 0), (0, 2), (1, 2)]
    legal = LegalActions.from_lists([row, [(0, 1)]], noop=(1, 1))
    every = list(itertools.product(range(-3, 8), repeat=2))
    contains = legal.contains(torch.tensor(every)[:, None, :].expand(-1, 2, -1))
    assert contains.tolist() == [[action in row, action == (0, 1)] for action in every]


def test_contains_among_thousands() -> None:
    rng = np.random.default_rng(2)
    legal = LegalActions.from_lists(BIG, noop=(0, 9, 0, 0))
    listed = [row[rng.integers(len(row))] if row else (0, 9, 0, 0) for row in BIG]
    others = [tuple(a) for a in rng.integers(0, [24, 50, 50, 50], (len(BIG), 4)).tolist()]
    expected = [a in row for a, row in zip(others, playable(BIG, (0, 9, 0, 0)), strict=True)]
    contains = legal.contains(torch.tensor([listed, others]))
    assert contains[0].all()
    assert contains[1].tolist() == expected
    assert max(map(len, BIG)) == 2000
    assert min(map(len, BIG)) == 0
    assert legal.to_lists() == BIG


# ---- masks of single slots


@given(batches(), st.sampled_from(INTEGERS), st.data())
def test_prefix_mask(
    batch: tuple[list[int], Lists, Action], dtype: str, data: st.DataObject
) -> None:
    nvec, lists, noop = batch
    slot = data.draw(st.integers(0, len(nvec) - 1))
    size = nvec[slot] + data.draw(st.integers(0, 2))
    prefixes = [
        data.draw(st.sampled_from([*row, noop]) | actions_below(nvec))[:slot] for row in lists
    ]
    prefix = torch.tensor(prefixes, dtype=torch.int64).reshape(len(lists), slot)
    mask = packed(batch).prefix_mask(prefix.to(getattr(torch, dtype)), size)
    assert mask.shape == (len(lists), size)
    assert mask.dtype == torch.bool
    for row, start, actions in zip(mask.tolist(), prefixes, playable(lists, noop), strict=True):
        follow = {action[slot] for action in actions if action[:slot] == tuple(start)}
        assert {value for value, legal in enumerate(row) if legal} == follow


@given(batches())
def test_head_masks_are_the_marginals(batch: tuple[list[int], Lists, Action]) -> None:
    nvec, lists, noop = batch
    masks = packed(batch).head_masks(nvec)
    assert len(masks) == len(nvec)
    for slot, (mask, size) in enumerate(zip(masks, nvec, strict=True)):
        assert mask.shape == (len(lists), size)
        assert mask.dtype == torch.bool
        for row, actions in zip(mask.tolist(), playable(lists, noop), strict=True):
            appear = {action[slot] for action in actions}
            assert {value for value, legal in enumerate(row) if legal} == appear


def test_marginally_legal_is_not_legal() -> None:
    legal = LegalActions.from_lists([[(1, 0), (0, 1)]])
    assert [mask.tolist() for mask in legal.head_masks([2, 2])] == [[[True, True]]] * 2
    assert legal.prefix_mask(torch.tensor([[1]]), 2).tolist() == [[True, False]]
    assert legal.contains(torch.tensor([[1, 1]])).tolist() == [False]


# ---- repeats and order


@given(batches())
def test_distinct_keeps_the_first_listing(batch: tuple[list[int], Lists, Action]) -> None:
    _, lists, noop = batch
    once = packed(batch).distinct()
    assert once.to_lists() == [list(dict.fromkeys(row)) for row in lists]
    assert once.noop.tolist() == list(noop)
    assert once.distinct() is once
    assert once.counts.tolist() == [len(set(row)) for row in lists]
    assert once.starts.tolist() == [sum(len(set(r)) for r in lists[:b]) for b in range(len(lists))]
    listed = torch.tensor([row[-1] if row else noop for row in lists], dtype=torch.int64)
    assert once.contains(listed.reshape(len(lists), len(noop))).all()


def test_distinct_of_thousands() -> None:
    for lists in (BIG, MANY_REPEATS):
        legal = LegalActions.from_lists(lists)
        assert legal.distinct().to_lists() == [list(dict.fromkeys(row)) for row in lists]


@given(batches())
def test_ids_are_ordered_as_the_tuples(batch: tuple[list[int], Lists, Action]) -> None:
    assert_ordered(packed(batch))


def assert_ordered(legal: LegalActions) -> None:
    ids, actions = legal.ids.tolist(), legal.actions.tolist()
    assert legal.ids.dtype == torch.int64
    assert len(ids) == len(actions)
    by_id = sorted(zip(ids, actions, strict=True))
    assert [action for _, action in by_id] == sorted(actions)
    assert len(set(ids)) == len({tuple(action) for action in actions})


HUGE = st.sampled_from([0, 1, 2, 2**31, 2**32 + 1, 2**62, 2**63 - 2])


@given(st.integers(1, 3), st.data())
def test_values_of_any_size(width: int, data: st.DataObject) -> None:
    action = st.tuples(*[HUGE] * width)
    lists, noop = data.draw(legal_lists(action)), data.draw(action)
    legal = LegalActions.from_lists(lists, slots=width - 1, noop=noop)
    assert legal.to_lists() == lists
    assert legal.distinct().to_lists() == [list(dict.fromkeys(row)) for row in lists]
    assert_ordered(legal)
    probes = [data.draw(st.sampled_from([*row, noop]) | action) for row in lists]
    contains = legal.contains(torch.tensor(probes, dtype=torch.int64).reshape(len(lists), width))
    expected = [a in row for a, row in zip(probes, playable(lists, noop), strict=True)]
    assert contains.tolist() == expected


@pytest.mark.parametrize(
    "row",
    [
        [(2**63 - 1,)],
        [(2**63 - 1, 1), (1, 5), (3, 5), (1, 5)],
        [(2**63 - 1, 2**63 - 1), (0, 0), (2**63 - 1, 2**63 - 1)],
    ],
)
def test_the_largest_int64_is_a_value_like_others(row: list[Action]) -> None:
    legal = LegalActions.from_lists([row, []])
    assert legal.distinct().to_lists() == [list(dict.fromkeys(row)), []]
    assert_ordered(legal)
    for action in {*row, (2**63 - 1,) * len(row[0]), (0,) * len(row[0]), (3, 1)[: len(row[0])]}:
        contains = legal.contains(torch.tensor([action, action]))
        assert contains.tolist() == [action in row, action == (0,) * len(action)]


# ---- checks against a spec

GAME = ActionSpec(
    [
        Primary("end_turn"),
        Primary("attack", Entity("ally", 6), Entity("enemy", 6)),
        Primary("cast", Index("card", 9), OneOf(Index("none", 1), Entity("enemy", 6)), id=4),
    ]
)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            [[], [(0, 0, 0), (1, 5, 6)]],
            "row 1: legal tuple 1 is (1, 5, 6); slot 2: 6 is outside 0..5, the range of enemy of "
            "attack",
        ),
        (
            [[(1, 5, 5)], [], [(4, 9, 0)], [(4, 9, 7)]],
            "row 2: legal tuple 0 is (4, 9, 0); slot 1: 9 is outside 0..8, the range of card of "
            "cast",
        ),
        (
            [[(0, 0, 0), (0, 1, 0)]],
            "row 0: legal tuple 1 is (0, 1, 0); slot 1: 1, but end_turn does not use this slot, "
            "so it must be 0",
        ),
        (
            [[(4, 8, 6), (2, 0, 0)]],
            "row 0: legal tuple 1 is (2, 0, 0); slot 0 (primary): 2 is not a primary of this spec",
        ),
        (
            [[(5, 0, 0)]],
            "row 0: legal tuple 0 is (5, 0, 0); slot 0 (primary): 5 is not a primary of this spec",
        ),
    ],
)
def test_validate_names_row_slot_and_value(lists: Lists, message: str) -> None:
    with pytest.raises(ValueError, match=r"^row \d") as refusal:
        LegalActions.from_lists(lists).validate(GAME)
    assert str(refusal.value) == message


@given(specs(), st.data())
def test_validate_finds_the_first_tuple_without_a_meaning(
    spec: ActionSpec, data: st.DataObject
) -> None:
    any_action = st.tuples(*(st.integers(0, int(size)) for size in spec.nvec))
    lists = data.draw(legal_lists(actions_of(spec)))
    LegalActions.from_lists(lists, slots=spec.slots).validate(spec)
    broken = data.draw(legal_lists(actions_of(spec) | any_action))
    legal = LegalActions.from_lists(broken, slots=spec.slots)
    problems = [
        f"row {row}: legal tuple {place} is {action}; {spec.explain(action)}"
        for row, actions in enumerate(broken)
        for place, action in enumerate(actions)
        if spec.explain(action) is not None
    ]
    if problems:
        with pytest.raises(ValueError, match=r"^row \d") as refusal:
            legal.validate(spec)
        assert str(refusal.value) == problems[0]
    else:
        legal.validate(spec)


# ---- devices


@pytest.mark.parametrize("device", DEVICES)
def test_everything_works_on_a_device(device: str) -> None:
    lists: Lists = [[(1, 2), (0, 1), (1, 2)], [], [(0, 0)]]
    here = LegalActions.from_lists(lists, noop=(1, 0))
    there = here.to(device)
    for name in ("actions", "counts", "noop", "rows", "starts", "ids"):
        tensor = getattr(there, name)
        assert tensor.device.type == device
        assert torch.equal(tensor.cpu(), getattr(here, name))
    assert there.to_lists() == lists
    once = there.distinct().to(torch.device(device))
    assert once.to_lists() == [[(1, 2), (0, 1)], [], [(0, 0)]]
    assert once.distinct() is once
    probes = torch.tensor([[0, 1], [1, 0], [0, 1]], device=device)
    assert there.contains(probes).tolist() == once.contains(probes).tolist() == [True, True, False]
    assert there.contains(probes.double()).tolist() == [True, True, False]
    masks = there.head_masks([2, 3])
    assert [mask.tolist() for mask in masks] == [m.tolist() for m in here.head_masks([2, 3])]
    assert there.prefix_mask(probes[:, :1], 3)[0].tolist() == [False, True, False]
    spec = ActionSpec.from_nvec([2, 3], noop=(1, 0))
    back = LegalActions.from_mask(there.to_mask(spec), spec)
    assert back.actions.device.type == back.noop.device.type == device
    assert back.to_lists() == [[(0, 1), (1, 2)], [], [(0, 0)]]
    there.validate(spec)
    room = torch.tensor([[[1, 2], [0, 1]]], device=device)
    padded_there = LegalActions.from_padded(room, torch.tensor([1], device=device))
    assert padded_there.actions.device.type == padded_there.noop.device.type == device
    assert padded_there.to_lists() == [[(1, 2)]]


def test_moving_keeps_what_is_known() -> None:
    spec = ActionSpec.from_nvec([3, 4])
    mask = torch.tensor([[True] * 2 + [False] * 10])
    moved = LegalActions.from_mask(mask, spec).to("cpu")
    assert moved.distinct() is moved
    assert moved.contains(torch.tensor([[0, 1]])).tolist() == [True]
    assert moved.ids.tolist() == [0, 1]


def test_repr() -> None:
    legal = LegalActions.from_lists([[(1, 2, 3), (0, 0, 0)], []])
    assert repr(legal) == "LegalActions(2 rows, 2 tuples, 2 slots)"


# ---- errors


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def two_rows() -> LegalActions:
    return LegalActions.from_lists([[(1, 2), (0, 1)], []], noop=(0, 1))


SPEC = ActionSpec.from_nvec([2, 3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # from lists
        (
            lambda: LegalActions.from_lists([[], []]),
            ValueError,
            r"^every list is empty: say how many slots a tuple has, slots=\.\.\.$",
        ),
        (
            lambda: LegalActions.from_lists([[(1, 2)], [(3, 4), (1, 2, 3)]]),
            ValueError,
            r"^row 1: \(1, 2, 3\) has 3 values, not 2$",
        ),
        (
            lambda: LegalActions.from_lists([[(1, 2)]], slots=2),
            ValueError,
            r"^row 0: \(1, 2\) has 2 values, not 3$",
        ),
        (
            lambda: LegalActions.from_lists([[(0, 1)], [(1, 2), (3, -4)]]),
            ValueError,
            r"^row 1: action \(3, -4\) is negative in slot 1$",
        ),
        (
            lambda: LegalActions.from_lists([[(0.5, 1)]]),  # type: ignore[list-item]
            TypeError,
            r"^row 0: \(0\.5, 1\) must be a tuple of whole numbers; a batch is a list of rows",
        ),
        (
            lambda: LegalActions.from_lists([[(True, False)]]),
            TypeError,
            r"^row 0: \(True, False\) must be a tuple of whole numbers",
        ),
        (
            lambda: LegalActions.from_lists([[("a", "b")]]),  # type: ignore[list-item]
            TypeError,
            r"^row 0: \('a', 'b'\) must be a tuple of whole numbers",
        ),
        (
            lambda: LegalActions.from_lists([[(0, 0)]], noop=(0,)),
            ValueError,
            r"^noop must be \(2,\), got \(1,\)$",
        ),
        (
            lambda: LegalActions.from_lists([[(0, 0)]], noop=(0, 0.5)),  # type: ignore[arg-type]
            TypeError,
            r"^noop: \(0, 0\.5\) must be a tuple of whole numbers",
        ),
        (
            lambda: LegalActions.from_lists([[(0, 0)], []], noop=(0, -1)),
            ValueError,
            r"noop \(0, -1\) must lie in 0\.\.",
        ),
        # the constructor
        (
            lambda: LegalActions(torch.zeros(2, 3), ints(1)),
            TypeError,
            r"^actions must be integers, got torch\.float32$",
        ),
        (
            lambda: LegalActions(ints(2, 3).bool(), ints(1)),
            TypeError,
            r"^actions must be integers, got torch\.bool$",
        ),
        (
            lambda: LegalActions(ints(2, 3), torch.zeros(1)),
            TypeError,
            r"^counts must be integers, got torch\.float32$",
        ),
        (
            lambda: LegalActions([[1, 2]], ints(1)),  # type: ignore[arg-type]
            TypeError,
            r"^actions must be an integer tensor, got list$",
        ),
        (
            lambda: LegalActions(ints(3), ints(1)),
            ValueError,
            r"^actions must be \(N, 1 \+ slots\), got \(3,\)$",
        ),
        (
            lambda: LegalActions(ints(3, 0), ints(1)),
            ValueError,
            r"^actions must be \(N, 1 \+ slots\), got \(3, 0\)$",
        ),
        (
            lambda: LegalActions(ints(3, 2), ints(1, 1)),
            ValueError,
            r"^counts must be \(B,\), got \(1, 1\)$",
        ),
        (
            lambda: LegalActions(ints(3, 2), torch.tensor([3]), ints(3)),
            ValueError,
            r"^noop must be \(2,\), got \(3,\)$",
        ),
        (
            lambda: LegalActions(ints(3, 2), torch.tensor([3]), torch.zeros(2)),
            TypeError,
            r"^noop must be integers, got torch\.float32$",
        ),
        (
            lambda: LegalActions(ints(3, 2), torch.tensor([1, 1])),
            ValueError,
            r"^counts sum to 2, but there are 3 actions$",
        ),
        (
            lambda: LegalActions(ints(3, 2), torch.tensor([3, -1])),
            ValueError,
            r"^row 1: count -1 must lie in 0\.\.3, the number of actions$",
        ),
        (
            lambda: LegalActions(torch.tensor([[0, 0], [-5, 0]]), torch.tensor([1, 0, 1])),
            ValueError,
            r"^row 2: action \(-5, 0\) is negative in slot 0$",
        ),
        # from padded
        (
            lambda: LegalActions.from_padded(torch.zeros(1, 2, 3), ints(1)),
            TypeError,
            r"^actions must be integers, got torch\.float32$",
        ),
        (
            lambda: LegalActions.from_padded(ints(1, 2, 3), torch.zeros(1)),
            TypeError,
            r"^counts must be integers, got torch\.float32$",
        ),
        (
            lambda: LegalActions.from_padded(ints(1, 2), ints(1)),
            ValueError,
            r"^actions must be \(B, K, H\) and counts \(B,\), got \(1, 2\) and \(1,\)$",
        ),
        (
            lambda: LegalActions.from_padded(ints(1, 2, 3), ints(2)),
            ValueError,
            r"^actions must be \(B, K, H\) and counts \(B,\), got \(1, 2, 3\) and \(2,\)$",
        ),
        (
            lambda: LegalActions.from_padded(ints(2, 2, 3), torch.tensor([2, 3])),
            ValueError,
            r"^row 1: count 3 must lie in 0\.\.2, the padded length$",
        ),
        (
            lambda: LegalActions.from_padded(ints(2, 2, 3), torch.tensor([-1, 1])),
            ValueError,
            r"^row 0: count -1 must lie in 0\.\.2",
        ),
        (
            lambda: LegalActions.from_padded(torch.tensor([[[0, 0], [0, -1]]]), torch.tensor([2])),
            ValueError,
            r"^row 0: action \(0, -1\) is negative in slot 1$",
        ),
        (
            lambda: LegalActions.from_padded(ints(1, 2, 3), ints(1), ints(2)),
            ValueError,
            r"^noop must be \(3,\), got \(2,\)$",
        ),
        # masks
        (
            lambda: LegalActions.from_mask(ints(1, 6), SPEC),
            TypeError,
            r"^mask must be bool, got torch\.int64$",
        ),
        (
            lambda: LegalActions.from_mask(ints(1, 5).bool(), SPEC),
            ValueError,
            r"^mask must be \(B, 6\), got \(1, 5\)$",
        ),
        (
            lambda: LegalActions.from_mask(ints(6).bool(), SPEC),
            ValueError,
            r"^mask must be \(B, 6\), got \(6,\)$",
        ),
        (
            lambda: LegalActions.from_lists([[(0, 3)]]).to_mask(SPEC),
            ValueError,
            r"^action value 3 at index \(0, 1\) is outside 0\.\.2$",
        ),
        # questions
        (
            lambda: two_rows().contains(ints(3, 2)),
            ValueError,
            r"^actions must be \(\*, 2, 2\), got \(3, 2\)$",
        ),
        (
            lambda: two_rows().contains(ints(2)),
            ValueError,
            r"^actions must be \(\*, 2, 2\), got \(2,\)$",
        ),
        (
            lambda: two_rows().contains(ints(2, 2).bool()),
            TypeError,
            r"^actions must be whole numbers, got torch\.bool$",
        ),
        (
            lambda: two_rows().contains(ints(2, 2).to(torch.complex64)),
            TypeError,
            r"^actions must be whole numbers, got torch\.complex64$",
        ),
        (
            lambda: two_rows().prefix_mask(torch.zeros(2, 1), 3),
            TypeError,
            r"^prefix must be integers, got torch\.float32$",
        ),
        (
            lambda: two_rows().prefix_mask(ints(2, 2), 3),
            ValueError,
            r"^prefix must be \(2, j\) with j < 2, got \(2, 2\)$",
        ),
        (lambda: two_rows().prefix_mask(ints(1, 1), 3), ValueError, r"^prefix must be \(2, j\) wi"),
        (lambda: two_rows().prefix_mask(ints(2), 3), ValueError, r"^prefix must be .* got \(2,\)$"),
        (
            lambda: two_rows().prefix_mask(ints(2, 1), 2),
            ValueError,
            r"^slot 1 holds value 2, not below its size 2$",
        ),
        (
            lambda: LegalActions.from_lists([[]], noop=(0, 4)).prefix_mask(ints(1, 1), 4),
            ValueError,
            r"^slot 1 holds value 4, not below its size 4$",
        ),
        (
            lambda: two_rows().head_masks([2]),
            ValueError,
            r"^nvec has 1 sizes, tuples have 2 values$",
        ),
        (
            lambda: two_rows().head_masks([1, 3]),
            ValueError,
            r"^slot 0 holds value 1, not below its size 1$",
        ),
        (
            lambda: two_rows().validate(ActionSpec.from_nvec([2, 3, 4])),
            ValueError,
            r"^tuples have 1 slots, the spec has 2$",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- what hostile tests found


@pytest.mark.parametrize("way", ["padded", "constructor", "lists", "mask"])
def test_lists_do_not_follow_the_caller_s_memory(way: str) -> None:
    spec = ActionSpec.from_nvec([2, 4], noop=(1, 3))
    actions, counts = torch.tensor([[1, 1], [0, 2]]), torch.tensor([1, 0, 1])
    noop = torch.tensor([1, 3])
    if way == "padded":
        actions = torch.tensor([[[1, 1], [1, 3]], [[0, 0], [0, 0]], [[0, 2], [0, 0]]])
        legal = LegalActions.from_padded(actions, counts, noop)
    elif way == "constructor":
        legal = LegalActions(actions, counts, noop)
    elif way == "lists":
        legal = LegalActions.from_lists([[(1, 1)], [], [(0, 2)]], noop=noop.tolist())
    else:
        mask = LegalActions(actions, counts, noop).to_mask(spec)
        legal = LegalActions.from_mask(mask, spec)
        mask.fill_(True)
        legal.noop[0] = 0
        assert spec.noop.tolist() == [1, 3]
        legal.noop[0] = 1
    counts.fill_(2)
    actions.fill_(3)
    noop.fill_(0)
    assert legal.to_lists() == [[(1, 1)], [], [(0, 2)]]
    assert legal.noop.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("lists", "error", "message"),
    [
        ([(0, 1), (1, 2)], TypeError, "row 0: 0 must be a tuple of whole numbers; a batch is a li"),
        ("ab", TypeError, "row 0: 'a' must be a tuple of whole numbers"),
        ([["ab"]], TypeError, "row 0: 'ab' must be a tuple of whole numbers"),
        ([[(0, 1)], [(0, 2**64)]], ValueError, "row 1: (0, 18446744073709551616) holds a value be"),
        ([[(0, 1)], [(0, 1, 2)]], ValueError, "row 1: (0, 1, 2) has 3 values, not 2"),
    ],
)
def test_lists_that_are_none(lists: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        LegalActions.from_lists(lists)


def test_unsigned_numbers_beyond_int64() -> None:
    huge = torch.from_numpy(np.array([2**63 + 1], np.uint64))
    with pytest.raises(ValueError, match=r"^row 0: count 9223372036854775809 must lie in 0\.\.2"):
        LegalActions.from_padded(ints(1, 2, 2), huge)
    with pytest.raises(
        ValueError, match=r"^row 0: action \(9223372036854775809,\) is beyond int64"
    ):
        LegalActions(huge.view(1, 1), torch.tensor([1]))


def test_a_mask_that_would_fill_the_memory_is_refused() -> None:
    spec = ActionSpec.from_nvec([1000, 1000, 10_000])
    legal = LegalActions.from_lists([[(0, 0, 0)]] * 100)
    with pytest.raises(ValueError, match=r"100 rows by 10000000000 ids takes .*take fewer rows at"):
        legal.to_mask(spec)


@given(legal_lists(actions_below([3, 4])), st.data())
def test_rows_can_be_chosen(lists: Lists, data: st.DataObject) -> None:
    legal = LegalActions.from_lists(lists, slots=1)
    mask = data.draw(st.lists(st.booleans(), min_size=len(lists), max_size=len(lists)))
    assert legal[torch.tensor(mask, dtype=torch.bool)].to_lists() == [
        row for row, kept in zip(lists, mask, strict=True) if kept
    ]
    assert legal[1:].to_lists() == lists[1:]
    if lists:
        numbers = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=6))
        chosen, at, rows = legal.select(torch.tensor(numbers, dtype=torch.int64))
        assert chosen.to_lists() == [lists[number] for number in numbers]
        assert rows.tolist() == numbers
        assert torch.equal(legal.actions[at], chosen.actions)
    with pytest.raises(IndexError):
        legal[torch.tensor([len(lists)])]
    with pytest.raises(TypeError, match=r"^rows are chosen by"):
        legal[torch.zeros(1)]


@given(legal_lists(actions_below([3, 4])), st.integers(1, 2**60))
def test_ids_of_large_values_are_ordered_as_the_tuples_are(lists: Lists, scale: int) -> None:
    """Beyond 2**63 ids are made of ranks: equal where tuples are, in their order."""
    most = max((value for row in lists for action in row for value in action), default=1)
    scale = min(scale, (2**63 - 1) // max(most, 1))
    large = [[tuple(value * scale for value in action) for action in row] for row in lists]
    legal = LegalActions.from_lists(large, slots=1)
    flat = [action for row in large for action in row]
    ids = legal.ids.tolist()
    for a, one in zip(flat, ids, strict=True):
        for b, other in zip(flat, ids, strict=True):
            assert (a < b, a == b) == (one < other, one == other)
    assert legal.distinct().to_lists() == [list(dict.fromkeys(row)) for row in large]
    for row, actions in enumerate(large):
        for action in actions:
            asked = torch.tensor([action] * len(large))
            assert bool(legal.contains(asked)[row])
