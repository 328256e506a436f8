"""What legality costs: reading the legal list, drawing, log-prob and entropy, and the way back.

Synthetic lists shaped like those of a real engine: half of the rows are empty (the other player's
turn), the rest have 11 tuples on average, 54 at the 99th percentile and 101 at most, in an order of
no use; sizes 24/50/50/50, padded to 1,024, in byte observations with a uint16 count. Every call
gets other lists than the one before. Contenders take turns on one thread; figures are ratios of
times of the same round.

    python benchmarks/head.py                  # some minutes
    python benchmarks/head.py --quick          # about one
    python benchmarks/head.py --profile 2048   # where our time goes, by operation
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import measure
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional
from torch.profiler import record_function

import tcg_flatpolicy as fp

SIZES = (24, 50, 50, 50)
PADDING = 1024
LONGEST = 101
HIDDEN, WIDTH = 256, 64
POOL = 4
"""Batches that calls take in turn."""
BATCHES = (512, 2048, 8192, 16384)
TARGETS = {512: 15, 8192: 40}
"""How many times the padded Categorical's time ours must be, by batch."""

FLOORS = {
    (512, "draw"): 1.5,
    (512, "and backward"): 1.8,
    (8192, "draw"): 1.2,
    (8192, "and backward"): 1.0,
}
"""How many times the floor's time ours with its scorer may be, by batch and direction."""

SPEC = fp.ActionSpec.from_nvec(SIZES)


class Batch(NamedTuple):
    """One batch of states: B rows, N legal tuples in all, padded to K."""

    observations: Tensor
    """(B, nbytes) uint8."""
    scores: Tensor
    """(N,) of the legal tuples."""
    padded: Tensor
    """(B, K) logits; what stands in the padding does not matter. (B, 0) where not asked for."""
    heads: Tensor
    """(B, 174) logits, 24 + 50 + 50 + 50."""
    masks: Tensor
    """(B, 174) bool, the values that some legal tuple has."""
    hidden: Tensor
    """(B, 256) states."""


def layout(padding: int) -> fp.LegalLayout:
    """Where the list of that padding lies in an observation."""
    dtype = np.dtype([("n_legal", np.uint16), ("legal", np.uint8, (padding, 4))], align=True)
    return fp.LegalLayout.from_dtype(dtype, count="n_legal", actions="legal", spec=SPEC)


