"""Gymnasium environments whose legal list is in ``info``, or in a mask over ``Discrete(n)``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium
from gymnasium import spaces

from tcg_flatpolicy.adapters.rows import Ids, Rows, ToTuple, split_mask, without_mask
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.wrapping import env_attribute

Listing = Callable[[gymnasium.Env[Any, Any], Any, dict[str, Any]], Iterable[Sequence[int]]]


class ListedEnv(gymnasium.Env[Any, Any]):
    """What :func:`from_gymnasium` returns; it has the environment as ``env``."""

    def __init__(
        self, env: gymnasium.Env[Any, Any], ids: Ids | None, spec: ActionSpec, room: int, find: Any
    ) -> None:
        self.env, self.action_spec = env, spec
        self._ids, self._find = ids, find
        self._space = without_mask(env.observation_space)
        self._rows = Rows(self._space, spec, room)
        self.observation_space, self.action_space = self._rows.space, spec.action_space
        self.legal_layout = self._rows.layout
        self.render_mode = env.render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """A row of bytes, and the environment's info."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._row(observation, info, False), info

    def step(self, action: Any) -> Any:
        """Plays a tuple of the spec; all but the observation is the environment's own."""
        if self._ids is None:
            sent: Any = tuple(int(value) for value in action)
            sent = self.env.action_space.dtype.type(sent) if self.env.action_space.dtype else sent
        else:
            sent = self._ids.of(action) + getattr(self.env.action_space, "start", 0)
        observation, reward, terminated, truncated, info = self.env.step(sent)
        row = self._row(observation, info, terminated or truncated)
        return row, reward, terminated, truncated, info

    def _row(self, observation: Any, info: dict[str, Any], over: bool) -> Any:
        seen, mask = split_mask(observation, info, self._space)
        legal = [] if over else list(self._find(self.env, observation, info, mask))
        if not over and not legal:
            raise ValueError(
                f"{type(self.env.unwrapped).__name__} lists no legal action in a state that is not "
                "the end; list what the agent does then, such as a pass"
            )
        return self._rows.row(seen, legal)

    def render(self) -> Any:
        """The environment's own."""
        return self.env.render()

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()


def from_gymnasium(
    env: gymnasium.Env[Any, Any],
    *,
    spec: ActionSpec | None = None,
    to_tuple: ToTuple | None = None,
    legal: str | Listing = "legal_actions",
    max_legal: int | None = None,
) -> ListedEnv:
    """A Gymnasium environment with its legal list in the observation.

    With the action space ``Discrete(n)`` the list is a mask of n entries: that of a method
    ``action_masks()``, as sb3-contrib has it, or the entry ``action_mask`` of the observation or of
    ``info``. Its actions are tuples of one value, or those of ``to_tuple``. Else the list is the
    tuples in ``info``.

    Args:
        env: the environment.
        spec: what the tuples mean; the environment's ``action_spec`` if left out, and for
            ``Discrete(n)`` without to_tuple one value of n.
        to_tuple: function of an action's number, from 0 to n - 1, that gives its tuple; checked to
            give each another one.
        legal: name in ``info`` of a list of tuples; or a function of (env, observation, info) that
            returns one, for any action space but Discrete.
        max_legal: most tuples of a list; n for ``Discrete(n)``, and else it must be given.

    Raises:
        ValueError: no spec, no max_legal, or tuples that are outside the spec or not distinct. When
            it plays: no list, a list with more tuples, or an empty one before the end.
    """
    space = env.action_space
    spec = spec or env_attribute(env, "action_spec")
    masks = env_attribute(env, "action_masks")
    if isinstance(space, spaces.Discrete):
        ids = Ids(int(space.n), spec, to_tuple)

        def masked(env: Any, observation: Any, info: dict[str, Any], mask: Any) -> Any:
            mask = masks() if masks is not None else mask
            if mask is None:
                raise ValueError(
                    f"{type(env.unwrapped).__name__} shows no mask: it has no method "
                    "action_masks(), and no action_mask in its observation or info"
                )
            return ids.listed(mask)

        return ListedEnv(env, ids, ids.spec, max_legal or int(space.n), masked)
    if spec is None or max_legal is None:
        raise ValueError(
            f"{type(env.unwrapped).__name__} has the action space {space}: from_gymnasium needs "
            "spec=... (what a tuple means) and max_legal=... (the most tuples of a list)"
        )

    def listed(env: Any, observation: Any, info: dict[str, Any], mask: Any) -> Any:
        if callable(legal):
            return legal(env, observation, info)
        if legal not in info:
            raise ValueError(
                f"the info of {type(env.unwrapped).__name__} has no {legal!r}, only "
                f"{', '.join(info) or 'nothing'}; name the list with legal=..., or give a function"
            )
        return info[legal]

    return ListedEnv(env, None, spec, max_legal, listed)
