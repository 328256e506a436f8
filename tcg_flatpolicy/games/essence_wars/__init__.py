"""Essence Wars, a real two-player card game, as PufferLib environments, and an encoder for it.

`tcg_flatpolicy.games.essence_wars.parallel`, through PettingZoo, is imported by its own name.
"""

from __future__ import annotations

from typing import Any

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
    num_games: int = 256, two_players: bool = False, **arguments: Any
) -> EssenceWars | EssenceWarsTwoPlayers:
    """`EssenceWarsTwoPlayers` with ``two_players``, else `EssenceWars`, with the class's arguments.

    Raises:
        TypeError: an argument that the class does not have.
        ValueError: as the class.
    """
    kind = EssenceWarsTwoPlayers if two_players else EssenceWars
    return kind(num_games, **arguments)
