"""In bfloat16: legal, exact, with the weights of now, and able to learn.

PuffeRL asks for autocast in rollout and update alike, so both are in bfloat16: the layers' matrix
products, that is; scores become probabilities in float32.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pufferlib.models
import pufferlib.vector
import pytest
import torch
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.app import evaluate, train
from tests.games import Bandit, BanditEncoder

pytestmark = pytest.mark.integration

KINDS = ["feed-forward", "recurrent", "stock LSTMWrapper"]
HEADS = ["flat", "autoregressive"]
CUDA_ALONE = "this PufferLib asks for autocast on cuda, whatever the device is"


def make(kind: str, head: str) -> tuple[Any, nn.Module]:
    """A vector environment, and what PuffeRL is given to train."""
    torch.manual_seed(0)
    vecenv = pufferlib.vector.make(
        Bandit,
        env_kwargs={"num_agents": 32, "empty": 0.2},
        backend=pufferlib.vector.Serial,
        num_envs=1,
        seed=1,
    )
    env = vecenv.driver_env
    maker = fp.RecurrentPolicy if kind == "recurrent" else fp.Policy
    policy = maker(env, head=head, encoder=BanditEncoder(env.legal_layout))
    if kind == "stock LSTMWrapper":
        size = policy.hidden_size
        return vecenv, pufferlib.models.LSTMWrapper(env, policy, size, size)
    return vecenv, policy


@pytest.fixture
def trainer_of(trainers: Any) -> Any:
    """Makes a trainer in bfloat16."""

    def new(vecenv: Any, policy: nn.Module, kind: str, **changes: Any) -> Any:
        changes = {"total_timesteps": 10**9, "learning_rate": 5e-3, **changes}
        recurrent = kind != "feed-forward"
        trainer = trainers(vecenv, policy, precision="bfloat16", use_rnn=recurrent, **changes)
        if trainer.amp_context.device != "cpu":
            pytest.skip(CUDA_ALONE)
        return trainer

    return new


def no_state() -> dict[str, None]:
    return {"lstm_h": None, "lstm_c": None}


def stored(trainer: Any, kind: str) -> tuple[Tensor, Tensor]:
    """The observations of a rollout as the update has them, and the tuples (B, H)."""
    observations = trainer.observations.clone()
    if kind == "feed-forward":
        observations = observations.flatten(0, 1)
    return observations, trainer.actions.flatten(0, 1).clone()


def every_listed_tuple(legal: fp.LegalActions) -> tuple[Tensor, Tensor]:
    """(K, B, H) the listed tuples of each row, the k-th of each; (K, B) which there are."""
    lists = legal.to_lists()
    tuples = torch.zeros(max(map(len, lists)), len(lists), 1 + legal.slots, dtype=torch.int64)
    there = torch.zeros(tuples.shape[:2], dtype=torch.bool)
    for row, listed in enumerate(lists):
        for k, action in enumerate(listed):
            tuples[k, row], there[k, row] = torch.tensor(action), True
    return tuples, there


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_probabilities_sum_to_one_and_draws_are_legal(kind: str, head: str, scale: float) -> None:
    """Also with scores so large that bfloat16 rounds them to whole tens."""
    vecenv, policy = make(kind, head)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(scale ** (1 / 3))  # some layers deep, so about scale in the scores
    observations = torch.as_tensor(vecenv.driver_env.reset(1)[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        face, value = policy.forward_eval(observations, no_state())
        tuples, there = every_listed_tuple(face.distribution.legal)
        log_probs = face.distribution.log_prob(tuples)
        drawn = face.sample(torch.Size([200]))
        of_drawn = face.distribution.log_prob(drawn)
    assert log_probs.dtype == value.dtype == torch.float32
    sums = (log_probs.double().exp() * there).sum(0)
    some = there.any(0)
    assert some.any()
    assert not some.all()
    assert (sums[some] - 1).abs().max() < 1e-6
    lists = [set(map(tuple, listed)) or {(0, 0, 0)} for listed in vecenv.driver_env.lists]
    for draw in drawn.tolist():
        assert all(tuple(action) in listed for action, listed in zip(draw, lists, strict=True))
    assert of_drawn.isfinite().all()


@pytest.mark.parametrize("head", HEADS)
def test_scores_that_tie_after_rounding_are_drawn_alike(head: str) -> None:
    """Three scores that differ by less than bfloat16 can tell from one another, near 256."""
    scores = torch.tensor([256.0, 256.25, 256.5])
    assert scores.bfloat16().unique().numel() == 1
    legal = fp.LegalActions.from_lists([[(0, 1), (0, 2), (0, 3)], [], [(1, 5)]])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = torch.cat([scores, torch.zeros(1)]).bfloat16()
        distribution: Any = fp.LegalCategorical(legal, rounded)
    if head == "autoregressive":
        distribution = tied_autoregressive(legal)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        draws = distribution.sample(torch.Size([6000]))
        log_probs = distribution.log_prob(draws)
    assert (log_probs[:, 0] - np.log(1 / 3)).abs().max() < 1e-6
    assert (log_probs[:, 1:] == 0).all()
    assert (draws[:, 1] == 0).all()
    assert (draws[:, 2] == torch.tensor([1, 5])).all()
    shares = torch.bincount(draws[:, 0, 1], minlength=4) / 6000
    assert shares[0] == 0
    assert (shares[1:] - 1 / 3).abs().max() < 5 * (2 / 9 / 6000) ** 0.5


def tied_autoregressive(legal: fp.LegalActions) -> Any:
    """An autoregressive head with keys of zeros, so that all logits tie."""
    spec = fp.ActionSpec([fp.Primary("a", fp.Index("x", 6)), fp.Primary("b", fp.Index("y", 6))])
    head = fp.AutoregressiveHead(spec, 8)
    with torch.no_grad():
        for parameter in (head.primary_keys, *head.slot(1).keys):
            parameter.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        return head(torch.randn(len(legal), 8), {}, legal)


@pytest.mark.parametrize("head", HEADS)
def test_numbers_that_bfloat16_cannot_tell_apart_stay_apart(head: str) -> None:
    """Also where observations are floats: 257 and 999 are no bfloat16 numbers."""
    spec = fp.ActionSpec([fp.Primary("pass"), fp.Primary("play", fp.Index("card", 1000))])
    dtype = np.dtype([("hp", np.float32, 2), ("n", np.float32), ("legal", np.float32, (4, 2))])
    layout = fp.LegalLayout.from_dtype(dtype, "n", "legal", spec=spec)
    policy = fp.Policy(spec=spec, layout=layout, head=head)
    records = np.zeros(3, dtype)
    records["n"] = 4
    records["legal"] = [(1, 257), (1, 258), (1, 999), (0, 0)]
    observations = torch.as_tensor(records.view(np.float32).reshape(3, -1).copy())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        face, _ = policy.forward_eval(observations)
        drawn = face.sample(torch.Size([300]))
    assert face.distribution.legal.to_lists() == [[(1, 257), (1, 258), (1, 999), (0, 0)]] * 3
    seen = set(map(tuple, drawn.flatten(0, 1).tolist()))
    assert seen == {(1, 257), (1, 258), (1, 999), (0, 0)}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_is_one_within_the_precision(trainer_of: Any, kind: str, head: str) -> None:
    """Log-probs that are rounded apart differ by no more than both are off; ours are rounded alike.

    The wrapper has an LSTMCell in the rollout and an LSTM in the update, which round differently.
    """
    vecenv, policy = make(kind, head)
    trainer = trainer_of(vecenv, policy, kind)
    for _ in range(3):
        trainer.evaluate()
        before = copy.deepcopy(policy)
        observations, actions = stored(trainer, kind)
        trainer.train()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        exact = before(observations, no_state())[0].distribution.log_prob(actions)
    rounded_by = (trainer.logprobs.flatten() - exact).abs()
    log_ratio = trainer.ratio.log().abs()
    assert rounded_by.max() > 1e-4  # it was in bfloat16
    assert log_ratio.max() <= 2 * rounded_by.max()
    if kind != "stock LSTMWrapper":
        assert log_ratio.mean() < 0.1 * rounded_by.mean()
    assert vecenv.driver_env.illegal_actions == 0


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_after_train_weights_and_gradients_are_those_of_now(
    trainer_of: Any, kind: str, head: str
) -> None:
    """train() never leaves autocast, so autocast's cache would keep the weights of its first
    minibatch; and in the update those of a rollout, which have no gradient."""
    vecenv, policy = make(kind, head)
    first = copy.deepcopy(policy)
    trainer = trainer_of(vecenv, policy, kind, update_epochs=2)
    for _ in range(2):
        trainer.evaluate()
        trainer.train()
    assert torch.is_autocast_enabled("cpu")
    observations, actions = stored(trainer, kind)
    latest = torch.as_tensor(vecenv.driver_env.observations)

    def ask(policy: nn.Module) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            rollout, _ = policy.forward_eval(latest, no_state())
            sure = rollout.distribution.log_prob(rollout.mode)
        update, value = policy(observations, no_state())
        log_probs = update.log_prob(actions)
        entropy = update.entropy()
        loss = log_probs.sum() + entropy.sum() + value.sum()
        gradients = torch.autograd.grad(loss, list(policy.parameters()))
        answers = [sure, log_probs.flatten(), entropy.flatten(), value.flatten()]
        return torch.cat(answers).detach(), list(gradients)

    answers, gradients = ask(policy)
    torch.clear_autocast_cache()
    cleared, cleared_gradients = ask(policy)
    torch.clear_autocast_cache()
    assert torch.equal(answers, cleared)
    assert all(map(torch.equal, gradients, cleared_gradients))
    assert not torch.equal(answers, ask(first)[0])


@pytest.mark.parametrize("kind", ["feed-forward", "recurrent"])
def test_the_bandit_is_solved(trainer_of: Any, kind: str) -> None:
    """94% of what the best legal actions would have paid, while sampling in bfloat16.

    Five seeds of the recurrent policy reach 94.6 to 95.7%, measured as here.
    """
    vecenv, policy = make(kind, "flat")
    env = vecenv.driver_env
    epochs = 300
    trainer = trainer_of(
        vecenv, policy, kind, total_timesteps=epochs * 256, minibatch_size=64, anneal_lr=True
    )
    for _ in range(epochs):
        trainer.evaluate()
        trainer.train()
    got = best = 0.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(800):  # for a standard error of 0.0013
            face, _ = policy.forward_eval(torch.as_tensor(env.observations), {})
            info = env.step(face.sample().numpy())[-1][0]
            got, best = got + info["got"], best + info["best"]
    assert env.illegal_actions == 0
    assert got / best > 0.94


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_run_on_the_real_game_has_no_illegal_action(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recurrent: bool
) -> None:
    """And its evaluations are in float32, as those of `eval` are, before training and after."""
    in_bfloat16, said = [], []
    autocast = partial(torch.is_autocast_enabled, "cpu")

    def play(*arguments: Any) -> Any:
        in_bfloat16.append(autocast())
        return evaluate.play(*arguments)

    monkeypatch.setattr(train, "play", play)
    settings = train.Settings(
        precision="bfloat16",
        recurrent=recurrent,
        total_steps=4096,
        num_games=64,
        bptt_horizon=16,
        minibatch_size=512,
        hidden_size=64,
        entity_size=16,
        eval_games=10,
        device="cpu",
    )
    try:
        report = train.train(settings, tmp_path / "run", say=lambda line: said.append(autocast()))
        if not any(said):  # the trainer never leaves it
            pytest.skip(CUDA_ALONE)
    finally:
        torch.set_autocast_enabled("cpu", False)
    assert report.steps == 4096
    assert report.illegal == 0
    assert [result.illegal for result in (*report.before.values(), *report.after.values())] == [
        0
    ] * 4
    assert in_bfloat16 == [False] * 4
