"""Old names of modules: what they held, with a warning that says where it is now."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def moved(old: str, *new: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of the module ``old``: finds a name in ``new``, imported only then."""

    def __getattr__(name: str) -> Any:
        for place in () if name.startswith("__") else new:
            module = importlib.import_module(place)
            if hasattr(module, name):
                words = f"{old}.{name} has moved to {place}.{name}"
                warnings.warn(words, DeprecationWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return __getattr__
