"""The fused decision: its reference against float64, and Triton's kernels against both.

Without a GPU the kernels run in Triton's interpreter, which is slow: few rows, few examples.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pufferlib.pytorch import sample_logits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tcg_flatpolicy as fp
from tcg_flatpolicy import kernels, testing
from tcg_flatpolicy.distribution import UnsoundScore
from tcg_flatpolicy.games.essence_wars import EssenceWars, EssenceWarsEncoder
from tcg_flatpolicy.heads.fused import FusedCategorical, Late, bind
from tcg_flatpolicy.invalid import InvalidActionWarning
from tcg_flatpolicy.kernels import reference
from tcg_flatpolicy.kernels.reference import COUNT, SCORE, TUPLE, Addresses, Rows
from tcg_flatpolicy.table import as_tensors
from tests.exact_kernels import Amount
from tests.games import BANDIT_DTYPE, Bandit, BanditEncoder
from tests.test_kernels import STRUCTS
from tests.test_sampling import ALPHA, p_value

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, masked
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOUND = version("triton") if importlib.util.find_spec("triton") else "0.0"
TRITON = tuple(int(part) for part in FOUND.split(".")[:2]) >= (
    (3, 5) if DEVICE == "cuda" else (3, 9)
)
needs_triton = pytest.mark.skipif(
    not TRITON, reason="without a GPU this needs the interpreter of triton 3.9: pip install triton"
)
KERNELS = ["reference", pytest.param("cuda", marks=needs_triton)]


@pytest.fixture(scope="module", autouse=True)
def _quick_interpreter() -> None:
    """Triton's interpreter looks through its language at each call of a device function."""
    if not TRITON or DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    ready = set()

    def call(self: Any, *given: Any, **named: Any) -> Any:
        if self.fn.__module__ not in ready:
            ready.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*given, **named)

    interpreter.InterpretedFunction.__call__ = call


def use(kernel: str, patch: pytest.MonkeyPatch) -> None:
    """Decides by that kernel until the end of the patch."""
    patch.setenv("TCG_KERNEL", kernel)
    patch.setattr(kernels, "_fused", functools.cache(kernels._fused.__wrapped__))
    assert kernels.fused(DEVICE) == ("" if kernel == "packed" else kernel)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(request.param, monkeypatch)
    return str(request.param)


# ---- numbers


@st.composite
def layouts(draw: st.DrawFn, rows_each: int = 12) -> fp.LegalLayout:
    """Lists of integers of any kind at odd places, tuple by tuple or slot by slot."""
    spec = draw(testing.specs(kinds=(fp.Index, fp.Entity, Amount)))
    room, values = draw(st.integers(1, rows_each)), 1 + spec.slots
    if draw(st.booleans()):
        names: Any = "legal"
        listed = [("legal", draw(STRUCTS), (room, values))]
    else:
        names = tuple(f"s{slot}" for slot in range(values))
        listed = [(name, draw(STRUCTS), (room,)) for name in names]
    fields = [("pad", "u1", (draw(st.integers(0, 3)),)), ("n", draw(STRUCTS)), *listed]
    dtype = np.dtype(draw(st.permutations(fields)), align=draw(st.booleans()))
    return fp.LegalLayout.from_dtype(dtype, "n", names, spec)


class Case:
    """A scorer, observations, and what an encoder gave for them."""

    def __init__(self, layout: fp.LegalLayout, data: np.ndarray, width: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.layout, self.data = layout, torch.as_tensor(data).to(DEVICE)
        sizes = {name: (4 + seed % 3, 1 + seed % 5) for name in layout.spec.entity_names}
        self.head = fp.FlatHead(layout.spec, 5, sizes, width).to(DEVICE)
        with torch.no_grad():
            self.head.scorer.readout.mul_(10)
            self.head.scorer.readout_of_state.mul_(30)
        self.names = list(sizes)
        self.leaves = [torch.randn(len(data), 5)]
        self.leaves += [torch.randn(len(data), *size) for size in sizes.values()]
        self.leaves = [leaf.to(DEVICE).requires_grad_() for leaf in self.leaves]

    def entities(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.leaves[1:], strict=True))

    def given(self) -> tuple[Any, ...]:
        """The first arguments of decide and evaluate."""
        of = self.head.fused
        addresses = Addresses(of.ranges, of.limits, of.noop, of.learned)
        rows = bind(self.head.scorer, self.leaves[0], self.entities())
        return self.data, self.layout.list_view(), addresses, rows

    def exactly(self, explore: tuple[float, float]) -> tuple[fp.LegalCategorical, list[Tensor]]:
        """Packed and in float64; and what has a gradient there."""
        head = copy.deepcopy(self.head).double()
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        legal = self.layout.read_distinct(self.data)
        scores = head.scorer(leaves[0], dict(zip(self.names, leaves[1:], strict=True)), legal)
        distribution = fp.LegalCategorical(legal, scores)
        distribution = distribution.tempered(explore[0]).smoothed(explore[1])
        return distribution, [*leaves, *head.scorer.parameters()]


