"""What an environment wraps, and which layer of it is PufferLib's emulation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any


def env_layers(env: Any) -> Iterator[Any]:
    """An environment and what it wraps, through ``.driver_env`` and ``.env``, outermost first."""
    seen: set[int] = set()
    while env is not None and id(env) not in seen:
        seen.add(id(env))
        yield env
        # A native PufferEnv is its own driver_env.
        inner = [getattr(env, name, None) for name in ("driver_env", "env")]
        env = next((one for one in inner if one is not None and id(one) not in seen), None)


def layer_with(env: Any, name: str) -> Any:
    """The outermost layer that has an attribute of that name which is not None, or None."""
    return next((e for e in env_layers(env) if getattr(e, name, None) is not None), None)


def env_attribute(env: Any, name: str) -> Any:
    """The attribute of `layer_with`, or None."""
    return getattr(layer_with(env, name), name, None)


def is_emulation(env: Any) -> bool:
    """Whether this layer is PufferLib's emulation of a Gymnasium or PettingZoo environment.

    An attribute ``emulated`` does not say so: a native environment may have one of its own.
    """
    emulation = sys.modules.get("pufferlib.emulation")  # not imported: there is no instance of it
    kinds = ("GymnasiumPufferEnv", "PettingZooPufferEnv")
    return isinstance(env, tuple(getattr(emulation, k) for k in kinds if hasattr(emulation, k)))


def steps_emulated(env: Any) -> bool:
    """Whether stepping ``env`` steps an emulated environment: itself, or one that it hands on.

    Whatever hands on attributes, such as a vector environment, has the emulation's ``emulated``.
    """
    said = getattr(env, "emulated", None)
    return any(is_emulation(layer) and layer.emulated is said for layer in env_layers(env))
