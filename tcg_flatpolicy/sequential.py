"""A tuple drawn value by value: each from those that continue a legal tuple.

The maths alone, for any conditionals. Shapes: B rows, N legal tuples in the whole batch, H values
in a tuple; at each slot G prefixes (of the slots before) and n choices (values that continue one).
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tcg_flatpolicy.distribution import LegalCategorical, TupleDistribution, draw, log_softmax
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.packing import counted


class Conditionals(Protocol):
    """Logits of each slot's values given the values before, for G prefixes at once.

    What was chosen so far reaches the next slot as a context, (G, W) floats of any meaning.
    """

    def start(self) -> Tensor:
        """(B, W): the context of each row, before its primary is drawn."""

    def logits(
        self,
        slot: int,
        context: Tensor,
        rows: Tensor,
        primaries: Tensor,
        choices: LegalActions,
        behind: Tensor,
    ) -> Tensor:
        """Logits (n,), floats, of the values that continue each prefix.

        Args:
            slot: 0 for the primary, then 1 .. H-1.
            context: (G, W), of each prefix.
            rows: (G,) int64, the row of each prefix.
            primaries: (G,) int64, the first value of each prefix; zeros for slot 0.
            choices: of G rows, n tuples of one value each.
            behind: (n,) int64, how many legal tuples go on with each choice, at least 1.
        """

    def extend(
        self, slot: int, context: Tensor, rows: Tensor, primaries: Tensor, values: Tensor
    ) -> Tensor:
        """The contexts (G, W) once ``values`` (G,) int64 are chosen in ``slot``."""


class _Path(NamedTuple):
    """One tuple a row, with what its conditionals say of it."""

    actions: Tensor  # (B, H)
    log_prob: Tensor  # (B,)
    entropy: Tensor  # (B,) summed over the conditionals
    learning: bool  # with a graph for gradients


class LegalAutoregressive(TupleDistribution):
    """Draws the primary, then each slot given what was drawn; batch_shape (B,), event_shape (H,).

    Each slot is a categorical over exactly the values with which some legal tuple goes on, so what
    is drawn is legal, and p(tuple) is the product of its conditionals, exactly: exp(log_prob) over
    a row's list sums to 1. A row without a legal tuple plays the no-op with probability 1. A tuple
    that is listed more than once counts once.

    Only the values next to the drawn path are scored, so drawing and log_prob cost little for long
    lists. Whatever speaks of the whole distribution (entropy, mode, tempered, smoothed) scores all
    prefixes of all listed tuples, by :meth:`enumerated`.

    Args:
        legal: the legal tuples of B rows, N in all.
        conditionals: the logits, as asked for.
        sizes: (H,) how many values each slot can have.
        validate_args: as in torch.distributions.

    Raises:
        ValueError: tuples of another length than sizes, or with a value that is not below its
            size. NaN and +inf logits raise UnsoundScore in whatever looks at them.
    """

    def __init__(
        self,
        legal: LegalActions,
        conditionals: Conditionals,
        sizes: list[int],
        validate_args: bool | None = None,
    ) -> None:
        if len(sizes) != legal.actions.shape[1]:
            raise ValueError(
                f"legal tuples have {legal.actions.shape[1]} values, but there are "
                f"{len(sizes)} sizes: the spec is that of other lists"
            )
        for slot, (bound, size) in enumerate(zip(legal.sizes, sizes, strict=True)):
            if bound > size:
                raise ValueError(
                    f"legal tuples have values up to {bound - 1} in slot {slot}, but its size is "
                    f"{size}: the spec is that of other lists"
                )
        self.legal = legal
        self._conditionals = conditionals
        self._with_graph = torch.is_grad_enabled()
        self._sizes = sizes
        self._path: _Path | None = None  # the last one
        self._enumerated: tuple[LegalCategorical, bool] | None = None  # and whether it has a graph
        super().__init__(torch.Size([len(legal)]), legal.actions.shape[1:], validate_args)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws tuples: sample_shape S -> (*S, B, H) int64, value by value for S = ()."""
        self._draws()
        if torch.Size(sample_shape):
            return self.enumerated().sample(sample_shape)
        return self._along(None).actions.clone()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of tuples by the same conditionals; -inf for one that is not listed.

        (*S, B, H) of any integer or whole-float dtype -> (*S, B) in float32 or better.

        Raises:
            ValueError: a wrong shape or, under validate_args, a value that is no whole number.
        """
        if self._validate_args:
            self._validate_sample(value)
        value = self.legal.whole(value)
        if value.ndim != 2:
            return self.enumerated().log_prob(value)
        return self._along(value).log_prob

    def path_entropy(self, value: Tensor) -> Tensor:
        """(B,) sum of the entropies of the conditionals along the path of ``value`` (B, H).

        This is the entropy that sequential heads are commonly trained with. If the tuple was drawn
        from this distribution, it is a one-sample estimate of :meth:`entropy`: right on average
        (the chain rule of entropy), with a variance. Its gradient is not that of the entropy even
        on average, since it leaves out how the path itself depends on the parameters.

        Raises:
            ValueError: a wrong shape.
        """
        value = self.legal.whole(value)
        if value.ndim != 2:
            raise ValueError(f"actions must be (B, H), got {tuple(value.shape)}")
        return self._along(value).entropy

    def __getitem__(self, rows: Any) -> LegalCategorical:
        """The distribution of some rows, as LegalCategorical's, by enumeration of them alone."""
        legal, _, chosen = self.legal.select(rows)
        with self._asking():
            return self._enumerate(legal.distinct(), chosen)

    def enumerated(self) -> LegalCategorical:
        """The same distribution as one categorical over the distinct legal tuples.

        Each prefix of a legal tuple is scored once, however many tuples share it.

        Raises:
            UnsoundScore: a NaN or +inf logit.
        """
        with self._asking() as learning:
            if self._enumerated is None or self._enumerated[1] != learning:
                every = torch.arange(len(self.legal), device=self.legal.rows.device)
                self._enumerated = self._enumerate(self.legal.distinct(), every), learning
        return self._enumerated[0]

    def _enumerate(self, legal: LegalActions, rows: Tensor) -> LegalCategorical:
        """The distribution over lists without repeats, of these rows of the batch."""
        context = self._conditionals.start().index_select(0, rows)
        groups, primaries = legal.rows, torch.zeros_like(rows)  # (N,) prefixes; (G,)
        scored, taken, begin = [], [], 0
        for slot, size in enumerate(self._sizes):
            keys = groups * size + legal.actions[:, slot]
            choices, behind, found = _continuing(keys, len(rows), size)
            logits = self._conditionals.logits(slot, context, rows, primaries, choices, behind)
            scored.append((rows, choices, logits))
            groups = torch.searchsorted(found, keys)
            taken.append(groups + begin)
            begin += len(logits)
            if slot + 1 < len(self._sizes):
                parents, values = choices.rows, choices.actions[:, 0]
                rows = rows.index_select(0, parents)
                primaries = primaries.index_select(0, parents) if slot else values
                context = context.index_select(0, parents)
                context = self._conditionals.extend(slot, context, rows, primaries, values)
        every = _Choices(scored)
        every._check_scores()
        total = every.logits.index_select(0, torch.cat(taken)).view(len(taken), -1).sum(0)
        return LegalCategorical(legal, total, self._validate_args)

    @contextmanager
    def _asking(self) -> Iterator[bool]:
        """In full precision, also inside a trainer's autocast; gives whether with a graph."""
        # Made without a graph, the contexts have none: that of the rest would be half of it.
        learning = self._with_graph and torch.is_grad_enabled()
        full_precision = torch.autocast(self.legal.rows.device.type, enabled=False)
        with full_precision, torch.set_grad_enabled(learning):
            yield learning

    def _along(self, given: Tensor | None) -> _Path:
        """The path of given tuples (B, H), or of drawn ones; the last one is remembered."""
        with self._asking() as learning:
            path = self._path
            if (
                path is None
                or given is None
                or path.learning != learning
                or not torch.equal(path.actions, given)
            ):
                self._path = path = self._walk(given, learning)
        return path

    def _walk(self, given: Tensor | None, learning: bool) -> _Path:
        legal = self.legal.distinct()
        groups, actions = legal.rows, legal.actions  # of the tuples that go on
        rows = torch.arange(len(self.legal), device=groups.device)
        primaries = torch.zeros_like(rows)
        context = self._conditionals.start()
        values, scored = [], []
        for slot, size in enumerate(self._sizes):
            choices, behind, _ = _continuing(groups * size + actions[:, slot], len(rows), size)
            logits = self._conditionals.logits(slot, context, rows, primaries, choices, behind)
            scored.append((rows, choices, logits))
            value = self._draw(slot, choices, logits) if given is None else given[:, slot]
            values.append(value)
            if slot + 1 < len(self._sizes):
                follow = value.index_select(0, groups) == actions[:, slot]
                at = follow.nonzero().squeeze(1)
                groups, actions = groups.index_select(0, at), actions.index_select(0, at)
                if given is not None:
                    # What is not listed leads nowhere, and may be no value of the primary's: 0 is.
                    value = value * torch.zeros_like(value).index_fill_(0, groups, 1)
                primaries = primaries if slot else value
                context = self._conditionals.extend(slot, context, rows, primaries, value)
        drawn, every = torch.stack(values), _Choices(scored)
        log_prob = every.log_prob(drawn.view(-1, 1)).view(drawn.shape).sum(0)
        is_noop = (drawn == self.legal.noop.unsqueeze(1)).all(0)
        of_empty = torch.where(is_noop, 0.0, -torch.inf).to(log_prob.dtype)
        log_prob = torch.where(self.legal.counts == 0, of_empty, log_prob)
        return _Path(drawn.t(), log_prob, every.entropy().view(drawn.shape).sum(0), learning)

    def _draw(self, slot: int, choices: LegalActions, logits: Tensor) -> Tensor:
        """(B,) one value a row; the no-op's where nothing can be chosen."""
        noop = self.legal.noop[slot]
        if not len(logits):
            return noop.repeat(len(choices))
        at = draw(log_softmax(logits, choices)[1], choices, torch.Size())
        return torch.where(choices.counts > 0, choices.actions[:, 0].index_select(0, at), noop)