@st.composite
def cases(draw: st.DrawFn, max_rows: int, rows_each: int = 12) -> Case:
    layout = draw(layouts(rows_each))
    data = draw(testing.observations(layout, max_rows=max_rows, max_length=rows_each))
    width = draw(st.integers(1, 20) | st.integers(60, 70))
    return Case(layout, data, width, draw(st.integers(0, 2**31)))


EXPLORE = st.sampled_from([(1.0, 0.0), (0.3, 0.0), (1.7, 0.2), (1.0, 1.0)])


def check_against_float64(kernel: str, case: Case, explore: tuple[float, float]) -> None:
    given, settings = case.given(), torch.tensor(explore, device=DEVICE)
    exact, of_exact = case.exactly(explore)
    module, batch = kernels.module(kernel), len(case.data)
    actions = exact.sample()
    actions[::3] = 0  # often not listed
    found = module.evaluate(*given, settings, actions)
    wanted = exact.log_prob(actions), exact.entropy()
    assert not found.error.any()
    for mine, theirs in zip((found.log_prob, found.entropy), wanted, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine.isinf(), theirs.isinf())
        near = (mine.double() - theirs).abs() <= 2e-6 * theirs.abs().clamp(min=1)
        assert (near | mine.isinf()).all()
    weights = torch.randn(2, batch, device=DEVICE)
    some = wanted[0].isfinite()
    grads = []
    for (log_prob, entropy), of in (
        ((found.log_prob, found.entropy), [*case.leaves, *case.head.scorer.parameters()]),
        (wanted, of_exact),
    ):
        total = (log_prob * weights[0])[some].sum() + (entropy * weights[1]).sum()
        grads.append(torch.autograd.grad(total, of))
    largest = max((float(one.abs().max()) for one in grads[1] if one.numel()), default=0.0)
    for mine, theirs in zip(*grads, strict=True):
        assert ((mine.double() - theirs).abs() <= 1e-5 * max(largest, 1e-2)).all()
    # What is drawn is listed, and has the log-prob that it has when it is given.
    with torch.no_grad():
        seed = torch.tensor(len(actions), device=DEVICE)
        for drawn in (module.decide(*given, settings, how) for how in (seed, None)):
            assert exact.legal.contains(drawn.actions).all()
            again = module.evaluate(*given, settings, drawn.actions)
            for one in ("log_prob", "entropy", "place"):
                assert torch.equal(getattr(drawn, one), getattr(again, one))
    modes = exact.log_prob(exact.mode)
    assert (exact.log_prob(drawn.actions) >= modes - 1e-5 * modes.abs().clamp(min=1)).all()


@given(cases(max_rows=6), EXPLORE)
@settings(max_examples=40)
def test_the_reference_is_that_of_float64(case: Case, explore: tuple[float, float]) -> None:
    check_against_float64("reference", case, explore)


