"""Several processes: torchrun's ranks with one policy, and PufferLib's worker processes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pufferlib.models
import pufferlib.vector
import pytest
import torch

import tcg_flatpolicy as fp
from tcg_flatpolicy import distributed
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.app.train import make_policy, trained_policy
from tcg_flatpolicy.games.essence_wars import EssenceWars, EssenceWarsEncoder
from tcg_flatpolicy.verify import LegalityMonitor
from tests.games import Bandit, BanditEncoder, trainer_config

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent
EPOCHS = {
    "flat": 104,
    "autoregressive": 8,
    "recurrent": 8,
    "recurrent autoregressive": 8,
    "stock LSTMWrapper": 8,
    "minibatches": 8,
}
"""Kinds of policy and trainer that a rank runs, and for how long."""
AGENTS, HORIZON = 16, 4


def torchrun(
    folder: Path, *arguments: str, seconds: float = 150, sigint_at: Path | None = None
) -> tuple[int, str]:
    """Runs two ranks in a folder; (exit status, what they printed). Too long, and all are killed.

    With sigint_at, SIGINT goes to rank 1, and to nothing else, once that file is there.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    printed = folder / "torchrun.txt"
    # To a file: a pipe that nobody reads fills up, and its writer waits.
    with printed.open("w") as out:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + seconds
    try:
        while process.poll() is None:
            if time.monotonic() > deadline:
                pytest.fail(f"no end after {seconds} s; printed so far:\n{printed.read_text()}")
            if sigint_at is not None and sigint_at.exists():
                for child in psutil.Process(process.pid).children():
                    if child.environ()["RANK"] == "1":
                        child.send_signal(signal.SIGINT)
                sigint_at = None
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun passes it on, and kills what does not follow
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
    return process.returncode, printed.read_text()


