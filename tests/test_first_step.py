"""A recurrent policy forgets where a game begins: in rollout, update, evaluation and export."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np
import pufferlib
import pufferlib.vector
import pytest
import torch

import tcg_flatpolicy as fp
from tcg_flatpolicy.export import PaddedPolicy, export_program

pytestmark = pytest.mark.integration

SPEC = fp.ActionSpec.from_nvec([3, 2])
DTYPE = np.dtype(
    [
        ("seen", np.float32, 4),
        ("turn", [("number", np.int16), ("first", np.uint8)]),
        ("legal", np.uint8, (6, 2)),
        ("n", np.uint8),
    ],
    align=True,
)
EVERY = [(i, j) for i in range(3) for j in range(2)]


class Games(pufferlib.PufferEnv):
    """Games of random length; each row ends on its own."""

    first_step: str | None = "turn.first"

    def __init__(self, num_agents: int = 8, buf: Any = None, seed: int = 0) -> None:
        self.action_spec = SPEC
        self.legal_layout = fp.LegalLayout.from_dtype(DTYPE, "n", "legal", spec=SPEC)
        self.single_observation_space = gymnasium.spaces.Box(0, 255, (DTYPE.itemsize,), np.uint8)
        self.single_action_space = SPEC.action_space
        self.num_agents = num_agents
        self.rng = np.random.default_rng(seed)
        super().__init__(buf)
        self.records = self.observations.view(DTYPE)[:, 0]
        self.begins = 0

    def show(self, first: np.ndarray) -> None:
        self.records["seen"] = self.rng.normal(size=(self.num_agents, 4))
        self.records["turn"]["first"] = first
        self.begins += int(first.sum())
        lists = [[a for a in EVERY if self.rng.random() < 0.6] for _ in range(self.num_agents)]
        self.legal_layout.write(self.observations, lists)

    def reset(self, seed: int | None = None) -> Any:
        self.show(np.ones(self.num_agents, bool))
        return self.observations, []

    def step(self, actions: np.ndarray) -> Any:
        self.rewards[:] = self.rng.normal(size=self.num_agents)
        self.terminals[:] = self.rng.random(self.num_agents) < 0.3
        self.truncations[:] = False
        self.show(self.terminals.copy())
        return self.observations, self.rewards, self.terminals, self.truncations, []

    def close(self) -> None: ...


class Unmarked(Games):
    first_step = None


def make(kind: type[Games], **arguments: Any) -> tuple[Any, fp.RecurrentPolicy]:
    vecenv = pufferlib.vector.make(kind, backend=pufferlib.vector.Serial, num_envs=1)
    torch.manual_seed(0)
    policy = fp.RecurrentPolicy(vecenv.driver_env, hidden_size=16, **arguments)
    with torch.no_grad():
        for weight in policy.lstm.parameters():
            weight.add_(torch.randn_like(weight) * 0.5)
    return vecenv, policy


@pytest.mark.parametrize("head", ["flat", "autoregressive"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_games_that_begin_within_a_segment_leave_the_ratio_at_one(
    trainers: Any, head: str, precision: str
) -> None:
    vecenv, policy = make(Games, head=head)
    assert policy.first_step == "turn.first"
    trainer = trainers(vecenv, policy, use_rnn=True, learning_rate=0.0, precision=precision)
    for _ in range(2):
        trainer.evaluate()
        trainer.train()
        off = (trainer.ratio - 1).abs().max()
        assert off < (1e-5 if precision == "float32" else 1e-2)
    assert vecenv.driver_env.begins > 20


@pytest.mark.usefixtures("each_kernel")
def test_the_memory_is_that_of_the_game_alone() -> None:
    """What came before a game's first step changes nothing; without the field it does."""
    for kind, same in ((Games, True), (Unmarked, False)):
        _, policy = make(kind)
        env = kind()
        env.reset()
        segment = torch.stack([torch.tensor(env.step(None)[0]) for _ in range(6)], dim=1)
        layout = policy.layout
        for row in range(6):
            flag = layout.field(segment[:, row].contiguous(), "turn.first").clone()
            data = segment[:, row].contiguous()
            layout.field(data, "turn.first").copy_(torch.full_like(flag, int(row == 3)))
            segment[:, row] = data
        other = segment.clone()
        other[:, :3] = segment[:, :3].flip(0)
        with torch.no_grad():
            one, other_one = policy.distribution(segment), policy.distribution(other)
        assert one[0].batch_shape == (8 * 6,)
        assert one[1].shape == (8, 6)
        assert torch.allclose(one[1][:, 3:], other_one[1][:, 3:]) == same


@pytest.mark.usefixtures("each_kernel")
def test_rollout_and_segments_agree() -> None:
    _, policy = make(Games)
    env = Games()
    env.reset()
    steps = [torch.tensor(env.step(None)[0]) for _ in range(7)]
    state: dict[str, Any] = {}
    with torch.no_grad():
        one_by_one = [policy.distribution(step, state) for step in steps]
        whole, values = policy.distribution(torch.stack(steps, dim=1))
    torch.testing.assert_close(values, torch.cat([value for _, value in one_by_one], dim=1))
    logits = [policy_step.logits for policy_step, _ in one_by_one]
    torch.testing.assert_close(whole.logits.sum(), torch.cat(logits).sum())


def test_compiled_it_gives_the_same() -> None:
    _, policy = make(Games)
    env = Games()
    env.reset()
    segment = torch.stack([torch.tensor(env.step(None)[0]) for _ in range(5)], dim=1)
    compiled = torch.compile(policy, fullgraph=True, backend="aot_eager")
    face, values = compiled(segment)
    expected, wanted = policy(segment)
    torch.testing.assert_close(values, wanted)
    torch.testing.assert_close(face.distribution.logits, expected.distribution.logits)


def test_exported_it_forgets_too() -> None:
    _, policy = make(Games)
    env = Games()
    env.reset()
    observations = torch.tensor(env.observations)
    policy.layout.field(observations, "turn.first").copy_(torch.tensor([1, 0] * 4))
    export_program(policy, observations)
    padded = PaddedPolicy(copy.deepcopy(policy))
    fields = {
        name: policy.layout.field(observations, name)
        for name in ("seen", "turn.number", "turn.first")
    }
    legal, counts = torch.zeros(8, 1, 2, dtype=torch.int64), torch.ones(8, dtype=torch.int64)
    ones = torch.ones(8, 16)
    with torch.no_grad():
        after = padded(fields, legal, counts, ones, ones)[1]
        fresh = padded(fields, legal, counts, ones * 0, ones * 0)[1]
    assert (after == fresh).tolist() == [True, False] * 4


def test_a_field_that_is_not_there_or_no_number() -> None:
    layout = fp.LegalLayout.from_dtype(DTYPE, "n", "legal", spec=SPEC)
    with pytest.raises(KeyError, match=r"no field 'last'; there are number, first"):
        fp.RecurrentPolicy(layout=layout, spec=SPEC, first_step="turn.last")
    with pytest.raises(ValueError, match=r"first_step='seen' must be one number, it has 4"):
        fp.RecurrentPolicy(layout=layout, spec=SPEC, first_step="seen")
    with pytest.raises(TypeError, match="'turn' is a struct"):
        fp.RecurrentPolicy(layout=layout, spec=SPEC, first_step="turn")
