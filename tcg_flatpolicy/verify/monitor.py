"""Checks each action of a real training run against the legal list that was shown for its row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.meaning import meaning
from tcg_flatpolicy.spec import ActionSpec, IntArray
from tcg_flatpolicy.verify.findings import Report

NEAREST = 5
"""How many legal tuples a message names."""

CHECK_SENT = "each action sent is in the list that was shown"
CHECK_COUNT = "the count lies within the list's room"


@dataclass(frozen=True)
class PrimaryCounts:
    """What came of one primary."""

    sent: int
    """Actions of this primary, but for forced no-ops."""
    illegal: int
    """Of them, not in the list that was shown."""
    legal: int
    """Rows whose list held at least one tuple of this primary."""

    @property
    def never(self) -> bool:
        """Whether it was legal at least once, and never sent."""
        return self.legal > 0 and self.sent == 0


@dataclass(frozen=True)
class Counts:
    """What a monitor has counted so far. A row is one agent in one state."""

    states: int
    """recv calls."""
    sent: int
    """Actions checked, but for forced ones."""
    illegal: int
    """Of them, those that are not listed."""
    forced: int
    """No-ops of rows without a list, where nothing else is right."""
    empty: int
    """Rows without a list."""
    noops: int
    """Of the actions sent, those that were the spec's no-op."""
    noop_listed: int
    """Rows whose list held the no-op."""
    unknown: int
    """Of the actions sent, those whose primary is none of the spec's; they are illegal too."""
    inactive: int
    """Rows that the environment masked out; their actions are not checked."""
    unchecked: int
    """Actions sent without a recv before them."""
    broken_lists: int
    """Rows whose count lay outside 0..K; of these the first K tuples count as listed."""
    primaries: dict[str, PrimaryCounts]
    """By the primary's name, in order of id."""


@dataclass(frozen=True)
class IllegalAction:
    """An action that the list shown for its row did not hold; ``str`` of it says it in words."""

    state: int
    """How many recv calls there had been, the one that showed the list included."""
    row: int
    """Its row in the batch that was sent."""
    agent: int
    """That row's number in the environment's ids."""
    action: tuple[float, ...]
    """As sent."""
    words: str
    """What it means, or why it means nothing."""
    listed: int
    """How many tuples the list held."""
    nearest: tuple[str, ...]
    """Legal tuples that differ from it in the fewest values, in words."""

    def __str__(self) -> str:
        where = f"state {self.state}, row {self.row} (agent {self.agent})"
        if not self.listed:
            only = f"the list is empty, so only the no-op is right: {self.nearest[0]}"
        else:
            only = f"of the {self.listed} legal actions these are nearest: "
            only += ", ".join(self.nearest)
        return f"{where}: {_shown(self.action)}: {self.words}; {only}"


class IllegalActionError(ValueError):
    """An action was sent that the list shown does not hold.

    Attributes:
        illegal: which, where, and what would have been legal.
    """

    def __init__(self, illegal: IllegalAction) -> None:
        super().__init__(str(illegal))
        self.illegal = illegal


class _Lists(NamedTuple):
    """The lists of one batch of B rows, N tuples in all, as they were when they were shown."""

    slots: list[IntArray]
    """H times (N,): the values of each slot."""
    rows: IntArray
    """(N,) row of each tuple, ascending."""
    counts: IntArray
    """(B,)."""
    agents: npt.NDArray[Any]
    """(B,) the environment's ids."""
    active: npt.NDArray[np.bool_] | None
    """(B,), or None where all are."""

    def of(self, row: int) -> IntArray:
        """(count, H) the tuples of a row."""
        start, end = np.searchsorted(self.rows, [row, row + 1])
        return np.stack([values[start:end] for values in self.slots], axis=1)


