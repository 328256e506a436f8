"""The compiled kernels: against the packed path, and where they are not used."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
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
from tcg_flatpolicy.scorer import TupleScorer
from tests.conftest import deciding_by

BUILT = bool([*Path(cpu.__file__).parent.glob("_*.so")])


@pytest.fixture(params=cpu.OBJECTS, scope="module")
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the compiled kernels that run here, in turn."""
    with deciding_by(request.param):
        assert cpu.kernel() == request.param
        yield request.param


@pytest.mark.skipif(not BUILT, reason="installed without a C++ compiler")
def test_what_is_built_is_taken() -> None:
    with cpu.deciding_by(""):
        assert cpu.kernel() in cpu.OBJECTS


# ---- drawing


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
    words = r"no kernel was built.*install a C\+\+ compiler"
    with pytest.raises(RuntimeError, match=words), cpu.deciding_by("cpu"):
        raise AssertionError("there is none")
    with cpu.deciding_by(""):
        assert cpu._loaded() == ("packed", None)


@pytest.mark.usefixtures("each_kernel")
def test_distributions_are_those_of_the_packed_path() -> None:
    torch.manual_seed(0)
    legal = fp.LegalActions.from_lists([[(n, 0) for n in range(9)], [], [(2, 2)]], slots=1)
    scores = torch.randn(10)
    scores[4] = -torch.inf
    legal, actions = legal.distinct(), torch.tensor([[4, 0], [0, 0], [2, 2]])
    mine = fp.LegalCategorical(legal, scores)
    assert mine.log_prob(actions).tolist() == [-torch.inf, 0.0, 0.0]
    with cpu.deciding_by("packed"):
        wanted = fp.LegalCategorical(legal, scores)
        torch.testing.assert_close(mine.logits, wanted.logits)
        torch.testing.assert_close(mine.entropy(), wanted.entropy())


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
@pytest.mark.usefixtures("each_kernel")
def test_a_lookup_decides_as_the_rows_that_it_looks_up(head: str) -> None:
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


@pytest.mark.usefixtures("each_kernel")
def test_an_id_beyond_the_table_is_an_error() -> None:
    policy, rows = cards_policy(True)
    policy.encoder.table = torch.nn.Parameter(torch.randn(20, 6))
    with pytest.raises(IndexError):
        policy(torch.from_numpy(rows))


@pytest.mark.parametrize("width", [8, 13])
def test_an_infinite_entity_scores_as_by_the_packed_path(kernel: str, width: int) -> None:
    spec = fp.ActionSpec([fp.Primary("a", fp.Entity("x", 2))])
    legal = fp.LegalActions.from_lists([[(0, 0), (0, 1)]], slots=1)
    torch.manual_seed(1)
    scorer = TupleScorer(spec, 4, {"x": (2, 3)}, width)
    things = torch.tensor([[[torch.inf, 1.0, 1.0], [1.0, 1.0, 1.0]]])
    with torch.no_grad():
        scorer.entity_projections[0].copy_(-scorer.entity_projections[0].abs())
        found = scorer(torch.zeros(1, 4), {"x": things}, legal)
        with cpu.deciding_by("packed"):
            wanted = scorer(torch.zeros(1, 4), {"x": things}, legal)
    assert wanted.isfinite().all()
    torch.testing.assert_close(found, wanted)
