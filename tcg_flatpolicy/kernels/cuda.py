"""The flat decision on a GPU, in Triton: one launch forward and one backward, whatever is listed.

A program takes a row. It reads the row's list from the bytes of the observation, BLOCK tuples at a
time, so that cost follows what is listed and not the room for it. Only rows of the table are
shared: their gradients are summed by atomic additions, those of the learned rows, which every
program adds to, in several copies. So a gradient's last bits may differ from call to call.

The same code runs on a CPU in Triton's interpreter (TRITON_INTERPRET=1). Where Triton is not
installed this module cannot be imported. :mod:`reference` says what everything means.

Shapes: B rows, K room of a list, H values of a tuple, W width, R rows of the table.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcg_flatpolicy.kernels.reference import Addresses, Decided, Rows, View
from tcg_flatpolicy.operators import Operator

EVALUATE, DRAW, BEST = range(3)
"""What a launch does with each list."""

COPIES = 2**20
"""Floats of the copies of the learned rows' gradients, at most, unless there is one only."""


# ---- device code. Offsets, values and addresses are int64.


@triton.jit
def _number(row, at, mask, SIZE: tl.constexpr, SIGNED: tl.constexpr):
    """The integer at a byte of a row, put together from bytes: any size, at any alignment."""
    value = tl.load(row + at, mask=mask, other=0).to(tl.int64)
    for k in tl.static_range(1, SIZE):
        value = value | (tl.load(row + at + k, mask=mask, other=0).to(tl.int64) << (8 * k))
    if SIGNED and SIZE < 8:
        value = tl.where(value >= 1 << (8 * SIZE - 1), value - (1 << (8 * SIZE)), value)
    return value


@triton.jit
def _column(row, place, mask, COLUMNS: tl.constexpr, j: tl.constexpr):
    """Value j of the tuples at some places of a list."""
    at = COLUMNS[4 * j] + place * COLUMNS[4 * j + 3]
    return _number(row, at, mask, COLUMNS[4 * j + 1], COLUMNS[4 * j + 2])


