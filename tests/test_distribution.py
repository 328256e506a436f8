"""LegalCategorical against a brute force over distinct tuples, and against dense float64 autograd.

The brute force knows only Python floats: a row is a dictionary from each distinct tuple to its
log-probability. The dense reference is padded float64 torch, for gradients. Scores are small
multiples of 1/16, or extreme: the first are exact in every float type, so that the reference starts
from the same numbers, and two masses are either equal or clearly apart.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Distribution, kl_divergence

from tcg_flatpolicy import LegalActions, LegalCategorical

Action = tuple[int, ...]
Row = dict[Action, float]
Step = tuple[str, float | list[float]]

INF, NAN = math.inf, math.nan
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
thorough = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def tolerance(dtype: torch.dtype) -> float:
    """Of a log-probability, relative above 1: it is a difference of a score and a logarithm, each
    rounded once; some ten units in the last place are left for tempering and smoothing."""
    return 1e-12 if dtype == torch.float64 else 1e-5


# Cases


@dataclass(frozen=True)
class Case:
    """Legal lists and a score for each listing, exact in the dtype."""

    lists: list[list[Action]]
    scores: list[list[float]]
    noop: Action
    dtype: torch.dtype

    @property
    def legal(self) -> LegalActions:
        return LegalActions.from_lists(self.lists, slots=len(self.noop) - 1, noop=self.noop)

    @property
    def tensor(self) -> Tensor:
        return torch.tensor([s for row in self.scores for s in row], dtype=self.dtype)

    @property
    def dist(self) -> LegalCategorical:
        return LegalCategorical(self.legal, self.tensor)

    @property
    def repeats(self) -> bool:
        return any(len(set(row)) < len(row) for row in self.lists)


def rounded(scores: list[float], dtype: torch.dtype) -> list[float]:
    """As the dtype holds them, an overflow cut to its largest number."""
    limit = torch.finfo(dtype).max
    cut = [s if s == -INF else min(max(s, -limit), limit) for s in scores]
    return torch.tensor(cut, dtype=torch.float64).to(dtype).tolist()


grid = st.integers(-128, 128).map(lambda i: i / 16)
tied = st.sampled_from([-2.0, 0.0, 3.0])
extreme = st.sampled_from([-1e30, -1e12, -1e4, -1.0, 0.0, 1.0, 1e4, 1e12, 1e30])
nothing = st.just(-INF)
SCORES = (grid, tied, extreme, grid | nothing, extreme | nothing, nothing)
SMALL_VALUES = (0, 1, 2, 3)
HUGE_VALUES = (0, 1, 2**31, 2**40, 2**62)  # their products do not fit into one int64


def scores_of(
    size: int, kinds: Sequence[st.SearchStrategy[float]] = SCORES
) -> st.SearchStrategy[list[float]]:
    """Of one row, all of one kind."""
    return st.sampled_from(kinds).flatmap(lambda kind: st.lists(kind, min_size=size, max_size=size))


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = FLOATS,
    scores: Sequence[st.SearchStrategy[float]] = SCORES,
    repeats: bool = True,
    values: Sequence[Sequence[int]] = (SMALL_VALUES, SMALL_VALUES, HUGE_VALUES),
) -> Case:
    width = draw(st.sampled_from([1, 2, 3, 4]))
    range_of_values = draw(st.sampled_from(values))
    action = st.tuples(*[st.sampled_from(range_of_values)] * width)
    dtype = draw(st.sampled_from(dtypes))
    lists, drawn = [], []
    for _ in range(draw(st.sampled_from([0, 1, 2, 3, 5]))):
        size = draw(st.sampled_from([0, 1, 2, 3, 6]))
        if repeats and draw(st.booleans()):
            one = st.sampled_from(draw(st.lists(action, min_size=2, max_size=3)))
            row = draw(st.lists(one, min_size=size, max_size=size))
        else:
            size = min(size, len(range_of_values) ** width)
            row = draw(st.lists(action, min_size=size, max_size=size, unique=True))
        lists.append(row)
        drawn.append(draw(scores_of(len(row), scores)))
    return Case(lists, [rounded(row, dtype) for row in drawn], draw(action), dtype)


@st.composite
def steps(draw: st.DrawFn, rows: int) -> list[Step]:
    """Up to three of tempered and smoothed, in the order in which they are applied."""
    choices = {"tempered": [0.5, 0.8, 1.0, 1.5, 5.0], "smoothed": [0.0, 1e-6, 0.05, 0.5, 1.0]}
    drawn: list[Step] = []
    for _ in range(draw(st.sampled_from([0, 1, 2, 3]))):
        name = draw(st.sampled_from(sorted(choices)))
        value = st.sampled_from(choices[name])
        per_row = st.lists(value, min_size=rows, max_size=rows)
        drawn.append((name, draw(value if draw(st.booleans()) else per_row)))
    return drawn


def apply(dist: LegalCategorical, steps: list[Step]) -> LegalCategorical:
    for name, value in steps:
        argument = torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
        dist = getattr(dist, name)(argument)
    return dist


def of_row(value: float | list[float], row: int) -> float:
    return value[row] if isinstance(value, list) else value


# The brute force


def logsumexp(values: list[float]) -> float:
    top = max(values)
    return top if top == -INF else top + math.log(sum(math.exp(v - top) for v in values))


def brute_row(actions: list[Action], scores: list[float], noop: Action) -> Row:
    if not actions:
        return {noop: 0.0}
    top = max(scores)
    shifted = [0.0 if top == -INF else s - top for s in scores]
    total = logsumexp(shifted)
    masses: dict[Action, list[float]] = {}
    for action, score in zip(actions, shifted, strict=True):
        masses.setdefault(action, []).append(score)
    return {action: logsumexp(mass) - total for action, mass in masses.items()}


def brute_step(row: Row, name: str, value: float) -> Row:
    if name == "tempered":
        powers = {a: log_p / value for a, log_p in row.items()}
        total = logsumexp(list(powers.values()))
        return {a: power - total for a, power in powers.items()}
    if value == 0:
        return row
    return {a: math.log((1 - value) * math.exp(p) + value / len(row)) for a, p in row.items()}


def brute(case: Case, steps: Sequence[Step] = ()) -> list[Row]:
    rows = [brute_row(*both, case.noop) for both in zip(case.lists, case.scores, strict=True)]
    for name, value in steps:
        rows = [brute_step(row, name, of_row(value, b)) for b, row in enumerate(rows)]
    return rows


def brute_entropy(row: Row) -> float:
    return -sum(math.exp(p) * p for p in row.values() if p > -INF)


def brute_kl(p: Row, q: Row) -> float:
    if any(p[a] > -INF and q[a] == -INF for a in p):
        return INF
    return sum(math.exp(p[a]) * (p[a] - q[a]) for a in p if p[a] > -INF)


def close(got: Tensor, expected: list[float] | Tensor, tol: float) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.detach().double(), expected, rtol=tol, atol=tol)


def actions_of(rows: list[Row], width: int) -> Tensor:
    """(S, B, H): the s-th tuple of each row, its first again where it has fewer."""
    most = max((len(row) for row in rows), default=0)
    table = [[list(row)[s if s < len(row) else 0] for row in rows] for s in range(most)]
    return torch.tensor(table, dtype=torch.int64).view(most, len(rows), width)


def check(dist: LegalCategorical, rows: list[Row], tol: float) -> None:
    """Everything that a distribution answers, against the brute force."""
    actions = actions_of(rows, dist.event_shape[0])
    log_prob = dist.log_prob(actions)
    table = [
        [list(row.values())[s if s < len(row) else 0] for row in rows] for s in range(len(actions))
    ]
    close(log_prob, torch.tensor(table, dtype=torch.float64).view(log_prob.shape), tol)
    close(dist.entropy(), [brute_entropy(row) for row in rows], tol)
    probs = dist.probs.double()
    modes = dist.mode.tolist()
    listed: list[Row] = [dict.fromkeys(row, 0.0) for row in rows]
    for n, (row, action) in enumerate(
        zip(dist.legal.rows.tolist(), map(tuple, dist.legal.actions.tolist()), strict=True)
    ):
        listed[row][action] += probs[n].item()
    for b, row in enumerate(rows):
        distinct = log_prob[: len(row), b].double()
        close(distinct.exp().sum(), torch.tensor(1.0), tol)
        if dist.legal.counts[b]:
            close(probs[dist.legal.rows == b].sum(), torch.tensor(1.0), tol)
            close(
                torch.tensor(list(listed[b].values()), dtype=torch.float64),
                [math.exp(p) for p in row.values()],
                tol,
            )
        mode = tuple(modes[b])
        assert row[mode] >= max(row.values()) - tol
        once = dist.legal.counts[b] == len(row)
        assert not (once and any(a < mode and row[a] == row[mode] for a in row)), "not the smallest"


# Values


@thorough
@given(cases())
def test_answers_equal_a_brute_force(case: Case) -> None:
    check(case.dist, brute(case), tolerance(case.dtype))


@thorough
@given(cases())
def test_probs_and_logits_are_of_each_listing(case: Case) -> None:
    expected = []
    for scores in filter(None, case.scores):
        top = max(scores)
        shifted = [0.0 if top == -INF else s - top for s in scores]
        expected += [s - logsumexp(shifted) for s in shifted]
    dist, tol = case.dist, tolerance(case.dtype)
    close(dist.logits, expected, tol)
    close(dist.probs, [math.exp(p) for p in expected], tol)


@thorough
@given(st.data())
def test_tempered_and_smoothed_compose_in_the_order_written(data: st.DataObject) -> None:
    case = data.draw(cases())
    todo = data.draw(steps(len(case.lists)))
    check(apply(case.dist, todo), brute(case, todo), 5 * tolerance(case.dtype))


def test_composition_in_either_order_is_another_distribution() -> None:
    """The brute force itself tells the two orders apart, so the test above can."""
    case = Case([[(0,), (1,)]], [[0.0, 2.0]], (0,), torch.float64)
    todo: list[Step] = [("tempered", 2.0), ("smoothed", 0.5)]
    one, other = brute(case, todo)[0], brute(case, todo[::-1])[0]
    assert abs(one[(0,)] - other[(0,)]) > 0.04
    check(case.dist.tempered(2.0).smoothed(0.5), [one], 1e-12)
    check(case.dist.smoothed(0.5).tempered(2.0), [other], 1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_lists_of_thousands(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    tuples = [(i // 100, i % 100, rng.randrange(3)) for i in range(3000)]
    lists = [tuples[:1], rng.sample(tuples, 3000), [], rng.choices(tuples, k=2000), tuples[:2]]
    scores = [rounded([rng.gauss(0, 3) for _ in row], dtype) for row in lists]
    scores[1][7] = scores[3][7] = -INF
    case = Case(lists, scores, (9, 9, 9), dtype)
    check(case.dist, brute(case), tolerance(dtype))
    todo: list[Step] = [("smoothed", 0.1), ("tempered", [1.0, 2.0, 3.0, 0.5, 1.0])]
    check(apply(case.dist, todo), brute(case, todo), 5 * tolerance(dtype))
    torch.manual_seed(0)
    drawn = case.dist.sample((20,))
    assert case.legal.contains(drawn).all()
    assert case.dist.log_prob(drawn).isfinite().all()


@thorough
@given(st.data())
def test_kl_equals_a_brute_force(data: st.DataObject) -> None:
    case = data.draw(cases())
    scores = [rounded(data.draw(scores_of(len(row))), case.dtype) for row in case.lists]
    second = Case(case.lists, scores, case.noop, case.dtype)
    todo = data.draw(steps(len(case.lists)))
    expected = [brute_kl(p, q) for p, q in zip(brute(case), brute(second, todo), strict=True)]
    close(kl_divergence(case.dist, apply(second.dist, todo)), expected, 5 * tolerance(case.dtype))


@thorough
@given(cases(repeats=False))
def test_kl_of_a_distribution_to_itself_is_zero(case: Case) -> None:
    close(kl_divergence(case.dist, case.dist), [0.0] * len(case.lists), tolerance(case.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 2, 30])
def test_equals_torchs_categorical_on_dense_rows(columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(columns)
    scores, others = torch.randn(2, 6 * columns, generator=generator, dtype=dtype) * 3
    ids = torch.stack([torch.randperm(columns, generator=generator) for _ in range(6)])
    legal = LegalActions(ids.view(-1, 1), torch.full((6,), columns))
    p, q = LegalCategorical(legal, scores), LegalCategorical(legal, others)
    dense_p, dense_q = (Categorical(logits=s.view(6, columns)) for s in (scores, others))
    tol = tolerance(dtype)
    close(p.probs.view(6, -1), dense_p.probs, tol)
    close(p.logits.view(6, -1), dense_p.logits, tol)
    close(p.entropy(), dense_p.entropy(), tol)
    close(kl_divergence(p, q), kl_divergence(dense_p, dense_q), tol)
    for column in range(columns):
        expected = dense_p.log_prob(torch.full((6,), column))
        close(p.log_prob(ids[:, column : column + 1]), expected, tol)
    best = dense_p.mode.unsqueeze(1)
    assert torch.equal(p.mode, ids.gather(1, best))


# What changes nothing


@thorough
@given(st.data())
def test_order_and_padding_change_nothing(data: st.DataObject) -> None:
    case = data.draw(cases())
    todo = data.draw(steps(len(case.lists)))
    lists, scores = [], []
    for row, of in zip(case.lists, case.scores, strict=True):
        order = data.draw(st.permutations(range(len(row))))
        lists.append([row[i] for i in order])
        scores.append([of[i] for i in order])
    width, most = len(case.noop), max(map(len, lists), default=0) + data.draw(st.integers(0, 2))
    junk = data.draw(st.sampled_from([0, -7, 2**62]))
    padded = torch.full((len(lists), most, width), junk)
    for b, row in enumerate(lists):
        padded[b, : len(row)] = torch.tensor(row, dtype=torch.int64).view(-1, width)
    counts = torch.tensor([len(row) for row in lists], dtype=torch.int64)
    legal = LegalActions.from_padded(padded, counts, torch.tensor(case.noop))
    flat = torch.tensor([s for row in scores for s in row], dtype=case.dtype)
    one, other = apply(case.dist, todo), apply(LegalCategorical(legal, flat), todo)
    tol = 5 * tolerance(case.dtype)
    actions = actions_of(brute(case), width)
    close(other.log_prob(actions), one.log_prob(actions).double(), tol)
    close(other.entropy(), one.entropy().double(), tol)
    close(kl_divergence(one, other), [0.0] * len(lists), tol)
    if not case.repeats:  # a sum of listings in another order may differ in its last bit
        assert torch.equal(other.mode, one.mode)


@thorough
@given(cases())
def test_the_other_rows_change_nothing(case: Case) -> None:
    whole = case.dist
    actions = actions_of(brute(case), len(case.noop))
    for b in range(len(case.lists)):
        alone = Case(case.lists[b : b + 1], case.scores[b : b + 1], case.noop, case.dtype).dist
        tol = tolerance(case.dtype)
        close(
            whole.log_prob(actions)[:, b], alone.log_prob(actions[:, b : b + 1])[:, 0].double(), tol
        )
        close(whole.entropy()[b], alone.entropy()[0].double(), tol)
        assert torch.equal(whole.mode[b], alone.mode[0])


@thorough
@given(st.data())
def test_duplicates_equal_their_merged_mass(data: st.DataObject) -> None:
    """In live rows: the uniform of a row of only -inf is over listings, so there repeats count."""
    case = data.draw(cases(scores=(grid, tied, extreme, grid | nothing), dtypes=[torch.float64]))
    lists, scores = [], []
    for actions, of, row in zip(case.lists, case.scores, brute(case), strict=True):
        dead = not actions or max(of) == -INF
        lists.append(list(actions if dead else row))
        scores.append(list(of if dead else row.values()))
    merged = Case(lists, scores, case.noop, case.dtype)
    todo = data.draw(steps(len(case.lists)))
    p, q = apply(case.dist, todo), apply(merged.dist, todo)
    actions = actions_of(brute(case), len(case.noop))
    close(p.log_prob(actions), q.log_prob(actions), 1e-10)
    close(p.entropy(), q.entropy(), 1e-10)
    close(kl_divergence(p, q), [0.0] * len(lists), 1e-10)
    close(kl_divergence(q, p), [0.0] * len(lists), 1e-10)


@pytest.mark.parametrize("level", [0.0, 1e4, -1e4, 1e30, -1e30])
def test_listing_three_times_triples_the_mass(level: float) -> None:
    """Also where the scores are so large that adding the logarithm of 3 to them changes nothing."""
    legal = LegalActions.from_lists([[(1, 0), (0, 1), (1, 0), (1, 0)]])
    dist = LegalCategorical(legal, torch.full((4,), level))
    close(dist.log_prob(torch.tensor([[1, 0]])), [math.log(0.75)], 1e-6)
    close(dist.entropy(), [-0.75 * math.log(0.75) - 0.25 * math.log(0.25)], 1e-6)
    close(dist.smoothed(1.0).log_prob(torch.tensor([[1, 0]])), [math.log(0.5)], 1e-6)
    close(dist.tempered(0.5).log_prob(torch.tensor([[1, 0]])), [math.log(0.9)], 1e-6)
    assert dist.mode.tolist() == [[1, 0]]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
@pytest.mark.parametrize("huge", [0, 2**60])
def test_mode_of_equals_is_the_smallest_tuple(order: list[int], huge: int) -> None:
    actions = [(0, 2, 9 + huge), (0, 3, 0), (0, 2, 10 + huge), (0, 0, 0)]
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0])[order]
    legal = LegalActions.from_lists([[(5, 5, huge)], [actions[i] for i in order]])
    dist = LegalCategorical(legal, torch.cat([torch.zeros(1), scores]))
    assert dist.mode[1].tolist() == [0, 2, 9 + huge]
    assert dist.smoothed(1.0).mode[1].tolist() == [0, 0, 0]


# Empty rows, rows of only -inf, unlisted actions


@thorough
@given(cases())
def test_empty_rows_play_the_noop(case: Case) -> None:
    dist = case.dist
    empty = dist.legal.counts == 0
    noop = torch.tensor(case.noop)
    for drawn in (dist.mode, dist.sample(), *dist.sample((2,))):
        assert (drawn[empty] == noop).all()
    assert (dist.log_prob(noop.expand(len(case.lists), -1))[empty] == 0).all()
    assert (dist.log_prob((noop + 1).expand(len(case.lists), -1))[empty] == -INF).all()
    assert (dist.entropy()[empty] == 0).all()


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_batches_without_a_legal_tuple(rows: int, dtype: torch.dtype) -> None:
    legal = LegalActions.from_lists([[]] * rows, slots=2, noop=(4, 0, 7))
    scores = torch.zeros(0, dtype=dtype, requires_grad=True)
    plain = LegalCategorical(legal, scores)
    noop = torch.tensor([4, 0, 7]).expand(rows, 3)
    for dist in (plain, plain.tempered(2.0), plain.smoothed(0.1), plain.tempered(torch.ones(rows))):
        assert torch.equal(dist.sample(), noop)
        assert torch.equal(dist.sample((2, 5)), noop.expand(2, 5, rows, 3))
        assert torch.equal(dist.mode, noop)
        assert torch.equal(dist.log_prob(noop), torch.zeros(rows, dtype=dist.logits.dtype))
        assert dist.log_prob(noop.expand(3, rows, 3)).shape == (3, rows)
        assert torch.equal(dist.entropy(), torch.zeros(rows, dtype=dist.logits.dtype))
        assert torch.equal(kl_divergence(dist, plain), dist.entropy())
        actions, drawn = dist.sample_without_replacement(2)
        assert torch.equal(actions, noop.unsqueeze(1).expand(rows, 2, 3))
        assert drawn.shape == (rows, 2)
        assert not drawn.any()
        # In the graph all the same: DistributedDataParallel waits for every parameter's gradient.
        for value in (dist.log_prob(noop), dist.entropy(), kl_divergence(dist, plain)):
            (got,) = torch.autograd.grad(value.sum(), scores, retain_graph=True)
            assert got.shape == (0,)


def test_a_row_of_only_minus_infinity_is_uniform_over_its_listings() -> None:
    legal = LegalActions.from_lists([[(0,), (1,)], [(2,), (3,), (2,), (4,)]])
    dist = LegalCategorical(legal, torch.tensor([0.0, -INF, -INF, -INF, -INF, -INF]))
    assert dist.probs.tolist() == [1, 0, 0.25, 0.25, 0.25, 0.25]
    close(dist.log_prob(torch.tensor([[0], [2]])).exp(), [1, 0.5], 1e-6)
    assert dist.mode.tolist() == [[0], [2]]


@thorough
@given(st.data())
def test_what_is_not_listed_has_no_mass(data: st.DataObject) -> None:
    case = data.draw(cases())
    value = st.sampled_from([-(2**40), -1, 0, 1, 2, 3, 4, 5, 12, 2**31, 2**40, 2**62])
    action = st.tuples(*[value] * len(case.noop))
    some = data.draw(st.lists(action, min_size=len(case.lists), max_size=len(case.lists)))
    actions = torch.tensor(some, dtype=torch.int64).view(-1, len(case.noop))
    got = case.dist.log_prob(actions)
    contains = case.legal.contains(actions)
    for b, (row, action_b) in enumerate(zip(brute(case), some, strict=True)):
        assert contains[b] == (action_b in row)
        close(got[b : b + 1], [row.get(action_b, -INF)], tolerance(case.dtype))


def test_an_action_with_the_same_mixed_radix_id_is_not_listed() -> None:
    """Sizes here are 2 and 3: 1 * 3 + 0 is 0 * 3 + 3, and 0 * 3 + 2 is 1 * 3 - 1."""
    dist = LegalCategorical(LegalActions.from_lists([[(1, 0), (0, 2)]]), torch.zeros(2))
    assert dist.log_prob(torch.tensor([[[0, 3]], [[1, -1]]])).tolist() == [[-INF], [-INF]]


WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", [*WHOLE, *UNSIGNED, *FLOATS])
@pytest.mark.parametrize("validate_args", [None, False, True])
def test_actions_of_any_whole_dtype(dtype: torch.dtype, validate_args: bool | None) -> None:
    legal = LegalActions.from_lists([[(0, 100), (3, 7)], [], [(3, 7), (3, 7)]], noop=(2, 1))
    dist = LegalCategorical(legal, torch.tensor([1.0, 0.0, 0.0, 2.0]), validate_args)
    actions = torch.tensor([[[0, 100], [2, 1], [3, 7]], [[3, 7], [0, 0], [3, 8]]])
    expected = [[-math.log1p(math.exp(-1)), 0, 0], [-math.log1p(math.exp(1)), -INF, -INF]]
    close(dist.log_prob(actions.to(dtype)), torch.tensor(expected), 1e-6)
    assert (dist.log_prob(actions.to(dtype)) == dist.log_prob(actions)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [0.5, -0.25, NAN, INF, -INF])
def test_values_that_are_not_whole(value: float, dtype: torch.dtype) -> None:
    legal = LegalActions.from_lists([[(0, 0), (1, 1)], []])
    actions = torch.tensor([[1, 1], [value, 0]], dtype=dtype)
    for tried in (actions, actions.flip(0)):
        with pytest.raises(ValueError, match="within the support"):
            LegalCategorical(legal, torch.zeros(2), validate_args=True).log_prob(tried)
        loose = LegalCategorical(legal, torch.zeros(2), validate_args=False)
        bad = (tried != tried.floor()).any(1) | ~tried.isfinite().all(1)
        assert (loose.log_prob(tried)[bad] == -INF).all()
    assert loose.log_prob(torch.tensor([[1.0, 1], [0, 0]])).isfinite().all()


def test_a_float_beyond_every_integer_is_not_listed() -> None:
    dist = LegalCategorical(LegalActions.from_lists([[(0,), (1,)]]), torch.zeros(2))
    for value in (1e30, -1e30, 2.0**63, -(2.0**63)):
        assert dist.log_prob(torch.tensor([[value]])).tolist() == [-INF]


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (1, 2), (2,), (4, 3, 2), (2, 2, 1)])
@pytest.mark.parametrize("validate_args", [True, False])
def test_actions_of_a_wrong_shape(shape: tuple[int, ...], validate_args: bool) -> None:
    legal = LegalActions.from_lists([[(0, 0)], [(1, 0)]])
    dist = LegalCategorical(legal, torch.zeros(2), validate_args=validate_args)
    with pytest.raises(ValueError, match=r"actions must be|shape"):
        dist.log_prob(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_actions_that_are_no_numbers(dtype: torch.dtype) -> None:
    dist = LegalCategorical(LegalActions.from_lists([[(0,)]]), torch.zeros(1), validate_args=False)
    with pytest.raises(TypeError, match="whole numbers"):
        dist.log_prob(torch.zeros(1, 1, dtype=dtype))


# Samples


@thorough
@given(st.data(), st.integers(0, 2**32))
def test_every_sample_is_legal(data: st.DataObject, seed: int) -> None:
    case = data.draw(cases())
    dist = apply(case.dist, data.draw(steps(len(case.lists))))
    torch.manual_seed(seed)
    drawn = dist.sample((8,))
    assert drawn.dtype == torch.int64
    assert case.legal.contains(drawn).all()
    assert dist.log_prob(drawn).isfinite().all()
    for sample in drawn.tolist():
        assert all(tuple(a) in row for a, row in zip(sample, brute(case), strict=True))
    assert case.legal.contains(dist.mode).all()
    assert dist.log_prob(dist.mode).isfinite().all()


@thorough
@given(st.data(), st.integers(1, 9))
def test_without_replacement_draws_distinct_tuples_of_positive_mass(
    data: st.DataObject, k: int
) -> None:
    case = data.draw(cases())
    todo = data.draw(steps(len(case.lists)))
    dist = apply(case.dist, todo)
    torch.manual_seed(k)
    actions, drawn = dist.sample_without_replacement(k)
    assert actions.shape == (len(case.lists), k, len(case.noop))
    assert actions.dtype == torch.int64
    assert drawn.shape == (len(case.lists), k)
    assert drawn.dtype == torch.bool
    for b, row in enumerate(brute(case, todo)):
        possible = {a for a, p in row.items() if p > -INF} if case.lists[b] else set()
        n = int(drawn[b].sum())
        taken = [tuple(a) for a in actions[b, :n].tolist()]
        assert drawn[b, :n].all(), "the drawn ones come first"
        assert n == min(k, len(possible))
        assert len(set(taken)) == n
        assert set(taken) <= possible
        assert (actions[b, n:] == torch.tensor(case.noop)).all()


@pytest.mark.parametrize("k", [0, -1])
def test_without_replacement_needs_at_least_one(k: int) -> None:
    dist = LegalCategorical(LegalActions.from_lists([[(0,)]]), torch.zeros(1))
    with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
        dist.sample_without_replacement(k)


def test_the_largest_scores_of_a_dtype_are_not_infinite() -> None:
    legal = LegalActions.from_lists([[(0,), (1,), (2,)], [(3,), (4,)], [(5,), (6,)]])
    for dtype in FLOATS:
        big = torch.finfo(dtype).max
        dist = LegalCategorical(
            legal, torch.tensor([big, -big, -INF, big, big, -big, -big], dtype=dtype)
        )
        drawn = dist.sample((50,))
        assert (drawn[:, 0] == 0).all()
        assert len(drawn[:, 1].unique()) == len(drawn[:, 2].unique()) == 2
        close(dist.log_prob(torch.tensor([[0], [3], [5]])).exp(), [1, 0.5, 0.5], 1e-6)


# Gradients


def dense_logsumexp(values: Tensor) -> Tensor:
    """Over the last axis. The gradient of torch's own, exp(x - result), is not a softmax near 1e30,
    where the result rounds to the largest value."""
    top = values.detach().amax(-1, keepdim=True)
    return (values - top).exp().sum(-1).log() + top.squeeze(-1)


def dense_log_probs(case: Case, scores: Tensor, steps: Sequence[Step] = ()) -> tuple[Tensor, ...]:
    """Padded float64: (B, D) log-probabilities of the distinct tuples, 0 where there is no mass;
    and which have mass, and which are listed."""
    rows = brute(case)
    most = max(map(len, rows), default=1)
    repeats = max((sum(a == b for b in row) for row in case.lists for a in row), default=1)
    at = torch.full((len(rows), most, repeats), len(scores))
    n = 0
    for b, row in enumerate(case.lists):
        seen = dict.fromkeys(row, 0)
        for action in row:
            at[b, list(seen).index(action), seen[action]] = n
            seen[action] += 1
            n += 1
    padded = torch.cat([scores.double(), torch.tensor([-INF], dtype=torch.float64)])[at]
    listed = (at < len(scores)).any(2)
    dead = (padded == -INF).all(2).all(1)
    padded = torch.where(dead[:, None, None], torch.where(at < len(scores), 0.0, -INF), padded)
    mass = (padded > -INF).any(2)
    # Near 1e30 a logarithm of 2 would be lost: shifted by a constant, which no gradient feels.
    top = padded.detach().flatten(1).amax(1)
    top = torch.where(top > -INF, top, 0.0)
    # And within a tuple by its own best listing, next to which 1e30 would swallow the others.
    best = padded.detach().amax(2)
    best = torch.where(best > -INF, best, 0.0)
    within = torch.where(mass.unsqueeze(2), padded - best.unsqueeze(2), 0.0)
    padded = padded - top[:, None, None]
    alone = torch.where(mass.any(1)[:, None, None], padded, 0.0)  # an empty row: no NaN gradient
    per_row = dense_logsumexp(alone.flatten(1)).unsqueeze(1)
    per_tuple = dense_logsumexp(within) + (best - top.unsqueeze(1))
    log_p = torch.where(mass, per_tuple - per_row, 0.0)
    for name, value in steps:
        of = torch.as_tensor(value, dtype=torch.float64).expand(len(rows)).unsqueeze(1)
        if name == "tempered":
            powers = torch.where(mass, log_p / of, -INF)
            alone = torch.where(mass.any(1, keepdim=True), powers, 0.0)
            log_p = torch.where(mass, log_p / of - dense_logsumexp(alone).unsqueeze(1), 0.0)
        else:
            uniform = of / listed.sum(1, keepdim=True).clamp(min=1)
            p = (1 - of) * torch.where(mass, log_p.exp(), 0.0) + uniform
            some = listed & (of > 0)
            kept = torch.where((of < 1) & (of > 0) & mass, p, uniform.clamp(min=1e-9))
            log_p = torch.where(some, kept.log(), log_p)
            mass = mass | some
    return log_p, mass, listed


def dense_entropy(log_p: Tensor, mass: Tensor) -> Tensor:
    return -torch.where(mass, log_p.exp() * log_p, 0.0).sum(1)


def gradient(value: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
    (got,) = torch.autograd.grad(value, scores, weights.to(value.dtype), retain_graph=True)
    return got.double()


def same_gradient(
    got: Tensor, expected: Tensor, legal: LegalActions, tol: float, size: Tensor | None = None
) -> None:
    """To the tolerance, relative to the largest of the row where that is above 1; or to the size
    (B,) of the terms of which the gradient is a difference."""
    assert got.isfinite().all()
    scale = torch.ones(len(legal), dtype=torch.float64)
    if size is not None:
        scale = scale.maximum(size.detach())
    scale = scale.scatter_reduce(0, legal.rows, expected.abs(), "amax")[legal.rows]
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=tol)


@thorough
@given(st.data(), st.integers(0, 1000))
def test_gradients_equal_a_dense_reference(data: st.DataObject, seed: int) -> None:
    """Of entropy, log-prob (of stored actions that are not listed too) and KL, after any steps.

    In float32, 1e30 swallows the difference of two listings of one tuple: repeats in float64 only.
    """
    single = cases(dtypes=[torch.float32], repeats=False)
    case = data.draw(cases(dtypes=[torch.float64]) | single)
    todo = data.draw(steps(len(case.lists)))
    rng = torch.Generator().manual_seed(seed)
    b, width, legal = len(case.lists), len(case.noop), case.legal
    weights = torch.randn(b, generator=rng, dtype=torch.float64)
    tol = 10 * tolerance(case.dtype)
    scores = case.tensor.requires_grad_()
    exact = case.tensor.double().requires_grad_()
    dist = apply(LegalCategorical(legal, scores), todo)
    log_p, mass, _ = dense_log_probs(case, exact, todo)

    got = gradient(dist.entropy(), scores, weights)
    same_gradient(got, gradient(dense_entropy(log_p, mass), exact, weights), legal, tol)

    # A listed tuple where one has mass, and one that is not listed in every other row.
    rows = brute(case, todo)
    unlisted = torch.arange(b) % 2 == 1
    column = torch.tensor(
        [
            data.draw(st.sampled_from([i for i, p in enumerate(r.values()) if p > -INF]))
            for r in rows
        ],
        dtype=torch.int64,
    )
    chosen = torch.tensor(
        [list(r)[i] for r, i in zip(rows, column.tolist(), strict=True)], dtype=torch.int64
    ).view(b, width)
    chosen[unlisted] = -1
    value = dist.log_prob(chosen)
    assert (value[unlisted] == -INF).all()
    assert value[~unlisted].isfinite().all()
    reference = log_p.gather(1, column.unsqueeze(1)).squeeze(1).masked_fill(unlisted, -INF)
    got = gradient(value, scores, weights)
    same_gradient(got, gradient(reference, exact, weights), legal, tol)

    # KL in both directions, against moderate scores: where it is infinite there is no gradient.
    other = torch.randn(len(scores), generator=rng, dtype=torch.float64).to(case.dtype)
    if len(other):
        other[torch.randint(len(other), (1,), generator=rng)] = -INF
    second = Case(case.lists, split(other, legal), case.noop, case.dtype)
    third = other.double().requires_grad_()
    other.requires_grad_()
    log_q, mass_q, _ = dense_log_probs(second, third)
    q = LegalCategorical(legal, other)
    for first, log_a, mass_a, last, log_b, mass_b in (
        (dist, log_p, mass, q, log_q, mass_q),
        (q, log_q, mass_q, dist, log_p, mass),
    ):
        terms = torch.where(mass_a & mass_b, log_a.exp() * (log_a - log_b), 0.0)
        expected = terms.masked_fill(mass_a & ~mass_b, INF).sum(1)
        got_kl = kl_divergence(first, last)
        close(got_kl, expected.detach(), tol)
        for mine, dense in ((scores, exact), (other, third)):
            want = gradient(expected, dense, weights)
            size = terms.abs().sum(1)
            same_gradient(gradient(got_kl, mine, weights), want, legal, tol, size)


def split(values: Tensor, legal: LegalActions) -> list[list[float]]:
    return [part.tolist() for part in values.split(legal.counts.tolist())] if len(legal) else []


def quantities(dist: LegalCategorical, actions: Tensor) -> dict[str, Tensor]:
    uniform = LegalCategorical(dist.legal, torch.zeros_like(dist.logits))
    return {
        "log_prob": dist.log_prob(actions),
        "entropy": dist.entropy(),
        "kl from": kl_divergence(dist, uniform),
        "kl to": kl_divergence(uniform, dist),
        "tempered": dist.tempered(0.5).entropy(),
        "smoothed": dist.smoothed(0.1).log_prob(actions),
    }


def test_gradcheck() -> None:
    """In float64, where all is smooth: an empty row, single, repeated and far apart listings."""
    lists = [[(0, 1), (1, 0), (0, 1)], [], [(2, 2)], [(0, 0), (1, 1), (3, 0), (1, 1), (0, 0)]]
    legal = LegalActions.from_lists(lists)
    scores = torch.tensor([0.3, -1.0, 2.0, 5.0, 1.0, 0.0, -2.0, 0.5, 20.0], dtype=torch.float64)
    actions = torch.tensor([[0, 1], [0, 0], [2, 2], [1, 1]])

    def everything(scores: Tensor) -> Tensor:
        return torch.stack([*quantities(LegalCategorical(legal, scores), actions).values()])

    assert torch.autograd.gradcheck(everything, scores.requires_grad_())


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_of_only_minus_infinity_and_an_empty_one_have_no_gradient(
    dtype: torch.dtype, repeat: bool
) -> None:
    lists = [[(0,), (1,)], [], [(2,), (2,) if repeat else (3,)], [(4,), (5,)]]
    legal = LegalActions.from_lists(lists)
    scores = torch.tensor([-INF, -INF, 0.0, 1.0, -INF, -INF], dtype=dtype, requires_grad=True)
    dist = LegalCategorical(legal, scores)
    for name, value in quantities(dist, torch.tensor([[1], [0], [2], [9]])).items():
        (got,) = torch.autograd.grad(value, scores, torch.ones_like(value), retain_graph=True)
        assert (got[[0, 1, 4, 5]] == 0).all(), name
        assert got.isfinite().all(), name
        assert repeat or name == "smoothed" or (got[2:4] != 0).all(), name
        (got,) = torch.autograd.grad(value[1], scores, retain_graph=True)
        assert (got == 0).all(), name


@pytest.mark.parametrize("listed", [[(0,), (1,), (2,)], [(0,), (1,), (1,)]])
def test_no_gradient_is_nan_where_the_log_prob_is_minus_infinity(listed: list[Action]) -> None:
    """The stored action has a score of -inf, or stands in another row, or nowhere."""
    legal = LegalActions.from_lists([listed, [(0,), (3,)]])
    for action in ([0], [3], [7], [-1]):
        scores = torch.tensor([-INF, 0.0, 1.0, -INF, 2.0], requires_grad=True)
        dist = LegalCategorical(legal, scores)
        log_prob = dist.log_prob(torch.tensor([action, [3]]))
        assert log_prob[0] == -INF
        assert log_prob[1] == 0
        (got,) = torch.autograd.grad(log_prob.sum(), scores, retain_graph=True)
        assert got.isfinite().all()
        # As the trainer makes a ratio of it: exp(-inf - old) is 0, and so is its gradient.
        (got,) = torch.autograd.grad((log_prob - 0.5).exp().sum(), scores)
        assert (got == 0).all()


def test_a_learned_temperature_has_no_nan_gradient() -> None:
    legal = LegalActions.from_lists([[(0,), (1,), (2,)]])
    t = torch.tensor(1.5, requires_grad=True)
    dist = LegalCategorical(legal, torch.tensor([0.0, 1.0, -INF])).tempered(t)
    (got,) = torch.autograd.grad(dist.entropy().sum(), t)
    assert got.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_reach_scores_of_half_precision(dtype: torch.dtype) -> None:
    legal = LegalActions.from_lists([[(0,), (1,), (2,)], [(0,), (0,), (1,)]])
    start = torch.tensor([0.0, 1.0, -INF, 0.5, 2.0, -1.0])
    actions = torch.tensor([[1], [0]])
    half = start.to(dtype).requires_grad_()
    full = start.clone().requires_grad_()
    one = quantities(LegalCategorical(legal, half).smoothed(0.1), actions)
    other = quantities(LegalCategorical(legal, full).smoothed(0.1), actions)
    for name in one:
        (got,) = torch.autograd.grad(one[name].sum(), half, retain_graph=True)
        (expected,) = torch.autograd.grad(other[name].sum(), full, retain_graph=True)
        assert got.dtype == dtype
        # One rounding to the dtype, of 8 bits in bfloat16.
        torch.testing.assert_close(got.float(), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("lists", [[[(0,), (1,)]], [[(0,), (1,), (1,)]]])
def test_a_draw_leaves_the_gradients_of_the_update_alone(lists: list[list[Action]]) -> None:
    """The rollout asks under no_grad; nothing that it leaves behind may cut the graph."""
    legal = LegalActions.from_lists(lists)
    scores = torch.linspace(0, 1, len(legal.rows)).requires_grad_()
    dist = LegalCategorical(legal, scores)
    with torch.no_grad():
        drawn = dist.sample()
        before = dist.log_prob(drawn)
        dist.entropy(), dist.mode, dist.sample_without_replacement(2), dist.probs
        kl_divergence(dist, dist.smoothed(0.1))
    assert not before.requires_grad
    assert not drawn.requires_grad
    fresh = LegalCategorical(LegalActions.from_lists(lists), scores)
    for name, value in quantities(dist, drawn).items():
        (got,) = torch.autograd.grad(value.sum(), scores, retain_graph=True)
        again = quantities(fresh, drawn)[name]
        (expected,) = torch.autograd.grad(again.sum(), scores, retain_graph=True)
        assert torch.equal(got, expected), name
        assert (got != 0).any(), name
    assert torch.equal(dist.log_prob(drawn), before)


# Unsound scores

CALLS: dict[str, Callable[[LegalCategorical], object]] = {
    "sample": lambda dist: dist.sample(),
    "log_prob": lambda dist: dist.log_prob(dist.legal.noop.expand(len(dist.legal), -1)),
    "entropy": lambda dist: dist.entropy(),
    "mode": lambda dist: dist.mode,
    "kl from": lambda dist: kl_divergence(dist, sound(dist)),
    "kl to": lambda dist: kl_divergence(sound(dist), dist),
    "without replacement": lambda dist: dist.sample_without_replacement(1),
}


def sound(dist: LegalCategorical) -> LegalCategorical:
    return LegalCategorical(dist.legal, torch.zeros_like(dist.logits))


def unsound(bad: float, rest: float, at: int, dtype: torch.dtype) -> LegalCategorical:
    """Row 2 is the bad one; its tuples are (3, 0), (3, 1), (3, 2), (3, 0)."""
    lists = [[(0, 0), (1, 0)], [], [(3, 0), (3, 1), (3, 2), (3, 0)], [(2, 2)]]
    scores = torch.tensor([0.0, 1.0, rest, rest, rest, rest, 0.0], dtype=dtype)
    scores[2 + at] = bad
    return LegalCategorical(LegalActions.from_lists(lists), scores)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("rest", [0.0, -INF])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_and_infinite_scores_raise_when_used(bad: float, rest: float, call: str) -> None:
    for at, name in enumerate([r"\(3, 0\)", r"\(3, 1\)", r"\(3, 2\)", r"\(3, 0\)"]):
        for dtype in FLOATS:
            dist = unsound(bad, rest, at, dtype)
            with pytest.raises(
                ValueError, match=rf"row 2: the score of legal tuple {name} is {bad}"
            ):
                CALLS[call](dist)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_and_infinite_scores_raise_when_explored(bad: float, call: str) -> None:
    """The same tuple is named: it is the network's score that the reader has to look for."""
    plain = unsound(bad, 0.0, 1, torch.float32)
    for dist in (
        plain.tempered(2.0),
        plain.smoothed(0.1),
        plain.smoothed(1.0),
        plain.smoothed(0.0),
    ):
        with pytest.raises(ValueError, match=rf"row 2: the score of legal tuple \(3, 1\) is {bad}"):
            CALLS[call](dist)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_building_a_distribution_never_looks_at_the_scores(bad: float) -> None:
    """A compiled graph builds it; a look at the numbers would break the graph."""
    dist = unsound(bad, 0.0, 1, torch.float32)
    assert dist.batch_shape == (4,)
    assert dist.logits.shape == dist.probs.shape == (7,)
    good = dist.legal.rows != 2
    close(dist.probs[good], [1 / (1 + math.e), math.e / (1 + math.e), 1], 1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_scores_must_be_floats(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="scores must be floats"):
        LegalCategorical(LegalActions.from_lists([[(0,)]]), torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_there_is_one_score_for_each_listing(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"scores must be \(2,\)"):
        LegalCategorical(LegalActions.from_lists([[(0,), (0,)]]), torch.zeros(shape))


# Temperature and epsilon


@pytest.mark.parametrize("bad", [0.0, -1.0, INF, NAN, [1.0, 0.0], [1.0, NAN]])
def test_temperatures_that_mean_nothing(bad: float | list[float]) -> None:
    dist = LegalCategorical(LegalActions.from_lists([[(0,)], []], slots=0), torch.zeros(1))
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        dist.tempered(torch.tensor(bad) if isinstance(bad, list) else bad)


@pytest.mark.parametrize("bad", [-0.1, 1.1, NAN, INF, [0.5, -1.0], [0.5, NAN]])
def test_epsilons_that_mean_nothing(bad: float | list[float]) -> None:
    dist = LegalCategorical(LegalActions.from_lists([[(0,)], []], slots=0), torch.zeros(1))
    with pytest.raises(ValueError, match=r"epsilon must lie in 0\.\.1"):
        dist.smoothed(torch.tensor(bad) if isinstance(bad, list) else bad)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1)])
