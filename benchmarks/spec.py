"""What the size of a spec costs: the same lists, under specs with more values, ids and primaries.

Cost should follow what is listed. Each series makes updates (forward and backward of the head, no
optimizer) over the same lists under a small and under larger specs, in turn on one thread. Of each
time, that of filling one gradient of zeros for each parameter is subtracted: a learned row that no
tuple holds has a gradient all the same. Figures are ratios over the smallest spec, of one round.

    python benchmarks/spec.py            # about three minutes
    python benchmarks/spec.py --quick    # about one
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import measure
import numpy as np
import torch

import tcg_flatpolicy as fp

ROWS, LISTED, HIDDEN = 512, 12, 256
TARGET = 1.5
SIZES = {"unit": (6, 32)}
FULL = {"quick": 2.0, "full": 8.0}


def of_values(n: int) -> fp.ActionSpec:
    """Seven primaries with an Index of n values of one name."""
    return fp.ActionSpec([fp.Primary(f"p{i}", fp.Index("n", n)) for i in range(7)])


def of_one_index(n: int) -> fp.ActionSpec:
    return fp.ActionSpec([fp.Primary("play", fp.Index("n", n)), fp.Primary("pass")])


def of_ids(n: int) -> fp.ActionSpec:
    """Three primaries, of which the last has the id n."""
    return fp.ActionSpec(
        [fp.Primary(f"p{i}", fp.Index("n", 10), id=i if i < 2 else n) for i in range(3)]
    )


def of_primaries(n: int) -> fp.ActionSpec:
    roles = fp.Entity("unit", 6), fp.Entity("unit", 6)
    return fp.ActionSpec([fp.Primary(f"p{i}", *roles) for i in range(n)])


def of_nvec(n: int) -> fp.ActionSpec:
    return fp.ActionSpec([fp.Primary("go", *(fp.Index(f"n{j}", n) for j in range(3)))])


SERIES: list[tuple[str, str, Callable[[int], fp.ActionSpec], list[int]]] = [
    ("values of an Index in 7 primaries", "flat", of_values, [10, 1000, 100_000]),
    ("values of one Index", "autoregressive", of_one_index, [10, 1000, 100_000]),
    ("largest id", "flat", of_ids, [2, 100_000, 1_000_000]),
    ("largest id", "autoregressive", of_ids, [2, 100_000, 1_000_000]),
    ("primaries with two entities", "flat", of_primaries, [2, 24, 400]),
    ("primaries with two entities", "autoregressive", of_primaries, [2, 24, 400]),
]


def lists(spec: fp.ActionSpec) -> list[list[tuple[int, ...]]]:
    """The same for all specs of a series, but for the number of the largest id."""
    random = np.random.default_rng(0)
    ids = list(spec.primaries)[:7]
    roles = [spec.primaries[number].slots for number in ids]
    if len(ids) == 7 and spec.slots == 2:
        ids, roles = ids[:2], roles[:2]
    made = []
    for _ in range(ROWS):
        row = []
        for _ in range(int(random.poisson(LISTED))):
            place = int(random.integers(len(ids)))
            values = [int(random.integers(10)) % min(role.size, 10) for role in roles[place]]
            row.append((ids[place], *values, *[0] * (spec.slots - len(values))))
        made.append(row)
    return made


def update_of(head: str, spec: fp.ActionSpec) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """An update, and the filling of its gradients."""
    torch.manual_seed(0)
    module = fp.HEADS[head](spec, HIDDEN, SIZES, 64)
    legal = fp.LegalActions.from_lists(lists(spec), slots=spec.slots).distinct()
    hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
    entities = {"unit": torch.randn(ROWS, *SIZES["unit"], requires_grad=True)}
    parameters = [hidden, *entities.values(), *module.parameters()]
    with torch.no_grad():
        stored = module(hidden, entities, legal).sample()

    def update(_: int) -> None:
        fresh = fp.LegalActions.trusted(legal.actions, legal.counts, legal.noop, distinct=True)
        dist = module(hidden, entities, fresh)
        entropy = dist.entropy() if head == "flat" else dist.path_entropy(stored)
        torch.autograd.grad(
            dist.log_prob(stored).sum() + entropy.sum(), parameters, allow_unused=True
        )

    return update, lambda _: [torch.zeros_like(parameter) for parameter in parameters]


def draws_of(n: int) -> Callable[[int], Any]:
    """A draw, its log-prob and the entropy, of lists with repeats whose values go up to n."""
    random = np.random.default_rng(0)
    step = n // 50
    rows = [
        [tuple(int(v) * step for v in random.integers(50, size=4)) for _ in range(LISTED)] * 2
        for _ in range(ROWS)
    ]
    given = fp.LegalActions.from_lists(rows)
    scores = torch.randn(len(given.rows))

    def draw(_: int) -> None:
        legal = fp.LegalActions(given.actions, given.counts)
        dist = fp.LegalCategorical(legal, scores)
        dist.log_prob(dist.sample())
        dist.entropy()

    return draw


def rows_of(seconds: float) -> Iterator[tuple[list[str], dict[str, Any]]]:
    for what, head, spec_of, sizes in SERIES:
        contenders: dict[str, Callable[[int], Any]] = {}
        for size in sizes:
            contenders[str(size)], contenders[f"zeros {size}"] = update_of(head, spec_of(size))
        times = measure.interleave(contenders, seconds * len(contenders))
        net = {size: times[str(size)] - times[f"zeros {size}"] for size in sizes}
        figures = {size: measure.figure(net[size] / net[sizes[0]]) for size in sizes[1:]}
        yield told(what, head, sizes, figures), {"what": what, "head": head, "ratios": figures}
    sizes = [50, 1000, 2**20]
    times = measure.interleave({str(n): draws_of(n) for n in sizes}, seconds * 3)
    figures = {n: measure.figure(times[str(n)] / times[str(sizes[0])]) for n in sizes[1:]}
    what = "values of each of 4 slots, draws over lists with repeats"
    yield told(what, "LegalCategorical", sizes, figures), {"what": what, "ratios": figures}


def told(what: str, head: str, sizes: list[int], figures: dict[int, measure.Figure]) -> list[str]:
    ratios = [f"{n:,}: {measure.number(f.median)} ({f.spread})" for n, f in figures.items()]
    last = figures[sizes[-1]].median
    return [what, head, f"{sizes[0]:,}", "; ".join(ratios), "met" if last <= TARGET else "MISSED"]


def main() -> None:
    parser = argparse.ArgumentParser(description="What the size of a spec costs.")
    parser.add_argument("--quick", action="store_true", help="about a minute; wider spreads")
    seconds = FULL["quick" if parser.parse_args().quick else "full"]
    torch.set_num_threads(1)
    rows, figures = [], []
    for row, figure in rows_of(seconds):
        print(" | ".join(row), flush=True)
        rows.append(row)
        figures.append(figure)
    header = ["series", "head", "smallest", "time over the smallest (middle 80%)", f"<= {TARGET}"]
    measure.write("spec", measure.table(header, rows), {"series": figures})


if __name__ == "__main__":
    main()
