"""The command: ``python -m tcg_flatpolicy verify``."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tcg_flatpolicy.heads import HEADS
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.policy import Policy
from tcg_flatpolicy.run_folder import write_whole
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.verify.codes import CODES, markdown
from tcg_flatpolicy.verify.environment import audit_env
from tcg_flatpolicy.verify.findings import Report, merged
from tcg_flatpolicy.verify.policy import LearnedEntities, audit_policy, check_rows, meaning
from tcg_flatpolicy.wrapping import env_attribute

if TYPE_CHECKING:
    from tcg_flatpolicy.train import Settings

ESSENCE_WARS = "essence_wars"
GAMES = 64
"""Games side by side of the built-in environment."""

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
        description="Plays random legal actions and checks every state and list; with --policy, "
        "what a policy draws as well. Prints a table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "env",
        nargs="?",
        metavar="module:factory",
        help="what makes the environment, called without arguments; imported from the current "
        f"directory or from what is installed. Or {ESSENCE_WARS}, the built-in game",
    )
    parser.add_argument(
        "--policy",
        help="module:factory, called with the environment; a run folder of `train`; or the name "
        f"of a head ({', '.join(sorted(HEADS))}) for a policy as it is initialised",
    )
    parser.add_argument(
        "--steps", type=int, default=2000, help="of each audit (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the games and the draws (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here, too")
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
    parser.add_argument("--codes", action="store_true", help="print what every code means")
    parser.add_argument("--explain", metavar="CODE", help="print what one code means")


def run(options: argparse.Namespace) -> int:
    """Does what the options of `add_parser` say.

    Returns:
        0 without findings, 1 with findings.

    Raises:
        ValueError: it could not run; one line says what is wrong and the way out.
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
            f"verify needs an environment: module:factory, such as mygame:make, or {ESSENCE_WARS}"
        )
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json {options.json}: there is no folder {options.json.parent}")

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
    """What a code means, in words.

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
        f"  to mend: {about.mend}"
    )


def audit(options: argparse.Namespace) -> Report:
    """The report on the environment, or on environment and policy together."""
    trained = _trained(options)
    make, make_policy = _environment(options, trained), _policy(options, trained)
    env = make()
    try:
        given = _given(options, env)
        if make_policy is not None:
            with _named(f"--policy {options.policy} cannot play {options.env}"):
                check_rows(env)
        with _named(f"the audit of {options.env} stopped"):
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
    if make_policy is None:
        return report

    env = make()
    try:
        given = _given(options, env)
        if isinstance(given["layout"], tuple):
            count, actions = given["layout"]
            with _named(f"--layout {options.layout} cannot be read for a policy"):
                given["layout"] = LegalLayout.from_env(env, count, actions, given["spec"])
        policy = make_policy(env, given)
        with _named(f"the audit of --policy {options.policy} stopped"):
            of_policy = audit_policy(policy, env, steps=options.steps, seed=options.seed, **given)
    except ValueError as error:
        if report.ok:
            raise
        report.skip("the policy's audit", f"stopped; mend the environment first: {error}")
        return report
    finally:
        _close(env)
    return merged(
        f"{options.env}, policy {options.policy}", {"environment": report, "policy": of_policy}
    )


def _trained(options: argparse.Namespace) -> tuple[Settings, Policy] | None:
    """What --policy's run folder holds, if it names one."""
    chosen = options.policy
    if chosen is None or chosen in HEADS or not Path(chosen).exists():
        return None
    if options.env != ESSENCE_WARS:
        raise ValueError(
            f"--policy {chosen} is a file or folder; `train` trains on {ESSENCE_WARS}, so verify "
            "that, or name a module:factory that loads your policy"
        )
    from tcg_flatpolicy.cli import trained_policy

    return trained_policy(Path(chosen))


def _environment(
    options: argparse.Namespace, trained: tuple[Settings, Policy] | None
) -> Callable[[], Any]:
    """What makes the environment; a trained policy's has the decks that it was trained with."""
    if options.env != ESSENCE_WARS:
        return _factory(options.env, "environment")
    from tcg_flatpolicy.envs.essence_wars import EssenceWars

    games: dict[str, Any] = {"num_games": GAMES, "seed": options.seed}
    if trained is not None:
        games.update({name: getattr(trained[0], name) for name in ("deck1", "deck2", "opponent")})
    return lambda: EssenceWars(**games)


def _policy(
    options: argparse.Namespace, trained: tuple[Settings, Policy] | None
) -> Callable[[Any, Given], Any] | None:
    """What makes the policy for an environment, if one is asked for."""
    chosen = options.policy
    if chosen is None:
        return None
    if trained is not None:
        policy = trained[1]
        return lambda env, given: policy
    if chosen in HEADS:
        return lambda env, given: _untrained(chosen, env, given, options.env == ESSENCE_WARS)
    if ":" not in chosen:
        raise ValueError(
            f"--policy {chosen} is neither module:factory nor a run folder nor the name of a head "
            f"({', '.join(sorted(HEADS))})"
        )
    factory = _factory(chosen, "policy")
    return lambda env, given: factory(env)