def test_one_temperature_and_epsilon_or_one_a_row(shape: tuple[int, ...]) -> None:
    dist = LegalCategorical(LegalActions.from_lists([[(0,)], []], slots=0), torch.zeros(1))
    with pytest.raises(ValueError, match=r"temperature must be a number or \(2,\)"):
        dist.tempered(torch.ones(shape))
    with pytest.raises(ValueError, match=r"epsilon must be a number or \(2,\)"):
        dist.smoothed(torch.ones(shape))


def test_a_number_is_taken_in_the_precision_of_the_scores() -> None:
    """0.1 and 1.7 rounded to float32 are off in the ninth digit."""
    legal = LegalActions.from_lists([[(0,), (1,)]])
    dist = LegalCategorical(legal, torch.tensor([0.0, 1.0], dtype=torch.float64))
    for one, other in (
        (dist.tempered(1.7), dist.tempered(torch.tensor(1.7, dtype=torch.float64))),
        (dist.smoothed(0.1), dist.smoothed(torch.tensor(0.1, dtype=torch.float64))),
    ):
        close(one.logits, other.logits, 1e-12)


@pytest.mark.parametrize("t", [1e-3, 1e-10, 1e-30, 1e-37, 1e-38, 1e-40, 1e-44])
@pytest.mark.parametrize("rows", [[[0.0, 1.0, 2.0]], [[5.0], [0.0, 1.0, 2.0]]])
def test_a_vanishing_temperature_plays_the_mode(rows: list[list[float]], t: float) -> None:
    lists = [[(i,) for i in range(len(row))] for row in rows]
    case = Case(lists, rows, (0,), torch.float32)
    cold = case.dist.tempered(t)
    close(cold.log_prob(case.dist.mode), [0.0] * len(rows), 1e-6)
    assert torch.equal(cold.mode, case.dist.mode)


