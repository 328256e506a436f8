"""audit_trainer: a sound run has no finding; each bug as seen in the wild has its own code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pufferlib.emulation
import pufferlib.models
import pufferlib.vector
import pytest
import torch
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.verify import trainer as audit
from tcg_flatpolicy.verify.policy import LearnedEntities
from tcg_flatpolicy.verify.trainer import audit_trainer
from tcg_flatpolicy.wrapping import env_attribute
from tests.broken import SPEC as DUEL_SPEC
from tests.broken import Solo
from tests.games import BANDIT_SPEC, Bandit, BanditEncoder

pytestmark = pytest.mark.integration

AGENTS, HORIZON = 32, 8

ALL_CHECKS = {
    audit.RATIO,
    audit.LOSSES,
    audit.GRADIENTS,
    audit.REACHED,
    audit.RELOADED,
    audit.IDLE,
    audit.STORED,
    audit.ARRIVED,
}


def make_vecenv(
    env: type[pufferlib.PufferEnv] = Bandit, empty: float = 0.2, num_envs: int = 2
) -> Any:
    return pufferlib.vector.make(
        env,
        env_kwargs={"num_agents": AGENTS // num_envs, "empty": empty},
        backend=pufferlib.vector.Serial,
        num_envs=num_envs,
        seed=1,
    )


def make_policy(vecenv: Any, kind: type[fp.Policy] = fp.Policy, **arguments: Any) -> fp.Policy:
    torch.manual_seed(0)
    env = vecenv.driver_env
    return kind(env, encoder=BanditEncoder(env_attribute(env, "legal_layout")), **arguments)


def nothing_found(report: Any) -> None:
    print(report)
    assert report.ok
    assert {name for name, c in report.checks.items() if c.status == "passed"} == ALL_CHECKS
    assert all(math.isfinite(figure) for figure in report.figures.values())


# ---- sound runs


@pytest.mark.parametrize("head", ["flat", "autoregressive"])
@pytest.mark.parametrize("recurrent", [False, True])
def test_a_sound_run(trainers: Any, recurrent: bool, head: str) -> None:
    vecenv = make_vecenv()
    policy = make_policy(vecenv, fp.RecurrentPolicy if recurrent else fp.Policy, head=head)
    trainer = trainers(
        vecenv,
        policy,
        use_rnn=recurrent,
        minibatch_size=AGENTS * HORIZON // 4,
        update_epochs=2,
    )
    report = audit_trainer(trainer, 3)
    nothing_found(report)
    assert report.figures["epochs"] == 3
    assert report.figures["steps"] == 3 * AGENTS * HORIZON
    assert report.figures["share of rows with no legal action"] == pytest.approx(0.2, abs=0.06)
    assert 0 < report.figures["share of the no-op where it is one of several"] < 1
    assert report.figures["largest distance of the ratio from 1"] < 1e-5
    assert report.checks[audit.RATIO].cases == 3 * AGENTS * HORIZON // 4


def test_pufferlib_s_own_wrapper_optimizer_and_accumulation(trainers: Any) -> None:
    vecenv = make_vecenv()
    policy = make_policy(vecenv)
    wrapped = pufferlib.models.LSTMWrapper(vecenv.driver_env, policy, 32, 32)
    # Another optimizer than Adam, whose steps must be seen as well.
    trainer = trainers(
        vecenv,
        wrapped,
        use_rnn=True,
        optimizer="muon",
        learning_rate=1e-2,
        max_minibatch_size=AGENTS * HORIZON // 2,
    )
    # The cell shares the LSTM's parameters, and its names come second.
    nothing_found(audit_trainer(trainer, 2))


def test_bfloat16(trainers: Any) -> None:
    vecenv = make_vecenv()
    trainer = trainers(vecenv, make_policy(vecenv), precision="bfloat16", update_epochs=2)
    nothing_found(audit_trainer(trainer, 3))


def test_the_trainer_is_left_as_it_was_and_goes_on(trainers: Any) -> None:
    vecenv = make_vecenv()
    policy = make_policy(vecenv)
    trainer = trainers(vecenv, policy)
    before = {name for env in vecenv.envs for name in vars(env)}
    audit_trainer(trainer, 2)
    assert {name for env in vecenv.envs for name in vars(env)} == before
    assert not trainer.optimizer._optimizer_step_pre_hooks
    assert not trainer.optimizer._optimizer_step_post_hooks
    assert not any(p._post_accumulate_grad_hooks for p in policy.parameters())
    assert trainer.epoch == 2
    trainer.evaluate()
    trainer.train()
    assert trainer.epoch == 3


def test_hooks_are_removed_after_an_exception_and_it_is_passed_on(
    trainers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vecenv = make_vecenv()
    policy = make_policy(vecenv)
    trainer = trainers(vecenv, policy)

    def broken(*_: Any) -> Any:
        raise RuntimeError("engine crashed")

    monkeypatch.setattr(vecenv, "send", broken)
    with pytest.raises(RuntimeError, match="engine crashed"):
        audit_trainer(trainer, 1)
    assert not trainer.optimizer._optimizer_step_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in policy.parameters())
    assert "step" not in vars(vecenv.envs[0])
    with pytest.raises(ValueError, match="epochs"):
        audit_trainer(trainer, 0)


# ---- broken ones


class Doubled(fp.Policy):
    """T01: only the rollout is tempered."""

    def forward_eval(self, observations: Tensor, state: Any = None) -> Any:
        face, value = super().forward_eval(observations, state)
        return fp.puffer.LegalNormal(face.distribution.tempered(2.0), face.action_dtype), value


class Noisy(fp.Policy):
    """T01: dropout before the decision."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.dropout = nn.Dropout(0.2)

    def encode(self, rows: Tensor) -> Any:
        hidden, entities = super().encode(rows)
        return fp.Encoding(self.dropout(hidden), entities)


