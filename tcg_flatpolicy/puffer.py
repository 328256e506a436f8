"""What PufferLib's trainer asks of what a policy returns, and nothing else.

``pufferlib.pytorch.sample_logits`` has a branch for ``isinstance(logits, Normal)``. It reads
``logits.loc.shape[0]``, draws with ``logits.sample()``, and takes row sums of
``logits.log_prob(action)`` and ``logits.entropy()``. A LegalNormal answers those from a
distribution over tuples, so the trainer runs as it is. After sampling, the trainer clips a Normal's
actions to the bounds of the joint action space, which legal tuples are within.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from tcg_flatpolicy.distribution import LegalCategorical, TupleDistribution
from tcg_flatpolicy.legal import LegalActions


class LegalNormal(Normal):
    """A distribution over tuples behind the face of a Normal, for PufferLib's trainer only.

    Args:
        distribution: batch_shape (B,), event_shape (H,); a LegalCategorical, say.
        action_dtype: of the environment's action space; PufferLib refuses int64 for an int32 space.
        entropy_of: what the trainer's entropy is (B,), given the tuples (B, H) last drawn or asked
            about; the distribution's own if left out.
        exploration: (2,) temperature and epsilon of this distribution.
        drawn_with: (2,) those that tuples were last drawn with. When given, `log_prob` with
            gradients raises where the two differ.
        drew: is told the exploration when tuples are drawn.
    """

    def __init__(
        self,
        distribution: TupleDistribution,
        action_dtype: torch.dtype = torch.int64,
        entropy_of: Callable[[Tensor], Tensor] | None = None,
        exploration: Tensor | None = None,
        drawn_with: Tensor | None = None,
        drew: Callable[[Tensor], None] | None = None,
    ) -> None:
        # Not Normal.__init__: there is no scale. loc is read for its first dimension alone.
        self.distribution = distribution
        self.action_dtype = action_dtype
        self.loc = torch.zeros(*distribution.batch_shape, 1)
        self._entropy_of = entropy_of
        self._exploration, self._drawn_with, self._drew = exploration, drawn_with, drew
        self._actions: Tensor | None = None
        Distribution.__init__(self, distribution.batch_shape, distribution.event_shape, False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """(*S, B, H) legal tuples in the action space's dtype."""
        if self._drew is not None and self._exploration is not None:
            self._drew(self._exploration)
        self._actions = self.distribution.sample(sample_shape).to(self.action_dtype)
        return self._actions

    def log_prob(self, value: Tensor) -> Tensor:
        """(B, H) tuples -> (B, 1): the trainer sums over dimension 1.

        Raises:
            RuntimeError: in an update, if the exploration was changed since the rollout.
        """
        # Here and not in the policy's forward, which may be compiled into a graph.
        if self._drawn_with is not None and torch.is_grad_enabled():
            self._check_exploration()
        self._actions = value
        return self.distribution.log_prob(value).unsqueeze(-1)

    def entropy(self) -> Tensor:
        """(B, 1): the trainer sums over dimension 1."""
        if self._entropy_of is None:
            return self.distribution.entropy().unsqueeze(-1)
        if self._actions is None:
            raise RuntimeError(
                "this head's entropy is an estimate from a tuple: draw one, or ask for a log_prob, "
                "before entropy(); .distribution.entropy() is exact"
            )
        return self._entropy_of(self._actions).unsqueeze(-1)

    def _check_exploration(self) -> None:
        assert self._drawn_with is not None
        assert self._exploration is not None
        if torch.equal(self._drawn_with, self._exploration):
            return
        raise RuntimeError(
            "exploration was changed between rollout and update: tuples were drawn at "
            f"(temperature, epsilon) = {tuple(self._drawn_with.tolist())}, now it is "
            f"{tuple(self._exploration.tolist())}, so their log-probs would be of another "
            "distribution; call explore() before evaluate()"
        )

    @property
    def mode(self) -> Tensor:
        """(B, H) the most probable tuple of each row."""
        return self.distribution.mode.to(self.action_dtype)

    @property
    def mean(self) -> Tensor:
        """(B, H) NaN: tuples are labels."""
        return torch.full(self._extended_shape(), torch.nan)

    @property
    def variance(self) -> Tensor:
        """(B, H) NaN: tuples are labels."""
        return self.mean

    def rsample(self, sample_shape: Any = torch.Size()) -> NoReturn:  # noqa: B008
        """Not offered: a drawn tuple has no gradient."""
        raise NotImplementedError("legal tuples are discrete: use sample() and log_prob()")

    def __getattr__(self, name: str) -> NoReturn:
        # Only reached for what is not there, such as scale.
        raise AttributeError(
            f"LegalNormal has no {name!r}: it wears the face of a Normal only for PufferLib's "
            "sample_logits, and this caller wants a real Gaussian. Use .distribution, or see "
            "tcg_flatpolicy.puffer.check_contract() for whether this PufferLib can be relied on"
        )

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "this PufferLib's sample_logits takes a Normal for a list of logits: it has lost the "
            "branch that tcg_flatpolicy relies on; use pufferlib 3.0.0 or pufferlib-core 3.0.23"
        )


