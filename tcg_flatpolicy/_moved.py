"""Old names of modules: what they held, with a warning that says where it is now."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def moved(old: str, *new: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that holds nothing but old names.

    It imports the new modules when a name is asked for, and no sooner. It issues a
    DeprecationWarning at the place that asks.

    Args:
        old: full name of the module.
        new: full names of the modules that its names are in now; the first that has one gives it.

    Raises:
        AttributeError: on access to a name that none of them has.
    """

    def __getattr__(name: str) -> Any:
        if not name.startswith("__"):
            for place in new:
                module = importlib.import_module(place)
                if hasattr(module, name):
                    warnings.warn(
                        f"{old}.{name} has moved to {place}.{name}",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    return getattr(module, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return __getattr__
