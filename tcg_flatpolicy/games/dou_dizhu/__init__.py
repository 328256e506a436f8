"""Dou dizhu, of OpenSpiel: 26,057 action ids, as tuples of how many cards of each rank are played.

Three players bid to be the landlord, who then plays alone against the two others.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyspiel

from tcg_flatpolicy.adapters.spiel import random_opponent
from tcg_flatpolicy.games.spiel import SpielGames
from tcg_flatpolicy.spec import ActionSpec, Index, Primary

RANKS = "3456789TJQKA2br"
"""In ascending order, as OpenSpiel writes them; b and r are the black and the red joker."""

SPEC = ActionSpec(
    [
        Primary("pass"),
        Primary("bid", Index("bid", 4)),
        # Some hands are two plays: 333444555666 is four triples, or 333444555 that takes 666 along.
        # The first rank of a chain that takes cards along, from 1 on, says which.
        Primary(
            "play", *(Index(rank, 2 if rank in "br" else 5) for rank in RANKS), Index("chain", 13)
        ),
    ]
)
"""What a tuple means. To pass is the same tuple while bidding and while playing."""

ROOM = 512
"""For legal plays in an observation; see the test for the most that were seen."""


FILE = Path(__file__).with_name("tuples.npz")


@functools.cache
def tuples() -> npt.NDArray[np.uint8]:
    """(26057, 17): the tuple of each of the game's ids, as :func:`ask_engine` gives it."""
    with np.load(FILE) as file:
        found: npt.NDArray[np.uint8] = file["tuples"]
    return found


def ask_engine() -> npt.NDArray[np.uint8]:
    """(26057, 17): the tuple of each id, from how the engine writes it; takes some seconds."""
    game = pyspiel.load_game("dou_dizhu")
    state = game.new_initial_state()
    while state.is_chance_node():
        state.apply_action(state.legal_actions()[0])
    state.apply_action(3)  # a bid that nobody can raise: now ids are plays
    found = np.zeros((game.num_distinct_actions(), 1 + SPEC.slots), np.uint8)
    found[1:4, 0], found[1:4, 1] = 1, [1, 2, 3]
    for number in range(4, len(found)):
        words = state.action_to_string(state.current_player(), number)
        words = words.replace("(BWJ)", "b").replace("(CJ)", "r")
        chain, takes, along = words.partition("-")
        found[number, 0] = 2
        found[number, 1:16] = [(chain + along).count(rank) for rank in RANKS]
        found[number, 16] = 1 + RANKS.index(chain[0]) if takes else 0
    return found


def make(
    num_games: int = 256,
    seat: int | None = None,
    self_play: bool = False,
    seed: int = 0,
    buf: Any = None,
) -> SpielGames:
    """Games of dou dizhu; each learner plays against two opponents who play at random.

    Args:
        num_games: number of games played at the same time.
        seat: the player that learns, 0 to 2; drawn for each game if left out.
        self_play: all three players learn, each with a row of its own.
        seed: random seed of deals, seats and opponents.
        buf: PufferLib's shared buffers.

    Raises:
        ValueError: no game, or no such seat.
    """
    return SpielGames(
        "dou_dizhu",
        SPEC,
        tuples(),
        opponents=None if self_play else random_opponent,
        seat=seat,
        num_games=num_games,
        room=ROOM,
        seed=seed,
        buf=buf,
    )
