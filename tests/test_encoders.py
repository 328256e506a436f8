"""RunningNorm: statistics of rollouts that stand still between a rollout and its updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.encoders import RunningNorm
from tests.games import BANDIT_SPEC, Bandit


def rollout(norm: RunningNorm, *batches: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [norm(batch) for batch in batches]


def update(norm: RunningNorm, batch: Tensor) -> Tensor:
    return norm(batch)  # type: ignore[no-any-return]


def test_statistics_are_those_of_all_rollouts_and_come_into_force_after_an_update() -> None:
    torch.manual_seed(0)
    norm = RunningNorm(3)
    first, second = torch.randn(50, 3) * 4 + 7, torch.randn(30, 3) - 2
    (seen,) = rollout(norm, first)
    assert torch.equal(seen, first.clamp(-10, 10))  # nothing is in force yet
    assert torch.equal(update(norm, first), seen)
    assert torch.equal(update(norm, first), seen)  # nor between two minibatches
    (seen,) = rollout(norm, second)
    wanted = (second - first.mean(0)) / (first.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(seen, wanted.clamp(-10, 10))
    assert torch.equal(update(norm, second), seen)
    both = torch.cat([first, second])
    (seen,) = rollout(norm, second)
    wanted = (second - both.mean(0)) / (both.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(seen, wanted.clamp(-10, 10))


def test_evaluation_gathers_nothing_and_puts_nothing_in_force() -> None:
    norm = RunningNorm(2)
    rollout(norm, torch.randn(9, 2) + 5)
    update(norm, torch.randn(3, 2))
    before = {name: one.clone() for name, one in norm.state_dict().items()}
    norm.eval()
    rollout(norm, torch.randn(9, 2))
    assert all(torch.equal(one, before[name]) for name, one in norm.state_dict().items())


def test_numbers_whose_squares_overflow_are_left_out() -> None:
    torch.manual_seed(0)
    norm, other = RunningNorm(2), RunningNorm(2)
    sane = torch.randn(9, 2, dtype=torch.float64)
    rollout(
        norm,
        torch.cat(
            [sane, torch.tensor([[1e200, -1e155], [-1e308, torch.inf]], dtype=torch.float64)]
        ),
    )
    rollout(other, sane)
    for one in (norm, other):
        update(one, sane)
    torch.testing.assert_close(rollout(norm, sane), rollout(other, sane))
    huge = torch.full((1, 2), 1e200, dtype=torch.float64)
    assert rollout(norm, huge)[0].tolist() == [[10.0, 10.0]]


def test_it_goes_on_from_a_state_dict() -> None:
    torch.manual_seed(0)
    norm, other = RunningNorm(2), RunningNorm(2)
    rollout(norm, torch.randn(9, 2) + 5)
    update(norm, torch.randn(3, 2))
    other.load_state_dict(norm.state_dict())
    batch = torch.randn(4, 2)
    assert torch.equal(rollout(norm, batch)[0], rollout(other, batch)[0])
    assert torch.equal(norm.mean, other.mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_statistics_keep_their_precision(dtype: torch.dtype) -> None:
    norm = RunningNorm(2)
    rollout(norm, torch.tensor([[1000.25, -3.0], [1001.75, 5.0]]))
    update(norm, torch.zeros(1, 2))
    rollout(norm, torch.zeros(0, 2))
    kept = norm.mean.clone()
    norm.to(dtype)
    assert norm.mean.dtype == torch.float64
    assert torch.equal(norm.mean, kept)
    assert norm(torch.ones(3, 2, dtype=dtype)).dtype == dtype


def test_a_constant_column_and_another_size() -> None:
    norm = RunningNorm(2)
    rollout(norm, torch.full((5, 2), 3.0))
    update(norm, torch.full((5, 2), 3.0))
    (seen,) = rollout(norm, torch.full((5, 2), 3.0))
    assert (seen == 0).all()
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 2\), got \(5, 3\)"):
        norm(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        RunningNorm(0)


class Normed(nn.Module):
    """Numbers of very different sizes, normalised."""

    hidden_size = 32

    def __init__(self, layout: fp.LegalLayout, kind: Any) -> None:
        super().__init__()
        self.layout = layout
        self.entity_sizes: dict[str, tuple[int, int]] = {}
        self.fields = [field for field in layout.fields() if not layout.is_legal_list(field)]
        size = sum(field.numbers for field in self.fields)
        self.norm = kind(size)
        self.net = nn.Linear(size, 32)

    def forward(self, observations: Tensor) -> fp.Encoding:
        columns = [
            self.layout.field(observations, field.name).reshape(len(observations), -1).float()
            for field in self.fields
        ]
        return fp.Encoding(torch.relu(self.net(self.norm(torch.cat(columns, 1) * 50 + 3))))


@pytest.mark.integration
@pytest.mark.parametrize("recurrent", [False, True])
def test_under_the_trainer_the_ratio_is_one(trainers: Any, recurrent: bool) -> None:
    import pufferlib.vector

    vecenv = pufferlib.vector.make(
        Bandit, env_kwargs={"num_agents": 16}, backend=pufferlib.vector.Serial, num_envs=1
    )
    env = vecenv.driver_env
    kind = fp.RecurrentPolicy if recurrent else fp.FlatPolicy
    env.action_spec = fp.ActionSpec.from_nvec(BANDIT_SPEC.nvec)  # without entities
    env.legal_layout = env.legal_layout.with_spec(env.action_spec)
    policy = kind(env, encoder=Normed(env.legal_layout, RunningNorm))
    trainer = trainers(vecenv, policy, update_epochs=1, use_rnn=recurrent, learning_rate=0.0)
    means = []
    for _ in range(3):
        trainer.evaluate()
        means.append(policy.encoder.norm.mean.clone())
        trainer.train()
        torch.testing.assert_close(trainer.ratio, torch.ones_like(trainer.ratio), rtol=0, atol=1e-5)
    assert not torch.equal(means[0], means[1])
    assert not torch.equal(means[1], means[2])


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    norm = RunningNorm(2)
    rollout(norm, *batches_of(rank))
    update(norm, torch.zeros(1, 2))
    rollout(norm, torch.zeros(0, 2))
    torch.save([norm.mean, norm.scale], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def batches_of(rank: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(rank)
    return [torch.randn(5 + 3 * rank, 2, generator=random) * (1 + rank) + 4 for _ in range(2)]


def test_several_processes_have_the_statistics_of_all(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    every = torch.cat([batch for rank in range(2) for batch in batches_of(rank)]).double()
    wanted = [every.mean(0), (every.var(0, correction=0) + 1e-5).rsqrt()]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), wanted)
