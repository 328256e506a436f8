"""Training runs of the heads that are compared: done side by side, found again, summed up, drawn.

A run is trained by PufferLib's own trainer (or by the game's own PPO tool) in a process of its own,
on one thread, and leaves ``run.json``, ``curve.csv`` and ``result.json`` in a folder of its own. As
a program this file does one such run, which is how `run_all` starts it:

    python benchmarks/learning.py --folder FOLDER_WITH_A_run.json
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import baselines
import coupled
import game_ppo
import measure
import numpy as np
import numpy.typing as npt
import torch
from baselines import COLOURS

import tcg_flatpolicy as fp
from tcg_flatpolicy.app.evaluate import WinRate, play, wilson_interval
from tcg_flatpolicy.app.run_folder import write_csv, write_json
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.games.essence_wars import EssenceWars, EssenceWarsEncoder
from tcg_flatpolicy.provenance import write_whole
from tcg_flatpolicy.puffer import Greedy

FIXED, RANDOM, COUPLED = "fixed decks", "random decks", "coupled"
TASKS = (FIXED, RANDOM, COUPLED)
DECKS = {FIXED: ("artificer_tokens", "broodmother_pack"), RANDOM: ("random", "random")}
GAMES = 256
"""Played at the same time while training."""

EVAL_SEED = 1_000_000
"""Added to a run's seed: other games and states than those trained on."""
EVAL_STATES = 20_000
"""States of the coupled task in each final evaluation."""
INITIAL_DRAWS = 51_200
"""Draws of an untrained policy, to say how many are illegal."""

TUNING_SEED = 101
"""Used for tuning only."""
TUNING_RATES = (1e-3, 2e-3)
TUNING_ENTROPIES = (0.003, 0.01)

WINDOW_STEPS = 50_000
"""Environment steps whose games count for the win rate at a time."""
WINDOW_ROLLOUTS = 5
"""Rollouts of the moving window in which curves are smoothed."""
BINS = 20
GRID = 200

Floats = npt.NDArray[np.float64]
Curve = dict[str, Floats]
"""The columns of a curve.csv, one number a rollout."""


@dataclass(frozen=True)
class Run:
    """One training run, all that it depends on.

    Raises:
        ValueError: a task, head or treatment of illegal actions that does not exist, less than one
            rollout, or games that cannot be shared equally by 10 to 250 slots.
    """

    task: str
    """One of `TASKS`."""
    head: str
    """A name in ``baselines.HEADS``, or ``game_ppo.NAME``."""
    seed: int
    steps: int
    """Environment steps; as many whole rollouts as fit are trained."""
    learning_rate: float = Settings.learning_rate
    ent_coef: float = Settings.ent_coef
    illegal: Literal["random", "noop"] = "random"
    """What the environment plays in the place of an illegal action."""
    eval_games: int = 2000
    """Games of each final evaluation (of the coupled task `EVAL_STATES` instead); 0 for none, and
    then the illegal draws of the untrained policy are not counted either."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} does not exist; take one of {TASKS}")
        heads = [*baselines.HEADS, game_ppo.NAME]
        if self.head not in heads:
            raise ValueError(f"head={self.head!r} does not exist; take one of {heads}")
        if self.head == game_ppo.NAME and self.task == COUPLED:
            raise ValueError(f"head={self.head!r} plays the game only, not task={self.task!r}")
        if self.illegal not in ("random", "noop"):
            raise ValueError(f"illegal={self.illegal!r} does not exist; take 'random' or 'noop'")
        if self.head == game_ppo.NAME and self.steps < game_ppo.ROLLOUT:
            raise ValueError(
                f"steps={self.steps} is less than one rollout of {self.head}, {game_ppo.ROLLOUT}"
            )
        rollout = GAMES * self.settings.bptt_horizon
        if self.steps < rollout:
            raise ValueError(f"steps={self.steps} is less than one rollout, {rollout}")
        if self.eval_games < 0:
            raise ValueError(f"eval_games must not be negative, got {self.eval_games}")
        if self.task != COUPLED and self.eval_games and self.slots < min(self.eval_games, 10):
            raise ValueError(
                f"eval_games={self.eval_games} cannot be shared equally by 10 to 250 slots; take a "
                f"number such as {max(10, round(self.eval_games, -2))}"
            )

    @property
    def settings(self) -> Settings:
        """Of the network and the trainer; the library's own for the game."""
        small: dict[str, Any] = {}
        if self.task == COUPLED:
            small = {
                "bptt_horizon": 8,
                "minibatch_size": 512,
                "hidden_size": 128,
                "entity_size": 64,
            }
        return Settings(
            seed=self.seed,
            total_steps=self.steps,
            learning_rate=self.learning_rate,
            ent_coef=self.ent_coef,
            **small,
        )

    @property
    def slots(self) -> int:
        """Games side by side in an evaluation."""
        return next(n for n in range(min(self.eval_games, 250), 0, -1) if self.eval_games % n == 0)

    @property
    def label(self) -> str:
        """What tables and pictures call it: the head, and how illegal actions were treated."""
        return self.head if self.illegal == "random" else f"{self.head}, no-op"

    @property
    def name(self) -> str:
        """Of its folder: all that sets it apart from other runs of a comparison."""
        words = f"{self.task} {self.label} seed {self.seed}"
        words += f" rate {self.learning_rate:g} entropy {self.ent_coef:g}"
        return re.sub(r"[^\w.-]+", "-", words)


