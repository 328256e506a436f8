"""E06: listed tuples that the engine does not take."""

from __future__ import annotations

from typing import Any

import numpy as np

from tcg_flatpolicy.verify.checks import Action, Bug, Check, Symptom
from tcg_flatpolicy.verify.evidence import State, Step, in_words, trace

OWN_ERRORS = (ArithmeticError, AttributeError, LookupError, NameError, RecursionError, TypeError)
"""What a fault in the engine's own code raises; what refuses an action is another exception."""


class AttacksAgain(Bug):
    """Lists attacks of units that have attacked."""

    def said(self, legal: list[Action], match: Any, player: int) -> list[Action]:
        mine, theirs = match.units[player], match.units[1 - player]
        attacks = [(1, i, 4) for i in range(4) if mine[i]]
        attacks += [(1, i, j) for i in range(4) for j in range(4) if mine[i] and theirs[j]]
        return legal + [action for action in attacks if action not in legal]


class Refused(Check):
    """A listed action is refused.

    Why: an exception, or a no-op in the action's place: the policy is credited for something
    that did not happen.

    Example: the list is computed from a rule that the engine applies in another way.

    Fix: make the list by the engine's own rules; enumerate_legal helps to compare.
    """

    code = "E06"
    lines = ("the step takes listed actions", "the engine says that listed actions are legal")
    planted = {"refused": AttacksAgain}

    def start(self) -> None:
        self.counted: list[tuple[Step, int, int]] = []
        """Steps with illegal actions that nothing explains: how many, and how many rows waited."""
        self.idle_counts = True
        """Whether each no-op of a row that waits may have been counted as illegal."""
        if not self.world.engine.knows_legality and not self.world.engine.forks:
            needs = "needs is_legal(row, action) or fork() on the environment"
            self.skip(needs, self.lines[1])

    def see(self, state: State) -> None:
        for answer in state.answers:
            self.looked(len(answer.looked_at), self.lines[1])
            if not answer.refused:
                continue
            refused = answer.refused
            padded = state.lists.room is not None and not any(refused[0])
            self.wrong(
                f"{state.where(answer.row)}: {self.world.words(refused[0])} is listed, and "
                f"{answer.how}, as {len(refused)} of {len(answer.looked_at)}",
                state.number,
                self.lines[1],
                tuples=refused,
                unchanged=bool(state.unchanged[answer.row]),
                fresh=state.shown.fresh,
                others_legal=bool(answer.missing),
                hint="zeros" if padded and refused == [answer.listed[-1]] else "",
            )

    def stepped(self, step: Step) -> None:
        rows = np.flatnonzero(step.listed)
        self.looked(len(rows))
        if step.error is not None and len(rows):
            words = f"step raises {in_words(step.error)}"
            if not self._known(step, words):
                self._raised(step, step.error, words)
        if step.error is not None:
            return
        idle = int((step.state.shown.live & ~step.listed).sum())
        self.idle_counts &= step.illegal >= idle
        if step.illegal > 0 and len(rows):
            known = self._known(step, f"the environment counts {step.illegal} illegal actions")
            illegal = step.illegal - known - self._unplayable(step)
            if illegal > 0:
                self.counted.append((step, illegal, idle))

    def _raised(self, step: Step, error: Exception, words: str) -> None:
        failed = isinstance(error, OWN_ERRORS) or self._said_legal(step)
        if failed:
            message = self._where(step, f"{words}; the engine's own step failed{trace(error)}")
        else:
            message = self._where(step, f"{words}; the fault may as well be in step itself")
            message += " as in the list"
        self._in_step(step, message, 1).hint = "failed" if failed else ""

    def _said_legal(self, step: Step) -> bool:
        """Whether the engine was asked about all that was sent, and would take it."""
        sent = {
            row: tuple(step.actions[row].tolist()) for row in np.flatnonzero(step.listed).tolist()
        }
        legal = {a.row for a in step.state.answers if sent.get(a.row) in a.looked_at}
        return legal == sent.keys()

    def end(self) -> None:
        for step, illegal, idle in self.counted:
            illegal -= idle if self.idle_counts else 0
            if illegal > 0:
                words = f"the environment counts {illegal} as illegal"
                self._in_step(step, self._where(step, words), illegal)
        if self.world.forks_asked and not self.world.forks_tell:
            why = (
                "forks took every unlisted action, so that it cannot be seen whether the engine "
                "refuses any; needs is_legal(row, action), illegal_actions or an exception"
            )
            self.skip(why, self.lines[1])

    def _known(self, step: Step, outcome: str) -> int:
        """How many actions were sent though the engine had said no."""
        sent = 0
        for row in {answer.row for answer in step.state.answers if step.listed[answer.row]}:
            action = tuple(step.actions[row].tolist())
            if action in step.state.refused(row):
                sent += 1
                self.wrong(
                    f"{step.state.where(row)}: {self.world.words(action)} is listed, and {outcome}",
                    step.state.number,
                    tuples=[action],
                    unchanged=bool(step.state.unchanged[row]),
                    fresh=step.state.shown.fresh,
                )
        return sent

    def _unplayable(self, step: Step) -> int:
        """How many no-ops were sent for rows that should have had something else to play."""
        counts, turns = step.state.lists.counts, step.state.turns
        if turns is None:
            idle = (counts == 0) if self.world.adapter.single_agent else np.zeros_like(step.listed)
            return int((((counts > 0) & ~step.listed) | idle).sum())
        return int((turns & step.state.shown.live & ~step.listed).sum())

    def _where(self, step: Step, words: str) -> str:
        rows = np.flatnonzero(step.listed)
        state = step.state
        if len(rows) == 1:
            action = self.world.words(step.actions[rows[0]])
            return f"{state.where(int(rows[0]))}: {action} is listed, and {words}"
        if step.error is None:
            return f"state {state.number}: of the listed actions of {len(rows)} rows {words}"
        at = (
            f"at listed actions of {len(rows)} rows "
            "(is_legal(row, action) on the environment would tell which)"
        )
        return f"state {state.number}: {words.replace('step raises', f'step raises {at}', 1)}"

    def _in_step(self, step: Step, message: str, illegal: int) -> Symptom:
        rows, state = np.flatnonzero(step.listed), step.state
        return self.wrong(
            message,
            state.number,
            tuples=[tuple(step.actions[rows[0]].tolist())] if len(rows) == 1 else [],
            count=illegal,
            unchanged=bool(state.unchanged[rows].all()),
            fresh=state.shown.fresh,
            sent=step.actions[rows, 0].tolist(),
        )