def run_rank(folder: Path) -> None:
    """What each rank does; leaves what it saw in the folder, for the tests."""
    rank, device = distributed.start()
    torch.set_num_threads(1)
    seen: dict[str, Any] = {
        "asked": [distributed.on_any_rank(flag) for flag in (False, rank == 1, True)],
        "added": distributed.sum_over_ranks(2**40 + rank),
    }
    for kind, epochs in EPOCHS.items():
        seen[kind] = train_kind(kind, epochs, rank, device, folder)
    torch.save(seen, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def train_kind(kind: str, epochs: int, rank: int, device: str, folder: Path) -> dict[str, Any]:
    from pufferlib.pufferl import PuffeRL

    torch.manual_seed(rank)  # other weights and other draws on each rank
    vecenv = pufferlib.vector.make(
        Bandit,
        env_kwargs={"num_agents": AGENTS},
        backend=pufferlib.vector.Serial,
        num_envs=1,
        seed=rank,
    )
    env = vecenv.driver_env
    head = "autoregressive" if "autoregressive" in kind else "flat"
    maker = fp.RecurrentPolicy if kind.startswith("recurrent") else fp.Policy
    policy = maker(env, head=head, encoder=BanditEncoder(env.legal_layout)).to(device)
    trained: torch.nn.Module = policy
    if kind == "stock LSTMWrapper":
        size = policy.hidden_size
        trained = pufferlib.models.LSTMWrapper(env, policy, size, size).to(device)
    several = {"minibatch_size": 16, "update_epochs": 2} if kind == "minibatches" else {}
    config = trainer_config(
        vecenv,
        folder / f"{rank}",
        seed=rank,
        device=device,
        use_rnn=kind.startswith("recurrent") or trained is not policy,
        bptt_horizon=HORIZON,
        ent_coef=0.01,
        total_timesteps=10**9,
        **several,
    )
    legal_tuples, empty_rows = [], []
    furthest, shown = 0.0, hashlib.sha256()
    first = [p.detach().clone() for p in trained.parameters()]
    policy.explore(3.0 - rank, 0.2 + 0.1 * rank)  # before distribute(): rank 0's holds
    distributed_policy = distributed.distribute(trained)
    numbers = tuple(policy.exploration.numbers.tolist())
    began_with = numbers, (policy.temperature, policy.epsilon)
    with contextlib.redirect_stdout(io.StringIO()):  # the dashboard
        trainer = PuffeRL(config, vecenv, distributed_policy)
        for epoch in range(epochs):
            # A rollout's first lists were dealt at the end of the one before, so each share is
            # kept for two rollouts: the second has no other lists.
            env.empty = [(0.0, 0.0), (0.5, 1.0), (1.0, 1.0), (1.0, 0.5)][epoch // 2 % 4][rank]
            policy.explore(1.0 + 0.1 * (epoch % 3) + 0.3 * rank, 0.1 * rank)
            trainer.evaluate()
            lists = env.legal_layout.read(trainer.observations.flatten(0, 1).cpu())
            legal_tuples.append(int(lists.counts.sum()))
            empty_rows.append(float((lists.counts == 0).float().mean()))
            shown.update(trainer.observations.cpu().numpy().tobytes())
            if (epoch + rank) % 2:
                trainer.last_log_time = time.time()  # this rank's clock says: not now
            distributed.log_together(trainer)
            trainer.train()
            furthest = max(furthest, float((trainer.ratio - 1).abs().max()))
    trainer.utilization.stop()
    return {
        "moved": any(
            not torch.equal(a, b) for a, b in zip(first, trained.parameters(), strict=True)
        ),
        "parameters": {name: p.detach().cpu() for name, p in trained.named_parameters()},
        "exploration": (float(policy.temperature), float(policy.epsilon)),
        "began_with": began_with,
        "finite": all(bool(p.isfinite().all()) for p in trained.parameters()),
        "furthest_ratio": furthest,
        "legal_tuples": legal_tuples,
        "empty_rows": empty_rows,
        "shown": shown.hexdigest(),
        "illegal": env.illegal_actions,
        "played": env.played,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    status, printed = torchrun(folder, "-m", "tests.test_distributed", str(folder))
    assert status == 0, printed
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("kind", EPOCHS)
def test_both_ranks_have_the_same_parameters_bit_for_bit(ranks: Any, kind: str) -> None:
    one, other = (rank[kind] for rank in ranks)
    assert one["shown"] != other["shown"]  # from other games
    assert one["parameters"].keys() == other["parameters"].keys()
    for name, value in one["parameters"].items():
        assert torch.equal(value, other["parameters"][name]), name
    for rank in (one, other):
        assert rank["moved"]
        assert rank["finite"]
        assert rank["illegal"] == 0
        assert rank["played"] == EPOCHS[kind] * AGENTS * HORIZON


@pytest.mark.parametrize("kind", EPOCHS)
def test_a_rank_without_a_legal_tuple_in_a_minibatch_takes_part(ranks: Any, kind: str) -> None:
    one, other = (rank[kind] for rank in ranks)
    tuples = list(zip(one["legal_tuples"], other["legal_tuples"], strict=True))
    assert any(a and not b for a, b in tuples)
    assert any(b and not a for a, b in tuples)
    assert (0, 0) in tuples
    # Half of the rows empty on a rank while all are on the other, within 5 standard deviations.
    shares = list(zip(one["empty_rows"], other["empty_rows"], strict=True))
    for half, all_of_them in (shares[3], shares[7][::-1]):
        assert abs(half - 0.5) < 5 * (0.25 / (AGENTS * HORIZON)) ** 0.5
        assert all_of_them == 1.0


@pytest.mark.parametrize("kind", [kind for kind in EPOCHS if kind != "minibatches"])
def test_the_ratio_is_one_with_exploration_of_the_rank_s_own(ranks: Any, kind: str) -> None:
    for rank, seen in enumerate(ranks):
        assert seen[kind]["furthest_ratio"] < 1e-5
        last = (EPOCHS[kind] - 1) % 3
        assert seen[kind]["exploration"] == pytest.approx((1 + 0.1 * last + 0.3 * rank, 0.1 * rank))


@pytest.mark.parametrize("kind", EPOCHS)
def test_every_rank_starts_from_the_exploration_of_rank_0(ranks: Any, kind: str) -> None:
    """What Python computes with is what the buffers hold, which were broadcast."""
    for rank in ranks:
        for pair in rank[kind]["began_with"]:
            assert pair == pytest.approx((3.0, 0.2))


def test_all_ranks_hear_of_a_flag_on_any(ranks: Any) -> None:
    assert [rank["asked"] for rank in ranks] == [[False, True, True]] * 2
    assert [rank["added"] for rank in ranks] == [2**41 + 1] * 2


@pytest.mark.parametrize(
    ("device", "processes", "error", "complaint"),
    [
        ("auto", None, RuntimeError, "LOCAL_WORLD_SIZE is not in the environment"),
        ("tpu", "1", ValueError, "auto, cpu or cuda, got 'tpu'"),
        ("cuda", "1000", ValueError, "1000 processes need a GPU each"),
    ],
)
def test_start_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    processes: str | None,
    error: type[Exception],
    complaint: str,
) -> None:
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": processes}.items():
        if value is None:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, value)
    with pytest.raises(error, match=complaint):
        distributed.start(device)
    assert not torch.distributed.is_initialized()


def test_distribute_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"call distributed.start\(\) before"):
        distributed.distribute(torch.nn.Linear(1, 1))


