"""A trained policy for a game server that has neither this library nor, with ONNX, torch.

A server sends the fields that the encoder reads, the legal lists in a padded array and their
counts; it gets the log-prob of each place in the lists. All operations are of static shapes, over
any number of rows and any length of the lists.

Shapes: B rows, K places in the padded lists, H values in a tuple, D hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.rnn import pad_sequence

from tcg_flatpolicy.encoders import Encoding
from tcg_flatpolicy.heads.autoregressive import same_so_far
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.memory import LSTM
from tcg_flatpolicy.operators import wide
from tcg_flatpolicy.provenance import provenance, write_whole
from tcg_flatpolicy.puffer import Greedy, Policy
from tcg_flatpolicy.spec import ActionSpec, Role
from tcg_flatpolicy.table import as_tensors

FIELD = "observation."
"""Goes before a field's name in the ONNX model's inputs, so that no field is named as another."""
_LISTS = ("legal", "n_legal", "lstm_h", "lstm_c")


@contextlib.contextmanager
def _without_gradients_or_autocast() -> Iterator[None]:
    """PufferLib's trainer leaves autocast on, and it would be recorded."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


class PaddedPolicy(nn.Module):
    """A policy over padded legal lists: what torch.export takes. It shares the policy's weights.

    It gives the log-probs of the policy's own distribution, with the exploration that was set when
    this was made. A tuple that is listed again counts at its first place. Comparing all places with
    each other costs B K² H, so cut the lists to the longest of the batch.

    Args:
        policy: a Policy whose head has a padded form (those of this library have one), a
            RecurrentPolicy of one, or PufferLib's LSTMWrapper around a Policy.

    Raises:
        TypeError: another module, a head without a padded form, or a subclass of one that decides
            otherwise than its parent and brings no padded form of its own.
    """

    limits: Tensor

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        inner, lstm = _taken_apart(policy)
        self.encoder, self.value = inner.encoder, inner.value
        self.cell: nn.LSTMCell | None = None
        if lstm is not None:
            self.cell = nn.LSTMCell(lstm.input_size, lstm.hidden_size)
            for name, _ in list(self.cell.named_parameters()):
                setattr(self.cell, name, getattr(lstm, f"{name}_l0"))
        self.head = _with_padded_form(inner.head)
        self.first_step = inner.first_step
        self.temperature, self.epsilon = inner.temperature, inner.epsilon
        limits = torch.as_tensor(inner.spec.limits, device=next(inner.value.parameters()).device)
        self.register_buffer("limits", limits, persistent=False)

    def forward(
        self,
        fields: dict[str, Tensor],
        legal: Tensor,
        n_legal: Tensor,
        lstm_h: Tensor | None = None,
        lstm_c: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Log-probs of the places in the lists, values, and the next state of a recurrent policy.

        Args:
            fields: {name: (B, *shape)} that the encoder reads, as LegalLayout.field gives them.
            legal: (B, K, H) int64, of which the first ``n_legal[b]`` tuples of row b are legal;
                what stands behind them does not matter. What was exported takes int64 alone.
            n_legal: (B,) int64, 0 to K.
            lstm_h: (B, D) float32, of a recurrent policy only, with lstm_c: zeros where a game
                begins, else what the step before gave.
            lstm_c: (B, D) float32.

        Returns:
            log_probs (B, K) float32: -inf behind the count and where a tuple is listed again, so
            a row without a legal tuple (it plays the spec's no-op) is -inf throughout. A row that
            is NaN throughout has a count outside 0..K or a tuple outside the spec, or the weights
            are broken. Then values (B,) float32, NaN of a policy with ``critic_only``, and, of a
            recurrent policy, lstm_h and lstm_c.
        """
        hidden, looked_up = self.encoder(fields)
        entities = as_tensors(looked_up)
        state: tuple[Tensor, ...] = ()
        if self.cell is not None:
            if lstm_h is None or lstm_c is None:
                raise ValueError("a recurrent policy needs lstm_h and lstm_c; zeros at the start")
            if self.first_step is not None:
                keep = (fields[self.first_step].reshape(-1, 1) == 0).to(hidden.dtype)
                lstm_h, lstm_c = lstm_h * keep, lstm_c * keep
            state = self.cell(hidden, (lstm_h, lstm_c))
            hidden = state[0]

        # In what is exported these are checks: uint8 would be taken for a mask.
        legal, n_legal = legal.long(), n_legal.long()
        place = torch.arange(legal.shape[1], device=legal.device)
        listed = place < n_legal.unsqueeze(1)  # (B, K)
        tuples = torch.where(listed.unsqueeze(2), legal, 0)
        bounds = self.limits[tuples[..., 0].clamp(0, self.limits.shape[0] - 1)]  # (B, K, H)
        foreign = listed & ((tuples < 0) | (tuples >= bounds)).any(2)
        broken = foreign.any(1) | (n_legal < 0) | (n_legal > legal.shape[1])  # (B,)
        tuples = torch.where(foreign.unsqueeze(2), 0, tuples)
        earlier = place < place.unsqueeze(1)  # (K, K)
        listed = listed & ~(same_so_far(tuples)[-1] & earlier).any(2)

        head: Any = self.head
        scores = wide(head.padded(hidden, entities, tuples, listed)) / self.temperature
        log_probs = scores.masked_fill(~listed, -math.inf).log_softmax(1)
        if self.epsilon:
            uniform = self.epsilon / listed.sum(1, keepdim=True).to(scores.dtype)
            log_probs = ((1 - self.epsilon) * log_probs.exp() + uniform).log()
        log_probs = log_probs.masked_fill(~listed, -math.inf)
        log_probs = log_probs.masked_fill(broken.unsqueeze(1), math.nan)
        return (log_probs, wide(self.value(hidden)).squeeze(1), *state)


@_without_gradients_or_autocast()
def export_program(policy: nn.Module, observations: Tensor) -> ExportedProgram:
    """A policy as torch.export has it: a PaddedPolicy in evaluation mode, in float32, on the CPU.

    ``program.module()(fields, legal, n_legal)`` calls it, and torch.export.save writes it. It is
    compared with the policy on the observations before it is returned: in float64, from what the
    encoder gives, so that no rounding hides a difference.

    Args:
        policy: as PaddedPolicy takes it; it is copied, and so left as it is.
        observations: (B, columns) as LegalLayout.read takes them, B at least 1: some real ones.

    Raises:
        TypeError: a policy that cannot be exported, an encoder that does not take each field by
            ``layout.field(observations, name)``, or observations that are no tensor.
        ValueError: no observations, or some that the layout does not fit.
        RuntimeError: what was exported decides otherwise than the policy.
    """
    _taken_apart(policy)  # raises before anything is copied
    if not isinstance(observations, Tensor):
        raise TypeError(
            f"observations must be a tensor, got {type(observations).__name__}; of an array, "
            "torch.as_tensor(observations) makes one"
        )
    if observations.ndim != 2 or not len(observations):
        raise ValueError(
            "export needs some real observations (B, columns), B at least 1, got "
            f"{tuple(observations.shape)}"
        )
    policy = copy.deepcopy(policy).cpu().float().eval()
    inner, lstm = _taken_apart(policy)
    observations = observations.cpu()
    # torch.export takes a size of 1 for a constant.
    if len(observations) == 1:
        observations = observations.repeat(2, 1)
    rows = len(observations)
    state: dict[str, Tensor] = {}
    if lstm is not None:
        ramp = torch.linspace(-1, 1, rows * lstm.hidden_size).view(rows, -1)
        state = {"lstm_h": ramp, "lstm_c": -ramp}
    distinct = inner.layout.read(observations).distinct()
    two = distinct.actions.new_zeros(2, 1 + distinct.slots)  # the lists are as long at least
    lists = pad_sequence([*distinct.actions.split(distinct.counts.tolist()), two], batch_first=True)
    others = [lists[:-1], distinct.counts, *state.values()]

    padded = PaddedPolicy(policy).eval()
    recorded = _Fields(inner.layout, observations)
    try:
        padded.encoder(recorded)
    except Exception as error:
        raise TypeError(
            f"{type(padded.encoder).__name__} cannot be exported: it must take each field by "
            f"layout.field(observations, name), and the number of rows from a field; it raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if inner.first_step is not None:
        recorded[inner.first_step]
    fields = dict(sorted(recorded.items()))  # so that no order of flattening differs
    # Without a bound, torch 2.6 finds fault with the largest int.
    free = [Dim(name, max=2**31 - 1) for name in ("batch", "list")]
    # strict: else len(tensor), which encoders use, makes a constant of the number of rows.
    program = torch.export.export(
        padded,
        ({name: field[:2] for name, field in fields.items()}, *(one[:2] for one in others)),
        dynamic_shapes=_shapes(fields, len(others), *free),
        strict=True,
    )
    seen, encoded = inner.encode(observations), Encoding(*padded.encoder(fields))
    _compare(_flat(seen), _flat(encoded).values(), "the policy's encoder gives", 1e-4)

    # Decisions by that encoding, compared in float64: what is left of a difference is no rounding.
    exact = copy.deepcopy(policy).double()
    entities = {name: one.double() for name, one in as_tensors(encoded.entities).items()}
    _taken_apart(exact)[0].encoder = _Recorded(Encoding(encoded.hidden.double(), entities))
    legal, n_legal, *carried = (one.double() if one.is_floating_point() else one for one in others)
    after = dict(zip(state, carried, strict=True))
    face, value = exact.forward_eval(observations, after)  # type: ignore[operator]
    log_probs = face.distribution.log_prob(legal.transpose(0, 1)).t()
    behind = torch.arange(legal.shape[1]) >= n_legal.unsqueeze(1)
    log_probs = log_probs.masked_fill(behind, -math.inf)
    if inner.critic_only:  # which nobody sends
        value = torch.full_like(value, math.nan)
    wanted = {"log_probs": log_probs, "value": value.reshape(rows)}
    wanted |= {name: after[name] for name in state}
    got = PaddedPolicy(exact).eval()(fields, legal, n_legal, *carried)
    _compare(wanted, got, "the policy's is", 1e-9)
    # What the program gives is what it was made of gives.
    made_of = dict(zip(wanted, padded(fields, *others), strict=True))
    _compare(made_of, program.module()(fields, *others), "what it was made of gives", 1e-5)
    return program


@_without_gradients_or_autocast()
def export_onnx(policy: nn.Module, path: str | Path, observations: Tensor) -> None:
    """Writes a policy as an ONNX model, whole: for onnxruntime, without torch or this library.

    Inputs are each field that the encoder reads, as ``"observation.<name>"``, ``"legal"`` (B, K, H)
    and ``"n_legal"`` (B,), both int64, and ``"lstm_h"``, ``"lstm_c"`` (B, D) of a recurrent policy.
    Outputs are ``"log_probs"`` (B, K), ``"value"`` (B,), and ``"next_lstm_h"``, ``"next_lstm_c"``.
    :meth:`PaddedPolicy.forward` says what they mean. The model's metadata has, as JSON, ``inputs``
    (dtype and shape of each), ``spec`` (sizes, the no-op, and what each primary's slots point at),
    ``exploration`` and ``versions``.

    Args:
        policy: as export_program takes it.
        path: of the file, such as ``policy.onnx``.
        observations: as export_program takes them.

    Raises:
        ImportError: without onnx or onnxscript.
        FileNotFoundError, IsADirectoryError: path has no folder, or is one.
        RuntimeError: a torch that is too old; and as export_program, with TypeError and ValueError.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"export_onnx needs {package}: from a checkout of this library, "
                "pip install '.[export]'",
                name=package,
            )
    if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        raise RuntimeError(
            f"export_onnx needs a newer torch than {torch.__version__}: 2.9 and 2.13 were tried; "
            "export_program does with this one"
        )
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} does not exist: make {path.parent} before")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it, such as policy.onnx")
    program = export_program(policy, observations)
    inner, _ = _taken_apart(policy)
    fields, *others = program.example_inputs[0]
    tensors = {FIELD + name: field for name, field in fields.items()}
    tensors |= zip(_LISTS, others, strict=False)
    for node in program.graph.nodes:
        # The exporter knows it by the second name only.
        if node.target is torch.ops.aten.__rshift__.Tensor:
            node.target = torch.ops.aten.bitwise_right_shift.Tensor
    with warnings.catch_warnings():
        # Each name of a dimension stands at several inputs, as it should.
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)
        model = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(tensors),
            output_names=["log_probs", "value", "next_lstm_h", "next_lstm_c"][: len(others)],
            dynamic_shapes=_shapes(fields, len(others), "batch", "list"),
        )
    assert model is not None
    inputs = {}
    for name, tensor in tensors.items():
        free = ["batch", "list"] if name == "legal" else ["batch"]
        dtype = str(tensor.dtype).removeprefix("torch.")
        inputs[name] = {"dtype": dtype, "shape": [*free, *tensor.shape[len(free) :]]}
    model.model.metadata_props.update(
        inputs=json.dumps(inputs),
        spec=json.dumps(_described(inner.spec)),
        exploration=json.dumps({"temperature": inner.temperature, "epsilon": inner.epsilon}),
        versions=json.dumps(provenance()["versions"]),
    )
    write_whole(path, model.model_proto.SerializeToString())


