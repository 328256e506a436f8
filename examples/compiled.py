"""The trainer's compiled update, in one whole graph.

    python examples/compiled.py

Rollouts stay eager, as PufferLib has it; log-probs agree. Before torch 2.13, say the first line.
"""

import sys
from pathlib import Path

import torch._dynamo
from pufferlib import vector

import tcg_flatpolicy as fp
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.app.train import make_policy
from tcg_flatpolicy.games.essence_wars import EssenceWars

torch._dynamo.config.capture_dynamic_output_shape_ops = True
settings = Settings(total_steps=int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
vecenv = vector.make(EssenceWars, backend=vector.Serial)
policy = make_policy(settings, vecenv.driver_env)
config = settings.trainer_config(vecenv, "cpu", Path("runs/compiled"))
with fp.trainer({**config, "compile": True}, vecenv, policy) as trainer:
    while trainer.global_step < settings.total_steps:
        trainer.evaluate()
        trainer.train()
played = f"{trainer.global_step} steps, {vecenv.driver_env.illegal_actions} illegal actions"
print(played)
