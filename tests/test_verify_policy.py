"""audit_policy: sound policies have no finding; each bug as seen in the wild has its own code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pettingzoo.utils
import pufferlib.emulation
import pufferlib.models
import pufferlib.vector
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy import testing
from tcg_flatpolicy.verify import Report
from tcg_flatpolicy.verify import policy as audit
from tcg_flatpolicy.verify.policy import audit_policy
from tcg_flatpolicy.wrapping import env_attribute
from tests.broken import AEC, Parallel, Solo
from tests.broken import SPEC as DUEL_SPEC
from tests.games import BANDIT_SPEC, CARDS, ROOM, Bandit, BanditEncoder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from baselines import MasksOfGreedyPrimary, MasksPerHead

pytestmark = pytest.mark.integration

STEPS = 2000
IDS = int(BANDIT_SPEC.nvec.prod())
EVERY = torch.as_tensor(BANDIT_SPEC.unravel(np.arange(IDS)))


def bandit(**arguments: Any) -> Bandit:
    return Bandit(**{"num_agents": 64, "seed": 3, **arguments})


def ours(env: Any, kind: type[fp.Policy] = fp.Policy, **arguments: Any) -> fp.Policy:
    torch.manual_seed(0)
    return kind(env, encoder=BanditEncoder(env_attribute(env, "legal_layout")), **arguments)


# ---- a policy as a user may have written it: none of this library's distributions


class Dense(torch.distributions.Normal):
    """A categorical over all ids of the spec, behind the face of a Normal."""

    def __init__(self, log_p: Tensor) -> None:
        self.log_p = log_p  # (B, IDS)
        self.loc = torch.zeros(len(log_p), 1)
        torch.distributions.Distribution.__init__(self, log_p.shape[:1], validate_args=False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return EVERY[torch.multinomial(self.log_p.detach().double().exp(), 1)[:, 0]]

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_p.gather(1, BANDIT_SPEC.ravel(value.long()).unsqueeze(1))

    def entropy(self) -> Tensor:
        p = self.log_p.exp()
        return -torch.where(p > 0, p * self.log_p, 0.0).sum(1, keepdim=True)


class Plain(nn.Module):
    """One score for each id, masked to the list; what bugs there are override a method."""

    face: type[Dense] = Dense
    sharpness = 1.0

    def __init__(self, env: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout = env.legal_layout
        self.spec = env.action_spec
        self.hidden = nn.Linear(4 * 4 + CARDS, 32)
        self.scores = nn.Linear(32, IDS)
        self.value = nn.Linear(32, 1)
        nn.init.normal_(self.scores.weight, std=0.5)

    def read(self, observations: Tensor) -> tuple[Tensor, fp.LegalActions]:
        kinds = self.layout.field(observations, "kind").long()
        card = self.layout.field(observations, "card").long()
        kinds = nn.functional.one_hot(kinds, 4).flatten(1)
        card = nn.functional.one_hot(card, CARDS)
        features = torch.cat([kinds, card], 1).float()
        return torch.relu(self.hidden(features)), self.layout.read(observations)

    def mask(self, legal: fp.LegalActions) -> Tensor:
        mask = legal.to_mask(BANDIT_SPEC)
        mask[legal.counts == 0, 0] = True
        return mask

    def score(self, hidden: Tensor, legal: fp.LegalActions) -> Tensor:
        return self.scores(hidden) * self.sharpness

    def normalise(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(~mask, -torch.inf).log_softmax(1)

    def forward(self, observations: Tensor, state: Any = None) -> tuple[Any, Tensor]:
        hidden, legal = self.read(observations)
        log_p = self.normalise(self.score(hidden, legal), self.mask(legal))
        return self.face(log_p), self.value(hidden)

    def forward_eval(self, observations: Tensor, state: Any = None) -> tuple[Any, Tensor]:
        return self.forward(observations, state)


# ---- the bugs


class HeadMasks(Plain):
    """P01: PufferLib's MultiDiscrete, each head masked by the marginal of the list."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.scores = nn.Linear(32, int(BANDIT_SPEC.nvec.sum()))

    def masks(self, legal: fp.LegalActions, heads: list[Tensor]) -> list[Tensor]:
        return legal.head_masks(BANDIT_SPEC.nvec.tolist())

    def forward(self, observations: Tensor, state: Any = None) -> tuple[Any, Tensor]:
        hidden, legal = self.read(observations)
        heads = list(self.scores(hidden).split(BANDIT_SPEC.nvec.tolist(), dim=1))
        masks = self.masks(legal, heads)
        heads = [h.masked_fill(~mask, -1e8) for h, mask in zip(heads, masks, strict=True)]
        return heads, self.value(hidden)


