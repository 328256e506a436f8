"""Random decisions, the same by brute force in float64, and how far a kernel is from that.

The oracle takes what a kernel is given, in float32, and works tuple by tuple, in NumPy: scores,
log-probability, entropy, and every gradient by hand. With each gradient goes its magnitude, the
same sum over absolute values, since float32 rounds the terms of a sum and terms may cancel out.

    python -m tests.exact_kernels                 # 2,000 decisions by each kernel; minutes
    python -m tests.exact_kernels --cases 0 --draws 100000000 --rows 1000000

Shapes: B rows, K tuples that a list has room for, H values in a tuple, W width.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import tcg_flatpolicy as fp
from tcg_flatpolicy.kernels import cpu
from tcg_flatpolicy.roles import Role
from tcg_flatpolicy.scorer import TupleScorer

Array = npt.NDArray[np.float64]
Action = tuple[int, ...]

NEAR = 2e-6
"""Of log-probability and entropy, times max(1, |x|)."""
GRADIENT = 5e-6
"""Of a gradient, times the largest of its tensor."""
OF_SIZE = 2**-23
"""Of log-probability and entropy that are further off, times the size of the row's scores: two
roundings of that."""
OF_MAGNITUDE = 5e-6
"""Of a gradient that is further off, times the largest magnitude of its tensor."""
INTEGERS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")


class Amount(Role):
    """Values that share three learned rows."""

    rows = 3

    def weights(self, values: Tensor) -> Tensor:
        x = values / self.size
        return torch.stack([x, x * x, torch.ones_like(x)], dim=-1)


# ---- random decisions


@dataclass
class Case:
    """What a flat head is given, and what is asked of it."""

    scorer: TupleScorer
    layout: fp.LegalLayout
    data: npt.NDArray[np.uint8]  # (B, nbytes)
    lists: list[list[Action]]  # as listed, with repeats
    leaves: dict[str, Tensor]  # state, readout (B, W), and the entities' (B, n, E) or (R, E)
    ids: dict[str, Tensor]  # (B, n) of entities that are looked up
    explore: tuple[float, float]
    actions: Tensor  # (B, H)
    upstream: tuple[Tensor, Tensor]  # (B,) each: of log-prob and entropy
    scores: Tensor | None  # (N,) of the distinct tuples, in the place of the scorer's


def random_spec(rng: np.random.Generator) -> fp.ActionSpec:
    sizes = 1 + rng.integers(0, rng.choice([2, 8, 40]), 8)
    large = rng.random() < 0.25  # more values than a table of all is made for
    kinds = (fp.Index, fp.Entity, Amount)

    def role() -> Role:
        kind = kinds[rng.integers(3)]
        name, size = f"{'xyz'[rng.integers(3)]}", int(sizes[rng.integers(8)])
        return kind(name, 20_000 if kind is fp.Index and size > 2 and large else size)

    def slot() -> Role:
        one = [role() for _ in range(rng.integers(1, 4))]
        return one[0] if rng.random() < 0.7 else fp.OneOf(*one)

    ids = rng.choice(40, rng.integers(1, 6), replace=False)
    primaries = [
        fp.Primary(f"p{number}", *(slot() for _ in range(rng.integers(0, 4))), id=int(number))
        for number in ids
    ]
    noop = rng.integers(0, fp.ActionSpec(primaries).nvec) * rng.integers(0, 2)
    return fp.ActionSpec(primaries, noop=tuple(noop.tolist()))


def random_layout(rng: np.random.Generator, spec: fp.ActionSpec, room: int) -> fp.LegalLayout:
    """A struct of any integers that hold the values, at odd offsets."""
    most, values = spec.nvec - 1, 1 + spec.slots

    def integer(largest: int) -> str:
        return str(rng.choice([one for one in INTEGERS if np.iinfo(one).max >= largest]))

    fields: list[Any] = [("n", integer(room)), ("pad", "u1", (int(rng.integers(0, 4)),))]
    names: Any = "legal"
    if rng.random() < 0.5:
        fields.append(("legal", integer(most.max()), (room, values)))
    elif rng.random() < 0.5:
        names = tuple(f"s{j}" for j in range(values))
        fields += [(f"s{j}", integer(largest), (room,)) for j, largest in enumerate(most)]
    else:
        names = tuple(f"legal.s{j}" for j in range(values))
        inner = [(f"s{j}", integer(largest)) for j, largest in enumerate(most)]
        fields.append(("legal", np.dtype(inner, align=bool(rng.integers(2))), (room,)))
    order = rng.permutation(len(fields))
    dtype = np.dtype([fields[k] for k in order], align=bool(rng.integers(2)))
    return fp.LegalLayout.from_dtype(dtype, "n", names, spec)


def random_tuple(rng: np.random.Generator, spec: fp.ActionSpec) -> Action:
    number = int(rng.choice(list(spec.primaries)))
    return (number, *(int(rng.integers(0, size)) for size in spec.limits[number, 1:]))


def random_case(seed: int, rows: int | None = None) -> Case:
    """Rooms of 1 to 1,024, lists of none to all of it; with a number of rows, rooms of 12."""
    rng = np.random.default_rng(seed)
    spec = random_spec(rng)
    room = int(rng.choice([1, 4, 12, 64, 300, 1024], p=[0.1, 0.3, 0.3, 0.2, 0.06, 0.04]))
    room = 12 if rows else room
    rows = rows or int(rng.integers(1, max(2, min(150, 3000 // room))))
    layout = random_layout(rng, spec, room)
    lists = []
    for _ in range(rows):
        length = int(rng.choice([0, min(room, 1), rng.integers(0, room + 1), room]))
        listed = [random_tuple(rng, spec) for _ in range(length)]
        if length and rng.random() < 0.3:
            listed = [listed[k] for k in rng.integers(0, rng.integers(1, length + 1), length)]
        lists.append(listed)
    data = rng.integers(0, 256, (rows, layout.dtype.itemsize), dtype=np.uint8)
    write(layout, data, lists)

    width, embedding = int(rng.integers(1, 80)), int(rng.integers(1, 20))
    sizes = {
        name: (size + int(rng.integers(0, 3)), int(rng.integers(1, 12)))
        for name in spec.entity_names
        for size in [max(p.role.size for p in spec.parts if p.role.encoded and p.role.name == name)]
    }
    torch.manual_seed(seed)
    scorer = TupleScorer(spec, 1, sizes, width, embedding)
    spread = float(rng.choice([0.3, 1.0, 3.0, 10.0])) / width**0.5
    leaves = {"state": torch.randn(rows, width), "readout": torch.randn(rows, width) * spread}
    ids = {}
    for name, (n, e) in sizes.items():
        if rng.random() < 0.3:
            leaves[name] = torch.randn(int(rng.integers(1, 50)), e)
            ids[name] = torch.as_tensor(rng.integers(0, len(leaves[name]), (rows, n)))
        else:
            leaves[name] = torch.randn(rows, n, e)

    actions = []
    for listed in lists:
        action = listed[rng.integers(len(listed))] if listed else tuple(spec.noop.tolist())
        if rng.random() < 0.2:
            action = random_tuple(rng, spec)  # often not listed
        actions.append(action)
    explore = [(1.0, 0.0), (1.0, 0.0), (0.3, 0.0), (1.7, 0.2), (1.0, 0.05), (1.0, 1.0)]
    scores = None
    if rng.random() < 0.3:
        n = sum(len(dict.fromkeys(listed)) for listed in lists)
        scores = torch.randn(n) * float(rng.choice([0.1, 3.0, 30.0]))
        scores[torch.as_tensor(rng.random(n) < rng.choice([0.1, 0.5, 1.0]))] = -torch.inf
    return Case(
        scorer, layout, data, lists, leaves, ids, explore[rng.integers(6)],
        torch.tensor(actions), (torch.randn(rows), torch.randn(rows)), scores,
    )  # fmt: skip


def write(layout: fp.LegalLayout, data: npt.NDArray[np.uint8], lists: list[list[Action]]) -> None:
    """By NumPy alone; what lies behind a list stays as it was."""
    records = data.view(layout.dtype)[:, 0]
    for record, listed in zip(records, lists, strict=True):
        record["n"] = len(listed)
        for i, action in enumerate(listed):
            if "legal" not in layout.dtype.names:
                for j, value in enumerate(action):
                    record[f"s{j}"][i] = value
            elif layout.dtype["legal"].base.names:
                record["legal"][i] = action
            else:
                record["legal"][i, :] = action


# ---- by a kernel


@dataclass
class Decision:
    """What comes out of a case."""

    log_prob: Array
    entropy: Array
    gradients: dict[str, Array]
    size: Array = field(default_factory=lambda: np.zeros(0))
    """Of each row the largest score over absolute values, over the temperature if that is below 1:
    what float32 rounds is so large, however little is left of it in a log-probability."""
    magnitudes: dict[str, Array] = field(default_factory=dict)
    uncertain: dict[str, Array] = field(default_factory=dict)
    """What a relu's input within its rounding may put into each gradient, or leave out."""


