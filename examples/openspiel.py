"""Liar's dice of OpenSpiel, whose numbered actions are played as tuples, from one command.

    pip install open_spiel
    python -m tcg_flatpolicy train examples.openspiel:make --total-steps 200000
    python -m tcg_flatpolicy eval runs/<folder> examples.openspiel:make

from_spiel checks that no two actions have the same tuple. It draws a seat for each game, and the
other player plays random legal actions.
"""

from __future__ import annotations

import tcg_flatpolicy as fp

SPEC = fp.ActionSpec(
    [fp.Primary("bid", fp.Index("dice", 10), fp.Index("face", 6)), fp.Primary("doubt")]
)


def make(dice: int = 5) -> fp.adapters.SpielEnv:
    """Liar's dice for two players.

    Args:
        dice: of each player, at most 5.
    """
    last = 2 * dice * 6  # its number is that of "Liar"

    def to_tuple(number: int) -> tuple[int, int, int]:
        return (1, 0, 0) if number == last else (0, number // 6, number % 6)

    return fp.adapters.from_spiel(f"liars_dice(numdice={dice})", spec=SPEC, to_tuple=to_tuple)
