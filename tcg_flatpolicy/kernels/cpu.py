"""The kernels of flat.cpp, reached by ctypes: float32 on a CPU, and nothing where it was not built.

Shapes: B rows, N legal tuples in the whole batch, H values in a tuple, W width.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcg_flatpolicy.operators import Operator

OBJECTS = ("avx2", "base")
"""For which instructions flat.cpp is compiled; the first that runs here is taken."""

PACKED = ("packed", "cuda", "reference")
"""What TCG_KERNEL may ask for that is not compiled here; see kernels.fused for the last two."""

_FUNCTIONS = {
    "runs_here": 0,
    "count": 5,
    "read": 8,
    "score": 2,
    "score_back": 2,
    "normalise": 7,
    "normalise_back": 10,
    "draw": 10,
    "log_prob": 11,
}
"""How many arguments each takes: whole numbers and addresses alike are 64 bits."""


@functools.cache
def _loaded() -> tuple[str, ctypes.CDLL | None]:
    asked = os.environ.get("TCG_KERNEL", "")
    if asked not in ("", "cpu", *OBJECTS, *PACKED):
        raise ValueError(
            f"TCG_KERNEL must be cpu, {', '.join(OBJECTS)}, cuda, reference or packed, or not set, "
            f"got {asked!r}"
        )
    for name in OBJECTS if asked in ("", "cpu") else {asked} & {*OBJECTS}:
        for path in sorted(Path(__file__).parent.glob(f"_{name}.*")):
            try:
                found = ctypes.CDLL(str(path))
            except OSError:  # of another machine
                continue
            for function, numbers in _FUNCTIONS.items():
                of = getattr(found, f"tcg_{function}")
                of.restype, of.argtypes = ctypes.c_int64, [ctypes.c_int64] * numbers
            if found.tcg_runs_here():
                return name, found
    if asked not in ("", *PACKED):
        raise RuntimeError(
            f"TCG_KERNEL is {asked}, and no kernel was built that runs here: install a C++ "
            "compiler, and then this package once more"
        )
    return "packed", None


def kernel() -> str:
    """What decides here: "avx2" or "base", compiled code; or "packed", PyTorch's operations.

    The environment variable TCG_KERNEL chooses: one of these, or "cpu", which is the first of the
    compiled ones that runs here. Else that is taken where there is one.

    Raises:
        ValueError: TCG_KERNEL is something else.
        RuntimeError: TCG_KERNEL asks for compiled code, and there is none.
    """
    return _loaded()[0]


@contextlib.contextmanager
def deciding_by(name: str) -> Iterator[None]:
    """In the whole process as if TCG_KERNEL said so, until the end: for tests and benchmarks.

    A graph that is compiled already stays as it is. Raises what :func:`kernel` raises.
    """
    before = os.environ.get("TCG_KERNEL")
    os.environ["TCG_KERNEL"] = name
    _loaded.cache_clear()
    try:
        kernel()
        yield
    finally:
        del os.environ["TCG_KERNEL"]
        if before is not None:
            os.environ["TCG_KERNEL"] = before
        _loaded.cache_clear()


def library() -> ctypes.CDLL | None:
    """The compiled code; None if :func:`kernel` is "packed"."""
    return _loaded()[1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _available() -> bool:
    return library() is not None


def usable(*tensors: Tensor) -> bool:
    """Whether there are kernels for these: of float32 on a CPU, outside torch.func and vmap."""
    return (
        _available()
        and (torch.compiler.is_compiling() or not transformed())
        and all(one.is_cpu and one.dtype == torch.float32 for one in tensors)
    )


# Torch says so nowhere else. A tensor inside such a transform has no memory of its own.
transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def _call(function: str, *given: int | Tensor) -> int:
    """A kernel's result, given whole numbers, addresses and tensors."""
    plain = [one if one.__class__ is int else _address(one) for one in given]
    result: int = getattr(library(), f"tcg_{function}")(*plain)
    return result


def _address(of: Any) -> int:
    """Of the numbers of a tensor, a NumPy array or one of ctypes' arrays."""
    if isinstance(of, Tensor):
        assert of.is_contiguous(), "a kernel reads what lies in one piece"
        return of.data_ptr()
    return int(of.ctypes.data) if isinstance(of, np.ndarray) else ctypes.addressof(of)


def _numbers(values: Iterable[int]) -> Any:
    """An array in memory, or a struct of 64 bits each."""
    listed = list(values)
    return (ctypes.c_int64 * max(1, len(listed)))(*listed)


