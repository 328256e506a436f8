"""The toy game of `tcg_flatpolicy.verify.toy` as other kinds of environments, and with bugs."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pettingzoo

from tcg_flatpolicy.verify.checks import bugs
from tcg_flatpolicy.verify.toy import PLACES, ROOM, SPEC, Duel, Match, Tuple

FAULTS = {name: code for name, (_, code) in bugs().items()}
"""The code under which each bug must be reported."""

duplicates = partial(Duel, fault="duplicates")
mask_zeroed = partial(Duel, fault="mask_zeroed")
not_refreshed = partial(Duel, fault="not_refreshed")
swapped = partial(Duel, fault="swapped")


def seen_by(match: Match, player: int) -> dict[str, Any]:
    """A Dict observation, of which the list is padded and has its count."""
    legal = match.legal(player)
    padded = np.zeros((ROOM, 3), dtype=np.uint8)
    padded[: len(legal)] = np.array(legal, dtype=np.uint8).reshape(-1, 3)
    return {
        "units": np.array([match.units[player], match.units[1 - player]], dtype=np.uint8),
        "n": len(legal),
        "legal": padded,
    }


SPACE = gymnasium.spaces.Dict(
    {
        "units": gymnasium.spaces.Box(0, 9, (2, PLACES), np.uint8),
        "n": gymnasium.spaces.Discrete(ROOM + 1),
        "legal": gymnasium.spaces.Box(0, 9, (ROOM, 3), np.uint8),
    }
)


class Solo(gymnasium.Env):  # type: ignore[type-arg]
    """The game against a random opponent, as a Gymnasium environment."""

    observation_space, action_space, action_spec = SPACE, SPEC.action_space, SPEC

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.match = Match(self.np_random)
        return self._seen()

    def _seen(self) -> tuple[Any, dict[str, Any]]:
        return seen_by(self.match, 0), {"legal": tuple(self.match.legal(0))}

    def is_legal(self, row: int, action: Tuple) -> bool:
        return self.match.is_legal(0, action)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        chosen = tuple(int(v) for v in action)
        if not self.match.is_legal(0, chosen):
            raise ValueError(f"{chosen} is not legal")
        self.match.play(chosen)
        while self.match.mover == 1 and not self.match.over:
            legal = self.match.legal(1)
            self.match.play(legal[self.np_random.integers(len(legal))])
        observation, info = self._seen()
        return observation, 0.0, self.match.over, False, info


class _Zoo:
    """What the two PettingZoo forms share."""

    possible_agents = ("first", "second")
    action_spec = SPEC

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.agents: list[str] = []

    def observation_space(self, agent: str) -> Any:
        return SPACE

    def action_space(self, agent: str) -> Any:
        return SPEC.action_space

    def start(self, seed: int | None) -> None:
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.match = Match(self.rng)
        self.agents = list(self.possible_agents)

    def is_legal(self, row: str, action: Tuple) -> bool:
        return self.match.is_legal(self.possible_agents.index(row), action)

    def play(self, action: Any) -> None:
        chosen = tuple(int(v) for v in action)
        if not self.match.is_legal(self.match.mover, chosen):
            raise ValueError(f"{chosen} is not legal")
        self.match.play(chosen)

    def close(self) -> None:
        pass


class Parallel(_Zoo, pettingzoo.ParallelEnv):
    """The game as a PettingZoo ParallelEnv: the waiting player's action is ignored."""

    def to_move(self, row: str) -> bool:
        return self.possible_agents[self.match.mover] == row

    def _seen(self) -> dict[str, Any]:
        return {agent: seen_by(self.match, i) for i, agent in enumerate(self.possible_agents)}

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        self.start(seed)
        return self._seen(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
        self.play(actions[self.possible_agents[self.match.mover]])
        agents = list(self.agents)
        over = dict.fromkeys(agents, self.match.over)
        if self.match.over:
            self.agents = []
        zeros = dict.fromkeys(agents, 0.0)
        return self._seen(), zeros, over, dict.fromkeys(agents, False), {a: {} for a in agents}


class AEC(_Zoo, pettingzoo.AECEnv):
    """The game as a PettingZoo AECEnv; ``leaky`` shows the waiting player the mover's list."""

    def __init__(self, leaky: bool = False) -> None:
        super().__init__()
        self.leaky = leaky

    def reset(self, seed: int | None = None, options: Any = None) -> None:
        self.start(seed)
        self.rewards = dict.fromkeys(self.agents, 0.0)
        self._cumulative_rewards = dict.fromkeys(self.agents, 0.0)
        self.terminations = dict.fromkeys(self.agents, False)
        self.truncations = dict.fromkeys(self.agents, False)
        self.infos: dict[str, Any] = {agent: {} for agent in self.agents}
        self.agent_selection = "first"

    def observe(self, agent: str) -> dict[str, Any]:
        player = self.possible_agents.index(agent)
        return seen_by(self.match, self.match.mover if self.leaky else player)

    def step(self, action: Any) -> None:
        if self.terminations[self.agent_selection]:
            assert action is None
            self.agents.remove(self.agent_selection)
            if self.agents:
                self.agent_selection = self.agents[0]
            return
        self.play(action)
        if self.match.over:
            self.terminations = dict.fromkeys(self.agents, True)
        self.agent_selection = self.possible_agents[self.match.mover]
