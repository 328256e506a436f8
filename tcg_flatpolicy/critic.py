"""A value that sees more than the policy does: hidden cards, in training only.

Shapes: B rows, D hidden size, F numbers in the fields that the value alone sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tcg_flatpolicy.encoders.base import columns_of, numbers_of
from tcg_flatpolicy.fields import resolve
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.table import Derived


class Critic(Derived):
    """value = layers of the policy's hidden and of fields that the policy does not see.

    Args:
        layout: has the fields.
        names: of the fields; those of the legal list raise a ValueError.
        hidden_size: D.
    """

    seen: Tensor

    def __init__(self, layout: LegalLayout, names: Sequence[str], hidden_size: int) -> None:
        super().__init__()
        self.layout, self.fields = layout, [layout.find(name) for name in names]
        for field in self.fields:
            if layout.is_legal_list(field):
                raise ValueError(
                    f"critic_only names {field.name!r}, by which the policy knows what is legal"
                )
        record = np.ones(1, np.dtype((np.uint8, layout.dtype.itemsize)))
        for name in names:
            resolve(record.view(layout.dtype)[:, 0], name)[...] = 0
        self.derive("seen", record[0] != 0)
        numbers = sum(field.numbers for field in self.fields)
        first = nn.Linear(hidden_size + numbers, hidden_size)
        self.net = nn.Sequential(first, nn.ReLU(), nn.Linear(hidden_size, 1))

    def forward(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Hidden (B, D), observations (B, columns) -> (B, 1); NaN without observations."""
        if rows is None:
            return hidden.new_full((hidden.shape[0], 1), math.nan)
        numbers = numbers_of(self.layout, self.fields, rows, hidden.dtype)
        value: Tensor = self.net(torch.cat([hidden, numbers], 1))
        return value

    def hide(self, rows: Tensor) -> Tensor:
        """Observations (B, columns) with 0 in the place of the fields."""
        return torch.where(self.seen.view(rows.shape[1], -1).all(1), rows, 0)

    def named_axes(self) -> dict[str, tuple[Any, ...]]:
        """What the columns of the first layer are of; see :mod:`tcg_flatpolicy.saving`."""
        size = self.net[2].get_parameter("weight").shape[1]
        columns = {"hidden": size, **columns_of(self.fields)}
        return {"net.0.weight": ("net.0.weight", None, columns)}


@torch.no_grad()
def critic_only_leaks(policy: Any, observations: Tensor) -> list[str]:
    """The fields of ``critic_only`` by which log-probs or memory change; [] where none does.

    Each row gets the field of another row, and nothing else.

    Args:
        policy: an ActorCritic.
        observations: (B, columns) bytes of real states, whose fields differ between rows.

    Raises:
        ValueError: a field is the same in all rows, which shows nothing.
    """
    training = policy.training
    policy.eval()
    try:
        before, leaks = _decisions(policy, observations), []
        for name in policy.critic_only:
            changed = observations.clone()
            field = resolve(changed.numpy().view(policy.layout.dtype)[:, 0], name)
            other = field[torch.arange(len(field)).roll(1).numpy()]
            if (other == field).all():
                raise ValueError(f"{name!r} is the same in all rows; take states that differ in it")
            field[...] = other
            after = _decisions(policy, changed)
            if not all(torch.equal(one, two) for one, two in zip(before, after, strict=True)):
                leaks.append(name)
        return leaks
    finally:
        policy.train(training)


def _decisions(policy: Any, rows: Tensor) -> list[Tensor]:
    """The log-prob of each listed tuple, and what the memory carries."""
    decided, legal = policy.run(rows), policy.layout.read_distinct(rows)
    last = (legal.starts + legal.counts - 1).clamp(min=0)
    log_probs = [
        decided.distribution.log_prob(
            torch.where(
                (legal.counts > 0).unsqueeze(1),
                legal.actions[
                    torch.minimum(legal.starts + place, last).clamp(max=len(legal.rows) - 1)
                ],
                legal.noop,
            )
        )
        for place in range(int(legal.counts.max()))
    ]
    return [*log_probs, *decided.carried]
