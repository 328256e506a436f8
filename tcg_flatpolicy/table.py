"""Every (primary, slot, value) of a spec as a row: which vector it has, and under which projection.

The one place where roles become numbers; scorer, keys and the padded form for export read it.

Shapes: B states, N legal tuples in the whole batch, P primaries, W width, E embedding size of a
source, M distinct things that legal tuples hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.operators import Operator, wide
from tcg_flatpolicy.packing import distinct
from tcg_flatpolicy.spec import ActionSpec, Part, Role

WHOLE = 2**14
"""Up to so many values of all learned parts are projected, listed or not."""

TABULATED = 2**16
"""Up to so many (primary, value) of a slot have their part in a table."""


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
            device = self._buffers[name].device  # type: ignore[union-attr]
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
        self._place = {number: place for place, number in enumerate(self.ids.tolist())}
        per_slot = _grouped(spec.parts, lambda part: (part.primary, part.slot))
        self._parts = max((len(parts) for parts in per_slot.values()), default=1)
        self.ranges = len(self.ids) * self.slots * self._parts
        self._number: dict[Part, int] = {}
        thresholds = np.full((self.slots, len(self.ids), self._parts), 2**63 - 1, np.int64)
        for (primary, slot), parts in per_slot.items():
            place = self._place[primary]
            for k, part in enumerate(parts):
                thresholds[slot, place, k] = part.start
                self._number[part] = (place * self.slots + slot) * self._parts + k
        self.derive("slot_numbers", np.arange(self.slots) * self._parts)
        self._divided = sorted({slot for (_, slot), parts in per_slot.items() if len(parts) > 1})
        # Of a slot that some primary divides: the part of each value, or, of a slot of many values,
        # where each part but the first begins.
        self._values = {slot: int(spec.nvec[1 + slot]) for slot in self._divided}
        for slot, values in self._values.items():
            begins = thresholds[slot, :, 1:]
            if len(begins) * values <= TABULATED:
                begins = (np.arange(values)[:, None] >= begins[:, None]).sum(-1).ravel()
            self.derive(f"parts{slot}", begins)
        self._gaps = bool(self.ids[-1] >= len(self.ids))
        if self._gaps:
            place_of_id = np.zeros(self.ids[-1] + 1, np.int64)
            place_of_id[self.ids] = np.arange(len(self.ids))
            self.derive("place_of_id", place_of_id)

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
        """The numbers of the ranges that values lie in.

        Args:
            places: (...,) of primaries, int64.
            values: (..., slots) int64.

        Returns:
            (..., slots) int64.
        """
        a_place = self.slots * self._parts
        ranges = torch.add(self.slot_numbers, places.unsqueeze(-1), alpha=a_place)
        for slot in self._divided:
            part = self._part(places, slot, values[..., slot])
            ranges.select(-1, slot).add_(part)
        return ranges

    def look_up_slot(self, places: Tensor, slot: int, values: Tensor) -> Tensor:
        """As look_up, of the values in one slot (0 .. slots - 1); all (n,)."""
        ranges = (places * self.slots + slot) * self._parts
        return ranges + self._part(places, slot, values) if slot in self._divided else ranges

    def _part(self, places: Tensor, slot: int, values: Tensor) -> Tensor:
        """Which of a slot's parts values lie in: how many of the others begin at most there."""
        parts = self.get_buffer(f"parts{slot}")
        if parts.ndim == 1:
            at = torch.add(values, places, alpha=self._values[slot])
            return parts.index_select(0, at.flatten()).view_as(values)
        begins = parts.index_select(0, places.flatten()).view(*values.shape, self._parts - 1)
        return (values.unsqueeze(-1) >= begins).sum(-1)


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


