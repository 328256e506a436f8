"""LegalAutoregressive against an oracle of Python floats; its head; heads in a policy.

The made-up conditionals are tables of random logits by (row, prefix, value). The oracle reads the
same tables and walks the tree of listed prefixes, one after the other.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pufferlib.models
import pufferlib.vector
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pufferlib import pufferl
from pufferlib.pytorch import sample_logits
from torch import Tensor, nn
from torch.distributions import kl_divergence

import tcg_flatpolicy as fp
from tcg_flatpolicy import (
    ActionSpec,
    AutoregressiveHead,
    Entity,
    Index,
    LegalActions,
    LegalAutoregressive,
    LegalCategorical,
    OneOf,
    Primary,
)
from tests.games import BANDIT_SPEC, Bandit, BanditEncoder, trainer_config
from tests.strategies import Action, Lists, actions_below, actions_of, legal_lists, specs
from tests.test_distribution import Row, brute_entropy, brute_kl, brute_step, close, thorough
from tests.test_distribution import actions_of as one_each
from tests.test_sampling import agree, normalised

INF, NAN = math.inf, math.nan


# ---- LegalAutoregressive: made-up conditionals, and the oracle


class Table:
    """Conditionals that are read from tables; row b has those of row b % R.

    Attributes:
        tables: of slot j, (R, prod(sizes[:j]), sizes[j]) logits.
        asked: how often logits were asked for.
    """

    def __init__(self, tables: list[Tensor], rows: int) -> None:
        self.tables = tables
        self.rows = rows
        self.sizes = [table.shape[2] for table in tables]
        self.asked = 0

    def start(self) -> Tensor:
        return torch.zeros(self.rows, 1, dtype=torch.float64)

    def logits(
        self,
        slot: int,
        context: Tensor,
        rows: Tensor,
        primaries: Tensor,
        choices: LegalActions,
        behind: Tensor,
    ) -> Tensor:
        self.asked += 1
        assert len(context) == len(rows) == len(primaries) == len(choices)
        assert len(behind) == len(choices.rows)
        assert (behind >= 1).all()
        assert choices.actions.shape == (len(choices.rows), 1)
        prefix = context[:, 0].long()
        first = prefix // math.prod(self.sizes[1:slot]) if slot else torch.zeros_like(prefix)
        assert torch.equal(primaries, first)
        at = choices.rows
        table = self.tables[slot]
        return table[rows[at] % len(table), prefix[at], choices.actions[:, 0]]

    def extend(
        self, slot: int, context: Tensor, rows: Tensor, primaries: Tensor, values: Tensor
    ) -> Tensor:
        assert len(context) == len(rows) == len(primaries) == len(values)
        return context * self.sizes[slot] + values.unsqueeze(1)


class Behind(Table):
    """Each value weighs as many as the tuples behind it."""

    def __init__(self, sizes: list[int], rows: int) -> None:
        super().__init__(
            [torch.zeros(1, math.prod(sizes[:j]), n) for j, n in enumerate(sizes)], rows
        )

    def logits(self, *arguments: Any) -> Tensor:
        super().logits(*arguments)
        behind: Tensor = arguments[-1]
        return behind.double().log()


def random_tables(
    sizes: list[int], rows: int, seed: int, dtype: torch.dtype, kind: str = "plain"
) -> list[Tensor]:
    """R = rows tables a slot: plain, tied, far (up to 1e30), gaps (some -inf), dead (only -inf)."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for slot, size in enumerate(sizes):
        shape = (rows, math.prod(sizes[:slot]), size)
        table = torch.randn(shape, generator=random, dtype=torch.float64).mul(32).round() / 16
        if kind == "tied":
            table = table.sign()
        if kind == "far":
            table = table.sign() * 10.0 ** torch.randint(0, 31, shape, generator=random)
        if kind == "gaps":
            table[torch.rand(shape, generator=random) < 0.4] = -INF
        if kind == "dead":
            table[:] = -INF
        made.append(table.to(dtype))
    return made


@dataclass(frozen=True)
class Case:
    """Legal lists, and tables of logits for each of their rows."""

    lists: Lists
    tables: list[Tensor]
    noop: Action

    @property
    def sizes(self) -> list[int]:
        return [table.shape[2] for table in self.tables]

    @property
    def legal(self) -> LegalActions:
        return LegalActions.from_lists(self.lists, slots=len(self.sizes) - 1, noop=self.noop)

    @property
    def dist(self) -> LegalAutoregressive:
        return LegalAutoregressive(self.legal, Table(self.tables, len(self.lists)), self.sizes)

    @property
    def tolerance(self) -> float:
        return 1e-11 if self.tables[0].dtype == torch.float64 else 2e-5


FLOATS = (torch.float32, torch.float64)
KINDS = ("plain", "tied", "far", "gaps", "dead")


