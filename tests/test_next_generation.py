"""The adapter for PufferLib's next generation, under a trainer that calls it as that one does.

`Trainer` below follows, in its own words, pufferlib/torch_pufferl.py of PufferAI/PufferLib at
commit 0eed1d6d6b1e7bdf996ab896e09fdadbfc130acd: what it calls, with which shapes and dtypes, what
it stores, and how it learns. The real one needs its compiled module, which is not published.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.puffer import NextGenerationPolicy
from tests.games import BANDIT_SPEC, ROOM, UNITS, Bandit, BanditEncoder

AGENTS, HORIZON = 32, 8
FLOATS = np.dtype(
    [
        ("kind", np.float32, UNITS),
        ("card", np.float32),
        ("n", np.float32),
        ("legal", np.float32, (ROOM, 3)),
    ]
)


class Vec:
    """Bandits as its environments are: buffers that each step overwrites, and float32 actions."""

    def __init__(self, agents: int, obs_dtype: torch.dtype, empty: float = 0.2) -> None:
        self.env = Bandit(agents, empty, seed=1)
        self.env.reset(1)
        self.total_agents = agents
        if obs_dtype == torch.uint8:
            self.layout = self.env.legal_layout
            self.vec_obs = torch.from_numpy(self.env.observations)
        else:
            self.layout = fp.LegalLayout.from_dtype(FLOATS, "n", "legal", spec=BANDIT_SPEC)
            self.vec_obs = torch.zeros(agents, FLOATS.itemsize // 4)
        self.vec_rewards = torch.zeros(agents)
        self.vec_terminals = torch.zeros(agents)
        self.got = self.best = 0.0
        self.show()

    def show(self) -> None:
        if self.vec_obs.dtype == torch.float32:
            floats = self.vec_obs.numpy().view(FLOATS)[:, 0]
            for name in FLOATS.names or ():
                floats[name] = self.env.records[name]

    def step(self, actions: Tensor) -> None:
        assert actions.dtype == torch.float32
        assert actions.shape == (self.total_agents, 3)
        _, rewards, terminals, _, (info,) = self.env.step(actions.numpy().astype(np.int64))
        self.got, self.best = self.got + info["got"], self.best + info["best"]
        self.vec_rewards.copy_(torch.from_numpy(rewards))
        self.vec_terminals.copy_(torch.from_numpy(terminals))
        self.show()


def sample_logits(logits: Any, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What is asked of a Normal."""
    assert isinstance(logits, torch.distributions.Normal)
    rows = logits.loc.shape[0]
    if action is None:
        action = logits.sample().view(rows, -1)
    log_prob = logits.log_prob(action.view(rows, -1)).sum(1)
    return action, log_prob, logits.entropy().view(rows, -1).sum(1)


