"""Whose spec and layout hold: one precedence for policies, monitors, audits and the command line.

What was given goes before the policy's, the policy's before the environment's. A layout that was
made for a spec brings it, too. Two that disagree raise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch

from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.wrapping import env_attribute

_IN_ENV = {"spec": "action_spec", "layout": "legal_layout"}
"""What an environment has each under."""


class NoMeaning(ValueError):
    """There is no spec, or no layout, anywhere."""


class Meaning(NamedTuple):
    """What tuples mean, and where their list is, read for that spec."""

    spec: ActionSpec
    layout: LegalLayout


def meaning(
    env: Any = None,
    policy: Any = None,
    spec: ActionSpec | None = None,
    layout: LegalLayout | None = None,
    who: str = "a policy",
) -> Meaning:
    """Spec and layout: as given, else the policy's (or what it wraps), else the environment's.

    ``env`` is asked for ``action_spec`` and ``legal_layout``, also through ``.driver_env`` and
    ``.env``; ``policy`` for ``spec`` and ``layout``, also through ``.policy``. ``who`` needs them.

    Raises:
        NoMeaning: one is nowhere.
        ValueError: two disagree; the message names both.
    """
    found, at = spec_of(env, policy, spec, layout), layout_of(env, policy, layout)
    if found is None:
        way = "ActionSpec.from_nvec(nvec) will do where only the sizes are known"
        raise _missing("spec", env, policy, who, way)
    if at is None:
        way = "LegalLayout.from_env or from_dtype makes one"
        raise _missing("layout", env, policy, who, way)
    return Meaning(found, at.with_spec(found))


def _missing(name: str, env: Any, policy: Any, who: str, way: str) -> NoMeaning:
    owners = f"{type(env).__name__} has no {_IN_ENV[name]}"
    if policy is not None:
        owners = f"{type(policy).__name__} has no {name} and {owners}"
    return NoMeaning(f"{who} needs {name}=...: {owners}, nor does what it wraps; {way}")


def spec_of(
    env: Any = None,
    policy: Any = None,
    spec: ActionSpec | None = None,
    layout: LegalLayout | None = None,
) -> ActionSpec | None:
    """As `meaning`, of the spec alone; None if it is nowhere."""
    layouts = _found("layout", LegalLayout, layout, policy, env)
    of_layouts = [(f"that of {whose}", getattr(at, "spec", None)) for whose, at in layouts]
    found = _found("spec", ActionSpec, spec, policy, env) + of_layouts
    one: ActionSpec | None = _agreed("spec", found)
    return one


def layout_of(
    env: Any = None, policy: Any = None, layout: LegalLayout | None = None
) -> LegalLayout | None:
    """As `meaning`, of the layout alone; None if it is nowhere."""
    found = _found("layout", LegalLayout, layout, policy, env)
    one: LegalLayout | None = _agreed("layout", found)
    return one


def policy_layers(policy: Any) -> Iterator[Any]:
    """A policy and what it wraps, as LSTMWrapper and torch.compile do."""
    seen: set[int] = set()
    while policy is not None and id(policy) not in seen:
        seen.add(id(policy))
        yield policy
        policy = getattr(policy, "_orig_mod", None) or getattr(policy, "policy", None)


def _found(name: str, kind: type, given: Any, policy: Any, env: Any) -> list[tuple[str, Any]]:
    """(whose, what), by precedence."""
    of_policy = [getattr(layer, name, None) for layer in policy_layers(policy)]
    return [
        (f"{name}=", given),
        *((f"the policy's {name}", one) for one in of_policy if isinstance(one, kind)),
        (f"the environment's {_IN_ENV[name]}", env_attribute(env, _IN_ENV[name])),
    ]


def _agreed(what: str, found: list[tuple[str, Any]]) -> Any:
    """The first that is not None, if all others are equal to it."""
    there = [(whose, one) for whose, one in found if one is not None] or [("nobody's", None)]
    owner, first = there[0]
    for whose, one in there[1:]:
        if one != first:
            raise ValueError(
                f"two {what}s disagree: {owner} is {_told(first)}, {whose} is {_told(one)}; "
                "leave one of them out, or make them equal"
            )
    return first


def _told(one: Any) -> str:
    if not isinstance(one, ActionSpec):
        return repr(one)
    names = ", ".join(f"{number} {p.name}" for number, p in list(one.primaries.items())[:8])
    return f"{one!r} ({names}{', ...' if len(one.primaries) > 8 else ''})"


def action_dtype(env: Any, spec: ActionSpec) -> torch.dtype:
    """The dtype of the environment's action space, int64 where it does not say.

    The space must hold the spec's tuples: MultiDiscrete of sizes that are at least the spec's, or,
    for a spec of one value, Discrete.

    Raises:
        ValueError: another space, or one that is too small.
    """
    space = env_attribute(env, "single_action_space")
    if space is None:
        return torch.int64
    wanted = spec.nvec
    sizes = [space.n] if isinstance(space, gymnasium.spaces.Discrete) else getattr(space, "nvec", 0)
    fits = np.shape(sizes) == wanted.shape and (sizes >= wanted).all()
    if not fits or np.any(getattr(space, "start", 0)):
        raise ValueError(
            f"the environment's action space is {space}, the spec's tuples need "
            f"MultiDiscrete({wanted.tolist()}), or one with larger sizes: set single_action_space "
            "to spec.action_space" + (f", or to Discrete({wanted[0]})" if len(wanted) == 1 else "")
        )
    dtype: torch.dtype = getattr(torch, space.dtype.name)
    return dtype
