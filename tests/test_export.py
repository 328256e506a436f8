"""Policies exported for play: the library's decisions, also in onnxruntime and without it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.export import PaddedPolicy, export_onnx, export_program
from tcg_flatpolicy.testing import legal_lists, specs
from tests.games import BANDIT_SPEC, Bandit, BanditEncoder

ROOM, NUMBERS = 12, 4

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:copyreg")  # of torch's own exporter


class NumbersEncoder(nn.Module):
    """Hidden and entities are linear in a field of four numbers."""

    def __init__(self, layout: fp.LegalLayout, things: list[str], hidden_size: int = 6) -> None:
        super().__init__()
        self.layout, self.hidden_size = layout, hidden_size
        self.entity_sizes = {name: (4, 2 + place) for place, name in enumerate(things)}
        self.trunk = nn.Linear(NUMBERS, hidden_size)
        self.entities = nn.ModuleDict(
            {name: nn.Linear(NUMBERS, n * e) for name, (n, e) in self.entity_sizes.items()}
        )

    def forward(self, observations: Tensor) -> fp.Encoding:
        numbers = self.layout.field(observations, "numbers")
        entities = {
            name: linear(numbers).unflatten(1, self.entity_sizes[name])
            for name, linear in self.entities.items()
        }
        return fp.Encoding(self.trunk(numbers), entities)


def layout_for(spec: fp.ActionSpec) -> fp.LegalLayout:
    fields = [("numbers", "f4", NUMBERS), ("n", "i4"), ("legal", "i4", (ROOM, 1 + spec.slots))]
    return fp.LegalLayout.from_dtype(np.dtype(fields), count="n", actions="legal", spec=spec)


def needs_onnx() -> Any:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9):
        pytest.skip("export_onnx was tried with torch 2.9 and newer")
    pytest.importorskip("onnxscript", reason="needs what export_onnx does: pip install '.[export]'")
    return pytest.importorskip("onnxruntime", reason="needs a server: pip install onnxruntime")


def observed(layout: fp.LegalLayout, lists: Any, seed: int = 0) -> Tensor:
    """(rows, nbytes) uint8 with these lists and any numbers."""
    records = np.zeros(len(lists), layout.dtype)
    records["numbers"] = np.random.default_rng(seed).normal(size=(len(lists), NUMBERS))
    layout.write(records, lists)
    return torch.as_tensor(records.view(np.uint8).reshape(len(lists), layout.dtype.itemsize))


def stirred(policy: Any, seed: int = 0) -> Any:
    """With weights as far from uniform as a trained policy's, not as at the start."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.4)
    return policy


def padded(lists: Any, length: int, slots: int) -> tuple[Tensor, Tensor]:
    """As a server sends them: behind the count stands something that is no tuple of any spec."""
    legal = torch.full((len(lists), length, 1 + slots), -7)
    for row, actions in enumerate(lists):
        for place, action in enumerate(actions):
            legal[row, place] = torch.tensor(action)
    return legal, torch.tensor([len(actions) for actions in lists], dtype=torch.int64)


def expected_log_probs(distribution: Any, lists: Any, length: int) -> Tensor:
    """(B, K) of the library's distribution: -inf behind the count and at a later repeat."""
    wanted = torch.full((len(lists), length), -torch.inf)
    for place in range(length):
        there = [row for row, actions in enumerate(lists) if place < len(actions)]
        asked = torch.zeros(len(lists), distribution.event_shape[0], dtype=torch.int64)
        for row in there:
            asked[row] = torch.tensor(lists[row][place])
        log_prob = distribution.log_prob(asked)
        for row in there:
            if lists[row][place] not in lists[row][:place]:
                wanted[row, place] = log_prob[row]
    return wanted


