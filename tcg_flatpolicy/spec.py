"""What an action tuple means: primaries, and the role of each of their slots.

A tuple is ``(primary, sub1, sub2, ...)``. The primary is an id; what the value in a slot means
depends on the primary of that same tuple, so roles are declared per primary and looked up by it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, NamedTuple, TypeAlias, overload

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcg_flatpolicy.packing import ravel
from tcg_flatpolicy.roles import Entity, Index, OneOf, Role

__all__ = ["ActionSpec", "Entity", "Index", "IntArray", "OneOf", "Part", "Primary", "Role"]

IntArray: TypeAlias = npt.NDArray[np.int64]

MOST_IDS = 2**20
"""Ids of primaries lie below this: what is looked up by id has a row for each up to the largest."""


@dataclass(frozen=True, init=False)
class Primary:
    """One kind of action: its name, the roles of its slots in order, and its id.

    Args:
        name: unique within a spec.
        slots: roles of sub1, sub2, ...; slots beyond them are unused and must be 0.
        id: the value in the tuple; if left out, an `ActionSpec` gives the next number.
    """

    name: str
    slots: tuple[Role, ...]
    id: int | None

    def __init__(self, name: str, *slots: Role, id: int | None = None) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"Primary needs a non-empty name, got {name!r}")
        for slot in slots:
            if not isinstance(slot, Role):
                raise TypeError(
                    f"Primary({name!r}): a slot is a role such as Index, Entity or OneOf, not "
                    f"{slot!r}"
                )
        if id is not None:
            if isinstance(id, bool) or not isinstance(id, (int, np.integer)):
                raise TypeError(f"Primary({name!r}): id must be a whole number, got {id!r}")
            if id < 0:
                raise ValueError(f"Primary({name!r}): id must not be negative, got {id}")
            if id >= MOST_IDS:
                raise ValueError(
                    f"Primary({name!r}): id must be below {MOST_IDS}, got {id}: number the "
                    "primaries densely"
                )
            id = int(id)
        for attribute, value in (("name", name), ("slots", slots), ("id", id)):
            object.__setattr__(self, attribute, value)


class Part(NamedTuple):
    """Where a single role stands: ``role.size`` values from ``start`` of a primary's slot."""

    primary: int
    slot: int
    start: int
    role: Role


