"""The environment audit: sound environments give no finding, each bug is found under its code."""

from __future__ import annotations

import copy
import inspect
import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pufferlib.emulation
import pufferlib.vector
import pytest

import tcg_flatpolicy as fp
from tcg_flatpolicy.verify import CODES, probe
from tcg_flatpolicy.verify.adapters import (
    AECAdapter,
    GymnasiumAdapter,
    ParallelAdapter,
    PufferAdapter,
    VectorAdapter,
    adapt,
)
from tcg_flatpolicy.verify.environment import CHECKS, audit_env
from tcg_flatpolicy.verify.toy import EVERY, SPEC, Duel, Match
from tcg_flatpolicy.verify.toy import ROOM as DUEL_ROOM
from tests.broken import AEC, FAULTS, Parallel, Solo, seen_by
from tests.games import Bandit

pytestmark = pytest.mark.integration

KEYS = ("n", "legal")
_, _, COUNT, ROOM, TAKEN, LISTED_LEGAL, UNLISTED, SOMEONE, MOVER, WAITER = CHECKS[:10]
MASKS, _, SEED, FLOATS, _ = CHECKS[10:]


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
    plain = report.figures["states a second of random play"]
    assert plain > 0
    share = report.figures["share of random play's speed"]
    assert share == report.figures["states a second"] / plain
    words = str(report)
    assert f"states a second of random play: {plain:,.6g}" in words
    assert f"share of random play's speed: {share:,.6g}" in words


def test_a_sound_game_gives_no_finding_in_100_000_states() -> None:
    report = audit_env(Duel(400), steps=100_000)
    assert report.ok, report
    assert report.figures["states"] >= 100_000
    assert set(statuses(report).values()) == {"passed"}


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
    essence_wars = pytest.importorskip("tcg_flatpolicy.games.essence_wars")
    make = partial(essence_wars.EssenceWars, 64)
    report = audit_env(make(), steps=3000, make=make)
    assert report.ok, report
    assert statuses(report)[SEED] == statuses(report)[TAKEN] == "passed"
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
    assert "needs make= or the Serial backend" in (report.checks[TAKEN].skipped or "")


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
def test_each_bug_is_reported_under_its_own_code_and_no_other(fault: str, code: str) -> None:
    report = audit_env(Duel(fault=fault), steps=2000)
    assert list(report.findings) == [code], report
    finding = report.findings[code]
    assert finding.state * 16 < 2000
    assert "state" in finding.message


def test_a_seed_that_reset_ignores_shows_in_new_environments_too() -> None:
    make = partial(Duel, 2, fault="reset_ignored")  # which its constructor seeds
    report = audit_env(make(), steps=200, make=make)
    assert list(report.findings) == ["E13"], report
    assert "after reset(seed) give another list" in report.findings["E13"].message


def test_a_game_without_chance_may_always_begin_alike() -> None:
    class Certain(Duel):
        def reset(self, seed: int | None = None) -> Any:
            return super().reset(0)

        def step(self, actions: Any) -> Any:
            outcome = super().step(actions)
            if self.terminals.any():
                self.matches = [Match(np.random.default_rng(0)) for _ in self.matches]
                self.observe()
            return outcome

    report = audit_env(Certain(1), steps=600)
    assert report.ok, report


@pytest.mark.parametrize("fault", ["refused", "not_refreshed", "floats_truncated"])
def test_an_engine_that_raises_is_audited_as_well(fault: str) -> None:
    report = audit_env(Duel(2, fault=fault, illegal="raise"), steps=800)
    assert list(report.findings) == [FAULTS[fault]], report
    assert report.figures["states"] >= 800


def test_a_step_that_fails_shows_where() -> None:
    report = audit_env(Duel(1, fault="step_fails", protocol=False, illegal="raise"), steps=300)
    assert list(report.findings) == ["E16"], report
    message = report.findings["E16"].message
    assert "IndexError: list index out of range" in message
    assert "e16_step_fails.py, line 15, in played: return [0, 1, 2][action[1]]" in message


