"""Win rates against a built-in opponent or another policy, with their intervals."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class WinRate:
    """The results of a number of games."""

    games: int
    wins: int
    draws: int
    actions: int
    """Number of actions sent to the environment, in unfinished games too."""
    illegal: int
    """Number of illegal ones among them, as the environment counted."""
    seconds: float

    @property
    def rate(self) -> float:
        """Share of games won; NaN without games."""
        return self.wins / self.games if self.games else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the share of games won."""
        return wilson_interval(self.wins, self.games)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:6.1%}  [{low:.1%}, {high:.1%}]  of {self.games} games"


def wilson_interval(wins: int, games: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927); (0, 1) without games."""
    if not games:
        return 0.0, 1.0
    z = 1.959963984540054
    centre = (wins + z * z / 2) / (games + z * z)
    half = z / (games + z * z) * math.sqrt(wins * (games - wins) / games + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def play(
    policy: nn.Module,
    env: Any,
    games: int,
    seed: int,
    stopped: Callable[[], bool] = lambda: False,
) -> WinRate:
    """Plays games as the first player and counts the wins.

    Each slot of the environment plays the same number of games, and no more are counted: counting
    the first games that end would favour short ones.

    Args:
        policy: with forward_eval, as PufferLib calls it; wrap it in Greedy to play the mode. It
            plays in eval mode, and has its own mode back afterwards. A recurrent one starts with a
            zero state, and keeps its state from game to game, as in training.
        env: a native environment of num_agents games, whose rewards at a game's end are above 0
            for a win and below 0 for a loss, and which counts illegal_actions. It has one agent a
            game: its agents_per_game, if it has that attribute, is 1.
        games: total number of games; a multiple of env.num_agents.
        seed: random seed of games and sampling; torch's own generator is unchanged afterwards.
        stopped: is asked before each step; True ends the games early.

    Raises:
        ValueError: games is not positive or not a multiple of env.num_agents, or the environment
            has more than one agent a game.
    """
    agents = getattr(env, "agents_per_game", 1)
    if agents != 1:
        raise ValueError(
            f"{type(env).__name__} has {agents} agents a game, and play() would count each game "
            f"{agents} times: let two policies play there with play_match(), or give play() an "
            "environment of one agent a game, with a built-in opponent"
        )
    return _play([policy], env, games, seed, stopped)


def play_match(
    first: nn.Module,
    second: nn.Module,
    env: Any,
    games: int,
    seed: int,
    stopped: Callable[[], bool] = lambda: False,
) -> WinRate:
    """Plays games between two policies and counts those that the first player won.

    Also evaluates a policy as the second player, which in an environment of one agent a game is
    always the built-in opponent.

    Args:
        first: plays the even rows; a policy as for `play`. It may be the same object as second.
        second: plays the odd rows.
        env: a native environment whose rows 2g and 2g + 1 are the two players of game g, and which
            has agents_per_game = 2; rewards and illegal_actions as for `play`.
        games: total number of games; a multiple of env.num_agents / 2. Each slot plays the same
            number.
        seed: random seed of games and sampling; torch's own generator is unchanged afterwards.
        stopped: is asked before each step; True ends the games early.

    Returns:
        Wins and draws of the first player. Actions are those of both players, without the no-ops of
        the waiting one.

    Raises:
        ValueError: games is not positive or not a multiple of env.num_agents / 2, or the
            environment does not have two agents a game.
    """
    rows, agents = env.num_agents, getattr(env, "agents_per_game", 1)
    if agents != 2:
        raise ValueError(
            f"play_match() needs two agents a game, and {type(env).__name__} has {agents}: use "
            "play() against a built-in opponent, or, if rows 2g and 2g + 1 are the players of game "
            "g, give the environment agents_per_game = 2"
        )
    if rows % 2:
        raise ValueError(f"two players need two rows a game, the environment has {rows} in all")
    return _play([first, second], env, games, seed, stopped)


@torch.no_grad()
def _play(
    players: Sequence[nn.Module], env: Any, games: int, seed: int, stopped: Callable[[], bool]
) -> WinRate:
    """Plays games in which the players' rows alternate, and counts the first player's wins."""
    agents = len(players)
    slots = env.num_agents // agents
    quota = _games_each(games, slots)
    started = time.monotonic()
    illegal_before = env.illegal_actions
    done = np.zeros(slots, dtype=np.int64)
    wins = draws = actions = 0
    states = []
    for policy in players:
        size = int(policy.hidden_size)  # type: ignore[arg-type]
        states.append({name: torch.zeros(slots, size) for name in ("lstm_h", "lstm_c")})
    space = env.single_action_space
    chosen = np.zeros((env.num_agents, *space.shape), dtype=space.dtype)
    with torch.random.fork_rng(devices=[]), _eval_mode(players):
        torch.manual_seed(seed)
        observations, _ = env.reset(seed)
        while (done < quota).any() and not stopped():
            for player, policy in enumerate(players):
                seen = torch.as_tensor(observations[player::agents])
                face, _ = policy.forward_eval(seen, states[player])  # type: ignore[operator]
                chosen[player::agents] = face.sample().numpy()
            observations, rewards, terminals, truncations, _ = env.step(chosen)
            actions += slots
            result = rewards[::agents]
            ended = (terminals | truncations)[::agents]
            counted = ended & (done < quota)
            wins += int((counted & (result > 0)).sum())
            draws += int((counted & (result == 0)).sum())
            done += counted
    return WinRate(
        games=int(done.sum()),
        wins=wins,
        draws=draws,
        actions=actions,
        illegal=env.illegal_actions - illegal_before,
        seconds=time.monotonic() - started,
    )


@contextlib.contextmanager
def _eval_mode(players: Sequence[nn.Module]) -> Iterator[None]:
    """Puts the players in eval mode, and restores the mode of each of their modules."""
    modes = [(module, module.training) for player in players for module in player.modules()]
    for player in players:
        player.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _games_each(games: int, slots: int) -> int:
    """Number of games that each slot plays."""
    if games < 1:
        raise ValueError(f"games must be at least 1, got {games}")
    quota, rest = divmod(games, slots)
    if rest:
        raise ValueError(f"{games} games cannot be shared equally by {slots} slots")
    return quota
