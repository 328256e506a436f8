"""Frequencies of draws against probabilities that are worked out by hand or in plain Python.

Pearson's chi-square, its tail exact by the incomplete gamma function. Below ALPHA a test fails:
with fixed seeds it either always does or never, and another random stream (a new torch) turns one
of the fifty or so comparisons here red by chance once in 20,000 releases.
"""

import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from tcg_flatpolicy import LegalActions, LegalCategorical

Action = tuple[int, ...]
Probs = dict[Action, float]

ALPHA = 1e-6
INF = math.inf


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Of counts (cells,) drawn from probs (cells,); what has no probability must not be drawn."""
    assert abs(float(probs.sum()) - 1) < 1e-9
    possible = probs > 0
    assert (counts[~possible] == 0).all(), "drawn, but of probability 0"
    expected = probs[possible] * counts.sum()
    assert (expected >= 5).all(), "too few draws for a chi-square"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = int(possible.sum()) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), statistic / 2))


def agree(drawn: Tensor, probs: Probs) -> None:
    """(n, H) draws of one row's distribution."""
    tuples, counts = drawn.unique(dim=0, return_counts=True)
    seen = dict(zip(map(tuple, tuples.tolist()), counts.tolist(), strict=True))
    assert set(seen) <= set(probs), "not in the list"
    observed = torch.tensor([seen.get(action, 0) for action in probs], dtype=torch.float64)
    assert p_value(observed, torch.tensor(list(probs.values()), dtype=torch.float64)) > ALPHA


def test_the_threshold_knows_right_from_wrong() -> None:
    counts = torch.tensor([30.0, 70.0], dtype=torch.float64)
    # 16 for one degree of freedom: twice the normal tail beyond 4.
    exact = math.erfc(4 / math.sqrt(2))
    assert p_value(counts, torch.tensor([0.5, 0.5]).double()) == pytest.approx(exact)
    assert p_value(counts, torch.tensor([0.3, 0.7]).double()) == pytest.approx(1)
    with pytest.raises(AssertionError, match="of probability 0"):
        p_value(counts, torch.tensor([0.0, 1.0]).double())


# One list in full: a tuple of mass 0, one that is listed twice, one once.

A, B, C, D = (0, 1), (2, 0), (1, 1), (3, 3)
LISTED = [A, B, C, B, D]
SCORES = [math.log(0.5) + 7, math.log(0.2) + 7, -INF, math.log(0.1) + 7, math.log(0.2) + 7]
PLAIN: Probs = {A: 0.5, B: 0.3, C: 0.0, D: 0.2}


def normalised(weights: Probs) -> Probs:
    total = sum(weights.values())
    return {action: weight / total for action, weight in weights.items()}


SMOOTHED: Probs = {action: 0.6 * p + 0.4 / 4 for action, p in PLAIN.items()}
TEMPERED: Probs = normalised({action: p**0.5 for action, p in PLAIN.items()})
SHARPENED: Probs = normalised({action: p**3 for action, p in PLAIN.items()})
THEN_SMOOTHED: Probs = {action: 0.6 * p + 0.4 / 4 for action, p in TEMPERED.items()}
THEN_TEMPERED: Probs = normalised({action: p**0.5 for action, p in SMOOTHED.items()})


def between_other_rows(rows: int = 1) -> LegalCategorical:
    """The list of above in every other row, with empty rows and other lists around."""
    other: list[Action] = [(0, 0), (0, 1), (9, 9)]
    lists = [[], other, [], *([LISTED, []] * rows), other, []]
    scores = [5.0, -INF, 1.0, *(SCORES * rows), 0.0, 3.0, -4.0]
    return LegalCategorical(LegalActions.from_lists(lists), torch.tensor(scores))


def derived(dist: LegalCategorical, name: str) -> LegalCategorical:
    half = torch.full((len(dist.legal),), 2.0)
    return {
        "plain": lambda: dist,
        "smoothed": lambda: dist.smoothed(0.4),
        "tempered": lambda: dist.tempered(half),
        "sharpened": lambda: dist.tempered(1 / 3),
        "then smoothed": lambda: dist.tempered(2.0).smoothed(0.2 * half),
        "then tempered": lambda: dist.smoothed(0.4).tempered(2.0),
    }[name]()


