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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from tcg_flatpolicy import distributed
from tcg_flatpolicy.app.evaluate import WinRate, play
from tcg_flatpolicy.app.load import load
from tcg_flatpolicy.app.run_folder import (
    CHECKPOINT,
    draw_curves,
    folder_of,
    read_checkpoint,
    read_csv,
    read_json,
    write_checkpoint,
    write_csv,
    write_json,
)
from tcg_flatpolicy.app.settings import GAME, Settings, saved_settings
from tcg_flatpolicy.provenance import provenance
from tcg_flatpolicy.puffer import (
    Greedy,
    Policy,
    RecurrentPolicy,
    TopK,
    check_contract,
    restore_trainer,
    trainer_state,
)
from tcg_flatpolicy.wrapping import env_attribute


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


def make_policy(settings: Settings, env: Any) -> Policy:
    """A new policy with the encoder that the environment makes, on the CPU.

    Raises:
        ValueError: the environment has no ``make_encoder(hidden_size, entity_size)``.
    """
    make_encoder = env_attribute(env, "make_encoder")
    if make_encoder is None:
        raise ValueError(
            f"{type(env).__name__} has no method make_encoder(hidden_size, entity_size) that "
            "returns the encoder; add one"
        )
    encoder = make_encoder(settings.hidden_size, settings.entity_size)
    kind = RecurrentPolicy if settings.recurrent else Policy
    return kind(
        env,
        encoder=encoder,
        head=settings.head,
        width=settings.head_width,
        invalid=settings.invalid,
    )


def trained_policy(run: Path) -> tuple[Settings, Policy]:
    """The settings and the policy, on the CPU, of a run folder or its checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is not a checkpoint of `train`, or is one of another version.
        ImportError: PufferLib or the game is not installed.
    """
    content = read_checkpoint(run)
    settings = saved_settings(content, run)
    env = load(GAME)(num_games=1, deck1=settings.deck1, deck2=settings.deck2)
    policy = make_policy(settings, env)
    policy.load_state_dict(content["policy"])
    return settings, policy


