"""Legal-by-construction policies for card games whose engine lists its legal action tuples."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from tcg_flatpolicy import adapters, encoders
from tcg_flatpolicy._moved import OldModules
from tcg_flatpolicy.actor_critic import ActorCritic, Decided
from tcg_flatpolicy.distribution import LegalCategorical
from tcg_flatpolicy.encoders import Encoding, FieldEncoder
from tcg_flatpolicy.heads import HEADS, AutoregressiveHead, FlatHead, Head, LegalAutoregressive
from tcg_flatpolicy.invalid import Dropped, InvalidActionWarning
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.roles import Entity, Index, OneOf, Role
from tcg_flatpolicy.saving import save
from tcg_flatpolicy.scorer import TupleScorer
from tcg_flatpolicy.spec import ActionSpec, Primary
from tcg_flatpolicy.table import Lookup

if TYPE_CHECKING:
    from tcg_flatpolicy.puffer import (
        FlatPolicy,
        Greedy,
        Policy,
        RandomLegal,
        RecurrentPolicy,
        TopK,
        WinRate,
        load,
        play_games,
    )
    from tcg_flatpolicy.puffer.config import config, trainer

__all__ = [
    "HEADS",
    "ActionSpec",
    "ActorCritic",
    "AutoregressiveHead",
    "Decided",
    "Dropped",
    "Encoding",
    "Entity",
    "FieldEncoder",
    "FlatHead",
    "FlatPolicy",
    "Greedy",
    "Head",
    "Index",
    "InvalidActionWarning",
    "LegalActions",
    "LegalAutoregressive",
    "LegalCategorical",
    "LegalLayout",
    "Lookup",
    "OneOf",
    "Policy",
    "Primary",
    "RandomLegal",
    "RecurrentPolicy",
    "Role",
    "TopK",
    "TupleScorer",
    "WinRate",
    "adapters",
    "config",
    "encoders",
    "load",
    "play_games",
    "save",
    "trainer",
]

sys.meta_path.append(OldModules())

_PUFFER = {"FlatPolicy", "Greedy", "Policy", "RecurrentPolicy", "TopK", "WinRate"}
_PUFFER |= {"RandomLegal", "config", "load", "play_games", "trainer"}


def __getattr__(name: str) -> Any:
    if name in _PUFFER:
        return getattr(importlib.import_module("tcg_flatpolicy.puffer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
