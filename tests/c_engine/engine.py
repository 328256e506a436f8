"""Skirmish, the card game in engine.c, as a native PufferEnv: all that an engine's own binding is.

Nothing here knows of tcg_flatpolicy. The observation buffer of PufferLib is the array of the
engine's structs: C writes there what the trainer reads, and nothing is copied or translated.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import pufferlib

SOURCE = Path(__file__).with_name("engine.c")
PLACES, HAND, ROOM = 4, 6, 1024
COMPILERS = (("CC", "cc", "c"), ("CXX", "c++", "c++"))
"""The variable that names each, the usual name, and the language that it is told to compile."""


class Unit(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_uint8),
        ("health", ctypes.c_int16),
        ("attack", ctypes.c_uint8),
        ("ready", ctypes.c_uint8),
    ]


class Side(ctypes.Structure):
    _fields_ = [
        ("life", ctypes.c_int16),
        ("energy", ctypes.c_uint8),
        ("held", ctypes.c_uint8),
        ("hand", ctypes.c_uint8 * HAND),
        ("deck", ctypes.c_int32),
        ("board", Unit * PLACES),
    ]


class Mask(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint8 * ROOM) for name in ("primary", "sub1", "sub2", "sub3")]


class Observation(ctypes.Structure):
    _fields_ = [
        ("me", Side),
        ("them", Side),
        ("phase", ctypes.c_uint8),
        ("count", ctypes.c_uint16),
        ("mask", Mask),
        ("turn", ctypes.c_int32),
    ]


def build(source: Path, language: str | None = None) -> ctypes.CDLL:
    """Compiles a C file that is C++ as well into a shared library, and loads it.

    Args:
        source: the file.
        language: "c" or "c++"; None takes the first that there is a compiler for.

    Raises:
        FileNotFoundError: no compiler.
        RuntimeError: the compiler refuses, with what it said.
    """
    for variable, usual, compiles in COMPILERS:
        command = shlex.split(os.environ.get(variable) or usual)
        if language in (None, compiles) and shutil.which(command[0]):
            break
    else:
        raise FileNotFoundError(
            f"no compiler for {language or 'C or C++'}; install one, or name it in $CC or $CXX"
        )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "engine.so"
        command += ["-x", compiles, "-O2", "-shared", "-fPIC"]
        command += ["-o", str(library), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
        return ctypes.CDLL(str(library))  # stays loaded when its file is gone


@functools.cache
def load() -> ctypes.CDLL:
    """The engine, compiled once a process."""
    return build(SOURCE)


class Skirmish(pufferlib.PufferEnv):
    """Games side by side; row 2 * g + p is player p of game g, and both players are agents.

    The player who waits has an empty list and sends zeros. The reward is +1 for the winner and -1
    for the loser in the step that ends their game, and the next one starts in that step.

    Args:
        num_games: half of ``num_agents``.
        buf: PufferLib's shared buffers.
        seed: of the games until `reset` is given another.
        engine: another build of engine.c than `load` gives.
    """

    def __init__(
        self,
        num_games: int = 64,
        buf: Any = None,
        seed: int = 0,
        engine: ctypes.CDLL | None = None,
    ) -> None:
        self.engine = engine or load()
        size = ctypes.sizeof(Observation)
        if self.engine.skirmish_observation_size() != size:
            raise RuntimeError("engine.py's Observation is not engine.c's; change both together")
        self.single_observation_space = gymnasium.spaces.Box(0, 255, (size,), np.uint8)
        self.single_action_space = gymnasium.spaces.MultiDiscrete([7, 6, 5, 4])
        self.num_agents = 2 * num_games
        self.seed = seed
        self.games = np.zeros(num_games * self.engine.skirmish_game_size(), np.uint8)
        super().__init__(buf)

    def reset(self, seed: int | None = None) -> tuple[Any, list[Any]]:
        if seed is not None:
            self.seed = seed
        games, n = self._games()
        self.engine.skirmish_reset(games, n, ctypes.c_uint64(self.seed), _at(self.observations))
        self.seed += 1
        self.rewards[:], self.terminals[:], self.truncations[:] = 0, False, False
        return self.observations, []

    def step(self, actions: npt.NDArray[Any]) -> tuple[Any, Any, Any, Any, list[Any]]:
        """Plays (num_agents, 4) whole numbers; ValueError names the first that is illegal."""
        played = np.ascontiguousarray(actions, np.int32).reshape(self.num_agents, 4)
        illegal = self.engine.skirmish_step(
            *self._games(),
            *map(_at, (played, self.observations, self.rewards, self.terminals)),
        )
        if illegal >= 0:
            raise ValueError(f"row {illegal}: {tuple(played[illegal].tolist())} is not legal")
        over = int(self.terminals.sum()) // 2
        infos = [{"games": over, "first_won": (self.rewards[::2] > 0).sum() / over}] if over else []
        return self.observations, self.rewards, self.terminals, self.truncations, infos

    def to_move(self, row: int) -> bool:
        """Whether that player is the one to move."""
        return bool(self.engine.skirmish_to_move(self._games()[0], row))

    def is_legal(self, row: int, action: tuple[int, ...]) -> bool:
        """What the engine's rules say, which do not look at the list."""
        asked = np.array(action, np.int32)
        return bool(self.engine.skirmish_is_legal(self._games()[0], row, _at(asked)))

    def close(self) -> None:
        pass

    def _games(self) -> tuple[ctypes.c_void_p, int]:
        return _at(self.games), self.num_agents // 2


def _at(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