def distribution(
    case: Case, leaves: dict[str, Tensor], begin: int = 0, end: int | None = None
) -> fp.LegalCategorical:
    """Of some of the rows, by reading, scoring and normalising, and by exploration."""
    some = slice(begin, end)
    legal = case.layout.read_distinct(torch.as_tensor(case.data[some]))
    if "scores" in leaves:
        first = sum(len(dict.fromkeys(listed)) for listed in case.lists[:begin])
        scores = leaves["scores"][first : first + len(legal.actions)]
        decided = fp.LegalCategorical(legal, scores)
    else:
        # The hidden state is the number of its row, and the two products of it are given.
        case.scorer._read = lambda rows: tuple(  # type: ignore[method-assign, assignment]
            leaves[name].index_select(0, rows[:, 0].long()) for name in ("state", "readout")
        )
        entities: dict[str, Any] = {}
        for name in case.scorer.entity_sizes:
            leaf = leaves[name]
            looked_up = name in case.ids
            entities[name] = fp.Lookup(leaf, case.ids[name][some]) if looked_up else leaf[some]
        rows = torch.arange(len(case.leaves["state"]), dtype=torch.float32).unsqueeze(1)[some]
        decided = case.scorer.categorical(rows, entities, legal)
    temperature, epsilon = case.explore
    decided = decided.tempered(temperature) if temperature != 1 else decided
    return decided.smoothed(epsilon) if epsilon else decided