def test_without_the_protocol_a_raising_step_is_a_refusal() -> None:
    report = audit_env(Duel(fault="refused", illegal="raise", protocol=False), steps=400)
    assert list(report.findings) == ["E06"]
    message = report.findings["E06"].message
    assert "step raises at listed actions of 8 rows" in message
    assert "is_legal(row, action) on the environment would tell which" in message
    # The exception, the line that raised it, and a doubt.
    assert "ValueError: game" in message
    lines = Path(inspect.getsourcefile(Duel) or "").read_text().splitlines()
    number = 1 + next(i for i, line in enumerate(lines) if "is not legal" in line)
    assert f"is not legal (toy.py, line {number}); the fault may as well be in step" in message
    assert report.checks[TAKEN].codes == ("E06",)


class OnlyForks(Duel):
    is_legal = None  # type: ignore[assignment]


TOLD_BY_FORKS = ("E02", "E05", "E06", "E07", "E08")
FORKS = {fault: code for fault, code in FAULTS.items() if code in TOLD_BY_FORKS}
FORKS["count_small"] = "E04"


@pytest.mark.parametrize(
    ("fault", "illegal"),
    [(None, "raise"), *((fault, ("raise", "count")[i % 2]) for i, fault in enumerate(FORKS))],
)
def test_forks_do_for_an_engine_that_cannot_be_asked(fault: str | None, illegal: str) -> None:
    report = audit_env(OnlyForks(2, fault=fault, illegal=illegal), steps=500)
    assert list(report.findings) == ([FORKS[fault]] if fault else []), report
    assert report.checks[UNLISTED].cases > 50


def test_forks_tell_a_stale_list_by_what_is_missing_from_it() -> None:
    # A step of eight games that raises does not say whose action was refused.
    env = OnlyForks(8, fault="not_refreshed", illegal="raise")
    assert list(audit_env(env, steps=600, seed=2).findings) == ["E07"]


class Silent(Duel):
    """Plays end_turn in place of what is illegal, and tells nobody."""

    is_legal = None  # type: ignore[assignment]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.illegal_actions = None  # type: ignore[assignment]

    def step(self, actions: Any) -> Any:
        self.illegal_actions = 0
        outcome = super().step(actions)
        self.illegal_actions = None  # type: ignore[assignment]
        return outcome


def test_forks_that_take_everything_say_nothing() -> None:
    report = audit_env(Silent(2), steps=300)
    assert report.ok, report
    assert "cannot be seen" in (report.checks[UNLISTED].skipped or "")
    assert "cannot be seen" in (report.checks[LISTED_LEGAL].skipped or "")


# What a refusal would look like.


class Grid(gymnasium.Env):  # type: ignore[type-arg]
    """Four fields, each to be taken once; in the first state every tuple of the spec is listed."""

    SPEC = fp.ActionSpec([fp.Primary("take", fp.Index("field", 4))])
    observation_space = gymnasium.spaces.Discrete(1)
    action_space, action_spec = SPEC.action_space, SPEC

    def __init__(self, again: Any = lambda: None) -> None:
        self.again = again

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.free = [(0, field) for field in range(4)]
        return 0, {"legal": list(self.free)}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        chosen = tuple(int(v) for v in action)
        if chosen in self.free:
            self.free.remove(chosen)
        else:
            self.again()
        return 0, 0.0, not self.free, False, {"legal": list(self.free)}


def listed(observation: Any, info: Any) -> Any:
    return info["legal"]


def raises() -> None:
    raise ValueError("taken")


def test_an_engine_that_replaces_illegal_actions_in_silence_has_not_taken_the_listed_ones() -> None:
    report = audit_env(Silent(2, protocol=False), steps=300)
    assert report.ok, report
    assert report.checks[TAKEN].status == "skipped"
    why = report.checks[TAKEN].skipped or ""
    for words in ("was sent, which was not listed", "is_legal", "illegal_actions", "raises"):
        assert words in why
    found, sound = statuses(report), statuses(audit_env(Duel(2, protocol=False), steps=300))
    assert (found.pop(TAKEN), sound.pop(TAKEN)) == ("skipped", "passed")
    assert found == sound
    report = audit_env(Grid(), 100, legal_actions=listed)
    assert "was sent, which was not listed" in (report.checks[TAKEN].skipped or "")