def evaluate(
    settings: Settings,
    policy: Policy,
    games: int,
    opponent: str,
    seed: int,
    stopped: Callable[[], bool] = lambda: False,
    top_k: int | None = None,
) -> dict[str, WinRate]:
    """Plays games against a built-in opponent: sampling, and with the mode.

    It plays a copy of the policy on the CPU, in float32, in eval mode and without the exploration
    of training.

    Args:
        settings: of the policy.
        policy: the policy.
        games: number of games of each way to play.
        opponent: name of the built-in opponent.
        seed: random seed of games and sampling.
        stopped: is asked before each step; True ends the evaluation. The unfinished way to play is
            left out of the result, since the games that ended by then are the short ones.
        top_k: also sample from this number of most probable tuples.

    Returns:
        The games of "sampling", "mode" and "top <k>"; {} for 0 games.

    Raises:
        ValueError: opponent "self", or games that cannot be divided equally.
    """
    if opponent == "self":
        raise ValueError("a win rate needs a built-in opponent, such as greedy; not 'self'")
    if not games:
        return {}
    slots = next(n for n in range(min(games, 250), 0, -1) if games % n == 0)
    if slots < min(games, 10):
        raise ValueError(
            f"{games} games cannot be shared equally by 10 to 250 slots; take a number such as "
            f"{round(games, -2)}"
        )
    decks = {"deck1": settings.deck1, "deck2": settings.deck2}
    env = load(GAME)(num_games=slots, opponent=opponent, seed=seed, **decks)
    player = make_policy(settings, env)
    player.load_state_dict(policy.state_dict())
    player.explore()
    players: dict[str, nn.Module] = {"sampling": player, "mode": Greedy(player)}
    if top_k is not None:
        players[f"top {top_k}"] = TopK(player, top_k)
    # The trainer leaves the process inside autocast.
    with torch.autocast("cpu", enabled=False):
        results = {way: play(one, env, games, seed, stopped) for way, one in players.items()}
    return {way: result for way, result in results.items() if result.games == games}


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
    return _run(settings, folder, say)


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
            (no annealing).
        say: gets a line every few seconds.

    Raises:
        ImportError: PufferLib or the game is not installed.
        FileNotFoundError: there is no checkpoint, or no metrics.csv.
        ValueError: a setting was changed, the run has workers, was started by torchrun or takes
            muon, the checkpoint is another version's, or a file of the run is damaged.
        RuntimeError: the installed PufferLib or game does not behave as when the run was stopped.
    """
    folder = folder_of(folder)
    content = read_checkpoint(folder)
    settings = saved_settings(content, folder, changes)
    saved = content["settings"]
    why = _not_resumable(settings)
    if why is None and content.get("trainer") is None:
        why = "its checkpoint is of torchrun or an earlier version, without the games"
    if why is not None:
        raise ValueError(f"{folder} cannot be resumed, only evaluated: {why}; start a new run")
    for name, value in asdict(settings).items():
        if name in saved and saved[name] != value:
            if name == "total_steps" and not settings.annealed:
                continue
            what = f"{name} was {saved[name]}, not {value}"
            if name == "total_steps":
                what += f", which {' and '.join(settings.annealed)} followed"
            raise ValueError(
                f"a resumed run keeps its settings, and {what}; leave it out, or start a new run"
            )
    rows = _rows_until(folder / "metrics.csv", content["trainer"]["global_step"])
    config = folder / "config.json"
    return _run(settings, folder, say, content, rows, read_json(config) if config.exists() else {})


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
    from pufferlib.pufferl import PuffeRL

    check_contract()
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
    else:
        folder.mkdir(parents=True, exist_ok=True)
    resumable = _not_resumable(settings) is None
    on_terminal = sys.stdout.isatty() and not under_torchrun
    seed = settings.seed + rank * 1_000_003  # an environment's workers take the seeds after it

    torch.manual_seed(settings.seed)
    with contextlib.ExitStack() as stack:
        if under_torchrun:
            stack.callback(distributed.stop)
        vecenv = _make_vecenv(settings, seed)
        stack.callback(vecenv.close)
        policy = make_policy(settings, vecenv.driver_env).to(device)
        if rank:
            torch.manual_seed(seed)
        stopped = stack.enter_context(_stop_on_sigint())

        if saved and saved["trainer"]["epoch"]:
            before = {way: WinRate(**result) for way, result in saved["before"].items()}
        else:
            if settings.eval_games:
                say(f"playing {settings.eval_games} games with the untrained policy, twice")
            before = {} if rank else _evaluate_own(settings, policy, stopped)

        with _dashboard(on_terminal):
            trainer = PuffeRL(
                settings.trainer_config(device, folder, seed, ranks),
                vecenv,
                distributed.distribute(policy) if under_torchrun else policy,
            )
        stack.callback(_close, trainer, rank, on_terminal)
        rows = rows or []
        if rows and policy.layout.dropped:
            policy.layout.dropped.count = int(rows[-1]["dropped"])
        if saved:
            say(f"replaying the games up to step {saved['trainer']['global_step']:,}")
            restore_trainer(trainer, saved["trainer"])

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
                    "trainer": trainer_state(trainer) if resumable else None,
                }
                write_checkpoint(folder / CHECKPOINT, content)

        def stop() -> bool:
            return distributed.on_any_rank(stopped()) if under_torchrun else stopped()

        if not saved:
            save()  # before all other files: a run that crashes after this can be resumed
        if not rank:
            _write_config(folder, settings, config, trainer.global_step)
        steps_here = settings.total_steps // ranks
        last_epoch = math.ceil(steps_here / settings.batch_size) - 1
        illegal = 0
        last_said = last_saved = time.monotonic()
        stack.callback(write_metrics)  # also when training raises
        while trainer.global_step < steps_here and not stop():
            policy.explore(*settings.exploration(min(1.0, trainer.epoch / max(1, last_epoch))))
            with _dashboard(on_terminal):
                games = {name: list(values) for name, values in trainer.evaluate().items()}
                distributed.log_together(trainer)  # or the losses would be those of a while ago
                trainer.train()
            illegal += int(sum(games.get("illegal_actions", [])))
            rows.append(_metrics(trainer, games, policy, ranks, rows))
            if not on_terminal and time.monotonic() - last_said > 5:
                last_said = time.monotonic()
                say(_line(rows[-1], settings.total_steps))
            if time.monotonic() - last_saved >= settings.checkpoint_seconds:
                save()
                last_saved = time.monotonic()
        save()
        if not rank:
            draw_curves(folder / "curves.png", rows, _title(settings))
        steps, training_seconds = trainer.global_step * ranks, trainer.uptime
        if not settings.num_workers:
            illegal = sum(env.illegal_actions for env in vecenv.envs)
        if under_torchrun:
            illegal = distributed.sum_over_ranks(illegal)
        interrupted = stop()
        after: dict[str, WinRate] = {}
        if not interrupted and not rank:
            if settings.eval_games:
                say(f"playing {settings.eval_games} games with the trained policy, twice")
            after = _evaluate_own(settings, policy, stopped)
            interrupted = stopped()  # of this process alone: the others have ended
        if interrupted and resumable:
            where = shlex.quote(str(folder))
            say(f"to continue: python -m tcg_flatpolicy train --resume {where}")
    report = Report(
        steps=steps,
        steps_per_second=steps / training_seconds,
        illegal=illegal,
        interrupted=interrupted,
        seconds=time.monotonic() - started,
        before=before,
        after=after,
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
    if settings.total_steps // ranks < settings.batch_size:
        raise ValueError(
            f"total_steps {settings.total_steps} is less than one rollout in each of {ranks} "
            f"processes, {ranks * settings.batch_size}"
        )
    return rank, ranks, device


def _make_vecenv(settings: Settings, seed: int) -> Any:
    from pufferlib import vector

    workers = settings.num_workers
    games: dict[str, Any] = {
        "num_games": settings.num_games // max(1, workers),
        "deck1": settings.deck1,
        "deck2": settings.deck2,
    }
    if settings.two_players:
        games["two_players"] = True
    else:
        games["opponent"] = settings.opponent
    game = load(GAME)
    if not workers:
        return vector.make(
            game,
            env_kwargs={**games, "record": "LOCAL_RANK" not in os.environ},
            backend=vector.Serial,
            num_envs=1,
            seed=seed,
        )
    # The trainer waits for ever for a worker that raised or was ended by Ctrl-C. So workers count
    # illegal actions, and ignore SIGINT.
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return vector.make(
            game,
            env_kwargs={**games, "illegal": "noop"},
            backend=vector.Multiprocessing,
            num_envs=workers,
            num_workers=workers,
            overwork=True,
            seed=seed,
        )
    finally:
        signal.signal(signal.SIGINT, earlier)


def _close(trainer: Any, rank: int, on_terminal: bool) -> None:
    """Stops the trainer's thread, which would keep the process from ending."""
    with _dashboard(on_terminal):
        if rank:  # PuffeRL.close writes a checkpoint, which only rank 0 has
            trainer.utilization.stop()
        else:
            trainer.close()


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
    return evaluate(settings, policy, settings.eval_games, "greedy", seed, stopped)


