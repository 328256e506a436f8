"""OpenSpiel's games with sequential moves, as a Gymnasium environment of one player."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from tcg_flatpolicy.adapters.rows import Ids, Rows, ToTuple
from tcg_flatpolicy.spec import ActionSpec

Opponent = Callable[[Any, np.random.Generator], int]
"""(state, generator) -> one of state.legal_actions()."""


def random_opponent(state: Any, rng: np.random.Generator) -> int:
    """A uniformly drawn legal action."""
    legal = state.legal_actions()
    return int(legal[rng.integers(len(legal))])


class SpielEnv(gymnasium.Env[Any, Any]):
    """What :func:`from_spiel` returns; ``game`` and ``state`` are OpenSpiel's."""

    def __init__(
        self,
        game: Any,
        spec: ActionSpec | None,
        to_tuple: ToTuple | None,
        opponents: Opponent,
        seat: int | None,
        max_legal: int | None,
    ) -> None:
        self.game, self._opponents, self._seat = game, opponents, seat
        self.state: Any = None
        self._ids = Ids(game.num_distinct_actions(), spec, to_tuple)
        self.action_spec = self._ids.spec
        told = game.get_type()
        self._private = told.provides_information_state_tensor
        if not self._private and not told.provides_observation_tensor:
            raise ValueError(f"{told.short_name} provides no tensor to see a state by")
        size = (
            game.information_state_tensor_size()
            if self._private
            else game.observation_tensor_size()
        )
        seen: dict[str, spaces.Space[Any]] = {
            "state": spaces.Box(-np.inf, np.inf, (size,), np.float32),
            "seat": spaces.Box(0, 255, (1,), np.uint8),
        }
        room = max_legal or game.num_distinct_actions()
        self._rows = Rows(spaces.Dict(seen), self.action_spec, room)
        self.observation_space = self._rows.space
        self.action_space = self.action_spec.action_space
        self.legal_layout = self._rows.layout

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """A new game, up to the first move of the player's; ``seed`` seeds all that is drawn."""
        super().reset(seed=seed)
        while True:
            players = self.game.num_players()
            drawn = int(self.np_random.integers(players))
            self._player = drawn if self._seat is None else self._seat
            self.state = self.game.new_initial_state()
            self._play_on()
            if not self.state.is_terminal():  # else the player never moved
                return self._row(), {}

    def step(self, action: Any) -> Any:
        """Plays a tuple, and all moves of the others; the reward is the change of the return."""
        before = self.state.returns()[self._player]
        self.state.apply_action(self._ids.of(action))
        self._play_on()
        reward = self.state.returns()[self._player] - before
        return self._row(), float(reward), self.state.is_terminal(), False, {}

    def _play_on(self) -> None:
        """Plays chance and the others until the player is to move, or the game is over."""
        state, rng = self.state, self.np_random
        while not state.is_terminal() and state.current_player() != self._player:
            if state.is_chance_node():
                actions, chances = zip(*state.chance_outcomes(), strict=True)
                shares = np.array(chances) / sum(chances)
                state.apply_action(int(rng.choice(actions, p=shares)))
            else:
                state.apply_action(self._opponents(state, rng))

    def _row(self) -> Any:
        tensor = (
            self.state.information_state_tensor if self._private else self.state.observation_tensor
        )
        over = self.state.is_terminal()
        legal = [] if over else [self._ids.tuples[i] for i in self.state.legal_actions()]
        seen = {"state": np.asarray(tensor(self._player), np.float32), "seat": self._player}
        return self._rows.row(seen, legal)

    def render(self) -> Any:
        """The state in OpenSpiel's words."""
        return str(self.state)


def from_spiel(
    game: str | Any,
    *,
    spec: ActionSpec | None = None,
    to_tuple: ToTuple | None = None,
    opponents: Opponent = random_opponent,
    seat: int | None = None,
    max_legal: int | None = None,
) -> SpielEnv:
    """A game of OpenSpiel for one player; the others are built in.

    Observations have the fields ``state``, float32, and ``seat``, uint8, beside the list. The
    reward is the change of the player's return.

    Args:
        game: its name, such as "dou_dizhu" or "leduc_poker(players=3)", or a pyspiel.Game.
        spec: what the tuples mean; the action's number as one value, if left out.
        to_tuple: function of an action's number that gives its tuple; it is checked over all of
            them that each has another tuple.
        opponents: function of (state, generator) that chooses an action for the other players.
        seat: of the player, from 0; None draws one for each game.
        max_legal: most legal actions in a state; all there are if left out, which makes long rows
            where there are many.

    Raises:
        ImportError: OpenSpiel is not installed.
        ValueError: a game with simultaneous moves or without a tensor, no such seat, or tuples that
            are outside the spec or not distinct.
    """
    try:
        import pyspiel
    except ImportError as error:
        raise ImportError("from_spiel needs OpenSpiel: pip install open_spiel") from error
    loaded = pyspiel.load_game(game) if isinstance(game, str) else game
    if loaded.get_type().dynamics != pyspiel.GameType.Dynamics.SEQUENTIAL:
        name = loaded.get_type().short_name
        raise ValueError(f"{name} has simultaneous moves; take pyspiel.convert_to_turn_based")
    if seat is not None and not 0 <= seat < loaded.num_players():
        raise ValueError(f"seat must lie in 0..{loaded.num_players() - 1}, got {seat}")
    return SpielEnv(loaded, spec, to_tuple, opponents, seat, max_legal)