class GreedyMasks(HeadMasks):
    """P02: the later heads are masked for the most probable primary."""

    def masks(self, legal: fp.LegalActions, heads: list[Tensor]) -> list[Tensor]:
        first, *_ = super().masks(legal, heads)
        greedy = heads[0].masked_fill(~first, -torch.inf).argmax(1)
        lists = [
            [action for action in row if action[0] == primary]
            for row, primary in zip(legal.to_lists(), greedy.tolist(), strict=True)
        ]
        of_greedy = fp.LegalActions.from_lists(lists, slots=2)
        return [first, *of_greedy.head_masks(BANDIT_SPEC.nvec.tolist())[1:]]


class Fallback(Plain):
    """P03: the mask was zeroed before use; what is refused is replaced by the no-op."""

    def mask(self, legal: fp.LegalActions) -> Tensor:
        return torch.zeros(len(legal), IDS, dtype=torch.bool)

    def normalise(self, scores: Tensor, mask: Tensor) -> Tensor:
        return (scores + 1e9 * (mask.float() - 1)).log_softmax(1)  # a uniform one, in float32

    def forward(self, observations: Tensor, state: Any = None) -> tuple[Any, Tensor]:
        face, value = super().forward(observations, state)
        legal = self.layout.read(observations)
        draw = face.sample

        def sample() -> Tensor:
            drawn = draw()
            return torch.where(legal.contains(drawn).unsqueeze(1), drawn, legal.noop)

        face.sample = sample
        return face, value


class RolloutTemperature(Plain):
    """P04: only the rollout divides by the temperature."""

    def forward_eval(self, observations: Tensor, state: Any = None) -> tuple[Any, Tensor]:
        hidden, legal = self.read(observations)
        log_p = self.normalise(self.score(hidden, legal) / 1.5, self.mask(legal))
        return self.face(log_p), self.value(hidden)


class ExploresInUpdates(fp.Policy):
    """P04: a schedule that is asked in the update only."""

    def forward(self, observations: Tensor, state: Any = None) -> Any:
        self.explore(temperature=1.5)
        return super().forward(observations, state)

    def forward_eval(self, observations: Tensor, state: Any = None) -> Any:
        self.explore()
        return super().forward_eval(observations, state)


def explores_in_updates(env: Any) -> nn.Module:
    return ours(env, ExploresInUpdates)


class Dropout(Plain):
    """P05: drawn with some units dropped, replayed with others."""

    def score(self, hidden: Tensor, legal: fp.LegalActions) -> Tensor:
        return super().score(nn.functional.dropout(hidden, 0.1, self.training), legal)


class BatchNorm(Plain):
    """P05: the log-prob of a row depends on the other rows."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.norm = nn.BatchNorm1d(32)

    def score(self, hidden: Tensor, legal: fp.LegalActions) -> Tensor:
        return super().score(self.norm(hidden), legal)


class Clock(Plain):
    """P05: the temperature falls from call to call."""

    calls = 0

    def score(self, hidden: Tensor, legal: fp.LegalActions) -> Tensor:
        self.calls += 1
        return super().score(hidden, legal) * (1 + 0.01 * self.calls)


class HalfPrecision(Plain):
    """P06: normalised in bfloat16."""

    def normalise(self, scores: Tensor, mask: Tensor) -> Tensor:
        return super().normalise(scores.bfloat16(), mask).float()


class LostMass(Plain):
    """P06: a thousandth is kept back for illegal tuples, which are then never drawn."""

    def normalise(self, scores: Tensor, mask: Tensor) -> Tensor:
        return super().normalise(scores, mask) + float(np.log(0.999))


class SummedEntropy(Dense):
    """The entropies of the values, each by itself."""

    def entropy(self) -> Tensor:
        p = self.log_p.exp().view(-1, *BANDIT_SPEC.nvec.tolist())
        each = [p.sum([d for d in (1, 2, 3) if d != keep]) for keep in (1, 2, 3)]
        return sum(torch.distributions.Categorical(one).entropy() for one in each).unsqueeze(1)


class EntropyOfHeads(Plain):
    """P07."""

    face = SummedEntropy


class Positions(Plain):
    """P08: a tuple's score depends on where it is listed."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.positions = nn.Parameter(torch.randn(ROOM) * 0.1)

    def score(self, hidden: Tensor, legal: fp.LegalActions) -> Tensor:
        at = torch.arange(len(legal.rows)) - legal.starts[legal.rows]
        added = torch.zeros(len(legal), IDS)
        added = added.index_put((legal.rows, BANDIT_SPEC.ravel(legal.actions)), self.positions[at])
        return super().score(hidden, legal) + added


