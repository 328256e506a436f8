"""Hypothesis strategies that several test files share: tcg_flatpolicy.testing's, and structs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tcg_flatpolicy.testing import Action, Lists, legal_lists, plain_roles, roles, specs
from tcg_flatpolicy.testing import actions as actions_of

__all__ = ["Action", "Lists", "actions_of", "legal_lists", "plain_roles", "roles", "specs"]

Draw = Callable[[st.SearchStrategy[Any]], Any]

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
FLOATS = ["float16", "float32", "float64"]

# ---- legal lists


def actions_below(nvec: list[int]) -> st.SearchStrategy[Action]:
    """Any tuple of ``MultiDiscrete(nvec)``."""
    return st.tuples(*(st.integers(0, int(size) - 1) for size in nvec))


def thousands(rng: np.random.Generator, nvec: list[int], rows: int, longest: int) -> Lists:
    """Big lists: some rows empty, some with repeats, the longest with ``longest`` tuples."""
    lengths = rng.integers(0, longest + 1, rows) * (rng.random(rows) < 0.7)
    lengths[rng.integers(rows)] = longest
    return [
        [tuple(action) for action in rng.integers(0, nvec, (length, len(nvec))).tolist()]
        for length in lengths
    ]


# ---- struct dtypes

Leaf = tuple[np.dtype, tuple[int, ...]]
"""A field's dtype and shape."""


