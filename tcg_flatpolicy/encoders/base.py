"""From observations to what a policy decides by: the state's vector and those of its entities.

Shapes: B rows of observations, D hidden size, n entities of a name, E their size, F numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from numpy import ndindex
from torch import Tensor, nn

from tcg_flatpolicy.fields import Field
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.table import Lookup


class Encoding(NamedTuple):
    """What an encoder makes of a batch of observations."""

    hidden: Tensor
    """(B, D) state."""
    entities: Mapping[str, Tensor | Lookup] = {}
    """{name: (B, n, E)}: what an Entity slot can point at; absent things are rows like others.
    What is looked up in a table, a :class:`Lookup` gives without a copy for each row."""


@runtime_checkable
class Encoder(Protocol):
    """An nn.Module, observations (B, columns) -> Encoding, that declares D and {name: (n, E)}."""

    hidden_size: int
    entity_sizes: Mapping[str, tuple[int, int]]

    def __call__(self, observations: Tensor) -> Encoding:
        """Encodes a batch."""


class FieldEncoder(nn.Module):
    """The default encoder: every field of the observation except the legal list, normalised.

    Numbers become sign(x) log(1 + |x|), so that hit points and identifiers of very different sizes
    can share a layer; then linear, layer norm, relu, twice. It embeds no entities; an encoder of
    your own that does will play better. Raises a ValueError if there is no other field.
    """

    def __init__(
        self, layout: LegalLayout, hidden_size: int = 256, without: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.layout = layout
        self.hidden_size, self.without = hidden_size, list(without)
        self.entity_sizes: dict[str, tuple[int, int]] = {}
        self.fields = [
            field
            for field in layout.fields()
            if not layout.is_legal_list(field) and field.name not in self.without
        ]
        numbers = sum(field.numbers for field in self.fields)
        if not numbers:
            raise ValueError(f"{layout} has no field besides the legal list: nothing to decide by")
        first, second = nn.Linear(numbers, hidden_size), nn.Linear(hidden_size, hidden_size)
        norms = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.net = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU())

    @classmethod
    def of_recipe(cls, layout: LegalLayout, recipe: Mapping[str, Any]) -> FieldEncoder:
        """Another one, from what :meth:`recipe` gave."""
        return cls(layout, **recipe)

    def recipe(self) -> dict[str, Any]:
        """The arguments after the layout, in plain values."""
        return {"hidden_size": self.hidden_size, "without": self.without}

    def named_axes(self) -> dict[str, tuple[Any, ...]]:
        """What the columns of the first layer are of; see :mod:`tcg_flatpolicy.saving`."""
        return {"net.0.weight": ("net.0.weight", None, columns_of(self.fields))}

    def forward(self, observations: Tensor) -> Encoding:
        """Observations (B, columns) as LegalLayout.read takes them -> hidden (B, D)."""
        dtype = next(self.net.parameters()).dtype
        return Encoding(self.net(numbers_of(self.layout, self.fields, observations, dtype)))


def numbers_of(
    layout: LegalLayout, fields: Sequence[Field], observations: Tensor, dtype: torch.dtype
) -> Tensor:
    """(B, numbers) of fields, each as sign(x) log(1 + |x|)."""
    exact = torch.promote_types(dtype, torch.float32)
    columns = [layout.field(observations, field.name) for field in fields]
    x = torch.cat([column.unsqueeze(-1).flatten(1).to(exact) for column in columns], dim=1)
    return (x.sign() * x.abs().log1p()).to(dtype)


def columns_of(fields: Sequence[Field]) -> dict[str, int]:
    """A column for each number of fields: an axis as in :mod:`tcg_flatpolicy.saving`."""
    places = ((field.name, place) for field in fields for place in ndindex(field.shape))
    return {f"{name}{list(place) or ''}": 1 for name, place in places}