@st.composite
def cases(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS, kinds: tuple[str, ...] = KINDS
) -> Case:
    """H of 1 to 4, no slot at all included; empty rows, repeats and any order are frequent."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    lists = draw(legal_lists(actions_below(sizes), max_rows=5))
    kind, dtype = draw(st.sampled_from(kinds)), draw(st.sampled_from(dtypes))
    tables = random_tables(sizes, max(len(lists), 1), draw(st.integers(0, 999)), dtype, kind)
    return Case(lists, tables, draw(actions_below(sizes)))


def oracle_row(case: Case, row: int) -> tuple[Row, Row]:
    """Log-probability of each distinct tuple, and the sum of entropies along its path."""
    log_probs: Row = {}
    entropies: Row = {}

    def walk(prefix: Action, listed: set[Action], log_p: float, entropy: float) -> None:
        slot = len(prefix)
        if slot == len(case.sizes):
            log_probs[prefix], entropies[prefix] = log_p, entropy
            return
        place = 0
        for value, size in zip(prefix, case.sizes, strict=False):
            place = place * size + value
        given = case.tables[slot][row, place].tolist()
        values = sorted({action[slot] for action in listed})
        logits = [given[value] for value in values]
        top = max(logits)
        if top == -INF:
            logits, top = [0.0] * len(values), 0.0
        total = math.log(sum(math.exp(logit - top) for logit in logits))
        found = [logit - top - total for logit in logits]
        own = -sum(math.exp(p) * p for p in found if p > -INF)
        for value, p in zip(values, found, strict=True):
            follow = {action for action in listed if action[slot] == value}
            walk((*prefix, value), follow, log_p + p, entropy + own)

    if case.lists[row]:
        walk((), set(case.lists[row]), 0.0, 0.0)
    else:
        log_probs[case.noop] = entropies[case.noop] = 0.0
    return log_probs, entropies


def oracle(case: Case) -> list[Row]:
    return [oracle_row(case, row)[0] for row in range(len(case.lists))]


def check_derived(dist: LegalCategorical, rows: list[Row], tol: float) -> None:
    """A distribution over whole tuples: tempered, smoothed, or the enumeration itself."""
    actions = one_each(rows, dist.event_shape[0])
    expected = [
        [row.get(tuple(a), NAN) for a, row in zip(s, rows, strict=True)] for s in actions.tolist()
    ]
    log_prob = dist.log_prob(actions)
    close(log_prob, torch.tensor(expected, dtype=torch.float64).view(log_prob.shape), tol)
    close(dist.entropy(), [brute_entropy(row) for row in rows], tol)


# ---- values


@thorough
@given(cases())
def test_answers_equal_the_oracle(case: Case) -> None:
    dist, tol = case.dist, case.tolerance
    rows = oracle(case)
    actions = one_each(rows, len(case.sizes))  # (S, B, H)
    one_by_one = [dist.log_prob(action) for action in actions]
    expected = [[row[tuple(a)] for a, row in zip(s, rows, strict=True)] for s in actions.tolist()]
    for got, wanted in zip(one_by_one, expected, strict=True):
        assert got.shape == (len(rows),)
        assert got.dtype == case.tables[0].dtype
        close(got, wanted, tol)
    together = dist.log_prob(actions)
    close(together, torch.tensor(expected, dtype=torch.float64).view(together.shape), tol)
    assert dist.log_prob(actions.unsqueeze(1)).shape == (len(actions), 1, len(rows))
    for b, row in enumerate(rows):
        mass = sum(math.exp(float(one_by_one[s][b])) for s in range(len(row)))
        assert mass == pytest.approx(1, abs=tol)
    close(dist.entropy(), [brute_entropy(row) for row in rows], tol)
    for b, mode in enumerate(dist.mode.tolist()):
        assert rows[b][tuple(mode)] >= max(rows[b].values()) - tol
    check_derived(dist.enumerated(), rows, tol)


@thorough
@given(cases())
def test_path_entropy_equals_the_oracle_and_averages_to_the_entropy(case: Case) -> None:
    """The chain rule: the entropy of a tuple is the mean over tuples of the sum along the path."""
    dist = case.dist
    both = [oracle_row(case, row) for row in range(len(case.lists))]
    actions = one_each([log_probs for log_probs, _ in both], len(case.sizes))
    got = [dist.path_entropy(action) for action in actions]
    entropy = dist.entropy()
    for b, (log_probs, entropies) in enumerate(both):
        mean = 0.0
        for s, (action, expected) in enumerate(entropies.items()):
            if log_probs[action] > -INF:  # behind a value of probability 0 there is no path
                close(got[s][b], expected, case.tolerance)
                mean += math.exp(log_probs[action]) * float(got[s][b])
        close(entropy[b], mean, 10 * case.tolerance)


@thorough
@given(cases(), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.0, 0.1, 1.0]))
def test_tempered_and_smoothed_are_of_whole_tuples(case: Case, t: float, epsilon: float) -> None:
    rows = oracle(case)
    hot = [brute_step(row, "tempered", t) for row in rows]
    check_derived(case.dist.tempered(t), hot, 5 * case.tolerance)
    check_derived(
        case.dist.smoothed(epsilon),
        [brute_step(row, "smoothed", epsilon) for row in rows],
        5 * case.tolerance,
    )
    both = case.dist.tempered(torch.full((len(rows),), t)).smoothed(epsilon)
    check_derived(both, [brute_step(row, "smoothed", epsilon) for row in hot], 5 * case.tolerance)


@thorough
@given(st.data())
def test_kl_equals_the_oracle(data: st.DataObject) -> None:
    case = data.draw(cases())
    kind, seed = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(1000, 1999))
    rows = max(len(case.lists), 1)
    tables = random_tables(case.sizes, rows, seed, case.tables[0].dtype, kind)
    other = Case(case.lists, tables, case.noop)
    expected = [brute_kl(p, q) for p, q in zip(oracle(case), oracle(other), strict=True)]
    close(kl_divergence(case.dist, other.dist), expected, 5 * case.tolerance)
    close(kl_divergence(case.dist, case.dist), [0.0] * len(case.lists), case.tolerance)
    whole = other.dist.enumerated()  # the same distribution, of another kind
    close(kl_divergence(case.dist, whole), expected, 5 * case.tolerance)


def by_hand(lists: Lists, *tables: list[list[float]]) -> Case:
    """The same probabilities in all rows; of slot j: for each prefix, one for each value."""
    logs = [torch.tensor([table], dtype=torch.float64).log() for table in tables]
    repeated = [table.expand(len(lists), -1, -1).clone() for table in logs]
    return Case(lists, repeated, (0,) * len(tables))


GREEDY = by_hand(
    [[(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)], []],
    [[0.6, 0.4]],
    [[0.4, 0.3, 0.3], [0.9, 0.3, 0.1]],  # value 1 is not listed behind primary 1
)
GREEDY_PROBS = {(0, 0): 0.24, (0, 1): 0.18, (0, 2): 0.18, (1, 0): 0.36, (1, 2): 0.04}


def test_the_mode_is_the_best_tuple_and_not_the_best_path() -> None:
    dist = GREEDY.dist
    for action, p in GREEDY_PROBS.items():
        close(dist.log_prob(torch.tensor([action, (0, 0)])).exp(), [p, 1], 1e-12)
    assert dist.mode.tolist() == [[1, 0], [0, 0]]
    assert not dist.mode.requires_grad


def test_the_mode_of_equals_is_the_smallest_tuple() -> None:
    case = by_hand([[(1, 1), (1, 0), (0, 0), (0, 1)]], [[0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]])
    assert case.dist.mode.tolist() == [[0, 0]]


def test_without_replacement_draws_each_possible_tuple_once() -> None:
    torch.manual_seed(0)
    actions, drawn = GREEDY.dist.sample_without_replacement(6)
    assert drawn.tolist() == [[True] * 5 + [False], [False] * 6]
    assert set(map(tuple, actions[0, :5].tolist())) == set(GREEDY_PROBS)


@thorough
@given(st.data())
def test_order_padding_and_repeats_of_the_list_change_nothing(data: st.DataObject) -> None:
    case = data.draw(cases())
    width = len(case.sizes)
    lists = []
    for row in case.lists:
        again = data.draw(st.lists(st.sampled_from(row), max_size=4)) if row else []
        lists.append(data.draw(st.permutations([*set(row), *again])))
    most = max(map(len, lists), default=0) + data.draw(st.integers(0, 2))
    padded = torch.full((len(lists), most, width), data.draw(st.sampled_from([0, -7, 2**62])))
    for b, row in enumerate(lists):
        padded[b, : len(row)] = torch.tensor(row, dtype=torch.int64).view(-1, width)
    counts = torch.tensor([len(row) for row in lists], dtype=torch.int64)
    legal = LegalActions.from_padded(padded, counts, torch.tensor(case.noop))
    one = case.dist
    other = LegalAutoregressive(legal, Table(case.tables, len(lists)), case.sizes)
    for action in one_each(oracle(case), width):
        assert torch.equal(one.log_prob(action), other.log_prob(action))
        assert torch.equal(one.path_entropy(action), other.path_entropy(action))
    close(one.entropy(), other.entropy().double(), case.tolerance)
    torch.manual_seed(1)
    drawn = one.sample()
    torch.manual_seed(1)
    assert torch.equal(drawn, other.sample())


# ---- what is not listed


@thorough
@given(st.data())
def test_what_is_not_listed_has_no_mass(data: st.DataObject) -> None:
    case = data.draw(cases())
    b = len(case.lists)
    value = st.sampled_from([-(2**40), -1, 0, 1, 2, 3, 4, 5, 17, 2**40, 2**62])
    action = st.tuples(*[value] * len(case.sizes))
    some = data.draw(st.lists(action, min_size=b, max_size=b))
    actions = torch.tensor(some, dtype=torch.int64).view(b, len(case.sizes))
    expected = [row.get(a, -INF) for row, a in zip(oracle(case), some, strict=True)]
    dist = case.dist
    close(dist.log_prob(actions), expected, case.tolerance)
    close(dist.log_prob(actions.unsqueeze(0))[0], expected, case.tolerance)
    assert dist.path_entropy(actions).isfinite().all()


WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
HALVES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [*WHOLE, torch.uint32, torch.uint64, *HALVES])
def test_actions_of_any_whole_dtype(dtype: torch.dtype) -> None:
    dist = GREEDY.dist
    for action, expected in (((1, 0), 0.36), ((1, 1), 0.0)):
        actions = torch.tensor([action, (0, 0)]).to(dtype)
        close(dist.log_prob(actions).exp(), [expected, 1], 1e-12)
        close(dist.log_prob(actions.unsqueeze(0)).exp(), [[expected, 1]], 1e-12)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [0.5, -0.25, NAN, INF, -INF])
@pytest.mark.parametrize("slot", [0, 1])
def test_values_that_are_not_whole(value: float, dtype: torch.dtype, slot: int) -> None:
    actions = torch.zeros(2, 2, dtype=dtype)
    actions[0, slot] = value
    legal, table = GREEDY.legal, Table(GREEDY.tables, 2)
    with pytest.raises(ValueError, match="within the support"):
        LegalAutoregressive(legal, table, GREEDY.sizes, validate_args=True).log_prob(actions)
    loose = LegalAutoregressive(legal, table, GREEDY.sizes, validate_args=False)
    assert loose.log_prob(actions).tolist() == [-INF, 0]


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (1, 2), (2,), (4, 3, 2), (2, 2, 1)])
@pytest.mark.parametrize("validate_args", [True, False])
def test_actions_of_a_wrong_shape(shape: tuple[int, ...], validate_args: bool) -> None:
    table = Table(GREEDY.tables, 2)
    dist = LegalAutoregressive(GREEDY.legal, table, GREEDY.sizes, validate_args)
    with pytest.raises(ValueError, match=r"actions must be|shape"):
        dist.log_prob(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="actions must be"):
        dist.path_entropy(torch.zeros(shape, dtype=torch.int64))


def test_path_entropy_is_of_one_tuple_a_row() -> None:
    with pytest.raises(ValueError, match=r"actions must be \(B, H\), got \(3, 2, 2\)"):
        GREEDY.dist.path_entropy(torch.zeros(3, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_actions_that_are_no_numbers(dtype: torch.dtype) -> None:
    dist = LegalAutoregressive(GREEDY.legal, Table(GREEDY.tables, 2), GREEDY.sizes, False)
    with pytest.raises(TypeError, match="whole numbers"):
        dist.log_prob(torch.zeros(2, 2, dtype=dtype))


def test_what_torch_asks_of_a_distribution() -> None:
    dist = GREEDY.dist
    assert dist.batch_shape == (2,)
    assert dist.event_shape == (2,)
    assert dist.mean.shape == dist.variance.shape == (2, 2)
    assert dist.mean.isnan().all()
    checked = dist.support.check(torch.tensor([[0.0, 1.0], [0.5, 0.0]]))
    assert checked.tolist() == [True, False]
    with pytest.raises(NotImplementedError, match="cannot be expanded"):
        dist.expand((3, 2))


@pytest.mark.parametrize("sizes", [[2], [2, 3, 1], []])
def test_another_number_of_sizes(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"have 2 values, but there are {len(sizes)} sizes"):
        LegalAutoregressive(GREEDY.legal, Table(GREEDY.tables, 2), sizes)


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("change", ["fused", "data", "assigned", "vector", "in place"])
def test_a_distribution_keeps_the_weights_it_was_made_with(change: str, learning: bool) -> None:
    torch.manual_seed(0)
    given = inputs(MIXED, [everything_of(MIXED)] * 3)
    head = given.head()
    with torch.set_grad_enabled(learning):
        dist = head(given.hidden, given.entities, given.legal)
        same = head(given.hidden, given.entities, given.legal)
    actions = same.sample()
    wanted = same.log_prob(actions), same.entropy(), same.path_entropy(actions)
    parameters = list(head.parameters())
    if change == "fused":
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.Adam(parameters, lr=1.0, fused=True).step()
    elif change == "vector":
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(parameters) + 1, parameters
        )
    else:
        for parameter in parameters:
            if change == "data":
                parameter.data.add_(1.0)
            elif change == "assigned":
                parameter.data = parameter.data + 1
            else:
                with torch.no_grad():
                    parameter.add_(1.0)
    after = head(given.hidden, given.entities, given.legal)
    assert (after.log_prob(actions) - wanted[0]).abs().max() > 1e-3
    got = dist.log_prob(actions), dist.entropy(), dist.path_entropy(actions)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    divergence = torch.distributions.kl_divergence(dist, after)
    torch.testing.assert_close(divergence, torch.distributions.kl_divergence(same, after))


def test_functional_call_answers_with_the_weights_that_it_was_given() -> None:
    torch.manual_seed(0)
    given = inputs(MIXED, [everything_of(MIXED)] * 3)
    head, other = given.head(), given.head()
    weights = dict(other.named_parameters())
    dist = torch.func.functional_call(head, weights, (given.hidden, given.entities, given.legal))
    expected = other(given.hidden, given.entities, given.legal)
    actions = expected.sample()
    torch.testing.assert_close(dist.log_prob(actions), expected.log_prob(actions))
    torch.testing.assert_close(dist.entropy(), expected.entropy())


def test_a_head_can_be_copied_inside_inference_mode() -> None:
    given = inputs(MIXED, [everything_of(MIXED)] * 3)
    head = given.head()
    with torch.inference_mode():
        copied = copy.deepcopy(head)
        actions = copied(given.hidden, given.entities, given.legal).sample()
    assert given.legal.contains(actions).all()


@pytest.mark.parametrize("kind", [fp.FlatHead, AutoregressiveHead])
def test_a_distribution_of_one_row_does_not_follow_the_encoder_s_weights(kind: type) -> None:
    given = inputs(MIXED, [everything_of(MIXED)])
    weights = {name: torch.nn.Parameter(one[0].clone()) for name, one in given.entities.items()}
    entities = {name: one.unsqueeze(0) for name, one in weights.items()}
    dist = kind(MIXED, given.hidden.shape[1], given.sizes, 8)(given.hidden, entities, given.legal)
    wanted = dist.entropy().detach().clone()
    dist = copy.copy(dist)
    for name in ("_path", "_enumerated"):
        if hasattr(dist, name):
            setattr(dist, name, None)
    for weight in weights.values():
        weight.data.add_(3.0)
    torch.testing.assert_close(dist.entropy().detach(), wanted)


def test_made_without_a_graph_it_has_none_later() -> None:
    torch.manual_seed(0)
    given = inputs(MIXED, [everything_of(MIXED)] * 3)
    with torch.no_grad():
        dist = given.head()(given.hidden, given.entities, given.legal)
    actions = dist.sample()
    assert not dist.log_prob(actions).requires_grad
    assert not dist.entropy().requires_grad


def test_a_value_not_below_its_size() -> None:
    legal = LegalActions.from_lists([[(0, 1)], [(1, 4)]])
    with pytest.raises(ValueError, match="values up to 4 in slot 1, but its size is 4"):
        LegalAutoregressive(legal, Behind([2, 4], 2), [2, 4])


@pytest.mark.parametrize("validate_args", [True, False])
def test_validate_args_is_kept(validate_args: bool) -> None:
    plain = LegalAutoregressive(GREEDY.legal, Table(GREEDY.tables, 2), GREEDY.sizes, validate_args)
    for dist in (plain, plain.enumerated(), plain.tempered(2.0), plain.smoothed(0.1)):
        if validate_args:
            with pytest.raises(ValueError, match="within the support"):
                dist.log_prob(torch.full((2, 2), 0.5))
        else:
            assert (dist.log_prob(torch.full((2, 2), 0.5)) == -INF).all()


# ---- samples


@thorough
@given(cases(), st.integers(0, 2**32))
def test_every_sample_is_legal_and_possible(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    dist, rows = case.dist, oracle(case)
    walked = torch.stack([dist.sample() for _ in range(4)])
    for drawn in (walked, dist.sample((3,)), dist.sample((2, 1)).flatten(0, 1)):
        assert drawn.dtype == torch.int64
        for sample in drawn.tolist():
            assert all(row[tuple(a)] > -INF for a, row in zip(sample, rows, strict=True))
    assert dist.sample((2, 1)).shape == (2, 1, len(rows), len(case.sizes))
    assert dist.log_prob(dist.sample()).isfinite().all()


TREE: Lists = [
    [(2, 1, 1), (0, 0, 0), (1, 0, 1), (0, 0, 1), (2, 1, 0), (0, 1, 0), (2, 1, 1)],
    [],
    [(1, 0, 0)],
    [(0, 1, 0), (1, 0, 0), (1, 1, 1), (1, 1, 0)],
]


def repeated(times: int) -> tuple[Case, list[dict[Action, float]]]:
    """TREE over and over, with tables of its own for each of its rows; and its probabilities."""
    tables = random_tables([3, 2, 2], 4, 3, torch.float32)
    case = Case(TREE, tables, (2, 0, 1))
    probs = [normalised({a: math.exp(p) for a, p in row.items()}) for row in oracle(case)]
    return Case(TREE * times, tables, case.noop), probs


def agree_in_each_row(drawn: Tensor, probs: list[dict[Action, float]]) -> None:
    """(n, 4, H) draws; of the row with a single tuple and the empty one all are the same."""
    for row, of in enumerate(probs):
        if len(of) > 1:
            agree(drawn[:, row], of)
        else:
            assert (drawn[:, row] == torch.tensor(*of)).all()


def test_frequencies_of_walks() -> None:
    torch.manual_seed(1)
    case, probs = repeated(15_000)
    agree_in_each_row(case.dist.sample().view(15_000, 4, 3), probs)


def test_frequencies_of_many_draws_a_row() -> None:
    torch.manual_seed(2)
    case, probs = repeated(3)
    agree_in_each_row(case.dist.sample((20_000,)), probs * 3)


def test_frequencies_of_tempered_and_smoothed_draws() -> None:
    torch.manual_seed(3)
    case, probs = repeated(3)
    drawn = case.dist.tempered(2.0).smoothed(0.2).sample((20_000,))
    hot = [normalised({action: p**0.5 for action, p in row.items()}) for row in probs]
    mixed = [{a: 0.8 * p + 0.2 / len(row) for a, p in row.items()} for row in hot]
    agree_in_each_row(drawn, mixed * 3)


def test_the_last_rows_of_a_large_batch() -> None:
    """Of 16,384 rows of 200 values in a slot: running sums over a batch lose what is late in it."""
    torch.manual_seed(4)
    rows, last, values = 16_384, 4_096, 200
    logits = torch.tensor([math.log(1 + i % 3) for i in range(values)])
    tables = [torch.tensor([[[0.0, 1.0]]]), logits.expand(1, 2, values)]
    counts = torch.full((rows,), 2)
    counts[-last:] = 2 * values
    few = torch.tensor([[0, 0], [1, 7]]).repeat(rows - last, 1)
    many = torch.tensor(list(product(range(2), range(values)))).repeat(last, 1)
    legal = LegalActions(torch.cat([few, many]), counts)
    dist = LegalAutoregressive(legal, Table(tables, rows), [2, values])
    drawn = torch.cat([dist.sample()[-last:] for _ in range(3)])
    first = normalised({(0,): 1.0, (1,): math.e})
    second = normalised({(i,): 1.0 + i % 3 for i in range(values)})
    agree(drawn[:, :1], first)
    agree(drawn[:, 1:], second)
    cells = normalised(
        {
            (a, r): first[(a,)] * sum(second[(i,)] for i in range(r, values, 3))
            for a in (0, 1)
            for r in range(3)
        }
    )
    agree(torch.stack([drawn[:, 0], drawn[:, 1] % 3], 1), cells)  # together, and not only alone


def test_draws_follow_the_seed_and_differ() -> None:
    dist = repeated(20)[0].dist
    torch.manual_seed(0)
    first, second = dist.sample(), dist.sample()
    torch.manual_seed(0)
    assert torch.equal(dist.sample(), first)
    assert not torch.equal(first, second)
    assert torch.equal(dist.sample(), second)
    with torch.no_grad():
        changed = dist.sample().zero_()  # a caller's to change
        assert torch.equal(dist.log_prob(changed), repeated(20)[0].dist.log_prob(changed))


# ---- empty rows


@thorough
@given(cases())
def test_empty_rows_play_the_noop(case: Case) -> None:
    dist = case.dist
    empty = dist.legal.counts == 0
    noop = torch.tensor(case.noop)
    for drawn in (dist.mode, dist.sample(), *dist.sample((2,))):
        assert (drawn[empty] == noop).all()
    actions = noop.expand(len(case.lists), -1)
    assert (dist.log_prob(actions)[empty] == 0).all()
    assert (dist.log_prob(actions + 1)[empty] == -INF).all()
    assert (dist.entropy()[empty] == 0).all()
    assert (dist.path_entropy(actions)[empty] == 0).all()


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_batches_without_a_legal_tuple(rows: int, dtype: torch.dtype) -> None:
    """In the graph all the same: DistributedDataParallel waits for every parameter's gradient."""
    tables = [t.requires_grad_() for t in random_tables([5, 1, 8], max(rows, 1), 0, dtype)]
    dist = Case([[]] * rows, tables, (4, 0, 7)).dist
    noop = torch.tensor([4, 0, 7]).expand(rows, 3)
    for drawn in (dist.sample(), dist.mode, *dist.sample((2,))):
        assert torch.equal(drawn, noop)
    for value in (dist.log_prob(noop), dist.path_entropy(noop), dist.entropy()):
        assert value.tolist() == [0] * rows
        got = torch.autograd.grad(value.sum(), tables, retain_graph=True)
        assert not any(g.any() for g in got)
    assert dist.log_prob(noop.expand(2, rows, 3)).shape == (2, rows)


