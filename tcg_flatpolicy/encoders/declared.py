"""An encoder by declaration: what each field of an observation is, and what the things in it are.

Shapes: B rows, D hidden size, E entity size, n things of a name, K names of one kind of thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal, TypeAlias

import torch
from numpy import ndindex
from torch import Tensor, nn
from torch.nn import functional

from tcg_flatpolicy.encoders.base import Encoding
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.table import Lookup

_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


@dataclass(frozen=True)
class Number:
    """Numbers, divided by a scale that brings them near 1."""

    field: str
    scale: float = 1.0


@dataclass(frozen=True)
class Category:
    """Whole numbers 0 .. n-1, with a learned row for each; of several in a field, for each place.

    The rows of a field are summed.
    """

    field: str
    n: int


@dataclass(frozen=True)
class Cards:
    """Ids 0 .. n-1 of cards, 0 for no card: the sum of their learned rows.

    Fields with the same ``embed`` share their rows, so a card in hand is the card on a board.
    """

    field: str
    n: int
    embed: str = "cards"


@dataclass(frozen=True, init=False)
class Entities:
    """Things that actions point at under ``name``: so many, each described by the same fields.

    A thing's vector is the sum of a linear layer of its numbers, the rows of its categories and
    cards, and a row of its place; then relu, if it has numbers.

    Args:
        name: of an Entity of the spec.
        max: n, how many there are at most, the first size of each field.
        fields: Number, Category and Cards, of fields (n,) or (n, numbers).
        present: field (n,), not 0 where there is such a thing; the vector of an absent one is 0.
            All are present if left out.
        pool: what the state gets: "sum" or "mean" of those present, all side by side ("flat"), or
            "none".
        places: whether each place has a learned row.
        kind: those of one kind share their weights, but for rows of places; the name if left out.
    """

    name: str
    max: int
    fields: tuple[Number | Category | Cards, ...]
    present: str | None
    pool: Literal["sum", "mean", "flat", "none"]
    places: bool
    kind: str

    def __init__(
        self,
        name: str,
        max: int,
        *fields: Number | Category | Cards,
        present: str | None = None,
        pool: Literal["sum", "mean", "flat", "none"] = "sum",
        places: bool = False,
        kind: str | None = None,
    ) -> None:
        if pool not in ("sum", "mean", "flat", "none"):
            raise ValueError(
                f"Entities({name!r}): pool must be sum, mean, flat or none, not {pool!r}"
            )
        if not fields:
            raise ValueError(f"Entities({name!r}) needs a Number, a Category or Cards")
        given = (name, max, fields, present, pool, places, kind or name)
        for attribute, value in zip(self.__dataclass_fields__, given, strict=True):
            object.__setattr__(self, attribute, value)

    def alike(self) -> tuple[Any, ...]:
        """What is the same of all of one kind."""
        shapes = [(type(f), getattr(f, "n", 0), getattr(f, "embed", "")) for f in self.fields]
        return self.max, self.places, self.present is None, *shapes


Part: TypeAlias = Number | Category | Cards | Entities


class Declared(nn.Module):
    """Encodes what is declared, in this order, by two layers; and embeds the declared entities.

    To read fields that the layout does not have as they are needed, override :meth:`read`.

    Args:
        layout: has the fields.
        parts: Number, Category, Cards and Entities.
        hidden_size: D.
        entity_size: E, of all rows and things.
        attention: one layer of attention among all things that are present.
        in_slots: ``embed`` names of Cards. An Entity slot of that name holds a card's id, and has
            its row.

    Raises:
        KeyError: the layout has no such field.
        ValueError: a field of another shape than declared, things of one kind that are not alike,
            or cards of one ``embed`` and another n.
    """

    def __init__(
        self,
        layout: LegalLayout,
        *parts: Part,
        hidden_size: int = 256,
        entity_size: int = 32,
        attention: bool = False,
        in_slots: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.layout, self.parts, self.hidden_size = layout, parts, hidden_size
        self.entity_size, self.in_slots = entity_size, tuple(in_slots)
        self.entities = [part for part in parts if isinstance(part, Entities)]
        self.kinds: dict[str, list[Entities]] = {}
        for part in self.entities:
            self.kinds.setdefault(part.kind, []).append(part)
        self.shapes = {
            name: tuple(values.shape[1:])
            for name, values in self.read(torch.zeros(1, layout.dtype.itemsize).byte()).items()
        }
        tables = self._tables()
        self.entity_sizes = {part.name: (part.max, entity_size) for part in self.entities}
        self.entity_sizes |= {name: (sum(tables[name].values()), entity_size) for name in in_slots}
        self._axes = self._named_axes(tables)

        self.places, self.tables = nn.ParameterDict(), nn.ModuleDict()
        self.linears = nn.ModuleDict()
        bags = {_key(part.embed) for part in self._fields() if isinstance(part, Cards)}
        for name, rows in tables.items():
            zero = 0 if _key(name) in bags else None
            table = nn.Embedding(sum(rows.values()), entity_size, padding_idx=zero)
            self.tables[_key(name)] = table
        for kind, group in self.kinds.items():
            if group[0].places:
                self.places[_key(kind)] = torch.zeros(len(group), group[0].max, entity_size)
            if numbers := self._numbers_of(group[0]):
                self.linears[_key(kind)] = nn.Linear(len(numbers), entity_size)
        self.attention: Any = _Attention(entity_size) if attention else None
        first = nn.Linear(sum(self._axes["trunk.0.weight"][2].values()), hidden_size)
        second = nn.Linear(hidden_size, hidden_size)
        self.trunk = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        for linear in (*self.linears.values(), first, second):
            nn.init.orthogonal_(linear.get_parameter("weight"), 2**0.5)
            nn.init.zeros_(linear.get_parameter("bias"))
        with torch.no_grad():
            for embedding in self.tables.values():
                embedding.get_parameter("weight").mul_(entity_size**-0.5)

    @classmethod
    def of_recipe(cls, layout: LegalLayout, recipe: Mapping[str, Any]) -> Declared:
        """Another one, from what :meth:`recipe` gave."""
        sizes = {name: value for name, value in recipe.items() if name != "parts"}
        return cls(layout, *map(_part_of, recipe["parts"]), **sizes)

    def recipe(self) -> dict[str, Any]:
        """The arguments after the layout, in plain values."""
        return {
            "parts": [_plain(part) for part in self.parts],
            "hidden_size": self.hidden_size,
            "entity_size": self.entity_size,
            "attention": self.attention is not None,
            "in_slots": list(self.in_slots),
        }

    def named_axes(self) -> dict[str, tuple[Any, ...]]:
        """What the rows of parameters are of; see :mod:`tcg_flatpolicy.saving`."""
        return self._axes

    def read(self, observations: Tensor) -> Mapping[str, Tensor]:
        """Observations (B, columns) -> {name: (B, *shape)} of all declared fields."""
        names = [part.field for part in self._fields()]
        names += [part.present for part in self.entities if part.present is not None]
        return {name: self.layout.field(observations, name) for name in dict.fromkeys(names)}

    def forward(self, observations: Tensor) -> Encoding:
        """Observations (B, columns) as LegalLayout.read takes them -> hidden (B, D) and entities.

        Raises:
            ValueError: on a CPU, a category or card outside its range, naming row and field.
        """
        fields = self.read(observations)
        things: dict[str, Tensor] = {}
        looked_up: dict[str, Lookup] = {}
        for kind, group in self.kinds.items():
            if self._is_looked_up(group[0]):
                looked_up |= {one.name: self._lookup(one, fields) for one in group}
                continue
            made = self._things(kind, group, fields)
            things |= zip((one.name for one in group), made, strict=True)
        present = {p.name: fields[p.present] != 0 for p in self.entities if p.present is not None}
        if self.attention is not None:
            things = self.attention(things, present)
        for name, here in present.items():
            things[name] = things[name] * here.unsqueeze(2)
        bags = self._bags(fields)
        columns = [self._columns(part, fields, bags, things, present) for part in self.parts]
        dtype = self.trunk[0].get_parameter("weight").dtype
        hidden = self.trunk(torch.cat([one for one in columns if one is not None], 1).to(dtype))
        for name in self.in_slots:
            weight = self.tables[_key(name)].get_parameter("weight")
            every = torch.arange(weight.shape[0], device=weight.device)
            looked_up[name] = Lookup(weight, every.expand(hidden.shape[0], -1))
        return Encoding(hidden, {**things, **looked_up})

    def _is_looked_up(self, part: Entities) -> bool:
        """Whether things are rows of a table as they are, and nobody else asks for them."""
        one, *others = part.fields
        plain = isinstance(one, (Cards, Category)) and len(self.shapes[one.field]) == 1
        alone = not others and part.pool == "none" and part.present is None and not part.places
        return plain and alone and self.attention is None

    def _lookup(self, part: Entities, fields: Mapping[str, Tensor]) -> Lookup:
        one: Any = part.fields[0]
        values = fields[one.field].unsqueeze(0).unsqueeze(-1)  # (1, B, n, 1)
        ids = self._ids(one, values, [one.field], 0)[0, ..., 0]
        return Lookup(self.tables[_key(_table(one))].get_parameter("weight"), ids)

    def _things(
        self, kind: str, group: Sequence[Entities], fields: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """The vectors (B, n, E) of each name of one kind."""
        numbers: list[Tensor] = []
        total: Any = None
        for alike in zip(*(one.fields for one in group), strict=True):
            values = torch.stack([fields[part.field] for part in alike])  # (K, B, n, ...)
            values = values.flatten(3) if values.ndim > 3 else values.unsqueeze(3)
            if isinstance(alike[0], Number):
                scales = [part.scale for part in alike]
                if any(scale != 1 for scale in scales):
                    by = values.new_tensor(scales, dtype=torch.float32)
                    values = values / by.view(-1, 1, 1, 1)
                numbers.append(values if values.is_floating_point() else values.float())
            else:
                ids = self._ids(alike[0], values, [part.field for part in alike], 0)
                rows = self.tables[_key(_table(alike[0]))](ids)
                rows = rows[:, :, :, 0] if rows.shape[3] == 1 else rows.sum(3)
                total = rows if total is None else total + rows
        if numbers:
            linear = self.linears[_key(kind)]
            dtype = linear.get_parameter("weight").dtype
            of_numbers = linear(torch.cat(numbers, 3).to(dtype))
            total = of_numbers if total is None else of_numbers + total
        if group[0].places:
            total = total + self.places[_key(kind)].unsqueeze(1)
        return (torch.relu(total) if numbers else total).unbind()

    def _ids(
        self, part: Category | Cards, values: Tensor, names: Sequence[str], along: int
    ) -> Tensor:
        """Rows of a table for values (K, B, ..., numbers), whose names go along a dimension."""
        ids = values.long()
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = (ids < 0) | (ids >= part.n)
            if values.is_floating_point():
                wrong |= ids != values
            for where in wrong.nonzero()[:1].tolist():
                raise ValueError(
                    f"row {where[1]}: {names[where[along]]} holds {values[tuple(where)].item()}, "
                    f"declared as {type(part).__name__} of 0 .. {part.n - 1}"
                )
        if isinstance(part, Category) and ids.shape[-1] > 1:
            ids = ids + torch.arange(ids.shape[-1], device=ids.device) * part.n
        return ids

    def _bags(self, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums (B, E) of the rows of each field of cards and categories outside of things."""
        found: dict[str, Tensor] = {}
        for name, group in self._outside().items():
            values = [fields[part.field].unsqueeze(-1).flatten(1) for part in group]
            table, sizes = self.tables[_key(name)], [one.shape[1] for one in values]
            names = [
                part.field for part, size in zip(group, sizes, strict=True) for _ in range(size)
            ]
            rows = self._ids(group[0], torch.cat(values, 1).unsqueeze(0), names, 2)[0]
            if _is_exporting():  # an export would turn embedding_bag into a loop
                sums = tuple(table(one).sum(1) for one in rows.split(sizes, 1))
            else:
                # One bag for each field: it sums without a copy of every row.
                first = torch.arange(len(rows), device=rows.device) * rows.shape[1]
                begins = first.new_tensor([0, *accumulate(sizes[:-1])])
                every_sum = functional.embedding_bag(
                    rows.flatten(),
                    table.get_parameter("weight"),
                    (first.unsqueeze(1) + begins).flatten(),
                    mode="sum",
                    padding_idx=0 if isinstance(group[0], Cards) else None,
                )
                sums = every_sum.view(-1, len(group), self.entity_size).unbind(1)
            found |= zip((part.field for part in group), sums, strict=True)
        return found

    def _columns(
        self,
        part: Part,
        fields: Mapping[str, Tensor],
        bags: Mapping[str, Tensor],
        things: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
    ) -> Tensor | None:
        """What the state gets of a part, (B, columns)."""
        if isinstance(part, Number):
            values = fields[part.field].unsqueeze(-1).flatten(1).float()
            return values if part.scale == 1 else values / part.scale
        if not isinstance(part, Entities):
            return bags[part.field]
        if part.pool == "none":
            return None
        vectors = things[part.name]
        if part.pool == "flat":
            return vectors.flatten(1)
        total = vectors.sum(1)
        if part.pool == "sum":
            return total
        here = present.get(part.name)
        return total / (part.max if here is None else here.sum(1, keepdim=True).clamp(min=1))

    # ---- what there is, when it is made

    def _fields(self) -> Iterator[Number | Category | Cards]:
        for part in self.parts:
            yield from part.fields if isinstance(part, Entities) else (part,)

    def _outside(self) -> dict[str, list[Category | Cards]]:
        """Cards and categories outside of things, by their table."""
        found: dict[str, list[Category | Cards]] = {}
        for part in self.parts:
            if isinstance(part, (Category, Cards)):
                found.setdefault(_table(part), []).append(part)
        return found

    def _tables(self) -> dict[str, dict[str, int]]:
        """{table: {what rows are of: how many}}; raises where declarations do not fit."""
        tables: dict[str, dict[str, int]] = {}

        def add(part: Category | Cards, count: int) -> None:
            name, rows = _table(part), {f"place {place}": part.n for place in range(count)}
            if tables.setdefault(name, rows) != rows:
                raise ValueError(
                    f"{part} does not fit the other rows of {name!r}, {tables[name]}: give it the "
                    "same n, or another name"
                )

        for part in self.parts:
            if isinstance(part, (Category, Cards)):
                add(part, 1 if isinstance(part, Cards) else _size(self.shapes[part.field]))
        for group in self.kinds.values():
            for one in group:
                if one.alike() != group[0].alike():
                    raise ValueError(
                        f"{one} and {group[0]} are of one kind, {one.kind!r}, but not alike: "
                        "declare as many, and the same kinds of fields, or another kind"
                    )
                for field in one.fields:
                    shape = self.shapes[field.field]
                    if shape[:1] != (one.max,):
                        raise ValueError(
                            f"Entities({one.name!r}, {one.max}): field {field.field!r} has shape "
                            f"{shape}; its first size must be {one.max}"
                        )
                if one.present is not None and self.shapes[one.present] != (one.max,):
                    raise ValueError(
                        f"Entities({one.name!r}, {one.max}): present={one.present!r} has shape "
                        f"{self.shapes[one.present]}, not ({one.max},)"
                    )
            for field in group[0].fields:
                if not isinstance(field, Number):
                    several = isinstance(field, Category)
                    add(field, _size(self.shapes[field.field][1:]) if several else 1)
        for name in self.in_slots:
            if name not in tables or any(name == one.name for one in self.entities):
                raise ValueError(
                    f"in_slots names {name!r}; it must be one of {sorted(tables)}, and no Entities"
                )
        return tables

    def _numbers_of(self, one: Entities) -> dict[str, int]:
        """A column for each number of a thing."""
        return {
            f"{part.field}{list(place)}": 1
            for part in one.fields
            if isinstance(part, Number)
            for place in ndindex(self.shapes[part.field][1:])
        }

    def _named_axes(self, tables: Mapping[str, Mapping[str, int]]) -> dict[str, tuple[Any, ...]]:
        axes: dict[str, tuple[Any, ...]] = {}
        for name, rows in tables.items():
            axes[f"tables.{_key(name)}.weight"] = (dict(rows), None)
        for kind, group in self.kinds.items():
            if group[0].places:
                names = {one.name: 1 for one in group}
                axes[f"places.{_key(kind)}"] = (names, {"place": group[0].max}, None)
            if numbers := self._numbers_of(group[0]):
                axes[f"linears.{_key(kind)}.weight"] = (None, numbers)
        columns: dict[str, int] = {}
        for part in self.parts:
            if isinstance(part, Number):
                for place in ndindex(self.shapes[part.field]):
                    columns[f"{part.field}{list(place)}"] = 1
            elif isinstance(part, Entities):
                count = {"none": 0, "flat": part.max}.get(part.pool, 1)
                columns[f"Entities {part.name}"] = count * self.entity_size
            else:
                columns[part.field] = self.entity_size
        axes["trunk.0.weight"] = (None, columns)
        return {name: (name, *of) for name, of in axes.items()}


