"""Writes files whole, and says which versions and which machine made them."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from tcg_flatpolicy.kernels.cpu import kernel


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file by way of a temporary one: a reader sees all of it, or the earlier file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        words = f"the disk is full, and {path} was not written (what it held before is whole)"
        raise OSError(errno.ENOSPC, f"{words}; make room, and go on from there") from error
    finally:
        temporary.unlink(missing_ok=True)


def provenance() -> dict[str, Any]:
    """Versions, machine and command, as plain values, to be saved beside a result."""
    packages = ("tcg_flatpolicy", "torch", "numpy", "gymnasium", "essence-wars")
    versions = {"python": platform.python_version(), **{name: _version(name) for name in packages}}
    puffer = [name for name in ("pufferlib-core", "pufferlib") if _version(name) != "not installed"]
    versions["pufferlib"] = ", ".join(f"{name} {_version(name)}" for name in puffer)
    return {
        "command": shlex.join(["python", "-m", "tcg_flatpolicy", *sys.argv[1:]]),
        "versions": versions,
        "kernel": kernel(),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
    }


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "not installed"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
