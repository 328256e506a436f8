"""The command line: ``python -m tcg_flatpolicy train``, ``eval``, ``verify`` and ``info``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tcg_flatpolicy.app import train, verify
from tcg_flatpolicy.app.evaluate import WinRate
from tcg_flatpolicy.app.run_folder import folder_of
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.app.train import trained_policy
from tcg_flatpolicy.provenance import provenance
from tcg_flatpolicy.puffer import MISSING_PUFFERLIB

KERNELS = {
    "avx2": "compiled code with AVX2 instructions",
    "base": "compiled code without AVX2 instructions",
    "packed": "PyTorch's operations, since no compiled code runs here or TCG_KERNEL says so",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "train":
            return _train(options)
        if options.command == "verify":
            return verify.run(options)
        if options.command == "info":
            return _info()
        return _eval(options)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        return _fail(MISSING_PUFFERLIB if missing == "pufferlib" else str(error))
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        return _fail(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tcg_flatpolicy",
        description="Train, evaluate and audit policies that play only legal action tuples.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    training = commands.add_parser(
        "train",
        help="train with PufferLib's own trainer, and evaluate before and after",
        description="Train with PufferLib's own trainer. Writes a run folder: config.json, "
        "metrics.csv, checkpoint.pt, curves.png, report.json. After Ctrl-C the folder is complete, "
        "and --resume continues the run as if it had not been stopped.",
        formatter_class=formatter,
    )
    where = training.add_mutually_exclusive_group()
    where.add_argument(
        "--folder", type=Path, default=None, help="run folder; runs/<time>-seed<seed> if left out"
    )
    where.add_argument(
        "--resume",
        type=Path,
        default=None,
        help="run folder of a stopped run, or its checkpoint.pt: continue it with its settings",
    )
    for setting in fields(Settings):
        flag = "--" + setting.name.replace("_", "-")
        help = f"{setting.metadata['help']} (default: {setting.default})"
        kind: dict[str, Any] = {"type": type(setting.default)}
        if kind["type"] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        # Only flags that are given are set: a resumed run takes the rest from its checkpoint.
        training.add_argument(flag, default=argparse.SUPPRESS, help=help, **kind)
    evaluate = commands.add_parser(
        "eval",
        help="play games with a trained policy",
        description="Play games with the policy of a run folder: sampling, and with the mode.",
        formatter_class=formatter,
    )
    evaluate.add_argument("run", type=Path, help="a run folder or its checkpoint.pt")
    evaluate.add_argument(
        "--games", type=int, default=1000, help="number of games of each way to play"
    )
    evaluate.add_argument("--opponent", default="greedy", help="name of the built-in opponent")
    evaluate.add_argument(
        "--top-k", type=int, default=None, help="also sample from the K most probable tuples"
    )
    evaluate.add_argument(
        "--seed", type=int, default=2_000_000, help="random seed of games and sampling"
    )
    verify.add_parser(commands)
    commands.add_parser(
        "info", help="say what decides here (compiled code, or PyTorch's operations) and versions"
    )
    return parser


def _info() -> int:
    found = provenance()
    kernel, processor = found["kernel"], found["machine"]["processor"]
    print(f"kernel: {kernel} ({KERNELS[kernel]})")
    print(f"processor: {processor}, {found['machine']['torch_threads']} threads")
    for package, version in found["versions"].items():
        print(f"{package}: {version or 'not installed'}")
    return 0


def _train(options: argparse.Namespace) -> int:
    names = [setting.name for setting in fields(Settings)]
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    if options.resume:
        folder = folder_of(options.resume)
        report = train.resume(folder, given, say=_say)
    else:
        settings = Settings(**given)
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-seed{settings.seed}"
        folder = options.folder or Path("runs") / name
        report = train.train(settings, folder, say=_say)
    if int(os.environ.get("RANK", "0")):  # under torchrun only rank 0 prints
        return 0  # another status would make torchrun end rank 0 before it has printed
    played = sum(result.actions for result in (*report.before.values(), *report.after.values()))
    illegal = sum(
        result.illegal or 0 for result in (*report.before.values(), *report.after.values())
    )
    print()
    print("interrupted; the run is saved up to this step" if report.interrupted else "done")
    print(f"  steps            {report.steps:,} in {report.seconds:.0f} s, evaluations included")
    print(f"  steps a second   {report.steps_per_second:,.0f}")
    print(
        f"  illegal actions  {report.illegal + illegal} of {report.steps + played:,} played, "
        "counted by the environment"
    )
    if report.before or report.after:
        print("  wins against the batch engine's greedy opponent, 95% interval")
    for when, results in (("before", report.before), ("after", report.after)):
        _print_results(results, f"{when:>8}, ")
    print(f"  run folder       {folder}")
    return 130 if report.interrupted else 0


def _eval(options: argparse.Namespace) -> int:
    if options.games < 1:
        raise ValueError(f"--games must be at least 1, got {options.games}")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must lie in 0..2**63 - 1, got {options.seed}")
    if options.top_k is not None and options.top_k < 1:
        raise ValueError(f"--top-k must be at least 1, got {options.top_k}")
    settings, policy = trained_policy(options.run)
    results = train.evaluate(
        settings, policy, options.games, options.opponent, options.seed, top_k=options.top_k
    )
    print(f"{settings.deck1} against {settings.deck2}, {options.opponent} opponent, 95% interval")
    _print_results(results, "  ")
    illegal = sum(result.illegal or 0 for result in results.values())
    actions = sum(result.actions for result in results.values())
    print(f"  illegal actions  {illegal} of {actions:,} played, counted by the environment")
    return 0


def _print_results(results: dict[str, WinRate], indent: str) -> None:
    for way, result in results.items():
        print(f"  {indent}{way:<10}{result}")


def _say(line: str) -> None:
    print(line, flush=True)


def _fail(message: str, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
