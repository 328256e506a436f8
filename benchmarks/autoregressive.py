"""The autoregressive head against its floor, on states of Essence Wars, encoder not included.

The floor is what no head that draws value by value from the packed list can leave out: the state's
layer, at each slot the mask of what continues the prefix, products with the keys, gathers, softmax
and one draw, what was chosen added to the context; and the way back. It knows beforehand where
everything lies: which choices belong to which prefix, what each of them is, which was drawn.

    python benchmarks/autoregressive.py             # a few minutes
    python benchmarks/autoregressive.py --quick     # about one
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import measure
import torch
from end_to_end import SETTINGS, record
from torch import Tensor

import tcg_flatpolicy as fp
from tcg_flatpolicy.games.essence_wars import SPEC, EssenceWarsEncoder

BATCHES = (256, 2048, 8192)
TARGET = 1.5


class Kind(NamedTuple):
    """Of one kind of choice (learned rows, or entities of a name) at a slot."""

    choices: Tensor
    """(k,) which of the slot's choices."""
    prefixes: Tensor
    """(k,) whose they are."""
    keys_at: Tensor
    """(k,) where their keys lie."""
    chosen_rows: Tensor
    """Rows that chose one of this kind."""
    chosen_at: Tensor
    """Where what they chose lies."""


class SlotIndex(NamedTuple):
    """Where everything lies at one slot of a path."""

    mask_at: Tensor
    """(n,) what the legal tuples that go on set in the mask."""
    mask_size: int
    prefixes: Tensor
    """(k,) of each choice."""
    values: Tensor
    """(k,) of each choice."""
    drawn: Tensor
    """(B,) which of the choices was drawn."""
    ends: Tensor
    """(B,) the last choice of each prefix."""
    kinds: list[Kind]


def index_path(head: fp.AutoregressiveHead, legal: fp.LegalActions, actions: Tensor) -> list[Any]:
    """Where everything lies along drawn tuples (B, H); every row has a legal tuple."""
    batch = len(legal)
    groups, listed = legal.rows, legal.actions
    primaries = actions[:, 0]
    path = []
    for slot, size in enumerate(SPEC.nvec.tolist()):
        at = groups * size + listed[:, slot]
        choices = torch.unique(at)
        prefixes, values = choices // size, choices % size
        drawn = torch.searchsorted(choices, torch.arange(batch) * size + actions[:, slot])
        ends = torch.bincount(prefixes, minlength=batch).cumsum(0) - 1
        kinds = []
        if slot:
            own = head.slot(slot)
            ranges = head.addresses.look_up_slot(primaries[prefixes], slot - 1, values)
            of_rows = head.addresses.look_up_slot(primaries, slot - 1, actions[:, slot])
            place = values + own.offset[ranges]
            of_row = actions[:, slot] + own.offset[of_rows]
            for number, kind in enumerate(own.kinds):
                some = (own.kind[ranges] == number).nonzero()[:, 0]
                rows = (own.kind[of_rows] == number).nonzero()[:, 0]
                things = 0 if kind.name is None else head.entity_sizes[kind.name][0]
                kinds.append(
                    Kind(
                        some,
                        prefixes[some],
                        prefixes[some] * things + place[some],
                        rows,
                        rows * things + of_row[rows],
                    )
                )
        path.append(SlotIndex(at, batch * size, prefixes, values, drawn, ends, kinds))
        goes_on = actions[groups, slot] == listed[:, slot]
        groups, listed = groups[goes_on], listed[goes_on]
    return path


