"""For your own test suite: hypothesis strategies, and the audits as pytest tests.

Needs hypothesis and pytest (from a checkout: ``pip install '.[testing]'``). Shapes: B rows, N legal
tuples in the whole batch, H = 1 + slots values in a tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcg_flatpolicy.fields import resolve
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.spec import ActionSpec, Entity, Index, OneOf, Primary, Role
from tcg_flatpolicy.verify import CODES, Report, environment, policy

try:
    import pytest
    from hypothesis import strategies as st
except ImportError as error:
    where = "from a checkout of this library, pip install '.[testing]'"
    raise ImportError(f"tcg_flatpolicy.testing needs {error.name}: {where}") from error

__all__ = [
    "EnvironmentTests",
    "actions",
    "legal_actions",
    "legal_lists",
    "observations",
    "plain_roles",
    "roles",
    "scores",
    "specs",
]

Action: TypeAlias = tuple[int, ...]
"""A tuple: primary, sub1, sub2, ..."""
Lists: TypeAlias = list[list[Action]]
"""One list of legal tuples a row."""
Kinds: TypeAlias = Sequence[type[Role]]
"""Classes of roles, which may be your own: they are called with name and size."""


def plain_roles(max_size: int = 4, kinds: Kinds = (Index, Entity)) -> st.SearchStrategy[Role]:
    """A role of one of the kinds."""
    arguments = st.tuples(st.sampled_from("abc"), st.integers(1, max_size))
    return st.builds(lambda kind, both: kind(*both), st.sampled_from(list(kinds)), arguments)


def roles(max_size: int = 4, kinds: Kinds = (Index, Entity)) -> st.SearchStrategy[Role]:
    """Any role of a slot; ``max_size`` is that of a single role, also within a OneOf."""
    plain = plain_roles(max_size, kinds)
    return plain | st.lists(plain, min_size=1, max_size=3).map(lambda parts: OneOf(*parts))


@st.composite
def specs(
    draw: st.DrawFn,
    max_primaries: int = 4,
    max_slots: int = 3,
    max_size: int = 4,
    kinds: Kinds = (Index, Entity),
) -> ActionSpec:
    """Specs with gaps between ids, ids out of order, and a no-op of their own.

    A primary has at most ``max_slots`` slots. ``max_size`` and ``kinds`` are those of `roles`.
    """
    ids = draw(st.lists(st.integers(0, 9), min_size=1, max_size=max_primaries, unique=True))
    slots = st.lists(roles(max_size, kinds), max_size=max_slots)
    primaries = [Primary(f"p{number}", *draw(slots), id=number) for number in ids]
    nvec = ActionSpec(primaries).nvec.tolist()
    noop = draw(st.none() | st.tuples(*(st.integers(0, size - 1) for size in nvec)))
    return ActionSpec(primaries, noop=noop)


def actions(spec: ActionSpec) -> st.SearchStrategy[Action]:
    """Tuples within a spec: a declared primary, values in their roles' ranges, zeros elsewhere."""
    each = []
    for number in spec.primaries:
        slots = [st.integers(0, size - 1) for size in spec.limits[number, 1:].tolist()]
        each.append(st.tuples(st.just(number), *slots))
    return st.one_of(each)


def legal_lists(
    tuples: ActionSpec | st.SearchStrategy[Action],
    max_rows: int = 6,
    max_length: int = 8,
    repeats: bool = True,
    min_rows: int = 0,
) -> st.SearchStrategy[Lists]:
    """Lists of ``min_rows`` to ``max_rows`` rows; empty rows are frequent.

    ``tuples`` is a spec, for tuples within it, or a strategy of tuples of one length. With
    ``repeats`` a row often lists a tuple more than once.
    """
    one = actions(tuples) if isinstance(tuples, ActionSpec) else tuples
    row: st.SearchStrategy[list[Action]] = st.just([])
    if repeats:
        row |= st.lists(one, min_size=1, max_size=3).flatmap(
            lambda pool: st.lists(st.sampled_from(pool), max_size=max_length)
        )
    row |= st.lists(one, max_size=max_length, unique=not repeats)
    return st.lists(row, min_size=min_rows, max_size=max_rows)


