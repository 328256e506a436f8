"""Policies and trainers in files: what comes back, what is refused, and how a policy grows."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pufferlib.emulation
import pufferlib.vector
import pytest
import torch
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy import puffer, saving
from tests.games import BANDIT_SPEC, Bandit, BanditEncoder
from tests.test_readme import BLOCKS
from tests.test_resume import differences

# ---- round trips

SIZES = fp.ActionSpec.from_nvec([3, 5, 5])
DTYPE = np.dtype([("life", np.int16, 2), ("n", np.uint8), ("legal", np.uint8, (12, 3))])
LAYOUT = fp.LegalLayout.from_dtype(DTYPE, "n", "legal")


def observations(layout: fp.LegalLayout, lists: list[list[tuple[int, ...]]]) -> Tensor:
    rows = np.zeros((len(lists), layout.dtype.itemsize), np.uint8)
    records = rows.view(layout.dtype)[:, 0]
    for name in layout.dtype.names or ():
        if name not in ("n", "legal"):
            values = np.random.default_rng(0).integers(0, 4, records[name].shape)
            records[name] = values
    layout.write(rows, lists)
    return torch.from_numpy(rows)


def shaken(policy: Any) -> Any:
    """With other weights than new ones have."""
    torch.manual_seed(3)
    with torch.no_grad():
        for weights in policy.parameters():
            weights.add_(torch.randn_like(weights) * 0.3)
    policy.explore(1.5, 0.1)
    return policy


def log_probs(policy: Any, seen: Tensor) -> list[Tensor]:
    with torch.no_grad():
        distribution, value = (
            policy.distribution(seen) if isinstance(policy, fp.Policy) else policy(seen)[:2]
        )
    legal = policy.layout.read(seen)
    padded = [legal.actions[legal.rows == row] for row in range(len(legal))]
    of = [
        distribution.log_prob(torch.stack([tuples[k % len(tuples)] for tuples in padded]))
        for k in range(max(map(len, padded)))
    ]
    return [*of, value]


MAKERS: dict[str, Callable[..., Any]] = {
    "flat": fp.FlatPolicy,
    "autoregressive": partial(fp.Policy, head="autoregressive", width=16, invalid="drop"),
    "exact": partial(fp.Policy, head=partial(fp.AutoregressiveHead, exact_entropy=True)),
    "recurrent": partial(fp.RecurrentPolicy, hidden_size=24),
    "bare": lambda spec, layout: fp.ActorCritic(spec, layout, recurrent=True, width=8),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_policy_comes_back(name: str, tmp_path: Path) -> None:
    policy = shaken(MAKERS[name](spec=SIZES, layout=LAYOUT))
    path = tmp_path / "policy.pt"
    policy.save(path)
    again = fp.load(path, spec=SIZES, layout=LAYOUT)
    assert type(again) is type(policy)
    assert list(tmp_path.iterdir()) == [path]
    seen = observations(LAYOUT, [[(0, 0, 0), (1, 2, 3), (2, 4, 0)], [(1, 1, 1)]])
    for one, other in zip(log_probs(policy, seen), log_probs(again, seen), strict=True):
        assert torch.equal(one, other)
    assert (again.temperature, again.width) == (policy.temperature, policy.width)
    assert bool(again.layout.dropped) == (name == "autoregressive")
    assert getattr(again.head, "path_entropy", None) == getattr(policy.head, "path_entropy", None)


def test_what_is_of_one_s_own_is_given_again(tmp_path: Path) -> None:
    class Mine(fp.Policy):
        pass

    class OwnHead(fp.FlatHead):
        pass

    env, path = Bandit(4), tmp_path / "policy.pt"
    policy = shaken(Mine(env, head=OwnHead, encoder=BanditEncoder(env.legal_layout)))
    fp.save(policy, path)
    ways: dict[str, Any] = {
        "kind": Mine,
        "encoder": BanditEncoder(env.legal_layout),
        "head": OwnHead,
    }
    own = {"kind": "Mine", "encoder": "BanditEncoder", "head": "OwnHead"}
    given: dict[str, Any] = {}
    imported = set(sys.modules)
    for name, way in ways.items():
        with pytest.raises(ValueError, match=rf"{own[name]}, which a file does not.*{name}=\.\.\."):
            fp.load(path, env, **given)
        given[name] = way
    assert set(sys.modules) == imported
    env.reset(seed=1)
    seen = torch.tensor(env.observations)
    again = fp.load(path, env, **given)
    for one, other in zip(log_probs(policy, seen), log_probs(again, seen), strict=True):
        assert torch.equal(one, other)
    given["encoder"] = BanditEncoder(env.legal_layout, 16)
    with pytest.raises(ValueError, match=r"policy.pt does not fit the policy:.*encoder.mix.weight"):
        fp.load(path, env, **given)


def test_another_spec_or_layout_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "policy.pt"
    spec = fp.ActionSpec([fp.Primary("rest"), fp.Primary("pay", fp.Index("amount", 3))])
    layout = fp.LegalLayout.from_dtype([("a", "i2"), ("n", "u1"), ("t", "u1", (4, 2))], "n", "t")
    fp.FlatPolicy(spec=spec, layout=layout).save(path)
    fp.load(path, spec=spec, layout=layout)
    rest, pay = spec.primaries.values()
    larger = fp.Primary("pay", fp.Index("amount", 4))
    for primaries, noop, said in (
        ([rest, larger], None, r"Index 'amount' in slot 1 of 'pay' was \[0, 3\] and is \[0, 4\]"),
        ([fp.Primary("rest", id=2), pay], None, r"primary 'rest' was 0 and is 2"),
        ([rest, fp.Primary("buy", fp.Index("amount", 3))], None, "'pay' was 1 and is not there"),
        ([rest, pay], (1, 1), r"noop was \[0, 0\] and is \[1, 1\]"),
    ):
        with pytest.raises(ValueError, match=rf"policy.pt was saved with another spec: .*{said}"):
            fp.load(path, spec=fp.ActionSpec(primaries, noop), layout=layout)
    other = fp.LegalLayout.from_dtype([("a", "i2", 3), ("n", "u1"), ("t", "u1", (4, 2))], "n", "t")
    with pytest.raises(ValueError, match=r"another layout: field 'a' was \['int16', \[\]\] and is"):
        fp.load(path, spec=spec, layout=other)
    smaller = fp.ActionSpec([rest, fp.Primary("pay", fp.Index("amount", 2))])
    with pytest.raises(ValueError, match="grow=True adds, and takes nothing away"):
        fp.load(path, spec=smaller, layout=layout, grow=True)


# ---- damage


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    """Wherever a byte is flipped, the policy that comes back, if any, is the saved one."""
    path, broken = tmp_path / "policy.pt", tmp_path / "broken.pt"
    spec = fp.ActionSpec.from_nvec([2, 2])
    layout = fp.LegalLayout.from_dtype([("a", "i2"), ("n", "u1"), ("t", "u1", (4, 2))], "n", "t")
    policy = fp.FlatPolicy(spec=spec, layout=layout, hidden_size=4, width=4)
    policy.save(path)
    whole = path.read_bytes()
    places = random.Random(1)
    said: list[str] = []
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[places.randrange(len(whole))] ^= 1 << places.randrange(8)
        broken.write_bytes(damaged)
        try:
            again = fp.load(broken, spec=spec, layout=layout)
        except ValueError as error:
            said.append(str(error))
        else:
            assert differences(dict(policy.state_dict()), dict(again.state_dict())) == []
    assert len(said) > 75
    assert all(str(broken) in one and "\n" not in one for one in said)
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        broken.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"broken.pt is damaged, or is no file of this"):
            fp.load(broken, spec=spec, layout=layout)
    content = saving.read_tensors(path)
    for key in saving.KEYS:
        saving.write_tensors(broken, {name: content[name] for name in content if name != key})
        with pytest.raises(ValueError, match=f"broken.pt is damaged.*it has no '{key}'"):
            fp.load(broken, spec=spec, layout=layout)
    del content["weights"]["value.bias"]
    saving.write_tensors(broken, content)
    with pytest.raises(ValueError, match=r'does not fit the policy:.*Missing.*"value.bias"'):
        fp.load(broken, spec=spec, layout=layout)
    saving.write_tensors(broken, {**content, "format": 2})
    with pytest.raises(ValueError, match="has format 2, and this version of tcg_flatpolicy reads"):
        fp.load(broken, spec=spec, layout=layout)
    with pytest.raises(FileNotFoundError):
        fp.load(tmp_path / "none.pt", spec=spec, layout=layout)


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit",))


def test_a_file_runs_no_code(tmp_path: Path) -> None:
    torch.save({"format": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt is damaged, or is no file of this library"):
        fp.load(tmp_path / "evil.pt", spec=SIZES, layout=LAYOUT)


# ---- growing


def game(large: bool) -> tuple[fp.ActionSpec, fp.LegalLayout]:
    """A game, and what it is with a new set of cards: ids moved, ranges moved, fields larger."""
    more = 2 if large else 0
    index, entity, none = fp.Index("mode", 2 + more), fp.Entity, fp.Index("none", 1)
    target = fp.OneOf(
        none, *[fp.Index("new", 2)] * large, entity("unit", 3 + more), entity("hand", 4)
    )
    primaries = [
        fp.Primary("attack", entity("unit", 3 + more), entity("unit", 3)),
        fp.Primary("play", entity("hand", 4), index, target),
        fp.Primary("pass"),
    ]
    if large:
        primaries.insert(0, fp.Primary("scry", entity("deck", 5), fp.Index("depth", 6)))
        primaries.append(fp.Primary("sing", fp.Index("mode", 3), fp.Index("mode", 4)))
    dtype = [("life", "i2", 2 + more), ("n", "u1"), ("legal", "u1", (9 + more, 4))]
    dtype += [("weather", "f4")] * large
    layout = fp.LegalLayout.from_dtype(np.dtype(dtype), "n", "legal")
    return fp.ActionSpec(primaries), layout


class Things(nn.Module):
    """Gives fixed entities, so that what grows is in the head; the state is a FieldEncoder's."""

    def __init__(self, layout: fp.LegalLayout, large: bool) -> None:
        super().__init__()
        self.state = fp.FieldEncoder(layout, 16)
        self.hidden_size = 16
        sizes = {"unit": 3 + 2 * large, "hand": 4, **({"deck": 5} if large else {})}
        self.entity_sizes = {name: (size, 6) for name, size in sizes.items()}

    def forward(self, seen: Tensor) -> fp.Encoding:
        entities = {
            name: torch.linspace(-1, 1, size * 6)
            .sin()
            .view(1, 6, size)
            .mT.expand(len(seen), -1, -1)
            if name == "deck"
            else torch.arange(size * 6.0).view(1, size, 6).sin().expand(len(seen), -1, -1)
            for name, (size, _) in self.entity_sizes.items()
        }
        return fp.Encoding(self.state(seen).hidden, entities)


