"""Old name of `tcg_flatpolicy.games.essence_wars`."""

from tcg_flatpolicy._moved import moved

__getattr__ = moved(
    __name__,
    "tcg_flatpolicy.games.essence_wars",
    "tcg_flatpolicy.games.essence_wars.engine",
    "tcg_flatpolicy.games.essence_wars.environment",
    "tcg_flatpolicy.games.essence_wars.encoder",
)
