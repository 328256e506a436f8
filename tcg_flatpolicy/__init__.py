"""Legal-by-construction policies for card games whose engine lists its legal action tuples."""

from tcg_flatpolicy.distribution import LegalCategorical
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.policy import Encoding, FieldEncoder, FlatPolicy, Greedy, RecurrentFlatPolicy
from tcg_flatpolicy.scorer import TupleScorer
from tcg_flatpolicy.spec import ActionSpec, Entity, Index, OneOf, Primary

__all__ = [
    "ActionSpec",
    "Encoding",
    "Entity",
    "FieldEncoder",
    "FlatPolicy",
    "Greedy",
    "Index",
    "LegalActions",
    "LegalCategorical",
    "LegalLayout",
    "OneOf",
    "Primary",
    "RecurrentFlatPolicy",
    "TupleScorer",
]
