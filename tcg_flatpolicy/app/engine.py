"""Engines by name: a factory and its arguments, and what is made of them.

A factory is a function or class that returns a native PufferEnv, a Gymnasium or a PettingZoo
environment, or a PufferLib vector environment. Its own arguments are the engine's settings. If it
takes ``buf`` and ``seed``, it gets them from PufferLib; a PufferEnv must take ``buf``. It may have

- an argument ``num_games``: games played at the same time, which workers share and an evaluation
  sets;
- an argument ``record``: true where a run can be resumed, so that ``state_dict`` needs to work;
- an argument ``illegal``: "noop" in worker processes, since PufferLib waits for ever for one that
  raised;
- an attribute ``evaluation``: a dict of arguments, in place of those trained with, to be evaluated
  with.

An environment may have a method ``make_encoder(hidden_size, entity_size)``.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium
from torch import nn

from tcg_flatpolicy.app.load import load, one_line
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.encoders import FieldEncoder
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.meaning import layout_of, meaning, spec_of
from tcg_flatpolicy.puffer import Policy, RecurrentPolicy
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.verify.policy import LearnedEntities
from tcg_flatpolicy.wrapping import env_attribute

Arguments = Mapping[str, inspect.Parameter]

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
"""By which a run is asked to save and end: Ctrl-C, docker stop and Slurm, a closed terminal."""


def is_own(engine: str) -> bool:
    """Whether it is one of this library's games, which have a name without a colon."""
    return ":" not in engine


def own_games() -> list[str]:
    """The names of this library's games."""
    games = Path(__file__).parent.parent / "games"
    return sorted(path.name for path in games.iterdir() if (path / "__init__.py").exists())


def factory_of(engine: str) -> Callable[..., Any]:
    """The factory that ``module:factory`` names, or the name of one of this library's games.

    Raises:
        ValueError, ImportError: there is none, or it cannot be imported; as :func:`load`.
    """
    if is_own(engine):
        games = own_games()
        if engine not in games:
            raise ValueError(
                f"no game is named {engine!r}; take {' or '.join(games)}, or your own engine as "
                "module:factory, such as my_game:make"
            )
        engine = f"tcg_flatpolicy.games.{engine}:make"
    elif str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    made_by = load(engine)
    if not callable(made_by):
        raise ValueError(
            f"{engine} is of type {type(made_by).__name__}; it must be a function or class that "
            "makes the environment"
        )
    factory: Callable[..., Any] = made_by
    return factory


def arguments_of(factory: Callable[..., Any]) -> Arguments:
    """The factory's own arguments by name, without PufferLib's ``buf`` and ``seed``."""
    parameters = inspect.signature(factory).parameters
    return {name: one for name, one in parameters.items() if name not in ("buf", "seed")}


def check_arguments(engine: str, known: Arguments, given: Mapping[str, Any]) -> None:
    """Raises a ValueError for an argument that the factory does not take, or lacks."""
    if any(one.kind is one.VAR_KEYWORD for one in known.values()):
        return
    for name in given.keys() - known.keys():
        near = difflib.get_close_matches(name, known) or list(known)
        takes = f"it takes {', '.join(near)}" if near else "it takes no arguments"
        raise ValueError(f"the engine {engine} has no argument {name!r}; {takes}")
    for name, one in known.items():
        if one.default is one.empty and one.kind is not one.VAR_POSITIONAL and name not in given:
            raise ValueError(f"the engine {engine} needs the argument {name}: --env.{name} VALUE")


