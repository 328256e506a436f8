"""Old name of `tcg_flatpolicy.puffer.games` and `tcg_flatpolicy.app.evaluate`."""

from tcg_flatpolicy._moved import moved

__getattr__ = moved(__name__, "tcg_flatpolicy.puffer.games", "tcg_flatpolicy.app.evaluate")
