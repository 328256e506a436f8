"""The kernels of flat.cpp, reached by ctypes: float32 on a CPU, and nothing where it was not built.

Shapes: B rows, N legal tuples in the whole batch, H values in a tuple, W width.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcg_flatpolicy.operators import Operator

OBJECTS = ("avx2", "base")
"""For which instructions flat.cpp is compiled; the first that runs here is taken."""


@functools.cache
def _loaded() -> tuple[str, ctypes.CDLL | None]:
    asked = os.environ.get("TCG_KERNEL", "")
    if asked not in ("", "cpu", *OBJECTS, "packed"):
        raise ValueError(
            f"TCG_KERNEL must be cpu, {', '.join(OBJECTS)} or packed, or not set, got {asked!r}"
        )
    for name in OBJECTS if asked in ("", "cpu") else {asked} & {*OBJECTS}:
        for path in sorted(Path(__file__).parent.glob(f"_{name}.*")):
            try:
                found = ctypes.CDLL(str(path))
            except OSError:  # of another machine
                continue
            for function in ("count", "read", "score", "score_back", "runs_here"):
                getattr(found, f"tcg_{function}").restype = ctypes.c_int64
            if found.tcg_runs_here():
                return name, found
    if asked not in ("", "packed"):
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
        and (torch.compiler.is_compiling() or not _transformed())
        and all(one.device.type == "cpu" and one.dtype == torch.float32 for one in tensors)
    )


# Torch says so nowhere else. A tensor inside such a transform has no memory of its own.
_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def _call(function: str, *arguments: Any) -> int:
    """A kernel's result, given tensors, structs, None and whole numbers."""
    plain = [
        ctypes.c_void_p(one.data_ptr())
        if isinstance(one, Tensor)
        else ctypes.byref(one)
        if isinstance(one, ctypes.Structure)
        else ctypes.c_int64(one)
        for one in arguments
    ]
    result: int = getattr(library(), f"tcg_{function}")(*plain)
    return result


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * max(1, len(tensors)))(*(one.data_ptr() for one in tensors))


class _Number(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("offset", "stride", "size", "is_signed")]


class _View(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("row_bytes", "values", "room", "ids")),
        ("count", _Number),
        *((name, ctypes.c_void_p) for name in ("columns", "limits")),
    ]


class Reader:
    """Reads the legal lists of rows of bytes, each tuple once.

    Args:
        row_bytes: of a row.
        room: K, tuples that a list has room for.
        count: (offset, size, signed) of the number of tuples, in bytes of a row.
        columns: H of (offset, stride, size, signed), primary first.
        limits: (ids, H) int64, of the spec.
    """

    def __init__(
        self,
        row_bytes: int,
        room: int,
        count: tuple[int, int, bool],
        columns: Sequence[tuple[int, int, int, bool]],
        limits: npt.NDArray[np.int64],
    ) -> None:
        self._given = row_bytes, room, count, columns, limits
        self._limits = np.ascontiguousarray(limits)
        self._columns = (_Number * len(columns))(*(_Number(*column) for column in columns))
        offset, size, signed = count
        self._view = _View(
            row_bytes,
            len(columns),
            room,
            len(limits),
            _Number(offset, 0, size, signed),
            ctypes.addressof(self._columns),
            self._limits.ctypes.data,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Reader, self._given

    def __call__(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """(B, row_bytes) uint8 -> actions (N, H), counts (B,), rows (N,), starts (B,), all int64.

        None for a list that is broken, or not within the limits.
        """
        batch = len(data)
        counts, starts = (torch.empty(batch, dtype=torch.int64) for _ in range(2))
        total = _call("count", self._view, data, batch, counts, starts)
        if total < 0:
            return None
        actions = torch.empty((total, self._view.values), dtype=torch.int64)
        rows = torch.empty(total, dtype=torch.int64)
        threads = torch.get_num_threads()
        kept = _call("read", self._view, data, batch, threads, counts, starts, actions, rows)
        if kept < 0:
            return None
        if kept < total:
            actions, rows = actions[:kept].clone(), rows[:kept].clone()
        return actions, counts, rows, starts


# ---- scores


class _Plan(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("values", "width", "ids", "primaries", "sources", "parts")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("place", "first", "start", "size", "part", "source", "column"),
                *("sizes", "embedding", "columns", "encoded"),
            )
        ),
    ]


class _Scoring(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "threads")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("counts", "starts", "tuples", "state_of", "state", "readout", "primaries"),
                *("vectors", "projections", "strides", "scores", "of_scores", "of_state"),
                *("of_readout", "of_primaries", "of_vectors", "of_projections"),
            )
        ),
    ]


class Range(NamedTuple):
    """Values of a slot of a primary that have their vectors in one source."""

    start: int
    size: int
    source: int
    column: int
    """Which of the source's projections."""


