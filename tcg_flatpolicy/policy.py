"""Old name of `tcg_flatpolicy.puffer` and `tcg_flatpolicy.encoders`."""

from tcg_flatpolicy._moved import moved

__getattr__ = moved(__name__, "tcg_flatpolicy.puffer", "tcg_flatpolicy.encoders")
