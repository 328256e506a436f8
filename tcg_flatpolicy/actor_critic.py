"""The actor-critic: observations to a distribution over legal tuples and a value; no trainer.

Shapes: S segments of T steps (one step: T = 1), B = S * T rows, D hidden size, H values in a tuple.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tcg_flatpolicy.critic import Critic
from tcg_flatpolicy.distribution import TupleDistribution
from tcg_flatpolicy.encoders import Encoder, Encoding, FieldEncoder
from tcg_flatpolicy.exploration import Exploration
from tcg_flatpolicy.heads import HeadFactory, decide, make_head
from tcg_flatpolicy.invalid import Dropped
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.memory import LSTM, Carried
from tcg_flatpolicy.operators import wide
from tcg_flatpolicy.saving import save
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.table import Embedded


class Decided(NamedTuple):
    """What an actor-critic makes of a batch."""

    distribution: TupleDistribution
    """Over the tuples of B rows, segment after segment."""
    value: Tensor
    """(B, 1), in float32 or better."""
    carried: Carried
    """What the memory carries on; () without one."""


class ActorCritic(nn.Module):
    """Encoder, memory, head and value, in this order.

    Args:
        spec: what tuples mean.
        layout: where the legal list is.
        head: how a tuple is chosen: "flat" (one categorical over the list), "autoregressive" (slot
            after slot), or a factory of your own, see :mod:`tcg_flatpolicy.heads`.
        encoder: observations -> Encoding; a FieldEncoder if left out.
        hidden_size: of the FieldEncoder; an encoder of your own brings its own.
        width: of the head's hidden layer.
        recurrent: whether there is an LSTM, as wide as the encoder.
        first_step: name of a field that is not 0 in a game's first step, where the LSTM forgets.
        invalid: what a listed tuple outside the spec does: "raise", or "drop", which leaves it out
            of the list, counts it in ``dropped`` and warns once of each kind.
        critic_only: names of fields that the value sees and nothing else does: the encoder gets
            zeros in their place, and a FieldEncoder leaves them out.

    Raises:
        KeyError: no field named first_step, or as critic_only says.
        TypeError: an encoder that does not declare its sizes, or a first_step that is a struct.
        ValueError: an argument out of its range, or two that do not fit: spec and layout, an
            Entity that the encoder does not embed, a first_step with no LSTM to clear.
    """

    def __init__(
        self,
        spec: ActionSpec,
        layout: LegalLayout,
        *,
        head: str | HeadFactory = "flat",
        encoder: nn.Module | None = None,
        hidden_size: int = 256,
        width: int = 64,
        recurrent: bool = False,
        first_step: str | None = None,
        invalid: str = "raise",
        critic_only: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if invalid not in ("raise", "drop"):
            raise ValueError(f"invalid must be 'raise' or 'drop', got {invalid!r}")
        self.spec, self.width = spec, width
        self.layout = layout.with_spec(spec, Dropped() if invalid == "drop" else None)
        self.critic_only = tuple(critic_only)
        self.encoder = encoder or FieldEncoder(self.layout, hidden_size, self.critic_only)
        if not isinstance(self.encoder, Encoder):
            raise TypeError(
                f"{type(self.encoder).__name__} must declare hidden_size and entity_sizes "
                "({name: (n, E)}; {} if it embeds none)"
            )
        self.hidden_size = int(self.encoder.hidden_size)
        self.head = make_head(head, spec, self.hidden_size, self.encoder.entity_sizes, width)
        self.value: Any = nn.Linear(self.hidden_size, 1)
        if critic_only:
            self.value = Critic(self.layout, self.critic_only, self.hidden_size)
        self.exploration = Exploration()
        if recurrent:
            self.lstm = LSTM(self.hidden_size)
        self.recurrent, self.first_step = recurrent, first_step
        if first_step is not None:
            if first_step in critic_only:
                raise ValueError(
                    f"first_step={first_step!r} is read by the policy; not critic_only"
                )
            if not recurrent:
                raise ValueError(f"first_step={first_step!r} clears an LSTM, and there is none")
            numbers = self.layout.find(first_step).numbers
            if numbers != 1:
                raise ValueError(f"first_step={first_step!r} must be one number, it has {numbers}")

    def explore(self, temperature: float = 1.0, epsilon: float = 0.0) -> None:
        """Makes exploration part of the policy: p^(1/temperature), then uniform with epsilon.

        A temperature above 1 flattens; epsilon is the share of draws that are uniform over the
        legal tuples. It holds in rollout and update alike, so log-probs stay exact. Draws in train
        mode are a rollout, draws in eval mode are not; an update raises unless all draws of the
        latest rollout were made at its settings. It is saved in the state_dict. With an
        autoregressive head it scores the whole list, and the trainer's entropy is then exact.

        Raises:
            TypeError: no number.
            ValueError: a temperature that is not positive and finite, an epsilon outside 0..1.
        """
        self.exploration.set(temperature, epsilon)

    @property
    def temperature(self) -> float:
        """Rounded to float32; explore() sets it."""
        return self.exploration.settings.temperature

    @property
    def epsilon(self) -> float:
        """Rounded to float32; explore() sets it."""
        return self.exploration.settings.epsilon

    @property
    def dropped(self) -> int:
        """How many listings outside the spec were left out, each time that they were read."""
        return self.layout.dropped.count if self.layout.dropped else 0

    def save(self, path: str | Path) -> None:
        """Writes weights, spec, layout and recipes to one file, whole; ``fp.load`` reads it."""
        save(self, path)

    def forward(self, observations: Tensor, carried: Carried | None = None) -> Any:
        """Decides (S, columns) of one step or (S, T, columns) of segments: a Decided of S * T rows.

        ``carried`` is what the memory carried so far; None at the start. A legal list that is
        broken or not within the spec raises a ValueError that names the row.
        """
        return self.run(observations, carried)

    def run(self, observations: Tensor, carried: Carried | None = None) -> Decided:
        """What forward does, for subclasses that give a trainer something else."""
        shape = tuple(observations.shape)
        if len(shape) not in (2, 3):
            raise ValueError(
                f"observations must be (rows, columns) or (segments, horizon, columns), got {shape}"
            )
        rows = observations.flatten(0, -2)
        hidden, entities = self.encode(rows)
        hidden, carried = self.remember(hidden, observations, carried)
        return Decided(self.decide(rows, hidden, entities), self.values(hidden, rows), carried)

    def encode(self, rows: Tensor) -> Encoding:
        """Observations (B, columns) -> hidden (B, D) and entities {name: (B, n, E)}."""
        if self.critic_only:
            rows = self.value.hide(rows)
        encoding = self.encoder(rows)
        if not isinstance(encoding, tuple) or len(encoding) != 2:
            raise TypeError(
                f"{type(self.encoder).__name__} gave a {type(encoding).__name__}; an encoder "
                "returns tcg_flatpolicy.Encoding(hidden, entities), entities {} if it embeds none"
            )
        return Encoding(*encoding)

    def remember(
        self, hidden: Tensor, observations: Tensor, carried: Carried | None
    ) -> tuple[Tensor, Carried]:
        """Hidden (B, D) of (S, columns) or (S, T, columns) observations -> (B, D) with memory."""
        if not self.recurrent:
            return hidden, ()
        shape = observations.shape[:-1] if observations.ndim == 3 else (len(observations), 1)
        first = None
        if self.first_step is not None:
            marks = self.layout.field(observations.flatten(0, -2), self.first_step)
            first = (marks != 0).reshape(shape)
        hidden, carried = self.lstm(hidden.unflatten(0, shape), carried, first)
        return hidden.flatten(0, 1), carried

    def decide(self, rows: Tensor, hidden: Tensor, entities: Embedded) -> TupleDistribution:
        """Observations (B, columns), hidden (B, D), {name: (B, n, E)} -> the distribution."""
        return decide(self.head, rows, self.layout, hidden, entities, self.exploration)

    def values(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Hidden (B, D), observations (B, columns) -> (B, 1), in float32 or better."""
        return wide(self.value(hidden, rows) if self.critic_only else self.value(hidden))

    def __setattr__(self, name: str, value: Any) -> None:
        ours = name == "lstm" and isinstance(value, nn.LSTM)
        super().__setattr__(name, LSTM.of(value) if ours else value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("temperature", "epsilon"):
            destination[prefix + name] = torch.tensor(getattr(self, name))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        names = [prefix + name for name in ("temperature", "epsilon")]
        _, _, missing_keys, unexpected_keys, error_msgs = others
        missing_keys += [name for name in names if name not in state_dict]
        super()._load_from_state_dict(state_dict, prefix, *others)
        if all(name in state_dict for name in names):
            try:
                self.explore(*(float(state_dict[name]) for name in names))
            except ValueError as error:
                error_msgs.append(str(error))
        unexpected_keys[:] = [name for name in unexpected_keys if name not in names]
