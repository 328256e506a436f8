"""The rule of exploration: an update is at the settings of all draws of the latest rollout."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

import tcg_flatpolicy as fp
from tcg_flatpolicy.puffer import LegalNormal

SPEC = fp.ActionSpec.from_nvec([2, 3])
DTYPE = np.dtype([("x", np.float32, 2), ("legal", np.uint8, (4, 2)), ("n", np.uint8)])
LAYOUT = fp.LegalLayout.from_dtype(DTYPE, count="n", actions="legal", spec=SPEC)
CHANGED = "exploration was changed between rollout and update"
E0, E1 = (1.0, 0.0), (1.5, 0.1)


def policy(head: str = "flat") -> fp.Policy:
    torch.manual_seed(0)
    return fp.Policy(spec=SPEC, layout=LAYOUT, hidden_size=8, width=4, head=head)


def batch() -> torch.Tensor:
    data = np.zeros((3, DTYPE.itemsize), np.uint8)
    LAYOUT.write(data, [[(0, 1), (1, 2), (1, 0)], [], [(1, 1), (0, 0)]])
    return torch.as_tensor(data)


ROWS = batch()


def draw(p: fp.Policy) -> torch.Tensor:
    with torch.no_grad():
        return p.forward_eval(ROWS)[0].sample()


def update(p: fp.Policy, actions: torch.Tensor) -> None:
    p(ROWS)[0].log_prob(actions).sum().backward()


def refused(p: fp.Policy, actions: torch.Tensor) -> bool:
    try:
        update(p, actions)
    except RuntimeError as error:
        if CHANGED not in str(error):
            raise
        return True
    return False


# ---- what went unnoticed


def test_a_draw_at_other_settings_before_the_last_one() -> None:
    p = policy()
    p.explore(*E1)
    draw(p)
    p.explore(*E0)
    assert refused(p, draw(p))


def test_explore_in_the_middle_of_a_rollout() -> None:
    p = policy()
    p.explore(*E1)
    actions = draw(p)
    p.explore(*E0)
    assert refused(p, actions)


def test_a_rollout_with_gradients() -> None:
    p = policy()
    p.explore(*E1)
    actions = p.forward_eval(ROWS)[0].sample()
    p.explore(*E0)
    assert refused(p, actions)


def test_a_face_made_with_gradients_and_drawn_from_without() -> None:
    p = policy()
    p.explore(*E1)
    face = p(ROWS)[0]
    with torch.no_grad():
        actions = face.sample()
    p.explore(*E0)
    assert refused(p, actions)


@pytest.mark.parametrize("head", ["flat", "autoregressive"])
@pytest.mark.parametrize("way", ["sample", "several", "without replacement"])
def test_a_draw_from_the_distribution_of_a_face(head: str, way: str) -> None:
    p = policy(head)
    with torch.no_grad():
        distribution: Any = p.forward_eval(ROWS)[0].distribution
        if way == "without replacement":
            actions = distribution.sample_without_replacement(1)[0][:, 0]
        else:
            actions = distribution.sample((2,))[0] if way == "several" else distribution.sample()
    p.explore(*E1)
    assert refused(p, actions)


def test_a_draw_by_settings_that_were_changed_since_the_forward() -> None:
    p = policy()
    face = p.forward_eval(ROWS)[0]
    p.explore(*E1)
    assert refused(p, face.sample())


@pytest.mark.parametrize("kind", ["update", "rollout"])
def test_compiled_policies_notice_and_are_noticed(kind: str) -> None:
    p = policy()
    compiled = torch.compile(p, fullgraph=True, backend="aot_eager")
    for number in range(5):  # a graph holds for all settings but the first
        p.explore(1.5 + number, 0.1)
        if kind == "update":
            actions = draw(p)
        else:
            with torch.no_grad():
                actions = compiled(ROWS)[0].sample()
        log_prob = compiled(ROWS)[0].log_prob(actions)
        torch.testing.assert_close(p(ROWS)[0].log_prob(actions), log_prob)
        log_prob.sum().backward()
        p.explore(3.5 + number, 0.2)
        with pytest.raises(RuntimeError, match=CHANGED):
            compiled(ROWS)[0].log_prob(actions)
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 4


def test_a_compiled_rollout_after_an_update_at_other_settings() -> None:
    p = policy()
    compiled = torch.compile(p.forward_eval, fullgraph=True, backend="aot_eager")
    p.explore(*E1)
    update(p, draw(p))
    p.explore(*E0)
    with torch.no_grad():
        actions = compiled(ROWS)[0].sample()
    assert not refused(p, actions)


def test_the_settings_are_python_data_and_nobody_else_s_to_write() -> None:
    p = policy()
    with pytest.raises(AttributeError):
        p.temperature.fill_(2.0)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        p.temperature = 2.0  # type: ignore[misc]
    p.explore(*E1)
    assert (p.temperature, p.epsilon) == (1.5, float(np.float32(0.1)))
    for cast in (p.double, p.bfloat16, p.float):
        cast()
        assert p.exploration.numbers.dtype == torch.float32
        assert p.exploration.numbers.tolist() == [p.temperature, p.epsilon]


# ---- what was refused though nothing was wrong


def test_settings_that_came_back() -> None:
    p = policy()
    p.explore(*E1)
    actions = draw(p)
    p.explore(*E0)
    p.eval()
    draw(p)
    p.train()
    p.explore(*E1)
    assert not refused(p, actions)


def test_an_old_rollout_that_was_updated_on() -> None:
    p = policy()
    p.explore(*E1)
    update(p, draw(p))
    p.explore(*E0)
    assert not refused(p, p(ROWS)[0].sample())


def test_a_cast_after_a_draw() -> None:
    p = policy()
    p.explore(*E1)
    actions = draw(p)
    p.bfloat16()
    assert not refused(p, actions)


def test_imitation_after_play() -> None:
    p = policy()
    p.explore(*E1)
    actions = draw(p)
    p.explore(*E0)
    p.distribution(ROWS)[0].log_prob(actions).sum().backward()


@pytest.mark.parametrize("way", ["eval", "greedy", "top"])
def test_draws_for_an_evaluation_are_no_rollout(way: str) -> None:
    p = policy()
    actions = draw(p)
    p.explore(*E1)
    player = {
        "eval": lambda: p.eval(),
        "greedy": lambda: fp.Greedy(p),
        "top": lambda: fp.TopK(p, 2),
    }
    with torch.no_grad():
        player[way]().forward_eval(ROWS)[0].sample()
    p.train()
    p.explore(*E0)
    assert not refused(p, actions)


# ---- the rule


def test_explore_between_two_minibatches() -> None:
    p = policy()
    actions = draw(p)
    update(p, actions)
    p.explore(*E1)
    assert refused(p, actions)


@pytest.mark.usefixtures("each_kernel")
def test_a_log_prob_of_the_face_that_drew_is_no_update() -> None:
    p = policy()
    p.explore(*E1)
    draw(p)
    p.explore(*E0)
    face = p(ROWS)[0]
    face.log_prob(face.sample())
    assert refused(p, draw(p))


def test_rows_of_a_face_are_the_same_draw_or_update() -> None:
    p = policy()
    p.explore(*E1)
    face = p(ROWS)[0]
    rows = torch.tensor([True, False, True])
    part = face[rows]
    actions = part.sample()
    assert torch.equal(
        part.log_prob(actions),
        face.log_prob(torch.stack([actions[0], torch.zeros(2, dtype=torch.int64), actions[1]]))[
            rows
        ],
    )
    p.explore(*E0)
    with pytest.raises(RuntimeError, match=CHANGED):
        p(ROWS)[0][rows].log_prob(actions)
    assert isinstance(face[1:], LegalNormal)
    assert face[1:].entropy().shape == (2, 1)
    assert torch.equal(face[torch.tensor([2, 0])].entropy(), face.entropy()[[2, 0]])


@pytest.mark.parametrize("head", ["flat", "autoregressive"])
@pytest.mark.usefixtures("each_kernel")
def test_the_entropy_is_of_the_tuples_that_were_asked_about(head: str) -> None:
    p = policy(head)
    face = p(ROWS)[0]
    actions = face.sample()
    face.log_prob(actions)
    wanted = face.entropy()
    actions.zero_()
    assert torch.equal(face.entropy(), wanted)
    face.sample().zero_()
    again = p(ROWS)[0]
    again.log_prob(face._actions if head == "autoregressive" else actions)
    torch.testing.assert_close(face.entropy(), again.entropy())


class Rule(RuleBasedStateMachine):
    """Any order of explore, draw, evaluate, update, copy, save and load, against the rule."""

    policies = Bundle("policies")

    @initialize(target=policies)
    def start(self) -> Any:
        return self.known(policy(), E0, set(), False)

    def known(self, p: fp.Policy, now: Any, drawn: set[Any], updated: bool) -> dict[str, Any]:
        return {"policy": p, "now": now, "drawn": drawn, "updated": updated}

    @rule(it=policies, now=st.sampled_from([E0, E1, (2.0, 0.0)]))
    def explore(self, it: dict[str, Any], now: Any) -> None:
        it["policy"].explore(*now)
        it["now"] = now

    @rule(it=policies, way=st.sampled_from(["plain", "gradients", "distribution", "rows"]))
    def draw(self, it: dict[str, Any], way: str) -> None:
        with torch.set_grad_enabled(way == "gradients"):
            face = it["policy"].forward_eval(ROWS)[0]
            drawn_from = {"distribution": lambda: face.distribution, "rows": lambda: face[1:]}
            drawn_from.get(way, lambda: face)().sample()
        if it["updated"]:
            it["drawn"], it["updated"] = set(), False
        it["drawn"].add(it["now"])

    @rule(it=policies, way=st.sampled_from(["eval", "greedy", "distribution"]))
    def evaluate(self, it: dict[str, Any], way: str) -> None:
        p = it["policy"]
        if way == "distribution":
            p.distribution(ROWS)[0].sample()
        elif way == "greedy":
            fp.Greedy(p).forward_eval(ROWS)[0].sample()
        else:
            p.eval()
            p.forward_eval(ROWS)[0].sample()
            p.train()

    @rule(it=policies, mode=st.booleans())
    def update(self, it: dict[str, Any], mode: bool) -> None:
        it["policy"].train(mode)
        wrong = any(one != it["now"] for one in it["drawn"])
        assert refused(it["policy"], torch.tensor([[0, 1], [0, 0], [1, 1]])) == wrong
        it["policy"].train()
        it["updated"] = True

    @rule(target=policies, it=policies, way=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, it: dict[str, Any], way: str) -> Any:
        p = it["policy"]
        other = copy.deepcopy(p) if way == "deepcopy" else pickle.loads(pickle.dumps(p))
        return self.known(other, it["now"], set(it["drawn"]), it["updated"])

    @rule(it=policies, source=policies)
    def load(self, it: dict[str, Any], source: dict[str, Any]) -> None:
        it["policy"].load_state_dict(source["policy"].state_dict())
        it["now"] = source["now"]


Rule.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestRule = Rule.TestCase
