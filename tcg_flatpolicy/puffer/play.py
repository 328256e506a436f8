"""Policies that play from a sharper distribution than they train with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tcg_flatpolicy.distribution import LegalCategorical, TupleDistribution, at_least_one
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.puffer.face import LegalNormal
from tcg_flatpolicy.puffer.policy import Policy


class _Sharpened(nn.Module):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.hidden_size = policy.hidden_size

    def forward_eval(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        return self._sharpen(*self.policy.forward_eval(observations, state))

    def forward(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        return self._sharpen(*self.policy(observations, state))

    def _sharpen(self, face: LegalNormal, value: Tensor) -> tuple[LegalNormal, Tensor]:
        return LegalNormal(self.sharpened(face.distribution), face.action_dtype), value

    def sharpened(self, distribution: TupleDistribution) -> TupleDistribution:
        raise NotImplementedError


class Greedy(_Sharpened):
    """Plays the most probable tuple of a policy; for evaluation.

    Its distribution has all mass on the mode, so log-probs are 0 for it and -inf otherwise.
    """

    def sharpened(self, distribution: TupleDistribution) -> TupleDistribution:
        """All mass on the mode."""
        mode = distribution.mode
        one, noop = torch.ones_like(mode[:, 0]), mode.new_zeros(mode.shape[1])
        alone = LegalActions.trusted(mode, one, noop)
        return LegalCategorical(alone, torch.zeros(len(mode), device=mode.device))


class TopK(_Sharpened):
    """Plays one of the k most probable tuples of a policy, renormalised; for evaluation.

    Args:
        policy: with one of this library's heads, or a distribution that has a ``top``.
        k: at least 1, else a ValueError (no whole number: a TypeError); 1 is Greedy.
    """

    def __init__(self, policy: Policy, k: int) -> None:
        super().__init__(policy)
        self.k = at_least_one(k)

    def sharpened(self, distribution: TupleDistribution) -> TupleDistribution:
        """The k most probable tuples; a TypeError if the distribution cannot tell them."""
        top = getattr(distribution, "top", None)
        if top is None:
            raise TypeError(
                f"{type(distribution).__name__} has no top(k): TopK needs the flat or the "
                "autoregressive head, or a head whose distribution offers it"
            )
        sharper: TupleDistribution = top(self.k)
        return sharper


class RandomLegal(_Sharpened):
    """Plays a uniformly drawn legal tuple: an opponent that needs no training."""

    def sharpened(self, distribution: TupleDistribution) -> TupleDistribution:
        """The same mass on each tuple of the list."""
        legal = distribution.legal
        return LegalCategorical(legal, torch.zeros(len(legal.rows), device=legal.rows.device))
