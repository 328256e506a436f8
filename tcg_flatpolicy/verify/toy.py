"""A small two-player game, in which bugs are planted as they are seen in the wild."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np
import pufferlib

from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.roles import Entity, Index, OneOf
from tcg_flatpolicy.spec import ActionSpec, Primary
from tcg_flatpolicy.verify.checks import Bug, bugs

PLACES, CARDS, ROOM, FACE = 4, 6, 48, 4
Tuple = tuple[int, ...]

SPEC = ActionSpec(
    [
        Primary("end_turn"),
        Primary(
            "attack",
            Entity("ally", PLACES),
            OneOf(Entity("enemy", 4), Index("face", 1)),
        ),
        Primary("play", Index("card", CARDS), Index("place", PLACES)),
        Primary("retreat", Entity("ally", PLACES)),
        Primary("trade", Entity("ally", PLACES), Entity("enemy", PLACES)),
        Primary("draw"),
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
    """What a row shows, with room for so many tuples."""
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
        """Whether the game has ended."""
        return min(self.life) <= 0 or self.moves >= 60

    def is_legal(self, player: int, action: Tuple) -> bool:
        """Whether a player may play a tuple now."""
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
        """Plays a legal tuple of the player who is to move."""
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


class Duel(pufferlib.PufferEnv):  # type: ignore[misc]
    """Games side by side; rows 2g and 2g + 1 are the two players of game g.

    Args:
        games: how many.
        fault: the name of a planted bug of `tcg_flatpolicy.verify.checks`; None is sound.
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
        self.kind = Bug if fault is None else bugs()[fault][0]
        self.illegal = illegal
        self.dtype = observation_dtype(self.kind.room or ROOM)
        self.action_spec = SPEC
        self.legal_layout = LegalLayout.from_dtype(self.dtype, "n", "legal", spec=SPEC)
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
        """As `KnowsWhoMoves.to_move`."""
        return self.matches[row // 2].mover == row % 2

    def is_legal(self, row: int, action: Tuple) -> bool:
        """As `KnowsLegality.is_legal`."""
        return self.matches[row // 2].is_legal(row % 2, self.bug.meant(action))

    def fork(self) -> Duel:
        """As `Forks.fork`."""
        twin = copy.copy(self)
        for name in ("observations", "rewards", "terminals", "truncations", "masks", "actions"):
            setattr(twin, name, getattr(self, name).copy())
        twin.matches, twin.rng = copy.deepcopy((self.matches, self.rng))
        twin.lists, twin.bug = list(self.lists), self.kind(twin.rng)
        return twin

    def list_shown(self, row: int) -> list[Tuple]:
        """The list that a row shows."""
        match, player = self.matches[row // 2], row % 2
        if match.mover != player:
            return self.bug.waits(self.said(1 - player, match))
        self.lists[row] = self.bug.shown(self.said(player, match), self.lists[row], match)
        return self.lists[row]

    def said(self, player: int, match: Match) -> list[Tuple]:
        """The list of a game's mover."""
        return self.bug.said(match.legal(player), match, player)

    def observe(self) -> None:
        """Writes what all rows show."""
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
            records[name][rows[fits], values[fits, slot]] = 1
        self.bug.written(records, some)

    def reset(self, seed: int | None = None) -> tuple[Any, list[Any]]:
        """Starts all games anew."""
        if seed is not None and self.kind.reseeds:
            self.rng = np.random.default_rng(self.kind(self.rng).seed(seed))
        self.bug = self.kind(self.rng)
        games = range(self.num_agents // 2)
        self.matches = [Match(self.bug.dealer(game)) for game in games]
        self.lists: list[list[Tuple]] = [[] for _ in range(self.num_agents)]
        self.rewards[:], self.terminals[:], self.truncations[:] = 0, False, False
        self.observe()
        return self.observations, []

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, list[Any]]:
        """Plays the action of each game's mover; a game that is over is followed by the next."""
        actions = np.asarray(actions)
        if actions.dtype.kind == "f":
            actions = self.bug.whole(actions)
        self.terminals[:] = False
        for game, match in enumerate(self.matches):
            action = self.bug.meant(tuple(actions[2 * game + match.mover].astype(int).tolist()))
            if not match.is_legal(match.mover, action):
                if self.illegal == "raise":
                    raise ValueError(f"game {game}: {action} is not legal")
                self.illegal_actions += 1
                action = (0, 0, 0)
            self.bug.played(action)
            match.play(action)
            if match.over:
                self.terminals[2 * game : 2 * game + 2] = True
                self.matches[game] = Match(self.bug.dealer(game))
        self.observe()
        return self.observations, self.rewards, self.terminals, self.truncations, []

    def close(self) -> None:
        """Nothing to close."""
