"""One way to play any kind of environment, and to read the lists that it shows.

An audit sees every environment as B rows, one for each agent: `adapt` picks the adapter for a
native PufferEnv, PufferLib's emulation, a PufferLib vector environment (Serial, Multiprocessing), a
gymnasium.Env or a PettingZoo environment (parallel or AEC; known by what they offer, so PettingZoo
need not be installed).

What only the engine knows, an environment may offer through four optional names, on itself or on
what it wraps (``.env``, ``.driver_env``); each enables the checks that need it:

=====================================  ==========================================================
``to_move(row) -> bool``               whether that row is the one to move (`KnowsWhoMoves`)
``is_legal(row, action) -> bool``      whether the engine would take the tuple (`KnowsLegality`)
``fork() -> environment``              an independent copy that can be stepped (`Forks`)
``illegal_actions: int``               how many illegal actions it was sent (`CountsIllegal`)
=====================================  ==========================================================

``row`` is the number of the agent in that environment, from 0 (so 0 for a gymnasium.Env); where the
layer that has the method has ``possible_agents``, as PettingZoo's environments do (also under
PufferLib's emulation), it is the agent's name. In an environment of one agent the row may be left
out: ``to_move()``, ``is_legal(action)``. ``action`` is a tuple of 1 + slots ints. Of a Serial
vector environment each part is asked about its own rows, from 0 again; the parts of a
Multiprocessing one are in other processes and cannot be asked. Nobody is asked about a row whose
episode is over.
"""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import gymnasium
import numpy as np
import numpy.typing as npt
import torch

from tcg_flatpolicy.fields import resolve
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.meaning import layout_of
from tcg_flatpolicy.spec import ActionSpec, IntArray
from tcg_flatpolicy.wrapping import env_layers, is_emulation, layer_with, steps_emulated

BoolArray: TypeAlias = npt.NDArray[np.bool_]
Row: TypeAlias = int | str
"""What names a row to the engine: a number, or an agent's name under PettingZoo."""
LegalCallable: TypeAlias = Callable[[Any, Any], Sequence[Sequence[int]]]
"""``legal_actions(observation, info)``: one agent's legal tuples."""
HeadMasks: TypeAlias = Callable[[Any, Any], Sequence[Any]] | Sequence[str]
"""``head_masks(observation, info)``: one bool array a head, of one agent; or fields' names."""


class KnowsWhoMoves(Protocol):
    """An environment that says who is to move; ``to_move()`` will do where there is one agent."""

    def to_move(self, row: Any) -> bool:
        """Whether the row is to move now."""


class KnowsLegality(Protocol):
    """An environment that says what its engine would take.

    ``is_legal(action)`` will do where there is one agent.
    """

    def is_legal(self, row: Any, action: tuple[int, ...]) -> bool:
        """Whether the row may play the tuple now. Must not depend on the list that is shown."""


class Forks(Protocol):
    """An environment that can be copied as it stands."""

    def fork(self) -> Any:
        """An independent copy of the environment; stepping it must not change this one."""


class CountsIllegal(Protocol):
    """An environment that replaces illegal actions, and counts them."""

    illegal_actions: int
    """How many illegal actions were sent so far."""


class WorkerDied(RuntimeError):
    """A process of a vector environment has ended, so that waiting for it would never end."""


@dataclass
class Shown:
    """What an environment shows at one time.

    Attributes:
        observations: (B, columns) array, or a list of B observations, None for absent agents. May
            be the environment's own memory: it is valid until the next step only.
        infos: of each row; empty where the environment gives none by row.
        live: (B,) bool: rows whose observation is of a running episode.
        fresh: whether this follows a `reset` of the whole environment.
        illegal: illegal actions that the step's infos count, for environments that cannot be asked.
        ended: (B,) bool: live rows whose last step ended an episode. A native environment may show
            the end of that one or the beginning of the next; None where that cannot be.
    """

    observations: Any
    infos: list[Any]
    live: BoolArray
    fresh: bool = False
    illegal: int = 0
    ended: BoolArray | None = None


