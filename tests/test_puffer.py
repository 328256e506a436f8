"""The contract with the installed PufferLib: each fact that this library rests on."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import inspect
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pufferlib
import pufferlib.models
import pufferlib.pytorch
import pufferlib.spaces
import pufferlib.vector
import pytest
import torch
from pufferlib import pufferl
from pufferlib.pytorch import sample_logits

import tcg_flatpolicy as fp
from tcg_flatpolicy.puffer import LegalNormal, check_contract
from tests.games import BANDIT_SPEC, Bandit, BanditEncoder

pytestmark = pytest.mark.integration


def make(
    empty: float = 0.0, num_agents: int = 32, policy: type[fp.FlatPolicy] = fp.FlatPolicy
) -> tuple[Any, fp.FlatPolicy]:
    torch.manual_seed(0)
    vecenv = pufferlib.vector.make(
        Bandit,
        env_kwargs={"num_agents": num_agents, "empty": empty},
        backend=pufferlib.vector.Serial,
        num_envs=1,
        seed=1,
    )
    env = vecenv.driver_env
    return vecenv, policy(env, encoder=BanditEncoder(env.legal_layout))


def a_face() -> LegalNormal:
    legal = fp.LegalActions.from_lists([[(1, 0, 3), (2, 4, 0)], [], [(0, 0, 0)]])
    return LegalNormal(fp.LegalCategorical(legal, torch.tensor([0.4, -1.0, 2.0])), torch.int32)


def test_sample_logits_draws_from_the_face_of_a_normal() -> None:
    face = a_face()
    assert isinstance(face, torch.distributions.Normal)
    torch.manual_seed(3)
    actions, log_probs, entropy = sample_logits(face)
    assert actions.dtype == torch.int32
    assert face.distribution.legal.contains(actions).all()
    assert torch.equal(log_probs, face.distribution.log_prob(actions))
    assert torch.equal(entropy, face.distribution.entropy())


def test_sample_logits_replays_stored_actions_of_segments() -> None:
    face = a_face()
    stored = torch.tensor([[[1, 0, 3]], [[0, 0, 0]], [[0, 0, 0]]])  # (segments, horizon, slots)
    actions, log_probs, entropy = sample_logits(face, action=stored)
    assert torch.equal(actions, stored)
    assert torch.equal(log_probs, face.distribution.log_prob(stored.view(3, 3)))
    assert entropy.shape == (3,)


def test_check_contract_passes_on_the_installed_one() -> None:
    check_contract()


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (lambda logits, action=None: ([x for x in logits], None, None), "lost the branch"),
        (
            lambda logits, action=None: (
                torch.zeros(3, 2, dtype=torch.int64),
                torch.zeros(3),
                torch.zeros(3),
            ),
            "changed the drawn tuples",
        ),
        (
            lambda logits, action=None: (
                action if action is not None else logits.sample(),
                torch.zeros(3),
                logits.entropy().sum(1),
            ),
            "changed the log-probs",
        ),
        (lambda logits, action=None: logits.scale, "wants a real Gaussian"),
    ],
)
def test_check_contract_says_what_another_pufferlib_does(
    monkeypatch: pytest.MonkeyPatch, broken: Any, complaint: str
) -> None:
    monkeypatch.setattr(pufferlib.pytorch, "sample_logits", broken)
    with pytest.raises(RuntimeError, match=complaint):
        check_contract()


def test_check_contract_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pufferlib.pytorch", None)
    with pytest.raises(ImportError, match="pip install"):
        check_contract()


def test_the_face_refuses_to_pass_for_a_gaussian() -> None:
    face = a_face()
    with pytest.raises(AttributeError, match="scale"):
        face.scale  # noqa: B018
    with pytest.raises(NotImplementedError):
        face.rsample()
    with pytest.raises(TypeError, match="Normal"):
        iter(face)
    assert face.mode.dtype == torch.int32
    assert torch.isnan(face.mean).all()
    assert torch.isnan(face.variance).all()


def test_the_joint_space_is_a_box_that_clips_no_legal_tuple() -> None:
    """The trainer clips a Normal's actions to vecenv.action_space.low/high."""
    space = pufferlib.spaces.joint_space(BANDIT_SPEC.action_space, 2)
    assert isinstance(space, gymnasium.spaces.Box)
    assert (space.low == 0).all()
    assert (space.high == BANDIT_SPEC.nvec - 1).all()
    assert space.dtype == BANDIT_SPEC.action_space.dtype
    extremes = np.stack([np.zeros(3, np.int64), BANDIT_SPEC.nvec - 1])
    assert (np.clip(extremes, space.low, space.high) == extremes).all()


def test_a_space_refuses_wider_integers_so_samples_take_its_dtype() -> None:
    narrow = pufferlib.spaces.joint_space(gymnasium.spaces.MultiDiscrete([3, 4], dtype=np.int32), 1)
    assert narrow.contains(np.array([[2, 3]], np.int32))
    assert not narrow.contains(np.array([[2, 3]], np.int64))


class Recorder(fp.FlatPolicy):
    """Notes how the trainer calls it."""

    calls: list[tuple[Any, ...]]

    def forward_eval(self, observations: Any, state: Any = None) -> Any:
        self.calls.append(("eval", observations.shape, sorted(state)))
        return super().forward_eval(observations, state)

    def forward(self, observations: Any, state: Any = None) -> Any:
        self.calls.append(("update", observations.shape, sorted(state)))
        return super().forward(observations, state)


