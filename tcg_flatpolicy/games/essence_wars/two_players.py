"""Essence Wars with both players of each game as agents, as a native PufferLib environment.

One policy plays both sides, so it learns by self-play. In every state one of the players waits: its
list is empty, it plays the no-op, and the policy gradient of its row is zero. If a share s of the
rows has a list, here 1/2, the trainer's numbers change:

- The reported entropy, KL and clipped fraction are means over all rows: divide them by s for those
  of the decisions. Each row counts as a step, so one action of a game counts as two.
- The policy's and the entropy's loss are means over all rows, so both gradients are s times those
  of the decisions alone, and ``ent_coef`` weighs as much as ever.
- The value loss has a gradient in each row, so against it and ``max_grad_norm`` the other two are
  smaller by s. `tcg_flatpolicy.puffer.compensated` multiplies ``vf_coef`` and ``max_grad_norm`` by
  s. Then the whole gradient is s times what it was, and Adam ignores a common factor.
- Advantages are normalised with the mean and the deviation of all rows. Those of waiting rows
  deviate as much as the others (0.90 times in the first rollout, 1.01 to 1.03 later), and the
  policy gradient has a cosine of 0.999 with the one normalised without them. Nothing needs to be
  changed. In `EssenceWarsParallel`, where the waiting player sees nothing, they deviate up to 1.9
  times as much, and the policy gradient is 0.33 times that of the decisions instead of 0.5:
  ``ent_coef`` weighs up to 1.5 times as much.

These are figures of ``benchmarks/two_players.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from tcg_flatpolicy.games.essence_wars import engine as ew
from tcg_flatpolicy.games.essence_wars.environment import EssenceWars, NativeGames


class EssenceWarsTwoPlayers(NativeGames):
    """Many games of Essence Wars in one process; two agents a game, its two players.

    Rows 2g and 2g + 1 are the first and the second player of game g. The player to move sees what
    `EssenceWars` shows: the engine's state, in which the cards of both hands are. A policy that was
    trained in one of the two environments plays in the other. The waiting player has an empty list
    and must send the no-op. It sees the game from its own side, because the value of its row is a
    target for the rows before: the player to move is 1, and the cards in the opponent's hand are 0.

    At the end of a game the winner's row gets +1 and the loser's -1, whoever moved last. Both rows
    are terminal, and the next game starts in the same step.

    The arguments are those of `EssenceWars`, except that ``num_agents`` is twice ``num_games``, and
    from a waiting player everything but the no-op is illegal: "random" and "noop" count it, and
    play nothing. Infos are those of opponent "self": ``win``, ``draw`` and ``episode_return`` are
    the first player's.

    Raises:
        ValueError: as `EssenceWars`.

    Attributes:
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
        self.games = EssenceWars(num_games, deck1, deck2, "self", game_mode, illegal, record, seed)
        super().__init__(2 * num_games, buf)
        self._first_rows = np.arange(0, 2 * num_games, 2)
        self._states = self.observations.view(ew.OBSERVATION_DTYPE)["state"][:, 0]

    @property
    def illegal_actions(self) -> int:
        """Number of illegal actions since the environment was made."""
        return self.games.illegal_actions

    def reset(self, seed: int | None = None) -> tuple[npt.NDArray[np.uint8], list[dict[str, Any]]]:
        """As `EssenceWars.reset`, with observations (2 * num_games, itemsize) uint8."""
        self.games.reset(seed)
        self._clear()
        self._observe()
        return self.observations, []

    def step(self, actions: npt.NDArray[Any]) -> tuple[Any, Any, Any, Any, list[dict[str, Any]]]:
        """Plays one action in each game: that of the row that is to move.

        As `EssenceWars.step`, with (2 * num_games, 4) integers: the no-op in rows that wait.
        """
        actions = self._checked(actions)
        movers, waiting = self.movers(), self.waiting()
        wrong = np.flatnonzero((actions[waiting] != ew.SPEC.noop).any(axis=1))
        self.games.count_illegal(wrong)
        if len(wrong) and self.games.illegal == "raise":
            row = int(waiting[wrong[0]])
            raise ValueError(f"row {row}: {waiting_refusal(actions[row].tolist())}")
        _, result, over, _, infos = self.games.step(actions[movers])
        self.rewards[movers], self.rewards[waiting] = result, -result
        self.terminals[:] = np.repeat(over, 2)
        for info in infos:  # there it is that of the player who moved last
            info["episode_return"] = self.rewards[::2][over].tolist()
        self._observe()
        return self.observations, self.rewards, self.terminals, self.truncations, infos

    def state_dict(self) -> dict[str, Any]:
        """The state of the games, in tensors and plain values, as `EssenceWars.state_dict`."""
        return {"games": self.games.state_dict(), "rewards": torch.tensor(self.rewards)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the games, as `EssenceWars.load_state_dict`."""
        self.games.load_state_dict(state["games"])
        self._clear()
        self.rewards[:] = state["rewards"].numpy()
        self.terminals[:] = np.repeat(self.games.terminals, 2)
        self._observe()

    def to_move(self, row: int) -> bool:
        """Whether the row's player is to move. `tcg_flatpolicy.verify` asks for it."""
        return bool(self.games.second_to_move[row // 2] == row % 2)

    def movers(self) -> npt.NDArray[np.intp]:
        """(num_games,) the row that is to move in each game."""
        return self._first_rows + self.games.second_to_move

    def waiting(self) -> npt.NDArray[np.intp]:
        """(num_games,) the row that waits in each game."""
        return self.movers() ^ 1

    def _observe(self) -> None:
        """Shows each game to its two players."""
        waiting, seen = self.waiting(), self.games.observations
        self.observations[self.movers()] = seen
        self.observations[waiting] = 0
        self._states[waiting] = waiting_view(seen.view(ew.OBSERVATION_DTYPE)["state"][:, 0])


def waiting_view(state: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The waiting player's view of states (n, 356) float32 that are those of the player to move.

    It is from the other side, with 1 as the player to move, and 0 for each card in the opponent's
    hand. The size of that hand is kept.
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
    noop = f"the no-op {tuple(ew.SPEC.noop.tolist())}"
    return f"{tuple(action)} from a player who waits: its list is empty, so it must send {noop}"
