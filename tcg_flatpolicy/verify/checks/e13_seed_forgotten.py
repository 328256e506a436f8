"""E13: games that cannot be played again."""

from __future__ import annotations

import numpy as np

from tcg_flatpolicy.verify.checks import Bug, Check


class Unseeded(Bug):
    """Seeds its generator with whatever the system gives."""

    def seed(self, seed: int) -> None:
        return None


class ResetIgnored(Bug):
    """Is seeded by its constructor alone."""

    reseeds = False


class SeedForgotten(Check):
    """The same seed gives other lists.

    Why: runs cannot be repeated, and a bug cannot be found again.

    Example: the engine draws from a generator of its own that reset(seed) does not set.

    Fix: seed every generator in reset(seed).
    """

    code = "E13"
    lines = ("the same seed, the same lists",)
    planted = {"unseeded": Unseeded, "reset_ignored": ResetIgnored}

    def end(self) -> None:
        if self.world.died:
            self.skip("needs an environment whose workers are alive")
            return
        replay = self.world.replay(np.int64)
        self.looked(replay.cases)
        if replay.state is not None:
            self.wrong(replay.where(self.world), replay.state, count=replay.count)
        elif replay.reordered:
            self.report.notes.append(
                f"the same seed and actions give {replay.reordered} lists in another order: the "
                "same tuples, but a place in the list means nothing from run to run"
            )
