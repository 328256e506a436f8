"""What an audit looks for: each file here is one fault, its page, its check and planted bugs.

To add a check, add a file with a subclass of `Check`; nothing else has to be touched. Its docstring
is the page of its code in docs/findings.md and of ``verify --explain``. A check keeps `Symptom`s of
what it sees; `diagnose` then moves each symptom to the fault that explains it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from tcg_flatpolicy.verify.evidence import State, Step, World
    from tcg_flatpolicy.verify.findings import Report

Action: TypeAlias = tuple[int, ...]


class Fault:
    """A kind of fault.

    Its docstring is its page: a title, and the paragraphs Why, Example and Fix.
    """

    code: ClassVar[str]
    """E of environments, P of policies, T of training. Codes are added at the end, and stay."""


@dataclass(eq=False)
class Symptom:
    """Something wrong that a check has seen."""

    code: str
    """Of the check that saw it."""
    line: str
    """What was looked at: the line of the report that it belongs to."""
    message: str
    state: int
    tuples: Sequence[Action] = ()
    """The tuples that it is about, where they are known."""
    count: int = 1
    unchanged: bool = False
    """Whether the row still shows the list that it showed last."""
    fresh: bool = False
    """Whether nothing had been played yet."""
    others_legal: bool = False
    """Whether tuples that are not listed are legal in the same state."""
    sent: Sequence[int] = ()
    """Where it is not known which tuples it is about: the primaries of all that were sent."""
    hint: str = ""
    """What another fault may know it by: "full", "follows", "last", "zeros",
    "failed"."""


class Bug:
    """How a planted bug changes `tcg_flatpolicy.verify.toy.Duel`; this one changes nothing."""

    room: int | None = None
    """How many tuples a list has room for."""
    reseeds: bool = True
    """Whether reset(seed) seeds the engine."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def meant(self, action: Action) -> Action:
        """What the engine takes a tuple for."""
        return action

    def said(self, legal: list[Action], match: Any, player: int) -> list[Action]:
        """The list of the player who is to move."""
        return legal

    def waits(self, legal: list[Action]) -> list[Action]:
        """The list of the player who waits, given the mover's."""
        return []

    def shown(self, legal: list[Action], last: list[Action], match: Any) -> list[Action]:
        """The list that is shown, given the one that this player was shown before."""
        return legal

    def written(self, records: Any, some: Any) -> None:
        """Changes the records; ``some`` says which rows have a list."""

    def seed(self, seed: int) -> int | None:
        """The seed that the engine's generator gets."""
        return seed

    def dealer(self, game: int) -> np.random.Generator:
        """The generator of the next game of a slot."""
        return self.rng

    def played(self, action: Action) -> Any:
        """Called with each legal action that is played."""

    def whole(self, actions: Any) -> Any:
        """Actions that were sent as floats, as whole numbers."""
        return np.rint(actions)


class Check(Fault):
    """Sees each state and step of a play of an environment, and keeps symptoms of one fault.

    Args:
        world: the environment, as it is played.
        report: where what was looked at, and what could not be, is noted.
    """

    lines: ClassVar[tuple[str, ...]] = ()
    """The lines of the report that it answers; none where it only explains what others see."""
    claims: ClassVar[tuple[str, ...]] = ()
    """Codes whose symptoms it may explain: it is asked before those checks are."""
    planted: ClassVar[dict[str, type[Bug]]] = {}
    """Bugs that it finds, by name."""

    def __init__(self, world: World, report: Report) -> None:
        self.world, self.report = world, report
        self.symptoms: list[Symptom] = []
        self.start()

    def start(self) -> None:
        """Called once, before anything is played: says what cannot be looked at."""

    def see(self, state: State) -> None:
        """Called with each state."""

    def stepped(self, step: Step) -> None:
        """Called with what came of each step."""

    def end(self) -> None:
        """Called once, after everything was played."""

    def explains(self, left: Mapping[str, list[Symptom]]) -> Iterable[Symptom]:
        """Symptoms that this fault explains, their messages changed where it has more to say.

        Args:
            left: by code, the symptoms that no other fault has explained.
        """
        return ()

    def looked(self, cases: int = 1, line: str | None = None) -> None:
        """Notes that so many more cases were looked at."""
        self.report.looked(line or self.lines[0], cases)

    def skip(self, why: str, line: str | None = None) -> None:
        """Notes what would enable the check."""
        self.report.skip(line or self.lines[0], why)

    def wrong(self, message: str, state: int, line: str | None = None, **more: Any) -> Symptom:
        """Keeps a symptom; ``more`` are further fields of it."""
        symptom = Symptom(self.code, line or self.lines[0], message, state, **more)
        self.symptoms.append(symptom)
        return symptom


def blamed(symptom: Symptom, faulty: Collection[int]) -> set[int]:
    """Primaries among the faulty ones, if they explain all of a symptom; else none."""
    primaries = {action[0] for action in symptom.tuples}
    if primaries:
        return primaries if primaries <= set(faulty) else set()
    if sum(primary in faulty for primary in symptom.sent) >= symptom.count:
        return set(symptom.sent) & set(faulty)
    return set()


def diagnose(checks: Sequence[Check], report: Report) -> None:
    """Reports each symptom under the code of the fault that explains it."""
    left = {check.code: check.symptoms for check in checks}
    for check in _in_order(checks):
        taken = list(check.explains(left))
        moved = set(map(id, taken))
        for code, symptoms in left.items():
            left[code] = [symptom for symptom in symptoms if id(symptom) not in moved]
        left[check.code] += taken
    for code, symptoms in left.items():
        for symptom in symptoms:
            report.found(code, symptom.line, symptom.message, symptom.state, symptom.count)


def _in_order(checks: Sequence[Check]) -> Iterator[Check]:
    """By code, but each before those whose symptoms it may explain."""
    left = sorted(checks, key=lambda check: check.code)
    while left:
        check = next(c for c in left if not any(c.code in other.claims for other in left))
        left.remove(check)
        yield check


def env_checks() -> list[type[Check]]:
    """The checks of an environment, by code."""
    return [fault for fault in faults().values() if issubclass(fault, Check)]


def bugs() -> dict[str, tuple[type[Bug], str]]:
    """All planted bugs by name, each with the code that it must be reported under."""
    return {n: (bug, check.code) for check in env_checks() for n, bug in check.planted.items()}


@cache
def faults() -> dict[str, type[Fault]]:
    """All faults by code: those of environments, then of policies, then of training."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        content = vars(importlib.import_module(f"{__name__}.{module.name}"))
        mine = [kind for kind in content.values() if inspect.isclass(kind)]
        found += [k for k in mine if issubclass(k, Fault) and hasattr(k, "code")]
    return {
        kind.code: kind
        for kind in sorted(found, key=lambda kind: ("EPT".index(kind.code[0]), kind.code))
    }