class ReadsPadding(Plain):
    """P08: the network reads the list's bytes, padding included, whatever the order."""

    def read(self, observations: Tensor) -> tuple[Tensor, fp.LegalActions]:
        hidden, legal = super().read(observations)
        behind = torch.arange(ROOM) >= legal.counts.unsqueeze(1)
        listed = self.layout.field(observations, "legal").float().sum(2)
        return hidden + 0.1 * (listed * behind).sum(1, keepdim=True), legal


class BiasedDense(Dense):
    """Draws from a flatter distribution than the one of the log-probs."""

    power = 0.4

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        p = (self.log_p.detach() * self.power).exp()
        return EVERY[torch.multinomial(p, 1)[:, 0]]


class SlightlyBiasedDense(BiasedDense):
    """In no one state does it show for certain."""

    power = 0.8


class BiasedDraws(Plain):
    """P09."""

    face = BiasedDense


class SlightlyBiasedDraws(Plain):
    """P09."""

    face = SlightlyBiasedDense


class Certain(Plain):
    """P20: scores have grown without bound."""

    sharpness = 1e4


class AlwaysRests(Plain):
    """P21: the no-op whenever it is listed."""

    def score(self, hidden: Tensor, legal: fp.LegalActions) -> Tensor:
        return super().score(hidden, legal) + 15.0 * (torch.arange(IDS) == 0)


class NeverPlays(Plain):
    """P22: one primary's logit was initialised low."""

    def score(self, hidden: Tensor, legal: fp.LegalActions) -> Tensor:
        plays = EVERY[:, 0] == 1
        return super().score(hidden, legal) - 30.0 * plays


def masks_per_head(env: Any) -> nn.Module:
    return ours(env, head=MasksPerHead)


def masks_of_greedy_primary(env: Any) -> nn.Module:
    return ours(env, head=MasksOfGreedyPrimary)


BROKEN = [
    (masks_per_head, "P01"),
    (HeadMasks, "P01"),
    (masks_of_greedy_primary, "P02"),
    (GreedyMasks, "P02"),
    (Fallback, "P03"),
    (RolloutTemperature, "P04"),
    (explores_in_updates, "P04"),
    (Dropout, "P05"),
    (BatchNorm, "P05"),
    (Clock, "P05"),
    (HalfPrecision, "P06"),
    (LostMass, "P06"),
    (EntropyOfHeads, "P07"),
    (Positions, "P08"),
    (ReadsPadding, "P08"),
    (BiasedDraws, "P09"),
    (SlightlyBiasedDraws, "P09"),
    (Certain, "P20"),
    (AlwaysRests, "P21"),
    (NeverPlays, "P22"),
]


@pytest.mark.parametrize(("make", "code"), BROKEN, ids=[f"{m.__name__}-{c}" for m, c in BROKEN])
def test_each_bug_is_found_under_its_own_code(make: Any, code: str) -> None:
    env = bandit()
    report = audit_policy(make(env), env, STEPS)
    print(report)
    assert list(report.findings) == [code]
    assert report.findings[code].message
    assert env.illegal_actions == 0  # what is not listed is not sent


# ---- sound ones


ALL_CHECKS = {
    audit.LISTED,
    audit.REPLAY,
    audit.UPDATE,
    audit.SCORES,
    audit.SUMS,
    audit.ENTROPY,
    audit.ORDER,
    audit.DRAWS,
    audit.SURENESS,
    audit.NOOP,
    audit.PRIMARIES,
}


