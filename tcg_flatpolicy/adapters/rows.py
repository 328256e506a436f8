"""What adapters share: action ids as tuples, and an observation and its list as a row of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.spec import ActionSpec

Tuple = tuple[int, ...]
ToTuple = Callable[[int], Sequence[int]]


class Ids:
    """The actions 0..n-1 of an environment as tuples of a spec, each another one.

    Args:
        n: number of actions.
        spec: what the tuples mean; one value of n, if left out.
        to_tuple: function of an id; the id alone, as a tuple of one value, if left out. It is
            called once for each id.

    Raises:
        ValueError: to_tuple without a spec, a tuple outside the spec, or two ids of one tuple; the
            ids are named.
    """

    def __init__(
        self, n: int, spec: ActionSpec | None = None, to_tuple: ToTuple | None = None
    ) -> None:
        if to_tuple is not None and spec is None:
            raise ValueError("to_tuple needs spec=...: what the tuples mean")
        self.spec = spec or ActionSpec.from_nvec([n])
        self.tuples: list[Tuple] = [
            tuple(map(int, to_tuple(i))) if to_tuple else (i,) for i in range(n)
        ]
        self.ids: dict[Tuple, int] = {}
        for number, action in enumerate(self.tuples):
            problem = self.spec.explain(action)
            if problem is not None:
                raise ValueError(
                    f"to_tuple({number}) is {action}, not a tuple of the spec: {problem}"
                )
            earlier = self.ids.setdefault(action, number)
            if earlier != number:
                raise ValueError(
                    f"to_tuple gives the actions {earlier} and {number} the same tuple {action}, "
                    "so one of them could never be played; let the tuples differ"
                )

    def of(self, action: Any) -> int:
        """The id of a tuple; a ValueError if none has it."""
        one = tuple(np.asarray(action).ravel().tolist())
        if one not in self.ids:
            raise ValueError(f"no action has the tuple {one}")
        return self.ids[one]

    def listed(self, mask: Any) -> list[Tuple]:
        """The tuples of a mask (n,), by their ids; another size raises a ValueError."""
        allowed = np.asarray(mask).ravel()
        if len(allowed) != len(self.tuples):
            raise ValueError(
                f"the mask has {len(allowed)} entries, and there are {len(self.tuples)} actions"
            )
        return [self.tuples[number] for number in np.flatnonzero(allowed)]


class Rows:
    """Observations of a space and their legal lists, as rows of bytes.

    The fields of a Dict have their names, any other observation is the field ``observation``;
    ``n_legal`` and ``legal`` are the list.

    Args:
        space: of the observation.
        spec: what tuples mean.
        room: most tuples that a list may have.

    Attributes:
        space: Box, uint8 (nbytes,).
        layout: the LegalLayout.
    """

    def __init__(self, space: spaces.Space[Any], spec: ActionSpec, room: int) -> None:
        self._named, self._room = isinstance(space, spaces.Dict), room
        self._sizes, self._values = spec.nvec, 1 + spec.slots
        fields = dtype_of(space if self._named else spaces.Dict({"observation": space}))
        value = np.min_scalar_type(max(int(spec.nvec.max()) - 1, 1))
        lists: list[Any] = [
            ("n_legal", np.min_scalar_type(room)),
            ("legal", value, (room, 1 + spec.slots)),
        ]
        if taken := {"n_legal", "legal"} & set(fields.names or ()):
            raise ValueError(f"the observation has a field named {sorted(taken)[0]!r}; rename it")
        # As bytes a field need not be aligned.
        own = [(name, fields[name]) for name in fields.names or ()]
        self.dtype = np.dtype([*own, *lists])
        self.layout = LegalLayout.from_dtype(self.dtype, "n_legal", "legal", spec=spec)
        self.space = spaces.Box(0, 255, (self.dtype.itemsize,), np.uint8)

    def row(self, observation: Any, legal: Iterable[Sequence[int]]) -> npt.NDArray[np.uint8]:
        """(nbytes,) uint8 of an observation and its list; a ValueError if the list has no room."""
        record = np.zeros(1, self.dtype)
        parts = observation if self._named else {"observation": observation}
        for name in self.dtype.names or ():
            if name not in ("n_legal", "legal"):
                _fill(record[name], parts[name])
        listed = np.array([*legal], np.int64).reshape(-1, self._values)
        if len(listed) > self._room:
            raise ValueError(
                f"{len(listed)} tuples are legal, and a list has room for {self._room}; take a "
                "larger max_legal"
            )
        if ((listed < 0) | (listed >= self._sizes)).any():
            raise ValueError(f"a listed tuple is outside the spec's sizes: {listed.tolist()}")
        record["legal"][0, : len(listed)] = listed
        record["n_legal"] = len(listed)
        return record.view(np.uint8)


def dtype_of(space: spaces.Space[Any]) -> np.dtype[Any]:
    """The dtype of a space's values; a TypeError for spaces without a fixed size."""
    if isinstance(space, spaces.Dict):
        return np.dtype([(name, dtype_of(one)) for name, one in space.spaces.items()])
    if isinstance(space, spaces.Tuple):
        return np.dtype([(f"f{place}", dtype_of(one)) for place, one in enumerate(space.spaces)])
    if isinstance(space, spaces.Discrete):
        return np.dtype(np.int64)
    if isinstance(space, (spaces.Box, spaces.MultiBinary, spaces.MultiDiscrete)):
        assert space.shape is not None
        return np.dtype((space.dtype, space.shape))
    raise TypeError(
        f"the observation space {space} has no fixed size; take Box, Discrete, or a Dict"
    )


def _fill(field: npt.NDArray[Any], value: Any) -> None:
    """Writes a value into a field (1, ...) of a record, part by part."""
    if field.dtype.names is None:
        field[0] = value
        return
    parts = value.values() if isinstance(value, dict) else value
    named = value if isinstance(value, dict) else dict(zip(field.dtype.names, parts, strict=True))
    for name in field.dtype.names:
        _fill(field[name], named[name])


def without_mask(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """An observation space without its ``action_mask``; of a Dict that leaves one, that one."""
    if not isinstance(space, spaces.Dict) or "action_mask" not in space.spaces:
        return space
    rest = {name: one for name, one in space.spaces.items() if name != "action_mask"}
    return rest["observation"] if set(rest) == {"observation"} else spaces.Dict(rest)


def split_mask(observation: Any, info: Any, space: gymnasium.Space[Any]) -> tuple[Any, Any]:
    """An observation of `without_mask`'s space, and the mask in it, or in ``info``, or None."""
    mask = info.get("action_mask") if isinstance(info, dict) else None
    if isinstance(observation, dict) and "action_mask" in observation:
        mask = observation["action_mask"]
        if not isinstance(space, spaces.Dict):
            observation = observation["observation"]
    return observation, mask
