"""Plays games with a policy, in any environment, and counts what came of them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.meaning import meaning
from tcg_flatpolicy.puffer.play import Greedy, TopK
from tcg_flatpolicy.wrapping import env_attribute, env_layers, is_emulation

Z = 1.959963984540054
"""Of a two-sided interval of 95%."""


@dataclass(frozen=True)
class WinRate:
    """The results of a number of games."""

    games: int
    wins: int
    draws: int
    actions: int
    """Number of actions sent to the environment, in unfinished games too."""
    illegal: int | None
    """Number of illegal ones among them, as the environment counted; None if it does not."""
    seconds: float
    mean_return: float = math.nan
    """Mean sum of a game's rewards; NaN without games."""
    return_deviation: float = math.nan
    """Standard deviation of that sum; NaN for less than two games."""
    by: Mapping[Any, WinRate] = field(default_factory=dict)
    """The same of the games of each value of the fields that were named."""

    @property
    def losses(self) -> int:
        """Number of games that were neither won nor drawn."""
        return self.games - self.wins - self.draws

    @property
    def rate(self) -> float:
        """Share of games won; NaN without games."""
        return self.wins / self.games if self.games else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the share of games won."""
        return wilson_interval(self.wins, self.games)

    @property
    def return_interval(self) -> tuple[float, float]:
        """95% interval of the mean return."""
        half = Z * self.return_deviation / math.sqrt(max(1, self.games))
        return self.mean_return - half, self.mean_return + half

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:6.1%}  [{low:.1%}, {high:.1%}]  of {self.games} games"


def wilson_interval(wins: int, games: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927); (0, 1) without games."""
    if not games:
        return 0.0, 1.0
    centre = (wins + Z * Z / 2) / (games + Z * Z)
    half = Z / (games + Z * Z) * math.sqrt(wins * (games - wins) / games + Z * Z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def play_games(
    policy: nn.Module | Sequence[nn.Module],
    vecenv: Any,
    games: int,
    *,
    how: str | int = "sampling",
    outcome: Callable[[npt.NDArray[np.float64]], Any] = np.sign,
    by: str | Sequence[str] = (),
    seed: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> WinRate:
    """Plays games and counts wins and draws, by the rewards.

    Each slot of the environment plays the same number of games, and no more are counted: counting
    the first games that end would favour short ones. A slot is an agent, or a game where several
    agents play in each.

    Args:
        policy: with forward_eval, as PufferLib calls it. It plays in eval mode and in float32, with
            the exploration that is set (``policy.explore()`` takes it out). A recurrent one starts
            with a zero state, and keeps its state from game to game, as in training. Several
            policies are the players of a game, in the order of its rows, and the first one's games
            are counted.
        vecenv: a vector environment, or a native PufferEnv. Its ``agents_per_game`` says how many
            rows a game has; 1 without it, and all agents of an emulated PettingZoo environment.
        games: total number of games; a multiple of the number of slots.
        how: "sampling", "mode", or k, to sample from the k most probable tuples.
        outcome: function of returns, float64 (n,), the sums of the rewards of n games. A game with
            a result above 0 is won, of 0 drawn; the sign of the return if left out.
        by: names of fields of the observation, of one number each, such as a seat or a deck. The
            result's ``by`` has the games of each value (of each tuple of values, for several
            names), as seen in the last state before a game ended.
        seed: random seed of games and sampling; torch's own generator is unchanged afterwards.
        stopped: is asked before each step; True ends the games early.

    Raises:
        ValueError: games is not positive or not a multiple of the number of slots, one policy where
            a game has several agents, other numbers of policies and agents, no such way to play, or
            a field that is missing or has several numbers.
    """
    players = [policy] if isinstance(policy, nn.Module) else list(policy)
    agents = agents_per_game(vecenv)
    if len(players) != agents:
        raise ValueError(
            f"{type(vecenv).__name__} has {agents} agents a game, and got "
            f"{'one policy' if len(players) == 1 else f'{len(players)} policies'}: give play_games "
            "one for each agent, in the order of a game's rows (the same one may play several)"
        )
    names = [by] if isinstance(by, str) else list(by)
    layout = meaning(vecenv, players[0]).layout if names else None
    slots = vecenv.num_agents // agents
    quota = _games_each(games, slots)
    started, illegal = time.monotonic(), _illegal(vecenv)
    device = next((p.device for p in players[0].parameters()), torch.device("cpu"))
    playing = [_played(player, how) for player in players]
    space = vecenv.single_action_space
    done = np.zeros(slots, dtype=np.int64)
    returns, acted = np.zeros(vecenv.num_agents), np.zeros(vecenv.num_agents, dtype=bool)
    seen: list[Any] = [()] * vecenv.num_agents
    ended: list[tuple[Any, float]] = []
    actions = 0
    sizes = [int(p.hidden_size) for p in players]  # type: ignore[arg-type]
    memory = [
        {k: torch.zeros(vecenv.num_agents, n, device=device) for k in ("lstm_h", "lstm_c")}
        for n in sizes
    ]
    no_autocast = torch.autocast(device.type, enabled=False)  # a trainer's train() leaves it on
    with torch.random.fork_rng(devices=[]), no_autocast, eval_mode(players):
        torch.manual_seed(seed)
        vecenv.async_reset(seed)
        while True:
            observations, rewards, terminals, truncations, *_, rows, _ = vecenv.recv()
            rows = np.asarray(rows)
            returns[rows] += np.where(acted[rows], rewards, 0)
            for row in rows[(terminals | truncations) & acted[rows]].tolist():
                slot, player = divmod(row, agents)
                if player == 0 and done[slot] < quota:
                    done[slot] += 1
                    ended.append((seen[row], float(returns[row])))
                returns[row] = 0
            if (done >= quota).all() or stopped():
                break
            shown = torch.as_tensor(observations)
            if layout is not None:
                for row, values in zip(rows.tolist(), _values(layout, shown, names), strict=True):
                    seen[row] = values
            chosen = np.zeros((len(rows), *space.shape), dtype=space.dtype)
            for player, one in enumerate(playing):
                mine = rows % agents == player
                places = torch.as_tensor(rows[mine], device=device)
                state = {name: held[places] for name, held in memory[player].items()}
                seen_by = shown[torch.as_tensor(mine)].to(device)
                face, _ = one.forward_eval(seen_by, state)  # type: ignore[operator]
                chosen[mine] = face.sample().cpu().numpy()
                for name, held in memory[player].items():
                    held[places] = state[name]
            actions += int((rows % agents == 0).sum())
            acted[rows] = True
            vecenv.send(chosen)
    common: dict[str, Any] = {
        "seconds": time.monotonic() - started,
        "actions": actions,
        "illegal": None,
    }
    groups = {key: [r for k, r in ended if k == key] for key in sorted({k for k, _ in ended})}
    each = {
        (key if len(names) > 1 else key[0]): WinRate(**_counted(rs, outcome), **common)
        for key, rs in groups.items()
        if names
    }
    if illegal is not None:
        common["illegal"] = _illegal(vecenv) - illegal
    return WinRate(**_counted([r for _, r in ended], outcome), **common, by=each)


def _counted(returns: list[float], outcome: Callable[[Any], Any]) -> dict[str, Any]:
    array = np.array(returns, dtype=np.float64)
    results = np.broadcast_to(np.asarray(outcome(array)), array.shape)
    return {
        "games": len(array),
        "wins": int((results > 0).sum()),
        "draws": int((results == 0).sum()),
        "mean_return": float(array.mean()) if len(array) else math.nan,
        "return_deviation": float(array.std(ddof=1)) if len(array) > 1 else math.nan,
    }


def agents_per_game(vecenv: Any) -> int:
    """Number of successive rows that are the agents of one game."""
    said = env_attribute(vecenv, "agents_per_game")
    emulated = next((layer for layer in env_layers(vecenv) if is_emulation(layer)), None)
    return int(said or getattr(emulated, "num_agents", 1))


def _illegal(vecenv: Any) -> Any:
    """Number of illegal actions that the environments counted; None if they do not."""
    counts = [getattr(env, "illegal_actions", None) for env in getattr(vecenv, "envs", [vecenv])]
    return None if None in counts else sum(counts)


def _played(policy: Any, how: str | int) -> nn.Module:
    """The policy that plays in this way."""
    if how == "sampling":
        assert isinstance(policy, nn.Module)
        return policy
    if how == "mode":
        return Greedy(policy)
    if isinstance(how, str):
        raise ValueError(f"how must be 'sampling', 'mode' or a number k, got {how!r}")
    return TopK(policy, how)


def _values(layout: LegalLayout, observations: Any, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """The values of these fields in each row."""
    columns = []
    for name in names:
        column = layout.field(observations, name).reshape(len(observations), -1)
        if column.shape[1] != 1:
            raise ValueError(
                f"by={name!r}: the field has {column.shape[1]} numbers, and a game has one value; "
                "name a field of one"
            )
        columns.append(column[:, 0].tolist())
    return list(zip(*columns, strict=True))


@contextlib.contextmanager
def eval_mode(players: Sequence[nn.Module]) -> Iterator[None]:
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
