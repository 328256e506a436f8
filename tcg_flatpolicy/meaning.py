"""Whose spec and layout hold: one precedence for policies, monitors, audits and the command line.

What was given goes before the policy's, the policy's before the environment's. A layout that was
made for a spec brings it, too. Two that disagree raise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import gymnasium
import numpy as np
import torch

from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.wrapping import env_attribute

_T = TypeVar("_T", ActionSpec, LegalLayout)


class NoMeaning(ValueError):
    """There is no spec, or no layout, anywhere."""


class Meaning(NamedTuple):
    """What tuples mean, and where their list is."""

    spec: ActionSpec
    layout: LegalLayout
    """It reads for the spec."""


def meaning(
    env: Any = None,
    policy: Any = None,
    spec: ActionSpec | None = None,
    layout: LegalLayout | None = None,
    who: str = "a policy",
) -> Meaning:
    """Spec and layout: as given, else the policy's (or what it wraps), else the environment's.

    Args:
        env: asked for ``action_spec`` and ``legal_layout``, also through ``.driver_env``, ``.env``.
        policy: asked for ``spec`` and ``layout``, also through ``.policy``.
        spec: as given.
        layout: as given.
        who: needs them, for messages.

    Raises:
        NoMeaning: a ValueError: one is nowhere.
        ValueError: two disagree; the message names both.
    """
    found, at = spec_of(env, policy, spec, layout), layout_of(env, policy, layout)
    for name, attribute, value in (("spec", "action_spec", found), ("layout", "legal_layout", at)):
        if value is None:
            owners = " and ".join(
                f"{type(one).__name__} has no {what}"
                for one, what in ((policy, name), (env, attribute))
                if one is not None or what == attribute
            )
            raise NoMeaning(
                f"{who} needs {name}=...: {owners}, nor does what it wraps; "
                + (
                    "ActionSpec.from_nvec(nvec) will do where only the sizes are known"
                    if name == "spec"
                    else "LegalLayout.from_env or from_dtype makes one"
                )
            )
    assert found is not None
    assert at is not None
    return Meaning(found, at.with_spec(found))


def spec_of(
    env: Any = None,
    policy: Any = None,
    spec: ActionSpec | None = None,
    layout: LegalLayout | None = None,
) -> ActionSpec | None:
    """As `meaning`, of the spec alone; None if it is nowhere."""
    layouts: list[tuple[str, LegalLayout | None]] = [
        ("the layout given", layout),
        *_of_policy(policy, "layout", LegalLayout),
    ]
    layouts.append(("the environment's legal_layout", env_attribute(env, "legal_layout")))
    found: list[tuple[str, ActionSpec | None]] = [
        ("spec=", spec),
        *_of_policy(policy, "spec", ActionSpec),
    ]
    found.append(("the environment's action_spec", env_attribute(env, "action_spec")))
    found += [(f"that of {whose}", getattr(at, "spec", None)) for whose, at in layouts]
    return _agreed(found, "spec")


def layout_of(
    env: Any = None, policy: Any = None, layout: LegalLayout | None = None
) -> LegalLayout | None:
    """As `meaning`, of the layout alone; None if it is nowhere."""
    found: list[tuple[str, LegalLayout | None]] = [
        ("layout=", layout),
        *_of_policy(policy, "layout", LegalLayout),
    ]
    found.append(("the environment's legal_layout", env_attribute(env, "legal_layout")))
    return _agreed(found, "layout")


def policy_layers(policy: Any) -> Iterator[Any]:
    """A policy and what it wraps, as LSTMWrapper and torch.compile do."""
    seen: set[int] = set()
    while policy is not None and id(policy) not in seen:
        seen.add(id(policy))
        yield policy
        policy = getattr(policy, "_orig_mod", None) or getattr(policy, "policy", None)


def _of_policy(policy: Any, name: str, kind: type[_T]) -> list[tuple[str, _T | None]]:
    found = (getattr(layer, name, None) for layer in policy_layers(policy))
    return [(f"the policy's {name}", one) for one in found if isinstance(one, kind)]


def _agreed(found: list[tuple[str, _T | None]], what: str) -> _T | None:
    """The first that is not None, if all others are equal to it."""
    first: tuple[str, _T] | None = None
    for whose, one in found:
        if one is None:
            continue
        first = first or (whose, one)
        if one != first[1]:
            raise ValueError(
                f"two {what}s disagree: {first[0]} is {_told(first[1])}, {whose} is {_told(one)}; "
                f"leave one of them out, or make them equal"
            )
    return None if first is None else first[1]


def _told(one: Any) -> str:
    if not isinstance(one, ActionSpec):
        return repr(one)
    names = ", ".join(f"{number} {p.name}" for number, p in list(one.primaries.items())[:8])
    return f"{one!r} ({names}{', ...' if len(one.primaries) > 8 else ''})"


def action_dtype(env: Any, spec: ActionSpec) -> torch.dtype:
    """The dtype of the environment's action space, into which the spec's tuples must fit.

    MultiDiscrete of sizes that are at least the spec's, or, for a spec of one value, Discrete.
    int64 where the environment does not say.

    Raises:
        ValueError: another space, or one that is too small.
    """
    space = env_attribute(env, "single_action_space")
    if space is None:
        return torch.int64
    sizes = getattr(space, "nvec", None)
    if isinstance(space, gymnasium.spaces.Discrete):
        sizes = np.array([space.n])
    wanted = spec.nvec
    fits = sizes is not None and not np.any(getattr(space, "start", 0))
    if fits:
        sizes = np.asarray(sizes)
        fits = sizes.shape == wanted.shape and bool((sizes >= wanted).all())
    if not fits:
        raise ValueError(
            f"the environment's action space is {space}, the spec's tuples need "
            f"MultiDiscrete({wanted.tolist()}), or one with larger sizes: set single_action_space "
            "to spec.action_space" + (f", or to Discrete({wanted[0]})" if len(wanted) == 1 else "")
        )
    dtype: torch.dtype = getattr(torch, space.dtype.name)
    return dtype
