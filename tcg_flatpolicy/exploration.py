"""Temperature and epsilon of a policy, and what its latest rollout was drawn with.

Draws in train mode are a rollout; the first after an update begins a new one. So that log-probs are
exact, an update raises unless all draws of the latest rollout were made at its settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tcg_flatpolicy.distribution import TupleDistribution


@dataclass(frozen=True)
class Settings:
    """How a distribution explores: p^(1/temperature), then uniform with probability epsilon.

    A compiled graph hands it on without looking at its numbers, so it is compiled once for all.
    """

    temperature: float = 1.0
    epsilon: float = 0.0


class Exploration(nn.Module):
    """The settings, as Python data, and the only writer of their tensor, which graphs read.

    Attributes:
        settings: those that distributions are made with now.
        drawn: the settings of all draws of the latest rollout.
        numbers: (2,) float32, the settings on the policy's device; no part of a checkpoint.
    """

    numbers: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()
        self.drawn: set[Settings] = set()
        self._updated = False
        self.register_buffer("numbers", torch.empty(2), persistent=False)
        self.set()

    def set(self, temperature: float = 1.0, epsilon: float = 0.0) -> None:
        """Sets both, each rounded to float32.

        Raises:
            TypeError: no number.
            ValueError: a temperature that is not positive and finite, an epsilon outside 0..1.
        """
        for name, value in (("temperature", temperature), ("epsilon", epsilon)):
            if isinstance(value, str) or not hasattr(value, "__float__"):
                raise TypeError(f"{name} must be a number, got {value!r}")
        with np.errstate(over="ignore"):
            t, e = (float(np.float32(float(x))) for x in (temperature, epsilon))
        if not 0 < t < np.inf:
            raise ValueError(f"temperature must be positive and finite in float32: {temperature}")
        if not 0 <= float(epsilon) <= 1:
            raise ValueError(f"epsilon must lie in 0..1, got {epsilon}")
        self.settings = Settings(t, e)
        # A graph depends on whether there is any exploration, and not on how much.
        self._tempers, self._smooths = t != 1.0, e != 0.0
        self._write()

    def _write(self) -> None:
        # A new tensor: a graph that is still to run backward may hold the one before. No inference
        # tensor, wherever it is made: no graph could save it for its backward pass.
        values = [self.settings.temperature, self.settings.epsilon]
        with torch.inference_mode(False):
            self.numbers = torch.tensor(values, dtype=torch.float32, device=self.numbers.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Exploration:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._write()  # whatever dtype it was cast to, and also after to_empty()
        return self

    def explored(self, distribution: TupleDistribution) -> TupleDistribution:
        """A distribution with the settings applied."""
        now, compiling = self.settings, torch.compiler.is_compiling()
        numbers: Any = self.numbers if compiling else (now.temperature, now.epsilon)
        if self._tempers:
            distribution = distribution.tempered(numbers[0])
        return distribution.smoothed(numbers[1]) if self._smooths else distribution

    def drew(self, settings: Settings) -> None:
        """A distribution of these settings was drawn from in train mode."""
        if self._updated:
            self.drawn, self._updated = set(), False
        self.drawn.add(settings)

    def check_update(self, settings: Settings) -> None:
        """An update asks a distribution of these settings for a log-prob.

        Raises:
            RuntimeError: a draw of the latest rollout was made at other settings.
        """
        self._updated = True
        for drawn in self.drawn - {settings}:
            raise RuntimeError(
                "exploration was changed between rollout and update: tuples were drawn at "
                f"(temperature, epsilon) = {drawn.temperature, drawn.epsilon}, the update is at "
                f"{settings.temperature, settings.epsilon}; call explore() before a rollout, draw "
                "for an evaluation in policy.eval(), and imitate by policy.distribution()"
            )
