"""A constructed task in which legality couples the values of a tuple, and whose best play is known.

Six allies face six enemies; each ally may attack one enemy, and each enemy may be attacked by one
ally: a random permutation, new in each state. So every value of a slot is legal by itself, while of
the 36 pairs 30 are not. What an attack pays depends on the two kinds, in order, and is no sum of
what each contributes. One decision is one episode.
"""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
import numpy.typing as npt
import pufferlib
import torch
from torch import Tensor, nn
from torch.nn import functional

import tcg_flatpolicy as fp

UNITS, KINDS = 6, 4
LEGAL = 1 + UNITS
"""Legal tuples of every state: to pass, and one attack of each ally."""
PASS_PAY = 0.1

SPEC = fp.ActionSpec(
    [
        fp.Primary("pass"),
        fp.Primary("attack", fp.Entity("ally", UNITS), fp.Entity("enemy", UNITS)),
    ]
)
"""MultiDiscrete [2, 6, 6], the no-op (0, 0, 0) is to pass."""

# Sixteen different payments, squared so that few are high. The seed is one with which the four
# highest share no row or column and no kind is good or bad by itself: what rows and columns explain
# is 1% of the variance.
PAY = (np.random.default_rng(1222).permutation(KINDS * KINDS).reshape(KINDS, KINDS) / 15) ** 2
"""(4, 4) float64 in 0..1: what an attack pays, by the kinds of ally and enemy."""

OBSERVATION_DTYPE = np.dtype(
    [
        ("kind", np.uint8, (2, UNITS)),
        ("may_attack", np.uint8, (UNITS, UNITS)),
        ("legal", np.uint8, (LEGAL, 3)),
        ("n_legal", np.uint8),
    ],
    align=True,
)
"""One observation: the kinds of allies and enemies, the legality matrix, and the legal tuples."""


def expected_best() -> float:
    """What the best legal action pays, on average over states; computed, not sampled.

    The kinds are independent and uniform, and so are those of the six pairs that may fight: the
    best pay is the highest of six independent ones of the sixteen.
    """
    values = np.sort(np.maximum(PAY.ravel(), PASS_PAY))
    below = (np.arange(len(values) + 1) / len(values)) ** UNITS
    return float((values * np.diff(below)).sum())


def expected_uniform() -> float:
    """What a uniformly drawn legal action pays, on average over states; computed, not sampled."""
    return float((PASS_PAY + UNITS * PAY.mean()) / LEGAL)


