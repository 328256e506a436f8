"""One categorical over exactly the legal tuples of each row.

The maths alone: plain torch, no trainer. Shapes: B rows, N legal tuples in the whole batch,
H values in a tuple, S samples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, register_kl
from torch.distributions.constraints import Constraint

from tcg_flatpolicy.kernels import cpu
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.operators import wide
from tcg_flatpolicy.packing import places


class _WholeTuples(Constraint):
    """Whole numbers, whatever their dtype; whether a tuple is listed is answered by log_prob."""

    is_discrete = True
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """(*S, B, H) -> (*S, B) bool."""
        if not value.is_floating_point():
            return torch.ones_like(value[..., 0], dtype=torch.bool)
        return ((value == value.floor()) & value.isfinite()).all(-1)


class UnsoundScore(ValueError):
    """A score, ``what`` in words, of a row of the batch is NaN or +inf."""

    def __init__(self, row: int, what: str, score: float, why: str | None = None) -> None:
        self.row, self.what, self.score = row, what, score
        self.why = why or "look for a diverged network (learning rate, unnormalised observations)"
        super().__init__(f"{what} is {score}; it must be finite or -inf: {self.why}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.row, self.what, self.score, self.why)


class TupleDistribution(Distribution):
    """What a head returns: a distribution over tuples, batch_shape (B,), event_shape (H,).

    Tuples are labels. One of your own has ``legal``, sample, log_prob and enumerated; what speaks
    of whole tuples follows from the last.

    Attributes:
        legal: the legal tuples of B rows.
        drew: is called before each draw, where somebody must know of them; set on the instance. A
            distribution that is made of this one does not have it.
    """

    drew: Callable[[], None] | None = None
    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    legal: LegalActions

    def enumerated(self) -> LegalCategorical:
        """The same distribution as one categorical over the legal tuples."""
        raise NotImplementedError

    @property
    def mode(self) -> Tensor:
        """(B, H) int64: the most probable tuple of each row; of equals, the smallest tuple."""
        with torch.no_grad():
            return self.enumerated().mode

    def entropy(self) -> Tensor:
        """(B,) entropy in nats, over distinct tuples; 0 for a row without a legal tuple."""
        return self.enumerated().entropy()

    def tempered(self, temperature: float | Tensor) -> LegalCategorical:
        """As LegalCategorical's."""
        return self.enumerated().tempered(temperature)

    def smoothed(self, epsilon: float | Tensor) -> LegalCategorical:
        """As LegalCategorical's."""
        return self.enumerated().smoothed(epsilon)

    def top(self, k: int) -> LegalCategorical:
        """As LegalCategorical's."""
        return self.enumerated().top(k)

    def sample_without_replacement(self, k: int) -> tuple[Tensor, Tensor]:
        """As LegalCategorical's."""
        self._draws()
        return self.enumerated().sample_without_replacement(k)

    @property
    def support(self) -> Constraint:
        """Whole numbers of the event shape: a tuple that is not listed is answered with -inf."""
        return _WholeTuples()

    @property
    def mean(self) -> Tensor:
        """(B, H) NaN, as of torch's Categorical."""
        return torch.full(self._extended_shape(), torch.nan, device=self.legal.rows.device)

    variance = mean

    def _draws(self) -> None:
        if self.drew is not None:
            self.drew()

    def expand(self, batch_shape: Any, _instance: Any = None) -> Distribution:
        """Not offered: raises NotImplementedError, since each row has its own legal list."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot be expanded: each row has its own legal list; build it "
            "from LegalActions with the rows repeated"
        )


class LegalCategorical(TupleDistribution):
    """Draws one of the legal tuples of each row; batch_shape (B,), event_shape (H,).

    A listed tuple's probability is the softmax of its score within its row. A tuple that is listed
    more than once has the sum of its listings. A row without a legal tuple plays the no-op with
    probability 1; a row of only -inf scores is uniform over its listings, with zero gradient.

    Args:
        legal: the legal tuples of B rows, N in all.
        scores: (N,) floats, -inf allowed; float16 and bfloat16 are computed in float32.
        validate_args: as in torch.distributions.
        known: of a caller that has them, of lists without repeats: the scores' log-softmax within
            rows (N,) and its entropy (B,), which then carry the gradient.

    Raises:
        TypeError: scores are not floats.
        ValueError: scores of another shape. NaN and +inf scores raise :class:`UnsoundScore` in
            whatever looks at them, not here, so that building a distribution stays compilable.
    """

    def __init__(
        self,
        legal: LegalActions,
        scores: Tensor,
        validate_args: bool | None = None,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if not scores.is_floating_point():
            raise TypeError(f"scores must be floats, got {scores.dtype}")
        if scores.shape != legal.rows.shape:
            n = len(legal.rows)
            raise ValueError(f"scores must be ({n},), one a legal tuple, got {tuple(scores.shape)}")
        self.legal = legal
        self._given = legal, scores  # for naming what is wrong with them
        self._entropy: Tensor | None = None
        self.logits: Tensor
        """(N,) log-probability of each listing, normalised within its row."""
        if known is None and legal.known_distinct and cpu.usable(scores):
            known = cpu.normalise(scores, legal.counts, legal.starts)
        if known is not None:
            self.logits, self._entropy = known
            self._scores, self._totals = known
        else:
            self._scores, self.logits, self._totals = log_softmax(scores, legal)
        super().__init__(torch.Size([len(legal)]), legal.actions.shape[1:], validate_args)

    def enumerated(self) -> LegalCategorical:
        """This one."""
        return self

    @property
    def probs(self) -> Tensor:
        """(N,) probability of each listing; sums to 1 within each row that has one."""
        return self.logits.exp()

    @property
    def mode(self) -> Tensor:
        """(B, H) int64: the most probable tuple of each row; of equals, the smallest tuple."""
        self._check_scores()
        legal, logits = self._merged()
        top = row_max(logits.detach(), legal).index_select(0, legal.rows)
        candidates = (logits.detach() == top).nonzero().squeeze(1)
        ids, rows = legal.ids[candidates], legal.rows[candidates]
        smallest = torch.full_like(legal.counts, torch.iinfo(torch.int64).max)
        smallest.scatter_reduce_(0, rows, ids, "amin")
        chosen = candidates[ids == smallest[rows]]
        actions = legal.noop.repeat(len(legal), 1)
        actions[legal.rows[chosen]] = legal.actions[chosen]
        return actions

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws tuples: sample_shape S -> (*S, B, H) int64."""
        self._draws()
        self._check_scores()
        legal, shape = self.legal, torch.Size(sample_shape)
        if self._entropy is not None and not shape:
            return cpu.draw(self.logits, (legal.actions, legal.counts, legal.starts), legal.noop)
        if not len(legal.rows):
            return legal.noop.expand(self._extended_shape(shape)).clone()
        actions = legal.actions[draw(self.logits, legal, shape)]
        return torch.where((legal.counts > 0).unsqueeze(-1), actions, legal.noop)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of tuples, summed over listings; -inf for one that is not listed.

        (*S, B, H) of any integer or whole-float dtype -> (*S, B) in the dtype of the logits.

        Raises:
            ValueError: a wrong shape or, under validate_args, a value that is no whole number.
        """
        self._check_scores()
        if self._validate_args and value.is_floating_point():  # integers are whole
            self._validate_sample(value)
        legal, logits = self._merged()
        value = legal.whole(value)
        if self._entropy is not None and value.ndim == 2:
            packed = legal.actions, legal.counts, legal.starts
            return cpu.log_prob(logits, packed, legal.noop, value)
        at = legal.find(value)
        idle = (legal.counts == 0) & (value == legal.noop).all(-1)
        outside = torch.where(idle, 0.0, -torch.inf).to(logits.dtype)
        if not len(logits):
            return outside + logits.sum()  # stays in the graph: DistributedDataParallel needs it
        listed = logits.index_select(0, at.clamp(min=0).flatten()).view(at.shape)
        return torch.where(at >= 0, listed, outside)

    def entropy(self) -> Tensor:
        """(B,) entropy in nats, over distinct tuples; 0 for a row without a legal tuple."""
        self._check_scores()
        if self._entropy is not None:
            return self._entropy
        legal, logits = self._merged()
        finite = logits.masked_fill(logits == -torch.inf, 0.0)  # 0 log 0 = 0, also in the gradient
        return row_sum(-finite.exp() * finite, legal)

    @torch.no_grad()
    def sample_without_replacement(self, k: int) -> tuple[Tensor, Tensor]:
        """k distinct tuples a row, in the order drawn: Gumbel top-k (Kool et al. 2019, 1903.06059).

        Returns:
            (B, k, H) int64 tuples and (B, k) bool, which of them were drawn: a row has no more than
            its tuples of positive probability; the rest is the no-op and False.

        Raises:
            TypeError: k is no whole number.
            ValueError: k below 1.
        """
        k = at_least_one(k)
        self._draws()
        self._check_scores()
        legal, logits = self._merged()
        gumbel = -torch.empty_like(logits, dtype=torch.float64).exponential_().log()
        order = _by_row((logits + gumbel).argsort(descending=True), legal)
        place = places(legal.rows, legal.starts)
        taken = (place < k) & (logits[order] > -torch.inf)
        rows, place, order = legal.rows[taken], place[taken], order[taken]
        actions = legal.noop.repeat(len(legal), k, 1)
        drawn = torch.zeros(len(legal), k, dtype=torch.bool, device=order.device)
        actions[rows, place] = legal.actions[order]
        drawn[rows, place] = True
        return actions, drawn

    def tempered(self, temperature: float | Tensor) -> LegalCategorical:
        """p(a)^(1/t), normalised, over distinct tuples a: t above 1 flattens, below 1 sharpens.

        Raises:
            ValueError: a temperature that is no scalar or (B,), or not positive and finite.
        """
        t = self._per_row("temperature", temperature)
        # A compiled graph cannot look at numbers; explore() has.
        if not torch.compiler.is_compiling() and not ((t > 0) & t.isfinite()).all():
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        legal, logits = self._merged()
        none = logits == -torch.inf  # kept out of the division: its gradient would be NaN
        top = row_max(logits.detach(), legal).index_select(0, legal.rows)
        below = (logits - top).masked_fill(none, 0.0)  # the mode stays at 0, however small t is
        # By the reciprocal: what is so far below that it overflows has then no gradient of NaN.
        sharpness = t.double().clamp(min=1e-150).reciprocal()
        scaled = (below.double() * sharpness.index_select(0, legal.rows)).to(below.dtype)
        return self._derive(legal, scaled.masked_fill(none, -torch.inf))

    def smoothed(self, epsilon: float | Tensor) -> LegalCategorical:
        """(1 - eps) p(a) + eps / D, with D the number of distinct legal tuples of the row.

        Raises:
            ValueError: an epsilon that is no scalar or (B,), or outside 0..1.
        """
        eps = self._per_row("epsilon", epsilon)
        if not torch.compiler.is_compiling() and not ((eps >= 0) & (eps <= 1)).all():
            raise ValueError(f"epsilon must lie in 0..1, got {epsilon}")
        legal, logits = self._merged()
        eps = eps[legal.rows]
        some = eps > 0
        many = legal.counts[legal.rows].to(eps.dtype).log()
        share = eps.where(some, 0.5)  # for a logarithm without a NaN gradient
        # Of p D, whose gradient is finite at epsilon 1, too.
        mixed = (share + (1 - share) * (logits + many).exp()).log() - many
        return self._derive(legal, torch.where(some, mixed, logits))

    def top(self, k: int) -> LegalCategorical:
        """The k most probable distinct tuples of each row, renormalised; of equals, the smaller.

        Raises:
            TypeError: k is no whole number.
            ValueError: k below 1.
        """
        k = at_least_one(k)
        self._check_scores()
        legal, logits = self._merged()
        order = legal.ids.argsort(stable=True)
        order = order[logits.detach()[order].argsort(descending=True, stable=True)]
        order = _by_row(order, legal)
        kept = order[places(legal.rows, legal.starts) < k].sort().values
        counts = legal.counts.clamp(max=k)
        best = LegalActions.trusted(legal.actions[kept], counts, legal.noop, distinct=True)
        return self._derive(best, logits[kept])

    def __getitem__(self, rows: Any) -> LegalCategorical:
        """The distribution of some rows, chosen as in LegalActions.select."""
        legal, at, _ = self.legal.select(rows)
        return LegalCategorical(legal, self._scores.index_select(0, at), self._validate_args)

    def _derive(self, legal: LegalActions, scores: Tensor) -> LegalCategorical:
        derived = LegalCategorical(legal, scores, self._validate_args)
        derived._given = self._given
        return derived

    def _per_row(self, name: str, value: float | Tensor) -> Tensor:
        per_row = torch.as_tensor(value, dtype=self.logits.dtype, device=self.logits.device)
        if per_row.shape not in ((), self._batch_shape):
            want = f"a number or ({len(self.legal)},)"
            raise ValueError(f"{name} must be {want}, got {tuple(per_row.shape)}")
        return per_row.expand(self._batch_shape)

    def _merged(self) -> tuple[LegalActions, Tensor]:
        """The distinct tuples of each row and the log-probability of each."""
        merge = self.legal.merged
        if merge is None:
            return self.legal, self.logits
        # Differences of scores, not of logits, which may round to the same number far below a row's
        # best; and relative to that best, where a sum of two may round to one of them.
        legal, position = merge
        scores = self._scores
        top = torch.full_like(legal.rows, -torch.inf, dtype=scores.dtype)
        top = top.scatter_reduce(0, position, scores.detach(), "amax")
        dead = top == -torch.inf
        best = row_max(top, legal).index_select(0, legal.rows)
        top = top.masked_fill(dead, 0.0)
        mass = torch.zeros_like(top, dtype=torch.float64).index_add(
            0, position, (scores - top.index_select(0, position)).exp().double()
        )
        merged = mass.masked_fill(dead, 1.0).log().to(top.dtype) + (top - best)
        return legal, log_softmax(merged.masked_fill(dead, -torch.inf), legal)[1]

    @cached_property
    def _scores_are_sound(self) -> bool:
        try:
            return not bool(self._totals.isnan().any())
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise RuntimeError(
                "a LegalCategorical cannot be inside torch.vmap, since its cost follows the "
                "numbers in a tensor: make one of all rows"
            ) from error

    def _check_scores(self) -> None:
        if not self._scores_are_sound:
            _, scores = self._given
            n = int((scores.isnan() | (scores == torch.inf)).nonzero()[0])
            raise UnsoundScore(*self._whose_score(n), scores[n].item())

    def _whose_score(self, n: int) -> tuple[int, str]:
        """The row of a score, and what it is of."""
        legal, _ = self._given
        row = int(legal.rows[n])
        return row, f"row {row}: the score of legal tuple {tuple(legal.actions[n].tolist())}"


def at_least_one(k: int) -> int:
    """A number of tuples as a Python int; TypeError: no whole number; ValueError: below 1."""
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"k must be a whole number, got {k!r}")
    k = operator.index(k)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return k


def draw(logits: Tensor, legal: LegalActions, shape: torch.Size) -> Tensor:
    """Draws one listing a row by its log-probability (N,): (*S, B) positions in N, which is not 0.

    Inverse transform on whole numbers: each probability is cut to a multiple of 2**-40, or beyond 4
    million rows of what the sums have room for. So running sums over the batch are exact in int64,
    also late in it. Probability 0 is never drawn. The positions of empty rows mean nothing.
    """
    bits = min(40, 62 - len(legal).bit_length())
    mass = (logits.exp() * 2.0**bits).to(torch.int64)
    running = mass.cumsum(0)
    last = (legal.starts + legal.counts - 1).clamp(min=0)
    first = legal.starts.clamp(max=len(mass) - 1)
    below = running.index_select(0, first) - mass.index_select(0, first)
    total = running.index_select(0, last) - below
    uniform = torch.rand(*shape, len(legal), dtype=torch.float64, device=mass.device)
    drawn = torch.minimum((uniform * total).to(torch.int64), total - 1)
    return torch.searchsorted(running, below + drawn, right=True).clamp(max=len(mass) - 1)


def log_softmax(scores: Tensor, legal: LegalActions) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax within rows, in float32 or better.

    Returns:
        (N,) the scores, 0 without gradient in rows that have only -inf; (N,) their log-softmax;
        (B,) sums of exponentials, NaN where a score is unsound.
    """
    scores = wide(scores)
    top = row_max(scores.detach(), legal)
    dead = top == -torch.inf  # an empty row, too
    scores = scores.masked_fill(dead.index_select(0, legal.rows), 0.0)
    shifted = scores - top.masked_fill(dead, 0.0).index_select(0, legal.rows)
    empty = legal.counts == 0
    # Empty rows start from 1, for a logarithm without a NaN gradient; sums in float64, for lists
    # of thousands.
    totals = empty.double().index_add(0, legal.rows, shifted.exp().double())
    sums = totals.log().to(shifted.dtype).index_select(0, legal.rows)
    return scores, shifted - sums, totals.detach()


