"""What PufferLib's trainer, left as it is, needs in several processes that torchrun starts.

Each has its own games, and all train one policy by DistributedDataParallel.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tcg_flatpolicy.puffer import Policy


def start(device: str = "auto") -> tuple[int, str]:
    """Joins the processes that torchrun started: nccl on GPUs, one each, or gloo on the CPU.

    Args:
        device: "cuda" (the GPU that has the number of this process on this machine), "cpu", or
            "auto": cuda where there are as many GPUs as processes.

    Returns:
        The rank, 0 to world size - 1, and "cuda" or "cpu", for the policy and the trainer's config.

    Raises:
        RuntimeError: torchrun did not start this process.
        ValueError: fewer GPUs than processes, with "cuda"; or no such device.
    """
    missing = [key for key in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if key not in os.environ]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} is not in the environment, so torchrun did not start this "
            "process; start it with: torchrun --standalone --nproc-per-node 2 script.py"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    gpus, processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "auto":
        device = "cuda" if gpus >= processes else "cpu"
    if device == "cuda" and gpus < processes:
        raise ValueError(
            f"{processes} processes need a GPU each, not {gpus}: start fewer or take device='cpu'"
        )
    if device == "cuda":  # without a number, so that PuffeRL asks for autocast by its right name
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    return torch.distributed.get_rank(), device


def stop() -> None:
    """Leaves the processes that :func:`start` joined.

    A thread of gloo may still have to let go of a tensor, for which it needs the interpreter's
    lock; and Python, which holds that lock, would wait for the thread for ever at the group's end.
    """
    time.sleep(0.1)  # without the lock
    torch.distributed.destroy_process_group()


def distribute(policy: nn.Module) -> DistributedDataParallel:
    """The policy with its gradients averaged over all processes, for PuffeRL.

    Every process starts from the parameters and the exploration of rank 0, and keeps the same
    parameters. Exploration is then each process's own: call explore() on the policy, after this,
    before evaluate(). Save ``policy.state_dict()``, whose names have no prefix.

    Args:
        policy: a Policy, a RecurrentPolicy or PufferLib's LSTMWrapper of one, on its device.

    Raises:
        RuntimeError: no process group.
    """
    if not torch.distributed.is_initialized():
        raise RuntimeError("distribute() needs a process group: call distributed.start() before")
    # No find_unused_parameters, which would not find the tensors in a distribution. Every parameter
    # takes part, also without any legal tuple.
    wrapped = DistributedDataParallel(policy)
    # What a rollout is drawn with is each process's own, not rank 0's at each forward. (As an
    # argument, torch deprecates it.)
    wrapped.broadcast_buffers = False
    for module in policy.modules():
        if isinstance(module, Policy):
            settings = module.exploration.numbers.clone()
            torch.distributed.broadcast(settings, 0)
            module.explore(*settings.tolist())
    wrapped.forward_eval = policy.forward_eval
    wrapped.hidden_size = policy.hidden_size
    return wrapped


def log_together(trainer: Any) -> None:
    """Makes the next ``trainer.train()`` log; call it in every process before each.

    PuffeRL adds up its logs over all processes once a quarter of a second has passed by a process's
    own clock: all hang where it has for one and not for another. With this, its steps a second
    count at least one second between two logs.
    """
    trainer.last_log_time = min(trainer.last_log_time, time.time() - 1.0)


def on_any_rank(flag: bool) -> bool:
    """Whether a flag, such as Ctrl-C's, is set in any process; all must call it equally often."""
    return sum_over_ranks(int(flag)) > 0


def sum_over_ranks(value: int) -> int:
    """The sum of a number over all processes; all must call it equally often."""
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(value, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(total)
    return int(total)
