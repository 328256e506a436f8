"""The comparisons in benchmarks/baselines.py: fair, and wrong in the ways that they describe."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical

pytest.importorskip("pufferlib")
pytest.importorskip("essence_wars")

import tcg_flatpolicy as fp
from tcg_flatpolicy import ActionSpec, Index, LegalActions, Primary
from tcg_flatpolicy.games.essence_wars import INDEX_TO_TUPLE, SPEC, EssenceWars, EssenceWarsEncoder
from tests.strategies import actions_of, legal_lists, specs
from tests.test_distribution import Row, close
from tests.test_sampling import agree

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from baselines import (
    HEADS,
    FixedHead,
    IndependentHeads,
    MasksOfGreedyPrimary,
    MasksPerHead,
    every_tuple,
)

# ---- independent heads


def independent(seed: int) -> tuple[IndependentHeads, list[Categorical]]:
    """Of 50 rows, with random masks; and torch's own, masked with -inf."""
    random = torch.Generator().manual_seed(seed)
    nvec = [3, 1, 5]
    logits = torch.randn(50, 9, generator=random)
    masks = torch.rand(50, 9, generator=random) < 0.5
    masks[:, [1, 3, 8]] = True
    legal = LegalActions.from_lists([[]] * 50, slots=2)
    masked = logits.masked_fill(~masks, -torch.inf).split(nvec, dim=1)
    theirs = [Categorical(logits=one) for one in masked]
    return IndependentHeads(legal, logits, masks, nvec), theirs


def test_independent_heads_are_torch_s_categoricals() -> None:
    ours, theirs = independent(0)
    close(ours.entropy(), sum(one.entropy() for one in theirs).double(), 1e-5)
    assert torch.equal(ours.mode, torch.stack([one.mode for one in theirs], 1))
    actions = ours.sample()
    expected = sum(one.log_prob(actions[:, j]) for j, one in enumerate(theirs))
    assert expected.isfinite().all()
    close(ours.log_prob(actions), expected.double(), 1e-5)
    assert torch.equal(ours.log_prob(actions.int()), ours.log_prob(actions))


def test_independent_heads_draw_each_value_by_itself() -> None:
    torch.manual_seed(0)
    ours, theirs = independent(1)
    drawn = ours.sample((20_000,))
    assert drawn.shape == (20_000, 50, 3)
    assert ours.sample().shape == (50, 3)
    assert ours.sample((2, 4)).shape == (2, 4, 50, 3)
    for row in range(0, 50, 10):
        joint = theirs[0].probs[row].double().view(3, 1) * theirs[2].probs[row].double()
        joint = joint / joint.sum()
        probs = {(a, 0, c): float(p) for a in range(3) for c in range(5) if (p := joint[a, c]) > 0}
        agree(drawn[:, row], probs)