class Result(NamedTuple):
    """What a finished run left."""

    run: Run
    told: dict[str, Any]
    """The content of its result.json."""
    curve: Curve


def game_ppo_run(task: str, seed: int, steps: int, eval_games: int) -> Run:
    """A run of the game's own PPO tool, with the hyperparameters that it ships with."""
    rate, entropy = game_ppo.SHIPPED.learning_rate, game_ppo.SHIPPED.ent_coef
    return Run(task, game_ppo.NAME, seed, steps, rate, entropy, eval_games=eval_games)


# One run


def run_one(run: Run, folder: Path) -> None:
    """Trains as the run says, and leaves run.json, curve.csv and, last, result.json in the folder.

    A finished run is not repeated; one that was cut short starts from its beginning. It sets torch
    to one thread.

    Raises:
        ValueError: the folder holds a run with other fields.
    """
    if claim(run, folder):
        return
    torch.set_num_threads(1)
    recorder = _Recorder(folder)
    if run.head == game_ppo.NAME:
        told = _train_game_ppo(run, recorder)
    else:
        told = _train_head(run, recorder)
    recorder.write()
    curve = {name: np.array([row[name] for row in recorder.rows]) for name in recorder.rows[0]}
    steps, seconds = int(curve["steps"][-1]), float(curve["process_seconds"][-1])
    write_json(
        folder / "result.json",
        {
            "run": asdict(run),
            "steps": steps,
            "process_seconds": seconds,
            "wall_seconds": float(curve["wall_seconds"][-1]),
            "steps_per_process_second": steps / seconds,
            "training": {
                "actions": int(curve["actions"].sum()),
                "illegal": int(curve["illegal"].sum()),
            },
            **told,
            "provenance": measure.provenance(),
        },
    )


def claim(run: Run, folder: Path) -> bool:
    """Takes a folder for a run.

    Returns:
        Whether the run is already finished there.

    Raises:
        ValueError: the folder holds a run with other fields.
    """
    path = folder / "run.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(run))
        return False
    held = json.loads(path.read_text())
    for field in fields(Run):
        ours = getattr(run, field.name)
        if held.get(field.name) != ours:
            raise ValueError(
                f"{folder} holds a run with {field.name}={held.get(field.name)!r}, not {ours!r}; "
                "name another folder with --folder"
            )
    return (folder / "result.json").exists()


class _Recorder:
    """The rows of a curve, with the seconds of training alone; writes them every few seconds."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "curve.csv"
        self.path.unlink(missing_ok=True)
        self.rows: list[dict[str, float]] = []
        self._process = self._wall = 0.0
        self._begin: tuple[float, float] | None = None
        self._written = time.monotonic()
        self._parent = os.getppid()

    def go(self) -> None:
        """Training starts, or goes on."""
        self._begin = time.process_time(), time.perf_counter()

    def pause(self) -> None:
        """Training stops, or something else comes in between."""
        assert self._begin is not None
        self._process += time.process_time() - self._begin[0]
        self._wall += time.perf_counter() - self._begin[1]
        self._begin = None

    def add(self, **row: float) -> None:
        """A rollout's row; while paused."""
        steps = {"steps": row.pop("steps")}
        seconds = {"process_seconds": self._process, "wall_seconds": self._wall}
        self.rows.append({**steps, **seconds, **row})
        if time.monotonic() - self._written > 2:
            self.write()
        self.stop_if_orphaned()

    def write(self) -> None:
        write_csv(self.path, self.rows)
        self._written = time.monotonic()

    def stop_if_orphaned(self) -> bool:
        """Ends the process if the one that started it is gone; else False, for play's stopped."""
        if os.getppid() != self._parent:
            raise SystemExit("the process that started this run is gone")
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the trainer's dashboard, and without torch's word on autocast in float32."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "In CPU autocast|CUDA is not available", UserWarning)
        yield


