"""One policy, trained by two processes, each with games of its own; the number is each one's steps.

Start it with
    torchrun --standalone --nproc-per-node 2 examples/distributed.py 500000
"""

import sys
from pathlib import Path

import torch
from pufferlib import vector

import tcg_flatpolicy as fp
from tcg_flatpolicy import distributed
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.app.train import make_policy
from tcg_flatpolicy.games.essence_wars import EssenceWars

rank, device = distributed.start()
torch.manual_seed(rank)
settings = Settings(seed=rank, total_steps=int(sys.argv[1]))
vecenv = vector.make(EssenceWars, backend=vector.Serial, num_envs=1)
policy = make_policy(settings, vecenv.driver_env).to(device)
config = settings.trainer_config(vecenv, device, Path("runs/distributed"))
with fp.trainer(config, vecenv, distributed.distribute(policy)) as trainer:
    while trainer.global_step < settings.total_steps:
        trainer.evaluate()
        distributed.log_together(trainer)
        trainer.train()
torch.save(policy.state_dict(), f"policy{rank}.pt")
