"""The scorer: against a slow reference, and what it can and cannot express."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tcg_flatpolicy as fp
from tcg_flatpolicy.scorer import TupleScorer
from tcg_flatpolicy.spec import Part

SPEC = fp.ActionSpec(
    [
        fp.Primary("end_turn"),
        fp.Primary("attack", fp.Entity("ally", 3), fp.Entity("enemy", 4)),
        fp.Primary(
            "ability",
            fp.Entity("ally", 3),
            fp.Index("which", 2),
            fp.OneOf(fp.Index("none", 1), fp.Entity("enemy", 4), fp.Entity("ally", 3)),
        ),
        fp.Primary("discard", fp.Index("which", 5), id=5),
    ]
)
SIZES = {"ally": (3, 6), "enemy": (5, 4)}  # one more enemy than the spec points at


def legal_of(seed: int, rows: int, most: int) -> fp.LegalActions:
    random = torch.Generator().manual_seed(seed)
    lists = []
    for _ in range(rows):
        actions = set()
        for _ in range(int(torch.randint(0, most + 1, (1,), generator=random))):
            primary = list(SPEC.primaries)[int(torch.randint(0, 4, (1,), generator=random))]
            limits = SPEC.limits[primary, 1:].tolist()
            slots = [int(torch.randint(0, n, (1,), generator=random)) for n in limits]
            actions.add((primary, *slots))
        lists.append(sorted(actions))
    return fp.LegalActions.from_lists(lists, slots=3)


def inputs(rows: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 7, generator=random)
    entities = {k: torch.randn(rows, *size, generator=random) for k, size in SIZES.items()}
    return hidden, entities


def reference(
    scorer: TupleScorer, hidden: Tensor, entities: dict[str, Tensor], legal: fp.LegalActions
) -> Tensor:
    """One tuple at a time, straight from the formula."""
    begins = {"which": 0, "none": 5}  # tables in order of first use, each as long as its longest
    width = len(scorer.readout)
    names = list(dict.fromkeys(p.role.name for p in SPEC.parts if isinstance(p.role, fp.Entity)))

    def projection(part: Part) -> Tensor:
        """Those of the parts that share a name stand side by side."""
        sharing = [other for other in SPEC.parts if other.role.name == part.role.name]
        matrix = scorer.index_projections
        if isinstance(part.role, fp.Entity):
            matrix = scorer.entity_projections[names.index(part.role.name)]
        before = 0
        if part.role.name == "none":
            before = sum(other.role.name == "which" for other in SPEC.parts)
        return matrix.split(width, dim=1)[before + sharing.index(part)]

    scores = []
    for row, action in zip(legal.rows.tolist(), legal.actions.tolist(), strict=True):
        state = scorer.state(hidden[row])
        x = state + scorer.primaries[list(SPEC.primaries).index(action[0])]
        for part in SPEC.parts:
            value = action[1 + part.slot] - part.start
            if part.primary != action[0] or not 0 <= value < part.role.size:
                continue
            if isinstance(part.role, fp.Index):
                x = x + scorer.embeddings[begins[part.role.name] + value] @ projection(part)
            else:
                x = x + entities[part.role.name][row, value] @ projection(part)
        scores.append(torch.relu(x) @ (scorer.readout + state @ scorer.readout_of_state))
    return torch.stack(scores) if scores else torch.zeros(0)


@given(st.integers(0, 10_000), st.integers(0, 6), st.integers(0, 12))
def test_scores_and_gradients_are_the_reference_s(seed: int, rows: int, most: int) -> None:
    torch.manual_seed(seed)
    scorer = TupleScorer(SPEC, 7, SIZES, width=5, embedding_size=3).double()
    legal = legal_of(seed, rows, most)
    hidden, entities = inputs(rows, seed)
    leaves = [
        hidden.double().requires_grad_(),
        *(v.double().requires_grad_() for v in entities.values()),
    ]
    named = dict(zip(entities, leaves[1:], strict=True))
    parameters = list(scorer.parameters())
    scores = scorer(leaves[0], named, legal)
    expected = reference(scorer, leaves[0], named, legal)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, expected.double(), rtol=1e-10, atol=1e-10)
    weights = torch.linspace(-1, 1, len(scores), dtype=torch.float64)
    got = torch.autograd.grad((scores * weights).sum(), [*leaves, *parameters])
    wanted = (
        torch.autograd.grad((expected * weights).sum(), [*leaves, *parameters], allow_unused=True)
        if len(scores)
        else [None] * len(got)
    )
    for a, b in zip(got, wanted, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_pieces_of_a_large_batch_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    from tcg_flatpolicy import scorer as module

    legal = legal_of(1, 40, 12)
    hidden, entities = inputs(40)
    hidden.requires_grad_()
    scorer = TupleScorer(SPEC, 7, SIZES, width=5)
    whole = scorer(hidden, entities, legal)
    (grad,) = torch.autograd.grad(whole.square().sum(), hidden)
    monkeypatch.setattr(module, "PIECE", 7)
    pieces = scorer(hidden, entities, legal)
    (grad_pieces,) = torch.autograd.grad(pieces.square().sum(), hidden)
    torch.testing.assert_close(whole, pieces)
    torch.testing.assert_close(grad, grad_pieces)


def test_every_parameter_takes_part_without_a_legal_tuple() -> None:
    scorer = TupleScorer(SPEC, 7, SIZES)
    hidden, entities = inputs(3)
    legal = fp.LegalActions.from_lists([[], [], []], slots=3)
    scorer(hidden, entities, legal).sum().backward()
    for name, parameter in scorer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_permuting_entities_together_with_the_indices_changes_no_score() -> None:
    scorer = TupleScorer(SPEC, 7, SIZES, width=16)
    legal = legal_of(3, 20, 12)
    hidden, entities = inputs(20)
    order = torch.tensor([2, 0, 1])  # ally i moves to place order[i]
    moved = {**entities, "ally": torch.empty_like(entities["ally"])}
    moved["ally"][:, order] = entities["ally"]
    actions = legal.actions.clone()
    points = (actions[:, 0] == 1) | (actions[:, 0] == 2)
    actions[points, 1] = order[actions[points, 1]]
    ally_target = (actions[:, 0] == 2) & (actions[:, 3] >= 5)
    actions[ally_target, 3] = 5 + order[actions[ally_target, 3] - 5]
    renamed = fp.LegalActions(actions, legal.counts)
    torch.testing.assert_close(
        scorer(hidden, entities, legal), scorer(hidden, moved, renamed), rtol=1e-5, atol=1e-6
    )


PAIRS = fp.ActionSpec([fp.Primary("link", fp.Entity("unit", 6), fp.Entity("unit", 6))])


class Additive(torch.nn.Module):
    """The control: one embedding a thing, whatever its slot, and no meeting under a relu."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(4, 64)
        self.unit = torch.nn.Linear(16, 64)
        self.readout = torch.nn.Linear(64, 1)

    def forward(
        self, hidden: Tensor, entities: dict[str, Tensor], legal: fp.LegalActions
    ) -> Tensor:
        units = self.unit(entities["unit"])
        pair = units[legal.rows, legal.actions[:, 1]] + units[legal.rows, legal.actions[:, 2]]
        return self.readout(torch.relu(pair + self.hidden(hidden)[legal.rows])).squeeze(1)


