"""Scores each legal tuple against the state: one number a tuple, no work for padding.

Shapes: B rows, N legal tuples in the whole batch, D hidden size, E embedding size, W width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.spec import ActionSpec, Entity, Index


class TupleScorer(nn.Module):
    """score(tuple | state) = readout . relu(state + primary + sum of its slots' projections).

    What a slot holds is embedded by the role that the tuple's own primary gives it: a learned row
    for an Index (the same name, the same table), the encoder's embedding of the thing pointed at
    for an Entity, the right one of these for a OneOf. Each (primary, slot, role) has a projection
    of its own, so a slot's meaning and its place both count, and state and slots meet under the
    relu: a pair can be worth something that neither of its parts is alone.

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

    _source: Tensor
    _row: Tensor
    _part: Tensor
    _thing: Tensor
    _things: Tensor
    _bases: Tensor
    _slot_steps: Tensor

    def __init__(
        self,
        spec: ActionSpec,
        hidden_size: int,
        entity_sizes: Mapping[str, tuple[int, int]] | None = None,
        width: int = 64,
        embedding_size: int = 32,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.hidden_size = hidden_size
        self.entity_sizes = dict(entity_sizes or {})
        parts = spec.parts
        for part in parts:
            if isinstance(part.role, Entity):
                self._check_entity(spec.primaries[part.primary].name, part.role)

        self.state = nn.Linear(hidden_size, width)
        ids, slots = spec.limits.shape[0], spec.slots
        self.primaries = nn.Parameter(torch.randn(ids, width) / width**0.5)

        # Static rows of the table: a row of zeros for unused slots, the primaries, Index rows.
        self._lookup_shape = (ids, slots, int(spec.nvec[1:].max(initial=1)))
        row = np.zeros(self._lookup_shape, dtype=np.int64)
        indices = [part for part in parts if isinstance(part.role, Index)]
        tables = {part.role.name: 0 for part in indices}
        for part in indices:
            tables[part.role.name] = max(tables[part.role.name], part.role.size)
        begins = dict(zip(tables, itertools.accumulate(tables.values(), initial=0), strict=False))
        longest = max((part.role.size for part in indices), default=0)
        source = np.zeros((len(indices), longest), dtype=np.int64)
        for k, part in enumerate(indices):
            size = part.role.size
            source[k, :size] = begins[part.role.name] + np.arange(size)
            values = slice(part.start, part.start + size)
            row[part.primary, part.slot, values] = 1 + ids + k * longest + np.arange(size)
        self.embeddings = nn.Parameter(torch.randn(sum(tables.values()), embedding_size))
        self.index_projections = nn.Parameter(_fan_in((len(indices), embedding_size, width)))
        self._buffer("_source", source)

        # Entity parts, grouped by name. A pair (part, thing) has the key
        # B * base[part] + row * things[name] + thing, so keys of a name lie together.
        entities = [part for part in parts if isinstance(part.role, Entity)]
        self._names = sorted({part.role.name for part in entities})
        entities.sort(key=lambda part: self._names.index(part.role.name))
        number = np.full(self._lookup_shape, -1, dtype=np.int64)
        thing = np.zeros(self._lookup_shape, dtype=np.int64)
        for k, part in enumerate(entities):
            values = slice(part.start, part.start + part.role.size)
            number[part.primary, part.slot, values] = k
            thing[part.primary, part.slot, values] = np.arange(part.role.size)
        self._part_names = [part.role.name for part in entities]
        things = [self.entity_sizes[name][0] for name in self._part_names]
        self._part_bases = [0, *itertools.accumulate(things)]
        self.entity_projections = nn.ParameterList(
            nn.Parameter(_fan_in((self.entity_sizes[name][1], width))) for name in self._part_names
        )
        self._buffer("_row", row.ravel())
        self._buffer("_part", number.ravel())
        self._buffer("_thing", thing.ravel())
        self._buffer("_things", np.array(things, dtype=np.int64))
        self._buffer("_bases", np.array(self._part_bases[:-1], dtype=np.int64))
        self._buffer("_slot_steps", np.arange(slots, dtype=np.int64) * self._lookup_shape[2])

        # Near uniform at first. One dimension only: PufferLib's LSTMWrapper re-initialises every
        # matrix, with a gain that would start from a sure policy.
        self.readout = nn.Parameter(torch.randn(width) * 0.1 / width**0.5)

    def forward(
        self, hidden: Tensor, entities: Mapping[str, Tensor], legal: LegalActions
    ) -> Tensor:
        """Scores of the legal tuples.

        Args:
            hidden: (B, D) state.
            entities: {name: (B, n, E)}, at least those that the spec points at.
            legal: B rows, N tuples within the spec.

        Returns:
            (N,) float32 scores, also under autocast.

        Raises:
            ValueError: hidden or an entity of another shape than declared.
        """
        batch = len(legal)
        if hidden.shape != (batch, self.hidden_size):
            raise ValueError(
                f"hidden must be ({batch}, {self.hidden_size}), got {tuple(hidden.shape)}"
            )
        ids, slots, values = self._lookup_shape
        primaries = legal.actions[:, 0]
        at = (primaries * (slots * values)).unsqueeze(1) + self._slot_steps + legal.actions[:, 1:]
        codes = torch.empty(len(at), 2 + slots, dtype=torch.int64, device=at.device)
        codes[:, 0] = 1 + primaries

        embedded = self.embeddings[self._source]  # (index parts, longest, E)
        static = torch.bmm(embedded, self.index_projections).flatten(0, 1).float()
        state = self.state(hidden).float()  # (B, W)
        zero = static.new_zeros(1, state.shape[1])
        table = [zero, self.primaries, static, state]
        states_from = 1 + ids + len(static)
        codes[:, 1] = states_from + legal.rows
        codes[:, 2:] = self._row[at]
        if self._names:
            where, points, projected = self._project(entities, legal, at)
            codes[where[0], 2 + where[1]] = states_from + batch + points
            table.append(projected)
        scores: Tensor = _SumRowsAndRead.apply(  # type: ignore[no-untyped-call]
            torch.cat(table), codes, self.readout
        )
        return scores

    def _project(
        self, entities: Mapping[str, Tensor], legal: LegalActions, at: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Where tuples point at entities (tuple, slot), at which projected row, and those rows."""
        batch = len(legal)
        for name in self._names:
            if name not in entities:
                raise ValueError(f"the encoder gave no entities {name!r}, only {list(entities)}")
            if entities[name].shape != (batch, *self.entity_sizes[name]):
                raise ValueError(
                    f"entities[{name!r}] must be ({batch}, {self.entity_sizes[name][0]}, "
                    f"{self.entity_sizes[name][1]}), got {tuple(entities[name].shape)}"
                )
        part = self._part[at]  # (N, slots)
        where = (part >= 0).nonzero(as_tuple=True)
        part = part[where]
        rows = legal.rows[where[0]]
        keys = self._bases[part] * batch + rows * self._things[part] + self._thing[at[where]]

        # Each thing pointed at is projected once for a part, however many tuples point at it.
        used = torch.zeros(batch * self._part_bases[-1], dtype=torch.bool, device=keys.device)
        used[keys] = True
        distinct = used.nonzero().squeeze(1)
        position = torch.empty_like(used, dtype=torch.int64)
        position[distinct] = torch.arange(len(distinct), device=keys.device)

        edges = torch.tensor([base * batch for base in self._part_bases], device=keys.device)
        bounds = torch.searchsorted(distinct, edges).tolist()
        projected = []
        for name in self._names:
            parts = [k for k, other in enumerate(self._part_names) if other == name]
            # What a key exceeds its part's edge by is row * n + thing: the place in flat entities.
            flat = torch.cat([distinct[bounds[k] : bounds[k + 1]] - edges[k] for k in parts])
            rows_of_name = entities[name].flatten(0, 1).index_select(0, flat)  # (M_name, E)
            sizes = [bounds[k + 1] - bounds[k] for k in parts]
            for k, chunk in zip(parts, rows_of_name.split(sizes), strict=True):
                projected.append(torch.mm(chunk, self.entity_projections[k]).float())
        return where, position[keys], torch.cat(projected)

    def _check_entity(self, primary: str, role: Entity) -> None:
        if role.name not in self.entity_sizes:
            raise ValueError(
                f"{primary!r} points at Entity({role.name!r}), but the encoder embeds "
                f"{sorted(self.entity_sizes) or 'no entities'}; add it to entity_sizes, or declare "
                f"the slot as Index({role.name!r}, {role.size})"
            )
        if self.entity_sizes[role.name][0] < role.size:
            raise ValueError(
                f"{primary!r} points at {role.size} of Entity({role.name!r}), but the encoder "
                f"embeds only {self.entity_sizes[role.name][0]}"
            )

    def _buffer(self, name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
        """Derived from the spec, so not part of a checkpoint."""
        self.register_buffer(name, torch.as_tensor(values), persistent=False)


def _fan_in(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) / math.sqrt(shape[-2])


class _SumRowsAndRead(torch.autograd.Function):
    """relu(sum of table rows) . readout for each tuple, without ever holding N times W numbers.

    table (R, W), codes (N, C) rows of it, readout (W,) -> (N,). Works through the tuples in pieces
    that stay in a core's cache, and adds up the hidden layer again in the backward pass: reading
    it back from memory would cost more.
    """

    PIECE = 4096

    @staticmethod
    def forward(ctx: FunctionCtx, table: Tensor, codes: Tensor, readout: Tensor) -> Tensor:
        ctx.save_for_backward(table, codes, readout)
        scores = table.new_empty(len(codes))
        for piece, out in zip(
            codes.split(_SumRowsAndRead.PIECE), scores.split(_SumRowsAndRead.PIECE), strict=True
        ):
            hidden = functional.embedding_bag(piece, table, mode="sum").relu_()
            torch.mv(hidden, readout, out=out)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        table, codes, readout = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_table = torch.zeros_like(table)
        grad_readout = torch.zeros_like(readout)
        for piece, upstream in zip(
            codes.split(_SumRowsAndRead.PIECE), grad.split(_SumRowsAndRead.PIECE), strict=True
        ):
            hidden = functional.embedding_bag(piece, table, mode="sum").relu_()
            grad_readout.addmv_(hidden.t(), upstream)
            active = torch.ops.aten.threshold_backward(torch.outer(upstream, readout), hidden, 0)
            for column in piece.unbind(1):
                grad_table.index_add_(0, column, active)
        return grad_table, None, grad_readout
