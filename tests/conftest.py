"""The same examples on every machine, and one thread, so that a test's time says something."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile(
    "reproducible", deadline=None, derandomize=True, max_examples=60, print_blob=True
)
settings.load_profile("reproducible")
torch.set_num_threads(1)


@pytest.fixture
def _every_warning() -> Iterator[None]:
    """Torch says some warnings once a process; with this, each time."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)