def legal_actions(
    spec: ActionSpec, max_rows: int = 6, max_length: int = 8, repeats: bool = True
) -> st.SearchStrategy[LegalActions]:
    """LegalActions within a spec, with its no-op; the arguments are those of `legal_lists`."""
    return legal_lists(spec, max_rows, max_length, repeats).map(
        lambda lists: LegalActions.from_lists(lists, slots=spec.slots, noop=spec.noop.tolist())
    )


SCORES: dict[str, st.SearchStrategy[float]] = {
    "plain": st.integers(-128, 128).map(lambda sixteenths: sixteenths / 16),
    "ties": st.sampled_from([-2.0, 0.0, 3.0]),
    "extreme": st.sampled_from([-1e30, -1e12, -1e4, -1.0, 0.0, 1.0, 1e4, 1e12, 1e30]),
    "-inf": st.sampled_from([-float("inf"), 0.0, 1.0]),
}
"""By kind; rows of nothing but -inf come up under "-inf"."""


@st.composite
def scores(
    draw: st.DrawFn,
    legal: LegalActions,
    kind: Literal["plain", "ties", "extreme", "-inf", "any"] = "any",
) -> Tensor:
    """Scores as LegalCategorical takes them: (N,) float32, one for each listed tuple.

    The kind "extreme" reaches ±1e30, and "-inf" is among other scores; "any" is one of the others.
    """
    one = SCORES[draw(st.sampled_from(list(SCORES))) if kind == "any" else kind]
    count = len(legal.actions)
    return torch.tensor(draw(st.lists(one, min_size=count, max_size=count)), dtype=torch.float32)


