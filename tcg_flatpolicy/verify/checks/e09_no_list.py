"""E09: empty lists of rows that have to move."""

from __future__ import annotations

from typing import Any

import numpy as np

from tcg_flatpolicy.verify.adapters import BoolArray
from tcg_flatpolicy.verify.checks import Action, Bug, Check
from tcg_flatpolicy.verify.evidence import State, Step, in_words

EMPTY_STEPS = 3
"""More steps in a row than this in which nobody has a list are a finding, or a wait."""
EMPTY_ASKED = 50
"""Of how many empty lists the engine is asked what is legal there."""
SAY_WHO_WAITS = "if nobody is to move then, say so with to_move(row) on the environment"
SOMEONE, MOVER = "somebody has a list", "who is to move has a list"


class Cleared(Bug):
    """Clears the list before the observation is copied."""

    def written(self, records: Any, some: Any) -> None:
        records["n"], records["legal"] = 0, 0


class NoList(Check):
    """The player to move has an empty list.

    Why: every step plays the no-op: episodes of the greatest length, entropy 0.

    Example: the mask is cleared for the next state before the observation is copied.

    Fix: fill the list before the observation is handed out; list the pass or end of turn; where
    nobody is to move, say so with to_move(row) on the environment.
    """

    code = "E09"
    lines = (SOMEONE, MOVER)
    planted = {"list_zeroed": Cleared}

    def start(self) -> None:
        self.waited = self.longest_wait = self.waits_since = 0
        """Steps in a row in which nobody has had a list: up to now, and at most until one came."""
        self.ended: BoolArray = np.zeros(len(self.world.adapter), dtype=bool)
        """Rows whose episode ended in the step before."""
        self.shows_next = False
        """Whether a step that ends an episode shows the next one's first state."""
        self.at_an_end: list[Any] = []
        """Symptoms of rows whose episode has just ended, so that they may show its last state."""
        if not self.world.knows_who_moves and not self.world.adapter.single_agent:
            self.skip("needs to_move(row) on the environment", MOVER)

    def see(self, state: State) -> None:
        lists, live, must = state.lists, state.shown.live, state.turns
        ended = np.zeros_like(live) if state.shown.ended is None else state.shown.ended
        # One that ends twice in a row has begun in between.
        self.shows_next |= bool((ended & (self.ended | (lists.counts > 0))).any())
        self.ended = ended
        empty = live & (lists.counts == 0) & state.sound
        if must is None and self.world.adapter.single_agent:
            must = np.ones(len(live), dtype=bool)
        if must is None or (lists.counts[live] > 0).any():
            self.looked(line=SOMEONE)
        if must is None:
            self._wait(state, empty)
            return
        self.looked(int((live & must).sum()), MOVER)
        for row in np.flatnonzero(empty & must).tolist():
            message = f"{state.where(row)} is to move, and its list is empty (count 0)"
            if state.turns is None:
                message += f"; {SAY_WHO_WAITS}"
            symptom = self.wrong(message, state.number, MOVER, tuples=self._legal(row))
            if ended[row]:
                self.at_an_end.append(symptom)

    def _legal(self, row: int) -> list[Action]:
        """Some tuples that the engine would take in place of an empty list."""
        engine = self.world.engine
        if not engine.knows_legality or len(self.symptoms) >= EMPTY_ASKED:
            return []
        return [action for action in self.world.candidates([]) if engine.is_legal(row, action)]

    def _wait(self, state: State, empty: BoolArray) -> None:
        """Counts the steps in a row in which no row has a list."""
        live = state.shown.live
        if live.any() and empty[live].all():
            if not self.waited:
                self.waits_since = state.number
            self.waited += 1
        elif live.any():
            self.longest_wait = max(self.longest_wait, self.waited)
            self.waited = 0

    def stepped(self, step: Step) -> None:
        if step.error is None or step.listed.any() or (step.state.lists.counts > 0).any():
            return
        noop = tuple(self.world.spec.noop.tolist())
        number = step.state.number
        self.wrong(
            f"state {number}: no row has a list, and the environment refuses the no-op {noop}: "
            f"{in_words(step.error)}",
            number,
            SOMEONE,
        )

    def end(self) -> None:
        if not self.shows_next:
            self.symptoms = [s for s in self.symptoms if s not in self.at_an_end]
        if self.waited > max(EMPTY_STEPS, 2 * self.longest_wait):
            self.wrong(
                f"from state {self.waits_since} on no row has had a list, for {self.waited} "
                f"steps; {SAY_WHO_WAITS}",
                self.waits_since,
                SOMEONE,
            )
        elif self.longest_wait > EMPTY_STEPS:
            self.skip(
                f"no row had a list for up to {self.longest_wait} steps, and then one had again; "
                "needs to_move(row) on the environment to see whether somebody was to move",
                SOMEONE,
            )
