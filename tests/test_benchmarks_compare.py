"""The comparison's folder: whose it is, and what is not done twice."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import compare


def test_a_folder_holds_one_scale(tmp_path: Path) -> None:
    folder = tmp_path / "compare"
    compare.claim(compare.QUICK, folder)
    compare.claim(compare.QUICK, folder)  # goes on
    with pytest.raises(ValueError, match=r"seeds=1, not 2; name another folder with --folder"):
        compare.claim(replace(compare.QUICK, seeds=2), folder)
    with pytest.raises(ValueError, match=r"quick=True, not False"):
        compare.claim(compare.FULL, folder)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no comparison"):
        compare.claim(compare.QUICK, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_part_is_measured_once(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"ratio": 2.5}

    first, again = (compare.once(tmp_path / "speed.json", make) for _ in range(2))
    assert len(made) == 1
    assert first == again == json.loads((tmp_path / "speed.json").read_text())
    assert first["ratio"] == 2.5
    assert {"commit", "date", "machine", "versions"} <= first["provenance"].keys()


@pytest.mark.parametrize("content", ["[1]", "not json"])
def test_a_configuration_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json is no configuration .* remove it"):
        compare.claim(compare.QUICK, tmp_path)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "compare").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder with --folder"):
        compare.claim(compare.QUICK, tmp_path / "compare")


def test_the_wrong_folder_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare.claim(compare.FULL, tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--quick", "--folder", str(tmp_path)])
    assert compare.main() == 2
    assert "holds a comparison with quick=False, not True" in capsys.readouterr().err


def test_shares_and_rates_in_words() -> None:
    assert compare.percent(0.0) == "0"
    assert compare.percent(0.0004) == "0.0%"  # there were some
    one = compare.learning.spread([0.5])
    assert compare.rate(one) == "50.0%"
    three = compare.learning.spread([0.4, 0.5, 0.6])  # t(2) = 4.303, sd 0.1
    assert compare.rate(three) == "50.0% [25.2, 74.8]"
    assert compare.rate(compare.learning.spread([0.9, 1.0])).endswith(
        ", 100.0]"
    )  # no share above 1
