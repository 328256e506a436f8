"""E16: errors of the engine's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tcg_flatpolicy.verify.checks import Action, Bug, Check, Symptom


class Overrun(Bug):
    """Looks up a place that is not there when a unit of the last place is taken back."""

    def played(self, action: Action) -> Any:
        return [0, 1, 2][action[1]] if action[0] == 3 else None


class StepFails(Check):
    """The step fails at a legal action.

    Why: the run ends, or the game is cut off and its reward is lost.

    Example: the engine draws a card from a deck that is empty: an IndexError.

    Fix: follow the traceback: the fault is in the engine's step, not in its list.
    """

    code = "E16"
    claims = ("E06",)
    planted = {"step_fails": Overrun}

    def explains(self, left: Mapping[str, list[Symptom]]) -> Iterable[Symptom]:
        return [symptom for symptom in left["E06"] if symptom.hint == "failed"]