class Adapter(ABC):
    """An environment as B rows.

    Attributes:
        env: the environment.
        rows: how the engine calls each of the B rows.
        parts: the environments that can be asked about their rows, and the number of the first row
            of each.
        single_agent: whether its one agent has to act in every state.
    """

    def __init__(self, env: Any, rows: Sequence[Row], single_agent: bool = False) -> None:
        self.env = env
        self.rows = list(rows)
        self.parts: list[tuple[int, Any]] = [(0, env)]
        self.single_agent = single_agent

    def __len__(self) -> int:
        return len(self.rows)

    @abstractmethod
    def reset(self, seed: int | None) -> Shown:
        """Starts anew; None goes on with the environment's own generator."""

    @abstractmethod
    def step(self, actions: npt.NDArray[Any]) -> Shown:
        """Plays (B, 1 + slots) numbers, or starts the next episode where all are over.

        The end of an episode is shown as well, of rows that are not live: what stands in a list
        that is not cleared may come from there.
        """

    def selected(self) -> BoolArray | None:
        """(B,) bool: who is to move, where the kind of environment itself says so."""
        return None

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def name(self, row: int) -> str:
        """A row in words."""
        return f"row {row}" if isinstance(self.rows[row], int) else f"agent {self.rows[row]!r}"


class PufferAdapter(Adapter):
    """A native PufferEnv, or one environment under PufferLib's emulation; read from its buffers."""

    def __init__(self, env: Any) -> None:
        super().__init__(env, range(env.num_agents), single_agent=_wraps_single_agent(env))
        self._emulated = steps_emulated(env)

    def reset(self, seed: int | None) -> Shown:
        """As `Adapter.reset`."""
        infos = self.env.reset(seed=seed)[1]
        return self._shown(infos, fresh=True)

    def step(self, actions: npt.NDArray[Any]) -> Shown:
        """As `Adapter.step`."""
        if self._emulated and self.env.done:
            return self.reset(None)
        return self._shown(self.env.step(_sent(actions, self.env.single_action_space))[4])

    def _shown(self, infos: Any, fresh: bool = False) -> Shown:
        live = np.array(getattr(self.env, "masks", np.ones(len(self))), dtype=bool)
        ended = np.asarray(self.env.terminals, bool) | np.asarray(self.env.truncations, bool)
        if self._emulated:
            live &= ~ended
        ended &= live & (not fresh)  # a native reset may leave them as they were
        illegal = _illegal_in(infos)
        return Shown(self.env.observations, [{}] * len(self), live, fresh, illegal, ended)


class VectorAdapter(Adapter):
    """A PufferLib vector environment: Serial, or Multiprocessing with all workers in each batch."""

    def __init__(self, env: Any) -> None:
        if env.agents_per_batch != env.num_agents:
            raise ValueError(
                f"{type(env).__name__} hands out {env.agents_per_batch} of its {env.num_agents} "
                "agents at a time; audit it with batch_size=num_envs"
            )
        super().__init__(env, range(env.num_agents), single_agent=_wraps_single_agent(env))
        self._emulated = steps_emulated(env)
        self.parts = []
        if hasattr(env, "envs"):  # Serial; the driver of a Multiprocessing one is never stepped
            sizes = [part.num_agents for part in env.envs]
            starts = np.cumsum([0, *sizes[:-1]]).tolist()
            self.parts = list(zip(starts, env.envs, strict=True))

    def reset(self, seed: int | None) -> Shown:
        """As `Adapter.reset`."""
        self.env.async_reset(0 if seed is None else seed)
        return self._receive(fresh=True)

    def step(self, actions: npt.NDArray[Any]) -> Shown:
        """As `Adapter.step`."""
        self.env.send(_sent(actions, self.env.single_action_space))
        return self._receive()

    def _receive(self, fresh: bool = False) -> Shown:
        processes = getattr(self.env, "processes", None)
        while processes and (self.env.buf["semaphores"] < _WORKING).any():
            if not all(process.is_alive() for process in processes):
                raise WorkerDied(
                    "a worker of the vector environment has ended; what it raised is on its "
                    "standard error, and audit_env names it under the Serial backend"
                )
            time.sleep(1e-4)
        received = self.env.recv()
        observations, _, terminals, truncations, *_, infos, _, masks = received
        live = np.array(masks, dtype=bool)
        ended = np.asarray(terminals, bool) | np.asarray(truncations, bool)
        if self._emulated:
            live &= ~ended
        ended &= live & (not fresh)
        return Shown(observations, [{}] * len(self), live, fresh, _illegal_in(infos), ended)


_WORKING = 5
"""Semaphores of PufferLib's workers from this number on say that the worker has answered."""