class Game(EssenceWars):
    """The game, where what stands in a slot that the primary does not use is ignored.

    Engines do so, and heads that draw each value by itself could hardly end a turn otherwise.
    """

    def step(self, actions: npt.NDArray[Any]) -> Any:
        return super().step(baselines.ignore_unused(self.action_spec, np.asarray(actions)))


class CoupledGame(coupled.CoupledLegality):
    """The same of the task where legality couples the slots."""

    def step(self, actions: npt.NDArray[Any]) -> Any:
        return super().step(baselines.ignore_unused(self.action_spec, np.asarray(actions)))


def make_env(run: Run, slots: int, illegal: str, seed: int) -> Any:
    """The run's environment, with as many games or states side by side."""
    if run.task == COUPLED:
        return CoupledGame(slots, illegal=illegal, seed=seed)  # type: ignore[arg-type]
    return Game(slots, *DECKS[run.task], illegal=illegal, seed=seed)  # type: ignore[arg-type]


def make_policy(run: Run, env: Any) -> fp.Policy:
    """The run's policy, untrained, for an environment of its task."""
    settings = run.settings
    kind = coupled.CoupledEncoder if run.task == COUPLED else EssenceWarsEncoder
    encoder = kind(env.legal_layout, settings.hidden_size, settings.entity_size)
    return fp.Policy(
        env, encoder=encoder, head=baselines.HEADS[run.head], width=settings.head_width
    )


def _train_head(run: Run, recorder: _Recorder) -> dict[str, Any]:
    from pufferlib import vector

    # Imported here: it takes SIGINT for itself, and would end the program at once.
    from pufferlib.pufferl import PuffeRL

    settings = run.settings
    torch.manual_seed(run.seed)
    kwargs: dict[str, Any] = {"num_agents": GAMES, "illegal": run.illegal}
    kind: Any = CoupledGame
    if run.task != COUPLED:
        deck1, deck2 = DECKS[run.task]
        kwargs = {"num_games": GAMES, "deck1": deck1, "deck2": deck2}
        kwargs["illegal"] = run.illegal
        kind = Game
    vecenv = vector.make(kind, env_kwargs=kwargs, backend=vector.Serial, num_envs=1, seed=run.seed)
    env = vecenv.driver_env
    policy = make_policy(run, env)
    initial = initial_illegal(run, policy) if run.eval_games else None

    names = ("got", "best") if run.task == COUPLED else ("win",)
    with tempfile.TemporaryDirectory() as scratch:
        with quiet():
            trainer = PuffeRL(settings.trainer_config(vecenv, "cpu", Path(scratch)), vecenv, policy)
        try:
            while trainer.epoch < trainer.total_epochs:
                # The trainer empties its stats when it logs, which is not after every rollout.
                begin = {name: len(trainer.stats.get(name, ())) for name in names}
                illegal, steps = env.illegal_actions, trainer.global_step
                with quiet():
                    recorder.go()
                    trainer.evaluate()
                    seen = {n: trainer.stats.get(n, [])[begin[n] :] for n in names}
                    trainer.train()
                    recorder.pause()
                scores = {name: float(np.sum(values)) for name, values in seen.items()}
                if run.task != COUPLED:
                    scores = {"games": len(seen["win"]), "wins": scores["win"]}
                recorder.add(
                    steps=trainer.global_step,
                    **scores,
                    illegal=env.illegal_actions - illegal,
                    actions=trainer.global_step - steps,
                    # As of its last log, which may be that of an earlier rollout.
                    entropy=trainer.losses.get("entropy", math.nan),
                )
        finally:  # or its thread would keep the process alive
            trainer.utilization.stop()
            vecenv.close()
    torch.set_autocast_enabled("cpu", False)  # the trainer leaves it on

    told: dict[str, Any] = {"parameters": sum(p.numel() for p in policy.parameters())}
    if not run.eval_games:
        return told
    told["initial"] = initial
    if run.task == COUPLED:
        told["evaluation"] = {
            how: share_of_optimum(run, policy, how == "mode", run.seed + EVAL_SEED)
            for how in ("sampling", "mode")
        }
        return told
    eval_env = make_env(run, run.slots, run.illegal, run.seed + EVAL_SEED)
    player = make_policy(run, eval_env)
    player.load_state_dict(policy.state_dict())
    told["evaluation"] = _evaluation(
        run, {"sampling": player, "mode": Greedy(player)}, eval_env, recorder
    )
    return told


