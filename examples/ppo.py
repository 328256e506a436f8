"""PPO in one file on a real card game, with LegalCategorical: no PufferLib, no trainer to fit into.

The game, Essence Wars, numbers its actions 0..541 and gives a 0/1 mask of the legal ones. Here each
number is a tuple with a meaning; the policy scores the legal tuples and draws one of them. It plays
the first side against the engine's greedy opponent, which random legal play beats in 1% of games.

    pip install essence-wars
    python examples/ppo.py
    python examples/ppo.py --total-steps 500000 --seed 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
from essence_wars._core import ACTION_SPACE_SIZE, STATE_TENSOR_SIZE, PyParallelGames
from torch import Tensor, nn

import tcg_flatpolicy as fp

# ---- what the engine's 542 numbers mean

HAND, BOARD = 10, 5
SPEC = fp.ActionSpec(
    [
        fp.Primary("end_turn"),
        fp.Primary("play_card", fp.Entity("hand", HAND), fp.Index("place", 12)),
        fp.Primary("attack", fp.Entity("ally", BOARD), fp.Entity("enemy", BOARD)),
        fp.Primary(
            "use_ability",
            fp.Entity("ally", BOARD),
            fp.Index("ability", 5),
            fp.OneOf(fp.Index("none", 1), fp.Entity("enemy", BOARD), fp.Entity("ally", BOARD)),
        ),
        fp.Primary("commander_insight"),
        fp.Primary("play_card_overload", fp.Entity("hand", HAND), fp.Index("place", 12)),
    ]
)
# In the engine's order: (primary, sizes of the slots that it uses), the last slot runs fastest.
ORDER = [(1, (10, 12)), (2, (5, 5)), (3, (5, 5, 11)), (4, ()), (0, ()), (5, (10, 12))]
TUPLES = torch.tensor(
    [
        (primary, *slots, *[0] * (3 - len(slots)))
        for primary, sizes in ORDER
        for slots in np.ndindex(*sizes)
    ]
)
"""(542, 4) int64: the tuple of each number."""
NUMBERS = {tuple(action): number for number, action in enumerate(TUPLES.tolist())}


class Games:
    """Games side by side against the engine's greedy opponent; one that ends starts anew.

    Attributes:
        states: (n, 356) float32, as the engine describes them.
        masks: (n, 542) bool, which numbers are legal.
        illegal: how many illegal actions were played so far.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.batch = PyParallelGames(
            n, "artificer_tokens", "broodmother_pack", "attrition", "greedy"
        )
        self.illegal = 0
        self._start(range(n))

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 4) tuples -> (n,) rewards, +1 for a win and -1 for a loss, and (n,) bool, ended."""
        numbers = [NUMBERS[tuple(action)] for action in actions.tolist()]
        self.illegal += int((~self.masks[torch.arange(len(numbers)), numbers]).sum())
        rewards, ended = self.batch.step_batch(np.array(numbers, np.uint16))
        self._start(np.flatnonzero(ended))
        return torch.tensor(rewards), torch.tensor(ended)

    def _start(self, games: range | np.ndarray) -> None:
        for game in games:
            self.batch.reset_single(int(game), int(self.rng.integers(2**63)))
        self.states = torch.tensor(self.batch.observe_batch())
        self.masks = torch.tensor(self.batch.action_mask_batch()) != 0


# ---- the agent


class Agent(nn.Module):
    """Embeds cards and creatures, sums the state up, and scores the legal tuples against it."""

    def __init__(self, hidden: int = 256, size: int = 32) -> None:
        super().__init__()
        self.cards = nn.Embedding(6000, size)
        self.creature = nn.Linear(12, size)
        self.place = nn.Parameter(torch.zeros(2, BOARD, size))
        self.trunk = nn.Sequential(
            nn.Linear(6 + 2 * (19 + BOARD * size + size), hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
        )
        entities = {"hand": (HAND, size), "ally": (BOARD, size), "enemy": (BOARD, size)}
        self.head = fp.FlatHead(SPEC, hidden, entities)
        self.value = nn.Linear(hidden, 1)
        nn.init.normal_(self.cards.weight, std=size**-0.5)

    def forward(self, states: Tensor, masks: Tensor) -> tuple[fp.LegalCategorical, Tensor]:
        """(B, 356) states and (B, 542) masks -> what to play, and (B,) values."""
        # Six numbers of the game, then of each player: five numbers, the ids of ten cards in hand,
        # five creatures of twelve numbers, and fourteen numbers of supports and what is prepared.
        players = states[:, 6:184].view(-1, 2, 89)
        hand = self.cards((players[..., 5:15] * 6000).round().long())  # (B, 2, 10, E)
        records = players[..., 15:75].reshape(-1, 2, BOARD, 12)
        units = torch.relu(self.creature(records) + self.place)  # (B, 2, 5, E)
        numbers = torch.cat([players[..., :5], players[..., 75:]], dim=2)
        parts = [states[:, :6], numbers, units, hand.sum(2)]
        hidden = self.trunk(torch.cat([part.flatten(1) for part in parts], dim=1))

        entities = {"hand": hand[:, 0], "ally": units[:, 0], "enemy": units[:, 1]}
        legal = fp.LegalActions(TUPLES[masks.nonzero()[:, 1]], masks.sum(1))
        return self.head(hidden, entities, legal), self.value(hidden).squeeze(1)


@torch.no_grad()
def win_rate(agent: Agent, seed: int, slots: int = 100, each: int = 5) -> float:
    """Share of slots * each games that it wins, drawing its actions; each slot plays as many."""
    games = Games(slots, seed)
    done, wins = torch.zeros(slots, dtype=torch.long), 0
    while (done < each).any():
        rewards, ended = games.step(agent(games.states, games.masks)[0].sample())
        counted = ended & (done < each)
        wins += int((counted & (rewards > 0)).sum())
        done += counted
    return wins / (slots * each)


# ---- PPO


def train(agent: Agent, options: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Trains, and says after each update how it went."""
    games = Games(options.num_games, options.seed)
    optimizer = torch.optim.Adam(agent.parameters(), lr=options.learning_rate)
    horizon, n = options.horizon, options.num_games
    batch = horizon * n
    updates = options.total_steps // batch

    states = torch.zeros(horizon, n, STATE_TENSOR_SIZE)
    masks = torch.zeros(horizon, n, ACTION_SPACE_SIZE, dtype=torch.bool)
    actions = torch.zeros(horizon, n, 4, dtype=torch.long)
    log_probs, rewards, values = (torch.zeros(horizon, n) for _ in range(3))
    ended = torch.zeros(horizon, n, dtype=torch.bool)

    for update in range(updates):
        optimizer.param_groups[0]["lr"] = options.learning_rate * (1 - update / updates)

        with torch.no_grad():
            for t in range(horizon):
                states[t], masks[t] = games.states, games.masks
                distribution, values[t] = agent(states[t], masks[t])
                actions[t] = distribution.sample()
                log_probs[t] = distribution.log_prob(actions[t])
                rewards[t], ended[t] = games.step(actions[t])
            next_value = agent(games.states, games.masks)[1]
            advantages = torch.zeros(horizon, n)
            running = torch.zeros(n)
            for t in reversed(range(horizon)):
                goes_on = (~ended[t]).float()
                delta = rewards[t] + options.gamma * next_value * goes_on - values[t]
                running = delta + options.gamma * options.gae_lambda * goes_on * running
                advantages[t], next_value = running, values[t]
            returns = advantages + values

        def rows(stored: Tensor) -> Tensor:
            return stored.flatten(0, 1)

        for _ in range(options.epochs):
            for chosen in torch.randperm(batch).split(options.minibatch):
                distribution, value = agent(rows(states)[chosen], rows(masks)[chosen])
                ratio = (
                    distribution.log_prob(rows(actions)[chosen]) - rows(log_probs)[chosen]
                ).exp()
                advantage = rows(advantages)[chosen]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                clipped = ratio.clamp(1 - options.clip, 1 + options.clip)
                policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                value_loss = (value - rows(returns)[chosen]).square().mean() / 2
                entropy = distribution.entropy().mean()
                loss = policy_loss + options.vf_coef * value_loss - options.ent_coef * entropy
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), options.max_grad_norm)
                optimizer.step()

        yield {
            "steps": (update + 1) * batch,
            "won": (rewards[ended] > 0).float().mean().item(),  # NaN where no game ended
            "loss": loss.item(),
            "entropy": entropy.item(),
            "illegal": games.illegal,
        }


