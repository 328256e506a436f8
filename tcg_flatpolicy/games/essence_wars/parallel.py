"""Essence Wars with both players as agents: the game's own PettingZoo environment, wrapped.

`tcg_flatpolicy.games.essence_wars.two_players` says how empty lists change the trainer's numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Dict, MultiDiscrete

from tcg_flatpolicy.games.essence_wars import engine as ew
from tcg_flatpolicy.games.essence_wars.encoder import Described
from tcg_flatpolicy.games.essence_wars.two_players import waiting_refusal

try:
    from essence_wars._core import STATE_TENSOR_SIZE
    from essence_wars.parallel_env import EssenceWarsParallelEnv
    from pettingzoo import ParallelEnv  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(
        f"tcg_flatpolicy.games.essence_wars.parallel needs {error.name}: install it with "
        "`pip install pettingzoo`"
    ) from error

ByAgent: TypeAlias = dict[str, Any]

# Pairs, since a Dict sorts the names of a mapping: in this order, PufferLib's emulation makes an
# OBSERVATION_DTYPE of it.
_SPACES = Dict(
    [
        ("state", Box(-np.inf, np.inf, (STATE_TENSOR_SIZE,), np.float32)),
        ("legal", Box(0, int(ew.SPEC.nvec.max()) - 1, (ew.MAX_LEGAL, 4), np.uint8)),
        ("n_legal", Box(0, ew.MAX_LEGAL, (), np.int16)),
    ]
)


class EssenceWarsParallel(Described, ParallelEnv):  # type: ignore[misc]
    """The game's PettingZoo ParallelEnv, with the legal tuples in what an agent observes.

    Put it under PufferLib's emulation, ``PettingZooPufferEnv(env_creator=EssenceWarsParallel)``: an
    emulated observation is an `OBSERVATION_DTYPE`, so a policy trained here plays in `EssenceWars`.
    `EssenceWarsTwoPlayers` plays many of the same games at once, and shows the waiting player its
    own view. Differences from the game's own environment:

    - An observation is a Dict of ``state``, ``legal`` and ``n_legal`` (there a mask in the infos),
      and an action a tuple of `SPEC` (there a number from 0 to 541).
    - The player to move sees the state from its own side, and the waiting player sees zeros (there
      both see it from the first player's side).
    - A game goes on until the engine ends it, at turn 30. There it is cut off after 100 actions,
      and PufferLib's trainer, which does not look at truncations, would carry the value of the next
      game into it.
    - An illegal action raises (there it loses the game).
    - Each game has a seed from this environment's own generator: the same seed and actions give the
      same run, over any number of games (there, and under emulation, the next game's seed is from
      NumPy's global one).

    Args:
        deck1: the deck of "player_0", who moves first.
        deck2: the deck of "player_1".
        game_mode: "attrition" or "essence_duel".
        seed: random seed of the games; `reset(seed)` sets a new one.

    Raises:
        ValueError: a deck or mode that does not exist.

    Attributes:
        illegal_actions: int, number of illegal actions since it was made; each raised.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "name": "essence_wars_tuples",
        "render_modes": [],
        "is_parallelizable": True,
    }
    render_mode = None

    def __init__(
        self,
        deck1: str = "artificer_tokens",
        deck2: str = "broodmother_pack",
        game_mode: str = "attrition",
        seed: int = 0,
    ) -> None:
        self._env = EssenceWarsParallelEnv(deck1, deck2, game_mode, max_turns=sys.maxsize)
        self.possible_agents = self._env.possible_agents
        self.agents: list[str] = []
        self.illegal_actions = 0
        self._rng = np.random.default_rng(seed)
        self._mask = np.zeros(len(ew.INDEX_TO_TUPLE), dtype=bool)
        self._mover: str | None = None
        self._moves = self._legal_seen = 0

    def observation_space(self, agent: str) -> Dict:
        """Of either: ``state`` (356,) float32, ``legal`` (128, 4) uint8, ``n_legal`` () int16."""
        return _SPACES

    def action_space(self, agent: str) -> MultiDiscrete:
        """Of either agent: that of `SPEC`."""
        return ew.SPEC.action_space

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[ByAgent, ByAgent]:
        """Starts a game; ``seed`` seeds the generator, None keeps its state. Infos are empty."""
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        observations, infos = self._env.reset(seed=int(self._rng.integers(2**63)))
        self._moves = self._legal_seen = 0
        return self._shown(observations, infos), {agent: {} for agent in self.possible_agents}

    def step(
        self, actions: Mapping[str, Any]
    ) -> tuple[ByAgent, ByAgent, ByAgent, ByAgent, ByAgent]:
        """Plays the action of the agent that is to move.

        Args:
            actions: by agent, (4,) integers; from the waiting agent the no-op, or no action.

        Returns:
            ``(observations, rewards, terminations, truncations, infos)`` by agent. The infos at the
            end of a game are those of `EssenceWars`, of that agent; else they are empty.

        Raises:
            RuntimeError: no game is running.
            TypeError: actions are not integers.
            ValueError: an agent that does not exist, no action of the one that is to move, or one
                that is not legal.
        """
        if self._mover is None:
            raise RuntimeError("no game is running; call reset() first")
        for agent in actions:
            if agent not in self.possible_agents:
                known = " and ".join(self.possible_agents)
                raise ValueError(f"{agent!r} is not an agent; there are {known}")
        if self._mover not in actions:
            raise ValueError(f"{self._mover} is to move, and there is no action of it")
        indices = {agent: self._index(agent, np.asarray(sent)) for agent, sent in actions.items()}
        self._moves += 1
        self._legal_seen += int(self._mask.sum())
        observations, rewards, terminations, truncations, infos = self._env.step(
            {self._mover: indices[self._mover]}
        )
        shown = self._shown(observations, infos)
        told: ByAgent = {agent: {} for agent in self.possible_agents}
        if not self.agents:
            for agent, reward in rewards.items():
                told[agent] = {
                    "win": float(reward > 0),
                    "draw": float(reward == 0),
                    "episode_return": float(reward),
                    "episode_length": self._moves,
                    "legal_actions": self._legal_seen / self._moves,
                }
        return shown, rewards, terminations, truncations, told

    def state(self) -> npt.NDArray[np.float32]:
        """(356,) the engine's state, from the first player's side."""
        return self._env.state()

    def to_move(self, agent: str | int) -> bool:
        """Whether an agent, by name or number, is to move. `tcg_flatpolicy.verify` asks for it."""
        name = self.possible_agents[agent] if isinstance(agent, int) else agent
        return bool(name == self._mover)

    def _index(self, agent: str, action: npt.NDArray[Any]) -> int:
        """The engine's index of what an agent sends; raises if the agent may not send it."""
        if action.shape != (4,):
            raise ValueError(f"{agent}: an action must be (4,), got {action.shape}")
        if action.dtype.kind not in "iu":
            raise TypeError(f"{agent}: actions must be integers, got {action.dtype}")
        index, legal = ew.look_up(action[None], self._mask[None])
        if agent == self._mover and not legal[0]:
            problem = ew.refusal(action.tolist(), self._mask)
        elif agent != self._mover and (action != ew.SPEC.noop).any():
            problem = waiting_refusal(action.tolist())
        else:
            return int(index[0])
        self.illegal_actions += 1
        raise ValueError(f"{agent}: {problem}")

    def _shown(self, observations: ByAgent, infos: ByAgent) -> ByAgent:
        """Turns what the game's environment shows into observations, by agent."""
        self.agents = list(self._env.agents)
        self._mover = next((agent for agent in self.agents if infos[agent]["is_active"]), None)
        records = {agent: np.zeros((), ew.OBSERVATION_DTYPE) for agent in self.possible_agents}
        if self._mover is not None:
            state = observations[self._mover][None]
            if self._mover == self.possible_agents[1]:
                state = ew.second_players_view(state)
            self._mask = infos[self._mover]["action_mask"]
            legal = ew.INDEX_TO_TUPLE[self._mask]
            ew.check_room(np.array([len(legal)]))
            record = records[self._mover]
            record["state"] = state[0]
            record["legal"][: len(legal)] = legal
            record["n_legal"] = len(legal)
        return {agent: {name: r[name] for name in _SPACES} for agent, r in records.items()}