def _train_game_ppo(run: Run, recorder: _Recorder) -> dict[str, Any]:
    taken = 0

    def on_update(steps: int, games: int, wins: int, entropy: float) -> None:
        nonlocal taken
        recorder.pause()
        scores = {"games": games, "wins": wins, "illegal": 0, "actions": steps - taken}
        recorder.add(steps=steps, **scores, entropy=entropy)
        taken = steps
        recorder.go()

    trainer = game_ppo.make_trainer(
        *DECKS[run.task], run.seed, run.steps, run.learning_rate, run.ent_coef
    )
    recorder.go()
    game_ppo.train(trainer, on_update)
    told: dict[str, Any] = {"parameters": sum(p.numel() for p in trainer.network.parameters())}
    if run.eval_games:
        told["initial"] = {"draws": 0, "illegal": 0}  # it masks all actions at once
        env = make_env(run, run.slots, "raise", run.seed + EVAL_SEED)
        players = {
            how: game_ppo.Player(trainer, env.legal_layout, how == "mode")
            for how in ("sampling", "mode")
        }
        told["evaluation"] = _evaluation(run, players, env, recorder)
    return told


def _evaluation(
    run: Run, players: Mapping[str, Any], env: Any, recorder: _Recorder
) -> dict[str, dict[str, Any]]:
    told = {}
    for how, player in players.items():
        seed = run.seed + EVAL_SEED
        won: WinRate = play(player, env, run.eval_games, seed, recorder.stop_if_orphaned)
        told[how] = {**asdict(won), "rate": won.rate, "interval": won.interval}
    return told


@torch.no_grad()
def initial_illegal(run: Run, policy: fp.Policy, draws: int = INITIAL_DRAWS) -> dict[str, int]:
    """How many draws of a policy are not listed, in states of random legal play.

    Nothing of what it draws is played, and torch's generator is left as it was. The states are the
    same for every head and seed.

    Returns:
        {"draws": n, "not_listed": n, "illegal": n}, at least as many draws as asked for: not listed
        as they were drawn, and not even when what stands in unused slots is ignored.
    """
    env = make_env(run, 256, "raise", EVAL_SEED)
    rng = np.random.default_rng(EVAL_SEED)
    rows = np.arange(env.num_agents)
    env.reset(EVAL_SEED)
    records = env.observations.view(env.observation_dtype)[:, 0]
    warm_up = 0 if run.task == COUPLED else 100  # so that games are at all their stages
    drawn = not_listed = illegal = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        while drawn < draws:
            if warm_up:
                warm_up -= 1
            else:
                observations = torch.as_tensor(env.observations)
                distribution, _ = policy.distribution(observations)
                legal, actions = policy.layout.read(observations), distribution.sample()
                drawn += len(actions)
                not_listed += int((~legal.contains(actions)).sum())
                played = baselines.ignore_unused(policy.spec, actions)
                illegal += int((~legal.contains(played)).sum())
            place = (rng.random(len(rows)) * records["n_legal"]).astype(np.int64)
            env.step(records["legal"][rows, place].astype(np.int64))
    return {"draws": drawn, "not_listed": not_listed, "illegal": illegal}


@torch.no_grad()
def share_of_optimum(
    run: Run, policy: fp.Policy, mode: bool, seed: int, states: int = EVAL_STATES
) -> dict[str, float]:
    """What a policy gets in the coupled task, of what the best legal actions would have paid."""
    env = make_env(run, 500, run.illegal, seed)
    observations, _ = env.reset(seed)
    got = best = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(math.ceil(states / env.num_agents)):
            distribution, _ = policy.distribution(torch.as_tensor(observations))
            actions = distribution.mode if mode else distribution.sample()
            observations, *_, infos = env.step(actions.numpy())
            got, best = got + infos[0]["got"], best + infos[0]["best"]
    actions_taken = math.ceil(states / env.num_agents) * env.num_agents
    return {
        "actions": actions_taken,
        "illegal": env.illegal_actions,
        "got": got,
        "best": best,
        "rate": got / best,
    }


# Many runs


