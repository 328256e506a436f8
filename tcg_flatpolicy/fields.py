"""The fields of a structured dtype, and observations of it as rows of bytes or as records.

NumPy itself resolves names, nesting, padding and alignment. Shapes: B rows, N places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

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
"""By bytes."""


class Number(NamedTuple):
    """An integer in rows of bytes, as a kernel takes it: of the row, or of each of its tuples."""

    offset: int
    size: int
    signed: bool
    stride: int
    """From one tuple to the next."""


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

    @property
    def number(self) -> Number:
        """Of a field of integers, () or (K,)."""
        stride = 0 if self.numbers == 1 else self.strides[0]
        return Number(self.offset, self.dtype.itemsize, self.dtype.kind == "i", stride)

    def view(self, data: Tensor) -> Tensor:
        """(B, *shape) in (B, nbytes) uint8, without a copy where alignment allows it."""
        size, steps = self.dtype.itemsize, (data.shape[1], *self.strides)
        shape = (len(data), *self.shape)
        if _divides(size, data.storage_offset(), self.offset, *steps):
            typed = data.view(-1).view(self.stored)
            start = typed.storage_offset() + self.offset // size
            return typed.as_strided(shape, [step // size for step in steps], start)
        loose = data.as_strided((*shape, size), (*steps, 1), data.storage_offset() + self.offset)
        # Not contiguous(): that keeps the odd address of what is contiguous already.
        copy = loose.clone(memory_format=torch.contiguous_format)
        return copy.view(self.stored).squeeze(-1)

    def gather(self, data: Tensor, at: Tensor, numbers: int) -> Tensor:
        """(N, numbers) that follow one another in (B, nbytes) uint8, of this field's dtype.

        They begin ``at`` (N,) int64 bytes from the field's offset on, each a sum of whole rows and
        of the field's strides.
        """
        size = self.dtype.itemsize * numbers
        flat = data.view(-1)
        if size in _SIGNED and _divides(
            size, data.storage_offset(), data.shape[1], self.offset, *self.strides
        ):
            # torch indexes signed integers of every size, but not all unsigned and floating ones.
            shift = size.bit_length() - 1  # quicker than to divide
            words = flat.view(_SIGNED[size]).index_select(0, (at + self.offset) >> shift)
        else:
            windows = flat.as_strided((max(flat.numel() - size + 1, 0), size), (1, 1))
            words = windows.index_select(0, at + self.offset)
        return words.view(self.stored).view(len(at), numbers)


def _divides(size: int, *steps: int | torch.SymInt) -> bool:
    return all(step % size == 0 for step in steps)


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


def leaf_names(dtype: np.dtype[Any], prefix: str = "") -> Iterator[str]:
    """The dotted name of each field that is not a struct, in order."""
    for name in dtype.names or ():
        inner = dtype[name].base
        if inner.names is None:
            yield prefix + name
        else:
            yield from leaf_names(inner, f"{prefix}{name}.")


class Struct:
    """Observations of a structured dtype, by field.

    An observation is a row of its bytes, or of its numbers where all share one dtype (``single``).
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        if dtype.names is None:
            raise TypeError(
                f"an observation needs a structured dtype with named fields, got {dtype}"
            )
        self.dtype = dtype
        self._found: dict[str, Field] = {}
        leaves = [resolve(np.zeros(1, dtype), name) for name in leaf_names(dtype)]
        kinds = {leaf.dtype for leaf in leaves}
        filled = sum(leaf.nbytes for leaf in leaves) == dtype.itemsize
        self.single = kinds.pop() if len(kinds) == 1 and filled else None
        """The dtype of all numbers, if they share one and lie without a gap."""

    def find(self, name: str) -> Field:
        """Where a field lies, by its dotted name.

        Raises:
            KeyError: no such field.
            TypeError: a struct, a dtype that torch does not have, or another byte order.
        """
        if name in self._found:
            return self._found[name]
        record = np.zeros(1, self.dtype)
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
        field = Field(name, view.dtype, offset, view.shape[1:], view.strides[1:])
        return self._found.setdefault(name, field)

    def fields(self) -> Iterator[Field]:
        """Every number in the observation: all fields that are not structs, the list included."""
        return map(self.find, leaf_names(self.dtype))

    def as_bytes(self, observations: Tensor) -> Tensor:
        """(B, nbytes) uint8, contiguous, of (B, nbytes) uint8 or (B, numbers) of any dtype.

        Raises:
            TypeError: observations of a dtype that the layout does not fit.
            ValueError: another number of columns, or a value that the layout's dtype does not hold
                exactly, naming row and field.
        """
        if not isinstance(observations, Tensor):
            raise TypeError(
                f"observations must be a tensor, got {type(observations).__name__}; "
                "torch.as_tensor(observations) shares an array's memory"
            )
        if observations.ndim != 2:
            raise ValueError(f"observations must be (B, columns), got {tuple(observations.shape)}")
        size, columns, given = self.dtype.itemsize, observations.shape[1], observations.dtype
        numbers = None if self.single is None else size // self.single.itemsize
        # PufferLib emulates a Discrete as int32 and may call the whole int64 all the same: where
        # it is not the numbers that fit, the bytes may.
        if columns * observations.itemsize == size and (given == torch.uint8 or columns != numbers):
            return _bytes(observations)
        if self.single is None and given != torch.uint8:
            raise TypeError(
                f"observations are {given}, but fields of several dtypes are read from bytes: "
                f"pass (B, {size}) uint8"
            )
        if self.single is None:
            raise ValueError(f"observations have {columns} bytes, the layout {size}")
        if columns != numbers:
            raise ValueError(f"observations have {columns} columns, the layout {numbers}")
        cast = observations.to(STORED[self.single])
        if cast.dtype != given:
            for row, column in _changed(observations, cast).nonzero()[:1].tolist():
                raise ValueError(
                    f"row {row}: {self._name_at(column * self.single.itemsize)} is "
                    f"{observations[row, column].item()}, which is no {self.single}, the dtype of "
                    "this layout; give the layout a dtype that holds it, or cast the observations "
                    f"to {cast.dtype} yourself, as you see fit"
                )
        return _bytes(cast)

    def _name_at(self, byte: int) -> str:
        """The number that begins at a byte, such as ``"me.hp[3]"``."""
        record = np.zeros(1, self.dtype)
        record.view(np.uint8)[byte] = 1
        for name in leaf_names(self.dtype):
            for place in np.argwhere(resolve(record, name)[0] != 0).tolist():
                return f"{name}{place or ''}"
        return f"byte {byte}"

    def records(self, observations: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(B,) records that share memory with what `LegalLayout.write` takes.

        Raises:
            TypeError: observations of a dtype that the layout does not fit.
            ValueError: another number of bytes, or rows that are not contiguous.
        """
        if not isinstance(observations, np.ndarray):
            raise TypeError(f"write takes a NumPy array, got {type(observations).__name__}")
        if observations.dtype == self.dtype and observations.ndim == 1:
            return observations
        size, itemsize = self.dtype.itemsize, observations.itemsize
        if observations.ndim != 2 or observations.dtype not in (np.uint8, self.single):
            raise TypeError(
                f"observations must be (B, {size}) uint8 or (B,) records, "
                f"got {observations.shape} {observations.dtype}"
            )
        rows, columns = observations.shape
        if columns * itemsize != size:
            raise ValueError(f"an observation has {columns * itemsize} bytes, the layout {size}")
        if rows and columns > 1 and observations.strides[1] != itemsize:
            raise ValueError(
                "the numbers of an observation do not follow one another in memory (strides "
                f"{observations.strides}): pass rows that do, such as "
                "np.ascontiguousarray(observations)"
            )
        return observations.view(self.dtype)[:, 0]


def _bytes(rows: Tensor) -> Tensor:
    """(B, columns) of any dtype as (B, nbytes) uint8, contiguous."""
    if not rows.is_contiguous() or rows.stride(-1) != 1:  # one column may have 0
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.uint8)


def _changed(values: Tensor, cast: Tensor) -> Tensor:
    """Which values a cast does not hold exactly; NaN stays NaN."""
    changed = cast.to(values.dtype) != values
    if cast.dtype.is_signed != values.dtype.is_signed:
        changed |= (cast if cast.dtype.is_signed else values) < 0  # -1 and 255 are the same byte
    if not cast.is_floating_point() or values.dtype == torch.bool:
        return changed
    if values.is_floating_point():
        return changed & ~values.isnan()
    # Rounded up beyond the largest: what the cast back makes of it is the machine's choice.
    return changed | (cast >= float(torch.iinfo(values.dtype).max + 1))