class Reader:
    """Reads the legal lists of rows of bytes, each tuple once.

    Args:
        row_bytes: of a row.
        room: K, tuples that a list has room for.
        count: (offset, size, signed, 0) of the number of tuples, in bytes of a row.
        columns: H of (offset, size, signed, stride), primary first.
        limits: (ids, H) int64, of the spec.
    """

    def __init__(
        self,
        row_bytes: int,
        room: int,
        count: tuple[int, int, bool, int],
        columns: Sequence[tuple[int, int, bool, int]],
        limits: npt.NDArray[np.int64],
    ) -> None:
        self._given = row_bytes, room, count, columns, limits
        self._limits = np.ascontiguousarray(limits)
        self._columns = _numbers(itertools.chain(*columns))
        lists = _address(self._columns), _address(self._limits)
        sizes = row_bytes, len(columns), room, len(limits)
        self._view = _numbers([*sizes, *count, *lists])
        self._values = len(columns)

    def __reduce__(self) -> tuple[Any, ...]:
        return Reader, self._given

    def __call__(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """(B, row_bytes) uint8 -> actions (N, H), counts (B,), rows (N,), starts (B,), all int64.

        None for a list that is broken, or not within the limits.
        """
        batch = len(data)
        counts, starts = (torch.empty(batch, dtype=torch.int64) for _ in range(2))
        total = _call("count", _address(self._view), data, batch, counts, starts)
        if total < 0:
            return None
        actions = torch.empty((total, self._values), dtype=torch.int64)
        rows = torch.empty(total, dtype=torch.int64)
        threads = torch.get_num_threads()
        kept = _call(
            "read", _address(self._view), data, batch, threads, counts, starts, actions, rows
        )
        if kept < 0:
            return None
        if kept < total:
            actions, rows = actions[:kept].clone(), rows[:kept].clone()
        return actions, counts, rows, starts


# ---- scores


class Range(NamedTuple):
    """Values of a slot of a primary that have their vectors in one source."""

    start: int
    size: int
    source: int
    column: int
    """Which of the source's projections."""


class Source(NamedTuple):
    """Where vectors and their projections are: a piece of two of the tensors that a call is given.

    Vectors are learned, (size, E), or those of each state, (B, size, E). The latter may be given as
    the rows of a table, by their numbers (B, size).
    """

    size: int
    embedding: int
    """E."""
    columns: int
    """How many projections stand side by side, W columns each."""
    encoded: bool
    vectors: int
    """Which of the vectors."""
    begin: int
    """Its first row there; 0 of encoded ones."""
    projections: int
    """Which of the projections."""
    first: int
    """The place of its first projection there."""
    together: int
    """How many stand side by side there."""


class Scorer:
    """The scores of legal tuples: readout . relu(state + primary + projections of the slots).

    Args:
        width: W.
        place: (ids,) of each primary among the P declared ones, -1 of others.
        ranges: of each of the P * (H - 1) slots, in order of their first value.
        sources: of the vectors.
    """

    def __init__(
        self,
        width: int,
        place: npt.NDArray[np.int64],
        ranges: Sequence[Sequence[Range]],
        sources: Sequence[Source],
    ) -> None:
        self.given = width, place, ranges, sources
        self.sources = sources
        self._vectors = vectors = 1 + max((one.vectors for one in sources), default=-1)
        flat = list(itertools.chain(*ranges))
        of_parts = dict.fromkeys((one.source, one.column) for one in flat)
        parts = {key: number for number, key in enumerate(of_parts)}
        primaries = int(place.max()) + 1
        arrays: list[tuple[Any, str]] = [  # in the order of Plan in flat.cpp
            (place, "i4"),
            (np.cumsum([0, *map(len, ranges)]), "i4"),
            ([one.start for one in flat], "i8"),
            ([one.size for one in flat], "i8"),
            ([parts[one.source, one.column] for one in flat], "i4"),
            ([source for source, _ in parts], "i4"),
            ([column for _, column in parts], "i4"),
            ([one.size for one in sources], "i8"),
            ([one.embedding for one in sources], "i8"),
            ([one.columns for one in sources], "i8"),
            ([one.encoded for one in sources], "i4"),
            ([one.vectors for one in sources], "i8"),
            ([one.begin for one in sources], "i8"),
            ([vectors + one.projections for one in sources], "i8"),
            ([one.first for one in sources], "i8"),
            ([one.together for one in sources], "i8"),
        ]
        self._arrays = [np.array(*given) for given in arrays]
        values = 1 + len(ranges) // primaries
        sizes = values, width, len(place), primaries, len(sources), len(parts)
        self._plan = _numbers([*sizes, *map(_address, self._arrays)])
        key = width, place.tobytes(), tuple(map(tuple, ranges)), tuple(sources)
        self.handle = _HANDLES.setdefault(key, len(_HANDLES))
        """Where the operators of a compiled graph, which take no objects, find it; of those that
        score alike the same, so that their policies share a graph."""
        _SCORERS.setdefault(self.handle, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Scorer, self.given

    def __call__(
        self,
        state: Tensor,
        readout: Tensor,
        primaries: Tensor,
        vectors: Sequence[Tensor],
        projections: Sequence[Tensor],
        packed: tuple[Tensor, Tensor, Tensor, Tensor],
        ids: Mapping[int, Tensor],
        normalised: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The scores (N,), with a gradient for each of the floats.

        Or without one; then also what :func:`normalise` gives, which has one.

        Args:
            state, readout: (B, W), or (b, W) of the rows that have a tuple.
            primaries: (P, W).
            vectors: (rows, E) or (B, size, E) each.
            projections: (E, columns * W) each.
            packed: actions (N, H), counts (B,), starts (B,), and which row of state and readout is
                each one's own, (B,), or (0,) if they are in order.
            ids: (B, size) int64 of the vectors that are tables, by their place among the vectors.

        Raises:
            IndexError: an id that is no row of its table.
            ValueError: a tuple that is not within the spec.
        """
        floats = [state, readout, primaries, *vectors, *projections]
        others = [*packed, *ids.values()]
        floats, others = ([one.contiguous() for one in some] for some in (floats, others))
        results = _score(floats, others, [self.handle, int(normalised), *ids])
        if not normalised:
            return results[0], None
        both, scores = results
        return scores, _parts(both, packed[1].shape[0])

    def run(
        self,
        floats: list[Tensor],
        others: list[Tensor],
        sizes: Sequence[int],
        given: Tensor | None = None,
        saved: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """The results; or, given the gradient of the first, that of each of the floats."""
        actions, counts, starts, state_of, *ids = others
        _, normalised, *tables = sizes
        rows, n = counts.shape[0], actions.shape[0]
        results, gradients, down = list(saved), [], 0
        if given is None:
            results = [floats[0].new_empty(size) for size in [n + rows] * normalised + [n]]
        else:
            given = given.contiguous()
            gradients, down = [torch.zeros_like(one) for one in floats], given.data_ptr()
        scores, both = results[-1].data_ptr(), results[0].data_ptr() if normalised else 0
        # Kept until the call is over, since it has but their addresses.
        looked_up, table = [0] * self._vectors, [0] * self._vectors
        for number, one in zip(tables, ids, strict=True):
            looked_up[number], table[number] = one.data_ptr(), floats[3 + number].shape[0]
        addresses, of_addresses = ([one.data_ptr() for one in some] for some in (floats, gradients))
        lists = [_numbers(some) for some in (addresses[3:], looked_up, table, of_addresses[3:])]
        pointers = [ctypes.addressof(one) for one in lists]
        call = _numbers(  # in the order of Call in flat.cpp
            [
                *(rows, torch.get_num_threads()),
                *(one.data_ptr() for one in (counts, starts, actions, state_of)),
                *(*addresses[:3], *pointers[:3]),
                *(scores, both, both and both + 4 * n),
                *(down, down + 4 * n),
                *((of_addresses or [0] * 3)[:3]),
                pointers[3],
            ]
        )
        result = _call(
            "score" if given is None else "score_back", _address(self._plan), _address(call)
        )
        if result == 2:
            raise IndexError("an id of an entity is no row of the table that it looks up")
        if result == 1:
            raise ValueError("a legal tuple is not within the spec: call validate(spec) to see it")
        if result:
            raise MemoryError("no memory to score the legal tuples of a batch")
        return results if given is None else gradients


_HANDLES: dict[tuple[Any, ...], int] = {}
_SCORERS: dict[int, Scorer] = {}


# Floats: state, readout, primaries, vectors, projections. Others: actions, counts, starts, which
# state is a row's own, ids. Sizes: the handle, whether to normalise, which of the vectors are
# tables. Results: scores (N,); or log-probabilities (N,) and then entropies (B,), and the scores.


def _score_forward(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    return _SCORERS[sizes[0]].run(floats, others, sizes)


def _score_backward(
    grad: Tensor, floats: list[Tensor], others: list[Tensor], sizes: list[int], saved: list[Tensor]
) -> list[Tensor]:
    return _SCORERS[sizes[0]].run(floats, others, sizes, grad, saved)


def _score_fake(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    scores = floats[0].new_empty(others[0].shape[0])
    both = floats[0].new_empty(others[0].shape[0] + others[1].shape[0])
    return [both, scores] if sizes[1] else [scores]


_score = Operator("score", _score_forward, _score_backward, _score_fake)


# ---- the categorical of each row. Floats: scores (N,). Others: counts (B,), starts (B,). Result:
# log-probabilities (N,) and then entropies (B,), in one.


def _normalise_forward(
    floats: list[Tensor], others: list[Tensor], sizes: list[int]
) -> list[Tensor]:
    (scores,), (counts, starts) = floats, others
    scores = scores.contiguous()
    both = scores.new_empty(len(scores) + len(counts))
    lists = len(counts), torch.get_num_threads(), counts, starts
    _call("normalise", *lists, scores, both, both[len(scores) :])
    return [both]


def _normalise_backward(
    grad: Tensor, floats: list[Tensor], others: list[Tensor], sizes: list[int], saved: list[Tensor]
) -> list[Tensor]:
    (scores,), (counts, starts), (both,) = floats, others, saved
    n, grad, scores = len(scores), grad.contiguous(), scores.contiguous()
    of_scores = torch.empty_like(scores)
    lists = len(counts), torch.get_num_threads(), counts, starts
    _call("normalise_back", *lists, scores, both, both[n:], grad, grad[n:], of_scores)
    return [of_scores]


def _normalise_fake(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    return [floats[0].new_empty(floats[0].shape[0] + others[0].shape[0])]


_normalise = Operator("normalise", _normalise_forward, _normalise_backward, _normalise_fake)


def normalise(scores: Tensor, counts: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (N,) of rows -> their log-softmax (N,) and its entropy (B,); each tuple listed once.

    A row of only -inf is uniform; one with a score of NaN or +inf has an entropy of NaN.
    """
    return _parts(_normalise([scores], [counts, starts])[0], counts.shape[0])


def _parts(both: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    n = both.shape[0] - rows
    return both[:n], both[n:]


def draw(logits: Tensor, packed: tuple[Tensor, Tensor, Tensor], noop: Tensor) -> Tensor:
    """(N,) log-probabilities; actions (N, H), counts, starts; (H,) -> (B, H) drawn tuples.

    Randomness comes from torch's default generator: one number, from which each row has its own.
    """
    actions, counts, starts = packed
    drawn = torch.empty((len(counts), actions.shape[1]), dtype=torch.int64)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    lists = len(counts), torch.get_num_threads(), actions.shape[1], counts, starts, actions
    _call("draw", *lists, noop.contiguous(), logits.contiguous(), seed, drawn)
    return drawn


# The log-probability of given tuples. Floats: log-probabilities (N,). Others: actions (N, H),
# counts (B,), starts (B,), noop (H,), tuples (B, H). Result: (B,); and where each stands, N or
# N + 1 of one that is not listed.


def _log_prob_forward(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    (logits,), (actions, counts, starts, noop, tuples) = floats, others
    logits, noop, tuples = logits.contiguous(), noop.contiguous(), tuples.contiguous()
    places, found = torch.empty_like(counts), logits.new_empty(len(counts))
    lists = len(counts), actions.shape[1], len(actions), counts, starts, actions
    _call("log_prob", *lists, noop, tuples, logits, places, found)
    return [found, places]


def _log_prob_backward(
    grad: Tensor, floats: list[Tensor], others: list[Tensor], sizes: list[int], saved: list[Tensor]
) -> list[Tensor]:
    of_logits = grad.new_zeros(len(floats[0]) + 2)
    of_logits[saved[1]] = grad  # no two rows have the same place, but behind what is listed
    return [of_logits[: len(floats[0])]]


def _log_prob_fake(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    return [floats[0].new_empty(others[1].shape), torch.empty_like(others[1])]


_log_prob = Operator("log_prob", _log_prob_forward, _log_prob_backward, _log_prob_fake)


def log_prob(
    logits: Tensor, packed: tuple[Tensor, Tensor, Tensor], noop: Tensor, tuples: Tensor
) -> Tensor:
    """(N,) log-probabilities; actions (N, H), counts, starts; (H,); tuples (B, H) int64 -> (B,).

    -inf of a tuple that its row does not list; 0 of the no-op in a row without a tuple.
    """
    return _log_prob([logits], [*packed, noop, tuples])[0]