def test_temperature_and_epsilon_keep_what_has_no_mass_apart() -> None:
    """Smoothing gives a tuple of score -inf its share; tempering gives it nothing."""
    legal = LegalActions.from_lists([[(0,), (1,), (2,), (2,)]])
    dist = LegalCategorical(legal, torch.tensor([0.0, 0.0, -INF, -INF]))
    action = torch.tensor([[2]])
    assert dist.tempered(100.0).log_prob(action) == -INF
    close(dist.smoothed(0.3).log_prob(action).exp(), [0.1], 1e-6)
    close(dist.smoothed(0.3).log_prob(torch.tensor([[1]])).exp(), [0.45], 1e-6)


# KL over other lists


def categorical(actions: list[Action], scores: list[float]) -> LegalCategorical:
    """Between two other rows, one of them empty."""
    lists = [[(9, 9)], actions, []]
    return LegalCategorical(LegalActions.from_lists(lists, slots=1), torch.tensor([0.0, *scores]))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]])
def test_kl_over_permuted_and_repeated_lists(order: list[int]) -> None:
    actions: list[Action] = [(0, 1), (2, 0), (1, 5)]
    p_scores, q_scores = [0.0, 1.0, 2.0], [1.0, -1.0, 0.5]
    p, q = categorical(actions, p_scores), categorical(actions, q_scores)
    expected = kl_divergence(p, q)
    assert expected[1] > 0.1
    permuted = categorical([actions[i] for i in order], [q_scores[i] for i in order])
    close(kl_divergence(p, permuted), expected.double(), 1e-6)
    half = math.log(2)
    repeated = categorical(
        [*(actions[i] for i in order), (2, 0)],
        [*(q_scores[i] - half * (i == 1) for i in order), q_scores[1] - half],
    )
    close(kl_divergence(p, repeated), expected.double(), 1e-6)
    close(kl_divergence(repeated, p), kl_divergence(q, p).double(), 1e-6)


