"""The autoregressive head: first the primary, then each slot given what was drawn before it.

Shapes: B rows, D hidden size, E embedding size, W width; at each slot G prefixes and n choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tcg_flatpolicy.heads.base import Head
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.operators import wide
from tcg_flatpolicy.packing import distinct
from tcg_flatpolicy.scorer import check_encoding, check_entities, fan_in
from tcg_flatpolicy.sequential import LegalAutoregressive
from tcg_flatpolicy.spec import ActionSpec, Part
from tcg_flatpolicy.table import Addresses, Derived, features_of, part_names, primary_names


class AutoregressiveHead(Head):
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

        self.addresses = Addresses(spec)
        primaries, slots = len(self.addresses.ids), spec.slots
        self.state = nn.Linear(hidden_size, width)
        # Read at each slot, so that each sees the state in its own way; the first by the bias.
        self.primary_rows = None
        if slots:
            self.primary_rows = nn.Parameter(torch.randn(slots, primaries, width) / width**0.5)
        # Keys are small at first, so that the policy starts near uniform. No parameter is named
        # weight: PufferLib's LSTMWrapper would set it anew, for a policy that starts sure.
        self.primary_keys = nn.Parameter(torch.randn(primaries, width) * 0.1 / width**0.5)
        self._slots = nn.ModuleList(
            _Slot(spec, self.addresses, slot, self.entity_sizes, width) for slot in range(slots)
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
        conditionals = _Attention(self, self._state(hidden), entities, legal)
        return LegalAutoregressive(legal, conditionals, self.spec.nvec.tolist())

    def _state(self, hidden: Tensor) -> Tensor:
        return wide(self.state(hidden.to(self.state.weight.dtype)))

    def padded(
        self, hidden: Tensor, entities: Mapping[str, Tensor], tuples: Tensor, listed: Tensor
    ) -> Tensor:
        """The log-prob of each padded tuple, (B, K), slot after slot; as Head.padded."""
        places = self.addresses.places(tuples[..., 0])
        ranges = self.addresses.look_up(places, tuples[..., 1:])  # (B, K, slots)
        context = self._state(hidden).unsqueeze(1)  # (B, 1, W), from the second slot on (B, K, W)
        every = context.squeeze(1).relu() @ self.primary_keys.t()  # (B, P)
        logits = [every.gather(1, places)]
        for slot in range(1, 1 + self.spec.slots):
            own = self.slot(slot)
            assert self.primary_rows is not None
            query = (context + self.primary_rows[slot - 1][places]).relu()  # (B, K, W)
            at = ranges[..., slot - 1]
            logit, added = torch.zeros_like(query[..., 0]), torch.zeros_like(query)
            for number, kind in enumerate(own.kinds):
                chosen = own.kind[at] == number
                place = torch.where(chosen, tuples[..., slot] + own.offset[at], 0)
                if kind.name is None:
                    keys = own.vectors(number, own.keys[kind.weights])[place]
                    dot = (query * keys).sum(2)
                else:
                    pointed = of_row(entities[kind.name].to(query.dtype), place)  # (B, K, E)
                    dot = ((query @ own.keys[kind.weights]) * pointed).sum(2)
                logit = torch.where(chosen, dot, logit)
                if slot < self.spec.slots:
                    learned = own.rows[kind.weights]
                    row = pointed @ learned if kind.name else own.vectors(number, learned)[place]
                    added = torch.where(chosen.unsqueeze(2), row, added)
            logits.append(logit)
            context = context + added

        # The head's prior counts the tuples behind a value, so its sum over the values that
        # continue a prefix is one over the tuples that share the prefix.
        log_prob = torch.zeros_like(logits[0])
        together = listed.unsqueeze(1).expand(-1, listed.shape[1], -1)  # (B, K, K)
        for logit, same in zip(logits, same_so_far(tuples), strict=True):
            # Of differences, so that large logits take no digits from the log-prob.
            ahead = logit.unsqueeze(1) - logit.unsqueeze(2)  # (B, K, K)
            among = ahead.masked_fill(~together, -torch.inf).logsumexp(2)
            together = same & listed.unsqueeze(1)
            log_prob = log_prob + together.sum(2).to(logit.dtype).log() - among
        return log_prob

    def named_axes(self) -> dict[str, tuple[Any, ...]]:
        """What the rows of parameters are of; see :mod:`tcg_flatpolicy.saving`."""
        primaries, names = primary_names(self.spec), part_names(self.spec)
        found: dict[str, tuple[Any, ...]] = {"primary_keys": ("primary_keys", primaries, None)}
        if self.primary_rows is not None:
            slots = {f"slot {slot + 1}": 1 for slot in range(self.spec.slots)}
            found["primary_rows"] = ("primary_rows", slots, primaries, None)
        for slot in range(self.spec.slots):
            here = [part for part in self.spec.parts if part.slot == slot]
            rows = {names[part]: part.role.rows for part in here if not part.role.encoded}
            entities = sorted({part.role.name for part in here if part.role.encoded})
            kinds: list[tuple[str, tuple[Any, ...]]] = [("numbers", (rows, None))] * bool(rows)
            kinds += [(repr(name), (None, None)) for name in entities]
            for place, (kind, axes) in enumerate(kinds):
                for of in ("keys", "rows") if slot + 1 < self.spec.slots else ("keys",):
                    at = f"_slots.{slot}.{of}"
                    found[f"{at} of {kind}"] = (f"{at}.{place}", *axes)
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name, dim in (("primary_keys", 0), ("primary_rows", 1)):
            rows = state_dict.get(prefix + name)
            if rows is not None:  # once each id up to the largest had a row
                state_dict[prefix + name] = self.addresses.of_declared(rows, dim)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Kind(NamedTuple):
    """What can stand in a slot: learned rows, features that weigh some, or entities of a name."""

    name: str | None
    """Of the entities; None of learned ones."""
    weights: int
    """Which of the slot's parameters."""
    begin: int = 0
    rows: int = 0
    """Where the rows that features weigh begin among the learned ones, and how many; or 0."""


