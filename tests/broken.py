"""A small two-player game, and the same game with bugs as they are seen in the wild.

`Duel` is sound; each other name in this module that is a `partial` of it has one bug, and `FAULTS`
says under which code `verify.audit_env` reports it. All are factories, for ``module:factory``.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pettingzoo
import pufferlib

import tcg_flatpolicy as fp

PLACES, CARDS, ROOM, FACE = 4, 6, 48, 4
Tuple = tuple[int, int, int]

SPEC = fp.ActionSpec(
    [
        fp.Primary("end_turn"),
        fp.Primary(
            "attack",
            fp.Entity("ally", PLACES),
            fp.OneOf(fp.Entity("enemy", 4), fp.Index("face", 1)),
        ),
        fp.Primary("play", fp.Index("card", CARDS), fp.Index("place", PLACES)),
        fp.Primary("retreat", fp.Entity("ally", PLACES)),
        fp.Primary("trade", fp.Entity("ally", PLACES), fp.Entity("enemy", PLACES)),
        fp.Primary("draw"),
    ]
)
EVERY = [
    tuple(int(v) for v in (p, *slots))
    for p, limits in enumerate(SPEC.limits)
    for slots in np.ndindex(*limits[1:])
]
KNOWN = set(EVERY)
MASKS = ("mask0", "mask1", "mask2")


def observation_dtype(room: int) -> np.dtype[Any]:
    return np.dtype(
        [
            ("life", np.int16, 2),
            ("mine", np.uint8, PLACES),
            ("theirs", np.uint8, PLACES),
            ("hand", np.uint8, CARDS),
            ("n", np.int16),
            ("legal", np.uint8, (room, 3)),
            ("mask0", np.uint8, int(SPEC.nvec[0])),
            ("mask1", np.uint8, int(SPEC.nvec[1])),
            ("mask2", np.uint8, int(SPEC.nvec[2])),
        ],
        align=True,
    )


class Match:
    """One game. Each player has four places for units, which attack once a turn, and a hand."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.life = [10, 10]
        self.units = rng.integers(0, 3, (2, PLACES)).tolist()  # 0: no unit there
        self.ready = [[True] * PLACES, [True] * PLACES]
        self.hand = (rng.random((2, CARDS)) < 0.5).tolist()
        self.mover = 0
        self.moves = self.moves_in_turn = 0

    @property
    def over(self) -> bool:
        return min(self.life) <= 0 or self.moves >= 60

    def is_legal(self, player: int, action: Tuple) -> bool:
        if player != self.mover or self.over or action not in KNOWN:
            return False
        primary, a, b = action
        mine, theirs = self.units[player], self.units[1 - player]
        if primary == 1:
            return bool(mine[a] and self.ready[player][a] and (b == FACE or theirs[b]))
        if primary == 2:
            return bool(self.hand[player][a] and not mine[b])
        if primary == 3:
            return bool(mine[a])
        if primary == 4:
            return bool(mine[a] and self.ready[player][a] and theirs[b])
        return True

    def legal(self, player: int) -> list[Tuple]:
        """Those of EVERY that is_legal lets through, in its order, and faster."""
        if player != self.mover or self.over:
            return []
        mine, theirs = self.units[player], self.units[1 - player]
        allies = [i for i in range(PLACES) if mine[i]]
        ready = [i for i in allies if self.ready[player][i]]
        enemies = [i for i in range(PLACES) if theirs[i]]
        free = [i for i in range(PLACES) if not mine[i]]
        cards = [i for i in range(CARDS) if self.hand[player][i]]
        return [
            (0, 0, 0),
            *((1, i, j) for i in ready for j in (*enemies, FACE)),
            *((2, card, i) for card in cards for i in free),
            *((3, i, 0) for i in allies),
            *((4, i, j) for i in ready for j in enemies),
            (5, 0, 0),
        ]

    def play(self, action: Tuple) -> None:
        primary, a, b = action
        me, other = self.mover, 1 - self.mover
        self.moves += 1
        self.moves_in_turn += 1
        if primary == 1:
            self.ready[me][a] = False
            if b == FACE:
                self.life[other] -= self.units[me][a]
            else:
                self.units[other][b] -= min(self.units[other][b], self.units[me][a])
        elif primary == 2:
            self.hand[me][a] = False
            self.units[me][b] = 1 + a % 3
            self.ready[me][b] = False
        elif primary == 3:
            self.units[me][a] = 0
        elif primary == 4:
            self.units[me][a] = self.units[other][b] = 0
        elif primary == 5:
            self.hand[me][self.rng.integers(CARDS)] = True
        if primary == 0 or self.moves_in_turn == 4:
            self.mover, self.moves_in_turn = other, 0
            self.ready[other] = [True] * PLACES
            self.life[other] -= 1