def run_all(
    runs: Sequence[Run], folder: Path, jobs: int, say: Callable[[str], None] = print
) -> list[Result]:
    """Does those of the runs that are not finished, each in a process of its own.

    KeyboardInterrupt, or anything else that ends it, stops all of the processes; what is finished
    is found again by the next call.

    Args:
        runs: each has a folder of its own, `Run.name`.
        folder: where those folders are.
        jobs: processes side by side.
        say: what to do with a line of progress.

    Returns:
        The results, in the order of the runs.

    Raises:
        ValueError: jobs below 1, two runs of one name, or a folder that holds a run with other
            fields; nothing is run then.
        RuntimeError: a run failed; with what its process said. The others are stopped.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two runs are named {twice}; give them other seeds or other folders")
    todo = [run for run in runs if not claim(run, folder / run.name)]
    done = len(runs) - len(todo)
    if done:
        say(f"{done} of {len(runs)} runs are already finished")
    running: dict[Run, subprocess.Popen[bytes]] = {}
    last_said = time.monotonic()
    with sigint_raises():
        try:
            while todo or running:
                while todo and len(running) < jobs:
                    run = todo.pop(0)
                    running[run] = _start(run, folder)
                    say(f"started   {run.name}")
                time.sleep(0.2)
                for run in [run for run, process in running.items() if process.poll() is not None]:
                    process = running.pop(run)
                    # The exit status alone does not tell: PufferLib's SIGINT handler exits with 0.
                    if not (folder / run.name / "result.json").exists():
                        raise RuntimeError(
                            f"{run.name} failed, exit status {process.returncode}:\n"
                            + (folder / run.name / "errors.txt").read_text().strip()
                        )
                    (folder / run.name / "errors.txt").unlink()
                    done += 1
                    say(f"finished  {run.name}  ({done} of {len(runs)})")
                if running and time.monotonic() - last_said > 10:
                    last_said = time.monotonic()
                    say("running   " + "; ".join(_progress(run, folder) for run in running))
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    return [read_result(folder / run.name) for run in runs]


def read_result(folder: Path) -> Result:
    """What a finished run left in its folder.

    Raises:
        FileNotFoundError: the folder holds no finished run.
    """
    told = json.loads((folder / "result.json").read_text())
    return Result(Run(**told["run"]), told, read_curve(folder / "curve.csv"))


def read_curve(path: Path) -> Curve:
    """The columns of a curve.csv, each (rollouts,) float64."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def _start(run: Run, folder: Path) -> subprocess.Popen[bytes]:
    """A process for the run, in a session of its own: Ctrl-C reaches it through this one only."""
    with (folder / run.name / "errors.txt").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--folder", run.name],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )


def _progress(run: Run, folder: Path) -> str:
    try:
        steps = read_curve(folder / run.name / "curve.csv")["steps"][-1]
    except FileNotFoundError:
        return f"{run.name} starts"
    return f"{run.name} {steps:,.0f} of {run.steps:,} steps"


@contextlib.contextmanager
def sigint_raises() -> Iterator[None]:
    """KeyboardInterrupt for SIGINT, also where pufferl was imported and took the signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


# Tuning


def tuning_runs(
    task: str, heads: Sequence[str], steps: int, illegal: Literal["random", "noop"] = "random"
) -> list[Run]:
    """The runs of a small grid of hyperparameters, the same for each head, without evaluations."""
    return [
        Run(task, head, TUNING_SEED, steps, rate, entropy, illegal, eval_games=0)
        for head in heads
        for rate in TUNING_RATES
        for entropy in TUNING_ENTROPIES
    ]


def pick(results: Sequence[Result]) -> dict[tuple[str, str], Run]:
    """The best run of each (task, label), by the rate over the last 20% of its training steps."""
    best: dict[tuple[str, str], tuple[float, Run]] = {}
    for run, _, curve in results:
        last = float(curve["steps"][-1])
        rate = rate_in_window(run.task, curve, last, 0.2 * last)
        key = run.task, run.label
        if key not in best or rate > best[key][0]:
            best[key] = rate, run
    return {key: run for key, (_, run) in best.items()}


# Summaries


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and its 95% interval by Student's t; NaN bounds for one seed."""

    mean: float
    low: float
    high: float
    values: list[float]
    """One a seed."""