def floor(
    head: fp.AutoregressiveHead,
    hidden: Tensor,
    entities: dict[str, Tensor],
    primaries: Tensor,
    path: list[SlotIndex],
    drawing: bool,
) -> Tensor:
    """Log-probs and entropies of the path, added up."""
    context = head.state(hidden)
    things = {name: rows.flatten(0, 1) for name, rows in entities.items()}
    log_prob, entropy = [], []
    for slot, at in enumerate(path):
        mask = torch.zeros(at.mask_size, dtype=torch.bool)
        mask.index_fill_(0, at.mask_at, True).nonzero()
        if slot == 0:
            every = context.relu() @ head.primary_keys.t()
            logits = every.flatten().index_select(0, at.prefixes * every.shape[1] + at.values)
        else:
            own = head.slot(slot)
            query = (context + head.primary_rows[slot - 1].index_select(0, primaries)).relu()
            logits = query.new_zeros(len(at.prefixes))
            names = [kind.name for kind in own.kinds]
            for kind, name, keys in zip(at.kinds, names, own.keys, strict=True):
                table, queries = (keys, query) if name is None else (things[name], query @ keys)
                products = queries.index_select(0, kind.prefixes) * table.index_select(
                    0, kind.keys_at
                )
                logits = logits.index_copy(0, kind.choices, products.sum(1))
            for kind, name, rows in zip(at.kinds, names, own.rows, strict=False):
                if name is None:
                    added = rows.index_select(0, kind.chosen_at)
                else:
                    added = things[name].index_select(0, kind.chosen_at) @ rows
                context = context.index_add(0, kind.chosen_rows, added)
        mass = logits.exp()
        totals = torch.zeros(len(hidden)).index_add(0, at.prefixes, mass)
        logits = logits - totals.log().index_select(0, at.prefixes)
        log_prob.append(logits.index_select(0, at.drawn))
        entropy.append(torch.zeros(len(hidden)).index_add(0, at.prefixes, mass * logits))
        if drawing:
            running = mass.cumsum(0)
            torch.searchsorted(running, torch.rand(len(hidden)) * running.index_select(0, at.ends))
    return torch.stack(log_prob).sum(0) + torch.stack(entropy).sum(0)


def contenders(batch: int) -> dict[str, Callable[[int], Any]]:
    """Ours and the floor, drawing and learning, on recorded states."""
    layout, kept = record(2 * batch // SETTINGS.num_games)
    states = list(torch.cat(kept).split(batch))
    torch.manual_seed(SETTINGS.seed)
    policy = fp.Policy(
        spec=SPEC,
        layout=layout,
        head="autoregressive",
        encoder=EssenceWarsEncoder(layout, SETTINGS.hidden_size, SETTINGS.entity_size),
    )
    head: Any = policy.head
    prepared = []
    for observations in states:
        with torch.no_grad():
            legal = layout.read(observations).distinct()
            hidden, entities = policy.encoder(observations)
            actions = head(hidden, entities, legal).sample()
        hidden.requires_grad_()
        entities = {name: rows.detach().requires_grad_() for name, rows in entities.items()}
        path = index_path(head, legal, actions)
        prepared.append((hidden, entities, legal, actions, path))

    @torch.no_grad()
    def draw(call: int) -> None:
        hidden, entities, legal, _, _ = prepared[call % len(prepared)]
        distribution = head(hidden, entities, legal)
        drawn = distribution.sample()
        distribution.log_prob(drawn)
        distribution.path_entropy(drawn)

    def learn(call: int) -> None:
        hidden, entities, legal, actions, _ = prepared[call % len(prepared)]
        distribution = head(hidden, entities, legal)
        total = distribution.log_prob(actions) + distribution.path_entropy(actions)
        total.mean().backward()

    @torch.no_grad()
    def draw_floor(call: int) -> None:
        hidden, entities, _, actions, path = prepared[call % len(prepared)]
        floor(head, hidden, entities, actions[:, 0], path, drawing=True)

    def learn_floor(call: int) -> None:
        hidden, entities, _, actions, path = prepared[call % len(prepared)]
        floor(head, hidden, entities, actions[:, 0], path, drawing=False).mean().backward()

    return {"draw": draw, "update": learn, "draw, floor": draw_floor, "update, floor": learn_floor}


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about a minute; wider spreads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, figures = [], {}
    for batch in BATCHES:
        times = measure.interleave(contenders(batch), 15 if arguments.quick else 60)
        for phase in ("draw", "update"):
            ratio = measure.figure(times[phase] / times[f"{phase}, floor"])
            met = "yes" if ratio.median <= TARGET else "NO"
            line = [f"{batch:,}", phase, measure.number(ratio.median), ratio.spread, met]
            rows.append(line)
            figures[f"{phase} {batch}"] = ratio._asdict()
    body = "# The autoregressive head, times its floor\n\n" + measure.table(
        ["batch", "", "times the floor", "middle 80%", f"at most {TARGET}"], rows
    )
    measure.write("autoregressive", body, figures)


if __name__ == "__main__":
    main()