def test_who_can_be_asked_need_not_complain() -> None:
    class Asked(Silent):
        is_legal = Duel.is_legal  # type: ignore[assignment]

    report = audit_env(Asked(2), steps=300)
    assert set(statuses(report).values()) == {"passed"}, report
    assert list(audit_env(Asked(2, fault="refused"), steps=300).findings) == ["E06"]


@pytest.mark.parametrize("complaint", [raises, partial(os.kill, os.getpid(), signal.SIGKILL)])
def test_exceptions_and_death_are_complaints(complaint: Any) -> None:
    here = os.getpid()

    def again() -> None:
        if complaint is raises:
            raises()
        assert os.getpid() != here  # else the tests end here
        os.kill(os.getpid(), signal.SIGKILL)

    report = audit_env(Grid(again), 100, legal_actions=listed)
    assert report.ok, report
    assert report.checks[TAKEN].status == "passed"


def test_an_engine_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.3)
    here = os.getpid()

    def again() -> None:
        assert os.getpid() != here
        time.sleep(60)

    report = audit_env(Grid(again), 100, legal_actions=listed)
    assert "gave no answer in 0.3 s" in (report.checks[TAKEN].skipped or "")


def test_where_everything_is_legal_nothing_can_be_refused() -> None:
    class Open(Grid):
        def step(self, action: Any) -> Any:
            return 0, 0.0, False, False, {"legal": list(self.free)}

    report = audit_env(Open(), 100, legal_actions=listed)
    assert "in no state looked at" in (report.checks[TAKEN].skipped or "")


def test_workers_are_given_an_unlisted_action_where_another_environment_can_be_made() -> None:
    made = []

    def make() -> Any:
        backend = pufferlib.vector.Multiprocessing
        engine = partial(Duel, 1, illegal="raise")
        made.append(pufferlib.vector.make(engine, num_envs=1, num_workers=1, backend=backend))
        return made[-1]

    vecenv = make()
    try:
        report = audit_env(vecenv, steps=20, make=make)
        assert report.checks[TAKEN].status == "passed", report
        assert vecenv.processes[0].is_alive()
    finally:
        vecenv.close()


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


def uncleared(observation: dict[str, Any], buffer: Any) -> dict[str, Any]:
    """The observation with its list written into a buffer that keeps what it held."""
    count = int(observation["n"])
    buffer[:count] = observation["legal"][:count]
    return {**observation, "legal": buffer.copy()}


class Uncleared(Solo):
    """Writes into several buffers in turn, and shows the end of an episode as it likes."""

    buffers, at_the_end, too_small = 1, 0, 0

    def _seen(self) -> Any:
        if not hasattr(self, "kept"):
            self.kept = [np.zeros((DUEL_ROOM, 3), np.uint8) for _ in range(self.buffers)]
        observation, info = super()._seen()
        if self.match.over and self.at_the_end:
            observation["n"] = self.at_the_end
            observation["legal"][: self.at_the_end] = self.match.rng.integers(
                1, 3, (self.at_the_end, 3)
            )
        self.kept.append(self.kept.pop(0))
        observation = uncleared(observation, self.kept[0])
        return {**observation, "n": max(int(observation["n"]) - self.too_small, 0)}, info


@pytest.mark.parametrize("buffers", [1, 6])
@pytest.mark.parametrize("at_the_end", [0, 20])
def test_a_list_that_is_not_cleared_is_no_fault(buffers: int, at_the_end: int) -> None:
    env = Uncleared()
    env.buffers, env.at_the_end = buffers, at_the_end
    report = audit_env(env, 200, layout=KEYS)
    assert report.ok, report


def test_a_count_too_small_shows_though_lists_are_not_cleared() -> None:
    env = Uncleared()
    env.buffers, env.too_small = 2, 1
    assert list(audit_env(env, 300, layout=KEYS).findings) == ["E04"]
    # What lies behind the count is no evidence by itself.
    env.is_legal = None  # type: ignore[assignment]
    assert audit_env(env, 300, layout=KEYS).ok