@dataclass(frozen=True)
class Band:
    """A curve: mean over seeds, lowest and highest, on a common grid."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Summary:
    """What came of one head on one task, over its seeds.

    A rate is a win rate, or the share of the optimum in the coupled task.
    """

    task: str
    label: str
    head: str
    illegal: str
    seeds: list[int]
    learning_rate: float
    ent_coef: float
    parameters: int
    steps: float
    """Mean over seeds."""
    process_seconds: float
    """Mean over seeds."""
    steps_per_process_second: Spread
    final: dict[str, Spread]
    """"sampling" and "mode" -> rate of the final evaluations; {} without any."""
    wilson: dict[str, tuple[float, float]]
    """The same -> 95% interval of the games of all seeds pooled; {} in the coupled task."""
    equal_seconds: float
    """Process seconds of the fastest head of this task, mean over seeds."""
    at_equal_seconds: Spread
    """Rate in the last `WINDOW_STEPS` up to then, while training."""
    not_listed_initial: float
    """Share of draws of the untrained policies that are not listed; NaN if not counted."""
    illegal_initial: float
    """The same, what stands in unused slots ignored."""
    illegal_final: dict[str, float]
    """"sampling" and "mode" -> share of illegal actions in the final evaluations."""
    illegal_training: float
    illegal_share: Band
    """Share of illegal actions over environment steps, in `BINS` bins."""
    over_steps: Band
    """Rate while training, in a window of `WINDOW_ROLLOUTS`, over environment steps."""
    over_seconds: Band
    """The same over process seconds."""


def summaries(results: Sequence[Result]) -> dict[str, dict[str, Summary]]:
    """{task: {label: Summary}}, in the order of the results.

    Raises:
        ValueError: two results of a task and label with the same seed, or with other fields.
    """
    groups: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        groups.setdefault(result.run.task, {}).setdefault(result.run.label, []).append(result)
    told: dict[str, dict[str, Summary]] = {}
    for task, labels in groups.items():
        seconds = min(_mean_seconds(group) for group in labels.values())
        told[task] = {label: _summary(group, seconds) for label, group in labels.items()}
    return told


def _mean_seconds(group: Sequence[Result]) -> float:
    return float(np.mean([result.curve["process_seconds"][-1] for result in group]))


def _summary(group: Sequence[Result], equal_seconds: float) -> Summary:
    run = group[0].run
    _check_alike(group)
    curves = [result.curve for result in group]
    evaluations = [r.told["evaluation"] for r in group if r.told.get("evaluation")]
    initial = [r.told["initial"] for r in group if r.told.get("initial")]
    final, wilson, illegal_final = {}, {}, {}
    for how in ("sampling", "mode") if evaluations else ():
        played = [evaluation[how] for evaluation in evaluations]
        final[how] = spread([one["rate"] for one in played])
        illegal_final[how] = _share(played, "illegal", "actions")
        if run.task != COUPLED:
            wins, games = (sum(one[key] for one in played) for key in ("wins", "games"))
            wilson[how] = wilson_interval(wins, games)
    at_time = []
    for curve in curves:
        ended = max(1, int(np.searchsorted(curve["process_seconds"], equal_seconds, "right")))
        at_time.append(rate_in_window(run.task, curve, curve["steps"][ended - 1], WINDOW_STEPS))
    smoothed = [moving_rate(run.task, curve) for curve in curves]
    return Summary(
        task=run.task,
        label=run.label,
        head=run.head,
        illegal=run.illegal,
        seeds=[result.run.seed for result in group],
        learning_rate=run.learning_rate,
        ent_coef=run.ent_coef,
        parameters=group[0].told["parameters"],
        steps=float(np.mean([curve["steps"][-1] for curve in curves])),
        process_seconds=_mean_seconds(group),
        steps_per_process_second=spread(
            [float(curve["steps"][-1] / curve["process_seconds"][-1]) for curve in curves]
        ),
        final=final,
        wilson=wilson,
        equal_seconds=equal_seconds,
        at_equal_seconds=spread(at_time),
        not_listed_initial=_share(initial, "not_listed", "draws"),
        illegal_initial=_share(initial, "illegal", "draws"),
        illegal_final=illegal_final,
        illegal_training=float(
            sum(c["illegal"].sum() for c in curves) / sum(c["actions"].sum() for c in curves)
        ),
        illegal_share=illegal_band(curves),
        over_steps=band([(steps, rate) for steps, _, rate in smoothed]),
        over_seconds=band([(seconds, rate) for _, seconds, rate in smoothed]),
    )


def _check_alike(group: Sequence[Result]) -> None:
    first = group[0].run
    for number, (run, _, _) in enumerate(group):
        for field in fields(Run):
            ours, others = getattr(first, field.name), getattr(run, field.name)
            if field.name != "seed" and ours != others:
                raise ValueError(
                    f"{first.task}, {first.label}: runs with {field.name}={ours!r} and {others!r}; "
                    "sum up runs that differ in their seeds only"
                )
        if any(run.seed == other.run.seed for other in group[:number]):
            raise ValueError(
                f"{run.task}, {run.label}: two runs with seed={run.seed}; give each run once"
            )


def _share(counts: Sequence[Mapping[str, Any]], part: str, whole: str) -> float:
    """Of pooled counts; NaN of none."""
    total = sum(one[whole] for one in counts)
    if total:
        return float(sum(one[part] for one in counts) / total)
    return 0.0 if counts else math.nan


def spread(values: Sequence[float]) -> Spread:
    """The mean of one value a seed, with its 95% interval."""
    mean, n = float(np.mean(values)), len(values)
    half = math.nan
    if n > 1:
        half = student_t(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Spread(mean, mean - half, mean + half, [float(value) for value in values])


def student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t, to three decimals.

    Raises:
        ValueError: no degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"freedom must be at least 1, got {freedom}")
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    if freedom <= len(table):
        return table[freedom - 1]
    # Cornish and Fisher's expansion about the normal quantile.
    z, n = 1.959964, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def _score(task: str, curve: Curve) -> tuple[Floats, Floats]:
    """What was won and what there was to win, one number a rollout."""
    if task == COUPLED:
        return curve["got"], curve["best"]
    return curve["wins"], curve["games"]


def rate_in_window(task: str, curve: Curve, end: float, length: float) -> float:
    """The rate of rollouts that ended in (end - length, end] steps; NaN if no game ended in them.

    So the window is as near to the length as whole rollouts allow, and holds one at least if
    ``end`` is a rollout's.
    """
    inside = (curve["steps"] > end - length) & (curve["steps"] <= end)
    won, of = (float(part[inside].sum()) for part in _score(task, curve))
    return won / of if of else math.nan


def moving_rate(task: str, curve: Curve) -> tuple[Floats, Floats, Floats]:
    """Steps, process seconds and rate of the last `WINDOW_ROLLOUTS`, where any game had ended."""
    won, of = (_moving_sum(part) for part in _score(task, curve))
    some = of > 0
    return curve["steps"][some], curve["process_seconds"][some], won[some] / of[some]


def _moving_sum(values: Floats) -> Floats:
    """Of the last `WINDOW_ROLLOUTS` values, fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(sums))
    return sums[ends] - sums[np.maximum(ends - WINDOW_ROLLOUTS, 0)]


