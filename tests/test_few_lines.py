"""The library's few lines for any environment: config, trainer, play_games."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pufferlib.emulation
import pufferlib.vector
import pytest
import torch
from pufferlib.pufferl import PuffeRL

import tcg_flatpolicy as fp
from tests.games import Bandit, BanditEncoder

pytestmark = pytest.mark.integration


class Duel(Bandit):
    """Games of 1 to 4 steps; what each slot's n-th game pays is known, and shown is its seat.

    Slot s plays games of 1 + s % 4 steps. Its n-th game pays ``(s + n) % 3 - 1`` at the end, less
    0.25 for every other step.
    """

    def reset(self, seed: int | None = None) -> tuple[Any, list[Any]]:
        self.left = 1 + np.arange(self.num_agents) % 4
        self.number = np.zeros(self.num_agents, dtype=int)
        super().reset(seed)
        self.show()
        return self.observations, []

    def show(self) -> None:
        self.records["card"] = (np.arange(self.num_agents) + self.number) % 2

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, list[Any]]:
        super().step(actions)
        rows = np.arange(self.num_agents)
        self.left -= 1
        self.terminals[:] = self.left == 0
        self.rewards[:] = np.where(self.terminals, (rows + self.number) % 3 - 1.0, -0.25)
        self.number += self.terminals
        self.left = np.where(self.terminals, 1 + rows % 4, self.left)
        self.show()
        return self.observations, self.rewards, self.terminals, self.truncations, []


def flat(env: Any, **more: Any) -> fp.FlatPolicy:
    torch.manual_seed(0)
    return fp.FlatPolicy(env, encoder=BanditEncoder(env.driver_env.legal_layout), **more)


def make(kind: Any = Bandit, backend: Any = pufferlib.vector.Serial, **more: Any) -> Any:
    return pufferlib.vector.make(kind, backend=backend, seed=1, **more)


@pytest.mark.parametrize("workers", [0, 2])
def test_games_are_counted_as_the_environment_pays_them(workers: int) -> None:
    """Six slots of two environments play five games each, long or short."""
    made = {"env_kwargs": {"num_agents": 3}, "num_envs": 2}
    if workers:
        made |= {"backend": pufferlib.vector.Multiprocessing, "num_workers": 2, "overwork": True}
    vecenv = make(Duel, **made)
    try:
        result = fp.play_games(flat(vecenv), vecenv, 30, by="card", seed=3)
    finally:
        vecenv.close()
    paid = [
        ((s + n) % 3 - 1, -0.25 * (s % 4), (s + n) % 2) for s in (0, 1, 2) * 2 for n in range(5)
    ]
    returns = np.array([last + before for last, before, _ in paid])
    assert (result.games, result.wins) == (30, int((returns > 0).sum()))
    assert (result.draws, result.losses) == (int((returns == 0).sum()), int((returns < 0).sum()))
    assert result.mean_return == pytest.approx(returns.mean())
    half = 1.96 * returns.std(ddof=1) / np.sqrt(30)
    assert result.return_interval == pytest.approx(
        (returns.mean() - half, returns.mean() + half), abs=1e-4
    )
    assert result.illegal == (None if workers else 0)
    assert set(result.by) == {0, 1}
    for seat, part in result.by.items():
        of_seat = np.array([seat == s for _, _, s in paid])
        assert part.games == of_seat.sum()
        assert part.wins == (returns[of_seat] > 0).sum()
        assert part.mean_return == pytest.approx(returns[of_seat].mean())


def test_an_outcome_of_one_s_own_and_ways_to_play() -> None:
    env = Bandit(num_agents=50)
    policy = flat(env)
    won = {}
    for how in ("sampling", "mode", 1, 3):
        result = fp.play_games(policy, env, 100, how=how, outcome=lambda r: r - 0.4, seed=2)
        assert result.games == 100
        assert result.draws == 0
        won[how] = (result.wins, result.mean_return)
    assert won["mode"] == won[1]
    assert len({won["sampling"], won["mode"], won[3]}) == 3
    with pytest.raises(ValueError, match="how must be 'sampling', 'mode' or a number k, got 'max'"):
        fp.play_games(policy, env, 100, how="max")
    with pytest.raises(ValueError, match=r"by='kind': the field has 4 numbers"):
        fp.play_games(policy, env, 100, by="kind")
    with pytest.raises(ValueError, match="70 games cannot be shared equally by 50 slots"):
        fp.play_games(policy, env, 70)
    env.agents_per_game = 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="has 2 agents a game, and got one policy"):
        fp.play_games(policy, env, 100)


def test_playing_leaves_no_trace() -> None:
    """Not in torch's generator, nor in the policy's mode, and the same seed plays the same."""
    env = Bandit(num_agents=10)
    policy, before = flat(env), torch.get_rng_state()
    results = [fp.play_games(policy, env, 20, seed=5).mean_return for _ in range(2)]
    assert results[0] == results[1] != fp.play_games(policy, env, 20, seed=6).mean_return
    assert torch.equal(before, torch.get_rng_state())
    assert policy.training


def test_a_config_is_complete_and_trains(tmp_path: Path) -> None:
    vecenv = make(env_kwargs={"num_agents": 64})
    config = fp.config(vecenv, total_timesteps=4096, data_dir=str(tmp_path), learning_rate=5e-3)
    assert config["batch_size"] == 64 * 32
    assert config["minibatch_size"] == config["max_minibatch_size"] == 2048
    assert config["learning_rate"] == 5e-3
    with fp.trainer(config, vecenv, flat(vecenv)) as trainer:
        assert type(trainer) is PuffeRL
        trainer.evaluate()
        assert "environment/got" in trainer.train()  # also in the first quarter of a second
    assert trainer.utilization.stopped
    assert not torch.is_autocast_enabled("cpu")
    assert list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("agents", [1, 3, 64, 100, 257])
def test_a_minibatch_fits_whatever_the_number_of_agents(agents: int) -> None:
    config = fp.config(Bandit(num_agents=agents))
    assert config["batch_size"] == agents * 32
    assert config["batch_size"] % config["minibatch_size"] == 0
    assert config["minibatch_size"] % 32 == 0
    assert config["minibatch_size"] <= 2048


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"learning_rte": 1}, TypeError, "no 'learning_rte'; take learning_rate"),
        ({"minibatch_size": 1000}, ValueError, "minibatch_size 1000 must divide batch_size 2048"),
        ({"total_timesteps": 9}, ValueError, "total_timesteps 9 is less than one rollout"),
        ({"batch_size": 32}, ValueError, "batch_size 32 must be .* at least one rollout"),
    ],
)
def test_a_wrong_config_is_refused(changes: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        fp.config(Bandit(num_agents=64), **changes)


FAILING = """
import sys
sys.path.insert(0, {root!r})
import pufferlib.vector
import tcg_flatpolicy as fp
from tests.games import Bandit, BanditEncoder
if __name__ == "__main__":
    vecenv = pufferlib.vector.make(
        Bandit, num_envs=2, num_workers=2, overwork=True, backend=pufferlib.vector.Multiprocessing
    )
    policy = fp.FlatPolicy(vecenv, encoder=BanditEncoder(vecenv.driver_env.legal_layout))
    with fp.trainer(fp.config(vecenv, data_dir={folder!r}), vecenv, policy) as trainer:
        trainer.evaluate()
        print([process.pid for process in vecenv.processes])
        raise KeyError("of one's own")
"""


def test_a_script_that_raises_ends_with_its_workers(tmp_path: Path) -> None:
    import psutil

    root = str(Path(__file__).parent.parent)
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=root, folder=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("KeyError")
    assert not any(psutil.pid_exists(pid) for pid in eval(done.stdout.splitlines()[-1]))
    assert not list(tmp_path.glob("*.pt"))
