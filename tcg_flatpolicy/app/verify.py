"""The command: ``python -m tcg_flatpolicy verify``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tcg_flatpolicy.app.engine import (
    factory_of,
    given_meaning,
    is_own,
    make_policy,
    make_vecenv,
)
from tcg_flatpolicy.app.load import load, one_line
from tcg_flatpolicy.app.run_folder import is_run
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.app.train import trained_policy
from tcg_flatpolicy.heads import HEADS
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.meaning import layout_of, meaning
from tcg_flatpolicy.provenance import write_whole
from tcg_flatpolicy.puffer import Policy
from tcg_flatpolicy.verify.codes import CODES, markdown
from tcg_flatpolicy.verify.environment import audit_env
from tcg_flatpolicy.verify.findings import Report, merged
from tcg_flatpolicy.verify.policy import LearnedEntities, audit_policy, check_rows

GAMES = 64
"""Number of games of the built-in environment."""

Given = dict[str, Any]
"""spec and layout where the command line names them, else None."""

EPILOG = """\
examples:
  python -m tcg_flatpolicy verify mygame:make
  python -m tcg_flatpolicy verify mygame:make --spec mygame:SPEC --layout mygame:LAYOUT
  python -m tcg_flatpolicy verify mygame:make --policy mygame:policy --json audit.json
  python -m tcg_flatpolicy verify essence_wars --policy runs/<folder>
  python -m tcg_flatpolicy verify --explain E07

