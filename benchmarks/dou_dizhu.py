"""The game where everybody else pads: dou dizhu, 26,057 action ids, at most some hundred legal.

FlatPolicy over tuples under PufferLib's trainer, against MaskablePPO of sb3-contrib over the ids,
each alone on one thread for the same processor time, with seeds in turn. One learner in a random
seat, two opponents who play at random. Wins are counted over games that are not trained on, with
the clock stopped. Needs sb3-contrib besides what `make setup` installs.

    python benchmarks/dou_dizhu.py                 # 5 seeds of 60 s each: about 20 minutes
    python benchmarks/dou_dizhu.py --quick         # 1 seed of 10 s
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import measure
import numpy as np
import torch
from pufferlib import vector
from pufferlib.pufferl import PuffeRL

import tcg_flatpolicy as fp
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.games import dou_dizhu
from tcg_flatpolicy.games.spiel import SpielGames
from tcg_flatpolicy.puffer.games import wilson_interval

OURS, THEIRS = "FlatPolicy, tuples", "MaskablePPO, ids"
GAMES, SLOTS = 600, 100
"""Of an evaluation, and how many of them at a time; each slot plays the same number."""
ROLES = ("landlord", "peasant")
SETTINGS = Settings(
    num_games=64,
    bptt_horizon=32,
    minibatch_size=1024,
    update_epochs=3,
    learning_rate=1e-3,
    anneal_lr=False,
    hidden_size=256,
    total_steps=10**9,
)

Choose = Callable[[Any, np.random.Generator], np.ndarray]
"""Environment of SLOTS games, generator -> actions."""
Wins = dict[str, tuple[int, int]]
"""Games won and played: "all" with bids of the policy's own; each role with bids at random."""
Point = tuple[float, int, Wins]
"""Seconds of the processor spent on training, steps, and what was won then."""


def evaluate(env: Any, choose: Choose, seed: int) -> Wins:
    """Plays GAMES games with bids of its own, and as many with random bids, to see both roles."""
    own, drawn = (_play(env, choose, seed, bids) for bids in (False, True))
    return {"all": (sum(w for w, _ in own.values()), GAMES), **drawn}


