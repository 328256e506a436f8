"""What a reader of the refactoring found: large specs, empty lists, odd policies."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.encoders import RunningNorm
from tcg_flatpolicy.puffer import FlatPolicy

LARGE = fp.ActionSpec([fp.Primary("a", fp.Index("x", 50_000), fp.Index("y", 3)), fp.Primary("end")])
DTYPE = np.dtype(
    [("x", np.float32, 3), ("legal", np.int32, (4, 3)), ("n", np.int32), ("first", np.int32)]
)
LAYOUT = fp.LegalLayout.from_dtype(DTYPE, "n", "legal", spec=LARGE)


def observed(lists: Any) -> torch.Tensor:
    data = np.zeros((len(lists), DTYPE.itemsize), np.uint8)
    LAYOUT.write(data, lists)
    return torch.as_tensor(data)


def test_a_large_table_of_learned_rows_compiles() -> None:
    policy = fp.FlatPolicy(spec=LARGE, layout=LAYOUT, hidden_size=8)
    compiled = torch.compile(policy, fullgraph=True, backend="aot_eager")
    data = observed([[(0, 40_000, 1), (1, 0, 0)], [], [(0, 3, 2)]])
    actions = torch.tensor([[0, 40_000, 1], [0, 0, 0], [0, 3, 2]])
    torch.testing.assert_close(
        compiled(data)[0].log_prob(actions), policy(data)[0].log_prob(actions)
    )


@pytest.mark.parametrize("lists", [[[], []], [[(1, 0, 0)], []], [[(0, 7, 1)], [(1, 0, 0)]]])
def test_the_autoregressive_head_knows_what_is_not_listed(lists: Any) -> None:
    head = fp.AutoregressiveHead(LARGE, 4)
    legal = fp.LegalActions.from_lists(lists, slots=2)
    dist = head(torch.randn(2, 4), {}, legal)
    asked = torch.tensor([[0, 5, 1], [0, 5, 1]])
    assert (dist.log_prob(asked) == -torch.inf).all()
    assert legal.contains(dist.sample()).all()


def test_wide_heads_and_entities_are_bound_whole() -> None:
    spec = fp.ActionSpec([fp.Primary("a", fp.Entity("unit", 2))])
    for width, size in ((2048, 5), (8, 1500)):
        head = fp.AutoregressiveHead(spec, 4, {"unit": (2, size)}, width)
        legal = fp.LegalActions.from_lists([[(0, 1), (0, 0)]] * 3)
        dist = head(torch.randn(3, 4), {"unit": torch.randn(3, 2, size)}, legal)
        assert legal.contains(dist.sample()).all()


@pytest.mark.parametrize("kind", [fp.FlatHead, fp.AutoregressiveHead])
def test_a_state_dict_of_another_spec_is_refused(kind: Any) -> None:
    def made(*ids: int) -> Any:
        return kind(fp.ActionSpec([fp.Primary(f"p{i}", fp.Index("x", 2), id=i) for i in ids]), 4)

    for one, other in (((0, 3), (0, 3, 5, 6)), ((0, 1, 2, 3, 4), (0, 1)), ((0, 3), (0, 3, 4))):
        with pytest.raises(RuntimeError, match="size mismatch"):
            made(*one).load_state_dict(made(*other).state_dict())


class Own(FlatPolicy):
    """With another LSTM, and a forward of its own."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.other = nn.LSTM(5, 6, 2)

    def forward(self, observations: torch.Tensor, state: Any = None, *, extra: int = 3) -> Any:
        assert extra == 3
        return super().forward(observations, state)


def test_a_subclass_keeps_what_is_its_own() -> None:
    policy = Own(spec=LARGE, layout=LAYOUT, hidden_size=8)
    assert type(policy.other) is nn.LSTM
    policy(observed([[(1, 0, 0)]]))


def test_no_rows_at_all_with_a_first_step() -> None:
    policy = fp.RecurrentPolicy(spec=LARGE, layout=LAYOUT, hidden_size=8, first_step="first")
    none = observed([[(1, 0, 0)]])[:0]
    assert policy.forward_eval(none, {})[1].shape == (0, 1)


def test_made_on_meta() -> None:
    norm = RunningNorm(3).to("meta").to_empty(device="cpu")
    norm.load_state_dict(RunningNorm(3).state_dict())
    assert norm(torch.ones(2, 3)).shape == (2, 3)
    with torch.device("meta"):
        fp.FlatPolicy(spec=LARGE, layout=LAYOUT, hidden_size=8)


def test_a_recurrent_policy_drops_what_the_one_it_takes_over_drops() -> None:
    flat = fp.FlatPolicy(spec=LARGE, layout=LAYOUT, hidden_size=8, invalid="drop")
    assert fp.RecurrentPolicy(None, flat).layout.dropped is not None


def test_the_gradient_of_the_primaries_is_their_own() -> None:
    head = fp.FlatHead(fp.ActionSpec.from_nvec([2, 3]), 4)
    legal = fp.LegalActions.from_lists([[(0, 1), (1, 2)]] * 20)
    head(torch.randn(20, 4), {}, legal).entropy().sum().backward()
    grad = head.scorer.primaries.grad
    assert grad.untyped_storage().nbytes() == grad.nbytes


