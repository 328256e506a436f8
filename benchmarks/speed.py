"""What choosing a tuple costs, by head: a draw and an update, encoder and value included.

First on states of Essence Wars, with lists as long as they are there; then on made-up states with
exactly K legal tuples each, as K grows. A draw is what PufferLib asks of a policy in a rollout
(tuple, log-prob, entropy, value), an update is forward and backward on a minibatch with stored
tuples; without environment, optimizer and trainer. Contenders take turns on one thread; figures are
ratios of processor times of the same round.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import COLOURS, HEADS, every_tuple
from measure import Times, figure, interleave, number, table
from pufferlib.pytorch import sample_logits
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.heads import HeadFactory

PHASES = ("draw", "update")
EXACT = "autoregressive, exact entropy"
CONTENDERS: dict[str, str | HeadFactory] = {
    "flat": "flat",
    "autoregressive": "autoregressive",
    EXACT: functools.partial(fp.AutoregressiveHead, exact_entropy=True),
    **{name: head for name, head in HEADS.items() if name not in ("flat", "autoregressive")},
}
ENCODER = "encoder alone"

DRAW_ROWS, UPDATE_ROWS = 256, 2048
"""On Essence Wars, as its trainer's batches are."""
GROWING_ROWS = 128
LENGTHS, QUICK_LENGTHS = (8, 32, 128, 512, 2048), (8, 128, 2048)
SECONDS, QUICK_SECONDS = (100.0, 200.0), (18.0, 40.0)
"""For Essence Wars and for lists that grow."""
WIDTH = 64
POOL = 4
"""Batches that calls take in turn."""

THINGS = {"hand": 50, "ally": 20, "enemy": 20}
FEATURES = 3
"""Numbers that an observation has of each thing."""
SPEC = fp.ActionSpec(
    [
        fp.Primary("end_turn"),
        fp.Primary(
            "play",
            fp.Entity("hand", 50),
            fp.Index("place", 50),
            fp.OneOf(fp.Index("none", 1), fp.Entity("enemy", 20), fp.Entity("ally", 20)),
        ),
        fp.Primary("attack", fp.Entity("ally", 20), fp.Entity("enemy", 20)),
        fp.Primary(
            "ability",
            fp.Entity("ally", 20),
            fp.Index("which", 5),
            fp.OneOf(fp.Index("none", 1), fp.Entity("enemy", 20), fp.Entity("ally", 20)),
        ),
    ]
)
"""A made-up engine's tuples: 107,001 of them."""
DTYPE = np.dtype(
    [
        ("things", np.float32, (sum(THINGS.values()), FEATURES)),
        ("rest", np.float32, (30,)),
        ("legal", np.uint8, (max(LENGTHS), 1 + SPEC.slots)),
        ("n_legal", np.uint16),
    ],
    align=True,
)

Contenders = dict[str, Callable[[int], Any]]


