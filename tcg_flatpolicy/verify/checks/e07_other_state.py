"""E07: lists of an earlier state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tcg_flatpolicy.verify.checks import Action, Bug, Check, Symptom


class NotRefreshed(Bug):
    """Begins each turn with the list of the same player's last turn."""

    def shown(self, legal: list[Action], last: list[Action], match: Any) -> list[Action]:
        return last or legal if match.moves and not match.moves_in_turn else legal


class OtherState(Check):
    """The list is that of another state.

    Why: actions are refused, or replaced, in every turn that follows an opponent's move.

    Example: the list is written before the opponent answers and not again afterwards.

    Fix: write the list last in step, after everything that changes the state.
    """

    code = "E07"
    claims = ("E06", "E08")
    planted = {"not_refreshed": NotRefreshed}

    def explains(self, left: Mapping[str, list[Symptom]]) -> Iterable[Symptom]:
        refused, missing = left["E06"], left["E08"]
        # What the environment does not name is taken for more of the same, where there is some.
        judged = [symptom for symptom in refused if symptom.tuples] or refused
        if not judged or any(symptom.fresh for symptom in judged):
            return
        same = all(symptom.unchanged for symptom in judged)
        others = any(symptom.others_legal for symptom in judged)
        if same or others or (missing and all(symptom.unchanged for symptom in missing)):
            for symptom in refused:
                symptom.message += (
                    "; the row still shows the list that it showed last"
                    if symptom.unchanged
                    else "; it seems to be the list of an earlier state"
                )
            yield from (*refused, *missing)
