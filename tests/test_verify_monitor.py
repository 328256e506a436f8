"""LegalityMonitor: real training under it, its counts against a recount, what it raises."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pufferlib
import pufferlib.vector
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.verify.monitor import CHECK_SENT, IllegalActionError, LegalityMonitor
from tests.games import BANDIT_DTYPE, BANDIT_SPEC, Bandit, BanditEncoder
from tests.strategies import Struct, lists_for, random_bytes, records_in, structs

pytestmark = pytest.mark.integration

LAYOUT = fp.LegalLayout.from_dtype(BANDIT_DTYPE, "n", "legal", spec=BANDIT_SPEC)
AGENTS = 16
LISTS = [[(0, 0, 0), (1, 2, 3), (1, 2, 1)], [], [(2, 4, 0)]]


class Tolerant(Bandit):
    """Plays on whatever it is sent: a worker that raises would leave its trainer waiting."""

    def pay(self, row: int, action: tuple[int, ...]) -> float:
        return super().pay(row, action) if BANDIT_SPEC.explain(action) is None else 0.0


class Wire:
    """What stands between monitor and environment: keeps copies of all that passes."""

    def __init__(self, vecenv: Any) -> None:
        self.vecenv = vecenv
        self.passed: list[tuple[np.ndarray, np.ndarray]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vecenv, name)

    def recv(self) -> Any:
        received = self.vecenv.recv()
        self.observations = received[0].copy()
        return received

    def send(self, actions: Any) -> None:
        self.passed.append((self.observations, np.array(actions)))
        self.vecenv.send(actions)


class Scripted:
    """A vector environment that shows the same lists in every state."""

    def __init__(
        self, lists: Any = LISTS, masks: Any = None, teacher: bool = True, layout: Any = LAYOUT
    ) -> None:
        self.lists, self.teacher, self.legal_layout = lists, teacher, layout
        self.observations = np.zeros((len(lists), layout.dtype.itemsize), np.uint8)
        layout.write(self.observations, lists)
        self.masks = np.ones(len(lists), bool) if masks is None else np.array(masks)
        self.sent: list[Any] = []

    def async_reset(self, seed: int | None = None) -> None:
        self.sent.append(("reset", seed))

    def recv(self) -> Any:
        numbers = np.zeros(len(self.lists), np.float32)
        teacher = [np.zeros(1)] if self.teacher else []
        ids = 10 + np.arange(len(self.lists))
        flags = (numbers, numbers > 0, numbers > 0)
        return (self.observations, *flags, *teacher, [{"info": 1}], ids, self.masks)

    def send(self, actions: Any) -> None:
        self.sent.append(actions)

    def close(self) -> None:
        self.sent.append("closed")


class Unmasked(nn.Module):
    """PufferLib's heads, which know no list."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(BANDIT_DTYPE.itemsize, int(BANDIT_SPEC.nvec.sum()))
        self.value = nn.Linear(BANDIT_DTYPE.itemsize, 1)

    def forward_eval(self, observations: Any, state: Any = None) -> Any:
        scaled = observations.float() / 255
        return self.heads(scaled).split(BANDIT_SPEC.nvec.tolist(), dim=-1), self.value(scaled)

    forward = forward_eval


def make(backend: str, empty: float = 0.3) -> Any:
    kwargs = {"num_agents": AGENTS, "empty": empty}
    if backend == "native":
        return pufferlib.vector.make(Tolerant, env_kwargs=kwargs, backend=pufferlib.PufferEnv)
    options: dict[str, Any] = {"backend": pufferlib.vector.Serial, "num_envs": 2}
    if backend != "Serial":
        options = {
            "backend": pufferlib.vector.Multiprocessing,
            "num_envs": 2,
            "num_workers": 2,
            "overwork": True,
        }
    if backend == "Multiprocessing, one at a time":
        options["batch_size"] = 1
    return pufferlib.vector.make(Tolerant, env_kwargs=kwargs, seed=1, **options)


def our_policy(env: Any) -> fp.FlatPolicy:
    torch.manual_seed(0)
    return fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))


