"""Old name of `tcg_flatpolicy.games.essence_wars`."""

from tcg_flatpolicy._moved import moved

_GAME = "tcg_flatpolicy.games.essence_wars"
__getattr__ = moved(__name__, _GAME, f"{_GAME}.engine", f"{_GAME}.environment", f"{_GAME}.encoder")