@pytest.mark.parametrize("head", ["flat", "autoregressive"])
@pytest.mark.parametrize("recurrent", [False, True])
def test_what_was_there_keeps_its_scores(head: str, recurrent: bool, tmp_path: Path) -> None:
    spec, layout = game(large=False)
    kind = fp.RecurrentPolicy if recurrent else fp.Policy
    policy = shaken(kind(spec=spec, layout=layout, encoder=Things(layout, False), head=head))
    policy.save(tmp_path / "small.pt")
    new_spec, new_layout = game(large=True)
    torch.manual_seed(9)
    grown = fp.load(
        tmp_path / "small.pt",
        spec=new_spec,
        layout=new_layout,
        encoder=Things(new_layout, True),
        grow=True,
    )
    # target: none 0, unit 1-3, hand 4-7; then none 0, new 1-2, unit 3-7, hand 8-11.
    old = [(0, 1, 2, 0), (0, 2, 2, 0), (1, 3, 1, 0), (1, 0, 0, 2), (1, 0, 1, 7), (2, 0, 0, 0)]
    new = [(1, 1, 2, 0), (1, 2, 2, 0), (2, 3, 1, 0), (2, 0, 0, 4), (2, 0, 1, 11), (3, 0, 0, 0)]
    before, after = observations(layout, [old] * 2), observations(new_layout, [new] * 2)
    after.numpy().view(new_layout.dtype)["life"][..., :2] = before.numpy().view(layout.dtype)[
        "life"
    ]
    for one, other in zip(log_probs(policy, before), log_probs(grown, after), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    if head == "flat":  # the very numbers, not only what is left after normalising
        scores = [
            one.head.scorer(*one.encode(seen), one.layout.read(seen))
            for one, seen in ((policy, before), (grown, after))
        ]
        torch.testing.assert_close(*scores, rtol=0, atol=1e-6)
    seen = observations(new_layout, [[(0, 4, 5, 0), (4, 2, 3, 0), (2, 1, 3, 1), (1, 4, 0, 0)]])
    assert all(one.isfinite().all() for one in log_probs(grown, seen))
    kept = dict(policy.state_dict())
    assert torch.equal(grown.state_dict()["value.weight"], kept["value.weight"])


def test_what_cannot_grow_says_so(tmp_path: Path) -> None:
    env, path = Bandit(4), tmp_path / "policy.pt"
    fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout)).save(path)
    wider = BanditEncoder(env.legal_layout)
    wider.cards = nn.Embedding(9, 32)
    with pytest.raises(ValueError, match=r"'encoder.cards.weight' of shape \(5, 32\), here \(9, "):
        fp.load(path, env, encoder=wider, grow=True)


