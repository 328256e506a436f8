"""Essence Wars, a real two-player card game, as PufferLib environments, and an encoder for it.

`tcg_flatpolicy.games.essence_wars.parallel`, through PettingZoo, is imported by its own name.
"""

from __future__ import annotations

from typing import Any, Literal

try:
    import essence_wars._core  # noqa: F401
    import pufferlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"tcg_flatpolicy.games.essence_wars needs {error.name}: install PufferLib as the README "
        "says, and the game with `pip install essence-wars`"
    ) from error

from tcg_flatpolicy.games.essence_wars.encoder import EssenceWarsEncoder
from tcg_flatpolicy.games.essence_wars.engine import (
    DECKS,
    GAME_MODES,
    INDEX_TO_TUPLE,
    LAYOUT,
    MAX_LEGAL,
    OBSERVATION_DTYPE,
    SPEC,
    TUPLE_TO_INDEX,
)
from tcg_flatpolicy.games.essence_wars.environment import EssenceWars
from tcg_flatpolicy.games.essence_wars.two_players import EssenceWarsTwoPlayers

__all__ = [
    "DECKS",
    "GAME_MODES",
    "INDEX_TO_TUPLE",
    "LAYOUT",
    "MAX_LEGAL",
    "OBSERVATION_DTYPE",
    "SPEC",
    "TUPLE_TO_INDEX",
    "EssenceWars",
    "EssenceWarsEncoder",
    "EssenceWarsTwoPlayers",
    "make",
]


def make(
    num_games: int = 256,
    deck1: str = "artificer_tokens",
    deck2: str = "broodmother_pack",
    opponent: str = "greedy",
    two_players: bool = False,
    game_mode: str = "attrition",
    illegal: Literal["raise", "random", "noop"] = "raise",
    record: bool = False,
    seed: int = 0,
    buf: dict[str, Any] | None = None,
) -> EssenceWars | EssenceWarsTwoPlayers:
    """The engine ``essence_wars`` of the command line.

    Args:
        num_games: number of games played at the same time.
        deck1: deck of the policy's side, or 'random'.
        deck2: deck of the opponent, or 'random'.
        opponent: built-in opponent: greedy, random, mcts<N> or alphabeta<N>.
        two_players: train on both players, without an opponent.
        game_mode: attrition or essence_duel.
        illegal: raise an error at an illegal action, or play a random one or the no-op.
        record: keep all actions, so that the games can be saved.
        seed: random seed of decks, games and opponent.
        buf: PufferLib's shared buffers.

    Raises:
        ValueError: as the class; opponent "self"; two_players with an opponent.
    """
    if opponent == "self":
        raise ValueError(
            "opponent 'self' alternates between two players in one row, which PPO's value "
            "targets do not allow for, and a win rate needs a built-in opponent, such as greedy"
        )
    rest: dict[str, Any] = {"deck1": deck1, "deck2": deck2, "game_mode": game_mode}
    rest |= {"illegal": illegal, "record": record, "seed": seed, "buf": buf}
    if not two_players:
        return EssenceWars(num_games, opponent=opponent, **rest)
    if opponent != "greedy":
        raise ValueError(
            f"two_players trains without an opponent, but opponent is {opponent!r}; leave one of "
            "them out"
        )
    return EssenceWarsTwoPlayers(num_games, **rest)


make.evaluation = {"two_players": False, "opponent": "greedy"}  # type: ignore[attr-defined]
