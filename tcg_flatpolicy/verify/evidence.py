"""Plays random legal actions, asks the engine, and hands checks what is seen: states and steps."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tcg_flatpolicy.spec import ActionSpec, IntArray
from tcg_flatpolicy.verify.adapters import (
    Adapter,
    BoolArray,
    Engine,
    HeadMasks,
    Lists,
    Reader,
    Shown,
    WorkerDied,
    adapt,
)
from tcg_flatpolicy.verify.checks import Action

REPLAYED_STEPS = 500
"""Most steps that are played again to compare lists."""
RESET_STEPS = 50
"""In a new environment, steps that are played once more after a second reset(seed)."""
ASKED_ROWS, ASKED_TUPLES = 16, 32
"""How many rows of a state the engine is asked about; listed tuples, and others, of each row."""
FORKED_EVERY, FORKED_TUPLES, FORKED_DRAWS = 4, 6, 8
"""Where there is only fork(): in each how many steps it is used, for how many listed tuples and
others, and how often the actions of the other rows are drawn, until a fork takes them."""


@dataclass
class Answer:
    """What the engine says of one row's list."""

    row: int
    listed: list[Action]
    looked_at: list[Action]
    """Listed tuples that it was asked about."""
    refused: list[Action]
    """Those of them that it would not take."""
    others_asked: int
    missing: list[Action]
    """Tuples that are not listed, and that it would take."""
    takes: Callable[[Action], bool]
    how: str
    """How it refuses, in words."""


@dataclass
class Mask:
    """One head's mask, and what it should be.

    Attributes:
        slot: which value of a tuple it is for.
        given: (B, size) bool, as the environment has it.
        listed: (B, size) bool, the values of the listed tuples.
    """

    slot: int
    given: BoolArray
    listed: BoolArray


@dataclass
class State:
    """What all rows show at one time.

    Attributes:
        turns: (B,) bool, who is to move; None where that is not known.
        last: (B,) digests of the list that each row showed last, of those that were not empty.
        answers: what the engine says of some rows.
    """

    world: World
    number: int
    shown: Shown
    lists: Lists
    turns: BoolArray | None
    last: npt.NDArray[np.uint64]
    answers: list[Answer] = field(default_factory=list)

    @cached_property
    def fits(self) -> BoolArray:
        """(N,) bool: whether each tuple is within the spec."""
        return fits(self.world.spec, self.lists.actions)

    @cached_property
    def repeats(self) -> npt.NDArray[np.intp]:
        """Positions of tuples within the spec that their row has listed before."""
        lists, fits = self.lists, self.fits
        places = np.flatnonzero(fits)
        return places[_repeats(lists.rows[fits], lists.actions[fits], self.world.spec.nvec)]

    @cached_property
    def sound(self) -> BoolArray:
        """(B,) bool: rows whose list has no fault of its own."""
        lists = self.lists
        sound: BoolArray = lists.said == lists.counts
        sound[lists.rows[~self.fits]] = False
        sound[lists.rows[self.repeats]] = False
        return sound

    @cached_property
    def capped(self) -> BoolArray:
        """(B,) bool: rows whose count is the largest number that its field holds."""
        lists = self.lists
        if lists.room is None or lists.most_count is None or lists.most_count >= lists.room:
            return np.zeros(len(lists.counts), dtype=bool)
        return np.asarray(lists.said == lists.most_count)

    @cached_property
    def full(self) -> BoolArray:
        """(B,) bool: rows whose list is as long as it can be."""
        if self.lists.room is None:
            return np.zeros(len(self.lists.counts), dtype=bool)
        return np.asarray(self.capped | (self.lists.counts == self.lists.room))

    @cached_property
    def unchanged(self) -> BoolArray:
        """(B,) bool: rows that show the list that they showed last."""
        return np.asarray(self.lists.digests == self.last)

    @cached_property
    def masks(self) -> list[Mask]:
        """The masks per head, where the environment has some."""
        world, lists = self.world, self.lists
        if world.masks is None:
            return []
        heads = world.reader.head_masks(self.shown, world.masks)
        width = lists.actions.shape[1]
        if len(heads) != width and self.shown.live.any():
            raise ValueError(
                f"head_masks gives {len(heads)} masks, the spec's tuples have {width} values"
            )
        masks = []
        mine = self.masked[lists.rows]
        for slot, mask in enumerate(heads):
            size = max(mask.shape[1], int(world.spec.nvec[slot]))
            given = np.zeros((len(mask), size), dtype=bool)
            given[:, : mask.shape[1]] = mask
            listed = np.zeros_like(given)
            listed[lists.rows[mine], lists.actions[mine, slot]] = True
            masks.append(Mask(slot, given, listed))
        return masks

    @cached_property
    def masked(self) -> BoolArray:
        """(B,) bool: rows whose masks can be compared with their list."""
        return np.asarray((self.lists.counts > 0) & self.sound)

    def where(self, row: int) -> str:
        """A row of this state, in words."""
        return f"{self.world.adapter.name(row)}, state {self.number}"

    def refused(self, row: int) -> set[Action]:
        """Listed tuples of a row that the engine said it would not take."""
        return {action for a in self.answers if a.row == row for action in a.refused}


