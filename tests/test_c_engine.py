"""A C engine's own struct as the observation: read where it lies, audited, and trained on."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pufferlib.vector
import pytest
import torch

from examples import c_engine as example
from examples.c_engine import COLUMNS, LAYOUT, SPEC, make_policy
from tcg_flatpolicy.verify import audit_env, compare_enumerations, enumerate_legal, whole
from tests.c_engine import engine
from tests.c_engine.engine import ROOM, SOURCE, Observation, Skirmish

pytestmark = pytest.mark.integration

DTYPE = np.dtype(Observation)


def listed(env: Skirmish) -> list[list[tuple[int, ...]]]:
    """Each row's list, from the columns of the struct by NumPy."""
    records = env.observations.view(DTYPE)[:, 0]
    columns = [records["mask"][name.removeprefix("mask.")] for name in COLUMNS]
    return [
        [tuple(int(column[row, k]) for column in columns) for k in range(record["count"])]
        for row, record in enumerate(records)
    ]


def random_actions(env: Skirmish, rng: np.random.Generator) -> np.ndarray:
    """(num_agents, 4) int32: a uniformly drawn legal action a row, zeros where there is none."""
    return np.array(
        [row[rng.integers(len(row))] if row else (0, 0, 0, 0) for row in listed(env)], np.int32
    )


def test_c_and_cpp_compilers_build_the_same_engine() -> None:
    try:
        builds = [engine.build(SOURCE, language) for language in ("c", "c++")]
    except FileNotFoundError as error:
        pytest.skip(f"needs compilers for both: {error}")
    envs = [Skirmish(3, seed=5, engine=build) for build in builds]
    rng = np.random.default_rng(0)
    for env in envs:
        env.reset()
    ended = 0
    for _ in range(300):
        actions = random_actions(envs[0], rng)
        for env in envs:
            env.step(actions)
        for name in ("observations", "rewards", "terminals"):
            assert np.array_equal(getattr(envs[0], name), getattr(envs[1], name))
        ended += int(envs[0].terminals.sum())
    assert ended > 0


def test_what_the_compiler_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken.c").write_text("int f(void) { return nothing; }\n")
    with pytest.raises(RuntimeError, match=r"(?s)broken.c failed:\n.*nothing"):
        engine.build(tmp_path / "broken.c")


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FileNotFoundError, match=r"\$CC or \$CXX"):
        engine.build(SOURCE)


def test_the_layout_is_the_compilers(tmp_path: Path) -> None:
    """Offsets, sizes and padding, as the compiler that builds the engine lays them out."""
    fields = ["me", "them", "phase", "count", "mask", "turn", "me.deck", "me.board", "them.hand"]
    fields += ["me.board[3].health", "them.board[2].ready", *COLUMNS]
    places = [f"offsetof(Observation, {field})" for field in fields]
    sizes = [f"sizeof ((Observation *)0)->{field}" for field in fields]
    probe = tmp_path / "probe.c"
    probe.write_text(
        f'#include "{SOURCE}"\n#ifdef __cplusplus\nextern "C"\n#endif\n'
        f"const size_t *probe(void) {{ static const size_t at[] = "
        f"{{{', '.join(places + sizes)}}}; return at; }}\n"
    )
    function = engine.build(probe).probe
    function.restype = engine.ctypes.POINTER(engine.ctypes.c_size_t)
    compiled = dict(zip(fields, function()[: len(fields)], strict=True))
    size = dict(zip(fields, function()[len(fields) : 2 * len(fields)], strict=True))

    for field in LAYOUT.fields():
        if field.name in compiled:
            assert field.offset == compiled[field.name]
            assert field.numbers * field.dtype.itemsize == size[field.name]
    found = {field.name: field.offset for field in LAYOUT.fields()}
    assert {"phase", "count", "turn", "me.deck", "them.hand", *COLUMNS} == found.keys() & compiled
    unit = DTYPE["me"]["board"].base
    assert found["me.board.health"] + 3 * unit.itemsize == compiled["me.board[3].health"]
    assert found["them.board.ready"] + 2 * unit.itemsize == compiled["them.board[2].ready"]

    # It is the kind of struct that is meant: nested, with padding in it, and a long list.
    numbers = sum(field.numbers * field.dtype.itemsize for field in LAYOUT.fields())
    assert numbers < DTYPE.itemsize
    assert compiled["count"] > compiled["phase"] + 1
    assert LAYOUT.padding == ROOM == 1024
    assert LAYOUT.count.dtype == np.uint16
    assert {column.dtype for column in LAYOUT.columns} == {np.dtype(np.uint8)}


