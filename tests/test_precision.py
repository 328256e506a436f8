"""Policies of other precisions than float32, and a default dtype of float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tcg_flatpolicy as fp
from tcg_flatpolicy.table import as_tensors
from tests.games import BANDIT_SPEC, Bandit, BanditEncoder

HEADS = ["flat", "autoregressive"]
KINDS = [fp.Policy, fp.RecurrentPolicy]


def observed() -> tuple[Bandit, torch.Tensor]:
    env = Bandit(12, empty=0.3)
    env.reset(seed=3)
    return env, torch.as_tensor(env.observations.copy())


def policy(kind: Any, head: str, own: bool) -> tuple[Any, torch.Tensor]:
    """With the Bandit's encoder, or with the default one, which embeds no entities."""
    env, observations = observed()
    torch.manual_seed(0)
    if own:
        return kind(env, head=head, encoder=BanditEncoder(env.legal_layout)), observations
    spec = fp.ActionSpec.from_nvec(BANDIT_SPEC.nvec)
    return kind(
        spec=spec, layout=env.legal_layout.with_spec(spec), head=head, hidden_size=16
    ), observations


def decided(
    policy: Any, observations: torch.Tensor, actions: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What it says of actions, by default of those that it draws; and the actions."""
    torch.manual_seed(1)
    state: dict[str, Any] = {}
    for _ in range(2):
        face, value = policy.forward_eval(observations, state)
    drawn = face.sample()
    assert face.distribution.legal.contains(drawn).all()
    actions = drawn if actions is None else actions
    log_prob, entropy = face.log_prob(actions), face.distribution.entropy()
    (log_prob.sum() + entropy.sum() + value.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
    return {"log_prob": log_prob, "entropy": entropy, "value": value}, actions


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("explored", [False, True])
def test_float64_throughout(kind: Any, head: str, explored: bool) -> None:
    made, observations = policy(kind, head, own=False)
    if explored:
        made.explore(1.5, 0.1)
    single, actions = decided(made, observations)
    double, _ = decided(made.double(), observations, actions)
    for name, one in double.items():
        assert one.dtype == torch.float64
        torch.testing.assert_close(one.float(), single[name], rtol=1e-4, atol=1e-4)
    legal = made.layout.read_distinct(observations)
    with torch.no_grad():
        every = made.distribution(observations)[0]
    for row, actions in enumerate(legal.to_lists()):
        total = sum(every.log_prob(torch.tensor([action] * 12))[row].exp() for action in actions)
        assert not actions or abs(float(total) - 1) < 1e-12


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_half_the_bits(kind: Any, head: str, dtype: torch.dtype, own: bool) -> None:
    made, observations = policy(kind, head, own)
    if own:
        encoder = made.encoder
        plain = encoder.forward
        encoder.float()
        made.to(dtype)
        encoder.float()  # whose own code is of float32
        encoder.forward = lambda rows: fp.Encoding(
            plain(rows).hidden.to(dtype),
            {k: v.to(dtype) for k, v in as_tensors(plain(rows).entities).items()},
        )
    else:
        made.to(dtype)
    for one in decided(made, observations)[0].values():
        assert one.dtype == torch.float32


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_default_dtype_of_float64(kind: Any, head: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        made, observations = policy(kind, head, own=False)
        made.explore(1.5, 0.1)
        for one in decided(made, observations)[0].values():
            assert one.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
