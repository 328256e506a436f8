"""Audit of an environment: plays random legal actions and checks each list that it shows."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.meaning import spec_of
from tcg_flatpolicy.spec import ActionSpec, IntArray
from tcg_flatpolicy.verify.adapters import (
    Adapter,
    BoolArray,
    Engine,
    HeadMasks,
    LegalCallable,
    Lists,
    Reader,
    Shown,
    WorkerDied,
    adapt,
    illegal_count,
    reader_for,
)
from tcg_flatpolicy.verify.findings import Report
from tcg_flatpolicy.wrapping import env_attribute

REPLAYED_STEPS = 500
"""Most steps that are played again to compare lists."""
ASKED_ROWS, ASKED_TUPLES = 16, 32
"""How many rows of a state the engine is asked about; listed tuples, and others, of each row."""
FORKED_EVERY, FORKED_TUPLES, FORKED_DRAWS = 4, 6, 8
"""Where there is only fork(): in each how many steps it is used, for how many listed tuples and
others, and how often the actions of the other rows are drawn, until a fork takes them."""
EMPTY_STEPS = 3
"""More steps in a row than this in which nobody has a list are a finding, or a wait."""
EMPTY_ASKED = 50
"""Of how many empty lists the engine is asked what is legal there."""
PROBE_SECONDS = 10.0
"""How long a copy of this process may take over one step."""

WOULD_NOT_SHOW = "a refusal might not show"
SAY_WHO_WAITS = "if nobody is to move then, say so with to_move(row) on the environment"

SPEC_CHECK = "tuples within the spec"
REPEATS = "no tuple twice"
COUNT = "the count fits the list"
ROOM = "the list fits its padding"
SOMEONE = "somebody has a list"
MOVER = "who is to move has a list"
WAITER = "who waits has no list"
TAKEN = "the step takes listed actions"
LISTED_LEGAL = "the engine says that listed actions are legal"
UNLISTED = "the engine refuses what is not listed"
MASKS = "masks per head are the list's projection"
FILLED = "no mask per head is empty"
SEED = "the same seed, the same lists"
FLOATS = "the same actions as floats, the same lists"

CHECKS = (
    *(SPEC_CHECK, REPEATS, COUNT, ROOM, SOMEONE, MOVER, WAITER),
    *(TAKEN, LISTED_LEGAL, UNLISTED, MASKS, FILLED, SEED, FLOATS),
)
"""The names of all checks, in order."""


def audit_env(
    env: Any,
    steps: int = 2000,
    seed: int = 0,
    *,
    spec: ActionSpec | None = None,
    layout: LegalLayout | Sequence[str] | None = None,
    legal_actions: LegalCallable | None = None,
    head_masks: HeadMasks | None = None,
    make: Callable[[], Any] | None = None,
) -> Report:
    """Plays uniformly random legal actions and checks every list that is shown.

    A row with an empty list plays the no-op. What the environment may offer for more checks is in
    `tcg_flatpolicy.verify.adapters`; a check that cannot run is skipped and says what would enable
    it. An exception inside a step is a finding where a listed action was sent; the environment is
    then reset and the audit goes on. Where one fault explains another (an action is missing because
    the list is that of another state), only the first is reported.

    At the very end one step is sent with actions that are not listed, to see whether a refusal
    would have shown: where the system has fork(), in a copy of this process first, since an engine
    may end it. Workers of a Multiprocessing environment get such a step only if ``make`` is given.

    Args:
        env: a native PufferEnv, one under PufferLib's emulation, a Serial or Multiprocessing vector
            environment, a gymnasium.Env, or a PettingZoo ParallelEnv or AECEnv. It is reset, played
            and left somewhere in a game.
        steps: how many states to look at. A state is one row at one time, so an environment of 256
            rows shows 256 in each step; rows whose episode is over do not count.
        seed: of the environment and of the actions; the audit has a generator of its own.
        spec: what tuples mean; the layout's, or the environment's ``action_spec``, if left out.
        layout: where the list is; the environment's ``legal_layout`` if left out. For Dict
            observations, the keys of the count and of the padded (K, 1 + slots) list. Room behind
            the count must hold zeros, or what it held in one of the last three states that the row
            showed.
        legal_actions: instead of a layout, ``legal_actions(observation, info)`` gives one agent's
            tuples; the info of a vector environment is empty.
        head_masks: to compare with the list's projection, as `LegalActions.head_masks` makes it:
            ``head_masks(observation, info)`` gives one agent's bool arrays, one for each of the
            1 + slots values, or names of fields with them. The environment's ``head_masks`` if
            left out.
        make: makes a fresh environment of the same kind, for the checks that play the same actions
            again; if left out they reset this one.

    Returns:
        What was looked at, found and skipped. Figures: states, steps of the environment, seconds,
        legal tuples a state (mean, most), the share of rows without one, and states a second, of
        the whole audit and of random play without checks.

    Raises:
        KeyError: a layout's key that the observation does not have; those that it has are named.
        TypeError: no environment of these kinds, nothing to read lists with, or an optional method
            (`tcg_flatpolicy.verify.adapters`) that takes other arguments.
        ValueError: steps below 1, no spec, or a layout that does not fit it.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    spec = spec_of(env, spec=spec, layout=layout if isinstance(layout, LegalLayout) else None)
    if spec is None:
        raise ValueError(
            f"{type(env).__name__} has no action_spec, and its layout no spec; pass spec="
        )
    if head_masks is None:
        head_masks = env_attribute(env, "head_masks")

    def new_reader(of: Any) -> Reader:
        return reader_for(of, spec, layout, legal_actions)

    audit = _Audit(adapt(env), new_reader, spec, seed, head_masks)
    started = time.perf_counter()
    audit.play(steps)
    audit.replay(make)
    audit.conclude()
    audit.figures(time.perf_counter() - started)
    audit.probe(make)
    return audit.report


@dataclass
class _Refusal:
    """Listed tuples that the engine refused."""

    check: str
    message: str
    state: int
    tuples: list[tuple[int, ...]]
    """() where the environment does not say which."""
    unchanged: bool
    """Whether the row's list is the one that it showed last."""
    fresh: bool
    """Whether nothing had been played yet."""
    others_legal: bool = False
    """Whether tuples that are not listed are legal in the same state."""
    sent: list[int] = field(default_factory=list)
    """Where the environment does not say which: the primaries of all listed tuples sent."""
    illegal: int = 1
    """How many of them were refused."""


@dataclass
class _Empty:
    """A list that is empty where there should be one."""

    check: str
    message: str
    state: int
    ended: bool = False
    """Whether the row's episode has just ended, so that this may be its last state."""
    legal: set[int] = field(default_factory=set)
    """Primaries of tuples that the engine says are legal there."""


