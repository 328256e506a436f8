"""Old name of `tcg_flatpolicy.games.essence_wars.parallel`."""

from tcg_flatpolicy._moved import moved

__getattr__ = moved(__name__, "tcg_flatpolicy.games.essence_wars.parallel")
