"""``python -m tcg_flatpolicy verify``: what it prints, writes and returns."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tcg_flatpolicy.app import cli
from tcg_flatpolicy.app.settings import Settings
from tcg_flatpolicy.app.train import make_policy
from tcg_flatpolicy.verify import CODES, codes, environment, policy
from tests.broken import FAULTS

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

MYGAME = '''
import gymnasium
import numpy as np
import pufferlib
import torch
import tcg_flatpolicy as fp
from tests.games import BANDIT_DTYPE, BANDIT_SPEC, Bandit, BanditEncoder

SPEC = BANDIT_SPEC
LAYOUT = fp.LegalLayout.from_dtype(BANDIT_DTYPE, "n", "legal", spec=SPEC)
PLAIN = fp.LegalLayout.from_dtype(BANDIT_DTYPE, "n", "legal")

def listed(observation, info):
    return LAYOUT.read(torch.as_tensor(observation)[None]).to_lists()[0]

def masks(observation, info):
    return [np.ones(n, bool) for n in SPEC.nvec]

def make():
    return Bandit(num_agents=16)

def policy(env):
    return fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))

class Bare(Bandit):
    """Brings neither spec nor layout under the names that are looked for."""
    def __init__(self):
        super().__init__(num_agents=16)
        del self.action_spec, self.legal_layout
    def deal(self):
        self.legal_layout = LAYOUT
        super().deal()
        del self.legal_layout

def layout_of(env):
    assert isinstance(env, Bare)
    return LAYOUT

class Late(Bandit):
    def step(self, actions):
        raise KeyError("deck\\nof cards")

ONLY = np.dtype([("n", np.uint16), ("legal", np.uint8, (4, 3))])

class Listed(pufferlib.PufferEnv):
    """Shows nothing but the list."""
    def __init__(self, buf=None):
        self.action_spec = SPEC
        self.legal_layout = fp.LegalLayout.from_dtype(ONLY, "n", "legal", spec=SPEC)
        self.single_observation_space = gymnasium.spaces.Box(0, 255, (ONLY.itemsize,), np.uint8)
        self.single_action_space = SPEC.action_space
        self.num_agents = 2
        super().__init__(buf)
    def reset(self, seed=None):
        self.legal_layout.write(self.observations, [[(0, 0, 0), (1, 2, 3)]] * 2)
        return self.observations, []
    def step(self, actions):
        return self.observations, self.rewards, self.terminals, self.truncations, []
    def close(self):
        pass

def none():
    pass

def deep():
    return {}["no such card"]
'''


GYM = """
import gymnasium
import numpy as np
import pufferlib.emulation
import pufferlib.vector
import tcg_flatpolicy as fp

SPEC = fp.ActionSpec([fp.Primary("pass"), fp.Primary("play", fp.Index("card", 10))])

class MyGym(gymnasium.Env):
    observation_space = gymnasium.spaces.Dict(
        {
            "hand": gymnasium.spaces.Box(0, 1, (10,), np.float32),
            "n_legal": gymnasium.spaces.Discrete(12),
            "legal": gymnasium.spaces.Box(0, 9, (11, 2), np.uint8),
        }
    )
    action_space = SPEC.action_space

    def observe(self):
        hand = self.np_random.random(10, dtype=np.float32)
        legal = [(0, 0)] + [(1, card) for card in range(10) if hand[card] > 0.5]
        padded = np.zeros((11, 2), np.uint8)
        padded[: len(legal)] = legal
        return {"hand": hand, "n_legal": len(legal), "legal": padded}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        return self.observe(), 0.0, False, False, {}

def one(buf=None, seed=0):
    return pufferlib.emulation.GymnasiumPufferEnv(env_creator=MyGym, buf=buf, seed=seed)

def make():
    return pufferlib.vector.make(one, num_envs=4, backend=pufferlib.vector.Serial)
