"""Imports what ``module:name`` names, and says in one line what failed."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def load(path: str) -> Any:
    """The attribute that ``module:name`` names; dots in the name reach into it.

    Raises:
        ValueError: there is no colon, no such module or no such attribute, or the module raised
            something when it was imported.
        ImportError: an import in the module failed.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{path!r} must be module:name, such as mygame:make")
    try:
        with one_line(f"importing {module_name} failed"):
            found = importlib.import_module(module_name)
    except ImportError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{cause.name}."
        ):
            raise ValueError(
                f"no module {cause.name!r}, neither in the current directory nor installed; run "
                "this in the directory that holds it, or set PYTHONPATH"
            ) from None
        raise
    for attribute in name.split("."):
        if not hasattr(found, attribute):
            public = [name for name in dir(found) if not name.startswith("_")]
            near = difflib.get_close_matches(attribute, public) or public[:8]
            raise ValueError(f"{module_name} has no {name}; it has {', '.join(near) or 'nothing'}")
        found = getattr(found, attribute)
    return found


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Replaces any exception of a user's code by one whose message is one line.

    Raises:
        ImportError, ValueError: the message says what failed, how, and in which line of the user's
            code. Only an ImportError stays one.
    """
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split())
        where = _place(error)
        kind = ImportError if isinstance(error, ImportError) else ValueError
        raise kind(
            f"{what}: {type(error).__name__}: {words}{f' ({where})' if where else ''}"
        ) from error


def _place(error: Exception) -> str | None:
    """File and line of the innermost frame that is neither ours nor an installed package's."""
    others = (str(Path(__file__).parent.parent), sysconfig.get_path("stdlib"), "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others) and "site-packages" not in frame.filename:
            return f"{Path(frame.filename).name}, line {frame.lineno}"
    return None