class CoupledLegality(pufferlib.PufferEnv):
    """Many states side by side; each step is a whole episode and deals new states.

    `step` returns one info: sums over the agents of ``got`` (what was paid) and ``best`` (what the
    best legal action would have paid), and ``illegal``, the number of actions that were not legal.
    A tuple is legal only if it is listed, so with 0 in unused slots.

    Args:
        num_agents: states side by side.
        illegal: what an action that is not legal does. "raise" raises; "random" plays a uniformly
            drawn legal action in its place, "noop" passes, and both count it.
        seed: of the states and of what is played instead; `reset(seed)` sets it anew.
        buf: PufferLib's shared buffers.

    Raises:
        ValueError: no agents, or a way to treat illegal actions that does not exist.

    Attributes:
        illegal_actions: int, how many were chosen since the environment was made.
    """

    def __init__(
        self,
        num_agents: int = 256,
        illegal: Literal["raise", "random", "noop"] = "raise",
        seed: int = 0,
        buf: Any = None,
    ) -> None:
        if num_agents < 1:
            raise ValueError(f"num_agents must be at least 1, got {num_agents}")
        if illegal not in ("raise", "random", "noop"):
            raise ValueError(
                f"illegal={illegal!r} does not exist; take 'raise', 'random' or 'noop'"
            )
        self.action_spec = SPEC
        self.observation_dtype = OBSERVATION_DTYPE
        self.legal_layout = fp.LegalLayout.from_dtype(
            OBSERVATION_DTYPE, count="n_legal", actions="legal", spec=SPEC
        )
        self.single_observation_space = gymnasium.spaces.Box(
            0, 255, (OBSERVATION_DTYPE.itemsize,), np.uint8
        )
        self.single_action_space = SPEC.action_space
        self.num_agents = num_agents
        super().__init__(buf)
        self.illegal_actions = 0
        self._illegal = illegal
        self._rng = np.random.default_rng(seed)
        self._rows = np.arange(num_agents)

    def reset(self, seed: int | None = None) -> tuple[npt.NDArray[np.uint8], list[dict[str, Any]]]:
        """Deals new states; ``seed`` sets the generator anew, None goes on with it.

        Returns:
            ``(observations (num_agents, itemsize) uint8, [])``
        """
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self.rewards[:] = 0
        self.terminals[:] = False
        self.truncations[:] = False
        self._deal()
        return self.observations, []

    def step(self, actions: npt.NDArray[Any]) -> tuple[Any, Any, Any, Any, list[dict[str, Any]]]:
        """Pays for one action in each state, and deals the next states.

        Args:
            actions: (num_agents, 3) integers.

        Returns:
            ``(observations, rewards, terminals, truncations, infos)``, all but the infos in the
            buffers.

        Raises:
            ValueError: actions of another shape, or with ``illegal="raise"`` one that is not legal.
        """
        actions = np.asarray(actions)
        if actions.shape != (self.num_agents, 3):
            raise ValueError(f"actions must be ({self.num_agents}, 3), got {actions.shape}")
        listed = (actions[:, None, :] == self._legal).all(axis=2)  # (n, LEGAL)
        place = listed.argmax(axis=1)
        illegal = np.flatnonzero(~listed.any(axis=1))
        if len(illegal):
            self._replace(place, illegal, actions)
        self.rewards[:] = self.pays[self._rows, place]
        info = {
            "got": float(self.pays[self._rows, place].sum()),
            "best": float(self.pays.max(axis=1).sum()),
            "illegal": len(illegal),
        }
        self.terminals[:] = True
        self._deal()
        return self.observations, self.rewards, self.terminals, self.truncations, [info]

    def close(self) -> None:
        """Nothing to free."""

    def _deal(self) -> None:
        n = self.num_agents
        kinds = self._rng.integers(0, KINDS, (n, 2, UNITS))
        enemies = self._rng.permuted(np.tile(np.arange(UNITS), (n, 1)), axis=1)
        legal = np.zeros((n, LEGAL, 3), dtype=np.int64)
        legal[:, 1:, 0] = 1
        legal[:, 1:, 1] = np.arange(UNITS)
        legal[:, 1:, 2] = enemies
        self._legal = legal
        self.pays = np.full((n, LEGAL), PASS_PAY)
        """(num_agents, 7) float64: what each listed tuple of the states at hand pays."""
        self.pays[:, 1:] = PAY[kinds[:, 0], np.take_along_axis(kinds[:, 1], enemies, axis=1)]

        records = self.observations.view(OBSERVATION_DTYPE)[:, 0]
        records["kind"] = kinds
        records["may_attack"] = enemies[:, :, None] == np.arange(UNITS)
        records["legal"] = legal
        records["n_legal"] = LEGAL

    def _replace(
        self, place: npt.NDArray[np.int64], illegal: npt.NDArray[np.int64], actions: Any
    ) -> None:
        """Sets the place in the list of what is played in the rows that are illegal."""
        self.illegal_actions += len(illegal)
        if self._illegal == "raise":
            row = int(illegal[0])
            legal = ", ".join(str(tuple(one)) for one in self._legal[row].tolist())
            raise ValueError(
                f"state {row}: {tuple(actions[row].tolist())} is not legal; legal are {legal}. To "
                "have such actions replaced and counted, take illegal='random' or 'noop'"
            )
        if self._illegal == "noop":
            place[illegal] = 0
        else:
            place[illegal] = self._rng.integers(0, LEGAL, len(illegal))


class CoupledEncoder(nn.Module):
    """Units by kind, place and the kinds of the units that they may fight; the state from all.

    Which kinds a unit may fight is worked out here, so that a head that chooses an ally before an
    enemy, or the two apart, need not first learn to look that up.

    Args:
        layout: finds the fields of an observation.
        hidden_size: D, width of the state's vector.
        entity_size: E, width of a unit.
    """

    def __init__(
        self, layout: fp.LegalLayout, hidden_size: int = 128, entity_size: int = 16
    ) -> None:
        super().__init__()
        self.layout = layout
        self.hidden_size = hidden_size
        self.entity_sizes = {"ally": (UNITS, entity_size), "enemy": (UNITS, entity_size)}
        self.units = nn.ModuleList(nn.Linear(2 * KINDS, entity_size) for _ in range(2))
        self.places = nn.Parameter(torch.zeros(2, UNITS, entity_size))
        self.trunk = nn.Sequential(
            nn.Linear(2 * UNITS * (KINDS + entity_size) + UNITS * UNITS, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
        )
        for linear in (*self.units, self.trunk[0], self.trunk[2]):
            nn.init.orthogonal_(linear.weight, 2**0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, observations: Tensor) -> fp.Encoding:
        """(B, nbytes) uint8 -> hidden (B, D), entities ally and enemy (B, 6, E)."""
        kind = self.layout.field(observations, "kind").long()  # (B, 2, 6)
        may_attack = self.layout.field(observations, "may_attack").float()
        kinds = functional.one_hot(kind, KINDS).float()
        faced = torch.stack([may_attack @ kinds[:, 1], may_attack.mT @ kinds[:, 0]], dim=1)
        known = torch.cat([kinds, faced], dim=3)  # (B, 2, 6, 8)
        ally, enemy = (
            torch.relu(linear(known[:, side]) + self.places[side])
            for side, linear in enumerate(self.units)
        )
        everything = [kinds, may_attack, ally, enemy]
        hidden = self.trunk(torch.cat([part.flatten(1) for part in everything], dim=1))
        return fp.Encoding(hidden, {"ally": ally, "enemy": enemy})
