"""Trains, resumes and evaluates a policy with PufferLib's own trainer."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from tcg_flatpolicy import distributed
from tcg_flatpolicy.app.engine import (
    SIGNALS,
    arguments_of,
    check_arguments,
    factory_of,
    is_own,
    make_policy,
    make_vecenv,
)
from tcg_flatpolicy.app.evaluate import WinRate, play
from tcg_flatpolicy.app.run_folder import (
    CHECKPOINT,
    claimed,
    draw_curves,
    folder_of,
    read_checkpoint,
    read_csv,
    read_json,
    write_checkpoint,
    write_csv,
    write_json,
)
from tcg_flatpolicy.app.settings import Settings, saved_settings
from tcg_flatpolicy.provenance import provenance, write_whole
from tcg_flatpolicy.puffer import (
    Greedy,
    Policy,
    RandomLegal,
    TopK,
    check_contract,
    close_vecenv,
    play_games,
    restore_trainer,
    trainer,
    trainer_state,
)
from tcg_flatpolicy.puffer.games import agents_per_game
from tcg_flatpolicy.wrapping import env_layers

__all__ = ["Report", "Settings", "evaluate", "make_policy", "resume", "train", "trained_policy"]


@dataclass
class Report:
    """The outcome of a training run."""

    steps: int
    steps_per_second: float
    illegal: int
    """Number of illegal actions in training, counted by the environment; with workers, in games
    that ended."""
    interrupted: bool
    seconds: float
    """Duration of the whole run, evaluations included."""
    before: dict[str, WinRate]
    """"sampling" and "mode" -> the untrained policy's games; without interrupted evaluations."""
    after: dict[str, WinRate]
    """The same of the trained policy."""
    evaluated: dict[str, Any]
    """The engine's arguments in those games."""


def trained_policy(run: Path, named: Mapping[str, Any] | None = None) -> tuple[Settings, Policy]:
    """The settings and the policy, on the CPU, of a run folder or its checkpoint.

    Args:
        run: the folder, or its checkpoint.pt.
        named: as :func:`checked_settings`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is not a checkpoint of `train`, is damaged or one of another version, or
            names code that the caller did not name.
        ImportError: PufferLib or the game is not installed.
    """
    content = read_checkpoint(run)
    settings = checked_settings(content, run, named)
    # Of one game: its sizes alone are asked for.
    games = "num_games" in arguments_of(factory_of(settings.engine))
    env = {**settings.env, **({"num_games": 1} if games else {})}
    few = replace(settings, num_workers=0, env=env, num_envs=1)
    vecenv = make_vecenv(few, settings.seed)
    try:
        policy = make_policy(settings, vecenv.driver_env)
    finally:
        vecenv.close()
    _load_weights(policy, content, run)
    return settings, policy


