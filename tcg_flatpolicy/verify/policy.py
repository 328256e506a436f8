"""Audits a policy: what it draws, and the numbers that it hands out with the draw.

Any policy with PufferLib's interface, whether or not it uses this library's distributions. Shapes:
B rows of observations, T steps of a segment, N listed tuples, H values in a tuple.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from tcg_flatpolicy.distribution import LegalCategorical
from tcg_flatpolicy.encoders import Encoding, FieldEncoder
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.meaning import meaning, policy_layers
from tcg_flatpolicy.puffer import MISSING_PUFFERLIB, LegalNormal, RecurrentPolicy
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.verify.findings import Report

SEGMENT = 16
"""Steps of a segment: a recurrent policy starts each from a zero state, as in PuffeRL."""
CLOSE_ROWS = 1024
"""How many states at most are enumerated, permuted and looked at for degeneracy."""
BATCH = 4096
"""Rows of a forward pass where observations are repeated."""

LOG_PROB_TOLERANCE = 1e-3
"""Nats between two log-probs of the same action: what float32 allows for with room to spare."""
HALF_TOLERANCE = 5e-2
"""The same for weights of half precision."""
SUM_TOLERANCE = 1e-5
"""How far the probabilities of a list may be from 1; in half precision, HALF_TOLERANCE."""
ENTROPY_TOLERANCE = 1e-3
"""Nats between the entropy and that of the enumeration."""
ESTIMATE_DEVIATIONS = 6.0
"""Standard deviations that the mean of estimates may be off: once in 500 million by chance."""

KIND_SHARE = 0.99
"""Share of the offending draws of one kind for which they are reported as that kind."""

DRAWN_ROWS, DRAWN_COPIES, DRAWN_ROUNDS = 16, 64, 16
"""Of so many states so many copies are drawn from in so many rounds: 1,024 draws a state."""
LEAST_EXPECTED = 20.0
"""Draws expected of a cell of the chi-square; rarer tuples share one."""
FALSE_ALARM = 1e-7
"""How often a sound policy fails the chi-square of all states, and as often that of any state."""

SURE, SURE_SHARE, SURE_STATES = 0.999, 0.5, 50
"""Degenerate: a tuple of more than this, in more than this share of at least so many states."""
NOOP_SHARE, NOOP_STATES = 0.95, 50
"""Degenerate: the no-op in more than this share of at least so many states with a choice."""
PRIMARY_STATES, PRIMARY_EXPECTED = 200, 50.0
"""Degenerate: never drawn, though one of several primaries in so many states, in which uniform play
draws it so often."""

LISTED = "drawn actions are in the list"
REPLAY = "a replay gives the same log-prob"
UPDATE = "the update's log-prob is the rollout's"
SCORES = "log-probs are those of the scores, in float64"
SUMS = "probabilities of the list sum to 1"
ENTROPY = "the entropy is that of the list"
ORDER = "order and padding of the list do not matter"
DRAWS = "draws are distributed as the log-probs say"
SURENESS = "not all mass on one action"
NOOP = "not always the no-op"
PRIMARIES = "every primary is drawn"

CHECKS = (
    *(LISTED, REPLAY, UPDATE, SCORES, SUMS, ENTROPY),
    *(ORDER, DRAWS, SURENESS, NOOP, PRIMARIES),
)
"""The names of all checks."""


def audit_policy(
    policy: nn.Module,
    env: Any,
    steps: int = 2000,
    seed: int = 0,
    *,
    spec: ActionSpec | None = None,
    layout: LegalLayout | Sequence[str] | None = None,
    recurrent: bool | None = None,
) -> Report:
    """Plays a policy and checks what it draws and what it says of it.

    The policy is asked as PuffeRL asks it: ``forward_eval(observations, state)`` in the rollout,
    ``forward(observations, state)`` under gradients in the update, each read by the installed
    PufferLib's sample_logits. It stays in its own mode (PufferLib never calls eval()), and its
    buffers and torch's generators are left as they were.

    The environment is reset, and left somewhere in a game. A draw that is not listed is not sent: a
    random listed tuple is.

    Args:
        policy: returns (logits, value); logits are whatever sample_logits takes: a Normal or what
            passes for one, a list of logits for each value of the tuple, or a tensor.
        env: a native PufferEnv or a PufferLib vector environment.
        steps: states to draw in, at least; each row of each environment step is one.
        seed: of the environment, the draws and the choices of the audit.
        spec: what tuples mean; the policy's or the environment's if left out.
        layout: where the legal list is, or the keys of count and list in a Dict observation; the
            policy's or the environment's if left out.
        recurrent: whether the policy carries lstm_h and lstm_c; by whether it has an ``lstm`` or
            ``cell`` if left out.

    Raises:
        ImportError: PufferLib is not installed.
        TypeError: an environment that does not show rows (`check_rows` says how to wrap it), or a
            layout of keys where observations are not emulated from a Dict.
        ValueError: steps below 1, no spec or layout anywhere, or a list that is broken or not
            within the spec (audit_env says more).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    check_rows(env)
    started = time.monotonic()
    if isinstance(layout, Sequence):
        count, actions = layout
        layout = LegalLayout.from_env(env, count, actions, spec)
    spec, layout = meaning(env, policy, spec, layout, "an audit")
    report = Report(f"policy {type(policy).__name__} on {type(env).__name__}, seed {seed}")
    asked = Asked(policy, is_recurrent(policy) if recurrent is None else recurrent)
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    devices = [asked.device] if asked.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            audit = _Audit(report, asked, env, spec, layout, np.random.default_rng(seed))
            audit.run(steps, seed)
    finally:
        with torch.no_grad():
            for name, buffer in policy.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
    report.figures["seconds"] = time.monotonic() - started
    return report


