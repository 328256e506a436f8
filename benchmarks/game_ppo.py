"""The game's own PPO tool, as it ships, trained and timed like the heads that are compared.

``essence_wars.agents.ppo`` numbers all 542 actions and masks a fixed head; it has a network, a
trainer, hyperparameters and a normalisation of observations of its own. Only decks, opponent, seed,
device and number of steps are set here, and its evaluations and checkpoints in between are put off.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from essence_wars._core import ACTION_SPACE_SIZE
from essence_wars.agents.ppo import PPOConfig, PPOTrainer
from torch import Tensor, nn

from tcg_flatpolicy.games.essence_wars import INDEX_TO_TUPLE, SPEC, TUPLE_TO_INDEX

NAME = "the game's own PPO"
SHIPPED = PPOConfig(device="cpu")
ROLLOUT = SHIPPED.batch_size
"""Environment steps of a rollout."""

OnUpdate = Callable[[int, int, int, float], None]
"""Called after each update with the steps so far, games and wins of its rollout, and entropy."""


class Player(nn.Module):
    """What the tool trained, as a policy for :func:`tcg_flatpolicy.app.evaluate.play`.

    Args:
        trainer: whose network and normalisation of observations are used, as they are then.
        layout: of the environment that is played, an `EssenceWars`.
        mode: play the most probable action, instead of drawing one.
    """

    def __init__(self, trainer: PPOTrainer, layout: Any, mode: bool) -> None:
        super().__init__()
        self.trainer = trainer
        self.layout = layout
        self.mode = mode
        self.hidden_size = trainer.config.hidden_dim
        self.register_buffer("tuples", torch.as_tensor(INDEX_TO_TUPLE.astype(np.int64)))
        self.register_buffer("indices", torch.as_tensor(TUPLE_TO_INDEX))

    @torch.no_grad()
    def forward_eval(self, observations: Tensor, state: Any = None) -> tuple[Chosen, None]:
        """Observations (B, nbytes) -> what to play, and no value."""
        states = self.layout.field(observations, "state").numpy()
        normalizer = self.trainer.obs_normalizer
        if normalizer is not None:
            states = normalizer.normalize(states).astype(np.float32)
        legal = self.layout.read(observations)
        mask = torch.zeros(len(observations), ACTION_SPACE_SIZE, dtype=torch.bool)
        mask[legal.rows, self.indices[SPEC.ravel(legal.actions)]] = True
        self.trainer.network.eval()
        action, _, _ = self.trainer.network.get_action(
            torch.as_tensor(states), mask, deterministic=self.mode
        )
        return Chosen(self.tuples[action]), None


class Chosen:
    """Tuples that are already chosen, (B, 4) int64, where a distribution is asked for."""

    def __init__(self, actions: Tensor) -> None:
        self.actions = actions

    def sample(self) -> Tensor:
        """(B, 4) int64."""
        return self.actions


def make_trainer(
    deck1: str, deck2: str, seed: int, steps: int, learning_rate: float, ent_coef: float
) -> PPOTrainer:
    """The tool's trainer, against the greedy opponent, on the CPU.

    Args:
        deck1: of the side that learns; "random" for the tool's own way to train on all decks, which
            changes both decks of all games every 25,000 steps.
        deck2: of the opponent; "random" if and only if deck1 is.
        seed: of torch, numpy and random, which the tool draws from.
        steps: environment steps, at least one rollout.
        learning_rate: of Adam; it ships with 3e-4.
        ent_coef: weight of the entropy; it ships with 0.02.

    Raises:
        ValueError: one deck is "random" and the other is not.
    """
    if (deck1 == "random") != (deck2 == "random"):
        raise ValueError(
            f"deck1={deck1!r}, deck2={deck2!r}: the game's own PPO trains on all decks or on a "
            "pair; take 'random' for both or for none"
        )
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    never = 10**12
    config = PPOConfig(
        player_deck=None if deck1 == "random" else deck1,
        opponent_deck=None if deck2 == "random" else deck2,
        opponent_type="greedy",
        total_timesteps=steps,
        learning_rate=learning_rate,
        ent_coef=ent_coef,
        eval_interval=never,
        save_best=False,
        device="cpu",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return PPOTrainer(config)


def train(trainer: PPOTrainer, on_update: OnUpdate) -> None:
    """Trains for the trainer's steps, in whole rollouts.

    The tool ends its training with a hundred games of its own. Time it by ``on_update``, which is
    not called after them.
    """

    def callback(step: int, info: dict[str, Any]) -> bool:
        done = trainer.buffer.dones > 0
        wins = done & (trainer.buffer.rewards > 0)
        on_update(step, int(done.sum()), int(wins.sum()), float(info["entropy"]))
        return False

    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(callback=callback)
