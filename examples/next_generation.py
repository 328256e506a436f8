"""A policy for PufferLib's next generation: its torch trainer, and an environment of its own in C.

It runs where that generation is compiled for an environment "mygame" that shows these bytes.
"""

import numpy as np

import tcg_flatpolicy as fp
from tcg_flatpolicy.puffer import NextGenerationPolicy

OBSERVATION = np.dtype(
    [("life", "u1", 2), ("strength", "u1", 12), ("n_legal", "u1"), ("legal", "u1", (64, 3))]
)
LAYOUT = fp.LegalLayout.from_dtype(OBSERVATION, count="n_legal", actions="legal")
ATTACK = fp.Primary("attack", fp.Index("ally", 6), fp.Index("enemy", 6))
SPEC = fp.ActionSpec([fp.Primary("end_turn"), ATTACK])
policy = NextGenerationPolicy(fp.RecurrentPolicy(spec=SPEC, layout=LAYOUT))

if __name__ == "__main__":
    from pufferlib import _C, pufferl, torch_pufferl

    args = pufferl.load_config("mygame") | {"rank": 0, "gpu_id": 0, "world_size": 1}
    args["vec"]["num_buffers"] = 1
    policy.to("cuda" if _C.gpu else "cpu")
    trainer = torch_pufferl.PuffeRL(args, _C.create_vec(args, _C.gpu), policy)
    while trainer.epoch < trainer.total_epochs:
        trainer.rollouts()
        trainer.train()
