"""The steps of a flat decision, each as one call of compiled code where there is some.

On a CPU they are those of :mod:`cpu`. On a GPU the whole decision is one kernel of :mod:`cuda`, of
which :mod:`reference` is the plain form.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch


@functools.cache
def _fused(device: str) -> str:
    asked = os.environ.get("TCG_KERNEL", "")
    if asked not in ("", "cuda"):
        return asked if asked == "reference" else ""
    there = importlib.util.find_spec("triton") is not None
    if asked and not there:
        raise RuntimeError("TCG_KERNEL is cuda, and Triton is not installed: pip install triton")
    # On a CPU only in Triton's interpreter, where it is asked for: it is slow.
    asked_here = bool(asked) and os.environ.get("TRITON_INTERPRET") == "1"
    return "cuda" if there and (device == "cuda" or asked_here) else ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def fused(device: str) -> str:
    """What makes a flat decision in one kernel on this type of device: "cuda", or "" for nothing.

    The environment variable TCG_KERNEL may be "cuda", also on a CPU if TRITON_INTERPRET is 1, or
    "reference", for tests; any other keeps to packed lists.

    Raises:
        RuntimeError: it is "cuda", and Triton is not installed.
    """
    return _fused(device)


def module(name: str) -> ModuleType:
    """The module of that name here, with ``decide`` and ``evaluate``; imported when it is used."""
    return importlib.import_module(f"tcg_flatpolicy.kernels.{name}")
