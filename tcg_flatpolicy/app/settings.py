"""The settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tcg_flatpolicy.heads import HEADS
from tcg_flatpolicy.puffer import compensated, config
from tcg_flatpolicy.puffer.config import DEFAULTS

GAME = "tcg_flatpolicy.games.essence_wars:make"
"""module:function that makes the game's environment. Its environments have ``make_encoder``."""


def _setting(default: Any, help: str, least: int | None = None) -> Any:
    return field(default=default, metadata={"help": help, "least": least})


def _default(name: str, help: str, least: int | None = None) -> Any:
    return _setting(DEFAULTS[name], help, least)


@dataclass
class Settings:
    """Everything that a training run depends on; each field is a flag of the command line.

    Raises:
        ValueError: a value out of its range, or two that do not fit together.
    """

    seed: int = _default("seed", "random seed for weights, games and sampling")
    total_steps: int = _setting(
        DEFAULTS["total_timesteps"],
        "environment steps to train for; of both players, with two_players",
        1,
    )
    # the game
    deck1: str = _setting("artificer_tokens", "deck of the policy's side, or 'random'")
    deck2: str = _setting("broodmother_pack", "deck of the opponent, or 'random'")
    opponent: str = _setting("greedy", "built-in opponent: greedy or random")
    num_games: int = _setting(256, "number of games played at the same time", 1)
    two_players: bool = _setting(False, "train on both players, without an opponent")
    # the network
    hidden_size: int = _setting(256, "size of the encoder's state vector", 1)
    entity_size: int = _setting(32, "size of the embedding of a card or creature", 1)
    head: str = _setting("flat", "how a tuple is chosen: flat or autoregressive")
    head_width: int = _setting(64, "size of the head's hidden layer", 1)
    recurrent: bool = _setting(False, "put an LSTM between encoder and head")
    invalid: str = _setting("raise", "listed tuples outside the spec: raise an error, or drop them")
    # the trainer, with PufferLib's names
    bptt_horizon: int = _default("bptt_horizon", "steps of each game in a rollout", 1)
    minibatch_size: int = _default("minibatch_size", "environment steps in a minibatch", 1)
    update_epochs: int = _default("update_epochs", "number of passes over each rollout", 1)
    learning_rate: float = _default("learning_rate", "learning rate at the start")
    anneal_lr: bool = _default("anneal_lr", "reduce the learning rate to 0, along a cosine")
    adam_beta1: float = _default("adam_beta1", "Adam's beta1")
    adam_beta2: float = _default("adam_beta2", "Adam's beta2")
    adam_eps: float = _default("adam_eps", "Adam's epsilon")
    optimizer: str = _default(
        "optimizer", "adam, or muon (needs heavyball, at least 2.1 and below 3)"
    )
    gamma: float = _default("gamma", "discount factor of a step")
    gae_lambda: float = _default("gae_lambda", "lambda of generalised advantage estimation")
    ent_coef: float = _default("ent_coef", "weight of the entropy in the loss")
    vf_coef: float = _default("vf_coef", "weight of the value loss")
    clip_coef: float = _default("clip_coef", "clip range of the importance ratio")
    vf_clip_coef: float = _default("vf_clip_coef", "clip range of the change of a value")
    max_grad_norm: float = _default("max_grad_norm", "upper limit of the gradient's norm")
    vtrace_rho_clip: float = _default("vtrace_rho_clip", "upper limit of V-trace's rho")
    vtrace_c_clip: float = _default("vtrace_c_clip", "upper limit of V-trace's c")
    prio_alpha: float = _default(
        "prio_alpha", "exponent of prioritised sampling; 0 samples uniformly"
    )
    prio_beta0: float = _default("prio_beta0", "exponent of its correction, at the start")
    precision: str = _default("precision", "float32 or bfloat16")
    # exploration: part of the policy, changes linearly from the first rollout to the last
    temperature: float = _setting(1.0, "temperature at the start; above 1 is more uniform")
    final_temperature: float = _setting(1.0, "temperature at the end")
    epsilon: float = _setting(0.0, "share of uniform draws from the legal list, at the start")
    final_epsilon: float = _setting(0.0, "share of uniform draws from the legal list, at the end")
    # the run
    checkpoint_seconds: float = _setting(60.0, "seconds between checkpoints; 0: every epoch", 0)
    eval_games: int = _setting(1000, "number of games of each evaluation; 0: none", 0)
    device: str = _setting("auto", "cpu, cuda, or auto: cuda if there is a GPU, else cpu")
    threads: int = _setting(1, "number of torch's CPU threads", 1)
    num_workers: int = _setting(0, "processes that play the games; 0: the trainer's own", 0)
    compile: bool = _default("compile", "compile the update's forward pass with torch.compile")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, least = getattr(self, setting.name), setting.metadata["least"]
            if least is not None and not value >= least:
                raise ValueError(f"{setting.name} must be at least {least}, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2**63 - 1, got {self.seed}")
        for name in ("temperature", "final_temperature"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name in ("epsilon", "final_epsilon"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if self.num_workers and self.num_games % self.num_workers:
            raise ValueError(
                f"num_workers {self.num_workers} must divide num_games {self.num_games}, or be 0"
            )
        if self.head not in HEADS:
            raise ValueError(f"no head is named {self.head!r}; take one of {sorted(HEADS)}")
        if self.invalid not in ("raise", "drop"):
            raise ValueError(f"invalid must be raise or drop, got {self.invalid!r}")
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
                f"two_players trains without an opponent, but opponent is {self.opponent!r}; "
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
        """Names of what depends on total_steps during training."""
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
        """PuffeRL's config.

        With two_players, vf_coef and max_grad_norm are reduced, since half of the rows wait.

        Args:
            device: cpu or cuda.
            folder: of the run.
            seed: of this process; the settings' seed if left out.
            ranks: number of processes, which share total_steps.
        """
        same = asdict(self).keys() & DEFAULTS.keys()
        made = config(
            SimpleNamespace(num_agents=self.batch_size // self.bptt_horizon),
            **{name: getattr(self, name) for name in same},
        )
        made |= {
            "seed": self.seed if seed is None else seed,
            "env": GAME.partition(":")[0].rpartition(".")[2],
            "device": device,
            "total_timesteps": self.total_steps // ranks,
            "use_rnn": self.recurrent,
            "data_dir": str(folder / "pufferlib"),
        }
        if not self.two_players:
            return made
        return compensated(made)


def saved_settings(
    content: Mapping[str, Any], run: Path, changes: Mapping[str, Any] | None = None
) -> Settings:
    """The settings in a checkpoint's content, with changes.

    Raises:
        ValueError: they are another version's, or the changed ones do not fit together.
    """
    try:
        return Settings(**{**content["settings"], **(changes or {})})
    except TypeError as error:
        raise ValueError(f"{run} was written by another version: {error}") from error
