"""Where a field of a structured dtype lies, and how it is read from rows of bytes.

NumPy itself resolves names, nesting, padding and alignment. Shapes: B rows, N places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_NAMES = ["bool", "float16", "float32", "float64"]
_NAMES += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
STORED: dict[np.dtype[Any], torch.dtype] = {np.dtype(name): getattr(torch, name) for name in _NAMES}
"""The torch dtype with the same bytes."""

WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64}
"""For what torch has hardly any operations."""

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Signed integers by bytes."""


@dataclass(frozen=True)
class Field:
    """A field of one dtype in a struct: its shape and byte strides, from byte ``offset``."""

    name: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many numbers the field holds."""
        return math.prod(self.shape)

    @property
    def stored(self) -> torch.dtype:
        """The torch dtype with the same bytes."""
        return STORED[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        """What `LegalLayout.field` reads it as: uint16 as int32, uint32 as int64."""
        return WIDER.get(self.stored, self.stored)


def resolve(records: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """The view of a dotted name; a name that itself has dots in it goes first.

    Raises:
        KeyError: no such field; those that there are are named.
    """
    names = records.dtype.names
    if names is None:
        raise KeyError(f"no field {name!r}: {records.dtype} has no fields")
    if name in names:
        return records[name]
    for end in reversed([place for place, letter in enumerate(name) if letter == "."]):
        if name[:end] in names:
            return resolve(records[name[:end]], name[end + 1 :])
    raise KeyError(f"no field {name!r}; there are {', '.join(names)}")


def find(dtype: np.dtype[Any], name: str) -> Field:
    """The field of a dotted name.

    Raises:
        KeyError: no such field.
        TypeError: a struct, a dtype that torch does not have, or another byte order.
    """
    record = np.zeros(1, dtype)
    view = resolve(record, name)
    if view.dtype.names is not None:
        raise TypeError(f"{name!r} is a struct; name one of its fields: {view.dtype.names}")
    if not view.dtype.isnative:
        raise TypeError(
            f"field {name!r} is {view.dtype.str}, not in this machine's byte order: build the "
            'layout from dtype.newbyteorder("="), and convert records by records.astype(that)'
        )
    if view.dtype not in STORED:
        raise TypeError(f"field {name!r} is {view.dtype}, which torch does not have")
    offset = view.__array_interface__["data"][0] - record.__array_interface__["data"][0]
    return Field(name, view.dtype, offset, view.shape[1:], view.strides[1:])


def leaf_names(dtype: np.dtype[Any], prefix: str = "") -> Iterator[str]:
    """The dotted name of each field that is not a struct, in order."""
    for name in dtype.names or ():
        inner = dtype[name].base
        if inner.names is None:
            yield prefix + name
        else:
            yield from leaf_names(inner, f"{prefix}{name}.")


def name_at(dtype: np.dtype[Any], byte: int) -> str:
    """The number that a byte of a struct belongs to, such as ``"me.hp[3]"``."""
    record = np.zeros(1, dtype)
    record.view(np.uint8)[byte] = 1
    for name in leaf_names(dtype):
        places = np.argwhere(resolve(record, name)[0] != 0).tolist()
        if places:
            return f"{name}{places[0] or ''}"
    return f"byte {byte}, between fields"


def single_dtype(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype of all numbers of a struct, if they share one and fill it without a gap."""
    leaves = [resolve(np.zeros(1, dtype), name) for name in leaf_names(dtype)]
    kinds = {leaf.dtype for leaf in leaves}
    if len(kinds) == 1 and sum(leaf.nbytes for leaf in leaves) == dtype.itemsize:
        return kinds.pop()
    return None


def as_bytes(rows: Tensor) -> Tensor:
    """(B, columns) of any dtype as (B, nbytes) uint8, contiguous."""
    if not rows.is_contiguous() or rows.stride(-1) != 1:  # one column may have 0
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.uint8)


def view(data: Tensor, field: Field) -> Tensor:
    """(B, *shape) of a field in (B, nbytes) uint8, without a copy where alignment allows it."""
    size = field.dtype.itemsize
    steps = (data.shape[1], *field.strides)
    shape = (len(data), *field.shape)
    if _divides(size, data.storage_offset(), field.offset, *steps):
        typed = data.view(-1).view(field.stored)
        start = typed.storage_offset() + field.offset // size
        return typed.as_strided(shape, [step // size for step in steps], start)
    loose = data.as_strided((*shape, size), (*steps, 1), data.storage_offset() + field.offset)
    # Not contiguous(): that keeps the odd address of what is contiguous already.
    copy = loose.clone(memory_format=torch.contiguous_format)
    return copy.view(field.stored).squeeze(-1)


def gather(data: Tensor, field: Field, at: Tensor, numbers: int) -> Tensor:
    """Numbers that follow one another in memory, at N places.

    Args:
        data: (B, nbytes) uint8.
        field: of the first number; the others are of its dtype.
        at: (N,) int64, bytes from the field's offset on, each a multiple of whatever the row's
            bytes and the field's strides are multiples of.
        numbers: how many.

    Returns:
        (N, numbers).
    """
    size = field.dtype.itemsize * numbers
    flat = data.view(-1)
    steps = (data.storage_offset(), data.shape[1], field.offset, *field.strides)
    if size in _SIGNED and _divides(size, *steps):
        # torch indexes signed integers of every size, but not all unsigned and floating ones.
        shift = size.bit_length() - 1  # quicker than to divide
        words = flat.view(_SIGNED[size]).index_select(0, (at + field.offset) >> shift)
    else:
        windows = flat.as_strided((max(flat.numel() - size + 1, 0), size), (1, 1))
        words = windows.index_select(0, at + field.offset)
    return words.view(field.stored).view(len(at), numbers)


def _divides(size: int, *steps: int | torch.SymInt) -> bool:
    return all(step % size == 0 for step in steps)
