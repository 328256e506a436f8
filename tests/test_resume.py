"""A run that was stopped and resumed is the run that never stopped, bit for bit."""

from __future__ import annotations

import csv
import io
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pufferlib.vector
import pytest
import torch
from pufferlib.pufferl import Utilization

import tcg_flatpolicy as fp
from tcg_flatpolicy.app import cli, evaluate, train
from tcg_flatpolicy.games.essence_wars import EssenceWars, EssenceWarsEncoder
from tcg_flatpolicy.games.essence_wars.two_players import EssenceWarsTwoPlayers
from tcg_flatpolicy.puffer import restore_trainer, trainer_state
from tests.games import Bandit, BanditEncoder

pytestmark = pytest.mark.integration

SMALL = train.Settings(
    total_steps=6 * 128,
    num_games=16,
    bptt_horizon=8,
    minibatch_size=64,
    hidden_size=16,
    entity_size=8,
    head_width=8,
    eval_games=0,
    checkpoint_seconds=0,
)
"""Six epochs."""

EXAMPLE = Path(__file__).parent.parent / "examples" / "exploration.py"

TIMES = ("seconds", "uptime", "steps_per_second")


@pytest.fixture(autouse=True)
def _autocast_left() -> Iterator[None]:
    yield
    torch.set_autocast_enabled("cpu", False)  # train() enters it and never leaves


def quiet(line: str) -> None:
    pass


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nests of tensors and plain values differ, but for times."""
    if isinstance(one, dict):
        found = [] if one.keys() == other.keys() else [f"{path}: {set(one) ^ set(other)}"]
        for name in one.keys() & other.keys():
            if name not in TIMES:
                found += differences(one[name], other[name], f"{path}/{name}")
        return found
    if isinstance(one, (list, tuple)):
        found = [] if len(one) == len(other) else [f"{path}: {len(one)} and {len(other)}"]
        for place, pair in enumerate(zip(one, other, strict=False)):
            found += differences(*pair, f"{path}/{place}")
        return found
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    return [] if type(one) is type(other) and one == other else [f"{path}: {one} and {other}"]


def checkpoint(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content


def metrics(folder: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    return [{name: text for name, text in row.items() if name not in TIMES} for row in rows]


def stop_after(epochs: int, monkeypatch: pytest.MonkeyPatch, crash: bool = False) -> None:
    """Ends a run by SIGINT, or by a crash, after its checkpoint of an epoch."""
    written = -1  # there is one before the first epoch
    write = train.write_checkpoint

    def write_and_stop(path: Path, content: dict[str, Any]) -> None:
        nonlocal written
        write(path, content)
        written += 1
        if written == epochs and crash:
            raise OSError("the power went")
        if written == epochs:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "write_checkpoint", write_and_stop)


RUNS: dict[str, dict[str, Any]] = {
    "feed-forward": {},
    "recurrent": {
        "recurrent": True,
        "temperature": 1.5,
        "epsilon": 0.2,
        "deck2": "random",
        "prio_alpha": 0.8,
        "prio_beta0": 0.2,
    },
}


def test_runs_resumed_in_a_new_process_are_those_that_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, changes in RUNS.items():
        settings = replace(SMALL, **changes)
        train.train(settings, tmp_path / f"{name}, whole", quiet)
        with monkeypatch.context() as patch:
            stop_after(3, patch)
            report = train.train(settings, tmp_path / f"{name}, parts", quiet)
        assert report.interrupted
        assert checkpoint(tmp_path / f"{name}, parts")["trainer"]["epoch"] == 3
    code = "import sys; from tcg_flatpolicy.app.cli import main; "
    code += "sys.exit(max(main(['train', '--resume', folder]) for folder in sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / f"{name}, parts") for name in RUNS)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("illegal actions  0 of 768 played") == len(RUNS)
    for name in RUNS:
        whole, parts = (tmp_path / f"{name}, {which}" for which in ("whole", "parts"))
        assert checkpoint(whole)["trainer"]["epoch"] == 6
        # Weights, optimiser, scheduler, counters, generators, and the games with what they show.
        assert differences(checkpoint(whole), checkpoint(parts)) == []
        assert len(metrics(whole)) == 6
        assert metrics(whole) == metrics(parts)


def test_a_crash_loses_what_came_after_the_last_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SMALL, two_players=True, total_steps=4 * 256)
    train.train(settings, tmp_path / "whole", quiet)
    with monkeypatch.context() as patch:
        stop_after(2, patch, crash=True)
        with pytest.raises(OSError, match="the power went"):
            train.train(settings, tmp_path / "parts", quiet)
    # Metrics are written before the checkpoint, so that they can be ahead of it.
    ahead = (tmp_path / "parts" / "metrics.csv").read_text()
    with (tmp_path / "parts" / "metrics.csv").open("a") as file:
        file.write(ahead.splitlines()[-1].replace("512", "768", 1) + "\n")
    report = train.resume(tmp_path / "parts", say=quiet)
    assert report.steps == 4 * 256
    assert report.illegal == 0
    assert differences(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")) == []
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_a_crash_in_the_first_epoch_leaves_a_run_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SMALL, total_steps=2 * 128, checkpoint_seconds=60)
    train.train(settings, tmp_path / "whole", quiet)
    with monkeypatch.context() as patch:
        patch.delattr(train, "_metrics")
        with pytest.raises(NameError):
            train.train(settings, tmp_path / "parts", quiet)
    assert checkpoint(tmp_path / "parts")["trainer"]["epoch"] == 0
    with pytest.raises(
        FileExistsError, match=r"already holds a run; .* go on with it with --resume"
    ):
        train.train(settings, tmp_path / "parts", quiet)
    train.resume(tmp_path / "parts" / "checkpoint.pt", say=quiet)
    assert differences(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")) == []
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_a_config_that_is_not_of_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="name another folder with --folder, or delete it"):
        train.train(SMALL, tmp_path, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("number", [2, 4])
def test_an_evaluation_that_was_interrupted_is_left_out(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Second is the mode before training, fourth the mode after it; what has ended are few games.

    A run that goes on plays them again.
    """
    settings = replace(SMALL, total_steps=128, eval_games=20)
    ways, said, played = {"sampling", "mode"}, [], []
    play = train.play

    def play_and_interrupt(policy: Any, env: Any, games: int, seed: int, stopped: Any) -> Any:
        def stopped_on_the_way() -> bool:
            nonlocal asked
            asked += 1
            if len(played) == number - 1 and asked == 28:
                signal.raise_signal(signal.SIGINT)
            return bool(stopped())

        asked = 0
        played.append(play(policy, env, games, seed, stopped_on_the_way))
        return played[-1]

    with monkeypatch.context() as patch:
        patch.setattr(train, "play", play_and_interrupt)
        report = train.train(settings, tmp_path, said.append)
    assert [0 < result.games < 20 for result in played] == [False] * (number - 1) + [True]
    assert report.interrupted
    assert "to continue: python" in said[-1]
    assert set(report.before) == (ways if number == 4 else {"sampling"})
    assert set(report.after) == ({"sampling"} if number == 4 else set())
    report = train.resume(tmp_path, say=quiet)
    assert not report.interrupted
    assert set(report.before) == set(report.after) == ways
    assert {result.games for result in (*report.before.values(), *report.after.values())} == {20}


