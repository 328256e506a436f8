"""How sure a policy is, against a count by hand, and an entropy target with the real trainer."""

from __future__ import annotations

import math
from typing import Any

import pufferlib.vector
import pytest
import torch

import tcg_flatpolicy as fp
from tcg_flatpolicy.puffer import EntropyTarget, decisions
from tests.games import Bandit, BanditEncoder


@pytest.mark.parametrize("kind", [fp.FlatPolicy, fp.RecurrentPolicy])
def test_decisions_are_those_of_a_count_by_hand(kind: Any) -> None:
    env = Bandit(300, empty=0.3)
    torch.manual_seed(0)
    policy = kind(env, encoder=BanditEncoder(env.legal_layout))
    with torch.no_grad():
        for parameter in policy.head.parameters():
            parameter.mul_(6)
    env.reset(seed=1)
    rows = torch.as_tensor(env.observations)
    with torch.no_grad():
        distribution, _ = policy.distribution(rows)
    entropies, tops = [], []
    for p in distribution.probs.double().split(distribution.legal.counts.tolist()):
        if len(p):
            entropies.append(float(-(p * p.log()).nan_to_num().sum()))
        if len(p) > 1:
            tops.append(float(p.max()))
    found = decisions(policy, rows)
    assert (found.number, found.choices) == (len(entropies), len(tops))
    assert found.number < 300
    assert found.entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert found.saturated[0] == sum(top > 0.999 for top in tops) / len(tops) > 0
    assert decisions(policy, rows.unsqueeze(1))[:3] == pytest.approx(found[:3])


def test_without_a_row_that_decides() -> None:
    env = Bandit(4, empty=1.0)
    env.reset(seed=1)
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    found = decisions(policy, torch.as_tensor(env.observations))
    assert (found.number, found.choices) == (0, 0)
    assert math.isnan(found.entropy)
    assert all(math.isnan(share) for share in found.saturated)


@pytest.mark.integration
def test_a_target_is_held(trainers: Any) -> None:
    """Half of the rows wait, and do not count."""
    vecenv = pufferlib.vector.make(
        Bandit,
        env_kwargs={"num_agents": 64, "empty": 0.5},
        backend=pufferlib.vector.Serial,
        num_envs=1,
    )
    torch.manual_seed(1)
    env = vecenv.driver_env
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    trainer = trainers(vecenv, policy, ent_coef=0.01, total_timesteps=10**7)
    steer = EntropyTarget(trainer, 0.7)
    for _ in range(150):
        trainer.evaluate()
        trainer.train()
        found = steer()
    assert 200 < found.number < 312
    assert found.entropy == pytest.approx(0.7, abs=0.12)  # about 0.2 without
    assert trainer.config["ent_coef"] > 0.02


def test_what_is_refused(trainers: Any) -> None:
    vecenv = pufferlib.vector.make(Bandit, backend=pufferlib.vector.Serial, num_envs=1)
    env = vecenv.driver_env
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    trainer = trainers(vecenv, policy, ent_coef=0.0)
    with pytest.raises(ValueError, match="ent_coef must be above 0, got 0"):
        EntropyTarget(trainer, 0.5)
    trainer.config["ent_coef"] = 0.01
    with pytest.raises(ValueError, match="target must be above 0"):
        EntropyTarget(trainer, 0.0)
    with pytest.raises(ValueError, match="rate must be above 0"):
        EntropyTarget(trainer, 0.5, rate=math.nan)
