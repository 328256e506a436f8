"""The exactness benchmark's figures against loops over every draw and every replacement."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.heads import make_head

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import exactness
from baselines import HEADS, IndependentHeads, MasksOfGreedyPrimary, MasksPerHead

SPEC = fp.ActionSpec(
    [
        fp.Primary("pass"),
        fp.Primary("hit", fp.Entity("unit", 2), fp.Index("way", 3)),
        fp.Primary("cast", fp.Index("card", 2)),
    ]
)
LISTS = [
    [(2, 1, 0), (0, 0, 0), (1, 0, 0), (1, 1, 2)],
    [(1, 1, 1), (1, 0, 1), (1, 1, 0)],
    [(0, 0, 0)],
    [(1, 0, 2), (2, 0, 0), (2, 1, 0), (1, 1, 1), (0, 0, 0), (1, 0, 1)],
    [(0, 0, 0), (1, 1, 1)],
]
USED = {0: 0, 1: 2, 2: 1}
"""How many slots each primary uses."""
HIDDEN = 5
Tuple = tuple[int, ...]
ONES = torch.ones(len(LISTS))
ILLEGAL = ("masks per head", "masks of the greedy primary")


def legal_lists() -> fp.LegalActions:
    return fp.LegalActions.from_lists(LISTS).distinct()


def make(name: str, factor: float = 20.0) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A head that is far from uniform, with hidden (5, 5) and units (5, 2, 3)."""
    torch.manual_seed(3)
    head = make_head(HEADS[name], SPEC, HIDDEN, {"unit": (2, 3)}, 8)
    entities = {"unit": torch.randn(len(LISTS), 2, 3)}
    return exactness.scaled(head, factor), torch.randn(len(LISTS), HIDDEN), entities


def as_read(drawn: Tuple) -> Tuple:
    """What an engine makes of a tuple, whose unused slots it does not look at."""
    used = 1 + USED[drawn[0]]
    return drawn[:used] + (0,) * (3 - used)


def masked_logs(
    head: nn.Module, hidden: Tensor, lists: list[Tuple]
) -> tuple[list[Tensor], list[list[int]]]:
    """By hand, for masks: log-probs (float64) of each head's values, and which are unmasked."""
    logits = copy.deepcopy(head.net).double()(hidden).split(head.nvec)
    primaries = sorted({one[0] for one in lists})
    follow = lists
    if isinstance(head, MasksOfGreedyPrimary):
        greedy = max(primaries, key=lambda value: logits[0][value].item())
        follow = [one for one in lists if one[0] == greedy]
    allowed = [primaries] + [sorted({one[j] for one in follow}) for j in (1, 2)]
    logs = []
    for values, row in zip(allowed, logits, strict=True):
        mask = torch.full_like(row, -1e8)
        mask[values] = 0.0
        logs.append((torch.where(mask == 0, row, -1e8)).log_softmax(0))
    return logs, allowed


def tuple_logs(
    head: nn.Module, hidden: Tensor, units: Tensor, lists: list[Tuple]
) -> tuple[dict[Tuple, Tensor], Callable[[Tuple], Tensor], list[Tuple]]:
    """Of one state: log pi of each tuple, the entropy reported of a draw, and what can be drawn."""
    if isinstance(head, MasksPerHead):
        logs, allowed = masked_logs(head, hidden, lists)
        drawn = list(itertools.product(*allowed))
        by_tuple = {
            one: logs[0][one[0]] + logs[1][one[1]] + logs[2][one[2]] for one in {*drawn, *lists}
        }
        entropy = sum(
            -(logs[j][value].exp() * logs[j][value]) for j in range(3) for value in allowed[j]
        )
        return by_tuple, lambda one: entropy, drawn
    legal = fp.LegalActions.from_lists([lists])
    distribution = head(hidden.float().unsqueeze(0), {"unit": units.unsqueeze(0)}, legal)
    if isinstance(distribution, fp.LegalAutoregressive):
        scores = torch.cat(
            [
                head(hidden.float().unsqueeze(0), {"unit": units.unsqueeze(0)}, legal).log_prob(
                    torch.tensor([one])
                )
                for one in lists
            ]
        )
    else:
        scores = distribution.logits
    normalised = scores.double().log_softmax(0)
    by_tuple = dict(zip(lists, normalised, strict=True))
    whole = -(normalised.exp() * normalised).sum()

    def along_the_path(drawn: Tuple) -> Tensor:
        """The conditionals from sums of whole tuples' probabilities, and their entropies summed."""
        total = torch.zeros((), dtype=torch.float64)
        for slot in range(3):
            going_on = [one for one in lists if one[:slot] == drawn[:slot]]
            reached = sum(by_tuple[one].exp() for one in going_on)
            for value in {one[slot] for one in going_on}:
                share = sum(by_tuple[one].exp() for one in going_on if one[slot] == value)
                share = share / reached
                total = total - share * share.log()
        return total

    if isinstance(distribution, fp.LegalAutoregressive):
        return by_tuple, along_the_path, lists
    return by_tuple, lambda one: whole, lists


