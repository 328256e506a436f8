"""E11: masks per head that say something else than the list."""

from __future__ import annotations

from typing import Any

import numpy as np

from tcg_flatpolicy.verify.checks import Bug, Check
from tcg_flatpolicy.verify.evidence import Mask, State


class LetsThrough(Bug):
    """Lets each value of the first slot through."""

    def written(self, records: Any, some: Any) -> None:
        records["mask1"][some] = 1


class MaskNotProjected(Check):
    """A mask per head is not the projection of the list.

    Why: policies that use the masks act otherwise than those that use the list.

    Example: masks are made by another function than the list, and one of them was not updated.

    Fix: make the masks from the list: LegalActions.head_masks.
    """

    code = "E11"
    lines = ("masks per head are the list's projection",)
    planted = {"mask_not_projected": LetsThrough}

    def start(self) -> None:
        if self.world.masks is None:
            self.skip("needs head_masks, a callable or the names of fields")

    def see(self, state: State) -> None:
        for mask in state.masks:
            self.looked(int(state.masked.sum()))
            judged = state.masked & mask.given.any(axis=1)  # an empty one is another fault
            differs = (mask.given != mask.listed).any(axis=1) & judged
            for row in np.flatnonzero(differs).tolist():
                self._differs(state, mask, row)

    def _differs(self, state: State, mask: Mask, row: int) -> None:
        given, listed = mask.given[row], mask.listed[row]
        value = int((given != listed).argmax())
        if listed[value]:
            words = "is masked out as value {} of the tuple, and a listed tuple has it"
        else:
            words = "is let through as value {} of the tuple, and no listed tuple has it"
        hint = ""
        if not (listed & ~given).any():  # it knows of more than the list, which may be too short
            following = state.lists.following[row]
            more = np.flatnonzero(given & ~listed)
            if state.full[row]:
                hint = "full"
            elif following.any() and (more == following[mask.slot]).all():
                hint = "follows"
        message = f"{state.where(row)}: {value} {words.format(mask.slot)}"
        self.wrong(message, state.number, hint=hint)