class Anneals(fp.Policy):
    """T01: a schedule sets the exploration when the rollout has ended, not before the next."""

    calls = 0

    def forward_eval(self, observations: Tensor, state: Any = None) -> Any:
        drawn = super().forward_eval(observations, state)
        self.calls += 1
        if self.calls == HORIZON:
            self.explore(temperature=2.5)
        return drawn


class Spare(fp.Policy):
    """T04: a layer that was replaced but not removed."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.old_value = nn.Linear(self.hidden_size, 1)


class Detached(fp.Policy):
    """T04: the encoder's output is detached, and there is a gradient of exactly 0."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, observations: Tensor, state: Any = None) -> Any:
        face, value = super().forward(observations, state)
        return face, value + 0 * self.scale


class Cooling(fp.Policy):
    """T05: the temperature is a number of Python's, lowered at the start of each rollout."""

    heat = 2.0
    updated = False

    def decide(self, *given: Any) -> Any:
        if torch.is_grad_enabled():
            self.updated = True
        return super().decide(*given).tempered(self.heat)

    def forward_eval(self, observations: Tensor, state: Any = None) -> Any:
        if self.updated:
            self.updated, self.heat = False, self.heat * 0.9
        return super().forward_eval(observations, state)


class Forgets(fp.Policy):
    """T05: weights that the checkpoint does not hold."""

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        saved = super().state_dict(*arguments, **named)
        return {name: value for name, value in saved.items() if "value" not in name}


class ForgetsFrozen(Forgets):
    """T05: they do not change in training, and loading says nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.encoder.requires_grad_(False)

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        saved = fp.Policy.state_dict(self, *arguments, **named)
        return {name: value for name, value in saved.items() if "encoder" not in name}

    def load_state_dict(self, state_dict: Any, *arguments: Any, **named: Any) -> Any:
        return super().load_state_dict(state_dict, strict=False)


class StaleWeights(fp.Policy):
    """T01: what Policy guards against, autocast's cache in bfloat16."""

    def forward(self, observations: Tensor, state: Any = None) -> Any:
        return self._face(self.run(observations), observations)

    def forward_eval(self, observations: Tensor, state: Any = None) -> Any:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return self._face(self.run(observations), observations)


class Tolerant(Bandit):
    """Plays on whatever it is sent."""

    def pay(self, row: int, action: tuple[int, ...]) -> float:
        return super().pay(row, action) if BANDIT_SPEC.explain(action) is None else 0.0


