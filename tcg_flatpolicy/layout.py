"""Where things lie in an observation: the legal list and every other field, by their names.

An engine's C struct, or PufferLib's emulation of a Dict space, reaches the policy as one flat row
of bytes (or of numbers, when all fields share a dtype). Shapes: B rows, N legal tuples in the whole
batch, K tuples that a list has room for, H = 1 + slots values in a tuple.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcg_flatpolicy.fields import Field, Number, Struct, resolve
from tcg_flatpolicy.invalid import Dropped
from tcg_flatpolicy.kernels import cpu
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.packing import pack, places
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.wrapping import env_attribute, env_layers, is_emulation

Names: TypeAlias = str | Sequence[str]
"""Of the fields of tuples: a (K, H) one, or H of (K,), primary first."""


class ListView(NamedTuple):
    """Where each row's list lies in (B, row_bytes) uint8, as a compiled kernel takes it."""

    row_bytes: int
    counts: Number
    columns: tuple[Number, ...]
    """H, primary first."""
    room: int
    """K."""


class LegalLayout(Struct):
    """Reads and writes the legal list, and reads any other field, of flat observations.

    Build one with :meth:`from_dtype` or :meth:`from_env`. Two are equal if dtype, count and actions
    are, whatever the spec.
    """

    def __init__(
        self,
        dtype: npt.DTypeLike,
        count: str,
        actions: Names,
        spec: ActionSpec | None = None,
        dropped: Dropped | None = None,
    ) -> None:
        super().__init__(np.dtype(dtype))
        self.count_name = count
        self.action_names = actions if isinstance(actions, str) else tuple(actions)
        self.count = self._integers(count)
        """Where the number of tuples is."""
        if self.count.shape not in ((), (1,)):
            raise ValueError(f"count field {count!r} must be one number, it has {self.count.shape}")
        self.columns = self._columns()
        """One (K,) field a tuple value, primary first."""
        first, width = self.columns[0], len(self.columns)
        self.padding = first.shape[0]
        """K: how many tuples the list has room for."""

        size, offsets = first.dtype.itemsize, [column.offset for column in self.columns]
        alike = first.dtype.kind in "iu" and all(
            (column.dtype, column.strides) == (first.dtype, first.strides)
            for column in self.columns
        )
        together = alike and offsets == [first.offset + j * size for j in range(width)]
        self._pieces = [(first, width)] if together else [(column, 1) for column in self.columns]
        """What of a tuple is read at once: from a field on, so many numbers."""

        self.spec, self.dropped = spec, dropped
        if spec is not None and len(self.columns) != 1 + spec.slots:
            raise ValueError(
                f"the layout's tuples have {len(self.columns)} values, the spec's {1 + spec.slots}"
            )
        noop = (0,) * len(self.columns) if spec is None else spec.noop
        self._noop = torch.tensor(noop, dtype=torch.int64)
        self._sizes: list[int] | None = None if spec is None else spec.nvec.tolist()
        self._reader: cpu.Reader | None = None
        if spec is not None and self.count.dtype.kind in "iu":
            row_bytes, said, columns, room = self.list_view()
            self._reader = cpu.Reader(row_bytes, room, said, columns, spec.limits)
        self._enter()

    def _enter(self) -> None:
        self.handle = next(_NUMBERS)
        """Where the operators of a compiled graph, which take no objects, find this layout.

        Layouts that read alike share one, so that their policies share a graph; one that counts
        what it drops has its own."""
        if self.dropped is None:
            self.handle = _HANDLES.setdefault((self, self.spec), self.handle)
        _LAYOUTS.setdefault(self.handle, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of one from another process, too."""
        self.__dict__.update(state)
        self._enter()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LegalLayout):
            return NotImplemented
        return self._place() == other._place()

    def __hash__(self) -> int:
        return hash(self._place())

    def _place(self) -> tuple[Any, ...]:
        return self.dtype, self.count_name, self.action_names

    @classmethod
    def from_dtype(
        cls, dtype: npt.DTypeLike, count: str, actions: Names, spec: ActionSpec | None = None
    ) -> LegalLayout:
        """From the structured dtype of an observation, with whatever offsets and nesting it has.

        Args:
            dtype: of NumPy.
            count: name of the integer that says how many tuples are legal; dots reach into structs.
            actions: name of a (K, H) integer field, or H names of (K,) fields, primary first.
            spec: if given, :meth:`read` also checks each value against its role's range, and an
                empty row plays the spec's no-op.

        Raises:
            KeyError: no field of that name.
            TypeError: a field of another dtype than integers.
            ValueError: a field of another shape, or another number of values than the spec has.
        """
        return cls(dtype, count, actions, spec)

    @classmethod
    def from_env(
        cls, env: Any, count: str, actions: Names, spec: ActionSpec | None = None
    ) -> LegalLayout:
        """From an environment under PufferLib's emulation, found through ``.env``, ``.driver_env``.

        A native environment may offer the dtype of its struct as ``observation_dtype`` instead.
        Where no spec is given, it is the environment's ``action_spec``, if it has one.

        Raises:
            TypeError: no structured observation dtype anywhere.
        """
        for layer in env_layers(env):
            dtype = getattr(layer, "observation_dtype", None)
            if is_emulation(layer):
                dtype = layer.emulated["emulated_observation_dtype"]
            if isinstance(dtype, np.dtype) and dtype.names is not None:
                return cls(dtype, count, actions, spec or env_attribute(env, "action_spec"))
        raise TypeError(
            f"{type(env).__name__} has no structured observation: it is neither emulated from a "
            "Dict space nor has an observation_dtype; use LegalLayout.from_dtype(dtype, ...)"
        )

    def with_spec(self, spec: ActionSpec, dropped: Dropped | None = None) -> LegalLayout:
        """The same layout, reading for this spec.

        With ``dropped``, listed tuples outside the spec do not raise: it leaves them out, counts
        them and warns of them.
        """
        return LegalLayout(self.dtype, self.count_name, self.action_names, spec, dropped)

    def is_legal_list(self, field: Field) -> bool:
        """Whether a field of :meth:`fields` is the count or belongs to the legal tuples."""
        names = [self.action_names] if isinstance(self.action_names, str) else self.action_names
        return field.name in (self.count_name, *names)

    def _integers(self, name: str) -> Field:
        field = self.find(name)
        # Where all numbers share one dtype, the list may be stored as whole floats.
        if field.dtype.kind not in ("iu" if self.single is None else "iuf"):
            raise TypeError(f"field {name!r} must be integers, it is {field.dtype}")
        return field

    def _columns(self) -> list[Field]:
        if isinstance(self.action_names, str):
            field = self._integers(self.action_names)
            if len(field.shape) != 2:
                raise ValueError(
                    f"field {field.name!r} must be (K, H), it is {field.shape}; for a field a slot "
                    "pass their names as a tuple"
                )
            room, width = field.shape
            if not width:
                raise ValueError(
                    f"field {field.name!r} is {field.shape}: its tuples have no values"
                )
            step, between = field.strides
            column = replace(field, shape=(room,), strides=(step,))
            return [
                replace(column, name=f"{field.name}[:, {j}]", offset=field.offset + j * between)
                for j in range(width)
            ]
        columns = [self._integers(name) for name in self.action_names]
        if not columns:
            raise ValueError("actions names no field")
        first = columns[0]
        for column in columns:
            if len(column.shape) != 1 or column.shape != first.shape:
                raise ValueError(
                    f"the fields of a tuple must all be (K,): {first.name!r} is {first.shape}, "
                    f"{column.name!r} is {column.shape}"
                )
        return columns

    # ---- reading

    def read(self, observations: Tensor) -> LegalActions:
        """The legal lists of B observations, as listed (repeats included).

        Inside torch.compile this is one operator of the graph, whatever the number of tuples.

        Args:
            observations: (B, nbytes) uint8, or (B, numbers) of one dtype where all fields share
                one; whole floats are allowed for the list then.

        Raises:
            TypeError: observations of a dtype that the layout does not fit.
            ValueError: another number of columns, or a value that the layout's dtype does not hold
                exactly. Naming the row: a count outside 0..K; a value of the list that is not
                whole, negative, beyond int64, so large that its floating dtype may have rounded it,
                or (with a spec) outside its role's range. With ``dropped``: a list with nothing
                within the spec.
        """
        return self._read(observations, distinct=False)

    def read_distinct(self, observations: Tensor) -> LegalActions:
        """As :meth:`read`, each tuple once in a row: what a policy draws from."""
        return self._read(observations, distinct=True)

    def _read(self, observations: Tensor, distinct: bool) -> LegalActions:
        if torch.compiler.is_compiling():
            actions, counts, rows, starts, noop = _read_op(observations, self.handle, distinct)
            return LegalActions.trusted(
                actions, counts, noop, self._sizes, distinct=distinct, packing=(rows, starts)
            )
        data = self.as_bytes(observations)
        if distinct and self._reader and data.device.type == "cpu" and cpu.library():
            packed = self._reader(data)
            if packed is not None:  # else what is wrong is said, or dropped, below
                actions, counts, rows, starts = packed
                return LegalActions.trusted(
                    actions, counts, self._noop, self._sizes, True, (rows, starts)
                )
        actions, counts, rows, starts = self._read_list(data, observations.dtype)
        noop = self._noop.to(actions.device)
        if self.spec is None:
            legal = LegalActions(actions, counts, noop)  # checks that none is negative
        else:
            packing = rows, starts
            legal = LegalActions.trusted(actions, counts, noop, self._sizes, packing=packing)
            if self.dropped is not None:
                legal = self.dropped.drop(legal, self.spec)
            else:
                legal.validate(self.spec)  # says what is wrong
        return legal.distinct() if distinct else legal

    def _read_list(self, data: Tensor, given: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Actions, counts, rows, starts, of (B, nbytes) that were given as numbers of a dtype."""
        said = self.count.view(data).reshape(len(data)).clone()  # environments write there
        counts = _whole(said, self.count)
        if ((counts < 0) | (counts > self.padding)).any():
            raise self.overflow(counts.tolist())
        rows, starts = pack(counts)
        place = places(rows, starts)
        pieces = []
        for field, numbers in self._pieces:
            at = rows * data.shape[1] + place * field.strides[0]
            pieces.append(_whole(field.gather(data, at, numbers), field, rows))
        actions = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        self._check_exact(given, actions, counts, rows)
        return actions, counts, rows, starts

    def _numbers(self, actions: Tensor, counts: Tensor, rows: Tensor) -> Iterator[tuple[Any, ...]]:
        """(field, its values (n,), their rows (n,)): the count, then each value of a tuple."""
        yield self.count, counts, torch.arange(len(counts), device=counts.device)
        for j, field in enumerate(self.columns):
            yield field, actions[:, j], rows

    def overflow(self, counts: list[int]) -> ValueError:
        """Of counts as int64, one of which lies outside 0..K."""
        row, count = next((r, n) for r, n in enumerate(counts) if not 0 <= n <= self.padding)
        if self.count.dtype == np.uint64:
            count %= 2**64
        return ValueError(
            f"row {row}: {self.count_name} says {count} legal actions, outside "
            f"0..{self.padding}, the room of {self.action_names}"
        )

    def _check_exact(
        self, given: torch.dtype, actions: Tensor, counts: Tensor, rows: Tensor
    ) -> None:
        """Refuses numbers of the list that may be others, rounded or wrapped."""
        for j, field in enumerate(self.columns):
            if field.dtype == np.uint64 and (actions[:, j] < 0).any():
                at = int((actions[:, j] < 0).nonzero()[0, 0])
                raise ValueError(
                    f"row {int(rows[at])}: {field.name} holds {int(actions[at, j]) % 2**64}, "
                    f"beyond int64; values of a tuple are at most {2**63 - 1}"
                )
        kinds = () if self.single is None else (given, self.count.stored)
        floats = [kind for kind in kinds if kind.is_floating_point]
        if not floats:
            return
        coarsest = max(floats, key=lambda kind: torch.finfo(kind).eps)
        exact = int(2 / torch.finfo(coarsest).eps)
        for field, values, row_of in self._numbers(actions, counts, rows):
            for at in (values >= exact).nonzero()[:1, 0].tolist():
                raise ValueError(
                    f"row {int(row_of[at])}: {field.name} holds {int(values[at])}, which may be "
                    f"another number, rounded: {coarsest} counts exactly below {exact} only; pass "
                    "the list as integers, or as floats of more bits"
                )

    def field(self, observations: Tensor | Mapping[str, Tensor], name: str) -> Tensor:
        """Any field by its dotted name, such as ``"me.hp"``.

        Args:
            observations: as for :meth:`read`; or a mapping {name: (B, *shape)} of fields that were
                taken apart before, of which the named one is returned as it is.
            name: of :meth:`fields`.

        Returns:
            (B, *shape of the field), without gradient, of the field's own dtype, perhaps sharing
            memory with the observations; but uint16 as int32 and uint32 as int64, for which torch
            has operations. uint64 stays, as torch has no wider dtype: take its bits by
            ``.view(torch.int64)``, or ``.double()``.

        Raises:
            KeyError: no such field.
            TypeError: a struct, a dtype that torch does not have, or another byte order.
        """
        if isinstance(observations, Mapping):
            return observations[name]
        if torch.compiler.is_compiling():
            found: Tensor = _read_field(observations, self.handle, name)
            return found
        field = self.find(name)
        return field.view(self.as_bytes(observations)).to(field.torch_dtype)

    # ---- writing

    def write(
        self, observations: npt.NDArray[Any], lists: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        """Writes legal lists into observations, in place, and zeroes the room they leave.

        Args:
            observations: (B, nbytes) uint8, (B, numbers) of the one dtype, or (B,) of the
                structured dtype; C-contiguous rows.
            lists: B lists of tuples of H whole numbers.

        Raises:
            TypeError: observations of a dtype that the layout does not fit.
            ValueError: observations that are read-only or whose rows are not contiguous; a list
                longer than K, a tuple of another length, or a value that the field's dtype does not
                hold, naming the row. Nothing is written then.
        """
        records = self.records(observations)
        if not records.flags.writeable:
            raise ValueError(
                "observations are read-only, and write changes them in place: pass a writable "
                "array, such as observations.copy()"
            )
        if len(lists) != len(records):
            raise ValueError(f"{len(lists)} lists for {len(records)} observations")
        for row, actions in enumerate(lists):
            if len(actions) > self.padding:
                raise ValueError(
                    f"row {row}: {len(actions)} legal actions overflow the room for {self.padding} "
                    f"in {self.action_names}; give the field more room"
                )
        legal = LegalActions.from_lists(lists, slots=len(self.columns) - 1)
        for field, whole, rows in self._numbers(legal.actions, legal.counts, legal.rows):
            numbers = whole.numpy()
            with np.errstate(over="ignore", invalid="ignore"):
                wrong = numbers.astype(field.dtype).astype(np.int64) != numbers
            if field.dtype.kind == "f":
                wrong |= numbers >= 2 / np.finfo(field.dtype).eps  # read could not tell it
            for n in np.flatnonzero(wrong)[:1]:
                raise ValueError(
                    f"row {int(rows[n])}: {int(numbers[n])} does not fit {field.name}, which is "
                    f"{field.dtype}"
                )
        counts, columns = self.list_arrays(records)
        counts[...] = legal.counts.numpy()
        at = legal.rows.numpy(), places(legal.rows, legal.starts).numpy()
        for column, values in zip(columns, legal.actions.numpy().T, strict=True):
            column[...] = 0
            column[at] = values

    def list_view(self) -> ListView:
        """Where the list lies in the rows of :meth:`as_bytes`; a TypeError if it is of floats."""
        if self.count.dtype.kind == "f":  # as all are then
            raise TypeError(f"field {self.count.name!r} must be integers, it is {self.count.dtype}")
        columns = tuple(column.number for column in self.columns)
        return ListView(self.dtype.itemsize, self.count.number, columns, self.padding)

    def list_arrays(
        self, records: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], list[npt.NDArray[Any]]]:
        """Views of the list in (B,) records: counts (B,), and (B, K) a tuple value."""
        counts = resolve(records, self.count_name)
        counts = counts[:, 0] if counts.ndim > 1 else counts
        if isinstance(self.action_names, str):
            return counts, list(np.moveaxis(resolve(records, self.action_names), -1, 0))
        return counts, [resolve(records, name) for name in self.action_names]

    def __repr__(self) -> str:
        return (
            f"LegalLayout({self.dtype.itemsize} bytes, count={self.count_name!r}, "
            f"actions={self.action_names!r}, room for {self.padding})"
        )


def _whole(values: Tensor, field: Field, rows: Tensor | None = None) -> Tensor:
    """Integers from a field that may hold whole floats; ``rows`` as of each value."""
    if values.is_floating_point():
        broken = (values != values.floor()) | (values.abs() >= 2.0**63)
        if broken.any():
            at = int(broken.nonzero()[0, 0])
            row = at if rows is None else int(rows[at])
            raise ValueError(
                f"row {row}: {field.name} holds {values[at].item()}, which is not a whole number "
                "of 64 bits"
            )
    return values.to(torch.int64)


# ---- operators of compiled graphs

_NUMBERS = itertools.count()
_HANDLES: dict[tuple[LegalLayout, ActionSpec | None], int] = {}
_LAYOUTS: weakref.WeakValueDictionary[int, LegalLayout] = weakref.WeakValueDictionary()
"""By handle. Those that share theirs are kept for good, as keys of _HANDLES."""


@torch.library.custom_op(
    "tcg_flatpolicy::read",
    mutates_args=(),
    schema="(Tensor observations, int layout, bool distinct) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _read_op(
    observations: Tensor, layout: int, distinct: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(B, columns) -> actions (N, H), counts (B,), rows (N,), starts (B,), noop (H,), all int64."""
    of = _LAYOUTS[layout]
    legal = of.read_distinct(observations) if distinct else of.read(observations)
    # No memory that is also an input's or the spec's: an operator must not return it.
    return legal.actions, legal.counts.clone(), legal.rows, legal.starts, legal.noop.clone()


@_read_op.register_fake
def _(
    observations: Tensor, layout: int, distinct: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tuples = torch.library.get_ctx().new_dynamic_size()
    values = len(_LAYOUTS[layout].columns)
    whole = functools.partial(observations.new_empty, dtype=torch.int64)
    batch = observations.shape[0]
    return whole(tuples, values), whole(batch), whole(tuples), whole(batch), whole(values)


@torch.library.custom_op(
    "tcg_flatpolicy::read_field",
    mutates_args=(),
    schema="(Tensor observations, int layout, str name) -> Tensor",
)
def _read_field(observations: Tensor, layout: int, name: str) -> Tensor:
    """(B, columns) -> (B, *shape of the field), in memory of its own."""
    return _LAYOUTS[layout].field(observations, name).clone(memory_format=torch.contiguous_format)


@_read_field.register_fake
def _(observations: Tensor, layout: int, name: str) -> Tensor:
    field = _LAYOUTS[layout].find(name)
    shape = (observations.shape[0], *field.shape)
    return observations.new_empty(shape, dtype=field.torch_dtype)
