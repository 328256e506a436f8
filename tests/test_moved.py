"""Every public name of a module that has moved is still there, with a warning."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import pytest

pytestmark = pytest.mark.integration

OLD = {
    "tcg_flatpolicy.train": "Settings Report make_policy evaluate train resume saved_settings",
    "tcg_flatpolicy.evaluate": "WinRate wilson_interval play play_match",
    "tcg_flatpolicy.run_folder": (
        "CHECKPOINT write_whole write_json read_json write_csv read_csv write_checkpoint "
        "read_checkpoint folder_of provenance draw_curves"
    ),
    "tcg_flatpolicy.cli": "main trained_policy",
    "tcg_flatpolicy.envs.essence_wars": (
        "HAND BOARD SUPPORTS PLACES SPEC INDEX_TO_TUPLE TUPLE_TO_INDEX MAX_LEGAL "
        "OBSERVATION_DTYPE LAYOUT DECKS GAMES_IN_BATCH GAME_MODES PLAYER_TO_MOVE PLAYERS "
        "PLAYER_SIZE CARDS COMMANDERS MOST_CARDS CREATURE_SIZE KEYWORD_COLUMN KEYWORDS "
        "CARD_ID_SCALE CARD_ROWS EssenceWars look_up refusal check_room second_players_view "
        "cards_held EssenceWarsEncoder"
    ),
    "tcg_flatpolicy.envs.two_players": "EssenceWarsTwoPlayers waiting_view waiting_refusal",
    "tcg_flatpolicy.envs.parallel": "EssenceWarsParallel",
    "tcg_flatpolicy.policy": (
        "Encoding Encoder FieldEncoder Policy FlatPolicy RecurrentPolicy Greedy TopK"
    ),
    "tcg_flatpolicy.puffer_next": "NextGenerationPolicy FLOAT32_EXACT",
    "tcg_flatpolicy.resume": "trainer_state restore_trainer",
    "tcg_flatpolicy.heads.sequential": "LegalAutoregressive Conditionals",
}


@pytest.mark.parametrize("module", OLD)
def test_old_names_give_the_new_things_and_say_where(module: str) -> None:
    old = importlib.import_module(module)
    for name in OLD[module].split():
        with pytest.warns(DeprecationWarning, match=" has moved to ") as caught:
            thing = getattr(old, name)
        (warning,) = caught
        assert warning.filename == __file__
        words = str(warning.message).split()
        assert words[0] == f"{module}.{name}"
        place, _, there = words[-1].rpartition(".")
        assert there == name
        assert getattr(importlib.import_module(place), name) is thing
        if callable(thing) and not place.endswith(("essence_wars", ".puffer")):
            assert f"{thing.__module__}.".startswith(f"{place}.")


def test_a_name_that_never_was() -> None:
    old = importlib.import_module("tcg_flatpolicy.train")
    with pytest.raises(AttributeError, match=r"'tcg_flatpolicy\.train' has no attribute 'trian'"):
        _ = old.trian


def test_ways_to_import() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import tcg_flatpolicy.evaluate
        from tcg_flatpolicy.envs import essence_wars
        from tcg_flatpolicy.train import train

        from tcg_flatpolicy import cli
        from tcg_flatpolicy.app import evaluate as new

        assert tcg_flatpolicy.evaluate.play is new.play
        assert callable(cli.main)
        assert callable(train)
        assert essence_wars.EssenceWars.__name__ == "EssenceWars"


def test_an_old_module_imports_nothing_until_it_is_asked() -> None:
    code = (
        "import sys, tcg_flatpolicy.train, tcg_flatpolicy.envs.essence_wars, tcg_flatpolicy.cli\n"
        "print([name for name in sys.modules if name.startswith(('tcg_flatpolicy.app', 'pufferlib',"
        " 'tcg_flatpolicy.games'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