@needs_triton
@given(cases(max_rows=2, rows_each=5), EXPLORE, st.sampled_from([1, 2, 4, 32]))
@settings(max_examples=10)
def test_triton_s_kernels_are_those_of_float64(
    case: Case, explore: tuple[float, float], block: int
) -> None:
    cuda = kernels.module("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "block_of", lambda room, width: block)
        check_against_float64("cuda", case, explore)


@needs_triton
@given(
    cases(max_rows=2, rows_each=5),
    EXPLORE,
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([1, 2, 8]),
)
@settings(max_examples=10)
def test_triton_s_kernels_draw_what_the_reference_draws(
    case: Case, explore: tuple[float, float], seed: int, block: int
) -> None:
    given, numbers = case.given(), torch.tensor(explore, device=DEVICE)
    seeds = torch.tensor(seed, device=DEVICE)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.module("cuda"), "block_of", lambda room, width: block)
        mine, theirs = (
            kernels.module(name).decide(*given, numbers, seeds) for name in ("cuda", "reference")
        )
    for one in ("actions", "error", "place"):
        assert torch.equal(getattr(mine, one), getattr(theirs, one))


def test_block_sizes_follow_room_and_width() -> None:
    block_of = pytest.importorskip("tcg_flatpolicy.kernels.cuda").block_of
    found = [block_of(*given) for given in ((1, 64), (5, 64), (1024, 64), (1024, 512), (9, 8192))]
    assert found == [1, 8, 32, 4, 1]