@pytest.mark.parametrize("head", ["flat", "autoregressive"])
@settings(max_examples=40)
@given(st.data())
def test_any_spec_and_list(head: str, data: st.DataObject) -> None:
    spec = data.draw(specs())
    lists = data.draw(legal_lists(spec, max_length=ROOM).filter(len))
    length = data.draw(st.integers(max(map(len, lists)), ROOM))
    temperature, epsilon = data.draw(st.sampled_from([(1.0, 0.0), (0.5, 0.0), (1.7, 0.2)]))
    layout = layout_for(spec)
    encoder = NumbersEncoder(layout, list(spec.entity_names))
    policy = stirred(fp.Policy(spec=spec, layout=layout, encoder=encoder, head=head, width=5))
    policy.explore(temperature, epsilon)
    observations = observed(layout, lists)
    with torch.no_grad():
        distribution, value = policy.distribution(observations)
        fields = {"numbers": layout.field(observations, "numbers")}
        log_probs, values = PaddedPolicy(policy)(fields, *padded(lists, length, spec.slots))
        wanted = expected_log_probs(distribution, lists, length)
    torch.testing.assert_close(log_probs, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, value.squeeze(1))


@pytest.mark.usefixtures("each_kernel")
def test_a_list_that_is_none_is_nan_and_leaves_other_rows_alone() -> None:
    spec = BANDIT_SPEC
    policy = bandit_policy(fp.FlatPolicy)
    lists = [[(0, 0, 0), (1, 3, 3)], [(2, 4, 4), (1, 0, 1)], []]
    legal, n_legal = padded(lists, 2, 2)
    fields = {
        "kind": torch.zeros(3, 4, dtype=torch.uint8),
        "card": torch.zeros(3, dtype=torch.int16),
    }
    exported = PaddedPolicy(policy)

    def log_probs(row: int, action: Any = None, count: int | None = None) -> Tensor:
        changed, counts = legal.clone(), n_legal.clone()
        if action is not None:
            assert spec.explain(action) is not None
            changed[row, 1] = torch.tensor(action)
        if count is not None:
            counts[row] = count
        with torch.no_grad():
            return exported(fields, changed, counts)[0]

    right = log_probs(0)
    assert not right.isnan().any()
    foreign = [(3, 0, 0), (-1, 0, 0), (99, 0, 0), (0, 1, 0), (1, 0, 4), (2, 5, 0), (1, -1, 0)]
    for row in (0, 1):
        others = [other for other in range(3) if other != row]
        for changes in [{"action": action} for action in foreign] + [{"count": 3}, {"count": -1}]:
            got = log_probs(row, **changes)
            assert got[row].isnan().all()
            assert torch.equal(got[others], right[others])


def bandit_policy(make: Any, **arguments: Any) -> Any:
    env = Bandit(4)
    return stirred(make(env, encoder=BanditEncoder(env.legal_layout), **arguments))


def held(policy: nn.Module) -> dict[str, Tensor]:
    return dict([*policy.named_parameters(), *policy.named_buffers()])


def bandit_fields(env: Bandit, rows: slice) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(env.records[name][rows]) for name in ("kind", "card")}


def test_pufferlib_s_lstm_around_a_policy() -> None:
    from pufferlib.models import LSTMWrapper

    env = Bandit(5, empty=0.3)
    env.reset(seed=2)
    policy = stirred(
        LSTMWrapper(
            env, fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout, 32)), 32, hidden_size=32
        )
    )
    state = {"lstm_h": torch.randn(5, 32), "lstm_c": torch.randn(5, 32)}
    given_state = tuple(state.values())
    fields = {name: torch.as_tensor(f) for name, f in bandit_fields(env, slice(None)).items()}
    with torch.no_grad():
        face, value = policy.forward_eval(torch.as_tensor(env.observations), state)
        got = PaddedPolicy(policy)(fields, *padded(env.lists, ROOM, 2), *given_state)
        wanted = expected_log_probs(face.distribution, env.lists, ROOM)
    torch.testing.assert_close(got[0], wanted)
    torch.testing.assert_close(got[1], value.squeeze(1))
    torch.testing.assert_close(got[2], state["lstm_h"])
    torch.testing.assert_close(got[3], state["lstm_c"])
    with pytest.raises(ValueError, match="needs lstm_h and lstm_c"):
        PaddedPolicy(policy)(fields, *padded(env.lists, ROOM, 2))


