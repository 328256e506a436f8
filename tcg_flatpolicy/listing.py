"""Where the legal list lies in rows of bytes, and reading it from there.

Shapes: B rows, N legal tuples in the whole batch, K tuples that a list has room for, H = 1 + slots
values in a tuple.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tcg_flatpolicy import fields
from tcg_flatpolicy.fields import Field
from tcg_flatpolicy.packing import pack, places

Packed: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""actions (N, H), counts (B,), rows (N,), starts (B,), all int64."""


class Number(NamedTuple):
    """An integer of each row."""

    offset: int
    """In bytes, from the row's first."""
    size: int
    """In bytes."""
    signed: bool


class Column(NamedTuple):
    """An integer of each of a row's K tuples."""

    offset: int
    """In bytes, from the row's first: of the first tuple."""
    stride: int
    """In bytes, from one tuple to the next."""
    size: int
    """In bytes."""
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
        dtype: of the struct.
        count: name of the number of tuples.
        actions: name of a (K, H) field, or H names of (K,) fields.

    Raises:
        KeyError: no field of that name.
        TypeError: a field of another dtype than integers; whole floats are taken where all of the
            struct's numbers share one dtype.
        ValueError: a field of another shape.
    """

    def __init__(self, dtype: np.dtype[Any], count: str, actions: str | Sequence[str]) -> None:
        self.row_bytes = dtype.itemsize
        self.single = fields.single_dtype(dtype)
        """The dtype of all numbers of the struct, if they share one."""
        self.names = count, actions
        self.count = self._integer_field(dtype, count)
        if self.count.shape not in ((), (1,)):
            raise ValueError(f"count field {count!r} must be one number, it has {self.count.shape}")
        self.columns = self._columns(dtype, actions)
        self.room = self.columns[0].shape[0]
        self._together = self._tuples_lie_together()

    def _integer_field(self, dtype: np.dtype[Any], name: str) -> Field:
        field = fields.find(dtype, name)
        if field.dtype.kind in "iu":
            return field
        if field.dtype.kind == "f" and self.single is not None:
            return field  # one dtype for all: the list is stored as whole floats
        raise TypeError(f"field {name!r} must be integers, it is {field.dtype}")

    def _columns(self, dtype: np.dtype[Any], actions: str | Sequence[str]) -> list[Field]:
        if isinstance(actions, str):
            field = self._integer_field(dtype, actions)
            if len(field.shape) != 2:
                raise ValueError(
                    f"field {actions!r} must be (K, H), it is {field.shape}; for a field a slot "
                    "pass their names as a tuple"
                )
            if not field.shape[1]:
                raise ValueError(f"field {actions!r} is {field.shape}: its tuples have no values")
            return [
                Field(
                    f"{actions}[:, {j}]",
                    field.dtype,
                    field.offset + j * field.strides[1],
                    field.shape[:1],
                    field.strides[:1],
                )
                for j in range(field.shape[1])
            ]
        columns = [self._integer_field(dtype, name) for name in actions]
        if not columns:
            raise ValueError("actions names no field")
        for column in columns:
            if len(column.shape) != 1 or column.shape != columns[0].shape:
                raise ValueError(
                    f"the fields of a tuple must all be (K,): {columns[0].name!r} is "
                    f"{columns[0].shape}, {column.name!r} is {column.shape}"
                )
        return columns

    def _tuples_lie_together(self) -> bool:
        """Whether the integers of a tuple follow one another, so that it is read in one piece."""
        first = self.columns[0]
        return first.dtype.kind in "iu" and all(
            column.dtype == first.dtype
            and column.offset == first.offset + j * first.dtype.itemsize
            and column.strides == first.strides
            for j, column in enumerate(self.columns)
        )

    def view(self) -> ListView:
        """In plain integers.

        Raises:
            TypeError: a list that is stored as floats.
        """
        for field in (self.count, *self.columns):
            if field.dtype.kind not in "iu":
                raise TypeError(f"field {field.name!r} must be integers, it is {field.dtype}")
        count, columns = self.count, self.columns
        return ListView(
            self.row_bytes,
            Number(count.offset, count.dtype.itemsize, count.dtype.kind == "i"),
            tuple(
                Column(c.offset, c.strides[0], c.dtype.itemsize, c.dtype.kind == "i")
                for c in columns
            ),
            self.room,
        )

    def read(self, data: Tensor, given: torch.dtype) -> Packed:
        """The tuples that are listed, all of them int64.

        Args:
            data: (B, nbytes) uint8, contiguous.
            given: what dtype the numbers had when they were handed over.

        Raises:
            ValueError: a count outside 0..K; a number that is not whole, beyond int64, or so large
                that its floating dtype may have rounded it.
        """
        said = fields.view(data, self.count).reshape(len(data)).clone()  # environments write there
        counts = self._whole(said, self.count.name)
        outside = (counts < 0) | (counts > self.room)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise self.overflow(row, int(counts[row]))
        rows, starts = pack(counts)
        place = places(rows, starts)

        def read(field: Field, numbers: int) -> Tensor:
            """(N, numbers) of each tuple, from the field on."""
            at = rows * data.shape[1] + place * field.strides[0]
            return self._whole(fields.gather(data, field, at, numbers), field.name, rows)

        if self._together:
            actions = read(self.columns[0], len(self.columns))
        else:
            actions = torch.cat([read(field, 1) for field in self.columns], dim=1)
        self._check_numbers(given, actions, counts, rows)
        return actions, counts, rows, starts

    def overflow(self, row: int, count: int) -> ValueError:
        """What is raised for a count, as int64, that lies outside 0..K."""
        if self.count.dtype == np.uint64:
            count %= 2**64
        return ValueError(
            f"row {row}: {self.names[0]} says {count} legal actions, outside "
            f"0..{self.room}, the room of {self.names[1]}"
        )

    def _check_numbers(
        self, given: torch.dtype, actions: Tensor, counts: Tensor, rows: Tensor
    ) -> None:
        """Refuses numbers of the list that may be others, rounded or wrapped."""
        floats = {given, self.count.stored} if self.single else {self.count.stored}
        kind = max((f for f in floats if f.is_floating_point), key=_epsilon, default=None)
        columns = [(field, actions[:, j], rows) for j, field in enumerate(self.columns)]
        for field, values, row_of in columns:
            if field.dtype == np.uint64:
                for at in (values < 0).nonzero()[:1, 0].tolist():
                    raise ValueError(
                        f"row {int(row_of[at])}: {field.name} holds {int(values[at]) % 2**64}, "
                        f"beyond int64; values of a tuple are at most {2**63 - 1}"
                    )
        if kind is None:
            return
        exact, each = int(2 / _epsilon(kind)), torch.arange(len(counts), device=counts.device)
        for field, values, row_of in [(self.count, counts, each), *columns]:
            for at in (values >= exact).nonzero()[:1, 0].tolist():
                raise ValueError(
                    f"row {int(row_of[at])}: {field.name} holds {int(values[at])}, which may be "
                    f"another number, rounded: {kind} counts exactly below {exact} only; pass the "
                    "list as integers, or as floats of more bits"
                )

    def _whole(self, values: Tensor, name: str, rows: Tensor | None = None) -> Tensor:
        """Integers from a field that may hold whole floats; ``rows`` as of each value."""
        if values.is_floating_point():
            broken = (values != values.floor()) | (values.abs() >= 2.0**63)
            if broken.any():
                at = int(broken.nonzero()[0, 0])
                row = at if rows is None else int(rows[at])
                raise ValueError(
                    f"row {row}: {name} holds {values[at].item()}, which is not a whole number "
                    "of 64 bits"
                )
        return values.to(torch.int64)


def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
