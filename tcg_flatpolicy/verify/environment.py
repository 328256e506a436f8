"""Audit of an environment: plays random legal actions and checks each list that it shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.meaning import spec_of
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.verify.adapters import HeadMasks, LegalCallable, Reader, adapt, reader_for
from tcg_flatpolicy.verify.checks import diagnose, env_checks
from tcg_flatpolicy.verify.evidence import State, World
from tcg_flatpolicy.verify.findings import Report
from tcg_flatpolicy.verify.probe import probe
from tcg_flatpolicy.wrapping import env_attribute

TAKEN = "the step takes listed actions"
CHECKS = tuple(line for check in env_checks() for line in check.lines)
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
            observations, the keys of the count and of the padded (K, 1 + slots) list. What
            stands behind the count may be anything.
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

    world = World(adapt(env), new_reader, spec, seed, head_masks, make)
    report = Report(f"environment {type(env).__name__}")
    for line in CHECKS:
        report.looked(line, 0)  # so that they are reported in this order
    checks = [check(world, report) for check in env_checks()]
    started = time.perf_counter()
    for event in world.play(steps):
        for check in checks:
            check.see(event) if isinstance(event, State) else check.stepped(event)
    for check in checks:
        check.end()
    diagnose(checks, report)
    _measure(world, report, time.perf_counter() - started)
    taken = report.checks[TAKEN]
    if taken.cases and not (taken.codes or world.died or world.tells):
        why = probe(world)
        if why is not None:
            report.skip(TAKEN, f"a refusal might not show; {why}")
    return report


def _measure(world: World, report: Report, seconds: float) -> None:
    """Notes what was measured, and plays a while without checks to compare."""
    figures = report.figures
    figures["states"] = world.states
    figures["steps of the environment"] = world.steps
    figures["seconds"] = seconds
    figures["legal tuples a state, mean"] = world.tuples / max(world.states, 1)
    figures["legal tuples a state, most"] = world.most
    figures["share of states with an empty list"] = world.empty / max(world.states, 1)
    figures["states a second"] = world.states / seconds
    plain = 0.0 if world.died else _random_play(world, min(max(seconds / 4, 0.05), 2.0))
    if plain:
        figures["states a second of random play"] = plain
        figures["share of random play's speed"] = figures["states a second"] / plain


def _random_play(world: World, seconds: float) -> float:
    """States a second of random play: the list read, an action drawn, a step; 0 if it fails."""
    reader = world.new_reader(world.adapter.env)
    try:
        shown = world.adapter.reset(world.seed)
        states, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            states += int(shown.live.sum())
            lists = reader.read(shown)
            every = np.ones(len(lists.actions), dtype=bool)
            shown = world.adapter.step(world.draw(lists, shown.live, None, every)[0])
        return states / (time.perf_counter() - started)
    except Exception:
        # A broken environment: its findings say so, and there is no speed to compare with.
        return 0.0
