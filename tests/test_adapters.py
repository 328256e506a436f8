"""Adapters against the real packages: what is listed, what is played, and that it trains."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pufferlib.emulation
import pufferlib.vector
import pytest
import torch
from gymnasium import spaces

import tcg_flatpolicy as fp
from tcg_flatpolicy.adapters import from_aec, from_gymnasium, from_parallel, from_spiel
from tcg_flatpolicy.app import cli

pytestmark = pytest.mark.integration

SPEC = fp.ActionSpec([fp.Primary("pass"), fp.Primary("play", fp.Index("card", 4))])


def to_tuple(number: int) -> tuple[int, ...]:
    return (0, 0) if number == 4 else (1, number)


class Cards(gymnasium.Env[Any, Any]):
    """Shows four cards of which some can be played; playing the highest of those pays."""

    observation_space = spaces.Dict(
        {"card": spaces.Box(0, 9, (4,), np.int16), "turn": spaces.Discrete(5)}
    )

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.turn = 0
        return self.show(), self.info()

    def show(self) -> Any:
        self.cards = self.np_random.integers(0, 10, 4).astype(np.int16)
        self.mask = np.append(self.np_random.random(4) < 0.5, True)
        return {"card": self.cards, "turn": self.turn}

    def info(self) -> dict[str, Any]:
        return {}

    def number(self, action: Any) -> int:
        return int(action)

    def step(self, action: Any) -> Any:
        number = self.number(action)
        assert self.mask[number], "illegal"
        best = max((self.cards[i] for i in range(4) if self.mask[i]), default=None)
        won = best is None or (number < 4 and self.cards[number] == best)
        self.turn += 1
        return self.show(), 1.0 if won else -1.0, self.turn == 4, False, self.info()


class Masked(Cards):
    action_space = spaces.Discrete(5)

    def action_masks(self) -> Any:
        return self.mask


class InInfo(Cards):
    action_space = spaces.Discrete(5, start=3)

    def info(self) -> dict[str, Any]:
        return {"action_mask": self.mask.astype(np.int8)}

    def number(self, action: Any) -> int:
        return int(action) - 3


class Tuples(Cards):
    action_space = SPEC.action_space

    def info(self) -> dict[str, Any]:
        return {"legal_actions": [to_tuple(i) for i in np.flatnonzero(self.mask)]}

    def number(self, action: Any) -> int:
        return 4 if action[0] == 0 else int(action[1])


MADE: dict[str, Any] = {
    "action_masks": lambda: from_gymnasium(Masked()),
    "mask in info, as tuples": lambda: from_gymnasium(InInfo(), spec=SPEC, to_tuple=to_tuple),
    "tuples in info": lambda: from_gymnasium(Tuples(), spec=SPEC, max_legal=5),
    "a function": lambda: from_gymnasium(
        Tuples(), spec=SPEC, max_legal=5, legal=lambda env, seen, info: info["legal_actions"]
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_gymnasium_lists_are_those_of_the_environment(name: str) -> None:
    env = MADE[name]()
    row, _ = env.reset(seed=3)
    for turn in range(40):
        legal = env.legal_layout.read(torch.as_tensor(row)[None]).to_lists()[0]
        numbers = np.flatnonzero(env.env.mask).tolist()
        assert legal == [(i,) if name == "action_masks" else to_tuple(i) for i in numbers]
        card = env.legal_layout.field(torch.as_tensor(row)[None], "card")[0]
        assert card.tolist() == env.env.cards.tolist()
        action = legal[turn % len(legal)]
        row, _, ended, _, _ = env.step(np.array(action))
        if ended:
            assert env.legal_layout.read(torch.as_tensor(row)[None]).counts.tolist() == [0]
            row, _ = env.reset()


def emulated(make: Any, buf: Any = None, seed: int = 0) -> Any:
    return pufferlib.emulation.GymnasiumPufferEnv(env=make(), buf=buf, seed=seed)


def test_gymnasium_trains(tmp_path: Path) -> None:
    torch.manual_seed(1)
    make = partial(emulated, MADE["mask in info, as tuples"])
    vecenv = pufferlib.vector.make(make, num_envs=32, backend=pufferlib.vector.Serial, seed=1)
    policy = fp.FlatPolicy(vecenv, hidden_size=32, width=16)
    config = fp.config(vecenv, total_timesteps=8 * 512, bptt_horizon=16, minibatch_size=256)
    config |= {"data_dir": str(tmp_path), "learning_rate": 1e-2}
    before = fp.play_games(policy, vecenv, 320, by="turn", outcome=lambda r: r - 3)
    with fp.trainer(config, vecenv, policy) as trainer:
        while trainer.global_step < config["total_timesteps"]:
            trainer.evaluate()
            trainer.train()
    vecenv = pufferlib.vector.make(make, num_envs=32, backend=pufferlib.vector.Serial, seed=2)
    after = fp.play_games(policy, vecenv, 320, how="mode")
    assert list(before.by) == [3]
    assert after.mean_return > before.mean_return + 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: from_gymnasium(Masked(), to_tuple=to_tuple), r"to_tuple needs spec=..."),
        (
            lambda: from_gymnasium(Masked(), spec=SPEC, to_tuple=lambda i: (1, i % 3)),
            r"the actions 0 and 3 the same tuple \(1, 0\)",
        ),
        (
            lambda: from_gymnasium(Masked(), spec=SPEC, to_tuple=lambda i: (1, i)),
            r"to_tuple\(4\) is \(1, 4\), not a tuple of the spec",
        ),
        (lambda: from_gymnasium(Tuples(), spec=SPEC), r"needs spec=.* and max_legal="),
        (
            lambda: from_gymnasium(Tuples(), spec=SPEC, max_legal=1).reset(seed=3),
            r"tuples are legal, and a list has room for 1; take a larger max_legal",
        ),
        (
            lambda: from_gymnasium(Tuples(), spec=SPEC, max_legal=5, legal="moves").reset(seed=1),
            r"info of Tuples has no 'moves', only legal_actions",
        ),
        (
            lambda: from_gymnasium(Tuples(), spec=SPEC, max_legal=5, legal=lambda *all: []).reset(
                seed=1
            ),
            r"Tuples lists no legal action in a state that is not the end",
        ),
    ],
)
def test_what_gymnasium_lacks_is_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# PettingZoo


def connect_four() -> Any:
    pytest.importorskip("pettingzoo", reason="needs pettingzoo")
    connect = pytest.importorskip(
        "pettingzoo.classic.connect_four_v3", reason="needs pettingzoo[classic]"
    )
    return connect.env()


def rows_of(env: Any, shown: Any) -> dict[Any, list[tuple[int, ...]]]:
    return {
        agent: env.legal_layout.read(torch.as_tensor(row)[None]).to_lists()[0]
        for agent, row in shown.items()
    }


def aec_class() -> Any:
    from pettingzoo import AECEnv

    class Nim(AECEnv):  # type: ignore[misc]
        """Two players take one to three of twelve in turn; whoever takes the last one wins."""

        metadata = {"name": "nim", "render_modes": []}  # noqa: RUF012
        render_mode = None
        possible_agents = ["a", "b"]  # noqa: RUF012

        def observation_space(self, agent: str) -> Any:
            return spaces.Dict(
                {
                    "observation": spaces.Box(0, 12, (1,), np.int8),
                    "action_mask": spaces.Box(0, 1, (3,), np.int8),
                }
            )

        def action_space(self, agent: str) -> Any:
            return spaces.Discrete(3)

        def reset(self, seed: int | None = None, options: Any = None) -> None:
            self.agents, self.agent_selection, self.left = ["a", "b"], "a", 12
            self.rewards = self._cumulative_rewards = dict.fromkeys(self.agents, 0)
            self.terminations = dict.fromkeys(self.agents, False)
            self.truncations = dict.fromkeys(self.agents, False)
            self.infos: Any = {agent: {} for agent in self.agents}

        def observe(self, agent: str) -> Any:
            mask = np.array([self.left > i for i in range(3)], np.int8)
            return {"observation": np.array([self.left], np.int8), "action_mask": mask}

        def step(self, action: Any) -> None:
            mover = self.agent_selection
            if self.terminations[mover]:
                self._was_dead_step(action)
                return
            assert 0 <= action < self.left
            self.left -= int(action) + 1
            self.agent_selection = "b" if mover == "a" else "a"
            if not self.left:
                self.rewards = {agent: 1 if agent == mover else -1 for agent in self.agents}
                self.terminations = dict.fromkeys(self.agents, True)

    return Nim


def test_an_aec_environment_has_one_mover(tmp_path: Path) -> None:
    pytest.importorskip("pettingzoo", reason="needs pettingzoo")
    kind = aec_class()
    env = from_aec(kind())
    shown, _ = env.reset(seed=1)
    mover, left, rng = "a", 12, np.random.default_rng(1)
    while env.agents:
        lists = rows_of(env, shown)
        other = "b" if mover == "a" else "a"
        assert lists[mover] == [(i,) for i in range(3) if left > i]
        assert lists[other] == []
        taken = int(rng.integers(len(lists[mover])))
        left -= taken + 1
        shown, rewards, ended, _, _ = env.step({mover: np.array([taken]), other: np.array([0])})
        last, mover = mover, other
    assert left == 0
    assert all(ended.values())
    assert rewards == {"a": 1 if last == "a" else -1, "b": 1 if last == "b" else -1}

    def make(buf: Any = None, seed: int = 0) -> Any:
        return pufferlib.emulation.PettingZooPufferEnv(env=from_aec(kind()), buf=buf, seed=seed)

    torch.manual_seed(1)
    vecenv = pufferlib.vector.make(make, num_envs=16, backend=pufferlib.vector.Serial, seed=1)
    policy = fp.FlatPolicy(vecenv, hidden_size=32, width=16)
    config = fp.config(vecenv, total_timesteps=20 * 512, bptt_horizon=16, minibatch_size=256)
    config |= {"data_dir": str(tmp_path), "learning_rate": 1e-2}
    with fp.trainer(config, vecenv, policy) as trainer:
        while trainer.global_step < config["total_timesteps"]:
            trainer.evaluate()
            trainer.train()
    vecenv = pufferlib.vector.make(make, num_envs=16, backend=pufferlib.vector.Serial, seed=2)
    won = fp.play_games([policy, fp.RandomLegal(policy)], vecenv, 160, how="sampling")
    assert won.rate > 0.6
    assert won.wins + won.losses == 160


def test_a_parallel_environment() -> None:
    pytest.importorskip("pettingzoo", reason="needs pettingzoo")
    from pettingzoo.utils.conversions import turn_based_aec_to_parallel

    kind = aec_class()
    kind.metadata = {**kind.metadata, "is_parallelizable": True}
    env = from_parallel(turn_based_aec_to_parallel(kind()))
    shown, _ = env.reset(seed=1)
    for _ in range(3):
        assert rows_of(env, shown) == {"a": [(0,), (1,), (2,)], "b": [(0,), (1,), (2,)]}
        shown, *_ = env.step({agent: np.array([0]) for agent in env.agents})


def test_pettingzoo_s_connect_four() -> None:
    env = from_aec(connect_four())
    shown, _ = env.reset(seed=1)
    lists = rows_of(env, shown)
    assert sorted(map(len, lists.values())) == [0, 7]


# OpenSpiel


def test_openspiel_lists_are_those_of_the_state() -> None:
    pyspiel = pytest.importorskip("pyspiel", reason="needs open_spiel")
    env = from_spiel("liars_dice", seat=1)
    total, games = 0.0, 0
    row, _ = env.reset(seed=1)
    rng = np.random.default_rng(0)
    for _ in range(300):
        bytes_ = torch.as_tensor(row)[None]
        assert env.state.current_player() == 1
        legal = env.legal_layout.read(bytes_).to_lists()[0]
        assert legal == [(i,) for i in env.state.legal_actions()]
        seen = env.legal_layout.field(bytes_, "state")[0].tolist()
        assert seen == env.state.information_state_tensor(1)
        row, reward, over, _, _ = env.step(np.array(legal[rng.integers(len(legal))]))
        total += reward
        if over:
            games += 1
            assert total == env.state.returns()[1]
            total = 0.0
            row, _ = env.reset()
    assert games > 30
    with pytest.raises(ValueError, match=r"seat must lie in 0\.\.1, got 2"):
        from_spiel("liars_dice", seat=2)
    with pytest.raises(ValueError, match="goofspiel has simultaneous moves"):
        from_spiel(pyspiel.load_game("goofspiel"))


def test_openspiel_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyspiel", reason="needs open_spiel")
    monkeypatch.chdir(tmp_path)
    few = ["--num-envs", "16", "--bptt-horizon", "16", "--total-steps", "4096"]
    few += ["--eval-games", "160", "--folder", "a", "--dice", "1"]
    few += ["--hidden-size", "64", "--learning-rate", "0.005"]
    assert cli.main(["train", "examples.openspiel:make", *few]) == 0
    rates = [float(one) for one in re.findall(r"mode +([\d.]+)%", capfd.readouterr().out)]
    assert rates[1] > rates[0] + 5


def test_the_gymnasium_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples import action_masks

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    before, after = action_masks.main(steps=4096)
    assert after > before