def _play(env: Any, choose: Choose, seed: int, random_bids: bool) -> Wins:
    """Wins and games of each role, over GAMES games; those that nobody bids for do not count."""
    env.reset(seed)
    rng = np.random.default_rng(seed)
    played = np.zeros(SLOTS, int)
    found = {role: [0, 0] for role in ROLES}
    records = env.observations.view(env.observation_dtype)[:, 0]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while (played < GAMES // SLOTS).any():
            position = records["tensor"][:, :3].argmax(1)  # 0 is the landlord
            bidding = records["tensor"][:, :3].max(1) == 0
            actions = choose(env, rng)
            if random_bids:
                actions[bidding] = at_random(env, rng)[bidding]
            _, rewards, terminals, _, _ = env.step(actions)
            for slot in np.flatnonzero(terminals & ~bidding & (played < GAMES // SLOTS)):
                played[slot] += 1
                role = found[ROLES[int(position[slot] > 0)]]
                role[0] += int(rewards[slot] > 0)
                role[1] += 1
    return {role: (won, games) for role, (won, games) in found.items()}


def at_random(env: Any, rng: np.random.Generator) -> np.ndarray:
    """A listed tuple of each row."""
    records = env.observations.view(env.observation_dtype)[:, 0]
    drawn = (rng.random(len(records)) * records["n_legal"]).astype(int)
    return records["legal"][np.arange(len(records)), drawn].astype(np.int64)


def train_ours(seed: int, marks: list[float], folder: Path) -> Iterator[Point]:
    """A point at each mark, in seconds of the processor."""
    vecenv = vector.make(
        dou_dizhu.make,
        env_kwargs={"num_games": SETTINGS.num_games},
        backend=vector.Serial,
        num_envs=1,
        seed=seed,
    )
    torch.manual_seed(seed)
    policy = fp.FlatPolicy(vecenv.driver_env, hidden_size=SETTINGS.hidden_size)
    examined = dou_dizhu.make(SLOTS)

    def choose(env: Any, rng: np.random.Generator) -> np.ndarray:
        face, _ = policy.forward_eval(torch.from_numpy(env.observations))
        return face.sample().numpy()

    def point(spent: float, steps: int) -> Point:
        policy.eval()
        try:
            return spent, steps, evaluate(examined, choose, 10**6 + seed)
        finally:
            policy.train()

    config = replace(SETTINGS, seed=seed).trainer_config("cpu", folder)
    with quiet():
        trainer = PuffeRL(config, vecenv, policy)
    try:
        yield point(0.0, 0)
        spent = 0.0
        for mark in marks:
            while spent < mark:
                begin = time.process_time()
                with quiet():
                    trainer.evaluate()
                    trainer.train()
                spent += time.process_time() - begin
            yield point(spent, trainer.global_step)
    finally:
        with quiet():
            trainer.close()


class MaskedIds(gymnasium.Env):  # type: ignore[type-arg]
    """One game as sb3-contrib takes it: ids, and a mask over all of them."""

    def __init__(self, seed: int) -> None:
        self.games = SpielGames("dou_dizhu", num_games=1, room=dou_dizhu.ROOM, seed=seed)
        self.record = self.games.observations.view(self.games.observation_dtype)[0, 0]
        size = self.record["tensor"].shape
        self.observation_space = gymnasium.spaces.Box(0, 1, size, np.float32)
        self.action_space = gymnasium.spaces.Discrete(int(self.games.action_spec.nvec[0]))

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, Any]:
        self.games.reset(seed)
        return self.record["tensor"].copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, Any]:
        _, rewards, terminals, _, _ = self.games.step(np.array([[action]]))
        return self.record["tensor"].copy(), float(rewards[0]), bool(terminals[0]), False, {}

    def action_masks(self) -> np.ndarray:
        mask = np.zeros(self.action_space.n, bool)
        mask[self.record["legal"][: self.record["n_legal"], 0]] = True
        return mask


def train_theirs(seed: int, marks: list[float]) -> Iterator[Point]:
    """As train_ours. The network is as wide and as deep as ours."""
    from sb3_contrib import MaskablePPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv

    envs = DummyVecEnv([lambda k=k: MaskedIds(1000 * seed + k) for k in range(16)])
    model = MaskablePPO(
        "MlpPolicy",
        envs,
        n_steps=32,
        batch_size=256,
        n_epochs=3,
        learning_rate=SETTINGS.learning_rate,
        gamma=SETTINGS.gamma,
        gae_lambda=SETTINGS.gae_lambda,
        ent_coef=SETTINGS.ent_coef,
        policy_kwargs={"net_arch": [256, 256], "activation_fn": torch.nn.ReLU},
        seed=seed,
        device="cpu",
    )
    examined = SpielGames("dou_dizhu", num_games=SLOTS, room=dou_dizhu.ROOM)
    records = examined.observations.view(examined.observation_dtype)[:, 0]

    def choose(env: Any, rng: np.random.Generator) -> np.ndarray:
        masks = np.zeros((SLOTS, 26057), bool)
        for row, record in enumerate(records):
            masks[row, record["legal"][: record["n_legal"], 0]] = True
        actions, _ = model.predict(records["tensor"], action_masks=masks, deterministic=False)
        return actions[:, None]

    points: list[Point] = [(0.0, 0, evaluate(examined, choose, 10**6 + seed))]

    class Clock(BaseCallback):
        spent, since = 0.0, 0.0

        def _on_rollout_start(self) -> None:
            self._look()

        def _on_step(self) -> bool:
            return len(points) <= len(marks)

        def _on_training_start(self) -> None:
            self.since = time.process_time()

        def _look(self) -> None:
            self.spent += time.process_time() - self.since
            if len(points) <= len(marks) and self.spent >= marks[len(points) - 1]:
                result = evaluate(examined, choose, 10**6 + seed)
                points.append((self.spent, self.num_timesteps, result))
            self.since = time.process_time()

    model.learn(10**9, callback=Clock())
    yield from points


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the trainer's dashboard, and without torch's word on autocast in float32."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def rate(found: Wins, of: str = "all") -> float:
    """The share of games won."""
    won, games = found[of]
    return won / max(1, games)


def draw(runs: dict[str, list[list[Point]]], path: Path) -> None:
    """Win rate over processor time and over steps, a thin line a seed and a thick one of means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for name, colour in ((OURS, "#1f5fa8"), (THEIRS, "#c8792b")):
        for axis, column in zip(axes, (0, 1), strict=True):
            lines = [
                ([p[column] for p in run], [100 * rate(p[2]) for p in run]) for run in runs[name]
            ]
            for x, y in lines:
                axis.plot(x, y, color=colour, alpha=0.25, linewidth=1)
            mean = np.mean([x for x, _ in lines], 0), np.mean([y for _, y in lines], 0)
            axis.plot(*mean, color=colour, linewidth=2.2, label=name, marker="o", markersize=3)
    axes[0].set_xlabel("seconds of one processor")
    axes[1].set_xlabel("environment steps")
    axes[1].set_xscale("symlog", linthresh=1000)
    axes[0].set_ylabel("games won against random play [%]")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower right")
    figure.suptitle("Dou dizhu: 26,057 action ids, one learner against two random players")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Trains, prints and writes the table, the figures and a picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed of 10 s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    marks = [2.0, 5.0, 10.0] if arguments.quick else [2.0, 5.0, 10.0, 20.0, 40.0, 60.0]
    seeds = [1] if arguments.quick else [1, 2, 3, 4, 5]
    random = evaluate(dou_dizhu.make(SLOTS), at_random, 10**6)
    runs: dict[str, list[list[Point]]] = {OURS: [], THEIRS: []}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs[OURS].append(list(train_ours(seed, marks, Path(folder))))
        runs[THEIRS].append(list(train_theirs(seed, marks)))
        for name, of in runs.items():
            last = of[-1][-1]
            print(f"seed {seed}, {name}: {last[1]:,} steps, {rate(last[2]):.1%}", flush=True)
    lines = []
    for name, of in runs.items():
        last = [run[-1] for run in of]
        wins = sum(found["all"][0] for _, _, found in last)
        low, high = wilson_interval(wins, GAMES * len(last))
        shares = [rate(found) for _, _, found in last]
        lines.append(
            [
                name,
                f"{np.mean([steps for _, steps, _ in last]):,.0f}",
                f"{np.mean(shares):.1%}",
                f"[{low:.1%}, {high:.1%}]",
                f"{min(shares):.1%} to {max(shares):.1%}",
                *(f"{np.mean([rate(found, role) for _, _, found in last]):.1%}" for role in ROLES),
            ]
        )
    # Equal steps: ours where it had made at most as many as theirs at the end.
    most = min(run[-1][1] for run in runs[THEIRS])
    early = [max((p for p in run if p[1] <= most), key=lambda p: p[1]) for run in runs[OURS]]
    body = (
        f"# Dou dizhu\n\nAfter {marks[-1]:.0f} seconds of one processor, {len(seeds)} seeds, "
        f"{GAMES} games each against random play (random play itself wins {rate(random):.1%}). "
        f"By role: another {GAMES} games in which it bids at random.\n\n"
        + measure.table(
            ["", "steps", "won", "95% interval", "seeds", *(f"as {role}" for role in ROLES)], lines
        )
        + f"\nWith no more steps than {THEIRS} made in all, {most:,}, {OURS} had made "
        f"{np.mean([p[1] for p in early]):,.0f} in {np.mean([p[0] for p in early]):.1f} seconds, "
        f"and won {np.mean([rate(p[2]) for p in early]):.1%}.\n"
    )
    measure.write("dou_dizhu", body, {"runs": runs, "random": random})
    draw(runs, measure.RESULTS / "dou_dizhu.png")


if __name__ == "__main__":
    main()
