"""The flat decision as one kernel, on a GPU: nothing waits between observation and action.

A FusedCategorical decides when it is asked, and the trainer may ask after the environment has
written its next observations, or the optimizer its next weights. So it is bound when the policy
runs: it keeps a copy of the observations, and the table of projected rows, which is made then. To
decide at once instead would draw where nobody asks for a draw, and an update's tuples are not known
yet.

On a GPU what is wrong with a list or a score is known only later. It raises in the next draw or
evaluation at the latest; until then its row plays a listed tuple, with log-prob and entropy 0 and
no gradient. In a CUDA graph nothing can raise: look at ``error`` after a replay.

Shapes: B rows, H values in a tuple, W width, D hidden size, E embedding size of a source.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcg_flatpolicy.distribution import LegalCategorical, UnsoundScore
from tcg_flatpolicy.exploration import Exploration
from tcg_flatpolicy.fields import STORED
from tcg_flatpolicy.kernels import cpu, fused, module, reference
from tcg_flatpolicy.kernels.reference import FATAL, SCORE, Addresses, Decided, Rows
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.legal import whole_tuples
from tcg_flatpolicy.operators import Operator, wide
from tcg_flatpolicy.scorer import TupleScorer, check_shapes
from tcg_flatpolicy.table import Derived, Embedded, RowTable, as_tensors

MOST = 2**16
"""Learned rows that are projected in each call, listed or not; a spec of more is packed."""
MOST_TOGETHER = 2**12


class Fused(Derived):
    """Decides by one kernel, where there is one for device, layout and dtype.

    Args:
        scorer: of the tuples.
    """

    ranges: Tensor
    limits: Tensor
    noop: Tensor

    def __init__(self, scorer: TupleScorer) -> None:
        super().__init__()
        ranges, self.learned = reference.ranges_of(
            *scorer.kernel.given[1:], _together(scorer.table)
        )
        self.derive("ranges", ranges)
        self.derive("limits", scorer.spec.limits)
        self.derive("noop", scorer.spec.noop)
        self.late = Late()

    def decide(
        self,
        scorer: TupleScorer,
        observations: Tensor,
        layout: LegalLayout,
        hidden: Tensor,
        entities: Embedded,
        exploration: Exploration,
    ) -> FusedCategorical | None:
        """As Head.decide; None where the packed path must decide."""
        kernel = fused(observations.device.type)
        plain = observations.dtype in (torch.uint8, layout.single and STORED[layout.single])
        if (
            not kernel
            or layout.spec is not scorer.spec
            or layout.count.dtype.kind == "f"
            or not (plain and layout.padding)
            or self.learned > MOST
            or hidden.device != observations.device
            or torch.are_deterministic_algorithms_enabled()
            or (not torch.compiler.is_compiling() and cpu.transformed())
        ):
            return None
        sizes = scorer.hidden_size, entities, scorer.entity_sizes
        check_shapes(scorer.spec, hidden, *sizes, len(observations))
        data = layout.as_bytes(observations)
        rows = bind(scorer, hidden, entities)
        if any(one.dtype != torch.float32 for one in rows):
            return None
        return FusedCategorical(kernel, self, layout, data.clone(), rows, exploration)


def bind(scorer: TupleScorer, hidden: Tensor, entities: Embedded) -> Rows:
    """Hidden (B, D), {name: (B, n, E)} -> state, readout and the table that tuples sum rows of.

    All things are projected, listed or not: that is one product a source, and no wait.
    """
    state, readout = scorer._read(hidden)
    weights = scorer._weights()
    vectors, projections = scorer.table.learned_vectors(weights, state.shape[1])
    if vectors and _together(scorer.table):
        vectors, projections = [weights.rows], [weights.projections]  # type: ignore[list-item]
    things = as_tensors(entities)
    vectors += [things[str(source.name)].flatten(0, 1) for source in scorer.table.encoded]
    floats = [*vectors, *projections, *scorer.entity_projections]
    if torch.is_autocast_enabled(hidden.device.type):
        floats = [one.to(torch.get_autocast_dtype(hidden.device.type)) for one in floats]
    return Rows(state, wide(readout), _project([scorer.primaries, *floats], [])[0])


def _together(table: RowTable) -> bool:
    """Whether learned rows are so few that each is projected under all parts, in one product."""
    plain = all(source.features is None for source in table.learned)
    return plain and table.learned_rows * table.learned_parts <= MOST_TOGETHER


# A table of rows. Floats: primaries (P, W); vectors (n, E) of each source; projections (E, k W) of
# each. Result: (R, W), the primaries and then k rows for each vector, in float32 or better.


def _project_forward(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    primaries, *rest = floats
    vectors, projections = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    width = primaries.shape[1]
    rows = sum(len(v) * p.shape[1] // width for v, p in zip(vectors, projections, strict=True))
    table = wide(primaries).new_empty(len(primaries) + rows, width)
    table[: len(primaries)] = primaries
    at = len(primaries)
    for vector, projection in zip(vectors, projections, strict=True):
        end = at + len(vector) * projection.shape[1] // width
        below = table[at:end].view(len(vector), projection.shape[1])
        if vector.dtype == projection.dtype == table.dtype:
            torch.mm(vector, projection, out=below)
        else:
            below.copy_(vector @ projection)
        at = end
    return [table]


def _project_backward(
    grad: Tensor, floats: list[Tensor], others: list[Tensor], sizes: list[int], saved: list[Tensor]
) -> list[Tensor]:
    primaries, *rest = floats
    vectors, projections = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    grad, at = grad.contiguous(), len(primaries)
    of_vectors, of_projections = [], []
    for vector, projection in zip(vectors, projections, strict=True):
        end = at + len(vector) * projection.shape[1] // primaries.shape[1]
        upstream = grad[at:end].view(len(vector), projection.shape[1]).to(vector.dtype)
        of_vectors.append(upstream @ projection.t())
        of_projections.append(vector.t() @ upstream)
        at = end
    return [grad[: len(primaries)].to(primaries.dtype), *of_vectors, *of_projections]


def _project_fake(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    primaries, *rest = floats
    vectors, projections = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    width = primaries.shape[1]
    rows = sum(
        v.shape[0] * (p.shape[1] // width) for v, p in zip(vectors, projections, strict=True)
    )
    return [wide(primaries).new_empty(primaries.shape[0] + rows, width)]


_project = Operator("project_whole", _project_forward, _project_backward, _project_fake)


_PACKED = ("legal", "logits", "_given", "_scores", "_totals", "_entropy")


class FusedCategorical(LegalCategorical):
    """The LegalCategorical of each row, that draws and evaluates by one kernel, unpacked.

    Whatever else it is asked for packs the lists first, and on a GPU waits for it.

    Attributes:
        error: (B,) int32 of the last decision, see kernels.reference; None before it.
    """

    def __init__(
        self,
        kernel: str,
        of: Fused,
        layout: LegalLayout,
        data: Tensor,
        rows: Rows,
        exploration: Exploration,
    ) -> None:
        self._kernel, self._layout, self._rows, self._late = kernel, layout, rows, of.late
        self._addresses = Addresses(of.ranges, of.limits, of.noop, of.learned)
        self._data, self._view = data, layout.list_view()
        # The object, not its numbers: a compiled graph would be compiled again for others.
        self._settings: Any = exploration.settings
        self._explore = exploration.numbers
        self._last: Decided | None = None
        shape = torch.Size([data.shape[0]]), torch.Size([of.noop.shape[0]])
        torch.distributions.Distribution.__init__(self, *shape, validate_args=False)

    def __getattr__(self, name: str) -> Any:
        if name not in _PACKED:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        legal = self._layout.read_distinct(self._data)
        live = torch.ones_like(legal.rows, dtype=torch.bool)
        scores = reference.score(legal.actions, legal.rows, self._addresses, self._rows, live)
        packed, now = LegalCategorical(legal, scores), self._settings
        if now.temperature != 1.0:
            packed = packed.tempered(now.temperature)
        if now.epsilon != 0.0:
            packed = packed.smoothed(now.epsilon)
        self.__dict__.update({one: packed.__dict__[one] for one in _PACKED})
        return self.__dict__[name]

    @property
    def error(self) -> Tensor | None:  # noqa: D102
        return None if self._last is None else self._last.error

    @property
    def mode(self) -> Tensor:
        """(B, H) int64: the most probable tuple of each row; of equals, the smallest tuple."""
        return self._decided(self._decide(None)).actions

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws tuples: sample_shape S -> (*S, B, H) int64; packed, if S is not ()."""
        if tuple(sample_shape):
            return super().sample(sample_shape)
        self._draws()
        seed = torch.empty((), dtype=torch.int64, device=self._data.device).random_()
        self._last = self._decided(self._decide(seed))
        return self._last.actions

    def log_prob(self, value: Tensor) -> Tensor:
        """(B, H) tuples of any integer or whole-float dtype -> (B,), as of LegalCategorical.

        Of what was drawn last, without gradients: that decision's own. A value that is not a whole
        number is not listed. Other shapes are packed.
        """
        last = self._last
        if last is not None and value is last.actions and not torch.is_grad_enabled():
            return last.log_prob
        if value.ndim != 2:
            return super().log_prob(value)
        self._last = self._evaluate(whole_tuples(value, *self._batch_shape, *self._event_shape))
        return self._last.log_prob

    def entropy(self) -> Tensor:
        """(B,) entropy in nats, over distinct tuples; 0 for a row without a legal tuple."""
        last = self._last
        if last is None or (torch.is_grad_enabled() and not last.entropy.requires_grad):
            noop = self._addresses.noop.expand(*self._batch_shape, -1)
            last = self._last = self._evaluate(noop)
        return last.entropy

    def _decide(self, seed: Tensor | None) -> Decided:
        drop = self._layout.dropped is not None
        given = self._data, self._view, self._addresses, self._rows, self._explore
        with torch.no_grad():
            decided: Decided = module(self._kernel).decide(*given, seed, drop)
        return decided

    def _evaluate(self, actions: Tensor) -> Decided:
        drop = self._layout.dropped is not None
        given = self._data, self._view, self._addresses, self._rows, self._explore
        return self._decided(module(self._kernel).evaluate(*given, actions, drop))

    def _decided(self, decided: Decided) -> Decided:
        if not torch.compiler.is_compiling():
            self._late.look(self._layout, self._data, decided)
        return decided