class Creator:
    """Makes environments for PufferLib, also in its worker processes, which end with this one."""

    def __init__(self, engine: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> None:
        self.engine, self.factory, self.given = engine, factory, dict(given)
        self.parent = os.getpid()

    def __call__(self, buf: Any = None, seed: Any = None) -> Any:
        """The environment, under PufferLib's emulation if it is not a native one."""
        from pufferlib import PufferEnv, emulation

        if os.getpid() != self.parent:
            threading.Thread(target=_end_with, args=(self.parent,), daemon=True).start()
        takes = inspect.signature(self.factory).parameters
        own = {"buf": buf, "seed": seed}
        offered = {name: v for name, v in own.items() if name in takes and v is not None}
        # What this library's own games raise is to be read as it is.
        words = one_line(f"{self.engine} failed")
        with contextlib.nullcontext() if is_own(self.engine) else words:
            made = self.factory(**self.given, **offered)
        seed = 0 if seed is None else seed
        if isinstance(made, gymnasium.Env) and not isinstance(made, emulation.GymnasiumPufferEnv):
            return emulation.GymnasiumPufferEnv(env=made, buf=buf, seed=seed)
        if hasattr(made, "possible_agents") and not hasattr(made, "num_agents_per_env"):
            if not isinstance(made, emulation.PettingZooPufferEnv):
                return emulation.PettingZooPufferEnv(env=made, buf=buf, seed=seed)
        elif not isinstance(made, PufferEnv) and not hasattr(made, "reset"):
            raise ValueError(f"{self.engine} returned a {type(made).__name__}, not an environment")
        if buf is not None and made.observations is not buf["observations"]:
            raise ValueError(
                f"{self.engine} made a {type(made).__name__} with buffers of its own: give the "
                "factory the arguments buf=None and seed=0, and hand buf on to PufferEnv.__init__ "
                "or to the emulation"
            )
        return made


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, also where that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def make_vecenv(settings: Settings, seed: int, record: bool = False) -> Any:
    """The vector environment of a run.

    Args:
        settings: of the run.
        seed: of the environments.
        record: whether the environments' ``state_dict`` must work.

    Raises:
        ValueError, ImportError: the engine cannot be made with these settings.
    """
    from pufferlib import PufferEnv, vector

    factory, workers, copies = factory_of(settings.engine), settings.num_workers, settings.num_envs
    known, given = arguments_of(factory), dict(settings.env)
    check_arguments(settings.engine, known, given)
    if record and "record" in known:
        given["record"] = True
    if "num_games" in known and not copies:
        copies = max(1, workers)
        games = given.get("num_games", known["num_games"].default)
        if games % copies:
            raise ValueError(f"num_workers {workers} must divide num_games {games}, or be 0")
        given["num_games"] = games // copies
    if workers and "illegal" in known:
        given["illegal"] = "noop"
    creator = Creator(settings.engine, factory, given)
    if not copies:
        probe = creator()
        if hasattr(probe, "recv") and not isinstance(probe, PufferEnv):
            return probe  # a vector environment, made by the factory
        copies = 1 if isinstance(probe, PufferEnv) else 64
        probe.close()
        copies = max(copies, workers)
    if not workers:
        return vector.make(creator, backend=vector.Serial, num_envs=copies, seed=seed)
    if copies % workers:
        raise ValueError(f"num_workers {workers} must divide num_envs {copies}, or be 0")
    with ignored_signals():
        return vector.make(
            creator,
            backend=vector.Multiprocessing,
            num_envs=copies,
            num_workers=workers,
            overwork=True,
            seed=seed,
        )


@contextlib.contextmanager
def ignored_signals() -> Iterator[None]:
    """For making workers: they ignore the signals that ask a run to end, which reach all at once.

    The trainer would wait for ever for a worker that ended.
    """
    earlier = [(one, signal.signal(one, signal.SIG_IGN)) for one in SIGNALS]
    try:
        yield
    finally:
        for one, handler in earlier:
            signal.signal(one, handler)


def given_meaning(
    env: Any, name: str, spec: str | None, layout: str | None, needs_layout: bool = True
) -> dict[str, Any]:
    """The spec and the layout that are named; None for those of the environment.

    Args:
        env: the environment.
        name: what it is called on the command line.
        spec: module:name of an ActionSpec.
        layout: module:name of a LegalLayout, or of a function of the environment that returns one;
            or ``count,list``, the keys of a Dict observation, which stay a pair.
        needs_layout: whether there must be a layout somewhere.

    Raises:
        ValueError, ImportError: they cannot be found, are something else, or are nowhere.
    """
    of_spec: Any = None
    at: Any = None
    if spec:
        of_spec = load(spec)
        _check_kind("--spec", spec, of_spec, ActionSpec)
    if layout and ":" not in layout:
        at = tuple(layout.split(","))
        if len(at) != 2:
            raise ValueError(
                f"--layout {layout} must be module:attr, or the keys of count and list, "
                "such as n_legal,legal"
            )
    elif layout:
        at = load(layout)
        if callable(at):
            with one_line(f"--layout {layout}(env) failed"):
                at = at(env)
        _check_kind("--layout", layout, at, LegalLayout)
    if at is None and layout_of(env) is None and needs_layout:
        raise ValueError(
            f"{name} has no attribute legal_layout: give it one, or name it with --layout "
            "module:attr, for a Dict observation --layout count,list (its keys), or "
            "--legal-actions module:function"
        )
    if spec_of(env, spec=of_spec, layout=at if isinstance(at, LegalLayout) else None) is None:
        raise ValueError(
            f"{name} has no attribute action_spec: give it one, or name it with --spec module:attr"
        )
    return {"spec": of_spec, "layout": at}


def _check_kind(flag: str, name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{flag} {name} is of type {type(value).__name__}, not {kind.__name__}")


def make_policy(settings: Settings, env: Any) -> Policy:
    """A new policy for an environment, on the CPU.

    Its encoder is the one that the settings name, else the environment's ``make_encoder``, else
    every field of the observation, with a learned row for each number of an Entity.

    Raises:
        ValueError, ImportError: no spec or layout, or an encoder that cannot be made.
    """
    given = given_meaning(env, settings.engine, settings.spec, settings.layout)
    if isinstance(given["layout"], tuple):
        count, actions = given["layout"]
        given["layout"] = LegalLayout.from_env(env, count, actions, given["spec"])
    spec, layout = meaning(env, **given)
    sizes = settings.hidden_size, settings.entity_size
    make_encoder = env_attribute(env, "make_encoder")
    encoder: nn.Module
    if settings.encoder:
        kind = load(settings.encoder)
        with one_line(f"--encoder {settings.encoder}(layout, hidden_size) failed"):
            encoder = kind(layout, settings.hidden_size)
    elif make_encoder is not None:
        encoder = make_encoder(*sizes)
    elif any(part.role.encoded for part in spec.parts):
        encoder = LearnedEntities(layout, spec, *sizes)
    else:
        encoder = FieldEncoder(layout, settings.hidden_size)
    made_by = RecurrentPolicy if settings.recurrent else Policy
    return made_by(
        env,
        encoder=encoder,
        head=settings.head,
        width=settings.head_width,
        invalid=settings.invalid,
        **given,
    )
