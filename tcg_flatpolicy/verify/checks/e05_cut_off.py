"""E05: lists that are longer than their room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from tcg_flatpolicy.verify.checks import Action, Bug, Check, Symptom
from tcg_flatpolicy.verify.evidence import State


class LittleRoom(Bug):
    """Has room for eight tuples, and leaves out the others."""

    room = 8


class CutOff(Check):
    """The list is cut off at its padding.

    Why: strong actions are missing in just the states where there is most to choose from.

    Example: more tuples are legal than the observation has room for, and the rest is dropped.

    Fix: make room for the longest list, and raise on overflow: LegalLayout.write does.
    """

    code = "E05"
    lines = ("the list fits its padding",)
    claims = ("E08", "E11")
    planted = {"truncated": LittleRoom}

    def start(self) -> None:
        self.lengths: Counter[int] = Counter()
        self.listed: set[Action] = set()
        self.first = ("", 0)
        """The first full list, in words, and its state."""
        if not self.world.reader.has_count:
            self.skip("needs a padded list with its count: a layout")

    def see(self, state: State) -> None:
        lists = state.lists
        if lists.room is None:
            return
        self.looked(int(state.shown.live.sum()))
        for row in np.flatnonzero(state.capped & state.sound).tolist():
            self.wrong(
                f"{state.where(row)}: the count is {lists.most_count}, the largest number "
                f"that its field holds, and the list has room for {lists.room}",
                state.number,
            )
        lengths, times = np.unique(lists.counts, return_counts=True)
        self.lengths.update(dict(zip(lengths.tolist(), times.tolist(), strict=True)))
        if state.full.any() and not self.first[0]:
            row = int(state.full.argmax())
            words = f"{state.where(row)}: {int(lists.counts[row])} tuples are listed"
            self.first = (words, state.number)
        if self.first[0] and len(self.listed) <= lists.room and state.sound.all():
            self.listed.update(map(tuple, np.unique(lists.actions, axis=0).tolist()))

    def explains(self, left: Mapping[str, list[Symptom]]) -> Iterable[Symptom]:
        known = [s for code in self.claims for s in left[code] if s.hint == "full"]
        for symptom in known:
            symptom.message += "; the list is as long as it can be"
        if known or self.symptoms or not self.first[0] or self.world.tells:
            return known
        room = max(self.lengths)
        full = self.lengths[room]
        near = max(self.lengths[length] for length in range(room - 3, room))
        if full >= 5 and full > 2 * near and len(self.lengths) > 2 and len(self.listed) > room:
            words = (
                f"{self.first[0]}, as many as there is room for; {full} lists are that long, and "
                f"at most {near} are each a little shorter: longer ones are cut off"
            )
            return [Symptom(self.code, self.lines[0], words, self.first[1], count=full)]
        self.skip(
            f"{full} lists fill their padding of {room}; needs is_legal(row, action) on the "
            "environment, or more room, to see whether more was legal"
        )
        return []