def by_loops(
    head: nn.Module, hidden: Tensor, entities: dict[str, Tensor], advantages: Tensor
) -> dict[str, float]:
    """What evaluate gives, by loops over states, draws and replacements, in float64."""
    names = ("entropy gradient", "policy gradient", "policy gradient of the played")
    true2, mean2, off2, product, spread = ({name: 0.0 for name in names} for _ in range(5))
    entropy_sum = bias_sum = variance_sum = illegal_sum = not_listed_sum = 0.0
    offset = 0
    for state, lists in enumerate(LISTS):
        leaf = hidden[state].double().requires_grad_()
        logs, reported, drawn = tuple_logs(head, leaf, entities["unit"][state], lists)
        worth = dict(zip(lists, advantages[offset : offset + len(lists)].tolist(), strict=True))
        offset += len(lists)

        def grad(value: Any, leaf: Tensor = leaf) -> Tensor:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return torch.zeros_like(leaf)
            (found,) = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)
            return torch.zeros_like(leaf) if found is None else found

        nothing = 0.0 * leaf.sum()
        illegal = sum((logs[one].exp() for one in drawn if as_read(one) not in lists), nothing)
        q = {
            two: sum((logs[one].exp() for one in drawn if as_read(one) == two), nothing)
            + illegal / len(lists)
            for two in lists
        }
        assert sum(q.values()).item() == pytest.approx(1, abs=1e-6)
        entropy = sum(-value * value.log() for value in q.values() if value > 0)
        true = {"entropy gradient": grad(entropy)}
        true["policy gradient"] = grad(sum(q[one] * worth[one] for one in lists))
        true["policy gradient of the played"] = true["policy gradient"]

        events: list[tuple[float, Tuple, Tuple]] = []  # probability, drawn, played
        for one in drawn:
            prob = logs[one].exp().item()
            if as_read(one) in lists:
                events.append((prob, one, as_read(one)))
            else:
                events += [(prob / len(lists), one, instead) for instead in lists]
        told = [(prob, reported(one).item()) for prob, one, _ in events]
        mean = sum(prob * value for prob, value in told)
        entropy_sum += entropy.item()
        bias_sum += mean - entropy.item()
        variance_sum += sum(prob * (value - mean) ** 2 for prob, value in told)
        illegal_sum += illegal.item()
        not_listed_sum += sum(logs[one].exp().item() for one in drawn if one not in lists)
        samples = {
            "entropy gradient": [(p, grad(reported(one))) for p, one, _ in events],
            "policy gradient": [(p, worth[two] * grad(logs[one])) for p, one, two in events],
            "policy gradient of the played": [
                (p, worth[two] * grad(logs[two])) for p, _, two in events
            ],
        }
        for name, pairs in samples.items():
            average = sum(prob * vector for prob, vector in pairs)
            true2[name] += true[name].square().sum().item()
            mean2[name] += average.square().sum().item()
            off2[name] += (average - true[name]).square().sum().item()
            product[name] += (average * true[name]).sum().item()
            spread[name] += sum(p * (v - average).square().sum().item() for p, v in pairs)
    states = len(LISTS)
    figures = {
        "entropy": entropy_sum / states,
        "entropy bias": bias_sum / states,
        "entropy sd": (variance_sum / states) ** 0.5,
        "not listed share": not_listed_sum / states,
        "illegal share": illegal_sum / states,
    }
    for name in names:
        figures[f"{name} bias"] = (off2[name] / true2[name]) ** 0.5
        figures[f"{name} cosine"] = product[name] / (true2[name] * mean2[name]) ** 0.5
        figures[f"{name} variance"] = spread[name] / true2[name]
    return figures


def off_by(head: nn.Module, hidden: Tensor, entities: dict[str, Tensor]) -> float:
    """How far the probability of drawing a listed tuple, just as it stands, is from 1 at most."""
    return max(
        abs(1 - sum(logs[one].exp().item() for one in lists))
        for state, lists in enumerate(LISTS)
        for logs, _, _ in [tuple_logs(head, hidden[state].double(), entities["unit"][state], lists)]
    )