def by_kernel(case: Case) -> Decision:
    """What a decision says of the actions, and its gradients."""
    given = case.leaves if case.scores is None else {"scores": case.scores}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in given.items()}
    decided = distribution(case, leaves)
    log_prob, entropy = decided.log_prob(case.actions), decided.entropy()
    assert log_prob.dtype == entropy.dtype == torch.float32
    finite = log_prob.isfinite()
    total = (log_prob * case.upstream[0])[finite].sum() + (entropy * case.upstream[1]).sum()
    if case.scores is None:
        leaves.update(item for item in case.scorer.named_parameters() if used(item[0]))
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return Decision(
        log_prob.detach().double().numpy(),
        entropy.detach().double().numpy(),
        {name: gradient.double().numpy() for name, gradient in zip(leaves, gradients, strict=True)},
    )


def used(parameter: str) -> bool:
    """Whether the scores follow it once state and readout are given."""
    return parameter not in ("state.weight", "state.bias", "readout", "readout_of_state")


# ---- by brute force


@dataclass
class Vector:
    """Where a value of a slot has its vector and projection: names of tensors, and places there."""

    vectors: str
    weights: dict[tuple[int, ...], float]  # of the rows of the tensor that it is made of
    projection: str
    columns: slice


def vector_of(case: Case, row: int, action: Action, slot: int) -> Vector | None:
    """Of the value in a slot (0 ..); None of a slot that its primary does not use."""
    table, width = case.scorer.table, case.leaves["state"].shape[1]
    parts = [p for p in case.scorer.spec.parts if (p.primary, p.slot) == (action[0], slot)]
    parts = [p for p in parts if p.start <= action[1 + slot] < p.start + p.role.size]
    if not parts:
        return None
    value = action[1 + slot] - parts[0].start
    column = 0
    for source in table.learned:
        for part in source.parts:
            if part == parts[0]:
                weights: dict[tuple[int, ...], float] = {(source.begin + value,): 1.0}
                if source.features is not None:
                    features = source.features[value].double().tolist()
                    weights = {(source.begin + i,): x for i, x in enumerate(features)}
                columns = slice(column * width, (column + 1) * width)
                return Vector("embeddings", weights, "index_projections", columns)
            column += 1
    for number, source in enumerate(table.encoded):
        if parts[0] in source.parts:
            name, column = str(source.name), source.parts.index(parts[0])
            at = (int(case.ids[name][row, value]),) if name in case.ids else (row, value)
            columns = slice(column * width, (column + 1) * width)
            return Vector(name, {at: 1.0}, f"entity_projections.{number}", columns)
    raise AssertionError("a part of no source")


