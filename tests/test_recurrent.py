"""Policies with a memory: our own, and PufferLib's LSTMWrapper around a feed-forward one.

What is held of each, with both heads, on the Bandit and on a real game.
"""

from __future__ import annotations

import math
from typing import Any

import pufferlib.models
import pufferlib.vector
import pytest
import torch
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.games.essence_wars import EssenceWars, EssenceWarsEncoder
from tests.games import Bandit, BanditEncoder

pytestmark = pytest.mark.integration

KINDS, HEADS, GAMES = ["own", "stock wrapper"], ["flat", "autoregressive"], ["bandit", "game"]


def make(kind: str, head: str, game: str, num_agents: int) -> tuple[Any, nn.Module]:
    """A vector environment and an untrained recurrent policy for it."""
    torch.manual_seed(0)
    creator, kwargs = {
        "bandit": (Bandit, {"num_agents": num_agents, "empty": 0.3}),
        "game": (EssenceWars, {"num_games": num_agents}),
    }[game]
    vecenv = pufferlib.vector.make(
        creator, env_kwargs=kwargs, backend=pufferlib.vector.Serial, num_envs=1, seed=1
    )
    env = vecenv.driver_env
    encoder: nn.Module = (
        BanditEncoder(env.legal_layout)
        if game == "bandit"
        else EssenceWarsEncoder(env.legal_layout, 64, 16)
    )
    if kind == "own":
        return vecenv, fp.RecurrentPolicy(env, head=head, encoder=encoder)
    policy = fp.Policy(env, head=head, encoder=encoder)
    size = policy.hidden_size
    return vecenv, pufferlib.models.LSTMWrapper(env, policy, size, size)


def zero_state(policy: Any, rows: int) -> dict[str, Tensor]:
    """As the trainer begins with."""
    return {name: torch.zeros(rows, policy.hidden_size) for name in ("lstm_h", "lstm_c")}


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("each_kernel")
def test_a_rollout_of_single_steps_and_an_update_of_segments_agree(
    kind: str, head: str, game: str
) -> None:
    rows, horizon = 16, 6
    vecenv, policy = make(kind, head, game, rows)
    env = vecenv.driver_env
    env.reset(3)
    state: dict[str, Any] = zero_state(policy, rows)
    observations, actions, log_probs, values, forgetful = [], [], [], [], []
    with torch.no_grad():
        for _ in range(horizon):
            observations.append(torch.as_tensor(env.observations).clone())
            forgotten, _ = policy.forward_eval(observations[-1], zero_state(policy, rows))
            face, value = policy.forward_eval(observations[-1], state)
            actions.append(face.sample())
            log_probs.append(face.log_prob(actions[-1])[:, 0])
            forgetful.append(forgotten.log_prob(actions[-1])[:, 0])
            values.append(value.flatten())
            env.step(actions[-1].numpy())
    assert env.illegal_actions == 0

    segments = torch.stack(observations, 1)  # (rows, horizon, columns), as the trainer keeps them
    face, value = policy(segments, {"lstm_h": None, "lstm_c": None})
    stored = torch.stack(actions, 1).view(rows * horizon, -1)
    drawn = torch.stack(log_probs, 1)
    again = face.log_prob(stored)[:, 0].view(rows, horizon)
    assert value.shape == (rows, horizon)
    torch.testing.assert_close(again, drawn, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value, torch.stack(values, 1), rtol=1e-4, atol=1e-5)
    # The memory is used: without it, the first step alone would agree.
    without = (torch.stack(forgetful, 1) - drawn).abs()
    assert without[:, 0].max() < 1e-6
    assert without[:, 1:].max() > 1e-3


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_policy_is_near_uniform_over_the_list(kind: str, head: str, game: str) -> None:
    """The stock wrapper draws every matrix anew, embeddings and readouts too."""
    vecenv, policy = make(kind, head, game, 64)
    env = vecenv.driver_env
    env.reset(3)
    state: dict[str, Any] = zero_state(policy, 64)
    furthest, longest = 0.0, 0
    with torch.no_grad():
        for _ in range(20):
            face, _ = policy.forward_eval(torch.as_tensor(env.observations), state)
            counts = face.distribution.legal.counts
            divergence = counts.clamp(min=1).log() - face.distribution.entropy()  # from uniform
            assert divergence.min() > -1e-5
            furthest = max(furthest, float(divergence.max()))
            longest = max(longest, int(counts.max()))
            env.step(face.sample().numpy())
    assert longest > 10
    # By Pinsker's inequality no set of tuples is more than sqrt(0.05 / 2) = 0.16 off its share.
    assert furthest < 0.05


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_on_the_game_sends_no_illegal_action(trainers: Any, kind: str, head: str) -> None:
    vecenv, policy = make(kind, head, "game", 64)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    trainer = trainers(vecenv, policy, use_rnn=True, bptt_horizon=16)
    for _ in range(3):
        trainer.evaluate()
        trainer.train()
        assert (trainer.ratio - 1).abs().max() < 1e-4
    assert trainer.global_step == 3 * 64 * 16
    assert vecenv.driver_env.illegal_actions == 0  # and the game would have raised
    assert all(math.isfinite(loss) for loss in trainer.losses.values())
    after = policy.state_dict()
    assert any(
        "lstm" in name and not torch.equal(value, before[name]) for name, value in after.items()
    )