def check_rows(env: Any) -> None:
    """Does nothing if an environment shows a policy rows of flat observations, as PuffeRL needs.

    Raises:
        TypeError: a Gymnasium or PettingZoo environment, or one under PufferLib's emulation, that
            is in no vector environment; the message says how to put it into one.
    """
    if hasattr(env, "recv"):
        return
    name = type(env).__name__
    if isinstance(getattr(env, "emulated", None), dict):
        is_a, returned = "a single emulated environment", "it, with buf and seed"
    elif isinstance(env, gymnasium.Env):
        is_a = "a bare gymnasium.Env"
        returned = f"pufferlib.emulation.GymnasiumPufferEnv(env_creator={name}, buf=buf, seed=seed)"
    elif hasattr(env, "possible_agents"):
        creator, is_a = name, "a bare PettingZoo ParallelEnv"
        if hasattr(env, "agent_iter"):
            creator = f"lambda: pettingzoo.utils.turn_based_aec_to_parallel({name}())"
            is_a = "a bare PettingZoo AECEnv"
        emulation = "pufferlib.emulation.PettingZooPufferEnv"
        returned = f"{emulation}(env_creator={creator}, buf=buf, seed=seed)"
    else:
        return
    raise TypeError(
        f"{name} is {is_a}, and a policy plays rows of flat observations: make and audit it with "
        "pufferlib.vector.make(make, num_envs=4, backend=pufferlib.vector.Serial), where "
        f"make(buf=None, seed=0) returns {returned}"
    )


class LearnedEntities(FieldEncoder):
    """A FieldEncoder that embeds every Entity of a spec, by a learned row for each number.

    As if each were an Index: enough to audit a policy of any spec, not to play well.

    Args:
        layout: where the fields are.
        spec: whose Entities are embedded, each name by as many rows as its largest role needs.
        hidden_size: D.
        embedding_size: E.

    Raises:
        ValueError: there is no field besides the legal list.
    """

    def __init__(
        self,
        layout: LegalLayout,
        spec: ActionSpec,
        hidden_size: int = 256,
        embedding_size: int = 16,
    ) -> None:
        super().__init__(layout, hidden_size)
        for part in spec.parts:
            if part.role.encoded:
                rows, _ = self.entity_sizes.get(part.role.name, (0, 0))
                size = max(rows, part.role.size), embedding_size
                self.entity_sizes[part.role.name] = size
        self.rows = nn.ParameterList(
            nn.Parameter(torch.randn(size)) for size in self.entity_sizes.values()
        )

    def forward(self, observations: Tensor) -> Encoding:
        """Observations (B, columns) -> hidden (B, D), and entities (B, n, E) alike in every row."""
        hidden, _ = super().forward(observations)
        named = zip(self.entity_sizes, self.rows, strict=True)
        return Encoding(
            hidden, {name: rows.expand(len(hidden), *rows.shape) for name, rows in named}
        )


def is_recurrent(policy: nn.Module) -> bool:
    """Whether a policy has PufferLib's interface of recurrent ones, as far as one can see."""
    return any(
        isinstance(layer, RecurrentPolicy)
        or (hasattr(layer, "hidden_size") and (hasattr(layer, "lstm") or hasattr(layer, "cell")))
        for layer in policy_layers(policy)
    )


def exploration_changed(error: RuntimeError) -> bool:
    """Whether a policy of this library refused an update because its exploration was changed."""
    return "between rollout and update" in str(error)


def in_words(spec: ActionSpec, action: list[int]) -> str:
    """A tuple and what it means, or why it means nothing."""
    problem = spec.explain(action)
    return (
        f"{tuple(action)} = {spec.describe(action)}"
        if problem is None
        else (f"{tuple(action)} ({problem})")
    )


class Answer(NamedTuple):
    """What a policy and PufferLib's sample_logits answered."""

    logits: Any
    actions: Tensor
    """(B, H) as drawn, or as given."""
    log_prob: Tensor
    """(B,) float64."""
    entropy: Tensor
    """(B,) float64."""
    value: Tensor
    """(B,) float64."""