def band(curves: Sequence[tuple[Floats, Floats]]) -> Band:
    """Mean, lowest and highest of curves (x, y), x rising, where all of them are."""
    if not all(len(x) for x, _ in curves):
        return Band([], [], [], [])
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(first, max(first, last), GRID)
    return _band(grid, np.array([np.interp(grid, x, y) for x, y in curves]))


def illegal_band(curves: Sequence[Curve]) -> Band:
    """The share of illegal actions in bins of equal steps, at their middles; empty bins are out."""
    last = max(curve["steps"][-1] for curve in curves)
    edges = np.linspace(0, last, BINS + 1)
    shares, full = [], np.ones(BINS, dtype=bool)
    for curve in curves:
        # A rollout counts for the bin in which its middle lies.
        middle = curve["steps"] - curve["actions"] / 2
        at = np.clip(np.searchsorted(edges, middle, "right") - 1, 0, BINS - 1)
        illegal = np.bincount(at, curve["illegal"], BINS)
        actions = np.bincount(at, curve["actions"], BINS)
        full &= actions > 0
        shares.append(illegal / np.maximum(actions, 1))
    middles = (edges[:-1] + edges[1:]) / 2
    return _band(middles[full], np.array(shares)[:, full])


def _band(x: Floats, rows: Floats) -> Band:
    return Band(x.tolist(), rows.mean(0).tolist(), rows.min(0).tolist(), rows.max(0).tolist())


# Pictures

# A dash for each head besides its colour.
STYLES: dict[str, tuple[str, Any]] = {
    "flat": (COLOURS["flat"], "-"),
    "autoregressive": (COLOURS["autoregressive"], "-"),
    "masks per head": (COLOURS["masks per head"], (0, (5, 2))),
    "masks of the greedy primary": (COLOURS["masks of the greedy primary"], (0, (5, 2))),
    "fixed numbers": (COLOURS["fixed numbers"], (0, (2, 1.5))),
    game_ppo.NAME: ("#000000", (0, (1, 1.5))),
}
TASK_WORDS = {FIXED: "one pair of decks", RANDOM: "random decks", COUPLED: "coupled legality"}


