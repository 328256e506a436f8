"""Every (primary, slot, value) of a spec as a row: which vector it has, and under which projection.

The one place where roles become numbers; scorer, keys and the padded form for export read it.

Shapes: B states, N legal tuples in the whole batch, P primaries, W width, E embedding size of a
source, M distinct things that legal tuples hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from tcg_flatpolicy.kernels import cpu
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.operators import Operator, wide
from tcg_flatpolicy.packing import distinct
from tcg_flatpolicy.spec import ActionSpec, Part, Role

WHOLE = 2**14
"""Up to so many values of all learned parts are projected, listed or not."""


class Lookup(NamedTuple):
    """Entities whose vectors are rows of a table, such as the cards in hand of all cards.

    The flat head projects a row once for all states that hold it, and needs no copy for each.
    """

    table: Tensor
    """(R, E)."""
    ids: Tensor
    """(B, n) int64, which row each is."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, n, E)."""
        return *self.ids.shape, self.table.shape[1]

    def rows(self) -> Tensor:
        """(B, n, E), the vectors themselves."""
        return functional.embedding(self.ids, self.table)


Embedded: TypeAlias = Mapping[str, Tensor | Lookup]
"""{name: (B, n, E)}."""


def as_tensors(entities: Embedded) -> dict[str, Tensor]:
    """{name: (B, n, E)}, with a copy of the rows that are looked up."""
    return {name: one.rows() if isinstance(one, Lookup) else one for name, one in entities.items()}