DISTRIBUTIONS = {
    "plain": PLAIN,
    "smoothed": SMOOTHED,
    "tempered": TEMPERED,
    "sharpened": SHARPENED,
    "then smoothed": THEN_SMOOTHED,
    "then tempered": THEN_TEMPERED,
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_frequencies(name: str) -> None:
    torch.manual_seed(1)
    drawn = derived(between_other_rows(), name).sample((100_000,))
    agree(drawn[:, 3], DISTRIBUTIONS[name])


@pytest.mark.parametrize("name", ["plain", "then smoothed"])
def test_frequencies_over_the_rows_of_one_draw(name: str) -> None:
    torch.manual_seed(2)
    drawn = derived(between_other_rows(20_000), name).sample()
    agree(drawn[3:-2:2], DISTRIBUTIONS[name])
    assert (drawn[4:-2:2] == 0).all()


def test_tiny_probabilities_are_drawn_as_often_as_they_should() -> None:
    """One in 10,000: what a coarser random number than float64, or a clamp, would miss."""
    torch.manual_seed(3)
    probs = {(0,): 1 - 1.5e-4, (1,): 1e-4, (2,): 5e-5}
    scores = torch.tensor([math.log(p) for p in probs.values()])
    dist = LegalCategorical(LegalActions.from_lists([list(probs)]), scores)
    agree(dist.sample((300_000,))[:, 0], probs)


def test_only_minus_infinity_draws_uniformly_over_listings() -> None:
    torch.manual_seed(4)
    legal = LegalActions.from_lists([[(0,)], [(1,), (2,), (1,), (3,)]])
    drawn = LegalCategorical(legal, torch.full((5,), -INF)).sample((50_000,))
    assert (drawn[:, 0] == 0).all()
    agree(drawn[:, 1], {(1,): 0.5, (2,): 0.25, (3,): 0.25})


def test_half_precision_scores_draw_by_their_own_values() -> None:
    torch.manual_seed(5)
    scores = torch.linspace(-3, 1, 7).bfloat16()
    weights = normalised({(i,): math.exp(score) for i, score in enumerate(scores.tolist())})
    dist = LegalCategorical(LegalActions.from_lists([list(weights)]), scores)
    agree(dist.sample((100_000,))[:, 0], weights)


def test_rows_and_samples_are_independent() -> None:
    """Joint frequencies of two rows of a draw, of one row in two draws, and of neighbours."""
    torch.manual_seed(6)
    first, second = {(0,): 0.7, (1,): 0.3}, {(2,): 0.1, (3,): 0.6, (4,): 0.3}
    scores = torch.tensor([math.log(p) for p in (*first.values(), *second.values())])
    legal = LegalActions.from_lists([list(first), list(second)])
    drawn = LegalCategorical(legal, scores).sample((2, 50_000))
    joint = {(*a, *b): first[a] * second[b] for a, b in product(first, second)}
    agree(drawn[0].flatten(1), joint)
    twice = {(*a, *b): second[a] * second[b] for a, b in product(second, second)}
    agree(torch.stack([drawn[0, :, 1, 0], drawn[1, :, 1, 0]], 1), twice)
    agree(drawn[0, :, 1, 0].view(-1, 2), twice)
    crossed = torch.stack([drawn[0, :, 0, 0], drawn[1, :, 1, 0]], 1)
    agree(crossed, joint)


# The ends of the random number, which no test would ever meet by chance


def fixed_uniform(monkeypatch: pytest.MonkeyPatch, uniform: float) -> None:
    def rand(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert dtype == torch.float64, "float32 has steps of 2**-24: what is rarer is never drawn"
        return torch.full(shape, uniform, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "rand", rand)


@pytest.mark.parametrize(
    ("uniform", "expected"), [(0.0, [1, 3, 9, 5, 6]), (1 - 2**-53, [1, 4, 9, 5, 7])]
)
def test_the_ends_of_the_random_number_stay_in_the_row(
    monkeypatch: pytest.MonkeyPatch, uniform: float, expected: list[int]
) -> None:
    """The first and the last tuple that has mass, never a neighbour's."""
    lists = [[(0,), (1,), (2,)], [(3,), (4,)], [], [(5,)], [(6,), (7,), (8,)], []]
    scores = torch.tensor([-INF, 0.0, -INF, 0.0, 1.0, 7.0, 0.0, 1.0, -INF])
    dist = LegalCategorical(LegalActions.from_lists(lists, noop=(9,)), scores)
    fixed_uniform(monkeypatch, uniform)
    assert dist.sample().flatten().tolist() == [*expected, 9]
    assert dist.sample((2,)).flatten().tolist() == [*expected, 9] * 2


@pytest.mark.parametrize(
    ("uniform", "expected"), [(2**-31, 0), (2**-29, 1), (1 - 2**-29, 1), (1 - 2**-31, 2)]
)
def test_a_tuple_of_one_in_a_billion_has_its_share(
    monkeypatch: pytest.MonkeyPatch, uniform: float, expected: int
) -> None:
    """Of probability 2**-30, at either end of the list, behind 1,000 other rows."""
    lists = [*[[(7,), (8,)]] * 1000, [(0,), (1,), (2,)]]
    rare = -30 * math.log(2)
    scores = torch.cat([torch.zeros(2000), torch.tensor([rare, 0.0, rare])])
    dist = LegalCategorical(LegalActions.from_lists(lists), scores)
    fixed_uniform(monkeypatch, uniform)
    assert dist.sample()[-1].tolist() == [expected]


# The end of a large batch

LONG = 512


def long_row() -> tuple[list[Action], Tensor]:
    """(512,) tuples of probability near 1 / 512, some thrice as likely as others."""
    scores = torch.tensor([math.log(1 + i % 3) for i in range(LONG)])
    return [(i // 32, i % 32) for i in range(LONG)], scores


@pytest.mark.parametrize("huge", [0, 40])
def test_the_last_rows_of_a_large_batch(huge: int) -> None:
    """Of 16,384 rows; a running sum in float32 has steps of 1/1,024 there: half the tuples of the
    last rows would never be drawn. The same behind rows of 20,000 tuples."""
    torch.manual_seed(7)
    rows, last, samples = 16_384, 64, 120
    tuples, scores = long_row()
    counts = torch.tensor([11, 0]).repeat(rows // 2)
    counts[:huge] = 20_000
    counts[-last:] = LONG
    before = int(counts[:-last].sum())
    listed = torch.stack([torch.arange(before) // 200, torch.arange(before) % 200], 1)
    actions = torch.cat([listed, torch.tensor(tuples).repeat(last, 1)])
    legal = LegalActions(actions, counts)
    dist = LegalCategorical(legal, torch.cat([torch.randn(before), scores.repeat(last)]))
    drawn = dist.sample((samples,))
    assert legal.contains(drawn[:3]).all()
    probs = normalised({a: math.exp(s) for a, s in zip(tuples, scores.tolist(), strict=True)})
    agree(drawn[:, -last:].flatten(0, 1), probs)


def test_without_replacement_in_the_last_rows_of_a_large_batch() -> None:
    torch.manual_seed(8)
    rows, last = 16_384, 4_096
    probs = {(i,): 1 / 16 for i in range(16)}
    legal = LegalActions(torch.arange(16).repeat(rows).unsqueeze(1), torch.full((rows,), 16))
    actions, drawn = LegalCategorical(legal, torch.zeros(rows * 16)).sample_without_replacement(3)
    assert drawn.all()
    for place in range(3):
        agree(actions[-last:, place], probs)


# Without replacement


def ordered(probs: Probs, k: int) -> Probs:
    """The probability of each k tuples in a row, drawn one after another and not put back."""
    found: Probs = {(): 1.0}
    for _ in range(k):
        found = {
            (*taken, i): p * q / (1 - sum(list(probs.values())[j] for j in taken))
            for taken, p in found.items()
            for i, q in enumerate(probs.values())
            if i not in taken and q > 0
        }
    return found


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_without_replacement_draws_one_after_the_other(name: str) -> None:
    """Gumbel top-k: the first as a plain draw, the pairs p_i p_j / (1 - p_i), in their order."""
    torch.manual_seed(9)
    rows, probs = 30_000, DISTRIBUTIONS[name]
    dist = derived(between_other_rows(rows), name)
    actions, drawn = dist.sample_without_replacement(2)
    taken = actions[3:-2:2]
    assert drawn[3:-2:2].all()
    assert not drawn[4:-2:2].any()
    agree(taken[:, 0], probs)
    number = {action: i for i, action in enumerate(probs)}
    pairs = [(number[tuple(a)], number[tuple(b)]) for a, b in taken.tolist()]
    agree(torch.tensor(pairs), ordered(probs, 2))


def test_without_replacement_orders_everything_when_all_are_drawn() -> None:
    torch.manual_seed(10)
    rows = 30_000
    dist = between_other_rows(rows).smoothed(0.4)
    actions, drawn = dist.sample_without_replacement(5)
    taken, drawn = actions[3:-2:2], drawn[3:-2:2]
    assert (drawn == torch.tensor([True, True, True, True, False])).all()
    number = {action: i for i, action in enumerate(SMOOTHED)}
    orders = [tuple(number[tuple(a)] for a in row) for row in taken[:, :4].tolist()]
    agree(torch.tensor(orders), ordered(SMOOTHED, 4))


# Seeds


def test_draws_follow_the_seed() -> None:
    dist = between_other_rows(50)

    def draws() -> list[Tensor]:
        return [dist.sample(), dist.sample((3, 2)), *dist.sample_without_replacement(2)]

    torch.manual_seed(0)
    first = draws()
    second = draws()
    torch.manual_seed(0)
    again = draws()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


def test_samples_of_one_call_differ() -> None:
    torch.manual_seed(0)
    drawn = between_other_rows(50).sample((4,))
    assert not any(torch.equal(a, b) for a, b in pairwise(drawn))
