"""E08: legal tuples that are not listed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tcg_flatpolicy.verify.checks import Action, Bug, Check, Symptom
from tcg_flatpolicy.verify.evidence import State


class NoRetreat(Bug):
    """Leaves retreats out."""

    def said(self, legal: list[Action], match: object, player: int) -> list[Action]:
        return [action for action in legal if action[0] != 3]


class Missing(Check):
    """A legal action is not listed.

    Why: that action is never tried; nothing else shows.

    Example: abilities without a target are left out of the enumeration.

    Fix: compare the enumeration with the engine's own: compare_enumerations.
    """

    code = "E08"
    lines = ("the engine refuses what is not listed",)
    claims = ("E09",)
    planted = {"missing": NoRetreat}

    def start(self) -> None:
        if not self.world.engine.knows_legality and not self.world.engine.forks:
            self.skip("needs is_legal(row, action) or fork() on the environment")

    def see(self, state: State) -> None:
        for answer in state.answers:
            row, missing = answer.row, answer.missing
            self.looked(answer.others_asked)
            if not missing:
                continue
            following = tuple(state.lists.following[row].tolist())
            follows = any(following) and following in missing
            shown = self.world.words(following if follows else missing[0])
            self.wrong(
                f"{state.where(row)}: {shown} is legal, and is not among the "
                f"{int(state.lists.counts[row])} listed tuples",
                state.number,
                tuples=missing,
                unchanged=bool(state.unchanged[row]),
                hint="follows" if follows else "full" if state.full[row] else "",
            )

    def end(self) -> None:
        if self.world.forks_asked and not self.world.forks_tell:
            self.skip(
                "forks took every unlisted action, so that it cannot be seen whether the engine "
                "refuses any; needs is_legal(row, action), illegal_actions or an exception"
            )

    def explains(self, left: Mapping[str, list[Symptom]]) -> Iterable[Symptom]:
        unlisted = {action[0] for symptom in left["E08"] for action in symptom.tuples}
        asked = [{a[0] for a in symptom.tuples} for symptom in left["E09"] if symptom.tuples]
        return left["E09"] if asked and all(legal <= unlisted for legal in asked) else ()
