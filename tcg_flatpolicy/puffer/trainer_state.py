"""What PufferLib's trainer holds between train() and evaluate(), to go on from there bit for bit.

PufferLib's own checkpoints hold the weights and the optimiser. This adds the scheduler, counters,
generators and games. Not the rollout buffers and the LSTM's state: evaluate() makes them anew.
"""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch

from tcg_flatpolicy.saving import read_tensors, write_tensors
from tcg_flatpolicy.wrapping import env_layers, is_emulation

_BUFFERS = ("observations", "rewards", "terminals", "truncations", "masks")


def save_trainer(trainer: Any, path: str | Path) -> None:
    """Writes :func:`trainer_state` to one file, whole; raises as it does."""
    write_tensors(path, trainer_state(trainer))


def resume_trainer(trainer: Any, path: str | Path) -> None:
    """Restores a new trainer, made with the same settings, from a file of :func:`save_trainer`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged; and as :func:`restore_trainer`.
    """
    restore_trainer(trainer, read_tensors(path, ("environments", "policy", "optimizer", "epoch")))


def trainer_state(trainer: Any) -> dict[str, Any]:
    """Everything that decides what a trainer does next, in tensors and plain values.

    ``torch.load(weights_only=True)`` reads it. Take it after ``trainer.train()`` and before the
    next ``trainer.evaluate()``.

    Args:
        trainer: a PuffeRL over a Serial vector environment, whose infos are plain values. Each
            environment, or what it wraps, can save its games, by ``get_state()`` and
            ``set_state(state)`` or by ``state_dict()`` and ``load_state_dict(state)``; one that the
            seed and the actions determine need not, if it was made by :func:`recorded`.

    Raises:
        TypeError: an environment that cannot, or in another process, or something that is not a
            tensor or a plain value; heavyball's Muon has such things in its state.
    """
    # The legacy one, since no other is shared by all code of a process.
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {
        "environments": [save() for save, _ in _games(trainer)],
        "buffers": {
            name: torch.tensor(getattr(trainer.vecenv, name).view(np.uint8)) for name in _BUFFERS
        },
        "begun": [_begun(environment) for environment in trainer.vecenv.envs],
        "policy": trainer.uncompiled_policy.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "epoch": trainer.epoch,
        "global_step": trainer.global_step,
        "uptime": trainer.uptime,
        # Logged one log later than they were computed.
        "losses": {name: float(value) for name, value in trainer.losses.items()},
        # Of the episodes since the last log, and those that the next recv() will tell of.
        "stats": {name: list(values) for name, values in trainer.stats.items()},
        "infos": list(trainer.vecenv.infos),
        "torch_generator": torch.get_rng_state(),
        "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy_generator": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
    }
    _check_plain(state, "")
    return state


def restore_trainer(trainer: Any, state: Mapping[str, Any]) -> None:
    """Puts a new trainer, made with the same settings, where :func:`trainer_state` was taken.

    Call it last before ``trainer.evaluate()``: it sets torch's and NumPy's generators.

    Raises:
        TypeError: as trainer_state.
        ValueError, RuntimeError: the state is of another policy, optimiser or environment, or its
            learning rate is annealed over another number of epochs.
    """
    own, games = _games(trainer), state["environments"]
    if len(own) != len(games):
        raise ValueError(f"the state is of {len(games)} environments, the trainer has {len(own)}")
    epochs, saved_epochs = trainer.scheduler.T_max, state["scheduler"]["T_max"]
    if trainer.config["anneal_lr"] and epochs != saved_epochs:
        raise ValueError(
            f"the state's learning rate is annealed over {saved_epochs} epochs, the trainer's over "
            f"{epochs}, and the schedule cannot change on the way; make the trainer with the "
            "total_timesteps and batch_size that the state was saved with, or train anew"
        )
    trainer.uncompiled_policy.load_state_dict(state["policy"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    trainer.epoch = state["epoch"]
    trainer.global_step = trainer.last_log_step = state["global_step"]
    trainer.last_log_time = time.time()
    trainer.start_time = trainer.last_log_time - state["uptime"]
    trainer.losses = dict(state["losses"])
    trainer.stats = defaultdict(list, {name: list(v) for name, v in state["stats"].items()})
    for (_, load), saved in zip(own, games, strict=True):
        load(saved)
    for name, saved in state.get("buffers", {}).items():  # an earlier version saved none
        getattr(trainer.vecenv, name).view(np.uint8)[:] = saved.numpy()
    for environment, saved in zip(trainer.vecenv.envs, state.get("begun", []), strict=False):
        vars(environment).update(saved)
    trainer.vecenv.infos = list(state["infos"])
    torch.set_rng_state(state["torch_generator"])
    if state["cuda_generators"]:
        torch.cuda.set_rng_state_all(state["cuda_generators"])
    kind, keys, *rest = state["numpy_generator"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def _check_plain(value: Any, path: str) -> None:
    if type(value) in (list, tuple):
        value = dict(enumerate(value))
    if type(value) in (dict, OrderedDict):
        for key, inner in value.items():
            _check_plain(inner, f"{path}[{key!r}]")
    elif not (
        isinstance(value, torch.Tensor) or type(value) in (str, bytes, int, float, bool, NoneType)
    ):
        raise TypeError(
            f"the trainer's state{path} is a {type(value).__name__}, which "
            "torch.load(weights_only=True) does not read; take the optimizer adam, and tensors and "
            "plain values in infos and in what an environment saves"
        )


def _games(trainer: Any) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """How the games of each environment are saved, and how they are loaded."""
    environments = getattr(trainer.vecenv, "envs", None)
    if environments is None:
        raise TypeError(
            f"{type(trainer.vecenv).__name__} does not show its environments, so their games "
            "cannot be saved; resuming takes pufferlib.vector.Serial"
        )
    return [_game(environment) for environment in environments]


def _game(environment: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    for layer in env_layers(environment):
        for save, load in (("state_dict", "load_state_dict"), ("get_state", "set_state")):
            if hasattr(layer, save) and hasattr(layer, load):
                return getattr(layer, save), getattr(layer, load)
    raise TypeError(
        f"{type(environment).__name__} has neither get_state and set_state nor state_dict and "
        "load_state_dict, so its games cannot be saved: write two of them; or, if the seed and the "
        "actions determine its games, make it as tcg_flatpolicy.puffer.recorded(environment)"
    )


def _begun(environment: Any) -> dict[str, Any]:
    """Whether PufferLib's emulation of a Gymnasium environment has begun and ended a game."""
    if not is_emulation(environment):
        return {}
    return {n: bool(v) for n, v in vars(environment).items() if n in ("initialized", "done")}