class GymnasiumAdapter(Adapter):
    """A gymnasium.Env: one row."""

    def __init__(self, env: Any) -> None:
        super().__init__(env, [0], single_agent=True)
        self._over = False

    def reset(self, seed: int | None) -> Shown:
        """As `Adapter.reset`."""
        observation, info = self.env.reset(seed=seed)
        self._over = False
        return Shown([observation], [info], np.ones(1, dtype=bool), fresh=True)

    def step(self, actions: npt.NDArray[Any]) -> Shown:
        """As `Adapter.step`."""
        if self._over:
            return self.reset(None)
        action = _sent(actions, self.env.action_space)[0]
        observation, _, terminated, truncated, info = self.env.step(action)
        self._over = bool(terminated or truncated)
        return Shown([observation], [info], np.array([not self._over]))


class ParallelAdapter(Adapter):
    """A PettingZoo ParallelEnv: one row for each possible agent."""

    def __init__(self, env: Any) -> None:
        super().__init__(env, list(env.possible_agents))

    def reset(self, seed: int | None) -> Shown:
        """As `Adapter.reset`."""
        observations, infos = self.env.reset(seed=seed)
        return self._shown(observations, infos, self.rows, fresh=True)

    def step(self, actions: npt.NDArray[Any]) -> Shown:
        """As `Adapter.step`."""
        if not self.env.agents:
            return self.reset(None)
        sent = {
            agent: _sent(actions[row : row + 1], self.env.action_space(agent))[0]
            for row, agent in enumerate(self.rows)
            if agent in self.env.agents
        }
        observations, _, terminated, truncated, infos = self.env.step(sent)
        running = [a for a in observations if not (terminated.get(a) or truncated.get(a))]
        return self._shown(observations, infos, running)

    def _shown(
        self,
        observations: Mapping[Any, Any],
        infos: Any,
        running: Sequence[Any],
        fresh: bool = False,
    ) -> Shown:
        live = np.array([agent in observations and agent in running for agent in self.rows])
        return Shown(
            [observations.get(agent) for agent in self.rows],
            [infos.get(agent, {}) for agent in self.rows],
            live,
            fresh,
        )


class AECAdapter(Adapter):
    """A PettingZoo AECEnv: one row for each possible agent; only the selected one plays."""

    def __init__(self, env: Any) -> None:
        super().__init__(env, list(env.possible_agents))

    def reset(self, seed: int | None) -> Shown:
        """As `Adapter.reset`."""
        self.env.reset(seed=seed)
        return self._shown(fresh=True)

    def step(self, actions: npt.NDArray[Any]) -> Shown:
        """As `Adapter.step`."""
        self._take_out_finished()
        if not self.env.agents:
            return self.reset(None)
        agent = self.env.agent_selection
        row = self.rows.index(agent)
        self.env.step(_sent(actions[row : row + 1], self.env.action_space(agent))[0])
        if not all(map(self._is_over, self.env.agents)):
            self._take_out_finished()
        return self._shown()

    def _take_out_finished(self) -> None:
        while self.env.agents and self._is_over(self.env.agent_selection):
            self.env.step(None)  # PettingZoo's way to take a finished agent out

    def selected(self) -> BoolArray | None:
        """As `Adapter.selected`."""
        return np.array([agent == self.env.agent_selection for agent in self.rows])

    def _is_over(self, agent: Any) -> bool:
        env = self.env
        return bool(env.terminations.get(agent, True) or env.truncations.get(agent, True))

    def _shown(self, fresh: bool = False) -> Shown:
        agents = self.env.agents
        live = np.array([agent in agents and not self._is_over(agent) for agent in self.rows])
        return Shown(
            [self.env.observe(agent) if agent in agents else None for agent in self.rows],
            [self.env.infos.get(agent, {}) for agent in self.rows],
            live,
            fresh,
        )


def adapt(env: Any) -> Adapter:
    """The adapter for an environment.

    Raises:
        TypeError: an environment of none of the known kinds.
        ValueError: a vector environment that hands out only some of its agents at a time.
    """
    if hasattr(env, "agents_per_batch") and hasattr(env, "recv"):
        return VectorAdapter(env)
    if hasattr(env, "num_agents") and hasattr(env, "single_action_space"):
        return PufferAdapter(env)
    if hasattr(env, "possible_agents"):
        return AECAdapter(env) if hasattr(env, "agent_iter") else ParallelAdapter(env)
    if isinstance(env, gymnasium.Env):
        return GymnasiumAdapter(env)
    raise TypeError(
        f"{type(env).__name__} is no environment that can be audited: it must be a PufferEnv, a "
        "PufferLib vector environment, a gymnasium.Env, or a PettingZoo ParallelEnv or AECEnv"
    )


