"""PufferLib's compile=True with compile_fullgraph=True: one graph, whatever the lists hold.

Where only the graph matters and not what is made of it, it runs as traced (backend aot_eager):
most of the time to compile is saved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pufferlib.vector
import pytest
import torch
from pufferlib.pytorch import sample_logits

import tcg_flatpolicy as fp
from tests.games import BANDIT_SPEC, Bandit, BanditEncoder

AGENTS, HORIZON = 16, 8


RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(RELEASE < (2, 9), reason="compiled policies need torch 2.9")


@pytest.fixture(autouse=True)
def _no_graphs_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Newer releases of torch need not be asked, and are not: the README says so.
    asked = {"capture_dynamic_output_shape_ops": RELEASE < (2, 13)}
    with torch._dynamo.config.patch(asked):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def make(kind: type[fp.Policy], empty: float = 0.3) -> tuple[Any, fp.Policy]:
    torch.manual_seed(0)
    vecenv = pufferlib.vector.make(
        Bandit,
        env_kwargs={"num_agents": AGENTS, "empty": empty},
        backend=pufferlib.vector.Serial,
        num_envs=1,
        seed=1,
    )
    env = vecenv.driver_env
    return vecenv, kind(env, encoder=BanditEncoder(env.legal_layout, hidden_size=16), width=16)


def with_lists(
    layout: fp.LegalLayout, observations: torch.Tensor, lists: list[list[tuple[int, ...]]]
) -> torch.Tensor:
    changed = observations.numpy().copy()
    layout.write(changed, lists)
    return torch.as_tensor(changed)


def replayed(
    policy: Any, observations: torch.Tensor, actions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Log-prob, entropy and value as the trainer asks for them, and all gradients."""
    policy.zero_grad()
    face, value = policy(observations)
    _, log_prob, entropy = sample_logits(face, action=actions)
    (log_prob.sum() - entropy.sum() + value.square().sum()).backward()
    grads = [parameter.grad.clone() for parameter in policy.parameters()]
    return log_prob.detach(), entropy.detach(), value.detach(), grads


