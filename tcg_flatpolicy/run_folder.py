"""Old name of `tcg_flatpolicy.app.run_folder` and `tcg_flatpolicy.provenance`."""

from tcg_flatpolicy._moved import moved

__getattr__ = moved(__name__, "tcg_flatpolicy.provenance", "tcg_flatpolicy.app.run_folder")