class SmallEncoder(nn.Module):
    """All 300 numbers through two layers; a thing is its features and its place.

    Attributes:
        entity_sizes: ``{"hand": (50, 32), "ally": (20, 32), "enemy": (20, 32)}``.
    """

    def __init__(self, layout: fp.LegalLayout, hidden_size: int = 256, size: int = 32) -> None:
        super().__init__()
        self.layout = layout
        self.hidden_size = hidden_size
        self.entity_sizes = {name: (things, size) for name, things in THINGS.items()}
        things = sum(THINGS.values())
        self.trunk = nn.Sequential(
            nn.Linear(things * FEATURES + 30, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
        )
        self.thing = nn.Linear(FEATURES, size)
        self.place = nn.Parameter(torch.randn(things, size) * 0.1)

    def forward(self, observations: Tensor) -> fp.Encoding:
        """(B, nbytes) uint8 -> hidden (B, 256) and things (B, n, 32) by name."""
        things = self.layout.field(observations, "things")
        rest = self.layout.field(observations, "rest")
        hidden = self.trunk(torch.cat([things.flatten(1), rest], dim=1))
        embedded = torch.relu(self.thing(things) + self.place)
        parts = embedded.split(list(THINGS.values()), dim=1)
        return fp.Encoding(hidden, dict(zip(THINGS, parts, strict=True)))


# The measurements.


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Times a row of every head: on Essence Wars, and as lists grow.

    Args:
        quick: about a minute in place of five; fewer lengths, wider spreads.
        seed: of the networks and the states.

    Returns:
        What :func:`report` and :func:`draw` take: ``game``, as :func:`on_the_game` gives it, and
        ``growing``, as :func:`as_lists_grow` does.
    """
    torch.set_num_threads(1)
    on_game, growing = QUICK_SECONDS if quick else SECONDS
    return {
        "game": on_the_game(on_game, seed),
        "growing": as_lists_grow(QUICK_LENGTHS if quick else LENGTHS, growing, seed),
    }


def on_the_game(seconds: float, seed: int) -> dict[str, Any]:
    """Recorded states of Essence Wars, each head on an encoder of its own.

    Returns:
        ``mean legal``, ``rounds``, and by phase and contender (the encoder alone too) the figure of
        its time over that of the flat head: ``ratios`` {phase: {name: {median, low, high}}}; and
        ``seconds a row`` {phase: {name: median}}.
    """
    # Here, not above: PufferLib's trainer turns warnings of the importing process into errors.
    from end_to_end import SETTINGS, record

    from tcg_flatpolicy.games.essence_wars import SPEC as GAME_SPEC
    from tcg_flatpolicy.games.essence_wars import EssenceWarsEncoder

    layout, kept = record(POOL * UPDATE_ROWS // SETTINGS.num_games)
    seen = torch.cat(kept)
    drawn_from, learned_from = list(seen.split(DRAW_ROWS)), list(seen.split(UPDATE_ROWS))

    def encoder() -> EssenceWarsEncoder:
        return EssenceWarsEncoder(layout, SETTINGS.hidden_size, SETTINGS.entity_size)

    contenders = encoder_alone(encoder(), drawn_from, learned_from)
    for name, head in CONTENDERS.items():
        torch.manual_seed(seed)
        policy = fp.Policy(
            spec=GAME_SPEC, layout=layout, head=head, encoder=encoder(), width=SETTINGS.head_width
        )
        contenders |= both_phases(name, policy, drawn_from, learned_from)
    times = interleave(contenders, seconds)
    names = [ENCODER, *CONTENDERS]
    rows = dict(zip(PHASES, (DRAW_ROWS, UPDATE_ROWS), strict=True))
    return {
        "mean legal": layout.read(seen).counts.double().mean().item(),
        "rounds": len(times[f"flat, {PHASES[0]}"]),
        "ratios": {
            phase: {name: _ratio(times, f"{name}, {phase}", f"flat, {phase}") for name in names}
            for phase in PHASES
        },
        "seconds a row": {
            phase: {
                name: float(np.median(times[f"{name}, {phase}"])) / rows[phase] for name in names
            }
            for phase in PHASES
        },
    }


def as_lists_grow(lengths: tuple[int, ...], seconds: float, seed: int) -> dict[str, Any]:
    """Made-up states with exactly K legal tuples each, the same number of rows at each K.

    Returns:
        ``lengths``; ``rounds``; ``relative`` {phase: {name: [figure of the time over that of the
        flat head at the shortest list, of each K]}}; ``to flat`` {phase: [figure of autoregressive
        over flat at the same K]}; and ``crossover`` {phase: K or None}, as :func:`crossover`.
    """
    layout = fp.LegalLayout.from_dtype(DTYPE, count="n_legal", actions="legal", spec=SPEC)
    policies = {}
    for name, head in CONTENDERS.items():
        torch.manual_seed(seed)
        policies[name] = fp.Policy(
            spec=SPEC, layout=layout, head=head, encoder=SmallEncoder(layout), width=WIDTH
        )
    contenders: Contenders = {}
    for length in lengths:
        batches = [made_up(length, seed=seed + number) for number in range(POOL)]
        for name, policy in policies.items():
            contenders |= both_phases(f"{name}, {length}", policy, batches, batches)
    times = interleave(contenders, seconds)

    def relative(name: str, phase: str) -> list[dict[str, float]]:
        under = f"flat, {lengths[0]}, {phase}"
        return [_ratio(times, f"{name}, {length}, {phase}", under) for length in lengths]

    to_flat = {
        phase: [
            _ratio(times, f"autoregressive, {length}, {phase}", f"flat, {length}, {phase}")
            for length in lengths
        ]
        for phase in PHASES
    }
    return {
        "lengths": list(lengths),
        "rounds": len(times[f"flat, {lengths[0]}, {PHASES[0]}"]),
        "relative": {
            phase: {name: relative(name, phase) for name in CONTENDERS} for phase in PHASES
        },
        "to flat": to_flat,
        "crossover": {
            phase: crossover(lengths, [one["median"] for one in to_flat[phase]]) for phase in PHASES
        },
    }


def made_up(length: int, seed: int, rows: int = GROWING_ROWS) -> Tensor:
    """(rows, nbytes) uint8: random numbers, and ``length`` tuples a row, drawn from all of SPEC's.

    None stands twice in a row, and they are in an order of no use.
    """
    rng = np.random.default_rng([seed, length])
    tuples = every_tuple(SPEC)
    records = np.zeros(rows, DTYPE)
    records["things"] = rng.standard_normal(records["things"].shape)
    records["rest"] = rng.standard_normal(records["rest"].shape)
    records["n_legal"] = length
    for row in range(rows):
        records["legal"][row, :length] = tuples[rng.choice(len(tuples), length, replace=False)]
    return torch.as_tensor(records.view(np.uint8).reshape(rows, -1))


def both_phases(
    name: str, policy: fp.Policy, drawn_from: list[Tensor], learned_from: list[Tensor]
) -> Contenders:
    """What a trainer asks of a policy: "NAME, draw" and "NAME, update".

    Args:
        name: of the contender.
        policy: its parameters' grad is written by the update.
        drawn_from: batches (B, nbytes) of the rollout, for calls to take in turn.
        learned_from: those of the update; the stored tuples are drawn by the policy itself.
    """

    @torch.no_grad()
    def draw_from(observations: Tensor) -> Tensor:
        logits, _ = policy.forward_eval(observations)
        actions: Tensor = sample_logits(logits)[0]
        return actions

    stored = [draw_from(observations) for observations in learned_from]

    def learn(call: int) -> None:
        at = call % len(learned_from)
        for parameter in policy.parameters():
            parameter.grad = None
        logits, value = policy(learned_from[at])
        _, log_prob, entropy = sample_logits(logits, action=stored[at])
        (value.square().mean() - log_prob.mean() - entropy.mean()).backward()

    return {
        f"{name}, draw": lambda call: draw_from(drawn_from[call % len(drawn_from)]),
        f"{name}, update": learn,
    }


def encoder_alone(
    encoder: nn.Module, drawn_from: list[Tensor], learned_from: list[Tensor]
) -> Contenders:
    """What every contender pays for the encoder: its forward, and forward and backward."""

    @torch.no_grad()
    def encode(call: int) -> None:
        encoder(drawn_from[call % len(drawn_from)])

    def learn(call: int) -> None:
        for parameter in encoder.parameters():
            parameter.grad = None
        hidden, entities = encoder(learned_from[call % len(learned_from)])
        (hidden.sum() + sum(things.sum() for things in entities.values())).backward()

    return {f"{ENCODER}, draw": encode, f"{ENCODER}, update": learn}


def crossover(lengths: tuple[int, ...], ratios: list[float]) -> float | None:
    """The list length at which a ratio of times falls to 1 and stays there.

    Interpolated between the measured lengths, log ratio over log length.

    Args:
        lengths: ascending.
        ratios: one of each length.

    Returns:
        The length; the shortest measured if the ratio is at or below 1 throughout; None if it is
        above 1 at the longest.
    """
    if ratios[-1] > 1:
        return None
    above = [at for at, ratio in enumerate(ratios) if ratio > 1]
    if not above:
        return float(lengths[0])
    last = above[-1]
    (low, high), (over, under) = lengths[last : last + 2], ratios[last : last + 2]
    share = math.log(over) / (math.log(over) - math.log(under))
    return float(low * (high / low) ** share)


def _ratio(times: Mapping[str, Times], over: str, under: str) -> dict[str, float]:
    return figure(times[over] / times[under])._asdict()


# What is said of it.


def report(results: dict[str, Any]) -> str:
    """Markdown: two tables on Essence Wars and three on lists that grow."""
    game, growing = results["game"], results["growing"]
    lengths = growing["lengths"]
    body = (
        f"Time of a policy over that of the one with the flat head, in the same round "
        f"({game['rounds']} rounds), on states of Essence Wars ({game['mean legal']:.1f} legal "
        f"tuples a state). A draw is for {DRAW_ROWS} rows, an update (forward and backward, no "
        f"optimizer) for {UPDATE_ROWS}; encoder and value are part of both. The first line is "
        "the encoder alone, as a share of the same.\n\n"
    )
    rows = []
    for name in [ENCODER, *CONTENDERS]:
        row = [name]
        for phase in PHASES:
            one = game["ratios"][phase][name]
            row += [number(one["median"]), _spread(one) if name != "flat" else ""]
        rows.append(row)
    body += table(["head", "draw", "middle 80%", "update", "middle 80%"], rows)
    body += (
        f"\nAs lists grow: exactly K legal tuples in each of {GROWING_ROWS} rows, drawn without "
        f"repeats from the {len(every_tuple(SPEC)):,} that a made-up engine of four primaries "
        f"knows (sizes {'/'.join(str(size) for size in SPEC.nvec)}), a small encoder. Time a row "
        f"over that of the flat head at K = {lengths[0]} ({growing['rounds']} rounds):\n"
    )
    for phase in PHASES:
        body += f"\n{phase.capitalize()}:\n\n" + table(
            ["head", *(f"K = {length:,}" for length in lengths)],
            [
                [name, *(number(one["median"]) for one in growing["relative"][phase][name])]
                for name in CONTENDERS
            ],
        )
    body += (
        "\nTime of the autoregressive head over that of the flat one, at the same K, and K*, from "
        "where on it is the faster:\n\n"
    )
    body += table(
        ["", *(f"K = {length:,}" for length in lengths), "K*"],
        [
            [
                phase,
                *(f"{number(r['median'])} ({_spread(r)})" for r in growing["to flat"][phase]),
                _crossover_words(growing["crossover"][phase], lengths),
            ]
            for phase in PHASES
        ],
    )
    return body


def _crossover_words(length: float | None, lengths: list[int]) -> str:
    if length is None:
        return f"none up to {lengths[-1]:,}"
    if length <= lengths[0]:
        return f"{lengths[0]} or fewer"
    return f"about {float(f'{length:.2g}'):,.0f}"


def _spread(one: Mapping[str, float]) -> str:
    return f"{number(one['low'])} to {number(one['high'])}"


def draw(results: dict[str, Any], path: Path) -> None:
    """A picture (PNG): time a row over the length of the list, a line a head; draw and update.

    Args:
        results: as measure gives them.
        path: of the picture; written whole.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    growing = results["growing"]
    lengths = growing["lengths"]
    figure_, axes = pyplot.subplots(1, len(PHASES), figsize=(12, 4.6), sharey=True)
    ends: dict[str, float] = {}
    for axis, phase in zip(axes, PHASES, strict=True):
        for name in CONTENDERS:
            of_name = growing["relative"][phase][name]
            medians = [one["median"] for one in of_name]
            axis.fill_between(
                lengths,
                [one["low"] for one in of_name],
                [one["high"] for one in of_name],
                color=COLOURS[name],
                alpha=0.15,
                linewidth=0,
            )
            axis.plot(lengths, medians, marker="o", markersize=5, color=COLOURS[name], linewidth=2)
            ends[name] = medians[-1]
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.set_title(f"{phase.capitalize()}, {GROWING_ROWS} rows", fontsize=11)
        axis.set_xlabel("legal tuples a state")
        axis.grid(color="#e4e4e4")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for name, height in _apart(ends).items():
        axis.annotate(
            name,
            (lengths[-1], height),
            (10, 0),
            textcoords="offset points",
            color=COLOURS[name],
            fontsize=10,
            va="center",
            annotation_clip=False,
        )
    axes[0].set_ylabel(f"time a row / that of the flat head at {lengths[0]}")
    axes[1].tick_params(labelleft=True)
    figure_.subplots_adjust(left=0.07, right=0.81, bottom=0.13, top=0.92, wspace=0.16)
    part = path.with_name(path.name + ".part")
    figure_.savefig(part, dpi=150, format="png")
    pyplot.close(figure_)
    part.replace(path)


def _apart(ends: Mapping[str, float], step: float = 1.3) -> dict[str, float]:
    """Heights for labels on a log axis: in the order of the lines, a factor of step apart.

    Lines whose ends are closer than that have their labels spread around their middle.
    """
    groups: list[list[str]] = []
    for name in sorted(ends, key=lambda name: ends[name]):
        groups.append([name])
        while (
            len(groups) > 1
            and _heights(groups[-2], ends, step)[-1] * step > (_heights(groups[-1], ends, step)[0])
        ):
            last = groups.pop()
            groups[-1] += last
    return {
        name: height
        for group in groups
        for name, height in zip(group, _heights(group, ends, step), strict=True)
    }


def _heights(group: list[str], ends: Mapping[str, float], step: float) -> list[float]:
    middle = math.exp(sum(math.log(ends[name]) for name in group) / len(group))
    return [middle * step ** (place - (len(group) - 1) / 2) for place in range(len(group))]
