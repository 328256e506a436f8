"""critic_only: the value sees fields that the policy does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pufferlib.vector
import pytest
import torch
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.critic import critic_only_leaks

SPEC = fp.ActionSpec([fp.Primary("pass"), fp.Primary("play", fp.Index("card", 4))])


def layout_of(hidden: bool = True) -> fp.LegalLayout:
    dtype = [("hand", "u1", 4), ("n", "i2"), ("legal", "u1", (5, 2)), ("turn", "u1")]
    if hidden:
        dtype[1:1] = [("deck", "i4", 3), ("opponent", [("hand", "i2", 2), ("life", "i2")])]
    return fp.LegalLayout.from_dtype(np.dtype(dtype), "n", "legal")


HIDDEN = ("deck", "opponent.hand")


def states(layout: fp.LegalLayout, rows: int = 6) -> Tensor:
    random = np.random.default_rng(1)
    observations = np.zeros((rows, layout.dtype.itemsize), np.uint8)
    records = observations.view(layout.dtype)[:, 0]
    records["hand"] = random.integers(0, 9, (rows, 4))
    for name in ("deck", "opponent"):
        if name in records.dtype.names:
            fields = [records[name]] if name == "deck" else [records[name]["hand"]]
            for field in fields:
                field[...] = random.integers(-900, 900, field.shape)
    layout.write(observations, [[(0, 0), (1, 2), (1, 3)], []] * (rows // 2))
    return torch.from_numpy(observations)


def play(policy: Any, seen: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        distribution, value = policy.distribution(seen)
    return distribution.logits, value


class ReadsAll(nn.Module):
    """An encoder of one's own that looks at every byte."""

    hidden_size, entity_sizes = 8, {}

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = nn.Linear(size, 8)

    def forward(self, observations: Tensor) -> fp.Encoding:
        return fp.Encoding(torch.tanh(self.net(observations.float() / 64)))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", [fp.FlatPolicy, fp.RecurrentPolicy])
def test_the_value_sees_what_the_policy_does_not(kind: Any, own: bool) -> None:
    layout = layout_of()
    encoder = ReadsAll(layout.dtype.itemsize) if own else None
    torch.manual_seed(0)
    policy = kind(spec=SPEC, layout=layout, encoder=encoder, critic_only=HIDDEN, hidden_size=8)
    seen = states(layout)
    assert critic_only_leaks(policy, seen) == []
    assert policy.training
    before = play(policy, seen)
    for name in HIDDEN:
        changed = seen.clone()
        record = changed.numpy().view(layout.dtype)[:, 0]
        (record["deck"] if name == "deck" else record["opponent"]["hand"])[...] += 50
        logits, value = play(policy, changed)
        assert torch.equal(logits, before[0])
        assert (value != before[1]).all()
    for name in ("hand", "opponent"):
        changed = seen.clone()
        record = changed.numpy().view(layout.dtype)[:, 0]
        (record["hand"] if name == "hand" else record["opponent"]["life"])[...] += 5
        assert not torch.equal(play(policy, changed)[0], before[0])


def test_a_leak_is_found() -> None:
    layout = layout_of()

    class Peeking(fp.FlatHead):
        def decide(self, observations: Tensor, layout: Any, hidden: Tensor, *rest: Any) -> Any:
            deck = layout.field(observations, "deck").float().mean(1, keepdim=True)
            return super().decide(observations, layout, hidden + deck / 900, *rest)

    policy = fp.Policy(spec=SPEC, layout=layout, head=Peeking, critic_only=HIDDEN)
    assert critic_only_leaks(policy, states(layout)) == ["deck"]
    policy = fp.RecurrentPolicy(spec=SPEC, layout=layout, critic_only=HIDDEN)
    policy.value.seen[:] = True
    assert critic_only_leaks(policy, states(layout)) == []  # a FieldEncoder leaves them out
    encoder = ReadsAll(layout.dtype.itemsize)
    policy = fp.RecurrentPolicy(spec=SPEC, layout=layout, critic_only=HIDDEN, encoder=encoder)
    policy.value.seen[:] = True
    assert critic_only_leaks(policy, states(layout)) == list(HIDDEN)
    with pytest.raises(ValueError, match="'deck' is the same in all rows"):
        critic_only_leaks(policy, states(layout)[:1].repeat(3, 1))


def test_what_cannot_be_hidden() -> None:
    layout = layout_of()
    for names, said in ((["n"], "by which the policy knows what is legal"), (["mana"], "mana")):
        with pytest.raises((KeyError, ValueError), match=said):
            fp.FlatPolicy(spec=SPEC, layout=layout, critic_only=names)
    with pytest.raises(ValueError, match="first_step='turn' is read by the policy"):
        fp.RecurrentPolicy(spec=SPEC, layout=layout, first_step="turn", critic_only=["turn"])


