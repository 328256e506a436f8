"""What legality costs in a whole training run: PuffeRL's steps per second on Essence Wars.

FlatPolicy against PufferLib's own unmasked multi-discrete head, with the same encoder and the same
trainer settings, one epoch of each in turn, on one thread. The unmasked head draws tuples that are
not legal; the environment plays a random legal one in their place. The two play other games, so
both are also timed on the same stored states, part by part.

    python benchmarks/end_to_end.py           # some minutes
    python benchmarks/end_to_end.py --quick   # about one
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

# This import takes SIGINT for itself (the process then ends at once, with nothing written) and
# turns every RuntimeWarning into an error.
from pufferlib import vector
from pufferlib.pufferl import PuffeRL
from pufferlib.pytorch import layer_init, sample_logits
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.games.essence_wars import SPEC, EssenceWars, EssenceWarsEncoder

OURS, THEIRS = "FlatPolicy", "unmasked heads"
GAMES = 256
SETTINGS = Settings(
    num_games=GAMES,
    bptt_horizon=32,
    minibatch_size=2048,
    update_epochs=3,
    learning_rate=1e-3,
    anneal_lr=False,
    total_steps=10**9,
)
TARGET = 0.7
PHASES = {
    "environment": ["env"],
    "rollout: policy": ["eval_forward"],
    "rollout: trainer": ["eval_copy", "eval_misc"],
    "update: policy forward": ["train_forward"],
    "update: backward and optimizer": ["learn"],
    "update: trainer": ["train_copy", "train_misc"],
}
"""What the trainer's own profile counts, gathered."""