@triton.jit
def _row_of(
    row, place, live, known, b, B, ranges, COLUMNS: tl.constexpr, j: tl.constexpr,
    H: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The row of the table that value j of each tuple has, negative if none."""
    value = _column(row, place, live, COLUMNS, j)
    at = (known * H + j) * PARTS
    which = at
    for m in tl.static_range(1, PARTS):
        begin = tl.load(ranges + (at + m) * 5, mask=live, other=0)
        which = tl.where(value >= begin, at + m, which)
    of = ranges + which * 5
    found = tl.load(of + 1, mask=live, other=-1) + tl.load(of + 2, mask=live, other=0) * B
    found += tl.load(of + 3, mask=live, other=0) * b + tl.load(of + 4, mask=live, other=0) * value
    return tl.where(live, found, -1)


@triton.jit
def _hidden(
    row, place, live, known, b, B, ranges, state, table, COLUMNS: tl.constexpr, H: tl.constexpr,
    PARTS: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(BLOCK, WIDTH) relu(state + the rows of each tuple)."""
    w = tl.arange(0, WIDTH)
    hidden = tl.zeros((BLOCK, WIDTH), tl.float32)
    hidden += tl.load(state + b * W + w, mask=w < W, other=0.0)[None, :]
    for j in tl.static_range(H):
        at = _row_of(row, place, live, known, b, B, ranges, COLUMNS, j, H, PARTS)
        some = (at >= 0)[:, None] & (w < W)[None, :]
        hidden += tl.load(table + at[:, None] * W + w[None, :], mask=some, other=0.0)
    return tl.where(hidden < 0, 0.0, hidden)  # NaN stays


@triton.jit
def _explored(z, top, total, distinct, temperature, epsilon):
    """Of scores, NaN for what does not count: p, log-prob and probability with exploration."""
    live = z == z
    dead = top == float("-inf")
    log_p = tl.where(dead, 0.0, (z - top) / temperature) - total
    p = tl.where(live, tl.exp(log_p), 0.0)
    share = tl.where(live, (1 - epsilon) * p + epsilon / tl.maximum(distinct, 1.0), 0.0)
    mixed = tl.where(share > 0, tl.log(tl.where(share > 0, share, 1.0)), float("-inf"))
    log_p = tl.where(epsilon > 0, mixed, log_p)
    return p, tl.where(live, log_p, float("-inf")), share


@triton.jit
def _uniform(seed, b):
    """In [0, 1) with 53 bits: splitmix64 of seed and row, as reference.uniform."""
    x = seed.to(tl.uint64, bitcast=True) + (b + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit(do_not_specialize=["B"])
def _forward(
    data, state, readout, table, ranges, limits, noop, explore, given, out, norm, place, error,
    scores, actions, B, BYTES: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr,
    K: tl.constexpr, IDS: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, W: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = data + b * BYTES
    each = tl.arange(0, BLOCK).to(tl.int64)
    w = tl.arange(0, WIDTH)
    count = _number(row, COUNT[0], True, COUNT[1], COUNT[2])
    code = tl.where((count < 0) | (count > K), 1, 0)
    n = tl.where(code > 0, 0, count)

    # Reads, checks, finds repeats and scores: leaves the scores, NaN where a tuple does not count.
    top = tl.full((), float("-inf"), tl.float32)
    distinct = tl.zeros((), tl.int32)
    outside = tl.zeros((), tl.int32)
    first = tl.full((), K, tl.int64)
    unsound = tl.full((), K, tl.int64)
    read = tl.load(readout + b * W + w, mask=w < W, other=0.0)
    for begin in range(0, n, BLOCK):
        at = begin + each
        listed = at < n
        known = _column(row, at, listed, COLUMNS, 0)
        live = listed & (known >= 0) & (known < IDS)
        known = tl.where(live, known, 0)
        for j in tl.static_range(H):
            value = _column(row, at, listed, COLUMNS, j)
            limit = tl.load(limits + known * H + j)
            live = live & (value >= 0) & (value < limit)
        outside += tl.sum((listed & ~live).to(tl.int32))
        first = tl.minimum(first, tl.min(tl.where(live, at, K)))
        for other in range(0, begin + BLOCK, BLOCK):
            before = other + each
            same = (before[None, :] < at[:, None]) & (before < n)[None, :]
            for j in tl.static_range(H):
                mine = _column(row, at, listed, COLUMNS, j)
                theirs = _column(row, before, before < n, COLUMNS, j)
                same = same & (mine[:, None] == theirs[None, :])
            live = live & (tl.max(same.to(tl.int32), axis=1) == 0)
        hidden = _hidden(
            row, at, live, known, b, B, ranges, state, table, COLUMNS, H, PARTS, W, WIDTH, BLOCK
        )  # fmt: skip
        z = tl.sum(hidden * read[None, :], axis=1)
        wrong = live & ((z != z) | (z == float("inf")))
        unsound = tl.minimum(unsound, tl.min(tl.where(wrong, at, K)))
        distinct += tl.sum(live.to(tl.int32))
        top = tl.maximum(top, tl.max(tl.where(live & (z == z), z, float("-inf"))))
        tl.store(scores + b * K + at, tl.where(live, z, float("nan")), mask=listed)
    tl.debug_barrier()  # other threads read what these have stored
    if DROP:
        code += tl.where(outside > 0, tl.where(first < K, 8, 2), 0)
    else:
        code += tl.where(outside > 0, 2, 0)
    code += tl.where((unsound < K) & ((code == 0) | (code == 8)), 4, 0)
    sound = (code == 0) | (code == 8)
    n = tl.where(sound, n, 0)

    temperature = tl.maximum(tl.load(explore), 1.1754944e-38)
    epsilon = tl.load(explore + 1)
    mass = tl.zeros((), tl.float64)
    for begin in range(0, n, BLOCK):
        z = tl.load(scores + b * K + begin + each, mask=begin + each < n, other=float("nan"))
        below = tl.where(top == float("-inf"), 0.0, (z - top) / temperature)
        mass += tl.sum(tl.where(z == z, tl.exp(below), 0.0).to(tl.float64))
    total = tl.log(tl.where(mass > 0, mass, 1.0)).to(tl.float32)
    many = distinct.to(tl.float32)

    entropy = tl.zeros((), tl.float64)
    chosen = tl.full((), -1, tl.int64)
    if MODE == 1:
        uniform = _uniform(tl.load(given), b)
        running = tl.zeros((), tl.float64)
        last = tl.full((), -1, tl.int64)
    if MODE == 2:
        best = tl.full((), float("-inf"), tl.float32)
    for begin in range(0, n, BLOCK):
        at = begin + each
        listed = at < n
        z = tl.load(scores + b * K + at, mask=listed, other=float("nan"))
        _, log_p, share = _explored(z, top, total, many, temperature, epsilon)
        finite = tl.where(log_p == float("-inf"), 0.0, log_p)
        entropy -= tl.sum((share * finite).to(tl.float64))
        if MODE == 0:
            hit = z == z
            for j in tl.static_range(H):
                hit = hit & (_column(row, at, listed, COLUMNS, j) == tl.load(given + b * H + j))
            chosen = tl.maximum(chosen, tl.max(tl.where(hit, at, -1)))
        if MODE == 1:
            wide = share.to(tl.float64)
            over = (share > 0) & (running + tl.cumsum(wide, 0) > uniform)
            hit = tl.min(tl.where(over, at, K))
            chosen = tl.where((chosen < 0) & (hit < K), hit, chosen)
            last = tl.maximum(last, tl.max(tl.where(share > 0, at, -1)))
            running += tl.sum(wide)
        if MODE == 2:
            peak = tl.max(log_p)
            hit = (z == z) & (log_p == peak)
            for j in tl.static_range(H):
                value = _column(row, at, listed, COLUMNS, j)
                hit = hit & (value == tl.min(tl.where(hit, value, 9223372036854775807)))
            found = tl.max(tl.where(hit, at, -1))
            less = tl.zeros((), tl.int32)  # -1: the tuple found is less than the one before
            for j in tl.static_range(H):
                new = _column(row, tl.maximum(found, 0), n > 0, COLUMNS, j)
                old = _column(row, tl.maximum(chosen, 0), n > 0, COLUMNS, j)
                less = tl.where(less == 0, tl.where(new < old, -1, tl.where(new > old, 1, 0)), less)
            better = (chosen < 0) | (peak > best) | ((peak == best) & (less < 0))
            chosen = tl.where((found >= 0) & better, found, chosen)
            best = tl.maximum(best, peak)
    if MODE == 1:
        chosen = tl.where(chosen < 0, last, chosen)  # the probabilities may sum to less than 1

    if MODE == 0:
        idle = count == 0
        for j in tl.static_range(H):
            idle = idle & (tl.load(given + b * H + j) == tl.load(noop + j))
        none = tl.where(idle | (sound == 0), 0.0, float("-inf"))
    else:
        # A row in which something is wrong plays a listed tuple all the same.
        play = tl.where(chosen < 0, first, chosen)
        for j in tl.static_range(H):
            value = _column(row, tl.minimum(play, K - 1), play < K, COLUMNS, j)
            tl.store(actions + b * H + j, tl.where(play < K, value, tl.load(noop + j)))
        none = 0.0
    z = tl.load(scores + b * K + tl.maximum(chosen, 0), mask=chosen >= 0, other=float("nan"))
    _, log_p, _ = _explored(z, top, total, many, temperature, epsilon)
    tl.store(out + b, tl.where(chosen >= 0, log_p, none))
    tl.store(out + B + b, entropy.to(tl.float32))
    tl.store(norm + b, top)
    tl.store(norm + B + b, total)
    tl.store(norm + 2 * B + b, many)
    tl.store(place + b, tl.where(code >= 4, tl.where(unsound < K, unsound, chosen), chosen))
    tl.store(error + b, code)


@triton.jit(do_not_specialize=["B", "LEARNED", "SPARE"])
def _backward(
    data, state, readout, table, ranges, explore, norm, place, error, scores, upstream, of_state,
    of_readout, of_table, B, LEARNED, SPARE, BYTES: tl.constexpr, COUNT: tl.constexpr,
    COLUMNS: tl.constexpr, K: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, W: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = data + b * BYTES
    each = tl.arange(0, BLOCK).to(tl.int64)
    w = tl.arange(0, WIDTH)
    code = tl.load(error + b)
    n = _number(row, COUNT[0], True, COUNT[1], COUNT[2])
    n = tl.where((code == 0) | (code == 8), n, 0)
    top = tl.load(norm + b)
    total = tl.load(norm + B + b)
    many = tl.load(norm + 2 * B + b)
    n = tl.where(top == float("-inf"), 0, n)  # uniform, whatever the scores are
    temperature = tl.maximum(tl.load(explore), 1.1754944e-38)
    epsilon = tl.load(explore + 1)
    of_log_p = tl.load(upstream + b)
    of_entropy = tl.load(upstream + B + b)
    chosen = tl.load(place + b)

    # The gradient of log-probabilities is g; that of scores g - p sum(g), over the temperature.
    sum_g = tl.zeros((), tl.float64)
    for begin in range(0, n, BLOCK):
        at = begin + each
        z = tl.load(scores + b * K + at, mask=at < n, other=float("nan"))
        p, log_p, share = _explored(z, top, total, many, temperature, epsilon)
        sum_g += tl.sum(_of_log_p(p, log_p, share, at == chosen, of_log_p, of_entropy, epsilon))

    read = tl.load(readout + b * W + w, mask=w < W, other=0.0)
    sum_state = tl.zeros((WIDTH,), tl.float32)
    sum_readout = tl.zeros((WIDTH,), tl.float32)
    copy = b % (SPARE // LEARNED + 1)
    for begin in range(0, n, BLOCK):
        at = begin + each
        z = tl.load(scores + b * K + at, mask=at < n, other=float("nan"))
        live = z > float("-inf")
        p, log_p, share = _explored(z, top, total, many, temperature, epsilon)
        g = _of_log_p(p, log_p, share, at == chosen, of_log_p, of_entropy, epsilon)
        of_z = tl.where(live, (g - p * sum_g).to(tl.float32) / temperature, 0.0)
        known = _column(row, at, live, COLUMNS, 0)
        hidden = _hidden(
            row, at, live, known, b, B, ranges, state, table, COLUMNS, H, PARTS, W, WIDTH, BLOCK
        )  # fmt: skip
        sum_readout += tl.sum(of_z[:, None] * hidden, axis=0)
        active = tl.where(hidden > 0, of_z[:, None] * read[None, :], 0.0)
        sum_state += tl.sum(active, axis=0)
        for j in tl.static_range(H):
            to = _row_of(row, at, live, known, b, B, ranges, COLUMNS, j, H, PARTS)
            some = (to >= 0)[:, None] & (w < W)[None, :]
            to += tl.where(to < LEARNED, copy * LEARNED, SPARE)
            tl.atomic_add(of_table + to[:, None] * W + w[None, :], active, mask=some, sem="relaxed")
    tl.store(of_state + b * W + w, sum_state, mask=w < W)
    tl.store(of_readout + b * W + w, sum_readout, mask=w < W)


@triton.jit
def _of_log_p(p, log_p, share, chosen, of_log_p, of_entropy, epsilon):
    """The gradient of each unexplored log-probability, float64."""
    kept = tl.where(share > 0, (1 - epsilon) * p, 0.0)
    g = tl.where(kept > 0, -of_entropy * kept * (log_p + 1), 0.0)
    through = tl.where(epsilon > 0, kept / tl.where(share > 0, share, 1.0), 1.0)
    g += tl.where(chosen & (log_p > float("-inf")), of_log_p * through, 0.0)
    return g.to(tl.float64)


# ---- launches. Floats: state (B, W), readout (B, W), table (R, W). Others: data (B, bytes),
# explore (2,), given (actions (B, H), or a seed of one, or nothing), ranges, limits, noop. Sizes:
# the mode, whether to drop, learned rows, and a View. Result: log-probs and entropies (2, B); the
# actions (B, H) if they are not given; error (B,), place (B,), scores (B, K); and of each row the
# largest score, the logarithm of the sum, and how many tuples count (3, B).


def plan(sizes: list[int], ranges: Tensor, width: int) -> dict[str, Any]:
    """What a kernel is compiled for."""
    row_bytes, room, *rest = sizes[3:]
    padded = triton.next_power_of_2(width)
    block = block_of(room, padded)
    return {
        "BYTES": row_bytes,
        "COUNT": tuple(rest[:3]),
        "COLUMNS": tuple(rest[4:]),
        "K": room,
        "H": ranges.shape[1],
        "PARTS": ranges.shape[2],
        "W": width,
        "WIDTH": padded,
        "BLOCK": block,
        "num_warps": max(1, min(8, block * padded // 256)),
        "enable_fp_fusion": True,
    }


def block_of(room: int, width: int) -> int:
    """How many tuples are worked on together: with 8 warps no register spills at 2048 floats."""
    return max(1, min(int(triton.next_power_of_2(room)), 32, 2048 // width))


def _run(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    state, readout, table = (one.contiguous() for one in floats)
    data, explore, given, ranges, limits, noop = others
    mode, drop, _ = sizes[:3]
    made = plan(sizes, ranges, state.shape[1])
    batch = state.shape[0]
    whole = functools.partial(data.new_empty, dtype=torch.int64)
    out, norm = state.new_empty(2, batch), state.new_empty(3, batch)
    place, error = whole(batch), data.new_empty(batch, dtype=torch.int32)
    scores = state.new_empty(batch, made["K"])
    actions = whole(0 if mode == EVALUATE else batch, made["H"])
    with torch.cuda.device_of(data):
        if batch:
            _forward[(batch,)](
                data, state, readout, table, ranges, limits, noop, explore, given.contiguous(),
                out, norm, place, error, scores, actions, batch, IDS=ranges.shape[0], MODE=mode,
                DROP=bool(drop), **made,
            )  # fmt: skip
    return [out, actions, error, place, scores, norm]


def _gradients(
    grad: Tensor, floats: list[Tensor], others: list[Tensor], sizes: list[int], saved: list[Tensor]
) -> list[Tensor]:
    state, readout, table = (one.contiguous() for one in floats)
    data, explore, _, ranges, _, _ = others
    _, _, error, place, scores, norm = saved
    learned = sizes[2]
    spare = max(0, min(63, COPIES // (learned * state.shape[1]) - 1)) * learned
    of_table = table.new_zeros(spare + len(table), table.shape[1])
    of_state, of_readout = torch.empty_like(state), torch.empty_like(readout)
    with torch.cuda.device_of(data):
        if len(state):
            _backward[(len(state),)](
                data, state, readout, table, ranges, explore, norm, place, error, scores,
                grad.contiguous(), of_state, of_readout, of_table, len(state), learned, spare,
                **plan(sizes, ranges, state.shape[1]),
            )  # fmt: skip
    mine = of_table[spare:]
    if spare:
        mine[:learned] += of_table[:spare].view(-1, *mine[:learned].shape).sum(0)
    return [of_state, of_readout, mine]


def _fake(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    state, values, room, batch = floats[0], others[3].shape[1], sizes[4], floats[0].shape[0]
    whole = functools.partial(others[0].new_empty, dtype=torch.int64)
    actions = whole(0 if sizes[0] == EVALUATE else batch, values)
    error = others[0].new_empty(batch, dtype=torch.int32)
    norm = state.new_empty(3, batch)
    return [
        state.new_empty(2, batch), actions, error, whole(batch), state.new_empty(batch, room), norm
    ]  # fmt: skip


_operator = Operator("decide", _run, _gradients, _fake)


def _launch(
    data: Tensor,
    view: View,
    addresses: Addresses,
    rows: Rows,
    explore: Tensor,
    given: Tensor,
    mode: int,
    drop: bool,
) -> Decided:
    row_bytes, count, columns, room = view
    flat = [int(number) for number in itertools.chain(count, *columns)]
    sizes = [mode, int(drop), addresses.learned, row_bytes, room, *flat]
    results = _operator(list(rows), [data, explore, given, *addresses[:3]], sizes)
    out, actions, error, place, scores, _ = results
    log_prob, entropy = out.unbind(0)
    actions = given if mode == EVALUATE else actions
    return Decided(actions, log_prob, entropy, error, place, scores)


def decide(
    data: Tensor,
    view: View,
    addresses: Addresses,
    rows: Rows,
    explore: Tensor,
    seed: Tensor | None,
    drop: bool = False,
) -> Decided:
    """As reference.decide, without gradients, and drawing the same tuples by the same seed."""
    mode = BEST if seed is None else DRAW
    given = data.new_empty(0, dtype=torch.int64) if seed is None else seed.view(1)
    return _launch(data, view, addresses, rows, explore, given, mode, drop)


def evaluate(
    data: Tensor,
    view: View,
    addresses: Addresses,
    rows: Rows,
    explore: Tensor,
    actions: Tensor,
    drop: bool = False,
) -> Decided:
    """As reference.evaluate."""
    return _launch(data, view, addresses, rows, explore, actions, EVALUATE, drop)
