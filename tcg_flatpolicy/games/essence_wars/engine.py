"""What the engine's actions and states mean, as data and functions of arrays.

The engine (package ``essence-wars``) numbers its actions 0..541 and gives the legal ones as a 0/1
mask. Here an action is a tuple (`SPEC`), and an observation (`OBSERVATION_DTYPE`) holds the state
and the list of the legal tuples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from essence_wars._core import STATE_TENSOR_SIZE

from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.spec import ActionSpec, Entity, Index, OneOf, Primary

HAND, BOARD, SUPPORTS, PLACES = 10, 5, 2, 12
"""Cards in a hand, creatures and supports on a board, and places that a card can be played to."""

SPEC = ActionSpec(
    [
        Primary("end_turn"),
        Primary("play_card", Entity("hand", HAND), Index("place", PLACES)),
        # An attack on an empty enemy place hits the enemy player; the encoder's row for that place
        # says that it is empty.
        Primary("attack", Entity("ally", BOARD), Entity("enemy", BOARD)),
        Primary(
            "use_ability",
            Entity("ally", BOARD),
            Index("ability", 5),
            OneOf(Index("no_target", 1), Entity("enemy", BOARD), Entity("ally", BOARD)),
        ),
        Primary("commander_insight"),
        Primary("play_card_overload", Entity("hand", HAND), Index("place", PLACES)),
    ]
)
"""What an action tuple means: MultiDiscrete [6, 10, 12, 11], the no-op (0, 0, 0, 0) is end_turn."""


def _block(primary: int, *sizes: int) -> npt.NDArray[np.uint8]:
    """(prod(sizes), 4): every tuple of a primary, the last slot running fastest."""
    table = np.zeros((int(np.prod(sizes)), 4), dtype=np.uint8)
    table[:, 0] = primary
    table[:, 1 : 1 + len(sizes)] = np.indices(sizes).reshape(len(sizes), -1).T
    return table


INDEX_TO_TUPLE = np.concatenate(
    [
        _block(1, HAND, PLACES),  # 0..119 PlayCard
        _block(2, BOARD, BOARD),  # 120..144 Attack
        _block(3, BOARD, 5, 1 + 2 * BOARD),  # 145..419 UseAbility
        _block(4, 1),  # 420 CommanderInsight
        _block(0, 1),  # 421 EndTurn
        _block(5, HAND, PLACES),  # 422..541 PlayCardOverload
    ]
)
"""(542, 4) uint8: the tuple of each of the engine's action indices."""

TUPLE_TO_INDEX = np.full(int(SPEC.nvec.prod()), -1, dtype=np.int64)
"""(7920,) int64: the engine's index of each tuple, by ``SPEC.ravel``; -1 where it has none."""
TUPLE_TO_INDEX[SPEC.ravel(INDEX_TO_TUPLE)] = np.arange(len(INDEX_TO_TUPLE))

MAX_LEGAL = 128
"""Room for legal tuples in an observation. The most seen in 2.5 million states, of all pairs of
decks and also of players who hoard cards and creatures, is 64."""

OBSERVATION_DTYPE = np.dtype(
    [
        ("state", np.float32, (STATE_TENSOR_SIZE,)),
        ("legal", np.uint8, (MAX_LEGAL, 4)),
        ("n_legal", np.int16),
    ],
    align=True,
)
"""One observation: the engine's state as the player to move sees it, and that player's legal tuples
(zeros after the first ``n_legal``)."""

LAYOUT = LegalLayout.from_dtype(OBSERVATION_DTYPE, count="n_legal", actions="legal", spec=SPEC)

DECKS = (
    "alpha_frenzy",
    "architect_fortify",
    "archon_burst",
    "artificer_tokens",
    "broodmother_pack",
    "deathmaster_assassin",
    "grove_regenerate",
    "plague_volatile",
    "sanctum_healer",
    "shadow_weaver",
    "sovereign_lifesteal",
    "vex_piercing",
)
"""The engine's real decks; the others that it lists are for its own tests."""

GAME_MODES = ("attrition", "essence_duel")

# Where things lie in the state: six global numbers, then 89 of each player, then the ids of cards,
# packed: hand, creatures and supports of one player, then of the other; the commanders come last.
PLAYER_TO_MOVE = 1
PLAYERS, PLAYER_SIZE = 6, 89
CARDS = PLAYERS + 2 * PLAYER_SIZE
COMMANDERS = STATE_TENSOR_SIZE - 2
MOST_CARDS = 2 * (HAND + BOARD + SUPPORTS)
# Of a player: five numbers (the last is the size of the hand, in tenths), the ids of the hand, a
# record of 12 of each creature (the first says whether there is one, the tenth has its keywords as
# bits), one of 5 of each support (the first likewise, the third is its id), and four of what is
# prepared.
CREATURE_SIZE, KEYWORD_COLUMN, KEYWORDS = 12, 9, 16
CARD_ID_SCALE, CARD_ROWS = 6000, 600


