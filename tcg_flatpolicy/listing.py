"""Where the legal list lies in rows of bytes, and reading it from there.

Shapes: B rows, N legal tuples in the whole batch, K tuples that a list has room for, H = 1 + slots
values in a tuple.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcg_flatpolicy.fields import Field, Struct, resolve
from tcg_flatpolicy.packing import pack, places

Names: TypeAlias = str | Sequence[str]
"""Of the fields of tuples: a (K, H) one, or H of (K,), primary first."""

Packed: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""actions (N, H), counts (B,), rows (N,), starts (B,), all int64."""


class Number(NamedTuple):
    """An integer in (B, nbytes) uint8, all in bytes: of each row, or of each of a row's tuples."""

    offset: int
    size: int
    signed: bool
    stride: int
    """From one tuple to the next; 0 for an integer of the row."""


class ListView(NamedTuple):
    """Where each row's list lies in (B, row_bytes) uint8, as a compiled kernel takes it."""

    row_bytes: int
    counts: Number
    columns: tuple[Number, ...]
    """H, primary first."""
    room: int
    """K."""


class Listing(Struct):
    """Observations with a list of integer tuples, whatever they mean."""

    def __init__(self, dtype: npt.DTypeLike, count: str, actions: Names) -> None:
        super().__init__(np.dtype(dtype))
        self.count_name = count
        self.action_names = actions if isinstance(actions, str) else tuple(actions)
        self.count = self._integers(count)
        """Where the number of tuples is."""
        if self.count.shape not in ((), (1,)):
            raise ValueError(f"count field {count!r} must be one number, it has {self.count.shape}")
        self.columns = self._columns()
        """One (K,) field a tuple value, primary first."""
        first, width = self.columns[0], len(self.columns)
        self.padding = first.shape[0]
        """K: how many tuples the list has room for."""

        size, offsets = first.dtype.itemsize, [column.offset for column in self.columns]
        alike = first.dtype.kind in "iu" and all(
            (column.dtype, column.strides) == (first.dtype, first.strides)
            for column in self.columns
        )
        together = alike and offsets == [first.offset + j * size for j in range(width)]
        self._pieces = [(first, width)] if together else [(column, 1) for column in self.columns]
        """What of a tuple is read at once: from a field on, so many numbers."""

    def _integers(self, name: str) -> Field:
        field = self.find(name)
        # Where all numbers share one dtype, the list may be stored as whole floats.
        if field.dtype.kind not in ("iu" if self.single is None else "iuf"):
            raise TypeError(f"field {name!r} must be integers, it is {field.dtype}")
        return field

    def _columns(self) -> list[Field]:
        if isinstance(self.action_names, str):
            field = self._integers(self.action_names)
            if len(field.shape) != 2:
                raise ValueError(
                    f"field {field.name!r} must be (K, H), it is {field.shape}; for a field a slot "
                    "pass their names as a tuple"
                )
            room, width = field.shape
            if not width:
                raise ValueError(
                    f"field {field.name!r} is {field.shape}: its tuples have no values"
                )
            step, between = field.strides
            column = replace(field, shape=(room,), strides=(step,))
            return [
                replace(column, name=f"{field.name}[:, {j}]", offset=field.offset + j * between)
                for j in range(width)
            ]
        columns = [self._integers(name) for name in self.action_names]
        if not columns:
            raise ValueError("actions names no field")
        first = columns[0]
        for column in columns:
            if len(column.shape) != 1 or column.shape != first.shape:
                raise ValueError(
                    f"the fields of a tuple must all be (K,): {first.name!r} is {first.shape}, "
                    f"{column.name!r} is {column.shape}"
                )
        return columns

    def is_legal_list(self, field: Field) -> bool:
        """Whether a field of :meth:`fields` is the count or belongs to the legal tuples."""
        names = [self.action_names] if isinstance(self.action_names, str) else self.action_names
        return field.name in (self.count_name, *names)

    def list_view(self) -> ListView:
        """Where the list lies in the rows of :meth:`as_bytes`, in plain integers.

        Raises:
            TypeError: a list that is stored as floats.
        """
        if self.count.dtype.kind == "f":  # as all are then
            raise TypeError(f"field {self.count.name!r} must be integers, it is {self.count.dtype}")
        counts, *columns = (
            Number(
                f.offset,
                f.dtype.itemsize,
                f.dtype.kind == "i",
                0 if f is self.count else f.strides[0],
            )
            for f in (self.count, *self.columns)
        )
        return ListView(self.dtype.itemsize, counts, tuple(columns), self.padding)

    def list_arrays(
        self, records: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], list[npt.NDArray[Any]]]:
        """Views of the list in (B,) records: counts (B,), and (B, K) a tuple value."""
        counts = resolve(records, self.count_name)
        counts = counts[:, 0] if counts.ndim > 1 else counts
        if isinstance(self.action_names, str):
            return counts, list(np.moveaxis(resolve(records, self.action_names), -1, 0))
        return counts, [resolve(records, name) for name in self.action_names]

    def _numbers(self, actions: Tensor, counts: Tensor, rows: Tensor) -> Iterator[tuple[Any, ...]]:
        """(field, its values (n,), their rows (n,)): the count, then each value of a tuple."""
        yield self.count, counts, torch.arange(len(counts), device=counts.device)
        for j, field in enumerate(self.columns):
            yield field, actions[:, j], rows

    def _read_list(self, data: Tensor, given: torch.dtype) -> Packed:
        """Of (B, nbytes) uint8, contiguous, that were handed over as numbers of a dtype."""
        said = self.count.view(data).reshape(len(data)).clone()  # environments write there
        counts = _whole(said, self.count)
        if ((counts < 0) | (counts > self.padding)).any():
            raise self.overflow(counts.tolist())
        rows, starts = pack(counts)
        place = places(rows, starts)
        pieces = []
        for field, numbers in self._pieces:
            at = rows * data.shape[1] + place * field.strides[0]
            pieces.append(_whole(field.gather(data, at, numbers), field, rows))
        actions = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        self._check_exact(given, actions, counts, rows)
        return actions, counts, rows, starts

    def overflow(self, counts: list[int]) -> ValueError:
        """The error of counts as int64, one of which lies outside 0..K."""
        row, count = next((r, n) for r, n in enumerate(counts) if not 0 <= n <= self.padding)
        if self.count.dtype == np.uint64:
            count %= 2**64
        return ValueError(
            f"row {row}: {self.count_name} says {count} legal actions, outside "
            f"0..{self.padding}, the room of {self.action_names}"
        )

    def _check_exact(
        self, given: torch.dtype, actions: Tensor, counts: Tensor, rows: Tensor
    ) -> None:
        """Refuses numbers of the list that may be others, rounded or wrapped."""
        for j, field in enumerate(self.columns):
            if field.dtype == np.uint64 and (actions[:, j] < 0).any():
                at = int((actions[:, j] < 0).nonzero()[0, 0])
                raise ValueError(
                    f"row {int(rows[at])}: {field.name} holds {int(actions[at, j]) % 2**64}, "
                    f"beyond int64; values of a tuple are at most {2**63 - 1}"
                )
        kinds = () if self.single is None else (given, self.count.stored)
        floats = [kind for kind in kinds if kind.is_floating_point]
        if not floats:
            return
        coarsest = max(floats, key=lambda kind: torch.finfo(kind).eps)
        exact = int(2 / torch.finfo(coarsest).eps)
        for field, values, row_of in self._numbers(actions, counts, rows):
            for at in (values >= exact).nonzero()[:1, 0].tolist():
                raise ValueError(
                    f"row {int(row_of[at])}: {field.name} holds {int(values[at])}, which may be "
                    f"another number, rounded: {coarsest} counts exactly below {exact} only; pass "
                    "the list as integers, or as floats of more bits"
                )


def _whole(values: Tensor, field: Field, rows: Tensor | None = None) -> Tensor:
    """Integers from a field that may hold whole floats; ``rows`` as of each value."""
    if values.is_floating_point():
        broken = (values != values.floor()) | (values.abs() >= 2.0**63)
        if broken.any():
            at = int(broken.nonzero()[0, 0])
            row = at if rows is None else int(rows[at])
            raise ValueError(
                f"row {row}: {field.name} holds {values[at].item()}, which is not a whole number "
                "of 64 bits"
            )
    return values.to(torch.int64)