def test_it_plays_and_is_exported_without_the_fields(tmp_path: Path) -> None:
    from tcg_flatpolicy.export import export_program

    layout, without = layout_of(), layout_of(hidden=False)
    hidden = ("deck", "opponent.hand", "opponent.life")
    policy = fp.RecurrentPolicy(spec=SPEC, layout=layout, critic_only=hidden)
    seen = states(layout)
    policy.save(tmp_path / "policy.pt")
    again = fp.load(tmp_path / "policy.pt", spec=SPEC, layout=layout)
    for one, other in zip(play(policy, seen), play(again, seen), strict=True):
        assert torch.equal(one, other)
    player = fp.load(tmp_path / "policy.pt", spec=SPEC, layout=without)
    shown = states(without)
    shown.numpy().view(without.dtype)["hand"] = seen.numpy().view(layout.dtype)["hand"]
    assert torch.equal(play(policy, seen)[0], play(player, shown)[0])
    some = np.dtype([*without.dtype.descr, ("deck", "i4", 3)])
    some_layout = fp.LegalLayout.from_dtype(some, "n", "legal")
    with pytest.raises(ValueError, match=r"another layout: field 'opponent\.hand' was"):
        fp.load(tmp_path / "policy.pt", spec=SPEC, layout=some_layout)

    program = export_program(policy, seen)
    fields, *others = program.example_inputs[0]
    assert set(fields) == {"hand", "turn"}
    log_probs, value, *_ = program.module()(fields, *others)
    assert log_probs[0].isfinite().any()
    assert value.isnan().all()


class Guess(pufferlib.PufferEnv):
    """Pays 1 for the card that is shown, and a hidden prize that no action changes."""

    def __init__(self, num_agents: int = 32, buf: Any = None, seed: int = 0) -> None:
        self.dtype = np.dtype(
            [("card", "u1"), ("prize", "i1"), ("n", "u1"), ("legal", "u1", (5, 2))]
        )
        self.action_spec = SPEC
        self.legal_layout = fp.LegalLayout.from_dtype(self.dtype, "n", "legal")
        self.single_observation_space = gymnasium.spaces.Box(
            0, 255, (self.dtype.itemsize,), np.uint8
        )
        self.single_action_space = SPEC.action_space
        self.num_agents = num_agents
        self.rng = np.random.default_rng(seed)
        super().__init__(buf)

    def reset(self, seed: int | None = None) -> Any:
        self.records = self.observations.view(self.dtype)[:, 0]
        self.records["card"] = self.rng.integers(0, 4, self.num_agents)
        self.records["prize"] = self.rng.integers(-3, 4, self.num_agents)
        self.legal_layout.write(
            self.observations, [[(0, 0), *((1, card) for card in range(4))]] * self.num_agents
        )
        return self.observations, []

    def step(self, actions: Any) -> Any:
        right = (actions[:, 0] == 1) & (actions[:, 1] == self.records["card"])
        self.rewards[:] = right + self.records["prize"]
        self.terminals[:] = True
        self.reset()
        infos = [{"right": float(right.mean())}]
        return self.observations, self.rewards, self.terminals, self.truncations, infos

    def close(self) -> None:
        pass


@pytest.mark.integration
def test_it_trains_under_pufferlib(trainers: Any) -> None:
    """The prize makes returns noisy; a critic that sees it explains them."""
    explained = {}
    for critic_only in ((), ("prize",)):
        torch.manual_seed(0)
        vecenv = pufferlib.vector.make(Guess, backend=pufferlib.vector.Serial, num_envs=1, seed=1)
        env = vecenv.driver_env
        encoder = fp.FieldEncoder(env.legal_layout, 32, without=("prize",))
        policy = fp.FlatPolicy(env, encoder=encoder, critic_only=critic_only)
        trainer = trainers(
            vecenv,
            policy,
            learning_rate=1e-2,
            ent_coef=0.05,
            update_epochs=2,
            vf_clip_coef=10.0,
        )
        for _ in range(24):
            stats = trainer.evaluate()
            right = float(np.mean(stats["right"]))
            trainer.stats.clear()
            trainer.train()
        explained[critic_only] = trainer.losses["explained_variance"]
        assert critic_only_leaks(policy, torch.tensor(env.observations)) == []
    assert right > 0.35 > 1 / 5
    assert explained[("prize",)] > 0.8 > 0.3 > explained[()]


@pytest.mark.integration
def test_the_ratio_is_one(trainers: Any) -> None:
    vecenv = pufferlib.vector.make(Guess, backend=pufferlib.vector.Serial, num_envs=1, seed=1)
    for kind in (fp.FlatPolicy, fp.RecurrentPolicy):
        policy = kind(vecenv.driver_env, critic_only=("prize",), hidden_size=16)
        trainer = trainers(vecenv, policy, use_rnn=kind is fp.RecurrentPolicy)
        for _ in range(2):
            trainer.evaluate()
            trainer.train()
            ratio = trainer.ratio
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