@pytest.mark.parametrize(
    "other",
    [
        [[(9, 9)], [(0, 1), (2, 0), (1, 6)], []],
        [[(9, 9)], [(0, 1), (2, 0)], []],
        [[(9, 9)], [(0, 1), (2, 0), (2, 0)], []],
        [[(9, 9), (0, 1)], [(2, 0), (1, 5)], []],
        [[(2, 0)], [(0, 1), (9, 9), (1, 5)], []],
        [[(9, 9)], [(0, 1), (2, 0), (1, 5)]],
        [[(9, 9)], [], [(0, 1), (2, 0), (1, 5)]],
        [[], [], []],
        [[(9,)], [(0,), (2,), (1,)], []],
    ],
)
def test_kl_over_other_lists_raises(other: list[list[Action]]) -> None:
    p = categorical([(0, 1), (2, 0), (1, 5)], [0.0, 1.0, 2.0])
    legal = LegalActions.from_lists(other, slots=None if any(other) else 1)
    q = LegalCategorical(legal, torch.zeros(len(legal.rows)))
    for one, two in ((p, q), (q, p)):
        with pytest.raises(ValueError, match="the same legal lists"):
            kl_divergence(one, two)


@pytest.mark.parametrize("repeat", [False, True])
def test_kl_where_a_mass_is_zero(repeat: bool) -> None:
    """0 log 0 is 0; infinite where q is 0 and p is not, and the other rows keep their gradients."""
    rows: list[list[Action]] = [[(0,), (1,)]] * 4
    lists = [*rows, [(0,), (0,)]] if repeat else rows
    legal = LegalActions.from_lists(lists)
    more = [0.0, 0.0] if repeat else []
    p_scores = torch.tensor([0.0, -INF, 0.0, -INF, 0.0, 1.0, 0, 1, *more], requires_grad=True)
    q_scores = torch.tensor([0.0, 0.0, 0.0, -INF, 0, -INF, 1, 1, *more], requires_grad=True)
    kl = kl_divergence(LegalCategorical(legal, p_scores), LegalCategorical(legal, q_scores))
    p = 1 / (1 + math.e)
    finite = p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p)
    close(kl[:4], [math.log(2), 0.0, INF, finite], 1e-6)
    for scores in (p_scores, q_scores):
        (got,) = torch.autograd.grad(kl.sum(), scores, retain_graph=True)
        assert got.isfinite().all()
        assert (got[6:8] != 0).all()