def test_onnx_of_a_recurrent_policy(tmp_path: Path) -> None:
    """Autoregressive, exploring, exported where a trainer left autocast on; any rows and room."""
    onnxruntime = needs_onnx()
    env = Bandit(16, empty=0.3)
    observations, _ = env.reset(seed=1)
    policy = bandit_policy(fp.RecurrentPolicy, head="autoregressive").train()
    policy.explore(1.3, 0.1)
    before = {name: value.clone() for name, value in held(policy).items()}
    path = tmp_path / "policy.onnx"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        export_onnx(policy, path, torch.as_tensor(observations[:1]))  # one row is enough
    assert list(tmp_path.iterdir()) == [path]
    assert policy.training
    # The policy is as it was: what its last rollout was drawn with, too.
    torch.testing.assert_close(held(policy), before, rtol=0, atol=0, equal_nan=True)

    server = onnxruntime.InferenceSession(path)
    meta = server.get_modelmeta().custom_metadata_map
    inputs = json.loads(meta["inputs"])
    assert inputs == {
        "observation.kind": {"dtype": "uint8", "shape": ["batch", 4]},
        "observation.card": {"dtype": "int16", "shape": ["batch"]},
        "legal": {"dtype": "int64", "shape": ["batch", "list", 3]},
        "n_legal": {"dtype": "int64", "shape": ["batch"]},
        "lstm_h": {"dtype": "float32", "shape": ["batch", 32]},
        "lstm_c": {"dtype": "float32", "shape": ["batch", 32]},
    }
    assert {one.name: one.shape for one in server.get_inputs()} == {
        name: one["shape"] for name, one in inputs.items()
    }
    assert {one.name: one.shape for one in server.get_outputs()} == {
        "log_probs": ["batch", "list"],
        "value": ["batch"],
        "next_lstm_h": ["batch", 32],
        "next_lstm_c": ["batch", 32],
    }
    spec = json.loads(meta["spec"])
    assert (spec["nvec"], spec["noop"]) == (BANDIT_SPEC.nvec.tolist(), [0, 0, 0])
    assert spec["primaries"][2] == {
        "id": 2,
        "name": "play",
        "slots": [
            [{"kind": "index", "name": "card", "size": 5}],
            [
                {"kind": "index", "name": "none", "size": 1},
                {"kind": "entity", "name": "unit", "size": 4},
            ],
        ],
    }
    assert json.loads(meta["exploration"]) == pytest.approx({"temperature": 1.3, "epsilon": 0.1})
    assert json.loads(meta["versions"])["torch"] == importlib.metadata.version("torch")

    compared = 0
    for rows, room in [(1, 1), (1, ROOM), (2, ROOM + 3), (16, ROOM), (16, 1)]:
        env.deal()
        chosen = slice(16 - rows, 16)
        lists = [actions[:room] for actions in env.lists[chosen]]
        lists[0] = (lists[0] + lists[0][:2])[:room]  # listed twice, where there is room
        env.legal_layout.write(env.observations[chosen], [a[:ROOM] for a in lists])
        state = {"lstm_h": torch.zeros(rows, 32), "lstm_c": torch.zeros(rows, 32)}
        sent = {name: value.numpy() for name, value in state.items()}
        for _ in range(3):  # the state goes on from step to step
            with torch.no_grad():
                face, value = policy.forward_eval(torch.as_tensor(env.observations[chosen]), state)
            legal, n_legal = padded(lists, room, 2)
            fields = {f"observation.{k}": v for k, v in bandit_fields(env, chosen).items()}
            listed = {"legal": legal.numpy(), "n_legal": n_legal.numpy()}
            got = server.run(None, {**fields, **listed, **sent})
            wanted = expected_log_probs(face.distribution, lists, room).detach()
            torch.testing.assert_close(torch.as_tensor(got[0]), wanted, rtol=0, atol=1e-5)
            torch.testing.assert_close(torch.as_tensor(got[1]), value.squeeze(1).detach())
            sent = {"lstm_h": got[2], "lstm_c": got[3]}
            compared += int(wanted.isfinite().sum())
    assert compared > 300


