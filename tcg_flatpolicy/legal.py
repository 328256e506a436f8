"""A batch of legal action tuples, packed: one row of memory per legal tuple, none for padding.

Shapes: B rows (states), N legal tuples in the whole batch, H = 1 + slots values in a tuple.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from functools import cached_property, reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcg_flatpolicy.packing import number, pack, places, ravel
from tcg_flatpolicy.spec import ActionSpec

MASK_BYTES = 2**31
"""Of the largest mask that :meth:`LegalActions.to_mask` makes: more is rarely meant."""


class LegalActions:
    """The legal tuples of each of B rows, laid end to end.

    Actions, counts and no-op may be of any integer dtype. They are copied to int64.

    Attributes:
        actions: (N, H) int64, the tuples of row 0, then those of row 1, ...
        counts: (B,) int64, how many of them belong to each row; zeros allowed.
        noop: (H,) int64, what a row without a legal action plays; zeros if left out.
        rows: (N,) int64, the row of each tuple, ascending.
        starts: (B,) int64, where each row's tuples begin in ``actions``.

    Raises:
        TypeError: not integer tensors.
        ValueError: shapes that do not fit, a value that is negative or beyond int64, or counts that
            do not sum to N.
    """

    def __init__(self, actions: Tensor, counts: Tensor, noop: Tensor | None = None) -> None:
        _check_integer("actions", actions)
        if actions.ndim != 2 or actions.shape[1] < 1:
            raise ValueError(f"actions must be (N, 1 + slots), got {tuple(actions.shape)}")
        owned = _own_counts(counts, len(actions), "the number of actions")
        if int(owned.sum()) != len(actions):
            raise ValueError(f"counts sum to {owned.sum()}, but there are {len(actions)} actions")
        if noop is None:
            noop = torch.zeros(actions.shape[1], dtype=torch.int64)
        noop = torch.as_tensor(noop)
        _check_integer("noop", noop)
        if noop.shape != actions.shape[1:]:
            raise ValueError(f"noop must be ({actions.shape[1]},), got {tuple(noop.shape)}")
        self.noop = noop.to(actions.device, torch.int64, copy=True)
        if (self.noop < 0).any():
            raise ValueError(f"noop {tuple(noop.tolist())} must lie in 0..{2**63 - 1}")
        self.actions, self.counts = actions.to(torch.int64, copy=True), owned
        self.rows, self.starts = pack(owned, len(actions))
        if len(actions) and self.actions.min() < 0:
            n, slot = (self.actions < 0).nonzero()[0].tolist()
            action = tuple(actions[n].tolist())
            problem = "negative" if action[slot] < 0 else "beyond int64"
            raise ValueError(
                f"row {int(self.rows[n])}: action {action} is {problem} in slot {slot}"
            )

    @classmethod
    def trusted(
        cls,
        actions: Tensor,
        counts: Tensor,
        noop: Tensor,
        sizes: Sequence[int] | None = None,
        distinct: bool = False,
        packing: tuple[Tensor, Tensor] | None = None,
    ) -> LegalActions:
        """Of int64 tensors, without the checks of the constructor: for a caller that has made them.

        Only the no-op is copied: nobody may write to the other tensors later.

        Args:
            actions: (N, H), none negative.
            counts: (B,), summing to N.
            noop: (H,).
            sizes: a bound on each of the H values, exclusive, where the caller knows one.
            distinct: the caller knows that no row lists a tuple twice.
            packing: (rows, starts) as they follow from the counts, where the caller has them.
        """
        legal = cls.__new__(cls)
        legal.actions, legal.counts, legal.noop = actions, counts, noop.clone()
        legal.rows, legal.starts = packing or pack(counts, len(actions))
        if sizes is not None:
            legal.__dict__["sizes"] = [int(size) for size in sizes]
        if distinct:
            legal.__dict__["merged"] = None
        return legal

    @classmethod
    def from_lists(
        cls,
        lists: Sequence[Sequence[Sequence[int]]],
        slots: int | None = None,
        noop: Sequence[int] | None = None,
    ) -> LegalActions:
        """From one list a row of tuples of ``1 + slots`` whole numbers; empty lists allowed.

        The slots may be left out when some tuple, or the no-op, shows them.

        Raises:
            TypeError: naming the row: no list of tuples of whole numbers.
            ValueError: naming the row: a tuple of another length, a value that is negative or
                beyond int64; or nothing shows the slots.
        """
        width = None if slots is None else 1 + slots
        flat: list[tuple[int, ...]] = []
        counts: list[int] = []
        for row, listed in enumerate(lists):
            where = f"row {row}: "
            before = len(flat)
            for action in listed if isinstance(listed, Iterable) else [listed]:
                flat.append(_whole_numbers(where, action))
                width = len(flat[-1]) if width is None else width
                if len(flat[-1]) != width:
                    raise ValueError(f"{where}{flat[-1]} has {len(flat[-1])} values, not {width}")
            counts.append(len(flat) - before)
        own_noop = None if noop is None else torch.tensor(_whole_numbers("noop: ", noop))
        if width is None:
            if own_noop is None:
                raise ValueError("every list is empty: say how many slots a tuple has, slots=...")
            width = len(own_noop)
        actions = torch.from_numpy(np.array(flat, np.int64).reshape(len(flat), width))
        return cls(actions, torch.tensor(counts, dtype=torch.int64), own_noop)

    @classmethod
    def from_padded(
        cls,
        actions: Tensor | npt.NDArray[np.integer],
        counts: Tensor | npt.NDArray[np.integer],
        noop: Tensor | None = None,
    ) -> LegalActions:
        """From (B, K, H) integers, of which the first ``counts[b]``, 0 to K, of row b are legal.

        What stands in the padding does not matter.

        Raises:
            TypeError: not integers.
            ValueError: shapes that do not fit, a count outside 0..K, or a value that is negative or
                beyond int64.
        """
        actions, counts = as_tensor(actions), as_tensor(counts)
        _check_integer("actions", actions)
        if actions.ndim != 3 or counts.shape != actions.shape[:1]:
            raise ValueError(
                f"actions must be (B, K, H) and counts (B,), got {tuple(actions.shape)} and "
                f"{tuple(counts.shape)}"
            )
        counts = _own_counts(counts, actions.shape[1], "the padded length")
        rows, starts = pack(counts)
        at = rows * actions.shape[1] + places(rows, starts)
        # Not [at]: torch 2.4 cannot do that with all unsigned integers.
        return cls(actions.flatten(0, 1).index_select(0, at), counts, noop)

    @classmethod
    def from_mask(cls, mask: Tensor | npt.NDArray[np.bool_], spec: ActionSpec) -> LegalActions:
        """From a flat mask over all tuple ids: (B, prod(nvec)) bool, ids as ``spec.ravel``.

        An id that is set but no tuple of the spec's roles is left to :meth:`validate`.

        Raises:
            TypeError: not bool.
            ValueError: another number of columns than the spec has ids.
        """
        mask, sizes = as_tensor(mask), spec.nvec.tolist()
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if mask.ndim != 2 or mask.shape[1] != math.prod(sizes):
            raise ValueError(f"mask must be (B, {math.prod(sizes)}), got {tuple(mask.shape)}")
        ids = mask.nonzero()[:, 1]
        noop = torch.tensor(spec.noop, device=mask.device)
        return cls.trusted(spec.unravel(ids), mask.sum(1), noop, sizes, distinct=True)

    def to_mask(self, spec: ActionSpec) -> Tensor:
        """(B, prod(nvec)) bool, the inverse of :meth:`from_mask`; empty rows are all False.

        Raises:
            ValueError: a tuple outside the spec's sizes, or a mask above :data:`MASK_BYTES`.
        """
        ids = math.prod(spec.nvec.tolist())
        if len(self) * ids > MASK_BYTES:
            raise ValueError(
                f"a mask of {len(self)} rows by {ids} ids takes more than {MASK_BYTES} bytes: take "
                "fewer rows at once (legal[rows]), or ask contains, prefix_mask or head_masks"
            )
        mask = torch.zeros(len(self), ids, dtype=torch.bool, device=self.actions.device)
        mask[self.rows, spec.ravel(self.actions)] = True
        return mask

    def to_lists(self) -> list[list[tuple[int, ...]]]:
        """One list of tuples a row."""
        rows = self.actions.split(self.counts.tolist())
        return [[tuple(action) for action in row.tolist()] for row in rows]

    def to(self, device: torch.device | str) -> LegalActions:
        """The same lists on another device."""
        return self._some(*(x.to(device) for x in (self.actions, self.counts, self.noop)))

    def _some(self, actions: Tensor, counts: Tensor, noop: Tensor) -> LegalActions:
        """Some of each row's tuples, none more often than here, with what is known of them."""
        sizes = self.__dict__.get("sizes")
        return LegalActions.trusted(actions, counts, noop, sizes, self.known_distinct)

    @property
    def known_distinct(self) -> bool:
        """Whether it is known, without looking, that no row lists a tuple twice."""
        return self.__dict__.get("merged", ()) is None

    def __getitem__(self, rows: Tensor | slice) -> LegalActions:
        """The lists of some rows, as :meth:`select`."""
        return self.select(rows)[0]

    def select(self, rows: Tensor | slice) -> tuple[LegalActions, Tensor, Tensor]:
        """The lists of R rows, by (B,) bool, (R,) integers (any order, with repeats) or a slice.

        Returns:
            Them; (n,) int64, where each tuple stands in ``actions``; (R,) int64, the rows.

        Raises:
            TypeError: rows of another kind.
            IndexError: a mask of another length, or a row that there is not.
        """
        every = torch.arange(len(self), device=self.rows.device)
        if not isinstance(rows, slice):
            rows = as_tensor(rows)
            if rows.ndim != 1 or rows.is_floating_point() or rows.is_complex():
                raise TypeError(
                    "rows are chosen by (B,) bools, (R,) integers or a slice, got "
                    f"{tuple(rows.shape)} {rows.dtype}"
                )
            rows = rows.to(every.device, None if rows.dtype == torch.bool else torch.int64)
        chosen = every[rows]
        counts = self.counts.index_select(0, chosen)
        of, starts = pack(counts)
        at = places(of, starts) + self.starts.index_select(0, chosen).index_select(0, of)
        return self._some(self.actions.index_select(0, at), counts, self.noop), at, chosen

    def __len__(self) -> int:
        return self.counts.shape[0]

    @property
    def slots(self) -> int:
        """Number of slots after the primary."""
        return self.actions.shape[1] - 1

    def contains(self, actions: Tensor) -> Tensor:
        """Whether each row lists the action; an empty row contains only the no-op.

        (*S, B, H) of any integer or whole-float dtype -> (*S, B) bool.
        """
        actions = self.whole(actions)
        is_noop = (self.counts == 0) & (actions == self.noop).all(-1)
        return is_noop | (self.find(actions) >= 0)

    def find(self, actions: Tensor) -> Tensor:
        """Where each row lists an action: (*S, B, H) int64 -> (*S, B), a position in N or -1."""
        if math.prod(self.sizes) < 2**63:
            ids = ravel(actions, self.sizes)
            outside = (actions < 0) | (actions >= torch.tensor(self.sizes, device=actions.device))
            if outside.any():
                ids = ids.masked_fill(outside.any(-1), -1)
            same = ids.index_select(-1, self.rows) == self.ids
        else:
            pairs = zip(actions.unbind(-1), self.actions.unbind(1), strict=True)
            same = reduce(operator.and_, (a.index_select(-1, self.rows) == b for a, b in pairs))
        hits = same.nonzero(as_tuple=True)
        found = torch.full(actions.shape[:-1], -1, dtype=torch.int64, device=actions.device)
        found[(*hits[:-1], self.rows[hits[-1]])] = hits[-1]
        return found

    def whole(self, actions: Tensor) -> Tensor:
        """Actions (*S, B, H) of any integer or whole-float dtype as int64, checked for shape.

        A value that is not a whole number becomes -1, which no row lists.

        Raises:
            TypeError: bool or complex.
            ValueError: not (*S, B, H).
        """
        return whole_tuples(actions, len(self), self.actions.shape[1])

    def prefix_mask(self, prefix: Tensor, size: int) -> Tensor:
        """Which values of slot j continue a legal tuple; an empty row continues only the no-op.

        (B, j) integers, the first j values of each row's tuple, 0 <= j < H -> (B, size) bool.

        Raises:
            TypeError: no integers.
            ValueError: a prefix of another shape, or a value of a legal tuple, or of the no-op of
                an empty row, that is not below ``size``.
        """
        _check_integer("prefix", prefix)
        batch, width, shape = len(self), self.actions.shape[1], tuple(prefix.shape)
        if len(shape) != 2 or shape[0] != batch or shape[1] >= width:
            raise ValueError(f"prefix must be ({batch}, j) with j < {width}, got {shape}")
        return self._mask(prefix.shape[1], size, prefix.to(torch.int64))

    def head_masks(self, nvec: Sequence[int]) -> list[Tensor]:
        """The marginals, one (B, nvec[j]) bool a slot: which values appear in some legal tuple.

        An empty row shows only the no-op. For comparison: combinations need not be legal.

        Raises:
            ValueError: another number of sizes than slots, or a value not below its size.
        """
        if len(nvec) != self.slots + 1:
            raise ValueError(f"nvec has {len(nvec)} sizes, tuples have {self.slots + 1} values")
        of_any = self.actions.new_empty(len(self), 0)
        return [self._mask(slot, int(size), of_any) for slot, size in enumerate(nvec)]

    def _mask(self, slot: int, size: int, prefix: Tensor) -> Tensor:
        """(B, size) bool: the values in a slot of what begins with prefix (B, j) int64."""
        empty = (self.counts == 0).nonzero().squeeze(1)
        rows = torch.cat([self.rows, empty])
        played = torch.cat([self.actions, self.noop.expand(len(empty), -1)])
        values = played[:, slot]
        if (values >= size).any():
            raise ValueError(f"slot {slot} holds value {values.amax()}, not below its size {size}")
        follows = (prefix.index_select(0, rows) == played[:, : prefix.shape[1]]).all(1)
        mask = torch.zeros(len(self), size, dtype=torch.bool, device=values.device)
        mask[rows[follows], values[follows]] = True
        return mask

    def validate(self, spec: ActionSpec) -> None:
        """Checks that each tuple is within the spec.

        Raises:
            ValueError: naming the row, the tuple, the slot, the value and what is wrong with it.
        """
        if self.slots != spec.slots:
            raise ValueError(f"tuples have {self.slots} slots, the spec has {spec.slots}")
        wrong = self.outside(spec)
        if wrong.any():
            raise ValueError(self.told(int(wrong.any(1).nonzero()[0]), spec))

    def outside(self, spec: ActionSpec) -> Tensor:
        """(N, H) bool: the values that are not within the spec's limits."""
        limits = torch.as_tensor(spec.limits, device=self.actions.device)
        known = self.actions[:, 0].clamp(0, len(limits) - 1)
        return (self.actions < 0) | (self.actions >= limits.index_select(0, known))

    def told(self, n: int, spec: ActionSpec) -> str:
        """Tuple n of the batch, which is outside the spec, and what is wrong with it."""
        row, action = int(self.rows[n]), self.actions[n].tolist()
        place = n - int(self.starts[row])
        return f"row {row}: legal tuple {place} is {tuple(action)}; {spec.explain(action)}"

    @cached_property
    def sizes(self) -> list[int]:
        """Exclusive bound on each of the H values, no-op included."""
        every = torch.cat([self.actions, self.noop.unsqueeze(0)])
        return [int(value) + 1 for value in every.amax(0).tolist()]

    @cached_property
    def _numbers(self) -> tuple[Tensor, int]:
        return number(self.actions.unbind(1), self.sizes)

    @property
    def ids(self) -> Tensor:
        """(N,) int64: equal where tuples are equal, ordered as the tuples are lexicographically."""
        return self._numbers[0]

    @cached_property
    def merged(self) -> tuple[LegalActions, Tensor] | None:
        """Distinct actions, and the (N,) position in them of each listing; None if none repeats."""
        if not self.actions.numel():
            return None
        ids, bound = self._numbers
        keys, _ = number([self.rows, ids], [len(self), bound])
        if (keys[1:] > keys[:-1]).all():
            return None  # listed in order, as many engines do: nothing can repeat, nothing to sort
        keys, order = keys.sort(stable=True)
        repeated = keys[1:] == keys[:-1]
        if not repeated.any():
            return None
        first = torch.cat([repeated.new_ones(1), ~repeated])
        keep = torch.zeros_like(first)
        keep[order[first]] = True
        position = keep.cumsum(0) - 1
        at = torch.empty_like(order)
        at[order] = position[order[first]][first.cumsum(0) - 1]
        counts = torch.zeros_like(self.counts).index_add_(0, self.rows, keep.to(torch.int64))
        return LegalActions.trusted(self.actions[keep], counts, self.noop, self.sizes, True), at

    def distinct(self) -> LegalActions:
        """The same rows with each tuple listed once, in the order of first listing."""
        return self if self.merged is None else self.merged[0]

    def __repr__(self) -> str:
        return f"LegalActions({len(self)} rows, {len(self.actions)} tuples, {self.slots} slots)"