def recount(wire: Wire) -> dict[str, Any]:
    """Counted by Python loops over what passed the wire."""
    names = {number: primary.name for number, primary in BANDIT_SPEC.primaries.items()}
    counts: dict[str, Any] = dict.fromkeys(
        ("sent", "illegal", "forced", "empty", "noops", "noop_listed", "unknown"), 0
    )
    each = {name: [0, 0, 0] for name in names.values()}
    for observations, actions in wire.passed:
        lists = LAYOUT.read(torch.as_tensor(observations)).to_lists()
        for legal, action in zip(lists, map(tuple, actions.reshape(-1, 3).tolist()), strict=True):
            counts["empty"] += not legal
            counts["noop_listed"] += (0, 0, 0) in legal
            if not legal and action == (0, 0, 0):
                counts["forced"] += 1
                continue
            counts["sent"] += 1
            counts["illegal"] += action not in legal
            counts["noops"] += action == (0, 0, 0)
            if action[0] in names:
                each[names[action[0]]][0] += 1
                each[names[action[0]]][1] += action not in legal
            else:
                counts["unknown"] += 1
            for primary in {tuple_[0] for tuple_ in legal}:
                each[names[primary]][2] += 1
    return {**counts, "primaries": {name: tuple(numbers) for name, numbers in each.items()}}


def counted(monitor: LegalityMonitor) -> dict[str, Any]:
    counts = vars(monitor.counts).copy()
    primaries = {n: (c.sent, c.illegal, c.legal) for n, c in counts.pop("primaries").items()}
    for name in ("states", "inactive", "unchecked", "broken_lists"):
        counts.pop(name)
    return {**counts, "primaries": primaries}