# ---- gradients


def dense(case: Case, tables: list[Tensor], row: int) -> dict[Action, tuple[Tensor, Tensor]]:
    """Of each possible tuple of a row its log-probability and path entropy, in torch's float64."""
    found: dict[Action, tuple[Tensor, Tensor]] = {}
    zero = torch.zeros((), dtype=torch.float64)

    def walk(prefix: Action, listed: set[Action], log_p: Tensor, entropy: Tensor) -> None:
        slot = len(prefix)
        if slot == len(case.sizes):
            found[prefix] = log_p, entropy
            return
        place = 0
        for value, size in zip(prefix, case.sizes, strict=False):
            place = place * size + value
        of = {a[slot]: tables[slot][row, place, a[slot]].double() for a in sorted(listed)}
        live = {value: logit for value, logit in of.items() if logit > -INF}
        live = live or dict.fromkeys(of, zero)
        log_ps = torch.log_softmax(torch.stack(list(live.values())), 0)
        own = -(log_ps.exp() * log_ps).sum()
        for value, p in zip(live, log_ps, strict=True):
            walk(
                (*prefix, value), {a for a in listed if a[slot] == value}, log_p + p, entropy + own
            )

    if case.lists[row]:
        walk((), set(case.lists[row]), zero, zero)
    return found


