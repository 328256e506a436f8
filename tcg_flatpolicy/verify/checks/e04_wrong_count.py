"""E04: counts that do not fit the list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tcg_flatpolicy.verify.checks import Bug, Check, Symptom
from tcg_flatpolicy.verify.evidence import State


class OneTooSmall(Bug):
    """Counts one too few."""

    def written(self, records: Any, some: Any) -> None:
        records["n"][some] -= 1


class OneTooLarge(Bug):
    """Counts one too many."""

    def written(self, records: Any, some: Any) -> None:
        records["n"][some] += 1


class WrongCount(Check):
    """The count does not fit the list.

    Why: one action is never played, or padding is played as if it were the tuple of zeros.

    Example: the count is taken before the end of turn is appended: the last tuple lies behind
    it.

    Fix: write the count last, as the length of what was written.
    """

    code = "E04"
    lines = ("the count fits the list",)
    claims = ("E03", "E06", "E08", "E09", "E11")
    planted = {"count_small": OneTooSmall, "count_large": OneTooLarge}

    def start(self) -> None:
        self.behind: Counter[int] = Counter()
        """How often so many tuples behind the counted ones were other than zeros."""
        self.lengths: set[int] = set()
        """Of the lists among those."""
        self.example = ("", 0)
        self.other_ends = False
        """Whether lists end in something other than zeros."""
        self.too_small = False
        if not self.world.reader.has_count:
            self.skip("needs a padded list with its count: a layout")

    def see(self, state: State) -> None:
        lists = state.lists
        if lists.room is None:
            return
        self.looked(int(state.shown.live.sum()))
        for row in np.flatnonzero(lists.said != lists.counts).tolist():
            self.wrong(
                f"{state.where(row)}: the count is {int(lists.said[row])}, the list has room for "
                f"0 to {lists.room}",
                state.number,
            )
        ends = lists.actions[(lists.starts + lists.counts - 1)[lists.counts > 0]]
        self.other_ends |= bool(ends.any(axis=1).any())
        # A count that cannot be any larger is a matter of room; so is a list that is full.
        judged = (lists.said == lists.counts) & (lists.counts > 0) & ~state.full
        if not judged.any():
            return
        self.behind.update(lists.behind[judged].tolist())
        self.lengths.update(lists.counts[judged].tolist())
        if not self.example[0]:
            row = int(judged.argmax())
            self.example = (
                f"{state.where(row)}: the count is {int(lists.said[row])}, but place "
                f"{int(lists.counts[row])} of the list (from 0) is not zeros either",
                state.number,
            )

    def end(self) -> None:
        # What a list is not cleared of, or padded with, is not as long behind lists of any length.
        if len(self.behind) == 1 and 0 not in self.behind and len(self.lengths) > 2:
            self.too_small = True
            (number, times), *_ = self.behind.items()
            message = f"{self.example[0]}; behind every list {number} more follow"
            self.wrong(message, self.example[1], count=times)

    def explains(self, left: Mapping[str, list[Symptom]]) -> Iterable[Symptom]:
        small = [s for code in ("E08", "E11") for s in left[code] if s.hint == "follows"]
        large = [symptom for symptom in left["E06"] if symptom.hint == "zeros"]
        for symptom in small:
            symptom.message += "; it follows the counted tuples: the count is too small"
        for symptom in large:
            symptom.message += "; it is the last that is counted: padding is counted"
        # Padding that is counted ends every list; a no-op that is appended once more could as well.
        doubled = [symptom for symptom in left["E03"] if symptom.hint]
        apart = any(symptom.hint == "last" for symptom in doubled)
        if large or (apart and not self.other_ends):
            large += doubled
        if small or self.too_small:
            small += left["E09"]
        return [*small, *large]
