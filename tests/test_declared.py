"""Encoders by declaration: against sums written out by hand, in files, growing, and in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pufferlib.vector
import pytest
import torch
from torch import Tensor

import tcg_flatpolicy as fp
from tcg_flatpolicy.encoders import Cards, Category, Declared, Entities, Number
from tcg_flatpolicy.table import as_tensors
from tests.games import CARDS, UNITS, Bandit
from tests.test_recorded import RECORDED

UNIT = np.dtype([("hp", "i2"), ("stats", "u1", 2), ("kind", "u1"), ("card", "u2"), ("alive", "?")])


def layout_of(units: int = 3, hand: int = 4) -> fp.LegalLayout:
    dtype = np.dtype(
        [
            ("life", "i2", 2),
            ("phase", "u1"),
            ("seals", "u1", 2),
            ("hand", "u2", hand),
            ("mine", UNIT, units),
            ("other", UNIT, units),
            ("n", "u1"),
            ("legal", "u1", (6, 3)),
        ]
    )
    return fp.LegalLayout.from_dtype(dtype, "n", "legal")


def units_of(name: str, units: int, kinds: int, cards: int, pool: Any) -> Entities:
    return Entities(
        name,
        units,
        Number(f"{name}.hp", scale=10),
        Category(f"{name}.kind", kinds),
        Cards(f"{name}.card", cards),
        Number(f"{name}.stats"),
        present=f"{name}.alive",
        pool=pool,
        places=True,
        kind="unit",
    )


def declared(
    units: int = 3, kinds: int = 4, cards: int = 9, attention: bool = False, pool: Any = "flat"
) -> Declared:
    return Declared(
        layout_of(units),
        Number("life", scale=30),
        Category("phase", 3),
        Category("seals", 5),
        Cards("hand", cards),
        units_of("mine", units, kinds, cards, pool),
        units_of("other", units, kinds, cards, "mean"),
        Entities("hand", 4, Cards("hand", cards), pool="none"),
        hidden_size=16,
        entity_size=8,
        attention=attention,
        in_slots=["cards"],
    )


def states(layout: fp.LegalLayout, rows: int = 5) -> Tensor:
    random = np.random.default_rng(3)
    observations = np.zeros((rows, layout.dtype.itemsize), np.uint8)
    records = observations.view(layout.dtype)[:, 0]
    records["life"] = random.integers(-5, 30, records["life"].shape)
    for name, top in (("phase", 3), ("seals", 5), ("hand", 9)):
        records[name] = random.integers(0, top, records[name].shape)
    for side in ("mine", "other"):
        for name, top in (("hp", 40), ("stats", 9), ("kind", 4), ("card", 9), ("alive", 2)):
            records[side][name] = random.integers(0, top, records[side][name].shape)
    records["other"]["alive"][0] = False
    layout.write(observations, [[(0, 0, 0), (1, 1, 2), (1, 2, 5), (2, 7, 1)]] * rows)
    return torch.from_numpy(observations)


def shaken(module: Any) -> Any:
    torch.manual_seed(5)
    with torch.no_grad():
        for weights in module.parameters():
            weights.add_(torch.randn_like(weights) * 0.3)
        for name, table in getattr(module, "tables", {}).items():
            if name == "cards":
                table.weight[0] = 0  # no card
    return module


def by_hand(encoder: Declared, row: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden and entities of one record, number by number."""
    tables = {name: table.weight for name, table in encoder.tables.items()}
    columns = [torch.tensor(row["life"] / 30).float(), tables["phase"][int(row["phase"])]]
    columns.append(sum(tables["seals"][5 * j + int(v)] for j, v in enumerate(row["seals"])))
    columns.append(sum(tables["cards"][int(card)] for card in row["hand"] if card))
    entities = {}
    for side, name in enumerate(("mine", "other")):
        vectors = []
        for place, unit in enumerate(row[name]):
            numbers = torch.tensor([unit["hp"] / 10, *unit["stats"]]).float()
            x = encoder.linears["unit"](numbers) + tables["mine/kind"][int(unit["kind"])]
            x = x + tables["cards"][int(unit["card"])] * bool(unit["card"])
            vectors.append(torch.relu(x + encoder.places["unit"][side, place]))
        alive = [bool(a) for a in row[name]["alive"]]
        vectors = [vector * here for vector, here in zip(vectors, alive, strict=True)]
        entities[name] = torch.stack(vectors)
        if name == "mine":
            columns += vectors
        else:
            columns.append(sum(vectors) / max(1, sum(alive)))
    entities["hand"] = torch.stack([tables["cards"][int(card)] for card in row["hand"]])
    entities["cards"] = tables["cards"]
    return encoder.trunk(torch.cat([torch.as_tensor(c) for c in columns])), entities