# ---- under the trainer


def vectorised(make: Any, seed: int = 1, **arguments: Any) -> Any:
    serial = pufferlib.vector.Serial
    return pufferlib.vector.make(make, env_kwargs=arguments, backend=serial, num_envs=2, seed=seed)


@pytest.mark.integration
def test_a_trained_policy_grows_and_trains_on(trainers: Any, tmp_path: Path) -> None:
    class Wider(Bandit):
        """A new primary, after those that there were; it is never legal here."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            new = fp.Primary("new", fp.Index("card", 9), fp.Entity("unit", 4))
            self.action_spec = fp.ActionSpec([*BANDIT_SPEC.primaries.values(), new])
            self.legal_layout = self.legal_layout.with_spec(self.action_spec)
            self.single_action_space = self.action_spec.action_space

    def epoch(env: Any, policy: Any, epochs: int) -> Any:
        trainer = trainers(env, policy, learning_rate=1e-2)
        for _ in range(epochs):
            trainer.evaluate()
            trainer.train()
            ratio = trainer.ratio
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
        return policy

    vecenv = vectorised(Bandit, num_agents=16)
    layout = vecenv.driver_env.legal_layout
    torch.manual_seed(0)
    policy = fp.FlatPolicy(vecenv.driver_env, encoder=BanditEncoder(layout))
    epoch(vecenv, policy, 3).save(tmp_path / "policy.pt")
    wider = vectorised(Wider, num_agents=16)
    grown = fp.load(
        tmp_path / "policy.pt", wider.driver_env, encoder=BanditEncoder(layout), grow=True
    )
    seen = torch.tensor(vecenv.observations)
    for one, other in zip(log_probs(policy, seen), log_probs(grown, seen), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    epoch(wider, grown, 2)
    assert all(env.illegal_actions == 0 for env in wider.envs)


class SavedBandit(Bandit):
    """An engine that says what its state is."""

    def get_state(self) -> Any:
        generator = self.rng.bit_generator.state
        return {"generator": repr(generator), "lists": self.lists, "played": self.played}

    def set_state(self, state: Any) -> None:
        self.rng.bit_generator.state = eval(state["generator"])
        self.lists, self.played = [[tuple(a) for a in one] for one in state["lists"]], 0
        self.records = self.observations.view(self.legal_layout.dtype)[:, 0]
        self.played = state["played"]


def recorded_bandit(**arguments: Any) -> Any:
    return puffer.recorded(Bandit(**arguments))


def gym_of_the_readme() -> Any:
    namespace: dict[str, Any] = {}
    exec(BLOCKS["gymnasium"].partition("vecenv = ")[0], namespace)
    return namespace


def recorded_gym(buf: Any = None, seed: int = 0) -> Any:
    return puffer.recorded(gym_of_the_readme()["make"](buf, seed))


def saved_gym(buf: Any = None, seed: int = 0) -> Any:
    class Saved(gym_of_the_readme()["MyGym"]):  # type: ignore[misc]
        def get_state(self) -> str:
            return repr(self.np_random.bit_generator.state)

        def set_state(self, state: str) -> None:
            self.np_random.bit_generator.state = eval(state)

    return pufferlib.emulation.GymnasiumPufferEnv(env_creator=Saved, buf=buf, seed=seed)


@pytest.mark.integration
@pytest.mark.parametrize("make", [SavedBandit, recorded_bandit, recorded_gym, saved_gym])
def test_a_run_goes_on_bit_for_bit(make: Any, trainers: Any, tmp_path: Path) -> None:
    def new(seed: int) -> Any:
        torch.manual_seed(seed)
        vecenv = vectorised(make, seed, **({} if "gym" in make.__name__ else {"num_agents": 8}))
        env = vecenv.driver_env
        if "gym" in make.__name__:
            layout = fp.LegalLayout.from_env(env, "n_legal", "legal")
            spec = fp.ActionSpec(
                [fp.Primary("pass"), fp.Primary("play", fp.Index("c", 10), fp.Index("at", 5))]
            )
            policy = fp.FlatPolicy(env, spec=spec, layout=layout, hidden_size=8)
        else:
            policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout, 8))
        # An odd number of steps, after which games of one step have ended.
        return trainers(vecenv, policy, seed=seed, bptt_horizon=7)

    def epochs(trainer: Any, number: int) -> Any:
        for _ in range(number):
            trainer.evaluate()
            trainer.last_log_time = float("inf")  # no log, whose time would be another
            trainer.train()
        return trainer

    trainer = epochs(new(1), 3)
    puffer.save_trainer(trainer, tmp_path / "trainer.pt")
    epochs(trainer, 2)
    again = new(2)
    puffer.resume_trainer(again, tmp_path / "trainer.pt")
    epochs(again, 2)
    assert differences(puffer.trainer_state(trainer), puffer.trainer_state(again)) == []
    assert not torch.equal(
        saving.read_tensors(tmp_path / "trainer.pt")["policy"]["value.weight"],
        again.uncompiled_policy.value.weight,
    )


@pytest.mark.integration
def test_an_engine_that_the_seed_does_not_determine_is_named(trainers: Any, tmp_path: Path) -> None:
    class Wild(Bandit):
        def reset(self, seed: int | None = None) -> Any:
            return super().reset()

    def new(seed: int) -> Any:
        vecenv = vectorised(lambda **a: puffer.recorded(Wild(**a)), seed, num_agents=4)
        env = vecenv.driver_env
        return trainers(vecenv, fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout)))

    trainer = new(1)
    trainer.evaluate()
    trainer.train()
    puffer.save_trainer(trainer, tmp_path / "trainer.pt")
    with pytest.raises(RuntimeError, match="led Wild to other observations than those saved: it"):
        puffer.resume_trainer(new(2), tmp_path / "trainer.pt")
    with pytest.raises(RuntimeError, match="Bandit was not reset with a seed since it is recorded"):
        recorded_bandit(num_agents=2).state_dict()