def compensated(config: Mapping[str, Any], share: float = 0.5) -> dict[str, Any]:
    """A trainer's config for an environment in which some rows have empty lists.

    The trainer's loss is a mean over all rows, and the policy's part of it has a gradient in those
    with a list only. So this gives the value loss and the clip of the gradient's norm the size that
    they have without the others: ``vf_coef`` and ``max_grad_norm`` times ``share``. ``ent_coef``
    stays, since the entropy shrinks as the policy gradient does.

    Args:
        config: of PuffeRL; it is not changed.
        share: of rows with a list, above 0 and at most 1; half with two players.

    Raises:
        ValueError: a share out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    return {
        **config,
        "vf_coef": config["vf_coef"] * share,
        "max_grad_norm": config["max_grad_norm"] * share,
    }


def check_contract() -> None:
    """Asks the installed PufferLib whether it still treats a Normal as this library relies on.

    Raises:
        ImportError: PufferLib is not installed.
        RuntimeError: it answers otherwise; the message says what and which versions are known good.
    """
    try:
        from pufferlib.pytorch import sample_logits
    except ImportError as error:
        raise ImportError(MISSING_PUFFERLIB) from error
    try:
        wrong = _departure(sample_logits)
    except Exception as error:
        wrong = f"sample_logits raised {type(error).__name__}: {error}"
    if wrong is not None:
        raise RuntimeError(
            "the installed PufferLib does not treat a Normal as tcg_flatpolicy relies on: "
            f"{wrong}. Known to work: pufferlib 3.0.0 and pufferlib-core 3.0.23"
        )


def _departure(sample_logits: Any) -> str | None:
    """How this sample_logits departs from what LegalNormal needs, in words; None if it does not."""
    legal = LegalActions.from_lists([[(1, 2), (3, 0)], [(0, 5)], []])
    categorical = LegalCategorical(legal, torch.tensor([0.3, -0.2, 0.1]))
    face = LegalNormal(categorical)
    actions, log_probs, entropy = sample_logits(face)
    again, log_probs_again, _ = sample_logits(face, action=actions)
    if not legal.contains(actions).all() or not torch.equal(again, actions):
        return f"sample_logits changed the drawn tuples: {actions.tolist()}"
    if not torch.equal(log_probs, categorical.log_prob(actions)):
        return f"sample_logits changed the log-probs: {log_probs.tolist()}"
    if not torch.equal(log_probs_again, log_probs):
        return "sample_logits gives another log-prob for the same tuples"
    if not torch.equal(entropy, categorical.entropy()):
        return f"sample_logits changed the entropy: {entropy.tolist()}"
    return None


MISSING_PUFFERLIB = (
    "PufferLib is not installed. Install it the way your project does (a fork is fine), or, from a "
    "checkout of this library: pip install '.[puffer]' 'setuptools>=77' wheel, then "
    "PUFFERLIB_DISABLE_CUDA=1 pip install --no-deps --no-build-isolation "
    "--no-binary pufferlib-core pufferlib-core==3.0.23 (without the variable where there is a GPU)"
)