def gradients(value: Tensor, tables: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(table) for table in tables]
    got = torch.autograd.grad(value, tables, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(got, tables, strict=True)]


@thorough
@given(st.data())
def test_gradients_equal_a_dense_reference(data: st.DataObject) -> None:
    """Of log_prob, entropy and path entropy, with an unlisted stored tuple in every other row."""
    case = data.draw(cases(kinds=("plain", "tied", "gaps", "dead")))
    tables = [table.requires_grad_() for table in case.tables]
    dist, rows = case.dist, [dense(case, tables, b) for b in range(len(case.lists))]
    weights = torch.linspace(-1, 2, len(rows) + 1, dtype=torch.float64)[1:]
    zero = torch.zeros((), dtype=torch.float64)
    chosen, log_p, path, entropy = [], zero, zero, zero
    for b, row in enumerate(rows):
        entropy = entropy - weights[b] * sum((p.exp() * p for p, _ in row.values()), zero)
        action = data.draw(st.sampled_from(sorted(row))) if row else case.noop
        if b % 2:
            chosen.append((-1,) * len(case.sizes))
            continue
        chosen.append(action)
        if row:
            log_p = log_p + weights[b] * row[action][0]
            path = path + weights[b] * row[action][1]
    actions = torch.tensor(chosen, dtype=torch.int64).view(len(rows), len(case.sizes))
    odd = torch.arange(len(rows)) % 2 == 1
    got = dist.log_prob(actions)
    assert (got[odd] == -INF).all()
    stacked = dist.log_prob(torch.stack([actions, actions]))[1]
    close(stacked, got.double(), case.tolerance)
    of_path = dist.path_entropy(actions).masked_fill(odd, 0.0)
    for mine, reference in (
        (got, log_p),
        (stacked, log_p),
        (of_path, path),
        (dist.entropy(), entropy),
    ):
        # As the trainer weighs them; of the -inf with a weight of its own, which must not matter.
        total = torch.where(mine > -INF, mine, 0.0).double() @ weights
        close(total, reference.detach(), 20 * case.tolerance)
        for a, b in zip(gradients(total, tables), gradients(reference, tables), strict=True):
            assert a.isfinite().all()
            close(a, b.double(), 20 * case.tolerance)
        if mine is not of_path and len(rows):
            through = torch.autograd.grad(mine, tables, weights.to(mine.dtype), retain_graph=True)
            for a, b in zip(through, gradients(reference, tables), strict=True):
                close(a, b.double(), 20 * case.tolerance)


def test_gradcheck() -> None:
    case = Case(
        [[(0, 1, 0), (2, 0, 0), (0, 1, 1), (0, 0, 0)], [], [(1, 1, 1), (1, 0, 0), (1, 1, 1)]],
        random_tables([3, 2, 2], 3, 5, torch.float64),
        (0, 0, 0),
    )
    actions = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]])

    def everything(*tables: Tensor) -> Tensor:
        dist = Case(case.lists, list(tables), case.noop).dist
        uniform = Case(case.lists, [t.detach() * 0 for t in tables], case.noop).dist
        return torch.stack(
            [
                dist.log_prob(actions),
                dist.entropy(),
                dist.path_entropy(actions),
                dist.tempered(0.7).log_prob(actions),
                dist.smoothed(0.2).entropy(),
                kl_divergence(dist, uniform),
                kl_divergence(uniform, dist),
            ]
        )

    assert torch.autograd.gradcheck(everything, [t.requires_grad_() for t in case.tables])


@pytest.mark.parametrize("action", [(0, 0), (1, 1), (1, 9), (7, 0), (-1, -1), (0, 1)])
def test_no_gradient_is_nan_where_the_log_prob_is_minus_infinity(action: Action) -> None:
    """The stored tuple has a logit of -inf in its first or its second value, or is not listed."""
    tables = [
        torch.tensor([[[-INF, 0.0, 1.0]]] * 2, requires_grad=True),
        torch.tensor([[[0.0, 1.0], [2.0, -INF], [0.0, 0.0]]] * 2, requires_grad=True),
    ]
    dist = Case([[(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)], [(1, 0)]], tables, (0, 0)).dist
    actions = torch.tensor([action, (1, 0)])
    for value in (dist.log_prob(actions), dist.log_prob(actions.unsqueeze(0))[0]):
        assert value.tolist() == [-INF, 0]
        # As the trainer makes a ratio of it: exp(-inf - old) is 0, and so is its gradient.
        for loss in (value.sum(), (value - 0.5).exp().sum()):
            for got in torch.autograd.grad(loss, tables, retain_graph=True):
                assert got.isfinite().all()
    for got in torch.autograd.grad((value - 0.5).exp().sum(), tables, retain_graph=True):
        assert (got == 0).all()
    for got in torch.autograd.grad(dist.path_entropy(actions).sum(), tables):
        assert got.isfinite().all()


# ---- unsound logits