@st.composite
def observations(
    draw: st.DrawFn,
    layout: LegalLayout,
    spec: ActionSpec | None = None,
    *,
    max_rows: int = 4,
    max_length: int = 8,
    repeats: bool = True,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> npt.NDArray[np.uint8]:
    """Observations under a layout: (B, nbytes) uint8, B from 1 to ``max_rows``.

    Lists are those of `legal_lists`, within the spec (the layout's own if left out) and the room
    that the layout has. Integers have any value of their dtype, floats are finite, bools 0 or 1,
    the bytes between fields anything. One example in several is zeros but for its lists. For fields
    that hold less, ``ranges`` is {name: (lowest, highest)}, both included.

    Raises:
        ValueError: no spec, a range that is no field's or that its dtype does not hold, or a spec
            whose values the list's dtype does not hold.
    """
    spec = spec or layout.spec
    if spec is None:
        raise ValueError("observations needs spec=...: this layout was made without one")
    ranges = ranges or {}
    fields = {field.name: field.dtype for field in layout.fields()}
    for name, (low, high) in ranges.items():
        if name not in fields:
            raise ValueError(f"ranges names {name!r}; the fields are {', '.join(fields)}")
        lowest, highest = _limits(fields[name])
        if not lowest <= low <= high <= highest:
            raise ValueError(
                f"ranges[{name!r}] is ({low}, {high}); it must be (lowest, highest) within "
                f"{lowest}..{highest}, what {fields[name]} holds"
            )
    longest = min(max_length, layout.padding)
    lists = draw(legal_lists(spec, max_rows, longest, repeats, min_rows=1))
    seed = draw(st.none() | st.integers(0, 2**32 - 1))  # by a seed: bytes would be too many draws
    rng = np.random.default_rng(seed)
    data = np.zeros((len(lists), layout.dtype.itemsize), dtype=np.uint8)
    if seed is not None:
        data[:] = rng.integers(0, 256, data.shape, dtype=np.uint8)
    for name, dtype in fields.items():
        if name in ranges or dtype.kind in "bf":
            low, high = ranges.get(name, (0, 1) if dtype.kind == "b" else (-100, 100))
            view = resolve(data.view(layout.dtype)[:, 0], name)
            if seed is None:
                view[...] = low if name in ranges else 0
            elif dtype.kind == "f":
                view[...] = rng.uniform(low, high, view.shape)
            else:
                view[...] = rng.integers(int(low), int(high), view.shape, np.int64, endpoint=True)
    layout.write(data, lists)
    return data


def _limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    if dtype.kind == "b":
        return 0, 1
    if dtype.kind == "f":
        return float(np.finfo(dtype).min), float(np.finfo(dtype).max)
    return int(np.iinfo(dtype).min), min(int(np.iinfo(dtype).max), 2**63 - 1)


class EnvironmentTests:
    """The audit of an environment, and of a policy in it, as pytest tests: one for each check.

    Subclass it in a test file::

        class TestMyGame(EnvironmentTests):
            def make(self):
                return MyGame(num_agents=8)

            def make_policy(self, env):  # only if a policy is to be audited as well
                return fp.FlatPolicy(env)

    A check that could not run is a skipped test, with what would enable it (``pytest -rs`` shows
    it); what was found fails, in words. Each audit runs once a class (with pytest-xdist, once a
    worker; ``--dist loadscope`` keeps a class on one).

    A subclass may set what the audits take: ``steps``, ``seed``, ``spec``, ``layout`` (also the
    keys of count and list in a Dict observation), ``legal_actions`` and ``head_masks``. Where that
    is a function, write a method of the class, or ``staticmethod(function)``.
    """

    steps: ClassVar[int] = 2000
    seed: ClassVar[int] = 0
    spec: ClassVar[ActionSpec | None] = None
    layout: ClassVar[LegalLayout | Sequence[str] | None] = None
    legal_actions: Any = None
    head_masks: Any = None

    _audits: ClassVar[dict[str, Report | Exception]]

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        cls._audits = {}
        if hasattr(cls, "make_policy"):
            cls.test_policy = _test_policy  # type: ignore[attr-defined]

    def make(self) -> Any:
        """Makes the environment; more than once if a check needs a second one."""
        raise NotImplementedError(
            f"{type(self).__name__} needs a method make(self) that returns your environment"
        )

    @pytest.mark.parametrize("check", environment.CHECKS)
    def test_environment(self, check: str) -> None:
        """What `tcg_flatpolicy.verify.audit_env` says of one check."""
        self._judge(self._audit_environment, check)

    def _audit_environment(self) -> Report:
        with self._made() as env:
            return environment.audit_env(
                env, **self._arguments("legal_actions", "head_masks", "make")
            )

    def _audit_policy(self) -> Report:
        with self._made() as env:
            made = self.make_policy(env)  # type: ignore[attr-defined]
            return policy.audit_policy(made, env, **self._arguments())

    def _arguments(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("steps", "seed", "spec", "layout", *names)}

    @contextmanager
    def _made(self) -> Iterator[Any]:
        env = self.make()
        try:
            yield env
        finally:
            getattr(env, "close", lambda: None)()

    def _judge(self, audit: Callable[[], Report], name: str) -> None:
        """Passes, skips or fails the test that calls it, as a check of an audit says.

        The audit runs once a class; what it raises fails every test.
        """
        outcome = self._audits.get(audit.__name__)
        if outcome is None:
            try:
                outcome = self._audits[audit.__name__] = audit()
            except Exception as error:
                self._audits[audit.__name__] = error
                raise
        if isinstance(outcome, Exception):
            words = f"{type(outcome).__name__}: {outcome}"
            pytest.fail(f"the audit stopped, as the first test shows: {words}", pytrace=False)
        check = outcome.checks.get(name)
        if check is None:
            pytest.skip("the audit did not come to this check")
        if check.status == "skipped":
            pytest.skip(check.skipped or "no case came up; more steps may bring one")
        if check.status == "failed":
            lines = []
            for code in check.codes:
                finding = outcome.findings[code]
                seen = f"seen {finding.count:,} times, first in state {finding.state}"
                lines.append(f"{code} {CODES[code].title}: {seen}")
                lines.append(f"    {finding.message}\n    to fix: {CODES[code].fix}")
            pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize("check", policy.CHECKS)
def _test_policy(self: EnvironmentTests, check: str) -> None:
    """What `tcg_flatpolicy.verify.audit_policy` says of one check."""
    self._judge(self._audit_policy, check)