@dataclass
class _Doubled:
    """A tuple of zeros at the end of a list that has one already."""

    message: str
    state: int
    adjacent: bool
    """Whether nothing stands between the two."""


@dataclass
class _Outside:
    """Tuples of a primary that are not within the spec."""

    message: str
    state: int
    count: int = 0


@dataclass
class _Missing:
    """Legal tuples that are not listed."""

    message: str
    state: int
    tuples: list[tuple[int, ...]]
    unchanged: bool
    """Whether the row's list is the one that it showed last."""


class _Audit:
    def __init__(
        self,
        adapter: Adapter,
        new_reader: Callable[[Any], Reader],
        spec: ActionSpec,
        seed: int,
        head_masks: HeadMasks | None,
    ) -> None:
        self.adapter = adapter
        self.engine = Engine(adapter)
        self.new_reader = new_reader
        self.reader = new_reader(adapter.env)
        self.spec = spec
        self.seed = seed
        self.masks = head_masks
        self.rng = np.random.default_rng(seed)
        self.report = Report(f"environment {type(adapter.env).__name__}")

        self.state = 0
        self.states = self.tuples = self.most = self.empty = self.steps = 0
        self.turns: BoolArray | None = None
        """Who is to move in the state looked at."""
        self.waited = self.longest_wait = 0
        """Steps in a row in which nobody has had a list: up to now, and at most until one came."""
        self.waits_since = 0
        self.reset_number = 0
        self.died = False

        # What the replays compare with: the run up to its first reset.
        self.sent: list[IntArray] = []
        self.shown_digests: list[npt.NDArray[np.uint64]] = []
        self.recording = True

        rows = len(adapter)
        self.last_list = np.zeros(rows, dtype=np.uint64)
        """Digest of the list that each row showed last, of those that were not empty."""
        self.refusals: list[_Refusal] = []
        self.missing: list[_Missing] = []
        self.forks_asked = self.forks_tell = False
        """Whether forks were tried, and whether any has refused an action."""
        self.empties: list[_Empty] = []
        self.ended = np.zeros(rows, dtype=bool)
        """Rows whose episode ended in the step before."""
        self.shows_next = False
        """Whether a step that ends an episode shows the next one's first state."""
        self.doubled: list[_Doubled] = []
        self.other_ends = False
        """Whether lists end in something other than zeros."""
        self.count_too_small = self.count_too_large = False
        self.mender = _SlotMender(spec)
        self.outside: dict[int, _Outside] = {}
        """By primary."""
        self.lengths: dict[int, int] = {}
        self.all_listed: set[tuple[int, ...]] = set()
        self.full: list[tuple[int, str]] = []
        self.swaps: dict[int, set[tuple[int, ...]]] = {}
        self.swap_evidence: dict[int, set[tuple[int, ...]]] = {}
        self._skip_what_cannot_run()

    def _skip_what_cannot_run(self) -> None:
        report, engine = self.report, self.engine
        for check in CHECKS:
            report.looked(check, 0)  # so that they are reported in this order
        if not self.reader.has_count:
            for check in (COUNT, ROOM):
                report.skip(check, "needs a padded list with its count: a layout")
        if self.masks is None:
            for check in (MASKS, FILLED):
                report.skip(check, "needs head_masks, a callable or the names of fields")
        knows_turns = engine.knows_who_moves or hasattr(self.adapter.env, "agent_iter")
        if not knows_turns:
            if not self.adapter.single_agent:
                report.skip(MOVER, "needs to_move(row) on the environment")
                report.skip(WAITER, "needs to_move(row) on the environment")
            else:
                report.skip(WAITER, "needs a second player; here one agent always acts")
        if not engine.knows_legality and not engine.forks:
            for check in (LISTED_LEGAL, UNLISTED):
                report.skip(check, "needs is_legal(row, action) or fork() on the environment")

    # Playing.

    def play(self, steps: int) -> None:
        """Looks at so many states."""
        shown = self.adapter.reset(self.seed)
        while True:
            lists, refused = self._look(shown)
            if self.states >= steps:
                break
            actions, listed = self._draw(lists, shown.live, self.turns)
            before = self.engine.illegal_actions()
            if self.recording:
                self.sent.append(actions)
            try:
                after = self.adapter.step(actions)
            except Exception as error:
                self._raised(error, actions, listed, lists, refused, shown.fresh)
                if isinstance(error, WorkerDied):
                    self.died = True
                    break
                if self.recording:
                    self.sent.pop()
                    self.recording = False
                self.reset_number += 1
                # It forgets what lists held: the step may have written into them.
                self.reader = self.new_reader(self.adapter.env)
                shown = self.adapter.reset(self.seed + self.reset_number)
            else:
                count = self.engine.illegal_actions() - before
                if not self.engine.counts_illegal:
                    count = after.illegal
                self._took(count, actions, listed, lists, refused, shown.fresh)
                shown = after
            self.last_list = np.where(lists.counts > 0, lists.digests, self.last_list)
            self.steps += 1
            self.state += 1
            if self.recording and len(self.sent) >= REPLAYED_STEPS:
                self.recording = False

    def _draw(
        self, lists: Lists, live: BoolArray, turns: BoolArray | None
    ) -> tuple[IntArray, BoolArray]:
        """Uniformly random actions (B, 1 + slots), and whether each is a listed one."""
        fits = self._fits(lists.actions)
        if turns is not None:
            fits &= turns[lists.rows]
        counts = np.bincount(lists.rows[fits], minlength=len(lists.counts))
        starts = np.cumsum(counts) - counts
        listed = (counts > 0) & live
        at = (starts + (self.rng.random(len(counts)) * counts).astype(np.int64))[listed]
        actions = np.tile(self.spec.noop, (len(counts), 1))
        actions[listed] = lists.actions[fits][at]
        return actions, listed

    def _fits(self, actions: IntArray) -> BoolArray:
        """(N,) bool: whether each tuple is within the spec."""
        limits = self.spec.limits
        known = (actions[:, 0] >= 0) & (actions[:, 0] < len(limits))
        allowed = limits[np.where(known, actions[:, 0], 0)]
        fits: BoolArray = known & ((actions >= 0) & (actions < allowed)).all(axis=1)
        return fits

    def _to_move(self, live: BoolArray) -> BoolArray | None:
        if self.engine.knows_who_moves:
            return self.engine.to_move(live)
        return self.adapter.selected()

    def _raised(
        self,
        error: Exception,
        actions: IntArray,
        listed: BoolArray,
        lists: Lists,
        refused: dict[int, set[tuple[int, ...]]],
        fresh: bool,
    ) -> None:
        words = _in_words(error)
        rows = np.flatnonzero(listed)
        self.report.looked(TAKEN, len(rows))
        if self._refused_as_said(f"step raises {words}", rows, actions, lists, refused, fresh):
            return
        if not len(rows):
            if (lists.counts > 0).any() and (self.outside or not self.report.ok):
                return  # nothing that is listed is within the spec
            if self.died or isinstance(error, WorkerDied):
                raise error
            self.empties.append(
                _Empty(
                    SOMEONE,
                    f"state {self.state}: no row has a list, and the environment refuses the no-op "
                    f"{tuple(self.spec.noop.tolist())}: {words}",
                    self.state,
                )
            )
            return
        if len(rows) == 1:
            row = int(rows[0])
            said = f"{self._where(row)}: {self._words(actions[row])} is listed, and step raises"
        else:
            said = (
                f"state {self.state}: step raises at listed actions of {len(rows)} rows "
                "(is_legal(row, action) on the environment would tell which)"
            )
        said += f" {words}; the fault may as well be in step itself as in the list"
        self._refused_in_step(said, rows, actions, lists, fresh)

    def _took(
        self,
        illegal: int,
        actions: IntArray,
        listed: BoolArray,
        lists: Lists,
        refused: dict[int, set[tuple[int, ...]]],
        fresh: bool,
    ) -> None:
        rows = np.flatnonzero(listed)
        self.report.looked(TAKEN, len(rows))
        if illegal <= 0 or not len(rows):
            return
        illegal -= self._refused_as_said(
            f"the environment counts {illegal} illegal actions",
            rows,
            actions,
            lists,
            refused,
            fresh,
        )
        illegal -= self._noops_that_count(lists, listed)
        if illegal <= 0:
            return
        if len(rows) == 1:
            said = f"{self._where(int(rows[0]))}: {self._words(actions[rows[0]])} is listed, and"
        else:
            said = f"state {self.state}: of the listed actions of {len(rows)} rows"
        self._refused_in_step(
            f"{said} the environment counts {illegal} as illegal",
            rows,
            actions,
            lists,
            fresh,
            illegal,
        )

    def _noops_that_count(self, lists: Lists, listed: BoolArray) -> int:
        """How many no-ops were sent for rows that should have had something else to play."""
        unplayable = (lists.counts > 0) & ~listed
        if self.turns is not None:
            unplayable &= self.turns
        if self.turns is None and self.empties:
            return int((unplayable | (lists.counts == 0)).sum())
        return int(unplayable.sum()) + self._idle_movers

    def _refused_as_said(
        self,
        outcome: str,
        rows: npt.NDArray[np.intp],
        actions: IntArray,
        lists: Lists,
        refused: dict[int, set[tuple[int, ...]]],
        fresh: bool,
    ) -> int:
        """Notes the actions that were sent though the engine had said no; how many they were."""
        sent = 0
        unchanged = lists.digests == self.last_list
        for row in rows.tolist():
            action = tuple(actions[row].tolist())
            if action in refused.get(row, ()):
                sent += 1
                message = f"{self._where(row)}: {self._words(action)} is listed, and {outcome}"
                self.refusals.append(
                    _Refusal(TAKEN, message, self.state, [action], bool(unchanged[row]), fresh)
                )
        return sent

    def _refused_in_step(
        self,
        message: str,
        rows: npt.NDArray[np.intp],
        actions: IntArray,
        lists: Lists,
        fresh: bool,
        illegal: int = 1,
    ) -> None:
        unchanged = bool((lists.digests[rows] == self.last_list[rows]).all())
        tuples = [tuple(actions[rows[0]].tolist())] if len(rows) == 1 else []
        sent = actions[rows, 0].tolist()
        self.refusals.append(
            _Refusal(TAKEN, message, self.state, tuples, unchanged, fresh, False, sent, illegal)
        )

    # Looking at one state.

    def _look(self, shown: Shown) -> tuple[Lists, dict[int, set[tuple[int, ...]]]]:
        """All checks of what is shown; the lists, and the refused tuples by row."""
        lists = self.reader.read(shown)
        live = int(shown.live.sum())
        self.states += live
        self.tuples += len(lists.actions)
        self.most = max(self.most, int(lists.counts.max(initial=0)))
        self.empty += int((shown.live & (lists.counts == 0)).sum())
        if self.recording:
            self.shown_digests.append(lists.digests)

        fits = self._fits(lists.actions)
        wrong = np.zeros(len(lists.counts), dtype=bool)
        """Rows whose list has a fault of its own; the engine is not asked about them."""
        self._check_spec(lists, fits, wrong)
        self._check_count(lists, shown.live, wrong)
        self._check_repeats(lists, fits, wrong)
        full = self._check_room(lists, shown.live, wrong)
        turns = self.turns = self._to_move(shown.live)
        self._check_turns(lists, shown, wrong)
        if self.masks is not None:
            self._check_masks(shown, lists, wrong, full)
        asked = shown.live & ~wrong & (lists.counts > 0)
        if turns is not None:
            asked &= turns
        refused: dict[int, set[tuple[int, ...]]] = {}
        if self.engine.knows_legality:
            refused = self._ask(lists, asked, full, shown.fresh)
        elif self.engine.forks and self.state % FORKED_EVERY == 0:
            self._fork(lists, asked, full, shown)
        return lists, refused

    def _check_spec(self, lists: Lists, fits: BoolArray, wrong: BoolArray) -> None:
        self.report.looked(SPEC_CHECK, len(fits))
        if fits.all() and not self.outside:
            return
        self.mender.see(lists.actions, fits)
        for n in np.flatnonzero(~fits).tolist():
            row, action = int(lists.rows[n]), tuple(lists.actions[n].tolist())
            message = (
                f"{self._where(row)}, place {int(lists.places[n])} of the list: {action}; "
                f"{self.spec.explain(action)}"
            )
            wrong[row] = True
            self.outside.setdefault(action[0], _Outside(message, self.state)).count += 1

    def _check_count(self, lists: Lists, live: BoolArray, wrong: BoolArray) -> None:
        if lists.room is None:
            return
        self.report.looked(COUNT, int(live.sum()))
        outside = lists.said != lists.counts
        for row in np.flatnonzero(outside).tolist():
            self.report.found(
                "E04",
                COUNT,
                f"{self._where(row)}: the count is {int(lists.said[row])}, the list has room for "
                f"0 to {lists.room}",
                self.state,
            )
        # A count that cannot be any larger is a matter of room.
        capped = np.zeros_like(outside)
        if lists.most_count is not None and lists.most_count < lists.room:
            capped = lists.said == lists.most_count
        behind = lists.behind & ~outside & ~capped
        for row in np.flatnonzero(behind).tolist():
            self.report.found(
                "E04",
                COUNT,
                f"{self._where(row)}: the count is {int(lists.said[row])}, but place "
                f"{int(lists.first_behind[row])} of the list (from 0) is not zeros either",
                self.state,
            )
            self.count_too_small = True
        wrong |= outside | behind

    def _check_repeats(self, lists: Lists, fits: BoolArray, wrong: BoolArray) -> None:
        self.report.looked(REPEATS, len(lists.actions))
        some = lists.counts > 0
        ends = lists.actions[(lists.starts + lists.counts - 1)[some]]
        self.other_ends |= bool(ends.any(axis=1).any())
        places = np.flatnonzero(fits)
        again = places[_repeats(lists.rows[fits], lists.actions[fits], self.spec.nvec)]
        for n in again.tolist():
            row, action, place = int(lists.rows[n]), lists.actions[n], int(lists.places[n])
            wrong[row] = True
            listed = lists.of(row)
            first = listed.index(tuple(action.tolist()))
            message = (
                f"{self._where(row)}: {self._words(action)} is listed in place {first} and again "
                f"in place {place}"
            )
            if lists.room is not None and not np.any(listed[place:]):
                adjacent = not np.any(listed[first:])
                self.doubled.append(_Doubled(message, self.state, adjacent))
            else:
                self.report.found("E03", REPEATS, message, self.state)

    def _check_room(self, lists: Lists, live: BoolArray, wrong: BoolArray) -> BoolArray:
        """(B,) bool: rows whose list is as long as it can be."""
        if lists.room is None:
            return np.zeros(len(lists.counts), dtype=bool)
        self.report.looked(ROOM, int(live.sum()))
        full: BoolArray = lists.counts == lists.room
        if lists.most_count is not None and lists.most_count < lists.room:
            capped = lists.said == lists.most_count
            for row in np.flatnonzero(capped & ~wrong).tolist():
                self.report.found(
                    "E05",
                    ROOM,
                    f"{self._where(row)}: the count is {lists.most_count}, the largest number "
                    f"that its field holds, and the list has room for {lists.room}",
                    self.state,
                )
            full |= capped
        for length, times in zip(*np.unique(lists.counts, return_counts=True), strict=True):
            self.lengths[int(length)] = self.lengths.get(int(length), 0) + int(times)
        if (full.any() or self.full) and len(self.all_listed) <= lists.room and not wrong.any():
            self.all_listed.update(map(tuple, np.unique(lists.actions, axis=0).tolist()))
        if full.any() and not self.full:
            row = int(full.argmax())
            self.full.append(
                (self.state, f"{self._where(row)}: {int(lists.counts[row])} tuples are listed")
            )
        return full

    def _check_turns(self, lists: Lists, shown: Shown, wrong: BoolArray) -> None:
        live, turns = shown.live, self.turns
        ended = np.zeros_like(live) if shown.ended is None else shown.ended
        # One that ends twice in a row has begun in between.
        self.shows_next |= bool((ended & (self.ended | (lists.counts > 0))).any())
        self.ended = ended
        empty = live & (lists.counts == 0) & ~wrong
        self._idle_movers = 0
        must = turns
        if must is None and self.adapter.single_agent:
            must = np.ones(len(live), dtype=bool)
        if must is None or (lists.counts[live] > 0).any():
            self.report.looked(SOMEONE)
        if must is None:
            self._wait(empty, live)
            return
        self.report.looked(MOVER, int((live & must).sum()))
        movers = np.flatnonzero(empty & must)
        self._idle_movers = len(movers)
        for row in movers.tolist():
            message = (
                f"{self._where(row)} is to move, and its list is empty (count "
                f"{int(lists.said[row])})"
            )
            if turns is None:
                message += f"; {SAY_WHO_WAITS}"
            known = _Empty(MOVER, message, self.state, bool(ended[row]))
            if self.engine.knows_legality and len(self.empties) < EMPTY_ASKED:
                candidates = self._candidates([])
                known.legal = {a[0] for a in candidates if self.engine.is_legal(row, a)}
            self.empties.append(known)
        if turns is None:
            return
        waiting = live & ~turns
        self.report.looked(WAITER, int(waiting.sum()))
        for row in np.flatnonzero(waiting & (lists.counts > 0)).tolist():
            self.report.found(
                "E10",
                WAITER,
                f"{self._where(row)} is not to move, and {int(lists.counts[row])} tuples are "
                f"listed for it, first {self._words(lists.of(row)[0])}",
                self.state,
            )

    def _wait(self, empty: BoolArray, live: BoolArray) -> None:
        """Counts the steps in a row in which no row has a list."""
        if not live.any():
            return
        if empty[live].all():
            if not self.waited:
                self.waits_since = self.state
            self.waited += 1
        else:
            self.longest_wait = max(self.longest_wait, self.waited)
            self.waited = 0

    def _check_masks(self, shown: Shown, lists: Lists, wrong: BoolArray, full: BoolArray) -> None:
        assert self.masks is not None
        heads = self.reader.head_masks(shown, self.masks)
        width = lists.actions.shape[1]
        if len(heads) != width and shown.live.any():
            raise ValueError(
                f"head_masks gives {len(heads)} masks, the spec's tuples have {width} values"
            )
        rows = (lists.counts > 0) & ~wrong
        self.report.looked(MASKS, int(rows.sum()) * width)
        self.report.looked(FILLED, int(rows.sum()) * width)
        for slot, mask in enumerate(heads):
            size = max(mask.shape[1], int(self.spec.nvec[slot]))
            given = np.zeros((len(mask), size), dtype=bool)
            given[:, : mask.shape[1]] = mask
            listed = np.zeros_like(given)
            of_rows = rows[lists.rows]
            listed[lists.rows[of_rows], lists.actions[of_rows, slot]] = True
            blank = rows & ~given.any(axis=1)
            for row in np.flatnonzero(blank).tolist():
                self.report.found(
                    "E12",
                    FILLED,
                    f"{self._where(row)}: the mask of value {slot} of the tuple is empty, and "
                    f"{int(lists.counts[row])} tuples are listed",
                    self.state,
                )
            differs = (given != listed) & (rows & ~blank)[:, None]
            for row in np.flatnonzero(differs.any(axis=1)).tolist():
                self._mask_differs(row, slot, given[row], listed[row], lists, full)

    def _mask_differs(
        self,
        row: int,
        slot: int,
        given: BoolArray,
        listed: BoolArray,
        lists: Lists,
        full: BoolArray,
    ) -> None:
        value = int((given != listed).argmax())
        more = np.flatnonzero(given & ~listed)
        if listed[value]:
            words = f"{value} is masked out as value {slot} of the tuple, and a listed tuple has it"
        else:
            words = (
                f"{value} is let through as value {slot} of the tuple, and no listed tuple has it"
            )
        code, check = "E11", MASKS
        if not (listed & ~given).any():
            # The mask knows of more than the list: the list may be too short.
            if full[row]:
                code, check = "E05", ROOM
                words += f"; the list is as long as it can be, {int(lists.counts[row])}"
            elif lists.following[row].any() and (more == lists.following[row, slot]).all():
                code, check = "E04", COUNT
                words += "; the tuple that follows the counted ones has it"
                self.count_too_small = True
        self.report.found(code, check, f"{self._where(row)}: {words}", self.state)

    # What the engine says.

    def _ask(
        self, lists: Lists, asked: BoolArray, full: BoolArray, fresh: bool
    ) -> dict[int, set[tuple[int, ...]]]:
        """Asks is_legal about tuples of some rows; the listed ones that it refuses, by row."""
        refused: dict[int, set[tuple[int, ...]]] = {}
        for row in self._some(asked, ASKED_ROWS):
            takes = partial(self.engine.is_legal, row)
            answer = "the engine says that it is not legal"
            said_no = self._ask_about(row, lists, full, fresh, takes, answer, ASKED_TUPLES)
            if said_no:
                refused[row] = set(said_no)
        return refused

    def _fork(self, lists: Lists, asked: BoolArray, full: BoolArray, shown: Shown) -> None:
        """As `_ask`, by playing tuples of one row in copies of the environment."""
        for row in self._some(asked, 1):
            for _ in range(FORKED_DRAWS):
                actions = self._draw(lists, shown.live, self.turns)[0]
                if not self.engine.refuses(actions, row):
                    break
            else:
                return  # the steps will say so

            def takes(action: tuple[int, ...], row: int = row, base: IntArray = actions) -> bool:
                return not self.engine.refuses(_with(base, row, action), row)

            self.forks_asked = True
            if not self.forks_tell:
                listed = lists.of(row)
                tried = self._some_of(self._candidates(listed)) + self._some_of(listed)
                self.forks_tell = not all(map(takes, tried))
            if self.forks_tell:
                answer = "a fork of the environment refuses it"
                self._ask_about(row, lists, full, shown.fresh, takes, answer, FORKED_TUPLES)

    def _ask_about(
        self,
        row: int,
        lists: Lists,
        full: BoolArray,
        fresh: bool,
        takes: Callable[[tuple[int, ...]], bool],
        answer: str,
        most: int,
    ) -> list[tuple[int, ...]]:
        """Asks about at most so many listed tuples of a row, and about others; the refused ones."""
        listed = lists.of(row)
        following = tuple(lists.following[row].tolist())
        known = any(following) and self.spec.explain(following) is None and following not in listed
        for size in dict.fromkeys([most, ASKED_TUPLES]):  # more of them where something is wrong
            looked_at = self._some_of(listed, size)
            candidates = self._some_of(self._candidates(listed), size)
            if known:
                candidates = list(dict.fromkeys([following, *candidates]))
            said_no = [action for action in looked_at if not takes(action)]
            others = [action for action in candidates if takes(action)]
            if not said_no and not others:
                break
        self.report.looked(LISTED_LEGAL, len(looked_at))
        self.report.looked(UNLISTED, len(candidates))
        if said_no:
            if lists.room is not None and said_no == [listed[-1]] and not any(said_no[0]):
                self.report.found(
                    "E04",
                    COUNT,
                    f"{self._where(row)}: the last of the {len(listed)} counted tuples is "
                    f"{said_no[0]}, which is not legal: padding is counted",
                    self.state,
                )
                self.count_too_large = True
                return said_no
            self._try_swaps(listed, said_no, takes, most)
            self.refusals.append(
                _Refusal(
                    LISTED_LEGAL,
                    f"{self._where(row)}: {self._words(said_no[0])} is listed, and {answer}, as "
                    f"{len(said_no)} of {len(looked_at)}",
                    self.state,
                    said_no,
                    bool(lists.digests[row] == self.last_list[row]),
                    fresh,
                    bool(others),
                )
            )
        if any(following) and following in others:
            self.report.found(
                "E04",
                COUNT,
                f"{self._where(row)}: the count is {len(listed)}, and what follows, "
                f"{self._words(following)}, is legal: the count is too small",
                self.state,
            )
            self.count_too_small = True
        elif others:
            self._missed(row, others, lists, bool(full[row]))
        return said_no

    def _missed(self, row: int, others: list[tuple[int, ...]], lists: Lists, full: bool) -> None:
        words = (
            f"{self._where(row)}: {self._words(others[0])} is legal, and is not among the "
            f"{int(lists.counts[row])} listed tuples"
        )
        if full:
            self.report.found("E05", ROOM, f"{words}, which fill the list", self.state)
        else:
            unchanged = bool(lists.digests[row] == self.last_list[row])
            self.missing.append(_Missing(words, self.state, others, unchanged))

    def _candidates(self, listed: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Tuples of the spec that are not listed: random ones, and ones next to listed ones."""
        limits, ids = self.spec.limits, np.array(list(self.spec.primaries))
        half = ASKED_TUPLES // 2
        drawn = limits[ids[self.rng.integers(0, len(ids), half)]]
        values = (self.rng.random(drawn.shape) * drawn).astype(np.int64)
        values[:, 0] = drawn[:, 0] - 1
        if listed:  # next to a listed one: the same but for one slot
            near = np.array(listed)[self.rng.integers(0, len(listed), half)]
            if self.spec.slots:
                at = np.arange(half), self.rng.integers(1, near.shape[1], half)
                change = self.rng.random(near.shape) * limits[near[:, 0]]
                near[at] = change.astype(np.int64)[at]
            values = np.concatenate([values, near])
        noop = tuple(self.spec.noop.tolist())
        found = dict.fromkeys(map(tuple, values.tolist()))
        if self.spec.explain(noop) is None:
            found[noop] = None
        known = set(listed)
        return [action for action in found if action not in known]

    def _try_swaps(
        self,
        listed: list[tuple[int, ...]],
        refused: list[tuple[int, ...]],
        takes: Callable[[tuple[int, ...]], bool],
        most: int,
    ) -> None:
        """Keeps the orders of slots in which all listed tuples of a refused primary are legal."""
        for primary in {action[0] for action in refused}:
            used = len(self.spec.primaries[primary].slots)
            orders = self.swaps.setdefault(primary, set(_orders(used)))
            evidence = self.swap_evidence.setdefault(primary, set())
            evidence.update(action for action in refused if action[0] == primary)
            mine = [action for action in listed if action[0] == primary][:most]
            for order in list(orders):
                turned = [_reordered(action, order) for action in mine]
                if any(self.spec.explain(a) is not None or not takes(a) for a in turned):
                    orders.discard(order)

    def _some(self, which: BoolArray, most: int) -> list[int]:
        rows = np.flatnonzero(which)
        if len(rows) > most:
            rows = self.rng.choice(rows, most, replace=False)
        return [int(row) for row in rows]

    def _some_of(
        self, actions: list[tuple[int, ...]], most: int = FORKED_TUPLES
    ) -> list[tuple[int, ...]]:
        if len(actions) <= most:
            return actions
        return [actions[i] for i in self.rng.choice(len(actions), most, replace=False).tolist()]

    # Playing again.

    def replay(self, make: Callable[[], Any] | None) -> None:
        """Plays the recorded actions again, as they were and as float32.

        The floats are whole numbers, as a trainer stores them: exact, so that an engine may
        truncate them.
        """
        if self.died:
            for check in (SEED, FLOATS):
                self.report.skip(check, "needs an environment whose workers are alive")
            return
        same = self._replay_once(SEED, "E13", make, np.int64)
        if same:
            self._replay_once(FLOATS, "E14", make, np.float32)
        else:
            self.report.skip(FLOATS, "needs the same lists for the same seed, see E13")

    def _replay_once(
        self, check: str, code: str, make: Callable[[], Any] | None, dtype: Any
    ) -> bool:
        """Compares with the recorded lists; whether they are the same."""
        env = self.adapter.env if make is None else make()
        adapter = self.adapter if make is None else adapt(env)
        reader = self.new_reader(env)
        try:
            shown = adapter.reset(self.seed)
            for number, digests in enumerate(self.shown_digests):
                lists = reader.read(shown)
                self.report.looked(check, int(shown.live.sum()))
                differs = lists.digests != digests
                if differs.any():
                    row = int(differs.argmax())
                    how = "in a new environment" if make else "after reset(seed)"
                    shows = f"{int(lists.counts[row])} tuples"
                    if lists.counts[row]:
                        shows += f", first {self._words(np.array(lists.of(row)[0]))}"
                    self.report.found(
                        code,
                        check,
                        f"{self.adapter.name(row)}, state {number}: the same seed and actions"
                        f"{' as float32' if dtype == np.float32 else ''} {how} give another list: "
                        f"{shows}",
                        number,
                        int(differs.sum()),
                    )
                    return False
                if number == len(self.sent):
                    break
                try:
                    shown = adapter.step(self.sent[number].astype(dtype))
                except Exception as error:
                    if dtype == np.float32 and self._refuses_floats(adapter, reader, error, number):
                        said = " ".join(str(error).split())  # some exceptions have several lines
                        self.report.skip(FLOATS, f"the environment refuses floats: {said}")
                        return True  # and nothing is played wrongly
                    self.report.found(
                        code,
                        check,
                        f"state {number}: the same seed and actions"
                        f"{' as float32' if dtype == np.float32 else ''} raise now, and did not "
                        f"before: {_in_words(error)}",
                        number,
                    )
                    return False
        finally:
            if make is not None:
                adapter.close()
        return True

    def _refuses_floats(
        self, adapter: Adapter, reader: Reader, error: Exception, number: int
    ) -> bool:
        """Whether an exception at floats means that they are refused, whatever they are."""
        refusals = "only integers", "action space"  # NumPy's of indices, and PufferLib's
        if isinstance(error, TypeError) or any(words in str(error) for words in refusals):
            return True
        if number:
            return False
        # Zeros survive any rounding: an environment that takes them has refused a wrong number.
        lists = reader.read(adapter.reset(self.seed))
        actions = np.tile(self.spec.noop, (len(lists.counts), 1))
        for row in np.flatnonzero(lists.counts).tolist():
            actions[row] = min(lists.of(row), key=sum)
        try:
            adapter.step(actions.astype(np.float32))
        except Exception:
            return True
        return False

    # Conclusions that need the whole run.

    def conclude(self) -> None:
        """Turns what was collected into findings, each fault under one code."""
        self._conclude_outside()
        self._conclude_doubled()
        self._conclude_forks()
        self._conclude_room()
        self._conclude_refusals()
        self._conclude_waits()
        self._conclude_empties()

    def _conclude_refusals(self) -> None:
        swapped = self._swapped()
        faulty = {**dict.fromkeys(self.outside, "E01"), **dict.fromkeys(swapped, "E02")}
        """Primaries of which all tuples are doubtful, and the code that says why."""
        if swapped:  # where it could not be tried, it is taken for the same fault
            for number, primary in self.spec.primaries.items():
                if len(primary.slots) > 1 and number not in self.swaps:
                    faulty.setdefault(number, "E02")
        rest = []
        for refusal in self.refusals:
            primaries = {action[0] for action in refusal.tuples}
            blamed = primaries & faulty.keys()
            explained = bool(primaries) and primaries == blamed
            if not primaries:
                blamed = set(refusal.sent) & faulty.keys()
                explained = sum(primary in faulty for primary in refusal.sent) >= refusal.illegal
            if not explained:
                rest.append(refusal)
                continue
            number = min(blamed, key=lambda number: (number not in swapped, number))
            message = refusal.message
            if number in swapped:
                message += (
                    f"; with the slots of {self.spec.primaries[number].name} in the order "
                    f"{_order_in_words(swapped[number])} all are"
                )
            self.report.found(faulty[number], refusal.check, message, refusal.state)
        # What the environment does not name is taken for more of the same, where there is some.
        judged = [refusal for refusal in rest if refusal.tuples] or rest
        stale = (
            bool(judged)
            and not any(refusal.fresh for refusal in judged)
            and (
                all(refusal.unchanged for refusal in judged)
                or any(refusal.others_legal for refusal in judged)
                or (bool(self.missing) and all(missing.unchanged for missing in self.missing))
            )
        )
        for refusal in rest:
            why = ""
            if stale:
                why = (
                    "; the row still shows the list that it showed last"
                    if refusal.unchanged
                    else "; it seems to be the list of an earlier state"
                )
            code = "E07" if stale else "E06"
            self.report.found(code, refusal.check, refusal.message + why, refusal.state)
        if stale:
            return  # what is missing from a list of another state is no fault of its own
        for missing in self.missing:
            if not {action[0] for action in missing.tuples} <= faulty.keys():
                self.report.found("E08", UNLISTED, missing.message, missing.state)

    def _swapped(self) -> dict[int, tuple[int, ...]]:
        """By primary, the order of slots in which its listed tuples are legal."""
        swapped = {}
        for primary in self.outside:
            order = self.mender.order(primary)
            if order is not None and self.swaps.get(primary, {order}):
                swapped[primary] = order
        enough = any(self.swaps[p] and len(seen) >= 3 for p, seen in self.swap_evidence.items())
        if swapped or enough:  # then less is enough of the other primaries
            for primary, orders in self.swaps.items():
                if orders:
                    swapped.setdefault(primary, min(orders))
        return swapped

    def _conclude_doubled(self) -> None:
        """Whether a tuple of zeros at the end is listed twice, or is padding."""
        # Padding that is counted ends every list; a no-op that is appended once more could as well.
        always = not self.other_ends
        padding = self.count_too_large or (
            always and not all(doubled.adjacent for doubled in self.doubled)
        )
        for doubled in self.doubled:
            if padding:
                words = f"{doubled.message}, the last: padding is counted, or the no-op twice"
                self.report.found("E04", COUNT, words, doubled.state)
            else:
                words = doubled.message
                if always:
                    words += "; so are all lists, so the count may be one too large instead"
                self.report.found("E03", REPEATS, words, doubled.state)

    def _conclude_waits(self) -> None:
        """Whether lists stopped coming, or nobody was to move for a while."""
        if self.waited > max(EMPTY_STEPS, 2 * self.longest_wait):
            self.empties.append(
                _Empty(
                    SOMEONE,
                    f"from state {self.waits_since} on no row has had a list, for {self.waited} "
                    f"steps; {SAY_WHO_WAITS}",
                    self.waits_since,
                )
            )
        elif self.longest_wait > EMPTY_STEPS:
            self.report.skip(
                SOMEONE,
                f"no row had a list for up to {self.longest_wait} steps, and then one had again; "
                "needs to_move(row) on the environment to see whether somebody was to move",
            )

    def _conclude_empties(self) -> None:
        """Empty lists, where neither the end of an episode nor another finding explains them."""
        asked = [empty.legal for empty in self.empties if empty.legal]
        unlisted = {action[0] for missing in self.missing for action in missing.tuples}
        missing = bool(asked) and all(legal <= unlisted for legal in asked)
        for empty in self.empties:
            if empty.ended and not self.shows_next:
                continue
            if missing and "E08" in self.report.findings:
                code = "E08"
            else:
                code = "E04" if self.count_too_small else "E09"
            self.report.found(code, empty.check, empty.message, empty.state)

    def _conclude_outside(self) -> None:
        for primary, outside in self.outside.items():
            order = self.mender.order(primary)
            code, message = "E01", outside.message
            if order is not None:
                code = "E02"
                message += (
                    f"; with the slots in the order {_order_in_words(order)} all listed tuples of "
                    f"{self.spec.primaries[primary].name} are within the spec"
                )
            self.report.found(code, SPEC_CHECK, message, outside.state, outside.count)

    def _conclude_forks(self) -> None:
        if self.forks_asked and not self.forks_tell:
            for check in (UNLISTED, LISTED_LEGAL):
                self.report.skip(
                    check,
                    "forks took every unlisted action, so that it cannot be seen whether the "
                    "engine refuses any; needs is_legal(row, action), illegal_actions or an "
                    "exception",
                )

    def _conclude_room(self) -> None:
        if not self.full or "E05" in self.report.findings:
            return
        if self.engine.knows_legality or self.forks_tell:
            return
        state, words = self.full[0]
        room = max(self.lengths)
        full = self.lengths[room]
        near = max(self.lengths.get(length, 0) for length in range(room - 3, room))
        if full >= 5 and full > 2 * near and len(self.lengths) > 2 and len(self.all_listed) > room:
            self.report.found(
                "E05",
                ROOM,
                f"{words}, as many as there is room for; {full} lists are that long, and at most "
                f"{near} are each a little shorter: longer ones are cut off",
                state,
                full,
            )
        else:
            self.report.skip(
                ROOM,
                f"{full} lists fill their padding of {room}; needs is_legal(row, action) on the "
                "environment, or more room, to see whether more was legal",
            )

    def figures(self, seconds: float) -> None:
        """Notes what was measured, and plays a while without checks to compare."""
        figures = self.report.figures
        figures["states"] = self.states
        figures["steps of the environment"] = self.steps
        figures["seconds"] = seconds
        figures["legal tuples a state, mean"] = self.tuples / max(self.states, 1)
        figures["legal tuples a state, most"] = self.most
        figures["share of states with an empty list"] = self.empty / max(self.states, 1)
        figures["states a second"] = self.states / seconds
        plain = 0.0 if self.died else self._random_play(min(max(seconds / 4, 0.05), 2.0))
        if plain:
            figures["states a second of random play"] = plain
            figures["share of random play's speed"] = figures["states a second"] / plain

    def _random_play(self, seconds: float) -> float:
        """States a second of random play: the list read, an action drawn, a step; 0 if it fails."""
        reader = self.new_reader(self.adapter.env)
        try:
            shown = self.adapter.reset(self.seed)
            states, started = 0, time.perf_counter()
            while time.perf_counter() - started < seconds:
                states += int(shown.live.sum())
                lists = reader.read(shown)
                at = lists.starts + (self.rng.random(len(lists.counts)) * lists.counts).astype(int)
                some = lists.counts > 0
                actions = np.tile(self.spec.noop, (len(some), 1))
                actions[some] = lists.actions[at[some]]
                shown = self.adapter.step(actions)
            return states / (time.perf_counter() - started)
        except Exception:
            # A broken environment: its findings say so, and there is no speed to compare with.
            return 0.0

    # What the environment does with what is not listed.

    def probe(self, make: Callable[[], Any] | None) -> None:
        """Sends unlisted actions: if nothing complains, a refused listed one would not show either.

        This comes last, since an engine may do anything then.
        """
        taken = self.report.checks[TAKEN]
        if self.died or taken.codes or not taken.cases:
            return
        if self.engine.knows_legality or self.forks_tell:
            return  # it has been seen what the engine refuses
        workers = hasattr(self.adapter.env, "processes")
        if workers and make is None:
            why = "an unlisted action might end a worker: needs make= or the Serial backend"
            self.report.skip(TAKEN, f"{WOULD_NOT_SHOW}; {why}")
            return
        adapter = self.adapter if make is None or not workers else adapt(make())
        try:
            why_not = self._probe(adapter, alone=not workers and hasattr(os, "fork"))
        finally:
            if adapter is not self.adapter:
                adapter.close()
        if why_not is not None:
            self.report.skip(TAKEN, f"{WOULD_NOT_SHOW}; {why_not}")

    def _probe(self, adapter: Adapter, alone: bool) -> str | None:
        """None if the environment complains of unlisted actions; otherwise what was seen.

        Args:
            adapter: of the environment.
            alone: whether to try the step in a copy of this process before.
        """
        try:
            played = self._to_unlisted(adapter)
        except Exception as error:
            return f"playing once more raises {_in_words(error)}"
        if played is None:
            return "in no state looked at was there a tuple that is not listed"
        listed, unlisted, row = played
        if alone:
            outcome = _in_a_copy(partial(adapter.step, unlisted))
            if outcome == "ended" and _in_a_copy(partial(adapter.step, listed)) == "survived":
                return None  # which nobody will overlook
            if outcome != "survived":
                return f"a copy of this process {outcome}, given an unlisted action"
        before = sum(illegal_count(part) for _, part in adapter.parts)
        try:
            after = adapter.step(unlisted)
        except Exception:
            return None
        if sum(illegal_count(part) for _, part in adapter.parts) > before or after.illegal:
            return None
        return (
            f"{self._words(unlisted[row])} was sent, which was not listed, and the environment "
            "said nothing: needs is_legal(row, action) on the environment, illegal_actions there "
            "or in the infos, or a step that raises"
        )

    def _to_unlisted(self, adapter: Adapter) -> tuple[IntArray, IntArray, int] | None:
        """Plays until some row could play a tuple that is not listed.

        Returns:
            Listed actions; the same with one that is not listed in each row where there is one; and
            the number of such a row. None if none came up.
        """
        reader = self.new_reader(adapter.env)
        noop = tuple(self.spec.noop.tolist())
        shown = adapter.reset(self.seed)
        for _ in range(REPLAYED_STEPS):
            lists = reader.read(shown)
            turns = self._to_move(shown.live) if adapter is self.adapter else adapter.selected()
            listed, some = self._draw(lists, shown.live, turns)
            unlisted, found = listed.copy(), None
            for row in np.flatnonzero(some).tolist():
                others = [a for a in self._candidates(lists.of(row)) if a != noop]
                if others:
                    unlisted[row], found = others[0], row
            if found is not None:
                return listed, unlisted, found
            shown = adapter.step(listed)
        return None

    def _where(self, row: int) -> str:
        return f"{self.adapter.name(row)}, state {self.state}"

    def _words(self, action: Sequence[int] | IntArray) -> str:
        values = [int(value) for value in action]
        if self.spec.explain(values) is not None:
            return str(tuple(values))
        return f"{tuple(values)} {self.spec.describe(values)}"


class _SlotMender:
    """Finds the order of slots in which all listed tuples of a primary are within the spec."""

    def __init__(self, spec: ActionSpec) -> None:
        self._spec = spec
        self._orders: dict[int, set[tuple[int, ...]]] = {}
        self._outside: dict[int, int] = {}

    def see(self, actions: IntArray, fits: BoolArray) -> None:
        """Takes tuples (N, 1 + slots) into account, and whether they fit as they are."""
        for primary in np.unique(actions[~fits, 0]).tolist():
            if primary in self._spec.primaries:
                self._orders.setdefault(primary, set(_orders(self._spec.slots)))
        for primary, orders in self._orders.items():
            of_primary = actions[:, 0] == primary
            mine = actions[of_primary]
            self._outside[primary] = self._outside.get(primary, 0) + int((~fits[of_primary]).sum())
            for order in list(orders):
                turned = mine[:, [0, *order]]
                if ((turned < 0) | (turned >= self._spec.limits[primary])).any():
                    orders.discard(order)

    def order(self, primary: int) -> tuple[int, ...] | None:
        """The order, from at least three tuples; None if there is none."""
        orders = self._orders.get(primary)
        return min(orders) if orders and self._outside[primary] >= 3 else None


def _orders(slots: int) -> list[tuple[int, ...]]:
    """All orders of slots 1 .. slots but the first; of many slots those that exchange two."""
    plain = tuple(range(1, slots + 1))
    if slots <= 4:
        return [order for order in permutations(plain) if order != plain]
    exchanged = []
    for i in range(slots):
        for j in range(i + 1, slots):
            order = list(plain)
            order[i], order[j] = order[j], order[i]
            exchanged.append(tuple(order))
    return exchanged


def _reordered(action: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    rest = action[1 + len(order) :]
    return (action[0], *(action[slot] for slot in order), *rest)


def _order_in_words(order: tuple[int, ...]) -> str:
    return ", ".join(f"sub{slot}" for slot in order)


def _in_words(error: Exception) -> str:
    """Type and message of an exception, and the line that raised it."""
    words = f"{type(error).__name__}: {' '.join(str(error).split())}"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, WorkerDied) or not frames:  # a worker's lines are not known here
        return words
    return f"{words} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def _in_a_copy(act: Callable[[], Any]) -> str:
    """Runs something in a copy of this process, which it may end.

    Returns:
        "survived" if the copy went on, with an exception or without; "ended", or "gave no answer".
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which may hang the copy
        child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what it says in dying is no error here
            with contextlib.suppress(Exception):
                act()
            os._exit(_SURVIVED)
        finally:
            os._exit(1)
    until = time.monotonic() + PROBE_SECONDS
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "survived" if os.waitstatus_to_exitcode(status) == _SURVIVED else "ended"
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"gave no answer in {PROBE_SECONDS:g} s"


_SURVIVED = 86
"""An exit status that no engine has."""


def _with(actions: IntArray, row: int, action: tuple[int, ...]) -> IntArray:
    changed = actions.copy()
    changed[row] = action
    return changed


def _repeats(rows: IntArray, actions: IntArray, nvec: IntArray) -> npt.NDArray[np.intp]:
    """Positions of tuples (N, H) within ``nvec`` that their row has listed before."""
    if not len(rows):
        return np.zeros(0, dtype=np.intp)
    keys: npt.NDArray[Any]
    if float(np.prod(nvec.astype(float))) * (int(rows[-1]) + 1) < 2**62:
        keys = rows.copy()
        for slot, size in enumerate(nvec.tolist()):
            keys = keys * size + actions[:, slot]
    else:
        keys = np.unique(np.column_stack([rows, actions]), axis=0, return_inverse=True)[1].ravel()
    if (keys[1:] > keys[:-1]).all():
        return np.zeros(0, dtype=np.intp)
    order = keys.argsort(kind="stable")
    again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
    return np.sort(order[again])