CALLS: dict[str, Callable[[LegalAutoregressive], object]] = {
    "sample": lambda dist: dist.sample(),
    "samples": lambda dist: dist.sample((2,)),
    "log_prob": lambda dist: dist.log_prob(torch.tensor([[0, 1], [0, 0], [1, 0]])),
    "log_probs": lambda dist: dist.log_prob(torch.tensor([[[0, 1], [0, 0], [1, 0]]])),
    "path_entropy": lambda dist: dist.path_entropy(torch.tensor([[0, 1], [0, 0], [1, 0]])),
    "entropy": lambda dist: dist.entropy(),
    "mode": lambda dist: dist.mode,
    "tempered": lambda dist: dist.tempered(2.0),
    "smoothed": lambda dist: dist.smoothed(0.1),
    "without replacement": lambda dist: dist.sample_without_replacement(1),
    "kl": lambda dist: kl_divergence(dist, dist),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("rest", [0.0, -INF])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_and_infinite_logits_raise_when_used(
    bad: float, rest: float, slot: int, call: str
) -> None:
    """Row 2, whose only primary is 1, has the bad one; row 1 is empty."""
    lists: Lists = [[(0, 1), (0, 0)], [], [(1, 0), (1, 2), (1, 2)]]
    tables = [torch.full((3, 1, 2), rest), torch.full((3, 2, 3), rest)]
    tables[slot][2, slot and 1, 2 if slot else 1] = bad
    dist = Case(lists, tables, (0, 0)).dist  # building it does not look at them
    value = 2 if slot else 1
    with pytest.raises(
        ValueError, match=f"row 2: the logit of value {value} in slot {slot} is {bad}"
    ):
        CALLS[call](dist)


# ---- the remembered path


def test_a_log_prob_after_a_draw_is_the_same_number_as_recomputed() -> None:
    torch.manual_seed(0)
    case, _ = repeated(50)
    dist = case.dist
    for _ in range(3):
        drawn = dist.sample()
        log_prob, entropy = dist.log_prob(drawn), dist.path_entropy(drawn)
        fresh = case.dist
        assert torch.equal(log_prob, fresh.log_prob(drawn))
        assert torch.equal(entropy, fresh.path_entropy(drawn))
        assert torch.equal(fresh.path_entropy(drawn), case.dist.path_entropy(drawn))


def test_the_remembered_path_is_used_for_its_own_tuples_and_no_others() -> None:
    torch.manual_seed(0)
    case, _ = repeated(5)
    table = Table(case.tables, len(case.lists))
    dist = LegalAutoregressive(case.legal, table, case.sizes)
    with torch.no_grad():
        drawn = dist.sample()
        assert table.asked == 3
        dist.log_prob(drawn), dist.path_entropy(drawn), dist.log_prob(drawn.int())
        assert table.asked == 3
    other = drawn.clone()
    other[0] = (
        torch.tensor([1, 0, 1]) if drawn[0].tolist() != [1, 0, 1] else torch.tensor([0, 0, 0])
    )
    assert torch.equal(dist.log_prob(other), case.dist.log_prob(other))
    assert torch.equal(dist.path_entropy(other), case.dist.path_entropy(other))
    again = dist.sample()
    assert torch.equal(dist.log_prob(again), case.dist.log_prob(again))
    assert torch.equal(dist.log_prob(drawn), case.dist.log_prob(drawn))


def test_what_is_remembered_without_a_graph_is_not_used_where_gradients_are_wanted() -> None:
    torch.manual_seed(0)
    case, _ = repeated(2)
    tables = [table.requires_grad_() for table in case.tables]
    dist, fresh = case.dist, case.dist
    with torch.no_grad():
        drawn = dist.sample()
        without = dist.log_prob(drawn)
        dist.path_entropy(drawn), dist.entropy(), dist.mode
    assert not without.requires_grad
    for mine, other in (
        (dist.log_prob(drawn), fresh.log_prob(drawn)),
        (dist.path_entropy(drawn), fresh.path_entropy(drawn)),
        (dist.entropy(), fresh.entropy()),
        (dist.log_prob(drawn.unsqueeze(0)), fresh.log_prob(drawn.unsqueeze(0))),
        (dist.tempered(2.0).entropy(), fresh.tempered(2.0).entropy()),
    ):
        got = torch.autograd.grad(mine.sum(), tables, retain_graph=True)
        expected = torch.autograd.grad(other.sum(), tables, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert any(g.any() for g in got)
    assert torch.equal(dist.log_prob(drawn), without)


def test_what_is_remembered_with_a_graph_is_not_given_out_where_none_is_wanted() -> None:
    case, _ = repeated(2)
    for table in case.tables:
        table.requires_grad_()
    dist, actions = case.dist, case.dist.mode
    dist.log_prob(actions), dist.entropy()
    with torch.no_grad():
        assert not dist.entropy().requires_grad
        assert not dist.log_prob(actions.unsqueeze(0)).requires_grad
        assert not dist.log_prob(actions).requires_grad
        assert not dist.path_entropy(actions).requires_grad


# ---- the autoregressive head


@dataclass
class Inputs:
    """What a head is given, B rows; hidden (B, 5), entities of size 3."""

    spec: ActionSpec
    sizes: dict[str, tuple[int, int]]
    hidden: Tensor
    entities: dict[str, Tensor]
    legal: LegalActions

    def head(self, **arguments: Any) -> AutoregressiveHead:
        return AutoregressiveHead(self.spec, 5, self.sizes, **arguments)


def inputs(spec: ActionSpec, lists: Lists, seed: int = 0) -> Inputs:
    """One more thing of each name than the spec points at."""
    random = torch.Generator().manual_seed(seed)
    largest: dict[str, int] = {}
    for part in spec.parts:
        if isinstance(part.role, Entity):
            name = part.role.name
            largest[name] = max(largest.get(name, 0), part.role.size)
    sizes = {name: (1 + size, 3) for name, size in largest.items()}
    hidden = torch.randn(len(lists), 5, generator=random)
    entities = {k: torch.randn(len(lists), *v, generator=random) for k, v in sizes.items()}
    legal = LegalActions.from_lists(lists, slots=spec.slots, noop=spec.noop.tolist())
    return Inputs(spec, sizes, hidden, entities, legal)


@st.composite
def head_inputs(draw: st.DrawFn) -> Inputs:
    spec = draw(specs())
    lists = draw(legal_lists(actions_of(spec), max_rows=4))
    return inputs(spec, lists, draw(st.integers(0, 999)))


def enlarged(head: AutoregressiveHead) -> AutoregressiveHead:
    """Keys as large as rows, so that logits are far from 0."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "keys" in name:
                parameter.mul_(15)
    return head


def role_of(spec: ActionSpec, slot: int, primary: int, value: int) -> tuple[str | None, int] | None:
    """The entity that a value points at and its number, or (None, its learned row) of an Index."""
    learned = 0
    for part in spec.parts:
        if part.slot != slot - 1:
            continue
        index = value - part.start
        here = part.primary == primary and 0 <= index < part.role.size
        if here:
            is_entity = isinstance(part.role, Entity)
            return (part.role.name, index) if is_entity else (None, learned + index)
        if isinstance(part.role, Index):
            learned += part.role.size
    return None


def names_of(head: AutoregressiveHead, slot: int) -> list[str | None]:
    return [kind.name for kind in head.slot(slot).kinds]


def reference_logit(
    head: AutoregressiveHead, given: Inputs, row: int, prefix: Action, value: int
) -> Tensor:
    """One value at a time, straight from the formula."""
    context = head.state(given.hidden[row])
    if not prefix:
        return context.relu() @ head.primary_keys[list(given.spec.primaries).index(value)]
    for slot, chosen in enumerate(prefix[1:], start=1):
        role = role_of(given.spec, slot, prefix[0], chosen)
        if role is not None:
            name, number = role
            rows = head.slot(slot).rows[names_of(head, slot).index(name)]
            thing = rows[number] if name is None else given.entities[name][row, number] @ rows
            context = context + thing
    slot = len(prefix)
    query = (
        context + head.primary_rows[slot - 1][list(given.spec.primaries).index(prefix[0])]
    ).relu()
    role = role_of(given.spec, slot, prefix[0], value)
    if role is None:
        return query.sum() * 0
    name, number = role
    keys = head.slot(slot).keys[names_of(head, slot).index(name)]
    return query @ (keys[number] if name is None else keys @ given.entities[name][row, number])


def reference_log_prob(head: AutoregressiveHead, given: Inputs, row: int, action: Action) -> Tensor:
    listed = set(given.legal.to_lists()[row])
    total = given.hidden.new_zeros(())
    for slot, value in enumerate(action):
        listed = {other for other in listed if other[:slot] == action[:slot]}
        values = sorted({other[slot] for other in listed})
        logits = [
            reference_logit(head, given, row, action[:slot], v)
            + math.log(sum(other[slot] == v for other in listed))
            for v in values
        ]
        total = total + torch.log_softmax(torch.stack(logits), 0)[values.index(value)]
    return total


@given(head_inputs())
def test_log_probs_are_those_of_a_slow_reference(given: Inputs) -> None:
    """Which checks each role of each (primary, slot), of a OneOf by its ranges."""
    torch.manual_seed(0)
    head = enlarged(given.head(width=6))
    dist = head(given.hidden, given.entities, given.legal)
    rows = given.legal.to_lists()
    for place in range(max(map(len, rows), default=0)):
        actions = [
            row[place % len(row)] if row else tuple(given.legal.noop.tolist()) for row in rows
        ]
        expected = [
            reference_log_prob(head, given, b, a) if rows[b] else torch.zeros(())
            for b, a in enumerate(actions)
        ]
        got = dist.log_prob(torch.tensor(actions))
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dist.log_prob(torch.tensor([actions]))[0], got)


@given(head_inputs(), st.integers(0, 2**32))
def test_probabilities_sum_to_1_and_every_draw_is_legal(given: Inputs, seed: int) -> None:
    torch.manual_seed(seed)
    dist = enlarged(given.head())(given.hidden, given.entities, given.legal)
    assert isinstance(dist, LegalAutoregressive)
    rows: list[Row] = [
        dict.fromkeys(row or [tuple(given.legal.noop.tolist())], 0.0)
        for row in given.legal.to_lists()
    ]
    mass = torch.zeros(len(rows))
    for place, actions in enumerate(one_each(rows, 1 + given.spec.slots)):
        fresh = torch.tensor([place < len(row) for row in rows])
        mass += dist.log_prob(actions).detach().exp() * fresh
    torch.testing.assert_close(mass, torch.ones(len(rows)), rtol=0, atol=1e-6)
    for drawn in (*(dist.sample() for _ in range(5)), *dist.sample((3,)), dist.mode):
        assert given.legal.contains(drawn).all()


@given(head_inputs())
def test_every_parameter_takes_part(given: Inputs) -> None:
    """In the graph of each loss, also without a legal tuple; and float32."""
    for legal in (given.legal, LegalActions.from_lists([[]] * len(given.legal), given.spec.slots)):
        head = given.head(width=4)
        dist = head(given.hidden, given.entities, legal)
        actions = dist.mode
        for value in (dist.log_prob(actions), dist.path_entropy(actions), dist.entropy()):
            assert value.dtype == torch.float32
            head.zero_grad(set_to_none=True)
            value.sum().backward(retain_graph=True)
            for name, parameter in head.named_parameters():
                assert parameter.numel(), name  # muon divides by the sides of a matrix
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name


MIXED = ActionSpec(
    [
        Primary("rest"),
        Primary("attack", Entity("unit", 3), Entity("foe", 3), Index("how", 3)),
        Primary(
            "play", Index("card", 3), OneOf(Index("none", 1), Entity("unit", 2)), Index("x", 2)
        ),
        Primary("link", Entity("unit", 3), Entity("unit", 3)),
    ]
)


def everything_of(spec: ActionSpec) -> list[Action]:
    """Each tuple within the spec."""
    found = []
    for primary in spec.primaries.values():
        used = [range(role.size) for role in primary.slots]
        unused = [range(1)] * (spec.slots - len(used))
        found += [(primary.id or 0, *values) for values in product(*used, *unused)]
    return found


def test_each_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    given = inputs(MIXED, [everything_of(MIXED)] * 40)
    head = given.head()
    dist = head(given.hidden, given.entities, given.legal)
    actions = dist.sample()
    (dist.log_prob(actions).sum() + dist.path_entropy(actions).sum()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.any(), name


def test_an_index_ignores_the_entities_and_an_entity_follows_its_own() -> None:
    torch.manual_seed(0)
    given = inputs(MIXED, [everything_of(MIXED)])
    head = enlarged(given.head())

    def conditional(entities: Mapping[str, Tensor], *prefixes: Action) -> Tensor:
        """log p(last value | values before) of each prefix, from sums over the list."""
        dist = head(given.hidden, entities, given.legal).enumerated()
        probs = dict(zip(map(tuple, dist.legal.actions.tolist()), dist.probs.tolist(), strict=True))

        def mass(prefix: Action) -> float:
            return sum(p for action, p in probs.items() if action[: len(prefix)] == prefix)

        return torch.tensor([math.log(mass(prefix) / mass(prefix[:-1])) for prefix in prefixes])

    def changed(name: str, thing: int) -> dict[str, Tensor]:
        entities = {key: value.clone() for key, value in given.entities.items()}
        entities[name][0, thing] += 1
        return entities

    primaries = [(p,) for p in range(4)]
    cards, units = [(2, c) for c in range(3)], [(1, u) for u in range(3)]
    targets = [(2, 1, t) for t in range(3)]
    before = functools.partial(conditional, given.entities)
    for name, thing in (("unit", 0), ("unit", 1), ("foe", 2)):
        after = functools.partial(conditional, changed(name, thing))
        close(after(*primaries), before(*primaries).double(), 1e-5)
        close(after(*cards), before(*cards).double(), 1e-5)
    after = functools.partial(conditional, changed("unit", 1))
    # Which odds change: those of unit 1 against others, and of no other pair.
    odds = after(*units) - before(*units)
    assert abs(float(odds[0] - odds[2])) < 1e-5 < 1e-2 < abs(float(odds[1] - odds[0]))
    odds = after(*targets) - before(*targets)  # 0 is none, 1 and 2 are units 0 and 1
    assert abs(float(odds[0] - odds[1])) < 1e-5 < 1e-2 < abs(float(odds[2] - odds[1]))
    after = functools.partial(conditional, changed("foe", 1))
    close(after(*targets), before(*targets).double(), 1e-5)
    foes = [(1, 0, f) for f in range(3)]
    odds = after(*foes) - before(*foes)
    assert abs(float(odds[0] - odds[2])) < 1e-5 < 1e-2 < abs(float(odds[1] - odds[0]))


def test_permuting_entities_together_with_the_values_changes_no_probability() -> None:
    torch.manual_seed(0)
    given = inputs(MIXED, [everything_of(MIXED), everything_of(MIXED)[5:40:3], []])
    head = enlarged(given.head())
    order = torch.tensor([1, 0, 2, 3])  # unit i moves to place order[i]
    moved = {**given.entities, "unit": torch.empty_like(given.entities["unit"])}
    moved["unit"][:, order] = given.entities["unit"]

    def renamed(actions: Tensor) -> Tensor:
        actions = actions.clone()
        points = (actions[..., 0] == 1) | (actions[..., 0] == 3)
        actions[..., 1] = torch.where(points, order[actions[..., 1]], actions[..., 1])
        points = actions[..., 0] == 3
        actions[..., 2] = torch.where(points, order[actions[..., 2]], actions[..., 2])
        points = (actions[..., 0] == 2) & (actions[..., 2] > 0)
        swapped = 1 + order[(actions[..., 2] - 1).clamp(min=0)]
        actions[..., 2] = torch.where(points, swapped, actions[..., 2])
        return actions

    legal = LegalActions(renamed(given.legal.actions), given.legal.counts)
    before = head(given.hidden, given.entities, given.legal)
    after = head(given.hidden, moved, legal)
    actions = torch.stack([before.sample() for _ in range(20)])
    torch.testing.assert_close(after.log_prob(renamed(actions)), before.log_prob(actions))
    torch.testing.assert_close(after.entropy(), before.entropy())
    plain = head(given.hidden, moved, given.legal).log_prob(actions)
    assert (plain - before.log_prob(actions)).abs().max() > 0.1  # the permutation alone is felt


TWO_ROLES = ActionSpec([Primary("point", Entity("unit", 4)), Primary("count", Index("n", 4))])


@pytest.mark.parametrize("favourite", [0, 1])
def test_roles_follow_the_primary_of_the_tuple_and_not_the_most_probable(favourite: int) -> None:
    torch.manual_seed(0)
    given = inputs(TWO_ROLES, [everything_of(TWO_ROLES)] * 2)
    head = enlarged(given.head())
    with torch.no_grad():
        head.state.bias.fill_(5.0)  # so the relu leaves something
        head.primary_keys[favourite], head.primary_keys[1 - favourite] = 0.01, 0.0
    dist = head(given.hidden, given.entities, given.legal)
    assert (dist.mode[:, 0] == favourite).all()
    keys = dict(zip(names_of(head, 1), head.slot(1).keys, strict=True))
    state = head.state(given.hidden)
    p = torch.log_softmax(state.relu() @ head.primary_keys.t(), 1)  # (B, 2)
    assert (p[:, favourite] > math.log(0.9)).all()
    numbers = (state + head.primary_rows[0][1]).relu() @ keys[None].t()  # (B, 4)
    query = (state + head.primary_rows[0][0]).relu() @ keys["unit"]
    things = torch.einsum("be,bne->bn", query, given.entities["unit"])[:, :4]
    for value in range(4):
        for primary, logits in ((0, things), (1, numbers)):
            stored = torch.tensor([[primary, value]] * 2)
            expected = p[:, primary] + torch.log_softmax(logits, 1)[:, value]
            torch.testing.assert_close(dist.log_prob(stored), expected, rtol=1e-4, atol=1e-4)
    drawn = dist.sample((4000,)).flatten(0, 1)
    assert len(drawn[:, 0].unique()) == 2  # the other primary is drawn too, and keeps its values
    assert torch.equal(
        dist.log_prob(drawn[:2]),
        head(given.hidden, given.entities, given.legal).log_prob(drawn[:2]),
    )


PAIRS = ActionSpec([Primary("link", Entity("unit", 5), Entity("unit", 5))])


def test_the_second_slot_learns_to_depend_on_the_first() -> None:
    """A random table over ordered pairs, another in each state; marginals alone would leave it."""
    torch.manual_seed(0)
    pairs = everything_of(PAIRS)
    random = torch.Generator().manual_seed(7)
    states = 4
    hidden = torch.randn(states, 5, generator=random)
    entities = {"unit": torch.randn(states, 5, 16, generator=random)}
    legal = LegalActions.from_lists([pairs] * states)
    table = torch.randn(states * 25, generator=random)
    target = LegalCategorical(legal, table)
    head = AutoregressiveHead(PAIRS, 5, {"unit": (5, 16)}, width=64)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        logits = head(hidden, entities, legal).enumerated().logits
        loss = (logits - target.logits).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    fitted = head(hidden, entities, legal)
    stored = torch.tensor(pairs).unsqueeze(1).expand(-1, states, -1)
    wanted = target.log_prob(stored)
    error = (fitted.log_prob(stored) - wanted).square().sum()
    explained = 1 - float(error.detach() / (wanted - wanted.mean()).square().sum())
    assert explained > 0.99
    joint = target.probs.view(states, 5, 5)
    independent = joint.sum(1, keepdim=True) * joint.sum(2, keepdim=True)
    dependence = (joint * (joint / independent).log()).sum((1, 2))
    assert (dependence > 0.1).all()  # what a head that ignores the first slot would be off by
    assert (kl_divergence(target, fitted.enumerated()) < 0.005).all()


def test_entities_that_the_encoder_does_not_embed() -> None:
    with pytest.raises(ValueError, match=r"'attack' points at Entity\('unit'\).*embeds \['foe'\]"):
        AutoregressiveHead(MIXED, 5, {"foe": (3, 3)})
    with pytest.raises(ValueError, match=r"points at 3 of Entity\('foe'\).*embeds only 2"):
        AutoregressiveHead(MIXED, 5, {"unit": (3, 3), "foe": (2, 3)})
    with pytest.raises(ValueError, match="no entities"):
        AutoregressiveHead(MIXED, 5)


@pytest.mark.parametrize("kind", ["flat", "autoregressive"])
def test_inputs_of_another_shape_than_declared(kind: str) -> None:
    given = inputs(MIXED, [everything_of(MIXED)] * 3)
    head = fp.HEADS[kind](MIXED, 5, given.sizes, 16)
    with pytest.raises(ValueError, match=r"hidden must be \(3, 5\), got \(3, 4\)"):
        head(given.hidden[:, :4], given.entities, given.legal)
    with pytest.raises(ValueError, match=r"hidden must be \(3, 5\), got \(2, 5\)"):
        head(given.hidden[:2], given.entities, given.legal)
    with pytest.raises(
        ValueError, match=r"entities\['unit'\] must be \(3, 4, 3\), got \(3, 3, 3\)"
    ):
        head(given.hidden, {**given.entities, "unit": given.entities["unit"][:, :3]}, given.legal)
    with pytest.raises(ValueError, match="gave no entities 'foe', only"):
        head(given.hidden, {"unit": given.entities["unit"]}, given.legal)
    short = LegalActions.from_lists([[(0, 0)]] * 3)
    with pytest.raises(ValueError, match="legal tuples have 1 slots, but the spec has 3"):
        head(given.hidden, given.entities, short)


def test_autocast_leaves_probabilities_in_float32() -> None:
    torch.manual_seed(0)
    given = inputs(MIXED, [everything_of(MIXED)] * 6)
    head = enlarged(given.head())
    with torch.autocast("cpu", torch.bfloat16):
        entities = {name: value.bfloat16() for name, value in given.entities.items()}
        dist = head(given.hidden, entities, given.legal)
        actions = dist.sample()
        inside = [dist.log_prob(actions), dist.path_entropy(actions), dist.entropy()]
        probs = dist.enumerated().probs
    assert {value.dtype for value in (*inside, probs)} == {torch.float32}
    assert (probs.view(6, -1).sum(1) - 1).abs().max() < 1e-6
    stored = torch.tensor(everything_of(MIXED)).unsqueeze(1).expand(-1, 6, -1)
    assert torch.equal(dist.log_prob(actions), inside[0])  # after it, the same numbers
    with torch.autocast("cpu", torch.bfloat16):
        walked = sum(dist.log_prob(action).exp() for action in stored)
    assert (walked - 1).abs().max() < 1e-6
    outside = head(given.hidden, entities, given.legal).log_prob(actions)
    assert (outside - inside[0]).abs().max() < 0.3  # the state was bfloat16, nothing after it


def uniform_over(legal: LegalActions, spec: ActionSpec) -> LegalAutoregressive:
    """The same probability for each legal tuple."""
    sizes = spec.nvec.tolist()
    return LegalAutoregressive(legal, Behind(sizes, len(legal)), sizes)


@given(specs().flatmap(lambda spec: st.tuples(st.just(spec), legal_lists(actions_of(spec)))))
def test_the_number_of_tuples_behind_each_value_makes_it_uniform(
    drawn: tuple[ActionSpec, Lists],
) -> None:
    spec, lists = drawn
    lists = [row + row[:2] for row in lists]  # some of them twice, which must not count
    legal = LegalActions.from_lists(lists, slots=spec.slots, noop=spec.noop.tolist())
    dist = uniform_over(legal, spec)
    distinct = [sorted(set(row)) for row in lists]
    for place in range(max(map(len, distinct), default=0)):
        actions = [row[place % len(row)] if row else tuple(spec.noop.tolist()) for row in distinct]
        expected = [-math.log(max(len(row), 1)) for row in distinct]
        for got in (
            dist.log_prob(torch.tensor(actions)),
            dist.enumerated().log_prob(torch.tensor(actions)),
        ):
            torch.testing.assert_close(
                got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6
            )


def test_untrained_it_is_near_uniform() -> None:
    torch.manual_seed(0)
    given = inputs(MIXED, [everything_of(MIXED)] * 500)
    dist = given.head()(given.hidden, given.entities, given.legal)
    uniform = uniform_over(dist.legal, MIXED)
    with torch.no_grad():
        below = uniform.entropy() - dist.entropy()
    assert below.min() > -1e-5
    assert below.mean() < 0.05
    assert kl_divergence(dist, uniform).mean() < 0.05


# ---- in a policy


@pytest.fixture
def env() -> Bandit:
    made = Bandit(num_agents=16, empty=0.3)
    made.reset(3)
    return made


def observe(env: Bandit) -> Tensor:
    return torch.as_tensor(env.observations)


def policy_of(env: Bandit, head: Any = "autoregressive", **arguments: Any) -> fp.Policy:
    torch.manual_seed(0)
    return fp.Policy(env, head=head, encoder=BanditEncoder(env.legal_layout), **arguments)


EXACT = functools.partial(AutoregressiveHead, exact_entropy=True)


def test_the_trainer_s_questions_to_an_autoregressive_policy(env: Bandit) -> None:
    policy = policy_of(env)
    assert isinstance(policy.head, AutoregressiveHead)
    with torch.no_grad():
        face, value = policy.forward_eval(observe(env))
        actions, log_probs, entropy = sample_logits(face)
    dist = face.distribution
    assert isinstance(dist, LegalAutoregressive)
    assert value.shape == (16, 1)
    assert dist.legal.to_lists() == env.lists
    assert dist.legal.contains(actions).all()
    assert torch.equal(entropy, dist.path_entropy(actions))
    assert torch.equal(log_probs, dist.log_prob(actions))
    update, _ = policy(observe(env))
    stored = actions.view(16, 1, 3)  # (segments, horizon, slots)
    again, replayed, entropy = sample_logits(update, action=stored)
    assert torch.equal(again, stored)
    assert torch.equal(replayed.flatten(), log_probs)
    fresh = policy.distribution(observe(env))[0]
    assert torch.equal(entropy, fresh.path_entropy(actions))
    assert not torch.allclose(entropy, fresh.entropy())
    assert replayed.requires_grad
    assert entropy.requires_grad


def test_an_estimated_entropy_needs_a_tuple(env: Bandit) -> None:
    face, _ = policy_of(env).forward_eval(observe(env))
    with pytest.raises(RuntimeError, match="estimate from a tuple"):
        face.entropy()
    close(face.distribution.entropy(), face.distribution.enumerated().entropy().double(), 1e-6)
    face.log_prob(face.mode)
    torch.testing.assert_close(face.entropy()[:, 0], face.distribution.path_entropy(face.mode))


def test_exact_entropy_on_request(env: Bandit) -> None:
    face, _ = policy_of(env, EXACT).forward_eval(observe(env))
    _, _, entropy = sample_logits(face)
    assert torch.equal(entropy, face.distribution.entropy())
    assert isinstance(face.distribution, LegalAutoregressive)


@pytest.mark.parametrize("head", ["autoregressive", EXACT])
def test_exploration_is_of_whole_tuples_and_has_an_exact_entropy(env: Bandit, head: Any) -> None:
    policy = policy_of(env, head)
    plain = policy.distribution(observe(env))[0].enumerated()
    for temperature, epsilon in ((2.0, 0.25), (0.5, 0.0), (1.0, 0.1)):
        policy.explore(temperature, epsilon)
        face, _ = policy.forward_eval(observe(env))
        actions, log_probs, entropy = sample_logits(face)
        expected = plain.tempered(temperature).smoothed(epsilon)
        torch.testing.assert_close(log_probs, expected.log_prob(actions))
        torch.testing.assert_close(entropy, expected.entropy())
        assert face.distribution.legal.contains(actions).all()
        twin = policy_of(env, head)
        twin.load_state_dict(policy.state_dict())
        torch.testing.assert_close(twin.distribution(observe(env))[0].log_prob(actions), log_probs)


def test_greedy_plays_the_mode(env: Bandit) -> None:
    policy = policy_of(env)
    enlarged(policy.head)
    mode = policy.distribution(observe(env))[0].mode
    for forward in (fp.Greedy(policy).forward_eval, fp.Greedy(policy)):
        face, _ = forward(observe(env), {})
        assert torch.equal(face.sample(), mode)
        assert not face.log_prob(mode).any()
        assert not face.entropy().any()


def test_heads_by_name_and_by_factory(env: Bandit) -> None:
    assert isinstance(policy_of(env, "flat").head, fp.FlatHead)
    assert isinstance(policy_of(env, fp.FlatHead).head, fp.FlatHead)
    flat = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    assert isinstance(flat, fp.Policy)
    assert isinstance(flat.head, fp.FlatHead)
    assert isinstance(fp.Policy(env, encoder=BanditEncoder(env.legal_layout)).head, fp.FlatHead)
    with pytest.raises(ValueError, match=r"'dense'; take one of \['autoregressive', 'flat'\]"):
        policy_of(env, "dense")
    made = policy_of(env).head
    for wrong in (made, 3, None):
        with pytest.raises(TypeError, match="head must be a name or a factory"):
            policy_of(env, wrong)
    with pytest.raises(TypeError, match=r"made int, a head is an nn\.Module"):
        policy_of(env, lambda spec, hidden_size, entity_sizes, width: width)


def test_a_head_of_ones_own_is_told_what_there_is(env: Bandit) -> None:
    told: list[Any] = []

    class Uniform(nn.Module):
        def forward(self, hidden: Tensor, entities: Any, legal: LegalActions) -> LegalCategorical:
            return LegalCategorical(legal, torch.zeros(len(legal.rows)))

    def factory(*arguments: Any) -> nn.Module:
        told.extend(arguments)
        return Uniform()

    policy = policy_of(env, factory, width=48)
    assert told == [BANDIT_SPEC, 32, {"unit": (4, 8)}, 48]
    face, _ = policy.forward_eval(observe(env))
    _, _, entropy = sample_logits(face)
    counts = torch.tensor([max(len(row), 1) for row in env.lists])
    torch.testing.assert_close(entropy, counts.log().float())


def test_a_head_of_ones_own_may_return_a_legal_autoregressive(env: Bandit) -> None:
    """The protocol asks for no more than the distribution; its entropy is then the exact one."""

    class Uniform(nn.Module):
        def forward(self, hidden: Tensor, entities: Any, legal: LegalActions) -> Any:
            return uniform_over(legal, BANDIT_SPEC)

    face, _ = policy_of(env, lambda *arguments: Uniform()).forward_eval(observe(env))
    actions, _, entropy = sample_logits(face)
    assert face.distribution.legal.contains(actions).all()
    assert torch.equal(entropy, face.distribution.entropy())


def test_recurrent_rollout_and_update_give_the_same_numbers(env: Bandit) -> None:
    torch.manual_seed(0)
    encoder = BanditEncoder(env.legal_layout)
    policy = fp.RecurrentPolicy(env, head="autoregressive", encoder=encoder)
    state: dict[str, Any] = {"lstm_h": torch.zeros(16, 32), "lstm_c": torch.zeros(16, 32)}
    steps, drawn, log_probs = [], [], []
    for _ in range(4):
        env.deal()
        steps.append(observe(env).clone())
        with torch.no_grad():
            face, _ = policy.forward_eval(steps[-1], state)
            action, log_prob, _ = sample_logits(face)
        assert face.distribution.legal.contains(action).all()
        drawn.append(action)
        log_probs.append(log_prob)
    face, _ = policy(torch.stack(steps, 1), {"lstm_h": None, "lstm_c": None})
    _, update, _ = sample_logits(face, action=torch.stack(drawn, 1))
    together = torch.stack(log_probs, 1)
    torch.testing.assert_close(update.view(16, 4), together, rtol=1e-5, atol=1e-6)


def test_an_empty_batch(env: Bandit) -> None:
    face, value = policy_of(env)(observe(env)[:0])
    actions = face.sample()
    assert actions.shape == (0, 3)
    assert value.shape == face.log_prob(actions).shape == face.entropy().shape == (0, 1)


def test_nan_in_the_network_is_an_error_and_no_action(env: Bandit) -> None:
    policy = policy_of(env)
    with torch.no_grad():
        policy.head.state.bias.fill_(NAN)
    face, _ = policy.forward_eval(observe(env))
    with pytest.raises(ValueError, match="in slot 0 is nan; it must be finite"):
        face.sample()


def test_autocast_uses_the_weights_of_now(env: Bandit) -> None:
    """The trainer never leaves autocast, so autocast's own cache would keep the first weights."""
    policy = policy_of(env)
    with torch.autocast("cpu", torch.bfloat16):
        first, _ = policy(observe(env), {})
        actions = first.sample()
        before = first.log_prob(actions)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.3)
        inside = policy(observe(env), {})[0].log_prob(actions)
        torch.clear_autocast_cache()
        cleared = policy(observe(env), {})[0].log_prob(actions)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, cleared)
    assert not torch.equal(inside, before)