def test_independent_heads_never_draw_a_masked_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the random number is 0 and the first value is masked."""
    ours, theirs = independent(2)
    monkeypatch.setattr(torch, "rand", torch.zeros)
    drawn = ours.sample()
    for j, one in enumerate(theirs):
        assert torch.equal(drawn[:, j], (one.probs > 0).long().argmax(1))


@given(st.data())
def test_the_masks_per_head_are_the_marginals(data: st.DataObject) -> None:
    spec = data.draw(specs())
    lists = data.draw(legal_lists(actions_of(spec)))
    legal = LegalActions.from_lists(lists, slots=spec.slots, noop=spec.noop.tolist())
    head = MasksPerHead(spec, 4, {}, 8)
    dist = head(torch.zeros(len(lists), 4), {}, legal)
    expected = torch.cat(legal.head_masks(spec.nvec.tolist()), dim=1)
    assert torch.equal(dist.masks, expected)
    greedy = MasksOfGreedyPrimary(spec, 4, {}, 8)(torch.zeros(len(lists), 4), {}, legal)
    assert not (greedy.masks & ~expected).any()
    for b, row in enumerate(lists):
        primary = int(greedy.mode[b, 0])
        of_greedy = [action for action in row if action[0] == primary]
        assert bool(of_greedy) == bool(row)
        mask = LegalActions.from_lists([of_greedy], spec.slots, spec.noop.tolist())
        later = torch.cat(mask.head_masks(spec.nvec.tolist())[1:], dim=1) if spec.slots else None
        if later is not None:
            assert torch.equal(greedy.masks[b : b + 1, int(spec.nvec[0]) :], later)


# ---- what goes wrong with them


TWO = ActionSpec([Primary("a", Index("x", 4)), Primary("b", Index("x", 4))])
TWO_LISTS = [[(0, 0), (0, 1), (1, 2), (1, 3)], [(0, 3), (1, 3)], [], [(0, 0), (1, 0), (1, 1)]]


def with_logits(kind: type[MasksPerHead], logits: list[float]) -> IndependentHeads:
    """A head whose logits are the same in every state; over TWO_LISTS."""
    head = kind(TWO, 3, {}, 4)
    with torch.no_grad():
        head.net[2].weight.zero_()
        head.net[2].bias.copy_(torch.tensor(logits))
    hidden = torch.zeros(len(TWO_LISTS), 3)
    return head(hidden, {}, LegalActions.from_lists(TWO_LISTS))


P = 0.7
FIRST_MORE_PROBABLE = [float(np.log(P)), float(np.log(1 - P)), 0.0, 0.0, 0.0, 0.0]


def test_masks_of_the_greedy_primary_describe_a_tuple_other_than_the_one_played() -> None:
    """Row 0: a is most probable, b is drawn with 0.3, and x is then drawn among those of a."""
    torch.manual_seed(0)
    dist = with_logits(MasksOfGreedyPrimary, FIRST_MORE_PROBABLE)
    assert dist.masks[0].tolist() == [True, True, True, True, False, False]
    drawn = dist.sample((20_000,))
    half = P / 2
    rows: list[Row] = [
        {(0, 0): half, (0, 1): half, (1, 0): 0.5 - half, (1, 1): 0.5 - half},
        {(0, 3): P, (1, 3): 1 - P},
        {(0, 0): 1.0},
        {(0, 0): P, (1, 0): 1 - P},
    ]
    for row in (0, 1, 3):
        agree(drawn[:, row], rows[row])
    assert not drawn[:, 2].any()
    legal = dist.legal.contains(drawn).double().mean(0)
    wrong = 1 - P  # each draw of b in row 0 is off the list: (1, 0) and (1, 1) are not there
    deviation = (wrong * P / 20_000) ** 0.5
    assert abs(1 - legal[0] - wrong) < 5 * deviation
    assert legal[1:].tolist() == [1, 1, 1]
    # And what is listed for b has no probability at all: stored, its ratio would mean nothing.
    for action in ((1, 2), (1, 3)):
        stored = torch.tensor([action, (0, 3), (0, 0), (0, 0)])
        assert dist.log_prob(stored)[0] < -1e7


def test_masks_per_head_draw_what_is_not_listed_together() -> None:
    """Row 0: any x with either primary, half of them not listed. Row 3: (0, 1) is not listed."""
    torch.manual_seed(0)
    dist = with_logits(MasksPerHead, FIRST_MORE_PROBABLE)
    legal = dist.legal.contains(dist.sample((20_000,))).double().mean(0)
    deviation = 0.5 / 20_000**0.5
    assert abs(legal[0] - 0.5) < 5 * deviation
    assert abs(legal[3] - (1 - P / 2)) < 5 * deviation
    assert legal[1:3].tolist() == [1, 1]


# ---- all numbered tuples


def test_every_tuple_of_the_game_is_one_of_the_engine_s() -> None:
    tuples = every_tuple(SPEC)
    assert tuples.shape == (542, 4)
    assert set(map(tuple, tuples.tolist())) == set(map(tuple, INDEX_TO_TUPLE.tolist()))


@given(specs())
def test_every_tuple_of_a_spec(spec: ActionSpec) -> None:
    every = np.stack(np.meshgrid(*map(np.arange, spec.nvec), indexing="ij"), -1)
    every = every.reshape(-1, 1 + spec.slots)
    within = [action for action in every.tolist() if spec.explain(action) is None]
    assert every_tuple(spec).tolist() == within


@given(st.data())
def test_the_fixed_head_is_one_dense_masked_categorical(data: st.DataObject) -> None:
    spec = data.draw(specs(max_slots=2))
    lists = data.draw(legal_lists(actions_of(spec).map(tuple), max_rows=4))
    lists = [sorted(set(row)) for row in lists]
    legal = LegalActions.from_lists(lists, slots=spec.slots, noop=spec.noop.tolist())
    head = FixedHead(spec, 4, {}, 8)
    hidden = torch.randn(len(lists), 4, generator=torch.Generator().manual_seed(0)) * 100
    with torch.no_grad():
        dist, logits = head(hidden, {}, legal), head.net(hidden)
    number = {tuple(action): n for n, action in enumerate(every_tuple(spec).tolist())}
    for b, row in enumerate(lists):
        if not row:
            continue
        mask = torch.zeros(len(number), dtype=torch.bool)
        mask[[number[action] for action in row]] = True
        dense = Categorical(logits=logits[b].masked_fill(~mask, -torch.inf))
        close(dist.entropy()[b], float(dense.entropy()), 1e-4)
        for action in row:
            stored = spec.noop[None].repeat(len(lists), 0)
            stored[b] = action
            expected = float(dense.log_prob(torch.tensor(number[action])))
            close(dist.log_prob(torch.as_tensor(stored))[b], expected, 1e-4)


# ---- on the game


@pytest.fixture(scope="module")
def states() -> tuple[EssenceWars, Tensor]:
    """256 games after some random legal play, where lists are long; and their observations."""
    env = EssenceWars(num_games=256, seed=0)
    env.reset(0)
    rng = np.random.default_rng(0)
    seen = []
    for step in range(16):
        legal = env.legal_layout.read(torch.as_tensor(env.observations))
        place = legal.starts.numpy() + (rng.random(256) * legal.counts.numpy()).astype(np.int64)
        env.step(legal.actions.numpy()[place])
        if step % 5 == 0:
            seen.append(torch.as_tensor(env.observations).clone())
    return env, torch.cat(seen)


def policy(env: EssenceWars, name: str) -> fp.Policy:
    torch.manual_seed(0)
    encoder = EssenceWarsEncoder(env.legal_layout, 256, 32)
    return fp.Policy(env, head=HEADS[name], encoder=encoder)


def test_heads_have_about_as_many_parameters(states: Any) -> None:
    def parameters(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    counts = {name: parameters(policy(states[0], name)) for name in HEADS}
    assert max(counts.values()) < 1.1 * min(counts.values()), counts


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("flat", 0.0),
        ("autoregressive", 0.0),
        ("fixed numbers", 0.0),
        ("masks per head", 0.5),
        ("masks of the greedy primary", 0.3),
    ],
)
def test_which_heads_act_illegally_on_the_game(states: Any, name: str, least: float) -> None:
    env, observations = states
    with torch.no_grad():
        dist, _ = policy(env, name).distribution(observations)
        drawn = dist.sample()
        legal = env.legal_layout.read(observations).contains(drawn)
    illegal = 1 - float(legal.double().mean())
    if least:
        assert illegal > least
    else:
        assert legal.all()
        assert dist.log_prob(drawn).isfinite().all()
        # No head is legal for playing one thing only.
        assert len(Counter(map(tuple, drawn.tolist()))) > 50