BACKENDS = ["Serial", "native", "Multiprocessing", "Multiprocessing, one at a time"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sound_policy_trains_under_it(trainers: Any, backend: str) -> None:
    wire = Wire(make(backend))
    monitor = LegalityMonitor(wire)
    trainer = trainers(monitor, our_policy(monitor.driver_env))
    for _ in range(2):
        trainer.evaluate()
        trainer.train()
    counts = monitor.counts
    assert trainer.global_step == counts.sent + counts.forced == 2 * 8 * monitor.num_agents
    assert counted(monitor) == recount(wire)
    assert counts.states == len(wire.passed)
    assert counts.illegal == counts.unchecked == counts.inactive == counts.broken_lists == 0
    assert counts.forced == counts.empty
    assert 0.1 < counts.empty / trainer.global_step < 0.5
    assert counts.primaries["attack"].legal > counts.primaries["attack"].sent > 0
    report = monitor.report()
    assert report.ok
    assert [check.status for check in report.checks.values()] == ["passed", "passed"]
    assert report.figures["attack: sent"] == counts.primaries["attack"].sent
    assert report.figures["actions sent"] == report.checks[CHECK_SENT].cases == counts.sent
    assert report.figures["no-ops of rows without a list"] == counts.forced


def test_training_is_the_same_with_it_as_without(trainers: Any) -> None:
    weights = []
    for wrapped in (False, True):
        vecenv = make("Serial")
        policy = our_policy(vecenv.driver_env)
        trainer = trainers(LegalityMonitor(vecenv) if wrapped else vecenv, policy)
        torch.manual_seed(7)
        for _ in range(3):
            trainer.evaluate()
            trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_that_knows_no_list_is_recorded(trainers: Any, backend: str) -> None:
    wire = Wire(make(backend))
    monitor = LegalityMonitor(wire, on_illegal="record", keep=5)
    torch.manual_seed(0)
    trainer = trainers(monitor, Unmasked())
    trainer.evaluate()
    trainer.train()
    assert counted(monitor) == recount(wire)
    counts = monitor.counts
    assert counts.illegal > counts.sent / 2
    assert len(monitor.illegal) == 5
    report = monitor.report()
    assert list(report.findings) == ["T07"]
    assert report.findings["T07"].count == counts.illegal
    first = monitor.illegal[0]
    assert first.state == 1
    assert report.findings["T07"].message == str(first)
    assert report.findings["T07"].state == 1
    observations, actions = wire.passed[0]
    legal = LAYOUT.read(torch.as_tensor(observations)).to_lists()[first.row]
    assert first.action == tuple(actions.reshape(-1, 3)[first.row].tolist())
    assert first.listed == len(legal)
    assert set(first.nearest) <= {BANDIT_SPEC.describe(tuple_) for tuple_ in legal or [(0, 0, 0)]}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_that_knows_no_list_raises_before_the_environment_sees_it(
    trainers: Any, backend: str
) -> None:
    wire = Wire(make(backend))
    monitor = LegalityMonitor(wire)
    torch.manual_seed(0)
    trainer = trainers(monitor, Unmasked())
    with pytest.raises(IllegalActionError, match=r"^state 1, row \d+ \(agent \d+\): \(") as raised:
        trainer.evaluate()
    assert not wire.passed
    assert raised.value.illegal == monitor.illegal[0]
    assert not monitor.report().ok


def test_agents_are_numbered_as_the_environment_numbers_them(trainers: Any) -> None:
    """One worker at a time: the second batch is of the second worker's agents."""
    monitor = LegalityMonitor(make("Multiprocessing, one at a time"), on_illegal="record", keep=999)
    torch.manual_seed(0)
    trainer = trainers(monitor, Unmasked())
    trainer.evaluate()
    second = [illegal for illegal in monitor.illegal if illegal.state == 2]
    assert second
    assert all(illegal.agent == AGENTS + illegal.row for illegal in second)


def test_the_words_name_state_row_tuple_and_the_nearest() -> None:
    monitor = LegalityMonitor(Scripted())
    monitor.async_reset(3)
    for _ in range(2):
        monitor.recv()
        monitor.send(np.array([(1, 2, 3), (0, 0, 0), (2, 4, 0)]))
    monitor.recv()
    with pytest.raises(IllegalActionError) as raised:
        monitor.send(np.array([(1, 3, 3), (0, 0, 0), (2, 4, 0)]))
    assert str(raised.value) == (
        "state 3, row 0 (agent 10): (1, 3, 3): attack(unit[3], unit[3]) is not legal; of the 3 "
        "legal actions these are nearest: attack(unit[2], unit[3]), attack(unit[2], unit[1]), rest"
    )
    assert (monitor.counts.sent, monitor.counts.forced) == (6, 3)
    assert monitor.counts.illegal == 1
    assert len(monitor.vecenv.sent) == 3  # the reset and two sound batches


@pytest.mark.parametrize(
    ("row", "action", "words"),
    [
        (1, (1, 0, 0), "the list is empty, so only the no-op is right: rest"),
        (2, (0, 0, 0), "rest is not legal; of the 1 legal actions these are nearest: play(card[4]"),
        (0, (7, 0, 0), "7 is not a primary of this spec"),
        (0, (-1, 0, 0), "-1 is not a primary of this spec"),
        (0, (1, 9, 0), "slot 1: 9 is outside 0..3"),
        (0, (0, 0, 2), "rest does not use this slot"),
        (0, (1, 258, 3), "slot 1: 258 is outside 0..3"),  # 258 is 2 in a byte
        (
            0,
            (1.0, 1.9999998, 3.0),
            "slot 1: 1.9999998 is no whole number of 64 bits.*nearest: attack.unit.2., u",
        ),
        (0, (1.0, float("nan"), 3.0), "slot 1: nan is no whole number"),
        (0, (1.0, float("inf"), 3.0), "slot 1: inf is no whole number"),
        (0, (1.0, 2.0, 1e30), "slot 2: 1e.30 is no whole number"),
    ],
)
def test_each_kind_of_wrong_action_in_words(
    row: int, action: tuple[float, ...], words: str
) -> None:
    actions: list[tuple[float, ...]] = [(1, 2, 3), (0, 0, 0), (2, 4, 0)]
    actions[row] = action
    monitor = LegalityMonitor(Scripted(), on_illegal="record")
    monitor.recv()
    monitor.send(np.array(actions))
    (illegal,) = monitor.illegal
    assert illegal.row == row
    words = words.replace("(", r"\(").replace("[", r"\[").replace("]", r"\]")
    assert re.search(words, str(illegal)), str(illegal)
    assert monitor.counts.illegal == 1


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "int32", "int64", "uint64", "float16", "float32", "float64"]
)
def test_actions_of_any_dtype_with_whole_values(dtype: str) -> None:
    monitor = LegalityMonitor(Scripted())
    monitor.recv()
    actions = np.array([(1, 2, 1), (0, 0, 0), (2, 4, 0)], dtype)
    monitor.send(actions)
    assert (monitor.counts.sent, monitor.counts.forced) == (2, 1)
    assert monitor.vecenv.sent[-1] is actions  # sent on as it is


def test_actions_of_another_shape_with_as_many_numbers() -> None:
    monitor = LegalityMonitor(Scripted())
    monitor.recv()
    monitor.send(torch.tensor([[[1, 2, 1], [0, 0, 0], [2, 4, 0]]]))
    assert monitor.counts.illegal == 0


