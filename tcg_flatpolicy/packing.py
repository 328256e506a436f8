"""Rows of different lengths, laid end to end: where each begins, and which row each item is of.

Shapes: B rows, N items in all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TABLE = 16
"""Numbers below this many times their count are told apart by a table of them, else by a sort."""


def pack(counts: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """Counts (B,) int64 -> (N,) int64 the row of each item, (B,) int64 where each row begins.

    Without ``total``, N, the counts are summed, for which a GPU is waited for.
    """
    total = int(counts.sum()) if total is None else total
    return torch.repeat_interleave(counts, output_size=total), counts.cumsum(0) - counts


def places(rows: Tensor, starts: Tensor) -> Tensor:
    """(N,) int64: the place of each packed item within its row, from 0."""
    return torch.arange(len(rows), device=rows.device) - starts.index_select(0, rows)


def ravel(columns: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mixed radix: (..., H) int64 below ``sizes`` (H,) -> (...,) int64, the last running fastest.

    The product of the sizes must be below 2**63; :func:`number` takes any.
    """
    return number(columns.unbind(-1), sizes)[0]


def number(columns: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, int]:
    """One number for each item, equal where all columns are, in lexicographic order; their bound.

    H columns (n,) int64 below ``sizes`` (H,) -> (n,) int64 and an exclusive bound on them. A
    product of the sizes below 2**63 gives mixed radix, any other gives ranks.
    """
    numbers, bound = columns[0], sizes[0]
    for column, size in zip(columns[1:], sizes[1:], strict=True):
        if bound * size >= 2**63:
            found, numbers = distinct(numbers, bound)
            bound = len(found)
        if bound * size >= 2**63:
            found, column = distinct(column, size)
            size = len(found)
        numbers = torch.add(column, numbers, alpha=size)
        bound *= size
    return numbers, bound


def distinct(numbers: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Each of (n,) int64 numbers 0 to ``bound`` - 1 once, (m,) ascending; (n,) places among them.

    The cost does not grow with the bound once it is far above n.
    """
    if bound > TABLE * len(numbers):
        found, place = torch.unique(numbers, return_inverse=True)
        return found, place
    seen = numbers.new_zeros(bound, dtype=torch.bool)
    found = seen.index_fill_(0, numbers, True).nonzero().squeeze(1)
    table = torch.empty_like(seen, dtype=torch.int64)
    table[found] = torch.arange(len(found), device=found.device)
    return found, table.index_select(0, numbers)


def counted(numbers: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Each number once, as :func:`distinct`; (m,) int64, how often each stands."""
    if bound > TABLE * len(numbers):
        found, counts = torch.unique(numbers, return_counts=True)
        return found, counts
    counts = torch.bincount(numbers, minlength=bound)
    found = counts.nonzero().squeeze(1)
    return found, counts.index_select(0, found)
