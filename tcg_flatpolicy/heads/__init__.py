"""Ways to choose a legal tuple, behind one interface.

A head is an nn.Module, ``head(hidden, entities, legal)``, that returns a distribution over the
tuples of each row. :class:`tcg_flatpolicy.Policy` takes any: one of these by its name, or a class
or function of your own, called as ``Head(spec, hidden_size, entity_sizes, width)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tcg_flatpolicy.heads.autoregressive import AutoregressiveHead
from tcg_flatpolicy.heads.base import Head, HeadFactory, decide
from tcg_flatpolicy.heads.flat import FlatHead
from tcg_flatpolicy.sequential import Conditionals, LegalAutoregressive
from tcg_flatpolicy.spec import ActionSpec

__all__ = [
    "HEADS",
    "AutoregressiveHead",
    "Conditionals",
    "FlatHead",
    "Head",
    "HeadFactory",
    "LegalAutoregressive",
    "decide",
    "make_head",
]


HEADS: dict[str, HeadFactory] = {"flat": FlatHead, "autoregressive": AutoregressiveHead}
"""The heads of this library, by name."""


def make_head(
    head: str | HeadFactory,
    spec: ActionSpec,
    hidden_size: int,
    entity_sizes: Mapping[str, tuple[int, int]],
    width: int,
) -> nn.Module:
    """A head by its name in :data:`HEADS`, or by a factory.

    Raises:
        ValueError: an unknown name, or an Entity of the spec that is not among the entities.
        TypeError: neither a name nor a factory, or a factory that makes no module.
    """
    if isinstance(head, str):
        if head not in HEADS:
            raise ValueError(f"no head is named {head!r}; take one of {sorted(HEADS)}")
        head = HEADS[head]
    if isinstance(head, nn.Module) or not callable(head):
        raise TypeError(
            f"head must be a name or a factory (spec, hidden_size, entity_sizes, width) -> module, "
            f"such as the class itself, got {head!r}"
        )
    try:
        made: Any = head(spec, hidden_size, entity_sizes, width)
    except TypeError as error:
        raise TypeError(
            f"head {head!r} is called with (spec, hidden_size, entity_sizes, width): {error}"
        ) from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"{head!r} made {type(made).__name__}, a head is an nn.Module")
    return made
