"""The flat decision in plain torch, in shapes that do not depend on what is listed.

What a fused kernel does, and what it is tested against: it reads each row's list where it lies in
the observation, scores each tuple by rows of a table, explores, and draws, takes the mode, or
evaluates given tuples. Nothing here waits for a device.

Shapes: B rows, K room of a list, H values of a tuple, W width, R rows of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

COUNT, TUPLE, SCORE, DROPPED = 1, 2, 4, 8
"""Bits of an error: a count outside 0..K; a tuple outside the spec; a score of NaN or +inf; tuples
outside the spec that were left out, which alone is not fatal."""
FATAL = COUNT | TUPLE | SCORE

Number: TypeAlias = tuple[int, int, bool, int]
"""(offset, size, signed, stride) of an integer, in bytes of a row."""
View: TypeAlias = tuple[int, Number, tuple[Number, ...], int]
"""Where lists lie: bytes of a row, the count, the H columns, K."""


class Addresses(NamedTuple):
    """What does not change from call to call; tensors are int64."""

    ranges: Tensor
    """(ids, H, M, 5), M ranges of values in each column under each primary, ascending: where one
    begins, and (a, b, c, d): value v of state s has row a + b B + c s + d v; none if negative."""
    limits: Tensor
    """(ids, H) exclusive bounds of the values of each primary."""
    noop: Tensor
    """(H,)."""
    learned: int
    """How many rows of the table no state has of its own."""


class Rows(NamedTuple):
    """score(tuple) = readout . relu(state + a row of the table for each of its values)."""

    state: Tensor
    """(B, W) float32."""
    readout: Tensor
    """(B, W)."""
    table: Tensor
    """(R, W): first what is learned, then source after source what each state has of its own."""


class Decided(NamedTuple):
    """What is decided for each row. An error row has log-prob and entropy 0, without gradient."""

    actions: Tensor
    """(B, H) int64: of an error row the first listed tuple within the spec, or the no-op."""
    log_prob: Tensor
    """(B,)."""
    entropy: Tensor
    """(B,)."""
    error: Tensor
    """(B,) int32, bits."""
    place: Tensor
    """(B,) int64: where the tuple stands in its list; of an unsound score, where that stands; or
    -1."""
    scores: Tensor
    """(B, K), NaN where a tuple does not count: padding, outside the spec, or listed before."""


def ranges_of(
    place: npt.NDArray[np.int64],
    ranges: Sequence[Sequence[Any]],
    sources: Sequence[Any],
    together: bool,
) -> tuple[npt.NDArray[np.int64], int]:
    """`Addresses.ranges` of what a kernels.cpu.Scorer is made of; how many rows are learned.

    Args:
        place, ranges, sources: as of the Scorer.
        together: learned sources are projected as one, each under the projections of all.
    """
    slots = len(ranges) // (int(place.max()) + 1)
    most = max([1, *map(len, ranges)])
    table = np.zeros((len(place), 1 + slots, most, 5), np.int64)
    table[:, :, 1:, 0] = np.iinfo(np.int64).max
    table[:, :, 0, 1] = -1
    table[:, 0, 0, 1] = place
    learned, own, column = int(place.max()) + 1, 0, 0
    begins, steps = [], []
    columns = sum(source.columns for source in sources if not source.encoded)
    for source in sources:
        shared = together and not source.encoded
        steps.append(columns if shared else source.columns)
        begins.append(own if source.encoded else learned + column)
        if source.encoded:
            own += source.size * source.columns
        else:
            learned += source.size * steps[-1]
            column += source.columns * shared
    for number in np.flatnonzero(place >= 0):
        for slot in range(slots):
            for k, one in enumerate(ranges[place[number] * slots + slot]):
                source = sources[one.source]
                begin, step = begins[one.source], steps[one.source]
                a_state = (begin, source.size * step) if source.encoded else (0, 0)
                first = (learned if source.encoded else begin) + one.column - one.start * step
                table[number, 1 + slot, k] = one.start, first, *a_state, step
    return table, learned


def decide(
    data: Tensor,
    view: View,
    addresses: Addresses,
    rows: Rows,
    explore: Tensor,
    seed: Tensor | None,
    drop: bool = False,
) -> Decided:
    """Draws a tuple for each row; without a seed takes the most probable one, of equals the least.

    Args:
        data: (B, bytes) uint8.
        view, addresses, rows: where lists lie, and what their tuples are worth.
        explore: (2,) float32, temperature and epsilon.
        seed: () int64, on the device.
        drop: leave out what is outside the spec.
    """
    of = _weigh(data, view, addresses, rows, explore, drop)
    if seed is None:
        chosen = of.kept & (of.log_p == of.log_p.amax(1, keepdim=True))
        for column in of.tuples.unbind(-1):
            least = column.masked_fill(~chosen, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
            chosen = chosen & (column == least)
        at = chosen.int().argmax(1)
    else:
        mass = of.log_p.exp().double()
        at = (mass.cumsum(1) <= uniform(seed, len(data)).unsqueeze(1)).sum(1)
        places = torch.arange(mass.shape[1], device=mass.device)
        at = torch.minimum(at, torch.where(mass > 0, places, 0).amax(1))
    at = torch.where(of.kept.any(1), at, of.inside.int().argmax(1))
    chosen_tuples = of.tuples.take_along_dim(at.view(-1, 1, 1), 1).squeeze(1)
    actions = torch.where(of.inside.any(1, keepdim=True), chosen_tuples, addresses.noop)
    log_prob = torch.where(of.kept.any(1), of.log_p.take_along_dim(at.unsqueeze(1), 1)[:, 0], 0.0)
    return of.decided(actions, log_prob, torch.where(of.kept.any(1), at, -1))


def evaluate(
    data: Tensor,
    view: View,
    addresses: Addresses,
    rows: Rows,
    explore: Tensor,
    actions: Tensor,
    drop: bool = False,
) -> Decided:
    """As decide, of given tuples (B, H) int64, with gradients for the rows.

    The log-prob of a tuple that is not listed is -inf, and 0 for the no-op in an empty row.
    """
    of = _weigh(data, view, addresses, rows, explore, drop)
    same = of.kept & (of.tuples == actions.unsqueeze(1)).all(-1)
    idle = (of.counts == 0) & (actions == addresses.noop).all(1) | (of.error & FATAL > 0)
    at = same.int().argmax(1)
    listed = of.log_p.take_along_dim(at.unsqueeze(1), 1)[:, 0]
    possible = same.any(1) & (listed > -torch.inf)  # else no gradient
    log_prob = torch.where(possible, listed, torch.where(idle, 0.0, -torch.inf))
    return of.decided(actions, log_prob, torch.where(same.any(1), at, -1))


def score(
    tuples: Tensor, state_of: Tensor, addresses: Addresses, rows: Rows, live: Tensor
) -> Tensor:
    """Scores (...,) of tuples (..., H) of the states (...,) where live (...,), else a number."""
    hidden = rows.state[state_of]
    known = tuples[..., 0]
    for j, value in enumerate(tuples.unbind(-1)):
        ranges = addresses.ranges[known, j]  # (..., M, 5)
        which = (value.unsqueeze(-1) >= ranges[..., 0]).sum(-1) - 1
        ranges = ranges.take_along_dim(which.view(*which.shape, 1, 1), -2).squeeze(-2)
        _, first, of_batch, of_state, of_value = ranges.unbind(-1)
        row = first + of_batch * len(rows.state) + of_state * state_of + of_value * value
        some = (live & (row >= 0)).unsqueeze(-1)
        hidden = hidden + torch.where(some, rows.table[row.clamp(min=0)], 0.0)
    return (hidden.relu() * rows.readout[state_of]).sum(-1)


def uniform(seed: Tensor, rows: int) -> Tensor:
    """(rows,) float64 in [0, 1), each a hash (splitmix64) of seed () int64 and row."""
    x = seed + torch.arange(1, rows + 1, device=seed.device) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return (x >> 11 & (1 << 53) - 1).double() * 2.0**-53


class _Weighed(NamedTuple):
    tuples: Tensor  # (B, K, H), 0 where they are not within the spec
    counts: Tensor  # (B,)
    inside: Tensor  # (B, K) bool: listed, and within the spec
    kept: Tensor  # (B, K) bool: inside, for the first time, and nothing is wrong with the row
    log_p: Tensor  # (B, K), -inf where not kept
    error: Tensor  # (B,) int32
    scores: Tensor  # (B, K), of Decided
    unsound: Tensor  # (B, K) bool

    def decided(self, actions: Tensor, log_prob: Tensor, at: Tensor) -> Decided:
        none = self.log_p == -torch.inf
        finite = self.log_p.masked_fill(none, 0.0)
        terms = (finite.exp() * finite).masked_fill(none, 0.0)
        entropy = -terms.sum(1, dtype=torch.float64).to(terms.dtype)
        at = torch.where(self.error & SCORE > 0, self.unsound.int().argmax(1), at)
        return Decided(actions, log_prob, entropy, self.error, at, self.scores)


def _weigh(
    data: Tensor, view: View, addresses: Addresses, rows: Rows, explore: Tensor, drop: bool
) -> _Weighed:
    _, count, columns, room = view
    place = torch.arange(room, device=data.device)
    counts = _number(data, count, place[:1])[:, 0]
    tuples = torch.stack([_number(data, column, place) for column in columns], dim=-1)
    counted = (counts >= 0) & (counts <= room)
    listed = (place < counts.unsqueeze(1)) & counted.unsqueeze(1)
    limits = addresses.limits[tuples[..., 0].clamp(0, len(addresses.limits) - 1)]
    inside = listed & ((tuples >= 0) & (tuples < limits)).all(-1)
    wrong = (listed & ~inside).any(1)
    left_out = wrong & inside.any(1) if drop else torch.zeros_like(wrong)
    error = COUNT * (~counted).int() + DROPPED * left_out.int() + TUPLE * (wrong & ~left_out).int()
    tuples = torch.where(inside.unsqueeze(-1), tuples, 0)
    same = inside.unsqueeze(1) & (place < place.unsqueeze(1))
    for column in tuples.unbind(-1):
        same = same & (column.unsqueeze(2) == column.unsqueeze(1))
    first = inside & ~same.any(2)
    state_of = torch.arange(len(data), device=data.device).unsqueeze(1).expand(-1, room)
    scores = score(tuples, state_of, addresses, Rows(*(r.detach() for r in rows)), first)
    unsound = first & (scores.isnan() | (scores == torch.inf))
    error = error + SCORE * (unsound.any(1) & (error & FATAL == 0)).int()
    sound = (error & FATAL == 0).unsqueeze(1)
    kept = first & sound
    # Once more, without what would make a gradient of NaN.
    state, readout = (torch.where(sound, one, 0.0) for one in (rows.state, rows.readout))
    clean = Rows(state, readout, rows.table)
    given = score(tuples, state_of, addresses, clean, kept)
    log_p = _explored(given, kept, explore)
    seen = torch.where(first, scores, torch.nan)
    return _Weighed(tuples, counts, inside, kept, log_p, error, seen, unsound)


def _number(data: Tensor, number: Number, place: Tensor) -> Tensor:
    """(B, bytes) uint8, (n,) places in the list -> (B, n) int64, put together from bytes."""
    offset, size, signed, stride = number
    each = torch.arange(size, device=data.device)
    found = data[:, offset + place.unsqueeze(1) * stride + each].long()
    value = (found << 8 * each).sum(-1)
    if signed and size < 8:
        value = torch.where(value >= 1 << 8 * size - 1, value - (1 << 8 * size), value)
    return value


def _explored(scores: Tensor, kept: Tensor, explore: Tensor) -> Tensor:
    """Scores (B, K) -> log-probabilities at (temperature, epsilon), -inf where not kept."""
    top = scores.detach().masked_fill(~kept, -torch.inf).amax(1, keepdim=True)
    dead = top == -torch.inf  # uniform, without a gradient; an empty row, too
    none = ~kept | (scores == -torch.inf) & ~dead
    below = torch.where(none | dead, 0.0, scores - top)
    sharpness = explore[0].double().clamp(min=1e-150).reciprocal()
    scaled = (below.double() * sharpness).to(below.dtype).masked_fill(none, -torch.inf)
    empty = ~kept.any(1, keepdim=True)
    total = scaled.exp().sum(1, keepdim=True, dtype=torch.float64) + empty
    log_p = scaled - total.log().to(scaled.dtype)
    many = kept.sum(1, keepdim=True).clamp(min=1).to(log_p.dtype).log()
    some = explore[1] > 0
    share = torch.where(some, explore[1], 0.5)  # for a logarithm without a NaN gradient
    mixed = (share + (1 - share) * (log_p + many).exp()).log() - many
    return torch.where(some, mixed, log_p).masked_fill(~kept, -torch.inf)
