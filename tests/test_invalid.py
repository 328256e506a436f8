"""Listed tuples outside the spec, dropped, counted and warned of."""

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pufferlib.vector
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tcg_flatpolicy as fp
from tcg_flatpolicy import ActionSpec, Index, LegalLayout, Primary
from tcg_flatpolicy.invalid import Dropped, InvalidActionWarning
from tests.games import CARDS, Bandit, BanditEncoder
from tests.strategies import PLACEMENTS, Action, Lists, placed

SPEC = ActionSpec([Primary("rest"), Primary("hit", Index("at", 3)), Primary("cast", id=5)])
DTYPE = np.dtype([("hp", "u1"), ("n", "u1"), ("legal", "i2", (8, 2)), ("more", "i8")], align=True)
BARE = LegalLayout.from_dtype(DTYPE, "n", "legal")
WITHIN: list[Action] = [(0, 0), (1, 0), (1, 1), (1, 2), (5, 0)]


def shown(lists: list[list[Action]]) -> torch.Tensor:
    """By NumPy, since write refuses negative numbers."""
    records = np.zeros(len(lists), DTYPE)
    for row, actions in enumerate(lists):
        records["n"][row] = len(actions)
        for place, action in enumerate(actions):
            records["legal"][row, place] = action
    return torch.from_numpy(records.view(np.uint8).reshape(len(lists), DTYPE.itemsize))


def read_quietly(layout: LegalLayout, observations: torch.Tensor) -> Lists:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InvalidActionWarning)
        return layout.read(observations).to_lists()


ANY = st.tuples(st.integers(-2, 7), st.integers(-2, 4))


@given(st.lists(st.lists(ANY, max_size=8), max_size=5), st.sampled_from(PLACEMENTS[:3]))
def test_what_is_left_is_what_is_within_the_spec(lists: list[list[Action]], how: str) -> None:
    dropped = Dropped()
    layout = BARE.with_spec(SPEC, dropped)
    observations = placed(shown(lists), how)
    kept = [[action for action in row if action in WITHIN] for row in lists]
    emptied = [row for row, left in enumerate(kept) if lists[row] and not left]
    if emptied:
        words = (
            rf"^row {emptied[0]}: legal tuple 0 is \({lists[emptied[0]][0][0]}, .*nothing else in"
        )
        with pytest.raises(ValueError, match=words):
            read_quietly(layout, observations)
        assert dropped.count == 0
        return
    assert read_quietly(layout, observations) == kept
    outside = [action for row in lists for action in row if action not in WITHIN]
    assert dropped.count == len(outside)
    assert dropped.kinds == {
        (primary, 0 if primary not in (0, 1, 5) else 1) for primary, _ in outside
    }
    if outside:
        with pytest.raises(ValueError, match="legal tuple"):
            BARE.with_spec(SPEC).read(observations)


@pytest.mark.usefixtures("each_kernel")
def test_each_kind_is_warned_of_once_with_row_and_tuple() -> None:
    dropped = Dropped()
    layout = BARE.with_spec(SPEC, dropped)
    observations = shown([[(0, 0)], [(1, 3), (0, 0), (1, 4), (3, 0)]])
    with pytest.warns(InvalidActionWarning) as caught:
        legal = layout.read_distinct(observations)
    assert legal.to_lists() == [[(0, 0)], [(0, 0)]]
    assert legal.counts.tolist() == [1, 1]
    assert legal.rows.tolist() == [0, 1]
    assert legal.starts.tolist() == [0, 1]
    told = [str(one.message) for one in caught]
    assert len(told) == 2
    assert told[0].startswith(
        "row 1: legal tuple 0 is (1, 3); slot 1: 3 is outside 0..2, the range of at of hit. It is"
    )
    assert told[1].startswith(
        "row 1: legal tuple 3 is (3, 0); slot 0 (primary): 3 is not a primary"
    )
    layout.read(observations)  # a warning would be an error here
    with pytest.warns(InvalidActionWarning, match="does not use this slot"):
        layout.read(shown([[(0, 0), (0, 7)]]))
    assert dropped.count == 3 + 3 + 1


def test_a_count_that_cannot_be_still_raises() -> None:
    observations = shown([[(0, 0)]])
    observations[0, 1] = 9
    with pytest.raises(ValueError, match="n says 9 legal actions"):
        BARE.with_spec(SPEC, Dropped()).read(observations)