def main(arguments: list[str] | None = None) -> None:
    """Trains and plays, as the flags say."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default, text in (
        ("seed", 1, "of the network, the games and the draws"),
        ("total-steps", 100_000, "environment steps to train for, in whole rollouts"),
        ("num-games", 128, "games played side by side"),
        ("horizon", 32, "steps of each game in a rollout"),
        ("epochs", 2, "passes over each rollout"),
        ("minibatch", 1024, "steps in a minibatch"),
        ("learning-rate", 2e-3, "of Adam, at the start; it falls to 0"),
        ("gamma", 0.995, "discount of a step"),
        ("gae-lambda", 0.9, "of the generalised advantage estimate"),
        ("clip", 0.2, "of the importance ratio"),
        ("ent-coef", 0.003, "weight of the entropy in the loss"),
        ("vf-coef", 0.5, "weight of the value loss"),
        ("max-grad-norm", 0.5, "clip of the gradient's norm"),
        ("eval-games", 500, "games before and after training, a multiple of 100; 0 for none"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    options = parser.parse_args(arguments)
    if options.total_steps < options.num_games * options.horizon:
        parser.error("--total-steps must be at least one rollout, --num-games times --horizon")
    if options.eval_games % 100:
        parser.error("--eval-games must be a multiple of 100: that many are played side by side")

    torch.set_num_threads(1)  # networks this small gain little from more
    torch.manual_seed(options.seed)
    agent = Agent()

    def evaluate(when: str) -> None:
        if options.eval_games:
            rate = win_rate(agent, options.seed + 1_000_000, each=options.eval_games // 100)
            print(f"{when}: wins {rate:.1%} of {options.eval_games} games", flush=True)

    evaluate("untrained")
    started = time.monotonic()
    for report in train(agent, options):
        speed = report["steps"] / (time.monotonic() - started)
        print(
            "{steps:>9,} steps  won {won:.3f}  loss {loss:.4f}  entropy {entropy:.3f}  "
            "{illegal} illegal".format(**report),
            f" {speed:,.0f} steps/s",
            flush=True,
        )
    evaluate("trained")


if __name__ == "__main__":
    main()
