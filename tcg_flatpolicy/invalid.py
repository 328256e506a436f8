"""Listed tuples outside the spec, left out of the list, counted, and warned of.

Shapes: N legal tuples in the whole batch, H = 1 + slots values in a tuple.
"""

from __future__ import annotations

import warnings

import torch

from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.spec import ActionSpec


class InvalidActionWarning(UserWarning):
    """A listed tuple was dropped, since it is not within the spec."""


class Dropped:
    """What was dropped, of one policy: give it to `LegalLayout.with_spec`.

    Attributes:
        count: how many listings were dropped, each time that they were read.
        kinds: (primary, slot) of each kind that was warned of; the slot is the first with a wrong
            value, 0 where the primary is not one of the spec's.
    """

    def __init__(self) -> None:
        self.count = 0
        self.kinds: set[tuple[int, int]] = set()

    def drop(self, legal: LegalActions, spec: ActionSpec) -> LegalActions:
        """The lists without what is outside the spec; warns once of each kind.

        Raises:
            ValueError: a list that becomes empty, naming the row and its first tuple.
        """
        wrong = legal.outside(spec)
        keep = ~wrong.any(1)
        if keep.all():
            return legal
        counts = torch.zeros_like(legal.counts).index_add_(0, legal.rows, keep.to(torch.int64))
        emptied = (counts == 0) & (legal.counts > 0)
        if emptied.any():
            at = int(legal.starts[emptied][0])
            raise ValueError(
                f"{legal.told(at, spec)}; nothing else in the row's list is within the "
                "spec, so dropping it leaves no legal action"
            )
        listings = (~keep).nonzero()[:, 0]
        self.count += len(listings)
        primaries = legal.actions[listings, 0].tolist()
        slots = wrong[listings].int().argmax(1).tolist()
        for at, primary, slot in zip(listings.tolist(), primaries, slots, strict=True):
            if (primary, slot) not in self.kinds:
                self.kinds.add((primary, slot))
                warnings.warn(
                    f"{legal.told(at, spec)}. It is dropped, as later ones of this kind "
                    "are, without a warning",
                    InvalidActionWarning,
                    stacklevel=2,
                )
        return LegalActions.trusted(legal.actions[keep], counts, legal.noop, spec.nvec.tolist())
