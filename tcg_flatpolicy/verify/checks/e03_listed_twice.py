"""E03: repeated tuples."""

from __future__ import annotations

import numpy as np

from tcg_flatpolicy.verify.checks import Action, Bug, Check
from tcg_flatpolicy.verify.evidence import State


class Appended(Bug):
    """Appends the third tuple once more."""

    def said(self, legal: list[Action], match: object, player: int) -> list[Action]:
        return [*legal, legal[2]] if len(legal) > 3 else legal


class ListedTwice(Check):
    """A tuple is listed twice.

    Why: a trainer that does not merge repeats draws that action twice as often, and its entropy
    is wrong.

    Example: two ways to pay for a card give the same tuple, and both are appended.

    Fix: drop repeats when the list is made, or give the second way a slot of its own.
    """

    code = "E03"
    lines = ("no tuple twice",)
    planted = {"duplicates": Appended}

    def start(self) -> None:
        self.other_ends = False
        """Whether lists end in something other than zeros."""

    def see(self, state: State) -> None:
        lists = state.lists
        self.looked(len(lists.actions))
        ends = lists.actions[(lists.starts + lists.counts - 1)[lists.counts > 0]]
        self.other_ends |= bool(ends.any(axis=1).any())
        for n in state.repeats.tolist():
            row, action, place = int(lists.rows[n]), lists.actions[n], int(lists.places[n])
            listed = lists.of(row)
            first = listed.index(tuple(action.tolist()))
            hint = ""
            if lists.room is not None and not np.any(listed[place:]):
                hint = "last" if np.any(listed[first:]) else "zeros"
            self.wrong(
                f"{state.where(row)}: {self.world.words(action)} is listed in place {first} and "
                f"again in place {place}",
                state.number,
                hint=hint,
            )

    def end(self) -> None:
        if not self.other_ends:
            for symptom in self.symptoms:
                if symptom.hint:
                    symptom.message += "; so are all lists, so the count may be one too large"
