"""PuffeRL's config, complete, and its trainer, closed whatever happens."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tcg_flatpolicy.puffer.contract import MISSING_PUFFERLIB

DEFAULTS: dict[str, Any] = {
    "seed": 1,
    "total_timesteps": 1_250_000,
    "bptt_horizon": 32,
    "minibatch_size": 2048,
    "update_epochs": 2,
    "learning_rate": 2e-3,
    "anneal_lr": True,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "optimizer": "adam",
    "gamma": 0.995,
    "gae_lambda": 0.9,
    "ent_coef": 0.003,
    "vf_coef": 0.5,
    "clip_coef": 0.2,
    "vf_clip_coef": 0.2,
    "max_grad_norm": 0.5,
    "vtrace_rho_clip": 1.0,
    "vtrace_c_clip": 1.0,
    "prio_alpha": 0.0,
    "prio_beta0": 1.0,
    "precision": "float32",
    "compile": False,
    "compile_mode": "default",
    "compile_fullgraph": True,
    "use_rnn": False,
    "device": "cpu",
    "cpu_offload": False,
    "torch_deterministic": True,
    "env": "game",
    "data_dir": "runs",
    "checkpoint_interval": 10**9,
}
"""What trains card games; ``env`` is a name for the dashboard. ``batch_size`` and
``max_minibatch_size`` follow from the environment."""

SHAPES = ("batch_size", "max_minibatch_size")


def config(vecenv: Any, **changes: Any) -> dict[str, Any]:
    """A complete config for the installed PuffeRL, with defaults that train card games.

    A rollout is ``bptt_horizon`` steps of every agent, and the minibatch the largest part of it
    that is at most 2,048 rows. With a recurrent policy, set ``use_rnn=True``. PufferLib's own
    checkpoints are written by ``trainer.close()`` alone, into ``data_dir``.

    Args:
        vecenv: what PuffeRL will train in; its ``num_agents`` is read.
        changes: entries of :data:`DEFAULTS`, ``batch_size`` or ``max_minibatch_size``.

    Raises:
        TypeError: an entry that PuffeRL does not have; the nearest right ones are named.
        ValueError: sizes that do not fit together.
    """
    for name in changes.keys() - DEFAULTS.keys() - set(SHAPES):
        near = difflib.get_close_matches(name, [*DEFAULTS, *SHAPES], n=2)
        known = " or ".join(near) or f"one of {', '.join(sorted([*DEFAULTS, *SHAPES]))}"
        raise TypeError(f"PuffeRL's config has no {name!r}; take {known}")
    made = {**DEFAULTS, **changes}
    agents, horizon = vecenv.num_agents, made["bptt_horizon"]
    batch = made.setdefault("batch_size", agents * horizon)
    rollout = f"{agents} agents * bptt_horizon {horizon}"
    if batch % horizon or batch // horizon < agents:
        raise ValueError(
            f"batch_size {batch} must be a multiple of bptt_horizon {horizon}, and at least one "
            f"rollout, {rollout} = {agents * horizon}"
        )
    if "minibatch_size" not in changes:
        parts = (n for n in range(1, batch // horizon + 1) if (batch // horizon) % n == 0)
        sizes = (batch // n for n in parts)
        made["minibatch_size"] = next(
            (n for n in sizes if n <= DEFAULTS["minibatch_size"]), horizon
        )
    minibatch = made["minibatch_size"]
    made.setdefault("max_minibatch_size", minibatch)
    if minibatch < 1 or batch % minibatch or minibatch % horizon:
        raise ValueError(
            f"minibatch_size {minibatch} must divide batch_size {batch} and be a multiple of "
            f"bptt_horizon {horizon}"
        )
    if made["total_timesteps"] < batch:
        raise ValueError(
            f"total_timesteps {made['total_timesteps']} is less than one rollout, {rollout} = "
            f"{batch}"
        )
    return made


@contextlib.contextmanager
def trainer(
    config: Mapping[str, Any], vecenv: Any, policy: Any, logger: Any = None
) -> Iterator[Any]:
    """PufferLib's trainer, as it is, closed at the end of ``with fp.trainer(...) as trainer:``.

    PuffeRL starts a thread that keeps the process alive until it is closed. At the end of the block
    this calls ``trainer.close()``, which saves the weights in ``data_dir``; after an exception it
    saves nothing, and closes the rest all the same. Worker processes are ended in either case, and
    autocast, which PuffeRL's ``train()`` enters and never leaves, is left.

    PuffeRL logs at most four times a second, and not in its first quarter: the block's first
    ``train()`` always logs.

    Raises:
        ImportError: PufferLib is not installed.
    """
    try:
        from pufferlib.pufferl import PuffeRL
    except ImportError as error:
        raise ImportError(MISSING_PUFFERLIB) from error
    device = torch.device(config["device"]).type
    autocast = torch.is_autocast_enabled(device)
    made, closed = None, False
    try:
        made = PuffeRL(dict(config), vecenv, policy, logger)
        made.last_log_time -= 1.0
        yield made
        # Under torchrun only rank 0 has the checkpoint that close() writes.
        if not torch.distributed.is_initialized() or not torch.distributed.get_rank():
            closed = True
            made.close()
    finally:
        torch.set_autocast_enabled(device, autocast)
        if made is not None:
            made.utilization.stop()
        close_vecenv(vecenv, closed)


def close_vecenv(vecenv: Any, closed: bool = False) -> None:
    """Closes a vector environment, unless it is, and ends its worker processes if it has any."""
    if not closed:
        vecenv.close()
    for process in getattr(vecenv, "processes", ()):
        process.kill()
        process.join()
