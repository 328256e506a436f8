"""Old names of modules: what they held, with a warning that says where it is now."""

import importlib
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_GAME = "games.essence_wars"
MOVED = {
    "cli": ["app.train", "app.cli"],
    "envs": [],
    "envs.essence_wars": [_GAME, f"{_GAME}.engine", f"{_GAME}.environment", f"{_GAME}.encoder"],
    "envs.parallel": [f"{_GAME}.parallel"],
    "envs.two_players": [f"{_GAME}.two_players"],
    "evaluate": ["puffer.games", "app.evaluate"],
    "heads.sequential": ["sequential"],
    "policy": ["puffer", "encoders"],
    "puffer_next": ["puffer.next_generation"],
    "resume": ["puffer.trainer_state"],
    "run_folder": ["provenance", "app.run_folder"],
    "train": ["app.settings", "app.engine", "app.train"],
}
"""Where the names of each are looked up, in this order."""


class OldModules(MetaPathFinder, Loader):
    """Makes the modules of MOVED, which are no files; what they name is imported when asked for."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        here, _, old = name.partition(".")
        if here != "tcg_flatpolicy" or old not in MOVED:
            return None
        return ModuleSpec(name, self, is_package=old == "envs")

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        places = [f"tcg_flatpolicy.{place}" for place in MOVED[old.partition(".")[2]]]

        def __getattr__(name: str) -> Any:
            for place in [] if name.startswith("__") else places:
                new = importlib.import_module(place)
                if hasattr(new, name):
                    words = f"{old}.{name} has moved to {place}.{name}"
                    warnings.warn(words, DeprecationWarning, stacklevel=2)
                    return getattr(new, name)
            raise AttributeError(f"module {old!r} has no attribute {name!r}")

        module.__getattr__ = __getattr__  # type: ignore[method-assign]