SERVER = """
import sys, numpy as np, onnxruntime
data = dict(np.load(sys.argv[2]))
server = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
log_probs, value = server.run(["log_probs", "value"], data)
np.savez(sys.argv[3], log_probs=log_probs, value=value, place=log_probs.argmax(1))
assert not {"torch", "tcg_flatpolicy"} & set(sys.modules)
"""


def test_a_thousand_states_on_a_server_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example exports a policy of the real game and plays it; then the choices are torch's."""
    needs_onnx()
    from tcg_flatpolicy.games.essence_wars import OBSERVATION_DTYPE, EssenceWars

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "export.py"))
    assert example["env"].illegal_actions == 0
    policy = example["policy"]

    env = EssenceWars(num_games=100, seed=4, deck2="vex_piercing")
    observations, _ = env.reset()
    seen = []
    for step in range(60):
        if step % 6 == 0:
            seen.append(observations.copy())
        legal = policy.layout.read(torch.as_tensor(observations))
        uniform = fp.LegalCategorical(legal, torch.zeros(len(legal.rows)))
        observations, *_ = env.step(uniform.sample().numpy())
    states = np.concatenate(seen)
    assert len(np.unique(states, axis=0)) > 990  # of 1,000
    records = states.view(OBSERVATION_DTYPE)[:, 0]
    np.savez(
        "states.npz",
        **{
            "observation.state": records["state"],
            "legal": records["legal"].astype(np.int64),
            "n_legal": records["n_legal"].astype(np.int64),
        },
    )
    subprocess.run(
        [sys.executable, "-c", SERVER, "policy.onnx", "states.npz", "chosen.npz"], check=True
    )
    got = dict(np.load("chosen.npz"))

    with torch.no_grad():
        mode = fp.Greedy(policy).forward_eval(torch.as_tensor(states))[0].sample()
        distribution, value = policy.distribution(torch.as_tensor(states))
    lists = [[tuple(a) for a in r["legal"][: r["n_legal"]].tolist()] for r in records]
    wanted = expected_log_probs(distribution, lists, records["legal"].shape[1])
    torch.testing.assert_close(torch.as_tensor(got["log_probs"]), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.as_tensor(got["value"]), value.squeeze(1), rtol=0, atol=1e-5)
    first, second = wanted.topk(2).values.unbind(1)
    # Beyond what the log-probs may be off by. The rest, 55, are ties: a card that is held twice.
    clear = (first - second > 2e-5).numpy()
    assert clear.sum() > 900
    chosen = records["legal"][np.arange(1000), got["place"]]
    assert (chosen == mode.numpy())[clear].all()
    assert (wanted[np.arange(1000), got["place"]] >= first - 2e-5).all()  # nor is a tie lost