def test_it_is_what_is_declared() -> None:
    encoder = shaken(declared())
    assert encoder.entity_sizes == {
        n: (s, 8) for n, s in zip(("mine", "other", "hand", "cards"), (3, 3, 4, 9), strict=True)
    }
    seen = states(encoder.layout)
    hidden, entities = encoder(seen)
    entities = as_tensors(entities)
    for place, row in enumerate(seen.numpy().view(encoder.layout.dtype)[:, 0]):
        wanted, things = by_hand(encoder, row)
        torch.testing.assert_close(hidden[place], wanted)
        for name, thing in things.items():
            torch.testing.assert_close(entities[name][place], thing)
    assert encoder(seen[:0]).hidden.shape == (0, 16)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("pool", ["sum", "mean", "flat"])
def test_an_absent_thing_is_no_part_of_the_state(pool: str, attention: bool) -> None:
    encoder = shaken(declared(attention=attention, pool=pool))
    before = states(encoder.layout)
    after = before.clone()
    records = after.numpy().view(encoder.layout.dtype)[:, 0]
    assert not records["mine"]["alive"].all()
    for name in ("hp", "kind", "card"):
        changed = records["mine"][name]
        changed[:] = np.where(records["mine"]["alive"], changed, 3)
    one, other = encoder(before), encoder(after)
    torch.testing.assert_close(one.hidden, other.hidden)
    torch.testing.assert_close(one.entities["mine"], other.entities["mine"])
    records["mine"]["hp"] += 1
    assert not torch.equal(encoder(after).hidden[1:], one.hidden[1:])


def test_attention_looks_at_all_that_are_present() -> None:
    encoder = shaken(declared(attention=True))
    before = states(encoder.layout)
    after = before.clone()
    records = after.numpy().view(encoder.layout.dtype)[:, 0]
    present = torch.from_numpy(records["other"]["alive"].any(1).copy())
    records["other"]["hp"] += 20
    one, other = (encoder(seen).entities["hand"] for seen in (before, after))
    changed = (one - other).abs().amax((1, 2)) > 1e-6
    assert torch.equal(changed, present)
    assert (~present).any()
    loss = sum(x.square().sum() for x in (encoder(before).hidden, one))
    torch.as_tensor(loss).backward()
    for name, weights in encoder.named_parameters():
        assert weights.grad is not None, name
        assert weights.grad.isfinite().all(), name


SPEC = fp.ActionSpec(
    [
        fp.Primary("pass"),
        fp.Primary(
            "attack", fp.Entity("mine", 3), fp.OneOf(fp.Index("face", 3), fp.Entity("other", 3))
        ),
        fp.Primary("summon", fp.Entity("cards", 9), fp.Index("face", 3)),
    ]
)


@pytest.mark.parametrize("attention", [False, True])
def test_it_is_kept_in_a_file_and_grows(attention: bool, tmp_path: Path) -> None:
    encoder = declared(attention=attention)
    policy = shaken(fp.RecurrentPolicy(spec=SPEC, layout=encoder.layout, encoder=encoder))
    with torch.no_grad():
        encoder.tables["cards"].weight[0] = 0
    path = tmp_path / "policy.pt"
    policy.save(path)
    seen = states(encoder.layout)
    again = fp.load(path, spec=SPEC, layout=encoder.layout)  # by its recipe
    assert again.encoder.parts == encoder.parts
    one, other = (p.distribution(seen)[0].logits for p in (policy, again))
    assert torch.equal(one, other)

    larger = declared(units=5, kinds=6, cards=20, attention=attention)
    primaries = [
        SPEC.primaries[0],
        fp.Primary(
            "attack", fp.Entity("mine", 5), fp.OneOf(fp.Index("face", 3), fp.Entity("other", 5))
        ),
        fp.Primary("summon", fp.Entity("cards", 20), fp.Index("face", 3)),
    ]
    grown = fp.load(
        path, spec=fp.ActionSpec(primaries), layout=larger.layout, encoder=larger, grow=True
    )
    wider = np.zeros((len(seen), larger.layout.dtype.itemsize), np.uint8)
    new = wider.view(larger.layout.dtype)[:, 0]
    old = seen.numpy().view(encoder.layout.dtype)[:, 0]
    for name in ("life", "phase", "seals", "hand", "n", "legal"):
        new[name] = old[name]
    for name in ("mine", "other"):
        new[name][:, :3] = old[name]
    scores = [
        p.head.scorer(*p.encode(rows), p.layout.read(rows))
        for p, rows in ((policy, seen), (grown, torch.from_numpy(wider)))
    ]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)
    old["hand"][2, 1] = 12
    with pytest.raises(ValueError, match=r"row 2: hand holds 12, declared as Cards of 0 \.\. 8"):
        policy.distribution(seen)
    new["hand"][2, 1] = 12
    assert grown.distribution(torch.from_numpy(wider))[0].logits.isfinite().all()