@pytest.mark.parametrize("name", HEADS)
def test_figures_are_those_of_loops_over_every_draw(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exactness, "CHUNK", 3)  # so that a chunk ends within the batch
    head, hidden, entities = make(name)
    legal = legal_lists()
    # Not centred, so that draws that are replaced have an advantage on average too.
    advantages = 0.7 + exactness.made_up_advantages(legal, seed=1)
    figures = exactness.evaluate(head, hidden, entities, legal, advantages, SPEC)
    reference = by_loops(head, hidden, entities, advantages)
    reference["mass off by"] = off_by(head, hidden, entities)
    assert figures.keys() == reference.keys()
    for key, value in reference.items():
        assert figures[key] == pytest.approx(value, abs=2e-4, rel=2e-4), key
    if name in ILLEGAL:  # else neither share would be told from the other, or from 0
        assert 0.01 < figures["illegal share"] < figures["not listed share"] - 0.01


def test_a_draw_is_what_its_primary_makes_of_it() -> None:
    lists = [[(0, 0, 0), (1, 1, 1)], [(2, 1, 0), (1, 0, 2)]]
    legal = fp.LegalActions.from_lists(lists).distinct()
    masks = torch.tensor(
        [
            # primaries, then the values of the two slots
            [1, 1, 0, 0, 1, 0, 1, 1],
            [0, 1, 1, 0, 1, 1, 0, 1],
        ]
    ).bool()
    distribution = IndependentHeads(legal, torch.zeros(2, 8), masks, SPEC.nvec.tolist())
    draws = exactness.drawable(distribution, legal, SPEC)
    found = {
        (row, tuple(action)): (position, listed)
        for row, action, position, listed in zip(
            draws.rows.tolist(),
            draws.actions.tolist(),
            draws.position.tolist(),
            draws.listed.tolist(),
            strict=True,
        )
    }
    expected = {
        (0, (0, 0, 0)): (0, True),  # listed, though the masks leave no way to draw it
        (0, (0, 1, 1)): (0, False),
        (0, (0, 1, 2)): (0, False),
        (0, (1, 1, 1)): (1, True),
        (0, (1, 1, 2)): (-1, False),
        (1, (1, 1, 0)): (-1, False),
        (1, (1, 1, 2)): (-1, False),
        (1, (2, 1, 0)): (2, True),
        (1, (2, 1, 2)): (2, False),
        (1, (1, 0, 2)): (3, True),
    }
    assert len(draws.rows) == len(found)
    assert found == expected

    log_prob = exactness.log_probs(distribution, draws)
    q = exactness.played(log_prob, draws, legal)
    # Row 0 draws one of four, one of them illegal; row 1 one of four, two of them illegal.
    assert q.tolist() == pytest.approx([5 / 8, 3 / 8, 3 / 4, 1 / 4])


@pytest.mark.parametrize("name", ["flat", "fixed numbers"])
def test_one_categorical_over_the_list_tells_the_truth(name: str) -> None:
    head, hidden, entities = make(name)
    legal = legal_lists()
    figures = exactness.evaluate(
        head, hidden, entities, legal, exactness.made_up_advantages(legal, 1), SPEC
    )
    assert figures["entropy"] > 0.1
    for key in ("entropy bias", "entropy gradient bias", "policy gradient bias"):
        assert figures[key] == pytest.approx(0, abs=1e-5), key
    assert figures["not listed share"] == figures["illegal share"] == 0
    assert figures["entropy sd"] == pytest.approx(0, abs=1e-5)
    assert figures["entropy gradient variance"] == pytest.approx(0, abs=1e-5)
    assert figures["mass off by"] < 1e-6


