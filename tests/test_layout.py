"""Legal lists and fields in observations, against NumPy's own view of the same bytes."""

import copy
import itertools
import pickle
import re
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcg_flatpolicy import ActionSpec, Entity, Index, LegalLayout, Primary
from tests.strategies import (
    FLOATS,
    INTEGERS,
    PLACEMENTS,
    Action,
    Lists,
    Struct,
    leaves,
    lists_for,
    numpy_view,
    placed,
    random_bytes,
    records_in,
    structs,
    thousands,
)

pytestmark = pytest.mark.integration

NUMBERS = [np.dtype(name) for name in [*INTEGERS, *FLOATS]]


def layout_of(struct: Struct, spec: ActionSpec | None = None) -> LegalLayout:
    return LegalLayout.from_dtype(struct.dtype, struct.count, struct.actions, spec)


def read_as(array: np.ndarray) -> np.ndarray:
    """What a field is read as: torch has operations for few unsigned integers."""
    wider = {"uint16": "int32", "uint32": "int64"}
    return array.astype(wider.get(array.dtype.name, array.dtype))


def put(struct: Struct, data: np.ndarray, lists: Lists, clear: bool = False) -> None:
    """Writes lists into (B, itemsize) uint8 by NumPy's views, one number at a time."""
    counts, columns = struct.views(records_in(data, struct.dtype))
    for row, actions in enumerate(lists):
        counts[row] = len(actions)
        for j, column in enumerate(columns):
            for place in range(struct.padding):
                if place < len(actions):
                    column[row, place] = actions[place][j]
                elif clear:
                    column[row, place] = 0


# ---- any struct, as bytes


@settings(max_examples=150)
@given(structs(), st.integers(0, 99), st.data())
def test_read_gives_what_numpy_put_there(struct: Struct, seed: int, data: st.DataObject) -> None:
    lists = data.draw(lists_for(struct))
    rows = random_bytes(np.random.default_rng(seed), struct.dtype, len(lists))
    put(struct, rows, lists)
    layout = layout_of(struct)
    assert layout.padding == struct.padding
    for how in PLACEMENTS:
        observations = placed(rows, how)
        before = observations.clone()
        legal = layout.read(observations)
        assert legal.to_lists() == lists
        assert legal.counts.tolist() == [len(actions) for actions in lists]
        assert legal.noop.tolist() == [0] * struct.width
        assert legal.actions.dtype == torch.int64
        assert torch.equal(observations, before)


@settings(max_examples=150)
@given(structs(), st.integers(0, 99), st.data())
def test_write_touches_the_list_and_nothing_else(
    struct: Struct, seed: int, data: st.DataObject
) -> None:
    lists = data.draw(lists_for(struct))
    before = random_bytes(np.random.default_rng(seed), struct.dtype, len(lists))
    expected = before.copy()
    put(struct, expected, lists, clear=True)
    layout = layout_of(struct)

    as_bytes = before.copy()
    layout.write(as_bytes, lists)
    assert (as_bytes == expected).all()
    assert layout.read(torch.from_numpy(as_bytes)).to_lists() == lists

    home = np.full((2 * len(lists), before.shape[1] + 8), 7, dtype=np.uint8)
    inside = home[::2, 3:-5]  # every other row, at an odd address
    inside[:] = before
    layout.write(inside, lists)
    assert (inside == expected).all()
    assert (home[:, :3] == 7).all()
    assert (home[:, -5:] == 7).all()
    assert (home[1::2] == 7).all()

    if lists:
        as_records = before.copy()
        layout.write(records_in(as_records, struct.dtype), lists)
        assert (as_records == expected).all()


@settings(max_examples=100)
@given(structs(), st.integers(0, 3), st.integers(0, 99), st.sampled_from(PLACEMENTS))
def test_field_is_numpys_view(struct: Struct, rows: int, seed: int, how: str) -> None:
    data = random_bytes(np.random.default_rng(seed), struct.dtype, rows)
    records = records_in(data, struct.dtype)
    layout, observations = layout_of(struct), placed(data, how)
    for name in leaves(struct.dtype):
        expected = read_as(numpy_view(records, name))
        field = layout.field(observations, name)
        assert str(field.dtype) == f"torch.{expected.dtype}"
        assert field.shape == expected.shape
        assert field.numpy().tobytes() == expected.tobytes()


@settings(max_examples=150)
@given(structs(), st.integers(0, 99), st.data())
def test_list_view_says_where_read_finds_the_list(
    struct: Struct, seed: int, data: st.DataObject
) -> None:
    """As a kernel reads it: integer by integer from bytes."""
    lists = data.draw(lists_for(struct))
    rows = random_bytes(np.random.default_rng(seed), struct.dtype, len(lists))
    put(struct, rows, lists)
    view = layout_of(struct).list_view()
    assert all(type(n) is int for n in (view.row_bytes, view.room, *view.counts[:2]))

    def number(row: int, offset: int, size: int, signed: bool) -> int:
        raw = rows[row, offset : offset + size].tobytes()
        return int.from_bytes(raw, sys.byteorder, signed=signed)

    assert rows.shape[1] == view.row_bytes
    assert view.room == struct.padding
    found = [
        [
            tuple(number(row, c.offset + n * c.stride, c.size, c.signed) for c in view.columns)
            for n in range(number(row, *view.counts[:3]))
        ]
        for row in range(len(rows))
    ]
    assert found == lists
    assert found == layout_of(struct).read(torch.from_numpy(rows)).to_lists()
    dtypes = [v.dtype.kind == "i" for v in struct.views(np.zeros(1, struct.dtype))[1]]
    assert [c.signed for c in view.columns] == dtypes


def test_a_list_of_floats_has_no_list_view() -> None:
    layout = LegalLayout.from_dtype(FLOATING, "n", "legal")
    with pytest.raises(TypeError, match=r"^field 'n' must be integers, it is float32$"):
        layout.list_view()


@given(structs())
def test_fields_are_all_the_numbers(struct: Struct) -> None:
    layout = layout_of(struct)
    record = np.zeros(1, struct.dtype)
    found = {field.name: field for field in layout.fields()}
    assert list(found) == leaves(struct.dtype)
    for name, field in found.items():
        view = numpy_view(record, name)
        assert field.dtype == view.dtype
        assert field.shape == view.shape[1:]
        assert field.numbers == view.size
        assert str(field.torch_dtype) == f"torch.{read_as(view).dtype}"
        assert str(field.stored) == f"torch.{view.dtype}"
        assert field.offset == view.__array_interface__["data"][0] - record.ctypes.data
    names = {struct.actions} if isinstance(struct.actions, str) else set(struct.actions)
    assert {name for name, field in found.items() if layout.is_legal_list(field)} == {
        struct.count,
        *names,
    }


# ---- each way that a list can lie, one by one


