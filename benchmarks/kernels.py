"""What compiled kernels save: the flat policy's tail, packed against compiled, and threads.

The tail is what comes after the encoder: reading the list, scoring, drawing, log-prob and entropy;
with backward also the gradients of the state, the entities and the head. On recorded states of
random legal play of Essence Wars. Ratios of times of the same round.

    python benchmarks/kernels.py           # some minutes
    python benchmarks/kernels.py --quick   # about one
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import measure
import numpy as np
import torch
from end_to_end import record
from torch import Tensor

import tcg_flatpolicy as fp
from tcg_flatpolicy.games.essence_wars import SPEC, EssenceWarsEncoder
from tcg_flatpolicy.kernels import cpu

TARGETS = {
    (256, "forward"): 5.0,
    (256, "with backward"): 2.5,
    (2048, "forward"): 2.2,
    (2048, "with backward"): 1.6,
}
"""How many times the compiled tail's time the packed one's must be, by rows."""


@contextlib.contextmanager
def deciding_by(loaded: Any) -> Iterator[None]:
    """By these kernels, as cpu._loaded gives them, until the end."""
    before, cpu._loaded = cpu._loaded, lambda: loaded  # type: ignore[assignment]
    try:
        yield
    finally:
        cpu._loaded = before  # type: ignore[assignment]


def leaf(entity: Tensor | fp.Lookup) -> Tensor | fp.Lookup:
    """A copy that gradients end in."""
    if isinstance(entity, fp.Lookup):
        return entity._replace(table=entity.table.detach().clone().requires_grad_())
    return entity.clone().contiguous().requires_grad_()


class Tail:
    """A flat head's work on recorded states, their encoding given.

    Args:
        rows: of a batch.
        states: (n, nbytes), n at least rows.
        layout: of the states.
    """

    def __init__(self, rows: int, states: Tensor, layout: fp.LegalLayout) -> None:
        torch.manual_seed(0)
        self.policy = fp.FlatPolicy(
            spec=SPEC, layout=layout, encoder=EssenceWarsEncoder(layout, 256, 32)
        )
        batches = [part for part in states.split(rows) if len(part) == rows][:4]
        with torch.no_grad():
            encoded = [self.policy.encoder(batch) for batch in batches]
        self.given = [
            (
                batch,
                one.hidden.clone().requires_grad_(),
                {name: leaf(entity) for name, entity in one.entities.items()},
            )
            for batch, one in zip(batches, encoded, strict=True)
        ]

    def forward(self, call: int) -> tuple[Tensor, list[Tensor]]:
        """The sum of log-probs and entropies, and what it depends on."""
        observations, hidden, entities = self.given[call % len(self.given)]
        distribution = self.policy.decide(observations, hidden, entities)
        log_prob = distribution.log_prob(distribution.sample())
        total = log_prob.sum() + distribution.entropy().sum()
        leaves = [one.table if isinstance(one, fp.Lookup) else one for one in entities.values()]
        return total, [hidden, *leaves, *self.policy.head.parameters()]

    @torch.no_grad()
    def draw(self, call: int) -> None:
        """A rollout's part."""
        self.forward(call)

    def learn(self, call: int) -> None:
        """An update's part."""
        total, leaves = self.forward(call)
        torch.autograd.grad(total, leaves)


def packed_over_compiled(tails: dict[int, Tail], seconds: float) -> list[list[str]]:
    """A line for each number of rows and direction."""
    compiled, lines = cpu._loaded(), []
    for rows, tail in tails.items():
        for direction, run in (("forward", tail.draw), ("with backward", tail.learn)):

            def by(loaded: Any, run: Callable[[int], None] = run) -> Callable[[int], None]:
                def call(number: int) -> None:
                    with deciding_by(loaded):
                        run(number)

                return call

            times = measure.interleave(
                {"packed": by(("packed", None)), "compiled": by(compiled)}, seconds
            )
            figure = measure.figure(times["packed"] / times["compiled"])
            target = TARGETS.get((rows, direction))
            met = "" if target is None else "yes" if figure.median >= target else "NO"
            wanted = "" if target is None else f"≥ {target}"
            what = f"{rows} rows, {direction}"
            lines.append([what, wanted, measure.number(figure.median), figure.spread, met])
    return lines


def one_thread_over_two(tail: Tail, rounds: int) -> list[list[str]]:
    """Wall clock, since that is what threads are for."""
    lines = []
    for direction, run in (("forward", tail.draw), ("with backward", tail.learn)):
        ratios = []
        for number in range(rounds):
            seconds = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                run(number)
                begin = time.perf_counter()
                for call in range(5):
                    run(call)
                seconds.append(time.perf_counter() - begin)
            ratios.append(seconds[0] / seconds[1])
        torch.set_num_threads(1)
        figure = measure.figure(np.array(ratios))
        lines.append([direction, "≥ 1.6", measure.number(figure.median), figure.spread, ""])
    return lines


def main() -> None:
    """Measures, prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about a minute; wider spreads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if cpu.library() is None:
        parser.error("there are no compiled kernels here; see python -m tcg_flatpolicy info")
    layout, states = record(32)
    every = torch.cat(states)
    tails = {rows: Tail(rows, every, layout) for rows in (64, 256, 512, 2048, 8192)}
    ratios = packed_over_compiled(tails, 4 if arguments.quick else 25)
    threads = one_thread_over_two(tails[8192], 7 if arguments.quick else 25)
    body = (
        f"# Compiled kernels ({cpu.kernel()})\n\nTime of the packed tail over that of the "
        "compiled one, seconds of the processor, one thread:\n\n"
        + measure.table(["tail", "target", "ratio", "middle 80%", "met"], ratios)
        + "\nOne thread over two, 8,192 rows, wall clock:\n\n"
        + measure.table(["tail", "target", "ratio", "middle 80%", ""], threads)
    )
    measure.write("kernels", body, {"packed over compiled": ratios, "threads": threads})


if __name__ == "__main__":
    main()
