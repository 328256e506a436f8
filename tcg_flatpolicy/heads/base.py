"""What a policy asks of a head, and how one decides from observations.

A head is an nn.Module, ``head(hidden, entities, legal)``, that returns a distribution over the
tuples of each row. Shapes: B rows, D hidden size, n entities of a name, E their size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from tcg_flatpolicy.distribution import TupleDistribution
from tcg_flatpolicy.exploration import Exploration
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.table import Embedded, as_tensors


class Head(nn.Module):
    """A head of this library. One of your own need be no more than a module with its forward.

    One that returns a LegalAutoregressive may have an attribute ``path_entropy``: True gives the
    trainer `LegalAutoregressive.path_entropy`, an estimate, in the place of the exact entropy. One
    with ``takes_lookups`` true is given each `Lookup` of the encoder as it is, not its rows.
    """

    takes_lookups = False

    @abstractmethod
    def forward(
        self, hidden: Tensor, entities: Mapping[str, Tensor], legal: LegalActions
    ) -> TupleDistribution:
        """Hidden (B, D), {name: (B, n, E)}, B legal lists -> a distribution, batch_shape (B,)."""

    def decide(
        self,
        observations: Tensor,
        layout: LegalLayout,
        hidden: Tensor,
        entities: Embedded,
        exploration: Exploration,
    ) -> TupleDistribution:
        """Reads the lists from observations (B, columns), packed, decides by them, and explores.

        Raises:
            TypeError: forward gave no distribution of batch_shape (B,) and event_shape (H,).
            ValueError: a legal list that is broken or not within the spec, naming the row.
        """
        legal = layout.read_distinct(observations)
        if not getattr(self, "takes_lookups", False):
            entities = as_tensors(entities)
        distribution: TupleDistribution = self(hidden, entities, legal)
        shapes = [tuple(getattr(distribution, f"{kind}_shape", ())) for kind in ("batch", "event")]
        if shapes != [(len(legal),), (1 + legal.slots,)]:
            raise TypeError(
                f"{type(self).__name__} must return a distribution of batch_shape ({len(legal)},) "
                f"and event_shape ({1 + legal.slots},), got a {type(distribution).__name__} of "
                f"{shapes[0]} and {shapes[1]}"
            )
        return exploration.explored(distribution)

    def padded(
        self, hidden: Tensor, entities: Mapping[str, Tensor], tuples: Tensor, listed: Tensor
    ) -> Tensor:
        """As forward in static shapes, for export.

        Args:
            hidden: (B, D).
            entities: {name: (B, n, E)}.
            tuples: (B, K, H) int64, within the spec.
            listed: (B, K) bool, which of them are in the row's list, each once.

        Returns:
            (B, K) scores, of which the softmax over listed ones is the distribution.

        Raises:
            TypeError: this head has no such form.
        """
        raise TypeError(
            f"{type(self).__name__} cannot be exported: it has no padded(hidden, entities, tuples, "
            "listed)"
        )


HeadFactory: TypeAlias = Callable[[ActionSpec, int, Mapping[str, tuple[int, int]], int], nn.Module]
"""(spec, hidden_size D, entity_sizes {name: (n, E)}, width) -> a Head."""


def decide(head: Any, *given: Any) -> TupleDistribution:
    """What a head decides, given as to `Head.decide`, which is that of a module without its own."""
    own = getattr(head, "decide", None)
    distribution: TupleDistribution = own(*given) if own else Head.decide(head, *given)
    return distribution