@contextlib.contextmanager
def _stop_on_sigint() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGINT was sent. A second one raises KeyboardInterrupt.

    Importing pufferl sets a handler that ends the process with nothing written. This replaces it,
    so call it after that import.
    """
    sent = False

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal sent
        if sent:
            raise KeyboardInterrupt
        sent = True

    earlier = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: sent
    finally:
        signal.signal(signal.SIGINT, earlier)


@contextlib.contextmanager
def _dashboard(on_terminal: bool) -> Iterator[None]:
    """Hides PuffeRL's dashboard, which is cursor escapes, unless the output is a terminal."""
    quiet = contextlib.nullcontext() if on_terminal else contextlib.redirect_stdout(io.StringIO())
    with quiet, warnings.catch_warnings():
        # It asks for autocast in float32 too, and torch warns that a CPU has none.
        warnings.filterwarnings("ignore", "In CPU autocast|CUDA is not available", UserWarning)
        yield


def _metrics(
    trainer: Any,
    games: Mapping[str, list[float]],
    policy: Policy,
    ranks: int,
    rows: list[dict[str, float]],
) -> dict[str, float]:
    """One row of metrics.csv: an epoch, and the games of rank 0 that ended in it.

    It reads the trainer's attributes, since train() returns logs on the wrong ranks, with older
    losses.
    """

    def mean(name: str) -> float:
        values = games.get(name, [])
        return float(np.mean(values)) if values else math.nan

    before = rows[-1] if rows else {"steps": 0, "seconds": 0.0}
    steps, seconds = trainer.global_step * ranks, float(trainer.uptime)
    return {
        "steps": steps,
        "seconds": seconds,
        "steps_per_second": (steps - before["steps"]) / (seconds - before["seconds"]),
        "win_rate": mean("win"),
        "episode_length": mean("episode_length"),
        "legal_actions": mean("legal_actions"),
        "illegal_actions": mean("illegal_actions"),
        "learning_rate": float(trainer.optimizer.param_groups[0]["lr"]),
        "temperature": float(policy.temperature),
        "epsilon": float(policy.epsilon),
        **({"dropped": policy.dropped} if policy.layout.dropped else {}),
        **{name: float(value) for name, value in trainer.losses.items()},
    }


def _silent(line: str) -> None:
    """Prints nothing, on ranks other than 0."""


def _line(row: dict[str, float], total: int) -> str:
    return (
        f"{row['steps'] / total:4.0%}  {row['steps']:>10,} steps  "
        f"{row['steps_per_second']:>7,.0f}/s  win {row['win_rate']:.3f}  "
        f"entropy {row['entropy']:.3f}  KL {row['approx_kl']:.4f}  "
        f"value loss {row['value_loss']:.4f}"
    )


def _title(settings: Settings) -> str:
    other = "both players" if settings.two_players else f"{settings.opponent} opponent"
    return f"{settings.deck1} against {settings.deck2} ({other}), seed {settings.seed}"
