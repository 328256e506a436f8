"""The environment audit: sound environments give no finding, each bug is found under its code."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pufferlib.emulation
import pufferlib.vector
import pytest

import tcg_flatpolicy as fp
from tcg_flatpolicy.verify.adapters import (
    AECAdapter,
    GymnasiumAdapter,
    ParallelAdapter,
    PufferAdapter,
    VectorAdapter,
    adapt,
)
from tcg_flatpolicy.verify.environment import (
    COUNT,
    FLOATS,
    LISTED_LEGAL,
    MASKS,
    MOVER,
    ROOM,
    SEED,
    TAKEN,
    UNLISTED,
    WAITER,
    audit_env,
)
from tests.broken import AEC, FAULTS, SPEC, Duel, Match, Parallel, Solo, seen_by
from tests.broken import ROOM as DUEL_ROOM
from tests.games import Bandit

KEYS = ("n", "legal")


def statuses(report: Any) -> dict[str, str]:
    return {check.name: check.status for check in report.checks.values()}


def serial(maker: Any, envs: int = 2) -> Any:
    return pufferlib.vector.make(maker, num_envs=envs, backend=pufferlib.vector.Serial)


def emulated_solo(buf: Any = None, seed: int = 0) -> Any:
    return pufferlib.emulation.GymnasiumPufferEnv(env_creator=Solo, buf=buf, seed=seed)


# Sound environments.


def test_a_sound_game_passes_every_check() -> None:
    report = audit_env(Duel(), steps=1000)
    assert report.ok, report
    assert set(statuses(report).values()) == {"passed"}
    assert report.figures["states"] == 1008  # 63 times 16 rows
    assert report.figures["share of states with an empty list"] == 0.5
    assert 0 < report.figures["legal tuples a state, mean"] < DUEL_ROOM
    assert report.figures["states a second of random play"] > 0


def test_what_the_environment_does_not_offer_is_skipped_and_says_so() -> None:
    report = audit_env(Duel(protocol=False), steps=500)
    assert report.ok, report
    for check, words in {
        MOVER: "to_move(row)",
        WAITER: "to_move(row)",
        LISTED_LEGAL: "is_legal(row, action)",
        UNLISTED: "is_legal(row, action)",
    }.items():
        assert report.checks[check].status == "skipped"
        assert words in (report.checks[check].skipped or "")


def test_bandits_pass_though_some_lists_fill_their_padding() -> None:
    report = audit_env(Bandit(16, empty=0.3), steps=1500)
    assert report.ok, report
    assert "fill their padding" in (report.checks[ROOM].skipped or "")
    assert "refuses floats" in (report.checks[FLOATS].skipped or "")


def test_essence_wars_passes() -> None:
    essence_wars = pytest.importorskip("tcg_flatpolicy.envs.essence_wars")
    make = partial(essence_wars.EssenceWars, 64)
    report = audit_env(make(), steps=3000, make=make)
    assert report.ok, report
    assert statuses(report)[SEED] == "passed"
    assert "refuses floats" in (report.checks[FLOATS].skipped or "")


@pytest.mark.parametrize("make", [Solo, Parallel, AEC])
def test_other_kinds_of_environments_pass(make: Any) -> None:
    report = audit_env(make(), steps=400, layout=KEYS, make=make)
    assert report.ok, report
    found = statuses(report)
    assert found[COUNT] == found[ROOM] == found[MOVER] == found[SEED] == "passed"
    assert found[LISTED_LEGAL] == found[UNLISTED] == "passed"
    assert found[WAITER] == ("skipped" if make is Solo else "passed")


def test_a_callable_gives_the_list_where_there_is_no_layout() -> None:
    report = audit_env(Solo(), 200, legal_actions=lambda observation, info: info["legal"])
    assert report.ok, report
    assert "a layout" in (report.checks[COUNT].skipped or "")

    short = audit_env(Solo(), 200, legal_actions=lambda observation, info: info["legal"][1:])
    assert list(short.findings) == ["E08"]
    assert "(0, 0, 0) end_turn" in short.findings["E08"].message


def test_vector_environments_pass_and_ask_each_part_about_its_own_rows() -> None:
    report = audit_env(serial(partial(Duel, 2)), steps=600)
    assert report.ok, report
    assert set(statuses(report).values()) == {"passed"}
    report = audit_env(serial(emulated_solo, envs=4), steps=400, layout=KEYS)
    assert report.ok, report
    assert statuses(report)[MOVER] == statuses(report)[LISTED_LEGAL] == "passed"
    report = audit_env(emulated_solo(), steps=200, layout=KEYS)
    assert report.ok, report


def test_multiprocessing_passes_and_cannot_be_asked() -> None:
    vecenv = pufferlib.vector.make(
        partial(Duel, 2), num_envs=2, num_workers=1, backend=pufferlib.vector.Multiprocessing
    )
    try:
        report = audit_env(vecenv, steps=200)
    finally:
        vecenv.close()
    assert report.ok, report
    assert statuses(report)[SEED] == "passed"
    assert statuses(report)[LISTED_LEGAL] == statuses(report)[WAITER] == "skipped"


def test_a_worker_that_raises_ends_the_audit_and_not_the_waiting() -> None:
    vecenv = pufferlib.vector.make(
        partial(Duel, 2, fault="refused", illegal="raise"),
        num_envs=2,
        num_workers=1,
        backend=pufferlib.vector.Multiprocessing,
    )
    try:
        report = audit_env(vecenv, steps=2000)
    finally:
        vecenv.close()
    assert list(report.findings) == ["E06"]
    assert "under the Serial backend" in report.findings["E06"].message
    assert statuses(report)[SEED] == "skipped"


# Broken ones.


@pytest.mark.parametrize(("fault", "code"), FAULTS.items())
def test_each_bug_is_reported_under_its_own_code(fault: str, code: str) -> None:
    report = audit_env(Duel(fault=fault), steps=800)
    assert list(report.findings) == [code], report
    finding = report.findings[code]
    assert finding.state * 16 < 800
    assert "state" in finding.message


@pytest.mark.parametrize("fault", ["refused", "not_refreshed", "floats_truncated"])
def test_an_engine_that_raises_is_audited_as_well(fault: str) -> None:
    report = audit_env(Duel(2, fault=fault, illegal="raise"), steps=800)
    assert list(report.findings) == [FAULTS[fault]], report
    assert report.figures["states"] >= 800


def test_without_the_protocol_a_raising_step_is_a_refusal() -> None:
    report = audit_env(Duel(fault="refused", illegal="raise", protocol=False), steps=400)
    assert list(report.findings) == ["E06"]
    message = report.findings["E06"].message
    assert "is not legal" in message
    assert "is_legal(row, action) on the environment would tell which" in message
    assert report.checks[TAKEN].codes == ("E06",)


@pytest.mark.parametrize("fault", [None, "missing", "refused", "truncated"])
def test_forks_do_for_an_engine_that_cannot_be_asked(fault: str | None) -> None:
    class OnlyForks(Duel):
        is_legal = None  # type: ignore[assignment]

    report = audit_env(OnlyForks(2, fault=fault, illegal="raise"), steps=800)
    assert list(report.findings) == ([FAULTS[fault]] if fault else []), report


def test_forks_that_take_everything_say_nothing() -> None:
    class Lenient(Duel):
        """Plays end_turn in place of what is illegal, and tells nobody."""

        is_legal = None  # type: ignore[assignment]

        def step(self, actions: Any) -> Any:
            self.illegal_actions = 0
            outcome = super().step(actions)
            self.illegal_actions = None  # type: ignore[assignment]
            return outcome

    env = Lenient(2)
    env.illegal_actions = None  # type: ignore[assignment]
    report = audit_env(env, steps=300)
    assert report.ok, report
    assert "cannot be seen" in (report.checks[UNLISTED].skipped or "")


def test_a_list_cut_off_shows_without_the_engine_too() -> None:
    env = Duel(fault="truncated", protocol=False)
    env.head_masks = None  # type: ignore[assignment]
    report = audit_env(env, steps=800)
    assert list(report.findings) == ["E05"], report


def test_the_waiting_agent_of_an_aec_environment_must_have_no_list() -> None:
    report = audit_env(AEC(leaky=True), steps=200, layout=KEYS)
    assert list(report.findings) == ["E10"]
    assert "agent 'second', state 0 is not to move" in report.findings["E10"].message


def test_a_single_agent_with_an_empty_list_is_found() -> None:
    report = audit_env(Solo(), 60, legal_actions=lambda observation, info: [])
    assert list(report.findings) == ["E09"], report


def test_masks_of_a_callable_are_compared() -> None:
    def masks(observation: Any, info: Any) -> list[Any]:
        legal = fp.LegalActions.from_lists([info["legal"]])
        return [mask[0].numpy() for mask in legal.head_masks(SPEC.nvec.tolist())]

    given = {"layout": KEYS, "head_masks": masks}
    report = audit_env(Solo(), 100, **given)  # type: ignore[arg-type]
    assert report.ok, report
    assert statuses(report)[MASKS] == "passed"
    wrong = audit_env(
        Solo(),
        100,
        layout=KEYS,
        head_masks=lambda o, i: [m | (np.arange(len(m)) == 3) for m in masks(o, i)],
    )
    assert list(wrong.findings) == ["E11"]


def test_a_list_that_is_not_cleared_is_no_fault() -> None:
    class Uncleared(Solo):
        def _seen(self) -> Any:
            observation, info = super()._seen()
            kept = getattr(self, "kept", observation["legal"]).copy()
            kept[: observation["n"]] = observation["legal"][: observation["n"]]
            self.kept = kept
            return {**observation, "legal": kept}, info

    report = audit_env(Uncleared(), 200, layout=KEYS)
    assert report.ok, report


def test_counts_outside_the_padding_are_named() -> None:
    class Negative(Solo):
        def _seen(self) -> Any:
            observation, info = super()._seen()
            return {**observation, "n": -observation["n"]}, info

    report = audit_env(Negative(), 50, layout=KEYS)
    assert "E04" in report.findings
    assert "room for 0 to 48" in report.findings["E04"].message


def test_other_seeds_play_other_games_and_the_same_seed_the_same() -> None:
    first, again, other = (audit_env(Duel(2), 200, seed=seed).figures for seed in (1, 1, 2))
    name = "legal tuples a state, mean"
    assert first[name] == again[name] != other[name]


# Kinds and bad input.


def test_each_kind_has_its_adapter() -> None:
    kinds = {
        Duel: PufferAdapter,
        Solo: GymnasiumAdapter,
        Parallel: ParallelAdapter,
        AEC: AECAdapter,
        emulated_solo: PufferAdapter,
        partial(serial, Duel): VectorAdapter,
    }
    for make, adapter in kinds.items():
        assert type(adapt(make())) is adapter


def test_what_cannot_be_audited_says_why() -> None:
    with pytest.raises(TypeError, match="no environment that can be audited"):
        audit_env(object(), spec=SPEC)
    with pytest.raises(ValueError, match="at least 1"):
        audit_env(Duel(), steps=0)
    with pytest.raises(TypeError, match="pass layout="):
        audit_env(Solo())
    with pytest.raises(ValueError, match="pass spec="):
        audit_env(gymnasium.Env())
    with pytest.raises(ValueError, match="3 values, the spec's 4"):
        audit_env(Duel(), spec=fp.ActionSpec.from_nvec([2, 2, 2, 2]))


def test_the_game_itself_is_sound() -> None:
    match = Match(np.random.default_rng(0))
    seen = seen_by(match, 0)
    assert seen["n"] == len(match.legal(0)) <= DUEL_ROOM
    assert not match.legal(1)