class Engine:
    """What an environment's engine says through the optional names of this module.

    Attributes:
        knows_who_moves, knows_legality, forks, counts_illegal: what it offers, for all rows.

    Raises:
        TypeError: one of the methods takes other arguments than it would be called with.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._starts = [start for start, _ in adapter.parts]
        self._parts = [part for _, part in adapter.parts]
        self._sizes = np.diff([*self._starts, len(adapter)]).tolist()
        self._to_move = self._methods("to_move", "row")
        self._is_legal = self._methods("is_legal", "row", "action")
        self._fork = self._methods("fork")
        self.knows_who_moves = bool(self._to_move)
        self.knows_legality = bool(self._is_legal)
        self.forks = bool(self._fork)
        self.counts_illegal = bool(self._parts) and all(
            layer_with(part, "illegal_actions") is not None for part in self._parts
        )

    def _methods(self, name: str, *arguments: str) -> list[Callable[..., Any]]:
        """The method of each part, given a row by its number; none at all if one part lacks it."""
        layers = [layer_with(part, name) for part in self._parts]
        if not all(callable(getattr(layer, name, None)) for layer in layers):
            return []
        sizes = zip(layers, self._sizes, strict=True)
        return [_asking(layer, name, arguments, agents) for layer, agents in sizes]

    def _part(self, row: int) -> tuple[int, int]:
        """The part that a row belongs to, and the row's number in it."""
        part = bisect_right(self._starts, row) - 1
        return part, row - self._starts[part]

    def to_move(self, live: BoolArray) -> BoolArray:
        """(B,) bool, whether each row is to move; False where it is not live. Needs ``to_move``."""
        moves = np.zeros(len(live), dtype=bool)
        for row in np.flatnonzero(live).tolist():
            part, number = self._part(row)
            moves[row] = bool(self._to_move[part](number))
        return moves

    def is_legal(self, row: int, action: tuple[int, ...]) -> bool:
        """Whether the engine would take an action of a row. Needs ``is_legal``."""
        part, number = self._part(row)
        return bool(self._is_legal[part](number, action))

    def refuses(self, actions: IntArray, row: int) -> bool:
        """Whether a fork raises at, or counts, illegal actions. Needs ``fork``.

        Args:
            actions: (B, 1 + slots), of all rows.
            row: the row whose environment is forked.
        """
        part = self._part(row)[0]
        adapter = adapt(self._fork[part]())
        start = self._starts[part]
        before = illegal_count(adapter.env)
        try:
            adapter.step(actions[start : start + len(adapter)])
        except Exception:
            return True
        return illegal_count(adapter.env) > before

    def illegal_actions(self) -> int:
        """How many illegal actions were counted so far, by all parts."""
        return sum(illegal_count(part) for part in self._parts)