def _load_weights(policy: Policy, content: Mapping[str, Any], run: Path) -> None:
    try:
        policy.load_state_dict(content["policy"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the weights in {run} are damaged or of another policy: {error}") from (
            error
        )


def checked_settings(
    content: Mapping[str, Any], run: Path, named: Mapping[str, Any] | None = None
) -> Settings:
    """The settings in a checkpoint, with changes; no file names code that is then imported.

    Args:
        content: of the checkpoint.
        run: where it is, for messages.
        named: settings to change. What is imported (the engine, unless it is one of this library's
            games, the encoder, spec and layout) must be in it, as in the run.

    Raises:
        ValueError: it names code that the caller did not name, or is another version's.
    """
    named = named or {}
    settings = saved_settings(content, run, named)
    saved = saved_settings(content, run)
    for name in ("engine", "encoder", "spec", "layout"):
        was = getattr(saved, name)
        if ":" in was and not named.get(name):
            flag = "" if name == "engine" else f"--{name} "
            raise ValueError(
                f"{run} was trained with {name} {was}, and a run folder imports nothing by itself: "
                f"name it again on the command line, {flag}{was}"
            )
        if named.get(name, was) != was:
            raise ValueError(f"{run} was trained with {name} {was!r}, not {named[name]!r}")
    if is_own(settings.engine):
        known = arguments_of(factory_of(settings.engine))
        try:
            check_arguments(settings.engine, known, saved.env)
        except ValueError as error:
            raise ValueError(f"{run} was written by another version: {error}") from error
    return settings


def evaluate(
    settings: Settings,
    policy: Policy,
    games: int,
    opponent: str | None = None,
    seed: int = 0,
    stopped: Callable[[], bool] = lambda: False,
    top_k: int | None = None,
) -> dict[str, WinRate]:
    """Plays games in the engine: sampling, and with the mode.

    It plays a copy of the policy on the CPU, in float32, in eval mode and without the exploration
    of training. Where a game has several agents, the others play random legal actions.

    Args:
        settings: of the policy.
        policy: the policy.
        games: number of games of each way to play. Where the engine has a number of slots of its
            own, it is rounded up to a multiple.
        opponent: the engine's argument of that name; None for that of the factory's ``evaluation``,
            or of training.
        seed: random seed of games and sampling.
        stopped: is asked before each step; True ends the evaluation. The unfinished way to play is
            left out of the result, since the games that ended by then are the short ones.
        top_k: also sample from this number of most probable tuples.

    Returns:
        The games of "sampling", "mode" and "top <k>"; {} for 0 games.

    Raises:
        ValueError: an opponent that the engine does not take, or games that cannot be divided
            equally.
    """
    if not games:
        return {}
    given = evaluated(settings, opponent)
    if "num_games" in arguments_of(factory_of(settings.engine)):
        given["num_games"] = slots = _slots(games)
    vecenv = make_vecenv(replace(settings, env=given, num_workers=0), seed)
    try:
        agents = agents_per_game(vecenv)
        slots = vecenv.num_agents // agents
        games = -(-games // slots) * slots
        player = make_policy(settings, vecenv.driver_env)
        player.load_state_dict(policy.state_dict())
        player.explore()
        ways: dict[str, nn.Module] = {"sampling": player, "mode": Greedy(player)}
        if top_k is not None:
            ways[f"top {top_k}"] = TopK(player, top_k)
        others = [RandomLegal(player)] * (agents - 1)
        results = {}
        # The trainer leaves the process inside autocast.
        with torch.autocast("cpu", enabled=False):
            for way, one in ways.items():
                if others:
                    players = [one, *others]
                    result = play_games(players, vecenv, games, seed=seed, stopped=stopped)
                else:
                    result = play(one, vecenv, games, seed, stopped)
                results[way] = result
    finally:
        vecenv.close()
    return {way: result for way, result in results.items() if result.games == games}


def evaluated(settings: Settings, opponent: str | None = None) -> dict[str, Any]:
    """The engine's arguments with which a policy is evaluated, as of :func:`evaluate`."""
    changed = getattr(factory_of(settings.engine), "evaluation", {})
    return {**settings.env, **changed, **({} if opponent is None else {"opponent": opponent})}


def _slots(games: int) -> int:
    """Number of games to play at the same time, of which each slot has as many."""
    slots = next(n for n in range(min(games, 250), 0, -1) if games % n == 0)
    if slots < min(games, 10):
        raise ValueError(
            f"{games} games cannot be shared equally by 10 to 250 slots; take a number such as "
            f"{round(games, -2)}"
        )
    return slots


def train(settings: Settings, folder: Path, say: Callable[[str], None] = print) -> Report:
    """Trains with these settings, and writes config, metrics, checkpoint, picture and report.

    PuffeRL itself trains: evaluate() and train(), repeated. On a terminal it shows its own
    dashboard. Elsewhere ``say`` gets a line every few seconds. The first SIGINT ends the run after
    the current epoch, with all of its files, or ends the current evaluation, which is left out of
    the report. A second SIGINT ends the run at once; the latest checkpoint remains. The first
    checkpoint is written before the first epoch.

    Under torchrun, each process plays num_games games of its own and all train one policy.
    total_steps and the report's steps are those of all processes together. The process of rank 0
    evaluates, prints and writes; the others return a report without evaluations.

    Raises:
        ImportError: PufferLib or the game is not installed.
        RuntimeError: the installed PufferLib does not behave as this library relies on.
        FileExistsError: the folder already holds a run, or a config.json.
        ValueError: settings that do not work under torchrun.
    """
    _check_new(folder)
    return _run(settings, folder, say)


def _check_new(folder: Path) -> None:
    """Raises a FileExistsError for a folder that holds a run."""
    if (folder / CHECKPOINT).exists():
        raise FileExistsError(
            f"{folder} already holds a run; name another folder with --folder, or go on with it "
            "with --resume"
        )
    if (folder / "config.json").exists():
        raise FileExistsError(
            f"{folder} holds a config.json, and no {CHECKPOINT} to go on from; name another folder "
            "with --folder, or delete it"
        )


def resume(
    folder: Path, changes: Mapping[str, Any] | None = None, say: Callable[[str], None] = print
) -> Report:
    """Continues a run from its checkpoint to its total_steps, in the same folder.

    On a CPU and without compile the result is, bit for bit, that of a run that was never stopped,
    except for times. The games up to the checkpoint are played again, which takes at most a minute
    for a million steps. A run that had ended is evaluated and reported again.

    Args:
        folder: the run folder, or its checkpoint.pt.
        changes: settings to change. Only total_steps can change, and only if nothing depends on it
            (no annealing). What a run imports must be named again, as of :func:`checked_settings`.
        say: gets a line every few seconds.

    Raises:
        ImportError: PufferLib or the game is not installed.
        FileNotFoundError: there is no checkpoint, or no metrics.csv.
        ValueError: a setting was changed, the run has workers, was started by torchrun or takes
            muon, the checkpoint is another version's, or a file of the run is damaged.
        RuntimeError: the installed PufferLib or game does not behave as when the run was stopped.
    """
    folder = folder_of(folder)
    with claimed(folder) if folder.is_dir() else contextlib.nullcontext():
        return _resume(folder, changes or {}, say)


def _resume(folder: Path, changes: Mapping[str, Any], say: Callable[[str], None]) -> Report:
    content = read_checkpoint(folder)
    settings = checked_settings(content, folder, changes)
    why = _not_resumable(settings)
    if why is None and content.get("trainer") is None:
        why = "its checkpoint is of torchrun or an earlier version, without the games"
    if why is not None:
        raise ValueError(f"{folder} cannot be resumed, only evaluated: {why}; start a new run")
    _check_keys(folder, "it", content, ("device", "before", "seconds"))
    _check_keys(folder, "its trainer", content["trainer"], ("global_step", "epoch"))
    saved, wanted = _flat(saved_settings(content, folder)), _flat(settings)
    for name, value in wanted.items():
        if saved.get(name, value) != value or (name not in saved and name in changes):
            if name == "total_steps" and not settings.annealed:
                continue
            what = f"{name} was {saved.get(name, 'not given')}, not {value}"
            if name == "total_steps":
                what += f", which {' and '.join(settings.annealed)} followed"
            raise ValueError(
                f"a resumed run keeps its settings, and {what}; leave it out, or start a new run"
            )
    rows = _rows_until(folder / "metrics.csv", content["trainer"]["global_step"])
    config = folder / "config.json"
    return _run(settings, folder, say, content, rows, read_json(config) if config.exists() else {})


def _check_keys(folder: Path, what: str, content: Any, names: Sequence[str]) -> None:
    """Raises a ValueError for a part of a checkpoint that lacks a key."""
    if missing := [name for name in names if name not in content]:
        raise ValueError(f"{folder / CHECKPOINT} is damaged: {what} lacks {', '.join(missing)}")


def _flat(settings: Settings) -> dict[str, Any]:
    """Settings and the engine's arguments side by side."""
    content = asdict(settings)
    env = content.pop("env")
    return {**content, **env}


def _rows_until(path: Path, steps: int) -> list[dict[str, float]]:
    """The rows of metrics.csv up to a checkpoint's step; the file may have later ones."""
    if not steps:
        return []
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing, and a resumed run adds to it; restore it, or start a new run"
        )
    rows = [row for row in read_csv(path) if row.get("steps", math.inf) <= steps]
    if not rows or rows[-1]["steps"] != steps:
        raise ValueError(
            f"{path} has no row of step {steps}, at which the checkpoint was written; restore the "
            "file that has, or start a new run"
        )
    return rows


def _not_resumable(settings: Settings) -> str | None:
    """Why a run of these settings cannot be resumed; None if it can."""
    if "LOCAL_RANK" in os.environ:
        return "under torchrun each process has games of its own"
    if settings.num_workers:
        return "with num_workers the games are in other processes"
    if settings.optimizer != "adam":
        return (
            f"{settings.optimizer} holds more than a checkpoint of plain values can; adam does not"
        )
    return None


def _run(
    settings: Settings,
    folder: Path,
    say: Callable[[str], None],
    saved: Mapping[str, Any] | None = None,
    rows: list[dict[str, float]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Report:
    """Runs from the start, or from a checkpoint, its rows of metrics and its config.json."""
    check_contract()
    import pufferlib.pufferl  # noqa: F401  # takes SIGINT for itself, so before ours

    if settings.compile:
        from torch._dynamo import config as dynamo

        # For operators whose output size is known only at run time; off before torch 2.13.
        dynamo.capture_dynamic_output_shape_ops = True
    started = time.monotonic() - (saved["seconds"] if saved else 0.0)
    torch.set_num_threads(settings.threads)
    under_torchrun = "LOCAL_RANK" in os.environ
    rank, ranks, device = _processes(settings)
    if saved and saved["device"] != device:
        raise ValueError(f"{folder} was trained on {saved['device']}, here it would go on {device}")
    if rank:
        say = _silent
    on_terminal = sys.stdout.isatty() and not under_torchrun
    seed = settings.seed + rank * 1_000_003  # an environment's workers take the seeds after it

    torch.manual_seed(settings.seed)
    with contextlib.ExitStack() as stack:
        if under_torchrun:
            stack.callback(distributed.stop)
        why_not = _not_resumable(settings)
        vecenv = make_vecenv(settings, seed, record=why_not is None)
        until_trained = stack.enter_context(contextlib.ExitStack())
        until_trained.callback(close_vecenv, vecenv)
        if why_not is None:
            why_not = _games_not_saved(vecenv)
        policy = make_policy(settings, vecenv.driver_env).to(device)
        trainer_config = settings.trainer_config(vecenv, device, folder, seed, ranks)
        if rank:
            torch.manual_seed(seed)
        if not rank and not saved:  # so late that bad settings leave no folder
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(claimed(folder))
            _check_new(folder)
        stopped = stack.enter_context(_stop_on_signals())

        if saved and saved["trainer"]["epoch"]:
            before = {way: WinRate(**result) for way, result in saved["before"].items()}
        else:
            if settings.eval_games:
                say(f"playing {settings.eval_games} games with the untrained policy, twice")
            before = {} if rank else _evaluate_own(settings, policy, stopped)

        until_trained.pop_all()  # the trainer closes it
        learner = distributed.distribute(policy) if under_torchrun else policy
        with _dashboard(on_terminal):
            trained = stack.enter_context(trainer(trainer_config, vecenv, learner))
        rows = rows or []
        if rows and policy.layout.dropped:
            policy.layout.dropped.count = int(rows[-1]["dropped"])
        if saved:
            say(f"replaying the games up to step {saved['trainer']['global_step']:,}")
            try:
                restore_trainer(trained, saved["trainer"])
            except KeyError as error:
                raise ValueError(
                    f"{folder / CHECKPOINT} is damaged: its trainer lacks {error}"
                ) from error

        def write_metrics() -> None:
            if not rank:
                write_csv(folder / "metrics.csv", rows)

        def save() -> None:
            write_metrics()
            if not rank:
                content = {
                    "policy": policy.state_dict(),
                    "settings": asdict(settings),
                    "device": device,
                    "before": {way: asdict(result) for way, result in before.items()},
                    "seconds": time.monotonic() - started,
                    "trainer": trainer_state(trained) if why_not is None else None,
                }
                write_checkpoint(folder / CHECKPOINT, content)

        def stop() -> bool:
            return distributed.on_any_rank(stopped()) if under_torchrun else stopped()

        if not saved:
            save()  # before all other files: a run that crashes after this can be resumed
        if not rank:
            _write_config(folder, settings, config, trained.global_step)
            write_whole(folder / "config.toml", settings.as_toml().encode())
        steps_here = settings.total_steps // ranks
        last_epoch = math.ceil(steps_here / trainer_config["batch_size"]) - 1
        illegal = 0
        last_said = last_saved = time.monotonic()
        stack.callback(write_metrics)  # also when training raises
        while trained.global_step < steps_here and not stop():
            policy.explore(*settings.exploration(min(1.0, trained.epoch / max(1, last_epoch))))
            with _dashboard(on_terminal):
                games = {name: list(values) for name, values in trained.evaluate().items()}
                distributed.log_together(trained)  # or the losses would be those of a while ago
                trained.train()
            illegal += int(sum(games.get("illegal_actions", [])))
            rows.append(_metrics(trained, games, policy, ranks, rows))
            if not on_terminal and time.monotonic() - last_said > 5:
                last_said = time.monotonic()
                say(_line(rows[-1], settings.total_steps))
            if time.monotonic() - last_saved >= settings.checkpoint_seconds:
                save()
                last_saved = time.monotonic()
        if rows and not on_terminal and trained.global_step >= steps_here:
            say(_line(rows[-1], settings.total_steps))
        save()
        if not rank:
            draw_curves(folder / "curves.png", {"": rows}, title(settings))
        steps, training_seconds = trained.global_step * ranks, trained.uptime
        if not settings.num_workers:
            illegal = sum(getattr(env, "illegal_actions", 0) for env in vecenv.envs)
        if under_torchrun:
            illegal = distributed.sum_over_ranks(illegal)
        interrupted = stop()
        after: dict[str, WinRate] = {}
        if not interrupted and not rank:
            if settings.eval_games:
                say(f"playing {settings.eval_games} games with the trained policy, twice")
            after = _evaluate_own(settings, policy, stopped)
            interrupted = stopped()  # of this process alone: the others have ended
        if interrupted and why_not is None:
            where = shlex.quote(str(folder))
            named = "" if is_own(settings.engine) else f"{settings.engine} "
            say(f"to continue: python -m tcg_flatpolicy train {named}--resume {where}")
        elif interrupted:
            say(f"this run cannot be continued: {why_not}")
    report = Report(
        steps=steps,
        steps_per_second=steps / training_seconds,
        illegal=illegal,
        interrupted=interrupted,
        seconds=time.monotonic() - started,
        before=before,
        after=after,
        evaluated=evaluated(settings),
    )
    if not rank:
        write_json(folder / "report.json", {**asdict(report), **provenance()})
    return report


def _processes(settings: Settings) -> tuple[int, int, str]:
    """This process's rank, the number of processes that torchrun started (or 1), and the device."""
    if "LOCAL_RANK" not in os.environ:
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return 0, 1, device
    if settings.compile:
        raise ValueError("compile does not work under torchrun; leave one of them out")
    rank, device = distributed.start(settings.device)
    ranks = torch.distributed.get_world_size()
    return rank, ranks, device


def _games_not_saved(vecenv: Any) -> str | None:
    """Why the games cannot be saved; None if they can."""
    for env in getattr(vecenv, "envs", [None]):
        if not (hasattr(env, "state_dict") and hasattr(env, "load_state_dict")):
            kind = type(next(reversed([*env_layers(env)]), env)).__name__
            return f"{kind} has no state_dict and load_state_dict, with which its games are saved"
    return None


def _write_config(
    folder: Path, settings: Settings, earlier: Mapping[str, Any] | None, steps: int
) -> None:
    """Writes settings and provenance; for a resumed run, step and provenance of each part."""
    content = {"settings": asdict(settings), **provenance()}
    if earlier:
        parts = [*earlier.get("resumed", []), {"steps": steps, **provenance()}]
        content = {**earlier, "settings": asdict(settings), "resumed": parts}
    write_json(folder / "config.json", content)


def _evaluate_own(
    settings: Settings, policy: Policy, stopped: Callable[[], bool]
) -> dict[str, WinRate]:
    seed = settings.seed + 1_000_000  # other games than those trained on
    return evaluate(settings, policy, settings.eval_games, None, seed, stopped)


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGINT, SIGTERM or SIGHUP was sent.

    A second one raises KeyboardInterrupt. One that is ignored stays so, as nohup has it.

    Importing pufferl sets a handler of SIGINT that ends the process with nothing written. This
    replaces it, so call it after that import.
    """
    sent = False

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal sent
        if sent:
            raise KeyboardInterrupt
        sent = True

    heeded = [one for one in SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
    earlier = [(one, signal.signal(one, handler)) for one in heeded]
    try:
        yield lambda: sent
    finally:
        for one, former in earlier:
            signal.signal(one, former)


@contextlib.contextmanager
def _dashboard(on_terminal: bool) -> Iterator[None]:
    """Hides PuffeRL's dashboard, which is cursor escapes, unless the output is a terminal."""
    quiet = contextlib.nullcontext() if on_terminal else contextlib.redirect_stdout(io.StringIO())
    with quiet, warnings.catch_warnings():
        # It asks for autocast in float32 too, and torch warns that a CPU has none.
        warnings.filterwarnings("ignore", "In CPU autocast|CUDA is not available", UserWarning)
        yield


def _metrics(
    trained: Any,
    games: Mapping[str, list[float]],
    policy: Policy,
    ranks: int,
    rows: list[dict[str, float]],
) -> dict[str, float]:
    """One row of metrics.csv: an epoch, and the games of rank 0 that ended in it.

    It reads the trained's attributes, since train() returns logs on the wrong ranks, with older
    losses.
    """

    def mean(name: str) -> float:
        values = games.get(name, [])
        return float(np.mean(values)) if values else math.nan

    # Where the infos do not say it: games that ended with a positive reward.
    ended = trained.rewards[trained.terminals > 0]
    won = float((ended > 0).float().mean()) if len(ended) else math.nan
    before = rows[-1] if rows else {"steps": 0, "seconds": 0.0}
    steps, seconds = trained.global_step * ranks, float(trained.uptime)
    return {
        "steps": steps,
        "seconds": seconds,
        "steps_per_second": (steps - before["steps"]) / (seconds - before["seconds"]),
        "win_rate": mean("win") if "win" in games else won,
        "episode_length": mean("episode_length"),
        "legal_actions": mean("legal_actions"),
        "illegal_actions": mean("illegal_actions"),
        "learning_rate": float(trained.optimizer.param_groups[0]["lr"]),
        "temperature": float(policy.temperature),
        "epsilon": float(policy.epsilon),
        **({"dropped": policy.dropped} if policy.layout.dropped else {}),
        **{name: float(value) for name, value in trained.losses.items()},
    }


def _silent(line: str) -> None:
    """Prints nothing, on ranks other than 0."""


def _line(row: dict[str, float], total: int) -> str:
    left = max(0.0, total - row["steps"]) * row["seconds"] / row["steps"]
    return (
        f"{min(1.0, row['steps'] / total):4.0%}  {row['steps']:>10,} steps  "
        f"{row['steps_per_second']:>7,.0f}/s  win {row['win_rate']:.3f}  "
        f"entropy {row['entropy']:.3f}  KL {row['approx_kl']:.4f}  "
        f"value loss {row['value_loss']:.4f}  {left // 60:.0f} min {left % 60:02.0f} s left"
    )


def title(settings: Settings) -> str:
    """The engine with its arguments and the seed, in words."""
    given = ", ".join(f"{name} {value}" for name, value in settings.env.items())
    return f"{settings.engine}{f' ({given})' if given else ''}, seed {settings.seed}"
