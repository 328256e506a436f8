"""The real trainer on real environments: legal, exact, and able to learn."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pufferlib.vector
import pytest
import torch
from pufferlib import pufferl

import tcg_flatpolicy as fp
from tcg_flatpolicy.app.cli import main
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.app.train import evaluate, make_policy, train
from tcg_flatpolicy.games.essence_wars import EssenceWars, EssenceWarsEncoder
from tests.games import Bandit, BanditEncoder, trainer_config

pytestmark = pytest.mark.integration

# pufferlib/config/default.ini of PufferAI/PufferLib at commit 03d1ebc, section [train]; the device
# and the number of steps are ours.
SHIPPED = {
    "optimizer": "muon",
    "anneal_lr": True,
    "learning_rate": 0.015,
    "gamma": 0.995,
    "gae_lambda": 0.90,
    "update_epochs": 1,
    "clip_coef": 0.2,
    "vf_coef": 2.0,
    "vf_clip_coef": 0.2,
    "max_grad_norm": 1.5,
    "ent_coef": 0.001,
    "adam_beta1": 0.95,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "minibatch_size": 16384,
    "max_minibatch_size": 32768,
    "bptt_horizon": 64,
    "prio_alpha": 0.8,
    "prio_beta0": 0.2,
}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    """Runs PuffeRL for some epochs, checks what must hold in each, and stops its thread."""
    made = []

    def go(vecenv: Any, policy: Any, epochs: int, **changes: Any) -> Any:
        config = trainer_config(vecenv, tmp_path, **changes)
        config["total_timesteps"] = epochs * config["batch_size"]
        trainer = pufferl.PuffeRL(config, vecenv, policy)
        made.append(trainer)
        for _ in range(epochs):
            trainer.evaluate()
            trainer.train()
            if trainer.total_minibatches == 1:
                assert (trainer.ratio - 1).abs().max() < 1e-5
        for name in ("entropy", "approx_kl", "old_approx_kl", "policy_loss", "value_loss"):
            assert math.isfinite(trainer.losses[name]), name
        for parameter in policy.parameters():
            assert parameter.isfinite().all()
        assert all(env.illegal_actions == 0 for env in vecenv.envs)
        return trainer

    yield go
    for trainer in made:
        trainer.utilization.stop()


def make(creator: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    backend = pufferlib.vector.Serial
    return pufferlib.vector.make(creator, env_kwargs=kwargs, backend=backend, num_envs=1, seed=1)


class PairsBandit(Bandit):
    """Of attacks alone, and its list follows from the kinds, which the encoder sees.

    A head that chooses the primary first cannot know whether the good pair is in a list that is
    random, as the Bandit's is: the best that it can pay is less.
    """

    def deal(self) -> None:
        super().deal()
        for row, kinds in enumerate(self.records["kind"].tolist()):
            if self.lists[row]:
                able = [i for i, kind in enumerate(kinds) if kind != 3][:2]
                pairs = [(1, i, j) for i in able for j in range(len(kinds)) if j != i]
                self.lists[row] = [(0, 0, 0), *pairs]
        self.legal_layout.write(self.observations, self.lists)


@pytest.mark.parametrize(
    ("game", "head", "epochs"), [(Bandit, "flat", 150), (PairsBandit, "autoregressive", 100)]
)
@pytest.mark.parametrize("recurrent", [False, True])
def test_the_bandit_is_solved(
    run: Any, recurrent: bool, game: type[Bandit], head: str, epochs: int
) -> None:
    """At least 95% of what the best legal actions would have paid, while sampling."""
    vecenv = make(game, num_agents=64, empty=0.2)
    env = vecenv.driver_env
    kind = fp.RecurrentPolicy if recurrent else fp.Policy
    policy = kind(env, head=head, encoder=BanditEncoder(env.legal_layout))
    run(
        vecenv,
        policy,
        epochs,
        use_rnn=recurrent,
        minibatch_size=128,
        learning_rate=5e-3,
        anneal_lr=True,
    )
    got = best = 0.0
    with torch.no_grad():
        for _ in range(40):
            state: dict[str, Any] = {}
            face, _ = policy.forward_eval(torch.as_tensor(env.observations), state)
            info = env.step(face.sample().numpy())[-1][0]
            got, best = got + info["got"], best + info["best"]
    assert env.illegal_actions == 0
    assert got / best > 0.95


@pytest.mark.parametrize("recurrent", [False, True])
def test_essence_wars_some_thousand_steps(run: Any, recurrent: bool) -> None:
    vecenv = make(EssenceWars, num_games=64)
    env = vecenv.driver_env
    kind = fp.RecurrentPolicy if recurrent else fp.FlatPolicy
    policy = kind(env, encoder=EssenceWarsEncoder(env.legal_layout, 64, 16))
    trainer = run(vecenv, policy, 4, use_rnn=recurrent, bptt_horizon=16)
    assert trainer.global_step == 4 * 64 * 16


def test_pufferlib_s_shipped_hyperparameters(run: Any) -> None:
    vecenv = make(EssenceWars, num_games=256)
    env = vecenv.driver_env
    policy = fp.FlatPolicy(env, encoder=EssenceWarsEncoder(env.legal_layout))
    run(vecenv, policy, 2, **SHIPPED)


def test_the_shipped_optimizer_with_a_spec_without_an_index(run: Any) -> None:
    """Muon divides by the sides of a matrix, so there must be none without numbers."""
    vecenv = make(Bandit, num_agents=64)
    env = vecenv.driver_env
    spec = fp.ActionSpec(
        [
            fp.Primary("rest"),
            fp.Primary("attack", fp.Entity("unit", 4), fp.Entity("unit", 4)),
            fp.Primary("play", fp.Entity("card", 5), fp.OneOf(fp.Entity("unit", 5))),
        ]
    )
    encoder = BanditEncoder(env.legal_layout)
    encoder.entity_sizes = {"unit": (5, 8), "card": (5, 8)}

    def encode(observations: torch.Tensor) -> fp.Encoding:
        hidden, entities = BanditEncoder.forward(encoder, observations)
        card = entities["unit"].mean(1, keepdim=True).expand(-1, 5, -1)
        unit = torch.cat([entities["unit"], card[:, :1]], dim=1)
        return fp.Encoding(hidden, {"unit": unit, "card": card})

    encoder.forward = encode  # type: ignore[method-assign]
    env.action_spec, env.legal_layout = spec, env.legal_layout.with_spec(spec)
    policy = fp.FlatPolicy(env, encoder=encoder)
    assert all(parameter.numel() for parameter in policy.parameters())
    run(vecenv, policy, 3, optimizer="muon", learning_rate=0.015)


COMMAND = [sys.executable, "-m", "tcg_flatpolicy"]
FEW_STEPS = Settings(
    total_steps=2048,
    num_games=32,
    bptt_horizon=16,
    minibatch_size=256,
    hidden_size=32,
    eval_games=0,
)
SMALL = ["--num-games", "32", "--bptt-horizon", "16", "--minibatch-size", "256", "--threads", "1"]


def command(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=240, check=False, **kwargs
    )


def test_the_command_line_trains_reports_and_evaluates(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = command(
        "train", *SMALL, "--total-steps", "4096", "--eval-games", "40", "--folder", str(folder)
    )
    assert done.returncode == 0, done.stderr
    assert "\033" not in done.stdout  # no dashboard where there is no terminal
    assert "illegal actions  0 of" in done.stdout
    for words in ("before, sampling", "before, mode", "after, sampling", "after, mode"):
        assert words in done.stdout
    assert done.stdout.count("of 40 games") == 4
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.csv", "checkpoint.pt", "curves.png", "report.json"} <= names
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    assert {"steps", "win_rate", "entropy", "approx_kl", "steps_per_second"} <= set(
        header.split(",")
    )
    assert rows

    played = command("eval", str(folder), "--games", "40", "--opponent", "random", "--top-k", "2")
    assert played.returncode == 0, played.stderr
    assert played.stdout.count("of 40 games") == 3
    assert "top 2" in played.stdout
    assert "illegal actions  0 of" in played.stdout

    again = command("train", *SMALL, "--total-steps", "4096", "--folder", str(folder))
    assert again.returncode == 2
    assert "already holds a run" in again.stderr


def test_a_seed_gives_the_same_run(tmp_path: Path) -> None:
    weights = []
    for name in ("one", "two"):
        train(replace(FEW_STEPS, seed=7), tmp_path / name, lambda line: None)
        content = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        weights.append(content["policy"])
    torch.set_autocast_enabled("cpu", False)
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key


def test_an_evaluation_plays_in_float32_also_after_a_run_in_bfloat16() -> None:
    settings = Settings(hidden_size=64, entity_size=8, head_width=16)
    policy = make_policy(settings, EssenceWars(1))
    played = []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            results = evaluate(settings, policy, 20, "greedy", seed=1)
        played.append([(result.wins, result.actions) for result in results.values()])
    assert played[0] == played[1]


def test_an_evaluation_with_top_k() -> None:
    """Of one tuple it is the mode; of more it is neither that nor the policy."""
    settings = Settings(hidden_size=64, entity_size=8, head_width=16)
    policy = make_policy(settings, EssenceWars(1))
    came_of = {}
    for k in (1, 3):
        results = evaluate(settings, policy, 20, "greedy", seed=1, top_k=k)
        came_of |= {way: (result.wins, result.actions) for way, result in results.items()}
    assert list(came_of) == ["sampling", "mode", "top 1", "top 3"]
    assert came_of["top 1"] == came_of["mode"]
    assert came_of["top 3"] not in (came_of["mode"], came_of["sampling"])


@pytest.mark.parametrize("workers", ["0", "2"])
def test_ctrl_c_ends_cleanly_with_everything_saved(tmp_path: Path, workers: str) -> None:
    """Ctrl-C on a terminal reaches every process of its group, those that play the games too."""
    folder = tmp_path / "run"
    arguments = ["train", *SMALL, "--total-steps", "50000000", "--eval-games", "0"]
    arguments += ["--num-workers", workers]
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--folder", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "steps" in line:
                break
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, err
    assert "interrupted; the run is saved up to this step" in out
    assert "illegal actions  0 of" in out
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert content["settings"]["total_steps"] == 50_000_000
    assert (folder / "report.json").exists()
    assert len((folder / "metrics.csv").read_text().splitlines()) >= 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train", "--minibatch-size", "1000"], "minibatch_size 1000 must divide"),
        (["train", "--total-steps", "100"], "total_steps 100 is less than one rollout"),
        (["train", "--opponent", "self"], "alternates between two players"),
        (["train", "--deck1", "no_such_deck"], "no_such_deck"),
        (["train", "--seed", "-1"], "seed must lie in 0..2**63 - 1, got -1"),
        (["train", "--seed", str(2**63)], "seed must lie in 0..2**63 - 1, got"),
        (["eval", "{small}", "--seed", "-1"], "--seed must lie in 0..2**63 - 1, got -1"),
        (["train", "--compile", "--head", "autoregressive"], "compile takes the head 'flat', got"),
        (["train", "--epsilon", "2"], "epsilon must lie in 0..1"),
        (["train", "--final-epsilon", "-1"], "final_epsilon must lie in 0..1"),
        (["train", "--final-temperature", "0"], "final_temperature must be positive"),
        (["train", "--checkpoint-seconds", "-1"], "checkpoint_seconds must be at least 0"),
        (["train", "--num-workers", "3"], "num_workers 3 must divide num_games 256"),
        (["train", "--two-players", "--opponent", "random"], "trains without an opponent"),
        (["train", "--head-width", "0"], "head_width must be at least 1"),
        (["eval", "{small}", "--top-k", "0"], "--top-k must be at least 1"),
        (["train", "--eval-games", "1009"], "cannot be shared equally"),
        (["eval", "nowhere"], "no checkpoint at nowhere"),
        (["eval", "{older}"], "was written by another version"),
        (["eval", "{small}", "--opponent", "self"], "needs a built-in opponent"),
        (["eval", "{broken}"], "is damaged, or is no file of this library"),
        (["eval", "{other}"], "is no checkpoint of"),
    ],
)
def test_bad_arguments_end_with_one_line(
    tmp_path: Path,
    arguments: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    torch.save({"something": 1}, tmp_path / "other.pt")
    torch.save({"policy": {}, "settings": {"gone": 1}}, tmp_path / "older.pt")
    env = EssenceWars(1)
    settings = Settings(hidden_size=8)
    small = {"policy": make_policy(settings, env).state_dict(), "settings": asdict(settings)}
    torch.save(small, tmp_path / "small.pt")
    names = {name: str(tmp_path / f"{name}.pt") for name in ("older", "small")}
    names |= {"broken": str(tmp_path / "broken.pt"), "other": str(tmp_path / "other.pt")}
    assert main([argument.format(**names) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert complaint in said.err


def test_what_torchrun_cannot_do_is_said_before_processes_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "--compile", "--folder", str(tmp_path)]) == 2
    assert "compile does not work under torchrun" in capsys.readouterr().err
