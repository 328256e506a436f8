"""Other ways to choose a tuple, for comparison; not in the library: two of them act illegally.

Each is a head for ``fp.Policy(env, head=...)``: the same encoder, trainer and environment, about as
many parameters as the library's heads, and written with the same care for speed.

- `MasksPerHead`: one masked categorical for each value of the tuple, drawn independently. The mask
  of a head is the marginal of the legal list, so what is drawn together need not be listed.
- `MasksOfGreedyPrimary`: the same, but the later heads are masked for the most probable primary,
  while the primary that is drawn is played. Their masks then describe a tuple other than the one
  played whenever another primary is drawn.
- `FixedHead`: one masked categorical over all tuples that the spec allows, numbered once and for
  all: legal, but a tuple is a number to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

import tcg_flatpolicy as fp
from tcg_flatpolicy.heads import HeadFactory

MASKED = -1e8
"""What masked logits are commonly set to; finite, so that no stored action has -inf."""


class IndependentHeads(Distribution):
    """One masked categorical a head, drawn independently; batch_shape (B,), event_shape (H,).

    Args:
        legal: the legal tuples of B rows.
        logits: (B, sum(nvec)) floats, head after head.
        masks: (B, sum(nvec)) bool, at least one of each head.
        nvec: (H,) sizes of the heads.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}

    def __init__(
        self, legal: fp.LegalActions, logits: Tensor, masks: Tensor, nvec: list[int]
    ) -> None:
        self.legal = legal
        self.masks = masks
        masked = torch.where(masks, logits.float(), MASKED)
        self.heads = [head.log_softmax(1) for head in masked.split(nvec, dim=1)]
        """H of (B, nvec[j]) log-probabilities."""
        batch, values = torch.Size([len(legal)]), torch.Size([len(nvec)])
        super().__init__(batch, values, validate_args=False)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """(*S, B, H) int64, each value drawn by itself."""
        shape = torch.Size(sample_shape)
        drawn = []
        for head in self.heads:
            running = head.exp().cumsum(1)
            uniform = torch.rand(len(running), shape.numel()) * running[:, -1:]
            # The first value whose running sum exceeds the number, so never one of probability 0.
            drawn.append(torch.searchsorted(running, uniform, right=True))
        return torch.stack(drawn, dim=-1).transpose(0, 1).reshape(shape + self._extended_shape())

    def log_prob(self, value: Tensor) -> Tensor:
        """(B, H) -> (B,): the sum over heads."""
        value = value.long()
        return torch.stack(
            [head.gather(1, value[:, j : j + 1]).squeeze(1) for j, head in enumerate(self.heads)]
        ).sum(0)

    def entropy(self) -> Tensor:
        """(B,): the sum over heads, of tuples as they are drawn, legal or not."""
        return torch.stack([-(head.exp() * head).sum(1) for head in self.heads]).sum(0)

    @property
    def mode(self) -> Tensor:
        """(B, H): the most probable value of each head."""
        return torch.stack([head.argmax(1) for head in self.heads], dim=1)


class MasksPerHead(nn.Module):
    """A head with one layer and then plain logits of each value; masked by the marginals."""

    def __init__(
        self,
        spec: fp.ActionSpec,
        hidden_size: int,
        entity_sizes: Mapping[str, tuple[int, int]],
        width: int,
    ) -> None:
        super().__init__()
        self.nvec = spec.nvec.tolist()
        # Twice the width, for about as many parameters as the library's heads.
        self.net = nn.Sequential(
            nn.Linear(hidden_size, 2 * width), nn.ReLU(), nn.Linear(2 * width, sum(self.nvec))
        )
        near_uniform(self.net[2])
        ends = np.cumsum(self.nvec)
        self.register_buffer("begins", torch.as_tensor(ends - self.nvec), persistent=False)

    def masks(self, legal: fp.LegalActions, logits: Tensor) -> Tensor:
        """(B, sum(nvec)) bool: which values some legal tuple has; of an empty row the no-op's."""
        return self.marginals(legal, legal.rows, legal.actions)

    def marginals(self, legal: fp.LegalActions, rows: Tensor, actions: Tensor) -> Tensor:
        """(B, sum(nvec)) bool: which values these of its tuples have, all heads in one write."""
        masks = torch.zeros(len(legal), sum(self.nvec), dtype=torch.bool, device=rows.device)
        starts = rows * sum(self.nvec)
        masks.view(-1).index_fill_(0, (actions + self.begins + starts.unsqueeze(1)).flatten(), True)
        masks[(legal.counts == 0).nonzero(), legal.noop + self.begins] = True
        return masks

    def forward(
        self, hidden: Tensor, entities: Mapping[str, Tensor], legal: fp.LegalActions
    ) -> IndependentHeads:
        logits = self.net(hidden).float()
        return IndependentHeads(legal, logits, self.masks(legal, logits.detach()), self.nvec)


