"""Trains a policy on Essence Wars with PufferLib's own trainer, from settings to run folder."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tcg_flatpolicy import puffer
from tcg_flatpolicy.evaluate import WinRate, play
from tcg_flatpolicy.heads import HEADS
from tcg_flatpolicy.policy import Greedy, Policy, RecurrentPolicy
from tcg_flatpolicy.run_folder import (
    CHECKPOINT,
    draw_curves,
    provenance,
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
    total_steps: int = _setting(1_250_000, "environment steps to train for")
    # the game
    deck1: str = _setting("artificer_tokens", "deck of the policy's side; 'random' for any")
    deck2: str = _setting("broodmother_pack", "deck of the opponent; 'random' for any")
    opponent: str = _setting("greedy", "built-in opponent: greedy or random")
    num_games: int = _setting(256, "games played side by side")
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
    # exploration that is part of the policy
    temperature: float = _setting(1.0, "while training: above 1 flattens the policy")
    epsilon: float = _setting(0.0, "while training: share of draws uniform over the legal tuples")
    # the run
    eval_games: int = _setting(1000, "games of each evaluation; 0 for none")
    device: str = _setting("auto", "cpu, cuda, or auto: cuda where there is one")
    threads: int = _setting(1, "torch's threads; networks this small gain little from more")

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
        if self.head not in HEADS:
            raise ValueError(f"no head is named {self.head!r}; take one of {sorted(HEADS)}")
        if self.eval_games < 0:
            raise ValueError(f"eval_games must not be negative, got {self.eval_games}")
        if self.opponent == "self":
            raise ValueError(
                "opponent 'self' alternates between two players in one row, which PPO's value "
                "targets do not allow for; train against greedy or random"
            )
        if self.total_steps < self.batch_size:
            raise ValueError(
                f"total_steps {self.total_steps} is less than one rollout, num_games * "
                f"bptt_horizon = {self.batch_size}"
            )
        if self.batch_size % self.minibatch_size or self.minibatch_size % self.bptt_horizon:
            raise ValueError(
                f"minibatch_size {self.minibatch_size} must divide num_games * bptt_horizon = "
                f"{self.batch_size} and be a multiple of bptt_horizon {self.bptt_horizon}"
            )

    @property
    def batch_size(self) -> int:
        """Environment steps of a rollout."""
        return self.num_games * self.bptt_horizon

    def trainer_config(self, device: str, folder: Path) -> dict[str, Any]:
        """What PuffeRL wants to know."""
        return {
            **asdict(self),
            "env": "essence_wars",
            "device": device,
            "total_timesteps": self.total_steps,
            "batch_size": self.batch_size,
            "max_minibatch_size": self.minibatch_size,
            "use_rnn": self.recurrent,
            "data_dir": str(folder / "pufferlib"),
            "checkpoint_interval": 10**9,  # ours holds the settings too
            "torch_deterministic": True,
            "cpu_offload": False,
            "compile": False,
            "compile_mode": "default",
            "compile_fullgraph": False,
        }


@dataclass
class Report:
    """What a training run came to."""

    steps: int
    steps_per_second: float
    illegal: int
    """Illegal actions while training, counted by the environment."""
    interrupted: bool
    seconds: float
    """Of the whole run, evaluations included."""
    before: dict[str, WinRate]
    """"sampling" and "mode" -> what the untrained policy won."""
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
) -> dict[str, WinRate]:
    """Plays games against a built-in opponent, sampling and with the mode; {} for 0 games.

    It plays on the CPU and without the exploration of training.
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
    return {
        "sampling": play(player, env, games, seed, stopped),
        "mode": play(Greedy(player), env, games, seed, stopped),
    }