def test_total_steps_can_be_raised_where_nothing_is_annealed(tmp_path: Path) -> None:
    settings = replace(SMALL, anneal_lr=False, temperature=1.2, final_temperature=1.2)
    train.train(settings, tmp_path / "whole", quiet)
    train.train(replace(settings, total_steps=3 * 128), tmp_path / "parts", quiet)
    train.resume(tmp_path / "parts", {"total_steps": 6 * 128}, quiet)
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    of_the_schedule = [found for found in differences(whole, parts) if "/scheduler/" not in found]
    assert of_the_schedule == []
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_exploration_is_annealed_from_the_first_rollout_to_the_last(tmp_path: Path) -> None:
    exploring = {"temperature": 1.5, "final_temperature": 0.5, "epsilon": 0.1, "final_epsilon": 0.3}
    # So small that PuffeRL would not log every epoch of its own accord.
    small = {"num_games": 2, "bptt_horizon": 4, "minibatch_size": 8, "update_epochs": 1}
    train.train(replace(SMALL, total_steps=5 * 8, **small, **exploring), tmp_path, quiet)
    rows = metrics(tmp_path)
    assert len({row["value_loss"] for row in rows}) == 5
    for name, expected in (
        ("temperature", [1.5, 1.25, 1.0, 0.75, 0.5]),
        ("epsilon", [0.1, 0.15, 0.2, 0.25, 0.3]),
    ):
        assert [float(row[name]) for row in rows] == pytest.approx(expected, abs=1e-6)
        assert checkpoint(tmp_path)["policy"][name].item() == pytest.approx(expected[-1], abs=1e-6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch."""
    folder: Path = tmp_path_factory.mktemp("finished")
    train.train(replace(SMALL, total_steps=128), folder, quiet)
    return folder


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seed", "2"], "seed was 1, not 2"),
        (["--no-anneal-lr"], "anneal_lr was True, not False"),
        (["--total-steps", "256"], "total_steps was 128, not 256, which the learning rate"),
        (["--num-workers", "2"], "with num_workers the games are in other processes"),
        (["--optimizer", "muon"], "muon holds more than"),
    ],
)
def test_a_resumed_run_keeps_its_settings(
    finished: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    assert cli.main(["train", "--resume", str(finished), *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}


def test_what_cannot_be_resumed_says_why(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        train.resume(tmp_path)
    earlier = {"policy": {}, "settings": asdict(SMALL)}
    torch.save(earlier, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="of torchrun or an earlier version"):
        train.resume(tmp_path)
    content = checkpoint(finished)
    torch.save({**content, "device": "cuda"}, tmp_path / "checkpoint.pt")
    shutil.copy(finished / "metrics.csv", tmp_path)
    with pytest.raises(ValueError, match="was trained on cuda, here it would go on cpu"):
        train.resume(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="under torchrun"):
        train.resume(finished)


def test_a_run_is_named_by_its_folder_or_its_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert cli.main(["train", "--resume", str(run / "checkpoint.pt")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["run", "folder", str(run)]
    best = run / "best.pt"
    shutil.copy(run / "checkpoint.pt", best)
    assert cli.main(["train", "--resume", str(best)]) == 2
    assert f"{best} is neither a run folder nor its checkpoint.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("metrics.csv", None, "is missing, .* restore it, or start a new run"),
        ("metrics.csv", "", "is damaged: .* restore a complete one"),
        ("metrics.csv", "steps,seconds\n128,1.5\n25", "is damaged: .* restore a complete one"),
        ("metrics.csv", "steps,seconds\n64,1.5\n", "has no row of step 128, .* start a new run"),
        ("metrics.csv", "seconds\n1.5\n", "has no row of step 128, .* start a new run"),
        ("config.json", '{"settings": {', "is damaged: .* fix or delete it"),
        ("config.json", "[]", "is damaged: .* fix or delete it"),
    ],
)
def test_files_without_which_a_run_cannot_go_on_are_read_before_it_does(
    finished: Path, tmp_path: Path, name: str, content: str | None, complaint: str
) -> None:
    run, said = tmp_path / "run", []
    shutil.copytree(finished, run)
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    with pytest.raises(
        (FileNotFoundError, ValueError), match=f"{re.escape(str(run / name))} {complaint}"
    ):
        train.resume(run, say=said.append)
    assert said == []


# The environment's games


def play(env: Any, steps: int, rng: np.random.Generator) -> list[Any]:
    """Plays random legal tuples; what the environment answered."""
    answers = []
    for _ in range(steps):
        lists = env.legal_layout.read(torch.as_tensor(env.observations)).to_lists()
        actions = [legal[rng.integers(len(legal))] if legal else (0, 0, 0, 0) for legal in lists]
        *arrays, infos = env.step(np.array(actions, dtype=np.int32))
        answers.append(([array.copy() for array in arrays], infos))
    return answers


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda **more: EssenceWars(6, **more),
        lambda **more: EssenceWars(3, deck1="random", opponent="random", **more),
        lambda **more: EssenceWars(300, opponent="random", **more),  # of two batches
        lambda **more: EssenceWars(4, opponent="self", **more),
        lambda **more: EssenceWarsTwoPlayers(3, deck2="random", **more),
    ],
    ids=["greedy", "random decks", "two batches", "self", "two players"],
)
def test_replayed_games_go_on_as_the_saved_ones(make: Any) -> None:
    env = make(record=True)
    env.reset(seed=5)
    rng = np.random.default_rng(1)
    steps = 100 if env.num_agents < 100 else 40
    assert any(infos for _, infos in play(env, steps, rng))  # games ended, so others were started
    state = through_a_file(env.state_dict())
    again = make(record=True, seed=99)
    again.reset(seed=98)
    again.load_state_dict(state)
    for name in ("observations", "rewards", "terminals", "truncations"):
        assert np.array_equal(getattr(env, name), getattr(again, name)), name
    went_on = [play(one, steps, np.random.default_rng(2)) for one in (env, again)]
    for (arrays, infos), (arrays_again, infos_again) in zip(*went_on, strict=True):
        assert infos == infos_again
        for one, other in zip(arrays, arrays_again, strict=True):
            assert np.array_equal(one, other)
    assert differences(env.state_dict(), again.state_dict()) == []


def test_games_that_cannot_be_saved_or_replayed() -> None:
    with pytest.raises(ValueError, match="what replaced an illegal action cannot be replayed"):
        EssenceWars(2, illegal="random", record=True)
    with pytest.raises(RuntimeError, match="record=True"):
        EssenceWars(2).state_dict()
    env = EssenceWars(2, record=True)
    env.reset()
    with pytest.raises(RuntimeError, match="a reset with a seed"):
        env.state_dict()
    env.reset(seed=1)
    play(env, 30, np.random.default_rng(0))
    with pytest.raises(ValueError, match="of 2 games, this environment has 3"):
        EssenceWars(3).load_state_dict(env.state_dict())
    env.reset(seed=1)
    for _ in range(5):  # end_turn, which is legal in any game
        env.step(np.zeros((2, 4), dtype=np.int32))
    with pytest.raises(RuntimeError, match="led to other games than those saved"):
        EssenceWars(2, deck1="archon_burst").load_state_dict(env.state_dict())
    play(env, 30, np.random.default_rng(0))
    for other in ({"deck1": "archon_burst"}, {"opponent": "random"}):
        with pytest.raises(RuntimeError, match="led to other games than those saved"):
            EssenceWars(2, **other).load_state_dict(env.state_dict())


# A trainer of one's own


def test_a_loop_of_one_s_own_resumes(trainers: Any) -> None:
    """Also between logs, when the trainer holds the statistics of several epochs."""

    def new(seed: int) -> Any:
        torch.manual_seed(seed)
        vecenv = pufferlib.vector.make(
            EssenceWars,
            env_kwargs={"num_games": 16, "record": True},
            backend=pufferlib.vector.Serial,
            num_envs=2,
            seed=seed,
        )
        env = vecenv.driver_env
        policy = fp.FlatPolicy(env, encoder=EssenceWarsEncoder(env.legal_layout, 16, 8), width=8)
        return trainers(vecenv, policy, bptt_horizon=16, total_timesteps=8 * 32 * 16)

    def epochs(trainer: Any, number: int) -> None:
        for _ in range(number):
            trainer.evaluate()
            np.random.random()  # as an environment may  # noqa: NPY002
            trainer.last_log_time = float("inf") if trainer.epoch else 0.0
            trainer.train()

    trainer = new(1)
    epochs(trainer, 3)
    assert trainer.stats["win"]
    state = through_a_file(trainer_state(trainer))
    epochs(trainer, 2)
    expected, shown = trainer_state(trainer), trainer.vecenv.observations.copy()
    again = new(2)
    restore_trainer(again, state)
    assert again.uptime >= state["uptime"]
    epochs(again, 2)
    assert differences(expected, trainer_state(again)) == []
    assert np.array_equal(shown, again.vecenv.observations)


def test_a_trainer_that_cannot_be_saved(trainers: Any) -> None:
    vecenv = pufferlib.vector.make(Bandit, backend=pufferlib.vector.Serial, num_envs=1, seed=1)
    env = vecenv.driver_env
    policy = fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))
    trainer = trainers(vecenv, policy, optimizer="muon")
    with pytest.raises(TypeError, match="Bandit has neither get_state and set_state nor"):
        trainer_state(trainer)
    env.state_dict = env.load_state_dict = dict
    trainer.evaluate()
    trainer.train()
    with pytest.raises(TypeError, match=r"state\['optimizer'\].* take the optimizer adam"):
        trainer_state(trainer)
    trainer.vecenv = pufferlib.vector.Multiprocessing.__new__(pufferlib.vector.Multiprocessing)
    trainer.vecenv.close = lambda: None
    with pytest.raises(TypeError, match="Multiprocessing does not show its environments"):
        trainer_state(trainer)


def test_the_example_stops_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A second time it has nothing left to train, and plays what it played the first time.

    For more steps the learning rate would fall another way, and it ends.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["examples/exploration.py", "8192"])
    few_games = partial(evaluate.play, env=EssenceWars(4), games=4)
    monkeypatch.setattr(evaluate, "play", lambda policy, *_, seed: few_games(policy, seed=seed))
    played = []
    for _ in range(2):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        played.append(capfd.readouterr().out.splitlines()[-3:])
    assert [line.split(":")[0].strip() for line in played[0]] == ["Policy", "Greedy", "TopK"]
    assert played[0] == played[1]
    saved = torch.load(tmp_path / "exploration.pt", weights_only=True)
    assert saved["global_step"] == 8192
    monkeypatch.setattr(sys, "argv", ["examples/exploration.py", "16384"])
    with pytest.raises(ValueError, match=r"annealed over 1 epochs, the trainer's over 2, .* anew"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    threads = [thread for thread in threading.enumerate() if isinstance(thread, Utilization)]
    assert all(thread.stopped for thread in threads)  # or the process would not end
