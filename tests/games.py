"""Small real environments whose best play is known."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pufferlib
import torch
from torch import Tensor, nn

import tcg_flatpolicy as fp

UNITS, CARDS, ROOM = 4, 5, 12

BANDIT_SPEC = fp.ActionSpec(
    [
        fp.Primary("rest"),
        fp.Primary("attack", fp.Entity("unit", UNITS), fp.Entity("unit", UNITS)),
        fp.Primary(
            "play", fp.Index("card", CARDS), fp.OneOf(fp.Index("none", 1), fp.Entity("unit", UNITS))
        ),
    ]
)
BANDIT_DTYPE = np.dtype(
    [
        ("kind", np.uint8, UNITS),
        ("card", np.int16),
        ("n", np.uint16),
        ("legal", np.uint8, (ROOM, 3)),
    ],
    align=True,
)


class Bandit(pufferlib.PufferEnv):
    """One decision an episode, from a random legal set; what each tuple pays is known.

    Units have kinds 0..3 and the hand shows a wanted card. An attack pays by the pair of kinds, in
    order; playing a card pays if it is the wanted one, by the kind of unit it is played on. The
    best pair is no sum of its parts, and its place in the list says nothing.
    """

    PAIRS = np.random.default_rng(5).random((4, 4))

    def __init__(self, num_agents: int = 64, empty: float = 0.0, buf: Any = None, seed: int = 0):
        self.action_spec = BANDIT_SPEC
        self.legal_layout = fp.LegalLayout.from_dtype(BANDIT_DTYPE, "n", "legal", spec=BANDIT_SPEC)
        self.single_observation_space = gymnasium.spaces.Box(
            0, 255, (BANDIT_DTYPE.itemsize,), np.uint8
        )
        self.single_action_space = BANDIT_SPEC.action_space
        self.num_agents = num_agents
        self.empty = empty
        self.illegal_actions = 0
        self.played = 0
        self.rng = np.random.default_rng(seed)
        self.all_tuples = [(0, 0, 0)]
        self.all_tuples += [(1, i, j) for i in range(UNITS) for j in range(UNITS)]
        self.all_tuples += [(2, c, t) for c in range(CARDS) for t in range(1 + UNITS)]
        super().__init__(buf)

    def pay(self, row: int, action: tuple[int, ...]) -> float:
        primary, a, b = action
        kinds = self.records["kind"][row]
        if primary == 0:
            return 0.1
        if primary == 1:
            return float(self.PAIRS[kinds[a], kinds[b]])
        wanted = a == self.records["card"][row]
        return float(wanted) * (0.5 if b == 0 else float(self.PAIRS[kinds[b - 1], 0]))

    def deal(self) -> None:
        self.records = self.observations.view(BANDIT_DTYPE)[:, 0]
        self.records["kind"] = self.rng.integers(0, 4, (self.num_agents, UNITS))
        self.records["card"] = self.rng.integers(0, CARDS, self.num_agents)
        self.lists: list[list[tuple[int, ...]]] = []
        for _ in range(self.num_agents):
            count = int(self.rng.integers(1, ROOM + 1))
            chosen = self.rng.choice(len(self.all_tuples), count, replace=False)
            idle = self.rng.random() < self.empty
            self.lists.append([] if idle else [self.all_tuples[i] for i in chosen])
        self.legal_layout.write(self.observations, self.lists)

    def reset(self, seed: int | None = None) -> tuple[Any, list[Any]]:
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.deal()
        self.rewards[:], self.terminals[:], self.truncations[:] = 0, False, False
        return self.observations, []

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, list[Any]]:
        got = best = 0.0
        for row, action in enumerate(map(tuple, np.asarray(actions).tolist())):
            self.played += 1
            legal = self.lists[row] or [(0, 0, 0)]
            self.illegal_actions += action not in legal
            self.rewards[row] = self.pay(row, action) if self.lists[row] else 0.0
            got += float(self.rewards[row])
            best += max(self.pay(row, a) for a in self.lists[row]) if self.lists[row] else 0.0
        self.terminals[:] = True
        self.deal()
        return (
            self.observations,
            self.rewards,
            self.terminals,
            self.truncations,
            [{"got": got, "best": best}],
        )

    def close(self) -> None:
        pass


class BanditEncoder(nn.Module):
    """Units by their kind, the wanted card, no more."""

    def __init__(self, layout: fp.LegalLayout, hidden_size: int = 32) -> None:
        super().__init__()
        self.layout = layout
        self.hidden_size = hidden_size
        self.entity_sizes = {"unit": (UNITS, 8)}
        self.kinds = nn.Embedding(4, 8)
        self.cards = nn.Embedding(CARDS, hidden_size)
        self.mix = nn.Linear(hidden_size + UNITS * 8, hidden_size)

    def forward(self, observations: Tensor) -> fp.Encoding:
        units = self.kinds(self.layout.field(observations, "kind").long())
        card = self.cards(self.layout.field(observations, "card").long())
        hidden = torch.relu(self.mix(torch.cat([card, units.flatten(1)], dim=1)))
        return fp.Encoding(hidden, {"unit": units})


def trainer_config(vecenv: Any, folder: Any, **changes: Any) -> dict[str, Any]:
    """A PuffeRL config for small runs: one minibatch a rollout unless changed."""
    horizon = changes.get("bptt_horizon", 8)
    batch = vecenv.num_agents * horizon
    config: dict[str, Any] = {
        "env": "test",
        "seed": 1,
        "device": "cpu",
        "torch_deterministic": True,
        "cpu_offload": False,
        "total_timesteps": 20 * batch,
        "batch_size": batch,
        "minibatch_size": batch,
        "max_minibatch_size": batch,
        "bptt_horizon": horizon,
        "update_epochs": 1,
        "optimizer": "adam",
        "learning_rate": 3e-3,
        "anneal_lr": False,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_eps": 1e-8,
        "gamma": 0.99,
        "gae_lambda": 0.9,
        "clip_coef": 0.2,
        "vf_coef": 0.5,
        "vf_clip_coef": 0.2,
        "max_grad_norm": 0.5,
        "ent_coef": 0.0,
        "vtrace_rho_clip": 1.0,
        "vtrace_c_clip": 1.0,
        "prio_alpha": 0.0,
        "prio_beta0": 1.0,
        "precision": "float32",
        "use_rnn": False,
        "compile": False,
        "compile_mode": "default",
        "compile_fullgraph": False,
        "data_dir": str(folder),
        "checkpoint_interval": 10**9,
    }
    return {**config, **changes}
