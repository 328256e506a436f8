"""What reading the legal lists of a C engine's struct costs, beside a small encoder of that struct.

The struct is that of tests/c_engine: nested, padded by the compiler, one uint8 column of 1,024 for
each part of a tuple, a uint16 count. The lists are of the length of those of benchmarks/head.py:
half of the rows empty, else 11 tuples on average and 54 at the 99th percentile. Reading means
LegalLayout.read with all checks, of a spec too. The encoder gathers every other number of the
struct and puts them through two linear layers, of 128 and 256, with relu; its forward is timed
without gradients, as in a rollout. Both get other observations in each call, and take turns.

    python benchmarks/c_engine.py           # about a minute
    python benchmarks/c_engine.py --quick   # some seconds
    python benchmarks/c_engine.py --profile 512   # where reading spends its time, by operation
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import head
import measure
import numpy as np
import torch
from torch import Tensor, nn

import tcg_flatpolicy as fp

sys.path.insert(0, str(Path(__file__).parent.parent))  # tests and examples are not installed
from examples.c_engine import COLUMNS, LAYOUT, SPEC
from tests.c_engine.engine import Observation

DTYPE = np.dtype(Observation)
LAYERS = (128, 256)
BATCHES = (512, 8192)
TARGET = 0.10
"""The largest share of the encoder's forward that reading may take."""
READ, MERGED = "reading", "reading, and a look for repeats"
ENCODER, LAYERS_ALONE = "the encoder", "its linear layers alone"


class SmallEncoder(nn.Module):
    """Every number of the struct but the list -> (B, 256), by two linear layers."""

    def __init__(self, layout: fp.LegalLayout) -> None:
        super().__init__()
        self.layout = layout
        self.fields = [field for field in layout.fields() if not layout.is_legal_list(field)]
        self.numbers = sum(field.numbers for field in self.fields)
        self.net = nn.Sequential(
            nn.Linear(self.numbers, LAYERS[0]), nn.ReLU(), nn.Linear(*LAYERS), nn.ReLU()
        )

    def gather(self, observations: Tensor) -> Tensor:
        """Observations (B, nbytes) uint8 -> (B, numbers) float32."""
        columns = [
            self.layout.field(observations, field.name).reshape(len(observations), -1).float()
            for field in self.fields
        ]
        return torch.cat(columns, dim=1)

    def forward(self, observations: Tensor) -> Tensor:
        """Observations (B, nbytes) uint8 -> (B, 256)."""
        return self.net(self.gather(observations))


def every_tuple() -> np.ndarray:
    """(n, 4) all tuples of the spec."""
    ids = np.arange(SPEC.nvec.prod())
    tuples = np.stack(np.unravel_index(ids, SPEC.nvec), axis=1)
    return tuples[[SPEC.explain(action) is None for action in tuples.tolist()]]


def observe(batch: int, number: int) -> Tensor:
    """(B, nbytes) uint8: structs of random numbers, and lists of tuples, none of them twice."""
    rng = np.random.default_rng([batch, number])
    records = np.zeros(batch, DTYPE)
    records.view(np.uint8)[:] = rng.integers(0, 256, records.nbytes, np.uint8)
    records["mask"] = 0
    counts, _ = head.lists(rng, batch)
    tuples = every_tuple()
    records["count"] = counts
    rows = np.repeat(np.arange(batch), counts)
    place = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    order = np.argsort(rng.random((batch, len(tuples))), axis=1)  # (B, n)
    listed = tuples[order[rows, place]]
    for j, name in enumerate(COLUMNS):
        records["mask"][name.removeprefix("mask.")][rows, place] = listed[:, j]
    return torch.as_tensor(records.view(np.uint8).reshape(batch, -1))


def profile(batch: int) -> None:
    """Prints where the time of reading goes."""
    layout, observations = LAYOUT.with_spec(SPEC), observe(batch, 0)
    for _ in range(10):
        layout.read(observations)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(50):
            layout.read(observations)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


@torch.no_grad()
def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="some seconds; wider spreads")
    parser.add_argument("--profile", type=int, metavar="ROWS", help="only profile reading")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.profile:
        profile(arguments.profile)
        return
    torch.manual_seed(0)
    layout = LAYOUT.with_spec(SPEC)
    encoder = SmallEncoder(layout)
    lines, figures = [], {}
    tuples = []
    for batch in BATCHES:
        pool = [observe(batch, number) for number in range(head.POOL)]
        inputs = [encoder.gather(observations) for observations in pool]
        tuples += [len(layout.read(observations).rows) / batch for observations in pool]
        times = measure.interleave(
            {
                READ: lambda call, pool=pool: layout.read(pool[call % head.POOL]),
                MERGED: lambda call, pool=pool: layout.read(pool[call % head.POOL]).distinct(),
                ENCODER: lambda call, pool=pool: encoder(pool[call % head.POOL]),
                LAYERS_ALONE: lambda call, inputs=inputs: encoder.net(inputs[call % head.POOL]),
            },
            4 if arguments.quick else 30,
        )
        for name, whole in ((READ, ENCODER), (MERGED, ENCODER), (READ, LAYERS_ALONE)):
            share = measure.figure(times[name] / times[whole])
            target, met = "", ""
            if (name, whole) == (READ, ENCODER):
                target, met = f"≤ {TARGET}", "yes" if share.median <= TARGET else "NO"
            median = measure.number(share.median)
            lines.append([str(batch), name, whole, target, median, share.spread, met])
            figures[f"{batch}: {name}, of {whole}"] = share._asdict() | {"rounds": len(times[name])}
    body = (
        f"# Reading a C engine's lists\n\nTime as a share of that of an encoder's forward: "
        f"{encoder.numbers} numbers, from {len(encoder.fields)} fields of a struct of "
        f"{DTYPE.itemsize:,} bytes, through linear layers of {LAYERS[0]} and {LAYERS[1]}. Rows "
        f"have {np.mean(tuples):.1f} legal tuples on average, the empty half of them included:\n\n"
        + measure.table(["rows", "", "share of", "target", "share", "middle 80%", "met"], lines)
    )
    measure.write("c_engine", body, figures)


if __name__ == "__main__":
    main()
