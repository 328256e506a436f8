"""Two players, one policy: what empty lists cost, and what they do to the trainer's numbers.

Half of the rows belong to the player who waits. The first table takes batches as they are, and the
same batches without those rows, in turn on one thread. The second trains a policy of both players
of Essence Wars with PuffeRL as it is, and looks at rollouts on the way: what the trainer makes of
all rows, against what the rows with a list alone would give. It does so twice: who waits sees the
game from its own side, as in EssenceWarsTwoPlayers, or nothing at all, as through PettingZoo.

    python benchmarks/two_players.py           # about a quarter of an hour
    python benchmarks/two_players.py --quick   # about two minutes
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from end_to_end import quiet
from head import HIDDEN, PADDING, SPEC, WIDTH, Batch, both_ways, layout, ours, pool
from pufferlib import vector
from pufferlib.pufferl import PuffeRL, compute_puff_advantage
from pufferlib.pytorch import sample_logits
from torch import Tensor

import tcg_flatpolicy as fp
from tcg_flatpolicy.app.evaluate import WinRate, play
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.app.train import make_policy
from tcg_flatpolicy.games.essence_wars import EssenceWars
from tcg_flatpolicy.games.essence_wars.two_players import EssenceWarsTwoPlayers

GAMES = 128
HALF, WITHOUT = "half of the rows empty", "the rows with a list"
SETTINGS = Settings(two_players=True, num_games=GAMES, total_steps=10**9, anneal_lr=False)


class Blank(EssenceWarsTwoPlayers):
    """Who waits sees nothing."""

    def reset(self, seed: int | None = None) -> Any:
        told = super().reset(seed)
        self.observations[self.waiting()] = 0
        return told

    def step(self, actions: Any) -> Any:
        told = super().step(actions)
        self.observations[self.waiting()] = 0
        return told


# What empty rows cost.


def only_lists(batch: Batch) -> Batch:
    """The batch without its empty rows."""
    kept = layout(PADDING).read(batch.observations).counts > 0
    return Batch(
        batch.observations[kept],
        batch.scores,
        batch.padded[kept],
        batch.heads[kept],
        batch.masks[kept],
        batch.hidden.detach()[kept].requires_grad_(),
    )


def head_costs(size: int, seconds: float) -> list[list[str]]:
    """Time of the head with empty rows over its time without, lines of the table."""
    scorer = fp.TupleScorer(SPEC, HIDDEN, width=WIDTH)
    parameters = [p for p in scorer.parameters() if p.numel()]
    batches = pool(size)
    contenders = {}
    for rows, some in ((HALF, batches), (WITHOUT, [only_lists(b) for b in batches])):
        contenders |= both_ways(
            f"scores given, {rows}",
            some,
            partial(ours, layout(PADDING), score=lambda b, legal: b.scores),
            lambda b: [b.scores],
        )
        contenders |= both_ways(
            f"with the scorer, {rows}",
            some,
            partial(ours, layout(PADDING), score=lambda b, legal: scorer(b.hidden, {}, legal)),
            lambda b: [b.hidden, *parameters],
        )
    times = measure.interleave(contenders, seconds)
    return [
        cost(times, what, str(size), direction)
        for what in ("scores given", "with the scorer")
        for direction in ("draw", "and backward")
    ]


def policy_costs(observations: Tensor, seconds: float) -> list[list[str]]:
    """The same of a whole policy of the game, whose encoder works for every row's value."""
    policy = make_policy(SETTINGS, EssenceWars(1))
    kept = policy.layout.read(observations).counts > 0
    contenders = {}
    for rows, some in ((HALF, observations), (WITHOUT, observations[kept])):
        contenders[f"the whole policy, {rows}, draw"] = lambda call, some=some: draw(policy, some)
        contenders[f"the whole policy, {rows}, and backward"] = lambda call, some=some: update(
            policy, some
        )
    times = measure.interleave(contenders, seconds)
    return [
        cost(times, "the whole policy", str(len(observations)), direction)
        for direction in ("draw", "and backward")
    ]


@torch.no_grad()
def draw(policy: fp.Policy, observations: Tensor) -> Any:
    return sample_logits(policy.forward_eval(observations, {})[0])


