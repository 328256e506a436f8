"""Essence Wars with both players of each game as agents, as a native PufferLib environment.

One policy plays both sides, so it learns by self-play. In every state one of the players waits: its
list is empty, it plays the no-op, and the policy gradient of its row is zero. These are half of all
rows, and that changes the trainer's numbers. If a share s of the rows has a list, here 1/2:

- The reported entropy is the mean over all rows: divide it by s for that of the decisions. KL and
  the clipped fraction likewise.
- The policy's and the entropy's part of the loss are means over all rows as well, so their
  gradients are s times those of the decisions alone, both: ``ent_coef`` weighs as much as ever.
- The value loss is a mean over all rows, and has a gradient in each. Against it, and against
  ``max_grad_norm``, the other two gradients are smaller by s. `tcg_flatpolicy.puffer.compensated`
  multiplies ``vf_coef`` and ``max_grad_norm`` by s, so the whole gradient is s times what it was,
  and Adam ignores a common factor.
- Advantages are normalised with the mean and the deviation of all rows. Here those of waiting rows
  deviate as much as those of decisions (0.90 times in the first rollout, 1.01 to 1.03 later), and
  the policy gradient has a cosine of 0.999 with the one normalised without waiting rows. Nothing
  needs to be changed. If the waiting player sees nothing, as in `EssenceWarsParallel`, all its
  states have one value, their advantages deviate up to 1.9 times as much, and the policy gradient
  is 0.33 times that of the decisions instead of 0.5: ``ent_coef`` weighs up to 1.5 times as much.
- Each row counts as a step, so one action of a game counts as two.

These are figures of ``benchmarks/two_players.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pufferlib
import torch

from tcg_flatpolicy.games.essence_wars import engine as ew
from tcg_flatpolicy.games.essence_wars.encoder import EssenceWarsEncoder
from tcg_flatpolicy.games.essence_wars.environment import EssenceWars


class EssenceWarsTwoPlayers(pufferlib.PufferEnv):  # type: ignore[misc]
    """Many games of Essence Wars in one process; two agents a game, its two players.

    Rows 2g and 2g + 1 are the first and the second player of game g. The player to move sees what
    `EssenceWars` shows: the engine's state, in which the cards of both hands are. A policy that was
    trained in one of the two environments plays in the other. The waiting player has an empty list
    and must send the no-op. It sees the game from its own side, because the value of its row is a
    target for the rows before. In its view the player to move is 1, and the cards in the opponent's
    hand are 0.

    At the end of a game the winner's row gets +1 and the loser's -1, whoever moved last. Both rows
    are terminal, and the next game starts in the same step.

    Infos are those of `EssenceWars`: ``win``, ``draw`` and ``episode_return`` are the first
    player's, and ``episode_length`` counts the actions of both.

    Args:
        num_games: number of games played at the same time; num_agents is twice that.
        deck1: the first player's deck, as for `EssenceWars`.
        deck2: the second player's.
        game_mode: "attrition" or "essence_duel".
        illegal: what an illegal action does, as for `EssenceWars`. From a waiting player everything
            but the no-op is illegal: "random" and "noop" count it, and play nothing.
        record: keep every action, for `state_dict`, as for `EssenceWars`.
        seed: random seed of decks and games; `reset(seed)` sets a new one.
        buf: PufferLib's shared buffers.

    Raises:
        ValueError: as `EssenceWars`.

    Attributes:
        action_spec: `SPEC`.
        legal_layout: where the legal list lies in an observation.
        observation_dtype: `OBSERVATION_DTYPE`; observations are (2 * num_games, itemsize) uint8.
        games: the `EssenceWars` with opponent "self" that plays them.
        agents_per_game: 2; `tcg_flatpolicy.app.evaluate` reads it.
    """

    agents_per_game = 2

    def __init__(
        self,
        num_games: int = 256,
        deck1: str = "artificer_tokens",
        deck2: str = "broodmother_pack",
        game_mode: str = "attrition",
        illegal: Literal["raise", "random", "noop"] = "raise",
        record: bool = False,
        seed: int = 0,
        buf: dict[str, Any] | None = None,
    ) -> None:
        self.games = EssenceWars(
            num_games, deck1, deck2, "self", game_mode, illegal, record=record, seed=seed
        )
        self.action_spec = ew.SPEC
        self.observation_dtype = ew.OBSERVATION_DTYPE
        self.legal_layout = ew.LAYOUT
        self.single_observation_space = self.games.single_observation_space
        self.single_action_space = ew.SPEC.action_space
        self.num_agents = 2 * num_games
        super().__init__(buf)
        self._illegal = illegal
        self._game = np.arange(num_games)
        # Of game and player.
        self._rows = self.observations.reshape(num_games, 2, -1)
        self._states = self.observations.view(ew.OBSERVATION_DTYPE)["state"].reshape(
            num_games, 2, -1
        )
        self._paid = self.rewards.reshape(num_games, 2)
        self._over = self.terminals.reshape(num_games, 2)

    @property
    def illegal_actions(self) -> int:
        """Number of illegal actions since the environment was made."""
        return self.games.illegal_actions

    def reset(self, seed: int | None = None) -> tuple[npt.NDArray[np.uint8], list[dict[str, Any]]]:
        """Starts all games; ``seed`` seeds the generator, None keeps its state.

        Returns:
            ``(observations (2 * num_games, itemsize) uint8, [])``
        """
        self.games.reset(seed)
        self.rewards[:] = 0
        self.terminals[:] = False
        self.truncations[:] = False
        self._observe()
        return self.observations, []

    def step(self, actions: npt.NDArray[Any]) -> tuple[Any, Any, Any, Any, list[dict[str, Any]]]:
        """Plays one action in each game: that of the row that is to move.

        Args:
            actions: (2 * num_games, 4) integers; the no-op in the rows of waiting players.

        Returns:
            ``(observations, rewards, terminals, truncations, infos)``, all but the infos in the
            buffers.

        Raises:
            RuntimeError: before `reset`.
            TypeError: actions are not integers.
            ValueError: actions of another shape, or one that is not legal; it is named.
        """
        if not self.games._started:
            raise RuntimeError("EssenceWarsTwoPlayers.step before reset; call reset() first")
        actions = np.asarray(actions)
        if actions.shape != (self.num_agents, 4):
            raise ValueError(f"actions must be ({self.num_agents}, 4), got {actions.shape}")
        moves = actions.reshape(-1, 2, 4)
        mover = self.games.second_to_move.astype(np.intp)
        self._check_waiting(moves[self._game, 1 - mover], 1 - mover)
        _, result, over, _, infos = self.games.step(moves[self._game, mover])
        self._paid[self._game, mover], self._paid[self._game, 1 - mover] = result, -result
        self._over[:] = over[:, None]
        for info in infos:  # there it is that of the player who moved last
            info["episode_return"] = self._paid[over, 0].tolist()
        self._observe()
        return self.observations, self.rewards, self.terminals, self.truncations, infos

    def state_dict(self) -> dict[str, Any]:
        """The state of the games, in tensors and plain values, as `EssenceWars.state_dict`."""
        return {"games": self.games.state_dict(), "rewards": torch.tensor(self.rewards)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the games, as `EssenceWars.load_state_dict`."""
        self.games.load_state_dict(state["games"])
        self.rewards[:] = state["rewards"].numpy()
        self._over[:] = self.games.terminals[:, None]
        self.truncations[:] = False
        self._observe()

    def make_encoder(self, hidden_size: int = 256, entity_size: int = 32) -> EssenceWarsEncoder:
        """A new encoder of this environment's observations; sizes as of `EssenceWarsEncoder`."""
        return EssenceWarsEncoder(ew.LAYOUT, hidden_size, entity_size)

    def to_move(self, row: int) -> bool:
        """Whether the row's player is to move. `tcg_flatpolicy.verify` asks for it."""
        return bool(self.games.second_to_move[row // 2]) == bool(row % 2)

    def close(self) -> None:
        """Does nothing: there is nothing to free."""

    def _check_waiting(self, actions: npt.NDArray[Any], waits: npt.NDArray[np.intp]) -> None:
        """Counts what waiting players (num_games,) sent, (num_games, 4), other than the no-op."""
        illegal = np.flatnonzero((actions != ew.SPEC.noop).any(axis=1))
        if not len(illegal):
            return
        self.games.count_illegal(illegal)
        if self._illegal == "raise":
            game = int(illegal[0])
            row = 2 * game + int(waits[game])
            raise ValueError(f"row {row}: {waiting_refusal(actions[game].tolist())}")

    def _observe(self) -> None:
        """Shows each game to its two players."""
        mover = self.games.second_to_move.astype(np.intp)
        seen = self.games.observations
        self._rows[self._game, mover] = seen
        self._rows[self._game, 1 - mover] = 0
        state = seen.view(ew.OBSERVATION_DTYPE)["state"][:, 0]
        self._states[self._game, 1 - mover] = waiting_view(state)


def waiting_view(state: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The waiting player's view of a state, made from that of the player to move.

    Args:
        state: (n, 356) float32, the view of the player to move.

    Returns:
        (n, 356) float32: from the other side, with 1 as the player to move, and 0 for each card in
        the opponent's hand. The size of that hand is kept.
    """
    turned = ew.second_players_view(state)
    turned[:, ew.PLAYER_TO_MOVE] = 1
    opponent = ew.PLAYERS + ew.PLAYER_SIZE
    turned[:, opponent + 5 : opponent + 5 + ew.HAND] = 0
    mine = ew.cards_held(turned[:, ew.PLAYERS : opponent])
    hand = np.rint(turned[:, opponent + 4, None] * ew.HAND).astype(np.int64)
    place = np.arange(ew.MOST_CARDS)
    cards = turned[:, ew.CARDS : ew.CARDS + ew.MOST_CARDS]
    cards[(place >= mine) & (place < mine + hand)] = 0
    return turned


def waiting_refusal(action: list[int]) -> str:
    """Why a waiting player may not send a tuple."""
    return (
        f"{tuple(action)} from a player who waits: its list is empty, so it must send the no-op "
        f"{tuple(ew.SPEC.noop.tolist())}"
    )