@pytest.mark.parametrize(
    ("actions", "error", "words"),
    [
        (np.zeros((3, 3), bool), TypeError, "whole numbers, got bool"),
        (np.zeros((3, 3), complex), TypeError, "whole numbers, got complex128"),
        (np.zeros((3, 3), object), TypeError, "whole numbers, got object"),
        (np.zeros((3, 2), int), ValueError, r"must be \(3, 3\).*got \(3, 2\)"),
        (np.zeros((2, 3), int), ValueError, r"must be \(3, 3\).*got \(2, 3\)"),
    ],
)
def test_what_are_no_actions_at_all(
    actions: np.ndarray, error: type[Exception], words: str
) -> None:
    monitor = LegalityMonitor(Scripted(), on_illegal="record")
    monitor.recv()
    with pytest.raises(error, match=words):
        monitor.send(actions)
    assert not monitor.vecenv.sent


def test_a_list_that_is_zeroed_after_it_was_shown_still_counts() -> None:
    vecenv = Scripted()
    monitor = LegalityMonitor(vecenv)
    monitor.recv()
    vecenv.observations[:] = 0
    monitor.send(np.array([(1, 2, 1), (0, 0, 0), (2, 4, 0)]))
    assert monitor.counts.illegal == 0
    assert monitor.counts.empty == 1


def test_a_list_is_for_one_action() -> None:
    monitor = LegalityMonitor(Scripted(), on_illegal="record")
    actions = np.array([(1, 2, 1), (0, 0, 0), (2, 4, 0)])
    monitor.recv()
    monitor.send(actions)
    monitor.send(actions)  # no list was shown for these
    monitor.recv()
    monitor.async_reset(4)
    monitor.send(actions)  # nor for these, after the reset
    assert (monitor.counts.sent, monitor.counts.forced) == (2, 1)
    assert monitor.counts.unchecked == 6
    assert len(monitor.vecenv.sent) == 4


def test_rows_that_are_masked_out_are_not_judged() -> None:
    monitor = LegalityMonitor(Scripted(masks=[True, False, True]), on_illegal="record")
    monitor.recv()
    monitor.send(np.array([(1, 2, 1), (2, 2, 2), (2, 2, 2)]))
    counts = monitor.counts
    assert (counts.sent, counts.inactive, counts.illegal, counts.empty) == (2, 1, 1, 0)
    assert [illegal.row for illegal in monitor.illegal] == [2]


def test_a_count_outside_the_room() -> None:
    vecenv = Scripted()
    vecenv.observations.view(BANDIT_DTYPE)[2, 0]["n"] = 13
    monitor = LegalityMonitor(vecenv)
    with pytest.raises(ValueError, match=r"state 1, row 2: n says 13 legal actions, outside 0..12"):
        monitor.recv()
    monitor = LegalityMonitor(vecenv, on_illegal="record")
    for _ in range(2):
        monitor.recv()
        monitor.send(np.array([(1, 2, 1), (0, 0, 0), (2, 4, 0)]))
    assert monitor.counts.illegal == 0
    report = monitor.report()
    assert list(report.findings) == ["E04"]
    assert report.findings["E04"].count == monitor.counts.broken_lists == 2


def test_the_nearest_may_be_outside_the_spec() -> None:
    monitor = LegalityMonitor(Scripted([[(1, 9, 3)]]), on_illegal="record")
    monitor.recv()
    monitor.send(np.array([(1, 1, 3)]))
    assert "(1, 9, 3), where slot 1: 9 is outside 0..3" in str(monitor.illegal[0])
    monitor.recv()
    monitor.send(np.array([(1, 9, 3)]))  # listed is listed
    assert monitor.counts.illegal == 1


def test_what_is_not_whole_is_not_the_minus_one_of_a_broken_list() -> None:
    dtype = np.dtype([("n", np.int8), ("legal", np.int8, (1, 2))])
    layout = fp.LegalLayout.from_dtype(dtype, "n", "legal", spec=fp.ActionSpec.from_nvec([2, 2]))
    vecenv = Scripted([[(0, 0)]], layout=layout)
    vecenv.observations.view(dtype)["legal"] = -1
    monitor = LegalityMonitor(vecenv, layout=layout, on_illegal="record")
    monitor.recv()
    monitor.send(np.array([(0.5, 0.5)]))
    assert monitor.counts.illegal == 1