@pytest.mark.parametrize("one_field", [True, False])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_tuples_of_any_width_anywhere(dtype: str, width: int, one_field: bool) -> None:
    """Tuples as wide as a machine word are read as one, which must not show, aligned or not."""
    size = np.dtype(dtype).itemsize
    most = min(np.iinfo(dtype).max, 2**63 - 2)
    lists: Lists = [[(1,) * width, tuple(range(width))], [], [(most,) * width] * 5]
    for offset, gap, order in itertools.product([0, 1, 8], [0, 1, size], [1, -1]):
        columns = [f"v{j}" for j in range(width)]
        row: Any = (dtype, (width,))
        if not one_field:
            row = np.dtype([(name, dtype) for name in columns[::order]])
        inner = {"names": ["row"], "formats": [row], "itemsize": size * width + gap}
        fields = {"n": ("u2", offset + 5 * inner["itemsize"])}
        fields["legal"] = ((np.dtype(inner), (5,)), offset)  # type: ignore[call-overload]
        names = tuple(f"legal.row.{name}" for name in columns)
        struct = Struct(
            np.dtype(fields),
            "n",
            "legal.row" if one_field else names,
            5,
            width,  # type: ignore[call-overload]
        )
        data = random_bytes(np.random.default_rng(0), struct.dtype, len(lists))
        put(struct, data, lists)
        layout = layout_of(struct)
        for how in PLACEMENTS[:3]:
            assert layout.read(placed(data, how)).to_lists() == lists


def test_columns_of_one_dtype_that_do_not_lie_together() -> None:
    column = ("u1", (4,))
    dtype = np.dtype({"a": (column, 0), "b": (column, 4), "n": ("u1", 8)})  # type: ignore[call-overload]
    struct = Struct(dtype, "n", ("a", "b"), 4, 2)
    lists: Lists = [[(1, 2), (3, 4), (5, 6)], [(255, 0)]]
    data = random_bytes(np.random.default_rng(0), dtype, 2)
    put(struct, data, lists)
    assert layout_of(struct).read(torch.from_numpy(data)).to_lists() == lists


@pytest.mark.parametrize("count", ["int8", "int64", "uint16", "uint64"])
@pytest.mark.parametrize("align", [True, False])
def test_lists_of_a_thousand(count: str, align: bool) -> None:
    dtype = np.dtype(
        [("hp", "f4"), ("n", "u2"), ("legal", [("at", "u1", (3,)), ("last", "u2")], (1024,))],
        align=align,
    )
    wide = np.dtype([("n", count if count != "int8" else "i2"), ("legal", "u1", (1024, 4))], align)
    lists = thousands(np.random.default_rng(0), [24, 50, 50, 50], rows=100, longest=1024)
    data = random_bytes(np.random.default_rng(1), wide, len(lists))
    layout = LegalLayout.from_dtype(wide, "n", "legal")
    layout.write(data, lists)
    assert layout.read(torch.from_numpy(data)).to_lists() == lists

    short = [[action[:3] for action in row] for row in lists]
    data = random_bytes(np.random.default_rng(1), dtype, len(lists))
    layout = LegalLayout.from_dtype(dtype, "n", "legal.at")
    layout.write(data, short)
    assert layout.read(torch.from_numpy(data)).to_lists() == short


def test_a_single_observation() -> None:
    dtype = np.dtype([("flag", "?"), ("hp", "f4"), ("n", "u2"), ("legal", "i4", (3, 2))])
    data = random_bytes(np.random.default_rng(0), dtype, 1)
    layout = LegalLayout.from_dtype(dtype, "n", "legal")
    layout.write(data, [[(7, 8), (9, 10)]])
    observation = torch.from_numpy(data)
    records = records_in(data, dtype)
    assert layout.read(observation).to_lists() == [[(7, 8), (9, 10)]]
    for name in ("hp", "n", "legal"):
        assert layout.field(observation, name).numpy().tobytes() == read_as(records[name]).tobytes()


def test_no_observations() -> None:
    dtype = np.dtype([("flag", "?"), ("hp", "f4", (2,)), ("n", "u2"), ("legal", "i4", (3, 2))])
    layout = LegalLayout.from_dtype(dtype, "n", "legal")
    none = torch.zeros(0, dtype.itemsize, dtype=torch.uint8)
    assert layout.read(none).to_lists() == []
    assert layout.read(none).actions.shape == (0, 2)
    assert layout.field(none, "hp").shape == (0, 2)
    layout.write(np.zeros((0, dtype.itemsize), np.uint8), [])
    layout.write(np.zeros(0, dtype), [])


def test_fields_without_a_number() -> None:
    dtype = np.dtype([("n", "u1"), ("legal", "u1", (3, 2)), ("none", "f8", (0,))])
    layout = LegalLayout.from_dtype(dtype, "n", "legal")
    observations = torch.zeros(2, dtype.itemsize, dtype=torch.uint8)
    assert layout.field(observations, "none").shape == (2, 0)
    assert layout.read(observations).to_lists() == [[], []]


def test_names_with_dots() -> None:
    inner = np.dtype([("n", "u1"), ("hp", "u1")])
    dtype = np.dtype([("legal.list", "u1", (2, 2)), ("me.now", inner), ("me", inner)])
    data = np.arange(8, dtype=np.uint8)[None]
    data[0, 4] = 1
    observations = torch.from_numpy(data)
    layout = LegalLayout.from_dtype(dtype, "me.now.n", "legal.list")
    assert layout.read(observations).to_lists() == [[(0, 1)]]
    assert layout.field(observations, "me.now.hp").tolist() == [5]
    assert layout.field(observations, "me.hp").tolist() == [7]


def test_fields_share_memory_where_they_can() -> None:
    dtype = np.dtype([("hp", "f4"), ("n", "u2"), ("legal", "u1", (3, 2))], align=True)
    layout = LegalLayout.from_dtype(dtype, "n", "legal")
    observations = torch.zeros(2, dtype.itemsize, dtype=torch.uint8)
    hp = layout.field(observations, "hp")
    assert hp.untyped_storage().data_ptr() == observations.untyped_storage().data_ptr()
    hp[1] = 3.5
    assert layout.field(observations, "hp").tolist() == [0, 3.5]


# ---- observations of one dtype


