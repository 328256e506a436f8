"""The autoregressive head: first the primary, then each slot given what was drawn before it.

Shapes: B rows, D hidden size, E embedding size, W width; at each slot G prefixes and n choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tcg_flatpolicy.sequential import LegalAutoregressive
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.scorer import check_encoding, check_entities, fan_in
from tcg_flatpolicy.spec import ActionSpec


class AutoregressiveHead(nn.Module):
    """logit(value | state, values before) = relu(state + what was chosen) . key + log(behind).

    ``behind`` is how many legal tuples go on with the value, so that the untrained head is near
    uniform over the list, as the flat one is, and not over primaries, which ends many a turn early.

    The key of a thing that an Entity points at is its embedding under a projection of the slot
    (attention over those things); the key of an Index is a learned row of its (primary, slot), so
    its logits are plain ones. A OneOf has both. Which it is follows the primary that was drawn, or,
    for a stored tuple, the primary of that tuple. What was chosen is added to the state likewise:
    learned rows for the primary and for an Index, a projected embedding for an Entity.

    The cost of a draw grows with the number of slots and of values next to the drawn path, not
    with the number of legal tuples. The trainer's entropy is `LegalAutoregressive.path_entropy`, a
    one-sample estimate, unless ``exact_entropy``. What speaks of whole tuples (the mode and
    fp.Greedy, exploration) scores every prefix of the list.

    Args:
        spec: what tuples mean.
        hidden_size: D, of the state.
        entity_sizes: {name: (n, E)}, what the encoder embeds: n rows of size E.
        width: W, of the layer that is read.
        exact_entropy: let the trainer have the entropy over the whole legal list, for which each
            prefix of a listed tuple is scored: about twice the time for lists of a dozen tuples,
            and more than scoring each tuple as a whole for long ones.

    Raises:
        ValueError: an Entity of the spec that the encoder does not embed, or too few rows of it.
    """

    def __init__(
        self,
        spec: ActionSpec,
        hidden_size: int,
        entity_sizes: Mapping[str, tuple[int, int]] | None = None,
        width: int = 64,
        exact_entropy: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.hidden_size = hidden_size
        self.entity_sizes = dict(entity_sizes or {})
        self.path_entropy = not exact_entropy
        check_entities(spec, self.entity_sizes)

        ids, slots = spec.limits.shape[0], spec.slots
        self.state = nn.Linear(hidden_size, width)
        # Read at each slot, so that each sees the state in its own way; the first by the bias.
        self.primary_rows = None
        if slots:
            self.primary_rows = nn.Parameter(torch.randn(slots, ids, width) / width**0.5)
        # Keys are small at first, so that the policy starts near uniform. No parameter is named
        # weight: PufferLib's LSTMWrapper would set it anew, for a policy that starts sure.
        self.primary_keys = nn.Parameter(torch.randn(ids, width) * 0.1 / width**0.5)
        self._slots = nn.ModuleList(
            _Slot(spec, slot, self.entity_sizes, width) for slot in range(slots)
        )

    def slot(self, slot: int) -> _Slot:
        """The parameters of a slot, 1 .. H-1."""
        return cast(_Slot, self._slots[slot - 1])

    def forward(
        self, hidden: Tensor, entities: Mapping[str, Tensor], legal: LegalActions
    ) -> LegalAutoregressive:
        """Hidden (B, D), {name: (B, n, E)}, B legal lists -> the distribution.

        Raises:
            ValueError: hidden, an entity or the tuples have another shape than declared.
        """
        check_encoding(self.spec, hidden, self.hidden_size, entities, self.entity_sizes, legal)
        conditionals = _Attention(self, self.state(hidden).float(), entities)
        return LegalAutoregressive(legal, conditionals, self.spec.nvec.tolist())


class _Slot(nn.Module):
    """The parameters of a slot, and where each (primary, value) finds its own."""

    places: Tensor

    def __init__(
        self, spec: ActionSpec, slot: int, entity_sizes: Mapping[str, tuple[int, int]], width: int
    ) -> None:
        super().__init__()
        parts = [part for part in spec.parts if part.slot == slot]
        self.values = int(spec.nvec[1 + slot])
        # The kinds of things that stand in this slot: entities of a name, or (None) learned rows.
        entities = sorted({p.role.name for p in parts if p.role.encoded})
        learned = [part for part in parts if not part.role.encoded]
        self.names: list[str | None] = [None, *entities] if learned else [*entities]
        # Of each (primary, value), by kind: which row or thing it is; -1 for none of that kind.
        places = np.full((len(self.names), spec.limits.shape[0], self.values), -1, np.int64)
        row = 0
        for part in parts:
            numbers = np.arange(part.role.size)
            kind = 0
            if part.role.encoded:
                kind = self.names.index(part.role.name)
            else:
                numbers += row
                row += part.role.size
            places[kind, part.primary, part.start : part.start + part.role.size] = numbers
        self.register_buffer("places", torch.as_tensor(places).flatten(1), persistent=False)
        # Of each kind: its keys, (rows, W) or, for entities, what a query is read by, (W, E); and
        # what is added once it is chosen, (rows, W) or (E, W).
        sizes = [None if name is None else entity_sizes[name][1] for name in self.names]
        self.keys = nn.ParameterList(
            torch.randn(row, width) * 0.1 / width**0.5 if e is None else fan_in(width, e) * 0.1
            for e in sizes
        )
        last = slot + 1 == spec.slots  # nothing follows what is chosen there
        self.rows = nn.ParameterList(
            torch.randn(row, width) / width**0.5 if e is None else fan_in(e, width)
            for e in ([] if last else sizes)
        )


class _Attention:
    """The conditionals of a batch of states: a head's parameters with what an encoder gave."""

    def __init__(
        self, head: AutoregressiveHead, state: Tensor, entities: Mapping[str, Tensor]
    ) -> None:
        self.head = head
        self.state = state  # (B, W)
        self.versions = [parameter._version for parameter in head.parameters()]
        self.things = {
            name: entities[name].flatten(0, 1).float() for name in head.spec.entity_names
        }  # (B * n, E)

    def start(self) -> Tensor:
        # Weights are read when they are asked for, and the state was read before.
        if self.versions != [parameter._version for parameter in self.head.parameters()]:
            raise RuntimeError(
                "the head's weights have changed since this distribution was made, so it can no "
                "longer be asked: ask before the optimizer's step, or keep enumerated()"
            )
        return self.state

    def logits(
        self,
        slot: int,
        context: Tensor,
        rows: Tensor,
        primaries: Tensor,
        choices: LegalActions,
        behind: Tensor,
    ) -> Tensor:
        head = self.head
        groups, values = choices.rows, choices.actions[:, 0]
        prior = behind.to(context.dtype).log()
        if slot == 0:
            every = context.relu() @ head.primary_keys.t()  # (G, ids)
            return prior + every.flatten().index_select(0, groups * every.shape[1] + values)
        own = head.slot(slot)
        assert head.primary_rows is not None
        offsets = head.primary_rows[slot - 1].index_select(0, primaries)
        query = (context + offsets).relu()  # (G, W)
        at = primaries.index_select(0, groups) * own.values + values
        logits = query.new_zeros(len(at))
        for place, name, keys in zip(
            own.places.index_select(1, at), own.names, own.keys, strict=True
        ):
            chosen = (place >= 0).nonzero().squeeze(1)
            place, group = place.index_select(0, chosen), groups.index_select(0, chosen)
            if name is None:
                queries = query
            else:
                queries = query @ keys  # (G, E)
                place = rows.index_select(0, group) * head.entity_sizes[name][0] + place
                keys = self.things[name]
            scores = (queries.index_select(0, group) * keys.index_select(0, place)).sum(1)
            logits = logits.index_copy(0, chosen, scores)
        return prior + logits

    def extend(
        self, slot: int, context: Tensor, rows: Tensor, primaries: Tensor, values: Tensor
    ) -> Tensor:
        if slot == 0:
            return context  # a primary has a row for each slot, added when that is read
        head = self.head
        own = head.slot(slot)
        at = primaries * own.values + values
        for place, name, learned in zip(
            own.places.index_select(1, at), own.names, own.rows, strict=True
        ):
            chosen = (place >= 0).nonzero().squeeze(1)
            place = place.index_select(0, chosen)
            if name is None:
                added = learned.index_select(0, place)
            else:
                things = rows.index_select(0, chosen) * head.entity_sizes[name][0] + place
                added = self.things[name].index_select(0, things) @ learned
            context = context.index_add(0, chosen, added)
        return context