class Derived(nn.Module):
    """A module with buffers that follow from its arguments: no part of a checkpoint.

    Loading a state_dict fills them again, so that ``to("meta").to_empty(device=...)`` may precede.
    """

    def __init__(self) -> None:
        super().__init__()
        self._derived: dict[str, npt.NDArray[Any]] = {}

    def derive(self, name: str, values: npt.NDArray[Any]) -> None:
        """Sets a buffer to values that are not to change."""
        self._derived[name] = values
        self.register_buffer(name, torch.tensor(values), persistent=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        tensors = (one for one in state_dict.values() if isinstance(one, Tensor))
        given = next(tensors, torch.empty(0)).device
        for name, values in self._derived.items():
            device = self.get_buffer(name).device
            if device.type == "meta":  # and the weights are assigned, not copied
                device = given
            self._buffers[name] = torch.tensor(values, device=device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Addresses(Derived):
    """Numbers each range of values that one role describes: (primary, slot, which of its parts).

    A number is ``(place of the primary * slots + slot) * parts + part``, so looking one up costs a
    few operations for each tuple, whatever ids and sizes the spec has.

    Attributes:
        ids: (P,) of the declared primaries, ascending.
        ranges: how many numbers there are; unused slots and missing parts have one, too.
    """

    slot_numbers: Tensor
    place_of_id: Tensor

    def __init__(self, spec: ActionSpec) -> None:
        super().__init__()
        self.ids = np.array(list(spec.primaries), dtype=np.int64)
        self.slots = spec.slots
        place_of_id = np.zeros(self.ids[-1] + 1, np.int64)
        place_of_id[self.ids] = np.arange(len(self.ids))
        self._gaps = len(place_of_id) > len(self.ids)
        if self._gaps:
            self.derive("place_of_id", place_of_id)
        per_slot = _grouped(spec.parts, lambda part: (int(place_of_id[part.primary]), part.slot))
        self._parts = max((len(parts) for parts in per_slot.values()), default=1)
        self.ranges = len(self.ids) * self.slots * self._parts
        self.derive("slot_numbers", np.arange(self.slots) * self._parts)
        self._number: dict[Part, int] = {}
        begins = np.full((self.slots, len(self.ids), self._parts), 2**63 - 1, np.int64)
        for (place, slot), parts in per_slot.items():
            for k, part in enumerate(parts):
                begins[slot, place, k] = part.start
                self._number[part] = (place * self.slots + slot) * self._parts + k
        # Of a slot that some primary divides: where each part but the first begins.
        self._divided = sorted({slot for (_, slot), parts in per_slot.items() if len(parts) > 1})
        for slot in self._divided:
            self.derive(f"begins{slot}", begins[slot, :, 1:])

    def tabulate(self, values: Mapping[Part, int], default: int = 0) -> npt.NDArray[np.int64]:
        """(ranges,) int64: a number for each range, the default for those that are not named."""
        table = np.full(self.ranges, default, dtype=np.int64)
        for part, value in values.items():
            table[self._number[part]] = value
        return table

    def places(self, primaries: Tensor) -> Tensor:
        """Ids of primaries -> their places among the declared ones, 0 .. P-1; int64 both."""
        if not self._gaps:
            return primaries
        return self.place_of_id.index_select(0, primaries.flatten()).view_as(primaries)

    def of_declared(self, rows: Tensor, dim: int = 0) -> Tensor:
        """The rows of declared primaries, of a tensor that has a row for each id up to the last."""
        if not self._gaps or rows.shape[dim] != int(self.ids[-1]) + 1:
            return rows
        return rows.index_select(dim, torch.as_tensor(self.ids, device=rows.device))

    def look_up(self, places: Tensor, values: Tensor) -> Tensor:
        """The ranges (..., slots) that values (..., slots) lie in, of primaries' places (...,)."""
        a_place = self.slots * self._parts
        ranges = torch.add(self.slot_numbers, places.unsqueeze(-1), alpha=a_place)
        for slot in self._divided:
            ranges.select(-1, slot).add_(self._part(places, slot, values[..., slot]))
        return ranges

    def look_up_slot(self, places: Tensor, slot: int, values: Tensor) -> Tensor:
        """As look_up, of the values in one slot (0 .. slots - 1); all (n,)."""
        ranges = (places * self.slots + slot) * self._parts
        return ranges + self._part(places, slot, values) if slot in self._divided else ranges

    def _part(self, places: Tensor, slot: int, values: Tensor) -> Tensor:
        """Which of a slot's parts values lie in: how many of the others begin at most there."""
        begins = self.get_buffer(f"begins{slot}").index_select(0, places.flatten())
        return (values.unsqueeze(-1) >= begins.view(*values.shape, self._parts - 1)).sum(-1)


def part_names(spec: ActionSpec) -> dict[Part, str]:
    """What each part is called in any spec in which its role stands in that slot of that primary.

    A second part of one role in one slot has its number behind the name.
    """
    names: dict[Part, str] = {}
    for part in spec.parts:
        role, primary = part.role, spec.primaries[part.primary].name
        name = f"{type(role).__name__} {role.name!r} in slot {part.slot + 1} of {primary!r}"
        again = sum(other.startswith(name) for other in names.values())
        names[part] = f"{name}, {again + 1}" if again else name
    return names


def primary_names(spec: ActionSpec) -> dict[str, int]:
    """A row for each primary, by its name: an axis as in :mod:`tcg_flatpolicy.saving`."""
    return {repr(primary.name): 1 for primary in spec.primaries.values()}


@dataclass(frozen=True)
class Source:
    """Parts whose values have their vectors in one place.

    Attributes:
        name: of the entities that the encoder embeds; None of learned rows.
        parts: in the order of their projections.
        size: number of values.
        begin: where its rows begin among the learned ones.
        rows: of the learned ones, how many are its own; 0 for an encoded source.
        features: (size, rows) how much of each row a value's vector is; None if value i is row i.
    """

    name: str | None
    parts: list[Part]
    size: int
    begin: int = 0
    rows: int = 0
    features: Tensor | None = None


def sources(
    parts: Sequence[Part], entity_sizes: Mapping[str, tuple[int, int]]
) -> tuple[list[Source], list[Source]]:
    """Where the vectors of the values of parts are: learned sources and encoded ones.

    Roles of one class and name share their learned rows. Sources with features come last among the
    learned ones.
    """
    plainly: list[Source] = []
    mixed: list[Source] = []
    begin = 0
    learned = (part for part in parts if not part.role.encoded)
    for sharing in _grouped(learned, lambda part: (type(part.role), part.role.name)).values():
        rows = max(part.role.rows for part in sharing)
        plain = []
        for role, alike in _grouped(sharing, lambda part: part.role).items():
            features = features_of(role)
            if features is None:
                plain += alike
            else:
                mixed.append(Source(None, alike, role.size, begin, rows, features))
        if plain:
            plain.sort(key=sharing.index)
            plainly.append(Source(None, plain, rows, begin, rows))
        begin += rows
    encoded = _grouped((p for p in parts if p.role.encoded), lambda part: part.role.name)
    return [*plainly, *mixed], [
        Source(name, sharing, entity_sizes[name][0]) for name, sharing in encoded.items()
    ]


def features_of(role: Role) -> Tensor | None:
    """(size, rows) how much of each learned row each value's vector is; None if value i is row i.

    Raises:
        ValueError: the role's weights have another shape.
    """
    with torch.device("cpu"):
        if role.weights(torch.arange(1)) is None:
            return None
        weights = role.weights(torch.arange(role.size))
    if weights is None or weights.shape != (role.size, role.rows):
        raise ValueError(
            f"{type(role).__name__}({role.name!r}).weights gave "
            f"{weights if weights is None else tuple(weights.shape)} for {role.size} values; it "
            f"must be ({role.size}, {role.rows})"
        )
    return weights


def _grouped(parts: Iterable[Part], key: Callable[[Part], Any]) -> dict[Any, list[Part]]:
    """Parts of equal key, in order of first use."""
    found: dict[Any, list[Part]] = {}
    for part in parts:
        found.setdefault(key(part), []).append(part)
    return found


class Weights(NamedTuple):
    """What is learned about values."""

    rows: Tensor | None
    """(rows, e) of the learned sources; None if there are none."""
    projections: Tensor | None
    """(e, parts * W) of the learned sources, source after source."""
    entity_projections: Iterable[Tensor]
    """(E, parts * W) of each encoded source."""


class RowTable(Addresses):
    """The projected vector of each thing that a batch's legal tuples hold, and of few others.

    A thing is projected once for each (primary, slot, part) in which some legal tuple holds it.
    Things are told apart by keys: 0 in unused slots; then part after part the values of learned
    sources; then part after part, state after state, the things of encoded ones.

    Args:
        spec: what tuples mean.
        entity_sizes: {name: (n, E)}, what the encoder embeds.

    Attributes:
        learned: sources of learned rows; projections of their parts stand side by side.
        encoded: sources of entities, likewise each.
        learned_rows: how many rows the learned sources have.
        learned_parts: how many parts they have.
    """

    shift: Tensor
    stride: Tensor
    whole_shift: Tensor
    shift_a_state: Tensor
    things_a_row: Tensor
    edges: Tensor
    edges_a_state: Tensor

    def __init__(self, spec: ActionSpec, entity_sizes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(spec)
        self.learned, self.encoded = sources(spec.parts, entity_sizes)
        self.learned_rows = max((source.begin + source.rows for source in self.learned), default=0)
        sized = [(part, source.size) for source in self.learned for part in source.parts]
        pointing = [(part, source.size) for source in self.encoded for part in source.parts]
        self.learned_parts = len(sized)
        # Where the keys of each part begin: of learned ones, and of the others for each state.
        fixed = list(accumulate((size for _, size in sized), initial=1))
        moving = list(accumulate((size for _, size in pointing), initial=0))
        self.static, self.of_state = fixed[-1], moving[-1]
        shift = {part: at - part.start for (part, _), at in zip(sized, fixed, strict=False)}
        shift |= {part: self.static - part.start for part, _ in pointing}
        # Where learned sources are projected whole: a row of all parts for each value.
        stride, whole_shift, at = dict.fromkeys(shift, 1), dict(shift), 1
        for source in self.learned:
            for k, part in enumerate(source.parts):
                stride[part] = len(source.parts)
                whole_shift[part] = at + k - part.start * stride[part]
            at += source.size * len(source.parts)
        a_state = {part: at for (part, _), at in zip(pointing, moving, strict=False)}
        self.derive("shift", self.tabulate(shift))
        self.derive("stride", self.tabulate(stride))
        self.derive("whole_shift", self.tabulate(whole_shift))
        self.derive("shift_a_state", self.tabulate(a_state))
        self.derive("things_a_row", self.tabulate(dict(pointing)))
        self.derive("edges", np.array(fixed + [self.static] * len(pointing)))
        self.derive("edges_a_state", np.array([0] * len(sized) + moving))
        for number, source in enumerate(self.learned):
            if source.features is not None:
                self.derive(f"features{number}", source.features.numpy())

    def kernel(self, embedding_sizes: Mapping[Any, int], width: int) -> cpu.Scorer:
        """What this table says, as the compiled scorer takes it: {source's name: E}, W."""
        ranges: dict[tuple[int, int], list[cpu.Range]] = {}
        sources = []
        first = 0
        others, projections = (itertools.count(int(self.learned_rows > 0)) for _ in range(2))
        for number, source in enumerate([*self.learned, *self.encoded]):
            for column, part in enumerate(source.parts):
                found = cpu.Range(part.start, part.role.size, number, column)
                ranges.setdefault((part.primary, part.slot), []).append(found)
            own = bool(source.features is not None or source.name)
            columns = len(source.parts)
            sources.append(
                cpu.Source(
                    source.size,
                    embedding_sizes[source.name],
                    columns,
                    encoded=not source.rows,
                    vectors=next(others) if own else 0,
                    begin=0 if own else source.begin,
                    projections=next(projections) if source.name else 0,
                    first=0 if source.name else first,
                    together=columns if source.name else self.learned_parts,
                )
            )
            first += columns
        place = np.full(self.ids[-1] + 1, -1, np.int64)
        place[self.ids] = np.arange(len(self.ids))
        return cpu.Scorer(
            width,
            place,
            [
                sorted(ranges.get((number, slot), []))
                for number in self.ids.tolist()
                for slot in range(self.slots)
            ],
            sources,
        )

    def rows_of(
        self,
        above: Sequence[Tensor],
        legal: LegalActions,
        places: Tensor,
        entities: Mapping[str, Tensor],
        weights: Weights,
    ) -> tuple[Tensor, Tensor]:
        """The projected vectors of what legal tuples hold, in one table below other rows.

        Args:
            above: rows (., W) that come first.
            legal: B lists of N tuples in all, within the spec.
            places: (N,) int64, of their primaries.
            entities: {name: (B, n, E)}.
            weights: of the values.

        Returns:
            The table (R, W), in float32 or better; (N, slots) int64, the row of each slot's value.
        """
        batch, values = len(legal), legal.actions[:, 1:]
        ranges = self.look_up(places, values).flatten()
        # A few values are projected in one product of their table, listed or not.
        # A graph cannot look at how many tuples there are.
        compiling = torch.compiler.is_compiling()
        few = self.static <= (WHOLE if compiling else max(WHOLE, values.numel()))
        if few:
            keys = self.stride.index_select(0, ranges).view_as(values).mul_(values)
            keys.add_(self.whole_shift.index_select(0, ranges).view_as(values))
        else:
            keys = values + self.shift.index_select(0, ranges).view_as(values)
        edges = self.edges
        if self.of_state:
            a_state = self.shift_a_state.index_select(0, ranges).view_as(values)
            a_row = self.things_a_row.index_select(0, ranges).view_as(values)
            keys = torch.add(keys, a_state, alpha=batch) + a_row * legal.rows.unsqueeze(1)
            edges = torch.add(edges, self.edges_a_state, alpha=batch)
        none = torch.zeros_like(above[0][:1])  # of unused slots
        vectors, projections = self.learned_vectors(weights, above[0].shape[1])
        table = [*map(wide, above), wide(none)]
        if few:
            table += [
                wide((some @ projection).view(-1, none.shape[1]))
                for some, projection in zip(vectors, projections, strict=True)
            ]
            vectors, projections = [], []
        if projections or self.encoded:
            find = _find_op if compiling else _find
            bound = self.static + batch * self.of_state
            whole, first = (self.static, self.learned_parts) if few else (1, 0)
            keys, chosen, bounds = find(keys, edges[first:], whole, bound)
            vectors += [entities[str(source.name)].flatten(0, 1) for source in self.encoded]
            projections += weights.entity_projections
            dtype, device = projections[0].dtype, keys.device.type
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
            floats = [one.to(dtype) for one in (*vectors, *projections)]
            table.append(wide(_project(floats, [chosen, bounds], [none.shape[1]])[0]))
        return _join(table, [])[0], keys + sum(map(len, above))

    def learned_vectors(self, weights: Weights, width: int) -> tuple[list[Tensor], list[Tensor]]:
        """Of each learned source: its vectors (n, e), and their projections (e, parts * W)."""
        if weights.rows is None or weights.projections is None:
            return [], []
        vectors = [
            weights.rows.narrow(0, source.begin, source.rows)
            for source in self.learned
            if source.features is None
        ]
        vectors += self.of_features(weights.rows)
        columns = [len(source.parts) * width for source in self.learned]
        return vectors, list(weights.projections.split(columns, dim=1))

    def of_features(self, rows: Tensor) -> list[Tensor]:
        """Learned rows (rows, e) -> (n, e) of each source whose values weigh them."""
        return [
            self.get_buffer(f"features{number}").to(rows.dtype)
            @ rows.narrow(0, source.begin, source.rows)
            for number, source in enumerate(self.learned)
            if source.features is not None
        ]

    def padded(
        self, tuples: Tensor, entities: Mapping[str, Tensor], weights: Weights, width: int
    ) -> Tensor:
        """The sum of the projected vectors that padded tuples hold, in static shapes.

        Args:
            tuples: (B, K, H) int64, within the spec.
            entities: {name: (B, n, E)}.
            weights: of the values.
            width: W.

        Returns:
            (B, K, W).
        """
        batch = tuples.shape[0]
        static = [
            (some @ projection).view(-1, width)
            for some, projection in zip(*self.learned_vectors(weights, width), strict=True)
        ]
        own = [
            (entities[str(source.name)] @ projection)
            .unflatten(-1, (-1, width))
            .transpose(1, 2)
            .flatten(1, 2)
            for source, projection in zip(self.encoded, weights.entity_projections, strict=True)
        ]
        none = tuples.new_zeros(1, width, dtype=(*static, *own, torch.zeros(0))[0].dtype)
        ranges = self.look_up(self.places(tuples[..., 0]), tuples[..., 1:])  # (B, K, slots)
        rows = tuples[..., 1:] * self.stride[ranges] + self.whole_shift[ranges]
        total: Tensor = torch.cat([none, *static])[torch.where(rows < self.static, rows, 0)].sum(2)
        if own:
            mine = 1 - self.static + rows + self.shift_a_state[ranges]  # of a state's own things
            mine = torch.where(rows < self.static, 0, mine)
            things = torch.cat([none.expand(batch, 1, width), *own], dim=1)
            begins = torch.arange(batch, device=mine.device) * (1 + self.of_state)
            total = total + things.flatten(0, 1)[begins.view(-1, 1, 1) + mine].sum(2)
        return total


# How much work these two do depends on what legal tuples hold.


def _find(keys: Tensor, edges: Tensor, whole: int, bound: int) -> tuple[Tensor, Tensor, Tensor]:
    """Things of keys (N, slots) below ``bound``, after all keys below ``whole``.

    Args:
        keys: 0 or more.
        edges: (parts + 1,) where the keys of each part begin, the first at ``whole``.
        whole: the keys below are numbered as they are.
        bound: above all keys.

    Returns:
        The number (N, slots) of each; of the M that are at least ``whole``: (M,) the row of each
        in its source, and (parts + 1,) where the things of each part begin; all int64.
    """
    every = torch.cat([torch.arange(whole, device=keys.device), keys.flatten()])
    found, place = distinct(every, bound)
    bounds = torch.searchsorted(found, edges) - whole
    found = found[whole:]
    begins = edges[:-1].repeat_interleave(bounds.diff(), output_size=len(found))
    return place[whole:].view_as(keys), found - begins, bounds


def _find_apart(
    keys: Tensor, edges: Tensor, whole: int, bound: int
) -> tuple[Tensor, Tensor, Tensor]:
    place, chosen, bounds = _find(keys, edges, whole, bound)
    return place.clone(), chosen, bounds


_find_op = torch.library.custom_op(
    "tcg_flatpolicy::find_things",
    _find_apart,
    mutates_args=(),
    schema="(Tensor keys, Tensor edges, SymInt whole, SymInt bound) -> (Tensor, Tensor, Tensor)",
)


@_find_op.register_fake
def _(keys: Tensor, edges: Tensor, whole: int, bound: int) -> tuple[Tensor, Tensor, Tensor]:
    things = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(keys), keys.new_empty(things), torch.empty_like(edges)


# The rows of each source that are chosen, part after part, each part under its own columns of the
# projections. Floats: vectors (n, e) of each source; projections (e, parts * W) of each source.
# Others: chosen (M,), bounds (parts + 1,). Sizes: W. Result: (M, W).


def _parts(
    floats: list[Tensor], others: list[Tensor], width: int
) -> Iterator[tuple[int, slice, list[tuple[int, int, int]]]]:
    """Of each source: its number, its things, and of each part where its columns begin, where its
    things begin among those of the source, and how many they are.
    """
    edges: list[int] = others[1].tolist()
    part = 0
    for number, projections in enumerate(floats[len(floats) // 2 :]):
        ends = edges[part : part + projections.shape[1] // width + 1]
        part += len(ends) - 1
        held = [
            (k * width, begin - ends[0], end - begin)
            for k, (begin, end) in enumerate(pairwise(ends))
            if begin < end
        ]
        yield number, slice(ends[0], ends[-1]), held


def _project_forward(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    projected = floats[-1].new_empty(len(others[0]), sizes[0])
    vectors, projections = floats[: len(floats) // 2], floats[len(floats) // 2 :]
    for number, things, parts in _parts(floats, others, sizes[0]):
        rows, below = vectors[number].index_select(0, others[0][things]), projected[things]
        for column, begin, count in parts:
            projection = projections[number].narrow(1, column, sizes[0])
            torch.mm(rows.narrow(0, begin, count), projection, out=below.narrow(0, begin, count))
    return [projected]


def _project_backward(
    grad: Tensor, floats: list[Tensor], others: list[Tensor], sizes: list[int], saved: list[Tensor]
) -> list[Tensor]:
    of_vectors, of_projections = [], []
    vectors, projections = floats[: len(floats) // 2], floats[len(floats) // 2 :]
    for number, things, parts in _parts(floats, others, sizes[0]):
        chosen, below = others[0][things], grad[things]
        rows = vectors[number].index_select(0, chosen)
        of_rows, of_columns = torch.empty_like(rows), torch.zeros_like(projections[number])
        for column, begin, count in parts:
            upstream = below.narrow(0, begin, count)
            projection = projections[number].narrow(1, column, sizes[0])
            torch.mm(upstream, projection.t(), out=of_rows.narrow(0, begin, count))
            mine = rows.narrow(0, begin, count).t()
            of_columns.narrow(1, column, sizes[0]).copy_(torch.mm(mine, upstream))
        total = torch.zeros_like(vectors[number], dtype=wide(rows[:0]).dtype)
        total.index_add_(0, chosen, wide(of_rows))
        of_vectors.append(total.to(rows.dtype))
        of_projections.append(of_columns)
    return [*of_vectors, *of_projections]


def _project_fake(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    return [floats[-1].new_empty(others[0].shape[0], sizes[0])]


_project = Operator("project", _project_forward, _project_backward, _project_fake)


# Rows of several tables, one below the other. An operator, since inductor (torch 2.13) allocates
# the result of a cat before it knows how many things were found. Floats: (., W). Result: (R, W).


def _join_forward(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    return [torch.cat(floats)]


def _join_backward(
    grad: Tensor, floats: list[Tensor], others: list[Tensor], sizes: list[int], saved: list[Tensor]
) -> list[Tensor]:
    return list(grad.split([len(one) for one in floats]))


def _join_fake(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    return [floats[0].new_empty(sum(one.shape[0] for one in floats), floats[0].shape[1])]


_join = Operator("join", _join_forward, _join_backward, _join_fake)
