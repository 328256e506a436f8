"""The strategies and the test class that users get."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import tcg_flatpolicy as fp
from tcg_flatpolicy import testing
from tcg_flatpolicy.verify import environment, policy
from tests.games import BANDIT_DTYPE, BANDIT_SPEC, Bandit, BanditEncoder
from tests.strategies import structs

pytest_plugins = ["pytester"]

LOOK = settings(max_examples=2000, phases=[Phase.generate])
"""To find an example, which need not be the smallest."""

# ---- strategies


@given(st.data())
def test_actions_are_within_their_spec(data: st.DataObject) -> None:
    spec = data.draw(testing.specs())
    action = data.draw(testing.actions(spec))
    assert spec.explain(action) is None
    assert spec.explain(spec.noop.tolist()) is None or (spec.noop < spec.nvec).all()


def test_specs_have_what_specs_can_have() -> None:
    """Each is found, so that a user's test meets it."""
    for wanted in (
        lambda spec: min(spec.primaries) > 0,
        lambda spec: spec.noop.any(),
        lambda spec: spec.slots == 0,
        lambda spec: spec.slots == 3 and spec.entity_names,
        lambda spec: any(type(r) is fp.OneOf for p in spec.primaries.values() for r in p.slots),
    ):
        find(testing.specs(), wanted, settings=LOOK)


@given(st.data(), st.booleans())
def test_legal_actions(data: st.DataObject, repeats: bool) -> None:
    spec = data.draw(testing.specs())
    legal = data.draw(testing.legal_actions(spec, max_rows=3, max_length=5, repeats=repeats))
    legal.validate(spec)
    assert legal.noop.tolist() == spec.noop.tolist()
    assert len(legal) <= 3
    assert not len(legal) or legal.counts.max() <= 5
    if not repeats:
        assert torch.equal(legal.distinct().actions, legal.actions)


def test_lists_have_empty_rows_and_repeats() -> None:
    lists = testing.legal_lists(BANDIT_SPEC)
    find(lists, lambda rows: any(not row for row in rows), settings=LOOK)
    find(lists, lambda rows: any(len(set(row)) < len(row) for row in rows), settings=LOOK)
    distinct = testing.legal_lists(BANDIT_SPEC, repeats=False)
    find(distinct, lambda rows: any(len(row) > 2 for row in rows), settings=LOOK)


@given(st.data(), st.sampled_from(["plain", "ties", "extreme", "-inf", "any"]))
def test_scores_are_as_a_distribution_takes_them(data: st.DataObject, kind: Any) -> None:
    legal = data.draw(testing.legal_actions(BANDIT_SPEC))
    scores = data.draw(testing.scores(legal, kind))
    assert scores.shape == (len(legal.actions),)
    assert scores.dtype == torch.float32
    assert not scores.isnan().any()
    assert (scores < np.inf).all()
    if kind != "any":
        assert scores.isfinite().all() or kind == "-inf"
    distribution = fp.LegalCategorical(legal, scores)
    assert legal.contains(distribution.sample()).all()
    sums = torch.zeros(len(legal)).index_add_(0, legal.rows, distribution.probs)
    assert torch.allclose(sums, (legal.counts > 0).float())


def test_scores_of_each_kind_come_up() -> None:
    legal = fp.LegalActions.from_lists([[(0,), (1,), (2,)]])
    for wanted in (
        lambda s: (s == -np.inf).all(),
        lambda s: (s == s[0]).all() and s[0] == 3,
        lambda s: (s.abs() >= 1e30).any(),
    ):
        find(testing.scores(legal), wanted, settings=LOOK)


FIELDS_DTYPE = np.dtype(
    [
        ("me", [("hp", np.int16), ("alive", np.bool_, (2,))]),
        ("power", np.float16, (200,)),
        ("card", np.uint64),
        ("n", np.uint8),
        ("legal", np.uint8, (5, 3)),
    ],
    align=True,
)
FIELDS = fp.LegalLayout.from_dtype(FIELDS_DTYPE, "n", "legal", spec=BANDIT_SPEC)