def look_up(
    actions: npt.NDArray[Any], mask: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The engine's indices (n,) int64 of tuples (n, 4) of any integers, under masks (n, 542).

    The second array, (n,) bool, says which are legal. An illegal tuple's index has no meaning.
    """
    inside = ((actions >= 0) & (actions < SPEC.nvec)).all(axis=1)
    flat = np.ravel_multi_index(tuple(actions.astype(np.int64).T), tuple(SPEC.nvec), mode="clip")
    index = TUPLE_TO_INDEX[flat]
    return index, inside & (index >= 0) & mask[np.arange(len(mask)), index]


def refusal(action: list[int], mask: npt.NDArray[np.bool_]) -> str:
    """Why a tuple is not legal under a mask (542,), with the legal ones nearest to it."""
    problem = SPEC.explain(action) or f"{SPEC.describe(action)} is not legal"
    legal = INDEX_TO_TUPLE[mask]
    order = np.argsort((legal != action).sum(axis=1), kind="stable")
    nearest = ", ".join(SPEC.describe(other) for other in legal[order[:5]])
    among = f"of the {len(legal)} legal actions these are nearest"
    return f"{tuple(action)}: {problem}; {among}: {nearest}"


def check_room(counts: npt.NDArray[np.int64]) -> None:
    """Raises ValueError if a game has more legal tuples, (games,), than `MAX_LEGAL`."""
    if counts.max() > MAX_LEGAL:
        game = int(counts.argmax())
        raise ValueError(
            f"game {game} has {counts[game]} legal actions, an observation has room for "
            f"{MAX_LEGAL}; raise MAX_LEGAL in tcg_flatpolicy/games/essence_wars/engine.py"
        )


def second_players_view(state: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The engine's states (n, 356) float32, in which player 0 comes first, as player 1 sees them.

    The players' halves and their cards are swapped, and the player to move is 0.
    """
    turned = state.copy()
    turned[:, PLAYER_TO_MOVE] = 0
    first, second = slice(PLAYERS, PLAYERS + PLAYER_SIZE), slice(PLAYERS + PLAYER_SIZE, CARDS)
    turned[:, first], turned[:, second] = state[:, second], state[:, first]
    turned[:, COMMANDERS:] = state[:, COMMANDERS:][:, ::-1]
    mine, others = cards_held(state[:, first]), cards_held(state[:, second])
    place = np.arange(MOST_CARDS)
    source = np.where(place < others, place + mine, place - others)
    source = np.where(place < mine + others, source, place)
    turned[:, CARDS : CARDS + MOST_CARDS] = np.take_along_axis(state[:, CARDS:], source, axis=1)
    return turned


def cards_held(player: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """(n, 89) of one player -> (n, 1): number of that player's cards in the packed list."""
    hand = np.rint(player[:, 4] * HAND)
    on_board = player[:, 15:75:CREATURE_SIZE].sum(axis=1) + player[:, 75:85:5].sum(axis=1)
    return np.asarray(hand + on_board, dtype=np.int64)[:, None]


def describe(state: npt.NDArray[np.float32]) -> str:
    """A state (356,) in words, a line a player; cards by the engine's ids."""
    lines = []
    for whose, begin in (("mine", PLAYERS), ("theirs", PLAYERS + PLAYER_SIZE)):
        player = state[begin : begin + PLAYER_SIZE]
        hand = np.rint(player[5:15] * CARD_ID_SCALE).astype(int)
        creatures = player[15:75].reshape(BOARD, CREATURE_SIZE)
        supports = player[75:85].reshape(SUPPORTS, -1)
        parts = {
            "hand": [f"[{place}] card {card}" for place, card in enumerate(hand) if card],
            "creatures": [
                f"[{place}] {round(10 * one[1])}/{round(10 * one[2])}"
                for place, one in enumerate(creatures)
                if one[0]
            ],
            "supports": [f"card {round(one[2] * CARD_ID_SCALE)}" for one in supports if one[0]],
        }
        words = "; ".join(f"{name} {', '.join(of) or 'none'}" for name, of in parts.items())
        lines.append(f"{whose}: life {round(30 * player[0])}; {words}")
    return "\n".join(lines)