class _Fields(dict[str, Tensor]):
    """Observations by field, each read when it is asked for and kept."""

    def __init__(self, layout: LegalLayout, observations: Tensor) -> None:
        super().__init__()
        self.layout, self.observations = layout, observations

    def __missing__(self, name: str) -> Tensor:
        self[name] = self.layout.field(self.observations, name).contiguous()
        return self[name]

    def __len__(self) -> int:
        raise TypeError("exported observations are fields: take the rows of one, len(field)")


def _taken_apart(policy: nn.Module) -> tuple[Policy, LSTM | None]:
    """The policy that encodes and decides, and what stands between."""
    if isinstance(policy, Policy):
        return policy, policy.lstm if policy.recurrent else None
    inner, lstm = getattr(policy, "policy", None), getattr(policy, "lstm", None)
    if isinstance(inner, Policy) and isinstance(lstm, nn.LSTM):  # PufferLib's LSTMWrapper
        return inner, LSTM.of(lstm)
    raise TypeError(
        f"{type(policy).__name__} cannot be exported: pass a Policy, a RecurrentPolicy, or "
        "PufferLib's LSTMWrapper around a Policy"
        + ("; for the mode, the server takes argmax" if isinstance(policy, Greedy) else "")
    )


def _with_padded_form(head: nn.Module) -> nn.Module:
    """The head; a TypeError if it or a module in it decides otherwise than its padded form."""
    for module in (head, *(one for one in head.modules() if hasattr(one, "padded"))):
        for kind in type(module).__mro__:
            if "padded" in vars(kind):
                break
            if "forward" in vars(kind) or "decide" in vars(kind):
                raise TypeError(
                    f"a policy with the head {type(head).__name__} cannot be exported: "
                    f"{kind.__name__} decides in its own way and has no padded(...) of its own, "
                    "see tcg_flatpolicy.heads.Head.padded"
                )
    return head