class Halving(pufferlib.PufferEnv):
    """T07: a wrapper that maps the last slot wrongly."""

    def __init__(self, buf: Any = None, seed: int = 0, **arguments: Any) -> None:
        self.env = Tolerant(buf=buf, seed=seed, **arguments)
        for name in ("single_observation_space", "single_action_space", "num_agents"):
            setattr(self, name, getattr(self.env, name))
        super().__init__(buf)

    def reset(self, seed: int | None = None) -> Any:
        return self.env.reset(seed)

    def step(self, actions: Any) -> Any:
        return self.env.step(np.asarray(actions) // [1, 1, 2])

    def close(self) -> None:
        pass


class Bare(nn.Module):
    """PufferLib's MultiDiscrete without a mask, which knows of no list."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.value = nn.Linear(4, 13), nn.Linear(4, 1)

    def forward(self, observations: Tensor, state: Any = None) -> Any:
        x = observations[:, :4].float()
        return self.net(x).split([3, 5, 5], 1), self.value(x)

    forward_eval = forward


class Closed(Halving):
    """What it wraps cannot be seen, and plays the no-op."""

    def __init__(self, buf: Any = None, seed: int = 0, **arguments: Any) -> None:
        super().__init__(buf, seed, **arguments)
        self.inside = self.__dict__.pop("env")

    def reset(self, seed: int | None = None) -> Any:
        return self.inside.reset(seed)

    def step(self, actions: Any) -> Any:
        return self.inside.step(np.zeros_like(actions))


def found(report: Any, *codes: str) -> Any:
    print(report)
    assert list(report.findings) == list(codes)
    return report.findings[codes[0]]


def test_recurrent_with_several_segments_of_an_agent(trainers: Any) -> None:
    vecenv = make_vecenv()
    policy = make_policy(vecenv, fp.RecurrentPolicy)
    batch = 2 * AGENTS * HORIZON
    sizes = {"batch_size": batch, "minibatch_size": batch, "max_minibatch_size": batch}
    finding = found(audit_trainer(trainers(vecenv, policy, use_rnn=True, **sizes), 2), "T01")
    assert f"total_agents * bptt_horizon = {AGENTS} * {HORIZON}" in finding.message
    # Without recurrence such a batch is sound.
    nothing_found(audit_trainer(trainers(vecenv, make_policy(vecenv), **sizes), 2))


def test_another_temperature_in_the_rollout(trainers: Any) -> None:
    vecenv = make_vecenv()
    finding = found(audit_trainer(trainers(vecenv, make_policy(vecenv, Doubled)), 2), "T01")
    assert "No usual cause shows; audit_policy" in finding.message


@pytest.mark.parametrize("recurrent", [False, True])
def test_exploration_changed_between_rollout_and_update(trainers: Any, recurrent: bool) -> None:
    class AnnealsRecurrent(Anneals, fp.RecurrentPolicy):
        pass

    vecenv = make_vecenv()
    policy = make_policy(vecenv, AnnealsRecurrent if recurrent else Anneals)
    trainer = trainers(vecenv, policy, use_rnn=recurrent)
    report = audit_trainer(trainer, 3)
    finding = found(report, "T01")
    assert "epoch 0: the policy refused the update: exploration was changed" in finding.message
    assert "(1.0, 0.0)" in finding.message
    assert "(2.5, 0.0)" in finding.message
    assert report.checks[audit.RATIO].status == "failed"
    assert report.checks[audit.STORED].status == "passed"
    for check in (audit.LOSSES, audit.REACHED, audit.RELOADED):
        assert report.checks[check].skipped == "training broke off, see what was found"
    trainer.evaluate()  # it goes on from there
    trainer.train()


def test_another_error_of_the_update_is_passed_on(trainers: Any) -> None:
    class Raises(fp.Policy):
        def forward(self, observations: Tensor, state: Any = None) -> Any:
            raise RuntimeError("out of memory")

    vecenv = make_vecenv()
    with pytest.raises(RuntimeError, match="out of memory"):
        audit_trainer(trainers(vecenv, make_policy(vecenv, Raises)), 1)


def test_dropout(trainers: Any) -> None:
    vecenv = make_vecenv()
    finding = found(audit_trainer(trainers(vecenv, make_policy(vecenv, Noisy)), 2), "T01")
    assert "dropout or batch norm in training mode: dropout" in finding.message


def test_buffers_that_change_within_the_rollout_are_named(trainers: Any) -> None:
    class Running(fp.Policy):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.register_buffer("calls", torch.zeros(()))

        def forward_eval(self, observations: Tensor, state: Any = None) -> Any:
            self.calls += 1
            return super().forward_eval(observations, state)

        def decide(self, *given: Any) -> Any:
            distribution = super().decide(*given)
            return distribution.tempered(1 + 0.2 * float(self.calls))

    vecenv = make_vecenv()
    finding = found(audit_trainer(trainers(vecenv, make_policy(vecenv, Running)), 2), "T01")
    assert "changed since the rollout began: calls" in finding.message


def test_a_loss_that_is_not_finite(trainers: Any) -> None:
    class Diverges(fp.Policy):
        def forward(self, observations: Tensor, state: Any = None) -> Any:
            face, value = super().forward(observations, state)
            return face, value * torch.nan

    vecenv = make_vecenv()
    report = audit_trainer(trainers(vecenv, make_policy(vecenv, Diverges)), 3)
    finding = found(report, "T03", "T02")
    assert "gradient of " in finding.message
    assert "_loss is nan" in report.findings["T02"].message
    assert report.figures["epochs"] == 1  # it stops there
    assert report.checks[audit.RELOADED].status == "skipped"


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_from_the_start(
    trainers: Any, value: float, frozen: bool
) -> None:
    """Else the policy itself raises, of a score that is not finite."""
    vecenv = make_vecenv()
    policy = make_policy(vecenv)
    trainer = trainers(vecenv, policy)
    with torch.no_grad():
        policy.encoder.mix.weight[3, 2:4] = value
    policy.encoder.requires_grad_(not frozen)
    report = audit_trainer(trainer, 3)
    finding = found(report, "T03")
    size = policy.encoder.mix.weight.numel()
    assert finding.message == (
        f"epoch 0, before the first rollout: 2 of {size} values of encoder.mix.weight are not "
        "finite"
    )
    assert report.figures["epochs"] == trainer.epoch == trainer.global_step == 0
    assert set(report.checks) == ALL_CHECKS
    assert not [name for name, check in report.checks.items() if check.status == "passed"]


def test_a_gradient_that_is_not_finite(trainers: Any) -> None:
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient / 0.0

    class Breaks(fp.Policy):
        def forward(self, observations: Tensor, state: Any = None) -> Any:
            face, value = super().forward(observations, state)
            return face, Root.apply(value)

    vecenv = make_vecenv()
    finding = found(audit_trainer(trainers(vecenv, make_policy(vecenv, Breaks)), 3), "T03")
    assert "of the gradient of value.bias" in finding.message


@pytest.mark.parametrize(("kind", "names"), [(Spare, "old_value.weight"), (Detached, "scale")])
def test_a_parameter_without_gradient(trainers: Any, kind: Any, names: str) -> None:
    vecenv = make_vecenv()
    finding = found(audit_trainer(trainers(vecenv, make_policy(vecenv, kind)), 2), "T04")
    assert names in finding.message
    assert "encoder" not in finding.message


def test_state_that_the_checkpoint_does_not_hold(trainers: Any) -> None:
    vecenv = make_vecenv()
    finding = found(audit_trainer(trainers(vecenv, make_policy(vecenv, Cooling)), 2), "T05")
    assert "log-prob" in finding.message


def test_a_checkpoint_that_does_not_load(trainers: Any) -> None:
    vecenv = make_vecenv()
    finding = found(audit_trainer(trainers(vecenv, make_policy(vecenv, Forgets)), 1), "T05")
    assert "value.weight" in finding.message


def test_frozen_weights_that_the_checkpoint_does_not_hold(trainers: Any) -> None:
    vecenv = make_vecenv()
    found(audit_trainer(trainers(vecenv, make_policy(vecenv, ForgetsFrozen)), 1), "T05")


def test_weights_that_autocast_cast_before(trainers: Any) -> None:
    vecenv = make_vecenv()
    policy = make_policy(vecenv, StaleWeights)
    trainer = trainers(vecenv, policy, precision="bfloat16", learning_rate=0.1)
    finding = audit_trainer(trainer, 4).findings["T01"]
    assert finding.state > 0  # in the first epoch the weights are those of now
    assert "autocast in bfloat16" in finding.message


def test_exploration_of_ours_is_in_the_checkpoint(trainers: Any) -> None:
    vecenv = make_vecenv()
    policy = make_policy(vecenv)
    trainer = trainers(vecenv, policy)
    policy.explore(temperature=1.5, epsilon=0.1)
    nothing_found(audit_trainer(trainer, 2))


def test_mostly_empty_lists(trainers: Any) -> None:
    vecenv = make_vecenv(empty=0.97)
    report = audit_trainer(trainers(vecenv, make_policy(vecenv)), 3)
    assert "have no legal action" in found(report, "T06").message
    assert report.figures["share of rows with no legal action"] > 0.9


def test_a_wrapper_that_changes_actions(trainers: Any) -> None:
    vecenv = make_vecenv(Halving)
    report = audit_trainer(trainers(vecenv, make_policy(vecenv)), 2)
    assert "Tolerant is given (" in found(report, "T07").message
    assert report.checks[audit.STORED].status == "passed"
    assert report.checks[audit.ARRIVED].status == "failed"


def test_stored_actions_that_are_not_listed(trainers: Any) -> None:
    class Careless(fp.puffer.LegalNormal):
        def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
            return super().sample(sample_shape).clamp(max=1)

        def log_prob(self, value: Tensor) -> Tensor:
            return 0 * super().log_prob(self.distribution.mode)

    class Clips(fp.Policy):
        def _face(self, *given: Any) -> Any:
            face, value = super()._face(*given)
            return Careless(face.distribution, face.action_dtype), value

    vecenv = make_vecenv()
    report = audit_trainer(trainers(vecenv, make_policy(vecenv, Clips)), 1)
    assert report.checks[audit.STORED].codes == ("T07",)
    assert "is stored, which is not among" in report.findings["T07"].message


@pytest.mark.parametrize("env", [Tolerant, Halving])
def test_an_action_is_counted_once(trainers: Any, env: Any) -> None:
    """Stored and arrived, it is one; one that is changed on the way is one more."""

    class Counts(env):
        wrong = 0

        def step(self, actions: Any) -> Any:
            bandit = getattr(self, "env", self)
            arrived = np.asarray(actions) // [1, 1, 2 if env is Halving else 1]
            pairs = zip(actions.tolist(), arrived.tolist(), bandit.lists, strict=True)
            for sent, reached, listed in pairs:
                right = listed or [(0, 0, 0)]
                Counts.wrong += tuple(sent) not in right or tuple(reached) not in right
            return super().step(actions)

    vecenv = make_vecenv(Counts)
    spec, layout = BANDIT_SPEC, Bandit(2).legal_layout
    torch.manual_seed(0)
    report = audit_trainer(trainers(vecenv, Bare()), 2, spec=spec, layout=layout)
    finding = found(report, "T07")
    assert "is stored, which is not among" in finding.message
    assert finding.count == Counts.wrong > AGENTS
    assert report.checks[audit.STORED].status == report.checks[audit.ARRIVED].status == "failed"


def test_a_layout_may_be_the_keys_of_a_dict_observation(trainers: Any) -> None:
    class Hidden(nn.Module):
        """Shows neither spec nor layout."""

        def __init__(self, inner: fp.Policy) -> None:
            super().__init__()
            self.inner = inner

        def forward_eval(self, *arguments: Any) -> Any:
            return self.inner.forward_eval(*arguments)

        def forward(self, *arguments: Any) -> Any:
            return self.inner(*arguments)

    def one(buf: Any = None, seed: int = 0) -> Any:
        return pufferlib.emulation.GymnasiumPufferEnv(env_creator=Solo, buf=buf, seed=seed)

    vecenv = pufferlib.vector.make(one, num_envs=8, backend=pufferlib.vector.Serial)
    layout = fp.LegalLayout.from_env(vecenv, "n", "legal")
    encoder = LearnedEntities(layout, DUEL_SPEC)
    trainer = trainers(vecenv, Hidden(fp.FlatPolicy(vecenv, layout=layout, encoder=encoder)))
    report = audit_trainer(trainer, 1, layout=("n", "legal"))
    assert report.checks[audit.STORED].status == report.checks[audit.ARRIVED].status == "passed"
    with pytest.raises(TypeError, match="no structured observation"):
        audit_trainer(trainers(make_vecenv(), Bare()), 1, layout=("n", "legal"))


def test_without_a_layout_what_needs_it_is_skipped(trainers: Any) -> None:
    report = audit_trainer(trainers(make_vecenv(Closed), Bare()), 1)
    print(report)
    assert report.ok
    for check in (audit.IDLE, audit.STORED, audit.ARRIVED):
        assert "needs spec=" in str(report.checks[check].skipped)
    # With spec and layout they are looked at, but for what happens inside the environment.
    spec, layout = BANDIT_SPEC, Bandit(2).legal_layout
    report = audit_trainer(trainers(make_vecenv(Closed), Bare()), 1, spec=spec, layout=layout)
    assert found(report, "T07").count > 1


def test_a_spec_other_than_the_policy_s_is_not_skipped_over(trainers: Any) -> None:
    vecenv = make_vecenv()
    other = fp.ActionSpec.from_nvec(BANDIT_SPEC.nvec)
    with pytest.raises(ValueError, match=r"^two specs disagree: spec= is"):
        audit_trainer(trainers(vecenv, make_policy(vecenv)), 1, spec=other)


def test_what_was_found_is_reported_when_the_environment_then_raises(trainers: Any) -> None:
    class Breaks(Bandit):
        def step(self, actions: Any) -> Any:
            raise IndexError("no such unit")

    vecenv = make_vecenv(Breaks)
    report = audit_trainer(trainers(vecenv, Bare()), 2)
    found(report, "T07")
    assert "it then raised IndexError: no such unit" in report.subject
    assert report.checks[audit.REACHED].status == "skipped"
