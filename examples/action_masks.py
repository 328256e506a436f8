"""A Gymnasium environment with `action_masks()`, as sb3-contrib has it, trained and evaluated.

    python examples/action_masks.py
    python -m tcg_flatpolicy train examples.action_masks:make

An engine of numbered actions learns more where the numbers have a meaning: to_tuple says it.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

import tcg_flatpolicy as fp

SPEC = fp.ActionSpec(
    [fp.Primary("draw"), fp.Primary("play", fp.Index("place", 5), fp.Index("column", 3))]
)


class Columns(gymnasium.Env[Any, Any]):
    """A card may go on a column that ends in a smaller one; each that is played is a point."""

    observation_space = spaces.Dict(
        {"hand": spaces.Box(0, 20, (5,), np.int8), "columns": spaces.Box(0, 20, (3,), np.int8)}
    )
    action_space = spaces.Discrete(16)  # 15: draw a new hand

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        """Deals five cards, and clears the columns."""
        super().reset(seed=seed)
        self.columns, self.turn = np.zeros(3, np.int8), 0
        self.hand = self.np_random.integers(1, 21, 5).astype(np.int8)
        return self.show(), {}

    def show(self) -> dict[str, Any]:
        """What the player sees."""
        return {"hand": self.hand.copy(), "columns": self.columns.copy()}

    def action_masks(self) -> Any:
        """(16,) bool: which actions are legal."""
        return np.append((self.hand[:, None] > self.columns).ravel(), True)

    def step(self, action: Any) -> Any:
        """Plays one."""
        place, column = divmod(int(action), 3)
        if place < 5:
            self.columns[column] = self.hand[place]
            self.hand[place] = self.np_random.integers(1, 21)
        else:
            self.hand = self.np_random.integers(1, 21, 5).astype(np.int8)
        self.turn += 1
        return self.show(), float(place < 5) / 10, self.turn == 20, False, {}


def to_tuple(number: int) -> tuple[int, int, int]:
    """What an action's number means."""
    return (0, 0, 0) if number == 15 else (1, *divmod(number, 3))


def make() -> gymnasium.Env[Any, Any]:
    """The game with its list in the observation."""
    return fp.adapters.from_gymnasium(Columns(), spec=SPEC, to_tuple=to_tuple)


def main(steps: int = 100_000) -> tuple[float, float]:
    """Mean returns before and after training."""
    from pufferlib import emulation, vector

    def emulated(buf: Any = None, seed: int = 0) -> Any:
        return emulation.GymnasiumPufferEnv(env=make(), buf=buf, seed=seed)

    def games() -> Any:
        return vector.make(emulated, num_envs=32, backend=vector.Serial)

    vecenv = games()
    policy = fp.FlatPolicy(vecenv)
    before = fp.play_games(policy, vecenv, 320)
    config = fp.config(vecenv, total_timesteps=steps, data_dir="runs/action_masks")
    with fp.trainer(config, vecenv, policy) as trainer:
        while trainer.global_step < steps:
            trainer.evaluate()
            trainer.train()
    after = fp.play_games(policy, games(), 320)
    print(f"cards in 20 turns: {10 * before.mean_return:.1f}, trained {10 * after.mean_return:.1f}")
    return before.mean_return, after.mean_return


if __name__ == "__main__":
    main()