class Seldom(Parallel):
    """Shows the mover alone; each agent has buffers of its own."""

    def __init__(self, buffers: int) -> None:
        super().__init__()
        self.kept = {
            agent: [np.zeros((DUEL_ROOM, 3), np.uint8) for _ in range(buffers)]
            for agent in self.possible_agents
        }

    def _seen(self) -> dict[str, Any]:
        mover = self.possible_agents[self.match.mover]
        kept = self.kept[mover]
        kept.append(kept.pop(0))
        return {mover: uncleared(super()._seen()[mover], kept[0])}


@pytest.mark.parametrize("buffers", [1, 2])
def test_lists_that_are_not_cleared_may_be_of_agents_who_are_seldom_shown(buffers: int) -> None:
    report = audit_env(Seldom(buffers), 300, layout=KEYS)
    assert report.ok, report
    assert report.checks[COUNT].cases >= 300


def test_what_lists_held_before_the_audit_is_no_fault() -> None:
    for env in (Uncleared(), Seldom(1)):
        audit_env(env, 40, layout=KEYS)
        report = audit_env(env, 100, layout=KEYS, seed=1)
        assert report.ok, report


# Honest, and unusual.


class Padded(Duel):
    """Pads lists with a constant."""

    def observe(self) -> None:
        super().observe()
        records = self.observations.view(self.dtype)[:, 0]
        behind = np.arange(DUEL_ROOM) >= records["n"][:, None]
        records["legal"][behind] = 255


class Scratch(Duel):
    """Writes all lists into one scratch struct, which is copied whole into each row."""

    def observe(self) -> None:
        super().observe()
        scratch = self.__dict__.setdefault("scratch", np.zeros((DUEL_ROOM, 3), np.uint8))
        for record in self.observations.view(self.dtype)[:, 0]:
            scratch[: record["n"]] = record["legal"][: record["n"]]
            record["legal"] = scratch


class Shuffled(Duel):
    """Lists what is legal in another order each time, whatever the seed."""

    def said(self, player: int, match: Match) -> Any:
        legal = super().said(player, match)
        return [legal[i] for i in np.random.default_rng().permutation(len(legal))]


class CountsWaiters(Duel):
    """Counts the no-op of whoever waits as illegal."""

    def step(self, actions: Any) -> Any:
        outcome = super().step(actions)
        self.illegal_actions += len(self.matches)
        return outcome


@pytest.mark.parametrize("protocol", [True, False])
@pytest.mark.parametrize("kind", [Padded, Scratch, Shuffled, CountsWaiters])
def test_honest_and_unusual_engines_give_no_finding(kind: Any, protocol: bool) -> None:
    report = audit_env(kind(4, protocol=protocol), steps=600)
    assert report.ok, report
    notes = [note for note in report.notes if "order" in note]
    assert bool(notes) == (kind is Shuffled)


# Nobody to move, and the end of an episode.


class Slow(Duel):
    """Nobody may move in the eight steps after each turn."""

    waits = 0

    def reset(self, seed: int | None = None) -> Any:
        self.waits = 0
        return super().reset(seed)

    def list_shown(self, row: int) -> Any:
        return [] if self.waits else super().list_shown(row)

    def step(self, actions: Any) -> Any:
        movers = [match.mover for match in self.matches]
        if self.waits:
            self.waits -= 1
            self.observe()
            return self.observations, self.rewards, self.terminals, self.truncations, []
        outcome = super().step(actions)
        if movers != [match.mover for match in self.matches]:
            self.waits = 8
            self.observe()
        return outcome


def test_states_in_which_nobody_moves_are_no_fault() -> None:
    report = audit_env(Slow(1, protocol=False), steps=600)
    assert report.ok, report
    assert report.checks[SOMEONE].status == "skipped"
    assert "to_move(row)" in (report.checks[SOMEONE].skipped or "")

    class Says(Slow):
        def to_move(self, row: int) -> bool:
            return not self.waits and super().to_move(row)

    report = audit_env(Says(1), steps=600)
    assert report.ok, report
    assert statuses(report)[SOMEONE] == statuses(report)[MOVER] == "passed"