class _Slot(Derived):
    """The parameters of a slot, and where each (primary, value) finds its own.

    Attributes:
        kinds: what can stand there.
        kind: (ranges,) which of the kinds a range of values is; -1 for none here.
        offset: (ranges,) what to add to a value for its row, thing or features.
        keys: of each parameter (rows, W) or, for entities, what a query is read by, (W, E).
        rows: what is added once it is chosen, (rows, W) or (E, W).
    """

    kind: Tensor
    offset: Tensor

    def __init__(
        self,
        spec: ActionSpec,
        addresses: Addresses,
        slot: int,
        entity_sizes: Mapping[str, tuple[int, int]],
        width: int,
    ) -> None:
        super().__init__()
        parts = [part for part in spec.parts if part.slot == slot]
        names = sorted({part.role.name for part in parts if part.role.encoded})
        learned = [part for part in parts if not part.role.encoded]
        self.kinds = [_Kind(None, 0)] * bool(learned)
        self.kinds += [_Kind(name, place) for place, name in enumerate(names, len(self.kinds))]
        kind: dict[Part, int] = {}
        offset: dict[Part, int] = {}
        total = 0
        for part in parts:
            kind[part], offset[part] = 0, -part.start
            if part.role.encoded:
                kind[part] = bool(learned) + names.index(part.role.name)
                continue
            features = features_of(part.role)
            if features is None:
                offset[part] += total
            else:
                kind[part] = len(self.kinds)
                self.derive(f"features{len(self.kinds)}", features.numpy())
                self.kinds.append(_Kind(None, 0, total, part.role.rows))
            total += part.role.rows
        self.derive("kind", addresses.tabulate(kind, -1))
        self.derive("offset", addresses.tabulate(offset))
        sizes = [None] * bool(learned) + [entity_sizes[name][1] for name in names]
        self.keys = nn.ParameterList(
            torch.randn(total, width) * 0.1 / width**0.5 if e is None else fan_in(width, e) * 0.1
            for e in sizes
        )
        last = slot + 1 == spec.slots  # nothing follows what is chosen there
        self.rows = nn.ParameterList(
            torch.randn(total, width) / width**0.5 if e is None else fan_in(e, width)
            for e in ([] if last else sizes)
        )

    def vectors(self, number: int, learned: Tensor) -> Tensor:
        """The vectors of a learned kind, (n, W), of learned rows."""
        kind = self.kinds[number]
        if not kind.rows:
            return learned
        features = self.get_buffer(f"features{number}").to(learned.dtype)
        return features @ learned[kind.begin : kind.begin + kind.rows]


class _Rows:
    """The rows of a parameter that legal tuples hold, as they are now.

    An optimizer may write over the parameter before the rows are asked for. All of it is copied if
    it is small, else the rows that are held.
    """

    def __init__(self, parameter: Tensor, held: Tensor | None, dtype: torch.dtype) -> None:
        self.found: Tensor | None = None
        if held is not None and len(parameter) > 1024 + 4 * len(held):
            # One at least, for tuples that are not listed.
            self.found, _ = distinct(torch.cat([held, held.new_zeros(1)]), len(parameter))
            parameter = parameter.index_select(0, self.found)
        self.rows = parameter.to(dtype, copy=True)

    def take(self, place: Tensor) -> Tensor:
        """(n,) places -> (n, W); of one that is not held, any row."""
        if self.found is not None:
            place = torch.searchsorted(self.found, place).clamp(max=len(self.found) - 1)
        return self.rows.index_select(0, place)