class Source(NamedTuple):
    """Where vectors are: learned, (size, E), or those of each state, (B, size, E)."""

    size: int
    embedding: int
    """E."""
    columns: int
    """How many projections stand side by side, W columns each."""
    encoded: bool


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
        self._given = width, place, ranges, sources
        self.sources = sources
        flat = list(itertools.chain(*ranges))
        parts = {(one.source, one.column): k for k, one in enumerate(flat)}
        parts = {key: k for k, key in enumerate(parts)}
        primaries = int(place.max()) + 1
        arrays: dict[str, tuple[Any, str]] = {
            "place": (place, "i4"),
            "first": (np.cumsum([0, *map(len, ranges)]), "i4"),
            "start": ([one.start for one in flat], "i8"),
            "size": ([one.size for one in flat], "i8"),
            "part": ([parts[one.source, one.column] for one in flat], "i4"),
            "source": ([source for source, _ in parts], "i4"),
            "column": ([column for _, column in parts], "i4"),
            "sizes": ([one.size for one in sources], "i8"),
            "embedding": ([one.embedding for one in sources], "i8"),
            "columns": ([one.columns for one in sources], "i8"),
            "encoded": ([one.encoded for one in sources], "i4"),
        }
        self._arrays = {name: np.array(*given) for name, given in arrays.items()}
        sizes = {
            "values": 1 + len(ranges) // primaries,
            "width": width,
            "ids": len(place),
            "primaries": primaries,
            "sources": len(sources),
            "parts": len(parts),
        }
        self._plan = _Plan(**sizes, **{n: one.ctypes.data for n, one in self._arrays.items()})
        key = width, place.tobytes(), tuple(map(tuple, ranges)), tuple(sources)
        self.handle = _HANDLES.setdefault(key, len(_HANDLES))
        """Where the operators of a compiled graph, which take no objects, find it; of those that
        score alike the same, so that their policies share a graph."""
        _SCORERS.setdefault(self.handle, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Scorer, self._given

    def __call__(
        self,
        state: Tensor,
        readout: Tensor,
        primaries: Tensor,
        vectors: Sequence[Tensor],
        projections: Sequence[Tensor],
        packed: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> Tensor:
        """The scores (N,), with a gradient for each of the floats.

        Args:
            state, readout: (B, W).
            primaries: (P, W).
            vectors: of each source.
            projections: (E, columns * W) of each source.
            packed: actions (N, H), counts (B,), starts (B,), and which of the states that sources
                have vectors of is each row's own (B,).

        Raises:
            ValueError: a tuple that is not within the spec.
        """
        floats = [state, readout, primaries, *vectors]
        floats = [one.contiguous() for one in floats]
        return _score([*floats, *projections], packed, [self.handle])

    def run(
        self, floats: list[Tensor], packed: list[Tensor], given: Tensor | None = None
    ) -> list[Tensor]:
        """The scores; or, given their gradient, that of each of the floats."""
        state, readout, primaries, *rest = floats
        actions, counts, starts, state_of = packed
        vectors, projections = rest[: len(self.sources)], rest[len(self.sources) :]
        # A row of numbers must lie in one piece, and rows may be apart.
        projections = [one if one.stride(1) == 1 else one.contiguous() for one in projections]
        strides = np.array([one.stride(0) for one in projections], np.int64)
        vector_list, projection_list = _pointers(vectors), _pointers(projections)
        call = _Scoring(
            rows=len(state),
            threads=torch.get_num_threads(),
            **{
                name: one.data_ptr()
                for name, one in (
                    ("counts", counts),
                    ("starts", starts),
                    ("tuples", actions),
                    ("state_of", state_of),
                    ("state", state),
                    ("readout", readout),
                    ("primaries", primaries),
                )
            },
            vectors=ctypes.addressof(vector_list),
            projections=ctypes.addressof(projection_list),
            strides=strides.ctypes.data,
        )
        if given is None:
            scores = state.new_empty(len(actions))
            call.scores = scores.data_ptr()
            self._finish(_call("score", self._plan, call))
            return [scores]
        given = given.contiguous()
        results = [torch.empty_like(one) for one in (state, readout, primaries)]
        results += [torch.zeros_like(one) for one in vectors]
        results += [one.new_zeros(one.shape) for one in projections]
        call.of_scores = given.data_ptr()
        call.of_state, call.of_readout, call.of_primaries = (one.data_ptr() for one in results[:3])
        of_vectors = _pointers(results[3 : 3 + len(vectors)])
        of_projections = _pointers(results[3 + len(vectors) :])
        call.of_vectors = ctypes.addressof(of_vectors)
        call.of_projections = ctypes.addressof(of_projections)
        self._finish(_call("score_back", self._plan, call))
        return results

    def _finish(self, result: int) -> None:
        if result < 0:
            raise MemoryError("no memory to score the legal tuples of a batch")
        if result:
            raise ValueError("a legal tuple is not within the spec: call validate(spec) to see it")


_HANDLES: dict[tuple[Any, ...], int] = {}
_SCORERS: dict[int, Scorer] = {}


def _score_forward(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    return _SCORERS[sizes[0]].run(floats, others)


def _score_backward(
    grad: Tensor, floats: list[Tensor], others: list[Tensor], sizes: list[int], saved: list[Tensor]
) -> list[Tensor]:
    return _SCORERS[sizes[0]].run(floats, others, grad)


def _score_fake(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    return [floats[0].new_empty(others[0].shape[0])]


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
    logits, entropy = _normalise([scores], [counts, starts]).split([len(scores), len(counts)])
    return logits, entropy


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


def find(values: Tensor, packed: tuple[Tensor, Tensor, Tensor], noop: Tensor) -> Tensor:
    """Where tuples (B, H) int64 stand among the actions (N, H): (B,) int64.

    N of one that its row does not list, N + 1 of the no-op in a row without a tuple.
    """
    actions, counts, starts = packed
    places = torch.empty(len(counts), dtype=torch.int64)
    lists = len(counts), actions.shape[1], len(actions), counts, starts, actions
    _call("find", *lists, noop.contiguous(), values.contiguous(), places)
    return places
