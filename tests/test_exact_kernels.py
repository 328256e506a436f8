"""Each compiled kernel against brute force in float64, under other batches and threads, and attack.

A fraction of what ``python -m tests.exact_kernels`` runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tcg_flatpolicy as fp
from tcg_flatpolicy.kernels import cpu
from tests import exact_kernels as exact
from tests.conftest import deciding_by
from tests.test_sampling import ALPHA


@pytest.fixture(params=cpu.OBJECTS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the compiled kernels that run here, in turn."""
    with deciding_by(request.param):
        yield request.param


def test_log_prob_entropy_and_gradients_are_those_of_float64(kernel: str) -> None:
    seeds = range(30) if kernel == "avx2" else range(30, 50)
    errors = exact.many(seeds)
    assert 0 < errors.log_prob < 1e-5
    assert 0 < errors.gradient < 1e-4
    assert errors.large_scores + errors.cancelled < 6, "as rare as large scores are"


def test_the_oracle_notices_a_wrong_number() -> None:
    case = exact.random_case(3)
    wanted = exact.by_brute_force(case)
    for name, magnitude in wanted.magnitudes.items():
        got = exact.by_brute_force(case)
        got.gradients[name] += 1e-5 * magnitude
        with pytest.raises(AssertionError, match="of_magnitude"):
            exact.Errors().add(got, wanted).check()
    got = exact.by_brute_force(case)
    got.log_prob += 1e-4
    with pytest.raises(AssertionError, match="of_size"):
        exact.Errors().add(got, wanted).check()


def test_draws_are_legal_and_as_frequent_as_they_should_be(kernel: str) -> None:
    done, illegal, smallest = exact.draws(1, 400_000)
    assert done == 400_000
    assert illegal == 0
    assert smallest > ALPHA


def test_random_bytes_are_refused_or_read_as_they_are(kernel: str) -> None:
    rows, fine = np.sum([exact.any_bytes(seed, 200) for seed in range(16)], axis=0)
    assert rows / 20 < fine < rows * 19 / 20


# ---- whatever the batch and the threads

STEPS = ("actions", "counts", "logits", "entropy", "drawn", "log_prob")


def steps(case: exact.Case, begin: int = 0, end: int | None = None) -> dict[str, Tensor]:
    """What each step of a decision gives, of some rows."""
    with torch.no_grad():
        leaves = case.leaves if case.scores is None else {"scores": case.scores}
        decided = exact.distribution(case, leaves, begin, end)
        torch.manual_seed(1)
        found = decided.legal.actions, decided.legal.counts, decided.logits, decided.entropy()
        rest = decided.sample(), decided.log_prob(case.actions[begin:end])
    return dict(zip(STEPS, (*found, *rest), strict=True))


@pytest.fixture
def threads() -> Iterator[Any]:
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("seed", range(4))
def test_equal_inputs_give_equal_bits(kernel: str, seed: int, threads: Any) -> None:
    """Of 1 to 3 threads, and of some rows alone. A row's draw depends on its number alone."""
    case = exact.random_case(seed, rows=1000)
    every = steps(case)
    for number in (2, 3):
        threads(number)
        for name, found in steps(case).items():
            assert torch.equal(found, every[name]), (name, number)
    for begin, end in ((0, 1), (0, 37), (0, 770), (331, 334), (499, 1000), (999, 1000)):
        starts = every["counts"].cumsum(0) - every["counts"]
        first = int(starts[begin])
        some = steps(case, begin, end)
        listed = slice(first, first + len(some["actions"]))
        for name, found in some.items():
            if name == "drawn" and begin:
                continue
            rows = listed if name in ("actions", "logits") else slice(begin, end)
            assert torch.equal(found, every[name][rows]), (name, begin, end)


def test_gradients_of_threads_are_those_of_one(kernel: str, threads: Any) -> None:
    """A row's own bit for bit; those of what all rows share but for the order of their sums."""
    for seed in range(2):
        case = exact.random_case(seed, rows=1000)
        case.scores = None
        one = exact.by_kernel(case)
        threads(3)
        three = exact.by_kernel(case)
        threads(1)
        for name, wanted in one.gradients.items():
            apart = np.abs(three.gradients[name] - wanted).max()
            own = name in case.leaves and name not in case.ids
            assert apart <= (0 if own else 1e-5 * np.abs(wanted).max()), name


# ---- errors

