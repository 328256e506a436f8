"""Sends what is not listed: if nothing complains, a refused listed action would not show either."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tcg_flatpolicy.spec import IntArray
from tcg_flatpolicy.verify.adapters import Adapter, adapt, illegal_count
from tcg_flatpolicy.verify.evidence import REPLAYED_STEPS, World, fits, in_words

PROBE_SECONDS = 10.0
"""How long a copy of this process may take over one step."""


def probe(world: World) -> str | None:
    """Sends unlisted actions.

    This comes last, since an engine may do anything then.

    Returns:
        Why a refusal might not show; None if it would.
    """
    workers = hasattr(world.adapter.env, "processes")
    if workers and world.make is None:
        return "an unlisted action might end a worker: needs make= or the Serial backend"
    adapter = adapt(world.make()) if workers and world.make is not None else world.adapter
    try:
        return _probe(world, adapter, alone=not workers and hasattr(os, "fork"))
    finally:
        if adapter is not world.adapter:
            adapter.close()


def _probe(world: World, adapter: Adapter, alone: bool) -> str | None:
    """None if the environment complains of unlisted actions; otherwise what was seen.

    Args:
        world: as the audit played it.
        adapter: of the environment.
        alone: whether to try the step in a copy of this process before.
    """
    try:
        played = _to_unlisted(world, adapter)
    except Exception as error:
        return f"playing once more raises {in_words(error)}"
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
        f"{world.words(unlisted[row])} was sent, which was not listed, and the environment "
        "said nothing: needs is_legal(row, action) on the environment, illegal_actions there "
        "or in the infos, or a step that raises"
    )


def _to_unlisted(world: World, adapter: Adapter) -> tuple[IntArray, IntArray, int] | None:
    """Plays until some row could play a tuple that is not listed.

    Returns:
        Listed actions; the same with one that is not listed in each row where there is one; and
        the number of such a row. None if none came up.
    """
    reader = world.new_reader(adapter.env)
    noop = tuple(world.spec.noop.tolist())
    shown = adapter.reset(world.seed)
    for _ in range(REPLAYED_STEPS):
        lists = reader.read(shown)
        turns = world.turns(shown.live) if adapter is world.adapter else adapter.selected()
        listed, some = world.draw(lists, shown.live, turns, fits(world.spec, lists.actions))
        unlisted, found = listed.copy(), None
        for row in np.flatnonzero(some).tolist():
            others = [a for a in world.candidates(lists.of(row)) if a != noop]
            if others:
                unlisted[row], found = others[0], row
        if found is not None:
            return listed, unlisted, found
        shown = adapter.step(listed)
    return None


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