class MasksOfGreedyPrimary(MasksPerHead):
    """The same network; the later heads' masks are those of the most probable primary."""

    def masks(self, legal: fp.LegalActions, logits: Tensor) -> Tensor:
        masks = super().masks(legal, logits)
        primaries = self.nvec[0]
        greedy = torch.where(masks[:, :primaries], logits[:, :primaries], MASKED).argmax(1)
        follows = greedy.index_select(0, legal.rows) == legal.actions[:, 0]
        of_greedy = self.marginals(legal, legal.rows[follows], legal.actions[follows])
        of_greedy[:, :primaries] = masks[:, :primaries]
        return of_greedy


class FixedHead(nn.Module):
    """One logit for each tuple that the spec allows at all, masked to the legal list."""

    numbers: Tensor

    def __init__(
        self,
        spec: fp.ActionSpec,
        hidden_size: int,
        entity_sizes: Mapping[str, tuple[int, int]],
        width: int,
    ) -> None:
        super().__init__()
        self.spec = spec
        tuples = every_tuple(spec)
        numbers = np.full(int(spec.nvec.prod()), -1, dtype=np.int64)
        numbers[spec.ravel(tuples)] = np.arange(len(tuples))
        self.register_buffer("numbers", torch.as_tensor(numbers), persistent=False)
        self.net = nn.Sequential(
            nn.Linear(hidden_size, width), nn.ReLU(), nn.Linear(width, len(tuples))
        )
        near_uniform(self.net[2])

    def forward(
        self, hidden: Tensor, entities: Mapping[str, Tensor], legal: fp.LegalActions
    ) -> fp.LegalCategorical:
        logits = self.net(hidden).float()  # (B, tuples)
        ids = legal.actions[:, 0]
        for slot, size in enumerate(self.spec.nvec.tolist()[1:], start=1):
            ids = torch.add(legal.actions[:, slot], ids, alpha=size)
        at = self.numbers.index_select(0, ids) + legal.rows * logits.shape[1]
        return fp.LegalCategorical(legal, logits.flatten().index_select(0, at))


HEADS: dict[str, str | HeadFactory] = {
    "flat": "flat",
    "autoregressive": "autoregressive",
    "masks per head": MasksPerHead,
    "masks of the greedy primary": MasksOfGreedyPrimary,
    "fixed numbers": FixedHead,
}
"""What is compared, by the names in its tables; each as ``fp.Policy(env, head=...)`` takes it."""


COLOURS = {
    "flat": "#0072B2",
    "autoregressive": "#D55E00",
    "autoregressive, exact entropy": "#56B4E9",
    "masks per head": "#009E73",
    "masks of the greedy primary": "#CC79A7",
    "fixed numbers": "#E69F00",
}
"""Of each head, in every picture; those of Okabe and Ito, which colour-blind people tell apart."""

_T = TypeVar("_T", Tensor, np.ndarray)


def ignore_unused(spec: fp.ActionSpec, actions: _T) -> _T:
    """Tuples (..., H) with 0 in the slots that their primary does not use, as engines read them."""
    used = spec.limits > 1
    used[:, 0] = True
    if isinstance(actions, Tensor):
        return actions * torch.as_tensor(used, device=actions.device)[actions[..., 0].long()]
    return actions * used[actions[..., 0]]


def every_tuple(spec: fp.ActionSpec) -> np.ndarray:
    """(M, H) int64: every tuple within the spec, in order."""
    blocks = []
    for number, primary in spec.primaries.items():
        values = np.argwhere(np.ones([role.size for role in primary.slots], dtype=bool))
        block = np.zeros((len(values), 1 + spec.slots), dtype=np.int64)
        block[:, 0] = number
        block[:, 1 : 1 + values.shape[1]] = values
        blocks.append(block)
    return np.concatenate(blocks)


def near_uniform(last: nn.Linear) -> None:
    """Small weights in the last layer, as the library's heads start."""
    nn.init.orthogonal_(last.weight, 0.01)
    nn.init.zeros_(last.bias)
