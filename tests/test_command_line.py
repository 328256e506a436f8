"""The command line with an engine of one's own, and run folders whatever happens to them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tcg_flatpolicy import export
from tcg_flatpolicy.app import cli, train
from tcg_flatpolicy.app.run_folder import claimed, read_checkpoint, read_csv
from tcg_flatpolicy.app.settings import Settings, read_toml
from tests.test_resume import SMALL, quiet, stop_after

pytestmark = pytest.mark.integration

ENGINE = '''
import gymnasium
import numpy as np
import tcg_flatpolicy as fp
from tests.games import Bandit, BanditEncoder

def make(num_agents=32, empty=0.0, buf=None, seed=0):
    """A bandit.

    Args:
        num_agents: how many of them.
        empty: share of rows that
            wait.
    """
    return Bandit(num_agents, empty, buf, seed)

def deaf(num_agents=32):
    return Bandit(num_agents)

def encoder(layout, hidden_size):
    return BanditEncoder(layout, hidden_size)

SPEC = fp.ActionSpec([fp.Primary("pass"), fp.Primary("play", fp.Index("card", 10))])

class Gym(gymnasium.Env):
    """Pays for playing a card."""
    observation_space = gymnasium.spaces.Dict({
        "hand": gymnasium.spaces.Box(0, 1, (10,), np.float32),
        "n_legal": gymnasium.spaces.Discrete(12),
        "legal": gymnasium.spaces.Box(0, 9, (11, 2), np.uint8),
    })
    action_space = SPEC.action_space

    def observe(self):
        hand = self.np_random.random(10, dtype=np.float32)
        legal = [(0, 0)] + [(1, card) for card in range(10) if hand[card] > 0.5]
        padded = np.zeros((11, 2), np.uint8)
        padded[: len(legal)] = legal
        return {"hand": hand, "n_legal": len(legal), "legal": padded}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        return self.observe(), 1.0 if action[0] else -1.0, True, False, {}
'''

FEW = ["--bptt-horizon", "8", "--hidden-size", "16", "--head-width", "8"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each test has a folder with an engine of its own in a module of its own name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "my_game.py").write_text(ENGINE)
    yield
    sys.modules.pop("my_game", None)


def run(*arguments: str) -> int:
    return cli.main([*arguments])


def weights(folder: str) -> dict[str, torch.Tensor]:
    policy: dict[str, torch.Tensor] = read_checkpoint(Path(folder))["policy"]
    return policy


def test_an_engine_of_one_s_own_has_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [*FEW, "--total-steps", "512", "--env.num_agents", "16", "--eval-games", "32"]
    arguments += ["--encoder", "my_game:encoder"]
    assert run("train", "my_game:make", *arguments, "--empty", "0.25", "--folder", "a") == 0
    said = capfd.readouterr().out
    assert said.count("of 32 games") == 4
    last = [line for line in said.splitlines() if " steps " in line and "/s" in line][-1]
    assert last.startswith("100%")
    assert last.endswith("0 min 00 s left")

    toml = read_toml(Path("a/config.toml"))
    assert toml["engine"] == "my_game:make"
    assert toml["env"] == {"num_agents": 16, "empty": 0.25}
    assert run("train", "--config", "a/config.toml", "--folder", "b") == 0
    assert run("train", "--config", "a/config.toml", "--folder", "c", "--seed", "2") == 0
    assert all(torch.equal(one, weights("b")[name]) for name, one in weights("a").items())
    assert not all(torch.equal(one, weights("c")[name]) for name, one in weights("a").items())

    named = ["my_game:make", "--encoder", "my_game:encoder"]
    capfd.readouterr()
    assert run("eval", "a", *named, "--games", "32", "--top-k", "2") == 0
    assert capfd.readouterr().out.count("of 32 games") == 3
    assert run("eval", "my_game:make", "--empty", "0.5", "--games", "64") == 0  # untrained
    capfd.readouterr()
    assert run("compare", "a", "b", "c") == 0
    said = capfd.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[:4]] == ["run", "a", "b", "c"]
    assert "seed: 1, 1, 2" in said
    assert Path("compare.png").read_bytes().startswith(b"\x89PNG")
    assert run("verify", "my_game:make", "--policy", "a", "--steps", "20") == 2
    assert "--encoder my_game:encoder" in capfd.readouterr().err


def test_a_gymnasium_engine_with_a_dict_observation(capfd: pytest.CaptureFixture[str]) -> None:
    keys = ["--spec", "my_game:SPEC", "--layout", "n_legal,legal"]
    few = ["--total-steps", "2048", "--num-envs", "8", "--learning-rate", "0.01"]
    few += ["--eval-games", "40", "--minibatch-size", "64"]
    assert run("train", "my_game:Gym", *keys, *FEW, *few, "--folder", "a") == 0
    said = capfd.readouterr().out
    after = re.search(r"after, mode +([\d.]+)%", said)
    assert after
    assert float(after[1]) > 90
    assert "cannot be continued" not in said  # it was not interrupted
    rows = read_csv(Path("a/metrics.csv"))
    assert rows[-1]["win_rate"] > rows[0]["win_rate"]
    assert run("eval", "a", "my_game:Gym", *keys, "--games", "40") == 0
    assert run("verify", "my_game:Gym", "--policy", "a", *keys, "--steps", "20") == 0


def test_export_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing ONNX takes long, and test_export.py does; here it is what is to be written."""
    wrote: list[Any] = []
    monkeypatch.setattr(export, "export_onnx", lambda *arguments: wrote.append(arguments))
    few = [*FEW, "--num-games", "16", "--total-steps", "128", "--eval-games", "0"]
    assert run("train", *few, "--folder", "a") == 0
    assert run("export", "a", "--to", "some.onnx") == 0
    policy, path, observations = wrote[0]
    assert path == Path("some.onnx")
    assert all(torch.equal(one, weights("a")[name]) for name, one in policy.state_dict().items())
    assert policy.forward_eval(observations)[1].shape == (16, 1)


