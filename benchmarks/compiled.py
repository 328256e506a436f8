"""What torch.compile makes of an update: its time as a share of the eager one's, on the game.

An update is what PufferLib's trainer asks of a policy in a minibatch: forward, log-prob, entropy
and value, and the gradients; without the trainer's own work and the optimizer. Rollouts are eager
either way. Before anything is timed, both must give the same log-probs within 1e-5.

    python benchmarks/compiled.py             # some minutes, of which compiling takes one or two
    python benchmarks/compiled.py --quick
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import measure
import torch
from end_to_end import SETTINGS
from pufferlib.pytorch import sample_logits
from torch import Tensor

import tcg_flatpolicy as fp
from tcg_flatpolicy.games.essence_wars import EssenceWars, EssenceWarsEncoder

KINDS: dict[str, type[fp.Policy]] = {"feed-forward": fp.Policy, "recurrent": fp.RecurrentPolicy}
MINIBATCHES = 4
TARGET = 1.0


def record(minibatch: int) -> list[Tensor]:
    """Observations (minibatch, bytes) of games that a policy at initialisation plays."""
    env = EssenceWars(minibatch, seed=1)
    torch.manual_seed(0)
    policy = fp.FlatPolicy(env, encoder=EssenceWarsEncoder(env.legal_layout))
    env.reset(seed=1)
    states = []
    for step in range(5 * MINIBATCHES):
        if step % 5 == 4:
            states.append(torch.as_tensor(env.observations.copy()))
        with torch.no_grad():
            face, _ = policy.forward_eval(torch.as_tensor(env.observations))
            env.step(face.sample().numpy())
    return states


def contenders(kind: type[fp.Policy], states: list[Tensor]) -> dict[str, Callable[[int], Any]]:
    """An update by call, eager and compiled."""
    env = EssenceWars(1)
    torch.manual_seed(0)
    encoder = EssenceWarsEncoder(env.legal_layout, SETTINGS.hidden_size, SETTINGS.entity_size)
    policy = kind(env, encoder=encoder, width=SETTINGS.head_width)
    compiled = torch.compile(policy, fullgraph=True)
    horizon = SETTINGS.bptt_horizon
    if kind is fp.RecurrentPolicy:
        states = [one.view(len(one) // horizon, horizon, -1) for one in states]
    with torch.no_grad():
        actions = [sample_logits(policy(one)[0])[0] for one in states]

    def update(module: Any, call: int) -> Tensor:
        at = call % len(states)
        face, value = module(states[at])
        _, log_prob, entropy = sample_logits(face, action=actions[at])
        (log_prob.mean() - entropy.mean() + value.square().mean()).backward()
        policy.zero_grad()
        return log_prob.detach()

    for call in range(len(states)):
        torch.testing.assert_close(update(compiled, call), update(policy, call), rtol=0, atol=1e-5)
    return {
        "eager": lambda call: update(policy, call),
        "compiled": lambda call: update(compiled, call),
    }


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds; wider spreads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    states = record(SETTINGS.minibatch_size)
    rows, figures = [], {}
    for name, kind in KINDS.items():
        times = measure.interleave(contenders(kind, states), 15 if arguments.quick else 60)
        ratio = measure.figure(times["compiled"] / times["eager"])
        met = "yes" if ratio.median <= TARGET else "NO"
        rows.append(
            [name, measure.number(ratio.median), ratio.spread, str(len(times["eager"])), met]
        )
        figures[name] = {**ratio._asdict(), "rounds": len(times["eager"])}
    body = f"# A compiled update, minibatches of {SETTINGS.minibatch_size:,} states\n\n"
    body += measure.table(
        ["policy", "time of the eager one", "middle 80%", "rounds", f"at most {TARGET}"], rows
    )
    measure.write("compiled", body, figures)


if __name__ == "__main__":
    main()