@dataclass
class Step:
    """What came of the actions that were sent in a state.

    Attributes:
        state: in which they were sent.
        actions: (B, 1 + slots).
        listed: (B,) bool: rows that sent a listed action; the others sent the no-op.
        error: what the step raised.
        illegal: how many illegal actions the environment counted.
    """

    state: State
    actions: IntArray
    listed: BoolArray
    error: Exception | None = None
    illegal: int = 0


@dataclass
class Replay:
    """What came of playing the same actions again.

    Attributes:
        cases: how many lists were compared.
        state, row, count: of the first lists that differ, and how many differ there; None if none.
        says: how they differ.
        refused: why the environment does not take actions of this dtype.
        reordered: how many lists hold the same tuples in another order.
    """

    cases: int = 0
    state: int | None = None
    row: int | None = None
    count: int = 1
    says: str = ""
    refused: str | None = None
    reordered: int = 0

    def where(self, world: World) -> str:
        """Where it differs and how, in words."""
        row = "" if self.row is None else f"{world.adapter.name(self.row)}, "
        return f"{row}state {self.state}: {self.says}"


class World:
    """An environment as it is played by an audit.

    Args:
        adapter: of the environment.
        new_reader: makes a reader for an environment of this kind.
        spec: what tuples mean.
        seed: of the environment and of the actions.
        masks: masks per head, where there are some.
        make: makes a fresh environment, to play again.
    """

    def __init__(
        self,
        adapter: Adapter,
        new_reader: Callable[[Any], Reader],
        spec: ActionSpec,
        seed: int,
        masks: HeadMasks | None,
        make: Callable[[], Any] | None,
    ) -> None:
        self.adapter, self.spec, self.seed, self.masks = adapter, spec, seed, masks
        self.engine = Engine(adapter)
        self.new_reader, self.make = new_reader, make
        self.reader = new_reader(adapter.env)
        self.rng = np.random.default_rng(seed)
        self.states = self.tuples = self.most = self.empty = self.steps = 0
        self.died = False
        """Whether the environment cannot be played any more."""
        self.forks_asked = self.forks_tell = False
        """Whether forks were tried, and whether any has refused an action."""
        # What replays compare with: the run up to its first reset.
        self._sent: list[IntArray] = []
        self._digests: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]] = []
        self._recording = True
        self._replays: dict[Any, Replay] = {}

    @property
    def knows_who_moves(self) -> bool:
        """Whether it is known who is to move."""
        return self.engine.knows_who_moves or hasattr(self.adapter.env, "agent_iter")

    @property
    def tells(self) -> bool:
        """Whether it has been seen what the engine refuses."""
        return self.engine.knows_legality or self.forks_tell

    def words(self, action: Sequence[int] | IntArray) -> str:
        """A tuple, and what it means if it is within the spec."""
        values = tuple(int(value) for value in action)
        if self.spec.explain(values) is not None:
            return str(values)
        return f"{values} {self.spec.describe(values)}"

    def play(self, states: int) -> Iterator[State | Step]:
        """Each state and what came of each step, until so many states of rows were seen.

        Raises:
            WorkerDied: a worker has ended, and no row had anything to play.
        """
        shown = self.adapter.reset(self.seed)
        last = np.zeros(len(self.adapter), dtype=np.uint64)
        resets = 0
        while True:
            state = self._state(shown, last)
            yield state
            if self.states >= states:
                return
            step = Step(state, *self.draw(state.lists, shown.live, state.turns, state.fits))
            before = self.engine.illegal_actions()
            if self._recording:
                self._sent.append(step.actions)
            try:
                shown = self.adapter.step(step.actions)
            except Exception as error:
                step.error = error
                self.died = isinstance(error, WorkerDied)
                if self.died and not step.listed.any():
                    raise
                if self._recording:
                    self._sent.pop()
                    self._recording = False
                yield step
                if self.died:
                    return
                resets += 1
                shown = self.adapter.reset(self.seed + resets)
            else:
                counted = self.engine.illegal_actions() - before
                step.illegal = counted if self.engine.counts_illegal else shown.illegal
                yield step
            last = np.where(state.lists.counts > 0, state.lists.digests, last)
            self.steps += 1
            self._recording &= len(self._sent) < REPLAYED_STEPS

    def _state(self, shown: Shown, last: npt.NDArray[np.uint64]) -> State:
        lists = self.reader.read(shown)
        self.states += int(shown.live.sum())
        self.tuples += len(lists.actions)
        self.most = max(self.most, int(lists.counts.max(initial=0)))
        self.empty += int((shown.live & (lists.counts == 0)).sum())
        if self._recording:
            self._digests.append((lists.digests, lists.sets))
        state = State(self, self.steps, shown, lists, self.turns(shown.live), last)
        asked = shown.live & state.sound & (lists.counts > 0)
        if state.turns is not None:
            asked &= state.turns
        if self.engine.knows_legality:
            for row in self._some(asked, ASKED_ROWS):
                takes = partial(self.engine.is_legal, row)
                how = "the engine says that it is not legal"
                state.answers.append(self._answer(lists, row, takes, how, ASKED_TUPLES))
        elif self.engine.forks and state.number % FORKED_EVERY == 0:
            for row in self._some(asked, 1):
                self._fork(state, row)
        return state

    def turns(self, live: BoolArray) -> BoolArray | None:
        """(B,) bool: who is to move now; None where that is not known."""
        if self.engine.knows_who_moves:
            return self.engine.to_move(live)
        return self.adapter.selected()

    def draw(
        self,
        lists: Lists,
        live: BoolArray,
        turns: BoolArray | None,
        fits: BoolArray,
    ) -> tuple[IntArray, BoolArray]:
        """Uniformly random actions (B, 1 + slots), and whether each is a listed one."""
        if turns is not None:
            fits = fits & turns[lists.rows]
        counts = np.bincount(lists.rows[fits], minlength=len(lists.counts))
        starts = np.cumsum(counts) - counts
        listed = (counts > 0) & live
        at = (starts + (self.rng.random(len(counts)) * counts).astype(np.int64))[listed]
        actions = np.tile(self.spec.noop, (len(counts), 1))
        actions[listed] = lists.actions[fits][at]
        return actions, listed

    def _fork(self, state: State, row: int) -> None:
        """Asks by playing tuples of one row in copies of the environment."""
        lists = state.lists
        for _ in range(FORKED_DRAWS):
            actions = self.draw(lists, state.shown.live, state.turns, state.fits)[0]
            if not self.engine.refuses(actions, row):
                break
        else:
            return  # the steps will say so

        def takes(action: Action) -> bool:
            changed = actions.copy()
            changed[row] = action
            return not self.engine.refuses(changed, row)

        self.forks_asked = True
        if not self.forks_tell:
            listed = lists.of(row)
            tried = [*self._some_of(self.candidates(listed)), *self._some_of(listed)]
            self.forks_tell = not all(map(takes, tried))
        if self.forks_tell:
            how = "a fork of the environment refuses it"
            state.answers.append(self._answer(lists, row, takes, how, FORKED_TUPLES))

    def _answer(
        self, lists: Lists, row: int, takes: Callable[[Action], bool], how: str, most: int
    ) -> Answer:
        """Asks about at most so many listed tuples of a row, and about others."""
        listed = lists.of(row)
        following = tuple(lists.following[row].tolist())
        known = any(following) and self.spec.explain(following) is None and following not in listed
        for size in dict.fromkeys([most, ASKED_TUPLES]):  # more of them where something is wrong
            looked_at = self._some_of(listed, size)
            others = self._some_of(self.candidates(listed), size)
            if known:
                others = list(dict.fromkeys([following, *others]))
            refused = [action for action in looked_at if not takes(action)]
            missing = [action for action in others if takes(action)]
            if not refused and not missing:
                break
        return Answer(row, listed, looked_at, refused, len(others), missing, takes, how)

    def candidates(self, listed: list[Action]) -> list[Action]:
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

    def _some(self, which: BoolArray, most: int) -> list[int]:
        rows = np.flatnonzero(which)
        if len(rows) > most:
            rows = self.rng.choice(rows, most, replace=False)
        return [int(row) for row in rows]

    def _some_of(self, actions: list[Action], most: int = FORKED_TUPLES) -> list[Action]:
        if len(actions) <= most:
            return actions
        return [actions[i] for i in self.rng.choice(len(actions), most, replace=False).tolist()]

    def replay(self, dtype: Any) -> Replay:
        """Plays the recorded actions again, sent as a dtype; once for each dtype.

        Floats are whole numbers, as a trainer stores them: exact, so that an engine may truncate
        them.
        """
        if dtype not in self._replays:
            adapter = self.adapter if self.make is None else adapt(self.make())
            try:
                outcome = self._replays[dtype] = self._replay(adapter, dtype)
                if self.make is not None and dtype == np.int64 and outcome.state is None:
                    # Its constructor may be seeded, and reset(seed) ignored.
                    self._replays[dtype] = self._replay(adapter, dtype, RESET_STEPS)
            finally:
                if self.make is not None:
                    adapter.close()
        return self._replays[dtype]

    def _replay(self, adapter: Adapter, dtype: Any, most: int | None = None) -> Replay:
        reader, outcome = self.new_reader(adapter.env), Replay()
        same = f"the same seed and actions{' as float32' if dtype == np.float32 else ''}"
        shown = adapter.reset(self.seed)
        for number, (digests, sets) in enumerate(self._digests[:most]):
            lists = reader.read(shown)
            outcome.cases += int(shown.live.sum())
            outcome.reordered += int((lists.digests != digests).sum())
            differs = lists.sets != sets
            if differs.any():
                outcome.state, outcome.row = number, int(differs.argmax())
                outcome.count = int(differs.sum())
                how = "in a new environment" if self.make and most is None else "after reset(seed)"
                listed = lists.of(outcome.row)
                first = f", first {self.words(listed[0])}" if listed else ""
                outcome.says = f"{same} {how} give another list: {len(listed)} tuples{first}"
                break
            if number == len(self._sent) or number + 1 == most:
                break
            try:
                shown = adapter.step(self._sent[number].astype(dtype))
            except Exception as error:
                if dtype == np.float32 and self._refuses(dtype, adapter, reader, error, number):
                    outcome.refused = " ".join(str(error).split())  # of several lines, at times
                else:
                    outcome.state = number
                    outcome.says = f"{same} raise now, and did not before: {in_words(error)}"
                break
        return outcome

    def _refuses(
        self, dtype: Any, adapter: Adapter, reader: Reader, error: Exception, number: int
    ) -> bool:
        """Whether an exception at a dtype means that it is refused, whatever the numbers are."""
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
            adapter.step(actions.astype(dtype))
        except Exception:
            return True
        return False


def fits(spec: ActionSpec, actions: IntArray) -> BoolArray:
    """(N,) bool: whether each tuple is within the spec."""
    known = (actions[:, 0] >= 0) & (actions[:, 0] < len(spec.limits))
    allowed = spec.limits[np.where(known, actions[:, 0], 0)]
    within: BoolArray = known & ((actions >= 0) & (actions < allowed)).all(axis=1)
    return within


def in_words(error: Exception) -> str:
    """Type and message of an exception, and the line that raised it."""
    words = f"{type(error).__name__}: {' '.join(str(error).split())}"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, WorkerDied) or not frames:  # a worker's lines are not known here
        return words
    return f"{words} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def trace(error: Exception) -> str:
    """The innermost calls that led to an exception, the innermost last; "" if not known."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    calls = [f"{Path(f.filename).name}, line {f.lineno}, in {f.name}: {f.line}" for f in frames]
    return "".join(f"\n        {call}" for call in calls)


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
