"""What an audit says: checks passed, failed or skipped, and findings with stable codes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tcg_flatpolicy.provenance import provenance
from tcg_flatpolicy.verify.codes import CODES


@dataclass
class Finding:
    """A fault that was seen, once or more."""

    code: str
    """One of `CODES`, which says what it is, how it shows in training and how to fix it."""
    message: str
    """The first occurrence, in words: where, the value, what was expected."""
    state: int
    """Number of the state (or step, or epoch) in which it was first seen."""
    count: int = 1
    """How often it was seen."""


@dataclass
class Check:
    """Something that an audit looked at."""

    name: str
    cases: int = 0
    """How many cases it looked at."""
    skipped: str | None = None
    """Why it could not run, and what would enable it; None if it ran."""
    codes: tuple[str, ...] = ()
    """The codes of what it found; () where nothing was wrong."""

    @property
    def status(self) -> Literal["passed", "failed", "skipped"]:
        """A check that looked at no case is skipped, never passed."""
        if self.codes:
            return "failed"
        return "skipped" if self.skipped is not None or not self.cases else "passed"


class AuditError(Exception):
    """An audit has findings.

    Attributes:
        report: all of them.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(f"{len(report.findings)} findings\n{report}")
        self.report = report


@dataclass
class Report:
    """The outcome of an audit; ``str`` of it is a table in words."""

    subject: str
    """What was audited."""
    checks: dict[str, Check] = field(default_factory=dict)
    """By name, in order of first mention."""
    findings: dict[str, Finding] = field(default_factory=dict)
    """By code, in order of first occurrence."""
    figures: dict[str, float] = field(default_factory=dict)
    """What else was measured: steps, seconds, shares."""
    notes: list[str] = field(default_factory=list)
    """What is no fault, and good to know."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found. What was skipped is not counted against it."""
        return not self.findings

    def raise_for_findings(self) -> None:
        """Does nothing if all is well.

        Raises:
            AuditError: there are findings.
        """
        if not self.ok:
            raise AuditError(self)

    def looked(self, check: str, cases: int = 1) -> None:
        """Notes that a check looked at so many more cases."""
        self._check(check).cases += cases

    def skip(self, check: str, why: str) -> None:
        """Notes that a check cannot run: why, and what would enable it."""
        self._check(check).skipped = why

    def found(self, code: str, check: str, message: str, state: int, count: int = 1) -> None:
        """Notes a fault; of each code the first message is kept, and the count.

        Raises:
            KeyError: a code that is not documented.
        """
        if code not in CODES:
            raise KeyError(f"{code} is not in tcg_flatpolicy.verify.CODES; document it there")
        known = self.findings.get(code)
        if known is None:
            self.findings[code] = Finding(code, message, state, count)
        else:
            known.count += count
            known.state = min(known.state, state)
        of_check = self._check(check)
        if code not in of_check.codes:
            of_check.codes = (*of_check.codes, code)

    def _check(self, name: str) -> Check:
        return self.checks.setdefault(name, Check(name))

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, with versions, machine and command."""
        return {
            "subject": self.subject,
            "ok": self.ok,
            "checks": [{**asdict(c), "status": c.status} for c in self.checks.values()],
            "findings": [
                {**asdict(f), "title": CODES[f.code].title, "fix": CODES[f.code].fix}
                for f in self.findings.values()
            ],
            "figures": dict(self.figures),
            "notes": list(self.notes),
            **provenance(),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(report: Report) -> Iterator[str]:
    yield report.subject
    width = max((len(name) for name in report.checks), default=0)
    for check in report.checks.values():
        words = f"{check.cases:,} cases"
        if check.status == "skipped":
            words = check.skipped or "no case came up"
        elif check.codes:
            words = f"{', '.join(check.codes)}; {words}"
        yield f"  {check.status:<8}{check.name:<{width}}  {words}"
    for name, value in report.figures.items():
        yield f"  {name}: {value:,.6g}"
    for note in report.notes:
        yield f"  note: {note}"
    if report.ok:
        yield "  no findings"
    for finding in report.findings.values():
        code = CODES[finding.code]
        times = f"{finding.count:,} times" if finding.count > 1 else "once"
        yield ""
        yield f"  {finding.code}  {code.title}: {times}, first in state {finding.state}"
        yield f"      {finding.message}"
        yield f"      to fix: {code.fix}"


def merged(subject: str, reports: Mapping[str, Report]) -> Report:
    """Several reports as one: checks under ``<key>: <name>``, findings added up."""
    whole = Report(subject)
    for key, report in reports.items():
        for check in report.checks.values():
            whole.checks[f"{key}: {check.name}"] = Check(
                f"{key}: {check.name}", check.cases, check.skipped, check.codes
            )
        for finding in report.findings.values():
            known = whole.findings.get(finding.code)
            if known is None:
                whole.findings[finding.code] = Finding(**asdict(finding))
            else:
                known.count += finding.count
        whole.notes += [f"{key}: {note}" for note in report.notes]
        whole.figures.update({f"{key}: {name}": v for name, v in report.figures.items()})
    return whole
