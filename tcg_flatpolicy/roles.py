"""What the value in a slot means: each kind of role is one class, which says all there is to say.

A role says how its values are embedded: by learned rows of its own (`rows` and `weights`), or by
the encoder (`encoded`). Nothing outside this file asks for a kind, so a kind of your own is a
subclass, such as this one, of which near values have near vectors::

    class Amount(Role):
        rows = 3

        def weights(self, values):
            x = values / self.size
            return torch.stack([x, x * x, torch.ones_like(x)], dim=-1)
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor


def _size(what: str, size: object) -> int:
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
        raise TypeError(f"{what} needs a whole number of values, got {size!r}")
    if size < 1:
        raise ValueError(f"{what} needs at least one value, got {size}")
    if size >= 2**63:  # they are int64
        raise ValueError(f"{what} needs at most {2**63 - 1} values, got {size}: number densely")
    return int(size)


@dataclass(frozen=True)
class Role(ABC):
    """What values ``0 .. size-1`` of a slot mean, 1 to 2**63 - 1 of them.

    Roles of one class and name share what is learned about their values.

    Raises:
        TypeError: an empty name, a size that is no whole number, or a class that says neither how
            its values are embedded nor that the encoder does.
        ValueError: a size out of range.
    """

    name: str
    size: int
    encoded: ClassVar[bool] = False
    """Whether the encoder embeds the values: value i is row i of ``Encoding.entities[name]``."""
    rows: ClassVar[Any] = 0
    """How many learned rows the values share; an attribute or a property. 0 if encoded."""

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"{kind} needs a non-empty name, got {self.name!r}")
        object.__setattr__(self, "size", _size(f"{kind}({self.name!r})", self.size))
        if self.encoded == bool(self.rows):
            raise TypeError(
                f"{kind} says {'both' if self.rows else 'neither'} that the encoder embeds its "
                f"values {'and' if self.rows else 'nor'} how its own rows do: set encoded = True, "
                "or rows (how many learned rows) and weights(values)"
            )

    def weights(self, values: Tensor) -> Tensor | None:
        """How much of each learned row a value's vector is: (n,) int64 -> (n, rows) floats.

        None if the vector of value i is row i.
        """
        return None

    def parts(self) -> Iterator[tuple[int, Role]]:
        """(first value, role) of each range of values that a single role describes."""
        yield 0, self

    def describe(self, value: int) -> str:
        """A value in words."""
        return f"{self.name}[{value}]"


@dataclass(frozen=True)
class Index(Role):
    """A plain number ``0 .. size-1`` with a learned row; the same name shares one table."""

    @property
    def rows(self) -> int:
        """One for each value."""
        return self.size


@dataclass(frozen=True)
class Entity(Role):
    """Points at row ``0 .. size-1`` of the entities that the encoder embedded under ``name``."""

    encoded = True


@dataclass(frozen=True, init=False)
class OneOf(Role):
    """Several roles laid end to end in one slot: consecutive ranges of its values.

    ``OneOf(Index("none", 1), Entity("enemy", 6))`` reads 0 as none and 1 to 6 as enemy 0 to 5.

    Raises:
        TypeError: something that is no role.
        ValueError: no role, or more than 2**63 - 1 values.
    """

    roles: tuple[Role, ...]

    def __init__(self, *roles: Role) -> None:
        if not roles:
            raise ValueError("OneOf needs at least one role")
        for role in roles:
            if not isinstance(role, Role):
                raise TypeError(f"OneOf takes roles such as Index and Entity, got {role!r}")
        name = f"OneOf({', '.join(role.name for role in roles)})"
        size = _size(name, sum(role.size for role in roles))
        for attribute, value in (("name", name), ("size", size), ("roles", roles)):
            object.__setattr__(self, attribute, value)

    def parts(self) -> Iterator[tuple[int, Role]]:
        """Those of each role, one after the other."""
        start = 0
        for role in self.roles:
            for first, part in role.parts():
                yield start + first, part
            start += role.size

    def describe(self, value: int) -> str:
        """The value in the words of the role whose range it lies in."""
        first, role = [part for part in self.parts() if part[0] <= max(value, 0)][-1]
        return role.describe(value - first)