DTYPE = np.dtype(
    [
        ("x", "f4", 3),
        ("n", "i2"),
        ("legal", [("a", "u1"), ("b", "i4"), ("c", "u8")], 6),
        ("y", "u1"),
    ]
)
SPEC = fp.ActionSpec(
    [
        fp.Primary("a", fp.Index("i", 9), fp.OneOf(fp.Index("j", 2), fp.Index("i", 4))),
        fp.Primary("b", fp.Index("j", 5), id=3),
        fp.Primary("end", id=4),
    ]
)


def policy(invalid: str = "raise") -> fp.Policy:
    names = ("legal.a", "legal.b", "legal.c")
    layout = fp.LegalLayout.from_dtype(DTYPE, "n", names)
    torch.manual_seed(0)
    return fp.Policy(spec=SPEC, layout=layout, hidden_size=16, width=12, invalid=invalid)


def observations(seed: int, rows: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    records = np.zeros(rows, DTYPE)
    records["x"] = rng.normal(size=(rows, 3))
    for record in records:
        record["n"] = rng.integers(0, 7)
        for i in range(record["n"]):
            record["legal"][i] = exact.random_tuple(rng, SPEC)
    return records


def corrupted(seed: int) -> np.ndarray:
    """Often one number, sometimes more; sometimes none that matters."""
    rng = np.random.default_rng(seed)
    records = observations(seed, int(rng.integers(1, 6)))
    for _ in range(rng.integers(0, 4)):
        record, i = records[rng.integers(len(records))], rng.integers(6)
        kind = rng.integers(6)
        if kind == 0:
            record["n"] = rng.choice([-1, 7, -32768, 32767, 6, 0])
        elif kind == 1:
            record["legal"]["a"][i] = rng.choice([1, 2, 5, 255])
        elif kind == 2:
            record["legal"]["b"][i] = rng.choice([-1, 9, -(2**31), 2**31 - 1])
        elif kind == 3:
            record["legal"]["c"][i] = rng.choice(np.array([6, 2**63, 2**64 - 1, 2**32], "u8"))
        elif kind == 4:
            record["x"][rng.integers(3)] = rng.choice([np.nan, np.inf, -np.inf, 1e38])
        else:
            record["legal"][i] = exact.random_tuple(rng, SPEC)
    return records


def outcome(records: np.ndarray, question: str, invalid: str) -> tuple[Any, ...]:
    """What a policy says, in words if it is an error or a warning."""
    rows = torch.as_tensor(records.view(np.uint8).reshape(len(records), -1))
    asked = policy(invalid)
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        answer: Any
        try:
            face, _ = asked(rows)
            answer = {
                "sample": lambda: face.sample().shape,
                "log_prob": lambda: face.log_prob(torch.zeros(len(rows), 3)),
                "entropy": face.entropy,
            }[question]()
        except (ValueError, RuntimeError) as error:
            answer = f"{type(error).__name__}: {error}"
    return answer, [str(one.message) for one in told], asked.dropped


@pytest.mark.parametrize("invalid", ["raise", "drop"])
def test_errors_name_the_same_row_in_the_same_words(kernel: str, invalid: str) -> None:
    errors = 0
    for seed in range(60):
        records = corrupted(seed)
        question = ("sample", "log_prob", "entropy")[seed % 3]
        mine = outcome(records, question, invalid)
        with cpu.deciding_by("packed"):
            wanted = outcome(records, question, invalid)
        if isinstance(wanted[0], Tensor):
            torch.testing.assert_close(mine[0], wanted[0], rtol=1e-6, atol=1e-6)
            assert mine[1:] == wanted[1:]
        else:
            assert mine == wanted
            errors += isinstance(wanted[0], str)
    assert errors > (25 if invalid == "raise" else 8)


def test_a_policy_s_numbers_follow_the_batch_by_a_millionth(kernel: str) -> None:
    """The kernel's do not at all, but torch's products do."""
    records = observations(1, 700)
    rows = torch.as_tensor(records.view(np.uint8).reshape(700, -1))
    actions = torch.zeros(700, 3)
    actions[:, 0] = 4
    asked = policy()

    def numbers(some: slice) -> Tensor:
        face, value = asked(rows[some])
        log_prob, entropy = face.log_prob(actions[some]), face.entropy()
        return torch.stack([log_prob.flatten(), entropy.flatten(), value[:, 0]])

    with torch.no_grad():
        every = numbers(slice(None))
        for some in (slice(0, 1), slice(5, 8), slice(100, 164), slice(213, 700)):
            mine, wanted = numbers(some), every[:, some]
            near = (mine - wanted).abs() <= 1e-6 * wanted.abs().clamp(min=1)
            assert (near | (mine == wanted)).all()
