"""Games in processes of their own, and the networks in bfloat16.

    python examples/workers.py

PufferLib's Multiprocessing waits for ever for a worker that raises: try yours with Serial first.
"""

from pathlib import Path

from pufferlib import vector

import tcg_flatpolicy as fp
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.app.train import make_policy
from tcg_flatpolicy.games.essence_wars import EssenceWars
from tcg_flatpolicy.verify import LegalityMonitor

if __name__ == "__main__":  # workers import this file
    settings = Settings(precision="bfloat16", total_steps=100_000)
    kind, games = vector.Multiprocessing, {"num_games": 128}
    vecenv = vector.make(EssenceWars, env_kwargs=games, backend=kind, num_envs=2, num_workers=2)
    vecenv = LegalityMonitor(vecenv)  # raises at the first action that is not in the list shown
    policy = make_policy(settings, vecenv.driver_env)
    config = settings.trainer_config(vecenv, "cpu", Path("runs/workers"))
    with fp.trainer(config, vecenv, policy) as trainer:
        while trainer.global_step < settings.total_steps:
            trainer.evaluate()
            trainer.train()
        print(vecenv.report())