def test_kl_is_registered_for_other_distributions_by_nobody() -> None:
    dist = LegalCategorical(LegalActions.from_lists([[(0,)]]), torch.zeros(1))
    with pytest.raises(NotImplementedError):
        kl_divergence(dist, Categorical(logits=torch.zeros(1, 1)))


# The conventions of torch.distributions


def small(validate_args: bool | None = None) -> LegalCategorical:
    lists = [[(0, 1, 2), (3, 0, 0)], [], [(0, 1, 2)], [(0, 0, 0), (0, 0, 1)]]
    return LegalCategorical(LegalActions.from_lists(lists), torch.zeros(5), validate_args)


def test_conventions() -> None:
    dist = small()
    assert isinstance(dist, Distribution)
    assert dist.batch_shape == torch.Size([4])
    assert dist.event_shape == torch.Size([3])
    assert isinstance(dist.batch_shape, torch.Size)
    assert isinstance(dist.event_shape, torch.Size)
    assert dist.has_rsample is False
    assert dist.has_enumerate_support is False
    for shape in ((), (5,), (3, 2), (0,), (2, 0)):
        drawn = dist.sample(torch.Size(shape))
        assert drawn.shape == (*shape, 4, 3)
        assert dist.sample(shape).shape == drawn.shape
        assert dist.log_prob(drawn).shape == (*shape, 4)
    assert dist.entropy().shape == (4,)
    assert dist.mode.shape == (4, 3)
    for moment in (dist.mean, dist.variance, dist.stddev):
        assert moment.shape == (4, 3)
        assert moment.isnan().all()
    assert "LegalCategorical" in repr(dist)
    assert "LegalCategorical" in repr(dist.tempered(2.0))
    close(dist.perplexity(), [2.0, 1.0, 1.0, 2.0], 1e-6)


