"""Trains a policy on Essence Wars with PufferLib's own trainer, from settings to run folder."""

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from tcg_flatpolicy import distributed, puffer
from tcg_flatpolicy.evaluate import WinRate, play
from tcg_flatpolicy.heads import HEADS
from tcg_flatpolicy.puffer import (
    Greedy,
    Policy,
    RecurrentPolicy,
    TopK,
    restore_trainer,
    trainer_state,
)
from tcg_flatpolicy.run_folder import (
    CHECKPOINT,
    draw_curves,
    folder_of,
    provenance,
    read_checkpoint,
    read_csv,
    read_json,
    write_checkpoint,
    write_csv,
    write_json,
)


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """Everything that a training run depends on; each is a flag of the command line."""

    seed: int = _setting(1, "of the network, the games and the draws")
    total_steps: int = _setting(
        1_250_000, "environment steps to train for; of both players, with two_players"
    )
    # the game
    deck1: str = _setting("artificer_tokens", "deck of the policy's side; 'random' for any")
    deck2: str = _setting("broodmother_pack", "deck of the opponent; 'random' for any")
    opponent: str = _setting("greedy", "built-in opponent: greedy or random")
    num_games: int = _setting(256, "games played side by side")
    two_players: bool = _setting(
        False, "train on both players of each game instead of against an opponent"
    )
    # the network
    hidden_size: int = _setting(256, "width of the encoder")
    entity_size: int = _setting(32, "width of a card's or creature's embedding")
    head: str = _setting("flat", "how a tuple is chosen: flat or autoregressive")
    head_width: int = _setting(64, "width of the head's hidden layer")
    recurrent: bool = _setting(False, "put an LSTM between encoder and decision")
    # the trainer: PufferLib's names
    bptt_horizon: int = _setting(32, "steps of each game in a rollout")
    minibatch_size: int = _setting(2048, "environment steps in a minibatch")
    update_epochs: int = _setting(2, "passes over each rollout")
    learning_rate: float = _setting(2e-3, "of Adam, at the start")
    anneal_lr: bool = _setting(True, "let the learning rate fall to 0, as a cosine")
    adam_beta1: float = _setting(0.9, "of Adam")
    adam_beta2: float = _setting(0.999, "of Adam")
    adam_eps: float = _setting(1e-8, "of Adam")
    optimizer: str = _setting("adam", "adam, or muon (needs heavyball, at least 2.1 and below 3)")
    gamma: float = _setting(0.995, "discount of a step")
    gae_lambda: float = _setting(0.9, "of the generalised advantage estimate")
    ent_coef: float = _setting(0.003, "weight of the entropy in the loss")
    vf_coef: float = _setting(0.5, "weight of the value loss")
    clip_coef: float = _setting(0.2, "clip of the importance ratio")
    vf_clip_coef: float = _setting(0.2, "clip of the change of a value")
    max_grad_norm: float = _setting(0.5, "clip of the gradient's norm")
    vtrace_rho_clip: float = _setting(1.0, "clip of V-trace's rho")
    vtrace_c_clip: float = _setting(1.0, "clip of V-trace's c")
    prio_alpha: float = _setting(0.0, "prioritised sampling of segments; 0 is uniform")
    prio_beta0: float = _setting(1.0, "its correction, at the start")
    precision: str = _setting("float32", "float32 or bfloat16")
    # exploration that is part of the policy, annealed linearly from the first rollout to the last
    temperature: float = _setting(1.0, "at the start of training: above 1 flattens the policy")
    final_temperature: float = _setting(1.0, "at the end of training")
    epsilon: float = _setting(0.0, "at the start: share of draws uniform over the legal tuples")
    final_epsilon: float = _setting(0.0, "at the end of training")
    # the run
    checkpoint_seconds: float = _setting(60.0, "between checkpoints; 0 for one every epoch")
    eval_games: int = _setting(1000, "games of each evaluation; 0 for none")
    device: str = _setting("auto", "cpu, cuda, or auto: cuda where there is one")
    threads: int = _setting(1, "torch's threads; networks this small gain little from more")
    num_workers: int = _setting(0, "processes that play the games; 0 for the trainer's own")
    compile: bool = _setting(False, "let torch.compile make one graph of the update's forward")

    def __post_init__(self) -> None:
        for name in (
            "total_steps",
            "hidden_size",
            "entity_size",
            "head_width",
            "num_games",
            "bptt_horizon",
            "minibatch_size",
            "update_epochs",
            "threads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2**63 - 1, got {self.seed}")
        if self.eval_games < 0:
            raise ValueError(f"eval_games must not be negative, got {self.eval_games}")
        for name in ("temperature", "final_temperature"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name in ("epsilon", "final_epsilon"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if not self.checkpoint_seconds >= 0:
            raise ValueError(
                f"checkpoint_seconds must not be negative, got {self.checkpoint_seconds}"
            )
        if self.num_workers < 0 or (self.num_workers and self.num_games % self.num_workers):
            raise ValueError(
                f"num_workers {self.num_workers} must divide num_games {self.num_games}, or be 0"
            )
        if self.head not in HEADS:
            raise ValueError(f"no head is named {self.head!r}; take one of {sorted(HEADS)}")
        if self.compile and self.head != "flat":
            raise ValueError(
                f"compile takes the head 'flat', got the head {self.head!r}; leave one of them out"
            )
        if self.opponent == "self":
            raise ValueError(
                "opponent 'self' alternates between two players in one row, which PPO's value "
                "targets do not allow for; train against greedy or random"
            )
        if self.two_players and self.opponent != "greedy":
            raise ValueError(
                f"two_players is training without an opponent, but opponent is {self.opponent!r}; "
                "leave one of them out"
            )
        rollout = f"{'2 * ' if self.two_players else ''}num_games * bptt_horizon"
        if self.total_steps < self.batch_size:
            raise ValueError(
                f"total_steps {self.total_steps} is less than one rollout, {rollout} = "
                f"{self.batch_size}"
            )
        if self.batch_size % self.minibatch_size or self.minibatch_size % self.bptt_horizon:
            raise ValueError(
                f"minibatch_size {self.minibatch_size} must divide {rollout} = "
                f"{self.batch_size} and be a multiple of bptt_horizon {self.bptt_horizon}"
            )

    @property
    def batch_size(self) -> int:
        """Environment steps of a rollout."""
        return self.num_games * (2 if self.two_players else 1) * self.bptt_horizon

    @property
    def annealed(self) -> list[str]:
        """What follows total_steps."""
        exploration = (self.temperature, self.epsilon)
        follows = {
            "the learning rate (anneal_lr)": self.anneal_lr,
            "exploration": exploration != (self.final_temperature, self.final_epsilon),
            "the correction of prioritised sampling": self.prio_alpha and self.prio_beta0 != 1,
        }
        return [name for name, does in follows.items() if does]

    def exploration(self, share: float) -> tuple[float, float]:
        """Temperature and epsilon at a share, 0 to 1, of the way from first to last rollout."""
        return (
            self.temperature + share * (self.final_temperature - self.temperature),
            self.epsilon + share * (self.final_epsilon - self.epsilon),
        )

    def trainer_config(
        self, device: str, folder: Path, seed: int | None = None, ranks: int = 1
    ) -> dict[str, Any]:
        """What PuffeRL wants to know; ``seed`` and its share of the steps are the rank's own.

        With two_players, half of the rows wait, and what that changes is compensated.
        """
        config = {
            **asdict(self),
            "seed": self.seed if seed is None else seed,
            "env": "essence_wars",
            "device": device,
            "total_timesteps": self.total_steps // ranks,
            "batch_size": self.batch_size,
            "max_minibatch_size": self.minibatch_size,
            "use_rnn": self.recurrent,
            "data_dir": str(folder / "pufferlib"),
            "checkpoint_interval": 10**9,  # ours holds what a run needs to go on
            "torch_deterministic": True,
            "cpu_offload": False,
            "compile_mode": "default",
            "compile_fullgraph": True,
        }
        if not self.two_players:
            return config
        return puffer.compensated(config)


@dataclass
class Report:
    """What a training run came to."""

    steps: int
    steps_per_second: float
    illegal: int
    """Illegal actions while training, counted by the environment; with workers, in games that
    ended."""
    interrupted: bool
    seconds: float
    """Of the whole run, evaluations included."""
    before: dict[str, WinRate]
    """"sampling" and "mode" -> what the untrained policy won; evaluations that were interrupted are
    left out."""
    after: dict[str, WinRate]


def make_policy(settings: Settings, env: Any) -> Policy:
    """The policy of these settings, on the CPU."""
    from tcg_flatpolicy.envs.essence_wars import EssenceWarsEncoder

    encoder = EssenceWarsEncoder(env.legal_layout, settings.hidden_size, settings.entity_size)
    kind = RecurrentPolicy if settings.recurrent else Policy
    return kind(env, encoder=encoder, head=settings.head, width=settings.head_width)


def evaluate(
    settings: Settings,
    policy: Policy,
    games: int,
    opponent: str,
    seed: int,
    stopped: Callable[[], bool] = lambda: False,
    top_k: int | None = None,
) -> dict[str, WinRate]:
    """Plays games against a built-in opponent, sampling and with the mode; {} for 0 games.

    With ``top_k`` also sampling among that many most probable tuples. It plays on the CPU,
    in float32 and without the exploration of training. Once ``stopped`` says True it plays no more,
    and leaves out the way that was being played: the games that have ended by then are the short
    ones.
    """
    from tcg_flatpolicy.envs.essence_wars import EssenceWars

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
    env = EssenceWars(slots, settings.deck1, settings.deck2, opponent, seed=seed)
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
    """Trains as settings say, and leaves config, metrics, checkpoint and picture in the folder.

    PuffeRL itself does the training: evaluate(), train(), and again. On a terminal it shows its own
    dashboard; elsewhere a line goes to ``say`` every few seconds. SIGINT ends the run after the
    epoch it is in, with all of its files and the report, or the evaluation it is in, which is left
    out; a second SIGINT ends it at once, and what it leaves is the checkpoint before. The first
    checkpoint is written before the first epoch.

    Started by torchrun, each process plays num_games games of its own, and the policy is one:
    total_steps and the report's steps are those of all processes together. The process of rank 0
    evaluates, speaks and writes; the others return a report without evaluations.

    Raises:
        ImportError: PufferLib or the game is not installed.
        RuntimeError: the installed PufferLib does not behave as this library relies on.
        FileExistsError: the folder already holds a run, or a config.json.
        ValueError: settings that cannot be under torchrun.
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
    """Goes on with a run from its checkpoint to its total_steps, in the same folder.

    On a CPU and without compile the run continues bit for bit: what it leaves is what it would have
    left had it never stopped, but for times. The games are played again up to the checkpoint, which
    takes a fraction of the time that they took: at most a minute after a million steps. A run that
    had ended is evaluated and reported again.

    Args:
        folder: of the run, or its checkpoint.pt.
        changes: settings that are to be others. Only total_steps can be, and only where nothing
            follows it (no annealing).
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
        raise ValueError(f"{folder} cannot be resumed, only evaluated: {why}; train anew")
    for name, value in asdict(settings).items():
        if name in saved and saved[name] != value:
            if name == "total_steps" and not settings.annealed:
                continue
            what = f"{name} was {saved[name]}, not {value}"
            if name == "total_steps":
                what += f", which {' and '.join(settings.annealed)} followed"
            raise ValueError(
                f"a resumed run keeps its settings, and {what}; leave it out, or train anew"
            )
    rows = _rows_until(folder / "metrics.csv", content["trainer"]["global_step"])
    config = folder / "config.json"
    return _run(settings, folder, say, content, rows, read_json(config) if config.exists() else {})


def _rows_until(path: Path, steps: int) -> list[dict[str, float]]:
    """What metrics.csv, which may be ahead of a checkpoint, holds up to that."""
    if not steps:
        return []
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing, and a run that goes on adds to it; put it back, or train anew"
        )
    rows = [row for row in read_csv(path) if row.get("steps", math.inf) <= steps]
    if not rows or rows[-1]["steps"] != steps:
        raise ValueError(
            f"{path} has no row of step {steps}, at which the checkpoint was written; put back the "
            "one that had, or train anew"
        )
    return rows


def saved_settings(
    content: Mapping[str, Any], run: Path, changes: Mapping[str, Any] | None = None
) -> Settings:
    """The settings in a checkpoint's content, with changes.

    Raises:
        ValueError: they are another version's, or the changed ones do not go together.
    """
    try:
        return Settings(**{**content["settings"], **(changes or {})})
    except TypeError as error:
        raise ValueError(f"{run} was written by another version: {error}") from error


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
    """A whole run, or the rest of one: its checkpoint, metrics until then, and config.json."""
    from pufferlib.pufferl import PuffeRL

    puffer.check_contract()
    if settings.compile:
        from torch._dynamo import config as dynamo

        # For operators whose size is known only when they run; before torch 2.13 it must be asked.
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
            stack.callback(torch.distributed.destroy_process_group)
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
        if saved:
            say(f"playing the games again up to step {saved['trainer']['global_step']:,}")
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
            save()  # first of all files: a run that crashes at any time after this can be resumed
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
            say(f"to go on from here: python -m tcg_flatpolicy train --resume {where}")
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
        raise ValueError("compile and torchrun together are not supported; leave one of them out")
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
    kind: Callable[..., Any]
    if settings.two_players:
        from tcg_flatpolicy.envs.two_players import EssenceWarsTwoPlayers as kind
    else:
        from tcg_flatpolicy.envs.essence_wars import EssenceWars as kind

        games["opponent"] = settings.opponent
    if not workers:
        return vector.make(
            kind,
            env_kwargs={**games, "record": "LOCAL_RANK" not in os.environ},
            backend=vector.Serial,
            num_envs=1,
            seed=seed,
        )
    # A worker that raised would leave the trainer waiting for ever, and so would one that Ctrl-C
    # ends: so illegal actions are counted, and SIGINT is ignored there.
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return vector.make(
            kind,
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
    """Stops the trainer's thread, which would keep the process alive."""
    with _dashboard(on_terminal):
        if rank:  # PuffeRL.close writes a checkpoint, which only rank 0 has
            trainer.utilization.stop()
        else:
            trainer.close()


def _write_config(
    folder: Path, settings: Settings, earlier: Mapping[str, Any] | None, steps: int
) -> None:
    """Settings and provenance; of a resumed run, the step and the provenance of each part."""
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
    """Yields a question: was SIGINT sent? A second one raises KeyboardInterrupt.

    pufferl takes SIGINT for itself when it is imported, and would end the process with nothing
    written; this comes after that import.
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
    """PuffeRL draws its dashboard with cursor escapes: noise on anything that is not a terminal."""
    quiet = contextlib.nullcontext() if on_terminal else contextlib.redirect_stdout(io.StringIO())
    with quiet, warnings.catch_warnings():
        # It always asks for autocast, in float32 too, where torch says that there is none on a CPU.
        warnings.filterwarnings("ignore", "In CPU autocast|CUDA is not available", UserWarning)
        yield


def _metrics(
    trainer: Any,
    games: Mapping[str, list[float]],
    policy: Policy,
    ranks: int,
    rows: list[dict[str, float]],
) -> dict[str, float]:
    """One row of metrics.csv: of an epoch, the games of rank 0 that ended in it.

    It is made of what the trainer holds, since train() returns its logs on the wrong ranks, and
    losses that are older.
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
        **{name: float(value) for name, value in trainer.losses.items()},
    }


def _silent(line: str) -> None:
    """What ranks other than 0 say."""


def _line(row: dict[str, float], total: int) -> str:
    return (
        f"{row['steps'] / total:4.0%}  {row['steps']:>10,} steps  "
        f"{row['steps_per_second']:>7,.0f}/s  win {row['win_rate']:.3f}  "
        f"entropy {row['entropy']:.3f}  KL {row['approx_kl']:.4f}  "
        f"value loss {row['value_loss']:.4f}"
    )


def _title(settings: Settings) -> str:
    other = "both players" if settings.two_players else f"{settings.opponent} opponent"
    return (
        f"Essence Wars: {settings.deck1} against {settings.deck2} ({other}), seed {settings.seed}"
    )
