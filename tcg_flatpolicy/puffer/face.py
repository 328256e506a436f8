"""What PufferLib's trainer asks of what a policy returns, and nothing else.

``pufferlib.pytorch.sample_logits`` has a branch for ``isinstance(logits, Normal)``. It reads
``logits.loc.shape[0]``, draws with ``logits.sample()``, and takes row sums of
``logits.log_prob(action)`` and ``logits.entropy()``. A LegalNormal answers those from a
distribution over tuples. After sampling, the trainer clips a Normal's actions to the bounds of the
joint action space, which legal tuples are within. Shapes: B rows, H values in a tuple.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from tcg_flatpolicy.distribution import TupleDistribution, UnsoundScore
from tcg_flatpolicy.exploration import Exploration
from tcg_flatpolicy.layout import LegalLayout

HUGE = 1e30
"""A number that float32 arithmetic of a network does not survive."""


class _Draws:
    """Tells the exploration of draws and updates.

    A face and its distribution share it: a distribution that held its face would make a cycle.
    """

    def __init__(self, exploration: Exploration | None, training: bool) -> None:
        self.exploration, self.training, self.any = exploration, training, False
        # The object, not its numbers: a compiled graph would be compiled again for others.
        self.settings: Any = None if exploration is None else exploration.settings

    def drew(self) -> None:
        self.any = True
        if self.exploration is not None and self.training:
            self.exploration.drew(self.settings)

    def check_update(self) -> None:
        if self.exploration is not None and not self.any and torch.is_grad_enabled():
            self.exploration.check_update(self.settings)


class LegalNormal(Normal):
    """A distribution over tuples behind the face of a Normal, for PufferLib's trainer only.

    ``face[rows]`` is the face of some rows: a bool mask (B,), int64 numbers of rows, or a slice;
    its entropy is exact, also where that of the whole face is an estimate.

    Args:
        distribution: batch_shape (B,), event_shape (H,); a LegalCategorical, say.
        action_dtype: of the environment's action space; PufferLib refuses int64 for an int32 space.
        entropy_of: what the trainer's entropy is (B,), given the tuples (B, H) last drawn or asked
            about; the distribution's own if left out.
        exploration: is told of draws and updates, with the settings that it has now.
        training: whether draws are part of a rollout.
        seen: a layout and the observations (B, columns), to find what a score of NaN comes from.
    """

    def __init__(
        self,
        distribution: TupleDistribution,
        action_dtype: torch.dtype = torch.int64,
        entropy_of: Callable[[Tensor], Tensor] | None = None,
        exploration: Exploration | None = None,
        training: bool = False,
        seen: tuple[LegalLayout, Tensor] | None = None,
    ) -> None:
        # Not Normal.__init__: there is no scale. loc is read for its first dimension alone.
        self._distribution = distribution
        self.action_dtype = action_dtype
        self.loc = torch.zeros(*distribution.batch_shape, 1)
        self._entropy_of, self._seen = entropy_of, seen
        self._draws = _Draws(exploration, training)
        self._actions: Tensor | None = None
        self._drawn: tuple[Tensor, Tensor, int] | None = None
        Distribution.__init__(self, distribution.batch_shape, distribution.event_shape, False)

    @property
    def distribution(self) -> TupleDistribution:
        """The distribution over tuples. Drawing from it is a draw of this face."""
        if hasattr(self._distribution, "drew"):
            self._distribution.drew = self._draws.drew
        return self._distribution

    @property
    def estimates_entropy(self) -> bool:
        """Whether entropy() is an estimate from the tuples last drawn or asked about."""
        return self._entropy_of is not None

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """(*S, B, H) legal tuples in the action space's dtype."""
        self._draws.drew()
        with self._naming_fields():
            drawn = self._distribution.sample(sample_shape)
        actions = drawn.to(self.action_dtype)
        self._keep(actions)
        if not (torch.compiler.is_compiling() or actions.is_inference()):
            self._drawn = drawn, actions, actions._version
        return actions

    def log_prob(self, value: Tensor) -> Tensor:
        """(B, H) tuples -> (B, 1): the trainer sums over dimension 1.

        With gradients, and of a face that has not drawn, this is an update. It raises a
        RuntimeError if the latest rollout was drawn at other exploration settings.
        """
        # Here and not in the policy's forward, which may be compiled into a graph.
        self._draws.check_update()
        self._keep(value)
        with self._naming_fields():
            return self._distribution.log_prob(self._own(value)).unsqueeze(-1)

    def entropy(self) -> Tensor:
        """(B, 1): the trainer sums over dimension 1."""
        if self._entropy_of is None:
            with self._naming_fields():
                return self._distribution.entropy().unsqueeze(-1)
        if self._actions is None:
            raise RuntimeError(
                "this head's entropy is an estimate from a tuple: draw one, or ask for a log_prob, "
                "before entropy(); .distribution.entropy() is exact"
            )
        return self._entropy_of(self._actions).unsqueeze(-1)

    def __getitem__(self, rows: Any) -> LegalNormal:
        some: Any = self._distribution
        seen = self._seen and (self._seen[0], self._seen[1][rows])
        with self._naming_fields():
            face = LegalNormal(some[rows], self.action_dtype, seen=seen)
        face._draws = copy.copy(self._draws)
        return face

    @contextlib.contextmanager
    def _naming_fields(self) -> Iterator[None]:
        """Names the field of the observation that an unsound score comes from."""
        try:
            yield
        except UnsoundScore as error:
            if self._seen is None:
                raise
            layout, observations = self._seen
            for field in layout.fields():
                values = layout.field(observations[error.row : error.row + 1], field.name)
                wrong = ~(values.abs() < HUGE) if values.is_floating_point() else values != values
                if wrong.any():
                    why = f"the observation's field {field.name!r} holds {values[wrong][0].item()}"
                    raise UnsoundScore(error.row, error.what, error.score, why) from None
            raise

    def _own(self, value: Tensor) -> Tensor:
        """What the distribution drew, if that is what it is asked about: it need not look again."""
        if self._drawn is None or torch.compiler.is_compiling():
            return value
        drawn, actions, version = self._drawn
        same = value.data_ptr() == actions.data_ptr() and value.dtype == actions.dtype
        same = same and (value.shape, value.stride()) == (actions.shape, actions.stride())
        return drawn if same and actions._version == version else value

    def _keep(self, actions: Tensor) -> None:
        """Remembers what the entropy is of; a copy, since a trainer may write over its tuples."""
        if self._entropy_of is not None:
            self._actions = actions.clone()

    @property
    def mode(self) -> Tensor:
        """(B, H) the most probable tuple of each row."""
        return self._distribution.mode.to(self.action_dtype)

    @property
    def mean(self) -> Tensor:
        """(B, H) NaN: tuples are labels."""
        return torch.full(self._extended_shape(), torch.nan)

    variance = mean

    def rsample(self, sample_shape: Any = torch.Size()) -> NoReturn:  # noqa: B008
        """Not offered: a drawn tuple has no gradient, so this raises NotImplementedError."""
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
