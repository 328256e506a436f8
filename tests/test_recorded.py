"""Files that an earlier version wrote load, and give the numbers that they gave there.

`recorded/README.md` says how they were made.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tcg_flatpolicy as fp

RECORDED = Path(__file__).parent / "recorded"
RUNS = ["flat", "autoregressive", "recurrent"]

HIDDEN, WIDTH = 6, 8
ENTITIES = {"hand": (4, 3), "unit": (5, 2)}

# Ids with gaps and out of order, an Index of one name under several primaries, Entity roles, a
# OneOf, slots that a primary does not use, and a no-op that is not all zeros.
SPEC = fp.ActionSpec(
    [
        fp.Primary("attack", fp.Entity("unit", 5), fp.Entity("unit", 5), id=4),
        fp.Primary("pass", id=1),
        fp.Primary("play", fp.Entity("hand", 4), fp.Index("amount", 3), fp.Index("mode", 2), id=7),
        fp.Primary("pay", fp.Index("amount", 3), id=2),
        fp.Primary(
            "target",
            fp.Index("mode", 2),
            fp.OneOf(fp.Index("none", 1), fp.Entity("unit", 5), fp.Entity("hand", 4)),
            fp.Index("amount", 3),
            id=9,
        ),
    ],
    noop=(1, 0, 0, 0),
)
DTYPE = np.dtype(
    [
        ("hidden", np.float32, HIDDEN),
        ("hand", np.float32, ENTITIES["hand"]),
        ("n", np.int16),
        ("unit", np.float32, ENTITIES["unit"]),
        ("legal", np.uint8, (9, 4)),
    ],
    align=True,
)
LAYOUT = fp.LegalLayout.from_dtype(DTYPE, count="n", actions="legal")


class Given(nn.Module):
    """Takes the state and the entities as the observation has them."""

    hidden_size = HIDDEN
    entity_sizes = ENTITIES

    def forward(self, observations: Tensor) -> fp.Encoding:
        hidden, *things = (LAYOUT.field(observations, name) for name in ("hidden", *ENTITIES))
        return fp.Encoding(hidden, dict(zip(ENTITIES, things, strict=True)))


def made(name: str) -> fp.Policy:
    """A new policy of a recorded name, such as "flat", "recurrent autoregressive" or "fields"."""
    kind = fp.RecurrentPolicy if "recurrent" in name else fp.Policy
    head = "autoregressive" if "autoregressive" in name else "flat"
    if name == "fields":  # nothing is known but sizes
        sizes = fp.ActionSpec.from_nvec(SPEC.nvec, noop=(1, 0, 0, 0))
        return fp.Policy(spec=sizes, layout=LAYOUT, hidden_size=HIDDEN, width=WIDTH)
    return kind(head=head, spec=SPEC, layout=LAYOUT, encoder=Given(), width=WIDTH)


def outcome(policy: fp.Policy, recorded: dict[str, Any]) -> dict[str, Tensor]:
    """What a policy gives for the recorded observations (T, B, bytes) and actions (T, K, B, H).

    Returns:
        Of T steps of a rollout: "log_probs" (T, K, B), "entropies" (T, B) and "values" (T, B); of
        the update over B segments of T steps: "update_log_probs" (T, B), of the first actions.
    """
    policy.eval()
    observations, actions = recorded["observations"], recorded["actions"]
    steps, rows = observations.shape[:2]
    recurrent = isinstance(policy, fp.RecurrentPolicy)
    zeros = {name: torch.zeros(rows, policy.hidden_size) for name in ("lstm_h", "lstm_c")}
    log_probs, entropies, values = [], [], []
    with torch.no_grad():
        for seen, played in zip(observations, actions, strict=True):
            face, value = policy.forward_eval(seen, zeros)
            log_probs.append(face.distribution.log_prob(played))
            entropies.append(face.distribution.entropy())
            values.append(value.flatten())
        segments = observations.transpose(0, 1)
        state = {"lstm_h": None, "lstm_c": None}
        face, _ = policy(segments if recurrent else segments.flatten(0, 1), state)
        update = face.distribution.log_prob(actions[:, 0].transpose(0, 1).flatten(0, 1))
    return {
        "log_probs": torch.stack(log_probs),
        "entropies": torch.stack(entropies),
        "values": torch.stack(values),
        "update_log_probs": update.view(rows, steps).T,
    }


@pytest.mark.parametrize(
    "name", ["flat", "autoregressive", "recurrent flat", "recurrent autoregressive", "fields"]
)
def test_a_recorded_state_dict_gives_the_recorded_numbers(name: str) -> None:
    recorded = torch.load(RECORDED / "policies.pt", weights_only=True)
    policy = made(name)
    policy.load_state_dict(recorded["policies"][name]["state_dict"])
    assert float(policy.temperature) == pytest.approx(1.25)
    assert float(policy.epsilon) == pytest.approx(0.1)
    given = outcome(policy, recorded)
    for what, expected in recorded["policies"][name]["outcome"].items():
        torch.testing.assert_close(given[what], expected, rtol=0, atol=1e-5, msg=what)


def test_the_recorded_actions_are_what_the_observations_list() -> None:
    recorded = torch.load(RECORDED / "policies.pt", weights_only=True)
    primaries = set()
    for seen, played in zip(recorded["observations"], recorded["actions"], strict=True):
        legal = LAYOUT.with_spec(SPEC).read(seen)
        legal.validate(SPEC)
        assert (legal.counts == 0).any()
        primaries |= set(legal.actions[:, 0].tolist())
        assert legal.contains(played[0]).all()
        for row in range(len(legal)):
            first = int(legal.starts[row])
            listed = legal.actions[first : first + int(legal.counts[row])].tolist()
            assert {tuple(a) for a in listed} <= {tuple(a) for a in played[:, row].tolist()}
    assert primaries == {1, 2, 4, 7, 9}


@pytest.mark.integration
@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_is_evaluated_and_resumed(name: str, tmp_path: Path) -> None:
    from tcg_flatpolicy.app import train as app
    from tcg_flatpolicy.app.train import trained_policy

    folder = tmp_path / name
    shutil.copytree(RECORDED / name, folder)
    settings, policy = trained_policy(folder)
    assert settings.recurrent == (name == "recurrent")
    assert settings.head == ("autoregressive" if name == "autoregressive" else "flat")
    played = app.evaluate(settings, policy, games=2, opponent="greedy", seed=1)
    assert [(r.games, r.illegal) for r in played.values()] == [(2, 0), (2, 0)]

    report = app.resume(folder, {"total_steps": 128}, say=lambda line: None)
    assert report.steps == 128
    assert report.illegal == 0
    assert (folder / "metrics.csv").read_text().count("\n") == 1 + 4