# ---- under the trainer


@pytest.fixture
def trainer_of(tmp_path: Path) -> Iterator[Any]:
    """Makes a PuffeRL trainer on the bandit with a policy of env, and stops its thread."""
    made = []

    def new(make: Callable[[Any], nn.Module], empty: float = 0.2, **changes: Any) -> Any:
        torch.manual_seed(0)
        vecenv = pufferlib.vector.make(
            Bandit,
            env_kwargs={"num_agents": 32, "empty": empty},
            backend=pufferlib.vector.Serial,
            num_envs=1,
            seed=1,
        )
        policy = make(vecenv.driver_env)
        made.append(pufferl.PuffeRL(trainer_config(vecenv, tmp_path, **changes), vecenv, policy))
        return made[-1]

    yield new
    for trainer in made:
        trainer.utilization.stop()
    torch.set_autocast_enabled("cpu", False)  # train() enters it and never leaves


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("recurrent", [False, True])
def test_the_ratio_is_one_in_the_first_minibatch(
    trainer_of: Any, recurrent: bool, exact: bool
) -> None:
    kind = fp.RecurrentPolicy if recurrent else fp.Policy
    head = EXACT if exact else "autoregressive"
    trainer = trainer_of(
        lambda env: kind(env, head=head, encoder=BanditEncoder(env.legal_layout)),
        use_rnn=recurrent,
        ent_coef=0.01,
    )
    for _ in range(4):  # the later ones with weights that have moved
        trainer.evaluate()
        trainer.train()
        assert (trainer.ratio - 1).abs().max() < 1e-5
        assert np.isfinite(list(trainer.losses.values() or [0.0])).all()
    assert trainer.vecenv.driver_env.illegal_actions == 0


