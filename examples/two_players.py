"""Both players of Essence Wars are one policy, trained with PufferLib's trainer as it is.

    python examples/two_players.py

In each state one of the two waits: its list is empty, and it plays the no-op.
"""

from pathlib import Path

from pufferlib import vector

import tcg_flatpolicy as fp
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.app.train import make_policy
from tcg_flatpolicy.games.essence_wars import EssenceWars
from tcg_flatpolicy.games.essence_wars.two_players import EssenceWarsTwoPlayers

STEPS = 500_000  # rows; a game's action is two
settings = Settings(two_players=True, num_games=128, total_steps=STEPS)
vecenv = vector.make(EssenceWarsTwoPlayers, env_kwargs={"num_games": 128}, backend=vector.Serial)
policy = make_policy(settings, vecenv.driver_env)
config = settings.trainer_config(vecenv, "cpu", Path("runs/two_players"))
with fp.trainer(config, vecenv, policy) as trainer:
    while trainer.global_step < STEPS:
        trainer.evaluate()
        trainer.train()
print(f"{vecenv.driver_env.illegal_actions} illegal actions")
won = fp.play_games(policy, EssenceWars(100), 500)
print(f"against the built-in opponent, which it never met: {won}")
