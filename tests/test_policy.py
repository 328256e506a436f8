"""The policy: what it builds on, what it refuses, and that rollout and update agree."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pufferlib
import pufferlib.vector
import pytest
import torch
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tests.games import BANDIT_DTYPE, BANDIT_SPEC, Bandit, BanditEncoder


@pytest.fixture
def env() -> Bandit:
    made = Bandit(num_agents=16, empty=0.3)
    made.reset(3)
    return made


def observe(env: Bandit) -> Tensor:
    return torch.as_tensor(env.observations)


def test_it_finds_spec_and_layout_in_the_environment_or_what_it_wraps(env: Bandit) -> None:
    class Wrapper:
        def __init__(self, inner: Any) -> None:
            self.env = inner

    class Vector:
        def __init__(self, inner: Any) -> None:
            self.driver_env = inner

    for outer in (env, Wrapper(env), Vector(Wrapper(env))):
        policy = fp.FlatPolicy(outer, encoder=BanditEncoder(env.legal_layout))
        assert policy.spec == BANDIT_SPEC
        assert policy.layout.dtype == BANDIT_DTYPE


def test_what_a_native_environment_wraps_is_found_too() -> None:
    """A PufferEnv is its own driver_env, which must not end the search."""
    inner = Bandit(num_agents=2)

    class Outer(pufferlib.PufferEnv):  # type: ignore[misc]
        single_observation_space = inner.single_observation_space
        single_action_space = inner.single_action_space
        num_agents = 2
        env = inner

    assert fp.FlatPolicy(Outer(), encoder=BanditEncoder(inner.legal_layout)).spec == BANDIT_SPEC


def test_spec_and_layout_can_be_passed_without_an_environment(env: Bandit) -> None:
    layout = fp.LegalLayout.from_dtype(BANDIT_DTYPE, count="n", actions="legal")
    policy = fp.FlatPolicy(
        spec=BANDIT_SPEC, layout=layout, encoder=BanditEncoder(layout), hidden_size=64
    )
    distribution, value = policy.distribution(observe(env))
    assert distribution.legal.to_lists() == env.lists
    assert value.shape == (16, 1)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"needs spec=.*object has no action_spec"):
        fp.FlatPolicy(object())
    with pytest.raises(ValueError, match=r"needs layout="):
        fp.FlatPolicy(spec=BANDIT_SPEC)


def test_an_action_space_of_other_sizes_is_refused(env: Bandit) -> None:
    for sizes in ([3, 4, 9], [3, 5], [3, 5, 5, 5]):
        env.single_action_space = gymnasium.spaces.MultiDiscrete(sizes)
        with pytest.raises(
            ValueError, match=r"need MultiDiscrete\(\[3, 5, 5\]\), .*set single_act"
        ):
            fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))


def test_a_larger_action_space_is_accepted(env: Bandit) -> None:
    """A real engine's: MultiDiscrete [24, 50, 50, 50], of which its spec uses [24, 30, 6, 2]."""
    env.single_action_space = gymnasium.spaces.MultiDiscrete([3, 50, 9], dtype=np.int32)
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    env.reset(seed=1)
    actions = policy.forward_eval(torch.as_tensor(env.observations))[0].sample()
    assert actions.dtype == torch.int32


def test_two_specs_or_layouts_that_disagree_are_both_named(env: Bandit) -> None:
    encoder = BanditEncoder(env.legal_layout)
    other = fp.ActionSpec([fp.Primary("rest"), fp.Primary("hit", fp.Index("unit", 5))])
    with pytest.raises(
        ValueError, match=r"two specs disagree: spec= is .*0 rest, 1 hit.*, the envi"
    ):
        fp.FlatPolicy(env, spec=other, encoder=encoder)
    layout = fp.LegalLayout.from_dtype(BANDIT_DTYPE, "n", "legal")
    assert fp.FlatPolicy(env, spec=BANDIT_SPEC, layout=layout, encoder=encoder).spec == BANDIT_SPEC
    dtype = np.dtype([("y", "u1"), ("inner", BANDIT_DTYPE)])
    moved = fp.LegalLayout.from_dtype(dtype, "inner.n", "inner.legal")
    with pytest.raises(ValueError, match=r"two layouts disagree: layout= is .*, the environment's"):
        fp.FlatPolicy(env, layout=moved, encoder=encoder)