def _untrained(head: str, env: Any, given: Given, built_in: bool) -> Policy:
    if built_in:
        from tcg_flatpolicy import train

        return train.make_policy(train.Settings(head=head), env)
    if given["layout"] is None and env_attribute(env, "legal_layout") is None:
        raise ValueError(
            f"--policy {head} reads the list from observations: name where it is with --layout"
        )
    with _named(f"--policy {head} cannot be made for this environment"):
        spec, layout = meaning(None, env, **given)
        encoder = LearnedEntities(layout, spec)
        return Policy(env, head=head, spec=spec, layout=layout, encoder=encoder)


def _factory(name: str, kind: str) -> Callable[..., Any]:
    """What ``module:factory`` names, made to say in one line what goes wrong in it."""
    made_by = _load(name)
    if not callable(made_by):
        raise ValueError(
            f"{name} is of type {type(made_by).__name__}; it must be a function or class that "
            f"makes the {kind}"
        )
    called = f"{name}({'env' if kind == 'policy' else ''})"

    def make(*arguments: Any) -> Any:
        with _named(f"{called} failed"):
            made = made_by(*arguments)
        if made is None:
            raise ValueError(f"{called} returned None; it must return the {kind}")
        return made

    return make


def _given(options: argparse.Namespace, env: Any) -> Given:
    """The spec and layout that the command line names; None where the environment has its own."""
    spec: Any = None
    layout: Any = None
    if options.spec is not None:
        spec = _load(options.spec)
        _check_kind("--spec", options.spec, spec, ActionSpec)
    if options.layout is not None and ":" not in options.layout:
        layout = tuple(options.layout.split(","))
        if len(layout) != 2:
            raise ValueError(
                f"--layout {options.layout} must be module:attr, or the keys of count and list, "
                "such as n_legal,legal"
            )
    elif options.layout is not None:
        layout = _load(options.layout)
        if callable(layout):
            with _named(f"--layout {options.layout}(env) failed"):
                layout = layout(env)
        _check_kind("--layout", options.layout, layout, LegalLayout)
    own = env_attribute(env, "legal_layout")
    if layout is None and own is None and options.legal_actions is None:
        raise ValueError(
            f"{options.env} has no attribute legal_layout: give it one, or name it with --layout "
            "module:attr, for a Dict observation --layout count,list (its keys), or "
            "--legal-actions module:function"
        )
    known = [spec, env_attribute(env, "action_spec")]
    known += [getattr(one, "spec", None) for one in (layout, own)]
    if all(one is None for one in known):
        raise ValueError(
            f"{options.env} has no attribute action_spec: give it one, or name it with --spec "
            "module:attr"
        )
    return {"spec": spec, "layout": layout}


def _head_masks(options: argparse.Namespace) -> Any:
    """A function, or names of fields, or None."""
    given = options.head_masks
    if given is None or ":" in given:
        return _function("--head-masks", given)
    return given.split(",")


def _function(flag: str, name: str | None) -> Any:
    if name is None:
        return None
    found = _load(name)
    if not callable(found):
        raise ValueError(f"{flag} {name} is of type {type(found).__name__}, not a function")
    return found


def _check_kind(flag: str, name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{flag} {name} is of type {type(value).__name__}, not {kind.__name__}")


def _load(name: str) -> Any:
    """The attribute that ``module:attribute`` names; dots reach into it."""
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise ValueError(
            f"{name!r} must be module:name, such as mygame:make (or, as the environment, "
            f"{ESSENCE_WARS})"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with _named(f"importing {module_name} failed"):
            found = importlib.import_module(module_name)
    except ValueError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and _is_part(cause.name, module_name):
            raise ValueError(
                f"no module {cause.name!r}, neither in the current directory nor installed; run "
                "this where it lies, or set PYTHONPATH"
            ) from None
        raise
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            public = [name for name in dir(found) if not name.startswith("_")]
            near = difflib.get_close_matches(attribute, public) or public[:8]
            raise ValueError(f"{module_name} has no {path}; it has {', '.join(near) or 'nothing'}")
        found = getattr(found, attribute)
    return found


def _is_part(missing: str | None, module_name: str) -> bool:
    return missing is not None and (module_name + ".").startswith(missing + ".")


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Makes one line of whatever exception the user's own code raises.

    Raises:
        ValueError: saying what failed, how, and in which line of the user's code.
    """
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split())
        where = _place(error)
        raise ValueError(
            f"{what}: {type(error).__name__}: {words}{f' ({where})' if where else ''}"
        ) from error


def _place(error: Exception) -> str | None:
    """File and line of the innermost frame that is neither ours nor an installed package's."""
    others = (str(Path(__file__).parent.parent), sysconfig.get_path("stdlib"), "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others) and "site-packages" not in frame.filename:
            return f"{Path(frame.filename).name}, line {frame.lineno}"
    return None


def _close(env: Any) -> None:
    close = getattr(env, "close", None)
    if callable(close):
        close()
