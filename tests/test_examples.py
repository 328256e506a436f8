"""The examples, run at a small size as their docstrings say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tcg_flatpolicy as fp

ROOT = Path(__file__).parent.parent
WITHOUT_PUFFERLIB = """
import runpy, sys
sys.modules["pufferlib"] = None  # importing it raises ImportError
sys.argv = ["examples/ppo.py", *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["c_engine", "ppo", "torchrl_policy"])
def test_an_example_says_how_to_run_it(name: str) -> None:
    said = ast.get_docstring(ast.parse((ROOT / "examples" / f"{name}.py").read_text())) or ""
    assert re.search(rf"^    python (examples/{name}\.py|-m examples\.{name})$", said, re.MULTILINE)


def test_ppo_runs_without_pufferlib() -> None:
    pytest.importorskip("essence_wars")
    flags = "--total-steps 1024 --num-games 32 --horizon 16 --minibatch 128 --eval-games 0"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PUFFERLIB, *flags.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert not done.returncode, done.stderr
    updates = [
        re.search(r"([\d,]+) steps .* loss (\S+)  entropy (\S+)  (\d+) illegal", line)
        for line in done.stdout.splitlines()
    ]
    assert [update[1] for update in updates if update] == ["512", "1,024"]
    for update in filter(None, updates):
        assert np.isfinite(float(update[2]))
        assert float(update[3]) > 0
        assert update[4] == "0"


def test_ppo_says_what_flags_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("essence_wars")
    from examples import ppo

    for flags, words in ((["--total-steps", "10"], "one rollout"), (["--eval-games", "50"], "100")):
        with pytest.raises(SystemExit):
            ppo.main(flags)
        assert words in capsys.readouterr().err


def test_ppo_has_the_games_actions_and_plays_only_legal_ones() -> None:
    pytest.importorskip("essence_wars")
    from examples import ppo
    from tcg_flatpolicy.games import essence_wars

    assert np.array_equal(ppo.TUPLES, essence_wars.INDEX_TO_TUPLE)
    assert ppo.SPEC.limits.tolist() == essence_wars.SPEC.limits.tolist()

    torch.manual_seed(0)
    games, agent = ppo.Games(16, seed=3), ppo.Agent()
    for _ in range(60):
        distribution, value = agent(games.states, games.masks)
        assert value.shape == (16,)
        distribution.legal.validate(ppo.SPEC)
        assert torch.equal(distribution.legal.counts, games.masks.sum(1))
        actions = distribution.sample()
        numbers = [ppo.NUMBERS[tuple(action)] for action in actions.tolist()]
        assert games.masks[torch.arange(16), numbers].all()
        games.step(actions)
    assert games.illegal == 0
    assert 0 <= ppo.win_rate(agent, seed=4, slots=8, each=1) <= 0.5
    # What is counted would be seen: number 0, play a card, is not legal in all games.
    assert not games.masks[:, 0].all()
    illegal = int((~games.masks[:, 0]).sum())
    with pytest.raises(ValueError, match="Illegal action: PlayCard"):
        games.step(ppo.TUPLES[[0] * 16])
    assert games.illegal == illegal


@pytest.mark.integration
def test_c_engine_trains_and_says_what_it_wins(capfd: pytest.CaptureFixture[str]) -> None:
    from examples import c_engine

    flags = ["--steps", "2048", "--num-games", "16", "--eval-games", "50"]
    before, after = c_engine.main(flags)
    assert 0 <= before <= 50
    assert 0 <= after <= 50
    said = capfd.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["untrained", "trained"]
    assert f"wins {after} of 50 games" in said[1]


# What TorchRL and tensordict say of themselves.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
class TestTorchRL:
    @pytest.fixture(autouse=True)
    def example(self) -> Any:
        pytest.importorskip("torchrl", reason="needs torchrl: pip install torchrl tensordict")
        from examples import torchrl_policy

        return torchrl_policy

    def test_it_learns_without_an_illegal_action(self, example: Any) -> None:
        shares, illegal = example.main(["--updates", "10"])
        assert illegal == 0
        assert shares[0] < 0.7
        assert min(shares[-3:]) > 0.95

    def test_what_torchrl_stores_is_exact(self, example: Any) -> None:
        from tensordict.nn import InteractionType, set_interaction_type
        from torchrl.modules import ValueOperator
        from torchrl.objectives import ClipPPOLoss

        torch.manual_seed(0)
        env = example.Duels(64, seed=2)
        actor = example.make_actor(env)
        with torch.no_grad():
            shown = actor(env.reset())
        lists = [
            [tuple(action) for action in tuples[:count].tolist()]
            for tuples, count in zip(shown["tuples"], shown["count"], strict=True)
        ]
        scores = shown["scores"][example.places(shown["count"])]
        exact = fp.LegalCategorical(fp.LegalActions.from_lists(lists, slots=2), scores)
        assert torch.equal(shown["action_log_prob"], exact.log_prob(shown["action"]))
        assert exact.legal.contains(shown["action"]).all()
        assert shown["count"].min() < shown["count"].max()

        critic = ValueOperator(example.Value(), in_keys=["kinds"])
        shown["advantage"] = torch.randn(64, 1)
        shown["value_target"] = torch.randn(64, 1)
        losses = ClipPPOLoss(actor, critic)(shown)
        torch.testing.assert_close(losses["entropy"], exact.entropy().mean())
        with set_interaction_type(InteractionType.DETERMINISTIC):
            greedy = actor(shown.select("kinds", "tuples", "count"))
        assert torch.equal(greedy["action"], exact.mode)
