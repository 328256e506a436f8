"""The compiled kernels: against the packed path and against float64, and under attack."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tcg_flatpolicy as fp
from tcg_flatpolicy import testing
from tcg_flatpolicy.kernels import cpu
from tcg_flatpolicy.roles import Role
from tcg_flatpolicy.scorer import TupleScorer
from tests.test_sampling import ALPHA, p_value

LOAD = cpu._loaded.__wrapped__
COMPILED = [name for name in cpu.OBJECTS if name == cpu.kernel() or name == "base"]


def use(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decides by that kernel until the end of the test."""
    monkeypatch.setenv("TCG_KERNEL", kernel)
    loaded = LOAD()
    monkeypatch.setattr(cpu, "_loaded", lambda: loaded)
    assert cpu.kernel() == kernel


@pytest.fixture(params=COMPILED, scope="module")
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the compiled kernels that run here, in turn."""
    with pytest.MonkeyPatch.context() as patch:
        use(request.param, patch)
        yield request.param


def test_this_machine_has_one() -> None:
    """The README promises a C++ compiler, so setting up has compiled it."""
    assert cpu.kernel() in ("avx2", "base")


class Amount(Role):
    rows = 3

    def weights(self, values: Tensor) -> Tensor:
        x = values / self.size
        return torch.stack([x, x * x, torch.ones_like(x)], dim=-1)


KINDS = (fp.Index, fp.Entity, Amount)


@st.composite
def scored(draw: st.DrawFn) -> tuple[TupleScorer, fp.LegalActions, list[Tensor], list[str]]:
    """A scorer, distinct lists, and its inputs: hidden, and entities by name."""
    spec = draw(testing.specs(kinds=KINDS))
    legal = draw(testing.legal_actions(spec, max_rows=40)).distinct()
    width, embedding = draw(st.integers(1, 70)), draw(st.integers(1, 9))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    sizes = {
        name: (4 + draw(st.integers(0, 3)), draw(st.integers(1, 9))) for name in spec.entity_names
    }
    scorer = TupleScorer(spec, 5, sizes, width, embedding)
    with torch.no_grad():
        scorer.readout.mul_(10)
        scorer.readout_of_state.mul_(30)
    leaves = [torch.randn(len(legal), 5, generator=random)]
    leaves += [torch.randn(len(legal), *size, generator=random) for size in sizes.values()]
    return scorer, legal, leaves, list(sizes)


def run(
    scorer: TupleScorer,
    legal: fp.LegalActions,
    leaves: list[Tensor],
    names: list[str],
    actions: Tensor,
    weights: tuple[Tensor, Tensor],
    explore: tuple[float, float],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-prob, entropy, and the gradient of a weighted sum of both for leaves and parameters."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    scores = scorer(leaves[0], dict(zip(names, leaves[1:], strict=True)), legal)
    distribution = fp.LegalCategorical(legal, scores)
    if explore != (1.0, 0.0):
        distribution = distribution.tempered(explore[0]).smoothed(explore[1])
    log_prob, entropy = distribution.log_prob(actions), distribution.entropy()
    some = log_prob.isfinite()
    total = (log_prob * weights[0])[some].sum() + (entropy * weights[1]).sum()
    grads = torch.autograd.grad(total, [*leaves, *scorer.parameters()])
    return log_prob.detach(), entropy.detach(), list(grads)


@given(scored(), st.sampled_from([(1.0, 0.0), (0.3, 0.0), (1.7, 0.2)]), st.integers(0, 2**31))
@settings(max_examples=300)
def test_numbers_and_gradients_are_those_of_float64(
    kernel: str,
    case: tuple[TupleScorer, fp.LegalActions, list[Tensor], list[str]],
    explore: tuple[float, float],
    seed: int,
) -> None:
    scorer, legal, leaves, names = case
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(legal), generator=random), torch.randn(len(legal), generator=random)
    actions = fp.LegalCategorical(legal, torch.zeros(len(legal.rows))).sample()
    actions[::5] = 0  # often not listed
    assert cpu.usable(*leaves)
    got = run(scorer, legal, leaves, names, actions, weights, explore)
    exact = copy.deepcopy(scorer).double()
    doubles = tuple(weight.double() for weight in weights)
    wanted = run(exact, legal, [one.double() for one in leaves], names, actions, doubles, explore)  # type: ignore[arg-type]
    for mine, theirs in zip(got[:2], wanted[:2], strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine.isinf(), theirs.isinf())
        near = (mine.double() - theirs).abs() <= 2e-6 * theirs.abs().clamp(min=1)
        assert (near | mine.isinf()).all()
    # Of the largest: in a leaf's own gradient equal terms may cancel out.
    largest = max((float(one.abs().max()) for one in wanted[2] if one.numel()), default=0.0)
    for mine, theirs in zip(got[2], wanted[2], strict=True):
        assert ((mine.double() - theirs).abs() <= 1e-5 * max(largest, 1e-2)).all()


def test_a_row_s_numbers_do_not_depend_on_the_batch_or_on_threads(kernel: str) -> None:
    spec = fp.ActionSpec(
        [
            fp.Primary("a", fp.Entity("x", 6), fp.Index("i", 40)),
            fp.Primary("b", fp.OneOf(fp.Index("i", 30), fp.Entity("x", 6)), fp.Index("j", 50_000)),
        ]
    )
    rng = np.random.default_rng(0)
    lists = []
    for row in range(1200):
        primaries = rng.integers(0, 2, row % 13)
        lists.append([(p, *(rng.integers(0, n) for n in spec.limits[p, 1:])) for p in primaries])
    legal = fp.LegalActions.from_lists(lists, slots=2).distinct()
    torch.manual_seed(0)
    scorer = TupleScorer(spec, 8, {"x": (6, 10)}, 64)
    hidden, things = torch.randn(1200, 8), torch.randn(1200, 6, 10).requires_grad_()
    weights = torch.randn(len(legal.rows))

    def gradients() -> tuple[Tensor, ...]:
        scores = scorer(hidden, {"x": things}, legal)
        return (
            scores.detach(),
            *torch.autograd.grad((scores * weights).sum(), [things, *scorer.parameters()]),
        )

    one = gradients()
    torch.set_num_threads(3)
    try:
        three = gradients()
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0], three[0])
    assert torch.equal(one[1], three[1])  # of a state's own things
    for a, b in zip(one[2:], three[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    # What the kernel is given differs by torch's products, which are not the same for any batch.
    state, readout = scorer._read(hidden)
    with torch.no_grad():
        packed = legal.actions, legal.counts, legal.starts, legal.counts[:0]
        pieces = scorer._pieces({"x": things})
        every, _ = scorer.kernel(state, readout, scorer.primaries, *pieces[:2], packed, {})
        for begin, end in ((0, 1), (5, 6), (100, 177), (1199, 1200)):
            part, _, _ = legal.select(slice(begin, end))
            packed = part.actions, part.counts, part.starts, part.counts[:0]
            pieces = scorer._pieces({"x": things[begin:end]})
            own = state[begin:end], readout[begin:end], scorer.primaries
            some, _ = scorer.kernel(*own, *pieces[:2], packed, {})
            first = int(legal.starts[begin])
            assert torch.equal(some, every[first : first + len(some)])


# ---- drawing


def test_draws_follow_the_probabilities(kernel: str) -> None:
    """A million of them."""
    torch.manual_seed(3)
    lists = [[(a, b) for a in range(5) for b in range(4)], [(0, 0)], [], [(1, 1), (2, 0), (0, 3)]]
    legal = fp.LegalActions.from_lists(lists * 250, slots=1)
    legal = fp.LegalActions.trusted(legal.actions, legal.counts, legal.noop, [5, 4], distinct=True)
    scores = torch.randn(24).repeat(250)
    scores[3::24] = -torch.inf
    distribution = fp.LegalCategorical(legal, scores)
    packed = legal.actions, legal.counts, legal.starts
    counts = torch.zeros(24 + 2, dtype=torch.int64)
    for _ in range(1000):
        actions = distribution.sample()
        given = [*packed, legal.noop, actions]
        _, places = cpu._log_prob.forward([distribution.logits], given, [])
        assert int(places.max()) == len(scores) + 1  # the no-op of the empty rows
        places = places[places < len(scores)] % 24
        counts += torch.bincount(places, minlength=26)
    counts, probs = counts[:24], distribution.probs[:24]
    assert int(counts[3]) == 0
    for row in (slice(0, 20), slice(21, 24)):
        seen, expected = counts[row].double(), probs[row].double()
        assert p_value(seen, expected / expected.sum()) > ALPHA


def test_rows_draw_apart_and_the_seed_is_torch_s(kernel: str) -> None:
    legal = fp.LegalActions.from_lists([[(n,) for n in range(50)]] * 400, slots=0).distinct()
    distribution = fp.LegalCategorical(legal, torch.zeros(20_000))
    torch.manual_seed(5)
    first, second = distribution.sample(), distribution.sample()
    torch.manual_seed(5)
    assert torch.equal(distribution.sample(), first)
    assert not torch.equal(first, second)
    equal = int((first == second).sum())
    assert 0 < equal < 30  # 8 on average
    assert len(first.unique()) == 50


# ---- reading

STRUCTS = st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"])


@st.composite
def layouts(draw: st.DrawFn) -> fp.LegalLayout:
    """Lists in structs of any integers, at odd places, tuple by tuple or slot by slot."""
    spec = draw(testing.specs(max_size=6))
    room, slots = draw(st.integers(1, 12)), 1 + spec.slots
    pad = draw(st.integers(0, 3))
    count = ("n", draw(STRUCTS))
    if draw(st.booleans()):
        names: Any = "legal"
        listed = [("legal", draw(STRUCTS), (room, slots))]
    else:
        names = tuple(f"s{slot}" for slot in range(slots))
        listed = [(name, draw(STRUCTS), (room,)) for name in names]
    fields = draw(st.permutations([("pad", "u1", (pad,)), count, *listed]))
    dtype = np.dtype(fields, align=draw(st.booleans()))
    return fp.LegalLayout.from_dtype(dtype, "n", names, spec)


def both(layout: fp.LegalLayout, data: Tensor) -> tuple[Any, Any]:
    """What the compiled reader finds, and what the packed path finds or raises."""
    assert layout._reader is not None
    try:
        wanted: Any = layout.read(data).distinct()
    except ValueError as error:
        wanted = error
    return layout._reader(data), wanted


@given(layouts().flatmap(lambda layout: st.tuples(st.just(layout), testing.observations(layout))))
@settings(max_examples=300)
def test_reading_is_that_of_the_packed_path(
    kernel: str, case: tuple[fp.LegalLayout, np.ndarray]
) -> None:
    layout, data = case
    found, wanted = both(layout, torch.as_tensor(data))
    actions, counts, rows, starts = found
    for mine, theirs in (
        (actions, wanted.actions),
        (counts, wanted.counts),
        (rows, wanted.rows),
        (starts, wanted.starts),
    ):
        assert torch.equal(mine, theirs)
    legal = layout.read_distinct(torch.as_tensor(data))
    assert torch.equal(legal.actions, wanted.actions)


@given(layouts(), st.integers(0, 2**31), st.integers(0, 3))
@settings(max_examples=400)
def test_bytes_of_any_kind_are_read_or_refused_alike(
    kernel: str, layout: fp.LegalLayout, seed: int, low: int
) -> None:
    """Small numbers, so that lists are often within the spec; and any bytes at all."""
    rng = np.random.default_rng(seed)
    high = (2, 4, 12, 256)[low]
    data = rng.integers(0, high, (3, layout.dtype.itemsize), dtype=np.uint8)
    data[rng.random(data.shape) < (0.9 if high < 256 else 0)] = 0
    found, wanted = both(layout, torch.as_tensor(data))
    assert (found is None) == isinstance(wanted, ValueError)
    if found is not None:
        assert torch.equal(found[0], wanted.actions)
    else:
        with pytest.raises(ValueError, match=f"^{re.escape(str(wanted))}$"):
            layout.read_distinct(torch.as_tensor(data))


def test_a_million_rows_of_any_bytes(kernel: str) -> None:
    spec = fp.ActionSpec([fp.Primary("a", fp.Index("x", 200)), fp.Primary("b", id=3)])
    dtype = np.dtype([("n", "u1"), ("legal", "u1", (4, 2))])
    layout = fp.LegalLayout.from_dtype(dtype, "n", "legal", spec)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(1000):
        data = rng.integers(0, 256, (1000, 9), dtype=np.uint8)
        data[:, 0] %= 6
        refused += layout._reader(torch.as_tensor(data)) is None  # type: ignore[misc]
        for row in rng.integers(0, 1000, 2):
            found, wanted = both(layout, torch.as_tensor(data[row : row + 1]))
            assert (found is None) == isinstance(wanted, ValueError)
    assert refused == 1000


# ---- where it is not used


def test_what_it_has_no_kernel_for_takes_the_packed_path() -> None:
    one = torch.zeros(3)
    assert cpu.usable(one)
    assert not cpu.usable(one, one.double())
    assert not cpu.usable(one.bfloat16())
    assert not cpu.usable(torch.zeros(3, device="meta"))
    seen = []
    torch.func.grad(lambda x: (seen.append(cpu.usable(x)), x.sum())[1])(one)
    assert seen == [False]


def test_a_tuple_outside_the_spec_is_refused_and_nothing_is_read_there(kernel: str) -> None:
    spec = fp.ActionSpec(
        [fp.Primary("a", fp.Entity("x", 2), fp.Index("i", 3)), fp.Primary("b", id=4)]
    )
    scorer = TupleScorer(spec, 4, {"x": (2, 3)})
    for action in ((1, 0, 0), (9, 0, 0), (0, 2, 0), (0, 0, 3), (0, 2**40, 0)):
        legal = fp.LegalActions.from_lists([[action]], slots=2)
        with pytest.raises(ValueError, match="not within the spec: call validate"):
            scorer(torch.zeros(1, 4), {"x": torch.zeros(1, 2, 3)}, legal)
    fine = fp.LegalActions.from_lists([[(4, 7, 7)]], slots=2)  # slots that b does not use
    assert scorer(torch.zeros(1, 4), {"x": torch.zeros(1, 2, 3)}, fine).isfinite().all()


def test_copies_decide_alike(kernel: str) -> None:
    spec = fp.ActionSpec([fp.Primary("a", fp.Entity("x", 2), fp.Index("i", 3)), fp.Primary("b")])
    dtype = np.dtype([("n", "u1"), ("legal", "u1", (4, 3))])
    layout = fp.LegalLayout.from_dtype(dtype, "n", "legal", spec)
    scorer = TupleScorer(spec, 4, {"x": (2, 3)})
    legal = fp.LegalActions.from_lists([[(0, 1, 2), (1, 0, 0)]], slots=2)
    inputs = torch.randn(1, 4), {"x": torch.randn(1, 2, 3)}, legal
    scores = scorer(*inputs)
    data = torch.zeros(1, 13, dtype=torch.uint8)
    data[0, 0] = 1
    for one in (copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):
        assert torch.equal(one(*inputs), scores)
    for other in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert other.read_distinct(data).actions.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("packed", "kernel: packed"),
        (
            "fast",
            "TCG_KERNEL must be cpu, avx2, base, cuda, reference or packed, or not set, got 'fast'",
        ),
    ],
)
def test_the_environment_says_which(asked: str, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tcg_flatpolicy", "info"],
        env={"TCG_KERNEL": asked, "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert words in done.stdout + done.stderr
    assert done.returncode == (0 if asked == "packed" else 2)


def test_without_a_built_kernel_asking_for_one_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    monkeypatch.setenv("TCG_KERNEL", "cpu")
    with pytest.raises(RuntimeError, match=r"no kernel was built.*install a C\+\+ compiler"):
        LOAD()
    monkeypatch.setenv("TCG_KERNEL", "")
    assert LOAD() == ("packed", None)


def test_log_probs_of_draws_are_the_same_under_each(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    legal = fp.LegalActions.from_lists([[(n, 0) for n in range(9)], [], [(2, 2)]], slots=1)
    scores = torch.randn(10)
    scores[4] = -torch.inf
    legal = legal.distinct()
    actions = torch.tensor([[4, 0], [0, 0], [2, 2]])
    found = []
    for name in ("packed", *COMPILED):
        use(name, monkeypatch)
        distribution = fp.LegalCategorical(legal, scores)
        log_prob = distribution.log_prob(actions)
        assert log_prob.tolist() == [-torch.inf, 0.0, 0.0]
        found.append((distribution.logits, distribution.entropy()))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])


# ---- entities that are rows of a table


class Cards(torch.nn.Module):
    """Entities as a Lookup, or as a copy of the same rows."""

    def __init__(self, layout: fp.LegalLayout, looks_up: bool) -> None:
        super().__init__()
        self.layout, self.looks_up = layout, looks_up
        self.hidden_size, self.entity_sizes = 8, {"x": (5, 6)}
        torch.manual_seed(4)
        self.table = torch.nn.Parameter(torch.randn(30, 6))
        self.net = torch.nn.Linear(5, 8)

    def forward(self, observations: Tensor) -> fp.Encoding:
        ids = self.layout.field(observations, "cards").long()
        things: Any = fp.Lookup(self.table, ids)
        assert things.shape == (len(ids), 5, 6)
        return fp.Encoding(self.net(ids.float()), {"x": things if self.looks_up else things.rows()})


def cards_policy(looks_up: bool, head: str = "flat") -> tuple[fp.Policy, npt.NDArray[np.uint8]]:
    dtype = np.dtype([("cards", "u1", 5), ("n", "u1"), ("legal", "u1", (12, 3))])
    layout = fp.LegalLayout.from_dtype(dtype, count="n", actions="legal")
    either = fp.OneOf(fp.Index("i", 3), fp.Entity("x", 5))
    spec = fp.ActionSpec([fp.Primary("a", fp.Entity("x", 5), either), fp.Primary("b", either)])
    torch.manual_seed(5)
    policy = fp.Policy(
        spec=spec, layout=layout, encoder=Cards(layout, looks_up), head=head, width=20
    )
    rng = np.random.default_rng(6)
    records = np.zeros(50, dtype)
    records["cards"] = rng.integers(0, 30, (50, 5))
    records["n"] = rng.integers(0, 13, 50)
    primaries = rng.integers(0, 2, (50, 12))
    records["legal"][..., 0] = primaries
    records["legal"][..., 1] = rng.integers(0, 5, (50, 12))
    records["legal"][..., 2] = rng.integers(0, 8, (50, 12)) * (primaries == 0)
    return policy, records.view(np.uint8).reshape(50, -1)


@pytest.mark.parametrize("head", ["flat", "autoregressive"])
@pytest.mark.parametrize("by", [*COMPILED, "packed"])
def test_a_lookup_decides_as_the_rows_that_it_looks_up(
    by: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(by, monkeypatch)
    found = []
    for looks_up in (True, False):
        policy, rows = cards_policy(looks_up, head)
        face, _ = policy(torch.from_numpy(rows))
        torch.manual_seed(7)
        actions = face.sample()
        log_prob = face.log_prob(actions)
        total = log_prob.square().sum() + face.entropy().square().sum()
        gradients = torch.autograd.grad(total, list(policy.parameters()), allow_unused=True)
        found.append([log_prob, face.entropy(), *(g for g in gradients if g is not None)])
        names = [name for name, _ in policy.named_parameters()]
        assert gradients[names.index("encoder.table")].abs().sum() > 0
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by", [*COMPILED, "packed"])
def test_an_id_beyond_the_table_is_an_error(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(by, monkeypatch)
    policy, rows = cards_policy(True)
    policy.encoder.table = torch.nn.Parameter(torch.randn(20, 6))
    with pytest.raises(IndexError):
        policy(torch.from_numpy(rows))