def by_brute_force(case: Case) -> Decision:
    """The same, tuple by tuple."""
    named = {name: one for name, one in case.scorer.named_parameters() if used(name)}
    given = {**case.leaves, **named}
    if case.scores is not None:
        given = {"scores": case.scores}
    x = {name: one.detach().double().numpy() for name, one in given.items()}
    gradients, magnitudes, uncertain = (
        {name: np.zeros_like(one) for name, one in x.items()} for _ in range(3)
    )
    place = {number: k for k, number in enumerate(sorted(case.scorer.spec.primaries))}
    log_prob, entropy, size_of_row = np.zeros((3, len(case.lists)))
    first = 0
    for b, listed in enumerate(case.lists):
        tuples = list(dict.fromkeys(listed))
        action = tuple(case.actions[b].tolist())
        if not tuples:
            noop = tuple(case.scorer.spec.noop.tolist())
            log_prob[b] = 0 if action == noop else -np.inf
            continue
        held: list[list[tuple[Vector, Array]]] = []
        hidden, rounding = np.zeros((2, len(tuples), case.leaves["state"].shape[1]))
        if case.scores is not None:
            scores = x["scores"][first : first + len(tuples)]
            size_of_row[b] = np.abs(scores[np.isfinite(scores)]).max(initial=0)
        else:
            for i, one in enumerate(tuples):
                above = [x["state"][b], x["primaries"][place[one[0]]]]
                hidden[i], rounding[i] = sum(above), sum(map(np.abs, above))
                held.append([])
                for slot in range(len(one) - 1):
                    vector = vector_of(case, b, one, slot)
                    if vector is None:
                        continue
                    value = sum(w * x[vector.vectors][at] for at, w in vector.weights.items())
                    projection = x[vector.projection][:, vector.columns]
                    hidden[i] += value @ projection
                    rounding[i] += np.abs(value) @ np.abs(projection)
                    held[-1].append((vector, value))
            scores = np.maximum(hidden, 0) @ x["readout"][b]
            size_of_row[b] = (rounding * (hidden > 0) @ np.abs(x["readout"][b])).max()
        at = tuples.index(action) if action in tuples else None
        log_probs, entropy[b], back = categorical(scores, *case.explore)
        log_prob[b] = -np.inf if at is None else log_probs[at]
        g = float(case.upstream[0][b]) if at is not None and np.isfinite(log_prob[b]) else 0.0
        down, size = back(at, g, float(case.upstream[1][b]))
        first += len(tuples)
        if case.scores is not None:
            gradients["scores"][first - len(tuples) : first] = down
            magnitudes["scores"][first - len(tuples) : first] = size
            continue
        readout = x["readout"][b]
        near = np.abs(hidden) <= 1e-6 * rounding
        active = hidden > 0
        for i, one in enumerate(tuples):
            for total, upstream, on, absolute in (
                (gradients, down[i], active[i], np.asarray),
                (magnitudes, size[i], active[i], np.abs),
                (uncertain, size[i], near[i], np.abs),
            ):
                below = upstream * absolute(readout) * on
                total["readout"][b] += upstream * hidden[i] * on
                total["state"][b] += below
                total["primaries"][place[one[0]]] += below
                for vector, value in held[i]:
                    projection = x[vector.projection][:, vector.columns]
                    of_value = absolute(projection) @ below
                    for where, weight in vector.weights.items():
                        total[vector.vectors][where] += weight * of_value
                    total[vector.projection][:, vector.columns] += np.outer(absolute(value), below)
    size_of_row /= min(1, case.explore[0])
    return Decision(log_prob, entropy, gradients, size_of_row, magnitudes, uncertain)