"""


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Runs the command in a folder with mygame.py: (exit status, stdout, stderr)."""
    (tmp_path / "mygame.py").write_text(MYGAME)
    (tmp_path / "needy.py").write_text("import no_such_package\n")
    (tmp_path / "faulty.py").write_text("x = 1\n\ny = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("mygame", "needy", "faulty"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main(["verify", *arguments])
        except SystemExit as error:
            status = int(str(error.code))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    yield run
    for name in ("mygame", "needy", "faulty"):
        sys.modules.pop(name, None)


def test_a_sound_environment(verify: Any) -> None:
    status, out, err = verify("mygame:make", "--steps", "300")
    assert status == 0, out + err
    assert "no findings" in out
    for name in environment.CHECKS:
        assert re.search(rf"^  (passed|skipped) *{re.escape(name)}  ", out, re.MULTILINE), name
    assert not err


@pytest.mark.parametrize("policy", [False, True])
def test_the_speed_is_reported_beside_that_of_random_play(
    verify: Any, tmp_path: Path, policy: bool
) -> None:
    """Printed, and in the JSON; what they are is the machine's."""
    file = tmp_path / "audit.json"
    arguments = ["mygame:make", "--steps", "300", "--json", str(file)]
    _, out, err = verify(*arguments, *(["--policy", "mygame:policy"] if policy else []))
    assert not err
    figures = json.loads(file.read_text())["figures"]
    for name in ("states a second", "states a second of random play"):
        name = f"environment: {name}" if policy else name
        assert figures[name] > 0
        assert f"\n  {name}: {figures[name]:,.6g}\n" in out


def test_a_finding(verify: Any, tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    status, out, _ = verify("tests.broken:duplicates", "--steps", "300", "--json", str(file))
    assert status == 1
    assert re.search(r"E03  a tuple is listed twice: \d+ times, first in state", out)
    assert "verify --explain E03" in out
    content = json.loads(file.read_text())
    assert content["ok"] is False
    assert [finding["code"] for finding in content["findings"]] == ["E03"]
    assert content["figures"]
    assert content["versions"]["torch"]
    assert [path.name for path in tmp_path.glob(".audit*")] == []


@pytest.mark.parametrize("chosen", ["mygame:policy", "flat", "autoregressive"])
def test_a_policy(verify: Any, tmp_path: Path, chosen: str) -> None:
    """By the name of a head, too, though this spec has Entity roles."""
    file = tmp_path / "audit.json"
    arguments = ["mygame:make", "--steps", "300", "--policy", chosen]
    status, out, err = verify(*arguments, "--json", str(file))
    assert status in (0, 1), err
    assert f"mygame:make, policy {chosen}" in out
    for check in environment.CHECKS:
        assert f"environment: {check}" in out
    for check in policy.CHECKS:
        assert f"policy: {check}" in out
    checks = {check["name"]: check["status"] for check in json.loads(file.read_text())["checks"]}
    assert len(checks) == len(environment.CHECKS) + len(policy.CHECKS)
    # An untrained network may be degenerate, but never wrong.
    found = [finding["code"] for finding in json.loads(file.read_text())["findings"]]
    assert not [code for code in found if code < "P20"], out
    assert status == bool(found)


def test_the_built_in_game_with_an_untrained_policy(verify: Any) -> None:
    status, out, err = verify("essence_wars", "--steps", "1000", "--policy", "flat")
    assert status == 0, out + err
    assert "essence_wars, policy flat" in out
    assert "no findings" in out


def test_the_built_in_game_with_a_trained_policy(
    verify: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tcg_flatpolicy.games import essence_wars

    decks = []

    class Game(essence_wars.EssenceWars):
        def __init__(self, *positional: Any, **named: Any) -> None:
            decks.append(named.get("deck1"))
            super().__init__(*positional, **named)

    settings = Settings(hidden_size=8, entity_size=4, deck1="archon_burst")
    trained = make_policy(settings, essence_wars.EssenceWars(1))
    (tmp_path / "run").mkdir()
    content = {"policy": trained.state_dict(), "settings": settings.__dict__}
    torch.save(content, tmp_path / "run" / "checkpoint.pt")
    monkeypatch.setattr(essence_wars, "EssenceWars", Game)
    status, out, err = verify("essence_wars", "--steps", "300", "--policy", "run")
    assert status in (0, 1), err
    assert set(decks[1:]) == {"archon_burst"}  # the first only shows the sizes
    assert not re.search(r"^  [EPT][01]\d  ", out, re.MULTILINE), out


def test_spec_and_layout_of_the_command_line(verify: Any) -> None:
    arguments = ["--steps", "300", "--spec", "mygame:SPEC", "--layout"]
    assert verify("mygame:Bare", *arguments, "mygame:LAYOUT")[0] == 0
    assert verify("mygame:Bare", *arguments, "mygame:layout_of")[0] == 0
    status, _, err = verify("mygame:Bare", "--layout", "mygame:PLAIN")
    assert status == 2
    assert "mygame:Bare has no attribute action_spec: give it one, or name it with --spec" in err
    status, _, err = verify("mygame:Bare", "--spec", "mygame:SPEC")
    assert status == 2
    assert "mygame:Bare has no attribute legal_layout: give it one, or name it with --layout" in err


@pytest.mark.parametrize("name", ["Duel", "swapped", "not_refreshed", "mask_zeroed"])
def test_engines_with_a_bug(verify: Any, name: str) -> None:
    masks = ["--head-masks", "mask0,mask1,mask2"]
    status, out, err = verify(f"tests.broken:{name}", "--steps", "1000", *masks)
    found = re.findall(r"^  ([EPT]\d\d)  ", out, re.MULTILINE)
    assert found == ([FAULTS[name]] if name in FAULTS else []), out + err
    assert status == bool(found)


def test_functions_of_the_command_line(verify: Any) -> None:
    arguments = ["mygame:Bare", "--steps", "100", "--spec", "mygame:SPEC"]
    status, out, err = verify(*arguments, "--legal-actions", "mygame:listed")
    assert status == 0, out + err
    status, out, err = verify(
        *arguments, "--layout", "mygame:LAYOUT", "--head-masks", "mygame:masks"
    )
    assert status == 1, out + err  # all values are unmasked
    assert "E11" in out


def test_a_dict_observation_s_keys(verify: Any, tmp_path: Path) -> None:
    (tmp_path / "mygame.py").write_text(GYM)
    arguments = ["--steps", "60", "--spec", "mygame:SPEC", "--layout", "n_legal,legal"]
    status, out, err = verify("mygame:MyGym", *arguments)
    assert status == 0, out + err
    status, out, err = verify("mygame:MyGym", *arguments, "--policy", "flat")
    assert status == 2
    assert not out  # before it audits the environment
    assert "--policy flat cannot play mygame:MyGym: TypeError: MyGym is a bare gymnasium.Env" in err
    status, out, err = verify("mygame:make", *arguments, "--policy", "flat")
    assert status == 0, out + err


def test_an_engine_that_raises_is_a_finding(verify: Any) -> None:
    status, out, _ = verify("mygame:Late", "--steps", "100")
    assert status == 1
    assert "E16" in out
    assert "KeyError" in out


def test_the_seed_is_the_audit_s(verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    sound = environment.audit_env

    def audit(*positional: Any, **named: Any) -> Any:
        seen.append((named["steps"], named["seed"]))
        return sound(*positional, **named)

    monkeypatch.setattr("tcg_flatpolicy.app.verify.audit_env", audit)
    verify("mygame:make", "--steps", "64", "--seed", "9")
    assert seen == [(64, 9)]


def test_codes_and_explanations(verify: Any) -> None:
    status, out, _ = verify("--codes")
    assert status == 0
    assert out == codes.markdown()
    status, out, _ = verify("--explain", "e07")
    assert status == 0
    assert out.startswith("E07  the list is that of another state\n")
    for words in (CODES["E07"].example, CODES["E07"].shows, CODES["E07"].fix):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "verify needs an environment: module:factory, such as mygame:make, or essence_wars"),
        (["mygame"], "no game is named 'mygame'"),
        (["mygame:"], "'mygame:' must be module:name"),
        (["nogame:make"], "no module 'nogame', neither in the current directory nor installed"),
        (["my.game:make"], "no module 'my'"),
        (["needy:make"], "importing needy failed: ModuleNotFoundError: No module named 'no_such"),
        (["faulty:make"], "importing faulty failed: ZeroDivisionError: division by zero (faulty.p"),
        (["faulty:make"], "(faulty.py, line 3)"),
        (["mygame:mak"], "mygame has no mak; it has make"),
        (
            ["mygame:SPEC"],
            "mygame:SPEC is of type ActionSpec; it must be a function or",
        ),
        (["mygame:none"], "mygame:none() returned None; it must return the environment"),
        (["mygame:deep"], "mygame:deep() failed: KeyError: 'no such card' (mygame.py, line "),
        (["mygame:policy"], "mygame:policy() failed: TypeError"),
        (["mygame:make", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["mygame:make", "--steps", "many"], "invalid int value"),
        (["mygame:make", "--json", "no/where.json"], "there is no folder no"),
        (["mygame:make", "--policy", "clever"], "neither module:factory nor a run folder nor"),
        (["mygame:make", "--policy", "mygame:none"], "mygame:none(env) failed: TypeError"),
        (
            ["mygame:Listed", "--policy", "flat"],
            "--policy flat cannot be made for this environment: ValueError: LegalLayout(14 bytes, ",
        ),
        (
            [
                *("mygame:Bare", "--spec", "mygame:SPEC"),
                *("--legal-actions", "mygame:listed", "--policy", "flat"),
            ],
            "--policy flat reads the list from observations: name where it is with --layout",
        ),
        (["mygame:make", "--policy", "mygame.py"], "mygame.py is damaged, or is no file"),
        (["essence_wars", "--policy", "mygame.py"], "is damaged, or is no file of this library"),
        (["mygame:make", "--spec", "mygame:LAYOUT"], "is of type LegalLayout, not ActionSpec"),
        (["mygame:make", "--layout", "mygame:none"], "--layout mygame:none(env) failed"),
        (["mygame:make", "--layout", "mygame:SPEC"], "is of type ActionSpec, not LegalLayout"),
        (["--explain", "X01"], "there is no code 'X01'; --codes prints all"),
    ],
)
def test_what_cannot_run_ends_with_one_line(
    verify: Any, arguments: list[str], complaint: str
) -> None:
    if "--steps" not in arguments and arguments[:1] != ["--explain"]:
        arguments = [*arguments, "--steps", "32"]
    status, _, err = verify(*arguments)
    assert status == 2
    assert complaint in err
    if "usage:" not in err:
        assert err.startswith("error: ")
        assert err.count("\n") == 1 or "checkpoint" in err  # torch's own words are longer


def test_as_a_process(tmp_path: Path) -> None:
    """The current directory is looked into, and the status is the process's."""
    (tmp_path / "mygame.py").write_text((ROOT / "tests" / "broken.py").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "tcg_flatpolicy", "verify", "mygame:duplicates", "--steps", "100"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert "E03" in done.stdout


# ---- what is written about codes


def test_the_page_of_findings_is_the_table() -> None:
    page = (ROOT / "docs" / "findings.md").read_text()
    assert page == codes.markdown(), (
        "write it anew: python -m tcg_flatpolicy verify --codes > docs/findings.md"
    )


def test_the_readme_s_table_is_made_from_the_pages() -> None:
    table = re.findall(r"(?m)^\| \| what \| how it shows \|\n(?:\|.*\n)+", README)
    listed = re.findall(r"(?m)^\| ([EPT]\d\d) ", table[0])
    assert len(listed) > 5
    assert table == [codes.table(listed)]


def test_every_code_is_found_in_some_test() -> None:
    """Environments' bugs stand beside the checks; policies' and training's are in these files."""
    text = "".join(file.read_text() for file in sorted((ROOT / "tests").glob("test_verify_*.py")))
    found = set(FAULTS.values())
    missing = [code for code in CODES if code not in found and f'"{code}"' not in text]
    assert not missing


NEW_CHECK = '''
from tcg_flatpolicy.verify.checks import Check

class LongList(Check):
    """A list holds more than three tuples.

    Why: there is much to choose from.

    Example: any game.

    Fix: list less.
    """

    code = "E99"
    lines = ("lists are short",)

    def see(self, state):
        self.looked(len(state.lists.counts))
        for row in (state.lists.counts > 3).nonzero()[0].tolist():
            self.wrong(f"{state.where(row)} has a long list", state.number)
'''


def test_a_new_check_is_one_file(tmp_path: Path) -> None:
    """It is audited, explained, and has its place in the page, in the order of codes."""
    package = tmp_path / "tcg_flatpolicy"
    shutil.copytree(ROOT / "tcg_flatpolicy", package)
    (package / "verify" / "checks" / "long_list.py").write_text(NEW_CHECK)
    script = """
from tcg_flatpolicy.app import cli
cli.main(["verify", "tcg_flatpolicy.verify.toy:Duel", "--steps", "50"])
cli.main(["verify", "--explain", "E99"])
cli.main(["verify", "--codes"])
"""
    arguments = [sys.executable, "-c", script]
    done = subprocess.run(
        arguments, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=True
    )
    assert re.search(r"failed +lists are short  +E99", done.stdout)
    assert re.search("E99  a list holds more than three tuples: .* first in state 0", done.stdout)
    assert "E99  a list holds more than three tuples\n  for example: any game" in done.stdout
    page = re.findall("^## (...): ", done.stdout, re.MULTILINE)
    assert page.index("E14") < page.index("E99") < page.index("P01")