def test_lists_that_stop_coming_are_found_and_to_move_is_named() -> None:
    report = audit_env(Duel(1, fault="list_zeroed", protocol=False), steps=100)
    assert list(report.findings) == ["E09"], report
    assert "from state 0 on no row has had a list" in report.findings["E09"].message
    assert "to_move(row)" in report.findings["E09"].message


def test_a_single_agent_may_have_to_wait_if_it_says_so() -> None:
    class Waits(Solo):
        """Every other state shows no list."""

        moves = 0

        def reset(self, **named: Any) -> Any:
            self.moves = 0
            return super().reset(**named)

        def _seen(self) -> Any:
            observation, info = super()._seen()
            if self.moves % 2:
                observation = {**observation, "n": 0, "legal": 0 * observation["legal"]}
            return observation, info

        def step(self, action: Any) -> Any:
            self.moves += 1
            if self.moves % 2:
                return super().step(action)
            observation, info = self._seen()
            return observation, 0.0, False, False, info

    report = audit_env(Waits(), 60, layout=KEYS)
    assert list(report.findings) == ["E09"], report
    assert "to_move(row) on the environment" in report.findings["E09"].message

    class Says(Waits):
        def to_move(self) -> bool:
            return self.moves % 2 == 0

    report = audit_env(Says(), 60, layout=KEYS)
    assert report.ok, report
    assert statuses(report)[MOVER] == "passed"


class ShowsTheEnd(Duel):
    """Shows each game's last state, and begins the next one in the step after it."""

    def step(self, actions: Any) -> Any:
        over = [match.over for match in self.matches]
        if any(over):
            self.terminals[:] = False
            pairs = zip(over, self.matches, strict=True)
            self.matches = [Match(self.rng) if ended else match for ended, match in pairs]
            self.observe()
            return self.observations, self.rewards, self.terminals, self.truncations, []
        for game, match in enumerate(self.matches):
            match.play(tuple(np.asarray(actions)[2 * game + match.mover].astype(int).tolist()))
            self.terminals[2 * game : 2 * game + 2] = match.over
        self.observe()
        return self.observations, self.rewards, self.terminals, self.truncations, []


@pytest.mark.parametrize("games", [1, 4])
def test_the_last_state_of_an_episode_needs_no_list(games: int) -> None:
    # is_legal is asked about lists only, and to_move says yes to a game that is over.
    report = audit_env(ShowsTheEnd(games), steps=600)
    assert report.ok, report


def test_the_first_state_of_an_episode_needs_one() -> None:
    class Idle(Bandit):
        """An episode is one step, so that each state but the first follows an end."""

        def to_move(self, row: int) -> bool:
            return True

    report = audit_env(Idle(16, empty=0.3), steps=500)
    assert list(report.findings) == ["E09"], report
    share = report.figures["share of states with an empty list"]
    assert report.findings["E09"].count == round(share * report.figures["states"])


# One fault, one code.


class Lists(Duel):
    """The game with lists of its own making; `change` is given what is legal."""

    def __init__(self, *given: Any, change: Any, **named: Any) -> None:
        self.change = change
        super().__init__(*given, **named)

    def said(self, player: int, match: Match) -> Any:
        return self.change(super().said(player, match), match)


def one_at_times(legal: Any, match: Match) -> Any:
    return [legal, [(5, 0, 0)], [(0, 0, 0)]][match.moves % 3]


def swapped(legal: Any, match: Match) -> Any:
    return [(p, b, a) if p in (1, 4) else (p, a, b) for p, a, b in legal]


def shifted(legal: Any, match: Match) -> Any:
    return [(p, a + 1, b) if p == 2 else (p, a, b) for p, a, b in legal]


def without_what_needs_no_unit(legal: Any, match: Match) -> Any:
    return [action for action in legal if action[0] not in (0, 5)]


def without_retreat_and_trade(legal: Any, match: Match) -> Any:
    return [action for action in legal if action[0] not in (3, 4)]