def _by_row(order: Tensor, legal: LegalActions) -> Tensor:
    """An order of the listings (N,), sorted by row and within each row as it is."""
    return order[legal.rows[order].argsort(stable=True)]


def row_max(values: Tensor, legal: LegalActions) -> Tensor:
    """(N,) -> (B,) largest of each row; -inf of an empty one."""
    lowest = torch.full((len(legal),), -torch.inf, dtype=values.dtype, device=values.device)
    return lowest.scatter_reduce(0, legal.rows, values, "amax")


def row_sum(values: Tensor, legal: LegalActions) -> Tensor:
    """(N,) -> (B,) sum of each row, added up in float64."""
    zero = torch.zeros(len(legal), dtype=torch.float64, device=values.device)
    return zero.index_add(0, legal.rows, values.double()).to(values.dtype)


@register_kl(TupleDistribution, TupleDistribution)  # type: ignore[untyped-decorator]
def _kl(p: TupleDistribution, q: TupleDistribution) -> Tensor:
    """(B,) KL(p || q) in nats, with 0 log 0 = 0, and inf where q is 0 and p is not."""
    whole_p, whole_q = p.enumerated(), q.enumerated()
    whole_p._check_scores()
    whole_q._check_scores()
    (legal, log_p), (other, log_q) = whole_p._merged(), whole_q._merged()
    if legal is not other:
        log_q = log_q[_align(legal, other)]
    p_none, q_none = log_p == -torch.inf, log_q == -torch.inf
    finite_p, finite_q = log_p.masked_fill(p_none, 0.0), log_q.masked_fill(q_none, 0.0)
    terms = (finite_p.exp() * (finite_p - finite_q)).masked_fill(p_none, 0.0)
    return row_sum(terms.masked_fill(q_none & ~p_none, torch.inf), legal)


def _align(legal: LegalActions, other: LegalActions) -> Tensor:
    """(N,) where each tuple of ``legal`` stands in ``other``; both list distinct tuples."""
    if torch.equal(legal.counts, other.counts) and legal.slots == other.slots:
        if torch.equal(legal.actions, other.actions):
            return torch.arange(len(legal.rows), device=legal.rows.device)
        mine, theirs = (_by_row(x.ids.argsort(), x) for x in (legal, other))
        if torch.equal(legal.actions[mine], other.actions[theirs]):
            return theirs[mine.argsort()]
    raise ValueError(
        f"KL needs two distributions over the same legal lists, got {legal} and {other} that differ"
    )