def test_an_action_space_that_does_not_start_at_zero_is_refused(env: Bandit) -> None:
    env.single_action_space = gymnasium.spaces.MultiDiscrete(BANDIT_SPEC.nvec, start=[1, 0, 0])
    with pytest.raises(ValueError, match="the spec's tuples need"):
        fp.FlatPolicy(env)


def test_a_spec_that_does_not_fit_the_layout_is_refused(env: Bandit) -> None:
    layout = fp.LegalLayout.from_dtype(BANDIT_DTYPE, "n", "legal")
    with pytest.raises(ValueError, match="3 values, the spec's 4"):
        fp.FlatPolicy(spec=fp.ActionSpec.from_nvec([3, 5, 5, 5]), layout=layout)


def test_an_encoder_must_declare_its_sizes(env: Bandit) -> None:
    with pytest.raises(TypeError, match="hidden_size and entity_sizes"):
        fp.FlatPolicy(env, encoder=nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"points at Entity\('unit'\)"):
        fp.FlatPolicy(env)  # the default encoder embeds no entities, and says how to go on


def test_the_default_encoder_takes_every_field_but_the_legal_list() -> None:
    dtype = np.dtype(
        [
            ("me", [("hp", np.int16), ("gold", np.float32, 2)]),
            ("n", np.int32),
            ("legal", np.uint8, (4, 2)),
        ]
    )
    layout = fp.LegalLayout.from_dtype(dtype, "n", "legal")
    encoder = fp.FieldEncoder(layout, hidden_size=8)
    assert [field.name for field in encoder.fields] == ["me.hp", "me.gold"]
    records = np.zeros(2, dtype)
    records["me"]["hp"] = [30000, -5]
    plain = encoder(torch.from_numpy(records.view(np.uint8).reshape(2, -1))).hidden
    assert plain.shape == (2, 8)
    assert plain.isfinite().all()
    records["legal"] = 7
    records["n"] = 2
    same = encoder(torch.from_numpy(records.view(np.uint8).reshape(2, -1))).hidden
    assert torch.equal(plain, same)
    records["me"]["gold"][1, 1] = 3
    other = encoder(torch.from_numpy(records.view(np.uint8).reshape(2, -1))).hidden
    assert torch.equal(other[0], plain[0])
    assert not torch.equal(other[1], plain[1])
    with pytest.raises(ValueError, match="no field besides the legal list"):
        fp.FieldEncoder(
            fp.LegalLayout.from_dtype([("n", "u1"), ("legal", "u1", (4, 2))], "n", "legal")
        )


@pytest.mark.usefixtures("each_kernel")
def test_samples_have_the_dtype_of_the_action_space(env: Bandit) -> None:
    for dtype, wanted in ((np.int32, torch.int32), (np.int64, torch.int64)):
        env.single_action_space = gymnasium.spaces.MultiDiscrete(BANDIT_SPEC.nvec, dtype=dtype)
        face, _ = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout)).forward_eval(
            observe(env)
        )
        assert face.sample().dtype == wanted


@pytest.mark.usefixtures("each_kernel")
def test_a_repeated_listing_never_doubles_a_probability(env: Bandit) -> None:
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    lists: list[list[tuple[int, ...]]] = [[(0, 0, 0), (1, 2, 3)]] * 16
    env.legal_layout.write(env.observations, lists)
    once, _ = policy.distribution(observe(env))
    env.legal_layout.write(env.observations, [[(0, 0, 0), (1, 2, 3), (0, 0, 0), (0, 0, 0)]] * 16)
    twice, _ = policy.distribution(observe(env))
    action = torch.tensor([[1, 2, 3]] * 16)
    torch.testing.assert_close(once.log_prob(action), twice.log_prob(action))
    assert len(twice.legal.actions) == 32