@pytest.mark.integration
@pytest.mark.parametrize("kind", [fp.FlatPolicy, fp.RecurrentPolicy])
def test_the_trainer_compiles_one_graph_for_all_batches(trainers: Any, kind: type) -> None:
    vecenv, policy = make(kind)
    trainer = trainers(
        vecenv,
        policy,
        compile=True,
        compile_fullgraph=True,
        bptt_horizon=HORIZON,
        use_rnn=kind is fp.RecurrentPolicy,
    )
    after = []
    for epoch in range(5):
        # Half-way to a sharper policy: how much it explores is no reason to compile anew.
        policy.explore(temperature=2.0 - epoch / 5, epsilon=0.3 - epoch / 20)
        trainer.evaluate()
        trainer.train()
        # One minibatch an epoch, so all of it is on the weights that played the rollout (eager).
        assert (trainer.ratio - 1).abs().max() < 1e-5
        after.append(graphs())
    assert after[1] >= 1
    assert after[-1] == after[1], "a batch of another number of legal tuples was compiled anew"
    env = vecenv.driver_env
    assert env.illegal_actions == 0
    assert env.played == 5 * AGENTS * HORIZON


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize(
    ("kind", "backend"), [(fp.FlatPolicy, "inductor"), (fp.RecurrentPolicy, "aot_eager")]
)
def test_compiled_and_eager_give_the_same_numbers_for_any_number_of_tuples(
    kind: type, backend: str
) -> None:
    vecenv, policy = make(kind)
    env = vecenv.driver_env
    compiled = torch.compile(policy, fullgraph=True, backend=backend)
    env.reset(seed=3)
    some = env.lists
    one = [[] for _ in some]
    one[5] = [(1, 2, 3)]
    full = [env.all_tuples[:12] for _ in some]
    twice = [[*row[:6], *row[:6]] for row in some]
    for lists in (some, [[] for _ in some], one, full, twice):
        observations = with_lists(env.legal_layout, torch.as_tensor(env.observations), lists)
        if kind is fp.RecurrentPolicy:
            observations = observations.view(AGENTS // 4, 4, -1)
        with torch.no_grad():
            actions = sample_logits(policy(observations)[0])[0]
        eager = replayed(policy, observations, actions)
        ours = replayed(compiled, observations, actions)
        for mine, theirs in zip(ours[:3], eager[:3], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
        for mine, theirs in zip(ours[3], eager[3], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert graphs() == 1


@pytest.mark.usefixtures("each_kernel")
def test_what_is_wrong_with_a_list_is_said_from_within_the_graph() -> None:
    vecenv, policy = make(fp.FlatPolicy)
    env = vecenv.driver_env
    compiled = torch.compile(policy, fullgraph=True, backend="aot_eager")
    env.reset(seed=3)
    compiled(torch.as_tensor(env.observations))
    lists = [[(0, 0, 0)] for _ in env.lists]
    lists[4] = [(1, 3, 9)]
    observations = with_lists(env.legal_layout, torch.as_tensor(env.observations), lists)
    with pytest.raises(ValueError, match=r"row 4: legal tuple 0 is \(1, 3, 9\)"):
        compiled(observations)


def test_changing_exploration_after_the_rollout_raises_in_a_compiled_update() -> None:
    vecenv, policy = make(fp.FlatPolicy)
    env = vecenv.driver_env
    compiled = torch.compile(policy, fullgraph=True, backend="aot_eager")
    env.reset(seed=3)
    observations = torch.as_tensor(env.observations)
    policy.explore(temperature=1.5)
    with torch.no_grad():
        actions = sample_logits(compiled.forward_eval(observations)[0])[0]
    face, _ = compiled(observations)
    sample_logits(face, action=actions)
    policy.explore(temperature=1.25)
    with pytest.raises(RuntimeError, match=r"between rollout and update.*\(1\.5, 0\.0\)"):
        sample_logits(compiled(observations)[0], action=actions)


def test_a_layout_that_was_copied_is_found_from_within_a_graph() -> None:
    vecenv, policy = make(fp.FlatPolicy)
    env = vecenv.driver_env
    env.reset(seed=3)
    observations = torch.as_tensor(env.observations)
    expected = policy(observations)[0].distribution.logits
    other = copy.deepcopy(policy)
    del policy, vecenv.driver_env.legal_layout
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(observations)[0].distribution.logits, expected)


def test_the_operators_keep_what_torch_asks_of_operators() -> None:
    """Schema, fake and autograd, by torch's own checks."""
    from tcg_flatpolicy import layout, memory, scorer, table
    from tcg_flatpolicy.kernels import cpu

    env = Bandit(4)
    env.reset(seed=1)
    observations = torch.as_tensor(env.observations)
    handle = env.legal_layout.handle
    check = torch.library.opcheck
    check(layout._read_op, (observations, handle, True))
    check(layout._read_op, (observations, handle, False))
    check(layout._read_field, (observations, handle, "kind"))

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=True)

    keys = torch.tensor([[0, 5], [3, 9], [4, 5]])
    edges = torch.tensor([0, 1, 4, 10])
    check(table._find_op, (keys, edges[1:], 1, 10))
    check(table._find_op, (keys, edges[2:], 4, 10))
    _, chosen, bounds = table._find(keys, edges[1:], 1, 10)
    check(table._project.op, ([floats(6, 2), floats(2, 6)], [chosen, bounds], [3]))
    check(table._join.op, ([floats(2, 3), floats(0, 3), floats(4, 3)], [], []))
    if cpu.library():
        legal = fp.LegalActions.from_lists([[(0, 1), (0, 0)], []], slots=1)
        spec = fp.ActionSpec([fp.Primary("a", fp.Index("x", 2))])
        plan = scorer.TupleScorer(spec, 4, width=3, embedding_size=2).kernel
        of_rows = [legal.counts, legal.starts]
        learned = [floats(2, 3), floats(2, 3), floats(1, 3), floats(2, 2), floats(2, 3)]
        packed = [legal.actions, *of_rows, torch.arange(2)]
        check(cpu._score.op, (learned, packed, [plan.handle, 0]))
        check(cpu._score.op, (learned, packed, [plan.handle, 1]))
        spec = fp.ActionSpec([fp.Primary("a", fp.Entity("x", 2))])
        plan = scorer.TupleScorer(spec, 4, {"x": (2, 2)}, width=3).kernel
        looked_up = [*packed, torch.tensor([[4, 0], [1, 1]])]
        learned[3] = floats(5, 2)  # a table
        check(cpu._score.op, (learned, looked_up, [plan.handle, 1, 0]))
        check(cpu._normalise.op, ([floats(2)], of_rows, []))
    codes, rows = torch.tensor([[0, 1], [2, 2]]), torch.tensor([0, 1])
    check(scorer._sum_and_read.op, ([floats(3, 4), floats(2, 4)], [codes, rows], []))
    weights = [floats(8, 3), floats(8, 2), floats(8), floats(8)]
    state = [floats(4, 5, 3), floats(5, 2), floats(5, 2)]
    check(memory._lstm.op, ([*state, *weights], [torch.ones(4, 5, 1)], []))


def test_the_spec_s_sizes_reach_the_graph() -> None:
    """The ids of tuples are those of the spec there, too, so that replays find any tuple."""
    vecenv, policy = make(fp.FlatPolicy)
    env = vecenv.driver_env
    env.reset(seed=3)
    compiled = torch.compile(policy, fullgraph=True, backend="aot_eager")
    face, _ = compiled(torch.as_tensor(env.observations))
    legal = face.distribution.legal
    assert legal.sizes == BANDIT_SPEC.nvec.tolist()
    assert legal.distinct() is legal
    unlisted = torch.as_tensor(np.tile([2, 4, 4], (AGENTS, 1)))
    expected = policy(torch.as_tensor(env.observations))[0].distribution.log_prob(unlisted)
    torch.testing.assert_close(face.distribution.log_prob(unlisted), expected)


def test_equal_policies_share_a_graph() -> None:
    vecenv, policy = make(fp.FlatPolicy)
    vecenv.driver_env.reset(seed=3)
    observations = torch.as_tensor(vecenv.driver_env.observations)
    for another in [policy, *(copy.deepcopy(policy) for _ in range(9))]:
        torch.compile(another, fullgraph=True, backend="aot_eager")(observations)
    assert graphs() == 1


def test_a_spec_with_other_names_is_another_layout() -> None:
    """What is wrong with a list is said in the names of its own spec."""
    primaries = [fp.Primary("rest"), fp.Primary("hit", fp.Index("unit", 3))]
    other = [fp.Primary("rest"), fp.Primary("heal", fp.Index("unit", 3))]
    dtype = np.dtype([("x", np.uint8), ("n", np.uint8), ("legal", np.uint8, (4, 2))])
    layouts = [
        fp.LegalLayout.from_dtype(dtype, "n", "legal", spec=fp.ActionSpec(one))
        for one in (primaries, other, primaries)
    ]
    assert layouts[0].handle == layouts[2].handle != layouts[1].handle


def test_each_class_of_policies_has_graphs_of_its_own() -> None:
    """Torch keeps 8 of a piece of code; ten policies of unlike specs share none."""

    class Own(fp.FlatPolicy):
        pass

    for kind in (fp.FlatPolicy, Own):
        for number in range(5):
            spec = fp.ActionSpec.from_nvec([2 + number, 3])
            fields = [("x", np.float32, 1 + number), ("legal", np.uint8, (4, 2)), ("n", np.uint8)]
            layout = fp.LegalLayout.from_dtype(np.dtype(fields), "n", "legal", spec=spec)
            policy = kind(spec=spec, layout=layout, hidden_size=4, width=4)
            data = np.zeros((3, layout.dtype.itemsize), np.uint8)
            layout.write(data, [[(0, 1)], [(1, 2), (0, 0)], []])
            compiled = torch.compile(policy, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(
                compiled(torch.as_tensor(data))[1], policy(torch.as_tensor(data))[1]
            )
