"""Old name of `tcg_flatpolicy.app.settings`, `tcg_flatpolicy.app.engine` and `.app.train`."""

from tcg_flatpolicy._moved import moved

__getattr__ = moved(
    __name__, "tcg_flatpolicy.app.settings", "tcg_flatpolicy.app.engine", "tcg_flatpolicy.app.train"
)