def test_what_is_not_offered_says_so() -> None:
    dist = small()
    with pytest.raises(NotImplementedError, match="each row has its own legal list"):
        dist.expand(torch.Size([2, 4]))
    with pytest.raises(NotImplementedError):
        dist.rsample()
    with pytest.raises(NotImplementedError):
        dist.enumerate_support()


def test_support_is_whole_numbers_of_the_event_shape() -> None:
    support = small().support
    assert support.is_discrete
    assert support.event_dim == 1
    assert support.check(torch.tensor([[0, 1, 2], [99, -5, 0]])).tolist() == [True, True]
    assert support.check(torch.tensor([[0.0, 1, 2], [0.5, 1, 2], [NAN, 1, 2]])).tolist() == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "derive", [lambda d: d, lambda d: d.tempered(2.0), lambda d: d.smoothed(0.1)]
)
@pytest.mark.parametrize("validate_args", [True, False])
def test_validate_args_is_kept(
    validate_args: bool, derive: Callable[[LegalCategorical], LegalCategorical]
) -> None:
    dist = derive(small(validate_args))
    broken = torch.full((4, 3), 0.5)
    if validate_args:
        with pytest.raises(ValueError, match="within the support"):
            dist.log_prob(broken)
    else:
        assert (dist.log_prob(broken) == -INF).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_probabilities_are_float32_or_better(dtype: torch.dtype) -> None:
    legal = small().legal
    better = torch.float64 if dtype == torch.float64 else torch.float32
    plain = LegalCategorical(legal, torch.zeros(5, dtype=dtype))
    for dist in (plain, plain.tempered(2.0), plain.smoothed(0.1), plain.tempered(torch.ones(4))):
        answers = [dist.probs, dist.logits, dist.entropy(), dist.log_prob(dist.sample())]
        answers.append(kl_divergence(dist, plain))
        assert {answer.dtype for answer in answers} == {better}