class Things(NamedTuple):
    """What the legal tuples of a batch hold, each thing once, however many tuples hold it."""

    place: Tensor
    """(N, slots) int64: which of the M things stands in each slot."""
    chosen: Tensor
    """(M,) int64: the row of each thing in its source; of learned ones, among its own."""
    bounds: Tensor
    """(parts + 2,) int64: where the things of each part begin among the M. The first part is that
    of unused slots, whose one thing is a row of zeros."""


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
    shift_a_state: Tensor
    things_a_row: Tensor
    edges: Tensor
    edges_a_state: Tensor

    def __init__(self, spec: ActionSpec, entity_sizes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(spec)
        self.learned, self.encoded = sources(spec.parts, entity_sizes)
        self.learned_rows = max((source.begin + source.rows for source in self.learned), default=0)
        self.learned_parts = sum(len(source.parts) for source in self.learned)
        shift: dict[Part, int] = {}
        shift_a_state: dict[Part, int] = {}
        things_a_row: dict[Part, int] = {}
        # Where the keys of each part begin, that of unused slots first.
        edges, edges_a_state = [0], [0]
        static, of_state = 1, 0
        for source in (*self.learned, *self.encoded):
            for part in source.parts:
                edges.append(static)
                edges_a_state.append(of_state)
                shift[part] = static - part.start
                if source.rows:
                    static += source.size
                else:
                    shift_a_state[part], things_a_row[part] = of_state, source.size
                    of_state += source.size
        for part in things_a_row:  # behind all learned ones
            shift[part] = static - part.start
        at = 1 + self.learned_parts
        edges[at:] = [static] * (len(edges) - at)
        self.static, self.of_state = static, of_state
        self.derive("shift", self.tabulate(shift))
        self.derive("shift_a_state", self.tabulate(shift_a_state))
        self.derive("things_a_row", self.tabulate(things_a_row))
        self.derive("edges", np.array([*edges, static]))
        self.derive("edges_a_state", np.array([*edges_a_state, of_state]))
        # Of each source: how many parts it has, negative where its vectors are features.
        signs = [-1 if source.features is not None else 1 for source in self.learned]
        self._counts = [
            sign * len(source.parts) for sign, source in zip(signs, self.learned, strict=True)
        ]
        self._counts += [len(source.parts) for source in self.encoded]
        for number, source in enumerate(self.learned):
            if source.features is not None:
                self.derive(f"features{number}", source.features.numpy())

    def find(self, legal: LegalActions, places: Tensor) -> Things:
        """What legal tuples, whose primaries have ``places`` (N,), hold."""
        batch, values = len(legal), legal.actions[:, 1:]
        ranges = self.look_up(places, values).flatten()
        shift = self.shift + batch * self.shift_a_state
        keys = values + shift.index_select(0, ranges).view_as(values)
        if self.of_state:
            a_row = self.things_a_row.index_select(0, ranges).view_as(values)
            keys = keys + a_row * legal.rows.unsqueeze(1)
        edges = self.edges + batch * self.edges_a_state
        # A few values are projected in one product of their table, listed or not.
        # A graph cannot look at how many tuples there are.
        compiling = torch.compiler.is_compiling()
        few = WHOLE if compiling else max(WHOLE, keys.numel())
        whole = self.static if self.static <= few else 0
        find = _find_op if compiling else _find
        return Things(*find(keys, edges, whole, self.static + batch * self.of_state))

    def project(
        self,
        above: Sequence[Tensor],
        things: Things,
        entities: Mapping[str, Tensor],
        learned: Tensor | None,
        learned_projections: Tensor | None,
        entity_projections: Iterable[Tensor],
    ) -> Tensor:
        """The projected vectors of things, in one table below other rows.

        Args:
            above: rows (., W) that come first, R in all.
            things: M of a batch of B states.
            entities: {name: (B, n, E)}.
            learned: (rows, e) of the learned sources; None if there are none.
            learned_projections: (e, parts * W) of the learned sources.
            entity_projections: (E, parts * W) of each encoded source.

        Returns:
            (R + M, W), in float32 or better.
        """
        vectors, projections, features = self._learned(learned, learned_projections, above[0])
        vectors += [entities[str(source.name)].flatten(0, 1) for source in self.encoded]
        projections += entity_projections
        if projections:
            dtype, device = projections[0].dtype, things.place.device.type
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
            vectors, projections, features = (
                [one.to(dtype) for one in some] for some in (vectors, projections, features)
            )
        return _project(
            [*map(wide, above), *vectors, *projections],
            [things.chosen, things.bounds, *features],
            [len(above), *self._counts],
        )

    def _learned(
        self, learned: Tensor | None, projections: Tensor | None, like: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of the learned sources: rows of plain ones, projections of all, features of the others.

        The projection of features is that of the rows that they weigh.
        """
        vectors: list[Tensor] = []
        of_each: list[Tensor] = []
        features: list[Tensor] = []
        if learned is None or projections is None:
            return vectors, of_each, features
        columns = [len(source.parts) * like.shape[1] for source in self.learned]
        for number, (source, projection) in enumerate(
            zip(self.learned, projections.split(columns, dim=1), strict=True)
        ):
            rows = learned.narrow(0, source.begin, source.rows)
            if source.features is None:
                vectors.append(rows)
                of_each.append(projection)
            else:
                features.append(self.get_buffer(f"features{number}"))
                of_each.append(rows @ projection)
        return vectors, of_each, features

    def padded(
        self,
        tuples: Tensor,
        entities: Mapping[str, Tensor],
        learned: Tensor | None,
        learned_projections: Tensor | None,
        entity_projections: Iterable[Tensor],
        width: int,
    ) -> Tensor:
        """The sum of the projected vectors that padded tuples hold, in static shapes.

        Args:
            tuples: (B, K, H) int64, within the spec.
            entities, learned, learned_projections, entity_projections: as for `project`.
            width: W.

        Returns:
            (B, K, W).
        """
        batch, listed, _ = tuples.shape
        none = tuples.new_zeros(1, width, dtype=torch.float32)
        static = [none]
        vectors, projections, features = self._learned(learned, learned_projections, none)
        for source, projection in zip(self.learned, projections, strict=True):
            some = (vectors if source.features is None else features).pop(0)
            static.append(_part_by_part(some.to(projection.dtype) @ projection, width))
        static[0] = none.to(static[-1].dtype)
        own = [
            _part_by_part(entities[str(source.name)] @ projection, width)
            for source, projection in zip(self.encoded, entity_projections, strict=True)
        ]
        ranges = self.look_up(self.places(tuples[..., 0]), tuples[..., 1:])  # (B, K, slots)
        rows = tuples[..., 1:] + self.shift[ranges]
        total = torch.cat(static)[torch.where(rows < self.static, rows, 0)].sum(2)
        if own:
            mine = rows - self.static + self.shift_a_state[ranges]  # of a state's own things
            things = torch.cat(own, dim=1)
            one = things.new_zeros(1, 1, width).expand(batch, 1, width)
            mine = 1 + torch.where(rows < self.static, -1, mine)
            begins = torch.arange(batch, device=mine.device) * (1 + self.of_state)
            flat = torch.cat([one, things], dim=1).flatten(0, 1)
            total = total + flat[begins.view(-1, 1, 1) + mine].sum(2)
        return total.view(batch, listed, width)


def _part_by_part(projected: Tensor, width: int) -> Tensor:
    """(..., n, parts * W) -> (..., parts * n, W)."""
    parted: Tensor = projected.unflatten(-1, (-1, width))
    return parted.transpose(-3, -2).flatten(-3, -2)


def _grouped(parts: Iterable[Part], key: Callable[[Part], Any]) -> dict[Any, list[Part]]:
    """Parts of equal key, in order of first use."""
    found: dict[Any, list[Part]] = {}
    for part in parts:
        found.setdefault(key(part), []).append(part)
    return found


# How much work these two do depends on what legal tuples hold.


def _find(keys: Tensor, edges: Tensor, whole: int, bound: int) -> tuple[Tensor, Tensor, Tensor]:
    """Things of keys (N, slots) below ``bound``, and of all keys below ``whole``.

    The keys of parts begin at ``edges``.
    """
    if whole == bound:  # nothing to tell apart
        return keys, keys.new_empty(bound), edges
    every = torch.cat([torch.arange(whole, device=keys.device), keys.flatten()])
    found, place = distinct(every, bound)
    bounds = torch.searchsorted(found, edges)
    begins = edges[:-1].repeat_interleave(bounds.diff(), output_size=len(found))
    return place[whole:].view_as(keys), found - begins, bounds


def _find_apart(
    keys: Tensor, edges: Tensor, whole: int, bound: int
) -> tuple[Tensor, Tensor, Tensor]:
    place, chosen, bounds = _find(keys, edges, whole, bound)
    return place.clone(), chosen, bounds.clone()


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


class _Group(NamedTuple):
    """Parts whose things are rows of one matrix."""

    whole: bool
    """Whether each part holds all things of the source, one after the other."""
    vectors: Tensor
    projections: Tensor
    parts: list[tuple[int, int, int]]
    """Of each part that holds something: its number in the group, where its things begin among
    those of the group, and how many they are."""
    things: slice
    """Of all its parts."""
    floats: tuple[int | None, int]
    """Where vectors (if they have a gradient) and projections stand among the floats."""


def _groups(
    floats: list[Tensor], others: list[Tensor], sizes: list[int]
) -> tuple[Tensor, list[_Group]]:
    """The things that are no part's, one or none, as (n, W) zeros, and the groups."""
    above, *counts = sizes
    edges: list[int] = others[1].tolist()
    mixed, plain, first = 2, above, len(floats) - len(counts)
    part, found = 1, []
    for number, count in enumerate(counts):
        ends = edges[part : part + abs(count) + 1]
        part += abs(count)
        where: tuple[int | None, int] = (plain if count > 0 else None, first + number)
        vectors = floats[plain] if count > 0 else others[mixed]
        plain, mixed = plain + (count > 0), mixed + (count < 0)
        things = slice(ends[0], ends[-1])
        # No part holds more than all of them.
        whole = ends[-1] - ends[0] == abs(count) * len(vectors)
        held = [
            (k, begin - ends[0], end - begin)
            for k, (begin, end) in enumerate(pairwise(() if whole else ends))
            if begin < end
        ]
        found.append(_Group(whole, vectors, floats[first + number], held, things, where))
    return floats[0].new_zeros(edges[1], floats[0].shape[1]), found


def _project_forward(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    nothing, groups = _groups(floats, others, sizes)
    width = nothing.shape[1]
    below = [nothing]
    for group in groups:
        if group.whole:
            by_part = group.projections.unflatten(1, (-1, width)).transpose(0, 1)
            vectors = group.vectors.expand(len(by_part), *group.vectors.shape)
            below.append(torch.bmm(vectors, by_part).flatten(0, 1))
            continue
        rows = group.vectors.index_select(0, others[0][group.things])
        for k, begin, count in group.parts:
            projection = group.projections.narrow(1, k * width, width)
            below.append(torch.mm(rows.narrow(0, begin, count), projection))
    return [torch.cat([*floats[: sizes[0]], *map(wide, below)])]


def _project_backward(
    grad: Tensor, floats: list[Tensor], others: list[Tensor], sizes: list[int], saved: list[Tensor]
) -> list[Tensor]:
    width, above = grad.shape[1], sizes[0]
    *grads, below = grad.split([*(len(one) for one in floats[:above]), len(others[0])])
    grads = [one.clone() for one in grads]  # a parameter would keep all of the gradient
    grads += floats[above:]  # each is replaced
    for group in _groups(floats, others, sizes)[1]:
        of_vectors, at = group.floats
        if group.whole:
            by_part = below[group.things].to(group.vectors.dtype)
            parts = group.projections.shape[1] // width
            by_part = by_part.view(parts, len(group.vectors), width)
            upstream = by_part.transpose(0, 1).reshape(len(group.vectors), parts * width)
            grads[at] = torch.mm(group.vectors.t(), upstream)
            if of_vectors is not None:
                grads[of_vectors] = torch.mm(upstream, group.projections.t())
            continue
        chosen = others[0][group.things]
        rows = group.vectors.index_select(0, chosen)
        upstream = below[group.things].to(rows.dtype)
        of_rows, of_projections = torch.empty_like(rows), torch.zeros_like(group.projections)
        for k, begin, count in group.parts:
            above_these = upstream.narrow(0, begin, count)
            projection = group.projections.narrow(1, k * width, width)
            torch.mm(above_these, projection.t(), out=of_rows.narrow(0, begin, count))
            mine = rows.narrow(0, begin, count).t()
            of_projections.narrow(1, k * width, width).copy_(torch.mm(mine, above_these))
        grads[at] = of_projections
        if of_vectors is not None:
            total = torch.zeros_like(group.vectors, dtype=wide(rows[:0]).dtype)
            total.index_add_(0, chosen, wide(of_rows))
            grads[of_vectors] = total.to(rows.dtype)
    return grads


def _project_fake(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    rows = sum(piece.shape[0] for piece in floats[: sizes[0]])
    return [floats[0].new_empty(rows + others[0].shape[0], floats[0].shape[1])]


_project = Operator("project", _project_forward, _project_backward, _project_fake)