class RecurrentRecorder(Recorder, fp.RecurrentPolicy):
    """Notes how the trainer calls a recurrent policy."""


@pytest.mark.parametrize("recurrent", [False, True])
def test_how_the_trainer_calls_a_policy(trainers: Any, recurrent: bool) -> None:
    vecenv, policy = make(policy=RecurrentRecorder if recurrent else Recorder)
    policy.calls = []
    trainer = trainers(vecenv, policy, use_rnn=recurrent)
    trainer.evaluate()
    trainer.train()
    size = vecenv.single_observation_space.shape[0]
    rollout = [call for call in policy.calls if call[0] == "eval"]
    (update,) = [call for call in policy.calls if call[0] == "update"]
    assert {call[1] for call in rollout} == {(32, size)}
    assert update[1] == ((32, 8, size) if recurrent else (32 * 8, size))
    assert {"lstm_h", "lstm_c"} <= set(update[2])
    assert all(({"lstm_h", "lstm_c"} <= set(call[2])) == recurrent for call in rollout)
    assert trainer.actions.dtype == torch.int64


def snapshot() -> dict[str, dict[str, int]]:
    """Identity of everything in every pufferlib module, and in the classes that they define."""
    found: dict[str, dict[str, int]] = {}
    for name, module in list(sys.modules.items()):
        if name == "pufferlib" or name.startswith("pufferlib."):
            found[name] = {key: id(value) for key, value in vars(module).items()}
            for key, value in vars(module).items():
                if inspect.isclass(value) and value.__module__.startswith("pufferlib"):
                    members = {k: id(v) for k, v in vars(value).items() if k != "__doc__"}
                    found[f"{name}.{key}"] = members
    return found


def test_training_leaves_pufferlib_as_it_is(trainers: Any) -> None:
    before = snapshot()
    vecenv, policy = make()
    trainer = trainers(vecenv, policy)
    for _ in range(3):
        trainer.evaluate()
        trainer.train()
    after = snapshot()
    assert after.keys() >= before.keys()
    for name, members in before.items():
        assert after[name] == members, f"{name} was changed"
    assert type(trainer) is pufferl.PuffeRL
    assert not [k for k, v in vars(trainer).items() if inspect.isroutine(v)]


def test_the_installed_files_match_their_recorded_hashes() -> None:
    names = importlib.metadata.packages_distributions()["pufferlib"]
    checked = 0
    for file in importlib.metadata.files(names[0]) or []:
        if file.hash is None or not str(file).startswith("pufferlib/"):
            continue
        digest = hashlib.new(file.hash.mode, Path(str(file.locate())).read_bytes()).digest()
        assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value, str(file)
        checked += 1
    assert checked > 5


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("empty", [0.0, 0.5])
def test_the_ratio_is_one_in_the_first_minibatch(
    trainers: Any, recurrent: bool, empty: float
) -> None:
    vecenv, policy = make(empty, policy=fp.RecurrentPolicy if recurrent else fp.FlatPolicy)
    trainer = trainers(vecenv, policy, use_rnn=recurrent)
    for _ in range(4):  # the later ones with weights that have moved
        trainer.evaluate()
        trainer.train()
        assert (trainer.ratio - 1).abs().max() < 1e-5
        assert np.isfinite(list(trainer.losses.values() or [0.0])).all()


def test_the_ratio_is_one_with_exploration_and_changing_it_in_between_raises(trainers: Any) -> None:
    vecenv, policy = make()
    policy.explore(temperature=1.7, epsilon=0.2)
    trainer = trainers(vecenv, policy)
    trainer.evaluate()
    trainer.train()
    assert (trainer.ratio - 1).abs().max() < 1e-5
    trainer.evaluate()
    policy.explore(temperature=1.0)
    with pytest.raises(RuntimeError, match="between rollout and update"):
        trainer.train()
    policy.explore(temperature=1.7, epsilon=0.2)
    trainer.train()


def test_changing_exploration_raises_under_the_stock_lstm_wrapper_too(trainers: Any) -> None:
    """The wrapper calls neither forward nor forward_eval of the policy."""
    vecenv, policy = make()
    size = policy.hidden_size
    wrapped = pufferlib.models.LSTMWrapper(vecenv.driver_env, policy, size, size)
    policy.explore(temperature=1.3, epsilon=0.1)
    trainer = trainers(vecenv, wrapped, use_rnn=True)
    trainer.evaluate()
    trainer.train()
    assert (trainer.ratio - 1).abs().max() < 1e-5
    trainer.evaluate()
    policy.explore()
    with pytest.raises(RuntimeError, match="between rollout and update"):
        trainer.train()


def test_the_stock_lstm_wrapper_around_a_flat_policy(trainers: Any) -> None:
    vecenv, policy = make()
    size = policy.hidden_size
    wrapped = pufferlib.models.LSTMWrapper(vecenv.driver_env, policy, size, size)
    with torch.no_grad():
        observations = torch.as_tensor(vecenv.driver_env.reset(0)[0])
        face, _ = wrapped.forward_eval(observations, {"lstm_h": None, "lstm_c": None})
    legal = face.distribution.legal
    uniform = legal.counts.double().log()
    assert (face.distribution.entropy() - uniform).abs().max() < 0.15  # near uniform at first
    trainer = trainers(vecenv, wrapped, use_rnn=True)
    for _ in range(2):
        trainer.evaluate()
        trainer.train()
        assert (trainer.ratio - 1).abs().max() < 1e-5
    assert vecenv.driver_env.illegal_actions == 0
