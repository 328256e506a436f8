"""E12: masks per head that let nothing through."""

from __future__ import annotations

from typing import Any

import numpy as np

from tcg_flatpolicy.verify.checks import Bug, Check
from tcg_flatpolicy.verify.evidence import State


class Zeroed(Bug):
    """Clears the masks after they were filled."""

    def written(self, records: Any, some: Any) -> None:
        for name in ("mask0", "mask1", "mask2"):
            records[name] = 0


class MaskEmpty(Check):
    """A mask per head is empty.

    Why: a masked softmax over nothing is uniform: it plays anything, or always the no-op.

    Example: the mask array is zeroed for reuse after it was put into the observation.

    Fix: copy the mask into the observation, and zero it before it is filled, not after.
    """

    code = "E12"
    lines = ("no mask per head is empty",)
    planted = {"mask_zeroed": Zeroed}

    def start(self) -> None:
        if self.world.masks is None:
            self.skip("needs head_masks, a callable or the names of fields")

    def see(self, state: State) -> None:
        for mask in state.masks:
            self.looked(int(state.masked.sum()))
            for row in np.flatnonzero(state.masked & ~mask.given.any(axis=1)).tolist():
                self.wrong(
                    f"{state.where(row)}: the mask of value {mask.slot} of the tuple is empty, and "
                    f"{int(state.lists.counts[row])} tuples are listed",
                    state.number,
                )