def nothing_found(report: Report, without: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    print(report)
    assert report.ok
    passed = {name for name, check in report.checks.items() if check.status == "passed"}
    assert passed == ALL_CHECKS - without


def test_a_sound_policy_without_this_library_s_distributions() -> None:
    env = bandit(empty=0.2)
    report = audit_policy(Plain(env), env, STEPS)
    nothing_found(report, without={audit.SCORES})
    assert report.figures["states"] >= STEPS


@pytest.mark.parametrize("head", ["flat", "autoregressive"])
def test_the_library_s_heads(head: str) -> None:
    env = bandit(empty=0.2)
    without = {audit.SCORES} if head == "autoregressive" else set()
    nothing_found(audit_policy(ours(env, head=head), env, STEPS), without)


def test_exploration_is_part_of_the_distribution() -> None:
    env = bandit()
    policy = ours(env)
    with torch.no_grad():
        for parameter in policy.head.parameters():
            parameter.mul_(2.0)
    policy.explore(temperature=0.2, epsilon=0.1)
    nothing_found(audit_policy(policy, env, STEPS))


@pytest.mark.parametrize("wrapper", [False, True])
def test_recurrent_policies(wrapper: bool) -> None:
    env = bandit()
    policy: nn.Module = ours(env, fp.Policy if wrapper else fp.RecurrentPolicy)
    if wrapper:
        policy = pufferlib.models.LSTMWrapper(env, policy, 32, 32)
    assert audit.is_recurrent(policy)
    nothing_found(audit_policy(policy, env, STEPS))


def test_a_vector_environment() -> None:
    vecenv = pufferlib.vector.make(
        Bandit,
        env_kwargs={"num_agents": 16},
        backend=pufferlib.vector.Serial,
        num_envs=3,
        seed=1,
    )
    nothing_found(audit_policy(ours(vecenv), vecenv, STEPS))


@pytest.mark.parametrize("head", ["flat", "autoregressive"])
def test_on_the_game(head: str) -> None:
    pytest.importorskip("essence_wars")
    from tcg_flatpolicy.games.essence_wars import EssenceWars, EssenceWarsEncoder

    env = EssenceWars(num_games=32, seed=0)
    torch.manual_seed(0)
    policy = fp.Policy(env, head=head, encoder=EssenceWarsEncoder(env.legal_layout, 64, 16))
    report = audit_policy(policy, env, 400)
    print(report)
    assert report.ok


# ---- what an audit leaves as it was, and what it says


def test_mode_weights_buffers_and_random_numbers_are_left_as_they_were() -> None:
    env = bandit()
    policy = BatchNorm(env)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    audit_policy(policy, env, 200)
    assert torch.equal(torch.rand(3), expected)
    assert policy.training
    policy.eval()
    assert audit_policy(policy, env, 200).ok  # batch norm is sound in eval mode
    assert not policy.training
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_the_same_seed_gives_the_same_report() -> None:
    reports = []
    for _ in range(2):
        env = bandit()
        reports.append(audit_policy(HeadMasks(env), env, 500, seed=4))
    first, second = reports
    assert {c: vars(f) for c, f in first.findings.items()} == {
        c: vars(f) for c, f in second.findings.items()
    }


def test_a_message_names_row_step_tuple_and_list() -> None:
    env = bandit()
    (finding,) = audit_policy(HeadMasks(env), env, 500).findings.values()
    assert finding.count > 50
    for words in ("step 0, row ", "drew (", "which is not listed; its ", "listed tuples are ("):
        assert words in finding.message


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Dropout, "when asked again in the same batch"),
        (BatchNorm, "when asked again among other rows"),
        (RolloutTemperature, "the rollout (forward_eval) gave log-prob"),
        (explores_in_updates, "from step 0 on: the policy refused the update: exploration was"),
        (LostMass, "the rest is on tuples that are not listed, or lost"),
        (Positions, "with the list in another order"),
        (ReadsPadding, "with other tuples behind the list, in its padding"),
        (BiasedDraws, "whose probability is"),
        (SlightlyBiasedDraws, "over 16 states, draws are off"),
        (masks_of_greedy_primary, "are legal with the most probable primary"),
        (Fallback, "such draws are the no-op"),
    ],
)
def test_a_message_says_how_it_was_found(make: Any, words: str) -> None:
    env = bandit()
    (finding,) = audit_policy(make(env), env, 500).findings.values()
    assert words in finding.message