def test_the_ratio_is_one_with_exploration(trainer_of: Any) -> None:
    def make(env: Any) -> fp.Policy:
        policy = policy_of(env)
        policy.explore(temperature=1.7, epsilon=0.2)
        return policy

    trainer = trainer_of(make)
    for _ in range(2):
        trainer.evaluate()
        trainer.train()
        assert (trainer.ratio - 1).abs().max() < 1e-5


def test_the_stock_lstm_wrapper_leaves_it_near_uniform(trainer_of: Any) -> None:
    """The wrapper sets every parameter anew that is named a weight, with a large gain."""

    def make(env: Any) -> nn.Module:
        policy = policy_of(env)
        size = policy.hidden_size
        return pufferlib.models.LSTMWrapper(env, policy, size, size)

    trainer = trainer_of(make, use_rnn=True)
    env = trainer.vecenv.driver_env
    with torch.no_grad():
        wrapped = trainer.uncompiled_policy
        face, _ = wrapped.forward_eval(observe(env), {"lstm_h": None, "lstm_c": None})
        dist = face.distribution
        actions = dist.sample()
        uniform = uniform_over(dist.legal, BANDIT_SPEC)
        assert (kl_divergence(dist, uniform) < 0.1).all()
        assert (dist.log_prob(actions) - uniform.log_prob(actions)).abs().max() < 0.5
    for _ in range(2):
        trainer.evaluate()
        trainer.train()
        assert (trainer.ratio - 1).abs().max() < 1e-5
    assert env.illegal_actions == 0