def test_path_entropy_is_right_on_average_and_its_gradient_is_not() -> None:
    head, hidden, entities = make("autoregressive")
    legal = legal_lists()
    figures = exactness.evaluate(
        head, hidden, entities, legal, exactness.made_up_advantages(legal, 1), SPEC
    )
    assert figures["entropy bias"] == pytest.approx(0, abs=1e-5)
    assert figures["entropy sd"] > 0.01
    assert figures["entropy gradient bias"] > 0.01
    assert figures["policy gradient bias"] == pytest.approx(0, abs=1e-5)
    assert figures["mass off by"] < 1e-6

    head.path_entropy = False
    exact = exactness.evaluate(
        head, hidden, entities, legal, exactness.made_up_advantages(legal, 1), SPEC
    )
    assert exact["entropy gradient bias"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_is_played_is_what_drawing_and_replacing_gives(name: str) -> None:
    head, hidden, entities = make(name)
    legal = legal_lists()
    with torch.no_grad():
        distribution = head(hidden, entities, legal)
    draws = exactness.drawable(distribution, legal, SPEC)
    log_prob = exactness.log_probs(distribution, draws)
    q = exactness.played(log_prob, draws, legal)
    assert torch.allclose(exactness.row_sum(log_prob.exp(), draws.rows, len(LISTS)).float(), ONES)
    assert torch.allclose(exactness.row_sum(q, legal.rows, len(LISTS)).float(), ONES)

    torch.manual_seed(0)
    times = 100_000
    drawn = distribution.sample(torch.Size([times]))  # (S, B, H)
    for primary, used in USED.items():
        unused = torch.arange(3) > used
        drawn[(drawn[..., :1] == primary) & unused] = 0
    begin = 0
    for state, lists in enumerate(LISTS):
        tuples = torch.tensor(lists)
        same = (drawn[:, state].unsqueeze(1) == tuples).all(-1)  # (S, n)
        instead = torch.randint(len(lists), (times,))
        at = torch.where(same.any(1), same.int().argmax(1), instead)
        shares = torch.bincount(at, minlength=len(lists)).double() / times
        expected = q[begin : begin + len(lists)]
        begin += len(lists)
        # Six standard deviations of a share, and a draw for those that are all but certain.
        threshold = 6 * (expected * (1 - expected).clamp(min=0) / times).sqrt() + 1 / times
        assert ((shares - expected).abs() <= threshold).all(), (state, shares, expected)


@pytest.mark.parametrize("name", HEADS)
def test_a_sharpened_head_has_half_the_entropy_or_draws_with_half_of_it(name: str) -> None:
    head, hidden, entities = make(name, factor=1.0)
    legal = legal_lists()
    sharp, factor = exactness.sharpened(head, hidden, entities, legal, SPEC)
    advantages = exactness.made_up_advantages(legal, 1)
    found = exactness.evaluate(sharp, hidden, entities, legal, advantages, SPEC)["entropy"]
    uniform = legal.counts.double().log().mean().item()
    with torch.no_grad():
        first, now = (one(hidden, entities, legal).entropy().mean() for one in (head, sharp))
    reached = found == pytest.approx(0.5 * uniform, rel=0.01)
    assert factor > 1
    assert reached or (name in ILLEGAL and now.item() == pytest.approx(first.item() / 2, rel=0.01))


def test_advantages_are_centred_and_the_same_for_a_seed() -> None:
    legal = legal_lists()
    values = exactness.made_up_advantages(legal, 4)
    assert torch.equal(values, exactness.made_up_advantages(legal, 4))
    assert exactness.row_sum(values, legal.rows, len(LISTS)).abs().max() < 1e-12


def test_an_empty_list_is_refused() -> None:
    head, hidden, entities = make("flat")
    legal = fp.LegalActions.from_lists([*LISTS[:3], []], slots=2)
    with pytest.raises(ValueError, match=r"row 3: legal.counts is 0"):
        exactness.evaluate(head, hidden, entities, legal, torch.zeros(8).double(), SPEC)


def test_a_legal_tuple_with_something_in_an_unused_slot_is_refused() -> None:
    head, hidden, entities = make("masks per head")
    legal = fp.LegalActions.from_lists([*LISTS[:3], [(1, 1, 2), (2, 1, 2)]])
    with pytest.raises(ValueError, match=r"row 3: legal.actions has \(2, 1, 2\), .* set .* to 0"):
        exactness.evaluate(head, hidden, entities, legal, torch.zeros(10).double(), SPEC)


def test_report_and_picture_from_what_json_keeps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    legal = legal_lists()
    advantages = exactness.made_up_advantages(legal, 1)
    heads: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name in HEADS:
        figures = exactness.evaluate(*make(name), legal, advantages, SPEC)
        heads[name] = {kind: [figures] for kind in exactness.KINDS}
    results = {
        "states": 5,
        "policies": 1,
        "mean legal": 3.2,
        "uniform entropy": 1.0,
        "heads": heads,
    }
    kept = json.loads(json.dumps(results))
    report = exactness.report(kept)
    assert report.count("| masks per head | played |") == len(exactness.KINDS)
    assert "| flat | played |" not in report
    assert report.count("| head | not listed as drawn | illegal, unused slots ignored |") == 2
    of_masks = heads["masks per head"][exactness.KINDS[0]][0]
    shares = [f"{of_masks[key]:.1%}" for key in ("not listed share", "illegal share")]
    assert f"| masks per head | {shares[0]} | {shares[1]} |" in report
    assert "a slot that the primary does not use is ignored, as engines do" in report

    # Where no draw is illegal, some are still stored otherwise than they are played.
    of_masks["illegal share"] = 0.0
    assert "| masks per head | played |" in exactness.report(results)
    path = tmp_path / "exactness.png"
    exactness.draw(kept, path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert [one.name for one in tmp_path.iterdir()] == ["exactness.png"]