@pytest.mark.filterwarnings(
    "ignore:The given buffer is not writable:UserWarning"
)  # torch 2.9 reads
def test_the_default_encoder_and_torch_export(tmp_path: Path) -> None:
    """Of torch's own format: written, read, and called with other rows and room."""
    spec = fp.ActionSpec.from_nvec([2, 3])
    dtype = [("me", [("hp", "i2"), ("seen", "?", (2, 2))]), ("n", "u2"), ("legal", "u1", (6, 2))]
    layout = fp.LegalLayout.from_dtype(np.dtype(dtype), count="n", actions="legal", spec=spec)
    records = np.zeros(5, dtype)
    records["me"]["hp"] = [0, 3, 500, -4, 9]
    records["me"]["seen"] = np.random.default_rng(1).random((5, 2, 2)) < 0.5
    lists = [[(0, 1), (1, 2)], [], [(1, 1)], [(0, 0), (0, 1), (0, 2), (1, 0)], [(1, 1), (1, 1)]]
    layout.write(records, lists)
    observations = torch.as_tensor(records.view(np.uint8).reshape(5, -1))
    policy = stirred(fp.FlatPolicy(spec=spec, layout=layout, hidden_size=8))
    torch.export.save(export_program(policy, observations[:3]), tmp_path / "policy.pt2")
    program = torch.export.load(tmp_path / "policy.pt2").module()
    names = ["me.hp", "me.seen"]
    fields = {name: layout.field(observations, name).contiguous() for name in names}
    log_probs, values = program(fields, *padded(lists, 6, 1))
    distribution, value = policy.distribution(observations)
    wanted = expected_log_probs(distribution, lists, 6)
    torch.testing.assert_close(log_probs, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(values, value.squeeze(1))

    # Lists of another dtype: a policy takes them, and a program too, or it names the dtypes.
    legal, n_legal = padded(lists, 6, 1)
    small = legal.clamp(min=0).to(torch.uint8), n_legal.to(torch.int16)
    assert torch.equal(PaddedPolicy(policy)(fields, *small)[0], log_probs)
    complaint = "dtype mismatch"
    try:
        assert torch.equal(program(fields, *small)[0], log_probs)
    except RuntimeError as error:
        complaint = str(error)
    assert "dtype mismatch" in complaint


@pytest.mark.parametrize("head", ["flat", "autoregressive"])
def test_large_scores_are_no_fault_of_the_encoder(head: str) -> None:
    """Observations in the thousands: float32 cannot hold what the scores differ by."""
    layout = layout_for(BANDIT_SPEC)
    env = Bandit(20)
    env.reset(seed=1)
    observations = observed(layout, env.lists)
    layout.field(observations, "numbers").mul_(1e4)
    names = list(BANDIT_SPEC.entity_names)

    def policy(encoder: type[NumbersEncoder]) -> fp.Policy:
        made = fp.Policy(spec=BANDIT_SPEC, layout=layout, encoder=encoder(layout, names), head=head)
        return stirred(made)

    export_program(policy(NumbersEncoder), observations)
    with pytest.raises(RuntimeError, match=r"hidden\[0, 0\] is .*, but the policy's encoder gives"):
        export_program(policy(Doubled), observations)


def test_an_autoregressive_log_prob_keeps_its_digits_at_large_logits() -> None:
    layout = layout_for(BANDIT_SPEC)
    env = Bandit(20)
    env.reset(seed=1)
    observations = observed(layout, env.lists)
    numbers = layout.field(observations, "numbers").mul_(1e4)
    encoder = NumbersEncoder(layout, list(BANDIT_SPEC.entity_names))
    policy = stirred(
        fp.Policy(spec=BANDIT_SPEC, layout=layout, encoder=encoder, head="autoregressive")
    )
    with torch.no_grad():
        wanted = expected_log_probs(policy.distribution(observations)[0], env.lists, ROOM)
        got, _ = PaddedPolicy(policy)({"numbers": numbers}, *padded(env.lists, ROOM, 2))
    assert (wanted[wanted.isfinite()] < -1e4).any()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


class Unlike(NumbersEncoder):
    """Gives another answer for fields than for observations."""

    def forward(self, observations: Tensor) -> fp.Encoding:
        hidden, entities = super().forward(observations)
        return fp.Encoding(hidden + isinstance(observations, dict), entities)


class Doubled(NumbersEncoder):
    """Likewise, whatever the size of the numbers."""

    def forward(self, observations: Tensor) -> fp.Encoding:
        hidden, entities = super().forward(observations)
        return fp.Encoding(hidden * (1 + isinstance(observations, dict)), entities)


class OfBytes(NumbersEncoder):
    def forward(self, observations: Tensor) -> fp.Encoding:
        return fp.Encoding(self.trunk(observations[:, :NUMBERS].float()))


class OfRows(NumbersEncoder):
    def forward(self, observations: Tensor) -> fp.Encoding:
        numbers = self.layout.field(observations, "numbers").view(len(observations), NUMBERS)
        return fp.Encoding(self.trunk(numbers))


class Softer(fp.FlatHead):
    def forward(self, *arguments: Any) -> Any:
        return super().forward(*arguments).tempered(2.0)


class Deceptive(fp.FlatHead):
    """Its padded form is of another distribution."""

    def padded(self, *arguments: Any) -> Any:
        return super().padded(*arguments) / 2


class OwnHead(nn.Module):
    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        self.flat = fp.FlatHead(*arguments)

    def forward(self, *arguments: Any) -> Any:
        return self.flat(*arguments)


def test_a_path_that_cannot_be_written_raises_before_the_export(tmp_path: Path) -> None:
    needs_onnx()
    policy = bandit_policy(fp.FlatPolicy)
    nothing = torch.zeros(0, 1)  # which the export itself would refuse
    with pytest.raises(FileNotFoundError, match=r"missing/policy.onnx does not exist: make .*miss"):
        export_onnx(policy, tmp_path / "missing" / "policy.onnx", nothing)
    with pytest.raises(IsADirectoryError, match="is a folder: name a file in it"):
        export_onnx(policy, tmp_path, nothing)


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = fp.ActionSpec.from_nvec([2, 3])
    layout = layout_for(spec)
    observations = observed(layout, [[(0, 1), (1, 2)], [(1, 0)]])

    def policy(encoder: type[NumbersEncoder] = NumbersEncoder, **arguments: Any) -> fp.Policy:
        return stirred(
            fp.Policy(spec=spec, layout=layout, encoder=encoder(layout, []), **arguments)
        )

    with pytest.raises(TypeError, match=r"Greedy cannot be exported.*takes argmax"):
        export_program(fp.Greedy(policy()), observations)
    with pytest.raises(TypeError, match="Linear cannot be exported: pass a Policy"):
        export_program(nn.Linear(2, 2), observations)
    with pytest.raises(TypeError, match="head OwnHead cannot be exported"):
        export_program(policy(head=OwnHead), observations)
    with pytest.raises(ValueError, match=re.escape("B at least 1, got (0, ")):
        export_program(policy(), observations[:0])
    for encoder in (OfBytes, OfRows):
        with pytest.raises(TypeError, match=f"{encoder.__name__} cannot be exported: it must take"):
            export_program(policy(encoder), observations)
    with pytest.raises(
        RuntimeError, match=r"row 0: exported, hidden\[0, 0\] is .*, but the policy's encoder"
    ):
        export_program(policy(Unlike), observations)
    with pytest.raises(TypeError, match=r"head Softer cannot be .*: Softer decides in its own way"):
        export_program(policy(head=Softer), observations)
    with pytest.raises(RuntimeError, match=r"log_probs\[0, 0\] is .*, but the policy's is"):
        export_program(policy(head=Deceptive), observations)

    with pytest.raises(ValueError, match="115 bytes, the layout 116"):
        export_program(policy(), observations[:, 1:].contiguous())
    with pytest.raises(TypeError, match=r"a tensor, got ndarray; of an array, torch.as_tensor"):
        export_program(policy(), observations.numpy())  # type: ignore[arg-type]

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"needs onnx: from a checkout .*'.\[export"):
        export_onnx(policy(), tmp_path / "policy.onnx", observations)
    assert not list(tmp_path.iterdir())