def _continuing(keys: Tensor, prefixes: int, size: int) -> tuple[LegalActions, Tensor, Tensor]:
    """With which values, below ``size``, tuples go on: a key is a tuple's prefix * size + value.

    Returns:
        G rows of n values in all, each listed once and ascending; (n,) how many of the tuples have
        each of them; (n,) their keys, ascending.
    """
    found, tuples = counted(keys, prefixes * size)
    parents = torch.div(found, size, rounding_mode="floor")
    counts = torch.bincount(parents, minlength=prefixes)
    return _values((found - parents * size).unsqueeze(1), counts, parents, size), tuples, found


def _values(values: Tensor, counts: Tensor, rows: Tensor, size: int) -> LegalActions:
    """Lists of single values (n, 1), packed by row, each below ``size`` and listed once."""
    packing = rows, counts.cumsum(0) - counts
    return LegalActions.trusted(values, counts, values.new_zeros(1), [size], True, packing)


class _Choices(LegalCategorical):
    """Categoricals over the next value of each prefix, those of all slots end to end.

    Made of what each slot has: (G,) the row of each prefix, the values that continue them, and
    (n,) their logits. Complaints name row and slot.
    """

    def __init__(self, scored: Sequence[tuple[Tensor, LegalActions, Tensor]]) -> None:
        self._rows, choices, logits = zip(*scored, strict=True)
        self._begins = list(accumulate((len(rows) for rows in self._rows), initial=0))
        of = [one.rows + begin for one, begin in zip(choices, self._begins, strict=False)]
        values = torch.cat([one.actions for one in choices])
        counts = torch.cat([one.counts for one in choices])
        size = max(one.sizes[0] for one in choices)
        super().__init__(_values(values, counts, torch.cat(of), size), torch.cat(logits), False)

    def _whose_score(self, n: int) -> tuple[int, str]:
        prefix, value = int(self.legal.rows[n]), int(self.legal.actions[n, 0])
        row, slot = int(torch.cat(self._rows)[prefix]), bisect(self._begins, prefix) - 1
        return row, f"row {row}: the logit of value {value} in slot {slot}"
