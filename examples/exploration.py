"""Exploration that is part of the policy and dies down, in a run that goes on where it was stopped.

    python examples/exploration.py

Stop it with Ctrl-C whenever you like, and start it again: it goes on from exploration.pt. The
learning rate falls over all steps of the run, so train for the same number of steps as before, or
delete that file.
"""

import sys
from pathlib import Path

import torch
from pufferlib import vector

import tcg_flatpolicy as fp
from tcg_flatpolicy.app.evaluate import play
from tcg_flatpolicy.app.run_folder import write_checkpoint
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.app.train import make_policy
from tcg_flatpolicy.games.essence_wars import EssenceWars
from tcg_flatpolicy.puffer import restore_trainer, trainer_state

settings = Settings(total_steps=int(sys.argv[1]) if len(sys.argv) > 1 else 500_000)
vecenv = vector.make(EssenceWars, env_kwargs={"record": True}, backend=vector.Serial)
policy, saved = make_policy(settings, vecenv.driver_env), Path("exploration.pt")
config = settings.trainer_config(vecenv, "cpu", Path("runs/exploration"))
with fp.trainer(config, vecenv, policy) as trainer:
    if saved.exists():
        restore_trainer(trainer, torch.load(saved, weights_only=True))
    while trainer.global_step < settings.total_steps:
        left = 1 - trainer.global_step / settings.total_steps
        policy.explore(temperature=1 + 0.5 * left, epsilon=0.1 * left)  # before evaluate()
        trainer.evaluate()
        trainer.train()
        write_checkpoint(saved, trainer_state(trainer))
policy.explore()  # from here on it plays as it learned to
for player in (policy, fp.Greedy(policy), fp.TopK(policy, 3)):
    print(f"{type(player).__name__:>8}: {play(player, EssenceWars(100), 200, seed=0)}")
