"""Win rates against a built-in opponent or another policy, with their intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tcg_flatpolicy.puffer.games import WinRate, agents_per_game, play_games, wilson_interval

__all__ = ["WinRate", "play", "play_match", "wilson_interval"]


def play(
    policy: nn.Module,
    env: Any,
    games: int,
    seed: int,
    stopped: Callable[[], bool] = lambda: False,
) -> WinRate:
    """`play_games` in an environment of one agent a game, with a built-in opponent.

    Raises:
        ValueError: as play_games, or the environment has more than one agent a game.
    """
    agents = agents_per_game(env)
    if agents != 1:
        raise ValueError(
            f"{type(env).__name__} has {agents} agents a game, and play() would count each game "
            f"{agents} times: let two policies play there with play_match(), or give play() an "
            "environment of one agent a game, with a built-in opponent"
        )
    return play_games(policy, env, games, seed=seed, stopped=stopped)


def play_match(
    first: nn.Module,
    second: nn.Module,
    env: Any,
    games: int,
    seed: int,
    stopped: Callable[[], bool] = lambda: False,
) -> WinRate:
    """`play_games` between two policies: wins and draws are those of the first player.

    Also evaluates a policy as the second player, which in an environment of one agent a game is
    always the built-in opponent. ``first`` plays the even rows and ``second`` the odd ones.

    Raises:
        ValueError: as play_games, or the environment does not have two agents a game.
    """
    rows, agents = env.num_agents, agents_per_game(env)
    if agents != 2:
        raise ValueError(
            f"play_match() needs two agents a game, and {type(env).__name__} has {agents}: use "
            "play() against a built-in opponent, or, if rows 2g and 2g + 1 are the players of game "
            "g, give the environment agents_per_game = 2"
        )
    if rows % 2:
        raise ValueError(f"two players need two rows a game, the environment has {rows} in all")
    return play_games([first, second], env, games, seed=seed, stopped=stopped)