class Late:
    """What the last decision of a head found wrong, until somebody is told."""

    def __init__(self) -> None:
        self._waiting: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Late, ()

    def look(self, layout: LegalLayout, data: Tensor, decided: Decided) -> None:
        """Raises for this decision, but on a GPU for the one before, which has long ended.

        Raises:
            ValueError: a list that is broken or not within the spec, or an unsound score.
        """
        found = layout, data, decided.place, decided.scores.detach()
        if data.device.type != "cuda":
            _tell(decided.error.cpu(), *found)
            return
        if torch.cuda.is_current_stream_capturing():
            return
        before, self._waiting = self._waiting, None
        error = torch.empty(decided.error.shape, dtype=torch.int32, pin_memory=True)
        error.copy_(decided.error, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(data.device))
        self._waiting = ready, error, found
        if before is not None:
            before[0].synchronize()
            try:
                _tell(before[1], *before[2])
            except UnsoundScore as wrong:
                raise ValueError(f"in the decision before this one, {wrong}") from wrong


def _tell(error: Tensor, layout: LegalLayout, data: Tensor, place: Tensor, scores: Tensor) -> None:
    """Says in words what is wrong, given the errors (B,) on the CPU; counts what was dropped."""
    if not error.any():
        return
    if (error & ~SCORE).any():
        layout.read_distinct(data)  # says what is wrong, or drops, counts and warns
    for row in (error & SCORE).nonzero()[:1, 0].tolist():
        at = int(place[row])
        lists = layout.list_view()
        listed = [
            int(reference._number(data[row : row + 1], column, place.new_tensor([at])))
            for column in lists.columns
        ]
        what = f"row {row}: the score of legal tuple {tuple(listed)}"
        raise UnsoundScore(row, what, float(scores[row, at]))
    if (error & FATAL).any():
        raise RuntimeError(f"a kernel found error {int(error.max())} in a list that reads well")