def test_what_a_finding_explains_is_not_looked_at() -> None:
    env = bandit()
    fallback = audit_policy(Fallback(env), env, 500)
    assert "P03" in str(fallback.checks[audit.NOOP].skipped)
    dropout = audit_policy(Dropout(env), env, 500)
    for check in (audit.UPDATE, audit.SUMS, audit.ORDER, audit.DRAWS):
        assert "P05" in str(dropout.checks[check].skipped)


def test_sums_that_unlisted_draws_explain_are_not_passed() -> None:
    env = bandit()
    report = audit_policy(HeadMasks(env), env, 500)
    sums = report.checks[audit.SUMS]
    assert sums.status == "skipped"
    assert "% of the mass is on tuples that are not listed" in str(sums.skipped)


def test_what_cannot_be_looked_at_is_skipped_not_passed() -> None:
    env = bandit(num_agents=4)
    report = audit_policy(ours(env), env, 8)
    for check in (audit.SURENESS, audit.NOOP, audit.PRIMARIES):
        assert report.checks[check].status == "skipped"
        assert "more" in str(report.checks[check].skipped)
    assert report.checks[audit.LISTED].cases == 8


def test_only_empty_lists() -> None:
    env = bandit(empty=1.1)
    report = audit_policy(ours(env), env, 128)
    assert report.ok
    assert report.checks[audit.LISTED].cases == 128
    assert report.checks[audit.SUMS].status == "skipped"


def test_spec_and_layout_may_be_given() -> None:
    env = bandit()
    policy = Plain(env)
    spec, layout = env.action_spec, env.legal_layout
    policy.layout_, env.action_spec, env.legal_layout = layout, None, None

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = policy

        def forward_eval(self, *arguments: Any) -> Any:
            return self.inner.forward_eval(*arguments)

        def forward(self, *arguments: Any) -> Any:
            return self.inner(*arguments)

    with pytest.raises(ValueError, match="needs spec="):
        audit_policy(Hidden(), env, 10)
    env.legal_layout = layout  # the environment writes its lists by it
    assert audit_policy(Hidden(), env, 100, spec=spec, layout=layout).ok
    with pytest.raises(ValueError, match="steps"):
        audit_policy(policy, env, 0)


def test_the_entropy_of_an_estimate_must_be_right_on_average() -> None:
    env = bandit()
    policy = ours(env, head="autoregressive")
    face = policy._face

    def wrong(*given: Any) -> Any:
        normal, value = face(*given)
        right = normal._entropy_of
        normal._entropy_of = lambda actions: right(actions) + 0.3
        return normal, value

    policy._face = wrong  # type: ignore[method-assign]
    report = audit_policy(policy, env, STEPS)
    assert list(report.findings) == ["P07"]
    assert "on average" in report.findings["P07"].message


def test_chi_square_knows_right_from_wrong() -> None:
    p = torch.tensor([0.5, 0.3, 0.195, 0.005], dtype=torch.float64)
    right = torch.tensor([505.0, 300.0, 190.0, 5.0], dtype=torch.float64)
    statistic, freedom = audit._chi_square(right, p)
    assert freedom == 2  # the rarest goes with the next
    assert audit._tail(statistic, freedom) > 0.5
    statistic, freedom = audit._chi_square(right.flip(0), p)
    assert audit._tail(statistic, freedom) < 1e-30
    # 16 for one degree of freedom: twice the normal tail beyond 4.
    assert audit._tail(16.0, 1) == pytest.approx(6.334e-5, rel=1e-3)


def one_solo(buf: Any = None, seed: int = 0) -> Any:
    return pufferlib.emulation.GymnasiumPufferEnv(env_creator=Solo, buf=buf, seed=seed)


def one_parallel(buf: Any = None, seed: int = 0) -> Any:
    return pufferlib.emulation.PettingZooPufferEnv(env_creator=Parallel, buf=buf, seed=seed)


class TurnBased(AEC):
    metadata: ClassVar[dict[str, Any]] = {"is_parallelizable": True}
    render_mode = None


def one_aec(buf: Any = None, seed: int = 0) -> Any:
    return pufferlib.emulation.PettingZooPufferEnv(
        env_creator=lambda: pettingzoo.utils.turn_based_aec_to_parallel(TurnBased()),
        buf=buf,
        seed=seed,
    )