def as_numbers(data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """(B, numbers) of one dtype of (B, itemsize) uint8."""
    return data.view(dtype)


@given(st.sampled_from(NUMBERS), st.data())
def test_observations_of_one_dtype(dtype: np.dtype, data: st.DataObject) -> None:
    struct = data.draw(structs(only=dtype))
    lists = data.draw(lists_for(struct))
    layout = layout_of(struct)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = random_bytes(rng, struct.dtype, len(lists))  # floats full of NaN and inf among them
    put(struct, rows, lists)
    for how in PLACEMENTS:
        assert layout.read(placed(rows, how)).to_lists() == lists
        numbers = placed(as_numbers(rows, dtype), how)
        assert layout.read(numbers).to_lists() == lists
        for name in leaves(struct.dtype):
            expected = read_as(numpy_view(records_in(rows, struct.dtype), name))
            field = layout.field(numbers, name)
            assert str(field.dtype) == f"torch.{expected.dtype}"
            assert field.shape == expected.shape
            assert field.numpy().tobytes() == expected.tobytes()

    expected_bytes = rows.copy()
    put(struct, expected_bytes, lists, clear=True)
    written = as_numbers(rows.copy(), dtype)
    layout.write(written, lists)
    assert written.tobytes() == expected_bytes.tobytes()


@given(
    st.sampled_from(NUMBERS),
    st.sampled_from([*INTEGERS, *FLOATS, "bfloat16"]),
    st.sampled_from(PLACEMENTS),
    st.data(),
)
def test_one_dtype_given_as_another(
    dtype: np.dtype, other: str, how: str, data: st.DataObject
) -> None:
    struct = data.draw(structs(only=dtype))
    lists = data.draw(lists_for(struct, largest=100))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    shape = (len(lists), struct.dtype.itemsize // dtype.itemsize)
    numbers = rng.integers(0, 100, shape).astype(dtype)
    put(struct, numbers.view(np.uint8), lists)
    records = records_in(numbers.view(np.uint8), struct.dtype)
    layout = layout_of(struct)
    given_as = placed(torch.from_numpy(numbers).to(getattr(torch, other)), how)
    assert layout.read(given_as).to_lists() == lists
    for name in leaves(struct.dtype):
        expected = read_as(numpy_view(records, name))
        np.testing.assert_array_equal(layout.field(given_as, name).numpy(), expected, strict=True)


FLOATING = np.dtype([("n", "f4"), ("hp", "f4", (2,)), ("legal", "f4", (3, 2))])
WHOLE = np.dtype([("n", "i4"), ("hp", "i4", (2,)), ("legal", "i4", (3, 2))])


def two_floating() -> Tensor:
    """Row 0 with (1, 2), (3, 4), row 1 without an action; junk in state and padding."""
    nan, inf = float("nan"), float("inf")
    return torch.tensor(
        [[2, nan, 0.5, 1, 2, 3, 4, nan, 0.5], [0, inf, -0.0, -1, 0.5, nan, inf, -inf, 9]]
    )


def test_floats_hold_whole_numbers() -> None:
    layout = LegalLayout.from_dtype(FLOATING, "n", "legal")
    assert layout.read(two_floating()).to_lists() == [[(1, 2), (3, 4)], []]
    as_bytes = two_floating().view(torch.uint8)
    assert layout.read(as_bytes).to_lists() == [[(1, 2), (3, 4)], []]


@pytest.mark.parametrize("broken", [0.5, 1.5, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("column", "name"), [(0, "n"), (3, "legal[:, 0]"), (6, "legal[:, 1]")])
def test_floats_that_are_not_whole_raise(broken: float, column: int, name: str) -> None:
    layout = LegalLayout.from_dtype(FLOATING, "n", "legal")
    observations = two_floating()
    observations[0, column] = broken
    message = re.escape(f"{name} holds {broken}, which is not a whole number")
    for given_as in (observations, observations.view(torch.uint8)):
        with pytest.raises(ValueError, match=message):
            layout.read(given_as)


def test_floats_that_are_not_whole_are_said_with_their_row() -> None:
    layout = LegalLayout.from_dtype(FLOATING, "n", "legal")
    for column in (0, 3):
        observations = two_floating()
        observations[1, 0], observations[1, 3:5] = 1, 0
        observations[1, column] = 0.5
        with pytest.raises(ValueError, match=r"row 1\b"):
            layout.read(observations)


def test_numbers_that_the_dtype_does_not_hold_raise() -> None:
    layout = LegalLayout.from_dtype(WHOLE, "n", "legal")
    observations = torch.zeros(2, 9, dtype=torch.float64)
    for broken in (0.5, float("nan"), float("inf"), 2.0**31, -1e30):
        observations[1, 2] = broken
        message = re.escape(
            f"row 1: hp[1] is {broken}, which is no int32, the dtype of this layout"
        )
        with pytest.raises(ValueError, match=f"^{message}; .* cast the observations"):
            layout.read(observations)
    with pytest.raises(ValueError, match=r"^row 0: hp\[0\] is 4294967296, which is no int32"):
        layout.read(torch.tensor([[0, 2**32, 0, 0, 0, 0, 0, 0, 0]]))


def test_gaps_are_no_numbers() -> None:
    """Fields of one dtype with a gap between them are bytes, not a row of that dtype."""
    dtype = np.dtype({"n": ("i4", 0), "legal": (("i4", (3, 2)), 8)})  # type: ignore[call-overload]
    layout = LegalLayout.from_dtype(dtype, "n", "legal")
    with pytest.raises(TypeError, match=r"^observations are torch\.int32, but fields of several"):
        layout.read(torch.zeros(2, 7, dtype=torch.int32))
    assert layout.read(torch.zeros(2, 32, dtype=torch.uint8)).to_lists() == [[], []]


# ---- what reading checks

SPEC = ActionSpec(
    [
        Primary("end_turn"),
        Primary("attack", Entity("ally", 6), Entity("enemy", 6)),
        Primary("cast", Index("card", 9), id=4),
    ],
    noop=(4, 8, 0),
)
STRUCT = np.dtype(
    [("hp", "f4"), ("mask", [("primary", "i1", (4,)), ("sub", "i2", (4, 2)), ("count", "i1")])]
)
SLOTS = ("mask.primary", "mask.sub1", "mask.sub2")
BY_SLOT = np.dtype(
    [
        ("hp", "f4"),
        ("mask", [("primary", "i1", 4), ("sub1", "i2", 4), ("sub2", "i8", 4), ("count", "i1")]),
    ]
)
ONE_FIELD = np.dtype([("n", "i4"), ("legal", "i1", (4, 3)), ("hp", "f8")], align=True)
LAYOUTS = [
    (BY_SLOT, "mask.count", SLOTS),
    (ONE_FIELD, "n", "legal"),
    (np.dtype([("n", "i8"), ("legal", "i8", (4, 3))]), "n", "legal"),
    (np.dtype([("n", "f4"), ("legal", "f4", (4, 3))]), "n", "legal"),
    (np.dtype([("n", "i2"), ("legal", "i1", (4, 4)), ("x", "u1")]), "n", "legal"),
]


@pytest.mark.parametrize("place", range(4))
def test_a_count_that_cannot_be_is_named_with_its_row(place: int) -> None:
    struct = Struct(*LAYOUTS[place], 4, 3)  # type: ignore[arg-type]
    layout = layout_of(struct)
    for count in (5, 100, -1):
        data = np.zeros((3, struct.dtype.itemsize), np.uint8)
        struct.views(records_in(data, struct.dtype))[0][:] = [4, count, -2]
        with pytest.raises(ValueError, match=r"^row 1: ") as refusal:
            layout.read(torch.from_numpy(data))
        assert str(refusal.value) == (
            f"row 1: {struct.count} says {count} legal actions, outside 0..4, the room of "
            f"{struct.actions}"
        )


@pytest.mark.parametrize("place", range(5))
def test_negative_values_are_named_with_their_row(place: int) -> None:
    width = 4 if place == 4 else 3
    struct = Struct(*LAYOUTS[place], 4, width)  # type: ignore[arg-type]
    data = np.zeros((3, struct.dtype.itemsize), np.uint8)
    broken = tuple([1, 2, -3, 4][:width])
    put(struct, data, [[(1,) * width], [], [(0,) * width, broken]])
    with pytest.raises(ValueError, match=r"^row 2: ") as refusal:
        layout_of(struct).read(torch.from_numpy(data))
    assert str(refusal.value) == f"row 2: action {broken} is negative in slot 2"
    # In the padding it does not matter.
    counts, _ = struct.views(records_in(data, struct.dtype))
    counts[2] = 1
    legal = layout_of(struct).read(torch.from_numpy(data))
    assert legal.to_lists() == [[(1,) * width], [], [(0,) * width]]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    ("action", "problem"),
    [
        ((1, 5, 6), "slot 2: 6 is outside 0..5, the range of enemy of attack"),
        ((1, -1, 0), "slot 1: -1 is outside 0..5, the range of ally of attack"),
        ((0, 0, 1), "slot 2: 1, but end_turn does not use this slot, so it must be 0"),
        ((2, 0, 0), "slot 0 (primary): 2 is not a primary of this spec"),
        ((5, 0, 0), "slot 0 (primary): 5 is not a primary of this spec"),
        ((-1, 0, 0), "slot 0 (primary): -1 is not a primary of this spec"),
    ],
)
def test_values_outside_their_role_are_named_with_their_row(
    place: int, action: Action, problem: str
) -> None:
    struct = Struct(*LAYOUTS[place], 4, 3)  # type: ignore[arg-type]
    layout = layout_of(struct, SPEC)
    data = np.zeros((2, struct.dtype.itemsize), np.uint8)
    fine: Lists = [[(0, 0, 0), (4, 8, 0)], [(1, 5, 5), (1, 0, 1), (4, 0, 0)]]
    put(struct, data, fine)
    assert layout.read(torch.from_numpy(data)).to_lists() == fine
    put(struct, data, [fine[0], [(1, 5, 5), action]])
    with pytest.raises(ValueError, match=r"^row 1: ") as refusal:
        layout.read(torch.from_numpy(data))
    assert str(refusal.value) == f"row 1: legal tuple 1 is {action}; {problem}"


def test_numbers_beyond_int64_raise() -> None:
    dtype = np.dtype([("n", "u8"), ("legal", "u8", (2, 2))])
    layout = LegalLayout.from_dtype(dtype, "n", "legal")
    records = np.zeros(2, dtype)
    records["n"][1] = 1
    records["legal"][1, 0] = [0, 2**63]
    data = torch.from_numpy(records.view(np.uint8).reshape(2, -1))
    for spec in (None, ActionSpec.from_nvec([2, 2])):
        layout = LegalLayout.from_dtype(dtype, "n", "legal", spec)
        records["n"][1], records["legal"][1, 0] = 1, [0, 2**63]
        for how in PLACEMENTS[:2]:
            words = rf"^row 1: legal\[:, 1\] holds {2**63}, beyond int64"
            with pytest.raises(ValueError, match=words):
                layout.read(placed(data, how))
        records["legal"][1, 0] = 0
        records["n"][1] = 2**64 - 1
        for how in PLACEMENTS[:2]:
            with pytest.raises(ValueError, match=rf"^row 1: n says {2**64 - 1} legal actions, out"):
                layout.read(placed(data, how))


def test_an_empty_row_plays_the_specs_noop() -> None:
    layout = LegalLayout.from_dtype(ONE_FIELD, "n", "legal", spec=SPEC)
    legal = layout.read(torch.zeros(2, ONE_FIELD.itemsize, dtype=torch.uint8))
    assert legal.noop.tolist() == [4, 8, 0]
    noop = torch.tensor([[4, 8, 0], [0, 0, 0]])
    assert legal.contains(noop).tolist() == [True, False]
    assert not legal.contains(torch.tensor([[9, 9, 9], [-1, 0, 0]])).any()


def test_with_spec_changes_the_spec_alone() -> None:
    bare = LegalLayout.from_dtype(BY_SLOT, "mask.count", list(SLOTS))
    layout = bare.with_spec(SPEC)
    assert layout.spec is SPEC
    assert bare.spec is None
    assert (layout.dtype, layout.count_name) == (BY_SLOT, "mask.count")
    assert layout.action_names == SLOTS
    none = torch.zeros(1, BY_SLOT.itemsize, dtype=torch.uint8)
    assert bare.read(none).noop.tolist() == [0, 0, 0]
    assert layout.read(none).noop.tolist() == [4, 8, 0]


def test_repeats_are_read_as_listed() -> None:
    layout = LegalLayout.from_dtype(ONE_FIELD, "n", "legal", SPEC)
    data = np.zeros((1, ONE_FIELD.itemsize), np.uint8)
    layout.write(data, [[(1, 2, 3), (0, 0, 0), (1, 2, 3)]])
    legal = layout.read(torch.from_numpy(data))
    assert legal.to_lists() == [[(1, 2, 3), (0, 0, 0), (1, 2, 3)]]
    assert legal.distinct().to_lists() == [[(1, 2, 3), (0, 0, 0)]]


# ---- what writing refuses


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            [[(1, 1, 1)], [(0, 0, 0)] * 5],
            r"^row 1: 5 legal actions overflow the room for 4 in \('mask\.primary', 'mask\.sub1', "
            r"'mask\.sub2'\); give the field more room$",
        ),
        (
            [[(1, 1, 1)], [(2, 2, 2), (128, 0, 0)]],
            r"^row 1: 128 does not fit mask\.primary, which is int8$",
        ),
        (
            [[(1, 40000, 1)], [(2, 2, 2)]],
            r"^row 0: 40000 does not fit mask\.sub1, which is int16$",
        ),
        ([[(1, 1, 1)], [(0, 0, -1)]], r"^row 1: action \(0, 0, -1\) is negative in slot 2$"),
        ([[(1, 1, 1)], [(0, 0)]], r"^row 1: \(0, 0\) has 2 values, not 3$"),
        ([[(1, 1, 1)]], r"^1 lists for 2 observations$"),
        ([[(1, 1, 1)], [], []], r"^3 lists for 2 observations$"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(lists: Lists, message: str) -> None:
    layout = LegalLayout.from_dtype(BY_SLOT, "mask.count", SLOTS)
    data = random_bytes(np.random.default_rng(0), BY_SLOT, 2)
    before = data.copy()
    with pytest.raises(ValueError, match=message):
        layout.write(data, lists)
    assert (data == before).all()


def test_a_value_that_is_not_whole_is_refused_and_nothing_written() -> None:
    layout = LegalLayout.from_dtype(BY_SLOT, "mask.count", SLOTS)
    data = random_bytes(np.random.default_rng(0), BY_SLOT, 1)
    before = data.copy()
    with pytest.raises(TypeError, match=r"^row 0: \(1, 0\.5, 0\) must be a tuple of whole numbers"):
        layout.write(data, [[(1, 0.5, 0)]])  # type: ignore[list-item]
    assert (data == before).all()


def test_a_count_that_does_not_fit_its_field_is_refused() -> None:
    dtype = np.dtype([("n", "i1"), ("legal", "u1", (300, 2))])
    layout = LegalLayout.from_dtype(dtype, "n", "legal")
    data = np.full((2, dtype.itemsize), 7, np.uint8)
    with pytest.raises(ValueError, match=r"^row 1: 128 does not fit n, which is int8$"):
        layout.write(data, [[(1, 2)] * 127, [(1, 2)] * 128])
    assert (data == 7).all()
    layout.write(data, [[(1, 2)] * 127, []])
    assert layout.read(torch.from_numpy(data)).counts.tolist() == [127, 0]


@pytest.mark.parametrize(
    ("dtype", "value"), [("f4", 2**24 + 1), ("f2", 2049), ("f2", 70_000), ("f2", 2**62)]
)
def test_a_value_that_a_float_rounds_is_refused(dtype: str, value: int) -> None:
    struct = np.dtype([("n", dtype), ("legal", dtype, (2, 2))])
    layout = LegalLayout.from_dtype(struct, "n", "legal")
    data = np.zeros((2, struct.itemsize), np.uint8)
    message = rf"^row 1: {value} does not fit legal\[:, 1\], which is float\d\d$"
    with pytest.raises(ValueError, match=message):
        layout.write(data, [[], [(0, 0), (1, value)]])
    assert (data == 0).all()


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_records_in_a_column_are_refused_not_mixed_up(rows: int) -> None:
    """``observations.view(dtype)`` has shape (B, 1), and that is not (B,)."""
    layout = LegalLayout.from_dtype(ONE_FIELD, "n", "legal")
    records = np.zeros((rows, ONE_FIELD.itemsize), np.uint8).view(ONE_FIELD)
    with pytest.raises((TypeError, ValueError), match=r"^observations must be"):
        layout.write(records, [[(row, 0, 0)] for row in range(rows)])
    assert not records["legal"].any()


@pytest.mark.parametrize("one_dtype", [True, False])
def test_rows_that_do_not_follow_one_another_are_refused_with_the_way_out(one_dtype: bool) -> None:
    layout = LegalLayout.from_dtype(WHOLE if one_dtype else ONE_FIELD, "n", "legal")
    kind, width = (np.int32, 9) if one_dtype else (np.uint8, ONE_FIELD.itemsize)
    lists: Lists = [[(1,) * len(layout.columns)], [], []]
    for observations in (
        np.zeros((3, width), kind, order="F"),
        np.zeros((3, 2 * width), kind)[:, ::2],
        np.zeros((3, width), kind)[:, ::-1],
    ):
        with pytest.raises(ValueError, match=r"do not follow .* np\.ascontiguousarray\(observ"):
            layout.write(observations, lists)
        assert not observations.any()
        contiguous = np.ascontiguousarray(observations)
        layout.write(contiguous, lists)
        assert layout.read(torch.from_numpy(contiguous)).to_lists() == lists


def test_read_only_observations_are_refused_with_the_way_out() -> None:
    layout = LegalLayout.from_dtype(ONE_FIELD, "n", "legal")
    for observations in (np.zeros((1, ONE_FIELD.itemsize), np.uint8), np.zeros(1, ONE_FIELD)):
        observations.flags.writeable = False
        with pytest.raises(ValueError, match=r"^observations are read-only, .*\.copy\(\)$"):
            layout.write(observations, [[(1, 2, 3)]])
        layout.write(observations.copy(), [[(1, 2, 3)]])


# ---- fields as torch can use them


def test_wide_unsigned_fields_can_be_used() -> None:
    dtype = np.dtype(
        [("a", "u2", 2), ("b", "u4"), ("c", "u8"), ("n", "u1"), ("legal", "u1", (2, 1))]
    )
    layout = LegalLayout.from_dtype(dtype, "n", "legal")
    records = np.zeros(2, dtype)
    records["a"], records["b"], records["c"] = 65535, 2**32 - 1, 2**64 - 1
    observations = torch.from_numpy(records.view(np.uint8).reshape(2, -1))
    a, b, c = (layout.field(observations, name) for name in "abc")
    assert a.dtype == torch.int32
    assert (a + 1).tolist() == [[65536, 65536]] * 2
    assert b.dtype == torch.int64
    assert (b + 1)[torch.tensor([1])].tolist() == [2**32]
    assert c.dtype == torch.uint64
    assert c.tolist() == [2**64 - 1] * 2
    assert c.view(torch.int64).tolist() == [-1, -1]
    assert c.double().tolist() == [2.0**64] * 2


def test_another_byte_order_is_refused_with_the_way_out() -> None:
    other = {"little": ">", "big": "<"}[sys.byteorder]
    dtype = np.dtype([("hp", "i2", 2), ("n", "u1"), ("legal", "u2", (2, 2))])
    swapped = dtype.newbyteorder(other)
    with pytest.raises(TypeError, match=r"^field 'legal' is .u2, not in this .*newbyteorder"):
        LegalLayout.from_dtype(swapped, "n", "legal")
    mixed = np.dtype([("hp", f"{other}i2"), ("n", "u1"), ("legal", "u1", (2, 2))])
    layout = LegalLayout.from_dtype(mixed, "n", "legal")
    observations = torch.zeros(1, mixed.itemsize, dtype=torch.uint8)
    assert layout.read(observations).to_lists() == [[]]
    with pytest.raises(TypeError, match=r"^field 'hp' is .i2, not in this .*newbyteorder"):
        layout.field(observations, "hp")
    records = np.zeros(1, swapped)
    records["n"], records["legal"][0, 0], records["hp"] = 1, [258, 3], [4, 259]
    native = swapped.newbyteorder("=")
    layout = LegalLayout.from_dtype(native, "n", "legal")
    observations = torch.from_numpy(records.astype(native).view(np.uint8).reshape(1, -1))
    assert layout.read(observations).to_lists() == [[(258, 3)]]
    assert layout.field(observations, "hp").tolist() == [[4, 259]]


# ---- equal layouts


def test_layouts_are_equal_by_what_they_say_of_bytes() -> None:
    one = LegalLayout.from_dtype(BY_SLOT, "mask.count", SLOTS)
    same = [
        LegalLayout.from_dtype(BY_SLOT.descr, "mask.count", list(SLOTS), SPEC),
        one.with_spec(SPEC),
        copy.deepcopy(one),
        pickle.loads(pickle.dumps(one.with_spec(SPEC))),
    ]
    assert {one, *same} == {one}
    for other in (
        LegalLayout.from_dtype(BY_SLOT, "mask.count", SLOTS[::-1]),
        LegalLayout.from_dtype(ONE_FIELD, "n", "legal"),
        LegalLayout.from_dtype(np.dtype([*BY_SLOT.descr, ("more", "u1")]), "mask.count", SLOTS),
        "mask.count",
    ):
        assert one != other


# ---- what a layout refuses

OTHERS = np.dtype(
    [
        ("n", "i4"),
        ("legal", "i2", (3, 2)),
        ("a", "u1", (3,)),
        ("b", "u1", (4,)),
        ("hp", "f4"),
        ("x", "f4", (3, 2)),
        ("flag", "?"),
        ("two", "i4", (2,)),
        ("me", [("hp", "i2"), ("armour", "i2")]),
    ]
)


@pytest.mark.parametrize(
    ("dtype", "count", "actions", "error", "message"),
    [
        (np.uint8, "n", "legal", TypeError, r"^an observation needs a structured .* got uint8$"),
        (OTHERS, "m", "legal", KeyError, r"no field 'm'; there are n, legal, a, b, hp, x, flag"),
        (OTHERS, "n", "illegal", KeyError, r"no field 'illegal'; there are n, legal, a"),
        (OTHERS, "n", ("a", "c"), KeyError, r"no field 'c'; there are"),
        (OTHERS, "me.n", "legal", KeyError, r"no field 'n'; there are hp, armour"),
        (OTHERS, "n.n", "legal", KeyError, r"no field 'n': int32 has no fields"),
        (OTHERS, "me", "legal", TypeError, r"^'me' is a struct; name one of .* \('hp', 'armour'\)"),
        (OTHERS, "hp", "legal", TypeError, r"^field 'hp' must be integers, it is float32$"),
        (OTHERS, "flag", "legal", TypeError, r"^field 'flag' must be integers, it is bool$"),
        (OTHERS, "n", "x", TypeError, r"^field 'x' must be integers, it is float32$"),
        (OTHERS, "two", "legal", ValueError, r"^count field 'two' must be one number, .* \(2,\)$"),
        (OTHERS, "n", "a", ValueError, r"^field 'a' must be \(K, H\), it is \(3,\); .* a tuple$"),
        (OTHERS, "n", (), ValueError, r"^actions names no field$"),
        (
            [("n", "i4"), ("legal", "i2", (3, 0))],
            "n",
            "legal",
            ValueError,
            r"^field 'legal' is \(3, 0\): its tuples have no values$",
        ),
        (
            OTHERS,
            "n",
            ("a", "b"),
            ValueError,
            r"^the fields of a tuple must all be \(K,\): 'a' is \(3,\), 'b' is \(4,\)$",
        ),
        (OTHERS, "n", ("legal", "a"), ValueError, r"'legal' is \(3, 2\), 'legal' is \(3, 2\)$"),
        (OTHERS, "n", ("a", "me.hp"), ValueError, r"'a' is \(3,\), 'me\.hp' is \(\)$"),
        ([("n", ">i4"), ("legal", "i2", (3, 2))], "n", "legal", TypeError, r"^field 'n' is >i4, n"),
    ],
)
def test_from_dtype_errors(
    dtype: Any, count: str, actions: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LegalLayout.from_dtype(dtype, count, actions)


def test_a_field_that_torch_does_not_have_blocks_no_other() -> None:
    dtype = np.dtype([("n", "i4"), ("legal", "i2", (3, 2)), ("name", "S8")])
    layout = LegalLayout.from_dtype(dtype, "n", "legal")
    records = np.zeros(2, dtype)
    layout.write(records, [[(1, 2)], []])
    observations = torch.from_numpy(records.view(np.uint8).reshape(2, -1))
    assert layout.read(observations).to_lists() == [[(1, 2)], []]
    with pytest.raises(TypeError, match=r"^field 'name' is \|S8, which torch does not have$"):
        layout.field(observations, "name")
    with pytest.raises(TypeError, match=r"^field 'name' is \|S8, which torch does not have$"):
        list(layout.fields())


@pytest.mark.parametrize(
    ("given", "stored", "value"),
    [
        ("float64", "float32", 16777217.0),
        ("float64", "float32", 0.1),
        ("float32", "float16", 2049.0),
        ("float32", "float16", 1e6),
        ("int64", "float32", 2**24 + 1),
        ("int64", "float32", 2**63 - 1),
        ("int64", "float64", 2**63 - 1),
        ("int32", "float16", 2**31 - 1),
        ("int16", "float16", 2049),
    ],
)
def test_a_number_that_the_layout_would_round_is_refused(
    given: str, stored: str, value: float
) -> None:
    dtype = np.dtype([("x", stored, 2), ("n", stored), ("legal", stored, (2, 1))])
    layout = LegalLayout.from_dtype(dtype, "n", "legal")
    observations = torch.zeros(2, 5, dtype=getattr(torch, given))
    observations[1, 1] = value
    words = rf"^row 1: x\[1\] is {re.escape(str(value))}, which is no {stored}, .*cast the observ"
    for read in (layout.read, lambda o: layout.field(o, "x"), layout.as_bytes):
        with pytest.raises(ValueError, match=words):
            read(observations)


def test_what_a_narrower_float_holds_exactly_is_read() -> None:
    layout = LegalLayout.from_dtype(
        [("x", "f4", 3), ("n", "f4"), ("legal", "f4", (2, 1))], "n", "legal"
    )
    nan, inf = float("nan"), float("inf")
    observations = torch.tensor([[0.5, nan, -inf, 1, 3, 0]], dtype=torch.float64)
    assert layout.read(observations).to_lists() == [[(3,)]]
    expected = torch.tensor([[0.5, nan, -inf]])
    torch.testing.assert_close(layout.field(observations, "x"), expected, equal_nan=True)


@given(st.sampled_from(["bfloat16", "float16", "float32"]), st.sampled_from(["int64", "float64"]))
def test_the_list_in_floats_is_read_up_to_what_they_tell_apart(given_as: str, stored: str) -> None:
    """(1, 2051) in half precision is (1, 2052), an action of another number."""
    dtype = getattr(torch, given_as)
    layout = LegalLayout.from_dtype([("n", stored), ("legal", stored, (2, 2))], "n", "legal")
    # By torch itself: the first number that another one is rounded to.
    most = next(e for e in range(70) if torch.tensor(2**e + 1).to(dtype).double() == 2.0**e)
    for value in (2**most - 1, 1):
        observations = torch.tensor([[0, 0, 0, 0, 0], [2, 0, 0, 1, value]]).to(dtype)
        assert layout.read(observations).to_lists() == [[], [(0, 0), (1, value)]]
    for value in (2**most, 2**most + 1, 2**most + 3, 2 ** (most + 2)):
        observations = torch.tensor([[0, 0, 0, 0, 0], [2, 0, 0, 1, value]]).to(dtype)
        words = rf"^row 1: legal\[:, 1\] holds \d+, .*{given_as} counts exactly below {2**most} "
        with pytest.raises(ValueError, match=words):
            layout.read(observations)
        observations[1, 0] = 1  # in the padding it does not matter
        assert layout.read(observations).to_lists() == [[], [(0, 0)]]


def test_a_count_that_may_have_been_rounded_is_refused() -> None:
    layout = LegalLayout.from_dtype([("n", "i4"), ("legal", "i4", (300, 1))], "n", "legal")
    observations = torch.zeros(2, 301, dtype=torch.bfloat16)
    observations[1, 0] = 257  # 256 in bfloat16
    with pytest.raises(ValueError, match=r"^row 1: n holds 256, which may be another number"):
        layout.read(observations)
    assert layout.read(observations.int()).counts.tolist() == [0, 256]


def test_a_float_beyond_int64_is_named() -> None:
    layout = LegalLayout.from_dtype(FLOATING, "n", "legal", ActionSpec.from_nvec([9, 9]))
    observations = two_floating()
    observations[0, 3] = 1e30
    with pytest.raises(ValueError, match=r"^row 0: legal\[:, 0\] holds 1\.0\d*e\+30, which is not"):
        layout.read(observations)


def test_a_sign_is_not_lost_in_a_layout_without() -> None:
    layout = LegalLayout.from_dtype([("n", "u1"), ("legal", "u1", (2, 1))], "n", "legal")
    with pytest.raises(ValueError, match=r"row 0: legal\[0, 0\] is -1, which is no uint8"):
        layout.read(torch.tensor([[1, -1, 0]], dtype=torch.int8))


def test_arrays_are_refused_with_the_way_out() -> None:
    layout = LegalLayout.from_dtype([("n", "i4"), ("legal", "i2", (3, 2))], "n", "legal")
    with pytest.raises(TypeError, match=r"must be a tensor, got ndarray; torch.as_tensor"):
        layout.read(np.zeros((1, 16), np.uint8))  # type: ignore[arg-type]


def others() -> LegalLayout:
    return LegalLayout.from_dtype(OTHERS, "n", "legal")


def numbers() -> LegalLayout:
    return LegalLayout.from_dtype(WHOLE, "n", "legal")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: others().with_spec(ActionSpec.from_nvec([2, 3, 4])),
            ValueError,
            r"^the layout's tuples have 2 values, the spec's 3$",
        ),
        (
            lambda: others().read(torch.zeros(2, 9, dtype=torch.uint8)),
            ValueError,
            rf"^observations have 9 bytes, the layout {OTHERS.itemsize}$",
        ),
        (
            lambda: others().read(torch.zeros(2, OTHERS.itemsize)),
            TypeError,
            r"^observations are torch\.float32, but fields of several dtypes are read from bytes",
        ),
        (
            lambda: others().read(torch.zeros(OTHERS.itemsize, dtype=torch.uint8)),
            ValueError,
            r"^observations must be \(B, columns\), got \(\d+,\)$",
        ),
        (
            lambda: numbers().read(torch.zeros(2, 8)),
            ValueError,
            r"^observations have 8 columns, the layout 9$",
        ),
        (
            lambda: numbers().read(torch.zeros(2, 3, 9)),
            ValueError,
            r"^observations must be \(B, columns\), got \(2, 3, 9\)$",
        ),
        (
            lambda: others().field(torch.zeros(1, OTHERS.itemsize, dtype=torch.uint8), "mana"),
            KeyError,
            r"no field 'mana'; there are n, legal",
        ),
        (
            lambda: others().field(torch.zeros(1, OTHERS.itemsize, dtype=torch.uint8), "me"),
            TypeError,
            r"^'me' is a struct",
        ),
        (
            lambda: others().write(torch.zeros(1, 9), [[]]),  # type: ignore[arg-type]
            TypeError,
            r"^write takes a NumPy array, got Tensor$",
        ),
        (
            lambda: others().write(np.zeros((1, OTHERS.itemsize), np.int8), [[]]),
            TypeError,
            rf"^observations must be \(B, {OTHERS.itemsize}\) uint8 or \(B,\) records, got "
            rf"\(1, {OTHERS.itemsize}\) int8$",
        ),
        (
            lambda: others().write(np.zeros(OTHERS.itemsize, np.uint8), [[]]),
            TypeError,
            r"^observations must be .* got \(\d+,\) uint8$",
        ),
        (
            lambda: others().write(np.zeros((1, 9), np.uint8), [[]]),
            ValueError,
            rf"^an observation has 9 bytes, the layout {OTHERS.itemsize}$",
        ),
        (
            lambda: numbers().write(np.zeros((1, 9), np.float32), [[]]),
            TypeError,
            r"^observations must be .* got \(1, 9\) float32$",
        ),
        (
            lambda: numbers().write(np.zeros((1, 8), np.int32), [[]]),
            ValueError,
            r"^an observation has 32 bytes, the layout 36$",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_repr() -> None:
    assert repr(others()) == (
        f"LegalLayout({OTHERS.itemsize} bytes, count='n', actions='legal', room for 3)"
    )


# ---- environments


class Duel(gymnasium.Env):
    """A Gymnasium environment whose observation lists what is legal."""

    action_space = spaces.MultiDiscrete([5, 9, 6])
    action_spec: ActionSpec | None = SPEC

    def __init__(self, space: spaces.Dict, observation: dict[str, Any]) -> None:
        self.observation_space = space
        self.observation = observation

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.observation, {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        return self.observation, 0.0, False, False, {}


def box(dtype: Any, *shape: int) -> spaces.Box:
    return spaces.Box(0, 99, shape, dtype)


LEGAL = [(0, 0, 0), (1, 5, 3), (4, 8, 0)]


def nested_duel() -> Duel:
    """The list one field a slot, of three dtypes, inside a nested Dict."""
    mask: dict[str, Any] = {"count": np.array([3], np.int16)}
    for j, (name, dtype) in enumerate([("primary", "u1"), ("sub1", "u2"), ("sub2", "i8")]):
        mask[name] = np.array([*(action[j] for action in LEGAL), 77], dtype)
    observation = {
        "me": {"hp": np.array(12.5, np.float32), "hand": np.arange(6, dtype=np.int32)},
        "turn": 7,
        "mask": mask,
    }
    space = spaces.Dict(
        me=spaces.Dict(hp=box(np.float32), hand=box(np.int32, 6)),
        turn=spaces.Discrete(30),
        mask=spaces.Dict(
            count=box(np.int16, 1),
            primary=box(np.uint8, 4),
            sub1=box(np.uint16, 4),
            sub2=box(np.int64, 4),
        ),
    )
    return Duel(space, observation)


def flat_duel(count: tuple[spaces.Space, Any], dtype: str) -> Duel:
    """A count and one (4, 3) list of a dtype."""
    legal = np.array([*LEGAL, (77, 77, 77)], dtype)
    return Duel(
        spaces.Dict(n=count[0], legal=box(np.dtype(dtype), 4, 3)), {"n": count[1], "legal": legal}
    )


def emulated(env: Duel, **kwargs: Any) -> Any:
    emulation = pytest.importorskip("pufferlib.emulation")
    return emulation.GymnasiumPufferEnv(env, **kwargs)


class Around:
    """A wrapper that says nothing about observations."""

    def __init__(self, env: Any) -> None:
        self.env = env


def test_from_an_emulated_environment() -> None:
    env = emulated(nested_duel())
    observations = torch.as_tensor(env.reset(seed=0)[0])
    assert observations.dtype == torch.uint8
    for layer in (env, Around(env), Around(Around(env)), gymnasium.Wrapper(env)):
        layout = LegalLayout.from_env(layer, "mask.count", SLOTS)
        assert layout.spec is SPEC
        legal = layout.read(observations)
        assert legal.to_lists() == [LEGAL]
        assert legal.noop.tolist() == [4, 8, 0]
        assert layout.field(observations, "me.hp").tolist() == [12.5]
        assert layout.field(observations, "me.hand").tolist() == [list(range(6))]
        assert layout.field(observations, "turn").tolist() == [7]
    layout.write(env.observations, [[(1, 1, 1)]])
    assert env.obs_struct["mask"]["primary"].tolist() == [[[1, 0, 0, 0]]]
    assert layout.read(torch.as_tensor(env.observations)).to_lists() == [[(1, 1, 1)]]


def test_from_env_takes_the_spec_it_is_given() -> None:
    env = emulated(nested_duel())
    other = ActionSpec.from_nvec([9, 99, 99])
    assert LegalLayout.from_env(env, "mask.count", SLOTS, spec=other).spec is other
    env.env.action_spec = None
    assert LegalLayout.from_env(env, "mask.count", SLOTS).spec is None


@pytest.mark.parametrize("dtype", ["float32", "int16", "int32", "uint8"])
def test_an_emulated_environment_of_one_dtype(dtype: str) -> None:
    env = emulated(flat_duel((box(np.dtype(dtype), 1), np.array([3], dtype)), dtype))
    observations = torch.as_tensor(env.reset(seed=0)[0])
    assert observations.dtype == getattr(torch, dtype)
    assert observations.shape == (1, 13)
    layout = LegalLayout.from_env(env, "n", "legal")
    assert layout.read(observations).to_lists() == [LEGAL]
    assert layout.read(observations.float()).to_lists() == [LEGAL]


def test_an_emulated_discrete_beside_int64() -> None:
    """PufferLib stores a Discrete as int32 but counts it as int64, so these bytes come as int64."""
    env = emulated(flat_duel((spaces.Discrete(5), 3), "int64"))
    observations = torch.as_tensor(env.reset(seed=0)[0])
    assert observations.dtype == torch.int64
    layout = LegalLayout.from_env(env, "n", "legal")
    assert layout.read(observations).to_lists() == [LEGAL]
    assert layout.field(observations, "n").tolist() == [3]


def test_an_emulated_discrete_beside_multidiscretes() -> None:
    """All of these are int32 in memory, and again PufferLib calls their bytes int64."""
    names = ("primary", "sub1", "sub2")
    columns = {name: np.array([*(a[j] for a in LEGAL), 0]) for j, name in enumerate(names)}
    slots = {name: spaces.MultiDiscrete([SPEC.nvec[j]] * 4) for j, name in enumerate(names)}
    space = spaces.Dict(n=spaces.Discrete(5), turn=spaces.MultiDiscrete([9] * 3), **slots)
    env = emulated(Duel(space, {"n": 3, "turn": np.array([8, 0, 1]), **columns}))
    observations = torch.as_tensor(env.reset(seed=0)[0])
    assert observations.dtype == torch.int64
    assert observations.shape == (1, 8)
    layout = LegalLayout.from_env(env, "n", names)
    assert layout.read(observations).to_lists() == [LEGAL]
    assert layout.field(observations, "turn").tolist() == [[8, 0, 1]]


def test_from_the_driver_of_vectorised_environments() -> None:
    vector = pytest.importorskip("pufferlib.vector")
    vecenv = vector.make(
        emulated, env_args=[nested_duel()], backend=vector.Serial, num_envs=2, seed=0
    )
    layout = LegalLayout.from_env(vecenv, "mask.count", SLOTS)
    assert layout.spec is SPEC
    vecenv.async_reset(0)
    assert layout.read(torch.as_tensor(vecenv.recv()[0])).to_lists() == [LEGAL, LEGAL]


def test_from_a_native_environment() -> None:
    pytest.importorskip("pufferlib")
    pytest.importorskip("essence_wars")
    from tcg_flatpolicy.games.essence_wars import OBSERVATION_DTYPE, EssenceWars

    env = EssenceWars(num_games=4, seed=1)
    observations, _ = env.reset()
    records = records_in(observations, OBSERVATION_DTYPE)
    for layer in (env, Around(env)):
        layout = LegalLayout.from_env(layer, count="n_legal", actions="legal")
        assert layout.spec is env.action_spec
        assert layout.dtype == OBSERVATION_DTYPE
        legal = layout.read(torch.as_tensor(observations))
        expected = [
            [tuple(action) for action in record["legal"][: record["n_legal"]].tolist()]
            for record in records
        ]
        assert min(map(len, expected)) > 0
        assert legal.to_lists() == expected
        state = layout.field(torch.as_tensor(observations), "state")
        np.testing.assert_array_equal(state.numpy(), records["state"], strict=True)


class Native:
    """A native environment that says of itself that it is an emulated console."""

    observation_dtype = ONE_FIELD
    action_spec = SPEC

    def __init__(self, emulated: Any) -> None:
        self.emulated = emulated


@pytest.mark.parametrize(
    "said", [{"console": "gba"}, True, {"emulated_observation_dtype": BY_SLOT}]
)
def test_an_attribute_emulated_is_no_emulation(said: Any) -> None:
    env = Native(said)
    for layer in (env, Around(env)):
        layout = LegalLayout.from_env(layer, "n", "legal")
        assert layout.dtype == ONE_FIELD
        assert layout.spec is SPEC


def test_from_env_without_a_structured_observation() -> None:
    message = (
        r"has no structured observation: it is neither emulated from a Dict space nor has an "
        r"observation_dtype; use LegalLayout\.from_dtype\(dtype, \.\.\.\)$"
    )
    with pytest.raises(TypeError, match=f"^Around {message}"):
        LegalLayout.from_env(Around(nested_duel()), "n", "legal")
    plain = nested_duel()
    plain.observation_space = box(np.float32, 3)  # type: ignore[assignment]
    with pytest.raises(TypeError, match=f"^GymnasiumPufferEnv {message}"):
        LegalLayout.from_env(emulated(plain), "n", "legal")
    loop = Around(None)
    loop.env = loop
    with pytest.raises(TypeError, match=f"^Around {message}"):
        LegalLayout.from_env(loop, "n", "legal")


def test_what_read_gives_does_not_change_with_the_buffer() -> None:
    """A list of several dtypes, with a count that is int64 already."""
    dtype = np.dtype([("n", np.int64), ("a", np.int64, 3), ("b", np.int32, 3), ("x", np.int32)])
    layout = LegalLayout.from_dtype(dtype, "n", ("a", "b"))
    records = np.zeros(2, dtype)
    records["n"] = [1, 2]
    legal = layout.read(torch.as_tensor(records.view(np.uint8).reshape(2, -1)))
    records["n"] = 3
    assert legal.counts.tolist() == [1, 2]


def test_a_number_that_becomes_infinite_is_refused() -> None:
    dtype = np.dtype([("x", np.float32), ("n", np.float32), ("a", np.float32, (2, 1))])
    layout = LegalLayout.from_dtype(dtype, "n", "a")
    observations = torch.tensor([[1e300, 1.0, 0.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"row 0: x is 1e\+300, which is no float32"):
        layout.read(observations)