def test_the_example_trains_on_the_real_game(tmp_path: Path) -> None:
    status, printed = torchrun(tmp_path, str(ROOT / "examples/distributed.py"), "8192")
    assert status == 0, printed  # an illegal action raises
    one, other = (
        torch.load(tmp_path / f"policy{rank}.pt", weights_only=True, map_location="cpu")
        for rank in (0, 1)
    )
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    make_policy(Settings(), EssenceWars(1)).load_state_dict(one)


COMMAND = ["-m", "tcg_flatpolicy", "train", "--num-games", "32", "--bptt-horizon", "16"]
COMMAND += ["--minibatch-size", "256", "--folder", "run", "--total-steps"]


def test_the_command_line_has_one_summary(tmp_path: Path) -> None:
    status, printed = torchrun(tmp_path, *COMMAND, "4096", "--eval-games", "20")
    assert status == 0, printed
    for words in ("done", "steps            4,096 in", "illegal actions  0 of", "run folder"):
        assert printed.count(words) == 1, printed
    assert printed.count("of 20 games") == 4
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 4096
    assert report["illegal"] == 0
    *_, last = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert last.startswith("4096,")
    settings, _ = trained_policy(tmp_path / "run")
    assert settings.total_steps == 4096


def test_sigint_to_one_rank_ends_all_with_one_summary(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    every_epoch = ["--checkpoint-seconds", "0", "--eval-games", "0"]
    status, printed = torchrun(
        tmp_path, *COMMAND, "50000000", *every_epoch, sigint_at=folder / "checkpoint.pt"
    )
    assert status != 0
    assert printed.count("interrupted; the run is saved up to this step") == 1, printed
    assert printed.count("illegal actions  0 of") == 1
    report = json.loads((folder / "report.json").read_text())
    assert report["interrupted"]
    assert report["steps"] % (2 * 32 * 16) == 0  # as many epochs on both ranks
    trained_policy(folder)


def test_two_workers_train_what_serial_trains(trainers: Any) -> None:
    """The same games in worker processes: the same rollouts, so the same weights, bit for bit."""
    weights = []
    for backend, more in (
        (pufferlib.vector.Serial, {}),
        (pufferlib.vector.Multiprocessing, {"num_workers": 2, "overwork": True}),
    ):
        torch.manual_seed(0)
        vecenv = LegalityMonitor(
            pufferlib.vector.make(
                EssenceWars,
                # A worker that raises is waited for for ever; this counts.
                env_kwargs={"num_games": 32, "illegal": "noop"},
                backend=backend,
                num_envs=2,
                seed=1,
                **more,
            )
        )
        env = vecenv.driver_env
        policy = fp.FlatPolicy(env, encoder=EssenceWarsEncoder(env.legal_layout, 32, 8))
        trainer = trainers(vecenv, policy, bptt_horizon=32, total_timesteps=10**9)
        games: list[float] = []  # illegal actions in each game that ended
        for _ in range(3):
            trainer.evaluate()
            games += trainer.stats["illegal_actions"]
            trainer.train()
        assert trainer.global_step == 3 * 64 * 32
        assert games
        assert not any(games)
        assert vecenv.counts.sent > 5000
        assert vecenv.counts.illegal == 0
        weights.append(policy.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
