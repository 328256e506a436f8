"""Decisions of a policy as one page: each legal tuple in words, with its probability.

The page is a single file that opens by a double click and asks no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.provenance import provenance, write_whole
from tcg_flatpolicy.puffer.decisions import SATURATED, shares
from tcg_flatpolicy.puffer.games import eval_mode
from tcg_flatpolicy.spec import ActionSpec

PAGE = Path(__file__).with_name("watch.html")


class _Player:
    """A policy with the memory of each row."""

    def __init__(self, policy: nn.Module, rows: int) -> None:
        self.policy = policy
        size = int(policy.hidden_size)  # type: ignore[arg-type]
        self.memory = {name: torch.zeros(rows, size) for name in ("lstm_h", "lstm_c")}

    def decide(
        self, observations: Tensor, legal: LegalActions
    ) -> tuple[Any, npt.NDArray[Any], npt.NDArray[Any]]:
        """The face, values (B,), and the probability (N,) of each listed tuple."""
        face, value = self.policy.forward_eval(observations, self.memory)  # type: ignore[operator]
        places = torch.arange(len(legal.rows)) - legal.starts[legal.rows]
        longest = int(legal.counts.max()) if len(legal) else 0
        padded = legal.noop.repeat(longest, len(legal), 1)
        padded[places, legal.rows] = legal.actions
        log_probs = face.distribution.log_prob(padded) if longest else torch.zeros(0, len(legal))
        return face, value.flatten().numpy(), log_probs[places, legal.rows].exp().numpy()


@torch.no_grad()
def record(
    policies: Sequence[nn.Module],
    env: Any,
    spec: ActionSpec,
    layout: LegalLayout,
    games: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Plays games with the first policy, and asks the others what they would do.

    Policies sample, in eval mode. Memory goes on from game to game, as in training.

    Args:
        policies: with forward_eval, as PufferLib calls it.
        env: a native environment or vecenv: reset(seed) and step(actions).
        spec: what tuples mean.
        layout: of the observations.
        games: how many finished games to keep, of the first rows. Each row gives equally many, one
            more at most: the first games to end would favour short ones.
        seed: random seed of games and sampling.

    Returns:
        A dict a game: its row, its return, and its decisions. Decisions of rows without a legal
        tuple are left out.
    """
    driver = getattr(env, "driver_env", env)
    describe = getattr(driver, "describe", None)
    observations, _ = env.reset(seed)
    rows = len(observations)
    players = [_Player(policy, rows) for policy in policies]
    watched = min(rows, games)
    quota = [games // watched + (row < games % watched) for row in range(watched)]
    running: list[list[dict[str, Any]]] = [[] for _ in range(watched)]
    finished: list[dict[str, Any]] = []
    with torch.random.fork_rng(devices=[]), eval_mode(policies):
        torch.manual_seed(seed)
        while len(finished) < games:
            seen = torch.as_tensor(np.array(observations))
            legal = layout.read(seen).distinct()
            decided = [player.decide(seen, legal) for player in players]
            actions = decided[0][0].sample()
            drawn = legal.find(actions.long())
            states = _states(layout, seen, describe)
            for row in legal.counts[:watched].nonzero()[:, 0].tolist():
                begin = int(legal.starts[row])
                listed = slice(begin, begin + int(legal.counts[row]))
                running[row].append(
                    {
                        "state": states(row),
                        "actions": [_words(spec, one) for one in legal.actions[listed].tolist()],
                        "drawn": int(drawn[row]) - begin,
                        "p": [[_short(x) for x in p[listed].tolist()] for _, _, p in decided],
                        "value": [_short(float(value[row])) for _, value, _ in decided],
                        "reward": 0.0,
                    }
                )
            observations, rewards, terminals, truncations, _ = env.step(actions.numpy())
            ended = np.asarray(terminals, bool) | np.asarray(truncations, bool)
            for row in range(watched):
                if running[row]:
                    running[row][-1]["reward"] += _short(float(rewards[row]))
                if ended[row] and running[row] and quota[row]:
                    total = sum(one["reward"] for one in running[row])
                    finished.append({"row": row, "return": total, "decisions": running[row]})
                    quota[row] -= 1
                    running[row] = []
    return sorted(finished, key=lambda game: int(game["row"]))


def _words(spec: ActionSpec, action: Sequence[int]) -> list[str]:
    """A tuple in words: its primary, and each slot that the primary uses."""
    primary = spec.primaries[action[0]]
    pairs = zip(primary.slots, action[1:], strict=False)
    return [primary.name, *(role.describe(value) for role, value in pairs)]


def _states(layout: LegalLayout, seen: Tensor, describe: Any) -> Any:
    """A function of a row: its state in words, as (name, text) pairs."""
    if describe is not None:
        records = layout.records(seen.numpy())
        return lambda row: [["", str(describe(records[row]))]]
    fields = [field for field in layout.fields() if not layout.is_legal_list(field)]
    values = [(field.name, layout.field(seen, field.name)) for field in fields]

    def state(row: int) -> list[list[str]]:
        found = []
        for name, of in values:
            numbers = of[row].flatten().tolist()
            text = ", ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in numbers)
            found.append([name, text])
        return found

    return state


def _short(x: float) -> float:
    """Six digits, which are enough to look at."""
    return float(f"{x:.6g}") if math.isfinite(x) else 0.0


def saturation(games: Sequence[dict[str, Any]]) -> str:
    """How many of the first policy's choices are saturated, in words."""
    tops = [
        max(one["p"][0]) for game in games for one in game["decisions"] if len(one["actions"]) > 1
    ]
    found = zip(shares(tops), SATURATED, strict=True)
    words = ", ".join(f"{share:.1%} above {bar}" for share, bar in found)
    return f"probability of the best tuple, {len(tops)} choices: {words}"


def write_page(
    path: Path, games: Sequence[dict[str, Any]], names: Sequence[str], slots: int, title: str
) -> None:
    """Writes recorded games as one HTML file, whole.

    Args:
        path: of the file.
        games: as :func:`record` gives them.
        names: of the policies.
        slots: of a tuple, besides the primary.
        title: of the page.
    """
    data = {
        "title": title,
        "policies": list(names),
        "slots": ["primary", *(f"slot {k}" for k in range(1, slots + 1))],
        "saturated": SATURATED,
        "games": games,
        "made": provenance(),
    }
    page = PAGE.read_text()
    # No "<" reaches the page: nothing in the data can end its element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    for kind in ("script", "style"):
        inline = page.partition(f"<{kind}>")[2].partition(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        page = page.replace(f"HASH-OF-{kind.upper()}", f"sha256-{digest}")
    write_whole(path, page.replace("DATA-OF-PAGE", text).encode())
