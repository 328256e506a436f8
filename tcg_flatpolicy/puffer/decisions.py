"""How sure a policy is of its decisions, and an entropy weight that keeps it less sure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

SATURATED = (0.999, 0.999999)
"""Probabilities of a decision's best tuple above which it is saturated: the entropy's gradient
vanishes there, so neither exploration nor an entropy bonus changes what is played."""


class Decisions(NamedTuple):
    """Of some rows' decisions."""

    number: int
    """Rows with a legal tuple."""
    entropy: float
    """Their mean entropy in nats; NaN without such rows."""
    choices: int
    """Rows with at least two distinct legal tuples."""
    saturated: tuple[float, ...]
    """Of the choices, the share whose best tuple's probability is above each of `SATURATED`."""


def shares(tops: Iterable[float]) -> tuple[float, ...]:
    """Of probabilities, the share above each of `SATURATED`; NaN for none."""
    found = list(tops)
    return tuple(
        sum(top > bar for top in found) / len(found) if found else math.nan for bar in SATURATED
    )


@torch.no_grad()
def decisions(policy: Any, observations: Tensor) -> Decisions:
    """Looks at a policy's decisions as an update sees them; draws nothing.

    Args:
        policy: of this library.
        observations: (rows, columns), or (segments, horizon, columns).
    """
    distribution = policy.distribution(observations)[0]
    counts = distribution.legal.counts
    acts, chooses = counts > 0, counts > 1
    entropy = distribution.entropy()[acts]
    tops = distribution.log_prob(distribution.mode).exp()[chooses].tolist()
    mean = float(entropy.mean()) if len(entropy) else math.nan
    return Decisions(int(acts.sum()), mean, len(tops), shares(tops))


class EntropyTarget:
    """Holds the entropy of a decision near a target, by the entropy weight of PuffeRL's loss.

    Call it after each ``trainer.train()``. It multiplies ``trainer.config["ent_coef"]`` by
    exp(rate (1 - entropy / target)), so that the weight grows while decisions are surer than
    wanted. The entropy is exact, of the rows that have a legal tuple in the last rollout.

    Args:
        trainer: a PuffeRL of a policy of this library. Its ent_coef must be above 0.
        target: nats a decision.
        rate: of the weight's change.
        least, most: bounds of the weight.
        rows: at most so many of the last rollout are looked at.

    Raises:
        ValueError: a target, rate or ent_coef that is not above 0.
    """

    def __init__(
        self,
        trainer: Any,
        target: float,
        rate: float = 0.1,
        least: float = 1e-6,
        most: float = 1.0,
        rows: int = 2048,
    ) -> None:
        weight = trainer.config["ent_coef"]
        for name, value in (("target", target), ("rate", rate), ("ent_coef", weight)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.trainer, self.target, self.rate = trainer, target, rate
        self.least, self.most, self.rows = least, most, rows

    def __call__(self) -> Decisions:
        """Sets the weight for the next update; returns what it was set by."""
        seen = self.trainer.observations
        found = decisions(
            self.trainer.uncompiled_policy, seen[: max(1, self.rows // seen.shape[1])]
        )
        if found.number:
            weight = self.trainer.config["ent_coef"]
            weight *= math.exp(self.rate * (1 - found.entropy / self.target))
            self.trainer.config["ent_coef"] = min(self.most, max(self.least, weight))
        return found
