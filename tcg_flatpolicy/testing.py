"""For your own test suite: hypothesis strategies, and the audits as pytest tests.

Needs hypothesis and pytest (from a checkout: ``pip install '.[testing]'``). Shapes: B rows, N legal
tuples in the whole batch, H = 1 + slots values in a tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcg_flatpolicy.fields import resolve
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.spec import ActionSpec, Entity, Index, OneOf, Primary, Role
from tcg_flatpolicy.verify import CODES, Report
from tcg_flatpolicy.verify import environment as environment_audit
from tcg_flatpolicy.verify import policy as policy_audit

try:
    import pytest
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        f"tcg_flatpolicy.testing needs {error.name}: from a checkout of this "
        "library, pip install '.[testing]'"
    ) from error

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

# ---- specs


def plain_roles(
    max_size: int = 4, kinds: Sequence[type[Role]] = (Index, Entity)
) -> st.SearchStrategy[Role]:
    """A role of one of the kinds: Index and Entity, or classes of your own."""
    return st.builds(
        lambda kind, name, size: kind(name, size),
        st.sampled_from(list(kinds)),
        st.sampled_from("abc"),
        st.integers(1, max_size),
    )


def roles(
    max_size: int = 4, kinds: Sequence[type[Role]] = (Index, Entity)
) -> st.SearchStrategy[Role]:
    """Any role of a slot; ``max_size`` is that of a single role, also within a OneOf."""
    plain = plain_roles(max_size, kinds)
    return plain | st.lists(plain, min_size=1, max_size=3).map(lambda parts: OneOf(*parts))


@st.composite
def specs(
    draw: st.DrawFn,
    max_primaries: int = 4,
    max_slots: int = 3,
    max_size: int = 4,
    kinds: Sequence[type[Role]] = (Index, Entity),
) -> ActionSpec:
    """Specs with gaps between ids, ids out of order, and a no-op of their own.

    Args:
        max_primaries: most primaries.
        max_slots: most slots of a primary.
        max_size: most values of a single role.
        kinds: classes of roles; those of your own are called with name and size.
    """
    count = draw(st.integers(1, max_primaries))
    ids = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count, unique=True))
    primaries = [
        Primary(
            f"p{number}", *draw(st.lists(roles(max_size, kinds), max_size=max_slots)), id=number
        )
        for number in ids
    ]
    nvec = ActionSpec(primaries).nvec.tolist()
    noop = draw(st.none() | st.tuples(*(st.integers(0, size - 1) for size in nvec)))
    return ActionSpec(primaries, noop=noop)


# ---- legal tuples


def actions(spec: ActionSpec) -> st.SearchStrategy[Action]:
    """Tuples within a spec: a declared primary, values in their roles' ranges, zeros elsewhere."""

    def of(primary: Primary) -> st.SearchStrategy[Action]:
        used = [st.integers(0, role.size - 1) for role in primary.slots]
        unused = [st.just(0)] * (spec.slots - len(used))
        return st.tuples(st.just(primary.id), *used, *unused)

    return st.sampled_from(list(spec.primaries.values())).flatmap(of)


def legal_lists(
    tuples: ActionSpec | st.SearchStrategy[Action],
    max_rows: int = 6,
    max_length: int = 8,
    repeats: bool = True,
) -> st.SearchStrategy[Lists]:
    """Lists of any number of rows, none included; empty rows are frequent.

    Args:
        tuples: a spec, for tuples within it; or a strategy of tuples of one length.
        max_rows: rows of a batch.
        max_length: tuples of a row.
        repeats: whether a row may list a tuple more than once; it often does then.
    """
    one = actions(tuples) if isinstance(tuples, ActionSpec) else tuples
    return st.lists(_row(one, max_length, repeats), max_size=max_rows)


