"""OpenSpiel's games as a native PufferLib environment with a legal list (package ``open_spiel``).

Shapes: R rows, H values in a tuple, n action ids of the game.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import pufferlib
import pyspiel
import torch

from tcg_flatpolicy.adapters.spiel import Opponent, random_opponent
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.spec import ActionSpec


class SpielGames(pufferlib.PufferEnv):  # type: ignore[misc]
    """Many games of an OpenSpiel game in one process.

    A row is a game seen by the player that learns, whose turn it always is; or, with
    ``opponents=None``, one player of a game, with an empty list while another is to move: the rows
    of game g are ``g * players`` and those that follow. A new game starts in the step that ends
    one. The reward is what the game pays that player in that step.

    An observation has the fields ``tensor`` (the game's information state where it has one, else
    its observation, float32), ``seat`` (of the row's player), ``n_legal`` and ``legal``.

    When games end, `step` returns one info: lists with an entry a finished game and learning
    player, ``episode_return``, ``win`` (a return above 0), ``seat`` and ``episode_length`` (moves
    of all players).

    Args:
        game: the game or its name, such as "leduc_poker" or "dou_dizhu".
        spec: what tuples mean; without one a tuple is the id alone.
        to_tuple: (n, H) integers, the tuple of each id, or a function of the id that gives it.
        opponents: how the players that do not learn choose; None if all players learn.
        seat: the player that learns; drawn for each game if left out.
        num_games: number of games played at the same time.
        room: for legal tuples in an observation; the number of ids at most.
        seed: random seed of chance, seats and opponents; `reset(seed)` sets a new one.
        buf: PufferLib's shared buffers.

    Raises:
        TypeError: a game in which players move at the same time, or only one of spec and to_tuple.
        ValueError: an argument out of its range, two ids with the same tuple, or a tuple that is
            not within the spec; both are named.
    """

    def __init__(
        self,
        game: Any,
        spec: ActionSpec | None = None,
        to_tuple: npt.ArrayLike | Callable[[int], Sequence[int]] | None = None,
        opponents: Opponent | None = random_opponent,
        seat: int | None = None,
        num_games: int = 64,
        room: int = 512,
        seed: int = 0,
        buf: dict[str, Any] | None = None,
    ) -> None:
        self.game = pyspiel.load_game(game) if isinstance(game, str) else game
        kind, self.players = self.game.get_type(), self.game.num_players()
        if kind.dynamics != pyspiel.GameType.Dynamics.SEQUENTIAL:
            raise TypeError(
                f"in {kind.short_name} players move at the same time: load it as a turn-based game"
            )
        if num_games < 1:
            raise ValueError(f"num_games must be at least 1, got {num_games}")
        if seat is not None and (opponents is None or not 0 <= seat < self.players):
            raise ValueError(
                f"seat={seat}: it is one of 0..{self.players - 1}, of a game in which the others "
                "are opponents"
            )
        ids = int(self.game.num_distinct_actions())
        if (spec is None) != (to_tuple is None):
            raise TypeError("spec and to_tuple say together what an id means: give both or none")
        self.action_spec = ActionSpec.from_nvec([ids]) if spec is None else spec
        self._tuples = tuples_of(
            np.arange(ids) if to_tuple is None else to_tuple, ids, self.action_spec
        )
        self._ids = {one.tobytes(): k for k, one in enumerate(self._tuples)}
        self._informed = kind.provides_information_state_tensor
        shape = (
            self.game.information_state_tensor_shape()
            if self._informed
            else self.game.observation_tensor_shape()
        )
        small = np.min_scalar_type(int(self._tuples.max()))
        self.observation_dtype = np.dtype(
            [
                ("tensor", np.float32, (int(np.prod(shape)),)),
                ("legal", small, (min(room, ids), self._tuples.shape[1])),
                ("n_legal", np.uint16 if room < 2**16 else np.uint32),
                ("seat", np.uint8),
            ]
        )
        self.legal_layout = LegalLayout.from_dtype(
            self.observation_dtype, count="n_legal", actions="legal", spec=self.action_spec
        )
        self.opponents, self.seat = opponents, seat
        self.agents_per_game = self.players if opponents is None else 1
        self.num_agents = num_games * self.agents_per_game
        size = self.observation_dtype.itemsize
        self.single_observation_space = gymnasium.spaces.Box(0, 255, (size,), np.uint8)
        self.single_action_space = self.action_spec.action_space
        super().__init__(buf)
        self._records = self.observations.view(self.observation_dtype)[:, 0]
        self._rng = np.random.default_rng(seed)
        self._games: list[_Game] = [_Game(self, None) for _ in range(num_games)]
        self.illegal_actions = 0

    def reset(self, seed: int | None = None) -> tuple[npt.NDArray[np.uint8], list[dict[str, Any]]]:
        """Starts all games; ``seed`` seeds the generator, None keeps its state."""
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._games = [self._new_game() for _ in self._games]
        for buffer in (self.rewards, self.terminals, self.truncations):
            buffer[:] = 0
        self._observe()
        return self.observations, []

    def step(self, actions: npt.NDArray[Any]) -> tuple[Any, Any, Any, Any, list[dict[str, Any]]]:
        """Plays (R, H) integers, a legal tuple of each row that is to move, then the opponents.

        Raises:
            ValueError: a tuple that is not legal; row and tuple are named.
        """
        ended: dict[str, list[float]] = {}
        self.rewards[:] = 0
        self.terminals[:] = False
        for number, game in enumerate(self._games):
            row = number * self.agents_per_game
            mover = row + (game.state.current_player() if self.agents_per_game > 1 else 0)
            sent = np.asarray(actions[mover]).astype(self._tuples.dtype)
            action = self._ids.get(sent.tobytes())
            if action is None or action not in game.state.legal_actions():
                raise ValueError(
                    f"row {mover}: {tuple(actions[mover].tolist())} is not legal: the list holds "
                    f"{game.state.legal_actions()[:10]} (ids of the game)"
                )
            game.play(action)
            game.go_on()
            for k, player in enumerate(game.learners):
                self.rewards[row + k] = game.paid(player)
            if game.state.is_terminal():
                self.terminals[row : row + self.agents_per_game] = True
                for player in game.learners:
                    total = game.returns[player]
                    for key, value in (
                        ("episode_return", total),
                        ("win", float(total > 0)),
                        ("seat", float(player)),
                        ("episode_length", float(game.moves)),
                    ):
                        ended.setdefault(key, []).append(value)
                self._games[number] = self._new_game()
        self._observe()
        return (
            self.observations,
            self.rewards,
            self.terminals,
            self.truncations,
            [dict(ended)] if ended else [],
        )

    def close(self) -> None:
        """Does nothing: there is nothing to free."""

    def _new_game(self) -> _Game:
        """A game in which a learner is to move, some opponents having moved."""
        while True:
            seat = self.seat
            if self.opponents is not None and seat is None:
                seat = int(self._rng.integers(self.players))
            game = _Game(self, seat)
            game.go_on()
            if not game.state.is_terminal():
                return game

    def _observe(self) -> None:
        room = self._records["legal"].shape[1]
        self._records["n_legal"] = 0
        self._records["legal"] = 0
        for number, game in enumerate(self._games):
            state, row = game.state, number * self.agents_per_game
            for k, player in enumerate(game.learners):
                tensor = (
                    state.information_state_tensor if self._informed else state.observation_tensor
                )
                self._records["tensor"][row + k] = tensor(player)
                self._records["seat"][row + k] = player
            legal = state.legal_actions()
            if len(legal) > room:
                raise ValueError(
                    f"a state of {self.game} has {len(legal)} legal actions, and there is room for "
                    f"{room}: pass room={len(legal)} or more"
                )
            mover = row + (state.current_player() if self.agents_per_game > 1 else 0)
            self._records["n_legal"][mover] = len(legal)
            self._records["legal"][mover, : len(legal)] = self._tuples[legal]


class _Game:
    """One game: its state, who learns, and what they have been paid."""

    def __init__(self, env: SpielGames, seat: int | None) -> None:
        self.env = env
        self.state = env.game.new_initial_state()
        self.learners = range(env.players) if seat is None else range(seat, seat + 1)
        self.returns = [0.0] * env.players
        self._seen = [0.0] * env.players
        self.moves = 0

    def play(self, action: int) -> None:
        self.state.apply_action(action)
        self.moves += 1

    def go_on(self) -> None:
        """Until a learner is to move or the game is over."""
        state, rng = self.state, self.env._rng
        while not state.is_terminal():
            if state.is_chance_node():
                outcomes, chances = zip(*state.chance_outcomes(), strict=True)
                state.apply_action(outcomes[_drawn(chances, rng)])
            elif state.current_player() in self.learners:
                break
            else:
                assert self.env.opponents is not None
                self.play(self.env.opponents(state, rng))
        self.returns = list(state.returns())

    def paid(self, player: int) -> float:
        """What the player has been paid since it was last asked."""
        paid = self.returns[player] - self._seen[player]
        self._seen[player] = self.returns[player]
        return paid


def _drawn(chances: Sequence[float], rng: np.random.Generator) -> int:
    """A place, by its chance."""
    running = np.cumsum(chances)
    return min(
        int(np.searchsorted(running, rng.random() * running[-1], side="right")), len(running) - 1
    )


def tuples_of(
    to_tuple: npt.ArrayLike | Callable[[int], Sequence[int]], ids: int, spec: ActionSpec
) -> npt.NDArray[Any]:
    """(ids, H), the tuple of each id, in the smallest dtype that holds them.

    Raises:
        ValueError: another number of tuples, one that is not within the spec, or one of two ids.
    """
    given = [to_tuple(k) for k in range(ids)] if callable(to_tuple) else to_tuple
    tuples = np.asarray(given, np.int64).reshape(ids, -1)
    if tuples.shape[1] != len(spec.nvec):
        raise ValueError(
            f"to_tuple gives tuples of {tuples.shape[1]} values, and the spec's have "
            f"{len(spec.nvec)}"
        )
    legal = LegalActions(torch.from_numpy(tuples), torch.ones(ids, dtype=torch.int64))
    try:
        legal.validate(spec)
    except ValueError as error:
        raise ValueError(f"to_tuple, with row for id: {error}") from None
    order = np.lexsort(tuples.T)
    again = np.flatnonzero((tuples[order[1:]] == tuples[order[:-1]]).all(1))
    for k in again[:1]:
        raise ValueError(
            f"ids {order[k]} and {order[k + 1]} have the same tuple "
            f"{tuple(tuples[order[k]].tolist())}, as have {len(again)} in all: the game could not "
            "tell them apart"
        )
    return np.ascontiguousarray(tuples.astype(np.min_scalar_type(int(tuples.max()))))
