"""Legal-by-construction policies for card games whose engine lists its legal action tuples."""

import importlib
from typing import TYPE_CHECKING, Any

from tcg_flatpolicy import encoders
from tcg_flatpolicy.actor_critic import ActorCritic, Decided
from tcg_flatpolicy.distribution import LegalCategorical
from tcg_flatpolicy.encoders import Encoding, FieldEncoder
from tcg_flatpolicy.heads import HEADS, AutoregressiveHead, FlatHead, Head, LegalAutoregressive
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.roles import Entity, Index, OneOf, Role
from tcg_flatpolicy.saving import save
from tcg_flatpolicy.scorer import TupleScorer
from tcg_flatpolicy.spec import ActionSpec, Primary

if TYPE_CHECKING:
    from tcg_flatpolicy.puffer import FlatPolicy, Greedy, Policy, RecurrentPolicy, TopK, load

__all__ = [
    "HEADS",
    "ActionSpec",
    "ActorCritic",
    "AutoregressiveHead",
    "Decided",
    "Encoding",
    "Entity",
    "FieldEncoder",
    "FlatHead",
    "FlatPolicy",
    "Greedy",
    "Head",
    "Index",
    "LegalActions",
    "LegalAutoregressive",
    "LegalCategorical",
    "LegalLayout",
    "OneOf",
    "Policy",
    "Primary",
    "RecurrentPolicy",
    "Role",
    "TopK",
    "TupleScorer",
    "encoders",
    "load",
    "save",
]

_PUFFER = {"FlatPolicy", "Greedy", "Policy", "RecurrentPolicy", "TopK", "load"}


def __getattr__(name: str) -> Any:
    if name in _PUFFER:
        return getattr(importlib.import_module("tcg_flatpolicy.puffer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
