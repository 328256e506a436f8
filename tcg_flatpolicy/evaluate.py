"""Win rates: a policy against an environment's built-in opponent, with their uncertainty."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class WinRate:
    """What came of a number of games."""

    games: int
    wins: int
    draws: int
    actions: int
    """All actions sent to the environment, of unfinished games too."""
    illegal: int
    """How many of them were not legal, as the environment counted."""
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
    """The 95% score interval of a proportion (Wilson 1927); (0, 1) without games."""
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
    """Plays games with the first player's side and counts the wins.

    Each slot of the environment plays the same number of games and no more are counted: taking the
    first games to finish would favour short ones.

    Args:
        policy: with forward_eval, as PufferLib has it; wrap it in Greedy to play the mode. A
            recurrent one starts each game from a zero state.
        env: a native environment of num_agents games side by side, whose rewards at a game's end
            are above 0 for a win and below 0 for a loss, and which counts illegal_actions. It has
            one agent a game: its agents_per_game, if it has that, is 1.
        games: in all; a multiple of env.num_agents.
        seed: of the games and the draws; torch's own generator is left as it was.
        stopped: asked before each step; True ends the count early.

    Raises:
        ValueError: games is not positive or not a multiple of env.num_agents, or an environment
            with more than one agent a game.
    """
    agents = getattr(env, "agents_per_game", 1)
    if agents != 1:
        raise ValueError(
            f"{type(env).__name__} has {agents} agents a game, and play() would count each game "
            f"{agents} times: let two policies play there with play_match(), or play() a built-in "
            "opponent in an environment of one agent a game, such as EssenceWars"
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

    The way to evaluate as the second player, too: of an environment of one side, the built-in
    opponent is that.

    Args:
        first: plays the even rows, with forward_eval as for `play`; may be the second as well.
        second: plays the odd rows.
        env: a native environment whose rows 2g and 2g + 1 are the two players of game g, and which
            says so with agents_per_game = 2; rewards and illegal_actions as for `play`.
            EssenceWarsTwoPlayers, say.
        games: in all; a multiple of env.num_agents / 2. As in `play`, each slot plays as many.
        seed: of the games and the draws; torch's own generator is left as it was.
        stopped: asked before each step; True ends the count early.

    Returns:
        Wins and draws of the first player. Actions are those of both, and no-ops of who waits are
        not counted.

    Raises:
        ValueError: games is not positive or not a multiple of env.num_agents / 2, or an environment
            without two agents a game.
    """
    rows, agents = env.num_agents, getattr(env, "agents_per_game", 1)
    if agents != 2:
        raise ValueError(
            f"play_match() needs two agents a game, and {type(env).__name__} has {agents}: take "
            "EssenceWarsTwoPlayers, or play() against a built-in opponent; an environment of your "
            "own whose rows 2g and 2g + 1 are the players of game g says so by agents_per_game = 2"
        )
    if rows % 2:
        raise ValueError(f"two players need two rows a game, the environment has {rows} in all")
    return _play([first, second], env, games, seed, stopped)


@torch.no_grad()
def _play(
    players: Sequence[nn.Module], env: Any, games: int, seed: int, stopped: Callable[[], bool]
) -> WinRate:
    """Plays games in which each player has an agent, in this order; the first one's wins."""
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
    with torch.random.fork_rng(devices=[]):
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
            fresh = torch.as_tensor(~ended, dtype=torch.float32).unsqueeze(1)
            states = [{name: value * fresh for name, value in s.items()} for s in states]
    return WinRate(
        games=int(done.sum()),
        wins=wins,
        draws=draws,
        actions=actions,
        illegal=env.illegal_actions - illegal_before,
        seconds=time.monotonic() - started,
    )


def _games_each(games: int, slots: int) -> int:
    """How many games each slot plays."""
    if games < 1:
        raise ValueError(f"games must be at least 1, got {games}")
    quota, rest = divmod(games, slots)
    if rest:
        raise ValueError(f"{games} games cannot be shared equally by {slots} slots")
    return quota
