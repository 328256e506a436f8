"""Old names of the modules of `tcg_flatpolicy.games.essence_wars`."""