@dataclass
class Lists:
    """The legal lists of B rows as they are shown, right or wrong; N tuples in all.

    Attributes:
        actions: (N, 1 + slots) int64, packed by row; -1 for what is not a whole number.
        rows: (N,) int64, ascending.
        places: (N,) int64, of each tuple in its row's list.
        counts: (B,) int64, how many tuples of each row were read.
        said: (B,) int64, the count as the observation has it.
        behind: (B,) int64: how many tuples behind the counted ones are other than zeros.
        following: (B, 1 + slots) int64: what follows the last counted tuple; zeros if nothing does.
        room: how many tuples a list has room for; None where lists have no padding.
        most_count: the largest number that the count can be; None if it has no bound.
    """

    actions: IntArray
    rows: IntArray
    places: IntArray
    counts: IntArray
    said: IntArray
    behind: IntArray
    following: IntArray
    room: int | None = None
    most_count: int | None = None

    @cached_property
    def starts(self) -> IntArray:
        """(B,) int64: where each row begins in ``actions``."""
        starts: IntArray = np.cumsum(self.counts) - self.counts
        return starts

    def of(self, row: int) -> list[tuple[int, ...]]:
        """One row's list."""
        start = int(self.starts[row])
        return [tuple(a) for a in self.actions[start : start + int(self.counts[row])].tolist()]

    @cached_property
    def digests(self) -> npt.NDArray[np.uint64]:
        """(B,) uint64: equal for equal lists in equal order; 0 for an empty one."""
        places = (2 * self.places + 1).astype(np.uint64)
        return self._sums((self._mixed ^ (self._mixed >> np.uint64(32))) * places)

    @cached_property
    def sets(self) -> npt.NDArray[np.uint64]:
        """(B,) uint64: equal for equal lists in any order; 0 for an empty one."""
        return self._sums(self._mixed)

    @cached_property
    def _mixed(self) -> npt.NDArray[np.uint64]:
        """(N,) uint64: a hash of each tuple."""
        slots = self.actions.shape[1]
        mixed = (self.actions.astype(np.uint64) * _WEIGHTS[:slots]).sum(axis=1, dtype=np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * _ODD + np.uint64(1)
        hashes: npt.NDArray[np.uint64] = mixed
        return hashes

    def _sums(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes, dtype=np.uint64)])
        of_rows: npt.NDArray[np.uint64] = sums[self.starts + self.counts] - sums[self.starts]
        return of_rows


_ODD = np.uint64(0x9E3779B97F4A7C15)
_WEIGHTS = np.random.default_rng(0).integers(1, 2**63, 64, dtype=np.uint64) * np.uint64(2) + _ODD


class Reader(ABC):
    """Reads lists, and masks per head, from what an environment shows."""

    has_count = True
    """Whether lists come padded, with a count."""

    @abstractmethod
    def read(self, shown: Shown) -> Lists:
        """The lists of all rows; those of rows that are not live are empty."""

    @abstractmethod
    def field(self, shown: Shown, name: str) -> npt.NDArray[Any]:
        """(B, ...) of a field, for masks per head."""

    def head_masks(self, shown: Shown, masks: HeadMasks) -> list[BoolArray]:
        """One (B, size) bool array a head; rows that are not live are False.

        Raises:
            ValueError: masks of another number for each row.
        """
        if not callable(masks):
            fields = [self.field(shown, name) for name in masks]
            return [(f.reshape(len(f), -1) != 0) & shown.live[:, None] for f in fields]
        heads: list[BoolArray] = []
        for row in np.flatnonzero(shown.live).tolist():
            of_row = [np.asarray(m) != 0 for m in masks(shown.observations[row], shown.infos[row])]
            if not heads:
                heads = [np.zeros((len(shown.live), len(m)), dtype=bool) for m in of_row]
            for head, mask in zip(heads, of_row, strict=True):
                head[row] = mask
        return heads


class _PaddedReader(Reader):
    def _from_padded(
        self,
        said: npt.NDArray[Any],
        columns: list[npt.NDArray[Any]],
        live: BoolArray,
        most_count: int | None,
    ) -> Lists:
        """From counts (B,) and one (B, K) array a value of the tuples."""
        room = columns[0].shape[1]
        said = np.where(live, _whole(said), 0)
        counts = np.clip(said, 0, room)
        counted = np.arange(room) < counts[:, None]
        rows, places = np.nonzero(counted)
        actions = np.stack([_whole(c[rows, places]) for c in columns], axis=1)

        last = np.arange(len(counts)), np.minimum(counts, room - 1)
        following = np.stack([_whole(c[last]) for c in columns], axis=1)
        following[(counts == room) | ~live] = 0

        behind: npt.NDArray[Any] = columns[0] != 0
        for column in columns[1:]:
            behind |= column != 0
        behind &= ~counted & live[:, None]
        totals = np.asarray(behind.sum(axis=1))
        return Lists(actions, rows, places, counts, said, totals, following, room, most_count)


