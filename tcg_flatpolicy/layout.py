"""Where things sit in an observation: the legal list and every other field, by their names.

An engine's C struct, or PufferLib's emulation of a Dict space, reaches the policy as one flat row
of bytes (or of numbers, when all fields share a dtype). A NumPy structured dtype says where each
field is; NumPy itself resolves names, nesting, padding and alignment.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.spec import ActionSpec


@dataclass(frozen=True)
class Field:
    """A field of one dtype in an observation: its shape and byte strides, from byte ``offset``."""

    name: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many numbers the field holds."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype with the same bytes."""
        return _TORCH_DTYPES[self.dtype]


class LegalLayout:
    """Reads and writes the legal list, and reads any other field, of flat observations.

    Build one with :meth:`from_dtype` or :meth:`from_env`.
    """

    def __init__(
        self,
        dtype: np.dtype[Any],
        count: str,
        actions: str | Sequence[str],
        spec: ActionSpec | None = None,
    ) -> None:
        if np.dtype(dtype).names is None:
            raise TypeError(
                f"an observation needs a structured dtype with named fields, got {dtype}"
            )
        self.dtype = np.dtype(dtype)
        self.count_name = count
        self.action_names = actions if isinstance(actions, str) else tuple(actions)
        self.spec = spec
        self._sizes: list[int] | None = None if spec is None else spec.nvec.tolist()
        self._single = _single_dtype(self.dtype)
        self._fields: dict[str, Field] = {}
        self.count = self._integer_field(count)
        if self.count.shape not in ((), (1,)):
            raise ValueError(f"count field {count!r} must be one number, it has {self.count.shape}")
        self.columns = self._columns(actions)
        """One (K,) field a tuple value, primary first."""
        self.padding = self.columns[0].shape[0]
        """K: how many tuples the list has room for."""
        if spec is not None and len(self.columns) != 1 + spec.slots:
            raise ValueError(
                f"the layout's tuples have {len(self.columns)} values, the spec's {1 + spec.slots}"
            )
        self._together = self._tuples_lie_together()
        self._even = self._lies_even()
        self._largest = None if spec is None else self._largest_values(spec)
        self._declared = None if spec is None else spec.limits[:, 0] > 0
        noop = (0,) * len(self.columns) if spec is None else spec.noop
        self._noop = torch.as_tensor(noop, dtype=torch.int64)
        self._enter()

    def _enter(self) -> None:
        """Where the operators of a compiled graph, which take no objects, find this layout.

        Equal ones share a place, so that their policies share a graph.
        """
        names = self.count_name, self.action_names
        primaries = self.spec and [(repr(self.spec.primaries), *self.spec.noop.tolist())]
        key = repr((self.dtype, names, primaries))
        self._handle = _HANDLES.setdefault(key, len(_LAYOUTS))
        if self._handle == len(_LAYOUTS):
            _LAYOUTS.append(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of one from another process, too."""
        self.__dict__.update(state)
        self._enter()

    @classmethod
    def from_dtype(
        cls,
        dtype: npt.DTypeLike,
        count: str,
        actions: str | Sequence[str],
        spec: ActionSpec | None = None,
    ) -> LegalLayout:
        """From the structured dtype of an observation.

        Args:
            dtype: NumPy structured dtype with whatever offsets, padding and nesting the engine has.
            count: name of the integer that says how many tuples are legal; dots reach into nested
                structs.
            actions: name of a (K, H) integer field, or H names of (K,) fields, primary first.
            spec: when given, :meth:`read` also checks each value against its role's range, and an
                empty row plays the spec's no-op.

        Raises:
            KeyError: no field of that name.
            TypeError: a field of another dtype than integers.
            ValueError: a field of another shape, or another number of values than the spec has.
        """
        return cls(np.dtype(dtype), count, actions, spec)

    @classmethod
    def from_env(
        cls,
        env: Any,
        count: str,
        actions: str | Sequence[str],
        spec: ActionSpec | None = None,
    ) -> LegalLayout:
        """From an environment under PufferLib's emulation.

        It is looked for through ``.env`` and ``.driver_env``. A native environment may offer the
        dtype of its struct as ``observation_dtype`` instead. The spec is the environment's
        ``action_spec`` where it has one and none is given.

        Raises:
            TypeError: no structured observation dtype anywhere.
        """
        for layer in env_layers(env):
            emulated = getattr(layer, "emulated", None)
            dtype = getattr(layer, "observation_dtype", None)
            if isinstance(emulated, dict):
                dtype = emulated["emulated_observation_dtype"]
            if isinstance(dtype, np.dtype) and dtype.names is not None:
                return cls(dtype, count, actions, spec or env_attribute(env, "action_spec"))
        raise TypeError(
            f"{type(env).__name__} has no structured observation: it is neither emulated from a "
            "Dict space nor has an observation_dtype; use LegalLayout.from_dtype(dtype, ...)"
        )

    def with_spec(self, spec: ActionSpec) -> LegalLayout:
        """The same layout, reading for this spec."""
        return LegalLayout(self.dtype, self.count_name, self.action_names, spec)

    def read(self, observations: Tensor) -> LegalActions:
        """The legal lists of a batch of observations.

        Args:
            observations: (B, nbytes) uint8, or (B, numbers) of one dtype where all fields share
                one; whole floats are allowed for the list then.

        Returns:
            LegalActions of B rows, as listed (repeats included).

        Raises:
            TypeError: observations of a dtype that the layout does not fit.
            ValueError: another number of columns; a count outside 0..K, a value that is not whole,
                negative, or (with a spec) outside its role's range, naming the row.
        """
        data = self._bytes(observations)
        if self._even and data.device.type == "cpu" and len(data):
            return self._read_by_numpy(data)
        said = _view(data, self.count).reshape(len(data)).clone()  # environments write over it
        counts = self._whole(said, self.count_name)
        outside = (counts < 0) | (counts > self.padding)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise self._overflow(row, int(counts[row]))
        n = int(counts.sum())
        rows = torch.repeat_interleave(counts, output_size=n)
        starts = counts.cumsum(0) - counts
        begins = torch.arange(len(data), device=data.device) * data.shape[1]

        def read(field: Field, numbers: int) -> Tensor:
            """(n, numbers) of each tuple, from the field on."""
            # Tuple i of the batch is tuple i - starts[row] of its row, a step further for each.
            step = field.strides[0]
            at = (begins - starts * step).index_select(0, rows)
            at += torch.arange(0, n * step, step, device=data.device)
            return self._whole(_gather(data, field, at, numbers), field.name, rows)

        if self._together:
            actions = read(self.columns[0], len(self.columns))
        else:
            actions = torch.cat([read(field, 1) for field in self.columns], dim=1)
        noop = self._noop.to(data.device)
        legal = LegalActions.trusted(actions, counts, noop, self._sizes, packing=(rows, starts))
        if self.spec is None:
            legal._check_not_negative()
        else:
            legal.validate(self.spec)
        return legal

    def _read_by_numpy(self, data: Tensor) -> LegalActions:
        """As :meth:`read`, on a CPU: in small batches it is torch's calls that cost."""
        raw = data.numpy()
        batch, nbytes = raw.shape
        strides = (nbytes, *self.count.strides)
        where = np.ndarray(
            (batch, *self.count.shape), self.count.dtype, raw, self.count.offset, strides
        )
        counts = where.reshape(batch).astype(np.int64)
        if counts.min() < 0 or counts.max() > self.padding:
            row = int(((counts < 0) | (counts > self.padding)).argmax())
            raise self._overflow(row, int(counts[row]))
        starts = counts.cumsum() - counts
        rows = np.repeat(np.arange(batch), counts)

        first = self.columns[0]
        size = first.dtype.itemsize
        numbers = raw.reshape(-1).view(first.dtype)
        step, row_step = first.strides[0] // size, nbytes // size
        at = np.repeat(np.arange(0, batch * row_step, row_step) - starts * step, counts)
        at += np.arange(0, len(rows) * step, step)
        # The counts are checked, so that nothing wraps: it is the quickest of take's modes.
        columns = [numbers[field.offset // size :].take(at, mode="wrap") for field in self.columns]
        actions = np.empty((len(rows), len(columns)), np.int64)
        for j, column in enumerate(columns):
            actions[:, j] = column
        legal = LegalActions.trusted(
            torch.from_numpy(actions),
            torch.from_numpy(counts),
            self._noop,
            self._sizes,
            packing=(torch.from_numpy(rows), torch.from_numpy(starts)),
        )
        if self.spec is None:
            legal._check_not_negative()
        elif not self._within_spec(columns):
            legal.validate(self.spec)  # says what is wrong
        return legal

    def _lies_even(self) -> bool:
        """Whether the list is integers of one dtype, each column alike and none at an odd place."""
        first, steps = self.columns[0], [self.dtype.itemsize, *self.columns[0].strides]
        return (
            self.count.dtype.kind in "iu"
            and first.dtype.kind in "iu"
            and all((c.dtype, c.strides) == (first.dtype, first.strides) for c in self.columns)
            and _divides(first.dtype.itemsize, *steps, *(c.offset for c in self.columns))
        )

    def _largest_values(self, spec: ActionSpec) -> list[npt.NDArray[Any]]:
        """Of each column, in its dtype: the largest value that each primary allows.

        0 for ids that are not declared, which :meth:`_within_spec` refuses by their number.
        """
        most = np.iinfo(np.int64).max
        return [
            (limits - 1).clip(0, min(np.iinfo(column.dtype).max, most)).astype(column.dtype)
            for column, limits in zip(self.columns, spec.limits.T, strict=True)
            if column.dtype.kind in "iu"
        ]

    def _within_spec(self, columns: list[npt.NDArray[Any]]) -> bool:
        """Whether tuples, (N,) integers a column, are all within the spec."""
        assert self._largest is not None
        assert self._declared is not None
        if not len(columns[0]):
            return True
        primaries = columns[0].astype(np.intp)
        if primaries.min() < 0 or primaries.max() >= len(self._largest[0]):
            return False
        if not self._declared.take(primaries).all():
            return False
        signed = columns[0].dtype.kind == "i"
        return not any(
            (column > largest.take(primaries)).any() or (signed and column.min() < 0)
            for column, largest in zip(columns, self._largest, strict=True)
        )

    def _overflow(self, row: int, count: int) -> ValueError:
        return ValueError(
            f"row {row}: {self.count_name} says {count} legal actions, outside "
            f"0..{self.padding}, the room of {self.action_names}"
        )

    def read_distinct(self, observations: Tensor) -> LegalActions:
        """As :meth:`read`, each tuple once in a row: what a policy draws from.

        Inside torch.compile this is one operator of the graph, whatever the number of tuples.
        """
        if not torch.compiler.is_compiling():
            return self.read(observations).distinct()
        actions, counts, rows, starts, noop = _read_distinct(observations, self._handle)
        return LegalActions.trusted(
            actions, counts, noop, self._sizes, distinct=True, packing=(rows, starts)
        )

    def field(self, observations: Tensor | Mapping[str, Tensor], name: str) -> Tensor:
        """Any field by its dotted name.

        Args:
            observations: as for :meth:`read`; or a mapping {name: (B, *shape)} of fields that were
                taken apart before, of which the named one is returned as it is.
            name: such as ``"me.hp"``.

        Returns:
            (B, *shape of the field) in the field's own dtype, without gradient; it may share memory
            with the observations.

        Raises:
            KeyError: no such field.
            TypeError: a struct, or a dtype that torch does not have.
        """
        if isinstance(observations, Mapping):
            return observations[name]
        if torch.compiler.is_compiling():
            found: Tensor = _read_field(observations, self._handle, name)
            return found
        return _view(self._bytes(observations), self._find(name))

    def fields(self) -> Iterator[Field]:
        """Every number in the observation: all fields that are not structs, the list included."""
        yield from (self._find(name) for name in _leaf_names(self.dtype))

    def is_legal_list(self, field: Field) -> bool:
        """Whether a field of :meth:`fields` is the count or belongs to the legal tuples."""
        actions = (self.action_names,) if isinstance(self.action_names, str) else self.action_names
        return field.name in (self.count_name, *actions)

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
            ValueError: a list longer than K, a tuple of another length, or a value that the field's
                dtype does not hold, naming the row. Nothing is written then.
        """
        records = self._records(observations)
        if len(lists) != len(records):
            raise ValueError(f"{len(lists)} lists for {len(records)} observations")
        for row, actions in enumerate(lists):
            if len(actions) > self.padding:
                raise ValueError(
                    f"row {row}: {len(actions)} legal actions overflow the room for {self.padding} "
                    f"in {self.action_names}; give the field more room"
                )
        legal = LegalActions.from_lists(lists, slots=len(self.columns) - 1)
        values, rows = legal.actions.numpy(), legal.rows.numpy()
        places = np.arange(len(rows)) - legal.starts.numpy()[rows]
        counts = legal.counts.numpy()
        for name, dtype, numbers, at in [
            (self.count_name, self.count.dtype, counts, np.arange(len(counts))),
            *((f.name, f.dtype, values[:, j], rows) for j, f in enumerate(self.columns)),
        ]:
            with np.errstate(over="ignore", invalid="ignore"):
                wrong = np.flatnonzero(numbers.astype(dtype).astype(np.int64) != numbers)
            if len(wrong):
                raise ValueError(
                    f"row {int(at[wrong[0]])}: {int(numbers[wrong[0]])} does not fit {name}, "
                    f"which is {dtype}"
                )
        target = _resolve(records, self.count_name)
        target[...] = counts.reshape(target.shape)
        for j, column in enumerate(self._action_views(records)):
            column[...] = 0
            column[rows, places] = values[:, j]

    def _records(self, observations: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if not isinstance(observations, np.ndarray):
            raise TypeError(f"write takes a NumPy array, got {type(observations).__name__}")
        if observations.dtype == self.dtype and observations.ndim == 1:
            return observations
        if observations.ndim != 2 or (
            observations.dtype != np.uint8 and observations.dtype != self._single
        ):
            raise TypeError(
                f"observations must be (B, {self.dtype.itemsize}) uint8 or (B,) records, "
                f"got {observations.shape} {observations.dtype}"
            )
        if observations.shape[1] * observations.itemsize != self.dtype.itemsize:
            raise ValueError(
                f"an observation has {observations.shape[1] * observations.itemsize} bytes, the "
                f"layout {self.dtype.itemsize}"
            )
        if not len(observations):
            return np.empty(0, self.dtype)
        return observations.view(self.dtype)[:, 0]

    def _action_views(self, records: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        if isinstance(self.action_names, str):
            view = _resolve(records, self.action_names)
            return [view[..., j] for j in range(view.shape[-1])]
        return [_resolve(records, name) for name in self.action_names]

    def _bytes(self, observations: Tensor) -> Tensor:
        """(B, nbytes) uint8, contiguous, of observations in any of the forms that read takes."""
        size = self.dtype.itemsize
        if not isinstance(observations, Tensor):
            raise TypeError(
                f"observations must be a tensor, got {type(observations).__name__}; "
                "torch.as_tensor(observations) shares an array's memory"
            )
        if observations.ndim != 2:
            raise ValueError(f"observations must be (B, columns), got {tuple(observations.shape)}")
        columns, dtype = observations.shape[1], observations.dtype
        if dtype == torch.uint8 and columns == size:
            return _as_bytes(observations)
        if self._single is None or columns * self._single.itemsize != size:
            # PufferLib emulates a Discrete as int32 and may call the whole int64 all the same, so
            # here the bytes count, not the dtype.
            if columns * observations.itemsize == size:
                return _as_bytes(observations)
            if self._single is None and dtype != torch.uint8:
                raise TypeError(
                    f"observations are {dtype}, but fields of several dtypes are read from bytes: "
                    f"pass (B, {size}) uint8"
                )
            if self._single is None:
                raise ValueError(f"observations have {columns} bytes, the layout {size}")
            numbers = size // self._single.itemsize
            raise ValueError(f"observations have {columns} columns, the layout {numbers}")
        wanted = _TORCH_DTYPES[self._single]
        if observations.dtype != wanted:
            cast = observations.to(wanted)
            changed = cast.to(dtype) != observations
            changed |= _negative(cast) != _negative(observations)  # -1 and 255 are the same byte
            if cast.is_floating_point() and observations.is_floating_point():
                changed = cast.isinf() & observations.isfinite()  # else only less exact
            if changed.any():
                row, column = changed.nonzero()[0].tolist()
                raise ValueError(
                    f"row {row}, column {column}: {observations[row, column].item()} is no "
                    f"{self._single}, the dtype of this layout"
                )
            observations = cast
        return _as_bytes(observations)

    def _whole(self, values: Tensor, name: str, rows: Tensor | None = None) -> Tensor:
        """Integers from a field that may hold whole floats; ``rows`` as of each value."""
        if values.is_floating_point():
            broken = (values != values.floor()) | values.isinf()
            if broken.any():
                at = int(broken.nonzero()[0, 0])
                row = at if rows is None else int(rows[at])
                raise ValueError(
                    f"row {row}: {name} holds {values[at].item()}, which is not a whole number"
                )
        return values.to(torch.int64)

    def _find(self, name: str) -> Field:
        if name not in self._fields:
            self._fields[name] = self._look_up(name)
        return self._fields[name]

    def _look_up(self, name: str) -> Field:
        record = np.zeros(1, self.dtype)
        view = _resolve(record, name)
        if view.dtype.names is not None:
            raise TypeError(f"{name!r} is a struct; name one of its fields: {view.dtype.names}")
        if view.dtype not in _TORCH_DTYPES:
            raise TypeError(f"field {name!r} is {view.dtype}, which torch does not have")
        offset = view.__array_interface__["data"][0] - record.__array_interface__["data"][0]
        return Field(name, view.dtype, offset, view.shape[1:], view.strides[1:])

    def _integer_field(self, name: str) -> Field:
        field = self._find(name)
        if field.dtype.kind in "iu":
            return field
        if field.dtype.kind == "f" and self._single is not None:
            return field  # one dtype for all: the list is stored as whole floats
        raise TypeError(f"field {name!r} must be integers, it is {field.dtype}")

    def _columns(self, actions: str | Sequence[str]) -> list[Field]:
        if isinstance(actions, str):
            field = self._integer_field(actions)
            if len(field.shape) != 2:
                raise ValueError(
                    f"field {actions!r} must be (K, H), it is {field.shape}; for a field a slot "
                    "pass their names as a tuple"
                )
            return [
                Field(
                    f"{actions}[:, {j}]",
                    field.dtype,
                    field.offset + j * field.strides[1],
                    field.shape[:1],
                    field.strides[:1],
                )
                for j in range(field.shape[1])
            ]
        columns = [self._integer_field(name) for name in actions]
        if not columns:
            raise ValueError("actions names no field")
        for column in columns:
            if len(column.shape) != 1 or column.shape != columns[0].shape:
                raise ValueError(
                    f"the fields of a tuple must all be (K,): {columns[0].name!r} is "
                    f"{columns[0].shape}, {column.name!r} is {column.shape}"
                )
        return columns

    def _tuples_lie_together(self) -> bool:
        """Whether the integers of a tuple follow one another, so that it is read in one piece."""
        first = self.columns[0]
        return first.dtype.kind in "iu" and all(
            column.dtype == first.dtype
            and column.offset == first.offset + j * first.dtype.itemsize
            and column.strides == first.strides
            for j, column in enumerate(self.columns)
        )

    def __repr__(self) -> str:
        return (
            f"LegalLayout({self.dtype.itemsize} bytes, count={self.count_name!r}, "
            f"actions={self.action_names!r}, room for {self.padding})"
        )


_LAYOUTS: list[LegalLayout] = []
_HANDLES: dict[str, int] = {}


@torch.library.custom_op(
    "tcg_flatpolicy::read_distinct",
    mutates_args=(),
    schema="(Tensor observations, int layout) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _read_distinct(
    observations: Tensor, layout: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(B, columns) -> actions (N, H), counts (B,), rows (N,), starts (B,), noop (H,), all int64."""
    legal = _LAYOUTS[layout].read(observations).distinct()
    # No memory that is also an input's or the spec's: an operator must not return it.
    return legal.actions, legal.counts.clone(), legal.rows, legal.starts, legal.noop.clone()


@_read_distinct.register_fake
def _(observations: Tensor, layout: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    field = _LAYOUTS[layout]._find(name)
    shape = (observations.shape[0], *field.shape)
    return observations.new_empty(shape, dtype=field.torch_dtype)


def env_layers(env: Any) -> Iterator[Any]:
    """An environment and what it wraps, through ``.driver_env`` and ``.env``, outermost first."""
    seen: set[int] = set()
    while env is not None and id(env) not in seen:
        seen.add(id(env))
        yield env
        # A native PufferEnv is its own driver_env.
        inner = [getattr(env, name, None) for name in ("driver_env", "env")]
        env = next((one for one in inner if one is not None and id(one) not in seen), None)


def env_attribute(env: Any, name: str) -> Any:
    """The first layer's attribute of that name that is not None, or None."""
    for layer in env_layers(env):
        value = getattr(layer, name, None)
        if value is not None:
            return value
    return None


_NAMES = ["bool", "float16", "float32", "float64"]
_NAMES += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
_TORCH_DTYPES: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(name): getattr(torch, name) for name in _NAMES
}


_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Signed integers by bytes."""


def _resolve(records: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """The view of a dotted name; a name that itself has dots in it goes first."""
    names = records.dtype.names
    if names is None:
        raise KeyError(f"no field {name!r}: {records.dtype} has no fields")
    if name in names:
        return records[name]
    for end in reversed([place for place, letter in enumerate(name) if letter == "."]):
        if name[:end] in names:
            return _resolve(records[name[:end]], name[end + 1 :])
    raise KeyError(f"no field {name!r}; there are {', '.join(names)}")


def _single_dtype(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype of all numbers of a struct, if they share one and fill it without a gap."""
    leaves = [_resolve(np.zeros(1, dtype), name) for name in _leaf_names(dtype)]
    kinds = {leaf.dtype for leaf in leaves}
    if len(kinds) == 1 and sum(leaf.nbytes for leaf in leaves) == dtype.itemsize:
        return kinds.pop()
    return None


def _leaf_names(dtype: np.dtype[Any], prefix: str = "") -> Iterator[str]:
    for name in dtype.names or ():
        inner = dtype[name].base
        if inner.names is None:
            yield prefix + name
        else:
            yield from _leaf_names(inner, f"{prefix}{name}.")


def _negative(numbers: Tensor) -> Tensor:
    if numbers.dtype.is_signed:
        return numbers < 0
    return torch.zeros_like(numbers, dtype=torch.bool)  # torch compares not all unsigned integers


def _as_bytes(observations: Tensor) -> Tensor:
    """(B, columns) of any dtype as (B, nbytes) uint8."""
    if not observations.is_contiguous() or observations.stride(-1) != 1:  # one column may have 0
        observations = observations.clone(memory_format=torch.contiguous_format)
    return observations.view(torch.uint8)


def _view(data: Tensor, field: Field) -> Tensor:
    """(B, *shape) of a field in (B, nbytes) uint8, without a copy where alignment allows it."""
    size = field.dtype.itemsize
    steps = (data.shape[1], *field.strides)
    shape = (len(data), *field.shape)
    if _aligned(data, field):
        typed = data.view(-1).view(field.torch_dtype)
        start = typed.storage_offset() + field.offset // size
        return typed.as_strided(shape, [step // size for step in steps], start)
    loose = data.as_strided((*shape, size), (*steps, 1), data.storage_offset() + field.offset)
    # Not contiguous(): that keeps the odd address of what is contiguous already.
    copy = loose.clone(memory_format=torch.contiguous_format)
    return copy.view(field.torch_dtype).squeeze(-1)


def _gather(data: Tensor, field: Field, at: Tensor, numbers: int) -> Tensor:
    """(len(at), numbers) that follow one another, from each byte ``at`` behind the field's offset.

    Each ``at`` is a multiple of whatever the row's bytes and the field's strides are multiples of.
    """
    size = field.dtype.itemsize * numbers
    flat = data.view(-1)
    steps = (data.storage_offset(), data.shape[1], field.offset, *field.strides)
    if size in _SIGNED and _divides(size, *steps):
        # torch indexes signed integers of every size, but not all unsigned and floating ones.
        shift = size.bit_length() - 1  # quicker than to divide
        words = flat.view(_SIGNED[size]).index_select(0, (at + field.offset) >> shift)
    else:
        windows = flat.as_strided((max(flat.numel() - size + 1, 0), size), (1, 1))
        words = windows.index_select(0, at + field.offset)
    return words.view(field.torch_dtype).view(len(at), numbers)


def _aligned(data: Tensor, field: Field) -> bool:
    return _divides(
        field.dtype.itemsize, data.storage_offset(), data.shape[1], field.offset, *field.strides
    )


def _divides(size: int, *steps: int | torch.SymInt) -> bool:
    return all(step % size == 0 for step in steps)