def test_the_shipped_optimizer(trainer_of: Any) -> None:
    """Muon divides by the sides of a matrix, and wants a gradient of each parameter."""
    trainer = trainer_of(policy_of, optimizer="muon")
    before = [parameter.detach().clone() for parameter in trainer.uncompiled_policy.parameters()]
    for _ in range(2):
        trainer.evaluate()
        trainer.train()
    for old, new in zip(before, trainer.uncompiled_policy.parameters(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)


def test_a_head_that_returns_something_else_is_refused(env: Bandit) -> None:
    class Scores(nn.Module):
        def __init__(self, *arguments: Any) -> None:
            super().__init__()

        def forward(self, hidden: Tensor, entities: Any, legal: LegalActions) -> Any:
            return torch.distributions.Categorical(logits=torch.zeros(len(legal), 5))

    with pytest.raises(
        TypeError, match=r"Scores must return a distribution of batch_shape \(16,\)"
    ):
        policy_of(env, Scores).forward_eval(observe(env))


def test_a_head_of_other_arguments_is_refused(env: Bandit) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()

    with pytest.raises(
        TypeError, match=r"is called with \(spec, hidden_size, entity_sizes, width\)"
    ):
        policy_of(env, Bare)


def test_the_flat_policy_takes_no_other_head(env: Bandit) -> None:
    with pytest.raises(TypeError, match="FlatPolicy has the flat head"):
        fp.FlatPolicy(env, head="autoregressive")
