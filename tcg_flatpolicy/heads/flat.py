"""The flat head: one score a legal tuple, one categorical over exactly the list."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tcg_flatpolicy.distribution import LegalCategorical, TupleDistribution
from tcg_flatpolicy.exploration import Exploration
from tcg_flatpolicy.heads.base import Head
from tcg_flatpolicy.heads.fused import Fused
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.scorer import TupleScorer
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.table import Embedded


class FlatHead(Head):
    """Scores each listed tuple as a whole, and draws one of them.

    Log-prob and entropy are exact, and any dependence between slots can be learned. The cost grows
    with the number of legal tuples.

    Args:
        spec: what tuples mean.
        hidden_size: D, of the state.
        entity_sizes: {name: (n, E)}, what the encoder embeds.
        width: of the scorer's hidden layer.

    Raises:
        ValueError: an Entity of the spec that the encoder does not embed, or too few rows of it.
    """

    takes_lookups = True

    def __init__(
        self,
        spec: ActionSpec,
        hidden_size: int,
        entity_sizes: Mapping[str, tuple[int, int]] | None = None,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.scorer = TupleScorer(spec, hidden_size, entity_sizes, width)
        self.fused = Fused(self.scorer)

    def forward(self, hidden: Tensor, entities: Embedded, legal: LegalActions) -> LegalCategorical:
        """Hidden (B, D), {name: (B, n, E)}, B legal lists -> the categorical over each list.

        Raises:
            ValueError: hidden, an entity or the tuples have another shape than declared.
        """
        return self.scorer.categorical(hidden, entities, legal)

    def decide(
        self,
        observations: Tensor,
        layout: LegalLayout,
        hidden: Tensor,
        entities: Embedded,
        exploration: Exploration,
    ) -> TupleDistribution:
        """As Head.decide; by one kernel on a GPU, where what is wrong raises when it is asked."""
        given = observations, layout, hidden, entities, exploration
        if type(self).forward is FlatHead.forward:
            found = self.fused.decide(self.scorer, *given)
            if found is not None:
                return found
        return super().decide(*given)

    def padded(
        self, hidden: Tensor, entities: Mapping[str, Tensor], tuples: Tensor, listed: Tensor
    ) -> Tensor:
        """The scores of padded tuples, (B, K); as Head.padded."""
        return self.scorer.padded(hidden, entities, tuples)