def draw(told: Mapping[str, Mapping[str, Summary]], folder: Path) -> list[Path]:
    """Draws what there is: win_rate.png, coupled.png and illegal.png.

    Lines are means over seeds, bands reach from the lowest to the highest seed.

    Returns:
        The paths of the pictures.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []

    def save(figure: Any, name: str, shown: Sequence[Summary]) -> None:
        if shown:
            _legend(figure, {summary.label: summary for summary in shown})
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        pyplot.close(figure)
        write_whole(folder / name, picture.getvalue())
        paths.append(folder / name)

    games = [task for task in (FIXED, RANDOM) if task in told]
    if games:
        shape = len(games), 2
        size = 11, 1.2 + 3.6 * len(games)
        figure, axes = pyplot.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
        top = max(max(s.over_steps.high, default=0) for t in games for s in told[t].values())
        for task, pair in zip(games, axes, strict=True):
            _draw_rates(pair, told[task], f"{TASK_WORDS[task]}: win rate against greedy")
            for axis in pair:
                axis.set_ylim(0, min(1.0, 1.08 * top) or 1.0)
        save(figure, "win_rate.png", [s for task in games for s in told[task].values()])
    if COUPLED in told:
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
        words = f"{TASK_WORDS[COUPLED]}: share of the optimum"
        _draw_rates(axes, told[COUPLED], words)
        uniform = coupled.expected_uniform() / coupled.expected_best()
        for axis in axes:
            axis.set_ylim(0, 1.03)
            axis.axhline(uniform, color="0.45", linewidth=1)
            axis.annotate(
                "uniform legal play",
                (1, uniform),
                xycoords=("axes fraction", "data"),
                xytext=(-2, -3),
                textcoords="offset points",
                ha="right",
                va="top",
                color="0.35",
                fontsize=8,
            )
        save(figure, "coupled.png", list(told[COUPLED].values()))
    tasks = [task for task in TASKS if task in told]
    if tasks:
        size = 1.0 + 4.2 * len(tasks), 4.8
        figure, axes = pyplot.subplots(
            1, len(tasks), figsize=size, layout="constrained", squeeze=False, sharey=True
        )
        for task, axis in zip(tasks, axes[0], strict=True):
            scale, unit = _steps_unit(told[task])
            never = []
            for summary in told[task].values():
                if summary.illegal_training:
                    _line(axis, summary, summary.illegal_share, scale, 100)
                else:
                    never.append(summary.label)
            if never:
                words = textwrap.fill("none at all: " + ", ".join(never), 50)
                place = {"xycoords": "axes fraction", "va": "bottom", "fontsize": 8}
                axis.annotate(words, (0.02, 0.03), color="0.3", **place)
            axis.set_xlabel(f"environment steps [{unit}]")
            _plain(axis, TASK_WORDS[task])
            axis.set_xlim(left=0)
            axis.set_ylim(-2, 102)
        axes[0][0].set_ylabel("illegal actions while training [% of all]")
        shown = [s for task in tasks for s in told[task].values() if s.illegal_training]
        save(figure, "illegal.png", shown)
    return paths


def _draw_rates(axes: Any, labels: Mapping[str, Summary], words: str) -> None:
    scale, unit = _steps_unit(labels)
    for summary in labels.values():
        _line(axes[0], summary, summary.over_steps, scale, 1)
        _line(axes[1], summary, summary.over_seconds, 1, 1)
    for axis, label in zip(
        axes, (f"environment steps [{unit}]", "time of training [processor seconds]"), strict=True
    ):
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        _plain(axis, words)


def _line(axis: Any, summary: Summary, curve: Band, scale: float, percent: float) -> None:
    style = _style(summary)
    x = np.array(curve.x) / scale
    mean, low, high = (percent * np.array(y) for y in (curve.mean, curve.low, curve.high))
    axis.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axis.plot(x, mean, **style)


def _style(summary: Summary) -> dict[str, Any]:
    """The same colour for a head everywhere; thinner and dotted where no-ops were played."""
    color, dashes = STYLES[summary.head]
    if summary.illegal == "noop":
        return {"color": color, "linestyle": (0, (1, 1)), "linewidth": 1.4}
    return {"color": color, "linestyle": dashes, "linewidth": 1.8}


def _steps_unit(labels: Mapping[str, Summary]) -> tuple[float, str]:
    most = max(summary.steps for summary in labels.values())
    return (1e6, "millions") if most >= 5e5 else (1e3, "thousands")


def _plain(axis: Any, words: str) -> None:
    axis.set_title(words, fontsize=10, loc="left")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, labels: Mapping[str, Summary]) -> None:
    """One for the whole figure, below it."""
    from matplotlib.lines import Line2D

    words = []
    seeds = max(len(summary.seeds) for summary in labels.values())
    if seeds > 1:
        words.append(f"mean of {seeds} seeds; band: lowest to highest seed")
    if any(summary.illegal == "noop" for summary in labels.values()):
        words.append("no-op: played in place of an illegal action, otherwise a random legal one")
    figure.legend(
        handles=[Line2D([], [], label=label, **_style(s)) for label, s in labels.items()],
        loc="outside lower center",
        ncols=min(3, len(labels)),
        frameon=False,
        fontsize=9,
        handlelength=3,
        title="\n".join(words) or None,
        title_fontsize=8,
    )


def main() -> None:
    """Does the run that run.json in the folder describes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="holds a run.json")
    folder = parser.parse_args().folder
    run_one(Run(**json.loads((folder / "run.json").read_text())), folder)


if __name__ == "__main__":
    main()