@given(st.data(), st.booleans())
def test_observations_are_read_back_by_their_layout(data: st.DataObject, repeats: bool) -> None:
    layout = data.draw(
        st.sampled_from([FIELDS, fp.LegalLayout.from_dtype(BANDIT_DTYPE, "n", "legal")])
    )
    rows = data.draw(
        testing.observations(layout, BANDIT_SPEC, max_rows=3, max_length=4, repeats=repeats)
    )
    assert rows.dtype == np.uint8
    assert 1 <= len(rows) <= 3
    legal = layout.with_spec(BANDIT_SPEC).read(torch.as_tensor(rows))
    assert legal.counts.max() <= 4
    if not repeats:
        assert torch.equal(legal.distinct().actions, legal.actions)
    if layout is FIELDS:
        records = rows.view(FIELDS_DTYPE)[:, 0]
        assert np.isfinite(records["power"]).all()
        assert set(records["me"]["alive"].view(np.uint8).ravel().tolist()) <= {0, 1}


@given(structs(), st.data())
def test_observations_of_any_struct(struct: Any, data: st.DataObject) -> None:
    """In packed, aligned and nested structs alike; the values 0 and 1 fit every integer."""
    spec = fp.ActionSpec.from_nvec([2] * struct.width)
    layout = fp.LegalLayout.from_dtype(struct.dtype, struct.count, struct.actions)
    rows = data.draw(testing.observations(layout, spec))
    counts, columns = struct.views(rows.view(struct.dtype)[:, 0])
    legal = layout.with_spec(spec).read(torch.as_tensor(rows))
    assert legal.counts.tolist() == counts.tolist()
    for row, actions in enumerate(legal.to_lists()):
        for place, action in enumerate(actions):
            assert action == tuple(int(column[row, place]) for column in columns)


@given(st.data())
def test_ranges_of_fields_hold(data: st.DataObject) -> None:
    ranges = {"me.hp": (-3, 30), "power": (0.5, 1), "card": (7, 9), "me.alive": (1, 1)}
    rows = data.draw(testing.observations(FIELDS, ranges=ranges))
    records = rows.view(FIELDS_DTYPE)[:, 0]
    for name, values in {
        "me.hp": records["me"]["hp"],
        "power": records["power"],
        "card": records["card"],
        "me.alive": records["me"]["alive"],
    }.items():
        low, high = ranges[name]
        assert (values >= low).all(), name
        assert (values <= high).all(), name


def test_a_list_that_fills_its_room_comes_up() -> None:
    full = testing.observations(FIELDS, max_length=99)
    find(full, lambda rows: rows.view(FIELDS_DTYPE)["n"].max() == 5, settings=LOOK)


@pytest.mark.parametrize(
    ("layout", "arguments", "complaint"),
    [
        (fp.LegalLayout.from_dtype(FIELDS_DTYPE, "n", "legal"), {}, "needs spec="),
        (FIELDS, {"ranges": {"hp": (0, 1)}}, "ranges names 'hp'; the fields are me.hp"),
        (FIELDS, {"ranges": {"me.hp": (0, 40_000)}}, "within -32768..32767, what int16 holds"),
        (FIELDS, {"ranges": {"power": (3, 2)}}, "must be .lowest, highest."),
        (FIELDS, {"ranges": {"power": (0, 1e6)}}, "what float16 holds"),
        (FIELDS, {"spec": fp.ActionSpec.from_nvec([2, 300, 2])}, "does not fit legal"),
    ],
)
def test_what_cannot_be_observed_is_said(
    layout: fp.LegalLayout, arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        find(testing.observations(layout, **arguments), lambda rows: False, settings=LOOK)


@pytest.mark.parametrize("missing", ["hypothesis", "pytest"])
def test_without_what_it_needs(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delitem(sys.modules, "tcg_flatpolicy.testing")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ImportError, match=r"from a checkout of this library, pip install '.\[testing\]'"
    ):
        __import__("tcg_flatpolicy.testing")


# ---- the audits as tests


class TestBandit(testing.EnvironmentTests):
    """As a user has it, on a sound environment and a sound policy."""

    steps = 500

    def make(self) -> Bandit:
        return Bandit(num_agents=16, empty=0.2)

    def make_policy(self, env: Bandit) -> fp.FlatPolicy:
        torch.manual_seed(0)
        return fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))


HEAD = """
    import tcg_flatpolicy as fp
    from tcg_flatpolicy.testing import EnvironmentTests
    from tests.broken import Duel
    from tests.games import Bandit, BanditEncoder
"""


