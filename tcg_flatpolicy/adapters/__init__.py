"""Environments that show their legal actions in other ways, as this library's policies read them.

Each adapter gives observations of bytes, with the list in them, and brings ``action_spec`` and
``legal_layout``. So ``train my_game:make`` takes what it returns, and PufferLib's emulation does.
"""

from tcg_flatpolicy.adapters.gymnasium import ListedEnv, from_gymnasium
from tcg_flatpolicy.adapters.pettingzoo import ListedParallel, ListedTurns, from_aec, from_parallel
from tcg_flatpolicy.adapters.spiel import SpielEnv, from_spiel

__all__ = [
    "ListedEnv",
    "ListedParallel",
    "ListedTurns",
    "SpielEnv",
    "from_aec",
    "from_gymnasium",
    "from_parallel",
    "from_spiel",
]
