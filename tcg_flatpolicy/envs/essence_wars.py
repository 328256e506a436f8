"""Essence Wars, a real two-player card game, as a native PufferLib environment, and its encoder.

The engine (package ``essence-wars``) numbers its actions 0..541 and says which are legal in a 0/1
mask. Here they are tuples with a meaning (`SPEC`), and each observation carries the legal ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from tcg_flatpolicy.encoders import Encoding
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.spec import ActionSpec, Entity, Index, OneOf, Primary

try:
    import pufferlib
    from essence_wars._core import (
        ACTION_SPACE_SIZE,
        STATE_TENSOR_SIZE,
        PyGame,
        PyParallelGames,
    )
except ImportError as error:
    raise ImportError(
        f"tcg_flatpolicy.envs.essence_wars needs {error.name}: install PufferLib as the README "
        "says, and the game with `pip install essence-wars`"
    ) from error

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


def _index_to_tuple() -> npt.NDArray[np.uint8]:
    def block(primary: int, *sizes: int) -> npt.NDArray[np.uint8]:
        """(prod(sizes), 4): every tuple of a primary, the last slot running fastest."""
        table = np.zeros((int(np.prod(sizes)), 4), dtype=np.uint8)
        table[:, 0] = primary
        table[:, 1 : 1 + len(sizes)] = np.indices(sizes).reshape(len(sizes), -1).T
        return table

    return np.concatenate(
        [
            block(1, HAND, PLACES),  # 0..119 PlayCard
            block(2, BOARD, BOARD),  # 120..144 Attack
            block(3, BOARD, 5, 1 + 2 * BOARD),  # 145..419 UseAbility
            block(4, 1),  # 420 CommanderInsight
            block(0, 1),  # 421 EndTurn
            block(5, HAND, PLACES),  # 422..541 PlayCardOverload
        ]
    )


INDEX_TO_TUPLE = _index_to_tuple()
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

# The engine allocates its answers anew at each call. For more games than this they are so large
# that their memory goes back to the system each time, and faulting it in costs more than the copy.
GAMES_IN_BATCH = 256

GAME_MODES = ("attrition", "essence_duel")

# Where things lie in the state: six global numbers, then 89 of each player, then the ids of cards,
# packed: hand, creatures and supports of one player, then of the other; at the end the commanders.
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

_OTHER_GAMES = (
    "replaying the saved actions led to other games than those saved: the decks, the opponent, the "
    "mode and the release of essence-wars must be the same"
)

_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

_RADIX = np.append(np.cumprod(SPEC.nvec[:0:-1])[::-1], 1)
_TUPLE_WORDS = INDEX_TO_TUPLE.view(np.uint32)[:, 0]
_LEGAL_WORD = OBSERVATION_DTYPE.fields["legal"][1] // 4  # type: ignore[index]


class EssenceWars(pufferlib.PufferEnv):  # type: ignore[misc]
    """Many games of Essence Wars in one process; one agent a game.

    The agent is the game's first player and so moves first; the built-in opponent answers inside
    `step`. The reward is +1 when a game is won, -1 when it is lost, else 0. A game that ends (the
    engine decides it at turn 30) is terminal, never truncated, and the next one starts in the same
    step, with a seed from this environment's own generator: the same seed and actions give the same
    run.

    With ``opponent="self"`` each row is the player to move, who changes from step to step, and the
    state is turned round so that it is always that player's own view. The reward then goes to the
    player who just moved. Two rows of a game that follow each other may thus belong to opponents: a
    value target bootstrapped from the next row has the wrong sign there. Good for data, for playing
    against yourself and for returns of whole games, one player at a time; not for PPO, which
    `tcg_flatpolicy.envs.two_players` is for: there each player has a row.

    Whenever games end, `step` returns one info: lists with one entry a finished game, so that
    PufferLib's trainer averages over games. ``win`` and ``draw`` (of the first player),
    ``episode_return``, ``episode_length`` (actions of the agent; with "self", of both players),
    ``legal_actions`` (their mean number in a state) and ``illegal_actions`` (chosen in that game).

    Args:
        num_games: games played side by side; ``num_agents``.
        deck1: the agent's deck, one of `DECKS` or of the engine's test decks, or "random": a new
            one of `DECKS` for each game. The engine takes one pair of decks a batch, so random
            decks are batches of one game, which costs about a third of the environment's speed.
        deck2: the opponent's deck, likewise.
        opponent: "greedy", "random" or "self"; or "mcts<N>" or "alphabeta<N>", which are slow.
        game_mode: "attrition" or "essence_duel".
        illegal: what an action that is not legal does. "raise" is right for anything that samples
            from the legal list. "random" plays a uniformly drawn legal action in its place, "noop"
            ends the turn, and both count it, as engines do for policies that do not know the list.
            A tuple is legal only if it
            is listed, with 0 in unused slots. (PufferLib's Multiprocessing prints what a worker
            raises and then waits for it for ever; look for such an error under Serial.)
        record: keep every action since the last `reset(seed)`, two bytes each, for `state_dict`;
            with ``illegal="raise"`` only.
        seed: of everything random here; `reset(seed)` sets it anew.
        buf: PufferLib's shared buffers.

    Raises:
        ValueError: no game, a deck, opponent or mode that does not exist, or ``record`` where
            illegal actions are replaced.

    Attributes:
        action_spec: `SPEC`.
        legal_layout: where the legal list lies in an observation.
        observation_dtype: `OBSERVATION_DTYPE`; observations are (num_games, itemsize) uint8.
        illegal_actions: int, how many were chosen since the environment was made.
        second_to_move: (num_games,) bool, whether it is the second player's move in a game; only
            with "self" it ever is.
    """

    def __init__(
        self,
        num_games: int = 256,
        deck1: str = "artificer_tokens",
        deck2: str = "broodmother_pack",
        opponent: str = "greedy",
        game_mode: str = "attrition",
        illegal: Literal["raise", "random", "noop"] = "raise",
        record: bool = False,
        seed: int = 0,
        buf: dict[str, Any] | None = None,
    ) -> None:
        if num_games < 1:
            raise ValueError(f"num_games must be at least 1, got {num_games}")
        for name, deck in (("deck1", deck1), ("deck2", deck2)):
            if deck != "random" and deck not in PyGame.list_decks():
                raise ValueError(f"{name}={deck!r} is not a deck; take 'random' or one of {DECKS}")
        if game_mode not in GAME_MODES:
            raise ValueError(f"game_mode={game_mode!r} does not exist; take one of {GAME_MODES}")
        if illegal not in ("raise", "random", "noop"):
            raise ValueError(
                f"illegal={illegal!r} does not exist; take 'raise', 'random' or 'noop'"
            )
        if record and illegal != "raise":
            raise ValueError(
                f"record=True with illegal={illegal!r}: what replaced an illegal action cannot be "
                "replayed; take illegal='raise'"
            )
        self.action_spec = SPEC
        self.observation_dtype = OBSERVATION_DTYPE
        self.legal_layout = LAYOUT
        self.single_observation_space = gymnasium.spaces.Box(
            0, 255, (OBSERVATION_DTYPE.itemsize,), np.uint8
        )
        self.single_action_space = SPEC.action_space
        self.num_agents = num_games
        super().__init__(buf)
        self._records = self.observations.view(OBSERVATION_DTYPE)[:, 0]
        # A legal tuple is four bytes, so it is written as one word.
        words = slice(_LEGAL_WORD, _LEGAL_WORD + MAX_LEGAL)
        self._legal_words = self.observations.view(np.uint32)[:, words]

        self.illegal_actions = 0
        self._illegal = illegal
        self._record = record
        self._seed: int | None = None
        self._played: list[npt.NDArray[np.uint16]] = []
        self._decks = (deck1, deck2)
        self._rules = [game_mode, opponent]
        self._self_play = opponent == "self"
        self._rng = np.random.default_rng(seed)
        self._rows = np.arange(num_games)
        self._started = False
        self._batch_size = 1 if "random" in self._decks else GAMES_IN_BATCH
        self._slices = [
            slice(start, min(start + self._batch_size, num_games))
            for start in range(0, num_games, self._batch_size)
        ]
        self._batches = [self._new_batch(rows.stop - rows.start) for rows in self._slices]
        self._mask = np.zeros((num_games, ACTION_SPACE_SIZE), dtype=bool)
        self._n_legal = np.zeros(num_games, dtype=np.int64)
        self.second_to_move = np.zeros(num_games, dtype=bool)
        self._moves = np.zeros(num_games, dtype=np.int64)
        self._legal_seen = np.zeros(num_games, dtype=np.int64)
        self._illegal_seen = np.zeros(num_games, dtype=np.int64)

    def reset(self, seed: int | None = None) -> tuple[npt.NDArray[np.uint8], list[dict[str, Any]]]:
        """Starts all games; ``seed`` sets the generator anew, None goes on with it.

        Returns:
            ``(observations (num_games, itemsize) uint8, [])``
        """
        self._seed, self._played = seed, []
        if seed is not None:
            self._rng = np.random.default_rng(seed)
            # A batch's built-in opponent draws from a generator that goes on from game to game.
            self._batches = [self._new_batch(rows.stop - rows.start) for rows in self._slices]
        for game in range(self.num_agents):
            self._start(game)
        self.rewards[:] = 0
        self.terminals[:] = False
        self.truncations[:] = False
        for counter in (self._moves, self._legal_seen, self._illegal_seen):
            counter[:] = 0
        self._started = True
        self._observe()
        return self.observations, []

    def step(self, actions: npt.NDArray[Any]) -> tuple[Any, Any, Any, Any, list[dict[str, Any]]]:
        """Plays one action in each game, and the opponent's answer.

        Args:
            actions: (num_games, 4) integers, a legal tuple of each game.

        Returns:
            ``(observations, rewards, terminals, truncations, infos)``, all but the infos in the
            buffers.

        Raises:
            RuntimeError: before `reset`.
            TypeError: actions are not integers.
            ValueError: actions of another shape, or one that is not legal; it is named, with the
                legal ones nearest to it.
        """
        if not self._started:
            raise RuntimeError("EssenceWars.step before reset; call reset() first")
        index = self._to_index(np.asarray(actions))
        self._moves += 1
        self._legal_seen += self._n_legal

        chosen = index.astype(np.uint16)
        if self._record:
            self._played.append(chosen)
        result = self._advance(chosen)
        self.rewards[:] = np.where(self.second_to_move, -result, result)
        infos = self._finish(result)
        self._observe()
        return self.observations, self.rewards, self.terminals, self.truncations, infos

    def to_move(self, row: int) -> bool:
        """Always: a row is the player to move. For tcg_flatpolicy.verify."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """The games as they stand, in tensors and plain values: the seed and every action since.

        The engine can neither save a game nor set its built-in opponent's generator, which goes on
        from game to game; so the running games' own actions would not be enough.

        Raises:
            RuntimeError: made without ``record``, or the last `reset` had no seed.
        """
        if not self._record or self._seed is None:
            raise RuntimeError(
                "EssenceWars.state_dict needs the actions since a reset with a seed: make it with "
                "record=True, and call reset(seed)"
            )
        played = np.array(self._played, dtype=np.int16).reshape(-1, self.num_agents)
        counters = np.stack([self._moves, self._legal_seen, self._illegal_seen])
        return {
            "seed": self._seed,
            "actions": torch.from_numpy(played),
            "rewards": torch.tensor(self.rewards),
            "counters": torch.from_numpy(counters),
            "illegal_actions": self.illegal_actions,
            "observations": hashlib.sha256(self.observations.tobytes()).hexdigest(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Plays all actions again, so that the next `step` goes on from there.

        Observations, rewards, terminals and statistics become those after the last action. It takes
        a fraction of the time that they took: 25,000 to 50,000 a second on one core.

        Raises:
            ValueError: the state is of another number of games.
            RuntimeError: the games do not come out as they were: they are of other decks, another
                opponent or another release of the game.
        """
        played = state["actions"].numpy().astype(np.uint16)
        if played.shape[1] != self.num_agents:
            raise ValueError(
                f"the state is of {played.shape[1]} games, this environment has {self.num_agents}"
            )
        self.reset(state["seed"])
        try:
            for chosen in played:
                self._advance(chosen)
                for game in np.flatnonzero(self.terminals).tolist():
                    self._start(game)
        except ValueError as error:
            raise RuntimeError(f"{_OTHER_GAMES}: {error}") from error
        self.rewards[:] = state["rewards"].numpy()
        self._moves, self._legal_seen, self._illegal_seen = state["counters"].numpy().copy()
        self.illegal_actions = state["illegal_actions"]
        self._observe()
        if hashlib.sha256(self.observations.tobytes()).hexdigest() != state["observations"]:
            raise RuntimeError(_OTHER_GAMES)
        if self._record:
            self._played = list(played)

    def close(self) -> None:
        """Nothing to free: the games go with this object."""

    def _new_batch(self, games: int) -> PyParallelGames:
        decks = [str(self._rng.choice(DECKS)) if d == "random" else d for d in self._decks]
        return PyParallelGames(games, *decks, *self._rules)

    def _start(self, game: int) -> None:
        batch, place = divmod(game, self._batch_size)
        if "random" in self._decks:
            self._batches[batch] = self._new_batch(1)
        self._batches[batch].reset_single(place, int(self._rng.integers(2**63)))

    def _advance(self, chosen: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        """Plays the engine's indices (num_games,), and writes which games ended.

        Returns:
            (num_games,) what each game came to: 1 if the first player won, -1 if he lost, else 0.
        """
        result = np.empty(self.num_agents, dtype=np.float32)
        for rows, batch in zip(self._slices, self._batches, strict=True):
            result[rows], self.terminals[rows] = batch.step_batch(chosen[rows])
        return result

    def _finish(self, result: npt.NDArray[np.float32]) -> list[dict[str, Any]]:
        """Starts a new game where one ended (its ``result`` is the first player's); statistics."""
        ended = np.flatnonzero(self.terminals)
        if not len(ended):
            return []
        result, moves = result[ended], self._moves[ended]
        info = {
            "win": (result > 0).astype(float).tolist(),
            "draw": (result == 0).astype(float).tolist(),
            "episode_return": self.rewards[ended].tolist(),
            "episode_length": moves.tolist(),
            "legal_actions": (self._legal_seen[ended] / moves).tolist(),
            "illegal_actions": self._illegal_seen[ended].tolist(),
        }
        for counter in (self._moves, self._legal_seen, self._illegal_seen):
            counter[ended] = 0
        for game in ended.tolist():
            self._start(game)
        return [info]

    def _observe(self) -> None:
        """Writes state and legal list of each game into the observations."""
        for rows, batch in zip(self._slices, self._batches, strict=True):
            self._records["state"][rows] = batch.observe_batch()
            np.not_equal(batch.action_mask_batch(), 0, out=self._mask[rows])
        if self._self_play:
            state = self._records["state"]
            second = self.second_to_move = state[:, PLAYER_TO_MOVE] != 0
            state[second] = second_players_view(state[second])

        listed = np.flatnonzero(self._mask)
        ends = np.searchsorted(listed, (self._rows + 1) * ACTION_SPACE_SIZE)
        counts = self._n_legal = np.diff(ends, prepend=0)
        if not counts.all():
            raise RuntimeError(
                f"game {int(counts.argmin())}: the engine lists no legal action for the player to "
                "move, who can always end the turn; check it against another release of the game"
            )
        check_room(counts)
        game = np.repeat(self._rows, counts)
        place = np.arange(len(listed)) - (ends - counts)[game]
        self._legal_words[:] = 0
        self._legal_words[game, place] = _TUPLE_WORDS[listed - game * ACTION_SPACE_SIZE]
        self._records["n_legal"] = counts

    def _to_index(self, actions: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """(num_games, 4) tuples -> (num_games,) legal indices of the engine."""
        if actions.shape != (self.num_agents, 4):
            raise ValueError(f"actions must be ({self.num_agents}, 4), got {actions.shape}")
        if actions.dtype.kind not in "iu":
            raise TypeError(f"actions must be integers, got {actions.dtype}")
        index, legal = look_up(actions, self._mask)
        if legal.all():
            return index
        illegal = np.flatnonzero(~legal)
        self.count_illegal(illegal)
        if self._illegal == "raise":
            row = int(illegal[0])
            raise ValueError(f"game {row}: {refusal(actions[row].tolist(), self._mask[row])}")
        if self._illegal == "noop":  # always legal
            index[illegal] = TUPLE_TO_INDEX[SPEC.ravel(SPEC.noop)]
            return index
        instead = np.flatnonzero(self._mask[illegal]) % ACTION_SPACE_SIZE
        counts = self._n_legal[illegal]
        drawn = (self._rng.random(len(illegal)) * counts).astype(np.int64)
        index[illegal] = instead[counts.cumsum() - counts + drawn]
        return index

    def count_illegal(self, games: npt.NDArray[np.intp]) -> None:
        """Counts an illegal action in each of these games, none of them listed twice."""
        self.illegal_actions += len(games)
        self._illegal_seen[games] += 1


def look_up(
    actions: npt.NDArray[Any], mask: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The engine's indices of tuples.

    Args:
        actions: (n, 4) integers, of any value.
        mask: (n, 542), the engine's legal indices.

    Returns:
        (n,) int64 indices and (n,) bool, which of them are legal; the others mean nothing.
    """
    inside = ((actions >= 0) & (actions < SPEC.nvec)).all(axis=1)
    index = TUPLE_TO_INDEX[np.where(inside, actions.astype(np.int64) @ _RADIX, 0)]
    return index, inside & (index >= 0) & mask[np.arange(len(mask)), index]


def refusal(action: list[int], mask: npt.NDArray[np.bool_]) -> str:
    """Why a tuple is not legal under a mask (542,), with the legal ones nearest to it."""
    problem = SPEC.explain(action)
    if problem is None:
        problem = f"{SPEC.describe(action)} is not legal"
    legal = INDEX_TO_TUPLE[mask]
    nearest = legal[np.argsort((legal != action).sum(axis=1), kind="stable")[:5]]
    return (
        f"{tuple(action)}: {problem}; of the {len(legal)} legal actions these are nearest: "
        + ", ".join(SPEC.describe(tuple_) for tuple_ in nearest)
    )


def check_room(counts: npt.NDArray[np.int64]) -> None:
    """Raises ValueError if one of (games,) numbers of legal tuples is more than `MAX_LEGAL`."""
    if counts.max() > MAX_LEGAL:
        game = int(counts.argmax())
        raise ValueError(
            f"game {game} has {counts[game]} legal actions, an observation has room for "
            f"{MAX_LEGAL}; raise MAX_LEGAL in tcg_flatpolicy/envs/essence_wars.py"
        )


def second_players_view(state: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The engine's states, in which player 0 comes first, as player 1 sees them.

    Args:
        state: (n, 356) float32.

    Returns:
        (n, 356) float32: the players' halves and their cards swapped, and 0 as the player to move.
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
    held: npt.NDArray[np.int64] = (hand + on_board).astype(np.int64)[:, None]
    return held


class EssenceWarsEncoder(nn.Module):
    """Embeds the cards and creatures of a state, and sums the state up in one vector.

    A card in hand is the learned row of its id. A creature is its record (attack, health, whether
    it can attack, ...), its sixteen keywords and the place it stands on; an empty place has a row
    too. The state also has the ids of the cards on the board, but in the order in which they were
    played, not by place, and 0 for tokens: they count for their board as a whole only.

    Args:
        layout: finds the field ``state`` in an observation.
        hidden_size: D, width of the state's vector.
        entity_size: E, width of an entity.

    Attributes:
        entity_sizes: ``{"hand": (10, E), "ally": (5, E), "enemy": (5, E)}``.
    """

    def __init__(self, layout: LegalLayout, hidden_size: int = 256, entity_size: int = 32) -> None:
        super().__init__()
        self.layout = layout
        self.hidden_size = hidden_size
        self.entity_sizes = {
            "hand": (HAND, entity_size),
            "ally": (BOARD, entity_size),
            "enemy": (BOARD, entity_size),
        }
        self.cards = nn.Embedding(CARD_ROWS, entity_size, padding_idx=0)
        self.creature = nn.Linear(CREATURE_SIZE + KEYWORDS, entity_size)
        self.place = nn.Parameter(torch.zeros(2, BOARD, entity_size))
        # A player's numbers, and sums of the hand's, the board's, the supports' and the commander's
        # cards.
        player = 5 + 5 * SUPPORTS + 4 + 4 * entity_size
        first = nn.Linear(PLAYERS + 2 * (player + BOARD * entity_size), hidden_size)
        second = nn.Linear(hidden_size, hidden_size)
        self.trunk = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        for linear in (self.creature, first, second):
            nn.init.orthogonal_(linear.weight, 2**0.5)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.cards.weight.mul_(entity_size**-0.5)

    def forward(self, observations: Tensor) -> Encoding:
        """Encodes a batch.

        Args:
            observations: (B, nbytes) uint8, records of `OBSERVATION_DTYPE`.

        Returns:
            hidden (B, D) float and entities hand (B, 10, E), ally (B, 5, E), enemy (B, 5, E).

        Raises:
            TypeError, ValueError: observations that the layout does not fit.
        """
        state = self.layout.field(observations, "state")
        players = state[:, PLAYERS:CARDS].view(len(state), 2, PLAYER_SIZE)
        numbers, hand = players[..., :5], players[..., 5:15]
        creatures = players[..., 15:75].view(len(state), 2, BOARD, CREATURE_SIZE)
        supports, prepared = players[..., 75:85], players[..., 85:]

        bits = (creatures[..., KEYWORD_COLUMN, None] * 65535).round().int()
        keywords = (bits >> torch.arange(KEYWORDS, device=state.device, dtype=torch.int32)) & 1
        records = [creatures.transpose(0, 1), keywords.transpose(0, 1).to(state.dtype)]
        units = torch.relu(self.creature(torch.cat(records, dim=3)) + self.place.unsqueeze(1))
        ally, enemy = units.unbind()  # (B, 5, E), contiguous: the scorer gathers from them

        ids = [hand, _board_ids(state, players), supports[..., 2::5], state[:, COMMANDERS:, None]]
        rows = _card_rows(torch.cat(ids, dim=2))  # (B, 2, 10 + 5 + 2 + 1)
        sums = self._sums(rows)
        everything = [state[:, :PLAYERS], numbers, supports, prepared, ally, enemy, sums]
        hidden = self.trunk(torch.cat([part.flatten(1) for part in everything], dim=1))
        cards = self.cards(rows[:, 0, :HAND])  # (B, 10, E)
        return Encoding(hidden, {"hand": cards, "ally": ally, "enemy": enemy})

    def _sums(self, rows: Tensor) -> Tensor:
        """(B, 2, 18) rows of cards -> (B, 2, 4, E): sums of hand, board, supports, commander."""
        if _is_exporting():  # bags become a loop over them there
            kinds = self.cards(rows).split([HAND, BOARD, SUPPORTS, 1], dim=2)
            return torch.stack([kind.sum(2) for kind in kinds], dim=2)
        groups = torch.arange(0, rows.numel(), rows.shape[2], device=rows.device)[:, None]
        groups = groups + groups.new_tensor([0, HAND, HAND + BOARD, HAND + BOARD + SUPPORTS])
        # One bag for each group: the rows of all cards, once summed, are never laid out in memory.
        sums = functional.embedding_bag(
            rows.flatten(), self.cards.weight, groups.flatten(), mode="sum", padding_idx=0
        )
        return sums.view(len(rows), 2, 4, self.cards.embedding_dim)


def _board_ids(state: Tensor, players: Tensor) -> Tensor:
    """The ids of the cards on each board, as the state holds them: (B, 2, 5), in order of play.

    Args:
        state: (B, 356) float32.
        players: (B, 2, 89), the two players' part of it.
    """
    hand = (players[..., 4] * HAND).round().long()
    creatures = players[..., 15:75:CREATURE_SIZE].sum(dim=2).long()
    held = hand + creatures + players[..., 75:85:5].sum(dim=2).long()
    start = torch.stack([hand[:, 0], held[:, 0] + hand[:, 1]], dim=1)
    place = torch.arange(BOARD, device=state.device)
    at = (start[..., None] + place).clamp(0, MOST_CARDS - 1)
    ids = state[:, CARDS : CARDS + MOST_CARDS].gather(1, at.flatten(1)).view_as(at)
    return ids * (place < creatures[..., None])


def _card_rows(ids: Tensor) -> Tensor:
    """Rows of the card table of ids as the state holds them, divided by 6000; 0 for no card.

    The engine counts the cards of each of its five sets from a full thousand, so far to 82. An id
    beyond row 99 of its set, or of no set, shares the unused row 1.
    """
    ids = (ids * CARD_ID_SCALE).round().long()
    rows = ids // 1000 * 100 + ids % 1000
    known = (ids == 0) | ((ids >= 1000) & (ids < CARD_ID_SCALE) & (ids % 1000 < 100))
    return torch.where(known, rows, 1)