def whole_tuples(actions: Tensor, batch: int, width: int) -> Tensor:
    """As LegalActions.whole, of ``batch`` rows and tuples of ``width`` values."""
    shape = tuple(actions.shape)
    if shape[-2:] != (batch, width):
        raise ValueError(f"actions must be (*, {batch}, {width}), got {shape}")
    if actions.dtype == torch.bool or actions.is_complex():
        raise TypeError(f"actions must be whole numbers, got {actions.dtype}")
    if actions.is_floating_point():
        actions = torch.where(actions == actions.floor(), actions, -1).nan_to_num(-1, -1, -1)
    return actions.to(torch.int64)


def as_tensor(values: Tensor | npt.NDArray[Any]) -> Tensor:
    """As a tensor; an array that torch cannot share (read-only, reversed) is copied."""
    if isinstance(values, np.ndarray) and not (values.flags.carray and values.dtype.isnative):
        values = np.array(values, dtype=values.dtype.newbyteorder("="))
    return torch.as_tensor(values)


def _check_integer(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be an integer tensor, got {type(values).__name__}")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {values.dtype}")


def _own_counts(given: Tensor, most: int, what: str) -> Tensor:
    """(B,) integers, each checked to lie in 0..most, as int64 of their own memory."""
    _check_integer("counts", given)
    if given.ndim != 1:
        raise ValueError(f"counts must be (B,), got {tuple(given.shape)}")
    counts = given.to(torch.int64, copy=True)
    outside = (counts < 0) | (counts > most)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"row {row}: count {given[row].tolist()} must lie in 0..{most}, {what}")
    return counts


def _whole_numbers(where: str, action: Any) -> tuple[int, ...]:
    try:
        values = tuple(action)
        if bool in map(type, values):
            raise TypeError
        values = tuple(map(operator.index, values))
    except TypeError:
        raise TypeError(
            f"{where}{action!r} must be a tuple of whole numbers; a batch is a list of rows, a row "
            "is a list of tuples: [[(0, 1), (2, 0)], []]"
        ) from None
    if max(map(abs, values), default=0) >= 2**63:
        raise ValueError(f"{where}{values} holds a value beyond int64")
    return values
