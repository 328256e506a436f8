"""E02: slots in another order than the spec's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations, permutations

import numpy as np

from tcg_flatpolicy.verify.checks import Action, Bug, Check, Symptom, blamed
from tcg_flatpolicy.verify.evidence import Answer, State

ENOUGH = 3
"""How many tuples of a primary tell that its slots are swapped."""
Order = tuple[int, ...]


class SwappedAttack(Bug):
    """Lists and takes (attack, enemy, ally), and there is one more enemy than allies."""

    def meant(self, action: Action) -> Action:
        return (1, action[2], action[1]) if action[0] == 1 else action

    def said(self, legal: list[Action], match: object, player: int) -> list[Action]:
        return [(p, b, a) if p == 1 else (p, a, b) for p, a, b in legal]


class SwappedTrade(Bug):
    """Lists (trade, enemy, ally), and takes (trade, ally, enemy)."""

    def said(self, legal: list[Action], match: object, player: int) -> list[Action]:
        return [(p, b, a) if p == 4 else (p, a, b) for p, a, b in legal]


class SwappedSlots(Check):
    """Two slots are swapped.

    Why: nothing breaks where both slots are of the same size: the policy learns from the wrong
    embeddings, and slowly.

    Example: the spec says attack(ally, enemy), the engine lists (attack, enemy, ally).

    Fix: list the slots in the order in which the spec declares them.
    """

    code = "E02"
    claims = ("E01", "E06", "E08")
    planted = {"swapped": SwappedAttack, "swapped_same_size": SwappedTrade}

    def start(self) -> None:
        self.orders: dict[int, set[Order]] = {}
        """By primary, the orders of slots in which all that was listed would be right."""
        self.outside: dict[int, int] = {}
        """By primary, how many of its tuples were outside the spec."""
        self.refused: dict[int, set[Action]] = {}
        self.asked: set[int] = set()
        """Primaries of which the engine has said that their tuples are right in some order."""

    def see(self, state: State) -> None:
        for primary in np.unique(state.lists.actions[~state.fits, 0]).tolist():
            self._suspect(primary)
        for answer in state.answers:
            if answer.refused:
                self._ask(answer)
        for primary, orders in self.orders.items():
            of_primary = state.lists.actions[:, 0] == primary
            mine = state.lists.actions[of_primary]
            self.outside[primary] += int((~state.fits[of_primary]).sum())
            limits = self.world.spec.limits[primary]
            for order in list(orders):
                turned = mine[:, [0, *order]]
                if ((turned < 0) | (turned >= limits)).any():
                    orders.discard(order)

    def _suspect(self, primary: int) -> None:
        if primary in self.world.spec.primaries and primary not in self.orders:
            self.orders[primary] = set(_orders(self.world.spec.slots))
            self.outside[primary], self.refused[primary] = 0, set()

    def _ask(self, answer: Answer) -> None:
        for primary in {action[0] for action in answer.refused}:
            self._suspect(primary)
            self.refused[primary].update(a for a in answer.refused if a[0] == primary)
            mine = [a for a in answer.listed if a[0] == primary][: len(answer.looked_at)]
            for order in list(self.orders[primary]):
                turned = [(primary, *(action[slot] for slot in order)) for action in mine]
                explain = self.world.spec.explain
                if any(explain(a) is not None or not answer.takes(a) for a in turned):
                    self.orders[primary].discard(order)

    def explains(self, left: Mapping[str, list[Symptom]]) -> Iterable[Symptom]:
        seen = {p: max(self.outside[p], len(self.refused[p])) for p in self.orders}
        if not any(orders and seen[p] >= ENOUGH for p, orders in self.orders.items()):
            return
        swapped = {p: min(orders) for p, orders in self.orders.items() if orders}
        # Where it could not be tried, it is taken for the same fault.
        untried = {n for n, p in self.world.spec.primaries.items() if len(p.slots) > 1}
        faulty = {*swapped, *(untried - self.orders.keys())}
        outside = {symptom.tuples[0][0] for symptom in left["E01"]}
        for code in self.claims:
            for symptom in left[code]:
                guilty = blamed(symptom, faulty if code == "E01" else faulty | outside) & faulty
                if guilty:
                    for primary in sorted(guilty & swapped.keys())[:1]:
                        symptom.message += self._words(primary, swapped[primary], code == "E01")
                    yield symptom

    def _words(self, primary: int, order: Order, outside: bool) -> str:
        name = self.world.spec.primaries[primary].name
        right = "within the spec" if outside else "legal"
        slots = ", ".join(f"sub{slot}" for slot in order)
        return (
            f"; with the slots of {name} in the order {slots} all of its listed tuples are {right}"
        )


def _orders(slots: int) -> Iterator[Order]:
    """All orders of slots 1 .. slots but the first; of many slots those that exchange two."""
    plain = tuple(range(1, slots + 1))
    if slots <= 4:
        yield from (order for order in permutations(plain) if order != plain)
        return
    for i, j in combinations(range(slots), 2):
        order = list(plain)
        order[i], order[j] = order[j], order[i]
        yield tuple(order)
