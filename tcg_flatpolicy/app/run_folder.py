"""The files of a training run; each is written whole, by way of a temporary one."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tcg_flatpolicy.provenance import write_whole
from tcg_flatpolicy.saving import read_tensors, write_tensors

CHECKPOINT = "checkpoint.pt"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file."""
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads what :func:`write_json` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; fix or delete it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: no JSON object; fix or delete it")
    return content


def write_csv(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Writes rows of the same keys as CSV with a header; nothing for no rows."""
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, float]]:
    """Reads what :func:`write_csv` wrote; whole numbers come back as int.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with path.open(newline="") as file:
            header, *lines = csv.reader(file)
        return [
            {
                key: int(text) if text.isdecimal() else float(text)
                for key, text in zip(header, line, strict=True)
            }
            for line in lines
        ]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {error}; restore a complete one") from error


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes tensors and plain values, for :func:`read_checkpoint`."""
    write_tensors(path, content)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, or the one in a run folder: tensors and plain values, no code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint of this library.
    """
    if path.is_dir():
        path = path / CHECKPOINT
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: pass a run folder or its {CHECKPOINT}")
    content = read_tensors(path)
    if not {"policy", "settings"} <= content.keys():
        raise ValueError(f"{path} is no checkpoint of `python -m tcg_flatpolicy train`")
    return content


def is_run(name: str | None) -> bool:
    """Whether it is a run folder or its checkpoint, and not the name of an engine."""
    return name is not None and ":" not in name and Path(name).exists()


def folder_of(run: Path) -> Path:
    """The run folder, of its own path or that of its checkpoint.

    Raises:
        ValueError: the path is another file.
    """
    if not run.is_file():
        return run
    if run.name != CHECKPOINT:
        raise ValueError(f"{run} is neither a run folder nor its {CHECKPOINT}; pass one of these")
    return run.parent


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Holds a folder for this process until the block or the process ends, however it does.

    Raises:
        FileExistsError: another run that is alive holds it.
    """
    try:
        import fcntl
    except ImportError:  # on Windows folders cannot be locked
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise FileExistsError(
            f"{folder} is that of a run that is alive; wait for its end, or name another folder "
            "with --folder"
        ) from error
    finally:
        os.close(held)


def draw_curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, float]]], title: str) -> bool:
    """Draws win rate, entropy, KL and steps per second over environment steps, as a PNG.

    Args:
        path: of the picture.
        runs: {name: rows of metrics}, a line each.
        title: of the picture.

    Returns:
        False, and draws nothing, for no rows or without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    if not any(runs.values()):
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("win_rate", "win rate while training (sampling)", (0.0, 1.0)),
        ("entropy", "entropy of the policy [nats]", None),
        ("approx_kl", "KL of an update [nats]", None),
        ("steps_per_second", "environment steps per second", None),
    ]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for axis, (key, label, limits) in zip(axes.flat, panels, strict=True):
        for name, rows in runs.items():
            steps, values = [row["steps"] / 1e6 for row in rows], [row[key] for row in rows]
            axis.plot(steps, values, linewidth=1.3, label=name)
        axis.set_title(label, fontsize=10, loc="left")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if limits is None:
            axis.set_ylim(bottom=0)
        else:
            axis.set_ylim(*limits)
    if len(runs) > 1:
        axes[0, 0].legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("environment steps [millions]")
    figure.suptitle(title, fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    pyplot.close(figure)
    write_whole(path, picture.getvalue())
    return True