class Trainer:
    """Rollouts and updates."""

    def __init__(self, vec: Vec, policy: Any, minibatch_size: int, learning_rate: float) -> None:
        self.vec, self.policy = vec, policy
        shape = (HORIZON, vec.total_agents)
        self.observations = torch.zeros(*shape, vec.vec_obs.shape[1], dtype=vec.vec_obs.dtype)
        self.actions = torch.zeros(*shape, 3)
        self.values, self.log_probs = torch.zeros(shape), torch.zeros(shape)
        self.rewards, self.terminals = torch.zeros(shape), torch.zeros(shape)
        self.ratio = torch.ones(vec.total_agents, HORIZON)
        self.segments = minibatch_size // HORIZON
        self.state = policy.initial_state(vec.total_agents, device="cpu")
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)

    def rollouts(self) -> None:
        self.state = tuple(torch.zeros_like(part) for part in self.state) if self.state else ()
        reward, terminal = torch.zeros(self.vec.total_agents), torch.zeros(self.vec.total_agents)
        for t in range(HORIZON):
            with torch.no_grad():
                logits, value, self.state = self.policy.forward_eval(self.vec.vec_obs, self.state)
                action, log_prob, _ = sample_logits(logits)
            self.observations[t] = self.vec.vec_obs
            self.actions[t], self.log_probs[t] = action, log_prob
            self.values[t] = value.flatten()
            self.rewards[t], self.terminals[t] = reward, terminal
            self.vec.step(action.to(torch.float32).contiguous())
            reward, terminal = self.vec.vec_rewards, self.vec.vec_terminals

    def advantages(self, values: Tensor, rewards: Tensor, terminals: Tensor) -> Tensor:
        """GAE, weighted by the clipped ratio, from the rewards that come with the next state."""
        gamma, gae_lambda = 0.99, 0.9
        advantages = torch.zeros_like(values)
        following = torch.zeros(len(values))
        for t in reversed(range(HORIZON - 1)):
            goes_on = 1 - terminals[:, t + 1]
            weight = self.ratio[:, t].clamp(max=1)
            target = rewards[:, t + 1] + gamma * goes_on * values[:, t + 1]
            following = weight * (target - values[:, t] + gamma * gae_lambda * goes_on * following)
            advantages[:, t] = following
        return advantages

    def train(self) -> list[Tensor]:
        """One pass over a rollout; the ratios of each minibatch (segments, horizon)."""
        observations = self.observations.transpose(0, 1).contiguous()
        actions = self.actions.transpose(0, 1).contiguous()
        log_probs, values = self.log_probs.T.contiguous(), self.values.T.contiguous()
        rewards = self.rewards.T.contiguous().clamp(-1, 1)
        terminals = self.terminals.T.contiguous()
        self.ratio[:] = 1
        ratios = []
        for _ in range(self.vec.total_agents // self.segments):
            advantages = self.advantages(values, rewards, terminals)
            weights = advantages.abs().sum(1).nan_to_num(0, 0, 0) + 1e-6
            chosen = torch.multinomial(weights, self.segments, replacement=True)
            logits, value = self.policy(observations[chosen])
            _, log_prob, entropy = sample_logits(logits, action=actions[chosen])
            ratio = (log_prob.reshape(self.segments, HORIZON) - log_probs[chosen]).exp()
            self.ratio[chosen] = ratio.detach()
            ratios.append(ratio.detach())

            advantage, old = advantages[chosen], values[chosen]
            returns, value = advantage + old, value.view(old.shape)
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()
            clipped = old + (value - old).clamp(-0.2, 0.2)
            loss += 0.25 * torch.max((value - returns) ** 2, (clipped - returns) ** 2).mean()
            (loss - 0.001 * entropy.mean()).backward()
            values[chosen] = value.detach()
            for name, parameter in self.policy.named_parameters():
                # Its Muon takes a parameter of any rank as a matrix, and divides by its sides.
                assert parameter.grad is not None, name
                assert parameter.grad.ndim < 2 or parameter.grad.view(len(parameter), -1).numel()
            nn.utils.clip_grad_norm_(self.policy.parameters(), 1.5)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return ratios


def make(
    recurrent: bool,
    head: str = "flat",
    obs_dtype: torch.dtype = torch.uint8,
    minibatch_size: int = AGENTS * HORIZON,
    learning_rate: float = 3e-3,
) -> Trainer:
    torch.manual_seed(0)
    vec = Vec(AGENTS, obs_dtype)
    kind = fp.RecurrentPolicy if recurrent else fp.Policy
    encoder = BanditEncoder(vec.layout)
    policy = kind(spec=BANDIT_SPEC, layout=vec.layout, encoder=encoder, head=head)
    return Trainer(vec, NextGenerationPolicy(policy), minibatch_size, learning_rate)


@pytest.mark.parametrize("obs_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("head", ["flat", "autoregressive"])
@pytest.mark.parametrize("recurrent", [False, True])
def test_the_ratio_is_one_and_every_action_legal(
    recurrent: bool, head: str, obs_dtype: torch.dtype
) -> None:
    trainer = make(recurrent, head, obs_dtype)
    for _ in range(3):  # the later ones with weights that have moved
        trainer.rollouts()
        (ratio,) = trainer.train()
        assert (ratio - 1).abs().max() < 1e-4
        observations = trainer.observations.flatten(0, 1)
        stored = trainer.actions.flatten(0, 1)
        assert trainer.vec.layout.read(observations).contains(stored.long()).all()
        assert (trainer.log_probs <= 0).all()
        assert trainer.log_probs.min() > -math.inf
    assert trainer.vec.env.played == 3 * AGENTS * HORIZON
    assert trainer.vec.env.illegal_actions == 0


def test_a_recurrent_ratio_stays_one_when_minibatches_are_smaller() -> None:
    """Rollouts start from a zero state, as segments do. Later minibatches have moved weights."""
    trainer = make(True, minibatch_size=4 * HORIZON)
    for _ in range(2):
        trainer.rollouts()
        ratio = trainer.train()[0]
        assert ratio.shape == (4, HORIZON)
        assert (ratio - 1).abs().max() < 1e-4


def uniform_share(env: Bandit) -> float:
    """What uniform legal play gets of the best, in expectation over the lists that it shows."""
    got = best = 0.0
    for _ in range(50):
        env.deal()
        for row, actions in enumerate(env.lists):
            pays = [env.pay(row, action) for action in actions] or [0.0]
            got, best = got + float(np.mean(pays)), best + max(pays)
    return got / best


@pytest.mark.parametrize("recurrent", [False, True])
def test_it_learns_the_bandit(recurrent: bool) -> None:
    """It ends with three quarters of what uniform legal play leaves of the optimum."""
    trainer = make(recurrent, minibatch_size=128, learning_rate=5e-3)
    for epoch in range(35):
        if epoch == 25:
            trainer.vec.got = trainer.vec.best = 0.0
        trainer.rollouts()
        trainer.train()
    uniform = uniform_share(Bandit(64, seed=2))
    assert 0.3 < uniform < 0.6
    assert trainer.vec.got / trainer.vec.best > uniform + 0.75 * (1 - uniform)
    assert trainer.vec.env.illegal_actions == 0


def test_a_feed_forward_policy_has_no_state() -> None:
    trainer = make(False)
    policy, observations = trainer.policy, trainer.vec.vec_obs
    assert policy.initial_state(AGENTS, device="cpu") == ()
    face, value, state = policy.forward_eval(observations, ())
    assert state == ()
    assert face.sample().shape == (AGENTS, 3)
    assert value.shape == (AGENTS, 1)


def test_a_recurrent_policy_carries_its_state_within_a_rollout_only() -> None:
    trainer = make(True)
    policy, observations = trainer.policy, trainer.vec.vec_obs
    zero = policy.initial_state(AGENTS, device="cpu")
    assert [part.shape for part in zero] == [(AGENTS, policy.hidden_size)] * 2
    assert not any(part.any() for part in zero)
    _, first, state = policy.forward_eval(observations, zero)
    assert not any(part.any() for part in zero)  # the caller's own are left alone
    _, second, _ = policy.forward_eval(observations, state)
    _, again, _ = policy.forward_eval(observations, tuple(torch.zeros_like(s) for s in state))
    assert torch.equal(first, again)
    assert (first - second).abs().max() > 1e-4
    # Each segment of an update is a rollout of its own.
    _, values = policy(torch.stack([observations] * 2, dim=1))
    torch.testing.assert_close(values, torch.cat([first, second], dim=1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"lstm_h must be \(32, 32\), got \(31, 32\)"):
        policy.forward_eval(observations, tuple(part[:31] for part in zero))


@pytest.mark.parametrize("recurrent", [False, True])
def test_it_answers_as_the_policy_inside(recurrent: bool) -> None:
    trainer = make(recurrent)
    inside, observations = trainer.policy.policy, trainer.vec.vec_obs
    face, value, _ = trainer.policy.forward_eval(observations, trainer.state)
    expected, expected_value = inside.forward_eval(observations, {})
    assert torch.equal(face.distribution.logits, expected.distribution.logits)
    assert torch.equal(value, expected_value)
    segments = torch.stack([observations] * 3, dim=1)
    face, value = trainer.policy(segments)
    expected, _ = inside(segments if recurrent else segments.flatten(0, 1))
    assert torch.equal(face.distribution.logits, expected.distribution.logits)
    assert value.shape == (AGENTS, 3)
    assert trainer.policy.hidden_size == inside.hidden_size
    assert list(trainer.policy.parameters()) == list(inside.parameters())


def test_exploration_may_not_change_between_rollout_and_update() -> None:
    trainer = make(False)
    trainer.policy.policy.explore(temperature=1.5, epsilon=0.1)
    trainer.rollouts()
    assert (trainer.train()[0] - 1).abs().max() < 1e-4
    trainer.rollouts()
    trainer.policy.policy.explore()
    with pytest.raises(RuntimeError, match="between rollout and update"):
        trainer.train()


def test_what_it_refuses() -> None:
    trainer = make(False)
    with pytest.raises(ValueError, match=r"\(segments, horizon, columns\), got \(32, "):
        trainer.policy(trainer.vec.vec_obs)
    with pytest.raises(TypeError, match="got a Linear"):
        NextGenerationPolicy(nn.Linear(2, 2))  # type: ignore[arg-type]


class Uniform(nn.Module):
    """A head without parameters, so that a slot may have any size."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def forward(self, hidden: Tensor, entities: Any, legal: Any) -> fp.LegalCategorical:
        return fp.LegalCategorical(legal, torch.zeros(len(legal.actions)))


def test_a_slot_must_have_no_more_values_than_float32_tells_apart() -> None:
    def wrap(size: int) -> NextGenerationPolicy:
        dtype = np.dtype([("x", np.int32), ("n", np.int32), ("legal", np.int32, (4, 2))])
        layout = fp.LegalLayout.from_dtype(dtype, "n", "legal")
        spec = fp.ActionSpec.from_nvec([2, size])
        return NextGenerationPolicy(fp.Policy(spec=spec, layout=layout, head=Uniform))

    wrap(2**24 + 1)
    with pytest.raises(ValueError, match="slot 1 of the spec has values up to 16777217"):
        wrap(2**24 + 2)


def test_the_example_is_a_policy_for_it() -> None:
    """Up to where it needs the compiled module."""
    from examples.next_generation import LAYOUT, OBSERVATION, SPEC, policy

    records = np.zeros((AGENTS, 1), OBSERVATION)
    LAYOUT.write(records.view(np.uint8), [[(0, 0, 0), (1, 2, 5)]] * AGENTS)
    observations = torch.from_numpy(records.view(np.uint8))
    face, _, state = policy.forward_eval(observations, policy.initial_state(AGENTS, device="cpu"))
    actions, log_prob, _ = sample_logits(face)
    assert {SPEC.describe(action) for action in actions.tolist()} == {
        "end_turn",
        "attack(ally[2], enemy[5])",
    }
    again, _ = policy(observations.unsqueeze(1))
    torch.testing.assert_close(sample_logits(again, actions.float())[1], log_prob)
    assert len(state) == 2