@pytest.mark.parametrize(
    ("make", "kind", "returned"),
    [
        (Solo, "a bare gymnasium.Env", "emulation.GymnasiumPufferEnv(env_creator=Solo, buf=buf, "),
        (Parallel, "a bare PettingZoo Para", "emulation.PettingZooPufferEnv(env_creator=Parallel"),
        (TurnBased, "a bare PettingZoo AECEnv", "utils.turn_based_aec_to_parallel(TurnBased()), "),
        (
            one_solo,
            "a single emulated env",
            "where make(buf=None, seed=0) returns it, with buf",
        ),
        (one_parallel, "a single emulated env", "where make(buf=None, seed=0) returns it, with"),
    ],
)
def test_an_environment_without_rows_is_refused(make: Any, kind: str, returned: str) -> None:
    env = make()
    env.reset(seed=0)
    with pytest.raises(TypeError) as raised:
        audit_policy(nn.Linear(1, 1), env)
    message = str(raised.value)
    assert message.startswith(f"{type(env).__name__} is {kind}")
    assert "pufferlib.vector.make(make, num_envs=4, backend=pufferlib.vector.Serial)" in message
    assert returned in message


@pytest.mark.parametrize("make", [one_solo, one_parallel, one_aec])
def test_what_a_refusal_says_to_do_works(make: Any) -> None:
    """With the layout by its keys, and with Entity roles, too."""
    env = pufferlib.vector.make(make, num_envs=4, backend=pufferlib.vector.Serial)
    layout = fp.LegalLayout.from_env(env, "n", "legal", DUEL_SPEC)
    torch.manual_seed(0)
    encoder = audit.LearnedEntities(layout, DUEL_SPEC)
    policy = fp.FlatPolicy(env, spec=DUEL_SPEC, layout=layout, encoder=encoder)
    report = audit_policy(policy, env, 400, layout=("n", "legal"))
    print(report)
    assert report.ok
    assert report.checks[audit.LISTED].cases >= 400


def test_keys_need_a_dict_observation() -> None:
    env = bandit()
    with pytest.raises(TypeError, match="no structured observation"):
        audit_policy(ours(env), env, layout=("n", "legal"))


def test_rewards_of_another_shape_are_refused() -> None:
    class OneReward(Bandit):
        def step(self, actions: Any) -> Any:
            observations, rewards, *rest = super().step(actions)
            return observations, float(rewards.sum()), *rest

    env = OneReward(num_agents=4)
    with pytest.raises(ValueError, match=r"rewards of shape \(\) for 4 rows.*put it into a vector"):
        audit_policy(ours(env), env)


# ---- the encoder for any spec


@given(testing.specs(), st.sampled_from(["flat", "autoregressive"]), st.data())
@settings(max_examples=30)
def test_an_audit_s_encoder_embeds_any_spec(spec: fp.ActionSpec, head: str, data: Any) -> None:
    dtype = np.dtype([("hp", "f4", 3), ("n", "u1"), ("legal", "u1", (8, 1 + spec.slots))])
    layout = fp.LegalLayout.from_dtype(dtype, "n", "legal", spec=spec)
    shown = torch.as_tensor(data.draw(testing.observations(layout)))
    encoder = audit.LearnedEntities(layout, spec, hidden_size=8, embedding_size=3)
    policy = fp.Policy(spec=spec, layout=layout, encoder=encoder, head=head, width=4)
    distribution, _ = policy.distribution(shown)
    assert layout.read(shown).contains(distribution.sample()).all()
    names = {part.role.name for part in spec.parts if isinstance(part.role, fp.Entity)}
    assert set(encoder.entity_sizes) == names
    for name, (rows, size) in encoder.entity_sizes.items():
        roles = [part.role for part in spec.parts if isinstance(part.role, fp.Entity)]
        assert (rows, size) == (max(role.size for role in roles if role.name == name), 3)


def test_an_audit_s_encoder_tells_entities_apart() -> None:
    """Else every tuple of a primary would have one score."""
    env = bandit()
    torch.manual_seed(0)
    encoder = audit.LearnedEntities(env.legal_layout, env.action_spec)
    policy = fp.FlatPolicy(env, encoder=encoder)
    observations, _ = env.reset(seed=1)
    face, _ = policy.forward_eval(torch.as_tensor(observations))
    legal, logits = face.distribution.legal, face.distribution.logits
    attacks = legal.actions[:, 0] == 1
    row = int(legal.rows[attacks].bincount().argmax())
    of_row = logits[attacks & (legal.rows == row)]
    assert len(of_row.unique()) == len(of_row) > 2