def outcomes(result: pytest.RunResult) -> Counter[str]:
    return Counter(result.parseoutcomes())


def test_a_broken_environment_fails_in_the_finding_s_words(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        HEAD
        + """
    class TestDuel(EnvironmentTests):
        steps = 200
        def make(self):
            return Duel(fault="duplicates", protocol=False)
        """
    )
    result = pytester.runpytest("-rs", "-p", "no:cacheprovider")
    count = outcomes(result)
    assert count["failed"] == 1
    assert count["failed"] + count["passed"] + count["skipped"] == len(environment.CHECKS)
    result.stdout.fnmatch_lines(["E03 a tuple is listed twice: seen * times, first in state *"])
    result.stdout.fnmatch_lines(["*to fix: drop repeats*"])
    result.stdout.fnmatch_lines(["SKIPPED*is_legal*"])  # what would enable it
    result.stdout.no_fnmatch_line("*Traceback*")


def test_the_audit_runs_once_a_class_and_never_for_another(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        HEAD
        + """
    made = []

    class TestOne(EnvironmentTests):
        steps = 50
        def make(self):
            made.append(type(self).__name__)
            return Bandit(num_agents=8)

    class TestTwo(TestOne):
        def make_policy(self, env):
            made.append("policy")
            return fp.FlatPolicy(env, encoder=BanditEncoder(env.legal_layout))

    def test_made():
        # The audit may make a second environment, but not one a check.
        assert 1 <= made.count("TestOne") <= 4
        assert 2 <= made.count("TestTwo") <= 6
        assert made.count("policy") == 1
        """
    )
    result = pytester.runpytest("-p", "no:cacheprovider")
    count = outcomes(result)
    assert count["failed"] == count["errors"] == 0
    every = 2 * len(environment.CHECKS) + len(policy.CHECKS) + 1
    assert count["passed"] + count["skipped"] == every


def test_what_the_audit_raises_fails_each_test_and_is_not_run_again(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        HEAD
        + """
    made = []

    class TestNone(EnvironmentTests):
        pass

    class TestBroken(EnvironmentTests):
        def make(self):
            made.append(1)
            raise OSError("no such deck")

    def test_made():
        assert len(made) == 1
        """
    )
    result = pytester.runpytest("-p", "no:cacheprovider")
    count = outcomes(result)
    assert count["failed"] == 2 * len(environment.CHECKS)
    assert count["passed"] == 1
    result.stdout.fnmatch_lines(["*TestNone needs a method make(self) that returns your env*"])
    result.stdout.fnmatch_lines(["the audit stopped, as the first test shows: OSError: no such d*"])


def test_attributes_reach_the_audits(monkeypatch: pytest.MonkeyPatch) -> None:
    env = Bandit(num_agents=4)
    closed: list[int] = []
    env.close = lambda: closed.append(1)  # type: ignore[method-assign]

    def function(*arguments: Any) -> tuple[Any, ...]:
        return arguments

    class Mine(testing.EnvironmentTests):
        steps, seed, spec, layout = 7, 3, BANDIT_SPEC, env.legal_layout
        head_masks = staticmethod(function)

        def legal_actions(self, *arguments: Any) -> Any:
            return arguments

        def make(self) -> Bandit:
            return env

        def make_policy(self, env: Any) -> str:
            return "policy"

    seen: list[dict[str, Any]] = []

    def audit(*positional: Any, **named: Any) -> Any:
        seen.append({"positional": positional, **named})
        return environment.Report("subject")

    monkeypatch.setattr(environment, "audit_env", audit)
    monkeypatch.setattr(policy, "audit_policy", audit)
    mine = Mine()
    mine._audit_environment()
    mine._audit_policy()
    first, second = seen
    assert first["positional"] == (env,)
    assert (first["steps"], first["seed"]) == (second["steps"], second["seed"]) == (7, 3)
    assert first["spec"] is second["spec"] is BANDIT_SPEC
    assert first["layout"] is second["layout"] is env.legal_layout
    assert first["head_masks"](1) == first["legal_actions"](1) == (1,)
    assert first["make"]() is env
    assert second["positional"] == ("policy", env)
    assert closed == [1, 1]
