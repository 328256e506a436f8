"""E14: actions that floats change."""

from __future__ import annotations

from typing import Any

import numpy as np

from tcg_flatpolicy.verify.checks import Bug, Check


class Truncated(Bug):
    """Scales floats, and truncates what comes out."""

    def whole(self, actions: Any) -> Any:
        return np.trunc(actions * np.float32(0.999))


class FloatsTruncated(Check):
    """An action sent as floats is another action.

    Why: now and then another action is played than the one drawn; its credit goes astray.

    Example: the trainer stores actions as float32; the engine scales 0..23 to -1..1 and back,
    so that 1 becomes 0.9999998, and truncates that to 0.

    Fix: round to the nearest whole number before use, or take integers (the audit sends whole
    numbers, which float32 holds exactly: an engine that only truncates those is right).
    """

    code = "E14"
    lines = ("the same actions as floats, the same lists",)
    planted = {"floats_truncated": Truncated}

    def end(self) -> None:
        if self.world.died:
            self.skip("needs an environment whose workers are alive")
            return
        if self.world.replay(np.int64).state is not None:
            self.skip("needs the same lists for the same seed, see E13")
            return
        replay = self.world.replay(np.float32)
        self.looked(replay.cases)
        if replay.refused is not None:
            self.skip(f"the environment refuses floats: {replay.refused}")
        elif replay.state is not None:
            self.wrong(replay.where(self.world), replay.state, count=replay.count)