class LayoutReader(_PaddedReader):
    """Reads flat observations by a `LegalLayout`."""

    def __init__(self, layout: LegalLayout) -> None:
        self.layout = layout
        kind = layout.count.dtype
        self._most_count = int(np.iinfo(kind).max) if kind.kind in "iu" else None
        self._blank: npt.NDArray[Any] | None = None
        """Stands for the observation of an absent agent."""

    def _records(self, shown: Shown) -> npt.NDArray[Any]:
        observations = shown.observations
        if isinstance(observations, list):
            flat = next((o for o in observations if o is not None), self._blank)
            if not isinstance(flat, np.ndarray):
                raise TypeError(
                    f"the layout reads flat arrays, an observation here is a {type(flat).__name__};"
                    " pass layout=(count, actions), the keys of a Dict observation, or "
                    "legal_actions"
                )
            blank = self._blank = np.zeros_like(flat)
            observations = np.stack([blank if o is None else o for o in observations])
        rows = np.require(observations.reshape(len(observations), -1), requirements=["C", "W"])
        records: npt.NDArray[Any] = (
            self.layout.as_bytes(torch.from_numpy(rows)).numpy().view(self.layout.dtype)[:, 0]
        )
        return records

    def read(self, shown: Shown) -> Lists:
        """As `Reader.read`."""
        records = self._records(shown)
        said, views = self.layout.list_arrays(records)
        return self._from_padded(said, views, shown.live, self._most_count)

    def field(self, shown: Shown, name: str) -> npt.NDArray[Any]:
        """As `Reader.field`."""
        return resolve(self._records(shown), name)


class NamesReader(_PaddedReader):
    """Reads Dict observations: a count and a padded (K, 1 + slots) list under two keys."""

    def __init__(self, count: str, actions: str) -> None:
        self._count, self._actions = count, actions
        self._blanks: dict[str, npt.NDArray[Any]] = {}
        """By key, what stands for the value of an absent agent."""

    def read(self, shown: Shown) -> Lists:
        """As `Reader.read`."""
        said = self.field(shown, self._count).reshape(len(shown.live))
        padded = self.field(shown, self._actions)
        if padded.ndim != 3:
            raise ValueError(
                f"{self._actions!r} must be (K, 1 + slots) in an observation, it is "
                f"{padded.shape[1:]}"
            )
        columns = list(np.moveaxis(padded, -1, 0))
        return self._from_padded(said, columns, shown.live, None)

    def field(self, shown: Shown, name: str) -> npt.NDArray[Any]:
        """As `Reader.field`.

        Raises:
            TypeError: observations without keys.
            KeyError: no such key.
        """
        values = [None if o is None else self._value(o, name) for o in shown.observations]
        present = next((value for value in values if value is not None), self._blanks.get(name))
        self._blanks[name] = np.zeros_like(present)
        return np.stack([self._blanks[name] if v is None else np.asarray(v) for v in values])

    def _value(self, observation: Any, name: str) -> Any:
        if not isinstance(observation, Mapping):
            raise TypeError(
                f"layout names the key {name!r}, and an observation here is a "
                f"{type(observation).__name__}, without keys; pass a LegalLayout, or legal_actions"
            )
        if name not in observation:
            keys = ", ".join(map(repr, observation))
            raise KeyError(f"the observation has no key {name!r}; it has {keys}")
        return observation[name]


class CallableReader(Reader):
    """Asks a callable for each row's list."""

    has_count = False

    def __init__(self, legal_actions: LegalCallable, slots: int) -> None:
        self._legal_actions, self._width = legal_actions, 1 + slots

    def read(self, shown: Shown) -> Lists:
        """As `Reader.read`."""
        lists = [
            list(self._legal_actions(shown.observations[row], shown.infos[row])) if live else []
            for row, live in enumerate(shown.live.tolist())
        ]
        counts = np.array([len(one) for one in lists], dtype=np.int64)
        flat = [tuple(action) for one in lists for action in one]
        wrong = next((action for action in flat if len(action) != self._width), None)
        if wrong is not None:
            raise ValueError(
                f"legal_actions gave {wrong}: {len(wrong)} values, the spec's tuples have "
                f"{self._width}"
            )
        actions = _whole(np.array(flat).reshape(len(flat), self._width))
        rows = np.repeat(np.arange(len(lists)), counts)
        places = np.arange(len(flat)) - (np.cumsum(counts) - counts)[rows]
        following = np.zeros((len(lists), self._width), dtype=np.int64)
        return Lists(actions, rows, places, counts, counts, np.zeros_like(counts), following)

    def field(self, shown: Shown, name: str) -> npt.NDArray[Any]:
        """As `Reader.field`."""
        raise TypeError(
            f"head_masks names the field {name!r}, and there is no layout to find it; pass a "
            "callable head_masks(observation, info)"
        )