class Unasked(Lists):
    """Says who is to move, and no more."""

    is_legal = fork = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (partial(Unasked, fault="count_small", change=one_at_times), "E04"),
        (partial(Lists, change=swapped), "E02"),
        (partial(Lists, change=swapped, illegal="raise"), "E02"),
        (partial(Lists, change=swapped, protocol=False), "E02"),
        (partial(Lists, 1, change=swapped, protocol=False, illegal="raise"), "E02"),
        (partial(Lists, change=shifted), "E01"),
        (partial(Lists, change=shifted, protocol=False), "E01"),
        (partial(Lists, 1, change=shifted, protocol=False, illegal="raise"), "E01"),
        (partial(Lists, change=without_what_needs_no_unit), "E08"),
        (partial(Lists, change=without_retreat_and_trade), "E08"),
    ],
)
def test_one_fault_has_one_code(make: Any, code: str) -> None:
    report = audit_env(make(), steps=800)
    assert list(report.findings) == [code], report


def end_turn_twice_at_the_end(legal: Any, match: Match) -> Any:
    return [*legal[1:], (0, 0, 0), (0, 0, 0)] if legal else []


def end_turn_first_and_last_at_times(legal: Any, match: Match) -> Any:
    return [*legal, (0, 0, 0)] if match.moves % 2 else legal


@pytest.mark.parametrize("change", [end_turn_twice_at_the_end, end_turn_first_and_last_at_times])
def test_the_tuple_of_zeros_twice_is_no_count(change: Any) -> None:
    report = audit_env(Lists(change=change), steps=300)
    assert list(report.findings) == ["E03"], report
    message = report.findings["E03"].message
    assert ("may be one too large" in message) == (change is end_turn_twice_at_the_end)


def test_an_engine_that_truncates_whole_floats_is_sound() -> None:
    class Truncates(Duel):
        def step(self, actions: Any) -> Any:
            return super().step(np.trunc(actions))

    report = audit_env(Truncates(2), steps=300)
    assert report.ok, report
    assert statuses(report)[FLOATS] == "passed"


def test_the_example_of_e14_is_true() -> None:
    of_23 = np.float32(1) / np.float32(23)
    scaled = of_23 * np.float32(2) - np.float32(1)
    back = (scaled + np.float32(1)) / np.float32(2) * np.float32(23)
    assert 0.9999997 < back < 0.9999998
    assert "1 becomes 0.9999998" in CODES["E14"].example


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


@pytest.mark.parametrize("said", [{"console": "gba"}, True, {"observation_dtype": np.uint8}])
@pytest.mark.parametrize("vector", [False, True])
def test_a_native_environment_may_say_that_it_is_emulated(said: Any, vector: bool) -> None:
    class Said(Duel):
        emulated = said

    reports = []
    for kind in (Duel, Said):
        report = audit_env(serial(kind, envs=2) if vector else kind(), 400)
        assert report.ok
        reports.append(
            {n: f for n, f in report.figures.items() if not re.search("second|speed", n)}
        )
    assert reports[0] == reports[1]


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
    wide = fp.ActionSpec.from_nvec([2, 2, 2, 2])
    with pytest.raises(ValueError, match=r"^two specs disagree: spec= is .*the environment's"):
        audit_env(Duel(), spec=wide)
    bare = Duel()
    bare.action_spec = None
    bare.legal_layout = fp.LegalLayout.from_dtype(bare.legal_layout.dtype, "n", "legal")
    with pytest.raises(ValueError, match="3 values, the spec's 4"):
        audit_env(bare, spec=wide)


@pytest.mark.parametrize("layout", [list(KEYS), KEYS])
def test_the_keys_of_a_layout_are_any_two(layout: Any) -> None:
    assert audit_env(Solo(), 20, layout=layout).ok
    assert audit_env(emulated_solo(), 20, layout=layout).ok


@pytest.mark.parametrize("make", [Solo, emulated_solo])
def test_keys_that_are_wrong_are_named(make: Any) -> None:
    with pytest.raises(KeyError, match=r"legal_list.*units"):
        audit_env(make(), 20, layout=("n", "legal_list"))
    for layout in ("legal", ("n",), ("n", "legal", "units"), (0, 1)):
        with pytest.raises(ValueError, match=r"the two keys \(count, actions\)"):
            audit_env(make(), 20, layout=layout)  # type: ignore[arg-type]