def train(settings: Settings, folder: Path, say: Callable[[str], None] = print) -> Report:
    """Trains as settings say, and leaves config, metrics, checkpoint and picture in the folder.

    PuffeRL itself does the training: evaluate(), train(), and again. On a terminal it shows its own
    dashboard; elsewhere a line goes to ``say`` every few seconds. SIGINT ends the run after the
    epoch it is in, with all of its files and the report; a second SIGINT ends it at once.

    Raises:
        ImportError: PufferLib or the game is not installed.
        RuntimeError: the installed PufferLib does not behave as this library relies on.
        FileExistsError: the folder already holds a run.
    """
    from pufferlib import vector
    from pufferlib.pufferl import PuffeRL

    from tcg_flatpolicy.envs.essence_wars import EssenceWars

    puffer.check_contract()
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} already holds a run; name another folder with --folder")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)

    vecenv = vector.make(
        EssenceWars,
        env_kwargs={
            "num_games": settings.num_games,
            "deck1": settings.deck1,
            "deck2": settings.deck2,
            "opponent": settings.opponent,
        },
        backend=vector.Serial,
        num_envs=1,
        seed=settings.seed,
    )
    env = vecenv.driver_env
    policy = make_policy(settings, env).to(device)
    on_terminal = sys.stdout.isatty()

    with _stop_on_sigint() as stopped:
        policy.explore(settings.temperature, settings.epsilon)
        if settings.eval_games:
            say(f"playing {settings.eval_games} games with the untrained policy, twice")
        before = _evaluate_own(settings, policy, stopped)

        with _dashboard(on_terminal):
            trainer = PuffeRL(settings.trainer_config(device, folder), vecenv, policy)
        write_json(folder / "config.json", {"settings": asdict(settings), **provenance()})
        rows: list[dict[str, float]] = []
        training_started = time.monotonic()
        last_said = 0.0
        try:
            while trainer.global_step < settings.total_steps and not stopped():
                with _dashboard(on_terminal):
                    trainer.evaluate()
                    logs = trainer.train()
                if not logs:
                    continue
                rows.append(_metrics(logs, trainer.losses))
                if not on_terminal and time.monotonic() - last_said > 5:
                    last_said = time.monotonic()
                    say(_line(rows[-1], settings.total_steps))
        finally:
            seconds = time.monotonic() - training_started
            steps = trainer.global_step
            try:
                write_csv(folder / "metrics.csv", rows)
                write_checkpoint(
                    folder / CHECKPOINT,
                    {"policy": policy.state_dict(), "settings": asdict(settings)},
                )
                draw_curves(folder / "curves.png", rows, _title(settings))
            finally:  # or its thread would keep the process alive
                with _dashboard(on_terminal):
                    trainer.close()

        interrupted = stopped()
        after: dict[str, WinRate] = {}
        if not interrupted:
            if settings.eval_games:
                say(f"playing {settings.eval_games} games with the trained policy, twice")
            after = _evaluate_own(settings, policy, stopped)
    report = Report(
        steps=steps,
        steps_per_second=steps / seconds,
        illegal=env.illegal_actions,
        interrupted=interrupted,
        seconds=time.monotonic() - started,
        before=before,
        after=after,
    )
    write_json(folder / "report.json", {**asdict(report), **provenance()})
    return report


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
        warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)
        yield


def _metrics(logs: dict[str, Any], losses: dict[str, float]) -> dict[str, float]:
    """One row of metrics.csv. The losses come from the trainer, since its logs hold older ones."""

    def environment(name: str) -> float:
        return float(logs.get(f"environment/{name}", float("nan")))

    return {
        "steps": int(logs["agent_steps"]),
        "seconds": float(logs["uptime"]),
        "steps_per_second": float(logs["SPS"]),
        "win_rate": environment("win"),
        "episode_length": environment("episode_length"),
        "legal_actions": environment("legal_actions"),
        "illegal_actions": environment("illegal_actions"),
        "learning_rate": float(logs["learning_rate"]),
        **{name: float(value) for name, value in losses.items()},
    }


def _line(row: dict[str, float], total: int) -> str:
    return (
        f"{row['steps'] / total:4.0%}  {row['steps']:>10,} steps  "
        f"{row['steps_per_second']:>7,.0f}/s  win {row['win_rate']:.3f}  "
        f"entropy {row['entropy']:.3f}  KL {row['approx_kl']:.4f}  "
        f"value loss {row['value_loss']:.4f}"
    )


def _title(settings: Settings) -> str:
    return (
        f"Essence Wars: {settings.deck1} against {settings.deck2} ({settings.opponent} opponent), "
        f"seed {settings.seed}"
    )