def test_help_has_the_engine_s_docstring(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("train", "my_game:make", "--help")
    said = " ".join(capfd.readouterr().out.split())
    assert "arguments of my_game:make" in said
    assert "share of rows that wait. (default: 0.0)" in said
    with pytest.raises(SystemExit):
        run("train", "--help")
    assert "--deck1" in capfd.readouterr().out


def test_a_run_folder_imports_nothing_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    few = [*FEW, "--total-steps", "256", "--eval-games", "0"]
    assert run("train", "my_game:make", *few, "--folder", "a") == 0
    del sys.modules["my_game"]
    for command in (["eval", "a"], ["train", "--resume", "a"], ["export", "a"], ["verify", "a"]):
        assert run(*command) == 2
        assert "name it again on the command line, my_game:make" in capfd.readouterr().err
        assert "my_game" not in sys.modules
    assert run("eval", "a", "my_game:deaf") == 2
    assert "was trained with engine 'my_game:make', not 'my_game:deaf'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["my_game:mke"], "my_game has no mke; it has make"),
        (["my_game"], "no game is named 'my_game'; take dou_dizhu or essence_wars, or"),
        (["my_game:SPEC"], "of type ActionSpec; it must be a function or class"),
        (["my_game:deaf"], "buffers of its own: give the factory the arguments buf=None"),
        (["my_game:Gym"], "my_game:Gym has no attribute legal_layout"),
        (["my_game:make", "--minibatch-size", "1000"], "minibatch_size 1000 must divide"),
        (["my_game:make", "--total-steps", "9"], "total_steps 9 is less than one rollout"),
        (["my_game:make", "--num-workers", "2", "--num-envs", "3"], "must divide num_envs 3"),
        (["--config", "gone.toml"], "gone.toml"),
        (["--config", "bad.toml"], "bad.toml: learning_rte in [trainer] does not exist; take lear"),
        (["--config", "odd.toml"], "odd.toml: [trainr] does not exist; take trainer"),
        (["--config", "type.toml"], "hidden_size must be of type int, got 'wide'"),
        (["--config", "arg.toml"], "no argument 'num_agent'; it takes num_agents"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(
    arguments: list[str], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {
        "bad": "[trainer]\nlearning_rte = 1.0",
        "odd": "[trainr]\ngamma = 1.0",
        "type": '[encoder]\nhidden_size = "wide"',
        "arg": 'engine = "my_game:make"\n[env]\nnum_agent = 3',
    }
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_text(text)
    assert run("train", *arguments) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert words in said
    assert not (tmp_path / "runs").exists()


def test_settings_are_the_same_after_a_file() -> None:
    settings = Settings(deck1="random", adam_eps=1e-12, recurrent=True, seed=2**62, head="flat")
    Path("s.toml").write_text(settings.as_toml())
    assert Settings(**read_toml(Path("s.toml"))) == settings


# Run folders


def test_a_folder_that_is_in_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By a second run of the same second, one with the same folder, and a second resume."""
    monkeypatch.setattr(cli.time, "strftime", lambda form: "20260101-000000")
    few = ["train", *FEW, "--num-games", "16", "--total-steps", "128", "--eval-games", "0"]
    assert run(*few) == 0
    assert run(*few) == 2
    assert "already holds a run" in capfd.readouterr().err
    for folder, arguments in (
        (tmp_path / "runs" / "20260101-000000-seed2", [*few, "--seed", "2"]),
        (tmp_path / "mine", [*few, "--folder", "mine"]),
        (tmp_path / "runs" / "20260101-000000-seed1", ["train", "--resume", "runs/{}"]),
    ):
        folder.mkdir(exist_ok=True)
        before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        with claimed(folder):
            assert run(*(one.format(folder.name) for one in arguments)) == 2
        assert "is that of a run that is alive" in capfd.readouterr().err
        assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert run("train", "--resume", "runs/20260101-000000-seed1") == 0  # it is free again


def test_a_full_disk_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = ["train", *FEW, "--num-games", "16", "--total-steps", "128", "--eval-games", "0"]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f".checkpoint.pt.{os.getpid()}").symlink_to("/dev/full")
    assert run(*few, "--folder", "run") == 2
    assert re.search("the disk is full, and .*checkpoint.pt was not", capfd.readouterr().err)
    assert run(*few, "--folder", "run") == 0  # nothing is left in the way


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_saves_the_run(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # one that nohup ignores stays ignored
    try:
        with monkeypatch.context() as patch:
            patch.setattr(signal, "SIGINT", number)  # what stop_after sends
            stop_after(2, patch)
            said: list[str] = []
            report = train.train(SMALL, tmp_path / "run", said.append)
    finally:
        signal.signal(number, before)
    assert report.interrupted
    assert "to continue: python" in said[-1]
    assert read_checkpoint(tmp_path / "run")["trainer"]["epoch"] == 2
    assert not train.resume(tmp_path / "run", say=quiet).interrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(number: signal.Signals, tmp_path: Path) -> None:
    """Slurm sends SIGTERM to all processes at once; SIGKILL reaches the parent alone."""
    few = ["--num-games", "16", *FEW, "--eval-games", "0", "--total-steps", "50000000"]
    command = [sys.executable, "-m", "tcg_flatpolicy", "train", *few, "--num-workers", "2"]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*command, "--folder", "run", "--checkpoint-seconds", "0"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 100
        metrics = tmp_path / "run" / "metrics.csv"
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        if number == signal.SIGTERM:
            os.killpg(process.pid, number)
        else:
            process.kill()
        out, _ = process.communicate(timeout=60)
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if number == signal.SIGTERM:
        assert process.returncode == 130, out
        assert "interrupted; the run is saved up to this step" in out
        assert (tmp_path / "run" / "report.json").exists()


def test_a_flipped_byte_is_named_or_changes_nothing(tmp_path: Path) -> None:
    train.train(replace(SMALL, total_steps=128), tmp_path / "run", quiet)
    path = tmp_path / "run" / "checkpoint.pt"
    whole, content = path.read_bytes(), read_checkpoint(path)
    refused = 0
    for place in range(0, len(whole), len(whole) // 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            read = read_checkpoint(path)
        except ValueError as error:
            refused += str(path) in str(error)
        else:
            for name, one in content["policy"].items():
                assert torch.equal(one, read["policy"][name]), place
    assert refused > 75


def test_a_missing_key_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train.train(replace(SMALL, total_steps=128), tmp_path / "run", quiet)
    whole = read_checkpoint(tmp_path / "run")
    some = next(iter(whole["policy"]))
    for part, name in (
        *((None, name) for name in whole if name not in ("trainer", "settings", "policy")),
        # Those of an earlier version had none of these two.
        *(("trainer", name) for name in whole["trainer"] if name not in ("buffers", "begun")),
        ("policy", some),
    ):
        inner = whole if part is None else whole[part]
        less = {key: value for key, value in inner.items() if key != name}
        shutil.copytree(tmp_path / "run", tmp_path / "less", dirs_exist_ok=True)
        content = less if part is None else {**whole, part: less}
        torch.save(content, tmp_path / "less" / "checkpoint.pt")
        capfd.readouterr()
        command = ["eval", "less"] if part == "policy" else ["train", "--resume", "less"]
        assert run(*command) == 2, name
        said = capfd.readouterr().err
        assert name in said
        assert said.count("\n") == 1