def categorical(scores: Array, temperature: float, epsilon: float) -> tuple[Array, float, Any]:
    """Log-probabilities, entropy, and what takes (place, its gradient, that of the entropy) to the
    gradient of the scores and its magnitude."""
    n = len(scores)
    t, e = float(temperature), float(epsilon)
    dead = bool(np.isneginf(scores).all())
    plain = log_softmax(np.zeros(n) if dead else scores)
    tempered = log_softmax(plain / t)
    with np.errstate(divide="ignore"):
        mixed = np.log((1 - e) * np.exp(tempered) + e / n) if e else tempered
    p, q = np.exp(tempered), np.exp(mixed)
    logs = np.where(q > 0, mixed, 0)

    def back(at: int | None, of_log_prob: float, of_entropy: float) -> tuple[Array, Array]:
        results = []
        for absolute in (np.asarray, np.abs):
            sign = -1 if absolute is np.asarray else 1
            upstream = of_entropy * sign * q * (logs + 1)
            if absolute is np.abs:
                upstream = abs(of_entropy) * q * (np.abs(logs) + 1)
            if at is not None:
                upstream[at] += absolute(of_log_prob)
            if e:
                upstream = upstream * np.where(q > 0, (1 - e) * p / np.where(q > 0, q, 1), 0)
            upstream = (upstream + sign * p * upstream.sum()) / t
            upstream = upstream + sign * np.exp(plain) * upstream.sum()
            results.append(np.zeros(n) if dead else upstream)
        return results[0], results[1]

    return mixed, float(-(q * logs).sum()), back


def log_softmax(scores: Array) -> Array:
    below = scores - scores.max()
    return np.asarray(below - np.log(np.exp(below).sum()))


# ---- how far apart


