"""A kind of role of the test suite's own: six lines, and everything of the library knows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy import testing
from tcg_flatpolicy.export import export_program
from tcg_flatpolicy.heads import HEADS
from tests.test_export import layout_for


class Amount(fp.Role):
    """A quantity: near values have near vectors."""

    rows = 3

    def weights(self, values: Tensor) -> Tensor:
        x = values / self.size
        return torch.stack([x, x * x, torch.ones_like(x)], dim=-1)


class Placed(fp.Role):
    """A thing that the encoder embeds, in words of its own."""

    encoded = True

    def describe(self, value: int) -> str:
        return f"the {self.name} at {value}"


SPEC = fp.ActionSpec(
    [
        fp.Primary("fold"),
        fp.Primary("bet", Amount("chips", 200), fp.Index("how", 2)),
        fp.Primary("move", fp.OneOf(fp.Index("none", 1), Amount("chips", 100), Placed("unit", 3))),
        fp.Primary("pay", Amount("chips", 200), Amount("days", 5), id=7),
    ]
)
SIZES = {"unit": (4, 5)}
LAYOUT = layout_for(SPEC)


def legal_of(lists: Any) -> fp.LegalActions:
    return fp.LegalActions.from_lists(lists, slots=2)


def inputs(rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(rows, 6), {"unit": torch.randn(rows, *SIZES["unit"])}


def head_of(name: str) -> Any:
    torch.manual_seed(0)
    head = HEADS[name](SPEC, 6, SIZES, 8)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(3)
    return head


@pytest.mark.parametrize("name", HEADS)
def test_near_values_have_near_scores_and_far_ones_do_not(name: str) -> None:
    head = head_of(name)
    hidden, entities = inputs(1)
    dist = head(hidden, entities, legal_of([[(1, value, 0) for value in range(200)]]))
    actions = torch.tensor([[[1, value, 0]] for value in range(200)])
    log_probs = dist.log_prob(actions)[:, 0]
    steps = log_probs.diff().abs()
    spread = log_probs.max() - log_probs.min()
    assert spread > 0.05
    assert steps.max() < 0.05 * spread
    plain = fp.ActionSpec([fp.Primary("bet", fp.Index("chips", 200))])
    control = HEADS[name](plain, 6, {}, 8)
    dist = control(hidden, {}, fp.LegalActions.from_lists([[(0, v) for v in range(200)]]))
    log_probs = dist.log_prob(actions[..., :2] - torch.tensor([1, 0]))[:, 0]
    assert log_probs.diff().abs().max() > 0.2 * (log_probs.max() - log_probs.min())


@pytest.mark.parametrize("name", HEADS)
def test_roles_of_one_class_and_name_share_what_is_learned(name: str) -> None:
    if name != "flat":
        pytest.skip("the autoregressive head has learned keys of each slot")
    head = head_of(name)
    assert len(head.scorer.embeddings) == 2 + 3 + 1 + 3  # how, chips, none, days
    hidden, entities = inputs(1)
    legal = legal_of([[(1, 20, 1), (2, 21, 0), (7, 20, 3)]])
    scores = head.scorer(hidden, entities, legal)
    (grad,) = torch.autograd.grad(scores.square().sum(), head.scorer.embeddings)
    assert (grad.abs().sum(1) > 0).sum() == 1 + 3 + 3  # no tuple holds "none" or how 0


@pytest.mark.parametrize("name", HEADS)
@given(st.data())
def test_the_packed_and_the_padded_form_agree(name: str, data: st.DataObject) -> None:
    head = head_of(name).double()
    lists = data.draw(testing.legal_lists(SPEC, max_rows=3, repeats=False))
    hidden, entities = inputs(len(lists))
    hidden, entities = hidden.double(), {name: one.double() for name, one in entities.items()}
    longest = max((len(row) for row in lists), default=0)
    tuples = torch.zeros(len(lists), longest, 3, dtype=torch.int64)
    listed = torch.zeros(len(lists), longest, dtype=torch.bool)
    for row, actions in enumerate(lists):
        for place, action in enumerate(actions):
            tuples[row, place], listed[row, place] = torch.tensor(action), True
    if not longest:
        return
    scores = head.padded(hidden, entities, tuples, listed)
    log_probs = scores.masked_fill(~listed, -torch.inf).log_softmax(1)
    dist = head(hidden, entities, legal_of(lists))
    got = dist.log_prob(tuples.transpose(0, 1)).t()
    torch.testing.assert_close(got[listed], log_probs[listed], rtol=1e-9, atol=1e-9)


class Encoder(nn.Module):
    hidden_size = 6
    entity_sizes = SIZES

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(25, 6 + 20)

    def forward(self, observations: Tensor) -> fp.Encoding:
        numbers = LAYOUT.field(observations, "numbers").float().flatten(1)
        hidden, things = self.net(numbers).split([6, 20], dim=1)
        return fp.Encoding(hidden, {"unit": things.reshape(-1, 4, 5)})


def batch() -> Tensor:
    data = np.zeros((3, LAYOUT.dtype.itemsize), np.uint8)
    LAYOUT.write(data, [[(1, 150, 1), (2, 0, 0), (2, 103, 0)], [], [(0, 0, 0), (7, 199, 4)]])
    observations = torch.as_tensor(data)
    LAYOUT.field(observations, "numbers").copy_(
        torch.randn(3, *LAYOUT.field(observations, "numbers").shape[1:])
    )
    return observations


@pytest.mark.parametrize("name", HEADS)
def test_a_policy_with_it_is_exported(name: str) -> None:
    torch.manual_seed(0)
    numbers = LAYOUT.field(
        torch.as_tensor(np.zeros((1, LAYOUT.dtype.itemsize), np.uint8)), "numbers"
    )
    encoder = Encoder()
    encoder.net = nn.Linear(numbers.numel(), 26)
    policy = fp.Policy(spec=SPEC, layout=LAYOUT, encoder=encoder, head=name, width=8)
    export_program(policy, batch())  # which compares them


@pytest.mark.parametrize("name", HEADS)
def test_a_state_dict_of_it_loads_and_a_copy_on_meta_too(name: str) -> None:
    head = head_of(name)
    with torch.device("meta"):
        other: Any = HEADS[name](SPEC, 6, SIZES, 8)
    other = other.to_empty(device="cpu")
    other.load_state_dict(head.state_dict())
    hidden, entities = inputs(1)
    legal = legal_of([[(1, 20, 1), (2, 102, 0), (7, 20, 3)]])
    actions = torch.tensor([[[1, 20, 1]], [[2, 102, 0]]])
    expected = head(hidden, entities, legal).log_prob(actions)
    torch.testing.assert_close(other(hidden, entities, legal).log_prob(actions), expected)
    with torch.device("meta"):
        assigned: Any = HEADS[name](SPEC, 6, SIZES, 8)
    assigned.load_state_dict(head.state_dict(), assign=True)
    torch.testing.assert_close(assigned(hidden, entities, legal).log_prob(actions), expected)


def test_words() -> None:
    assert SPEC.describe((1, 150, 1)) == "bet(chips[150], how[1])"
    assert SPEC.describe((2, 102, 0)) == "move(the unit at 1)"
    assert SPEC.explain((1, 200, 0)) == "slot 1: 200 is outside 0..199, the range of chips of bet"


@given(st.data())
def test_strategies_make_it(data: st.DataObject) -> None:
    spec = data.draw(testing.specs(kinds=[Amount, Placed]))
    kinds = {type(part.role) for part in spec.parts}
    assert kinds <= {Amount, Placed}
    for action in data.draw(testing.legal_lists(spec)):
        assert all(spec.explain(one) is None for one in action)


def test_weights_of_another_shape_are_refused() -> None:
    class Wrong(fp.Role):
        rows = 2

        def weights(self, values: Tensor) -> Tensor:
            return torch.ones(len(values), 3)

    spec = fp.ActionSpec([fp.Primary("a", Wrong("x", 4))])
    with pytest.raises(ValueError, match=r"Wrong\('x'\)\.weights gave \(4, 3\) .* \(4, 2\)"):
        fp.FlatHead(spec, 6)
