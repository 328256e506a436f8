"""Scores each legal tuple against the state: one number a tuple, no work for padding.

Shapes: B rows, N legal tuples in the whole batch, D hidden size, E embedding size, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.spec import ActionSpec, Entity, Index, Part


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
        indices = _by_name(part for part in parts if isinstance(part.role, Index))
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
        entities = _by_name(part for part in parts if isinstance(part.role, Entity))
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

        state = self.state(hidden)  # (B, W)
        readout = torch.addmm(self.readout, state, self.readout_of_state)  # (B, W)
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
            keys += a_row * legal.rows.unsqueeze(1)
            keys, projected = self._project(entities, batch, keys)
            table += projected
        states = self._static_rows + legal.rows.unsqueeze(1)
        codes = torch.cat([1 + primaries, states, keys], dim=1)
        whole = torch.cat(table)
        scores: Tensor = _SumRowsAndRead.apply(  # type: ignore[no-untyped-call]
            whole, codes, readout.to(whole.dtype), legal.rows
        )
        return scores

    def _project(
        self, entities: Mapping[str, Tensor], batch: int, keys: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The rows (M, W) of the things pointed at, part by part; keys now count only those."""
        # Each thing pointed at is projected once for a part, however many tuples point at it.
        first = self._static_rows + batch
        edges = torch.tensor([base * batch for base in self._part_bases], device=keys.device)
        used = keys.new_zeros(first + batch * self._part_bases[-1], dtype=torch.bool)
        used.index_fill_(0, keys.flatten(), True)
        things = used[first:].nonzero().squeeze(1)  # (M,)
        bounds = torch.searchsorted(things, edges).tolist()
        place = torch.empty_like(used, dtype=torch.int64)
        place[:first] = torch.arange(first, device=keys.device)
        place[first + things] = torch.arange(first, first + len(things), device=keys.device)

        projected, part = [], 0
        for name, side_by_side in zip(self._names, self.entity_projections, strict=True):
            projections = side_by_side.split(self.readout.shape[0], dim=1)
            # What a thing exceeds its part's edge by is row * n + thing: its place in entities.
            chosen = [
                things[bounds[k] : bounds[k + 1]] - edges[k]
                for k in range(part, part + len(projections))
            ]
            part += len(projections)
            rows = entities[name].flatten(0, 1).index_select(0, torch.cat(chosen))  # (M_name, E)
            chunks = rows.split([len(one) for one in chosen])
            for chunk, projection in zip(chunks, projections, strict=True):
                projected.append(torch.mm(chunk, projection).float())
        return place.index_select(0, keys.flatten()).view_as(keys), projected

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
        if not isinstance(role, Entity):
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


class _SumRowsAndRead(torch.autograd.Function):
    """relu(sum of table rows) . readout for each tuple, without ever holding N times W numbers.

    table (R, W), codes (N, C) rows of it, readout (B, W), rows (N,) of it -> (N,). Works through
    the tuples in pieces that stay in a core's cache, and adds up the hidden layer again in the
    backward pass: some time for memory that does not grow with N times W.
    """

    PIECE = 4096

    @staticmethod
    def forward(
        ctx: FunctionCtx, table: Tensor, codes: Tensor, readout: Tensor, rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(table, codes, readout, rows)
        scores = table.new_empty(len(codes))
        pieces = zip(*_pieces(codes, rows, scores), strict=True)
        for piece, of_rows, out in pieces:
            hidden = functional.embedding_bag(piece, table, mode="sum").relu_()
            torch.sum(hidden.mul_(readout.index_select(0, of_rows)), dim=1, out=out)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        table, codes, readout, rows = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_table = torch.zeros_like(table)
        grad_readout = torch.zeros_like(readout)
        for piece, of_rows, upstream in zip(*_pieces(codes, rows, grad), strict=True):
            hidden = functional.embedding_bag(piece, table, mode="sum").relu_()
            # In place: fresh memory of this size costs more than the sums. sign() of what a relu
            # gave is its derivative.
            active = readout.index_select(0, of_rows).mul_(upstream.unsqueeze(1))
            active.mul_(hidden.sign())
            grad_readout.index_add_(0, of_rows, hidden.mul_(upstream.unsqueeze(1)))
            for column in piece.unbind(1):
                grad_table.index_add_(0, column, active)
        return grad_table, None, grad_readout, None


def _pieces(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.split(_SumRowsAndRead.PIECE) for tensor in tensors]