def update(policy: fp.Policy, observations: Tensor) -> None:
    face, value = policy(observations, {})
    _, log_prob, entropy = sample_logits(face)
    (log_prob.sum() + entropy.sum() + value.sum()).backward()
    policy.zero_grad()


def cost(times: dict[str, measure.Times], what: str, size: str, direction: str) -> list[str]:
    ratio = times[f"{what}, {HALF}, {direction}"] / times[f"{what}, {WITHOUT}, {direction}"]
    found = measure.figure(ratio)
    return [what, size, direction, measure.number(found.median), found.spread]


# What they do to the trainer's numbers.


class Numbers(NamedTuple):
    """Of one rollout: what the trainer makes of all rows, and what those with a list alone give."""

    steps: int
    entropy: float
    """Mean over all rows, which the trainer reports."""
    entropy_of_decisions: float
    waiting_deviation: float
    """Deviation of the waiting rows' advantages, over that of the decisions'."""
    shift: float
    """Mean of the decisions' advantages as the trainer has normalised them; 0 without the rest."""
    policy_gradient: float
    """Its norm over that of the decisions alone, normalised among themselves."""
    cosine: float
    """Between these two gradients."""
    entropy_gradient: float
    """Its norm over that of the decisions alone."""
    value_gradient: float
    """Likewise."""
    explained: float
    """Share of the variance of the decisions' returns that their values explain."""

    def cells(self) -> list[str]:
        """As the table shows it."""
        return [
            f"{self.steps:,}",
            f"{self.entropy:.2f} / {self.entropy_of_decisions:.2f}",
            f"{self.waiting_deviation:.2f}",
            f"{self.shift:+.2f}",
            f"{self.policy_gradient:.2f}",
            f"{self.cosine:.3f}",
            f"{self.entropy_gradient:.2f}",
            f"{self.value_gradient:.2f}",
            f"{self.explained:.2f}",
        ]


def numbers(trainer: Any, policy: fp.Policy) -> Numbers:
    """Of the rollout that the trainer has just made, before it learns from it."""
    config = trainer.config
    advantages = compute_puff_advantage(
        trainer.values,
        trainer.rewards,
        trainer.terminals,
        torch.ones_like(trainer.values),
        torch.zeros_like(trainer.values),
        config["gamma"],
        config["gae_lambda"],
        config["vtrace_rho_clip"],
        config["vtrace_c_clip"],
    ).flatten()
    observations = trainer.observations.flatten(0, 1)
    decides = policy.layout.read(observations).counts > 0
    torch.set_autocast_enabled("cpu", False)  # train() enters it and never leaves
    face, value = policy(observations, {})
    _, log_prob, entropy = sample_logits(face, action=trainer.actions.flatten(0, 1))
    error = 0.5 * (value.flatten() - advantages - trainer.values.flatten()) ** 2

    def gradient(loss: Tensor) -> Tensor:
        parameters = list(policy.parameters())
        found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([one.flatten() for one in found])

    of_all = (advantages - advantages.mean()) / advantages.std()
    mine = advantages[decides]
    of_decisions = (mine - mine.mean()) / mine.std()
    got = gradient((of_all * log_prob).mean())
    alone = gradient((of_decisions * log_prob[decides]).mean())
    returns = mine + trainer.values.flatten()[decides]
    return Numbers(
        trainer.global_step,
        float(entropy.detach().mean()),
        float(entropy.detach()[decides].mean()),
        float(advantages[~decides].std() / mine.std()),
        float(of_all[decides].mean()),
        float(got.norm() / alone.norm()),
        float(torch.cosine_similarity(got, alone, dim=0)),
        float(gradient(entropy.mean()).norm() / gradient(entropy[decides].mean()).norm()),
        float(gradient(error.mean()).norm() / gradient(error[decides].mean()).norm()),
        float(1 - mine.var() / returns.var()),
    )


