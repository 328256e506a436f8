"""The command: ``python -m tcg_flatpolicy compare``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tcg_flatpolicy.app.evaluate import WinRate
from tcg_flatpolicy.app.run_folder import draw_curves, folder_of, read_csv, read_json

HEADER = ("run", "steps", "steps a second", "win rate in training", "sampling", "mode", "entropy")


def compare(options: argparse.Namespace) -> int:
    """Prints a table of runs and draws their curves into one picture.

    Below the table stand the settings in which the runs differ.

    Raises:
        FileNotFoundError: a folder without a run.
        ValueError: a file of a run is damaged.
    """
    names = [str(run) for run in options.runs]
    runs = {name: _read(folder_of(Path(name))) for name in names}
    rows = [HEADER, *(_row(name, *run) for name, run in runs.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    for name in sorted({name for settings, _, _ in runs.values() for name in settings}):
        values = [settings.get(name) for settings, _, _ in runs.values()]
        if any(value != values[0] for value in values):
            print(f"{name}: {', '.join(map(str, values))}")
    if draw_curves(options.to, {name: metrics for name, (_, metrics, _) in runs.items()}, ""):
        print(f"curves: {options.to}")
    else:
        print("no picture: there are no rows of metrics, or matplotlib is not installed")
    return 0


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]], dict[str, Any]]:
    """Settings, metrics and report of a run; a running one has no report."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"no run in {folder}: it has no config.json")
    settings = read_json(folder / "config.json")["settings"]
    settings = {**{k: v for k, v in settings.items() if k != "env"}, **settings.get("env", {})}
    metrics = read_csv(folder / "metrics.csv") if (folder / "metrics.csv").exists() else []
    report = read_json(folder / "report.json") if (folder / "report.json").exists() else {}
    return settings, metrics, report


def _row(
    name: str, settings: dict[str, Any], metrics: list[dict[str, float]], report: dict[str, Any]
) -> tuple[str, ...]:
    last = metrics[-1] if metrics else {"steps": 0, "win_rate": float("nan")}
    speed = last["steps"] / last["seconds"] if metrics else 0.0
    after = {way: WinRate(**result) for way, result in report.get("after", {}).items()}
    played = [
        str(after[way]).partition("  of")[0].strip() if way in after else "-"
        for way in ("sampling", "mode")
    ]
    entropy = f"{last['entropy']:.3f}" if metrics else "-"
    won = f"{last['win_rate']:.3f}"
    return (name, f"{last['steps']:,}", f"{speed:,.0f}", won, *played, entropy)