@dataclass
class Struct:
    """A drawn struct, where a legal list lies in it, and how it was drawn."""

    dtype: np.dtype
    count: str
    actions: str | tuple[str, ...]
    padding: int
    width: int

    def views(self, records: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """NumPy's own views of the count (B,) and of each column (B, K) of the list."""
        count = numpy_view(records, self.count).reshape(len(records))
        if isinstance(self.actions, str):
            array = numpy_view(records, self.actions)
            return count, [array[:, :, j] for j in range(self.width)]
        return count, [numpy_view(records, name) for name in self.actions]


def numpy_view(records: np.ndarray, path: str) -> np.ndarray:
    """A dotted name, one step after the other."""
    for name in path.split("."):
        records = records[name]
    return records


def leaves(dtype: np.dtype, prefix: str = "") -> list[str]:
    """The dotted name of each field that is not a struct."""
    found: list[str] = []
    for name in dtype.names or ():
        inner = dtype[name].base
        found += leaves(inner, f"{prefix}{name}.") if inner.names else [prefix + name]
    return found


@st.composite
def filler(draw: Draw, depth: int, only: np.dtype | None) -> Leaf:
    """A field that is no part of the list: number, subarray, struct or array of structs."""
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    if depth and draw(st.integers(0, 2)) == 0:
        return draw(struct_with(depth - 1, {}, only))[0], shape
    return only or np.dtype(draw(st.sampled_from(["bool", *INTEGERS, *FLOATS]))), shape


@st.composite
def struct_with(
    draw: Draw, depth: int, wanted: dict[str, Leaf], only: np.dtype | None
) -> tuple[np.dtype, dict[str, str]]:
    """A struct with the wanted fields somewhere in it; with ``only``, all else is of that dtype.

    Returns:
        Its dtype, packed, aligned or with offsets of its own (with ``only``, without gaps); the
        dotted name of each wanted field.
    """
    here = dict(wanted)
    paths = {name: name for name in wanted}
    fields: list[tuple[str, Leaf]] = []
    for inner in range(draw(st.integers(0, 2)) if depth else 0):
        moved = {name: here.pop(name) for name in list(here) if draw(st.booleans())}
        dtype, inside = draw(struct_with(depth - 1, moved, only))
        fields.append((f"s{inner}", (dtype, ())))
        paths.update({name: f"s{inner}.{inside[name]}" for name in moved})
    fields += here.items()
    fillers = draw(st.integers(0 if fields else 1, 2))
    fields += [(f"x{number}", draw(filler(depth, only))) for number in range(fillers)]
    fields = draw(st.permutations(fields))
    names, formats = [name for name, _ in fields], [leaf for _, leaf in fields]
    kind = "packed" if only else draw(st.sampled_from(["packed", "aligned", "offsets"]))
    if kind != "offsets":
        listed = [(name, *leaf) for name, leaf in zip(names, formats, strict=True)]
        return np.dtype(listed, align=kind == "aligned"), paths
    offsets = [0] * len(fields)
    end = 0
    for place in draw(st.permutations(range(len(fields)))):  # memory need not follow the names
        offsets[place] = end + draw(st.integers(0, 5))
        end = offsets[place] + np.dtype(formats[place]).itemsize
    itemsize = end + draw(st.integers(0, 5))
    described = {"names": names, "formats": formats, "offsets": offsets, "itemsize": itemsize}
    return np.dtype(described), paths  # type: ignore[call-overload]


@st.composite
def structs(draw: Draw, only: np.dtype | None = None, max_padding: int = 5) -> Struct:
    """Structs with a legal list in any of the forms that a layout reads.

    With ``only``, all numbers are of that dtype (it may be a floating one), without gaps.
    """
    padding, width = draw(st.integers(1, max_padding)), draw(st.integers(1, 4))
    integer = st.just(only) if only else st.sampled_from(INTEGERS).map(np.dtype)
    same = draw(integer)
    columns = [f"v{j}" for j in range(width)]
    wanted: dict[str, Leaf] = {"n": (draw(integer), draw(st.sampled_from([(), (1,)])))}
    form = draw(
        st.sampled_from(["field", "rows in structs", "field a slot", "structs", "mixed structs"])
    )
    inside: dict[str, str] = {}
    if form == "field":
        wanted["legal"] = (same, (padding, width))
    elif form == "rows in structs":  # an array of structs that hold a whole tuple each
        inner, inside = draw(struct_with(1, {"row": (same, (width,))}, only))
        wanted["legal"] = (inner, (padding,))
    elif form == "field a slot":
        wanted.update({name: (draw(integer), (padding,)) for name in columns})
    elif form == "structs":
        wanted["legal"] = (np.dtype([(name, same) for name in columns]), (padding,))
        inside = {name: name for name in columns}
    else:
        inner, inside = draw(struct_with(1, {name: (draw(integer), ()) for name in columns}, only))
        wanted["legal"] = (inner, (padding,))
    dtype, paths = draw(struct_with(2, wanted, only))
    actions: str | tuple[str, ...]
    if form == "field":
        actions = paths["legal"]
    elif form == "rows in structs":
        actions = f"{paths['legal']}.{inside['row']}"
    elif form == "field a slot":
        actions = tuple(paths[name] for name in columns)
    else:
        actions = tuple(f"{paths['legal']}.{inside[name]}" for name in columns)
    return Struct(dtype, paths["n"], actions, padding, width)


@st.composite
def lists_for(draw: Draw, struct: Struct, largest: int = 2**63 - 2) -> Lists:
    """Lists that fit a struct, often with the largest values that its fields hold."""

    def most(dtype: np.dtype) -> int:
        exact = np.iinfo(dtype).max if dtype.kind in "iu" else 2 ** (np.finfo(dtype).nmant + 1) - 1
        return min(int(exact), largest)

    columns = struct.views(np.zeros(1, struct.dtype))[1]
    action = st.tuples(*(st.integers(0, 4) | st.integers(0, most(v.dtype)) for v in columns))
    return draw(st.lists(st.lists(action, max_size=struct.padding), max_size=4))


def records_in(data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """(rows,) records that share the memory of (rows, itemsize) uint8."""
    return data.view(dtype)[:, 0] if len(data) else np.empty(0, dtype)


def random_bytes(rng: np.random.Generator, dtype: np.dtype, rows: int) -> np.ndarray:
    """(rows, itemsize) uint8 of records with random bytes, padding included; bools are 0 or 1."""
    data = rng.integers(0, 256, (rows, dtype.itemsize), dtype=np.uint8)
    records = records_in(data, dtype)
    for path in leaves(dtype):
        view = numpy_view(records, path)
        if view.dtype == bool:
            view[...] = rng.random(view.shape) < 0.5
    return data


PLACEMENTS = ["alone", "odd address", "later rows", "inner columns", "every other row", "column"]


def placed(data: np.ndarray | Tensor, how: str) -> Tensor:
    """The same numbers (rows, columns) as a tensor that lies in memory as ``how`` says."""
    values = torch.as_tensor(data)
    rows, columns = values.shape
    if how == "odd address":
        home = torch.zeros(rows * columns + 1, dtype=values.dtype)[1:].view(rows, columns)
    elif how == "later rows":
        home = torch.zeros(rows + 3, columns, dtype=values.dtype)[3:]
    elif how == "inner columns":
        home = torch.zeros(rows, columns + 4, dtype=values.dtype)[:, 3:-1]
    elif how == "every other row":
        home = torch.zeros(2 * rows, columns, dtype=values.dtype)[::2]
    elif how == "column":
        home = torch.zeros(columns, rows, dtype=values.dtype).T
    else:
        return values.clone()
    home.copy_(values)
    return home