def test_a_no_op_that_no_row_plays_may_be_beyond_the_size() -> None:
    legal = fp.LegalActions.from_lists([[(0, 2), (1, 0)]], noop=(3, 4))
    assert legal.prefix_mask(torch.tensor([[0]]), 3).tolist() == [[False, False, True]]
    assert [mask.tolist() for mask in legal.head_masks([2, 3])] == [
        [[True, True]],
        [[True, False, True]],
    ]
    with pytest.raises(ValueError, match="slot 1 holds value 4, not below its size 4"):
        fp.LegalActions.from_lists([[(0, 2)], []], noop=(0, 4)).prefix_mask(
            torch.ones(2, 1).int(), 4
        )


def test_rows_of_an_autoregressive_distribution_are_read_alone() -> None:
    head = fp.AutoregressiveHead(LARGE, 4)
    legal = fp.LegalActions.from_lists([[(0, 7, 1), (1, 0, 0)], [(0, 5, 2)], [(1, 0, 0)], []])
    hidden = torch.randn(4, 4)
    whole = head(hidden, {}, legal)
    hidden = hidden.clone()
    hidden[1] = torch.nan
    dist = head(hidden, {}, legal)
    actions = torch.tensor([[0, 7, 1], [0, 5, 2], [1, 0, 0], [0, 0, 0]])
    for rows in (torch.tensor([2, 0, 2, 3]), torch.tensor([True, False, True, True]), slice(2, 4)):
        part = dist[rows]
        torch.testing.assert_close(part.log_prob(actions[rows]), whole.log_prob(actions)[rows])
        assert part.legal.contains(part.sample()).all()
    with pytest.raises(ValueError, match="row 1: the logit of value 0 in slot 0 is nan"):
        dist[1:]


def test_exploration_set_in_inference_mode_can_be_learned_from() -> None:
    policy = fp.FlatPolicy(spec=LARGE, layout=LAYOUT, hidden_size=8)
    with torch.inference_mode():
        policy.explore(1.5, 0.1)
    assert not policy.exploration.numbers.is_inference()
    compiled = torch.compile(policy, fullgraph=True, backend="aot_eager")
    actions = torch.tensor([[0, 40_000, 1]])
    compiled(observed([[(0, 40_000, 1), (1, 0, 0)]]))[0].log_prob(actions).sum().backward()


def test_a_running_norm_leaves_out_what_is_not_finite() -> None:
    norm = RunningNorm(2)
    good = torch.tensor([[1.0, 20.0], [3.0, 60.0], [5.0, 70.0]])
    wrong = torch.tensor([[torch.nan, 50.0], [torch.inf, torch.nan], [7.0, -torch.inf]])
    with torch.no_grad():
        norm(torch.cat([good, wrong]))
    norm(good)
    with torch.no_grad():
        seen = norm(torch.tensor([[torch.nan, torch.inf], [4.0, 50.0]]))
    torch.testing.assert_close(norm.mean, torch.tensor([4.0, 50.0], dtype=torch.float64))
    deviations = torch.tensor([5.0, 350.0], dtype=torch.float64)  # of (1, 3, 5, 7), say
    torch.testing.assert_close(norm.scale, (deviations + 1e-5).rsqrt())
    torch.testing.assert_close(seen, torch.tensor([[torch.nan, 10.0], [0.0, 0.0]]), equal_nan=True)


def test_a_column_that_is_never_finite_keeps_its_scale() -> None:
    norm = RunningNorm(2)
    with torch.no_grad():
        norm(torch.tensor([[torch.inf, 1.0]]))
    norm(torch.zeros(1, 2))
    with torch.no_grad():
        assert norm(torch.tensor([[3.0, 1.0]])).tolist() == [[3.0, 0.0]]


def test_a_face_is_freed_without_the_garbage_collector() -> None:
    policy = fp.FlatPolicy(spec=LARGE, layout=LAYOUT, hidden_size=8)
    face, _ = policy(observed([[(1, 0, 0)]]))
    alive = [weakref.ref(face), weakref.ref(face.distribution)]
    gc.disable()
    try:
        del face
        assert [one() for one in alive] == [None, None]
    finally:
        gc.enable()


def test_draws_of_a_distribution_count_after_its_face_is_gone() -> None:
    policy = fp.FlatPolicy(spec=LARGE, layout=LAYOUT, hidden_size=8)
    data = observed([[(1, 0, 0)]])
    actions = policy.forward_eval(data)[0].distribution.sample()
    policy.explore(2.0)
    with pytest.raises(RuntimeError, match="between rollout and update"):
        policy(data)[0].log_prob(actions)


def test_a_copy_between_encode_and_decode_has_no_batch_that_waits() -> None:
    policy = fp.FlatPolicy(spec=LARGE, layout=LAYOUT, hidden_size=8)
    hidden = policy.encode_observations(observed([[(1, 0, 0)]]))
    twin = copy.deepcopy(policy)
    with pytest.raises(RuntimeError, match="needs encode_observations"):
        twin.decode_actions(hidden)
    wanted = policy.decode_actions(hidden)[1]
    twin.encode_observations(observed([[(1, 0, 0)]]))
    torch.testing.assert_close(twin.decode_actions(hidden)[1], wanted)
