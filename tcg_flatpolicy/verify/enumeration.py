"""All tuples of a spec that a predicate calls legal, and differences of two lists in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.spec import ActionSpec, IntArray

BLOCK = 2**16
"""Candidates that a predicate is asked about at once, at most. It bounds memory: besides what is
found, about a block of candidates is held for each value of a tuple."""

NAMED = 3
"""How many tuples of a kind a comparison names."""
MOST_PERMUTED = 5
"""Slots of which a comparison tries all orders; of more, swaps of two."""

Mask: TypeAlias = npt.NDArray[np.bool_]
PrefixPredicate: TypeAlias = Callable[[IntArray], Any]
"""(n, j) int64, the first j values of n tuples -> (n,) bool: may a legal tuple begin so?"""
Listing: TypeAlias = LegalActions | npt.NDArray[np.integer] | Tensor | Sequence[Sequence[int]]
"""The legal tuples of one state."""


class whole:
    """Marks a predicate that only knows whole tuples, so that it is never asked about a prefix.

    Args:
        predicate: (n, 1 + slots) int64 -> (n,) bool; or, with ``each``, a tuple of ``1 + slots``
            ints -> bool.
        each: the predicate takes one tuple at a time.
    """

    def __init__(self, predicate: Callable[..., Any], *, each: bool = False) -> None:
        self.predicate = predicate
        self.each = each

    def __call__(self, actions: IntArray) -> Any:
        """(n, 1 + slots) -> (n,) bool."""
        if not self.each:
            return self.predicate(actions)
        answers = []
        for action in map(tuple, actions.tolist()):
            answer = self.predicate(action)
            if not isinstance(answer, (bool, np.bool_)):
                raise TypeError(f"is_legal must answer True or False to {action}, got {answer!r}")
            answers.append(bool(answer))
        return np.array(answers, dtype=bool)


def enumerate_legal(spec: ActionSpec, is_legal: PrefixPredicate | whole) -> IntArray:
    """All tuples of a spec that are legal, by asking about primaries, then longer prefixes.

    Candidates are tuples within the spec: values in their primary's roles, unused slots 0. A prefix
    that is refused is never extended, so a predicate that refuses early is asked little::

        def is_legal(prefixes):
            primary = prefixes[:, 0]
            if prefixes.shape[1] == 1:
                return engine.any_legal[primary]
            ...

        legal = enumerate_legal(spec, is_legal)
        legal = enumerate_legal(spec, whole(engine.is_legal, each=True))  # knows only tuples

    Args:
        is_legal: given (n, j) int64, the first j values of n candidates (j = 1 is their primaries
            alone, j = 1 + slots whole tuples), it answers (n,) bool: for whole tuples whether they
            are legal, for shorter prefixes whether a legal tuple may begin so; True where it cannot
            tell. It is asked about :data:`BLOCK` candidates at most at once, and may write to what
            it is given. Around a predicate that knows only whole tuples, put :class:`whole`.

    Returns:
        (N, 1 + slots) int64, in lexicographic order, each tuple once. As a list of tuples, call
        ``tolist()``; as LegalActions, ``LegalActions.from_lists([legal])``.

    Raises:
        TypeError: an answer that is not bool, or a predicate that cannot take an array (it raises
            TypeError, ValueError or IndexError).
        ValueError: an answer of another shape than (n,).
    """
    return _gathered(spec, is_legal, None)


def list_from_head_masks(
    masks: Sequence[npt.ArrayLike | Tensor], is_legal: PrefixPredicate | whole, spec: ActionSpec
) -> IntArray:
    """The legal tuples of one state, for an engine that has only a mask a head.

    Combinations of values that are unmasked need not be legal, hence the predicate; it is asked
    only about prefixes of unmasked values. The way back is ``LegalActions.head_masks(spec.nvec)``,
    which shows the no-op alone for an empty list.

    Args:
        masks: ``1 + slots`` masks, one a value of the tuple, primary first: (nvec[j],) bool, or
            (1, nvec[j]) as of a batch of one. A slot that a primary does not use is 0, so its mask
            must leave 0 unmasked.
        is_legal: as for :func:`enumerate_legal`.

    Returns:
        (N, 1 + slots) int64, in lexicographic order.

    Raises:
        TypeError: a mask, or an answer, that is not bool, or a predicate that cannot take an array.
        ValueError: another number of masks than values in a tuple, or one of another size.
    """
    sizes = spec.nvec.tolist()
    if len(masks) != len(sizes):
        raise ValueError(
            f"this spec's tuples have {len(sizes)} values, so {len(sizes)} masks are needed, "
            f"got {len(masks)}"
        )
    checked: list[Mask] = []
    for slot, (given, size) in enumerate(zip(masks, sizes, strict=True)):
        mask = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
        if mask.dtype != np.bool_:
            raise TypeError(f"the mask of slot {slot} must be bool, got {mask.dtype}")
        if mask.shape not in ((size,), (1, size)):
            raise ValueError(f"the mask of slot {slot} must be ({size},), got {mask.shape}")
        checked.append(mask.reshape(size))
    return _gathered(spec, is_legal, checked)


def _gathered(
    spec: ActionSpec, is_legal: PrefixPredicate | whole, masks: list[Mask] | None
) -> IntArray:
    empty = np.empty((1, 0), dtype=np.int64)
    found = list(_extended(spec, is_legal, masks, empty))
    return np.concatenate([np.empty((0, len(spec.nvec)), dtype=np.int64), *found])


def _extended(
    spec: ActionSpec,
    is_legal: PrefixPredicate | whole,
    masks: list[Mask] | None,
    prefixes: IntArray,
) -> Iterator[IntArray]:
    """Blocks of the legal tuples that begin with prefixes (n, j), j < H, that were accepted."""
    width = prefixes.shape[1] + 1
    asked = width == len(spec.nvec) or not isinstance(is_legal, whole)
    for candidates in _children(spec, prefixes):
        if masks is not None:
            candidates = candidates[masks[width - 1][candidates[:, -1]]]
        if asked and len(candidates):
            candidates = candidates[_answer(is_legal, candidates)]
        if not len(candidates):
            continue
        if width == len(spec.nvec):
            yield candidates
        else:
            yield from _extended(spec, is_legal, masks, candidates)


def _children(spec: ActionSpec, prefixes: IntArray) -> Iterator[IntArray]:
    """Blocks of at most BLOCK (m, j + 1): each prefix with each value that its next slot has."""
    slot = prefixes.shape[1]
    if slot == 0:
        ids = np.array(list(spec.primaries), dtype=np.int64)
        for start in range(0, len(ids), BLOCK):
            yield ids[start : start + BLOCK, None]
        return
    ends = spec.limits[prefixes[:, 0], slot].cumsum()
    starts = np.concatenate([[0], ends[:-1]])
    for first in range(0, int(ends[-1]), BLOCK):
        numbers = np.arange(first, min(first + BLOCK, int(ends[-1])))
        parents = np.searchsorted(ends, numbers, side="right")
        values = numbers - starts[parents]
        yield np.concatenate([prefixes[parents], values[:, None]], axis=1)


def _answer(is_legal: PrefixPredicate | whole, candidates: IntArray) -> Mask:
    n, width = candidates.shape
    if isinstance(is_legal, whole) and is_legal.each:
        return np.asarray(is_legal(candidates), dtype=np.bool_)
    asked = (
        f"is_legal was asked about {n} prefixes of {width} values, an array ({n}, {width}), and "
        f"must answer ({n},) bool"
    )
    hint = "; if it takes one tuple at a time, give whole(is_legal, each=True)"
    try:
        answer = is_legal(candidates.copy())
    except (TypeError, ValueError, IndexError) as error:
        raise TypeError(f"{asked}, it raised {type(error).__name__}: {error}{hint}") from error
    if isinstance(answer, Tensor):
        answer = answer.detach().cpu().numpy()
    if not isinstance(answer, np.ndarray):
        try:
            answer = np.asarray(answer)
        except ValueError:
            raise ValueError(f"{asked}, got {answer!r}{hint}") from None
    if answer.dtype != np.bool_:
        raise TypeError(f"{asked}, got {answer.dtype}{hint}")
    if answer.shape != (n,):
        raise ValueError(f"{asked}, got {answer.shape}{hint}")
    accepted: Mask = answer
    return accepted


@dataclass(frozen=True, eq=False)
class Comparison:
    """What two lists of tuples have in common and what not; ``str`` of it says so in words."""

    only_a: IntArray
    """(n, H) int64 tuples that only the first lists, each once, in lexicographic order."""
    only_b: IntArray
    """(n, H) likewise of the second."""
    both: IntArray
    """(n, H) tuples that both list."""
    repeated_a: IntArray
    """(n, H) tuples that the first lists more than once, each once."""
    repeated_b: IntArray
    """(n, H) likewise of the second."""
    explanations: tuple[str, ...] = ()
    """What would make the second list of the first, where something simple does."""
    spec: ActionSpec | None = None
    """What the tuples mean, for the words."""
    names: tuple[str, str] = ("a", "b")
    """What the two are called."""

    @property
    def ok(self) -> bool:
        """Whether both list the same tuples, each once; their order does not matter."""
        parts = (self.only_a, self.only_b, self.repeated_a, self.repeated_b)
        return not any(len(part) for part in parts)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        a, b = self.names
        if not len(self.only_a) and not len(self.only_b):
            yield f"{a} and {b} list the same {_tuple_count(self.both)}"
        else:
            yield (
                f"{a} and {b} differ: {_tuple_count(self.only_a)} only in {a}, "
                f"{len(self.only_b):,} only in {b}, {len(self.both):,} in both"
            )
        for primary in np.union1d(self.only_a[:, :1], self.only_b[:, :1]).tolist():
            yield f"  {self._primary(primary)}:"
            for name, tuples in ((a, self.only_a), (b, self.only_b)):
                of_it = tuples[tuples[:, 0] == primary]
                if len(of_it):
                    yield f"    {len(of_it):,} only in {name}: {self._some(of_it)}"
        for name, tuples in ((a, self.repeated_a), (b, self.repeated_b)):
            if len(tuples):
                yield (
                    f"  {name} lists {_tuple_count(tuples)} more than once: {self._some(tuples)}"
                )
        yield from (f"  {explanation}" for explanation in self.explanations)

    def _primary(self, number: int) -> str:
        return _primary_name(self.spec, number)

    def _some(self, tuples: IntArray) -> str:
        words = [self._words(action) for action in tuples[:NAMED].tolist()]
        more = len(tuples) - len(words)
        return ", ".join(words) + (f" and {more:,} more" if more else "")

    def _words(self, action: list[int]) -> str:
        if self.spec is None:
            return str(tuple(action))
        problem = self.spec.explain(action)
        if problem is not None:
            return f"{tuple(action)} (outside the spec: {problem})"
        return f"{self.spec.describe(action)} {tuple(action)}"


def compare_enumerations(
    a: Listing,
    b: Listing,
    spec: ActionSpec | None = None,
    names: tuple[str, str] = ("a", "b"),
) -> Comparison:
    """Compares two lists of the legal tuples of one state, as sets, and says how they differ.

    If swapping slots, or adding or taking 1 in one slot, makes the one of the other (for all of
    the primaries in which they differ, each by itself), it says that too.

    Args:
        a: (N, H) integers, a list of tuples, or LegalActions of one row.
        b: likewise.
        spec: what tuples mean, for the words; without it they are numbers.
        names: what to call the two.

    Raises:
        TypeError: values that are not integers.
        ValueError: LegalActions of more or fewer rows than one, or tuples of another length than
            the other's or the spec's.
    """
    widths = [None if spec is None else len(spec.nvec), _width_of(a), _width_of(b)]
    width = next((one for one in widths if one is not None), 0)
    left, right = _tuples(names[0], a, width), _tuples(names[1], b, width)
    keys_left, keys_right = _keys(left, right)
    first_left, repeated_a = _distinct(left, keys_left)
    first_right, repeated_b = _distinct(right, keys_right)
    in_right = np.isin(keys_left[first_left], keys_right)
    in_left = np.isin(keys_right[first_right], keys_left)
    only_a, only_b = left[first_left[~in_right]], right[first_right[~in_left]]
    return Comparison(
        only_a=only_a,
        only_b=only_b,
        both=left[first_left[in_right]],
        repeated_a=repeated_a,
        repeated_b=repeated_b,
        explanations=_explanations(left, right, only_a, only_b, spec, names),
        spec=spec,
        names=names,
    )


def _width_of(listing: Listing) -> int | None:
    """H, as far as the listing itself shows it."""
    if isinstance(listing, LegalActions):
        return listing.slots + 1
    if isinstance(listing, (np.ndarray, Tensor)):
        return int(listing.shape[1]) if listing.ndim == 2 else None
    return len(listing[0]) if len(listing) else None


def _tuples(name: str, listing: Listing, width: int) -> IntArray:
    """(N, width) int64."""
    if isinstance(listing, LegalActions):
        if len(listing) != 1:
            raise ValueError(
                f"{name} has {len(listing)} rows: compare one state at a time, such as "
                "to_lists()[row]"
            )
        listing = listing.actions
    if isinstance(listing, Tensor):
        listing = listing.detach().cpu().numpy()
    if not isinstance(listing, np.ndarray):
        for action in listing:
            if len(action) != width:
                raise ValueError(
                    f"{name} lists {tuple(action)}, of {len(action)} values, not {width}"
                )
        listing = np.array([tuple(action) for action in listing])
        if not len(listing):
            return np.empty((0, width), dtype=np.int64)
    if listing.dtype.kind not in "iu":
        raise TypeError(f"{name} must list integers, got {listing.dtype}")
    if listing.ndim != 2 or listing.shape[1] != width:
        raise ValueError(f"{name} must be (N, {width}), got {listing.shape}")
    return listing.astype(np.int64)


def _keys(left: IntArray, right: IntArray) -> tuple[IntArray, IntArray]:
    """One number a tuple, equal where tuples are, ordered as they are lexicographically."""
    together = np.concatenate([left, right])
    if not together.size:
        return np.zeros(len(left), np.int64), np.zeros(len(right), np.int64)
    lowest, highest = together.min(axis=0).tolist(), together.max(axis=0).tolist()
    sizes = [high - low + 1 for low, high in zip(lowest, highest, strict=True)]
    if math.prod(sizes) < 2**63:
        keys = np.zeros(len(together), dtype=np.int64)
        for slot, size in enumerate(sizes):
            keys = keys * size + (together[:, slot] - lowest[slot])
    else:
        keys = np.unique(together, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return keys[: len(left)], keys[len(left) :]


def _distinct(tuples: IntArray, keys: IntArray) -> tuple[npt.NDArray[np.intp], IntArray]:
    """Where each distinct tuple is first, in order; and those that are there more than once."""
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    return first, tuples[first[counts > 1]]


def _explanations(
    left: IntArray,
    right: IntArray,
    only_a: IntArray,
    only_b: IntArray,
    spec: ActionSpec | None,
    names: tuple[str, str],
) -> tuple[str, ...]:
    """In words, what makes the right of the left in each primary in which they differ; or ()."""
    if not len(only_a) and not len(only_b):
        return ()
    if len(left) and len(right):
        for step in (1, -1):
            if _same(left + _unit(left.shape[1], 0, step), right):
                return (_offset_words(0, step, names),)
    said: dict[str, list[str]] = {}
    for primary in np.union1d(only_a[:, :1], only_b[:, :1]).tolist():
        words = _transformation(left[left[:, 0] == primary], right[right[:, 0] == primary], names)
        if words is None:
            return ()
        said.setdefault(words, []).append(_primary_name(spec, primary))
    return tuple(f"{', '.join(primaries)}: {words}" for words, primaries in said.items())


def _transformation(left: IntArray, right: IntArray, names: tuple[str, str]) -> str | None:
    """What makes the right of the left, of one primary, in words."""
    if not len(left) or not len(right):
        return None
    width = left.shape[1]
    for slot in range(1, width):
        for step in (1, -1):
            if _same(left + _unit(width, slot, step), right):
                return _offset_words(slot, step, names)
    for order in _orders(width):
        if _same(left[:, list(order)], right):
            moved = [slot for slot, source in enumerate(order) if slot != source]
            if len(moved) == 2:
                return f"with slots {moved[0]} and {moved[1]} swapped, {names[0]} is {names[1]}"
            told = ", ".join(f"{order[slot]} to {slot}" for slot in moved)
            return f"with slots moved ({told}), {names[0]} is {names[1]}"
    return None


def _orders(width: int) -> Iterator[tuple[int, ...]]:
    """Orders of the slots behind the primary, swaps of two first."""
    for i, j in itertools.combinations(range(1, width), 2):
        order = list(range(width))
        order[i], order[j] = j, i
        yield tuple(order)
    if width <= MOST_PERMUTED + 1:
        yield from ((0, *order) for order in itertools.permutations(range(1, width)))


def _same(left: IntArray, right: IntArray) -> bool:
    """Whether two arrays of tuples hold the same ones, whatever their order and repeats."""
    for bound in (np.min, np.max):  # quick to tell most that differ
        if not np.array_equal(bound(left, axis=0), bound(right, axis=0)):
            return False
    keys_left, keys_right = _keys(left, right)
    return np.array_equal(np.unique(keys_left), np.unique(keys_right))


def _unit(width: int, slot: int, step: int) -> IntArray:
    unit = np.zeros(width, dtype=np.int64)
    unit[slot] = step
    return unit


def _offset_words(slot: int, step: int, names: tuple[str, str]) -> str:
    where = "the primary" if slot == 0 else f"slot {slot}"
    return f"{names[1]}'s {where} is {names[0]}'s {'plus' if step > 0 else 'minus'} 1 throughout"


def _tuple_count(tuples: IntArray) -> str:
    return f"{len(tuples):,} tuple{'' if len(tuples) == 1 else 's'}"


def _primary_name(spec: ActionSpec | None, number: int) -> str:
    if spec is not None and number in spec.primaries:
        return spec.primaries[number].name
    return f"primary {number}"
