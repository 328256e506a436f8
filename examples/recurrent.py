"""Policies with a memory: the library's own, or PufferLib's LSTMWrapper around a feed-forward one.

    python examples/recurrent.py
    python examples/recurrent.py stock

Either trains for 100,000 steps and says how many illegal actions it played.
"""

import sys

import pufferlib.models
from pufferlib import vector

import tcg_flatpolicy as fp
from tcg_flatpolicy.games.essence_wars import EssenceWars, EssenceWarsEncoder

vecenv = vector.make(EssenceWars, backend=vector.Serial)
env = vecenv.driver_env
encoder = EssenceWarsEncoder(env.legal_layout)
if "stock" in sys.argv:
    policy = fp.FlatPolicy(env, encoder=encoder)
    policy = pufferlib.models.LSTMWrapper(env, policy, policy.hidden_size, policy.hidden_size)
else:
    policy = fp.RecurrentPolicy(env, encoder=encoder)
config = fp.config(vecenv, use_rnn=True, total_timesteps=100_000, data_dir="runs/recurrent")
with fp.trainer(config, vecenv, policy) as trainer:  # batch_size is agents * horizon
    while trainer.global_step < config["total_timesteps"]:
        trainer.evaluate()
        trainer.train()
print(f"{env.illegal_actions} illegal actions in {trainer.global_step} steps")
