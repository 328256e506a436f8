"""Where the legal list lies in rows of bytes, and reading it from there.

Shapes: B rows, N legal tuples in the whole batch, K tuples that a list has room for, H = 1 + slots
values in a tuple.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tcg_flatpolicy.fields import Field, Struct
from tcg_flatpolicy.packing import pack, pack_arrays, places

Packed: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""actions (N, H), counts (B,), rows (N,), starts (B,), all int64."""


class Number(NamedTuple):
    """An integer of each row: its offset in the row and its size, in bytes."""

    offset: int
    size: int
    signed: bool


class Column(NamedTuple):
    """An integer of each of a row's K tuples, ``stride`` bytes apart, the first at ``offset``."""

    offset: int
    stride: int
    size: int
    signed: bool


class ListView(NamedTuple):
    """Where each row's list lies in (B, row_bytes) uint8, as a compiled kernel takes it."""

    row_bytes: int
    counts: Number
    columns: tuple[Column, ...]
    """H, primary first."""
    room: int
    """K."""


class Listing:
    """The count and the columns of a list in a struct.

    Args:
        struct: what an observation is.
        count: name of the number of tuples.
        actions: name of a (K, H) field, or H names of (K,) fields.

    Raises:
        KeyError: no field of that name.
        TypeError: a field of another dtype than integers; whole floats are taken where all of the
            struct's numbers share one dtype.
        ValueError: a field of another shape.
    """

    def __init__(self, struct: Struct, count: str, actions: str | Sequence[str]) -> None:
        self.row_bytes, self.names = struct.dtype.itemsize, (count, actions)
        self._single = struct.single is not None
        self.count = _listed(struct, count)
        if self.count.shape not in ((), (1,)):
            raise ValueError(f"count field {count!r} must be one number, it has {self.count.shape}")
        self.columns = _columns(struct, actions)
        self.room = self.columns[0].shape[0]

        first, width = self.columns[0], len(self.columns)
        size, offsets = first.dtype.itemsize, [column.offset for column in self.columns]
        alike = first.dtype.kind in "iu" and all(
            (column.dtype, column.strides) == (first.dtype, first.strides)
            for column in self.columns
        )
        steps = [self.row_bytes, *first.strides, *offsets]
        self._even = alike and all(step % size == 0 for step in steps)
        """Whether the list is integers of one dtype, each column alike and none at an odd place."""
        together = alike and offsets == [first.offset + j * size for j in range(width)]
        self._pieces = [(first, width)] if together else [(column, 1) for column in self.columns]
        """What of a tuple is read at once: from a field on, so many integers."""

    def numbers(self, actions: Tensor, counts: Tensor, rows: Tensor) -> Iterator[tuple[Any, ...]]:
        """(field, its values (n,), their rows (n,)): the count, then each value of a tuple."""
        yield self.count, counts, torch.arange(len(counts), device=counts.device)
        for j, field in enumerate(self.columns):
            yield field, actions[:, j], rows

    def read(self, data: Tensor, given: torch.dtype) -> Packed:
        """The tuples that are listed.

        Args:
            data: (B, nbytes) uint8, contiguous.
            given: what dtype the numbers had when they were handed over.

        Raises:
            ValueError: a count outside 0..K; a number that is not whole, beyond int64, or so large
                that its floating dtype may have rounded it.
        """
        by_numpy = self._even and data.device.type == "cpu" and len(data)
        packed = self._read_by_numpy(data) if by_numpy else self._read_by_torch(data)
        self._check_exact(given, *packed[:3])
        return packed

    def _read_by_torch(self, data: Tensor) -> Packed:
        said = self.count.view(data).reshape(len(data)).clone()  # environments write there
        counts = _whole(said, self.count)
        if ((counts < 0) | (counts > self.room)).any():
            raise self._overflow(counts.tolist())
        rows, starts = pack(counts)
        place = places(rows, starts)
        pieces = []
        for field, numbers in self._pieces:
            at = rows * data.shape[1] + place * field.strides[0]
            pieces.append(_whole(field.gather(data, at, numbers), field, rows))
        actions = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return actions, counts, rows, starts

    def _read_by_numpy(self, data: Tensor) -> Packed:
        """As by torch, on a CPU: in small batches it is torch's calls that cost."""
        raw = data.numpy()
        batch, nbytes = raw.shape
        where = np.ndarray(batch, self.count.dtype, raw, self.count.offset, (nbytes,))
        counts = where.astype(np.int64)
        if counts.min() < 0 or counts.max() > self.room:
            raise self._overflow(counts.tolist())
        rows, starts = pack_arrays(counts)

        first = self.columns[0]
        size = first.dtype.itemsize
        numbers = raw.reshape(-1).view(first.dtype)
        step, row_step = first.strides[0] // size, nbytes // size
        at = np.repeat(np.arange(0, batch * row_step, row_step) - starts * step, counts)
        at += np.arange(0, len(rows) * step, step)
        actions = np.empty((len(rows), len(self.columns)), np.int64)
        for j, field in enumerate(self.columns):
            # The counts are checked, so that nothing wraps: it is the quickest of take's modes.
            actions[:, j] = numbers[field.offset // size :].take(at, mode="wrap")
        packed = actions, counts, rows, starts
        return tuple(map(torch.from_numpy, packed))  # type: ignore[return-value]

    def _overflow(self, counts: list[int]) -> ValueError:
        """Of counts as int64, one of which lies outside 0..K."""
        row, count = next((r, n) for r, n in enumerate(counts) if not 0 <= n <= self.room)
        if self.count.dtype == np.uint64:
            count %= 2**64
        return ValueError(
            f"row {row}: {self.names[0]} says {count} legal actions, outside "
            f"0..{self.room}, the room of {self.names[1]}"
        )

    def _check_exact(
        self, given: torch.dtype, actions: Tensor, counts: Tensor, rows: Tensor
    ) -> None:
        """Refuses numbers of the list that may be others, rounded or wrapped."""
        floats = [f for f in (given, self.count.stored) if self._single and f.is_floating_point]
        wrapping = [field.dtype == np.uint64 for field in self.columns]
        if not floats and not any(wrapping):
            return
        kind = max(floats, key=lambda f: torch.finfo(f).eps, default=torch.int64)
        most = int(2 / torch.finfo(kind).eps) - 1 if floats else 2**63 - 1
        for field, values, row_of in self.numbers(actions, counts, rows):
            wrong = values > most
            if field.dtype == np.uint64:
                wrong |= values < 0
            for at in wrong.nonzero()[:1, 0].tolist():
                value = int(values[at])
                why = (
                    f"{value % 2**64}, beyond int64; values of a tuple are at most {2**63 - 1}"
                    if value < 0
                    else f"{value}, which may be another number, rounded: {kind} counts exactly "
                    f"below {most + 1} only; pass the list as integers, or as floats of more bits"
                )
                raise ValueError(f"row {int(row_of[at])}: {field.name} holds {why}")


def _listed(struct: Struct, name: str) -> Field:
    """A field that may be of the list."""
    field = struct.find(name)
    # Where all share one dtype, the list may be stored as whole floats.
    if field.dtype.kind not in ("iu" if struct.single is None else "iuf"):
        raise TypeError(f"field {name!r} must be integers, it is {field.dtype}")
    return field


def _columns(struct: Struct, actions: str | Sequence[str]) -> list[Field]:
    """The (K,) field of each of a tuple's values."""
    if isinstance(actions, str):
        field = _listed(struct, actions)
        if len(field.shape) != 2:
            raise ValueError(
                f"field {actions!r} must be (K, H), it is {field.shape}; for a field a slot "
                "pass their names as a tuple"
            )
        if not field.shape[1]:
            raise ValueError(f"field {actions!r} is {field.shape}: its tuples have no values")
        column = replace(field, shape=field.shape[:1], strides=field.strides[:1])
        return [
            replace(column, name=f"{actions}[:, {j}]", offset=field.offset + j * field.strides[1])
            for j in range(field.shape[1])
        ]
    columns = [_listed(struct, name) for name in actions]
    if not columns:
        raise ValueError("actions names no field")
    for column in columns:
        if len(column.shape) != 1 or column.shape != columns[0].shape:
            raise ValueError(
                f"the fields of a tuple must all be (K,): {columns[0].name!r} is "
                f"{columns[0].shape}, {column.name!r} is {column.shape}"
            )
    return columns


def _whole(values: Tensor, field: Field, rows: Tensor | None = None) -> Tensor:
    """Integers from a field that may hold whole floats; ``rows`` as of each value."""
    if values.is_floating_point():
        broken = (values != values.floor()) | (values.abs() >= 2.0**63)
        for at, *_ in broken.nonzero()[:1].tolist():
            row = at if rows is None else int(rows[at])
            raise ValueError(
                f"row {row}: {field.name} holds {values[at].item()}, which is not a whole number "
                "of 64 bits"
            )
    return values.to(torch.int64)
