"""What the benchmarks share: contenders timed in turn, ratios of one run, tables that say how.

Machines are noisy, so no figure here is an absolute time that stands alone: contenders take turns
within each round, a ratio is taken within a round, and its median over rounds is reported with the
range that holds the middle 80% of them.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

RESULTS = Path(__file__).parent / "results"
FEWEST_ROUNDS = 5
SHORTEST = 0.03
"""Seconds that a contender runs for in a round at least, by more calls than one if need be: the
first of them finds the caches as another left them."""

Times = npt.NDArray[np.float64]
"""(rounds,) seconds a call."""


class Figure(NamedTuple):
    """A median over rounds, and the range of the middle 80% of them."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> str:
        """The range, in words of a table."""
        return f"{number(self.low)} to {number(self.high)}"


def interleave(contenders: Mapping[str, Callable[[int], Any]], seconds: float) -> dict[str, Times]:
    """Seconds a call of each contender, one number a round; each takes its turn in every round.

    Seconds of the processor, which do not count what other processes take: for one thread that
    waits for nothing.

    Args:
        contenders: by name; each is called with the number of the call, to choose fresh data by.
        seconds: how long to go on, all contenders together; five rounds at least.
    """
    calls = dict.fromkeys(contenders, 0)
    repeats = dict.fromkeys(contenders, 1)

    def one_turn(name: str) -> float:
        run, first = contenders[name], calls[name]
        calls[name] += repeats[name]
        begin = time.process_time()
        for call in range(first, first + repeats[name]):
            run(call)
        return (time.process_time() - begin) / repeats[name]

    for name in contenders:
        one_turn(name)  # the first call of all also pays for what is set up once
        repeats[name] = max(1, math.ceil(SHORTEST / one_turn(name)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    shuffle = np.random.default_rng(0).shuffle  # none always comes after the same other
    end = time.perf_counter() + seconds
    while len(times[order[0]]) < FEWEST_ROUNDS or time.perf_counter() < end:
        shuffle(order)
        for name in order:
            times[name].append(one_turn(name))
    return {name: np.array(values) for name, values in times.items()}


def figure(values: Times) -> Figure:
    """The median of values, one a round, and their spread."""
    low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
    return Figure(float(median), float(low), float(high))


def number(value: float) -> str:
    """Three figures, as many as such measurements bear."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def provenance() -> dict[str, str]:
    """What a table must say: the command, the versions, the machine, the date."""
    names = ["torch", "numpy", "tcg_flatpolicy", "pufferlib", "pufferlib-core", "essence-wars"]
    versions = [f"python {platform.python_version()}"]
    for name in names:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    return {
        "command": " ".join(["python", script, *sys.argv[1:]]),
        "versions": ", ".join(versions),
        "commit": commit or "unknown",
        "machine": f"{_cpu_model()}, {os.cpu_count()} cores; threads: {torch.get_num_threads()}",
        "date": datetime.date.today().isoformat(),
    }


def write(name: str, body: str, figures: Mapping[str, Any]) -> None:
    """Prints a report, and writes it to results/NAME.md and its figures to results/NAME.json."""
    told = provenance()
    report = body + "\n" + "".join(f"- {key}: {value}\n" for key, value in told.items())
    RESULTS.mkdir(exist_ok=True)
    for path, text in (
        (RESULTS / f"{name}.md", report),
        (RESULTS / f"{name}.json", json.dumps({**told, **figures}, indent=2) + "\n"),
    ):
        part = path.with_name(path.name + ".part")
        part.write_text(text)
        part.replace(path)
    print(report)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