def test_probabilities_are_float32_under_autocast() -> None:
    """To the last bit what they are without: the scores are bfloat16, nothing after them is."""
    legal = LegalActions.from_lists([[(i,) for i in range(300)], [(0,), (1,), (1,)], []])
    weight = torch.randn(303, 4, generator=torch.Generator().manual_seed(0))
    actions = torch.tensor([[7], [1], [0]])
    with torch.autocast("cpu", torch.bfloat16):
        scores = weight @ torch.ones(4)
        dist = LegalCategorical(legal, scores)
        inside = quantities(dist, actions)
        probs = dist.probs
    assert scores.dtype == torch.bfloat16
    outside = LegalCategorical(legal, scores)
    assert probs.dtype == torch.float32
    assert torch.equal(probs, outside.probs)
    for name, value in quantities(outside, actions).items():
        assert inside[name].dtype == torch.float32
        assert torch.equal(inside[name], value), name


# ---- what hostile tests found


def test_draws_are_legal_beyond_eight_million_rows() -> None:
    rows = 2**23 + 3
    counts = torch.full((rows,), 2)
    actions = torch.stack([torch.arange(2 * rows) % 2, torch.arange(2 * rows) % 7], dim=1)
    legal = LegalActions.trusted(actions, counts, torch.zeros(2, dtype=torch.int64))
    torch.manual_seed(0)
    scores = torch.tensor([0.0, -1.0]).repeat(rows)
    drawn = LegalCategorical(legal, scores).sample()
    pairs = actions.view(rows, 2, 2)
    first = (drawn == pairs[:, 0]).all(1)
    assert (first | (drawn == pairs[:, 1]).all(1)).all()
    share = 1 / (1 + math.exp(-1))
    tail = first[-(2**20) :]
    for some in (first, tail):
        off = abs(float(some.double().mean()) - share)
        assert off < 5 * math.sqrt(share * (1 - share) / len(some))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lowest", [-1e38, -1e30, -50.0])
