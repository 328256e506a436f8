"""Many games of Essence Wars against a built-in opponent, as a native PufferLib environment."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import gymnasium
import numpy as np
import numpy.typing as npt
import pufferlib
import torch
from essence_wars._core import ACTION_SPACE_SIZE, PyGame, PyParallelGames

from tcg_flatpolicy.games.essence_wars import engine as ew
from tcg_flatpolicy.games.essence_wars.encoder import Described

# The engine allocates its answers anew at each call. For more games than this they are so large
# that their memory goes back to the system each time, and faulting it in costs more than the copy.
GAMES_IN_BATCH = 256

_OTHER_GAMES = (
    "replaying the saved actions led to other games than those saved: the decks, the opponent, the "
    "mode and the release of essence-wars must be the same"
)

# A legal tuple is four bytes, so it is written as one word.
_TUPLE_WORDS = ew.INDEX_TO_TUPLE.view(np.uint32)[:, 0]
_LEGAL_WORD = ew.OBSERVATION_DTYPE.fields["legal"][1] // 4  # type: ignore[index]


class NativeGames(Described, pufferlib.PufferEnv):  # type: ignore[misc]
    """What the native environments share: their buffers, and the check of the actions' form.

    Observations are (num_agents, itemsize) uint8, records of ``observation_dtype``.
    """

    observation_dtype = ew.OBSERVATION_DTYPE
    _started = False

    def __init__(self, num_agents: int, buf: dict[str, Any] | None) -> None:
        shape = (ew.OBSERVATION_DTYPE.itemsize,)
        self.single_observation_space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        self.single_action_space = ew.SPEC.action_space
        self.num_agents = num_agents
        super().__init__(buf)

    def close(self) -> None:
        """Does nothing: there is nothing to free."""

    def _clear(self) -> None:
        """Fills the buffers as for games that have just started."""
        self.rewards[:] = 0
        self.terminals[:] = False
        self.truncations[:] = False
        self._started = True

    def _checked(self, sent: Any) -> npt.NDArray[Any]:
        """The actions as an array (num_agents, 4) of integers; raises if they are none."""
        if not self._started:
            raise RuntimeError(f"{type(self).__name__}.step before reset; call reset() first")
        actions: npt.NDArray[Any] = np.asarray(sent)
        if actions.shape != (self.num_agents, 4):
            raise ValueError(f"actions must be ({self.num_agents}, 4), got {actions.shape}")
        if actions.dtype.kind not in "iu":
            raise TypeError(f"actions must be integers, got {actions.dtype}")
        return actions


class EssenceWars(NativeGames):
    """Many games of Essence Wars in one process; one agent a game, the first player.

    `step` plays its action and then the built-in opponent's. The reward is +1 when a game is won,
    -1 when it is lost, else 0. The engine decides a game at turn 30 at the latest. The end of a
    game is terminal, never truncated, and the next game starts in the same step, with a seed from
    this environment's own generator: the same seed and actions give the same run.

    With ``opponent="self"`` a row is the player to move, who sees the state from its own side, and
    the reward goes to the player who has just moved. Two successive rows of a game may belong to
    opponents, and a value target that is bootstrapped from the next row then has the wrong sign:
    take it for data and for returns of whole games of one player, and `EssenceWarsTwoPlayers`,
    where each player has a row, for PPO.

    When games end, `step` returns one info: lists with one entry a finished game, so that
    PufferLib's trainer averages over games. ``win`` and ``draw`` (of the first player),
    ``episode_return``, ``episode_length`` (actions of the agent; with "self", of both players),
    ``legal_actions`` (their mean number in a state) and ``illegal_actions`` (chosen in that game).

    Args:
        num_games: number of games played at the same time; ``num_agents``.
        deck1: the agent's deck, one of `DECKS` or of the engine's test decks, or "random": a new
            one of `DECKS` for each game. The engine takes one pair of decks a batch, so random
            decks are batches of one game, which costs about a third of the environment's speed.
        deck2: the opponent's deck, likewise.
        opponent: "greedy", "random" or "self"; or "mcts<N>" or "alphabeta<N>", which are slow.
        game_mode: "attrition" or "essence_duel".
        illegal: "raise" raises at an action that is not listed; take it for a policy that samples
            from the legal list. "random" plays a uniformly drawn legal action instead, "noop" ends
            the turn, and both count it. (What a worker raises, PufferLib's Multiprocessing prints
            and then waits for it for ever; look for such an error under Serial.)
        record: keep every action since the last `reset(seed)`, two bytes each, for `state_dict`;
            with ``illegal="raise"`` only.
        seed: random seed of decks, games and opponent; `reset(seed)` sets a new one.
        buf: PufferLib's shared buffers.

    Raises:
        ValueError: no game, a deck, opponent or mode that does not exist, or ``record`` where
            illegal actions are replaced.

    Attributes:
        illegal_actions: int, number of illegal actions since the environment was made.
        second_to_move: (num_games,) bool, whether the second player is to move; always False
            without "self".
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
            if deck not in ("random", *PyGame.list_decks()):
                known = f"'random' or one of {ew.DECKS}"
                raise ValueError(f"{name}={deck!r} is not a deck; take {known}")
        if game_mode not in ew.GAME_MODES:
            raise ValueError(f"game_mode={game_mode!r} does not exist; take one of {ew.GAME_MODES}")
        if illegal not in ("raise", "random", "noop"):
            known = "'raise', 'random' or 'noop'"
            raise ValueError(f"illegal={illegal!r} does not exist; take {known}")
        if record and illegal != "raise":
            raise ValueError(
                f"record=True with illegal={illegal!r}: what replaced an illegal action cannot be "
                "replayed; take illegal='raise'"
            )
        super().__init__(num_games, buf)
        self._records = self.observations.view(ew.OBSERVATION_DTYPE)[:, 0]
        words = slice(_LEGAL_WORD, _LEGAL_WORD + ew.MAX_LEGAL)
        self._legal_words = self.observations.view(np.uint32)[:, words]
        self.illegal_actions = 0
        self.illegal = illegal
        self._record = record
        self._seed: int | None = None
        self._played: list[npt.NDArray[np.uint16]] = []
        self._decks = (deck1, deck2)
        self._rules = [game_mode, opponent]
        self._self_play = opponent == "self"
        self._rng = np.random.default_rng(seed)
        self._rows = np.arange(num_games)
        self._batch_size = 1 if "random" in self._decks else GAMES_IN_BATCH
        starts = range(0, num_games, self._batch_size)
        self._slices = [slice(start, min(start + self._batch_size, num_games)) for start in starts]
        self._batches = [self._new_batch(rows) for rows in self._slices]
        self._mask = np.zeros((num_games, ACTION_SPACE_SIZE), dtype=bool)
        self._n_legal = np.zeros(num_games, dtype=np.int64)
        self.second_to_move = np.zeros(num_games, dtype=bool)
        self._counters = np.zeros((3, num_games), dtype=np.int64)  # of the running games
        self._moves, self._legal_seen, self._illegal_seen = self._counters

    def reset(self, seed: int | None = None) -> tuple[npt.NDArray[np.uint8], list[dict[str, Any]]]:
        """Starts all games; ``seed`` seeds the generator, None keeps its state.

        Returns:
            ``(observations (num_games, itemsize) uint8, [])``
        """
        self._seed, self._played = seed, []
        if seed is not None:
            self._rng = np.random.default_rng(seed)
            # A batch's built-in opponent draws from a generator that it keeps from game to game.
            self._batches = [self._new_batch(rows) for rows in self._slices]
        self._start(range(self.num_agents))
        self._clear()
        self._observe()
        return self.observations, []

    def step(self, actions: npt.NDArray[Any]) -> tuple[Any, Any, Any, Any, list[dict[str, Any]]]:
        """Plays (num_games, 4) integers, a legal tuple of each game, and the opponent's answers.

        Returns:
            ``(observations, rewards, terminals, truncations, infos)``, all but the infos in the
            buffers.

        Raises:
            RuntimeError: before `reset`.
            TypeError: actions are not integers.
            ValueError: actions of another shape, or one that is not legal; it is named, with the
                legal ones nearest to it.
        """
        chosen = self._to_index(self._checked(actions)).astype(np.uint16)
        self._moves += 1
        self._legal_seen += self._n_legal
        if self._record:
            self._played.append(chosen)
        result = self._advance(chosen)
        self.rewards[:] = np.where(self.second_to_move, -result, result)
        ended = np.flatnonzero(self.terminals)
        infos = [self._info(ended, result[ended])] if len(ended) else []
        self._start(ended.tolist())
        self._observe()
        return self.observations, self.rewards, self.terminals, self.truncations, infos

    def to_move(self, row: int) -> bool:
        """Always True: a row is the player to move. `tcg_flatpolicy.verify` asks for it."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """The state of the games, in tensors and plain values: the seed and every action since.

        The engine can neither save a game nor set its built-in opponent's generator, which it keeps
        from game to game. So the actions of the running games alone would not be enough.

        Raises:
            RuntimeError: made without ``record``, or the last `reset` had no seed.
        """
        if not self._record or self._seed is None:
            raise RuntimeError(
                "EssenceWars.state_dict needs the actions since a reset with a seed: make it with "
                "record=True, and call reset(seed)"
            )
        played = np.array(self._played, dtype=np.int16).reshape(-1, self.num_agents)
        return {
            "seed": self._seed,
            "actions": torch.from_numpy(played),
            "rewards": torch.tensor(self.rewards),
            "counters": torch.tensor(self._counters),
            "illegal_actions": self.illegal_actions,
            "observations": hashlib.sha256(self.observations.tobytes()).hexdigest(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the games by playing all saved actions again.

        Observations, rewards, terminals and statistics become those after the last action. It plays
        25,000 to 50,000 actions a second on one core.

        Raises:
            ValueError: the state is of another number of games.
            RuntimeError: the games differ from the saved ones: the decks, the opponent or the
                release of the game are others.
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
                self._start(np.flatnonzero(self.terminals).tolist())
        except ValueError as error:
            raise RuntimeError(f"{_OTHER_GAMES}: {error}") from error
        self.rewards[:] = state["rewards"].numpy()
        self._counters[:] = state["counters"].numpy()
        self.illegal_actions = state["illegal_actions"]
        self._observe()
        if hashlib.sha256(self.observations.tobytes()).hexdigest() != state["observations"]:
            raise RuntimeError(_OTHER_GAMES)
        if self._record:
            self._played = list(played)

    def _new_batch(self, rows: slice) -> PyParallelGames:
        decks = [str(self._rng.choice(ew.DECKS)) if d == "random" else d for d in self._decks]
        return PyParallelGames(rows.stop - rows.start, *decks, *self._rules)

    def _start(self, games: Iterable[int]) -> None:
        """Starts a new game in the place of each of these."""
        self._counters[:, list(games)] = 0
        for game in games:
            batch, place = divmod(game, self._batch_size)
            if "random" in self._decks:
                self._batches[batch] = self._new_batch(self._slices[batch])
            self._batches[batch].reset_single(place, int(self._rng.integers(2**63)))

    def _advance(self, chosen: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        """Plays the engine's indices (num_games,), and writes the terminals.

        The result (num_games,) is 1 if the first player won, -1 if it lost, else 0.
        """
        result = np.empty(self.num_agents, dtype=np.float32)
        for rows, batch in zip(self._slices, self._batches, strict=True):
            result[rows], self.terminals[rows] = batch.step_batch(chosen[rows])
        return result

    def _info(self, ended: npt.NDArray[np.intp], result: npt.NDArray[Any]) -> dict[str, Any]:
        moves = self._moves[ended]
        return {
            "win": (result > 0).astype(float).tolist(),
            "draw": (result == 0).astype(float).tolist(),
            "episode_return": self.rewards[ended].tolist(),
            "episode_length": moves.tolist(),
            "legal_actions": (self._legal_seen[ended] / moves).tolist(),
            "illegal_actions": self._illegal_seen[ended].tolist(),
        }

    def _observe(self) -> None:
        """Writes state and legal list of each game into the observations."""
        for rows, batch in zip(self._slices, self._batches, strict=True):
            self._records["state"][rows] = batch.observe_batch()
            np.not_equal(batch.action_mask_batch(), 0, out=self._mask[rows])
        if self._self_play:
            state = self._records["state"]
            second = self.second_to_move = state[:, ew.PLAYER_TO_MOVE] != 0
            state[second] = ew.second_players_view(state[second])

        listed = np.flatnonzero(self._mask)
        ends = np.searchsorted(listed, (self._rows + 1) * ACTION_SPACE_SIZE)
        counts = self._n_legal = np.diff(ends, prepend=0)
        if not counts.all():
            raise RuntimeError(
                f"game {int(counts.argmin())}: the engine lists no legal action for the player to "
                "move, who can always end the turn; check it against another release of the game"
            )
        ew.check_room(counts)
        game = np.repeat(self._rows, counts)
        place = np.arange(len(listed)) - (ends - counts)[game]
        self._legal_words[:] = 0
        self._legal_words[game, place] = _TUPLE_WORDS[listed - game * ACTION_SPACE_SIZE]
        self._records["n_legal"] = counts

    def _to_index(self, actions: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """(num_games, 4) tuples -> (num_games,) legal indices of the engine."""
        index, legal = ew.look_up(actions, self._mask)
        if legal.all():
            return index
        illegal = np.flatnonzero(~legal)
        self.count_illegal(illegal)
        if self.illegal == "raise":
            row = int(illegal[0])
            raise ValueError(f"game {row}: {ew.refusal(actions[row].tolist(), self._mask[row])}")
        if self.illegal == "noop":  # always legal
            index[illegal] = ew.TUPLE_TO_INDEX[ew.SPEC.ravel(ew.SPEC.noop)]
        else:
            instead = np.flatnonzero(self._mask[illegal]) % ACTION_SPACE_SIZE
            counts = self._n_legal[illegal]
            drawn = (self._rng.random(len(illegal)) * counts).astype(np.int64)
            index[illegal] = instead[counts.cumsum() - counts + drawn]
        return index

    def count_illegal(self, games: npt.NDArray[np.intp]) -> None:
        """Counts an illegal action in each of these games, none of them listed twice."""
        self.illegal_actions += len(games)
        self._illegal_seen[games] += 1
