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
    """A policy that plays from a sharper distribution than it trains with; for evaluation."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.hidden_size = policy.hidden_size

    def forward_eval(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        """As the policy's, with the sharper distribution."""
        return self._sharpen(self.policy.forward_eval(observations, state))

    def forward(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        """As the policy's, with the sharper distribution."""
        return self._sharpen(self.policy(observations, state))

    def _sharpen(self, decided: tuple[LegalNormal, Tensor]) -> tuple[LegalNormal, Tensor]:
        face, value = decided
        return LegalNormal(self.sharpened(face.distribution), face.action_dtype), value

    def sharpened(self, distribution: TupleDistribution) -> TupleDistribution:
        """What is played in the place of the policy's distribution."""
        raise NotImplementedError


class Greedy(_Sharpened):
    """Plays the most probable tuple of a policy; for evaluation.

    Its distribution has all mass on the mode, so log-probs are 0 for it and -inf otherwise.
    """

    def sharpened(self, distribution: TupleDistribution) -> TupleDistribution:
        """All mass on the mode."""
        mode = distribution.mode
        alone = LegalActions.trusted(
            mode, torch.ones_like(mode[:, 0]), mode.new_zeros(mode.shape[1])
        )
        return LegalCategorical(alone, torch.zeros(len(mode), device=mode.device))


class TopK(_Sharpened):
    """Plays one of the k most probable tuples of a policy, renormalised; for evaluation.

    Args:
        policy: with one of this library's heads.
        k: at least 1; 1 is Greedy.

    Raises:
        TypeError: k is not a whole number.
        ValueError: k below 1.
    """

    def __init__(self, policy: Policy, k: int) -> None:
        super().__init__(policy)
        self.k = at_least_one(k)

    def sharpened(self, distribution: TupleDistribution) -> TupleDistribution:
        """The k most probable tuples, renormalised.

        Raises:
            TypeError: a distribution that cannot tell them.
        """
        top = getattr(distribution, "top", None)
        if top is None:
            raise TypeError(
                f"{type(distribution).__name__} has no top(k): TopK needs the flat or the "
                "autoregressive head, or a head whose distribution offers it"
            )
        sharper: TupleDistribution = top(self.k)
        return sharper