exit status: 0 nothing found, 1 findings, 2 it could not run
"""


def add_parser(commands: Any) -> None:
    """Adds ``verify`` to the subparsers of the command line."""
    parser = commands.add_parser(
        "verify",
        help="audit an environment's legal lists and a policy's actions",
        description="Play random legal actions and check every state and list; with --policy, "
        "also check the actions that a policy samples. Prints a table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "env",
        nargs="?",
        metavar="module:factory",
        help="function or class that makes the environment, called without arguments; imported "
        "from the current directory or an installed package. Or essence_wars, a game of this "
        "library; or a run folder of it, whose policy is audited, too",
    )
    parser.add_argument(
        "--policy",
        help="module:factory, called with the environment; a run folder of `train`; or the name "
        f"of a head ({', '.join(sorted(HEADS))}) for an untrained policy",
    )
    parser.add_argument(
        "--steps", type=int, default=2000, help="steps of each audit (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of games and sampling (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the report to this file"
    )
    parser.add_argument(
        "--spec",
        metavar="module:attr",
        help="an ActionSpec, if the environment has no action_spec",
    )
    parser.add_argument(
        "--layout",
        metavar="module:attr",
        help="a LegalLayout, or a function of the environment that returns one, if the "
        "environment has no legal_layout; or count,list: the two keys of a Dict observation",
    )
    parser.add_argument(
        "--legal-actions",
        metavar="module:function",
        help="instead of a layout: function(observation, info) returns one agent's legal tuples",
    )
    parser.add_argument(
        "--head-masks",
        metavar="module:function",
        help="function(observation, info) returns one agent's masks, one for each value of a "
        "tuple, to compare with the list; or the names of the fields that hold them: a,b,c",
    )
    parser.add_argument("--codes", action="store_true", help="print the meaning of every code")
    parser.add_argument("--explain", metavar="CODE", help="print the meaning of one code")


def run(options: argparse.Namespace) -> int:
    """Runs the command with the options of `add_parser`.

    Returns:
        0 without findings, 1 with findings.

    Raises:
        ValueError, ImportError: it could not run; one line says what is wrong and what to do.
        OSError: the JSON file cannot be written.
    """
    if options.codes:
        print(markdown(), end="")
        return 0
    if options.explain is not None:
        print(explanation(options.explain))
        return 0
    if options.env is None:
        raise ValueError(
            "verify needs an environment: module:factory, such as mygame:make, or essence_wars"
        )
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json {options.json}: there is no folder {options.json.parent}")

    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if is_run(options.env):
        options.policy, options.env = options.policy or options.env, None
    torch.set_num_threads(1)  # networks this small gain little from more
    torch.manual_seed(options.seed)
    report = audit(options)
    print(report)
    if options.json is not None:
        write_whole(options.json, (report.to_json() + "\n").encode())
    if report.ok:
        return 0
    first = next(iter(report.findings))
    print(f"\nabout a code: python -m tcg_flatpolicy verify --explain {first}")
    return 1


def explanation(code: str) -> str:
    """The meaning of a code, in words.

    Raises:
        ValueError: there is no such code.
    """
    about = CODES.get(code.upper())
    if about is None:
        raise ValueError(
            f"there is no code {code!r}; --codes prints all of them: {', '.join(CODES)}"
        )
    return (
        f"{code.upper()}  {about.title}\n"
        f"  for example: {about.example}\n"
        f"  in training: {about.shows}\n"
        f"  fix: {about.fix}"
    )


def audit(options: argparse.Namespace) -> Report:
    """The report on the environment, or on environment and policy together."""
    trained = _trained(options)
    make, policy_of = _environment(options, trained), _policy(options, trained)
    env = make()
    try:
        given = _given(options, env)
        if policy_of is not None:
            with one_line(f"--policy {options.policy} cannot play {options.env}"):
                check_rows(env)
        with one_line(f"the audit of {options.env} stopped"):
            report = audit_env(
                env,
                steps=options.steps,
                seed=options.seed,
                make=make,
                legal_actions=_function("--legal-actions", options.legal_actions),
                head_masks=_head_masks(options),
                **given,
            )
    finally:
        _close(env)
    if policy_of is None:
        return report

    env = make()
    try:
        given = _given(options, env)
        if isinstance(given["layout"], tuple):
            count, actions = given["layout"]
            with one_line(f"--layout {options.layout} cannot be read for a policy"):
                given["layout"] = LegalLayout.from_env(env, count, actions, given["spec"])
        policy = policy_of(env, given)
        with one_line(f"the audit of --policy {options.policy} stopped"):
            of_policy = audit_policy(policy, env, steps=options.steps, seed=options.seed, **given)
    except (ImportError, ValueError) as error:
        if report.ok:
            raise
        report.skip("the policy's audit", f"stopped; fix the environment first: {error}")
        return report
    finally:
        _close(env)
    return merged(
        f"{options.env}, policy {options.policy}", {"environment": report, "policy": of_policy}
    )


def _trained(options: argparse.Namespace) -> tuple[Settings, Policy] | None:
    """Settings and policy of the run folder that --policy names, if it names one."""
    chosen = options.policy
    if chosen is None or chosen in HEADS or not Path(chosen).exists():
        return None
    named = {name: getattr(options, name) or "" for name in ("spec", "layout")}
    if options.env is not None:
        named["engine"] = options.env
    trained = trained_policy(Path(chosen), named)
    options.env = trained[0].engine
    return trained


def _environment(
    options: argparse.Namespace, trained: tuple[Settings, Policy] | None
) -> Callable[[], Any]:
    """The function that makes the environment, as that of the trained policy, if any."""
    if not is_own(options.env):
        if trained is None:
            return _factory(options.env, "environment")
        settings = replace(trained[0], num_workers=0)
        return lambda: make_vecenv(settings, options.seed)
    env = trained[0].env if trained is not None else {}
    games = {**env, "num_games": GAMES, "seed": options.seed}
    game = factory_of(options.env)
    return lambda: game(**games)


def _policy(
    options: argparse.Namespace, trained: tuple[Settings, Policy] | None
) -> Callable[[Any, Given], Any] | None:
    """The function that makes the policy for an environment; None without --policy."""
    chosen = options.policy
    if chosen is None:
        return None
    if trained is not None:
        policy = trained[1]
        return lambda env, given: policy
    if chosen in HEADS:
        return lambda env, given: _untrained(chosen, env, given, is_own(options.env))
    if ":" not in chosen:
        raise ValueError(
            f"--policy {chosen} is neither module:factory nor a run folder nor the name of a head "
            f"({', '.join(sorted(HEADS))})"
        )
    factory = _factory(chosen, "policy")
    return lambda env, given: factory(env)


def _untrained(head: str, env: Any, given: Given, built_in: bool) -> Policy:
    if built_in:
        return make_policy(Settings(head=head), env)
    if given["layout"] is None and layout_of(env) is None:
        raise ValueError(
            f"--policy {head} reads the list from observations: name where it is with --layout"
        )
    with one_line(f"--policy {head} cannot be made for this environment"):
        spec, layout = meaning(env, **given)
        encoder = LearnedEntities(layout, spec)
        return Policy(env, head=head, spec=spec, layout=layout, encoder=encoder)


def _factory(name: str, kind: str) -> Callable[..., Any]:
    """The function that ``module:factory`` names; what it raises has a message of one line."""
    made_by = load(name)
    if not callable(made_by):
        raise ValueError(
            f"{name} is of type {type(made_by).__name__}; it must be a function or class that "
            f"makes the {kind}"
        )
    called = f"{name}({'env' if kind == 'policy' else ''})"

    def make(*arguments: Any) -> Any:
        with one_line(f"{called} failed"):
            made = made_by(*arguments)
        if made is None:
            raise ValueError(f"{called} returned None; it must return the {kind}")
        return made

    return make


def _given(options: argparse.Namespace, env: Any) -> Given:
    """The spec and layout that the command line names; None for those of the environment."""
    needs_layout = options.legal_actions is None
    return given_meaning(env, options.env, options.spec, options.layout, needs_layout)


def _head_masks(options: argparse.Namespace) -> Any:
    """A function, or names of fields, or None."""
    given = options.head_masks
    if given is None or ":" in given:
        return _function("--head-masks", given)
    return given.split(",")


def _function(flag: str, name: str | None) -> Any:
    if name is None:
        return None
    found = load(name)
    if not callable(found):
        raise ValueError(f"{flag} {name} is of type {type(found).__name__}, not a function")
    return found


def _close(env: Any) -> None:
    close = getattr(env, "close", None)
    if callable(close):
        close()