def lists_of(kernel: str, lists: Any, width: int = 4, slots: int = 1, size: int = 9) -> Any:
    """decide and evaluate of a kernel, given explore and a seed or actions, of scores by table."""
    spec = fp.ActionSpec([fp.Primary("a", *[fp.Index("x", size)] * slots)])
    dtype = np.dtype([("n", "i2"), ("legal", "u1", (8, 1 + slots))])
    layout = fp.LegalLayout.from_dtype(dtype, "n", "legal", spec)
    data = np.zeros((len(lists), dtype.itemsize), np.uint8)
    layout.write(data, lists)
    return Case(layout, data, width, 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_of_minus_infinity(kernel: str) -> None:
    """A row of the table is inf, and the readout -1: not drawn, unless all of a list are so."""
    lists = [[(0, 1), (0, 2), (0, 3)], [(0, 1), (0, 2)], [(0, 3), (0, 4), (0, 3)]]
    case = lists_of(kernel, lists, width=1)
    table = torch.zeros(1 + 9, 1, device=DEVICE)
    table[2:4] = torch.inf  # values 1 and 2
    rows = Rows(torch.zeros(3, 1, device=DEVICE), torch.full((3, 1), -1.0, device=DEVICE), table)
    of = [one.requires_grad_() for one in rows]
    given = (*case.given()[:3], rows, torch.tensor([1.0, 0.0], device=DEVICE))
    actions = torch.tensor([[0, 3], [0, 2], [0, 2]], device=DEVICE)
    module = kernels.module(kernel)
    found = module.evaluate(*given, actions)
    assert not found.error.any()
    of_two = float(np.log(2))
    wanted = torch.tensor([[0.0, -of_two, -torch.inf], [0.0, of_two, of_two]])
    torch.testing.assert_close(torch.stack([found.log_prob, found.entropy]).cpu(), wanted)
    grads = torch.autograd.grad(found.log_prob[:2].sum() + found.entropy.sum(), of[:1])
    assert grads[0].isfinite().all()
    for seed in range(3):
        drawn = module.decide(*given, torch.tensor(seed, device=DEVICE))
        assert drawn.actions[0].tolist() == [0, 3]
    assert module.decide(*given, None).actions.tolist() == [[0, 3], [0, 1], [0, 3]]  # of equals


# ---- draws


def test_draws_follow_the_probabilities() -> None:
    """A hundred thousand of the reference, whose uniform numbers the kernels' are."""
    rows = 100_000
    lists = [[(0, n) for n in range(8)]]
    case = lists_of("reference", lists)
    data, *rest, of = case.given()
    state, readout = (one.expand(rows, -1) for one in of[:2])
    given = (data.expand(rows, -1), *rest, Rows(state, readout, of.table))
    explore = torch.tensor([1.0, 0.1], device=DEVICE)
    with torch.no_grad():
        decided = reference.decide(*given, explore, torch.tensor(3, device=DEVICE))
        exact, _ = case.exactly((1.0, 0.1))
    counts = torch.bincount(decided.actions[:, 1].cpu(), minlength=8).double()
    probs = exact.probs.detach().cpu()
    assert p_value(counts, probs / probs.sum()) > ALPHA


@needs_triton
def test_draws_come_from_all_blocks_of_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = kernels.module("cuda")
    monkeypatch.setattr(cuda, "block_of", lambda room, width: 2)
    given = lists_of("cuda", [[(0, n) for n in range(8)]]).given()
    found = set()
    with torch.no_grad():
        for number in range(12):
            asked = torch.tensor([3.0, 0.5], device=DEVICE), torch.tensor(number, device=DEVICE)
            drawn = cuda.decide(*given, *asked).actions
            assert torch.equal(drawn, reference.decide(*given, *asked).actions)
            found.add(int(drawn[0, 1]) // 2)
    assert found == {0, 1, 2, 3}


# ---- what is wrong


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_bytes_are_read_or_refused_as_the_packed_path_does(kernel: str) -> None:
    module = kernels.module(kernel)

    @given(layouts(4), st.integers(0, 2**31), st.integers(0, 3))
    @settings(max_examples=100 if kernel == "reference" else 12)
    def check(layout: fp.LegalLayout, seed: int, low: int) -> None:
        rng = np.random.default_rng(seed)
        high = (2, 4, 12, 256)[low]
        data = rng.integers(0, high, (2, layout.dtype.itemsize), dtype=np.uint8)
        data[rng.random(data.shape) < (0.9 if high < 256 else 0)] = 0
        case = Case(layout, data, 3, seed)
        with torch.no_grad():
            explore = torch.tensor([1.0, 0.0], device=DEVICE)
            found = module.decide(*case.given(), explore, torch.tensor(seed, device=DEVICE))
        try:
            legal = layout.read_distinct(case.data)
        except ValueError as error:
            row = int(re.match(r"row (\d+)", str(error))[1])  # type: ignore[index]
            first = int(found.error.nonzero()[0])
            # A count is looked at in all rows before the first tuple is.
            assert row == first or (found.error[row] == COUNT and found.error[first] == TUPLE)
        else:
            assert not found.error.any()
            assert legal.contains(found.actions).all()

    check()


def bandit(**named: Any) -> tuple[fp.FlatPolicy, Bandit, Tensor]:
    """A policy, its environment, and observations of it."""
    torch.manual_seed(0)
    env = Bandit(6, empty=0.2)
    env.reset()
    encoder = BanditEncoder(env.legal_layout, 8)
    policy = fp.FlatPolicy(env, encoder=encoder, width=8, **named).to(DEVICE)
    return policy, env, torch.as_tensor(env.observations.copy()).to(DEVICE)


def broken(observations: Tensor, row: int, **fields: Any) -> Tensor:
    changed = observations.cpu().numpy().copy()
    for name, value in fields.items():
        changed.view(BANDIT_DTYPE)[row, 0][name] = value
    return torch.as_tensor(changed).to(DEVICE)


def asked(policy: fp.FlatPolicy, observations: Tensor) -> None:
    policy.forward_eval(observations)[0].sample()
    if DEVICE == "cuda":  # what is wrong is said later
        policy.forward_eval(observations)[0].sample()


@pytest.mark.parametrize("fields", [{"n": 13}, {"n": 1, "legal": 9}, {"n": 12, "legal": [1, 4, 0]}])
def test_what_is_wrong_is_said_in_the_same_words(
    kernel: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, _, observations = bandit()
    wrong = broken(observations, 3, **fields)
    with pytest.raises(ValueError, match=r"^row 3: ") as mine:
        asked(policy, wrong)
    use("packed", monkeypatch)
    with pytest.raises(ValueError, match=r"^row 3: ") as theirs:
        asked(policy, wrong)
    assert str(mine.value) == str(theirs.value)


def test_a_score_that_is_no_number_is_named_and_leaves_no_gradient(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, env, observations = bandit()
    rows = [row for row, legal in enumerate(env.lists) if legal]
    bad = rows[0]
    given = list(Case(policy.layout, observations.cpu().numpy(), 8, 0).given())
    state = given[3].state.detach().clone()
    state[bad, 2] = torch.nan
    given[3] = Rows(state, *(one.detach().clone() for one in given[3][1:]))
    of = [one.requires_grad_() for one in given[3]]
    actions = torch.tensor([(legal or [(0, 0, 0)])[0] for legal in env.lists], device=DEVICE)
    explore = torch.tensor([1.0, 0.0], device=DEVICE)
    found = kernels.module(kernel).evaluate(*given, explore, actions)
    assert found.error.tolist() == [SCORE if row == bad else 0 for row in range(6)]
    assert found.log_prob.isfinite().all()
    assert found.entropy.isfinite().all()
    grads = torch.autograd.grad((found.log_prob + found.entropy).sum(), of)
    for grad in grads:
        assert grad.isfinite().all()
    assert not grads[0][bad].any()
    assert not grads[1][bad].any()
    assert grads[0][rows[1]].any()
    with torch.no_grad():
        drawn = kernels.module(kernel).decide(*given, explore, torch.tensor(1, device=DEVICE))
    assert tuple(drawn.actions[bad].tolist()) == env.lists[bad][0]

    with torch.no_grad():
        policy.head.scorer.readout.fill_(torch.nan)
    said = []
    for name in (kernel, "packed"):
        use(name, monkeypatch)
        with pytest.raises(ValueError, match="the score of legal tuple") as error:
            asked(policy, observations)
        said.append(str(error.value).removeprefix("in the decision before this one, "))
        assert isinstance(error.value, UnsoundScore) or DEVICE == "cuda"
    assert said[0] == said[1]


def test_dropping_counts_and_warns(kernel: str) -> None:
    policy, env, observations = bandit(invalid="drop")
    row = next(row for row, legal in enumerate(env.lists) if len(legal) > 1)
    wrong = observations.cpu().numpy().copy()
    wrong.view(BANDIT_DTYPE)[row, 0]["legal"][0] = (1, 9, 0)
    with pytest.warns(InvalidActionWarning, match=f"row {row}: legal tuple 0 is"):
        asked(policy, torch.as_tensor(wrong).to(DEVICE))
    assert policy.dropped == 1
    face, _ = policy.forward_eval(torch.as_tensor(wrong).to(DEVICE))
    log_prob = face.log_prob(torch.tensor([(1, 9, 0)] * 6, device=DEVICE)).detach()
    assert float(log_prob[row, 0]) == -torch.inf
    emptied = broken(observations, row, n=1, legal=(1, 9, 0))
    with pytest.raises(ValueError, match="leaves no legal action"):
        asked(policy, emptied)


# ---- in a policy


def test_each_answer_of_a_face_comes_from_one_decision(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, env, observations = bandit()
    policy._action_dtype = torch.int32
    calls: list[str] = []
    module = kernels.module(kernel)
    for name in ("decide", "evaluate"):
        of = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, of=of, name=name: (calls.append(name), of(*given))[1]
        )
    with torch.no_grad():
        face, _ = policy.forward_eval(observations)
        actions, log_prob, entropy = sample_logits(face)
    assert calls == ["decide"]
    assert actions.dtype == torch.int32
    for row, action in enumerate(map(tuple, actions.tolist())):
        assert action in (env.lists[row] or [(0, 0, 0)])
    again, _ = policy(observations)
    _, stored, of_stored = sample_logits(again, actions)
    assert calls == ["decide", "evaluate"]
    assert torch.equal(stored, log_prob)
    assert torch.equal(of_stored, entropy)
    (stored.sum() + of_stored.sum()).backward()
    packed = again.distribution
    assert isinstance(packed, FusedCategorical)
    torch.testing.assert_close(packed.logits, fp.LegalCategorical(*packed._given).logits)
    assert packed.legal.to_lists() == env.lists
    drawn = face.distribution.sample((5,))
    assert face.distribution.log_prob(drawn).isfinite().all()
    assert face[torch.tensor([1, 3], device=DEVICE)].log_prob(actions[[1, 3]]).isfinite().all()


def test_it_decides_on_what_the_policy_saw(kernel: str) -> None:
    """The environment may have written its next observations, and the optimizer its weights."""
    policy, _, observations = bandit()
    wanted, _ = policy.forward_eval(observations.clone())
    actions = wanted.sample()
    log_prob = wanted.log_prob(actions)
    face, _ = policy.forward_eval(observations)
    observations.zero_()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(-3)
        assert torch.equal(face.log_prob(actions), log_prob)
        torch.testing.assert_close(face.distribution.log_prob(actions).unsqueeze(1), log_prob)
        torch.testing.assert_close(face.distribution.logits, wanted.distribution.logits)


def test_exploration_greedy_and_copies(kernel: str) -> None:
    policy, env, observations = bandit()
    mode, _ = fp.Greedy(policy).forward_eval(observations)
    best = policy.distribution(observations)[0].mode
    assert torch.equal(mode.sample(), best)
    for row, action in enumerate(map(tuple, best.tolist())):
        assert action in (env.lists[row] or [(0, 0, 0)])
    policy.explore(temperature=2.0, epsilon=0.3)
    face, _ = policy.forward_eval(observations)
    actions = face.sample()
    packed = face.distribution
    log_prob = fp.LegalCategorical(packed.legal, packed.logits).log_prob(actions)
    torch.testing.assert_close(face.log_prob(actions)[:, 0], log_prob)
    policy.explore()
    with pytest.raises(RuntimeError, match="exploration was changed"):
        policy(observations)[0].log_prob(actions)
    policy.explore(temperature=2.0, epsilon=0.3)
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        again = other(observations)[0].log_prob(actions)
        torch.testing.assert_close(again, face.log_prob(actions), rtol=0, atol=0)


def test_seeds_are_torch_s(kernel: str) -> None:
    policy, _, observations = bandit()
    torch.manual_seed(4)
    face, _ = policy.forward_eval(observations)
    first, second = face.sample(), face.sample()
    torch.manual_seed(4)
    assert torch.equal(policy.forward_eval(observations)[0].sample(), first)
    assert not torch.equal(first, second)


@pytest.mark.integration
def test_the_trainer_s_ratio_is_one(trainers: Any, kernel: str) -> None:
    import pufferlib.vector

    vecenv = pufferlib.vector.make(
        Bandit,
        env_kwargs={"num_agents": 4, "empty": 0.3},
        backend=pufferlib.vector.Serial,
        num_envs=1,
        seed=1,
    )
    env = vecenv.driver_env
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout, 8), width=8)
    trainer = trainers(vecenv, policy, bptt_horizon=2)
    trainer.evaluate()
    trainer.train()
    assert (trainer.ratio - 1).abs().max() < 1e-6
    assert env.illegal_actions == 0
    assert env.played >= 8


class Launches(TorchDispatchMode):
    """Operators for which a GPU would be given work, and those that would wait for it."""

    VIEWS = (
        "empty",
        "view",
        "detach",
        "expand",
        "slice",
        "select",
        "split",
        "unbind",
        "t.",
        "alias",
    )
    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select", "equal.")

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []
        self.waited: list[str] = []

    def __torch_dispatch__(self, of: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        name = str(of).removeprefix("aten.")
        if name.startswith(self.WAITS):
            self.waited.append(name)
        elif not name.lstrip("_").startswith(("new_empty", "unsafe_view", *self.VIEWS)):
            self.launched.append(name)
        return of(*given, **(named or {}))


@needs_triton
def test_a_rollout_step_waits_for_nothing_and_launches_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of ours; what a GPU is given for a Triton kernel is one launch more."""
    use("cuda", monkeypatch)
    env = EssenceWars(2, seed=1)
    env.reset(1)
    encoder = EssenceWarsEncoder(env.legal_layout, 16, 8)
    policy = fp.FlatPolicy(env, encoder=encoder, width=8).to(DEVICE)
    observations = torch.as_tensor(env.observations).to(DEVICE)
    monkeypatch.setattr(Late, "look", lambda *given: None)  # of a CPU, which may look
    cuda, runs = kernels.module("cuda"), []
    run = cuda._run

    def alone(*given: Any) -> Any:
        runs.append(given)
        with torch.utils._python_dispatch._disable_current_modes():
            return run(*given)

    monkeypatch.setattr(cuda._operator, "forward", alone)
    with torch.no_grad():
        hidden, entities = policy.encode(observations)
        # The copy of the cards in hand, of a Lookup, was the encoder's before.
        given = observations, hidden, as_tensors(entities)
        with Launches() as seen:
            distribution = policy.decide(*given)
            actions = distribution.sample()
            distribution.log_prob(actions)
            distribution.entropy()
        assert not seen.waited
        assert len(runs) == 1
        # And the copy of the errors, and the cast of the actions.
        assert len(seen.launched) + len(runs) + 2 <= 12, seen.launched
    stored = actions.clone()
    runs.clear()
    with Launches() as seen:
        distribution = policy.decide(*given)
        total = distribution.log_prob(stored).sum() + distribution.entropy().sum()
        total.backward()
    assert not seen.waited
    assert len(runs) == 1


# ---- shapes


def test_no_shape_depends_on_what_is_listed() -> None:
    policy, _, observations = bandit()
    given = Case(policy.layout, observations.cpu().numpy(), 8, 0).given()
    mode = FakeTensorMode()

    def fake(one: Any) -> Any:
        return mode.from_tensor(one.detach()) if isinstance(one, Tensor) else one

    addresses, rows = Addresses(*map(fake, given[2])), Rows(*map(fake, given[3]))
    faked = fake(given[0]), given[1], addresses, rows, fake(torch.ones(2, device=DEVICE))
    with mode:
        for seed in (fake(torch.tensor(1, device=DEVICE)), None):
            found = reference.decide(*faked, seed)
            assert found.actions.shape == (6, 3)
        found = reference.evaluate(*faked, found.actions)
        assert found.log_prob.shape == found.entropy.shape == found.error.shape == (6,)


@needs_triton
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_torch_knows_the_operator(mode: int) -> None:
    cuda = kernels.module("cuda")
    policy, _, observations = bandit()
    data, view, addresses, rows = Case(policy.layout, observations[:2].cpu().numpy(), 8, 0).given()
    explore = torch.tensor([1.0, 0.0], device=DEVICE)
    of = [one.detach().requires_grad_(mode == 0) for one in rows]
    asks = [torch.zeros(2, 3, dtype=torch.int64), torch.tensor([7]), torch.zeros(0).long()][mode]
    flat = [int(number) for column in (view[1], *view[2]) for number in column]
    sizes = [mode, 0, addresses.learned, view[0], view[3], *flat]
    others = [data, explore, asks.to(DEVICE), *addresses[:3]]
    checks = ("test_schema", "test_faketensor") + ("test_autograd_registration",) * (mode == 0)
    torch.library.opcheck(cuda._operator.op, (of, others, sizes), test_utils=checks)


@pytest.mark.skipif(torch.__version__ < "2.9", reason="compiled policies need torch 2.9")
def test_a_compiled_policy_is_one_graph(kernel: str) -> None:
    torch._dynamo.reset()
    policy, _, observations = bandit()
    actions = policy.forward_eval(observations)[0].sample()

    def loss(observations: Tensor, actions: Tensor) -> Tensor:
        face, value = policy(observations)
        return face.log_prob(actions).sum() + face.entropy().sum() + value.sum()

    compiled = torch.compile(policy.forward, backend="aot_eager", fullgraph=True)
    face, value = compiled(observations)
    (face.log_prob(actions).sum() + face.entropy().sum() + value.sum()).backward()
    mine = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    loss(observations, actions).backward()
    for one, parameter in zip(mine, policy.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)
    torch._dynamo.reset()


# ---- which


def test_without_a_gpu_nothing_changes() -> None:
    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    policy, _, observations = bandit()
    face, _ = policy.forward_eval(observations)
    assert type(face.distribution) is fp.LegalCategorical


def test_what_has_no_kernel_is_packed(kernel: str) -> None:
    policy, _, observations = bandit()
    assert isinstance(policy.forward_eval(observations)[0].distribution, FusedCategorical)
    double = copy.deepcopy(policy).double()
    assert type(double.distribution(observations)[0]) is fp.LegalCategorical

    class Other(fp.FlatHead):
        def forward(self, *given: Any) -> fp.LegalCategorical:
            return super().forward(*given).top(1)

    other, _, _ = bandit()
    other.head.__class__ = Other
    assert len(other.distribution(observations)[0].legal.rows) <= 6


def test_the_check_for_a_gpu_says_that_there_is_none() -> None:
    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    script = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no GPU" in done.stderr
