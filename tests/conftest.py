"""The same examples on every machine, and one thread, so that a test's time says something."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tcg_flatpolicy.kernels import cpu

settings.register_profile(
    "reproducible", deadline=None, derandomize=True, max_examples=60, print_blob=True
)
settings.load_profile("reproducible")
torch.set_num_threads(1)
if not torch.cuda.is_available():  # read when Triton is imported, by whomever
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def _every_warning() -> Iterator[None]:
    """Torch says some warnings once a process; with this, each time."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@contextlib.contextmanager
def deciding_by(name: str) -> Iterator[None]:
    """Skips what needs a kernel that is not here."""
    with contextlib.ExitStack() as until_the_end:
        try:
            until_the_end.enter_context(cpu.deciding_by(name))
        except RuntimeError as error:
            pytest.skip(str(error))
        yield


@pytest.fixture(params=["packed", *cpu.OBJECTS])
def each_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to decide that is there, in turn: for what must hold whichever does."""
    with deciding_by(request.param):
        yield request.param


@pytest.fixture
def trainers(tmp_path: Path) -> Iterator[Any]:
    """Makes PuffeRL trainers; stops their threads and workers.

    ``trainers(vecenv, policy, **changes)``; the changes are of tests.games.trainer_config.
    """
    # Here, since importing pufferl takes SIGINT, and not every test needs PufferLib.
    from pufferlib import pufferl

    from tests.games import trainer_config

    made = []

    def new(vecenv: Any, policy: Any, **changes: Any) -> Any:
        made.append(pufferl.PuffeRL(trainer_config(vecenv, tmp_path, **changes), vecenv, policy))
        return made[-1]

    yield new
    for trainer in made:
        trainer.utilization.stop()
        trainer.vecenv.close()
    torch.set_autocast_enabled("cpu", False)  # train() enters it and never leaves