class UnmaskedPolicy(nn.Module):
    """PufferLib's own multi-discrete head, as in its models.Default, on our encoder."""

    def __init__(self, encoder: EssenceWarsEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.sizes = SPEC.nvec.tolist()
        self.decoder = layer_init(nn.Linear(encoder.hidden_size, sum(self.sizes)), std=0.01)
        self.value = layer_init(nn.Linear(encoder.hidden_size, 1), std=1)

    def forward_eval(self, observations: Tensor, state: Any = None) -> tuple[Any, Tensor]:
        hidden = self.encoder(observations).hidden
        return self.decoder(hidden).split(self.sizes, dim=-1), self.value(hidden)

    def forward(self, observations: Tensor, state: Any = None) -> tuple[Any, Tensor]:
        return self.forward_eval(observations, state)


def make_policies(layout: fp.LegalLayout) -> dict[str, nn.Module]:
    """Both policies, each with an encoder of its own, all from the same seed."""

    def encoder() -> EssenceWarsEncoder:
        torch.manual_seed(0)
        return EssenceWarsEncoder(layout, SETTINGS.hidden_size, SETTINGS.entity_size)

    ours = fp.FlatPolicy(spec=SPEC, layout=layout, encoder=encoder(), width=SETTINGS.head_width)
    return {OURS: ours, THEIRS: UnmaskedPolicy(encoder())}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the trainer's dashboard, and without torch's word on autocast in float32."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def train_in_turn(seconds: float, folder: Path) -> tuple[str, dict[str, Any]]:
    """One epoch of each in turn: steps per second, and where the trainer says that they go."""
    trainers = {}
    for name, illegal in ((OURS, "raise"), (THEIRS, "random")):
        vecenv = vector.make(
            EssenceWars,
            env_kwargs={"num_games": GAMES, "illegal": illegal},
            backend=vector.Serial,
            num_envs=1,
            seed=SETTINGS.seed,
        )
        policy = make_policies(vecenv.driver_env.legal_layout)[name]
        with quiet():
            trainers[name] = PuffeRL(
                SETTINGS.trainer_config(vecenv, "cpu", folder / name), vecenv, policy
            )
        trainers[name].profile.frequency = 1  # its own clock looks at every fifth epoch only

    times: dict[tuple[str, str], list[float]] = {}
    spent: dict[str, dict[str, float]] = {}
    games: dict[str, dict[str, float]] = {name: {} for name in trainers}
    order = list(trainers)
    end = time.perf_counter() + seconds
    rounds = -1  # the first round also pays for what is set up once, and does not count
    try:
        while rounds < measure.FEWEST_ROUNDS or time.perf_counter() < end:
            for name in order:
                with quiet():
                    begin = time.perf_counter()
                    trainers[name].evaluate()
                    between = time.perf_counter()
                    logs = trainers[name].train()
                    done = time.perf_counter()
                games[name].update(
                    {k: v for k, v in (logs or {}).items() if k.startswith("environment/")}
                )
                if rounds < 0:
                    spent[name] = _phases(trainers[name], {})
                    continue
                times.setdefault((name, "total"), []).append(done - begin)
                times.setdefault((name, "rollout"), []).append(between - begin)
                times.setdefault((name, "update"), []).append(done - between)
            order.reverse()
            rounds += 1
    finally:
        for trainer in trainers.values():
            with quiet():
                trainer.close()

    taken = {key: np.array(values) for key, values in times.items()}
    lines, figures = [], {}
    for phase in ("total", "rollout", "update"):
        ratio = measure.figure(taken[THEIRS, phase] / taken[OURS, phase])
        target, met = "", ""
        if phase == "total":
            target, met = f"≥ {TARGET}", "yes" if ratio.median >= TARGET else "NO"
        lines.append([phase, target, measure.number(ratio.median), ratio.spread, met])
        speeds = {
            n: measure.figure(GAMES * SETTINGS.bptt_horizon / taken[n, phase]) for n in trainers
        }
        figures[phase] = {"ratio": ratio._asdict()} | {n: s._asdict() for n, s in speeds.items()}
    body = f"Steps per second of {OURS}, as a share of those of {THEIRS}, {rounds} rounds:\n\n"
    body += measure.table(["", "target", "ratio", "middle 80%", "met"], lines)

    spent = {name: _phases(trainer, spent[name]) for name, trainer in trainers.items()}
    body += (
        f"\nWhere time goes, by the trainer's own clock, in hundredths of a step of {THEIRS}:\n\n"
    )
    body += _shares({phase: (spent[OURS][phase], spent[THEIRS][phase]) for phase in PHASES})
    body += "\nThe games that they played, at the end:\n\n" + measure.table(
        ["", OURS, THEIRS],
        [
            [words, *(f"{games[name].get(f'environment/{key}', np.nan):.3g}" for name in trainers)]
            for words, key in (
                ("win rate", "win"),
                ("actions a game", "episode_length"),
                ("legal actions a state", "legal_actions"),
                ("illegal actions a game", "illegal_actions"),
            )
        ],
    )
    return body, figures | {"phases, seconds": spent, "games": games}


def _phases(trainer: PuffeRL, before: dict[str, float]) -> dict[str, float]:
    """Seconds that the trainer has counted so far, less those of before."""
    counted = dict(iter(trainer.profile))
    return {
        phase: sum(counted[part]["elapsed"] for part in parts) - before.get(phase, 0.0)
        for phase, parts in PHASES.items()
    }


def record(batches: int) -> tuple[fp.LegalLayout, list[Tensor]]:
    """Observations of random legal play, (num_games, nbytes) a step, of games well under way."""
    env = EssenceWars(GAMES, seed=SETTINGS.seed)
    env.reset(SETTINGS.seed)
    rng = np.random.default_rng(SETTINGS.seed)
    rows = np.arange(GAMES)
    kept = []
    for step in range(100 + batches):
        records = env.observations.view(env.observation_dtype)[:, 0]
        drawn = (rng.random(len(rows)) * records["n_legal"]).astype(int)
        if step >= 100:
            kept.append(torch.as_tensor(env.observations.copy()))
        env.step(records["legal"][rows, drawn].astype(np.int64))
    return env.legal_layout, kept


def on_stored_states(seconds: float) -> tuple[str, dict[str, Any]]:
    """Both policies on the same states, part by part."""
    layout, rollout = record(4 * SETTINGS.minibatch_size // GAMES)
    update = list(torch.cat(rollout).split(SETTINGS.minibatch_size))
    policies = make_policies(layout)
    encoder = policies[OURS].encoder

    def encode(call: int) -> Tensor:
        return encoder(update[call % len(update)]).hidden

    def encode_and_back(call: int) -> None:
        torch.autograd.grad(encode(call).sum(), list(encoder.parameters()))

    @torch.no_grad()
    def encode_rollout(call: int) -> None:
        encoder(rollout[call % len(rollout)])

    contenders: dict[str, Callable[[int], Any]] = {
        "rollout: encoder": encode_rollout,
        "update: encoder": encode,
        "update: encoder and back": encode_and_back,
    }
    for name, policy in policies.items():
        contenders |= _parts(name, policy, rollout, update)
    times = measure.interleave(contenders, seconds)

    # In seconds a step of the environment: rollout once, update update_epochs times.
    a_step = {
        part: t / GAMES
        if "rollout" in part
        else t * SETTINGS.update_epochs / SETTINGS.minibatch_size
        for part, t in times.items()
    }
    encoder_back = a_step["update: encoder and back"] - a_step["update: encoder"]
    parts: dict[str, list[measure.Times]] = {
        "rollout: encoder": [a_step["rollout: encoder"]] * 2,
        "rollout: head": [],
        "update: encoder": [a_step["update: encoder"]] * 2,
        "update: head": [],
        "update: backward of the encoder": [encoder_back] * 2,
        "update: backward of the head": [],
        "update: optimizer": [],
    }
    for name in policies:
        forward, whole = a_step[f"{name}, update: forward"], a_step[f"{name}, update: all"]
        parts["rollout: head"].append(a_step[f"{name}, rollout"] - a_step["rollout: encoder"])
        parts["update: head"].append(forward - a_step["update: encoder"])
        parts["update: backward of the head"].append(whole - forward - encoder_back)
        parts["update: optimizer"].append(a_step[f"{name}, update: optimizer"])
    medians = {part: tuple(float(np.median(t)) for t in pair) for part, pair in parts.items()}
    ratios = []
    for words, part in (("rollout", "rollout"), ("update", "update: all")):
        ratio = measure.figure(times[f"{THEIRS}, {part}"] / times[f"{OURS}, {part}"])
        ratios.append([words, measure.number(ratio.median), ratio.spread])
    legal = [layout.read(batch) for batch in update]
    mean = sum(len(one.rows) for one in legal) / sum(len(one) for one in legal)
    body = (
        f"On the same states of random legal play ({mean:.1f} legal actions a state), without "
        f"environment and trainer: speed of {OURS}, as a share of that of {THEIRS}:\n\n"
        + measure.table(["", "ratio", "middle 80%"], ratios)
        + f"\nand where it goes, in hundredths of a step of {THEIRS}:\n\n"
        + _shares(medians)
    )
    return body, {"parts, seconds a step": medians}


def _parts(
    name: str, policy: nn.Module, rollout: list[Tensor], update: list[Tensor]
) -> dict[str, Callable[[int], Any]]:
    """What the trainer asks of a policy, and what it does with its gradients."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.0)

    @torch.no_grad()
    def draw(call: int) -> Tensor:
        logits, _ = policy.forward_eval(rollout[call % len(rollout)])
        return sample_logits(logits)[0]

    @torch.no_grad()
    def draw_for(observations: Tensor) -> Tensor:
        return sample_logits(policy.forward_eval(observations)[0])[0]

    drawn = [draw_for(observations).long() for observations in update]

    def forward(call: int) -> Tensor:
        at = call % len(update)
        logits, value = policy(update[at])
        _, log_prob, entropy = sample_logits(logits, action=drawn[at])
        return value.square().mean() - log_prob.mean() - entropy.mean()

    def learn(call: int) -> None:
        for parameter in policy.parameters():
            parameter.grad = None
        forward(call).backward()

    def optimize(call: int) -> None:
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()

    learn(0)
    return {
        f"{name}, rollout": draw,
        f"{name}, update: forward": forward,
        f"{name}, update: all": learn,
        f"{name}, update: optimizer": optimize,
    }


def _shares(seconds: dict[str, tuple[float, float]]) -> str:
    """A table of ours and theirs, in hundredths of the sum of theirs."""
    total = tuple(sum(pair[i] for pair in seconds.values()) for i in (0, 1))
    rows = []
    for part, pair in {**seconds, "total": total}.items():
        ours, theirs = (100 * one / total[1] for one in pair)
        rows.append([part, f"{ours:.1f}", f"{theirs:.1f}", f"{ours - theirs:+.1f}"])
    return measure.table(["", OURS, THEIRS, "difference"], rows)


def main() -> None:
    """Measures, prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about a minute; wider spreads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    on_states, stored = on_stored_states(15 if arguments.quick else 60)
    with tempfile.TemporaryDirectory() as folder:
        in_turn, live = train_in_turn(40 if arguments.quick else 180, Path(folder))
    body = f"# End to end\n\n{in_turn}\n{on_states}"
    measure.write("end_to_end", body, {"training": live, "stored states": stored})


if __name__ == "__main__":
    main()
