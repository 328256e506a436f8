"""LegalCategorical in TorchRL: ProbabilisticActor, Collector, GAE and ClipPPOLoss as they come.

A tensordict holds tensors of its own batch size, so the legal list travels padded, as (K, H) tuples
and their number, and the scores as (K,). `PaddedLegal` is all that stands between: it makes the
distribution from these three. The environment deals one decision an episode: a duel between units
of four kinds, of which only some may fight; what a pair of kinds pays is no sum of its parts.

    pip install torchrl tensordict
    python examples/torchrl_policy.py

Run with torchrl 0.14.1, tensordict 0.14.3 and torch 2.13.0.
"""

from __future__ import annotations

import argparse

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import tcg_flatpolicy as fp

UNITS, KINDS, ROOM = 4, 4, 1 + 4 * 4
SPEC = fp.ActionSpec(
    [
        fp.Primary("rest"),
        fp.Primary("attack", fp.Entity("ally", UNITS), fp.Entity("enemy", UNITS)),
    ]
)
REST = 0.3
PAIRS = torch.rand(KINDS, KINDS, generator=torch.Generator().manual_seed(5))
"""(4, 4): what an attack of a kind on a kind pays."""


class PaddedLegal(fp.LegalCategorical):
    """The adapter: from (B, K, H) tuples, of which (B,) count are legal, and (B, K) scores."""

    def __init__(self, tuples: Tensor, count: Tensor, scores: Tensor) -> None:
        legal = fp.LegalActions.from_padded(tuples, count)
        super().__init__(legal, scores[places(count)])

    @property
    def deterministic_sample(self) -> Tensor:
        """What TorchRL plays when it does not explore: (B, H), the most probable tuple."""
        return self.mode


def places(count: Tensor) -> Tensor:
    """(B,) -> (B, K) bool: which places of the padded list are legal tuples."""
    return torch.arange(ROOM) < count.unsqueeze(1)


def pay(kinds: Tensor, tuples: Tensor) -> Tensor:
    """Kinds (B, 8) and tuples (B, K, 3) -> (B, K), what each pays."""
    ally, enemy = (kinds.gather(1, tuples[..., 1 + j] + j * UNITS) for j in range(2))
    return torch.where(tuples[..., 0] == 1, PAIRS[ally, enemy], REST)


class Duels(EnvBase):
    """A batch of duels, each one decision long."""

    def __init__(self, duels: int, seed: int) -> None:
        super().__init__(batch_size=[duels])
        self.generator = torch.Generator().manual_seed(seed)
        self.observation_spec = Composite(
            kinds=Categorical(KINDS, shape=[duels, 2 * UNITS]),
            tuples=Bounded(0, UNITS, shape=[duels, ROOM, 3], dtype=torch.int64),
            count=Categorical(1 + ROOM, shape=[duels]),
            shape=[duels],
        )
        self.action_spec = MultiCategorical(SPEC.nvec.tolist(), shape=[duels, 3])
        self.reward_spec = Unbounded(shape=[duels, 1])
        self.illegal = 0

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDictBase:
        """Deals kinds of units, and which may fight which; to rest is always legal."""
        duels = self.batch_size[0]
        kinds = torch.randint(KINDS, (duels, 2 * UNITS), generator=self.generator)
        allowed = torch.rand(duels, UNITS, UNITS, generator=self.generator) < 0.3
        lists = [[(0, 0, 0), *((1, *pair) for pair in may.nonzero().tolist())] for may in allowed]
        count = torch.tensor([len(listed) for listed in lists])
        tuples = torch.zeros(duels, ROOM, 3, dtype=torch.int64)
        tuples[places(count)] = torch.tensor([one for listed in lists for one in listed])
        return TensorDict({"kinds": kinds, "tuples": tuples, "count": count}, self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Pays for what was played, and ends the episode."""
        shown = tensordict.select("kinds", "tuples", "count")
        action = tensordict["action"].unsqueeze(1)  # (B, 1, 3)
        listed = (action == shown["tuples"]).all(2) & places(shown["count"])
        self.illegal += int((~listed.any(1)).sum())
        ended = torch.ones(*self.batch_size, 1, dtype=torch.bool)
        reward = pay(shown["kinds"], action)
        return shown.update({"reward": reward, "done": ended, "terminated": ended.clone()})

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.generator.manual_seed(seed)


class Scores(nn.Module):
    """Kinds (B, 8), tuples (B, K, 3) and their number (B,) -> scores (B, K)."""

    def __init__(self, hidden: int = 64, size: int = 16) -> None:
        super().__init__()
        self.units = nn.Embedding(KINDS, size)
        self.trunk = nn.Sequential(nn.Linear(2 * UNITS * size, hidden), nn.ReLU())
        self.scorer = fp.TupleScorer(SPEC, hidden, {"ally": (UNITS, size), "enemy": (UNITS, size)})

    def forward(self, kinds: Tensor, tuples: Tensor, count: Tensor) -> Tensor:
        """As the class says."""
        units = self.units(kinds)  # (B, 8, E)
        entities = {"ally": units[:, :UNITS], "enemy": units[:, UNITS:]}
        legal = fp.LegalActions.from_padded(tuples, count)
        scores = self.scorer(self.trunk(units.flatten(1)), entities, legal)  # (N,)
        return scores.new_zeros(tuples.shape[:2]).masked_scatter(places(count), scores)


class Value(nn.Module):
    """Kinds (*B, 8) -> values (*B, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 * UNITS * KINDS, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, kinds: Tensor) -> Tensor:
        """As the class says."""
        return self.net(nn.functional.one_hot(kinds, KINDS).flatten(-2).float())


def make_actor(env: Duels) -> ProbabilisticActor:
    """TorchRL's actor, which draws its actions from PaddedLegal."""
    return ProbabilisticActor(
        TensorDictModule(Scores(), in_keys=["kinds", "tuples", "count"], out_keys=["scores"]),
        in_keys=["tuples", "count", "scores"],
        distribution_class=PaddedLegal,
        spec=env.action_spec,
        return_log_prob=True,
    )


def main(arguments: list[str] | None = None) -> tuple[list[float], int]:
    """Trains with PPO; returns each batch's share of the best pay, and the illegal actions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=20, help="batches to learn from")
    parser.add_argument("--duels", type=int, default=256, help="of a batch, times 4")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    env = Duels(options.duels, options.seed)
    actor = make_actor(env)
    critic = ValueOperator(Value(), in_keys=["kinds"])
    batch = 4 * options.duels
    collector = Collector(
        env,
        actor,
        frames_per_batch=batch,
        total_frames=options.updates * batch,
        auto_register_policy_transforms=False,  # nothing here is recurrent
    )
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.003)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    shares: list[float] = []
    for collected in collector:
        with torch.no_grad():
            advantage(collected)
        rows = collected.reshape(-1)
        for chosen in torch.randperm(len(rows)).repeat(2).split(batch // 2):
            losses = loss(rows[chosen])
            total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        best = pay(rows["kinds"], rows["tuples"]).where(places(rows["count"]), 0).amax(1)
        shares.append((rows["next", "reward"].mean() / best.mean()).item())
        print(f"{len(shares) * batch:>8,} duels  {shares[-1]:.1%} of the best", flush=True)
    collector.shutdown()
    print(f"{env.illegal} illegal actions")
    return shares, env.illegal


if __name__ == "__main__":
    main()