def test_keep_and_the_first_of_all() -> None:
    for keep in (0, 1, 100):
        monitor = LegalityMonitor(Scripted(), on_illegal="record", keep=keep)
        for _ in range(3):
            monitor.recv()
            monitor.send(np.full((3, 3), 2))
        assert len(monitor.illegal) == min(keep, 9)
        finding = monitor.report().findings["T07"]
        assert finding.count == monitor.counts.illegal == 9
        assert finding.message.startswith("state 1, row 0")


def test_a_primary_that_is_legal_and_never_sent_is_named() -> None:
    monitor = LegalityMonitor(Scripted())
    for _ in range(4):
        monitor.recv()
        monitor.send(np.array([(0, 0, 0), (0, 0, 0), (2, 4, 0)]))
    attack = monitor.counts.primaries["attack"]
    assert (attack.sent, attack.legal, attack.never) == (0, 4, True)
    assert not monitor.counts.primaries["play"].never
    figures = monitor.report().figures
    assert figures["attack: legal, never sent"] == 4
    assert "play: legal, never sent" not in figures


def test_forced_no_ops_are_reported_apart() -> None:
    """The one of a row without a list is no action of the policy's, nor of the primary's."""
    monitor = LegalityMonitor(Scripted())
    for _ in range(5):
        monitor.recv()
        monitor.send(np.array([(1, 2, 1), (0, 0, 0), (2, 4, 0)]))
    report = monitor.report()
    assert report.figures["actions sent"] == 10
    assert report.figures["no-ops"] == 0
    assert report.figures["rows whose list held the no-op"] == 5
    assert report.figures["rows without a list"] == 5
    assert report.figures["no-ops of rows without a list"] == 5
    assert report.figures["rest: sent"] == 0
    assert report.figures["rest: legal, never sent"] == 5  # by no choice, that is
    assert report.checks[CHECK_SENT].cases == 10
    # Where another action is sent it is the policy's, and illegal.
    monitor = LegalityMonitor(Scripted(), on_illegal="record")
    monitor.recv()
    monitor.send(np.array([(1, 2, 1), (2, 4, 0), (2, 4, 0)]))
    counts = monitor.counts
    assert (counts.sent, counts.illegal, counts.forced, counts.empty) == (3, 1, 0, 1)


def test_only_empty_lists_are_nothing_passed() -> None:
    monitor = LegalityMonitor(Scripted([[], []]))
    monitor.recv()
    monitor.send(np.zeros((2, 3), int))
    check = monitor.report().checks[CHECK_SENT]
    assert check.status == "skipped"
    assert "no row had a list" in str(check.skipped)
    assert monitor.counts.forced == 2


def test_reset_and_step_as_pufferlib_has_them() -> None:
    for teacher in (True, False):  # PufferLib 3.0.0 returns no teacher actions
        monitor = LegalityMonitor(Scripted(teacher=teacher))
        observations, infos = monitor.reset(5)
        assert monitor.vecenv.sent == [("reset", 5)]
        assert infos == [{"info": 1}]
        result = monitor.step(np.array([(1, 2, 1), (0, 0, 0), (2, 4, 0)]))
        assert len(result) == 5
        assert result[4] == [{"info": 1}]
        assert result[0] is observations
        assert (monitor.counts.sent, monitor.counts.forced) == (2, 1)
        with pytest.raises(IllegalActionError):
            monitor.step(np.array([(1, 2, 0), (0, 0, 0), (2, 4, 0)]))


def test_nothing_looked_at_is_nothing_passed() -> None:
    report = LegalityMonitor(Scripted()).report()
    assert [check.status for check in report.checks.values()] == ["skipped", "skipped"]
    assert report.ok


def test_it_forwards_all_else_and_can_be_copied() -> None:
    vecenv = Scripted()
    monitor = LegalityMonitor(vecenv)
    assert monitor.lists is vecenv.lists
    with pytest.raises(AttributeError, match="'Scripted' object has no attribute 'nothing'"):
        _ = monitor.nothing
    assert copy.deepcopy(monitor).counts == monitor.counts
    monitor.close()
    assert vecenv.sent == ["closed"]


def test_what_it_needs_to_be_told() -> None:
    bare = object()
    with pytest.raises(ValueError, match=r"needs spec=.*object has no action_spec"):
        LegalityMonitor(bare)
    with pytest.raises(ValueError, match=r"needs layout=.*object has no legal_layout"):
        LegalityMonitor(bare, spec=BANDIT_SPEC)
    without = fp.LegalLayout.from_dtype(BANDIT_DTYPE, "n", "legal")
    with pytest.raises(ValueError, match=r"needs spec=.*from_nvec"):
        LegalityMonitor(bare, layout=without)
    assert LegalityMonitor(bare, layout=without, spec=BANDIT_SPEC).spec is BANDIT_SPEC
    with pytest.raises(ValueError, match="'raise' or 'record', got 'warn'"):
        LegalityMonitor(Scripted(), on_illegal="warn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep must not be negative"):
        LegalityMonitor(Scripted(), keep=-1)