@pytest.mark.usefixtures("each_kernel")
def test_order_and_padding_of_the_list_change_nothing(env: Bandit) -> None:
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    action = torch.tensor([(actions or [(0, 0, 0)])[0] for actions in env.lists])
    before = policy.distribution(observe(env))[0]
    env.legal_layout.write(env.observations, [actions[::-1] for actions in env.lists])
    records = env.observations.view(BANDIT_DTYPE)[:, 0]
    for row, actions in enumerate(env.lists):
        records["legal"][row, len(actions) :] = 255
    after = policy.distribution(observe(env))[0]
    torch.testing.assert_close(before.log_prob(action), after.log_prob(action))
    torch.testing.assert_close(before.entropy(), after.entropy())
    assert torch.equal(before.mode, after.mode)


@pytest.mark.usefixtures("each_kernel")
def test_a_list_outside_the_spec_is_refused_naming_the_row(env: Bandit) -> None:
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    env.legal_layout.write(env.observations, [[(0, 0, 0)]] * 9 + [[(1, 3, 4)]] + [[(0, 0, 0)]] * 6)
    with pytest.raises(ValueError, match=r"row 9.*slot 2: 4 is outside 0..3.*unit of attack"):
        policy.forward_eval(observe(env))


@pytest.mark.usefixtures("each_kernel")
def test_nan_observations_are_an_error_and_no_action(env: Bandit) -> None:
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    with torch.no_grad():
        policy.head.scorer.state.bias.fill_(float("nan"))
    face, _ = policy.forward_eval(observe(env))
    with pytest.raises(ValueError, match="is nan; it must be finite"):
        face.sample()


def test_encode_and_decode_belong_together(env: Bandit) -> None:
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    with pytest.raises(RuntimeError, match="needs encode_observations"):
        policy.decode_actions(torch.zeros(16, policy.hidden_size))
    hidden = policy.encode_observations(observe(env))
    with pytest.raises(RuntimeError, match="got 8 rows, but 16 observations"):
        policy.decode_actions(hidden[:8])
    with pytest.raises(RuntimeError, match="needs encode_observations"):
        policy.decode_actions(hidden)  # what waited is gone with the failure
    face, value = policy.decode_actions(policy.encode_observations(observe(env)))
    again, value_again = policy.forward_eval(observe(env))
    assert torch.equal(face.distribution.logits, again.distribution.logits)
    assert torch.equal(value, value_again)


@pytest.mark.usefixtures("each_kernel")
def test_exploration_is_part_of_the_distribution_and_of_the_checkpoint(env: Bandit) -> None:
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    plain, _ = policy.distribution(observe(env))
    policy.explore(temperature=2.0, epsilon=0.25)
    explored, _ = policy.distribution(observe(env))
    expected = plain.tempered(2.0).smoothed(0.25)
    torch.testing.assert_close(explored.logits, expected.logits)
    twin = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    twin.load_state_dict(policy.state_dict())
    torch.testing.assert_close(twin.distribution(observe(env))[0].logits, expected.logits)
    for bad in ({"temperature": 0.0}, {"temperature": float("inf")}, {"temperature": 1e-50}):
        with pytest.raises(ValueError, match="temperature must be positive"):
            policy.explore(**bad)
    for bad in ({"epsilon": -0.1}, {"epsilon": 1.1}, {"epsilon": float("nan")}):
        with pytest.raises(ValueError, match=r"epsilon must lie in 0\.\.1"):
            policy.explore(**bad)


@pytest.mark.usefixtures("each_kernel")
def test_greedy_plays_the_mode_with_certainty(env: Bandit) -> None:
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    for forward in (fp.Greedy(policy).forward_eval, fp.Greedy(policy)):
        face, _ = forward(observe(env), {})
        mode = policy.forward_eval(observe(env))[0].mode
        assert torch.equal(face.sample(), mode)
        assert not face.log_prob(mode).any()
        assert not face.entropy().any()


