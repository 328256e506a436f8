"""A batch of legal action tuples, packed: one row of memory per legal tuple, none for padding.

Shapes: B rows (states), N legal tuples in the whole batch, H = 1 + slots values in a tuple.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcg_flatpolicy.spec import ActionSpec


class LegalActions:
    """The legal tuples of each of B rows, laid end to end.

    Args:
        actions: (N, H) integers, the tuples of row 0, then those of row 1, ...
        counts: (B,) integers, how many of them belong to each row; zeros allowed.
        noop: (H,) integers, what a row without a legal action plays; zeros if left out.

    Raises:
        TypeError: not integer tensors.
        ValueError: shapes that do not fit, a negative value, or counts that do not sum to N.
    """

    actions: Tensor
    """(N, H) int64: the legal tuples, packed by row."""
    counts: Tensor
    """(B,) int64: number of legal tuples of each row."""
    noop: Tensor
    """(H,) int64: what a row without a legal action plays."""
    rows: Tensor
    """(N,) int64: the row of each legal tuple, ascending."""
    starts: Tensor
    """(B,) int64: where each row's tuples begin in ``actions``."""

    def __init__(self, actions: Tensor, counts: Tensor, noop: Tensor | None = None) -> None:
        _check_integer("actions", actions)
        _check_integer("counts", counts)
        if actions.ndim != 2 or actions.shape[1] < 1:
            raise ValueError(f"actions must be (N, 1 + slots), got {tuple(actions.shape)}")
        if counts.ndim != 1:
            raise ValueError(f"counts must be (B,), got {tuple(counts.shape)}")
        if noop is None:
            noop = torch.zeros(actions.shape[1], dtype=torch.int64, device=actions.device)
        noop = torch.as_tensor(noop)
        _check_integer("noop", noop)
        if noop.shape != actions.shape[1:]:
            raise ValueError(f"noop must be ({actions.shape[1]},), got {tuple(noop.shape)}")
        counts = counts.to(torch.int64)
        _check_counts(counts, None)
        if int(counts.sum()) != actions.shape[0]:
            raise ValueError(
                f"counts sum to {int(counts.sum())}, but there are {len(actions)} actions"
            )
        noop = noop.to(actions.device, torch.int64)
        if (noop < 0).any():
            raise ValueError(f"noop {tuple(noop.tolist())} must not be negative")
        self._set(actions.to(torch.int64), counts, noop)
        self._check_not_negative()

    def _set(
        self,
        actions: Tensor,
        counts: Tensor,
        noop: Tensor,
        packing: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.actions = actions
        self.counts = counts
        self.noop = noop
        if packing is None:
            rows = torch.repeat_interleave(counts, output_size=actions.shape[0])
            packing = rows, counts.cumsum(0) - counts
        self.rows, self.starts = packing

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
        """Without the checks of the constructor, for a caller that has made them.

        Args:
            actions: (N, H) int64, none negative.
            counts: (B,) int64, summing to N.
            noop: (H,) int64.
            sizes: a bound on each of the H values, exclusive, where the caller knows one.
            distinct: the caller knows that no row lists a tuple twice.
            packing: (rows, starts) as they follow from the counts, where the caller has them.
        """
        legal = cls.__new__(cls)
        legal._set(actions, counts, noop, packing)
        if sizes is not None:
            legal.__dict__["_sizes"] = [int(size) for size in sizes]
        if distinct:
            legal.__dict__["_merge"] = None
        return legal

    @classmethod
    def from_lists(
        cls,
        lists: Sequence[Sequence[Sequence[int]]],
        slots: int | None = None,
        noop: Sequence[int] | None = None,
    ) -> LegalActions:
        """From one list of tuples a row.

        Args:
            lists: B lists of tuples of ``1 + slots`` whole numbers; empty lists allowed.
            slots: may be left out when some tuple, or ``noop``, shows it.
            noop: tuple of ``1 + slots`` values; zeros if left out.

        Raises:
            TypeError: a value that is not a whole number.
            ValueError: a tuple of another length or with a negative value, or an unknown ``slots``.
        """
        flat = [action for row in lists for action in row]
        if slots is None:
            shown = flat[0] if flat else noop
            if shown is None:
                raise ValueError("every list is empty: say how many slots a tuple has, slots=...")
            slots = len(shown) - 1
        width = 1 + slots
        for row, actions in enumerate(lists):
            for action in actions:
                if len(action) != width:
                    raise ValueError(
                        f"row {row}: {tuple(action)} has {len(action)} values, not {width}"
                    )
        array = np.array([tuple(action) for action in flat]).reshape(len(flat), width)
        if len(flat) and array.dtype.kind not in "iu":
            raise TypeError(f"action values must be whole numbers, got {array.dtype}")
        counts = torch.tensor([len(row) for row in lists], dtype=torch.int64)
        return cls(
            torch.as_tensor(array.astype(np.int64)),
            counts,
            None if noop is None else torch.as_tensor(np.asarray(noop)),
        )

    @classmethod
    def from_padded(
        cls,
        actions: Tensor | npt.NDArray[np.integer],
        counts: Tensor | npt.NDArray[np.integer],
        noop: Tensor | None = None,
    ) -> LegalActions:
        """From a padded array, of which the first ``counts[b]`` tuples of row b are legal.

        Args:
            actions: (B, K, H) integers; what stands in the padding does not matter.
            counts: (B,) integers, 0 to K.

        Raises:
            TypeError: not integers.
            ValueError: shapes that do not fit, a count outside 0..K, or a negative value.
        """
        actions, counts = _as_tensor(actions), _as_tensor(counts)
        _check_integer("actions", actions)
        _check_integer("counts", counts)
        if actions.ndim != 3 or counts.shape != actions.shape[:1]:
            raise ValueError(
                f"actions must be (B, K, H) and counts (B,), got {tuple(actions.shape)} and "
                f"{tuple(counts.shape)}"
            )
        counts = counts.to(torch.int64)
        padding = actions.shape[1]
        _check_counts(counts, padding)
        n = int(counts.sum())
        rows = torch.repeat_interleave(counts, output_size=n)
        places = torch.arange(n, device=counts.device) - (counts.cumsum(0) - counts)[rows]
        flat = actions.reshape(-1, actions.shape[2])
        # Not flat[...]: torch 2.4 cannot do that with all unsigned integers.
        return cls(flat.index_select(0, rows * padding + places), counts, noop)

    @classmethod
    def from_mask(cls, mask: Tensor | npt.NDArray[np.bool_], spec: ActionSpec) -> LegalActions:
        """From a flat mask over all tuple ids: (B, prod(nvec)) bool, ids as ``spec.ravel``.

        Raises:
            TypeError: not bool.
            ValueError: another number of columns than the spec has ids. An id that is set but no
                tuple of the spec's roles is left to :meth:`validate`.
        """
        mask = _as_tensor(mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        ids = math.prod(spec.nvec.tolist())
        if mask.ndim != 2 or mask.shape[1] != ids:
            raise ValueError(f"mask must be (B, {ids}), got {tuple(mask.shape)}")
        return cls.trusted(
            spec.unravel(mask.nonzero()[:, 1]),
            mask.sum(1),
            torch.as_tensor(spec.noop, device=mask.device),
            sizes=spec.nvec.tolist(),
            distinct=True,
        )

    def to_mask(self, spec: ActionSpec) -> Tensor:
        """(B, prod(nvec)) bool, the inverse of :meth:`from_mask`; empty rows are all False."""
        ids = math.prod(spec.nvec.tolist())
        mask = torch.zeros(len(self), ids, dtype=torch.bool, device=self.actions.device)
        mask[self.rows, spec.ravel(self.actions)] = True
        return mask

    def to_lists(self) -> list[list[tuple[int, ...]]]:
        """One list of tuples a row."""
        flat = [tuple(action) for action in self.actions.tolist()]
        starts, counts = self.starts.tolist(), self.counts.tolist()
        return [flat[start : start + count] for start, count in zip(starts, counts, strict=True)]

    def to(self, device: torch.device | str) -> LegalActions:
        """The same lists on another device."""
        moved = LegalActions.trusted(
            self.actions.to(device), self.counts.to(device), self.noop.to(device)
        )
        if "_sizes" in self.__dict__:
            moved.__dict__["_sizes"] = self._sizes
        if self.__dict__.get("_merge", ()) is None:
            moved.__dict__["_merge"] = None
        return moved

    def __len__(self) -> int:
        return self.counts.shape[0]

    @property
    def slots(self) -> int:
        """Number of slots after the primary."""
        return self.actions.shape[1] - 1

    def contains(self, actions: Tensor) -> Tensor:
        """Whether each row lists the action; an empty row contains only the no-op.

        Args:
            actions: (*S, B, H), any integer or whole-float dtype.

        Returns:
            (*S, B) bool.
        """
        actions = self.whole(actions)
        is_noop = (self.counts == 0) & (actions == self.noop).all(-1)
        return is_noop | (self.find(actions) >= 0)

    def find(self, actions: Tensor) -> Tensor:
        """Where each row lists an action: (*S, B, H) int64 -> (*S, B) position in N, or -1.

        Of an action that is listed more than once, one of the positions.
        """
        sizes = self._sizes
        if self._packs_into_ids:
            ids = _horner(actions, sizes)
            outside = (actions < 0) | (actions >= torch.tensor(sizes, device=actions.device))
            if outside.any():
                ids = ids.masked_fill(outside.any(-1), -1)
            same = ids.index_select(-1, self.rows) == self.ids
        else:
            same = (actions.index_select(-2, self.rows) == self.actions).all(-1)
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
        if actions.shape[-2:] != (len(self), self.actions.shape[1]):
            raise ValueError(
                f"actions must be (*, {len(self)}, {self.actions.shape[1]}), "
                f"got {tuple(actions.shape)}"
            )
        if actions.dtype == torch.bool or actions.is_complex():
            raise TypeError(f"actions must be whole numbers, got {actions.dtype}")
        if actions.is_floating_point():
            return (
                torch.where(actions == actions.floor(), actions, -1).nan_to_num(-1, -1, -1).long()
            )
        return actions.to(torch.int64)

    def prefix_mask(self, prefix: Tensor, size: int) -> Tensor:
        """Which values of the next slot continue a legal tuple.

        Args:
            prefix: (B, j) integers, the first j values of each row's tuple, 0 <= j < H.
            size: number of values of slot j.

        Returns:
            (B, size) bool; an empty row continues only the no-op.

        Raises:
            ValueError: a prefix of another shape, or a legal value not below ``size``.
        """
        _check_integer("prefix", prefix)
        if prefix.ndim != 2 or len(prefix) != len(self) or prefix.shape[1] >= self.actions.shape[1]:
            raise ValueError(
                f"prefix must be ({len(self)}, j) with j < {self.actions.shape[1]}, "
                f"got {tuple(prefix.shape)}"
            )
        prefix = prefix.to(torch.int64)
        slot = prefix.shape[1]
        self._check_below(slot, size)
        follows = torch.ones_like(self.rows, dtype=torch.bool)
        for i in range(slot):
            follows &= prefix[:, i].index_select(0, self.rows) == self.actions[:, i]
        mask = torch.zeros(len(self), size, dtype=torch.bool, device=self.actions.device)
        mask[self.rows[follows], self.actions[follows, slot]] = True
        idle = (self.counts == 0) & (prefix == self.noop[:slot]).all(1)
        mask[idle, self.noop[slot]] = True
        return mask

    def head_masks(self, nvec: Sequence[int]) -> list[Tensor]:
        """The marginals, one (B, nvec[j]) bool a slot: which values appear in some legal tuple.

        An empty row shows only the no-op. Combinations of marginally legal values need not be
        legal: this is for comparison.

        Raises:
            ValueError: another number of sizes than slots, or a legal value not below its size.
        """
        if len(nvec) != self.actions.shape[1]:
            raise ValueError(
                f"nvec has {len(nvec)} sizes, tuples have {self.actions.shape[1]} values"
            )
        masks = []
        for slot, size in enumerate(int(n) for n in nvec):
            self._check_below(slot, size)
            mask = torch.zeros(len(self), size, dtype=torch.bool, device=self.actions.device)
            mask[self.rows, self.actions[:, slot]] = True
            mask[self.counts == 0, self.noop[slot]] = True
            masks.append(mask)
        return masks

    def validate(self, spec: ActionSpec) -> None:
        """Checks that each tuple is within the spec.

        Raises:
            ValueError: naming the row, the tuple, the slot, the value and what is wrong with it.
        """
        if self.slots != spec.slots:
            raise ValueError(f"tuples have {self.slots} slots, the spec has {spec.slots}")
        if not self.actions.numel():
            return
        primaries = self.actions[:, 0]
        limits = torch.as_tensor(spec.limits, device=self.actions.device)
        if (
            self.actions.min() >= 0
            and primaries.amax() < len(limits)
            and not (self.actions >= limits.index_select(0, primaries)).any()
        ):
            return
        for n, action in enumerate(self.actions.tolist()):
            problem = spec.explain(action)
            if problem is not None:
                row = int(self.rows[n])
                raise ValueError(
                    f"row {row}: legal tuple {n - int(self.starts[row])} is {tuple(action)}; "
                    f"{problem}"
                )

    @cached_property
    def _sizes(self) -> list[int]:
        """Exclusive bound on each of the H values, no-op included."""
        if not self.actions.numel():
            return [int(value) + 1 for value in self.noop.tolist()]
        largest = torch.maximum(self.actions.amax(0), self.noop).tolist()
        return [int(value) + 1 for value in largest]

    @property
    def _packs_into_ids(self) -> bool:
        return math.prod(self._sizes) * max(len(self), 1) < 2**63

    @cached_property
    def ids(self) -> Tensor:
        """(N,) int64: equal where tuples are equal, ordered as the tuples are lexicographically."""
        if self._packs_into_ids:
            return _horner(self.actions, self._sizes)
        ranks: Tensor = torch.unique(self.actions, dim=0, return_inverse=True)[1]
        return ranks

    @cached_property
    def _merge(self) -> tuple[LegalActions, Tensor] | None:
        """Distinct actions, and the (N,) position in them of each listing; None if none repeats."""
        if not self.actions.numel():
            return None
        # ids below N when they are ranks, else below the product that _packs_into_ids bounded.
        bound = math.prod(self._sizes) if self._packs_into_ids else self.actions.shape[0]
        keys = torch.add(self.ids, self.rows, alpha=bound)
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
        merged = torch.empty_like(order)
        merged[order] = position[order[first]][first.cumsum(0) - 1]
        counts = torch.zeros_like(self.counts).index_add_(0, self.rows, keep.to(torch.int64))
        kept = LegalActions.trusted(
            self.actions[keep], counts, self.noop, self._sizes, distinct=True
        )
        return kept, merged

    def distinct(self) -> LegalActions:
        """The same rows with each tuple listed once, in the order of first listing."""
        return self if self._merge is None else self._merge[0]

    def _check_not_negative(self) -> None:
        if self.actions.numel() and self.actions.min() < 0:
            n, slot = (self.actions < 0).nonzero()[0].tolist()
            raise ValueError(
                f"row {int(self.rows[n])}: action {tuple(self.actions[n].tolist())} is negative in "
                f"slot {slot}"
            )

    def _check_below(self, slot: int, size: int) -> None:
        values = torch.cat([self.actions[:, slot], self.noop[slot : slot + 1]])
        if values.amax() >= size:
            raise ValueError(
                f"slot {slot} holds value {int(values.amax())}, not below its size {size}"
            )

    def __repr__(self) -> str:
        return f"LegalActions({len(self)} rows, {len(self.actions)} tuples, {self.slots} slots)"


def _horner(actions: Tensor, sizes: Sequence[int]) -> Tensor:
    ids = actions[..., 0]
    for slot in range(1, len(sizes)):
        ids = torch.add(actions[..., slot], ids, alpha=sizes[slot])
    return ids


def _as_tensor(values: Tensor | npt.NDArray[Any]) -> Tensor:
    """As a tensor; an array that torch cannot share (read-only, reversed) is copied."""
    if isinstance(values, np.ndarray) and not (values.flags.carray and values.dtype.isnative):
        values = np.array(values, dtype=values.dtype.newbyteorder("="))
    return torch.as_tensor(values)


def _check_integer(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be an integer tensor, got {type(values).__name__}")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {values.dtype}")


def _check_counts(counts: Tensor, padding: int | None) -> None:
    """(B,) int64 counts: none negative, none above the padding where there is one."""
    outside = counts < 0
    if padding is not None:
        outside = outside | (counts > padding)
    if outside.any():
        row = int(outside.nonzero()[0])
        limit = "be negative" if padding is None else f"lie outside 0..{padding}, the padded length"
        raise ValueError(f"row {row}: count {int(counts[row])} must not {limit}")