class _Recorded(nn.Module):
    """An encoder that gives one encoding, whatever it observes."""

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        self.encoding = encoding

    def forward(self, observations: Any) -> Encoding:
        return self.encoding


def _flat(encoding: Encoding) -> dict[str, Tensor]:
    entities = sorted(as_tensors(encoding.entities).items())
    named = {f"entities[{name!r}]": one for name, one in entities}
    return {"hidden": encoding.hidden, **named}


def _compare(
    wanted: Mapping[str, Tensor], got: Iterable[Tensor], whose: str, tolerance: float
) -> None:
    for (name, expected), exported in zip(wanted.items(), got, strict=True):
        wrong = ~torch.isclose(exported, expected, tolerance, tolerance, equal_nan=True)
        if wrong.any():
            at = wrong.nonzero()[0].tolist()
            raise RuntimeError(
                f"row {at[0]}: exported, {name}{at} is {exported[tuple(at)].item()}, but {whose} "
                f"{expected[tuple(at)].item()}; does the encoder look at more than the fields of a "
                "row, or does a subclass decide otherwise?"
            )


def _shapes(fields: Mapping[str, Tensor], others: int, batch: Any, length: Any) -> tuple[Any, ...]:
    """Which dimensions of PaddedPolicy's arguments are free, ``others`` of them not fields."""
    lists = [{0: batch, 1: length}, *([{0: batch}] * (others - 1))]
    return ({name: {0: batch} for name in fields}, *lists)


def _described(spec: ActionSpec) -> dict[str, Any]:
    """A spec in plain values; a slot is the list of its ranges, one after the other."""
    primaries = []
    for number, primary in spec.primaries.items():
        slots = [[_range(part) for _, part in role.parts()] for role in primary.slots]
        primaries.append({"id": number, "name": primary.name, "slots": slots})
    return {"nvec": spec.nvec.tolist(), "noop": spec.noop.tolist(), "primaries": primaries}


def _range(role: Role) -> dict[str, Any]:
    return {"kind": type(role).__name__.lower(), "name": role.name, "size": role.size}