class _Attention(nn.Module):
    """One layer of attention among things, added to them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.asked, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(
        self, things: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """{name: (B, n, E)} and {name: (B, n) bool} of those that can be absent -> as things."""
        every = torch.cat(list(things.values()), 1)
        here = torch.cat(
            [present.get(n, torch.ones_like(x[..., 0]).bool()) for n, x in things.items()], 1
        )
        query, key, value = self.asked(every).chunk(3, 2)
        scores = query @ key.mT / every.shape[2] ** 0.5
        # Not -inf: where nothing is present, what is absent must still be numbers.
        weights = scores.masked_fill(~here.unsqueeze(1), -1e4).softmax(2)
        mixed = every + self.out(weights @ value)
        sizes = [x.shape[1] for x in things.values()]
        return dict(zip(things, mixed.split(sizes, 1), strict=True))


def _table(part: Category | Cards) -> str:
    return part.embed if isinstance(part, Cards) else part.field


def _key(name: str) -> str:
    """A name as torch takes it for a part of a module."""
    return name.replace(".", "/")


def _size(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _plain(part: Part) -> list[Any]:
    """[class, {argument: value}], in plain values."""
    if isinstance(part, Entities):
        fields = [_plain(field) for field in part.fields]
        return ["Entities", {**vars(part), "fields": fields}]
    return [type(part).__name__, asdict(part)]


def _part_of(plain: Any) -> Part:
    name, values = plain
    if name == "Entities":
        values = dict(values)
        fields: Any = map(_part_of, values.pop("fields"))
        return Entities(values.pop("name"), values.pop("max"), *fields, **values)
    kinds: dict[str, Any] = {"Number": Number, "Category": Category, "Cards": Cards}
    part: Part = kinds[name](**values)
    return part