def reader_for(
    env: Any,
    spec: ActionSpec,
    layout: LegalLayout | Sequence[str] | None,
    legal_actions: LegalCallable | None,
) -> Reader:
    """The reader for what was given or, of an environment, found.

    Args:
        env: the environment, asked for ``legal_layout`` if nothing is given.
        spec: of its tuples.
        layout: a layout of flat observations, or the two keys of count and list in a Dict
            observation (also one that PufferLib has emulated).
        legal_actions: gives each agent's tuples; takes the layout's place.

    Raises:
        KeyError: keys that the emulated observation does not have.
        TypeError: nothing that lists could be read with.
        ValueError: a layout whose tuples have another number of values than the spec's; keys that
            are not two.
    """
    if legal_actions is not None:
        return CallableReader(legal_actions, spec.slots)
    if layout is None or isinstance(layout, LegalLayout):
        layout = layout_of(env, layout=layout)
    if isinstance(layout, Sequence):
        keys = [layout] if isinstance(layout, str) else list(layout)
        if len(keys) != 2 or not all(isinstance(key, str) for key in keys):
            raise ValueError(
                f"layout is {layout!r}; it must be a LegalLayout, or the two keys (count, actions) "
                "of a Dict observation"
            )
        count, actions = keys
        if not any(map(is_emulation, env_layers(env))):
            return NamesReader(count, actions)
        layout = LegalLayout.from_env(env, count, actions)
    if layout is None:
        raise TypeError(
            f"{type(env).__name__} has no legal_layout; pass layout=, or legal_actions=, a "
            "callable (observation, info) -> list of tuples"
        )
    if len(layout.columns) != 1 + spec.slots:
        raise ValueError(
            f"the layout's tuples have {len(layout.columns)} values, the spec's {1 + spec.slots}"
        )
    return LayoutReader(layout)


def _asking(layer: Any, name: str, arguments: tuple[str, ...], agents: int) -> Callable[..., Any]:
    """The layer's method, as a function of the row's number among its agents and of the rest."""
    method = getattr(layer, name)
    if _takes(method, len(arguments)):
        if not arguments:
            return method  # type: ignore[no-any-return]
        rows = getattr(layer, "possible_agents", None) or range(agents)
        return lambda row, *rest: method(rows[row], *rest)
    if arguments and agents == 1 and _takes(method, len(arguments) - 1):
        return lambda row, *rest: method(*rest)
    wanted = f"{name}({', '.join(arguments)})"
    if arguments and agents == 1:
        wanted += f", or {name}({', '.join(arguments[1:])}) since there is one agent"
    raise TypeError(
        f"{type(layer).__name__}.{name} takes {inspect.signature(method)}; it is called as {wanted}"
    )


def _takes(method: Callable[..., Any], count: int) -> bool:
    """Whether so many arguments fit; taken for granted where the signature cannot be seen."""
    try:
        inspect.signature(method).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # of a compiled engine
        return True
    return True


def illegal_count(env: Any) -> int:
    """How many illegal actions an environment has counted; 0 if it counts none."""
    layer = layer_with(env, "illegal_actions")
    return 0 if layer is None else int(layer.illegal_actions)


def _illegal_in(infos: Any) -> int:
    """Illegal actions that the infos of a step count, each a number or a list of numbers."""
    found = [info.get("illegal_actions", 0) for info in _dicts(infos)]
    return sum(int(np.sum(value)) for value in found)


def _dicts(infos: Any) -> list[dict[str, Any]]:
    return [i for i in ([infos] if isinstance(infos, dict) else infos) if isinstance(i, dict)]


def _wraps_single_agent(env: Any) -> bool:
    """Whether it is PufferLib's emulation of a gymnasium.Env, whose one agent always acts."""
    driver = getattr(env, "driver_env", env)
    return steps_emulated(driver) and isinstance(driver, gymnasium.Env)


def _sent(actions: npt.NDArray[Any], space: Any) -> npt.NDArray[Any]:
    """Actions (B, 1 + slots) as the space takes them: without a last dimension for a Discrete."""
    return actions[:, 0] if getattr(space, "shape", None) == () else actions


def _whole(values: npt.NDArray[Any]) -> IntArray:
    """As int64; -1 for what is not a whole number."""
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            values = np.where(np.isfinite(values) & (values == np.floor(values)), values, -1)
    return values.astype(np.int64)
