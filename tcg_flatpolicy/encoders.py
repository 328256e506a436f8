"""From observations to what a policy decides by: the state's vector and those of its entities.

Shapes: B rows of observations, D hidden size, n entities of a name, E their size, F numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from numpy import ndindex
from torch import Tensor, nn

from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.operators import wide


class Encoding(NamedTuple):
    """What an encoder makes of a batch of observations."""

    hidden: Tensor
    """(B, D) state."""
    entities: Mapping[str, Tensor] = {}
    """{name: (B, n, E)}: what an Entity slot can point at; absent things are rows like others."""


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

    def __init__(self, layout: LegalLayout, hidden_size: int = 256) -> None:
        super().__init__()
        self.layout = layout
        self.hidden_size = hidden_size
        self.entity_sizes: dict[str, tuple[int, int]] = {}
        self.fields = [field for field in layout.fields() if not layout.is_legal_list(field)]
        numbers = sum(field.numbers for field in self.fields)
        if not numbers:
            raise ValueError(f"{layout} has no field besides the legal list: nothing to decide by")
        first, second = nn.Linear(numbers, hidden_size), nn.Linear(hidden_size, hidden_size)
        norms = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.net = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU())

    def recipe(self) -> dict[str, Any]:
        """The arguments after the layout, in plain values."""
        return {"hidden_size": self.hidden_size}

    def named_axes(self) -> dict[str, tuple[Any, ...]]:
        """What the columns of the first layer are of; see :mod:`tcg_flatpolicy.saving`."""
        places = ((field.name, place) for field in self.fields for place in ndindex(field.shape))
        columns = {f"{name}{list(place) or ''}": 1 for name, place in places}
        return {"net.0.weight": ("net.0.weight", None, columns)}

    def forward(self, observations: Tensor) -> Encoding:
        """Observations (B, columns) as LegalLayout.read takes them -> hidden (B, D)."""
        dtype = next(self.net.parameters()).dtype
        exact = torch.promote_types(dtype, torch.float32)
        columns = [self.layout.field(observations, field.name) for field in self.fields]
        x = torch.cat([column.unsqueeze(-1).flatten(1).to(exact) for column in columns], dim=1)
        return Encoding(self.net((x.sign() * x.abs().log1p()).to(dtype)))


class RunningNorm(nn.Module):
    """Numbers less their mean, divided by their deviation, over all rollouts so far.

    Statistics are gathered in rollouts (forwards in train mode without gradients) and put in force
    at the first such forward after an update (one in train mode with gradients). So they stand
    still between a rollout and its update, and the importance ratio starts at 1. Before the first
    update the numbers pass as they are. NaN and inf are left out of the statistics; inf comes out
    as clip, and NaN as NaN, of which the policy raises when it draws. Under torch.distributed the
    statistics are those of all processes, which must then begin their rollouts together.

    Args:
        size: F; below 1 raises a ValueError.
        clip: the result lies within -clip and clip.
        eps: added to the variance.
    """

    mean: Tensor
    scale: Tensor
    totals: Tensor
    gathered: Tensor
    due: Tensor

    def __init__(self, size: int, clip: float = 10.0, eps: float = 1e-5) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size, self.clip, self.eps = size, clip, eps
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(size, dtype=torch.float64))
        # Count, mean and sum of squared deviations, in force and gathered since then.
        self.register_buffer("totals", torch.zeros(3, size, dtype=torch.float64))
        self.register_buffer("gathered", torch.zeros(3, size, dtype=torch.float64))
        self.register_buffer("due", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """(..., F) floats -> (..., F), in their dtype; another F raises a ValueError."""
        if x.shape[-1] != self.size:
            raise ValueError(f"x must be (..., {self.size}), got {tuple(x.shape)}")
        if self.training and torch.is_grad_enabled():
            self.due.fill_(True)
        elif self.training:
            if self.due:
                self._put_in_force()
            numbers = x.detach().reshape(-1, self.size).double()
            known = numbers.isfinite()
            rows = torch.stack([known.double(), numbers.where(known, 0), 0 * known.double()], 1)
            self.gathered.copy_(_together(torch.cat([self.gathered.unsqueeze(0), rows])))
        shifted = (wide(x) - self.mean) * self.scale
        return shifted.clamp(-self.clip, self.clip).to(x.dtype)

    def _put_in_force(self) -> None:
        parts = [self.gathered]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [torch.empty_like(part) for part in parts * torch.distributed.get_world_size()]
            torch.distributed.all_gather(parts, self.gathered)
        self.totals.copy_(_together(torch.stack([self.totals, *parts])))
        count, mean, squares = self.totals
        self.mean.copy_(mean)
        self.scale.copy_((squares / count + self.eps).rsqrt().where(count > 0, 1))
        self.gathered.zero_()
        self.due.fill_(False)

    def _apply(self, fn: object, recurse: bool = True) -> RunningNorm:
        """Statistics keep their float64, whatever dtype the weights are cast to."""
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in exact.items():
            if not values.is_meta:
                setattr(self, name, values.to(getattr(self, name).device))
        return self


def _together(parts: Tensor) -> Tensor:
    """Statistics (P, 3, F) of parts -> (3, F) of all together, after Chan et al. (1983)."""
    counts, means, squares = parts.unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp(min=1)
    return torch.stack([count, mean, (squares + counts * (means - mean) ** 2).sum(0)])


ENCODERS: dict[str, Callable[..., nn.Module]] = {"FieldEncoder": FieldEncoder}
"""Those that a file may name; each is called with a layout and what its recipe() gives."""
