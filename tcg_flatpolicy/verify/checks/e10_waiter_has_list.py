"""E10: lists of rows that have to wait."""

from __future__ import annotations

import numpy as np

from tcg_flatpolicy.verify.checks import Action, Bug, Check
from tcg_flatpolicy.verify.evidence import State


class BothHaveIt(Bug):
    """Shows the mover's list to both players."""

    def waits(self, legal: list[Action]) -> list[Action]:
        return legal


class WaiterHasList(Check):
    """A player who is not to move has a list.

    Why: the waiting player's draws enter the loss as if they had been played.

    Example: both players get the mover's list.

    Fix: give the player who waits an empty list: count 0.
    """

    code = "E10"
    lines = ("who waits has no list",)
    planted = {"waiting_has_list": BothHaveIt}

    def start(self) -> None:
        if not self.world.knows_who_moves:
            alone = self.world.adapter.single_agent
            self.skip(
                "needs a second player; here one agent always acts"
                if alone
                else "needs to_move(row) on the environment"
            )

    def see(self, state: State) -> None:
        if state.turns is None:
            return
        waiting = state.shown.live & ~state.turns
        self.looked(int(waiting.sum()))
        for row in np.flatnonzero(waiting & (state.lists.counts > 0)).tolist():
            self.wrong(
                f"{state.where(row)} is not to move, and {int(state.lists.counts[row])} tuples are "
                f"listed for it, first {self.world.words(state.lists.of(row)[0])}",
                state.number,
            )