def test_the_trainers_observations_are_the_engines_structs() -> None:
    """C writes where the policy reads: the same memory, through PufferLib's vectorisation."""
    vecenv = pufferlib.vector.make(
        partial(Skirmish, 2), num_envs=2, backend=pufferlib.vector.Serial, seed=3
    )
    vecenv.async_reset(3)
    observations = torch.as_tensor(vecenv.recv()[0])
    life = LAYOUT.field(observations.view(8, -1), "me.life")
    assert life.tolist() == [12] * 8
    for part, env in enumerate(vecenv.envs):
        assert np.shares_memory(env.observations, observations.numpy())
        record = Observation.from_buffer(env.observations[1])
        record.me.life = 5 + part
        assert life.tolist()[4 * part + 1] == 5 + part


def test_the_list_is_read_as_it_stands_and_is_that_of_the_rules() -> None:
    env = Skirmish(4, seed=11)
    observations = torch.as_tensor(env.reset()[0])
    rng = np.random.default_rng(1)
    played = set()
    for step in range(400):
        legal = LAYOUT.with_spec(SPEC).read(observations)
        assert legal.to_lists() == listed(env)
        played.update(row[0] for rows in legal.to_lists() for row in rows)
        if step % 20 == 0:
            for row in range(env.num_agents):
                by_rules = enumerate_legal(
                    SPEC, whole(lambda action, row=row: env.is_legal(row, action), each=True)
                )
                shown = LAYOUT.read(observations[row : row + 1])
                same = compare_enumerations(shown, by_rules, SPEC, names=("list", "rules"))
                assert same.ok, same
        env.step(random_actions(env, rng))
    assert played == set(range(7))  # every primary was legal at some time


def test_the_audit_finds_nothing() -> None:
    make = partial(Skirmish, 8)
    report = audit_env(make(), steps=2500, spec=SPEC, layout=LAYOUT, make=make)
    assert report.ok, report
    skipped = {check.name for check in report.checks.values() if check.status != "passed"}
    assert skipped == {"masks per head are the list's projection", "no mask per head is empty"}
    assert report.figures["share of states with an empty list"] == 0.5


@pytest.mark.parametrize(
    ("row", "action"),
    [
        (0, (0, 0, 0, 1)),  # a slot that the primary does not use
        (0, (2, 0, 4, 0)),  # attacks with a unit that is not there
        (0, (7, 0, 0, 0)),
        (0, (-1, 0, 0, 0)),
        (1, (0, 0, 0, 1)),  # waits
    ],
)
def test_the_engine_refuses_what_is_illegal_and_plays_nothing(
    row: int, action: tuple[int, ...]
) -> None:
    env = Skirmish(1, seed=2)
    before = env.reset()[0].copy()
    actions = np.zeros((2, 4), np.int32)
    actions[row] = action
    with pytest.raises(ValueError, match=rf"row {row}: {re.escape(str(action))} is not legal"):
        env.step(actions)
    assert np.array_equal(env.observations, before)


def test_a_policy_takes_less_than_twenty_lines_and_the_engine_none() -> None:
    source = Path(example.__file__).read_text()
    part = source.split("# ---- a policy on it\n")[1].split("# ---- that is all\n")[0].strip()
    assert len(part.splitlines()) < 20
    assert "make_policy" in part
    for file in (SOURCE, Path(engine.__file__)):
        assert not re.search(r"(import|from|include).*tcg_flatpolicy", file.read_text())


def least_wins(games: int, rate: float, chance: float) -> int:
    """The fewest wins that a player with that rate reaches with less than that chance."""
    tail = 0.0
    for wins in range(games, -1, -1):
        tail += math.comb(games, wins) * rate**wins * (1 - rate) ** (games - wins)
        if tail >= chance:
            return wins + 1
    return 0


@pytest.mark.integration
def test_it_learns_to_beat_random_play_without_an_illegal_action(
    trainers: Any, tmp_path: Path
) -> None:
    games, steps = 300, 24_576
    torch.manual_seed(1)
    vecenv = pufferlib.vector.make(
        partial(Skirmish, 32), num_envs=1, backend=pufferlib.vector.Serial, seed=1
    )
    policy = make_policy(vecenv.driver_env)
    config = example.trainer_config(vecenv, steps, str(tmp_path))
    trainer = trainers(vecenv, policy, **config)
    while trainer.global_step < steps:
        trainer.evaluate()
        legal = policy.layout.read(trainer.observations.flatten(0, 1))
        assert legal.contains(trainer.actions.flatten(0, 1)).all()
        trainer.train()
        assert np.isfinite(list(trainer.losses.values())).all()
    torch.set_autocast_enabled("cpu", False)
    # One who wins three quarters of the games gets there once in a million times.
    assert example.against_random(policy, games, seed=9) >= least_wins(games, 0.75, 1e-6)
    untrained = make_policy(vecenv.driver_env)
    assert example.against_random(untrained, games, seed=9) < least_wins(games, 0.75, 1e-6)