@dataclass
class Errors:
    """The largest so far, and of how many decisions."""

    log_prob: float = 0.0  # over max(1, |x|)
    entropy: float = 0.0  # over max(1, |x|)
    large_scores: int = 0  # decisions of which either is beyond NEAR
    of_size: float = 0.0  # of those rows' errors, over the size of their scores
    gradient: float = 0.0  # over the largest of its tensor
    cancelled: int = 0  # decisions of which one is beyond GRADIENT
    of_magnitude: float = 0.0  # of those, over the largest magnitude of its tensor
    uncertain: int = 0  # decisions with a relu's input within its rounding

    def add(self, got: Decision, wanted: Decision) -> Errors:
        """Keeps the larger ones; returns those of this decision."""
        one = Errors()
        for name in ("log_prob", "entropy"):
            mine, theirs = getattr(got, name), getattr(wanted, name)
            finite = np.isfinite(theirs)
            assert (np.isfinite(mine) == finite).all(), name
            mine, theirs, size = mine[finite], theirs[finite], wanted.size[finite]
            error = np.abs(mine - theirs) / np.maximum(1, np.abs(theirs))
            setattr(one, name, float(error.max(initial=0)))
            beyond = error > NEAR
            one.large_scores |= int(beyond.any())
            of_size = (np.abs(mine - theirs)[beyond] / np.maximum(size[beyond], 1e-30)).max(
                initial=0
            )
            one.of_size = max(one.of_size, float(of_size))
        for name, theirs in wanted.gradients.items():
            uncertain = wanted.uncertain[name]
            one.uncertain |= int((uncertain > 0).any())
            apart = np.maximum(np.abs(got.gradients[name] - theirs) - 2 * uncertain, 0)
            assert np.isfinite(apart).all(), name
            worst = float(apart.max(initial=0))
            if worst <= 1e-30:  # a row of one tuple has none at all
                continue
            error = worst / max(float(np.abs(theirs).max()), 1e-300)
            one.gradient = max(one.gradient, error)
            if error > GRADIENT:
                one.cancelled = 1
                of_magnitude = worst / float(wanted.magnitudes[name].max())
                one.of_magnitude = max(one.of_magnitude, of_magnitude)
        self.add_all(one)
        return one

    def add_all(self, other: Errors) -> None:
        """Adds what is counted, and keeps the larger of the rest."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, mine + value if isinstance(value, int) else max(mine, value))

    def check(self) -> None:
        """Whether they are those that float32 allows."""
        assert self.of_size <= OF_SIZE, self
        assert self.of_magnitude <= OF_MAGNITUDE, self


def many(seeds: Iterable[int]) -> Errors:
    """Random decisions, each checked."""
    errors = Errors()
    for seed in seeds:
        case = random_case(seed)
        try:
            errors.add(by_kernel(case), by_brute_force(case)).check()
        except AssertionError as error:
            raise AssertionError(f"decision {seed}: {error}") from error
    return errors


# ---- illegal draws, and bytes of any kind


def draws(seed: int, total: int, rows: int = 50_000) -> tuple[int, int, float]:
    """How many draws, how many of them illegal, and the smallest p-value of a list.

    Lists of 0 to 40 tuples, some of them of probability 0, that many rows share.
    """
    rng = np.random.default_rng(seed)
    lists = 100
    counts = rng.integers(0, 41, lists) * (rng.random(lists) < 0.9)
    counts[:2] = 0, 40
    tuples = [rng.permutation(64)[:count] for count in counts]
    scores = [torch.randn(int(n)) * float(rng.choice([0.1, 1.0, 5.0])) for n in counts]
    for row in scores:
        row[torch.as_tensor(rng.random(len(row)) < 0.1)] = -torch.inf
    probs = np.zeros((lists, 64))
    for row, ids, probabilities in zip(scores, tuples, probs, strict=True):
        dead = bool(np.isneginf(row.numpy()).all())
        if len(ids):
            plain = np.zeros(len(ids)) if dead else row.double().numpy()
            probabilities[ids] = np.exp(log_softmax(plain))
        else:
            probabilities[9] = 1  # the no-op
    again, ids = rows // lists, torch.as_tensor(np.concatenate(tuples))
    actions = torch.stack([ids // 8, ids % 8], dim=1).repeat(again, 1)
    counts_of = torch.as_tensor(counts).repeat(again)
    legal = fp.LegalActions.trusted(actions, counts_of, torch.tensor([1, 1]), distinct=True)
    decided = fp.LegalCategorical(legal, torch.cat(scores * again))
    which = np.arange(len(legal)) % lists * 64
    seen = np.zeros(lists * 64, np.int64)
    torch.manual_seed(seed)
    for _ in range(-(-total // len(legal))):
        drawn = decided.sample().numpy()
        assert ((drawn >= 0) & (drawn < 8)).all()
        seen += np.bincount(which + drawn[:, 0] * 8 + drawn[:, 1], minlength=len(seen))
    illegal = int(seen[probs.flatten() == 0].sum())
    return int(seen.sum()), illegal, min(map(p_value_of, seen.reshape(lists, 64), probs))


def p_value_of(seen: npt.NDArray[np.int64], probs: Array) -> float:
    """Of Pearson's chi-square; what is expected less than 10 times is one cell."""
    expected = probs * seen.sum()
    rare = expected < 10
    if expected[rare].sum() < 10:
        rare |= expected == expected[~rare].min()
    seen_cells = np.append(seen[~rare], seen[rare].sum())
    cells = np.append(expected[~rare], expected[rare].sum())
    statistic = torch.tensor(((seen_cells - cells) ** 2 / cells).sum())
    freedom = torch.tensor((len(cells) - 1) / 2).double()
    return float(torch.special.gammaincc(freedom, statistic / 2)) if len(cells) > 1 else 1.0


