"""Scores each legal tuple against the state: one number a tuple, no work for padding.

Shapes: B rows, N legal tuples in the whole batch, D hidden size, E embedding size, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tcg_flatpolicy.distribution import LegalCategorical
from tcg_flatpolicy.kernels import cpu
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.operators import Operator, wide
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.table import (
    Embedded,
    Lookup,
    RowTable,
    Source,
    Weights,
    as_tensors,
    part_names,
    primary_names,
)


class TupleScorer(nn.Module):
    """score(tuple | state) = readout(state) . relu(state + primary + sum of slots' projections).

    What a slot holds is embedded by the role that the tuple's own primary gives it: a learned row
    for an Index (the same name, the same table), the encoder's embedding of the thing pointed at
    for an Entity, the right one of these for a OneOf. Each (primary, slot, role) has a projection
    of its own, so a slot's meaning and its place both count, and state and slots meet under the
    relu: a pair can be worth something that neither of its parts is alone. The readout follows the
    state, so that a liking for a kind of action in a kind of state is a product, which is learned
    sooner than which units of the relu are on in both.

    All projected rows stand in one table, and a tuple sums a few rows of it. Learned rows are
    projected once a call, all of them if they are few, else those that some legal tuple holds; an
    entity once for each (primary, slot) in which some legal tuple of its state points at it.

    Args:
        spec: what tuples mean.
        hidden_size: D, of the state.
        entity_sizes: {name: (n, E)}, what the encoder embeds: n rows of size E.
        width: W, of the hidden layer; the cost is N times this.
        embedding_size: of the learned rows of an Index.

    Raises:
        ValueError: an Entity of the spec that the encoder does not embed, or too few rows of it.
    """

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
        self.table = table = RowTable(spec, self.entity_sizes)
        sizes = {name: size for name, (_, size) in self.entity_sizes.items()}
        self.kernel = table.kernel({None: embedding_size, **sizes}, width)

        self.state = nn.Linear(hidden_size, width)
        self.primaries = nn.Parameter(torch.randn(len(table.ids), width) / width**0.5)
        # No parameter without numbers: PufferLib's default optimizer, muon, divides by its sides.
        self.embeddings = self.index_projections = None
        if table.learned_rows:
            self.embeddings = nn.Parameter(torch.randn(table.learned_rows, embedding_size))
            columns = table.learned_parts * width
            self.index_projections = nn.Parameter(fan_in(embedding_size, columns))
        self.entity_projections = nn.ParameterList(
            nn.Parameter(fan_in(self.entity_sizes[name][1], len(source.parts) * width))
            for source in table.encoded
            if (name := source.name) is not None
        )
        # Near uniform at first. Not a Linear: PufferLib's LSTMWrapper re-initialises every matrix
        # that is named a weight, with a gain that would start from a sure policy.
        self.readout = nn.Parameter(torch.randn(width) * 0.1 / width**0.5)
        self.readout_of_state = nn.Parameter(fan_in(width, width) * 0.01)

    def forward(self, hidden: Tensor, entities: Embedded, legal: LegalActions) -> Tensor:
        """Scores of the legal tuples.

        Args:
            hidden: (B, D) state.
            entities: {name: (B, n, E)}, at least those that the spec points at.
            legal: B rows, N tuples within the spec, which is not checked here but by
                LegalActions.validate.

        Returns:
            (N,) scores in float32 or better, also under autocast.

        Raises:
            ValueError: hidden or an entity of another shape than declared.
        """
        return self._scores(hidden, entities, legal, normalised=False)[0]

    def categorical(
        self, hidden: Tensor, entities: Embedded, legal: LegalActions
    ) -> LegalCategorical:
        """The categorical of the scores; takes and raises what :meth:`forward` does."""
        scores, known = self._scores(hidden, entities, legal, legal.known_distinct)
        return LegalCategorical(legal, scores, known=known)

    def _scores(
        self, hidden: Tensor, entities: Embedded, legal: LegalActions, normalised: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Scores (N,); and of a kernel that is to normalise them, log-softmax and entropies."""
        check_encoding(self.spec, hidden, self.hidden_size, entities, self.entity_sizes, legal)
        state_of = legal.counts.new_empty(0)  # (B,), or nothing where each row has its own state
        if not torch.compiler.is_compiling():  # a graph cannot look at how many have a tuple
            busy = legal.counts.nonzero().squeeze(1)
            if busy.shape[0] < hidden.shape[0]:
                hidden = hidden.index_select(0, busy)
                numbers = torch.arange(busy.shape[0], device=busy.device)
                state_of = torch.zeros_like(legal.counts).index_put_((busy,), numbers)
        state, readout = self._read(hidden)  # (b, W)

        vectors, projections, ids = self._pieces(entities)
        floats = state, wide(readout), self.primaries
        if cpu.usable(*floats, *vectors, *projections):
            packed = legal.actions, legal.counts, legal.starts, state_of
            return self.kernel(*floats, vectors, projections, packed, ids, normalised)
        own = state_of.index_select(0, legal.rows) if state_of.shape[0] else legal.rows
        primaries = self.table.places(legal.actions[:, 0])
        above, things = [self.primaries, state], as_tensors(entities)
        table, held = self.table.rows_of(above, legal, primaries, things, self._weights())
        states = (len(self.primaries) + own).unsqueeze(1)
        codes = torch.cat([primaries.unsqueeze(1), states, held], dim=1)
        return _sum_and_read([table, readout.to(table.dtype)], [codes, own])[0], None

    def _pieces(self, entities: Embedded) -> tuple[list[Tensor], list[Tensor], dict[int, Tensor]]:
        """What the kernel's sources are pieces of: vectors and projections; and ids of tables."""
        vectors: list[Tensor] = []
        projections = list(self.entity_projections)
        if self.embeddings is not None and self.index_projections is not None:
            vectors = [self.embeddings, *self.table.of_features(self.embeddings)]
            projections.insert(0, self.index_projections)
        ids: dict[int, Tensor] = {}
        for source in self.table.encoded:
            of = entities[str(source.name)]
            if isinstance(of, Lookup):
                ids[len(vectors)] = of.ids
                of = of.table
            vectors.append(wide(of))
        return vectors, projections, ids

    def padded(self, hidden: Tensor, entities: Mapping[str, Tensor], tuples: Tensor) -> Tensor:
        """As forward, of padded lists and in static shapes, for export.

        Args:
            hidden: (B, D).
            entities: {name: (B, n, E)}.
            tuples: (B, K, H) int64, within the spec.

        Returns:
            (B, K) scores.
        """
        state, readout = self._read(hidden)
        held = self.table.padded(tuples, entities, self._weights(), state.shape[1])
        primaries = self.primaries[self.table.places(tuples[..., 0])]
        scores: Tensor = (state.unsqueeze(1) + primaries + held).relu() @ readout.unsqueeze(2)
        return scores.squeeze(2)

    def _read(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(b, D) -> what is added to each tuple of a state, and the readout; (b, W) both."""
        state = self.state(hidden.to(self.state.weight.dtype))
        return wide(state), torch.addmm(self.readout, state, self.readout_of_state)

    def _weights(self) -> Weights:
        return Weights(self.embeddings, self.index_projections, self.entity_projections)

    def named_axes(self) -> dict[str, tuple[Any, ...]]:
        """What the rows of parameters are of; see :mod:`tcg_flatpolicy.saving`."""
        names = part_names(self.spec)

        def columns(sources: Sequence[Source]) -> dict[str, int]:
            return {names[part]: len(self.readout) for one in sources for part in one.parts}

        found: dict[str, tuple[Any, ...]] = {}
        found["primaries"] = ("primaries", primary_names(self.spec), None)
        if self.embeddings is not None:
            learned = sorted(self.table.learned, key=lambda one: one.begin)
            roles = [(one.parts[0].role, one.rows) for one in learned]
            rows = {f"{type(role).__name__} {role.name!r}": count for role, count in roles}
            found["embeddings"] = ("embeddings", rows, None)
            found["index_projections"] = ("index_projections", None, columns(self.table.learned))
        for place, one in enumerate(self.table.encoded):
            of_entity = (f"entity_projections.{place}", None, columns([one]))
            found[f"entity_projections of {one.name!r}"] = of_entity
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        rows = state_dict.get(prefix + "primaries")
        if rows is not None:  # once each id up to the largest had a row
            state_dict[prefix + "primaries"] = self.table.of_declared(rows)
        super()._load_from_state_dict(state_dict, prefix, *rest)


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
    entities: Embedded,
    entity_sizes: Mapping[str, tuple[int, int]],
    legal: LegalActions,
) -> None:
    """Whether what an encoder gave for a batch, and the legal lists, have the declared shapes.

    Raises:
        ValueError: hidden is not (B, hidden_size), an entity of the spec is missing or not
            (B, n, E), or the legal tuples have another number of slots than the spec.
    """
    if legal.slots != spec.slots:
        raise ValueError(
            f"legal tuples have {legal.slots} slots, but the spec has {spec.slots}: it is that of "
            "other lists"
        )
    check_shapes(spec, hidden, hidden_size, entities, entity_sizes, len(legal))


def check_shapes(
    spec: ActionSpec,
    hidden: Tensor,
    hidden_size: int,
    entities: Embedded,
    entity_sizes: Mapping[str, tuple[int, int]],
    batch: int,
) -> None:
    """As check_encoding, of a number of rows alone."""
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


def fan_in(inputs: int, outputs: int) -> Tensor:
    """(inputs, outputs) normal numbers that keep the variance of what they multiply."""
    return torch.randn(inputs, outputs) / math.sqrt(inputs)


PIECE = 4096
"""Tuples that are worked through at a time."""


# relu(sum of table rows) . readout for each tuple, without ever holding N times W numbers: works
# through the tuples in pieces that stay in a core's cache, and adds up the hidden layer again in
# the backward pass. Floats: table (R, W), readout (B, W). Others: codes (N, C), rows of the table
# that each tuple sums; rows (N,), of the readout. Result: (N,) scores.


def _sum_and_read_forward(
    floats: list[Tensor], others: list[Tensor], sizes: list[int]
) -> list[Tensor]:
    table, readout = floats
    scores = table.new_empty(len(others[0]))
    for codes, rows, out in _pieces(*others, scores):
        hidden = functional.embedding_bag(codes, table, mode="sum").relu_()
        torch.sum(hidden.mul_(readout.index_select(0, rows)), dim=1, out=out)
    return [scores]


def _sum_and_read_backward(
    grad: Tensor, floats: list[Tensor], others: list[Tensor], sizes: list[int], saved: list[Tensor]
) -> list[Tensor]:
    table, readout = floats
    of_table, of_readout = torch.zeros_like(table), torch.zeros_like(readout)
    for codes, rows, upstream in _pieces(*others, grad):
        hidden = functional.embedding_bag(codes, table, mode="sum").relu_()
        # In place: fresh memory of this size costs more than the sums. sign() of what a relu gave
        # is its derivative.
        active = readout.index_select(0, rows).mul_(upstream.unsqueeze(1))
        active.mul_(hidden.sign())
        of_readout.index_add_(0, rows, hidden.mul_(upstream.unsqueeze(1)))
        for column in codes.unbind(1):
            of_table.index_add_(0, column, active)
    return [of_table, of_readout]


def _sum_and_read_fake(
    floats: list[Tensor], others: list[Tensor], sizes: list[int]
) -> list[Tensor]:
    return [floats[0].new_empty(others[0].shape[0])]


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(PIECE) for tensor in tensors), strict=True)


_sum_and_read = Operator(
    "sum_and_read", _sum_and_read_forward, _sum_and_read_backward, _sum_and_read_fake
)
