"""The same examples on every machine, and one thread, so that a test's time says something."""

import torch
from hypothesis import settings

settings.register_profile(
    "reproducible", deadline=None, derandomize=True, max_examples=60, print_blob=True
)
settings.load_profile("reproducible")
torch.set_num_threads(1)