def test_the_no_op_is_the_specs_and_ids_may_have_gaps() -> None:
    spec = fp.ActionSpec(
        [fp.Primary("a", fp.Index("x", 3), id=2), fp.Primary("b", id=9)], noop=[2, 1]
    )
    dtype = np.dtype([("n", np.int64), ("legal", np.int8, (4, 2))])
    layout = fp.LegalLayout.from_dtype(dtype, "n", "legal")
    vecenv = Scripted([[], [(2, 1), (9, 0)], [(9, 0)], []], layout=layout)
    monitor = LegalityMonitor(vecenv, layout=layout, spec=spec, on_illegal="record")
    monitor.recv()
    monitor.send(np.array([(2, 1), (9, 0), (2, 1), (0, 0)]))
    counts = monitor.counts
    assert [illegal.row for illegal in monitor.illegal] == [2, 3]
    assert (counts.sent, counts.forced, counts.empty, counts.unknown) == (3, 1, 2, 1)
    assert (counts.noops, counts.noop_listed) == (1, 1)
    assert vars(counts.primaries["a"]) == {"sent": 1, "illegal": 1, "legal": 1}
    assert vars(counts.primaries["b"]) == {"sent": 1, "illegal": 0, "legal": 2}


@st.composite
def shown_and_sent(draw: Any) -> tuple[Struct, Any, np.ndarray, bool]:
    """A struct, lists in it, one action a row (often a listed one), and whether as numbers."""
    only = draw(st.none() | st.sampled_from(["float32", "float64", "int16"]).map(np.dtype))
    struct = draw(structs(only))
    lists = draw(lists_for(struct, largest=6).filter(len))
    anything = st.tuples(*[st.integers(-1, 7)] * struct.width)
    actions = [draw(st.sampled_from(row) | anything if row else anything) for row in lists]
    return struct, lists, np.array(actions), only is not None and draw(st.booleans())


@given(shown_and_sent())
def test_every_layout_against_contains(case: tuple[Struct, Any, np.ndarray, bool]) -> None:
    struct, lists, actions, as_numbers = case
    spec = fp.ActionSpec.from_nvec([7] * struct.width)
    layout = fp.LegalLayout.from_dtype(struct.dtype, struct.count, struct.actions, spec=spec)
    vecenv = Scripted(lists, layout=layout)
    data = random_bytes(np.random.default_rng(0), struct.dtype, len(lists))
    layout.write(records_in(data, struct.dtype), lists)
    vecenv.observations = data
    if as_numbers:
        single = struct.dtype[struct.count.split(".")[0]].base
        while single.names is not None:
            single = single[0].base
        vecenv.observations = data.view(single)
    monitor = LegalityMonitor(vecenv, layout=layout, on_illegal="record", keep=1000)
    monitor.recv()
    monitor.send(actions)
    legal = fp.LegalActions.from_lists(lists, slots=struct.width - 1)
    right = legal.contains(torch.as_tensor(actions)).tolist()
    wrong = [row for row, one in enumerate(right) if not one]
    assert [illegal.row for illegal in monitor.illegal] == wrong
    assert [illegal.listed for illegal in monitor.illegal] == [len(lists[row]) for row in wrong]
    assert monitor.counts.illegal == len(wrong)


def test_the_largest_values_of_wide_dtypes_are_told_apart() -> None:
    """As float64, 2**53 and 2**53 + 1 are one."""
    spec = fp.ActionSpec.from_nvec([1, 2**62])
    for dtype in ("uint64", "int64"):
        layout = fp.LegalLayout.from_dtype(
            np.dtype([("n", "u8"), ("legal", dtype, (2, 2))]), "n", "legal", spec=spec
        )
        monitor = LegalityMonitor(
            Scripted([[(0, 2**53)]], layout=layout), layout=layout, on_illegal="record"
        )
        for value, illegal in ((2**53, 0), (2**53 + 1, 1)):
            monitor.recv()
            monitor.send(np.array([(0, value)]))
            assert monitor.counts.illegal == illegal