class _Attention:
    """The conditionals of a batch of states: all that they take is bound when they are made."""

    def __init__(
        self,
        head: AutoregressiveHead,
        state: Tensor,
        entities: Mapping[str, Tensor],
        legal: LegalActions,
    ) -> None:
        self.head = head
        self.state = state  # (B, W)
        dtype = state.dtype
        self.things = {
            # Of one row they may be the encoder's own weights.
            name: entities[name].flatten(0, 1).to(dtype, copy=len(legal) == 1)
            for name in head.spec.entity_names
        }  # (B * n, E)
        places = head.addresses.places(legal.actions[:, 0])
        self.primary_keys = _Rows(head.primary_keys, places, dtype)
        self.primary_rows: list[_Rows] = []
        self.keys: list[list[_Rows]] = []
        self.rows: list[list[_Rows]] = []
        for slot in range(1, 1 + head.spec.slots):
            own = head.slot(slot)
            assert head.primary_rows is not None
            self.primary_rows.append(_Rows(head.primary_rows[slot - 1], places, dtype))
            held = places.new_zeros(0)
            if any(len(learned) > 1024 for learned in own.keys):
                values = legal.actions[:, slot]
                at = head.addresses.look_up_slot(places, slot - 1, values)
                plain = (own.kind.index_select(0, at) == 0).nonzero().squeeze(1)
                held = (values + own.offset.index_select(0, at)).index_select(0, plain)
            for bound, weights in ((self.keys, own.keys), (self.rows, own.rows)):
                bound.append(self._bind(own, weights, held))

    def _bind(self, own: _Slot, weights: nn.ParameterList, held: Tensor) -> list[_Rows]:
        """The rows of each kind in a slot; of entities, their projection as it is."""
        if not len(weights):
            return []
        dtype = self.state.dtype
        found: list[_Rows] = []
        for number, kind in enumerate(own.kinds):
            learned = weights[kind.weights]
            if kind.rows:
                features = own.get_buffer(f"features{number}").to(learned.dtype)
                learned = learned[kind.begin : kind.begin + kind.rows]
                found.append(_Mixed(learned, None, dtype, features))
            else:
                found.append(_Rows(learned, held if kind.name is None else None, dtype))
        return found

    def start(self) -> Tensor:
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
        addresses = self.head.addresses
        groups, values = choices.rows, choices.actions[:, 0]
        prior = behind.to(context.dtype).log()
        if slot == 0:
            query, keys = context.relu(), self.primary_keys.take(addresses.places(values))
            return prior + (query.index_select(0, groups) * keys).sum(1)
        places = addresses.places(primaries)
        query = (context + self.primary_rows[slot - 1].take(places)).relu()  # (G, W)
        logits = query.new_zeros(len(groups))
        at = addresses.look_up_slot(places.index_select(0, groups), slot - 1, values)
        for name, keys_of, chosen, place in self._split(slot, at, values, self.keys):
            group = groups.index_select(0, chosen)
            if name is None:
                queries, pointed = query, keys_of.take(place)
            else:
                queries = query @ keys_of.rows  # (G, E)
                pointed = self._pointed(name, rows.index_select(0, group), place)
            scores = (queries.index_select(0, group) * pointed).sum(1)
            logits = logits.index_copy(0, chosen, scores)
        return prior + logits

    def extend(
        self, slot: int, context: Tensor, rows: Tensor, primaries: Tensor, values: Tensor
    ) -> Tensor:
        if slot == 0:
            return context  # a primary has a row for each slot, added when that is read
        addresses = self.head.addresses
        at = addresses.look_up_slot(addresses.places(primaries), slot - 1, values)
        for name, chosen_rows, chosen, place in self._split(slot, at, values, self.rows):
            if name is None:
                added = chosen_rows.take(place)
            else:
                pointed = self._pointed(name, rows.index_select(0, chosen), place)
                added = pointed @ chosen_rows.rows
            context = context.index_add(0, chosen, added)
        return context

    def _split(
        self, slot: int, at: Tensor, values: Tensor, weights: list[list[_Rows]]
    ) -> Iterator[tuple[str | None, _Rows, Tensor, Tensor]]:
        """Of each kind in a slot: its name, its rows, which values are of it, and their places."""
        own = self.head.slot(slot)
        kinds = own.kind.index_select(0, at)
        places = values + own.offset.index_select(0, at)
        for number, kind in enumerate(own.kinds):
            chosen = (kinds == number).nonzero().squeeze(1)
            yield kind.name, weights[slot - 1][number], chosen, places.index_select(0, chosen)

    def _pointed(self, name: str, rows: Tensor, place: Tensor) -> Tensor:
        """(n, E): the things of a name at places of rows."""
        things = rows * self.head.entity_sizes[name][0] + place
        return self.things[name].index_select(0, things)


class _Mixed(_Rows):
    """The vectors of values that features weigh learned rows for."""

    def __init__(
        self, parameter: Tensor, held: Tensor | None, dtype: torch.dtype, features: Tensor
    ) -> None:
        super().__init__(parameter, held, dtype)
        self.features = features.to(dtype)

    def take(self, place: Tensor) -> Tensor:
        return self.features.index_select(0, place) @ self.rows


def same_so_far(tuples: Tensor) -> list[Tensor]:
    """For each slot, whether two places (B, K, K) have the same values up to and with it."""
    found: list[Tensor] = []
    for values in tuples.unbind(2):
        same = values.unsqueeze(2) == values.unsqueeze(1)
        found.append(same & found[-1] if found else same)
    return found


def of_row(table: Tensor, at: Tensor) -> Tensor:
    """(B, n, E) rows and (B, K) numbers of them -> (B, K, E)."""
    begins = torch.arange(table.shape[0], device=table.device) * table.shape[1]
    return table.flatten(0, 1)[begins.unsqueeze(1) + at]