def test_what_does_not_fit_is_named() -> None:
    layout = layout_of()
    hand = Cards("hand", 9)
    kinds = [
        Entities(n, 3, Number(f"{n}.{f}"), kind="u") for n, f in (("mine", "hp"), ("other", "hp"))
    ]
    for parts, options, said in (
        ([Number("mana")], {}, "mana"),
        (
            [hand, Cards("mine.card", 7)],
            {},
            r"field='mine.card', n=7.* does not fit the other rows",
        ),
        (
            [Entities("mine", 4, Number("mine.hp"))],
            {},
            r"'mine.hp' has shape \(3,\); its first size",
        ),
        ([Entities("mine", 3, Number("mine.hp"), present="life")], {}, r"present='life' has shape"),
        ([kinds[0], Entities("other", 3, Cards("other.card", 9), kind="u")], {}, "not alike"),
        ([hand], {"in_slots": ["units"]}, r"in_slots names 'units'; it must be one of \['cards'\]"),
    ):
        with pytest.raises((KeyError, ValueError), match=said):
            Declared(layout, *parts, **options)
    with pytest.raises(ValueError, match="pool must be sum, mean, flat or none, not 'max'"):
        Entities("mine", 3, Number("mine.hp"), pool="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a Number, a Category or Cards"):
        Entities("mine", 3)
    encoder = Declared(layout, Category("phase", 3), *kinds)
    seen = states(layout)
    seen.numpy().view(layout.dtype)[:, 0]["phase"][3] = 7
    with pytest.raises(ValueError, match=r"row 3: phase holds 7, declared as Category of 0 \.\. 2"):
        encoder(seen)


def bandit_encoder(layout: fp.LegalLayout) -> Declared:
    return Declared(
        layout,
        Category("card", CARDS),
        Entities("unit", UNITS, Category("kind", 4), pool="flat"),
        hidden_size=32,
        entity_size=8,
    )


@pytest.mark.integration
def test_it_trains_under_pufferlib(trainers: Any) -> None:
    torch.manual_seed(0)
    serial = pufferlib.vector.Serial
    vecenv = pufferlib.vector.make(
        Bandit, env_kwargs={"num_agents": 64}, backend=serial, num_envs=1, seed=1
    )
    env = vecenv.driver_env
    policy = fp.FlatPolicy(env, encoder=bandit_encoder(env.legal_layout))
    trainer = trainers(vecenv, policy, learning_rate=2e-2, update_epochs=2, minibatch_size=256)
    shares = []
    for _ in range(20):
        stats = trainer.evaluate()
        shares.append(np.sum(stats["got"]) / np.sum(stats["best"]))
        trainer.stats.clear()
        trainer.train()
    assert min(shares[-3:]) > 0.85 > 0.7 > shares[0]
    assert env.illegal_actions == 0


def test_one_graph_whatever_is_present() -> None:
    encoder = shaken(declared(attention=True))
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    seen = states(encoder.layout)
    for rows in (seen, seen[:3]):
        one, other = encoder(rows), compiled(rows)
        torch.testing.assert_close(one.hidden, other.hidden)
        torch.testing.assert_close(dict(one.entities), dict(other.entities))


def test_recorded_weights_of_essence_wars_load_by_their_old_names() -> None:
    from tcg_flatpolicy.games.essence_wars import LAYOUT, EssenceWarsEncoder

    saved = torch.load(RECORDED / "flat" / "checkpoint.pt", weights_only=True)["policy"]
    old = {n.removeprefix("encoder."): w for n, w in saved.items() if n.startswith("encoder.")}
    assert {"place", "cards.weight", "creature.weight", "creature.bias"} <= set(old)
    encoder = EssenceWarsEncoder(LAYOUT, 16, 2)
    encoder.load_state_dict(old)
    assert torch.equal(encoder.places["creature"], old["place"])
    for mine, theirs in zip(encoder.state_dict().values(), old.values(), strict=True):
        assert torch.equal(mine, theirs)  # in the same order, as the optimizer's state has it