class Asked:
    """A policy, asked as PuffeRL asks it.

    Args:
        policy: with forward_eval and forward.
        recurrent: whether it carries lstm_h and lstm_c.

    Raises:
        ImportError: PufferLib is not installed.
    """

    def __init__(self, policy: nn.Module, recurrent: bool) -> None:
        try:
            from pufferlib.pytorch import sample_logits
        except ImportError as error:
            raise ImportError(MISSING_PUFFERLIB) from error
        self.policy = policy
        self.recurrent = recurrent
        self.sample_logits = sample_logits
        weights = list(policy.parameters())
        self.device = weights[0].device if weights else torch.device("cpu")
        half = any(w.dtype in (torch.float16, torch.bfloat16) for w in weights)
        self.tolerance = HALF_TOLERANCE if half else LOG_PROB_TOLERANCE
        self.sum_tolerance = HALF_TOLERANCE if half else SUM_TOLERANCE

    def fresh(self, carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with a zero hidden state."""
        rows = len(carried["done"])
        state = {name: carried[name] for name in ("reward", "done")}
        if self.recurrent:
            size = next(
                int(layer.hidden_size)
                for layer in policy_layers(self.policy)
                if hasattr(layer, "hidden_size")
            )
            for name in ("lstm_h", "lstm_c"):
                state[name] = torch.zeros(rows, size, device=self.device)
        return state

    def rollout(
        self, observations: Tensor, carried: dict[str, Tensor], actions: Tensor | None = None
    ) -> tuple[Answer, dict[str, Tensor]]:
        """One step for B rows: draws, or answers for actions (B, H); and what is carried on."""
        rows = len(observations)
        state: dict[str, Any] = {
            **carried,
            "env_id": slice(0, rows),
            "mask": np.ones(rows, dtype=bool),
        }
        with torch.no_grad():
            logits, value = self.policy.forward_eval(observations, state)  # type: ignore[operator]
            answer = self._answer(logits, value, actions)
        after = dict(carried)
        for name in ("lstm_h", "lstm_c"):
            if name in after and state.get(name) is not None:
                after[name] = state[name].detach()
        return answer, after

    def update(self, observations: Tensor, actions: Tensor, learning: bool = True) -> Answer:
        """Segments, observations (B, T, ...) and actions (B, T, H): answers of B * T rows.

        Under gradients, as the trainer asks, unless ``learning`` is False.
        """
        state = {"action": actions, "lstm_h": None, "lstm_c": None}
        if not self.recurrent:
            observations = observations.flatten(0, 1)
        with torch.set_grad_enabled(learning):
            logits, value = self.policy(observations, state)
            return self._answer(logits, value, actions)

    def _answer(self, logits: Any, value: Tensor, actions: Tensor | None) -> Answer:
        given, log_prob, entropy = self.sample_logits(logits, action=actions)
        rows = len(log_prob.flatten())
        return Answer(
            logits,
            given.detach().reshape(rows, -1),
            log_prob.detach().double().flatten(),
            entropy.detach().double().flatten(),
            value.detach().double().reshape(rows, -1)[:, 0],
        )


@dataclass
class _Steps:
    """Rows of a rollout: what was shown, carried and answered."""

    state: Tensor
    """(n,) number of the environment step."""
    row: Tensor
    """(n,) which row of it."""
    observations: Tensor
    carried: dict[str, Tensor]
    actions: Tensor
    """(n, H) int64."""
    log_prob: Tensor
    entropy: Tensor
    estimate: bool
    """Whether the entropy is declared an estimate."""

    def take(self, at: Tensor) -> _Steps:
        """Some of the rows; an index may come more than once."""
        return _Steps(
            self.state[at],
            self.row[at],
            self.observations[at],
            {name: value[at] for name, value in self.carried.items()},
            self.actions[at],
            self.log_prob[at],
            self.entropy[at],
            self.estimate,
        )

    def where(self, n: int) -> str:
        return f"step {int(self.state[n])}, row {int(self.row[n])}"


def _joined(parts: list[_Steps]) -> _Steps:
    return _Steps(
        torch.cat([part.state for part in parts]),
        torch.cat([part.row for part in parts]),
        torch.cat([part.observations for part in parts]),
        {name: torch.cat([part.carried[name] for part in parts]) for name in parts[0].carried},
        torch.cat([part.actions for part in parts]),
        torch.cat([part.log_prob for part in parts]),
        torch.cat([part.entropy for part in parts]),
        parts[0].estimate,
    )


class _Audit:
    """One audit: the rollout, then a closer look at some of its states."""

    def __init__(
        self,
        report: Report,
        asked: Asked,
        env: Any,
        spec: ActionSpec,
        layout: LegalLayout,
        random: np.random.Generator,
    ) -> None:
        self.report, self.asked, self.env = report, asked, env
        self.spec, self.layout, self.random = spec, layout, random
        self.offences = _Offences(spec)
        ids = spec.limits.shape[0]
        self.primary_legal = np.zeros(ids, dtype=np.int64)  # in states with another one
        self.primary_expected = np.zeros(ids)  # draws by uniform play
        self.primary_drawn = np.zeros(ids, dtype=np.int64)
        self.noop_choices = self.noop_drawn = 0
        self.unlisted_mass: list[Tensor] = []

    def run(self, steps: int, seed: int) -> None:
        close = self._play(steps, seed)
        self.offences.write(self.report)
        self._degenerate()
        unfit = None
        if "P05" in self.report.findings:
            unfit = "replays of an action differ (P05), so there is no one log-prob to check"
            self.report.skip(UPDATE, unfit)
        elif not close:
            unfit = "no state with a legal action came up; play more steps"
        if unfit is not None:
            for check in (SCORES, SUMS, ENTROPY, ORDER, DRAWS, SURENESS):
                self.report.skip(check, unfit)
            return
        rows = _joined(close)
        self._order(rows)
        self._enumerate(rows)

    # ---- the rollout

    def _play(self, steps: int, seed: int) -> list[_Steps]:
        env, asked = self.env, self.asked
        observations, _ = env.reset(seed=seed)
        agents = len(observations)
        reward = done = torch.zeros(agents, device=asked.device)
        share = min(1.0, CLOSE_ROWS / steps)
        close: list[_Steps] = []
        segment: list[_Steps] = []
        off_update: list[tuple[int, str]] = []
        total = number = 0
        carried: dict[str, Tensor] = {}
        while total < steps:
            carried["reward"], carried["done"] = reward, done
            if not segment:
                carried = asked.fresh(carried)
            shown = torch.as_tensor(np.array(observations)).to(asked.device)
            answer, after = asked.rollout(shown, carried)
            legal = self.layout.read(shown).distinct()
            actions = legal.whole(answer.actions)
            rows = _Steps(
                torch.full((agents,), number, device=asked.device),
                torch.arange(agents, device=asked.device),
                shown,
                carried,
                actions,
                answer.log_prob,
                answer.entropy,
                isinstance(answer.logits, LegalNormal) and answer.logits.estimates_entropy,
            )
            listed = legal.contains(actions)
            self.report.looked(LISTED, agents)
            if not listed.all():
                self.offences.add(rows, legal, (~listed).nonzero()[:, 0], answer.logits)
            self._count(legal, actions)
            self._replay(rows, number)
            segment.append(rows)
            if len(segment) == SEGMENT or total + agents >= steps:
                self._update(segment, off_update)
                segment = []
            chosen = (legal.counts > 0).cpu().numpy() & (self.random.random(agents) < share)
            if chosen.any():
                close.append(rows.take(torch.as_tensor(np.flatnonzero(chosen)).to(asked.device)))
            sent = self._sendable(actions, listed, legal)
            observations, rewards, terminals, truncations, _ = env.step(sent)
            if np.shape(rewards) != (agents,):
                raise ValueError(
                    f"{type(env).__name__}.step gives rewards of shape {np.shape(rewards)} for "
                    f"{agents} rows of observations: put it into a vector environment, "
                    "pufferlib.vector.make(..., backend=pufferlib.vector.Serial)"
                )
            reward = torch.as_tensor(np.array(rewards)).to(asked.device).float()
            done = torch.as_tensor(np.logical_or(terminals, truncations)).to(asked.device).float()
            carried = dict(after)
            total += agents
            number += 1
        self.report.figures["states"] = total
        if off_update and "P05" not in self.report.findings:
            state, message = off_update[0]
            self.report.found("P04", UPDATE, message, state, len(off_update))
        return close

    def _sendable(self, actions: Tensor, listed: Tensor, legal: LegalActions) -> Any:
        space = self.env.single_action_space
        sent = actions.clone()
        for row in (~listed).nonzero()[:, 0].tolist():
            count, start = int(legal.counts[row]), int(legal.starts[row])
            at = start + int(self.random.integers(count)) if count else None
            sent[row] = legal.noop if at is None else legal.actions[at]
        array = sent.cpu().numpy().astype(space.dtype)
        return np.ascontiguousarray(array.reshape(len(array), *space.shape))

    def _count(self, legal: LegalActions, actions: Tensor) -> None:
        rows, tuples = legal.rows.cpu().numpy(), legal.actions.cpu().numpy()
        counts, drawn = legal.counts.cpu().numpy(), actions.cpu().numpy()
        # A primary is only chosen, or not, where there is another one.
        ids = len(self.primary_legal)
        pairs = np.unique(rows * ids + tuples[:, 0])
        choice = np.bincount(pairs // ids, minlength=len(counts)) > 1
        self.primary_legal += np.bincount((pairs % ids)[choice[pairs // ids]], minlength=ids)
        of_choice = choice[rows]
        np.add.at(
            self.primary_expected, tuples[of_choice, 0], 1 / counts[rows[of_choice]].astype(float)
        )
        known = choice & (drawn[:, 0] >= 0) & (drawn[:, 0] < ids)
        self.primary_drawn += np.bincount(drawn[known, 0], minlength=ids)
        noop = np.zeros(len(counts), dtype=bool)
        noop[rows[(tuples == self.spec.noop).all(1)]] = True
        noop &= counts > 1
        self.noop_choices += int(noop.sum())
        self.noop_drawn += int((noop & (drawn == self.spec.noop).all(1)).sum())

    def _replay(self, rows: _Steps, number: int) -> None:
        """The same batch again, and its rows among others: dropout, state, batch norm."""
        again, _ = self.asked.rollout(rows.observations, dict(rows.carried), rows.actions)
        agents = len(rows.actions)
        twice = torch.arange(agents, device=self.asked.device) // 2
        if number % 2:
            twice = twice + agents // 2
        pairs = rows.take(twice)
        company, _ = self.asked.rollout(pairs.observations, dict(pairs.carried), pairs.actions)
        self.report.looked(REPLAY, 2 * agents)
        for how, before, after in (
            ("in the same batch", rows, again),
            ("among other rows", pairs, company),
        ):
            self._differ(how, before, after.log_prob)

    def _differ(self, how: str, before: _Steps, after: Tensor) -> None:
        off = self._off(before.log_prob, after).nonzero()[:, 0]
        if len(off):
            n = int(off[0])
            self.report.found(
                "P05",
                REPLAY,
                f"{before.where(n)}: {in_words(self.spec, before.actions[n].tolist())} had "
                f"log-prob {float(before.log_prob[n]):.6f}, and {float(after[n]):.6f} when asked "
                f"again {how}",
                int(before.state[n]),
                len(off),
            )

    def _update(self, segment: list[_Steps], off_update: list[tuple[int, str]]) -> None:
        """The update's log-probs of a segment, twice, against the rollout's.

        Where they are not the same, the step and a message are added to ``off_update``.
        """
        observations = torch.stack([rows.observations for rows in segment], dim=1)
        actions = torch.stack([rows.actions for rows in segment], dim=1)
        stored = torch.stack([rows.log_prob for rows in segment], dim=1).flatten()
        try:
            first = self.asked.update(observations, actions).log_prob
            second = self.asked.update(observations, actions).log_prob
        except RuntimeError as error:
            if not exploration_changed(error):
                raise
            state = int(segment[0].state[0])
            self.report.looked(UPDATE, len(stored))
            message = f"from step {state} on: the policy refused the update: {error}"
            off_update += [(state, message)] * len(stored)
            return
        flat = _Steps(
            torch.stack([rows.state for rows in segment], dim=1).flatten(),
            torch.stack([rows.row for rows in segment], dim=1).flatten(),
            observations.flatten(0, 1),
            {},
            actions.flatten(0, 1),
            first,
            first,
            False,
        )
        self.report.looked(REPLAY, len(first))
        self._differ("by a second forward", flat, second)
        self.report.looked(UPDATE, len(first))
        for n in self._off(stored, first).nonzero()[:, 0].tolist():
            message = (
                f"{flat.where(n)}: the rollout (forward_eval) gave log-prob "
                f"{float(stored[n]):.6f}, the update (forward) gives {float(first[n]):.6f} for the "
                "same observation and action"
            )
            off_update.append((int(flat.state[n]), message))

    def _off(self, a: Tensor, b: Tensor) -> Tensor:
        """(n,) bool: where two log-probs or values are not the same; -inf is the same as -inf."""
        allowed = self.asked.tolerance * a.abs().clamp(min=1.0).nan_to_num(posinf=1.0)
        return ~(((a - b).abs() <= allowed) | (a == b))

    # ---- the closer look

    def _order(self, rows: _Steps) -> None:
        """Log-prob and value with the list permuted, and with other tuples in its padding."""
        plain = rows.observations.cpu().numpy()
        legal = self.layout.read(torch.as_tensor(plain))
        counts = legal.counts.numpy()
        permuted, padded = plain.copy(), plain.copy()
        lists = [[row[i] for i in self.random.permutation(len(row))] for row in legal.to_lists()]
        try:
            self.layout.write(permuted, lists)
            _, columns = self.layout.list_arrays(self.layout.records(padded))
        except TypeError as error:
            self.report.skip(ORDER, f"lists cannot be rewritten in these observations: {error}")
            return
        behind = np.arange(self.layout.padding) >= counts[:, None]
        other = self.random.integers(len(legal.actions), size=int(behind.sum()))
        for j, column in enumerate(columns):
            column[behind] = legal.actions.numpy()[other, j]
        for how, changed in (
            ("the list in another order", permuted),
            ("other tuples behind the list, in its padding", padded),
        ):
            for at in torch.arange(len(rows.state)).split(BATCH):
                some = rows.take(at.to(self.asked.device))
                shown = torch.as_tensor(changed)[at].to(self.asked.device)
                before, _ = self.asked.rollout(some.observations, some.carried, some.actions)
                after, _ = self.asked.rollout(shown, some.carried, some.actions)
                off = self._off(before.log_prob, after.log_prob)
                off |= self._off(before.value, after.value)
                self.report.looked(ORDER, len(at))
                if off.any():
                    n = int(off.nonzero()[0])
                    self.report.found(
                        "P08",
                        ORDER,
                        f"{some.where(n)}: with {how}, the log-prob of "
                        f"{in_words(self.spec, some.actions[n].tolist())} goes from "
                        f"{float(before.log_prob[n]):.6f} to {float(after.log_prob[n]):.6f}, the "
                        f"value from {float(before.value[n]):.6f} to {float(after.value[n]):.6f}",
                        int(some.state[n]),
                        int(off.sum()),
                    )

    def _enumerate(self, rows: _Steps) -> None:
        """Each listed tuple of each row is asked for, and the rest follows in float64."""
        whole: list[Tensor] = []  # rows whose probabilities sum to 1
        log_probs: list[Tensor] = []  # of their tuples
        surplus: list[Tensor] = []  # of an estimated entropy over the exact one
        top: list[Tensor] = []
        every = self.layout.read(rows.observations).distinct()
        for at in _chunks(every.counts):
            some = rows.take(at)
            legal = self.layout.read(some.observations).distinct()
            tuples = some.take(legal.rows)
            answer, _ = self.asked.rollout(tuples.observations, tuples.carried, legal.actions)
            log_prob = answer.log_prob
            plain, _ = self.asked.rollout(some.observations, some.carried, some.actions)
            self._scores(some, legal, log_prob, plain.logits)
            p = log_prob.exp()
            zero = torch.zeros(len(legal), dtype=torch.float64, device=p.device)
            sums = zero.index_add(0, legal.rows, p)
            sound = self._sums(some, legal, sums)
            exact = zero.index_add(0, legal.rows, -torch.special.xlogy(p, p))
            surplus += self._entropy(some.take(sound), exact[sound], plain, sound)
            choice = legal.counts > 1
            top.append(zero.scatter_reduce(0, legal.rows, p, "amax")[choice])
            whole.append(at[sound & choice])
            log_probs += [
                part
                for part, good in zip(
                    log_prob.split(legal.counts.tolist()), (sound & choice).tolist(), strict=True
                )
                if good
            ]
        self._estimates(rows, surplus)
        self._sure(torch.cat(top))
        self._drawn(rows.take(torch.cat(whole)), log_probs)
        if self.unlisted_mass:
            mass = torch.cat(self.unlisted_mass)
            self.report.skip(
                SUMS,
                f"{float(mass.mean()):.1%} of the mass is on tuples that are not listed, as the "
                "draws are; fix that first",
            )
        if self.offences.total and not self.report.checks[ENTROPY].cases:
            self.report.skip(ENTROPY, "no state whose probabilities sum to 1, see the draws")

    def _scores(self, rows: _Steps, legal: LegalActions, log_prob: Tensor, logits: Any) -> None:
        own = _own_log_probs(logits, legal)
        if own is None:
            self.report.skip(SCORES, f"{type(logits).__name__} does not show its scores")
            return
        self.report.looked(SCORES, len(own))
        off = self._off(own, log_prob).nonzero()[:, 0]
        if len(off):
            n = int(off[0])
            b = int(legal.rows[n])
            self.report.found(
                "P04",
                SCORES,
                f"{rows.where(b)}: {in_words(self.spec, legal.actions[n].tolist())} has log-prob "
                f"{float(log_prob[n]):.6f}, but by the policy's own scores {float(own[n]):.6f}",
                int(rows.state[b]),
                len(off),
            )

    def _sums(self, rows: _Steps, legal: LegalActions, sums: Tensor) -> Tensor:
        """(B,) bool: where the probabilities sum to 1."""
        sound = (sums - 1).abs() <= self.asked.sum_tolerance
        self.report.looked(SUMS, len(sums))
        wrong = ~sound
        if self.offences.total:
            # What is missing is what unlisted draws have, and those are reported.
            wrong = wrong & ~(sums < 1)
            self.unlisted_mass.append((1 - sums).clamp(min=0))
        if wrong.any():
            n = int(wrong.nonzero()[0])
            why = "" if not sums[n] < 1 else "; the rest is on tuples that are not listed, or lost"
            self.report.found(
                "P06",
                SUMS,
                f"{rows.where(n)}: the probabilities of its {int(legal.counts[n])} listed tuples "
                f"sum to {float(sums[n]):.8f}{why}",
                int(rows.state[n]),
                int(wrong.sum()),
            )
        return sound

    def _entropy(self, rows: _Steps, exact: Tensor, plain: Answer, sound: Tensor) -> list[Tensor]:
        """Rows whose probabilities sum to 1; what estimates are over is for `_estimates`."""
        self.report.looked(ENTROPY, len(exact))
        said, of = rows.entropy, "the entropy handed out"
        if rows.estimate:
            said, of = plain.logits.distribution.entropy().double()[sound], "the exact entropy"
        off = ~((said - exact).abs() <= ENTROPY_TOLERANCE * exact.clamp(min=1.0))
        if off.any():
            n = int(off.nonzero()[0])
            self.report.found(
                "P07",
                ENTROPY,
                f"{rows.where(n)}: {of} is {float(said[n]):.6f}, that of the enumerated list "
                f"{float(exact[n]):.6f}",
                int(rows.state[n]),
                int(off.sum()),
            )
        return [rows.entropy - exact] if rows.estimate else []

    def _estimates(self, rows: _Steps, surplus: list[Tensor]) -> None:
        """Estimates of an entropy must be right on average."""
        over = torch.cat(surplus) if surplus else torch.zeros(0)
        if len(over) < SURE_STATES:
            return
        # Two nats of one state are allowed for, where hardly any state has a choice.
        most = ESTIMATE_DEVIATIONS * float(over.square().sum().sqrt()) + 2.0
        if not abs(float(over.sum())) <= most:
            self.report.found(
                "P07",
                ENTROPY,
                f"the entropy is an estimate, and over {len(over)} states it is "
                f"{float(over.mean()):+.6f} too high on average; {most / len(over):.6f} are "
                "allowed for",
                int(rows.state[0]),
            )

    def _drawn(self, rows: _Steps, log_probs: list[Tensor]) -> None:
        """Chi-square of many draws in some states: in each, and in all together."""
        if not log_probs:
            self.report.skip(
                DRAWS, "no state with a choice whose probabilities sum to 1; play more steps"
            )
            return
        spread = np.linspace(0, len(log_probs) - 1, min(DRAWN_ROWS, len(log_probs))).astype(int)
        some = rows.take(torch.as_tensor(spread).to(self.asked.device))
        legal = self.layout.read(some.observations).distinct()
        copies = torch.arange(len(spread), device=self.asked.device).repeat(DRAWN_COPIES)
        repeated = some.take(copies)
        lists = LegalActions(
            torch.cat([legal.actions] * DRAWN_COPIES), legal.counts.repeat(DRAWN_COPIES), legal.noop
        )
        counts = torch.zeros(len(legal.rows), dtype=torch.float64, device=self.asked.device)
        for _ in range(DRAWN_ROUNDS):
            answer, _ = self.asked.rollout(repeated.observations, repeated.carried)
            at = lists.find(lists.whole(answer.actions))
            at = at[at >= 0] % len(legal.rows)
            counts += torch.bincount(at, minlength=len(legal.rows))
        statistics, freedoms = [], []
        for n, seen in enumerate(counts.cpu().split(legal.counts.tolist())):
            p = log_probs[int(spread[n])].cpu().exp()
            statistic, freedom = _chi_square(seen, p / p.sum())
            self.report.looked(DRAWS, int(seen.sum()))
            statistics.append(statistic)
            freedoms.append(freedom)
            tail = _tail(statistic, freedom)
            if tail < FALSE_ALARM / len(spread):
                worst = int((seen - p * seen.sum()).abs().argmax())
                action = legal.actions[int(legal.starts[n]) + worst].tolist()
                self.report.found(
                    "P09",
                    DRAWS,
                    f"{some.where(n)}: of {int(seen.sum())} draws {int(seen[worst])} are "
                    f"{in_words(self.spec, action)}, whose probability is {float(p[worst]):.4f} "
                    f"(chi-square {statistic:.0f} of {freedom} degrees of freedom)",
                    int(some.state[n]),
                )
        tail = _tail(sum(statistics), sum(freedoms))
        if tail < FALSE_ALARM and "P09" not in self.report.findings:
            self.report.found(
                "P09",
                DRAWS,
                f"over {len(spread)} states, draws are off their probabilities: chi-square "
                f"{sum(statistics):.0f} of {sum(freedoms)} degrees of freedom",
                int(some.state[0]),
            )

    # ---- degenerate policies

    def _sure(self, top: Tensor) -> None:
        """(n,) the largest probability of each state with a choice."""
        if len(top) < SURE_STATES:
            self.report.skip(
                SURENESS, f"{len(top)} states with a choice, {SURE_STATES} are needed; more steps"
            )
            return
        self.report.looked(SURENESS, len(top))
        share = float((top > SURE).double().mean())
        self.report.figures["share of states with one tuple above 0.999"] = share
        if share > SURE_SHARE:
            self.report.found(
                "P20",
                SURENESS,
                f"in {int((top > SURE).sum())} of {len(top)} states with more than one legal tuple "
                f"one of them has a probability above {SURE}",
                0,
                int((top > SURE).sum()),
            )

    def _degenerate(self) -> None:
        if "P03" in self.report.findings:
            for check in (NOOP, PRIMARIES):
                self.report.skip(check, "the no-op takes the place of other draws (P03)")
            return
        if self.noop_choices < NOOP_STATES:
            self.report.skip(
                NOOP,
                f"the no-op was one of several legal tuples in {self.noop_choices} states, "
                f"{NOOP_STATES} are needed; play more steps",
            )
        else:
            self.report.looked(NOOP, self.noop_choices)
            share = self.noop_drawn / self.noop_choices
            self.report.figures["share of the no-op where it is one of several"] = share
            if share > NOOP_SHARE:
                self.report.found(
                    "P21",
                    NOOP,
                    f"the no-op {in_words(self.spec, self.spec.noop.tolist())} was drawn in "
                    f"{self.noop_drawn} of {self.noop_choices} states where it was one of several "
                    "legal tuples",
                    0,
                    self.noop_drawn,
                )
        enough = self.primary_legal >= PRIMARY_STATES
        enough &= self.primary_expected > PRIMARY_EXPECTED
        if not enough.any():
            self.report.skip(
                PRIMARIES,
                f"no primary was one of several in {PRIMARY_STATES} states; play more steps",
            )
        for primary in np.flatnonzero(enough).tolist():
            self.report.looked(PRIMARIES)
            if not self.primary_drawn[primary]:
                self.report.found(
                    "P22",
                    PRIMARIES,
                    f"{self.spec.primaries[primary].name} (primary {primary}) was one of several "
                    f"legal primaries in {self.primary_legal[primary]} states and never drawn; "
                    "uniform play draws it "
                    f"{self.primary_expected[primary]:.0f} times",
                    0,
                )


class _Offences:
    """Draws that are not listed, and of which kind they are."""

    def __init__(self, spec: ActionSpec) -> None:
        self.spec = spec
        self.total = self.noops = self.of_one = self.of_another = 0
        self.known = False
        """Whether the most probable primary could be told."""
        self.first: tuple[int, str] | None = None

    def add(self, rows: _Steps, legal: LegalActions, offending: Tensor, logits: Any) -> None:
        """Takes down offending rows (n,)."""
        greedy = _most_probable_primary(logits, rows.actions.shape)
        self.known = greedy is not None
        lists = legal.to_lists()
        noop = self.spec.noop.tolist()
        for n in offending.tolist():
            action, listed = rows.actions[n].tolist(), lists[n]
            self.total += 1
            self.noops += action == noop
            own = _fits(action, action[0], listed)
            if greedy is None:
                fits = own or any(_fits(action, other, listed) for other in {a[0] for a in listed})
                another = fits and not own
            else:
                most = int(greedy[n])
                fits, another = _fits(action, most, listed), most != action[0]
            self.of_one += fits
            self.of_another += fits and another
            if self.first is None:
                some = ", ".join(map(str, listed[:4])) + (", ..." if len(listed) > 4 else "")
                held = f"its {len(listed)} listed tuples are {some}" if listed else "nothing is"
                self.first = (
                    int(rows.state[n]),
                    f"{rows.where(n)}: drew {in_words(self.spec, action)}, which is not listed; "
                    f"{held}",
                )

    def write(self, report: Report) -> None:
        """Reports them, all of one kind."""
        report.figures["share of draws not listed"] = self.total / report.figures["states"]
        if self.first is None:
            return
        state, message = self.first
        enough = KIND_SHARE * self.total
        # A value of a single slot always is some primary's, which says nothing.
        telling = self.known or self.spec.slots > 1
        if self.noops >= enough:
            code = "P03"
            message += f". {self.noops} of {self.total} such draws are the no-op"
        elif telling and self.of_one >= enough and self.of_another:
            code = "P02"
            whose = "the most probable primary" if self.known else "one other primary"
            message += (
                f". In {self.of_one} of {self.total} such draws the later values are those that "
                f"are legal with {whose}, in {self.of_another} of them not the one drawn"
            )
        else:
            code = "P01"
        report.found(code, LISTED, message, state, self.total)


def _fits(action: list[int], primary: int, listed: list[tuple[int, ...]]) -> bool:
    """Whether each later value is one that the primary has in some listed tuple."""
    of_primary = [other for other in listed if other[0] == primary]
    return bool(of_primary) and all(
        value in {other[slot] for other in of_primary}
        for slot, value in enumerate(action[1:], start=1)
    )


def _most_probable_primary(logits: Any, shape: torch.Size) -> Tensor | None:
    """(B,) by the first head's logits, or by the mode of what offers one; else None."""
    if isinstance(logits, (list, tuple)):
        most: Tensor = logits[0].argmax(1)
        return most
    try:
        mode = logits.mode
    except Exception:  # whatever a stand-in for a Normal raises
        return None
    if not isinstance(mode, Tensor) or mode.shape != shape or mode.isnan().any():
        return None
    return mode[:, 0].long()


def _own_log_probs(logits: Any, legal: LegalActions) -> Tensor | None:
    """(N,) float64 log-probabilities of the listed tuples by the scores, where these show."""
    if isinstance(logits, (list, tuple)):
        heads = [head.double().log_softmax(1) for head in logits]
        each = [head[legal.rows, legal.actions[:, j]] for j, head in enumerate(heads)]
        return torch.stack(each).sum(0)
    distribution = logits.distribution if isinstance(logits, LegalNormal) else None
    if not isinstance(distribution, LegalCategorical):
        return None
    theirs = distribution.legal
    same = torch.equal(theirs.counts, legal.counts) and torch.equal(theirs.actions, legal.actions)
    if not same:
        return None
    scores = distribution._scores.double()
    parts = scores.split(legal.counts.tolist())
    return torch.cat([part.log_softmax(0) for part in parts])


def _chunks(counts: Tensor) -> Iterator[Tensor]:
    """Rows (n,) in order, so many that their tuples fit a batch."""
    part = (counts.cumsum(0) - counts) // BATCH
    for number in part.unique().tolist():
        yield (part == number).nonzero()[:, 0]


def _chi_square(seen: Tensor, p: Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells that are rarely expected share one."""
    expected, order = (p * seen.sum()).sort(descending=True)
    seen = seen[order]
    often = int((expected >= LEAST_EXPECTED).sum())
    if float(expected[often:].sum()) < LEAST_EXPECTED:
        often = max(often - 1, 0)  # the rest goes with the rarest of the others
    cells = [(float(s), float(e)) for s, e in zip(seen[:often], expected[:often], strict=True)]
    cells.append((float(seen[often:].sum()), float(expected[often:].sum())))
    if len(cells) < 2:
        return 0.0, 0
    return sum((s - e) ** 2 / e for s, e in cells), len(cells) - 1


def _tail(statistic: float, freedom: int) -> float:
    """How probable a chi-square of at least this is."""
    if not freedom:
        return 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