def test_a_temperature_and_an_epsilon_have_finite_gradients(
    lowest: float, dtype: torch.dtype
) -> None:
    legal = LegalActions.from_lists([[(0,), (1,), (2,)]])
    scores = torch.tensor([lowest, 0.0, -1.0], dtype=dtype, requires_grad=True)
    for values in ((0.01, 1.0), (1e-40 if dtype == torch.float32 else 1e-300, 0.0), (2.0, 0.5)):
        t, e = (torch.tensor(value, dtype=dtype, requires_grad=True) for value in values)
        for dist in (
            LegalCategorical(legal, scores).tempered(t),
            LegalCategorical(legal, scores).smoothed(e),
        ):
            loss = dist.entropy().sum() + dist.log_prob(torch.tensor([[1]])).sum()
            for grad in torch.autograd.grad(loss, [scores, t, e], allow_unused=True):
                assert grad is None or grad.isfinite().all()


def test_smoothing_is_exact_to_first_order() -> None:
    legal = LegalActions.from_lists([[(0,), (1,), (1,), (2,)], [(0,)], [(3,), (4,)]])
    scores = torch.tensor([0.3, -1.0, 0.5, 2.0, 0.1, -3.0, 3.0], dtype=torch.float64)

    def log_probs(scores: Tensor, t: Tensor, e: Tensor) -> Tensor:
        return LegalCategorical(legal, scores).tempered(t).smoothed(e).logits

    for e in (1e-9, 0.3, 1.0):
        inputs = [
            scores.clone().requires_grad_(),
            torch.tensor(1.7, dtype=torch.float64, requires_grad=True),
            torch.tensor(e, dtype=torch.float64, requires_grad=e < 1),
        ]
        assert torch.autograd.gradcheck(log_probs, inputs, eps=1e-7 if e > 1e-6 else 1e-10)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-6, 0.01, 0.5, 1.0])
def test_smoothing_keeps_its_digits(epsilon: float) -> None:
    legal = LegalActions.from_lists([[(value,) for value in range(4)]])
    scores = torch.tensor([0.0, -20.0, -60.0, -200.0])
    exact = torch.softmax(scores.double(), 0)
    wanted = ((1 - epsilon) * exact + epsilon / 4).log()
    got = LegalCategorical(legal, scores).smoothed(epsilon).logits
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_rows_of_a_distribution() -> None:
    legal = LegalActions.from_lists([[(0,), (1,), (1,)], [], [(3,), (4,)]])
    scores = torch.tensor([0.3, -1.0, 0.5, 2.0, 0.1], requires_grad=True)
    dist = LegalCategorical(legal, scores)
    for rows in (torch.tensor([True, False, True]), torch.tensor([2, 0, 2]), slice(1, None)):
        part = dist[rows]
        torch.testing.assert_close(part.entropy(), dist.entropy()[rows])
        actions = torch.tensor([[1], [0], [4]])
        torch.testing.assert_close(part.log_prob(actions[rows]), dist.log_prob(actions)[rows])
    (mine,) = torch.autograd.grad(dist[1:].entropy().sum(), scores, retain_graph=True)
    (theirs,) = torch.autograd.grad(dist.entropy()[1:].sum(), scores)
    torch.testing.assert_close(mine, theirs)


def test_who_must_know_of_draws_is_told_once_of_each() -> None:
    legal = LegalActions.from_lists([[(0,), (1,)]])
    dist = LegalCategorical(legal, torch.zeros(2))
    told: list[int] = []
    dist.drew = lambda: told.append(1)
    dist.sample()
    dist.sample((3,))
    dist.sample_without_replacement(1)
    assert len(told) == 3
    for derived in (dist.tempered(2.0), dist.smoothed(0.1), dist.top(1), dist[:1]):
        derived.sample()
    dist.log_prob(dist.mode)
    assert len(told) == 3


@pytest.mark.parametrize("k", [1.5, True, "2"])
def test_a_number_of_tuples_is_a_whole_number(k: Any) -> None:
    dist = LegalCategorical(LegalActions.from_lists([[(0,)]]), torch.zeros(1))
    for method in (dist.top, dist.sample_without_replacement):
        with pytest.raises(TypeError, match=r"^k must be a whole number, got "):
            method(k)


def test_torch_func_has_gradients_and_no_vmap() -> None:
    legal = LegalActions.from_lists([[(0,), (1,)]])
    scores = torch.tensor([0.0, 1.0])
    grad = torch.func.grad(lambda s: LegalCategorical(legal, s).entropy().sum())(scores)
    scores.requires_grad_()
    (wanted,) = torch.autograd.grad(LegalCategorical(legal, scores).entropy().sum(), scores)
    torch.testing.assert_close(grad, wanted)
    with pytest.raises(RuntimeError, match=r"cannot be inside torch\.vmap.*: make one of all rows"):
        torch.vmap(lambda s: LegalCategorical(legal, s).entropy())(torch.zeros(3, 2))