@pytest.mark.usefixtures("each_kernel")
def test_recurrent_rollout_and_update_give_the_same_numbers(env: Bandit) -> None:
    policy = fp.RecurrentPolicy(env, encoder=BanditEncoder(env.legal_layout))
    steps = []
    for _ in range(5):
        env.deal()
        steps.append(observe(env).clone())
    state: dict[str, Any] = {
        "lstm_h": torch.zeros(16, policy.hidden_size),
        "lstm_c": torch.zeros(16, policy.hidden_size),
    }
    rollout = [policy.forward_eval(step, state) for step in steps]
    face, value = policy(torch.stack(steps, 1), {"lstm_h": None, "lstm_c": None})
    actions = [face.sample() for face, _ in rollout]
    together = torch.stack(
        [f.log_prob(a)[:, 0] for (f, _), a in zip(rollout, actions, strict=True)], 1
    )
    update = face.log_prob(torch.stack(actions, 1).view(80, 3))[:, 0].view(16, 5)
    torch.testing.assert_close(together, update, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack([v[:, 0] for _, v in rollout], 1), value)
    with pytest.raises(ValueError, match="segments, horizon, columns"):
        policy(torch.zeros(1, 2, 3, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"lstm_h must be \(16, 32\), got \(15, 32\)"):
        policy.forward_eval(steps[0], {k: v[:15] for k, v in state.items()})


@pytest.mark.usefixtures("each_kernel")
def test_an_empty_batch(env: Bandit) -> None:
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    face, value = policy(observe(env)[:0])
    assert face.sample().shape == (0, 3)
    assert value.shape == (0, 1)


def test_import_needs_no_pufferlib() -> None:
    code = (
        "import sys; sys.modules['pufferlib'] = None; sys.modules['essence_wars'] = None\n"
        "import tcg_flatpolicy, tcg_flatpolicy.app.cli, tcg_flatpolicy.app.train\n"
        "sys.exit(tcg_flatpolicy.app.cli.main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "PufferLib is not installed" in done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recurrent_policy_s_distribution_is_that_of_its_rollout(env: Bandit) -> None:
    policy = fp.RecurrentPolicy(env, encoder=BanditEncoder(env.legal_layout))
    first, second = observe(env), observe(env).flip(0)
    carried: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    with torch.no_grad():
        for observations in (first, second):
            face, value = policy.forward_eval(observations, carried)
            distribution, same = policy.distribution(observations, asked)
            assert torch.equal(distribution.logits, face.distribution.logits)
            assert torch.equal(value, same)
        alone, _ = policy.distribution(second)
    assert not torch.equal(alone.logits, distribution.logits)


def test_a_value_asked_for_in_between_does_not_hide_changed_exploration(env: Bandit) -> None:
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    with torch.no_grad():
        actions = policy.forward_eval(observe(env))[0].sample()
        policy.explore(temperature=2.0)
        policy(observe(env))  # for its value, say: nothing is drawn
        fp.Greedy(policy).forward_eval(observe(env))[0].sample()
    with pytest.raises(RuntimeError, match=r"drawn at .* \(1\.0, 0\.0\)"):
        policy(observe(env))[0].log_prob(actions)


def test_what_an_encoder_gives_is_named_if_it_is_no_encoding(env: Bandit) -> None:
    class Bare(BanditEncoder):
        def forward(self, observations: Tensor) -> Any:
            return super().forward(observations).hidden

    with pytest.raises(TypeError, match=r"Bare gave a Tensor; .*Encoding\(hidden, entities\)"):
        fp.FlatPolicy(env, encoder=Bare(env.legal_layout))(observe(env))


def test_what_a_recurrent_policy_cannot_do_is_said(env: Bandit) -> None:
    policy = fp.RecurrentPolicy(env, encoder=BanditEncoder(env.legal_layout))
    with pytest.raises(TypeError, match="has an LSTM of its own"):
        policy.encode_observations(observe(env))
    with pytest.raises(ValueError, match="lstm_h and no lstm_c"):
        policy.forward_eval(observe(env), {"lstm_h": torch.zeros(16, 32)})
    with pytest.raises(TypeError, match="state must be a dict"):
        policy.forward_eval(observe(env), ())


def test_what_is_no_number_is_refused(env: Bandit) -> None:
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    with pytest.raises(TypeError, match="temperature must be a number, got '1'"):
        policy.explore(temperature="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="k must be a whole number"):
        fp.TopK(policy, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must be at least 1"):
        fp.TopK(policy, 0)


def test_top_k_plays_the_k_most_probable(env: Bandit) -> None:
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    with torch.no_grad():
        all_of_it = policy.forward_eval(observe(env))[0].distribution
        for k in (1, 3, 100):
            top = fp.TopK(policy, k).forward_eval(observe(env))[0].distribution
            for row, (mine, theirs) in enumerate(
                zip(top.legal.to_lists(), all_of_it.legal.to_lists(), strict=True)
            ):
                start = int(all_of_it.legal.starts[row])
                probs = all_of_it.probs[start : start + len(theirs)].tolist()
                best = sorted(zip(probs, theirs, strict=True), key=lambda one: (-one[0], one[1]))
                best = best[:k]
                assert sorted(mine) == sorted(action for _, action in best)
                start = int(top.legal.starts[row])
                given = dict(zip(mine, top.probs[start : start + len(mine)].tolist(), strict=True))
                for prob, action in best:
                    assert given[action] == pytest.approx(prob / sum(p for p, _ in best), abs=1e-6)
        assert torch.equal(fp.TopK(policy, 1).forward_eval(observe(env))[0].mode, all_of_it.mode)


# ---- the trainer's settings, and PufferLib's ways to make a policy


def observed(rows: int = 3) -> tuple[Any, torch.Tensor]:
    env = Bandit(rows)
    env.reset(seed=2)
    return env, torch.as_tensor(env.observations.copy())


def test_a_trainer_whose_use_rnn_does_not_fit_the_policy_is_told() -> None:
    env, observations = observed()
    encoder = BanditEncoder(env.legal_layout)
    bare = {"reward": 0, "done": 0}
    state = {**bare, "lstm_h": torch.zeros(3, 4), "lstm_c": torch.zeros(3, 4)}
    with pytest.raises(RuntimeError, match=r"has a memory, .*: set use_rnn to True in its config"):
        fp.RecurrentPolicy(env, encoder=encoder).forward_eval(observations, bare)
    with pytest.raises(RuntimeError, match=r"has no memory, .*: set use_rnn to False in its con"):
        fp.FlatPolicy(env, encoder=encoder).forward_eval(observations, state)


def test_a_carried_state_of_another_size_is_named() -> None:
    env, observations = observed()
    policy = fp.RecurrentPolicy(env, encoder=BanditEncoder(env.legal_layout))
    good = torch.zeros(3, policy.hidden_size)
    for name in ("lstm_h", "lstm_c"):
        state = {"lstm_h": good, "lstm_c": good, name: torch.zeros(2, policy.hidden_size)}
        with pytest.raises(ValueError, match=rf"^{name} must be \(3, \d+\), got \(2, \d+\)$"):
            policy.forward_eval(observations, state)


def test_a_recurrent_policy_takes_the_parts_of_another() -> None:
    env, observations = observed()
    flat = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    flat.explore(1.5, 0.25)
    size = flat.hidden_size
    policy = fp.RecurrentPolicy(env, flat, input_size=size, hidden_size=size)
    assert policy.encoder is flat.encoder
    assert policy.head is flat.head
    assert policy.value is flat.value
    assert (policy.temperature, policy.epsilon) == (1.5, 0.25)
    assert policy.forward_eval(observations, {})[1].shape == (3, 1)
    with pytest.raises(ValueError, match=rf"hidden_size is 7, but the encoder's .* is {size}: "):
        fp.RecurrentPolicy(env, flat, hidden_size=7)
    with pytest.raises(ValueError, match="input_size is 9, but the encoder's"):
        fp.RecurrentPolicy(env, flat, input_size=9)
    for other in (policy, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"takes the parts of a Policy or FlatPolicy, got a "):
            fp.RecurrentPolicy(env, other)


def test_two_batches_encoded_before_a_decode_are_refused() -> None:
    env, observations = observed()
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    first = policy.encode_observations(observations)
    policy.encode_observations(observations.flip(0))
    with pytest.raises(RuntimeError, match="two batches were encoded since the last decode_act"):
        policy.decode_actions(first)
    hidden = policy.encode_observations(observations)
    assert policy.decode_actions(hidden)[1].shape == (3, 1)  # it starts over


def test_segments_without_a_memory_are_their_rows() -> None:
    env, observations = observed(6)
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    face, values = policy(observations.view(2, 3, -1))
    expected, wanted = policy(observations)
    assert torch.equal(values, wanted.view(2, 3))
    assert torch.equal(face.distribution.logits, expected.distribution.logits)


def test_an_actor_critic_knows_no_trainer() -> None:
    env, observations = observed(6)
    encoder = BanditEncoder(env.legal_layout)
    net = fp.ActorCritic(env.action_spec, env.legal_layout, encoder=encoder, recurrent=True)
    decided = net(observations)
    assert decided.distribution.batch_shape == (6,)
    assert [one.shape for one in decided.carried] == [(6, net.hidden_size)] * 2
    again = net(observations, decided.carried)
    assert not torch.equal(again.value, decided.value)
    plain = fp.ActorCritic(env.action_spec, env.legal_layout, encoder=encoder)
    assert plain(observations.view(2, 3, -1)).value.shape == (6, 1)
    assert plain(observations).carried == ()


def test_a_head_decides_by_observations_if_it_wants_to() -> None:
    """The default reads and packs; a head's own decide gets bytes, layout and exploration."""
    env, observations = observed()
    asked: list[Any] = []

    class Reads(fp.FlatHead):
        def decide(self, observations: Any, layout: Any, *rest: Any) -> Any:
            asked.append((observations.shape, layout.padding, rest[-1].settings.temperature))
            return super().decide(observations, layout, *rest)

    encoder = BanditEncoder(env.legal_layout)
    policy = fp.Policy(env, encoder=encoder, head=Reads)
    policy.explore(2.0)
    policy.forward_eval(observations)
    assert asked == [(observations.shape, policy.layout.padding, 2.0)]


def test_a_state_dict_with_exploration_that_cannot_be_is_refused() -> None:
    env, _ = observed()
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    state = policy.state_dict()
    assert {"temperature", "epsilon"} <= state.keys()
    with pytest.raises(RuntimeError, match="temperature must be positive and finite"):
        policy.load_state_dict({**state, "temperature": torch.tensor(-1.0)})
    del state["epsilon"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"epsilon"'):
        policy.load_state_dict(state)
    assert not policy.load_state_dict(state, strict=False).unexpected_keys


@pytest.mark.parametrize("kind", [fp.FlatPolicy, fp.RecurrentPolicy])
def test_a_policy_made_on_meta_is_whole_once_its_state_is_loaded(kind: Any) -> None:
    env, observations = observed()
    torch.manual_seed(0)
    policy = kind(env, encoder=BanditEncoder(env.legal_layout))
    policy.explore(1.5, 0.25)
    other = copy.deepcopy(policy).to("meta").to_empty(device="cpu")
    other.load_state_dict(policy.state_dict())
    torch.manual_seed(1)
    expected = policy.forward_eval(observations)[0]
    torch.testing.assert_close(
        other.forward_eval(observations)[0].distribution.logits, expected.distribution.logits
    )
    assert other.exploration.numbers.tolist() == [1.5, 0.25]


ONE = fp.ActionSpec.from_nvec([5])
ONE_DTYPE = np.dtype([("x", np.float32, 3), ("legal", np.uint8, (5, 1)), ("n", np.uint8)])


class OneNumber(pufferlib.PufferEnv):
    """A spec of one value, as PettingZoo's and OpenSpiel's games have it: Discrete."""

    single_action_space: Any = gymnasium.spaces.Discrete(5)

    def __init__(self, num_agents: int = 8, buf: Any = None, seed: int = 0) -> None:
        self.action_spec = ONE
        self.legal_layout = fp.LegalLayout.from_dtype(ONE_DTYPE, "n", "legal", spec=ONE)
        size = ONE_DTYPE.itemsize
        self.single_observation_space = gymnasium.spaces.Box(0, 255, (size,), np.uint8)
        self.num_agents, self.rng = num_agents, np.random.default_rng(seed)
        super().__init__(buf)

    def show(self) -> None:
        lists = [
            [(v,) for v in range(5) if self.rng.random() < 0.6] for _ in range(self.num_agents)
        ]
        self.legal_layout.write(self.observations, lists)

    def reset(self, seed: int | None = None) -> Any:
        self.show()
        return self.observations, []

    def step(self, actions: Any) -> Any:
        self.show()
        self.terminals[:] = True
        return self.observations, self.rewards, self.terminals, self.truncations, []

    def close(self) -> None: ...


class OneColumn(OneNumber):
    single_action_space = ONE.action_space


@pytest.mark.integration
def test_a_discrete_action_space_is_taken_and_the_trainer_s_limit_is_said(trainers: Any) -> None:
    def made(kind: Any) -> Any:
        return pufferlib.vector.make(kind, backend=pufferlib.vector.Serial, num_envs=1)

    env = OneNumber()
    env.reset()
    face, _ = fp.FlatPolicy(env).forward_eval(torch.as_tensor(env.observations))
    assert face.distribution.legal.contains(face.sample()).all()
    vecenv = made(OneNumber)
    with pytest.raises(RuntimeError, match=r"is Discrete: set .* MultiDiscrete\(\[5\]\), and take"):
        trainers(vecenv, fp.FlatPolicy(vecenv.driver_env)).evaluate()
    vecenv = made(OneColumn)
    trainer = trainers(vecenv, fp.FlatPolicy(vecenv.driver_env))
    trainer.evaluate()
    trainer.train()
    torch.testing.assert_close(trainer.ratio, torch.ones_like(trainer.ratio), rtol=0, atol=1e-5)
    env.single_action_space = gymnasium.spaces.Discrete(4)
    with pytest.raises(ValueError, match=r"or to Discrete\(5\)$"):
        fp.FlatPolicy(env)


@pytest.mark.parametrize("head", ["flat", "autoregressive"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -1e300])
def test_a_number_that_no_network_survives_names_its_field(number: float, head: str) -> None:
    me = np.dtype([("hp", np.float64, 3), ("mana", np.int32)], align=True)
    dtype = np.dtype([("n", np.uint8), ("legal", np.uint8, (4, 2)), ("me", me)], align=True)
    spec = fp.ActionSpec.from_nvec([2, 3])
    layout = fp.LegalLayout.from_dtype(dtype, "n", "legal", spec=spec)
    policy = fp.Policy(spec=spec, layout=layout, hidden_size=8, head=head)
    records = np.zeros(3, dtype)
    data = torch.as_tensor(records.view(np.uint8).reshape(3, -1).copy())
    layout.write(data.numpy(), [[(0, 1), (1, 2)]] * 3)
    layout.field(data, "me.hp")[1, 2] = number
    face, _ = policy.forward_eval(data)
    for ask in (face.sample, lambda: face.log_prob(torch.zeros(3, 2)), lambda: face[1:].sample()):
        with pytest.raises(
            ValueError, match=r"row [01]: .* is nan.*: the observation's field 'me.hp'"
        ) as caught:
            ask()
        # As it comes out of another process.
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with torch.no_grad():
        policy.value.weight.fill_(0)
        for weight in policy.head.parameters():
            weight.fill_(torch.nan)
    layout.field(data, "me.hp").zero_()
    with pytest.raises(ValueError, match=r"row 0: .* is nan.*: look for a diverged network"):
        policy.forward_eval(data)[0].sample()


@pytest.mark.parametrize("kind", ["lstm", "parameter", "assign"])
def test_a_compiled_recurrent_policy_reads_weights_that_were_replaced(kind: str) -> None:
    env, observations = observed(4)
    policy = fp.RecurrentPolicy(env, encoder=BanditEncoder(env.legal_layout))
    compiled = torch.compile(policy, fullgraph=True, backend="aot_eager")
    segments = observations.view(2, 2, -1)
    before = compiled(segments)[1]
    size = policy.hidden_size
    if kind == "lstm":
        policy.lstm = nn.LSTM(size, size)
    elif kind == "parameter":
        policy.lstm.weight_hh_l0 = nn.Parameter(torch.randn(4 * size, size))
    else:
        policy.lstm.load_state_dict(nn.LSTM(size, size).state_dict(), assign=True)
    after = compiled(segments)[1]
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, policy(segments)[1])
