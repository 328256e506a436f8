"""The command line: train, eval, watch, verify, compare, export and info."""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tcg_flatpolicy.app import train, verify, watch
from tcg_flatpolicy.app.compare import compare
from tcg_flatpolicy.app.engine import arguments_of, factory_of, make_policy, make_vecenv, own_games
from tcg_flatpolicy.app.evaluate import WinRate
from tcg_flatpolicy.app.run_folder import folder_of, is_run, read_checkpoint
from tcg_flatpolicy.app.settings import Settings, flags, read_toml, saved_settings
from tcg_flatpolicy.app.train import trained_policy
from tcg_flatpolicy.kernels import fused
from tcg_flatpolicy.provenance import provenance
from tcg_flatpolicy.puffer import MISSING_PUFFERLIB, Policy, check_contract

KERNELS = {
    "avx2": "compiled code with AVX2 instructions",
    "base": "compiled code without AVX2 instructions",
    "packed": "PyTorch's operations, since no compiled code runs here or TCG_KERNEL says so",
}
GPU_KERNELS = {
    "cuda": "one Triton kernel a decision",
    "reference": "the plain form of the Triton kernel, since TCG_KERNEL says so",
    "": "PyTorch's operations, since Triton is not installed or TCG_KERNEL says so",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser(arguments).parse_args(arguments)
        commands = {"train": _train, "eval": _eval, "verify": verify.run, "compare": compare}
        commands |= {"export": _export, "watch": _watch, "info": _info}
        return commands[options.command](options)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        return _fail(MISSING_PUFFERLIB if missing == "pufferlib" else str(error))
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        return _fail(str(error))


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tcg_flatpolicy",
        description="Train, evaluate and audit policies that play only legal action tuples.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    given = [one for one in arguments if one in ("train", "eval", "export", "watch")][:1]
    command, rest = (given[0], list(arguments)[1:]) if given else ("", [])

    training = commands.add_parser(
        "train",
        help="train with PufferLib's own trainer, and evaluate before and after",
        description="Train with PufferLib's own trainer. Writes a run folder: config.toml, "
        "config.json, metrics.csv, checkpoint.pt, curves.png, report.json. After Ctrl-C, SIGTERM "
        "or SIGHUP the folder is complete, and --resume continues the run as if it had not been "
        "stopped.",
        formatter_class=formatter,
    )
    training.add_argument(
        "engine",
        nargs="?",
        metavar="module:factory",
        help="function or class that makes the environment, such as my_game:make; or essence_wars, "
        "a game of this library, which a bare train takes",
    )
    training.add_argument(
        "--config", type=Path, help="a TOML file of settings, such as a run's config.toml"
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
    _add_flags(training, [])
    if command == "train":
        _add_engine(training, _engine_of(rest), rest)

    evaluate = commands.add_parser(
        "eval",
        help="play games with a trained policy",
        description="Play games with the policy of a run folder, or with an untrained one of an "
        "engine: sampling, and with the mode.",
        formatter_class=formatter,
    )
    export = commands.add_parser(
        "export",
        help="write a trained policy as an ONNX file",
        description="Write the policy of a run folder, or an untrained one of an engine, as an "
        "ONNX file, for onnxruntime without torch or this library.",
        formatter_class=formatter,
    )
    watching = commands.add_parser(
        "watch",
        help="write a page that shows each decision of some games",
        description="Play some games with the policy of a run folder, or with an untrained one of "
        "an engine, and write one HTML file that shows each decision: the state, every legal tuple "
        "with its probability, the value.",
        formatter_class=formatter,
    )
    playing = {"eval": evaluate, "export": export, "watch": watching}
    for one in playing.values():
        one.add_argument(
            "run", help="a run folder or its checkpoint.pt; or module:factory, for no training"
        )
        one.add_argument(
            "engine",
            nargs="?",
            metavar="module:factory",
            help="the run's engine, named again, unless it is a game of this library",
        )
        _add_flags(one, ["encoder", "spec", "layout"])
    evaluate.add_argument(
        "--games", type=int, default=1000, help="number of games of each way to play"
    )
    watching.add_argument("--games", type=int, default=5, help="number of games")
    watching.add_argument(
        "--other", type=Path, help="another run: what its policy would do in the same states"
    )
    watching.add_argument(
        "--to", type=Path, help="the file to write; watch.html in the run folder if left out"
    )
    for one, seed in ((evaluate, 2_000_000), (watching, 3_000_000)):
        one.add_argument(
            "--opponent",
            default=None,
            help="the engine's argument; that which it is evaluated with if left out",
        )
        one.add_argument("--seed", type=int, default=seed, help="random seed of games and sampling")
    evaluate.add_argument(
        "--top-k", type=int, default=None, help="also sample from the K most probable tuples"
    )
    export.add_argument("--to", type=Path, default=Path("policy.onnx"), help="the file to write")
    if command in playing and rest and not rest[0].startswith("-"):
        engine = next((one for one in rest[:2] if ":" in one), rest[0])
        if ":" in engine or engine in own_games():
            _add_engine(playing[command], engine, rest)

    verify.add_parser(commands)
    comparing = commands.add_parser(
        "compare",
        help="set runs side by side: a table, and their curves as a picture",
        description="Print a table of runs, and draw their curves into one picture.",
        formatter_class=formatter,
    )
    comparing.add_argument("runs", nargs="+", type=Path, help="run folders")
    comparing.add_argument(
        "--to", type=Path, default=Path("compare.png"), help="the picture to write"
    )
    commands.add_parser(
        "info", help="say what decides here (compiled code, or PyTorch's operations) and versions"
    )
    return parser


def _add_flags(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Adds settings as flags: those of these names, or all."""
    for setting in flags():
        if names and setting.name not in names:
            continue
        flag = "--" + setting.name.replace("_", "-")
        help = f"{setting.metadata['help']} (default: {setting.default})"
        # Only flags that are given are set: the rest is a file's, a checkpoint's or the default.
        kind = _kind(setting.default)
        parser.add_argument(flag, default=argparse.SUPPRESS, help=help.replace("%", "%%"), **kind)


def _kind(default: Any) -> dict[str, Any]:
    """How argparse reads a value of this default."""
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(default, (int, float, str)):
        return {"type": type(default)}
    return {"type": _literal}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _engine_of(rest: Sequence[str]) -> str | None:
    """The engine that ``train`` is given first, or that of the file or checkpoint it names."""
    if rest and not rest[0].startswith("-"):
        return rest[0]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", type=Path)
    options, _ = first.parse_known_args(rest)
    if options.config is not None:
        return str(read_toml(options.config).get("engine", "essence_wars"))
    if options.resume is not None:
        engine = saved_settings(read_checkpoint(options.resume), options.resume).engine
        return None if ":" in engine else engine
    return "essence_wars"


def _add_engine(parser: argparse.ArgumentParser, engine: str | None, rest: Sequence[str]) -> None:
    """Adds the arguments of an engine's factory: ``--env.name``, and ``--name`` where it is free.

    The help is that of the factory's docstring.
    """
    if engine is None:
        return
    check_contract()
    factory = factory_of(engine)
    said = _documented(inspect.getdoc(factory) or "")
    group = parser.add_argument_group(f"arguments of {engine}")
    known: Mapping[str, Any] = arguments_of(factory)
    defaults = {name: one.default for name, one in known.items() if one.kind not in (2, 4)}
    if any(one.kind == one.VAR_KEYWORD for one in known.values()):
        named = re.findall(r"^--env\.(\w+)", "\n".join(rest), re.MULTILINE)
        defaults = {**dict.fromkeys(named), **defaults}
    taken = parser._option_string_actions
    for name, default in defaults.items():
        short = "--" + name.replace("_", "-")
        names = [f"--env.{name}", *([short] if short not in taken else [])]
        shown = "" if default is inspect.Parameter.empty else f" (default: {default})"
        help = f"{said.get(name, '')}{shown}".strip().replace("%", "%%")
        kind = _kind(None if default is inspect.Parameter.empty else default)
        dest = f"env.{name}"
        group.add_argument(*names, dest=dest, default=argparse.SUPPRESS, help=help, **kind)


def _documented(docstring: str) -> dict[str, str]:
    """What a docstring in Google's convention says of each argument."""
    _, _, args = docstring.partition("Args:\n")
    args = re.split(r"\n\S", args)[0]
    found = re.findall(r"^    (\w+)(?: \(.*?\))?: (.*(?:\n {8,}.*)*)", args, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in found}


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings, engine and arguments of it that the command line gives."""
    there = vars(options)
    given = {s.name: there[s.name] for s in flags() if s.name in there}
    env = {name[4:]: value for name, value in there.items() if name.startswith("env.")}
    if options.engine is not None:
        given["engine"] = options.engine
    return {**given, **env}


def _info(options: argparse.Namespace) -> int:
    found = provenance()
    kernel, processor = found["kernel"], found["machine"]["processor"]
    print(f"kernel: {kernel} ({KERNELS[kernel]})")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU here"
    print(f"GPU kernel: {GPU_KERNELS[fused('cuda')]}; {card}")
    print(f"processor: {processor}, {found['machine']['torch_threads']} threads")
    for package, version in found["versions"].items():
        print(f"{package}: {version or 'not installed'}")
    return 0


def _train(options: argparse.Namespace) -> int:
    given = _given(options)
    if options.resume:
        if options.config:
            raise ValueError("--resume goes on with a run's own settings; leave --config out")
        folder = folder_of(options.resume)
        report = train.resume(folder, given, say=_say)
    else:
        settings = Settings(**{**(read_toml(options.config) if options.config else {}), **given})
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-seed{settings.seed}"
        folder = options.folder or Path("runs") / name
        report = train.train(settings, folder, say=_say)
    if int(os.environ.get("RANK", "0")):  # under torchrun only rank 0 prints
        return 0  # another status would make torchrun end rank 0 before it has printed
    results = [*report.before.values(), *report.after.values()]
    played = sum(result.actions for result in results)
    illegal = sum(result.illegal or 0 for result in results)
    print()
    print("interrupted; the run is saved up to this step" if report.interrupted else "done")
    print(f"  steps            {report.steps:,} in {report.seconds:.0f} s, evaluations included")
    print(f"  steps a second   {report.steps_per_second:,.0f}")
    print(
        f"  illegal actions  {report.illegal + illegal} of {report.steps + played:,} played, "
        "counted by the environment"
    )
    if results:
        print(f"  wins{_against(report.evaluated)}, 95% interval")
    for when, of_then in (("before", report.before), ("after", report.after)):
        _print_results(of_then, f"{when:>8}, ")
    print(f"  run folder       {folder}")
    return 130 if report.interrupted else 0


def _against(env: Mapping[str, Any]) -> str:
    return f" against the {env['opponent']} opponent" if "opponent" in env else ""


def _eval(options: argparse.Namespace) -> int:
    _check_games(options)
    if options.top_k is not None and options.top_k < 1:
        raise ValueError(f"--top-k must be at least 1, got {options.top_k}")
    settings, policy = _policy(options)
    results = train.evaluate(
        settings, policy, options.games, options.opponent, options.seed, top_k=options.top_k
    )
    env = train.evaluated(settings, options.opponent)
    print(f"{train.title(settings)}: wins{_against(env)}, 95% interval")
    _print_results(results, "  ")
    illegal = sum(result.illegal or 0 for result in results.values())
    actions = sum(result.actions for result in results.values())
    print(f"  illegal actions  {illegal} of {actions:,} played, counted by the environment")
    return 0


def _check_games(options: argparse.Namespace) -> None:
    if options.games < 1:
        raise ValueError(f"--games must be at least 1, got {options.games}")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must lie in 0..2**63 - 1, got {options.seed}")


def _watch(options: argparse.Namespace) -> int:
    _check_games(options)
    settings, policy = _policy(options)
    policies, names = [policy], [folder_of(Path(options.run)).name]
    if options.other is not None:
        policies.append(trained_policy(options.other, _given(options))[1])
        names.append(folder_of(options.other).name)
    env = train.evaluated(settings, options.opponent)
    if "num_games" in arguments_of(factory_of(settings.engine)):
        env["num_games"] = min(options.games, 64)
    vecenv = make_vecenv(replace(settings, env=env, num_workers=0), options.seed)
    try:
        games = watch.record(
            policies, vecenv, policy.spec, policy.layout, options.games, options.seed
        )
    finally:
        vecenv.close()
    to = (
        options.to
        or (folder_of(Path(options.run)) if is_run(options.run) else Path()) / "watch.html"
    )
    watch.write_page(to, games, names, policy.spec.slots, f"{names[0]}: {train.title(settings)}")
    print(watch.saturation(games))
    decisions = sum(len(game["decisions"]) for game in games)
    print(f"{to}: {decisions} decisions of {len(games)} games")
    return 0


def _policy(options: argparse.Namespace) -> tuple[Settings, Policy]:
    """The settings and the policy of a run folder, or an untrained one of an engine."""
    given = _given(options)
    given.pop("seed", None)
    if is_run(options.run) or (":" not in options.run and options.run not in own_games()):
        return trained_policy(Path(options.run), given)
    settings = Settings(**{"engine": options.run, **given})
    vecenv = make_vecenv(settings, settings.seed)
    try:
        torch.manual_seed(settings.seed)
        return settings, make_policy(settings, vecenv.driver_env)
    finally:
        vecenv.close()


def _export(options: argparse.Namespace) -> int:
    from tcg_flatpolicy.export import export_onnx

    settings, policy = _policy(options)
    vecenv = make_vecenv(settings, settings.seed)
    try:
        vecenv.async_reset(settings.seed)
        observations = torch.as_tensor(vecenv.recv()[0])
        export_onnx(policy.eval(), options.to, observations)
    finally:
        vecenv.close()
    print(f"wrote {options.to}")
    return 0


def _print_results(results: dict[str, WinRate], indent: str) -> None:
    for way, result in results.items():
        print(f"  {indent}{way:<10}{result}")


def _say(line: str) -> None:
    print(line, flush=True)


def _fail(message: str, status: int = 2) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
