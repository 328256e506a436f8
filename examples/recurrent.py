"""Policies with a memory: the library's own, or PufferLib's LSTMWrapper around a feed-forward one.

    python examples/recurrent.py
    python examples/recurrent.py stock

Either trains for 100,000 steps and says how many illegal actions it played.
"""

import sys
from pathlib import Path

import pufferlib.models
from pufferlib import vector
from pufferlib.pufferl import PuffeRL

import tcg_flatpolicy as fp
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.games.essence_wars import EssenceWars, EssenceWarsEncoder

settings = Settings(recurrent=True, total_steps=100_000)  # batch_size is agents * horizon
vecenv = vector.make(EssenceWars, backend=vector.Serial)
env = vecenv.driver_env
encoder = EssenceWarsEncoder(env.legal_layout)
if "stock" in sys.argv:
    policy = fp.FlatPolicy(env, encoder=encoder)
    policy = pufferlib.models.LSTMWrapper(env, policy, policy.hidden_size, policy.hidden_size)
else:
    policy = fp.RecurrentPolicy(env, encoder=encoder)
trainer = PuffeRL(settings.trainer_config("cpu", Path("runs/recurrent")), vecenv, policy)
while trainer.global_step < settings.total_steps:
    trainer.evaluate()
    trainer.train()
print(f"{env.illegal_actions} illegal actions in {trainer.global_step} steps")
trainer.utilization.stop()