@pytest.mark.usefixtures("each_kernel")
def test_each_counts_its_own_also_copied_and_unpickled() -> None:
    layout = BARE.with_spec(SPEC, Dropped())
    others = [BARE.with_spec(SPEC, Dropped()), copy.deepcopy(layout)]
    others.append(pickle.loads(pickle.dumps(layout)))
    observations = shown([[(0, 0), (9, 9)]])
    for number, one in enumerate([layout, *others]):
        with pytest.warns(InvalidActionWarning):
            one.read(observations)
        counts = [other.dropped.count for other in [layout, *others] if other.dropped is not None]
        assert counts == [1] * (number + 1) + [0] * (3 - number)
    assert len({one.handle for one in [BARE.with_spec(SPEC), layout, *others]}) == 5


def test_layouts_that_drop_nothing_share_a_handle() -> None:
    one = BARE.with_spec(SPEC)
    assert one.handle == BARE.with_spec(SPEC).handle == copy.deepcopy(one).handle != BARE.handle


def test_no_layout_is_kept_for_having_dropped() -> None:
    from tcg_flatpolicy import layout as module

    before = len(module._LAYOUTS)
    for _ in range(5):
        BARE.with_spec(SPEC, Dropped())
    assert len(module._LAYOUTS) <= before + 1


@pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9),
    reason="compiled policies need torch 2.9",
)
def test_in_a_compiled_graph_each_counts_its_own() -> None:
    torch._dynamo.reset()
    layouts = [BARE.with_spec(SPEC, Dropped()) for _ in range(3)]

    def tuples(layout: LegalLayout, observations: torch.Tensor) -> torch.Tensor:
        return layout.read_distinct(observations).actions + layout.read(observations).actions

    compiled = torch.compile(tuples, fullgraph=True, backend="aot_eager")
    observations = shown([[(0, 0), (9, 9), (1, 2)], []])
    for number, layout in enumerate(layouts):
        for _ in range(number + 1):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert compiled(layout, observations).tolist() == [[0, 0], [2, 4]]
            told = [one for one in caught if one.category is InvalidActionWarning]
            assert len(told) <= 1
    assert [layout.dropped.count for layout in layouts if layout.dropped] == [2, 4, 6]
    with pytest.raises(ValueError, match=r"row 0: .*nothing else in the row's list"):
        compiled(layouts[0], shown([[(9, 9)]]))
    torch._dynamo.reset()


class Overfull(Bandit):
    """An engine with a bug: now and then it lists a card that is not shown."""

    listed = 0

    def deal(self) -> None:
        super().deal()
        for row in np.flatnonzero(self.rng.random(self.num_agents) < 0.2):
            count = int(self.records["n"][row])
            if 0 < count < self.records["legal"].shape[1]:
                self.records["legal"][row, count] = (2, CARDS + 3, 0)
                self.records["n"][row] += 1
                self.listed += 1


@pytest.mark.integration
@pytest.mark.parametrize("head", ["flat", "autoregressive"])
def test_a_run_goes_on_though_the_engine_lists_what_cannot_be(trainers: Any, head: str) -> None:
    vecenv = pufferlib.vector.make(
        Overfull, env_kwargs={"num_agents": 16}, backend=pufferlib.vector.Serial, num_envs=1
    )
    env = vecenv.driver_env
    encoder = BanditEncoder(env.legal_layout)
    torch.manual_seed(0)
    policy = fp.Policy(env, encoder=encoder, head=head, invalid="drop")
    assert policy.dropped == 0
    trainer = trainers(vecenv, policy)

    def train() -> None:
        for _ in range(2):
            trainer.evaluate()
            trainer.train()

    with pytest.warns(InvalidActionWarning, match=r"row \d+: legal tuple \d+ is \(2, ") as caught:
        train()
    assert len([one for one in caught if one.category is InvalidActionWarning]) == 1
    assert env.listed > 10
    assert policy.dropped >= env.listed  # once in the rollout and once in the update
    assert env.illegal_actions == 0
    strict = fp.Policy(env, encoder=encoder, head=head)
    listed = env.listed
    while env.listed == listed:
        env.deal()
    with pytest.raises(ValueError, match=r"row \d+: legal tuple \d+ is \(2, "):
        strict.forward_eval(torch.as_tensor(env.observations))
    with pytest.raises(ValueError, match="invalid must be 'raise' or 'drop', got 'ignore'"):
        fp.FlatPolicy(env, encoder=encoder, invalid="ignore")
