"""Spec and layout: of an environment, a policy or as given; and the dtype of actions."""

import itertools
import re
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from tcg_flatpolicy import ActionSpec, Index, LegalLayout, Primary
from tcg_flatpolicy.meaning import NoMeaning, action_dtype, meaning, policy_layers

DTYPE = np.dtype([("hp", "u1"), ("n", "u1"), ("legal", "u1", (3, 2)), ("more", "u1", (3, 2))])
ONE = ActionSpec([Primary("rest"), Primary("hit", Index("at", 3))])
OTHER = ActionSpec([Primary("rest"), Primary("heal", Index("at", 3))])
HERE = LegalLayout.from_dtype(DTYPE, "n", "legal")
THERE = LegalLayout.from_dtype(DTYPE, "n", "more")


def env(spec: Any = None, layout: Any = None, **more: Any) -> Any:
    return SimpleNamespace(env=SimpleNamespace(action_spec=spec, legal_layout=layout, **more))


class Policy(nn.Module):
    def __init__(self, spec: Any = None, layout: Any = None) -> None:
        super().__init__()
        self.spec, self.layout = spec, layout


class Around(nn.Module):
    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.spec = "not a spec"


SOURCES = ("given", "given layout", "policy", "policy layout", "env", "env layout")


def asked(where: dict[str, ActionSpec]) -> Any:
    def layout(source: str) -> LegalLayout | None:
        return HERE.with_spec(where[source]) if source in where else None

    return meaning(
        env(where.get("env"), layout("env layout") or HERE),
        Around(Policy(where.get("policy"), layout("policy layout"))),
        where.get("given"),
        layout("given layout"),
    )


@pytest.mark.parametrize("source", SOURCES)
def test_a_spec_is_found_wherever_it_is(source: str) -> None:
    spec, layout = asked({source: ONE})
    assert spec == layout.spec == ONE
    assert layout == HERE


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(SOURCES, 2)])
def test_two_specs_that_disagree_raise(first: str, second: str) -> None:
    assert asked({first: ONE, second: ONE}).spec == ONE
    with pytest.raises(ValueError, match=r"^two specs disagree: .*(1 hit.*1 heal|1 heal.*1 hit)"):
        asked({first: ONE, second: OTHER})


@pytest.mark.parametrize(
    ("where", "first", "second"),
    [
        (("given", "env"), "spec= is", "the environment's action_spec is"),
        (("given", "policy layout"), "spec= is", "that of the policy's layout is"),
        (("policy", "env layout"), "the policy's spec is", "that of the environment's legal_lay"),
    ],
)
def test_both_are_named(where: tuple[str, str], first: str, second: str) -> None:
    with pytest.raises(ValueError, match=f"{first} .*, {second}"):
        asked(dict(zip(where, (ONE, OTHER), strict=True)))


def test_two_layouts_that_disagree_raise() -> None:
    own = env(ONE, THERE)
    for arguments in ((own, None, None, HERE), (own, Policy(layout=HERE))):
        with pytest.raises(ValueError, match=r"^two layouts disagree: .*environment's legal_"):
            meaning(*arguments)
    with pytest.raises(ValueError, match=r"^two layouts disagree: layout= is .*the policy's"):
        meaning(env(ONE), Policy(layout=HERE), None, THERE)
    equal = LegalLayout.from_dtype(DTYPE, "n", "legal", ONE)
    assert meaning(env(ONE, HERE), Policy(layout=equal), None, equal).layout == HERE


def test_what_is_missing_is_said_with_the_way_out() -> None:
    words = r"^a monitor needs spec=.*Namespace has no action_spec.*from_nvec"
    with pytest.raises(NoMeaning, match=words):
        meaning(env(), who="a monitor")
    with pytest.raises(NoMeaning, match=r"needs layout=.*has no legal_layout.*from_dtype"):
        meaning(env(ONE))
    with pytest.raises(NoMeaning, match=r"needs layout="):
        meaning(spec=ONE)


def test_what_a_policy_wraps() -> None:
    policy = Policy()
    around = Around(policy)
    assert list(policy_layers(torch.compile(around)))[-2:] == [around, policy]
    loop = Around(policy)
    loop.policy = loop
    assert list(policy_layers(loop)) == [loop]


# ---- the action space


def sized(*sizes: int) -> ActionSpec:
    return ActionSpec.from_nvec(sizes)


@pytest.mark.parametrize(
    ("space", "spec"),
    [
        (spaces.MultiDiscrete([24, 30, 6, 2]), sized(24, 30, 6, 2)),
        (spaces.MultiDiscrete([24, 50, 50, 50]), sized(24, 30, 6, 2)),
        (spaces.MultiDiscrete([3, 3], dtype=np.int32), sized(3, 2)),
        (spaces.MultiDiscrete([7]), sized(5)),
        (spaces.Discrete(7), sized(7)),
        (spaces.Discrete(7), sized(5)),
    ],
)
def test_a_space_that_holds_every_tuple(space: gymnasium.Space, spec: ActionSpec) -> None:
    found = action_dtype(env(single_action_space=space), spec)
    assert found == getattr(torch, np.dtype(space.dtype).name)


@pytest.mark.parametrize(
    ("space", "spec"),
    [
        (spaces.MultiDiscrete([24, 29, 50]), sized(24, 30, 6)),
        (spaces.MultiDiscrete([24, 50]), sized(24, 30, 6)),
        (spaces.MultiDiscrete([24, 50, 6, 2]), sized(24, 30, 6)),
        (spaces.MultiDiscrete([9, 9], start=[0, 1]), sized(3, 3)),
        (spaces.MultiDiscrete([[9, 9]]), sized(3, 3)),
        (spaces.Discrete(4), sized(5)),
        (spaces.Discrete(9, start=1), sized(5)),
        (spaces.Discrete(9), sized(5, 2)),
        (spaces.MultiBinary(9), sized(5)),
        (spaces.Box(0, 1, (1,)), sized(5)),
    ],
)
def test_another_space_is_refused_with_the_way_out(
    space: gymnasium.Space, spec: ActionSpec
) -> None:
    way = f"MultiDiscrete({spec.nvec.tolist()}), or one with larger sizes: set single_action_space"
    way += " to spec.action_space" + (", or to Discrete(5)" if spec.slots == 0 else "")
    with pytest.raises(ValueError, match=f"^the environment's action space is .*{re.escape(way)}$"):
        action_dtype(env(single_action_space=space), spec)


def test_without_a_space_actions_are_int64() -> None:
    assert action_dtype(None, ONE) == action_dtype(env(), ONE) == torch.int64