def test_keys_need_a_dict_observation() -> None:
    with pytest.raises(TypeError, match="an observation here is a int, without keys"):
        audit_env(Grid(), 20, layout=KEYS)


class RowLeftOut(Solo):
    def to_move(self) -> bool:
        assert not self.match.over  # nobody is asked about a game that is over
        return True

    def is_legal(self, action: Any) -> bool:  # type: ignore[override]
        return super().is_legal(0, action)


def test_one_agent_may_leave_the_row_out() -> None:
    def emulated(buf: Any = None, seed: int = 0) -> Any:
        return pufferlib.emulation.GymnasiumPufferEnv(env_creator=RowLeftOut, buf=buf, seed=seed)

    for env in (RowLeftOut(), emulated(), serial(emulated, envs=3)):
        report = audit_env(env, 100, layout=KEYS)
        assert report.ok, report
        for check in (MOVER, LISTED_LEGAL, UNLISTED):
            assert statuses(report)[check] == "passed"


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("to_move", lambda: True, r"Duel.to_move takes \(\); it is called as to_move\(row\)$"),
        ("is_legal", lambda action: True, r"takes \(action\); .* is_legal\(row, action\)$"),
        ("fork", lambda depth: None, r"takes \(depth\); it is called as fork\(\)$"),
    ],
)
def test_methods_with_other_arguments_are_refused_at_once(
    name: str, method: Any, words: str
) -> None:
    env = Duel(1)
    setattr(env, name, method)
    with pytest.raises(TypeError, match=words):
        audit_env(env, 20)


def test_of_one_agent_both_ways_are_named() -> None:
    class Odd(Solo):
        def is_legal(self, row: int, action: Any, really: bool) -> bool:  # type: ignore[override]
            return True

    words = r"takes \(row.*; it is called as is_legal\(row, action\), or is_legal\(action\)"
    with pytest.raises(TypeError, match=words):
        audit_env(Odd(), 20, layout=KEYS)


class Forking(Parallel):
    """Insists on agents' names."""

    def to_move(self, row: str) -> bool:
        assert row in self.possible_agents
        return super().to_move(row)

    def fork(self) -> Forking:
        return copy.deepcopy(self)


class OnlyForking(Forking):
    is_legal = None  # type: ignore[assignment]


class Forgetful(Forking):
    """Lists nobody's retreats."""

    def _seen(self) -> Any:
        seen = super()._seen()
        for agent, observation in seen.items():
            legal = [a for a in observation["legal"][: observation["n"]].tolist() if a[0] != 3]
            padded = np.zeros((DUEL_ROOM, 3), np.uint8)
            padded[: len(legal)] = np.array(legal).reshape(-1, 3)
            seen[agent] = {**observation, "n": len(legal), "legal": padded}
        return seen


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("kind", [Forking, OnlyForking, Forgetful])
def test_pettingzoo_under_emulation_is_asked_by_its_agents_names(kind: Any, vector: bool) -> None:
    def emulated(buf: Any = None, seed: int = 0) -> Any:
        return pufferlib.emulation.PettingZooPufferEnv(env_creator=kind, buf=buf, seed=seed)

    env = serial(emulated, envs=2) if vector else emulated()
    report = audit_env(env, 400, layout=KEYS)
    assert list(report.findings) == (["E08"] if kind is Forgetful else []), report
    for check in (MOVER, WAITER, LISTED_LEGAL):
        assert statuses(report)[check] == "passed"


def test_the_game_itself_is_sound() -> None:
    rng = np.random.default_rng(1)
    for number in range(20):
        match = Match(rng)
        for _ in range(3 * number):
            if match.over:
                break
            for player in (0, 1):
                assert match.legal(player) == [a for a in EVERY if match.is_legal(player, a)]
            legal = match.legal(match.mover)
            match.play(legal[rng.integers(len(legal))])
    match = Match(np.random.default_rng(0))
    seen = seen_by(match, 0)
    assert seen["n"] == len(match.legal(0)) <= DUEL_ROOM
    assert not match.legal(1)
