"""A policy on an engine in C: its struct is the observation, its columns are the legal list.

The engine is tests/c_engine, a two-player card game in C behind a native PufferEnv. Its observation
is a nested struct, padded by the compiler, with one uint8 column of 1,024 for each part of an
action. The engine knows nothing of this library; what a policy on it needs stands between the two
lines below. Both players are agents and learn from each other; then the policy plays a random one.

    python -m examples.c_engine
    python -m examples.c_engine --steps 300000

It runs from a checkout, and needs PufferLib and a C or C++ compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import tempfile
import warnings
from typing import Any

import numpy as np
import pufferlib.vector
import torch

import tcg_flatpolicy as fp
from tcg_flatpolicy.puffer.games import wilson_interval
from tests.c_engine.engine import Observation, Skirmish

# ---- a policy on it
HAND, ALLY = fp.Index("hand", 6), fp.Index("ally", 4)
ENEMY, FACE = fp.Index("enemy", 4), fp.Index("face", 1)
SPEC = fp.ActionSpec(
    [
        fp.Primary("end_turn"),
        fp.Primary("deploy", HAND, ALLY),
        fp.Primary("attack", ALLY, fp.OneOf(ENEMY, FACE)),
        fp.Primary("bolt", HAND, fp.OneOf(ENEMY, FACE)),
        fp.Primary("duel", HAND, ALLY, ENEMY),
        fp.Primary("mend", HAND, ALLY),
        fp.Primary("discard", HAND),
    ]
)
COLUMNS = ("mask.primary", "mask.sub1", "mask.sub2", "mask.sub3")
LAYOUT = fp.LegalLayout.from_dtype(np.dtype(Observation), count="count", actions=COLUMNS)
make_policy = functools.partial(fp.FlatPolicy, spec=SPEC, layout=LAYOUT)  # of an environment
# ---- that is all


def trainer_config(vecenv: Any, steps: int, folder: str) -> dict[str, Any]:
    """PuffeRL's config: the library's own, but for the size of a minibatch and the entropy."""
    half = vecenv.num_agents * 32 // 2
    changes = {"total_timesteps": steps, "minibatch_size": half, "ent_coef": 0.005}
    return fp.config(vecenv, data_dir=folder, **changes)


def train(policy: fp.FlatPolicy, vecenv: Any, steps: int) -> None:
    """PufferLib's own trainer, as it is; an illegal action would raise in the engine."""
    with tempfile.TemporaryDirectory() as folder:
        config = trainer_config(vecenv, steps, folder)
        with fp.trainer(config, vecenv, policy) as trainer:
            while trainer.global_step < steps:
                trainer.evaluate()
                trainer.train()


@torch.no_grad()
def against_random(policy: fp.FlatPolicy, games: int, seed: int) -> int:
    """How many games it wins against uniformly random legal play, each player's seat in turn."""
    env = Skirmish(games)
    torch.manual_seed(seed)
    observations, _ = env.reset(seed)
    mine = np.arange(2 * games) % 4 % 3 == 0  # rows 0 and 3 of four: each game once
    running = np.ones(2 * games, bool)
    won = 0
    while running.any():
        face, _ = policy.forward_eval(torch.as_tensor(observations))
        legal = face.distribution.legal
        uniform = fp.LegalCategorical(legal, torch.zeros(len(legal.rows)))
        actions = np.where(mine[:, None], face.sample(), uniform.sample())
        observations, rewards, terminals, _, _ = env.step(actions)
        won += int((running & mine & (rewards > 0)).sum())
        running &= ~terminals
    return won


def main(arguments: list[str] | None = None) -> tuple[int, int]:
    """Trains, and says how many of the games it wins before and after."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000, help="of both players, waiting too")
    parser.add_argument("--num-games", type=int, default=64, help="games played side by side")
    parser.add_argument("--eval-games", type=int, default=500, help="against random, each time")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    vecenv = pufferlib.vector.make(
        Skirmish,
        env_kwargs={"num_games": options.num_games},
        backend=pufferlib.vector.Serial,
        num_envs=1,
        seed=options.seed,
    )
    policy = make_policy(vecenv.driver_env)

    def evaluate(when: str) -> int:
        won = against_random(policy, options.eval_games, options.seed + 1)
        low, high = wilson_interval(won, options.eval_games)
        print(
            f"{when}: wins {won} of {options.eval_games} games against random play "
            f"(95% interval of the rate: {low:.1%} to {high:.1%})"
        )
        return won

    before = evaluate("untrained")
    # PufferLib's dashboard, and its asking for autocast where there is none.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)
        train(policy, vecenv, options.steps)
    return before, evaluate("trained")


if __name__ == "__main__":
    main()
