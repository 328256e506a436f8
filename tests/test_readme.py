"""The README's code, run as it is written."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pufferlib import pufferl

import tcg_flatpolicy as fp
from tcg_flatpolicy.app import cli
from tcg_flatpolicy.verify import environment, policy

pytestmark = pytest.mark.integration

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a block, for one epoch, and checks that its trainer is closed."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, namespace: dict[str, Any]) -> dict[str, Any]:
        block = BLOCKS[name].replace("1_000_000", str(64 * 32))
        exec(compile(block, f"README.md, {name}", "exec"), namespace)
        if "trainer" in namespace:
            assert namespace["trainer"].utilization.stopped
        return namespace

    return run


def test_every_python_block_is_tested() -> None:
    assert len(BLOCKS) == README.count("```python") == 10


@pytest.mark.parametrize("name", ["native", "gymnasium"])
def test_own_environments(execute: Callable[..., Any], name: str) -> None:
    namespace = execute(name, {})
    trainer = namespace["trainer"]
    assert type(trainer) is pufferl.PuffeRL
    assert trainer.global_step == 64 * 32
    layout = namespace["policy"].layout
    observations = trainer.observations.flatten(0, 1)
    legal = layout.read(observations)
    assert legal.contains(trainer.actions.flatten(0, 1)).all()
    assert legal.counts.float().mean() > 2


def test_a_policy_is_kept(
    execute: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    native = execute("native", {})
    trained = native["policy"]
    namespace = execute("keep", native)
    observations = torch.as_tensor(native["vecenv"].driver_env.observations)
    legal = trained.layout.read(observations)
    for kept in (namespace["policy"], namespace["grown"]):
        distribution, _ = kept.distribution(observations)
        torch.testing.assert_close(
            distribution.logits, trained.distribution(observations)[0].logits
        )
    assert namespace["grown"].layout.read(observations).counts.equal(legal.counts)


def test_the_declared_encoder(execute: Callable[..., Any]) -> None:
    namespace = execute("declared", {})
    observations = np.zeros((2, namespace["STATE"].itemsize), np.uint8)
    records = observations.view(namespace["STATE"])[:, 0]
    records["hand"][0, :3], records["units"]["card"][0, 1] = (5, 599, 7), 5
    namespace["layout"].write(observations, [[(0, 0, 0), (1, 2, 0), (2, 1, 3)], [(0, 0, 0)]])
    rows = torch.from_numpy(observations)
    distribution, _ = namespace["policy"].distribution(rows)
    assert distribution.entropy()[0] > 0
    entities = namespace["encoder"](rows).entities
    assert (entities["hand"][0].abs().sum(1) > 0).tolist() == [True] * 3 + [False] * 7


def test_the_encoder(execute: Callable[..., Any]) -> None:
    native = execute("native", {})
    encoder = execute("encoder", {})["MyEncoder"]
    spec = fp.ActionSpec(
        [
            fp.Primary("end_turn"),
            fp.Primary("attack", fp.Entity("ally", 6), fp.Entity("enemy", 6)),
            fp.Primary("retreat", fp.Entity("ally", 6)),
        ]
    )
    policy = fp.FlatPolicy(spec=spec, layout=native["LAYOUT"], encoder=encoder(native["LAYOUT"]))
    observations = torch.as_tensor(native["vecenv"].driver_env.observations)
    face, value = policy.forward_eval(observations)
    assert face.distribution.legal.contains(face.sample()).all()
    assert value.shape == (64, 1)


def test_the_distribution_alone(execute: Callable[..., Any]) -> None:
    namespace = execute("alone", {})
    assert namespace["legal"].contains(namespace["actions"]).all()
    assert np.isfinite(namespace["scores"].grad.numpy()).all()


def test_verifying_the_native_environment(
    execute: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    game = execute("asked", execute("native", {}))
    module = types.ModuleType("mygame")
    module.__dict__.update(game, make=game["Asked"])
    monkeypatch.setitem(sys.modules, "mygame", module)
    assert cli.main(["verify", "mygame:make", "--policy", "flat"]) == 0
    out = capfd.readouterr().out
    for check in (
        "who is to move has a list",
        "the engine says that listed actions are legal",
        "the engine refuses what is not listed",
    ):
        assert check in environment.CHECKS
        assert re.search(rf"passed +environment: {check}", out), check

    tests = execute("suite", {})["TestMyGame"]()
    passed = []
    for test, checks in (
        (tests.test_environment, environment.CHECKS),
        (tests.test_policy, policy.CHECKS),
    ):
        for check in checks:
            try:
                test(check)
                passed.append(check)
            except pytest.skip.Exception:
                pass
    assert set(policy.CHECKS) <= set(passed)

    game = execute("monitor", game)
    assert game["vecenv"].counts.sent == 64 * 32
    execute("enumerate", game)
    assert "the list and the rules list the same" in capfd.readouterr().out
