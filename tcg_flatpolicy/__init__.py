"""Legal-by-construction policies for card games whose engine lists its legal action tuples."""

from tcg_flatpolicy.distribution import LegalCategorical
from tcg_flatpolicy.heads import HEADS, AutoregressiveHead, FlatHead, LegalAutoregressive
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.policy import (
    Encoding,
    FieldEncoder,
    FlatPolicy,
    Greedy,
    Policy,
    RecurrentPolicy,
    TopK,
)
from tcg_flatpolicy.roles import Entity, Index, OneOf, Role
from tcg_flatpolicy.scorer import TupleScorer
from tcg_flatpolicy.spec import ActionSpec, Primary

__all__ = [
    "HEADS",
    "ActionSpec",
    "AutoregressiveHead",
    "Encoding",
    "Entity",
    "FieldEncoder",
    "FlatHead",
    "FlatPolicy",
    "Greedy",
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
]
