"""A page of decisions: what it records, that its numbers are right, and that nothing in it runs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tcg_flatpolicy as fp
from tcg_flatpolicy.app import watch
from tcg_flatpolicy.app.cli import main
from tests.games import Bandit, BanditEncoder

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><!--"


def policy(env: Any, seed: int, head: str = "flat") -> fp.Policy:
    torch.manual_seed(seed)
    made = fp.Policy(env, head=head, encoder=BanditEncoder(env.legal_layout), width=8)
    with torch.no_grad():
        for parameter in made.head.parameters():
            parameter.mul_(4)
    return made


@pytest.fixture
def env() -> Bandit:
    return Bandit(6)


def record(env: Any, games: int = 9, head: str = "flat") -> list[dict[str, Any]]:
    policies = [policy(env, 0, head), policy(env, 1, head)]
    one = policies[0]
    return watch.record(policies, env, one.spec, one.layout, games, seed=3)


@pytest.mark.parametrize("head", ["flat", "autoregressive"])
def test_every_listed_tuple_has_its_probability(env: Bandit, head: str) -> None:
    games = record(env, head=head)
    assert len(games) == 9
    for game in games:
        for one in game["decisions"]:
            assert all(math.isclose(sum(p), 1, abs_tol=1e-4) for p in one["p"])
            assert len(one["p"]) == len(one["value"]) == 2
            assert len({tuple(words) for words in one["actions"]}) == len(one["actions"])
            assert 0 <= one["drawn"] < len(one["actions"])
            assert one["p"][0] != one["p"][1] or len(one["actions"]) == 1
    per_row = np.bincount([game["row"] for game in games], minlength=6)
    assert per_row.tolist() == [2, 2, 2, 1, 1, 1]


def test_probabilities_are_those_of_the_distribution(env: Bandit) -> None:
    one = policy(env, 0).eval()
    games = watch.record([one], env, one.spec, one.layout, 6, seed=3)
    observations, _ = env.reset(3)
    seen = torch.as_tensor(np.array(observations))
    with torch.no_grad():
        face, value = one.forward_eval(seen)
    for game in games:
        first, row = game["decisions"][0], game["row"]
        listed = one.layout.read(seen)[row : row + 1].actions
        assert len(first["actions"]) == len(listed)
        log_probs = face.distribution[row : row + 1].log_prob(listed.unsqueeze(1))
        for words, p, action, wanted in zip(
            first["actions"], first["p"][0], listed, log_probs[:, 0].exp().tolist(), strict=True
        ):
            assert one.spec.describe(action).startswith(words[0])
            assert all(word in one.spec.describe(action) for word in words)
            assert p == pytest.approx(wanted, rel=1e-4)
        assert first["value"][0] == pytest.approx(float(value[row]), rel=1e-4)


def test_it_repeats_itself(env: Bandit) -> None:
    assert record(env) == record(Bandit(6))


def test_a_policy_in_training_stays_so(env: Bandit) -> None:
    one = policy(env, 0).train()
    watch.record([one], env, one.spec, one.layout, 2, seed=3)
    assert one.training
    assert not one.exploration.drawn  # draws in eval mode are no rollout


def test_saturation_counts_choices() -> None:
    def one(*p: float) -> dict[str, Any]:
        return {"p": [list(p)], "actions": [["a"]] * len(p)}

    games = [{"decisions": [one(0.5, 0.5), one(0.9995, 0.0005)]}]
    games += [{"decisions": [one(0.9999999, 1e-7), one(0.3, 0.3, 0.4), one(1.0)]}]
    assert "4 choices: 50.0% above 0.999, 25.0% above 0.999999" in watch.saturation(games)
    assert "0 choices: nan% above" in watch.saturation([])


def test_nothing_in_the_data_reaches_the_page_as_markup(env: Bandit, tmp_path: Path) -> None:
    games = record(env)
    games[0]["decisions"][0]["state"] = [[HOSTILE, HOSTILE]]
    path = tmp_path / "page.html"
    watch.write_page(path, games, [HOSTILE, "b"], 2, HOSTILE)
    page = path.read_text()
    assert "<img" not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search(r"https?://|HASH-OF|DATA-OF", page)
    text = page.partition('id="data">')[2].partition("</script>")[0]
    data = json.loads(text)
    assert data["title"] == HOSTILE
    assert data["games"][0]["decisions"][0]["state"] == [[HOSTILE, HOSTILE]]
    assert data["games"] == games


def test_a_game_s_own_words(env: Bandit) -> None:
    env.describe = lambda record: f"card {record['card']}"  # type: ignore[attr-defined]
    for game in record(env):
        for one in game["decisions"]:
            assert re.fullmatch(r"card \d+", one["state"][0][1])


@pytest.mark.integration
def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    small = "--num-games 8 --bptt-horizon 8 --minibatch-size 64 --eval-games 0 --hidden-size 32"
    assert main(["train", "--total-steps", "64", "--folder", str(run), *small.split()]) == 0
    assert main(["watch", str(run), "--games", "2", "--other", str(run)]) == 0
    assert "decisions of 2 games" in capfd.readouterr().out
    page = (run / "watch.html").read_text()
    assert "life 30; hand [0] card" in page
    assert main(["watch", str(run), "--games", "0"]) == 2
    assert "--games must be at least 1" in capfd.readouterr().err


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Any:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-sync"),
        *("disable-background-networking", "disable-component-update", "window-size=1300,900"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options=options)
    except Exception as error:
        pytest.skip(f"no Chromium with its driver here: {str(error).splitlines()[0]}")
    yield driver
    driver.quit()


@pytest.mark.browser
def test_it_opens_filters_and_steps(env: Bandit, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    def count() -> str:
        return browser.find_element(By.ID, "count").text

    def chosen() -> str:
        return browser.find_element(By.CSS_SELECTOR, "li[aria-selected]").text

    games = record(env, games=1000)
    number = sum(len(game["decisions"]) for game in games)
    assert number >= 1000
    games[0]["decisions"][0]["state"] = [[HOSTILE, HOSTILE]]
    path = tmp_path / "page.html"
    watch.write_page(path, games, ["a", "b"], 2, HOSTILE)
    browser.get(path.as_uri())
    assert browser.title == HOSTILE
    assert HOSTILE in browser.find_element(By.ID, "main").text
    assert count() == f"{number} of {number} decisions"
    body = browser.find_element(By.TAG_NAME, "body")
    first = chosen()
    body.send_keys(Keys.ARROW_RIGHT)
    second = chosen()
    assert second.split("\n")[0] != first.split("\n")[0]
    body.send_keys(Keys.ARROW_LEFT)
    assert chosen() == first
    body.send_keys(Keys.ARROW_DOWN)
    assert count() == f"{len(games[0]['decisions'])} of {number} decisions"
    body.send_keys(Keys.ARROW_UP)
    body.send_keys("/")
    browser.switch_to.active_element.send_keys("no such words")
    assert count() == f"0 of {number} decisions"
    browser.switch_to.active_element.send_keys(Keys.CONTROL, "a")
    browser.switch_to.active_element.send_keys(Keys.DELETE, Keys.ESCAPE)
    rare = sum(one["p"][0][one["drawn"]] < 0.05 for game in games for one in game["decisions"])
    Select(browser.find_element(By.ID, "filter")).select_by_value("rare")
    assert count() == f"{rare} of {number} decisions"
    Select(browser.find_element(By.ID, "filter")).select_by_value("all")
    Select(browser.find_element(By.ID, "order")).select_by_value("differ")
    widths = browser.find_elements(By.CSS_SELECTOR, "tr.drawn .bar")
    assert any(bar.size["width"] > 2 for bar in widths)
    assert browser.get_log("browser") == []
