"""Old name of `tcg_flatpolicy.sequential`."""

from tcg_flatpolicy._moved import moved

__getattr__ = moved(__name__, "tcg_flatpolicy.sequential")
