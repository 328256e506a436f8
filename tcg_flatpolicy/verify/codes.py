"""The findings' codes: what each fault is, how it shows in training, how to fix it.

They are made from the docstrings in `tcg_flatpolicy.verify.checks`, and ``docs/findings.md`` from
them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tcg_flatpolicy.verify.checks import Fault, faults


@dataclass(frozen=True)
class Code:
    """A kind of fault."""

    title: str
    """What is wrong, in a few words."""
    example: str
    """A bug of that kind, as it comes about."""
    shows: str
    """How it shows in training."""
    fix: str
    """What to do."""


def _page(fault: type[Fault]) -> Code:
    """A fault's docstring: its title, and the paragraphs Why, Example and Fix."""
    title, *parts = re.split(r"\n\n(Why|Example|Fix): ", inspect.getdoc(fault) or "")
    texts = {
        k: " ".join(text.split()).rstrip(".")
        for k, text in zip(parts[::2], parts[1::2], strict=True)
    }
    title = " ".join(title.split()).rstrip(".")
    return Code(title[0].lower() + title[1:], texts["Example"], texts["Why"], texts["Fix"])


CODES: dict[str, Code] = {code: _page(fault) for code, fault in faults().items()}
"""By code: E of environments, P of policies, T of training."""


def markdown() -> str:
    """All pages, as in docs/findings.md."""
    lines = [
        "# Findings",
        "",
        "What `python -m tcg_flatpolicy verify` and `tcg_flatpolicy.verify` report, by code. Codes",
        "are stable. E: an environment's lists; P: a policy's actions; T: a training run.",
    ]
    for code, about in CODES.items():
        lines += [
            "",
            f"## {code}: {about.title}",
            "",
            f"- **For example**: {about.example}.",
            f"- **In training**: {about.shows}.",
            f"- **To fix**: {about.fix}.",
        ]
    return "\n".join(lines) + "\n"


def table(codes: Sequence[str]) -> str:
    """Some codes as a table, as in README.md."""
    rows = [f"| {code} | {CODES[code].title} | {CODES[code].shows} |" for code in codes]
    return "\n".join(["| | what | how it shows |", "|---|---|---|", *rows]) + "\n"