class ActionSpec:
    """Declares once what action tuples mean; sizes, checks and embeddings are derived from it.

    Args:
        primaries: the kinds of action. Ids count up from 0, or from the latest that is given.
        noop: (1 + slots,), what a player without a legal action sends; zeros if left out.

    Raises:
        ValueError: no primaries, a name or an id used twice, or a no-op outside ``nvec``.
    """

    def __init__(self, primaries: Sequence[Primary], noop: Sequence[int] | None = None) -> None:
        if isinstance(primaries, Primary):
            raise TypeError(
                "ActionSpec takes a list of primaries: write ActionSpec([Primary(...)])"
            )
        if not primaries:
            raise ValueError("ActionSpec needs at least one Primary")
        by_id: dict[int, Primary] = {}
        names: set[str] = set()
        next_id = 0
        for primary in primaries:
            if not isinstance(primary, Primary):
                raise TypeError(f"ActionSpec takes Primary objects, got {primary!r}")
            number = next_id if primary.id is None else primary.id
            if number in by_id:
                raise ValueError(
                    f"id {number} is used by {by_id[number].name!r} and {primary.name!r}; "
                    "give one of them another id="
                )
            if primary.name in names:
                raise ValueError(f"two primaries are named {primary.name!r}; names must be unique")
            names.add(primary.name)
            by_id[number] = Primary(primary.name, *primary.slots, id=number)
            next_id = number + 1
        self.primaries: dict[int, Primary] = dict(sorted(by_id.items()))
        """By id, in order of id."""
        slots = max(len(primary.slots) for primary in by_id.values())
        self.limits: IntArray = np.zeros((max(by_id) + 1, 1 + slots), dtype=np.int64)
        """(ids, 1 + slots): a tuple with primary ``p`` is within the spec when each of its values
        is below ``limits[p]``; 1 where a slot is unused, rows of zeros for ids not declared."""
        for number, primary in self.primaries.items():
            sizes = [number + 1, *(role.size for role in primary.slots)]
            self.limits[number] = 1
            self.limits[number, : len(sizes)] = sizes
        self.slots = slots
        """Number of slots after the primary; a tuple has ``1 + slots`` values."""
        self.nvec: IntArray = self.limits.max(axis=0)
        """(1 + slots,) int64: sizes of the MultiDiscrete space."""
        self._ids = math.prod(self.nvec.tolist())

        noop = [0] * (1 + slots) if noop is None else noop
        whole = np.asarray(noop)
        if whole.shape != (1 + slots,) or whole.dtype.kind not in "iu":
            raise ValueError(f"noop must be {1 + slots} whole numbers, got {noop!r}")
        self.noop: IntArray = whole.astype(np.int64)
        """(1 + slots,) int64: what a player without a legal action sends."""
        if ((self.noop < 0) | (self.noop >= self.nvec)).any():
            raise ValueError(f"noop {noop!r} is outside MultiDiscrete sizes {self.nvec.tolist()}")

        self.parts: list[Part] = [
            Part(number, slot, start, role)
            for number, primary in self.primaries.items()
            for slot, of_slot in enumerate(primary.slots)
            for start, role in of_slot.parts()
        ]
        """Each single role of each slot of each primary, a OneOf taken apart."""
        encoded = [part.role.name for part in self.parts if part.role.encoded]
        self.entity_names: tuple[str, ...] = tuple(dict.fromkeys(encoded))
        """The names of the roles that the encoder embeds, each once, in order of first use."""

    @classmethod
    def from_nvec(cls, nvec: Sequence[int], noop: Sequence[int] | None = None) -> ActionSpec:
        """A spec of which only the sizes are known: each slot is a plain Index of every primary."""
        sizes = [operator.index(n) for n in nvec]
        if not sizes or min(sizes) < 1:
            raise ValueError(f"nvec must be sizes of at least 1, got {list(nvec)!r}")
        roles = [Index(f"sub{slot}", size) for slot, size in enumerate(sizes[1:], start=1)]
        return cls([Primary(f"primary{p}", *roles) for p in range(sizes[0])], noop=noop)

    @property
    def action_space(self) -> gymnasium.spaces.MultiDiscrete:
        """The gymnasium space of these tuples, MultiDiscrete(nvec) of int64."""
        return gymnasium.spaces.MultiDiscrete(self.nvec)

    @overload
    def ravel(self, actions: Tensor) -> Tensor: ...
    @overload
    def ravel(self, actions: npt.ArrayLike) -> IntArray: ...
    def ravel(self, actions: Any) -> Any:
        """Tuples to flat ids, mixed radix over ``nvec`` as numpy.ravel_multi_index.

        (..., 1 + slots) integers, a tensor or anything NumPy takes -> (...,) int64, a tensor or
        an array.

        Raises:
            TypeError: not integers.
            ValueError: wrong last dimension, a value outside its size, or a spec of more than
                2**63 - 1 ids.
        """
        if not isinstance(actions, Tensor):
            return self.ravel(_own_tensor(actions)).numpy()
        actions = self._integers("ravel", actions)
        if actions.ndim == 0 or actions.shape[-1] != len(self.nvec):
            raise ValueError(
                f"actions of shape {tuple(actions.shape)} must end in {len(self.nvec)} values"
            )
        outside = (actions < 0) | (actions >= torch.as_tensor(self.nvec, device=actions.device))
        if outside.any():
            where = tuple(outside.nonzero()[0].tolist())
            raise ValueError(
                f"action value {int(actions[where])} at index {where} is outside "
                f"0..{int(self.nvec[where[-1]]) - 1}"
            )
        ids = ravel(actions, self.nvec.tolist())
        return ids.clone() if len(self.nvec) == 1 else ids

    @overload
    def unravel(self, ids: Tensor) -> Tensor: ...
    @overload
    def unravel(self, ids: npt.ArrayLike) -> IntArray: ...
    def unravel(self, ids: Any) -> Any:
        """Flat ids back to tuples: (...,) integers -> (..., 1 + slots) int64.

        Raises:
            TypeError: not integers.
            ValueError: an id outside ``0 .. prod(nvec) - 1``.
        """
        if not isinstance(ids, Tensor):
            return self.unravel(_own_tensor(ids)).numpy()
        ids = self._integers("unravel", ids)
        outside = (ids < 0) | (ids >= self._ids)
        if outside.any():
            raise ValueError(f"id {int(ids[outside].flatten()[0])} is outside 0..{self._ids - 1}")
        columns = []
        for size in self.nvec[:0:-1].tolist():
            columns.append(ids % size)
            ids = torch.div(ids, size, rounding_mode="floor")
        columns.append(ids)
        return torch.stack(columns[::-1], dim=-1)

    def _integers(self, who: str, values: Tensor) -> Tensor:
        if self._ids >= 2**63:
            raise ValueError(f"MultiDiscrete {self.nvec.tolist()} has more ids than int64 holds")
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{who} takes integers, got {values.dtype}")
        return values.to(torch.int64)

    def explain(self, action: Sequence[int]) -> str | None:
        """What is wrong with a tuple of ``1 + slots`` whole numbers, in words; None if nothing is.

        This is about the spec (known primary, values in their roles' ranges, unused slots 0), not
        about what is legal in some state.
        """
        primary = self.primaries.get(int(action[0]))
        if primary is None:
            return f"slot 0 (primary): {int(action[0])} is not a primary of this spec"
        roles = chain(primary.slots, repeat(None))
        for slot, (number, role) in enumerate(zip(action[1:], roles, strict=False), 1):
            value = int(number)
            if role is None and value:
                unused = f"{primary.name} does not use this slot, so it must be 0"
                return f"slot {slot}: {value}, but {unused}"
            if role is not None and not 0 <= value < role.size:
                owner = f"{role.name} of {primary.name}"
                return f"slot {slot}: {value} is outside 0..{role.size - 1}, the range of {owner}"
        return None

    def describe(self, action: Sequence[int] | IntArray | Tensor) -> str:
        """A tuple in words, such as ``"attack(ally[0], enemy[3])"``.

        Raises:
            TypeError: a value that is not a whole number.
            ValueError: the tuple is not within the spec; the message says why.
        """
        values = [operator.index(value) for value in action]
        if len(values) != len(self.nvec):
            raise ValueError(
                f"{values} has {len(values)} values, this spec's tuples have {len(self.nvec)}"
            )
        problem = self.explain(values)
        if problem is not None:
            raise ValueError(f"{tuple(values)} means nothing here: {problem}")
        primary = self.primaries[values[0]]
        pairs = zip(primary.slots, values[1:], strict=False)
        words = [role.describe(value) for role, value in pairs]
        return f"{primary.name}({', '.join(words)})" if words else primary.name

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ActionSpec):
            return NotImplemented
        return self.primaries == other.primaries and bool((self.noop == other.noop).all())

    def __hash__(self) -> int:
        return hash((tuple(self.primaries.items()), tuple(self.noop.tolist())))

    def __repr__(self) -> str:
        return f"ActionSpec({len(self.primaries)} primaries, nvec={self.nvec.tolist()})"


def _own_tensor(values: npt.ArrayLike) -> Tensor:
    """A copy, since torch shares no array that is read-only, reversed or of another byte order."""
    array = np.array(values)
    return torch.as_tensor(array.astype(array.dtype.newbyteorder("=")))
