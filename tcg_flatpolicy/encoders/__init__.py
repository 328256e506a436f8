"""Encoders: one that takes every field, one that is declared, and what is common to all."""

from tcg_flatpolicy.encoders.base import Encoder, Encoding, FieldEncoder
from tcg_flatpolicy.encoders.declared import Cards, Category, Declared, Entities, Number
from tcg_flatpolicy.encoders.norm import RunningNorm

__all__ = [
    "ENCODERS",
    "Cards",
    "Category",
    "Declared",
    "Encoder",
    "Encoding",
    "Entities",
    "FieldEncoder",
    "Number",
    "RunningNorm",
]

ENCODERS: dict[str, type[FieldEncoder] | type[Declared]] = {
    kind.__name__: kind for kind in (FieldEncoder, Declared)
}
"""Those that a file may name: each says its recipe(), and is made again by of_recipe."""