def any_bytes(seed: int, rows: int) -> tuple[int, int]:
    """Reads rows of random bytes, some of small numbers, in batches of 1 to 60; and decides by
    those that are within the spec. Of how many rows in all, and of how many within it.
    """
    rng = np.random.default_rng(seed)
    done = fine = 0
    case = random_case(seed, rows=60)
    layout, spec = case.layout, case.scorer.spec
    while done < rows:
        batch = int(rng.choice([1, 1, 2, 60]))
        data = rng.integers(0, 256, (batch, layout.dtype.itemsize), dtype=np.uint8)
        if rng.random() < 0.8:
            data[rng.random(data.shape) < rng.choice([0.9, 0.99])] = 0
        case.data, case.lists = data, read(layout, data)
        known = all(within(spec, listed, layout.padding) for listed in case.lists)
        found = layout._reader(torch.as_tensor(data))  # type: ignore[misc]
        assert (found is None) != known, (seed, data)
        if known:
            actions, counts, *_ = found
            distinct = [list(dict.fromkeys(listed)) for listed in case.lists]
            assert counts.tolist() == list(map(len, distinct))
            assert actions.tolist() == [list(one) for listed in distinct for one in listed]
            assert distribution(case, case.leaves, 0, batch).sample().shape == (
                batch,
                1 + spec.slots,
            )
            fine += batch
        done += batch
    return done, fine


def read(layout: fp.LegalLayout, data: npt.NDArray[np.uint8]) -> list[list[Action]]:
    """By NumPy alone; of a count beyond the room, as many as there is room for and one more."""
    records = data.view(layout.dtype)[:, 0]
    lists = []
    for record in records:
        count, listed = int(record["n"]), []
        for i in range(min(max(count, 0), layout.padding)):
            if "legal" not in layout.dtype.names:
                action = [record[name][i] for name in layout.action_names]
            else:
                action = record["legal"][i]
            listed.append(tuple(map(int, action)))
        lists.append([(-1,)] if not 0 <= count <= layout.padding else listed)
    return lists


def within(spec: fp.ActionSpec, listed: list[Action], room: int) -> bool:
    """Whether each value is one that its primary has in its slot."""
    return len(listed) <= room and all(
        action[0] in spec.primaries
        and all(0 <= v < n for v, n in zip(action[1:], spec.limits[action[0], 1:], strict=True))
        for action in listed
    )


def main() -> None:
    """Runs and prints what is asked for, by each kernel that is here."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="decisions against float64")
    parser.add_argument("--draws", type=int, default=0, help="draws, to be looked at")
    parser.add_argument("--rows", type=int, default=0, help="observations of random bytes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kernel in cpu.OBJECTS:
        with cpu.deciding_by(kernel):
            errors, begin = Errors(), time.perf_counter()
            for seed in range(0, arguments.cases, 100):
                errors.add_all(many(range(seed, min(seed + 100, arguments.cases))))
                seconds = time.perf_counter() - begin
                print(f"{kernel}: {seed + 100} decisions, {seconds:.0f} s: {errors}", flush=True)
            done = illegal = 0
            while done < arguments.draws:
                block = min(10**7, arguments.draws - done)
                some, wrong, p = draws(done, block)
                done, illegal = done + some, illegal + wrong
                print(f"{kernel}: {done:,} draws, {illegal} illegal, p {p:.2g}", flush=True)
            done = fine = 0
            while done < arguments.rows:
                some, known = any_bytes(done, 5000)
                done, fine = done + some, fine + known
            if done:
                print(f"{kernel}: {done:,} rows of random bytes, {fine:,} within their specs")


if __name__ == "__main__":
    main()
