"""E01: tuples that the spec does not hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from tcg_flatpolicy.verify.checks import Action, Bug, Check, Symptom, blamed
from tcg_flatpolicy.verify.evidence import State


class Numbered(Bug):
    """Counts the hand from 1."""

    def meant(self, action: Action) -> Action:
        return (2, action[1] - 1, action[2]) if action[0] == 2 else action

    def said(self, legal: list[Action], match: object, player: int) -> list[Action]:
        return [(p, a + 1, b) if p == 2 else (p, a, b) for p, a, b in legal]


class UnusedSlot(Bug):
    """Leaves in an unused slot what another action had there."""

    def meant(self, action: Action) -> Action:
        return (3, action[1], 0) if action[0] == 3 else action

    def said(self, legal: list[Action], match: object, player: int) -> list[Action]:
        left = self.rng.integers(4, size=len(legal)).tolist()
        return [(p, a, left[i]) if p == 3 else (p, a, b) for i, (p, a, b) in enumerate(legal)]


class OutsideSpec(Check):
    """A listed tuple is outside the spec.

    Why: an exception where ranges are checked; elsewhere an embedding of something else, or an
    index error deep in the network.

    Example: the engine writes the hand's place 30 where the spec knows 30 places, 0 to 29; or
    leaves in an unused slot what another action had there.

    Fix: correct the spec's sizes, or the engine's numbering; write 0 in unused slots.
    """

    code = "E01"
    lines = ("tuples within the spec",)
    claims = ("E06", "E08")
    planted = {"out_of_range": Numbered, "unused_slot": UnusedSlot}

    def start(self) -> None:
        self.of_primary: dict[int, Symptom] = {}

    def see(self, state: State) -> None:
        lists = state.lists
        self.looked(len(state.fits))
        for n in np.flatnonzero(~state.fits).tolist():
            row, action = int(lists.rows[n]), tuple(lists.actions[n].tolist())
            known = self.of_primary.get(action[0])
            if known is not None:
                known.count += 1
                continue
            words = (
                f"{state.where(row)}, place {int(lists.places[n])} of the list: {action}; "
                f"{self.world.spec.explain(action)}"
            )
            self.of_primary[action[0]] = self.wrong(words, state.number, tuples=[action])

    def explains(self, left: Mapping[str, list[Symptom]]) -> Iterable[Symptom]:
        outside = {symptom.tuples[0][0] for symptom in left["E01"]}
        return [s for code in self.claims for s in left[code] if blamed(s, outside)]
