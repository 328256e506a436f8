"""E15: games that are dealt alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tcg_flatpolicy.verify.adapters import BoolArray, Shown
from tcg_flatpolicy.verify.checks import Bug, Check
from tcg_flatpolicy.verify.evidence import State

ENOUGH = 3
"""How many games after their row's first tell that all are alike."""


class DealtAgain(Bug):
    """Deals each game of a slot from the seed that the slot's first game had."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__(rng)
        self.base = int(rng.integers(2**31))

    def dealer(self, game: int) -> np.random.Generator:
        return np.random.default_rng((self.base, game))


class SameGame(Check):
    """Every game of a row begins alike.

    Why: the policy learns one game by heart, and its win rate says nothing of others.

    Example: each slot of a packed engine keeps its seed, and deals from it again after every game.

    Fix: seed a slot once, in reset(seed), and let its generator go on from game to game.
    """

    code = "E15"
    lines = ("games of a row begin in different ways",)
    planted = {"same_game": DealtAgain}

    def start(self) -> None:
        self.openings: dict[int, list[int]] = {}
        """By row, hashes of what its games begin with."""
        self.live: BoolArray = np.zeros(len(self.world.adapter), dtype=bool)

    def see(self, state: State) -> None:
        shown = state.shown
        begins = shown.live & ~self.live
        if shown.fresh:
            begins = shown.live
        elif shown.ended is not None:
            begins |= shown.ended
        self.live = shown.live
        for row in np.flatnonzero(begins).tolist():
            self.openings.setdefault(row, []).append(_hash(shown, row))

    def end(self) -> None:
        later = sum(len(games) - 1 for games in self.openings.values())
        if later < ENOUGH or self.world.died:
            self.skip(
                f"needs {ENOUGH} games after the first of their rows, saw {later}: more steps"
            )
            return
        self.looked(later)
        if any(len(set(games)) > 1 for games in self.openings.values()):
            return
        # A game without chance always begins alike: then another seed changes nothing either.
        other = self.world.adapter.reset(self.world.seed + 1)
        rows = np.flatnonzero(other.live).tolist()
        if any(_hash(other, row) != self.openings.get(row, [None])[0] for row in rows):
            self.wrong(
                f"from state 0 on, each of {len(self.openings)} rows began all its games with "
                f"one and the same observation, {later} games after the first; another "
                "seed gives others",
                0,
                count=later,
            )


def _hash(shown: Shown, row: int) -> int:
    """Of all that a row shows."""
    return hash(_plain(shown.observations[row]))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((key, _plain(value[key])) for key in sorted(value))
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return np.asarray(value).tobytes()
