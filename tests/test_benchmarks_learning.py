"""The learning part of the comparison: its constructed task, its runs, and its arithmetic."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import coupled
import game_ppo
import learning
from learning import COUPLED, FIXED, Result, Run

from tcg_flatpolicy.app.evaluate import play, wilson_interval
from tcg_flatpolicy.games.essence_wars import EssenceWars

EVERY = [(p, i, j) for p in range(2) for i in range(6) for j in range(6)]
SHORT = Run(COUPLED, "flat", seed=1, steps=4096, eval_games=0)


# The coupled task


def by_hand(env: Any) -> list[dict[tuple[int, int, int], float]]:
    """What each legal tuple pays, of each state, from kinds and legality matrix alone."""
    told = []
    for record in env.observations.view(env.observation_dtype)[:, 0].copy():
        ally, enemy = record["kind"]
        pays = {(0, 0, 0): coupled.PASS_PAY}
        for i, j in np.argwhere(record["may_attack"]).tolist():
            pays[1, i, j] = float(coupled.PAY[ally[i], enemy[j]])
        told.append(pays)
    return told


def test_what_every_tuple_does_in_the_coupled_task() -> None:
    env = coupled.CoupledLegality(40, illegal="noop")
    env.reset(3)
    states = by_hand(env)
    legal = env.legal_layout.read(torch.as_tensor(env.observations)).to_lists()
    for pays, listed in zip(states, legal, strict=True):
        assert sorted(pays) == sorted(listed)
        assert len(pays) == coupled.LEGAL
    for action in EVERY:
        env.reset(3)
        before = env.illegal_actions
        *_, infos = env.step(np.tile(action, (40, 1)))
        expected = [pays.get(action, coupled.PASS_PAY) for pays in states]
        assert env.rewards == pytest.approx(np.array(expected))
        assert env.terminals.all()
        illegal = sum(action not in pays for pays in states)
        assert env.illegal_actions - before == illegal == infos[0]["illegal"]
        assert infos[0]["got"] == pytest.approx(sum(expected))
        assert infos[0]["best"] == pytest.approx(sum(max(pays.values()) for pays in states))


def test_every_value_is_legal_by_itself_and_most_pairs_are_not() -> None:
    env = coupled.CoupledLegality(30)
    env.reset(1)
    for mask in env.legal_layout.read(torch.as_tensor(env.observations)).head_masks([2, 6, 6]):
        assert mask.all()
    may = env.observations.view(env.observation_dtype)[:, 0]["may_attack"]
    assert (may.sum(axis=1) == 1).all()
    assert (may.sum(axis=2) == 1).all()


def test_expected_values_of_the_coupled_task() -> None:
    env = coupled.CoupledLegality(100_000)
    env.reset(5)
    for values, expected in (
        (env.pays.max(axis=1), coupled.expected_best()),
        (env.pays.mean(axis=1), coupled.expected_uniform()),
    ):
        assert values.mean() == pytest.approx(expected, abs=4 * values.std() / 100_000**0.5)


def test_a_payment_is_no_sum_of_its_kinds() -> None:
    rows, columns = np.unravel_index(np.argsort(coupled.PAY.ravel())[-4:], (4, 4))
    assert len(set(rows)) == len(set(columns)) == 4
    table = coupled.PAY - coupled.PAY.mean()
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True)
    assert (rest**2).sum() > 0.98 * (table**2).sum()


def test_illegal_actions_are_replaced_by_uniform_legal_ones() -> None:
    env = coupled.CoupledLegality(20_000, illegal="random")
    env.reset(2)
    expected, spread = env.pays.mean(), env.pays.std()
    env.step(np.tile((0, 3, 3), (20_000, 1)))  # to pass has 0 in its unused slots
    assert env.illegal_actions == 20_000
    assert env.rewards.mean() == pytest.approx(expected, abs=4 * spread / 20_000**0.5)


@pytest.mark.parametrize("action", [(1, 0, 6), (2, 0, 0), (-1, 0, 0), (0, 0, 1)])
def test_an_illegal_action_raises_by_default(action: tuple[int, int, int]) -> None:
    env = coupled.CoupledLegality(2)
    env.reset(0)
    with pytest.raises(ValueError, match=r"state 1: .* is not legal; legal are \(0, 0, 0\), "):
        env.step(np.array([(0, 0, 0), action]))


def test_the_coupled_task_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="num_agents must be at least 1, got 0"):
        coupled.CoupledLegality(0)
    with pytest.raises(ValueError, match="illegal='ignore' does not exist"):
        coupled.CoupledLegality(1, illegal="ignore")  # type: ignore[arg-type]
    env = coupled.CoupledLegality(2)
    env.reset(0)
    with pytest.raises(ValueError, match=r"must be \(2, 3\), got \(3,\)"):
        env.step(np.zeros(3, dtype=int))


# Runs


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": "chess"}, "task='chess'"),
        ({"head": "round"}, "head='round'"),
        ({"head": game_ppo.NAME}, "plays the game only"),
        ({"illegal": "raise"}, "illegal='raise'"),
        ({"steps": 100}, "100 is less than one rollout"),
        ({"eval_games": -1}, "must not be negative"),
        ({"task": FIXED, "steps": 10**6, "eval_games": 1009}, "cannot be shared equally"),
        ({"task": FIXED, "head": game_ppo.NAME, "steps": 100}, "less than one rollout"),
    ],
)
def test_a_run_refuses_what_makes_no_sense(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(SHORT, **changes)


def test_a_run_is_counted_and_written(tmp_path: Path) -> None:
    run = replace(SHORT, head="masks per head", eval_games=1)
    learning.run_one(run, tmp_path)
    again, told, curve = learning.read_result(tmp_path)
    assert again == run
    assert curve["steps"].tolist() == [2048, 4096]
    assert curve["actions"].tolist() == [2048, 2048]
    assert (np.diff(curve["process_seconds"]) > 0).all()
    # To pass is always legal, though listed as drawn with 1 chance in 36; an attack with 1 in 6.
    share = 1 - (1 + 1 / 6) / 2
    assert told["training"]["illegal"] == curve["illegal"].sum()
    assert curve["illegal"][0] / 2048 == pytest.approx(share, abs=0.04)  # before any update
    initial = told["initial"]
    assert initial["draws"] >= 50_000
    assert initial["illegal"] / initial["draws"] == pytest.approx(share, abs=0.02)
    not_listed = 1 - (1 / 36 + 1 / 6) / 2
    assert initial["not_listed"] / initial["draws"] == pytest.approx(not_listed, abs=0.02)
    # Passes half of the time, attacks a twelfth, and plays uniformly in the rest.
    uniform = coupled.expected_uniform()
    attack = (7 * uniform - coupled.PASS_PAY) / 6
    expected = coupled.PASS_PAY / 2 + attack / 12 + uniform * 5 / 12
    share_got = curve["got"][0] / curve["best"][0]
    assert share_got == pytest.approx(expected / coupled.expected_best(), abs=0.04)
    for how in ("sampling", "mode"):
        assert told["evaluation"][how]["actions"] == 20_000
        assert 0.3 < told["evaluation"][how]["rate"] < 0.5
    assert told["steps_per_process_second"] > 0
    assert told["provenance"]["versions"]
    assert not torch.is_autocast_enabled("cpu")


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    said: list[str] = []
    first = learning.run_all([SHORT], tmp_path, 1, said.append)
    assert [line.split()[0] for line in said] == ["started", "finished"]
    assert "(1 of 1)" in said[1]
    said.clear()
    written = (tmp_path / SHORT.name / "result.json").stat().st_mtime_ns
    learning.run_one(SHORT, tmp_path / SHORT.name)
    second = learning.run_all([SHORT], tmp_path, 1, said.append)
    assert said == ["1 of 1 runs are already finished"]
    assert (tmp_path / SHORT.name / "result.json").stat().st_mtime_ns == written
    assert first[0].told == second[0].told
    assert not (tmp_path / SHORT.name / "errors.txt").exists()


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    assert not learning.claim(SHORT, tmp_path / SHORT.name)
    other = replace(SHORT, steps=8192)
    assert other.name == SHORT.name
    complaint = "holds a run with steps=4096, not 8192; name another folder with --folder"
    with pytest.raises(ValueError, match=complaint):
        learning.run_one(other, tmp_path / SHORT.name)
    with pytest.raises(ValueError, match=complaint):
        learning.run_all([other], tmp_path, 1)
    with pytest.raises(ValueError, match="two runs are named"):
        learning.run_all([SHORT, SHORT], tmp_path, 1)
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        learning.run_all([SHORT], tmp_path, 0)


def test_a_failing_run_is_told_with_its_error(tmp_path: Path) -> None:
    (tmp_path / SHORT.name / "curve.csv").mkdir(parents=True)
    with pytest.raises(RuntimeError, match=r"failed, exit status 1:\n(.|\n)*Error: "):
        learning.run_all([SHORT], tmp_path, 1, lambda line: None)


def test_an_interruption_stops_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = learning._start

    def remember(run: Run, folder: Path) -> subprocess.Popen[bytes]:
        started.append(start(run, folder))
        return started[-1]

    def interrupt(line: str) -> None:
        if len(started) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(learning, "_start", remember)
    with pytest.raises(KeyboardInterrupt):
        learning.run_all([SHORT, replace(SHORT, seed=2)], tmp_path, 2, interrupt)
    assert [process.poll() is None for process in started] == [False, False]


@pytest.mark.parametrize("mode", [False, True])
def test_the_game_s_own_ppo_plays_our_environment(mode: bool) -> None:
    trainer = game_ppo.make_trainer(
        "artificer_tokens", "broodmother_pack", 1, game_ppo.ROLLOUT, 3e-4, 0.02
    )
    env = EssenceWars(10, illegal="raise")
    env.reset(1)
    trainer.obs_normalizer.update(env.observations.view(env.observation_dtype)[:, 0]["state"])
    player = game_ppo.Player(trainer, env.legal_layout, mode)
    rates = [play(player, env, 10, seed=4) for _ in range(2)]
    assert rates[0].games == 10
    assert rates[0].wins == rates[1].wins
    with pytest.raises(ValueError, match="take 'random' for both or for none"):
        game_ppo.make_trainer("random", "vex_piercing", 1, game_ppo.ROLLOUT, 3e-4, 0.02)


# Tuning and summaries, on made-up curves


def made_up(
    run: Run, wins: list[float], games: float = 100, seconds: float = 2.0, **told: Any
) -> Result:
    """Rollouts of 10,000 steps and so many seconds, in which so many games were won."""
    n = len(wins)
    score = {"wins": np.array(wins, float), "games": np.full(n, float(games))}
    if run.task == COUPLED:
        score = {"got": score["wins"], "best": score["games"]}
    curve = {
        "steps": 10_000.0 * np.arange(1, n + 1),
        "process_seconds": seconds * np.arange(1, n + 1),
        "wall_seconds": seconds * np.arange(1, n + 1),
        **score,
        "illegal": np.arange(n, dtype=float) * 100,
        "actions": np.full(n, 10_000.0),
        "entropy": np.zeros(n),
    }
    return Result(run, {"parameters": 7, **told}, curve)


def test_the_grid_is_the_same_for_each_head_and_the_best_end_is_picked() -> None:
    runs = learning.tuning_runs(FIXED, ["flat", "fixed numbers"], 100_000)
    assert len(runs) == 8
    assert {run.seed for run in runs} == {101}
    assert {run.eval_games for run in runs} == {0}
    grids = [{(r.learning_rate, r.ent_coef) for r in half} for half in (runs[:4], runs[4:])]
    assert grids[0] == grids[1] == {(1e-3, 0.003), (1e-3, 0.01), (2e-3, 0.003), (2e-3, 0.01)}
    # Only the last two of ten rollouts count.
    curves = [[90] * 8 + [10, 10], [10] * 8 + [30, 50], [10] * 8 + [60, 10], [0] * 10]
    results = [made_up(run, wins) for run, wins in zip(runs, curves + curves[::-1], strict=True)]
    assert learning.pick(results) == {
        (FIXED, "flat"): runs[1],
        (FIXED, "fixed numbers"): runs[6],
    }


def test_spreads() -> None:
    told = learning.spread([0.4, 0.5, 0.6])
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (told.mean, told.low, told.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert math.isnan(learning.spread([0.4]).low)
    # From a table of the distribution.
    known = {1: 12.706, 10: 2.228, 11: 2.201, 20: 2.086, 30: 2.042, 120: 1.980}
    for freedom, quantile in known.items():
        assert learning.student_t(freedom) == pytest.approx(quantile, abs=0.0006)
    with pytest.raises(ValueError, match="freedom must be at least 1, got 0"):
        learning.student_t(0)


def test_windows() -> None:
    curve = made_up(replace(SHORT, task=FIXED, steps=10**5), [0, 10, 20, 30, 40, 50, 60]).curve
    assert learning.rate_in_window(FIXED, curve, 60_000, 50_000) == pytest.approx(0.3)
    assert learning.rate_in_window(FIXED, curve, 60_000, 5_000) == pytest.approx(0.5)
    assert math.isnan(learning.rate_in_window(FIXED, curve, 5_000, 5_000))
    curve["games"][0] = 0
    steps, seconds, rate = learning.moving_rate(FIXED, curve)
    assert steps.tolist() == [20_000, 30_000, 40_000, 50_000, 60_000, 70_000]
    assert seconds.tolist() == [4, 6, 8, 10, 12, 14]
    assert rate == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.4])


def test_a_summary() -> None:
    def result(head: str, seed: int, wins: int, seconds: float) -> Result:
        run = Run(FIXED, head, seed, steps=100_000, eval_games=100)
        one = {"games": 100, "wins": wins, "rate": wins / 100, "actions": 1000, "illegal": seed}
        evaluation = {"sampling": one, "mode": {**one, "wins": 0, "rate": 0.0}}
        initial = {"draws": 1000, "not_listed": 200 * seed, "illegal": 100 * seed}
        rollouts = [float(wins + n) for n in range(10)]
        return made_up(run, rollouts, 100, seconds, evaluation=evaluation, initial=initial)

    results = [
        result("flat", 1, 40, 2.0),
        result("flat", 2, 60, 2.0),
        result("masks per head", 1, 20, 1.0),
    ]
    told = learning.summaries(results)
    assert list(told) == [FIXED]
    flat, masks = told[FIXED]["flat"], told[FIXED]["masks per head"]
    assert flat.seeds == [1, 2]
    assert flat.final["sampling"].mean == pytest.approx(0.5)
    assert flat.final["mode"].mean == 0
    assert flat.wilson["sampling"] == wilson_interval(100, 200)
    assert flat.steps_per_process_second.mean == pytest.approx(5000)
    # The fastest took 10 seconds, in which the other did five rollouts.
    assert flat.equal_seconds == masks.equal_seconds == 10
    assert flat.at_equal_seconds.values == pytest.approx([0.42, 0.62])
    assert masks.at_equal_seconds.values == pytest.approx([0.27])
    assert flat.not_listed_initial == pytest.approx(0.3)
    assert flat.illegal_initial == pytest.approx(0.15)
    assert flat.illegal_final["sampling"] == pytest.approx(0.0015)
    assert flat.illegal_training == pytest.approx(0.045)
    # Ten rollouts are in ten of the twenty bins, each with the middle of a rollout at its start.
    assert flat.illegal_share.x == pytest.approx([5_000 + 10_000 * n + 2_500 for n in range(10)])
    assert flat.illegal_share.mean == pytest.approx([0.01 * n for n in range(10)])
    for curve, ends in ((flat.over_steps, (10_000, 100_000)), (flat.over_seconds, (2, 20))):
        assert (curve.x[0], curve.x[-1]) == pytest.approx(ends)
        assert (curve.low[0], curve.mean[0], curve.high[0]) == pytest.approx((0.4, 0.5, 0.6))
        assert (curve.low[-1], curve.mean[-1], curve.high[-1]) == pytest.approx((0.47, 0.57, 0.67))
    with pytest.raises(ValueError, match="two runs with seed=1; give each run once"):
        learning.summaries([results[0], results[0]])
    other = results[1]._replace(run=replace(results[1].run, ent_coef=0.5))
    with pytest.raises(ValueError, match=r"runs with ent_coef=0.003 and 0.5"):
        learning.summaries([results[0], other])


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fixed = made_up(Run(FIXED, "flat", 1, 100_000), [10.0] * 10)
    bandit = made_up(replace(SHORT, head="masks per head", illegal="noop"), [10.0] * 10)
    paths = learning.draw(learning.summaries([fixed, bandit]), tmp_path)
    assert [path.name for path in paths] == ["win_rate.png", "coupled.png", "illegal.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_what_a_summary_says_can_be_written() -> None:
    from dataclasses import asdict

    told = learning.summaries([made_up(SHORT, [10.0] * 10)])[COUPLED]["flat"]
    assert json.loads(json.dumps(asdict(told)))["label"] == "flat"
