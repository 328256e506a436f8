"""Games of an engine that cannot be saved, played again from the seed and every action since."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

_Env = TypeVar("_Env")


def recorded(env: _Env) -> _Env:
    """The same environment, which from now on records its seed and actions for trainer_state.

    For an engine that the seed and the actions determine. It gets ``state_dict`` and
    ``load_state_dict``, which play the actions again: a run that took an hour to play takes as long
    as the engine alone needs. Each action is kept in memory. Record where environments are made::

        def make(**arguments):
            return recorded(MyGame(**arguments))

    Args:
        env: as PufferLib's Serial takes it: native, or emulated from Gymnasium or PettingZoo.
    """
    record: Any = _Record(env)
    for name in ("reset", "step", "state_dict", "load_state_dict"):
        setattr(env, name, getattr(record, name))
    return env


class _Record:
    def __init__(self, env: Any) -> None:
        self.env, self._reset, self._step = env, env.reset, env.step
        self._seed: int | None = None
        self._resets: list[int] = []
        """Before which step each reset without a seed came."""
        self._actions: list[npt.NDArray[Any]] = []

    def reset(self, seed: int | None = None, **options: Any) -> Any:
        if seed is not None:
            self._seed, self._resets, self._actions = int(seed), [], []
        else:
            self._resets.append(len(self._actions))
        return self._reset(seed=seed, **options)

    def step(self, actions: Any) -> Any:
        self._actions.append(np.array(actions))
        return self._step(actions)

    def state_dict(self) -> dict[str, Any]:
        if self._seed is None:
            raise RuntimeError(
                f"{type(self.env).__name__} was not reset with a seed since it is recorded, so its "
                "games cannot be played again; call reset(seed=...) first, as PuffeRL does"
            )
        actions = torch.from_numpy(np.stack(self._actions)) if self._actions else torch.empty(0)
        return {
            "seed": self._seed,
            "resets": list(self._resets),
            "actions": actions,
            "digest": self._digest(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reset(seed=state["seed"])
        played = state["actions"].numpy()
        for step in range(len(played) + 1):
            for _ in range(state["resets"].count(step)):
                self.reset()
            if step < len(played):
                self.step(played[step])
        if self._digest() != state["digest"]:
            raise RuntimeError(
                f"playing the {len(played)} saved actions again led {type(self.env).__name__} to "
                "other observations than those saved: it is not determined by the seed of reset() "
                "and the actions, or is made with other arguments or of another version. Give it "
                "get_state() and set_state(state), or draw all of its chance from that seed"
            )

    def _digest(self) -> str:
        buffers = ("observations", "rewards", "terminals", "truncations")
        content = [np.asarray(getattr(self.env, name)).tobytes() for name in buffers]
        return hashlib.sha256(b"".join(content)).hexdigest()