class Duel(pufferlib.PufferEnv):
    """Games side by side; rows 2g and 2g + 1 are the two players of game g.

    Args:
        games: how many.
        fault: the bug, one of `FAULTS`; None is sound.
        illegal: "count" plays end_turn in place of an illegal action and counts it.
        protocol: whether the engine can be asked: to_move, is_legal, fork.
    """

    def __init__(
        self,
        games: int = 8,
        fault: str | None = None,
        illegal: str = "count",
        protocol: bool = True,
        buf: Any = None,
        seed: int = 0,
    ) -> None:
        self.fault, self.illegal = fault, illegal
        room = 8 if fault == "truncated" else ROOM
        self.dtype = observation_dtype(room)
        self.action_spec = SPEC
        self.legal_layout = fp.LegalLayout.from_dtype(self.dtype, "n", "legal", spec=SPEC)
        self.head_masks = MASKS
        self.single_observation_space = gymnasium.spaces.Box(
            0, 255, (self.dtype.itemsize,), np.uint8
        )
        self.single_action_space = SPEC.action_space
        self.num_agents = 2 * games
        self.illegal_actions = 0
        self.rng = np.random.default_rng(seed)
        if not protocol:
            self.to_move = self.is_legal = self.fork = None  # type: ignore[assignment]
        super().__init__(buf)

    # The engine's protocol.

    def to_move(self, row: int) -> bool:
        return self.matches[row // 2].mover == row % 2

    def is_legal(self, row: int, action: Tuple) -> bool:
        return self.matches[row // 2].is_legal(row % 2, self.meant(action))

    def fork(self) -> Duel:
        twin = copy.copy(self)
        for name in ("observations", "rewards", "terminals", "truncations", "masks", "actions"):
            setattr(twin, name, getattr(self, name).copy())
        twin.matches, twin.rng = copy.deepcopy((self.matches, self.rng))
        twin.lists = list(self.lists)
        return twin

    # What the engine's numbers mean, where it has an order or a count of its own.

    def meant(self, action: Tuple) -> Tuple:
        primary, a, b = action
        if self.fault == "swapped" and primary == 1:
            return primary, b, a
        if self.fault == "out_of_range" and primary == 2:
            return primary, a - 1, b
        if self.fault == "unused_slot" and primary == 3:
            return primary, a, 0
        return action

    def said(self, player: int, match: Match) -> list[Tuple]:
        legal = match.legal(player)
        if self.fault == "refused":  # attacks of units that have attacked
            mine, theirs = match.units[player], match.units[1 - player]
            attacks = [(1, i, FACE) for i in range(PLACES) if mine[i]]
            attacks += [(1, i, j) for i in range(4) for j in range(4) if mine[i] and theirs[j]]
            legal += [a for a in attacks if a not in legal and match.mover == player]
        if self.fault == "missing":
            legal = [a for a in legal if a[0] != 3]
        if self.fault == "swapped":
            legal = [(p, b, a) if p == 1 else (p, a, b) for p, a, b in legal]
        if self.fault == "swapped_same_size":
            legal = [(p, b, a) if p == 4 else (p, a, b) for p, a, b in legal]
        if self.fault == "out_of_range":
            legal = [(p, a + 1, b) if p == 2 else (p, a, b) for p, a, b in legal]
        if self.fault == "unused_slot":
            legal = [
                (3, a, int(self.rng.integers(4))) if p == 3 else (p, a, b) for p, a, b in legal
            ]
        if self.fault == "duplicates" and len(legal) > 3:
            legal.append(legal[2])
        return legal

    def list_shown(self, row: int) -> list[Tuple]:
        match, player = self.matches[row // 2], row % 2
        if match.mover != player:
            leaks = self.fault == "waiting_has_list"
            return self.said(1 - player, match) if leaks else []
        legal = self.said(player, match)
        if self.fault == "not_refreshed" and not match.moves_in_turn and match.moves:
            legal = self.lists[row] or legal  # that of this player's last turn
        self.lists[row] = legal
        return legal

    def observe(self) -> None:
        records = self.observations.view(self.dtype)[:, 0]
        shown = [self.list_shown(row) for row in range(self.num_agents)]
        room = self.legal_layout.padding
        self.legal_layout.write(self.observations, [legal[:room] for legal in shown])
        seats = [(self.matches[row // 2], row % 2) for row in range(self.num_agents)]
        records["life"] = [(match.life[i], match.life[1 - i]) for match, i in seats]
        records["mine"] = [match.units[i] for match, i in seats]
        records["theirs"] = [match.units[1 - i] for match, i in seats]
        records["hand"] = [match.hand[i] for match, i in seats]
        listed = np.array([(row, *a) for row, legal in enumerate(shown) for a in legal], int)
        rows, values = listed.reshape(-1, 4)[:, 0], listed.reshape(-1, 4)[:, 1:]
        some = np.array([bool(legal) for legal in shown])
        for slot, name in enumerate(MASKS):
            fits = values[:, slot] < SPEC.nvec[slot]
            records[name] = 0
            if self.fault != "mask_zeroed":
                records[name][rows[fits], values[fits, slot]] = 1
        if self.fault == "mask_not_projected":
            records["mask1"][some] = 1
        if self.fault in ("count_small", "count_large"):
            records["n"][some] += 1 if self.fault == "count_large" else -1
        if self.fault == "list_zeroed":
            records["n"], records["legal"] = 0, 0

    def reset(self, seed: int | None = None) -> tuple[Any, list[Any]]:
        if seed is not None:
            self.rng = np.random.default_rng(None if self.fault == "unseeded" else seed)
        self.matches = [Match(self.rng) for _ in range(self.num_agents // 2)]
        self.lists: list[list[Tuple]] = [[] for _ in range(self.num_agents)]
        self.rewards[:], self.terminals[:], self.truncations[:] = 0, False, False
        self.observe()
        return self.observations, []

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, list[Any]]:
        actions = np.asarray(actions)
        if actions.dtype.kind == "f":
            wrongly = self.fault == "floats_truncated"
            actions = np.trunc(actions * np.float32(0.999)) if wrongly else np.rint(actions)
        self.terminals[:] = False
        for game, match in enumerate(self.matches):
            action = self.meant(tuple(actions[2 * game + match.mover].astype(int).tolist()))
            if not match.is_legal(match.mover, action):
                if self.illegal == "raise":
                    raise ValueError(f"game {game}: {action} is not legal")
                self.illegal_actions += 1
                action = (0, 0, 0)
            match.play(action)
            if match.over:
                self.terminals[2 * game : 2 * game + 2] = True
                self.matches[game] = Match(self.rng)
        self.observe()
        return self.observations, self.rewards, self.terminals, self.truncations, []

    def close(self) -> None:
        pass


FAULTS = {
    "out_of_range": "E01",
    "unused_slot": "E01",
    "swapped": "E02",
    "swapped_same_size": "E02",
    "duplicates": "E03",
    "count_small": "E04",
    "count_large": "E04",
    "truncated": "E05",
    "refused": "E06",
    "not_refreshed": "E07",
    "missing": "E08",
    "list_zeroed": "E09",
    "waiting_has_list": "E10",
    "mask_not_projected": "E11",
    "mask_zeroed": "E12",
    "unseeded": "E13",
    "floats_truncated": "E14",
}
"""The code under which each bug must be reported."""

out_of_range = partial(Duel, fault="out_of_range")
unused_slot = partial(Duel, fault="unused_slot")
swapped = partial(Duel, fault="swapped")
swapped_same_size = partial(Duel, fault="swapped_same_size")
duplicates = partial(Duel, fault="duplicates")
count_small = partial(Duel, fault="count_small")
count_large = partial(Duel, fault="count_large")
truncated = partial(Duel, fault="truncated")
refused = partial(Duel, fault="refused")
not_refreshed = partial(Duel, fault="not_refreshed")
missing = partial(Duel, fault="missing")
list_zeroed = partial(Duel, fault="list_zeroed")
waiting_has_list = partial(Duel, fault="waiting_has_list")
mask_not_projected = partial(Duel, fault="mask_not_projected")
mask_zeroed = partial(Duel, fault="mask_zeroed")
unseeded = partial(Duel, fault="unseeded")
floats_truncated = partial(Duel, fault="floats_truncated")


def seen_by(match: Match, player: int) -> dict[str, Any]:
    """A Dict observation, of which the list is padded and has its count."""
    legal = match.legal(player)
    padded = np.zeros((ROOM, 3), dtype=np.uint8)
    padded[: len(legal)] = np.array(legal, dtype=np.uint8).reshape(-1, 3)
    return {
        "units": np.array([match.units[player], match.units[1 - player]], dtype=np.uint8),
        "n": len(legal),
        "legal": padded,
    }


SPACE = gymnasium.spaces.Dict(
    {
        "units": gymnasium.spaces.Box(0, 9, (2, PLACES), np.uint8),
        "n": gymnasium.spaces.Discrete(ROOM + 1),
        "legal": gymnasium.spaces.Box(0, 9, (ROOM, 3), np.uint8),
    }
)


class Solo(gymnasium.Env):  # type: ignore[type-arg]
    """The game against a random opponent, as a Gymnasium environment."""

    observation_space, action_space, action_spec = SPACE, SPEC.action_space, SPEC

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.match = Match(self.np_random)
        return self._seen()

    def _seen(self) -> tuple[Any, dict[str, Any]]:
        return seen_by(self.match, 0), {"legal": tuple(self.match.legal(0))}

    def is_legal(self, row: int, action: Tuple) -> bool:
        return self.match.is_legal(0, action)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        chosen = tuple(int(v) for v in action)
        if not self.match.is_legal(0, chosen):
            raise ValueError(f"{chosen} is not legal")
        self.match.play(chosen)
        while self.match.mover == 1 and not self.match.over:
            legal = self.match.legal(1)
            self.match.play(legal[self.np_random.integers(len(legal))])
        observation, info = self._seen()
        return observation, 0.0, self.match.over, False, info


class _Zoo:
    """What the two PettingZoo forms share."""

    possible_agents = ("first", "second")
    action_spec = SPEC

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.agents: list[str] = []

    def observation_space(self, agent: str) -> Any:
        return SPACE

    def action_space(self, agent: str) -> Any:
        return SPEC.action_space

    def start(self, seed: int | None) -> None:
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.match = Match(self.rng)
        self.agents = list(self.possible_agents)

    def is_legal(self, row: str, action: Tuple) -> bool:
        return self.match.is_legal(self.possible_agents.index(row), action)

    def play(self, action: Any) -> None:
        chosen = tuple(int(v) for v in action)
        if not self.match.is_legal(self.match.mover, chosen):
            raise ValueError(f"{chosen} is not legal")
        self.match.play(chosen)

    def close(self) -> None:
        pass


class Parallel(_Zoo, pettingzoo.ParallelEnv):
    """The game as a PettingZoo ParallelEnv: the waiting player's action is ignored."""

    def to_move(self, row: str) -> bool:
        return self.possible_agents[self.match.mover] == row

    def _seen(self) -> dict[str, Any]:
        return {agent: seen_by(self.match, i) for i, agent in enumerate(self.possible_agents)}

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        self.start(seed)
        return self._seen(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
        self.play(actions[self.possible_agents[self.match.mover]])
        agents = list(self.agents)
        over = dict.fromkeys(agents, self.match.over)
        if self.match.over:
            self.agents = []
        zeros = dict.fromkeys(agents, 0.0)
        return self._seen(), zeros, over, dict.fromkeys(agents, False), {a: {} for a in agents}


class AEC(_Zoo, pettingzoo.AECEnv):
    """The game as a PettingZoo AECEnv; ``leaky`` shows the waiting player the mover's list."""

    def __init__(self, leaky: bool = False) -> None:
        super().__init__()
        self.leaky = leaky

    def reset(self, seed: int | None = None, options: Any = None) -> None:
        self.start(seed)
        self.rewards = dict.fromkeys(self.agents, 0.0)
        self._cumulative_rewards = dict.fromkeys(self.agents, 0.0)
        self.terminations = dict.fromkeys(self.agents, False)
        self.truncations = dict.fromkeys(self.agents, False)
        self.infos: dict[str, Any] = {agent: {} for agent in self.agents}
        self.agent_selection = "first"

    def observe(self, agent: str) -> dict[str, Any]:
        player = self.possible_agents.index(agent)
        return seen_by(self.match, self.match.mover if self.leaky else player)

    def step(self, action: Any) -> None:
        if self.terminations[self.agent_selection]:
            assert action is None
            self.agents.remove(self.agent_selection)
            if self.agents:
                self.agent_selection = self.agents[0]
            return
        self.play(action)
        if self.match.over:
            self.terminations = dict.fromkeys(self.agents, True)
        self.agent_selection = self.possible_agents[self.match.mover]