def _row(
    one: st.SearchStrategy[Action], max_length: int, repeats: bool
) -> st.SearchStrategy[list[Action]]:
    if not repeats:
        return st.just([]) | st.lists(one, max_size=max_length, unique=True)
    few = st.lists(one, min_size=1, max_size=3).flatmap(
        lambda pool: st.lists(st.sampled_from(pool), max_size=max_length)
    )
    return st.one_of(st.just([]), few, st.lists(one, max_size=max_length))


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

    Args:
        legal: what is scored.
        kind: "plain", "ties", "extreme" (up to 1e30), "-inf" (among others), or "any" of these.
    """
    one = SCORES[draw(st.sampled_from(list(SCORES))) if kind == "any" else kind]
    count = len(legal.actions)
    return torch.tensor(draw(st.lists(one, min_size=count, max_size=count)), dtype=torch.float32)


# ---- observations


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
    """Observations under a layout, (B, nbytes) uint8 with B at least 1.

    Legal lists are within the spec; integers have any value of their dtype, floats are finite,
    bools 0 or 1, the bytes between fields anything. One example in several is zeros but for its
    lists.

    Args:
        layout: where the fields are.
        spec: of the lists; the layout's own if left out.
        max_rows: most rows.
        max_length: most tuples of a row; never more than the layout has room for.
        repeats: whether a row may list a tuple more than once.
        ranges: {name of a field: (lowest, highest)}, both included, of fields that hold less than
            their dtype could, such as a card's number.

    Raises:
        ValueError: no spec, a range that is no field's or that its dtype does not hold, or a spec
            whose values the list's dtype does not hold.
    """
    spec = spec or layout.spec
    if spec is None:
        raise ValueError("observations needs spec=...: this layout was made without one")
    ranges = ranges or {}
    fields = {field.name: field.dtype for field in layout.fields()}
    for name in ranges:
        if name not in fields:
            raise ValueError(f"ranges names {name!r}; the fields are {', '.join(fields)}")
    one = _row(actions(spec), min(max_length, layout.padding), repeats)
    lists = draw(st.lists(one, min_size=1, max_size=max_rows))
    seed = draw(st.none() | st.integers(0, 2**32 - 1))  # by a seed: bytes would be too many draws
    data = np.zeros((len(lists), layout.dtype.itemsize), dtype=np.uint8)
    if seed is not None:
        rng = np.random.default_rng(seed)
        data[:] = rng.integers(0, 256, data.shape, dtype=np.uint8)
    for name, dtype in fields.items():
        view = resolve(data.view(layout.dtype)[:, 0], name)
        if dtype == np.bool_ or dtype.kind == "f" or name in ranges:
            low, high = ranges.get(name, (0, 1) if dtype == np.bool_ else (-100, 100))
            _check_range(name, dtype, low, high)
            if seed is None:
                view[...] = low if name in ranges else 0
            elif dtype.kind == "f":
                view[...] = rng.uniform(low, high, view.shape)
            else:
                view[...] = rng.integers(int(low), int(high), view.shape, np.int64, endpoint=True)
    layout.write(data, lists)
    return data


def _check_range(name: str, dtype: np.dtype[Any], low: float, high: float) -> None:
    limits: tuple[float, float] = (0, 1)
    if dtype.kind in "iu":
        limits = int(np.iinfo(dtype).min), min(int(np.iinfo(dtype).max), 2**63 - 1)
    elif dtype.kind == "f":
        limits = float(np.finfo(dtype).min), float(np.finfo(dtype).max)
    if not limits[0] <= low <= high <= limits[1]:
        raise ValueError(
            f"ranges[{name!r}] is ({low}, {high}); it must be (lowest, highest) within "
            f"{limits[0]}..{limits[1]}, what {dtype} holds"
        )


# ---- the audits as tests


class EnvironmentTests:
    """The audit of an environment, and of a policy in it, as pytest tests: one for each check.

    Subclass it in a test file::

        class TestMyGame(EnvironmentTests):
            def make(self):
                return MyGame(num_agents=8)

            def make_policy(self, env):  # only if a policy is to be audited as well
                return fp.FlatPolicy(env)

    A check that could not run is a skipped test, with what would enable it (``pytest -rs`` shows
    it); what was found fails, in words. Each audit runs once a class. With pytest-xdist,
    ``--dist loadscope`` keeps a class on one worker; otherwise each worker runs it once.

    What a subclass may set:

    - steps: of each audit.
    - seed: of each audit.
    - spec, layout: where the environment does not bring them as action_spec and legal_layout; a
      layout may also be the keys of count and list in a Dict observation.
    - legal_actions, head_masks: as `tcg_flatpolicy.verify.audit_env` takes them; where that is a
      function, write a method of this class, or ``staticmethod(function)``.
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

    @pytest.mark.parametrize("check", environment_audit.CHECKS)
    def test_environment(self, check: str) -> None:
        """What `tcg_flatpolicy.verify.audit_env` says of one check."""
        _judge(self._audited("environment", self._audit_environment), check)

    def _audit_environment(self) -> Report:
        env = self.make()
        try:
            return environment_audit.audit_env(
                env,
                steps=self.steps,
                seed=self.seed,
                spec=self.spec,
                layout=self.layout,
                legal_actions=self.legal_actions,
                head_masks=self.head_masks,
                make=self.make,
            )
        finally:
            _close(env)

    def _audit_policy(self) -> Report:
        env = self.make()
        try:
            return policy_audit.audit_policy(
                self.make_policy(env),  # type: ignore[attr-defined]
                env,
                steps=self.steps,
                seed=self.seed,
                spec=self.spec,
                layout=self.layout,
            )
        finally:
            _close(env)

    def _audited(self, name: str, audit: Callable[[], Report]) -> Report:
        """The report of an audit that runs once a class; what it raises fails every test."""
        if name not in self._audits:
            try:
                self._audits[name] = audit()
            except Exception as error:
                self._audits[name] = error
                raise
        outcome = self._audits[name]
        if isinstance(outcome, Exception):
            words = f"{type(outcome).__name__}: {outcome}"
            pytest.fail(f"the audit stopped, as the first test shows: {words}", pytrace=False)
        return outcome


@pytest.mark.parametrize("check", policy_audit.CHECKS)
def _test_policy(self: EnvironmentTests, check: str) -> None:
    """What `tcg_flatpolicy.verify.audit_policy` says of one check."""
    _judge(self._audited("policy", self._audit_policy), check)


def _judge(report: Report, name: str) -> None:
    """Passes, skips or fails the test that calls it, as a check of a report says."""
    check = report.checks.get(name)
    if check is None:
        pytest.skip("the audit did not come to this check")
    if check.status == "skipped":
        pytest.skip(check.skipped or "no case came up; more steps may bring one")
    if check.status == "failed":
        lines = []
        for code in check.codes:
            finding = report.findings[code]
            lines += [
                f"{code} {CODES[code].title}: seen {finding.count:,} times, first in state "
                f"{finding.state}",
                f"    {finding.message}",
                f"    to mend: {CODES[code].mend}",
            ]
        pytest.fail("\n".join(lines), pytrace=False)


def _close(env: Any) -> None:
    close = getattr(env, "close", None)
    if callable(close):
        close()
