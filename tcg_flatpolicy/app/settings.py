"""The settings of a training run, as flags and as a TOML file."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tcg_flatpolicy.heads import HEADS
from tcg_flatpolicy.puffer import compensated, config
from tcg_flatpolicy.puffer.config import DEFAULTS
from tcg_flatpolicy.puffer.games import agents_per_game

SECTIONS = ("encoder", "policy", "trainer", "run")
"""Of the TOML file, besides ``env``."""


def _setting(section: str, default: Any, help: str, least: int | None = None) -> Any:
    return field(default=default, metadata={"section": section, "help": help, "least": least})


def _default(name: str, help: str, least: int | None = None) -> Any:
    return _setting("trainer", DEFAULTS[name], help, least)


@dataclass(init=False)
class Settings:
    """Everything that a training run depends on; each field is a flag of the command line.

    A name that is no field is an argument of the engine's factory, and goes to ``env``:
    ``Settings(num_games=32)`` is ``Settings(env={"num_games": 32})``.

    Raises:
        ValueError: a value out of its range, or two that do not fit together.
    """

    engine: str = "essence_wars"
    env: dict[str, Any] = field(default_factory=dict)
    # the network
    encoder: str = _setting("encoder", "", "module:name, called with (layout, hidden_size)")
    hidden_size: int = _setting("encoder", 256, "size of the encoder's state vector", 1)
    entity_size: int = _setting("encoder", 32, "size of the embedding of a card or creature", 1)
    head: str = _setting("policy", "flat", "how a tuple is chosen: flat or autoregressive")
    head_width: int = _setting("policy", 64, "size of the head's hidden layer", 1)
    recurrent: bool = _setting("policy", False, "put an LSTM between encoder and head")
    invalid: str = _setting(
        "policy", "raise", "listed tuples outside the spec: raise an error, or drop them"
    )
    spec: str = _setting("policy", "", "module:name of an ActionSpec, if the engine brings none")
    layout: str = _setting(
        "policy",
        "",
        "module:name of a LegalLayout, or the two keys of a Dict observation, count,list; if the "
        "engine brings none",
    )
    # the trainer, with PufferLib's names
    bptt_horizon: int = _default("bptt_horizon", "steps of each game in a rollout", 1)
    minibatch_size: int = _setting(
        "trainer", 0, "environment steps in a minibatch; 0: the largest that fits, at most 2048", 0
    )
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
    compile: bool = _default("compile", "compile the update's forward pass with torch.compile")
    # exploration: part of the policy, changes linearly from the first rollout to the last
    temperature: float = _setting(
        "policy", 1.0, "temperature at the start; above 1 is more uniform"
    )
    final_temperature: float = _setting("policy", 1.0, "temperature at the end")
    epsilon: float = _setting(
        "policy", 0.0, "share of uniform draws from the legal list, at the start"
    )
    final_epsilon: float = _setting(
        "policy", 0.0, "share of uniform draws from the legal list, at the end"
    )
    # the run
    seed: int = _setting("run", DEFAULTS["seed"], "random seed for weights, games and sampling")
    total_steps: int = _setting(
        "run",
        DEFAULTS["total_timesteps"],
        "environment steps to train for; those of all players of a game together",
        1,
    )
    checkpoint_seconds: float = _setting(
        "run", 60.0, "seconds between checkpoints; 0: every epoch", 0
    )
    eval_games: int = _setting("run", 1000, "number of games of each evaluation; 0: none", 0)
    device: str = _setting("run", "auto", "cpu, cuda, or auto: cuda if there is a GPU, else cpu")
    threads: int = _setting("run", 1, "number of torch's CPU threads", 1)
    num_envs: int = _setting(
        "run",
        0,
        "copies of the environment; 0: one of a PufferEnv, which plays many games itself, else 64",
        0,
    )
    num_workers: int = _setting("run", 0, "processes that play the games; 0: the trainer's own", 0)

    def __init__(self, **given: Any) -> None:
        env = dict(given.pop("env", {}))
        self.engine = given.pop("engine", "essence_wars")
        for setting in flags():
            setattr(self, setting.name, given.pop(setting.name, setting.default))
        self.env = {**env, **given}
        self._check()

    def _check(self) -> None:
        for setting in flags():
            value, least = getattr(self, setting.name), setting.metadata["least"]
            if type(value) is not type(setting.default) and (
                type(value) is not int or type(setting.default) is not float
            ):
                kind = type(setting.default).__name__
                raise ValueError(f"{setting.name} must be of type {kind}, got {value!r}")
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
        if self.head not in HEADS:
            raise ValueError(f"no head is named {self.head!r}; take one of {sorted(HEADS)}")
        if self.invalid not in ("raise", "drop"):
            raise ValueError(f"invalid must be raise or drop, got {self.invalid!r}")
        if self.compile and self.head != "flat":
            raise ValueError(
                f"compile takes the head 'flat', got the head {self.head!r}; leave one of them out"
            )

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
        self, vecenv: Any, device: str, folder: Path, seed: int | None = None, ranks: int = 1
    ) -> dict[str, Any]:
        """PuffeRL's config.

        Where a game has n agents, vf_coef and max_grad_norm are reduced to an nth, since the other
        rows wait.

        Args:
            vecenv: to train in.
            device: cpu or cuda.
            folder: of the run.
            seed: of this process; the settings' seed if left out.
            ranks: number of processes, which share total_steps.

        Raises:
            ValueError: total_steps or minibatch_size do not fit a rollout.
        """
        rollout = vecenv.num_agents * self.bptt_horizon
        if self.total_steps // ranks < rollout:
            each = f" in each of {ranks} processes" if ranks > 1 else ""
            raise ValueError(
                f"total_steps {self.total_steps} is less than one rollout{each}, "
                f"{'' if ranks == 1 else f'{ranks} * '}{vecenv.num_agents} agents * bptt_horizon "
                f"{self.bptt_horizon} = {ranks * rollout}"
            )
        names = [setting.name for setting in flags() if setting.name in DEFAULTS]
        changes = {name: getattr(self, name) for name in names}
        if not self.minibatch_size:
            del changes["minibatch_size"]
        changes |= {
            "seed": self.seed if seed is None else seed,
            "env": self.engine,
            "device": device,
            "total_timesteps": self.total_steps // ranks,
            "use_rnn": self.recurrent,
            "data_dir": str(folder / "pufferlib"),
        }
        return compensated(config(vecenv, **changes), 1 / agents_per_game(vecenv))

    def as_toml(self) -> str:
        """The settings as a TOML file that :func:`read_toml` reads."""
        sections: dict[str, dict[str, Any]] = {"env": self.env, **{name: {} for name in SECTIONS}}
        for setting in flags():
            sections[setting.metadata["section"]][setting.name] = getattr(self, setting.name)
        lines = [f"engine = {json.dumps(self.engine)}"]
        for name, values in sections.items():
            lines += ["", f"[{name}]"]
            for key, value in values.items():
                if value is not None:  # which TOML cannot say; it is the argument's default
                    text = repr(value) if type(value) is float else json.dumps(value)
                    lines.append(f"{key} = {text}")
        return "\n".join(lines) + "\n"


def flags() -> list[Any]:
    """The fields that are flags: all but the engine and its arguments."""
    return [setting for setting in fields(Settings) if setting.name not in ("engine", "env")]


def read_toml(path: Path) -> dict[str, Any]:
    """What Settings takes, of a TOML file: ``engine``, and the sections env, encoder, policy, ...

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, or names a section or setting that does not exist.
        ImportError: Python is older than 3.11, and tomli is not installed.
    """
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[import-not-found,no-redef]
        except ImportError as error:
            raise ImportError("--config needs Python 3.11, or pip install tomli") from error
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    given: dict[str, Any] = {}
    for section, values in content.items():
        if section in ("engine", "env"):
            given[section] = values
            continue
        known = [s.name for s in flags() if s.metadata["section"] == section]
        if not known or not isinstance(values, dict):
            raise _unknown(f"{path}: [{section}]", section, ["env", *SECTIONS])
        for name in values.keys() - set(known):
            raise _unknown(f"{path}: {name} in [{section}]", name, known)
        given |= values
    return given


def _unknown(what: str, name: str, known: list[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=2) or known
    return ValueError(f"{what} does not exist; take {' or '.join(near)}")


def saved_settings(
    content: Mapping[str, Any], run: Path, changes: Mapping[str, Any] | None = None
) -> Settings:
    """The settings in a checkpoint's content, with changes.

    Raises:
        ValueError: they are another version's, or the changed ones do not fit together.
    """
    saved = content["settings"]
    if not isinstance(saved, Mapping):
        raise ValueError(f"{run} was written by another version: its settings are no table")
    return Settings(**{**saved, **(changes or {})})