class LegalityMonitor:
    """A vector environment that checks the actions sent through it; else it is the one it wraps.

    ``PuffeRL(config, LegalityMonitor(vecenv), policy)`` trains as it does without. At `recv` the
    lists are copied out of the observations (the tuples alone, not the rooms they lie in), so that
    they are those that the policy was shown, whatever is written to the buffers afterwards. At
    `send` each action must be one of its row's, or the no-op where the list is empty. Rows that
    the environment masks out (agents that are not there) are not checked.

    Args:
        vecenv: PufferLib's Serial, Multiprocessing or Ray, or a PufferEnv by itself.
        spec: what tuples mean; the layout's, or the environment's ``action_spec``, if left out.
        layout: where the lists lie; the environment's ``legal_layout`` if left out.
        on_illegal: "raise" raises IllegalActionError before the environment sees any action of
            that batch; "record" counts, keeps the first ones and sends them on.
        keep: how many illegal actions to keep with their words.

    Raises:
        ValueError: no spec or layout to be found, or another ``on_illegal``.

    Attributes:
        vecenv: what it wraps; every attribute that the monitor does not have is its.
        illegal: the first ``keep`` illegal actions (with "raise": the one that was raised).
    """

    def __init__(
        self,
        vecenv: Any,
        *,
        spec: ActionSpec | None = None,
        layout: LegalLayout | None = None,
        on_illegal: Literal["raise", "record"] = "raise",
        keep: int = 100,
    ) -> None:
        if on_illegal not in ("raise", "record"):
            raise ValueError(f"on_illegal must be 'raise' or 'record', got {on_illegal!r}")
        if keep < 0:
            raise ValueError(f"keep must not be negative, got {keep}")
        self.vecenv = vecenv
        self.spec, self.layout = meaning(vecenv, spec=spec, layout=layout, who="a monitor")
        spec = self.spec
        self.on_illegal = on_illegal
        self.keep = keep
        self.illegal: list[IllegalAction] = []
        self._shown: _Lists | None = None
        # A bin a primary, in order of id, and one for what is no primary.
        self._bins = len(spec.primaries) + 1
        self._bin_of = np.full(len(spec.limits) + 1, self._bins - 1)
        self._bin_of[list(spec.primaries)] = np.arange(self._bins - 1)
        self._sent, self._illegal, self._legal = np.zeros((3, self._bins), dtype=np.int64)
        self._states = self._rows = self._empty = self._forced = self._noops = self._noop_listed = 0
        self._inactive = self._unchecked = self._broken = 0
        self._first_illegal = ""
        self._first_broken: tuple[int, str] | None = None
        self._first_state = 0

    def __getattr__(self, name: str) -> Any:
        # Only reached for what the monitor itself does not have.
        if name == "vecenv":  # while it is being unpickled or copied
            raise AttributeError(name)
        return getattr(self.vecenv, name)

    def async_reset(self, *args: Any, **kwargs: Any) -> None:
        """The environment's own; lists shown before it no longer count."""
        self._shown = None
        self.vecenv.async_reset(*args, **kwargs)

    def recv(self) -> Any:
        """The environment's own: ``(observations, ..., infos, env ids, masks)``.

        Raises:
            TypeError: observations of a dtype that the layout does not fit.
            ValueError: another number of columns than the layout has; with "raise", a count
                outside the list's room.
        """
        received = self.vecenv.recv()
        self._states += 1
        self._shown = self._copy_lists(received[0], received[-2], received[-1])
        return received

    def send(self, actions: Any) -> None:
        """Checks the actions, then sends them on as they are.

        Args:
            actions: (B, 1 + slots) whole numbers of any dtype, or of a shape with as many numbers.

        Raises:
            IllegalActionError: with "raise", an action that its row's list does not hold.
            TypeError: not numbers.
            ValueError: another number of values than rows times ``1 + slots``.
        """
        shown, self._shown = self._shown, None  # a list is for one action
        if shown is None:
            self._unchecked += np.size(actions) // len(self.layout.columns)
        else:
            self._check(self._whole_actions(actions, len(shown.counts)), actions, shown)
        self.vecenv.send(actions)

    def reset(self, seed: int | None = 42) -> tuple[Any, Any]:
        """As PufferLib's: ``(observations, infos)``."""
        self.async_reset(seed)
        received = self.recv()
        return received[0], received[-3]

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, Any]:
        """As PufferLib's: ``(observations, rewards, terminals, truncations, infos)``."""
        self.send(actions)
        received = self.recv()
        return (*received[:4], received[-3])

    def close(self) -> None:
        """The environment's own; counts and report stay."""
        self.vecenv.close()

    @property
    def counts(self) -> Counts:
        """What has been counted so far."""
        return Counts(
            states=self._states,
            sent=int(self._sent.sum()),
            illegal=int(self._illegal.sum()),
            forced=self._forced,
            empty=self._empty,
            noops=self._noops,
            noop_listed=self._noop_listed,
            unknown=int(self._sent[-1]),
            inactive=self._inactive,
            unchecked=self._unchecked,
            broken_lists=self._broken,
            primaries={
                primary.name: PrimaryCounts(
                    int(self._sent[at]), int(self._illegal[at]), int(self._legal[at])
                )
                for at, primary in enumerate(self.spec.primaries.values())
            },
        )

    def report(self) -> Report:
        """T07 for illegal actions, E04 for counts outside the list's room, and figures.

        May be asked for at any time.
        """
        counts = self.counts
        report = Report(f"actions sent to {type(self.vecenv).__name__} in {counts.states:,} states")
        if counts.sent:
            report.looked(CHECK_SENT, counts.sent)
        elif counts.forced:
            report.skip(CHECK_SENT, "no row had a list, and all played the no-op; see audit_env")
        else:
            report.skip(CHECK_SENT, "no action was sent after a recv; train, or step it")
        if counts.illegal:
            report.found("T07", CHECK_SENT, self._first_illegal, self._first_state, counts.illegal)
        if self._rows:
            report.looked(CHECK_COUNT, self._rows)
        else:
            report.skip(CHECK_COUNT, "no observation was received; train, or step it")
        if self._first_broken is not None:
            state, message = self._first_broken
            report.found("E04", CHECK_COUNT, message, state, counts.broken_lists)
        report.figures.update(
            {
                "states": counts.states,
                "actions sent": counts.sent,
                "illegal": counts.illegal,
                "no-ops": counts.noops,
                "rows whose list held the no-op": counts.noop_listed,
                "rows without a list": counts.empty,
                "no-ops of rows without a list": counts.forced,
                "actions of no primary": counts.unknown,
                "rows masked out, not checked": counts.inactive,
                "actions sent without a recv, not checked": counts.unchecked,
            }
        )
        for name, one in counts.primaries.items():
            report.figures[f"{name}: sent"] = one.sent
            report.figures[f"{name}: illegal"] = one.illegal
            report.figures[f"{name}: rows in which it was legal"] = one.legal
            if one.never:
                report.figures[f"{name}: legal, never sent"] = one.legal
        return report

    def _copy_lists(self, observations: Any, agents: Any, masks: Any) -> _Lists:
        records = self._bytes(observations).view(self.layout.dtype)[:, 0]
        said, columns = self.layout.list_arrays(records)
        counts = _whole(said)
        self._rows += len(counts)
        padding = self.layout.padding
        if len(counts) and (counts.min() < 0 or counts.max() > padding):
            counts = self._clipped(counts)
        rows = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(len(rows)) - (counts.cumsum() - counts)[rows]
        slots = [_whole(column[rows, places]) for column in columns]
        active = None if np.all(masks) else np.array(masks, dtype=bool).reshape(len(counts))
        return _Lists(slots, rows, counts, np.asarray(agents), active)

    def _bytes(self, observations: Any) -> npt.NDArray[np.uint8]:
        """(B, nbytes), without a copy where the observations lie as the layout has them."""
        if isinstance(observations, Tensor):
            tensor = observations.detach().cpu()
        else:
            # torch shares no array that is read-only.
            tensor = torch.from_numpy(np.require(observations, requirements="W"))
        data: npt.NDArray[np.uint8] = self.layout.as_bytes(tensor).numpy()
        return data

    def _clipped(self, counts: IntArray) -> IntArray:
        """Counts within 0..K, of some that are not."""
        padding = self.layout.padding
        broken = np.flatnonzero((counts < 0) | (counts > padding))
        message = str(self.layout.overflow(counts.tolist()))
        if self.on_illegal == "raise":
            raise ValueError(f"state {self._states}, {message}")
        self._broken += len(broken)
        self._first_broken = self._first_broken or (self._states, message)
        return counts.clip(0, padding)

    def _whole_actions(self, actions: Any, batch: int) -> IntArray:
        """(B, H) int64; -1, which no list holds, where a value is not whole."""
        array = actions.detach().cpu().numpy() if isinstance(actions, Tensor) else actions
        array = np.asarray(array)
        if array.dtype.kind not in "iuf":
            raise TypeError(f"actions must be whole numbers, got {array.dtype}")
        width = len(self.layout.columns)
        if array.size != batch * width:
            raise ValueError(
                f"actions must be ({batch}, {width}), one tuple a row, got {array.shape}"
            )
        return _whole(array.reshape(batch, width))

    def _check(self, actions: IntArray, sent: Any, shown: _Lists) -> None:
        rows, empty = shown.rows, shown.counts == 0
        same = shown.slots[0] == actions[rows, 0]
        noops = shown.slots[0] == self.spec.noop[0]
        for slot, values in enumerate(shown.slots[1:], start=1):
            same &= values == actions[rows, slot]
            noops &= values == self.spec.noop[slot]
        is_noop = (actions == self.spec.noop).all(axis=1)
        forced = empty & is_noop
        legal = np.zeros(len(empty), dtype=bool)
        legal[rows[same]] = True
        legal &= (actions >= 0).all(axis=1)  # a broken list may hold -1, as what is not whole is
        noop_listed = np.zeros(len(empty), dtype=bool)
        noop_listed[rows[noops]] = True
        offered = np.zeros((len(empty), self._bins), dtype=bool)
        offered[rows, self._bin(shown.slots[0])] = True
        bins = self._bin(actions[:, 0])
        active = np.ones(len(empty), dtype=bool) if shown.active is None else shown.active
        counted = active & ~forced
        wrong = np.flatnonzero(counted & ~legal)
        self._inactive += int((~active).sum())
        self._sent += np.bincount(bins[counted], minlength=self._bins)
        self._illegal += np.bincount(bins[wrong], minlength=self._bins)
        self._legal += offered[active].sum(axis=0)
        self._forced += int((active & forced).sum())
        self._empty += int((active & empty).sum())
        self._noops += int((counted & is_noop).sum())
        self._noop_listed += int((active & noop_listed).sum())
        if len(wrong):
            self._note(wrong, sent, shown)

    def _bin(self, primaries: IntArray) -> IntArray:
        """The bin of each id; those that are no primary's share the last."""
        last = len(self._bin_of) - 1
        return self._bin_of[np.where((primaries >= 0) & (primaries < last), primaries, last)]

    def _note(self, wrong: npt.NDArray[np.intp], sent: Any, shown: _Lists) -> None:
        """Keeps the illegal actions of these rows, and raises the first if it should."""
        array = sent.detach().cpu().numpy() if isinstance(sent, Tensor) else np.asarray(sent)
        array = array.reshape(len(shown.counts), -1)
        first = None
        if self.on_illegal == "raise" or not self._first_illegal:
            first = self._describe(int(wrong[0]), array[wrong[0]], shown)
            if not self._first_illegal:
                self._first_illegal, self._first_state = str(first), first.state
        room = self.keep - len(self.illegal)
        for row in wrong[:room].tolist() if room > 0 else []:
            self.illegal.append(self._describe(row, array[row], shown))
        if self.on_illegal == "raise" and first is not None:
            raise IllegalActionError(first)

    def _describe(self, row: int, sent: npt.NDArray[Any], shown: _Lists) -> IllegalAction:
        legal = shown.of(row)
        whole = _whole(sent)
        if (whole == sent).all():
            problem = self.spec.explain(whole.tolist())
            words = problem or f"{self.spec.describe(whole)} is not legal"
        else:
            slot = int(np.flatnonzero(whole != sent)[0])
            words = f"slot {slot}: {sent[slot]} is no whole number of 64 bits"
            if sent.dtype.kind == "f":  # the nearest legal ones are nearest to what was meant
                whole = _whole(np.rint(sent))
        nearest: list[tuple[int, ...]]
        if len(legal):
            order = np.argsort((legal != whole).sum(axis=1), kind="stable")[:NEAREST]
            nearest = [tuple(action) for action in legal[order].tolist()]
        else:
            nearest = [tuple(self.spec.noop.tolist())]
        return IllegalAction(
            state=self._states,
            row=row,
            agent=int(shown.agents[row]),
            action=tuple(sent.tolist()),
            words=words,
            listed=len(legal),
            nearest=tuple(self._words(action) for action in nearest),
        )

    def _words(self, action: tuple[int, ...]) -> str:
        problem = self.spec.explain(action)
        return self.spec.describe(action) if problem is None else f"{action}, where {problem}"


def _whole(values: npt.NDArray[Any]) -> IntArray:
    """As int64; -1 where a value is not whole or does not fit."""
    if values.dtype.kind == "f":
        values = values.astype(np.float64)  # 2**63 is infinite in half precision
        whole = (values == np.floor(values)) & (np.abs(values) < 2.0**63)
        values = np.where(whole, values, -1)
    elif values.dtype == np.uint64:
        values = np.where(values < 2**63, values, np.uint64(0)).astype(np.int64) - (values >= 2**63)
    return values.astype(np.int64, copy=False)


def _shown(action: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" if value % 1 else f"{value:.0f}" for value in action) + ")"
