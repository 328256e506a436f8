"""What LegalityMonitor costs: PuffeRL's steps per second on Essence Wars, with it and without.

Two trainers from the same seed, with the settings of `python -m tcg_flatpolicy train`, one epoch of
each in turn, on one thread. The monitor changes nothing of a run, so both do the same work but for
the check; the check by itself is timed too, on stored states.

    python benchmarks/monitor.py           # some minutes
    python benchmarks/monitor.py --quick   # about one
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from end_to_end import quiet
from pufferlib import vector
from pufferlib.pufferl import PuffeRL

import tcg_flatpolicy as fp
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.app.train import make_policy
from tcg_flatpolicy.games.essence_wars import EssenceWars
from tcg_flatpolicy.verify.monitor import LegalityMonitor

WITH, WITHOUT = "with the monitor", "without"
GAMES = 256
SETTINGS = Settings(num_games=GAMES, total_steps=10**9)
TARGET = 0.95
STATES = 64


class Replay:
    """A vector environment that shows stored states in turn, and does nothing else."""

    def __init__(self, layout: fp.LegalLayout, states: list[Any]) -> None:
        self.legal_layout, self.states = layout, states
        self.ids, self.masks = np.arange(len(states[0])), np.ones(len(states[0]), bool)
        self.at = -1

    def recv(self) -> Any:
        self.at = (self.at + 1) % len(self.states)
        return self.states[self.at], None, None, None, None, [], self.ids, self.masks

    def send(self, actions: Any) -> None:
        pass


def make_vecenv() -> Any:
    return vector.make(
        EssenceWars,
        env_kwargs={"num_games": GAMES},
        backend=vector.Serial,
        num_envs=1,
        seed=SETTINGS.seed,
    )


def train_in_turn(
    seconds: float, folder: Path
) -> tuple[dict[tuple[str, str], measure.Times], LegalityMonitor]:
    """(trainer, phase) -> (rounds,) seconds of each epoch, and the monitor after them.

    Seconds of the processor, as in measure.interleave.
    """
    trainers = {}
    for name in (WITH, WITHOUT):
        torch.manual_seed(SETTINGS.seed)
        vecenv = make_vecenv()
        policy = make_policy(SETTINGS, vecenv.driver_env)
        if name == WITH:
            vecenv = monitor = LegalityMonitor(vecenv)
        with quiet():
            trainers[name] = PuffeRL(
                SETTINGS.trainer_config(vecenv, "cpu", folder / name), vecenv, policy
            )
    times: dict[tuple[str, str], list[float]] = {}
    order = list(trainers)
    end = time.perf_counter() + seconds
    rounds = -1  # the first round also pays for what is set up once, and does not count
    try:
        while rounds < measure.FEWEST_ROUNDS or time.perf_counter() < end:
            for name in order:
                torch.manual_seed(rounds + 1)  # the same draws for both
                with quiet():
                    begin = time.process_time()
                    trainers[name].evaluate()
                    between = time.process_time()
                    trainers[name].train()
                    done = time.process_time()
                if rounds >= 0:
                    times.setdefault((name, "total"), []).append(done - begin)
                    times.setdefault((name, "rollout"), []).append(between - begin)
            order.reverse()
            rounds += 1
    finally:
        for trainer in trainers.values():
            with quiet():
                trainer.close()
    return {key: np.array(values) for key, values in times.items()}, monitor


def by_itself(seconds: float) -> measure.Times:
    """(rounds,) seconds of the processor that the monitor takes for a state of all games."""
    env = EssenceWars(GAMES, seed=SETTINGS.seed)
    env.reset(SETTINGS.seed)
    rng = np.random.default_rng(SETTINGS.seed)
    states, actions = [], []
    for _ in range(STATES):
        legal = env.legal_layout.read(torch.as_tensor(env.observations))
        drawn = legal.starts + torch.as_tensor(rng.integers(0, legal.counts.numpy()))
        states.append(env.observations.copy())
        actions.append(legal.actions[drawn].numpy())
        env.step(actions[-1])
    bare = Replay(env.legal_layout, states)
    watched = LegalityMonitor(Replay(env.legal_layout, states))

    def step(vecenv: Any, replay: Replay) -> None:
        vecenv.recv()
        vecenv.send(actions[replay.at])

    times = measure.interleave(
        {
            WITH: lambda call: step(watched, watched.vecenv),
            WITHOUT: lambda call: step(bare, bare),
        },
        seconds,
    )
    return times[WITH] - times[WITHOUT]


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about a minute; wider spreads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    alone = measure.figure(by_itself(3 if arguments.quick else 15))
    with tempfile.TemporaryDirectory() as folder:
        taken, monitor = train_in_turn(40 if arguments.quick else 240, Path(folder))
    monitor.report().raise_for_findings()

    lines, figures = [], {}
    for phase in ("total", "rollout"):
        ratio = measure.figure(taken[WITHOUT, phase] / taken[WITH, phase])
        target, met = "", ""
        if phase == "total":
            target, met = f"≥ {TARGET}", "yes" if ratio.median >= TARGET else "NO"
        lines.append([phase, target, measure.number(ratio.median), ratio.spread, met])
        figures[phase] = {"ratio": ratio._asdict()} | {
            name: measure.figure(GAMES * SETTINGS.bptt_horizon / taken[name, phase])._asdict()
            for name in (WITH, WITHOUT)
        }
    epoch = float(np.median(taken[WITHOUT, "total"]))
    share = 100 * alone.median * SETTINGS.bptt_horizon / epoch
    rounds = len(taken[WITH, "total"])
    body = (
        f"# The monitor's cost\n\nSteps per second of the processor {WITH}, as a share of those "
        f"{WITHOUT}, {rounds} rounds:\n\n"
        + measure.table(["", "target", "ratio", "middle 80%", "met"], lines)
        + f"\nBy itself it takes {1e6 * alone.median:.0f} µs of the processor (middle 80%: "
        f"{1e6 * alone.low:.0f} to {1e6 * alone.high:.0f}) for a state of {GAMES} "
        f"games, which is {share:.1f}% of a training run's time.\n\n"
        f"It checked {monitor.counts.sent:,} actions; {monitor.counts.illegal} were illegal.\n"
    )
    figures["alone, seconds a state"] = alone._asdict()
    figures["alone, % of training"] = share
    measure.write("monitor", body, figures)


if __name__ == "__main__":
    main()