def fit(model: torch.nn.Module) -> float:
    """R² of a random table over ordered pairs of one entity set, a different one in each state."""
    random = torch.Generator().manual_seed(7)
    states = 8
    hidden = torch.randn(states, 4, generator=random)
    entities = {"unit": torch.randn(states, 6, 16, generator=random)}
    pairs = [(0, i, j) for i, j in itertools.product(range(6), repeat=2)]
    legal = fp.LegalActions.from_lists([pairs] * states)
    target = torch.randn(states * 36, generator=random)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        loss = (model(hidden, entities, legal) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return 1.0 - float(loss.detach() / target.var(correction=0))


def test_a_random_table_over_ordered_pairs_is_fitted_and_an_additive_control_fails() -> None:
    torch.manual_seed(0)
    assert fit(TupleScorer(PAIRS, 4, {"unit": (6, 16)}, width=64)) > 0.99
    assert fit(Additive()) < 0.7  # it cannot tell (i, j) from (j, i): half of the variance


def test_untrained_policies_are_near_uniform() -> None:
    scorer = TupleScorer(SPEC, 7, SIZES)
    hidden, entities = inputs(200)
    legal = legal_of(4, 200, 12)
    entropy = fp.LegalCategorical(legal, scorer(hidden, entities, legal)).entropy()
    uniform = legal.counts.clamp(min=1).log()
    assert (uniform - entropy).mean() < 0.05


def test_entities_that_the_encoder_does_not_embed() -> None:
    with pytest.raises(
        ValueError, match=r"'attack' points at Entity\('ally'\).*embeds \['enemy'\]"
    ):
        TupleScorer(SPEC, 7, {"enemy": (4, 4)})
    with pytest.raises(ValueError, match=r"points at 4 of Entity\('enemy'\).*embeds only 3"):
        TupleScorer(SPEC, 7, {"ally": (3, 6), "enemy": (3, 4)})
    with pytest.raises(ValueError, match="no entities"):
        TupleScorer(SPEC, 7)


def test_inputs_of_another_shape_than_declared() -> None:
    scorer = TupleScorer(SPEC, 7, SIZES)
    legal = legal_of(1, 3, 4)
    hidden, entities = inputs(3)
    with pytest.raises(ValueError, match=r"hidden must be \(3, 7\), got \(3, 6\)"):
        scorer(hidden[:, :6], entities, legal)
    with pytest.raises(ValueError, match=r"entities\['ally'\] must be \(3, 3, 6\)"):
        scorer(hidden, {**entities, "ally": entities["ally"][:, :2]}, legal)
    with pytest.raises(ValueError, match="gave no entities 'enemy'"):
        scorer(hidden, {"ally": entities["ally"]}, legal)


def test_torch_func_has_gradients_and_no_vmap() -> None:
    scorer = TupleScorer(SPEC, 7, SIZES, width=5)
    legal = legal_of(1, 3, 5)
    hidden, entities = inputs(3)
    grad = torch.func.grad(lambda h: scorer(h, entities, legal).square().sum())(hidden)
    hidden.requires_grad_()
    (wanted,) = torch.autograd.grad(scorer(hidden, entities, legal).square().sum(), hidden)
    torch.testing.assert_close(grad, wanted)
    with pytest.raises(RuntimeError, match=r"cannot be inside torch\.vmap.*as one batch"):
        torch.vmap(lambda h: scorer(h, entities, legal))(torch.zeros(2, 3, 7))


@pytest.mark.parametrize("whole", [0, 2**14])
def test_parts_that_are_held_whole_and_parts_that_are_not_at_all(
    whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All things of one part and none of another that shares its projections; all of all."""
    from tcg_flatpolicy import table

    monkeypatch.setattr(table, "WHOLE", whole)
    torch.manual_seed(0)
    scorer = TupleScorer(SPEC, 7, {"ally": (3, 6), "enemy": (4, 4)}, width=5).double()
    every = [
        (primary, *slots)
        for primary, limits in enumerate(SPEC.limits.tolist())
        if limits[0]
        for slots in itertools.product(*map(range, limits[1:]))
    ]
    some = [action for action in every if action[0] == 1]
    for lists in ([some], [some, some], [every], [every, every], [[(5, 4, 0, 0)]]):
        legal = fp.LegalActions.from_lists(lists, slots=3)
        hidden, entities = inputs(len(lists))
        leaves = [hidden.double(), entities["ally"].double(), entities["enemy"][:, :4].double()]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        named = {"ally": leaves[1], "enemy": leaves[2]}
        both = scorer(leaves[0], named, legal), reference(scorer, leaves[0], named, legal)
        torch.testing.assert_close(both[0], both[1], rtol=1e-10, atol=1e-10)
        weights = torch.linspace(-1, 1, len(both[0]), dtype=torch.float64)
        wanted = [*leaves, *scorer.parameters()]
        grads = [
            torch.autograd.grad(
                (one * weights).sum(), wanted, allow_unused=True, materialize_grads=True
            )
            for one in both
        ]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