def lists(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """(B,) lengths and (N, 4) tuples, none of them twice in a row, in an order of no use."""
    # A log-normal of median 7.8 and deviation 0.83 has mean 11 and 99th percentile 54.
    lengths = np.clip(rng.lognormal(np.log(7.8), 0.83, batch).round(), 1, LONGEST).astype(int)
    counts = np.where(rng.random(batch) < 0.5, lengths, 0)
    first = rng.integers(np.prod(SIZES), size=batch)
    place = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    # The step has no factor in common with the number of ids, so it meets none of them twice.
    ids = (np.repeat(first, counts) + place * 1_234_577) % np.prod(SIZES)
    return counts, np.stack(np.unravel_index(ids, SIZES), axis=1)


def observe(counts: np.ndarray, tuples: np.ndarray, padding: int) -> Tensor:
    """(B, nbytes) uint8 observations with those lists."""
    observations = np.zeros(len(counts), layout(padding).dtype)
    observations["n_legal"] = counts
    observations["legal"][np.arange(padding) < counts[:, None]] = tuples
    return torch.as_tensor(observations.view(np.uint8).reshape(len(counts), -1))


def pool(batch: int, padding: int = PADDING, padded: bool = False, seed: int = 0) -> list[Batch]:
    """Batches for calls to take in turn; the same seed has the same lists, however padded."""
    made = []
    for number in range(POOL):
        rng = np.random.default_rng([seed, batch, number])
        counts, tuples = lists(rng, batch)
        observations = observe(counts, tuples, padding)
        masks = torch.cat(layout(padding).read(observations).head_masks(SIZES), dim=1)
        generator = torch.Generator().manual_seed(number)
        normal = partial(torch.randn, generator=generator, requires_grad=True)
        made.append(
            Batch(
                observations,
                normal(len(tuples)),
                normal(batch, padding if padded else 0),
                normal(batch, sum(SIZES)),
                masks,
                normal(batch, HIDDEN),
            )
        )
    return made


# The contenders. Each draws a tuple (B, 4) a row, and gives its log-prob and the entropy (B,).

Outputs = tuple[Tensor, Tensor, Tensor]


def ours(legal_layout: fp.LegalLayout, batch: Batch, score: Callable[..., Tensor]) -> Outputs:
    """From bytes, all ranges checked and repeats dropped, as FlatPolicy does."""
    legal = legal_layout.read_distinct(batch.observations)
    distribution = fp.LegalCategorical(legal, score(batch, legal))
    actions = distribution.sample()
    return actions, distribution.log_prob(actions), distribution.entropy()


def padded_categorical(batch: Batch) -> Outputs:
    """torch's own Categorical over the padded list; only the drawn tuple is gathered."""
    counts, listed = _padded_list(batch)
    # The first place of an empty list counts as its no-op: a row of -inf alone would be NaN.
    mask = torch.arange(PADDING) < counts.clamp(min=1).unsqueeze(1)
    logits = batch.padded.masked_fill(~mask, torch.finfo(torch.float32).min)
    distribution = Categorical(logits=logits, validate_args=False)
    at = distribution.sample()
    actions = listed[torch.arange(len(at)), at].long()
    return actions, distribution.log_prob(at), distribution.entropy()


def padded_by_hand(batch: Batch) -> Outputs:
    """The same without torch's Categorical: one log-softmax, and no pass more than needed."""
    counts, listed = _padded_list(batch)
    mask = torch.arange(PADDING) < counts.clamp(min=1).unsqueeze(1)
    logits = batch.padded.masked_fill(~mask, torch.finfo(torch.float32).min).log_softmax(1)
    probs = logits.exp()
    at = torch.minimum(_inverse_transform(probs).squeeze(1), (counts - 1).clamp(min=0))
    actions = listed[torch.arange(len(at)), at].long()
    log_prob = logits.gather(1, at.unsqueeze(1)).squeeze(1)
    return actions, log_prob, -(probs * logits).sum(1)


def masked_heads(batch: Batch, logits: Tensor) -> Outputs:
    """A masked categorical a head, masks given; what it draws together need not be listed."""
    actions, log_probs, entropies = [], [], []
    for head in torch.where(batch.masks, logits, -1e8).split(SIZES, dim=1):
        head = head.log_softmax(1)
        probs = head.exp()
        action = _inverse_transform(probs)
        actions.append(action)
        log_probs.append(head.gather(1, action))
        entropies.append(-(probs * head).sum(1))
    return torch.cat(actions, 1), torch.cat(log_probs, 1).sum(1), torch.stack(entropies).sum(0)


def masked_categoricals(batch: Batch, logits: Tensor) -> Outputs:
    """The same with torch's Categorical, about what sb3-contrib does, without its validation."""
    masked = torch.where(batch.masks, logits, -1e8)
    heads = [Categorical(logits=head, validate_args=False) for head in masked.split(SIZES, dim=1)]
    actions = [head.sample() for head in heads]
    log_probs = [head.log_prob(action) for head, action in zip(heads, actions, strict=True)]
    entropies = [head.entropy() for head in heads]
    return torch.stack(actions, 1), torch.stack(log_probs).sum(0), torch.stack(entropies).sum(0)


@torch.no_grad()
def _inverse_transform(probs: Tensor) -> Tensor:
    """(B, n) -> (B, 1): one random number a row, where torch's multinomial draws n."""
    running = probs.cumsum(1)
    return torch.searchsorted(running, torch.rand(len(running), 1) * running[:, -1:])


def _padded_list(batch: Batch) -> tuple[Tensor, Tensor]:
    """(B,) counts and (B, K, 4) uint8 tuples, views of the bytes."""
    counts = batch.observations[:, :2].view(torch.int16).squeeze(1)
    return counts, batch.observations[:, 2:].unflatten(1, (-1, 4))


# What cannot be avoided: the gathers and products alone, of any head that scores each legal tuple.


class Floor(NamedTuple):
    """Where the parts of a batch lie, found beforehand."""

    batch: Batch
    words: Tensor
    """(B * (1 + K),) int32: the count of each row, and then a tuple in each word."""
    counts_at: Tensor
    """(B,) in words."""
    tuples_at: Tensor
    """(N,) in words."""
    rows: Tensor
    """(N,)"""
    codes: Tensor
    """(N, 5) rows of a table: one of the state, of the primary and of each slot."""

    @classmethod
    def of(cls, batch: Batch) -> Floor:
        """For a batch padded to 1,024."""
        legal = layout(PADDING).read(batch.observations)
        counts_at = torch.arange(len(legal)) * (1 + PADDING)
        place = torch.arange(len(legal.rows)) - legal.starts[legal.rows]
        begins = torch.tensor([0, *SIZES[:-1]]).cumsum(0)
        codes = torch.cat([sum(SIZES) + legal.rows.unsqueeze(1), begins + legal.actions], dim=1)
        listed = batch.observations[:, 2:].contiguous().view(torch.int32)
        words = torch.cat([legal.counts.int().unsqueeze(1), listed], dim=1).flatten()
        return cls(batch, words, counts_at, counts_at[legal.rows] + 1 + place, legal.rows, codes)

    def given_scores(self, backward: bool) -> None:
        """Counts, words, rows; exp, running sum, sums by row; a draw; softmax's gradient."""
        scores = self.batch.scores.detach()
        counts = self.words.index_select(0, self.counts_at)
        rows = torch.repeat_interleave(counts, output_size=len(scores))
        self.words.index_select(0, self.tuples_at)
        probs = scores.exp()
        probs.cumsum(0)
        totals = torch.zeros(len(counts)).index_add_(0, rows, probs)
        self.tuples_at.index_select(0, self.counts_at.remainder(len(scores)))
        if backward:
            probs * totals.index_select(0, rows)

    def scored(self, backward: bool, weight: Tensor, table: Tensor) -> None:
        """That, and the scorer's: state times weight, the rows of a tuple summed, the readout.

        Args:
            backward: also the gradient of each of these.
            weight: (256, W).
            table: (174, W), a row of each primary and slot value.
        """
        self.given_scores(backward)
        hidden = self.batch.hidden.detach()
        rows = torch.cat([table, hidden @ weight])
        summed = functional.embedding_bag(self.codes, rows, mode="sum")
        summed @ table[0]
        if backward:
            torch.outer(self.batch.scores.detach(), table[0])
            for code in self.codes.unbind(1):
                rows.index_add_(0, code, summed)
            summed.t() @ self.batch.scores.detach()
            hidden.t() @ rows[len(table) :]
            rows[len(table) :] @ weight.t()


# The measurements. A contender is a function of the number of the call, once for each direction.

DIRECTIONS = ("draw", "and backward")
Contenders = dict[str, Callable[[int], Any]]
"""By "NAME, DIRECTION"."""


class Line(NamedTuple):
    """One line of the table."""

    what: str
    batch: str
    direction: str
    target: str
    figure: measure.Figure

    @property
    def met(self) -> str:
        """Whether the figure meets the target, where there is one."""
        if not self.target:
            return ""
        sign, limit = self.target.split()
        ratio = self.figure.median
        held = ratio >= float(limit) if sign == "≥" else ratio <= float(limit)
        return "yes" if held else "NO"

    def cells(self) -> list[str]:
        """As the table shows it."""
        median = measure.number(self.figure.median)
        return [*self[:3], self.target, median, self.figure.spread, self.met]


def both_ways(
    name: str,
    batches: list[Batch],
    forward: Callable[[Batch], Outputs],
    leaves: Callable[[Batch], Sequence[Tensor]],
) -> Contenders:
    """A contender in both directions: forward alone, and with the gradients of the leaves."""

    def backward(call: int) -> None:
        batch = batches[call % POOL]
        _, log_prob, entropy = forward(batch)
        torch.autograd.grad(log_prob.sum() + entropy.sum(), leaves(batch))

    return {
        f"{name}, draw": lambda call: forward(batches[call % POOL]),
        f"{name}, and backward": backward,
    }


def ours_given_scores(name: str, batches: list[Batch], padding: int = PADDING) -> Contenders:
    """Our head without a scorer."""
    forward = partial(ours, layout(padding), score=lambda batch, legal: batch.scores)
    return both_ways(name, batches, forward, lambda batch: [batch.scores])


def ours_scored(name: str, batches: list[Batch], scorer: fp.TupleScorer) -> Contenders:
    """Our head with its scorer: what FlatPolicy decides, its state given."""

    def score(batch: Batch, legal: fp.LegalActions) -> Tensor:
        return scorer(batch.hidden, {}, legal)

    return both_ways(
        name,
        batches,
        partial(ours, layout(PADDING), score=score),
        lambda batch: [batch.hidden, *scorer.parameters()],
    )


def compared(
    times: dict[str, measure.Times], over: str, under: str, batch: int | str, target: str = ""
) -> list[Line]:
    """The ratio of two contenders' times, a line for each direction."""
    return [
        Line(
            f"{over} / {under}",
            str(batch),
            direction,
            target,
            measure.figure(times[f"{over}, {direction}"] / times[f"{under}, {direction}"]),
        )
        for direction in DIRECTIONS
    ]


def given_scores(batch: int, seconds: float) -> list[Line]:
    """Ours against the others, scores and logits given."""
    batches = pool(batch, padded=True)
    others: dict[str, tuple[Callable[[Batch], Outputs], str]] = {
        "padded torch Categorical": (padded_categorical, "padded"),
        "padded by hand": (padded_by_hand, "padded"),
        "masks per head": (lambda b: masked_heads(b, b.heads), "heads"),
        "masks per head, torch Categorical": (lambda b: masked_categoricals(b, b.heads), "heads"),
    }
    contenders = ours_given_scores("ours", batches)
    for name, (forward, leaf) in others.items():
        contenders |= both_ways(name, batches, forward, lambda b, leaf=leaf: [getattr(b, leaf)])
    floors = [Floor.of(one) for one in batches]
    contenders["floor, draw"] = lambda call: floors[call % POOL].given_scores(False)
    contenders["floor, and backward"] = lambda call: floors[call % POOL].given_scores(True)

    times = measure.interleave(contenders, seconds)
    lines = []
    for name in others:
        target = (
            f"≥ {TARGETS[batch]}" if name == "padded torch Categorical" and batch in TARGETS else ""
        )
        lines += compared(times, name, "ours", batch, target)
    return lines + compared(times, "ours", "floor", batch)


def with_scorer(batch: int, seconds: float) -> list[Line]:
    """Ours with its scorer against masks per head with their linear layer."""
    batches = pool(batch)
    scorer = fp.TupleScorer(SPEC, HIDDEN, width=WIDTH)
    linear = nn.Linear(HIDDEN, sum(SIZES))
    others: dict[str, Callable[[Batch, Tensor], Outputs]] = {
        "masks per head + Linear": masked_heads,
        "masks per head + Linear, torch Categorical": masked_categoricals,
    }
    contenders = ours_scored("ours + scorer", batches, scorer)
    for name, head in others.items():
        contenders |= both_ways(
            name,
            batches,
            lambda b, head=head: head(b, linear(b.hidden)),
            lambda b: [b.hidden, *linear.parameters()],
        )
    floors = [Floor.of(one) for one in batches]
    weight, table = torch.randn(HIDDEN, WIDTH), torch.randn(sum(SIZES), WIDTH)
    for direction, backward in zip(DIRECTIONS, (False, True), strict=True):
        contenders[f"floor + scorer, {direction}"] = lambda call, backward=backward: floors[
            call % POOL
        ].scored(backward, weight, table)
    times = measure.interleave(contenders, seconds)
    lines = [
        line for name in others for line in compared(times, "ours + scorer", name, batch, "≤ 1")
    ]
    lines += compared(times, "ours + scorer", "floor + scorer", batch)
    for line in lines[-2:]:
        if (batch, line.direction) in FLOORS:
            lines[lines.index(line)] = line._replace(target=f"≤ {FLOORS[batch, line.direction]}")
    return lines


def padded_further(batch: int, seconds: float) -> list[Line]:
    """The same lists with room for 128 and for 4,096."""
    contenders = {}
    for padding in (128, 4096):
        contenders |= ours_given_scores(f"K = {padding}", pool(batch, padding), padding)
    times = measure.interleave(contenders, seconds)
    return compared(times, "K = 4096", "K = 128", batch, "≤ 1.3")


def larger_batch(small: int, large: int, seconds: float, scored: bool) -> list[Line]:
    """The time a row in a large batch against that in a small one, with or without the scorer."""
    contenders = {}
    scorer = fp.TupleScorer(SPEC, HIDDEN, width=WIDTH)
    for batch in (small, large):
        name = f"{'scored' if scored else 'a row'} of {batch}"
        if scored:
            contenders |= ours_scored(name, pool(batch), scorer)
        else:
            contenders |= ours_given_scores(name, pool(batch))
    times = measure.interleave(contenders, seconds)
    a_row = {name: t / (small if f" {small}," in name else large) for name, t in times.items()}
    what, target = ("scored", "≤ 1.1") if scored else ("a row", "≤ 1.3")
    return compared(a_row, f"{what} of {large}", f"{what} of {small}", "", target)


def profile(batch: int) -> None:
    """Prints where our time goes, by part and by operation."""
    batches = pool(batch)
    scorer = fp.TupleScorer(SPEC, HIDDEN, width=WIDTH)
    read = layout(PADDING)
    parameters = [parameter for parameter in scorer.parameters() if parameter.numel()]

    def step(call: int) -> None:
        one = batches[call % POOL]
        with record_function("[read]"):
            legal = read.read_distinct(one.observations)
        with record_function("[score]"):
            scores = scorer(one.hidden, {}, legal)
        with record_function("[LegalCategorical]"):
            distribution = fp.LegalCategorical(legal, scores)
        with record_function("[sample]"):
            actions = distribution.sample()
        with record_function("[log_prob]"):
            log_prob = distribution.log_prob(actions)
        with record_function("[entropy]"):
            entropy = distribution.entropy()
        with record_function("[backward]"):
            torch.autograd.grad(log_prob.sum() + entropy.sum(), [one.hidden, *parameters])

    for call in range(POOL):
        step(call)
    with torch.profiler.profile() as profiler:
        for call in range(50):
            step(call)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    for title, chosen, key in (
        ("part", [e for e in events if e.key.startswith("[")], "cpu_time_total"),
        ("operation", [e for e in events if not e.key.startswith("[")], "self_cpu_time_total"),
    ):
        rows = [
            [e.key, f"{getattr(e, key) / total:.1%}", f"{e.count / 50:.3g}"]
            for e in sorted(chosen, key=lambda e: -getattr(e, key))
        ]
        print(measure.table([title, "share of time", "calls a step"], rows[:40]))


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about a minute; wider spreads")
    parser.add_argument("--profile", type=int, metavar="BATCH", help="only print where time goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.profile:
        profile(arguments.profile)
        return

    seconds = 3.0 if arguments.quick else 25.0
    lines = [
        *(line for batch in BATCHES for line in given_scores(batch, seconds)),
        *(line for batch in (512, 8192) for line in padded_further(batch, seconds)),
        *(one for scored in (False, True) for one in larger_batch(2048, 16384, seconds, scored)),
        *(line for batch in BATCHES for line in with_scorer(batch, seconds)),
    ]
    header = ["ratio of times", "batch", "direction", "target", "figure", "middle 80%", "met"]
    figures = [{**line._asdict(), "figure": line.figure._asdict()} for line in lines]
    body = f"# The head\n\n{NOTES}\n" + measure.table(header, [line.cells() for line in lines])
    measure.write("head", body, {"lines": figures})


NOTES = f"""\
Processor times of the same round on one thread, fresh lists every call: half of the rows empty,
else 11 tuples on average, 54 at the 99th percentile, at most {LONGEST}; sizes 24/50/50/50, padded
to {PADDING}.
"draw" is the draw of a tuple, its log-prob and the entropy; "and backward" also the gradients of
their sums. Ours includes reading the list from bytes, all range checks and dropping repeats. The
padded ones read counts and the drawn tuple from the same bytes, unchecked; logits (B, {PADDING})
are given. Masks per head have their masks given, not built, and draw tuples that no row lists.
What does not say "torch Categorical" is written without it, by hand, and quicker for it. With the
scorer, ours scores from hidden ({HIDDEN}) at width {WIDTH}, and masks per head get their logits
from hidden too, by a Linear({HIDDEN}, {sum(SIZES)}). The floor is the gathers, sums and products
alone that no such head can do without, on what was found beforehand.
"""

if __name__ == "__main__":
    main()
