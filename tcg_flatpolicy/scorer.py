"""Scores each legal tuple against the state: one number a tuple, no work for padding.

Shapes: B rows, N legal tuples in the whole batch, D hidden size, E embedding size, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.spec import ActionSpec, Part


class TupleScorer(nn.Module):
    """score(tuple | state) = readout(state) . relu(state + primary + sum of slots' projections).

    What a slot holds is embedded by the role that the tuple's own primary gives it: a learned row
    for an Index (the same name, the same table), the encoder's embedding of the thing pointed at
    for an Entity, the right one of these for a OneOf. Each (primary, slot, role) has a projection
    of its own, so a slot's meaning and its place both count, and state and slots meet under the
    relu: a pair can be worth something that neither of its parts is alone. The readout follows the
    state, so that a liking for a kind of action in a kind of state is a product, which is learned
    sooner than which units of the relu are on in both.

    All projected rows stand in one table, and a tuple sums a few rows of it. Index rows are
    projected once a call, whatever the batch; an entity is projected once for each (primary, slot)
    in which some legal tuple of its state points at it, and not otherwise.

    Args:
        spec: what tuples mean.
        hidden_size: D, of the state.
        entity_sizes: {name: (n, E)}, what the encoder embeds: n rows of size E.
        width: W, of the hidden layer; the cost is N times this.
        embedding_size: of the learned rows of an Index.

    Raises:
        ValueError: an Entity of the spec that the encoder does not embed, or too few rows of it.
    """

    _key: Tensor
    _key_a_batch: Tensor
    _key_a_row: Tensor
    _slot_steps: Tensor

    def __init__(
        self,
        spec: ActionSpec,
        hidden_size: int,
        entity_sizes: Mapping[str, tuple[int, int]] | None = None,
        width: int = 64,
        embedding_size: int = 16,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.hidden_size = hidden_size
        self.entity_sizes = dict(entity_sizes or {})
        check_entities(spec, self.entity_sizes)
        parts = spec.parts

        self.state = nn.Linear(hidden_size, width)
        ids, slots = spec.limits.shape[0], spec.slots
        self.primaries = nn.Parameter(torch.randn(ids, width) / width**0.5)

        # Static rows of the table: a row of zeros for unused slots, the primaries, Index rows.
        self._lookup_shape = (ids, slots, int(spec.nvec[1:].max(initial=1)))
        row = np.zeros(self._lookup_shape, dtype=np.int64)
        # The table of a name (rows, E) times the projections of all its parts side by side
        # (E, parts * W) is, row after row, what each part makes of it.
        indices = _by_name(part for part in parts if not part.role.encoded)
        self._static_rows = 1 + ids
        self._tables: list[int] = []
        for sharing in indices.values():
            self._tables.append(max((part.role.size for part in sharing), default=0))
            for k, part in enumerate(sharing):
                values = slice(part.start, part.start + part.role.size)
                place = np.arange(part.role.size) * len(sharing) + k
                row[part.primary, part.slot, values] = self._static_rows + place
            self._static_rows += self._tables[-1] * len(sharing)
        self._index_columns = [len(sharing) * width for sharing in indices.values()]
        # No parameter without numbers: PufferLib's default optimizer, muon, divides by its sides.
        self.embeddings = self.index_projections = None
        if indices:
            self.embeddings = nn.Parameter(torch.randn(sum(self._tables), embedding_size))
            self.index_projections = nn.Parameter(fan_in(embedding_size, sum(self._index_columns)))

        # Behind the static rows and those of the states lie, part by part, the rows of everything
        # that a part could point at: state after state, the n things of each. A row's number there
        # is its key: key + B * key_a_batch + (row of the state) * key_a_row.
        entities = _by_name(part for part in parts if part.role.encoded)
        self._names = list(entities)
        self._part_bases = [0]
        a_batch, a_row = np.zeros_like(row), np.zeros_like(row)
        for name, sharing in entities.items():
            things = self.entity_sizes[name][0]
            for part in sharing:
                at = part.primary, part.slot, slice(part.start, part.start + part.role.size)
                row[at] = self._static_rows + np.arange(part.role.size)
                a_batch[at] = 1 + self._part_bases[-1]
                a_row[at] = things
                self._part_bases.append(self._part_bases[-1] + things)
        self.entity_projections = nn.ParameterList(
            nn.Parameter(fan_in(self.entity_sizes[name][1], len(sharing) * width))
            for name, sharing in entities.items()
        )
        self._buffer("_key", row.ravel())
        self._buffer("_key_a_batch", a_batch.ravel())
        self._buffer("_key_a_row", a_row.ravel())
        self._buffer("_slot_steps", np.arange(slots, dtype=np.int64) * self._lookup_shape[2])

        # Near uniform at first. Not a Linear: PufferLib's LSTMWrapper re-initialises every matrix
        # that is named a weight, with a gain that would start from a sure policy.
        self.readout = nn.Parameter(torch.randn(width) * 0.1 / width**0.5)
        self.readout_of_state = nn.Parameter(fan_in(width, width) * 0.01)

    def forward(
        self, hidden: Tensor, entities: Mapping[str, Tensor], legal: LegalActions
    ) -> Tensor:
        """Scores of the legal tuples.

        Args:
            hidden: (B, D) state.
            entities: {name: (B, n, E)}, at least those that the spec points at.
            legal: B rows, N tuples within the spec, which is not checked here but by
                LegalActions.validate.

        Returns:
            (N,) float32 scores, also under autocast.

        Raises:
            ValueError: hidden or an entity of another shape than declared.
        """
        batch = len(legal)
        check_encoding(self.spec, hidden, self.hidden_size, entities, self.entity_sizes, legal)
        _, slots, values = self._lookup_shape
        primaries, values_of_slots = legal.actions[:, :1], legal.actions[:, 1:]
        at = (primaries * (slots * values) + (values_of_slots + self._slot_steps)).flatten()
        keys = (self._key + batch * self._key_a_batch).index_select(0, at)
        keys = keys.view_as(values_of_slots)  # (N, slots)

        hidden, state_of = _without_idle_rows(hidden, legal)  # (b, D), (N,)
        state = self.state(hidden)  # (b, W)
        readout = torch.addmm(self.readout, state, self.readout_of_state)  # (b, W)
        state = state.float()
        width = state.shape[1]
        table = [state.new_zeros(1, width), self.primaries]
        if self.embeddings is not None and self.index_projections is not None:
            for rows, projections in zip(
                self.embeddings.split(self._tables),
                self.index_projections.split(self._index_columns, dim=1),
                strict=True,
            ):
                learned = torch.mm(rows, projections)  # (rows of the table, its parts * W)
                table.append(learned.view(learned.numel() // width, width).float())
        table.append(state)
        if self._names:
            a_row = self._key_a_row.index_select(0, at).view_as(keys)
            keys = keys + a_row * legal.rows.unsqueeze(1)
            whole, keys = self._point(table, batch, keys, entities)
        else:
            whole = torch.cat(table)
        states = self._static_rows + state_of.unsqueeze(1)
        codes = torch.cat([1 + primaries, states, keys], dim=1)
        return _sum_rows_and_read(whole, codes, readout.to(whole.dtype), state_of)

    def _point(
        self, table: list[Tensor], batch: int, keys: Tensor, entities: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The table with the rows (M, W) of the things pointed at; keys count only those."""
        edges = [base * batch for base in self._part_bases]
        first, begin = self._static_rows + batch, self._static_rows + len(table[-1])
        keys, chosen, bounds = _things_pointed_at(keys, edges, first, begin)
        flat = [entities[name].flatten(0, 1) for name in self._names]
        projections = list(self.entity_projections)
        if torch.is_autocast_enabled(keys.device.type):
            dtype = torch.get_autocast_dtype(keys.device.type)
            flat = [one.to(dtype) for one in flat]
            projections = [one.to(dtype) for one in projections]
        return _with_things(table, chosen, bounds, flat, projections), keys

    def _buffer(self, name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
        """Derived from the spec, so not part of a checkpoint."""
        self.register_buffer(name, torch.as_tensor(values), persistent=False)


def check_entities(spec: ActionSpec, entity_sizes: Mapping[str, tuple[int, int]]) -> None:
    """Whether an encoder embeds what a spec points at.

    Raises:
        ValueError: an Entity that is not in ``entity_sizes`` {name: (n, E)}, or too few rows of it.
    """
    for part in spec.parts:
        role = part.role
        if not role.encoded:
            continue
        primary = spec.primaries[part.primary].name
        if role.name not in entity_sizes:
            raise ValueError(
                f"{primary!r} points at Entity({role.name!r}), but the encoder embeds "
                f"{sorted(entity_sizes) or 'no entities'}; add it to entity_sizes, or declare "
                f"the slot as Index({role.name!r}, {role.size})"
            )
        if entity_sizes[role.name][0] < role.size:
            raise ValueError(
                f"{primary!r} points at {role.size} of Entity({role.name!r}), but the encoder "
                f"embeds only {entity_sizes[role.name][0]}"
            )


def check_encoding(
    spec: ActionSpec,
    hidden: Tensor,
    hidden_size: int,
    entities: Mapping[str, Tensor],
    entity_sizes: Mapping[str, tuple[int, int]],
    legal: LegalActions,
) -> None:
    """Whether what an encoder gave for a batch, and the legal lists, have the declared shapes.

    Raises:
        ValueError: hidden is not (B, hidden_size), an entity of the spec is missing or not
            (B, n, E), or the legal tuples have another number of slots than the spec.
    """
    batch = len(legal)
    if legal.slots != spec.slots:
        raise ValueError(
            f"legal tuples have {legal.slots} slots, but the spec has {spec.slots}: it is that of "
            "other lists"
        )
    if hidden.shape != (batch, hidden_size):
        raise ValueError(f"hidden must be ({batch}, {hidden_size}), got {tuple(hidden.shape)}")
    for name in spec.entity_names:
        if name not in entities:
            raise ValueError(f"the encoder gave no entities {name!r}, only {list(entities)}")
        if entities[name].shape != (batch, *entity_sizes[name]):
            raise ValueError(
                f"entities[{name!r}] must be ({batch}, {entity_sizes[name][0]}, "
                f"{entity_sizes[name][1]}), got {tuple(entities[name].shape)}"
            )


def _by_name(parts: Iterable[Part]) -> dict[str, list[Part]]:
    """Parts that share a role's name, in order of first use."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.role.name, []).append(part)
    return found


def fan_in(inputs: int, outputs: int) -> Tensor:
    """(inputs, outputs) normal numbers that keep the variance of what they multiply."""
    return torch.randn(inputs, outputs) / math.sqrt(inputs)


# How much work the three steps below do depends on how many tuples there are and on what they point
# at. In a graph of torch.compile each is one operator; elsewhere an operator would add to its time.


def _without_idle_rows(hidden: Tensor, legal: LegalActions) -> tuple[Tensor, Tensor]:
    """The rows of hidden (B, D) that have a legal tuple, and each tuple's row (N,) among them.

    Where it depends on the numbers in a tensor how many these are, as in a graph of torch.compile,
    all rows are kept.
    """
    if torch.compiler.is_compiling():
        return hidden, legal.rows
    busy = legal.counts.nonzero().squeeze(1)
    if len(busy) == len(hidden):
        return hidden, legal.rows
    place = torch.empty_like(legal.counts)
    place[busy] = torch.arange(len(busy), device=busy.device)
    return hidden.index_select(0, busy), place.index_select(0, legal.rows)


def _things_pointed_at(
    keys: Tensor, edges: list[int], first: int, begin: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What legal tuples point at: each thing once for a part, however many tuples do.

    Args:
        keys: (N, slots) rows of the table, as if all things of all parts were in it from ``first``
            on: part after part, state after state.
        edges: parts + 1 numbers, where each part begins among them.
        first: where things begin, as keys count.
        begin: how many rows of the table are none, from which on things are then counted.

    Returns:
        (N, slots) keys as if only the M things that are pointed at were in it; (M,) the place of
        each in its part, which is row * n + thing; (parts + 1,) where each part begins among the M.
    """
    if torch.compiler.is_compiling():
        found: tuple[Tensor, Tensor, Tensor] = _find_things_op(keys, edges, first, begin)
        return found
    return _find_things(keys, edges, first, begin)


def _find_things(
    keys: Tensor, edges: list[int], first: int, begin: int
) -> tuple[Tensor, Tensor, Tensor]:
    used = keys.new_zeros(first + edges[-1], dtype=torch.bool)
    used.index_fill_(0, keys.flatten(), True)
    things = used[first:].nonzero().squeeze(1)  # (M,)
    begins = torch.tensor(edges, device=keys.device)
    bounds = torch.searchsorted(things, begins)
    place = torch.empty_like(used, dtype=torch.int64)
    place[:first] = torch.arange(first, device=keys.device)
    place[first + things] = torch.arange(begin, begin + len(things), device=keys.device)
    chosen = things - begins[:-1].repeat_interleave(bounds.diff(), output_size=len(things))
    return place.index_select(0, keys.flatten()).view_as(keys), chosen, bounds


_find_things_op = torch.library.custom_op(
    "tcg_flatpolicy::find_things",
    _find_things,
    mutates_args=(),
    schema="(Tensor keys, SymInt[] edges, SymInt first, SymInt begin) -> (Tensor, Tensor, Tensor)",
)


@_find_things_op.register_fake
def _(keys: Tensor, edges: list[int], first: int, begin: int) -> tuple[Tensor, Tensor, Tensor]:
    things = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(keys), keys.new_empty(things), keys.new_empty(len(edges))


def _with_things(
    table: list[Tensor],
    chosen: Tensor,
    bounds: Tensor,
    entities: list[Tensor],
    projections: list[Tensor],
) -> Tensor:
    """(R + M, W) float32: a table, and below it each thing by the projection of its part.

    Args:
        table: its pieces, (., W) each, R rows in all.
        chosen, bounds: of `_things_pointed_at`.
        entities: (B * n, E) of each name.
        projections: (E, parts * W) of each name, those of its parts side by side.
    """
    if torch.compiler.is_compiling():
        whole: Tensor = _project_op(table, chosen, bounds, entities, projections)
    else:
        given = (*table, *entities, *projections)
        whole = _Project.apply(chosen, bounds, len(table), *given)  # type: ignore[no-untyped-call]
    return whole


def _project(
    table: list[Tensor],
    chosen: Tensor,
    bounds: Tensor,
    entities: list[Tensor],
    projections: list[Tensor],
) -> Tensor:
    below = []
    for name, cuts in enumerate(_cuts(bounds, projections, table[0].shape[1])):
        rows = entities[name].index_select(0, chosen[cuts[0] : cuts[-1]])
        for projection, begin, end in _parts(projections[name], cuts):
            below.append(torch.mm(rows[begin:end], projection).float())
    return torch.cat([*table, *below])


def _project_backward(
    grad: Tensor,
    chosen: Tensor,
    bounds: Tensor,
    entities: list[Tensor],
    projections: list[Tensor],
) -> list[Tensor]:
    """Gradients of the entities, then of the projections, from that (M, W) of the things' rows."""
    of_entities, of_projections = [], []
    for name, cuts in enumerate(_cuts(bounds, projections, grad.shape[1])):
        things, side_by_side = entities[name], projections[name]
        mine = slice(cuts[0], cuts[-1])
        rows, upstream = things.index_select(0, chosen[mine]), grad[mine].to(things.dtype)
        of_rows, of_side = torch.empty_like(rows), torch.empty_like(side_by_side)
        for (projection, begin, end), (of_projection, _, _) in zip(
            _parts(side_by_side, cuts), _parts(of_side, cuts), strict=True
        ):
            torch.mm(upstream[begin:end], projection.t(), out=of_rows[begin:end])
            of_projection.copy_(torch.mm(rows[begin:end].t(), upstream[begin:end]))
        zero = torch.zeros_like(things, dtype=torch.float32)
        of_entities.append(zero.index_add_(0, chosen[mine], of_rows.float()).to(things.dtype))
        of_projections.append(of_side)
    return [*of_entities, *of_projections]


def _cuts(bounds: Tensor, projections: list[Tensor], width: int) -> Iterator[list[int]]:
    """Of each name, where its parts begin among the things, and where the last one ends."""
    edges, part = bounds.tolist(), 0
    for side_by_side in projections:
        parts = side_by_side.shape[1] // width
        yield edges[part : part + parts + 1]
        part += parts


def _parts(side_by_side: Tensor, cuts: list[int]) -> Iterator[tuple[Tensor, int, int]]:
    """Of each part of a name its projection (E, W), and from where to where its things are."""
    places = [cut - cuts[0] for cut in cuts]
    return zip(side_by_side.chunk(len(cuts) - 1, dim=1), places[:-1], places[1:], strict=True)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, chosen: Tensor, bounds: Tensor, pieces: int, *given: Tensor
    ) -> Tensor:
        table, both = list(given[:pieces]), list(given[pieces:])
        ctx.rows = [len(piece) for piece in table]  # type: ignore[attr-defined]
        ctx.save_for_backward(chosen, bounds, *both)
        names = len(both) // 2
        return _project(table, chosen, bounds, both[:names], both[names:])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        chosen, bounds, *both = ctx.saved_tensors  # type: ignore[attr-defined]
        names = len(both) // 2
        rows: list[int] = ctx.rows  # type: ignore[attr-defined]
        below = grad[sum(rows) :]
        grads = _project_backward(below, chosen, bounds, both[:names], both[names:])
        return None, None, None, *grad[: sum(rows)].split(rows), *grads


_PROJECTED = "Tensor chosen, Tensor bounds, Tensor[] entities, Tensor[] projections"
_project_op = torch.library.custom_op(
    "tcg_flatpolicy::project",
    _project,
    mutates_args=(),
    schema=f"(Tensor[] table, {_PROJECTED}) -> Tensor",
)
_project_backward_op = torch.library.custom_op(
    "tcg_flatpolicy::project_backward",
    _project_backward,
    mutates_args=(),
    schema=f"(Tensor grad, {_PROJECTED}) -> Tensor[]",
)


@_project_op.register_fake
def _(
    table: list[Tensor],
    chosen: Tensor,
    bounds: Tensor,
    entities: list[Tensor],
    projections: list[Tensor],
) -> Tensor:
    rows = sum(piece.shape[0] for piece in table)
    return table[0].new_empty(rows + chosen.shape[0], table[0].shape[1])


@_project_backward_op.register_fake
def _(
    grad: Tensor,
    chosen: Tensor,
    bounds: Tensor,
    entities: list[Tensor],
    projections: list[Tensor],
) -> list[Tensor]:
    return [torch.empty_like(one) for one in (*entities, *projections)]


def _project_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, chosen, bounds, entities, projections = inputs
    ctx.rows = [piece.shape[0] for piece in table]
    ctx.save_for_backward(chosen, bounds, *entities, *projections)


def _project_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    chosen, bounds, *both = ctx.saved_tensors
    names, rows = len(both) // 2, sum(ctx.rows)
    grads = _project_backward_op(grad[rows:], chosen, bounds, both[:names], both[names:])
    of_table = list(grad[:rows].split(ctx.rows))
    return of_table, None, None, grads[:names], grads[names:]


_project_op.register_autograd(_project_gradient, setup_context=_project_context)


def _sum_rows_and_read(table: Tensor, codes: Tensor, readout: Tensor, rows: Tensor) -> Tensor:
    """relu(sum of table rows) . readout for each tuple, without ever holding N times W numbers.

    Works through the tuples in pieces that stay in a core's cache, and adds up the hidden layer
    again in the backward pass: some time for memory that does not grow with N times W.

    Args:
        table: (R, W).
        codes: (N, C) rows of it.
        readout: (B, W).
        rows: (N,) of the readout.

    Returns:
        (N,) scores.
    """
    if torch.compiler.is_compiling():
        scores: Tensor = _sum_and_read_op(table, codes, readout, rows)
    else:
        scores = _SumAndRead.apply(table, codes, readout, rows)  # type: ignore[no-untyped-call]
    return scores


PIECE = 4096
"""Tuples that are worked through at a time."""


def _sum_and_read(table: Tensor, codes: Tensor, readout: Tensor, rows: Tensor) -> Tensor:
    scores = table.new_empty(len(codes))
    for piece, of_rows, out in zip(*_pieces(codes, rows, scores), strict=True):
        hidden = functional.embedding_bag(piece, table, mode="sum").relu_()
        torch.sum(hidden.mul_(readout.index_select(0, of_rows)), dim=1, out=out)
    return scores


def _sum_and_read_backward(
    grad: Tensor, table: Tensor, codes: Tensor, readout: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the table and of the readout."""
    grad_table = torch.zeros_like(table)
    grad_readout = torch.zeros_like(readout)
    for piece, of_rows, upstream in zip(*_pieces(codes, rows, grad), strict=True):
        hidden = functional.embedding_bag(piece, table, mode="sum").relu_()
        # In place: fresh memory of this size costs more than the sums. sign() of what a relu gave
        # is its derivative.
        active = readout.index_select(0, of_rows).mul_(upstream.unsqueeze(1))
        active.mul_(hidden.sign())
        grad_readout.index_add_(0, of_rows, hidden.mul_(upstream.unsqueeze(1)))
        for column in piece.unbind(1):
            grad_table.index_add_(0, column, active)
    return grad_table, grad_readout


def _pieces(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.split(PIECE) for tensor in tensors]


class _SumAndRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, table: Tensor, codes: Tensor, readout: Tensor, rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(table, codes, readout, rows)
        return _sum_and_read(table, codes, readout, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_table, grad_readout = _sum_and_read_backward(grad, *saved)
        return grad_table, None, grad_readout, None


_SUMMED = "Tensor table, Tensor codes, Tensor readout, Tensor rows"
_sum_and_read_op = torch.library.custom_op(
    "tcg_flatpolicy::sum_and_read",
    _sum_and_read,
    mutates_args=(),
    schema=f"({_SUMMED}) -> Tensor",
)
_sum_and_read_backward_op = torch.library.custom_op(
    "tcg_flatpolicy::sum_and_read_backward",
    _sum_and_read_backward,
    mutates_args=(),
    schema=f"(Tensor grad, {_SUMMED}) -> (Tensor, Tensor)",
)


@_sum_and_read_op.register_fake
def _(table: Tensor, codes: Tensor, readout: Tensor, rows: Tensor) -> Tensor:
    return table.new_empty(codes.shape[0])


@_sum_and_read_backward_op.register_fake
def _(
    grad: Tensor, table: Tensor, codes: Tensor, readout: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(table), torch.empty_like(readout)


def _sum_and_read_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sum_and_read_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_table, grad_readout = _sum_and_read_backward_op(grad, *ctx.saved_tensors)
    return grad_table, None, grad_readout, None


_sum_and_read_op.register_autograd(_sum_and_read_gradient, setup_context=_sum_and_read_context)