def train(kind: Any, epochs: list[int], folder: Path, games: int) -> tuple[list[Numbers], WinRate]:
    """Numbers before these epochs (from 0) and, after them, games against the greedy opponent."""
    torch.manual_seed(SETTINGS.seed)
    vecenv = vector.make(
        kind, env_kwargs={"num_games": GAMES}, backend=vector.Serial, num_envs=1, seed=1
    )
    policy = make_policy(SETTINGS, vecenv.driver_env)
    with quiet():
        trainer = PuffeRL(SETTINGS.trainer_config(vecenv, "cpu", folder), vecenv, policy)
    found = []
    for epoch in range(epochs[-1] + 1):
        with quiet():
            trainer.evaluate()
        if epoch in epochs:
            found.append(numbers(trainer, policy))
        with quiet():
            trainer.train()
    if vecenv.driver_env.illegal_actions:
        raise RuntimeError(f"{vecenv.driver_env.illegal_actions} illegal actions")
    trainer.utilization.stop()
    return found, play(policy, EssenceWars(min(games, 100)), games, seed=0)


def played(steps: int) -> Tensor:
    """(2 * GAMES, nbytes) uint8: states after some steps of uniformly random play."""
    env = EssenceWarsTwoPlayers(GAMES)
    env.reset(0)
    torch.manual_seed(0)
    for _ in range(steps):
        legal = env.legal_layout.read(torch.as_tensor(env.observations))
        env.step(fp.LegalCategorical(legal, torch.zeros(len(legal.actions))).sample().numpy())
    return torch.as_tensor(env.observations.copy())


def main() -> None:
    """Measures, prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about two minutes; shorter training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds = 4.0 if arguments.quick else 12.0
    costs = [line for size in (512, 2048, 8192) for line in head_costs(size, seconds)]
    states = torch.cat([played(steps) for steps in range(20, 60, 5)])
    costs += policy_costs(states, seconds)

    epochs = [0, 3, 7] if arguments.quick else [0, 3, 7, 15, 31, 63]
    lines: list[list[str]] = []
    figures: dict[str, Any] = {}
    told = []
    for view, kind in (("its own side", EssenceWarsTwoPlayers), ("nothing", Blank)):
        with tempfile.TemporaryDirectory() as folder:
            found, wins = train(kind, epochs, Path(folder), 100 if arguments.quick else 1000)
        lines += [[view, *one.cells()] for one in found]
        figures[view] = {"numbers": [one._asdict() for one in found], "wins": str(wins)}
        told.append(f"- who waits sees {view}: {wins}")
    costs_header = ["time with / without the empty rows", "rows", "direction", "ratio"]
    body = (
        f"# Two players, one policy\n\n{NOTES_COSTS}\n"
        + measure.table([*costs_header, "middle 80%"], costs)
        + f"\n{NOTES_NUMBERS}\n"
        + measure.table(["who waits sees", *HEADER], lines)
        + f"\n{NOTES_WINS}\n\n"
        + "\n".join(told)
        + "\n"
    )
    measure.write("two_players", body, {"costs": costs, **figures})


HEADER = [
    "steps",
    "entropy: reported / of decisions",
    "deviation of waiting rows' advantages / decisions'",
    "decisions' mean normalised advantage",
    "policy gradient / that of decisions alone",
    "cosine",
    "entropy's gradient /",
    "value's gradient /",
    "explained variance",
]

NOTES_COSTS = f"""\
Processor times of the same round on one thread. "with / without" is the time of a batch, half of
whose rows have empty lists, over that of the same batch without these rows: 1 is for nothing. Lists
as in benchmarks/head.py, padded to {PADDING}. The whole policy is that of `python -m tcg_flatpolicy
train`, on states of the game: its encoder works for the waiting rows too, since each has a value.
"""

NOTES_NUMBERS = f"""\
One rollout of {GAMES} games, {2 * GAMES * SETTINGS.bptt_horizon} rows, half of them with a list.
"/ that of decisions alone" is the norm of the gradient of the trainer's mean over all rows over
that of the mean over the rows with a list, advantages normalised among these: 0.5 is the share of
rows, which Adam does not see.
"""

NOTES_WINS = """\
Games won as the first player against the batch engine's greedy opponent, which the policy has not
met in training, sampling, after the steps above and one more epoch (in brackets the 95% interval;
one seed each):"""

if __name__ == "__main__":
    main()
