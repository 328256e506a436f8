"""Audits a training run: PuffeRL itself is run for some epochs and watched.

Shapes: S segments (rows of experience), T steps of each, H values in a tuple.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.meaning import NoMeaning, meaning
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.verify.findings import Report
from tcg_flatpolicy.verify.policy import Asked, exploration_changed, in_words
from tcg_flatpolicy.wrapping import env_layers

RATIO_TOLERANCE = 1e-3
"""How far the importance ratio may be from 1 before the first update."""
RATIO_TOLERANCE_BFLOAT16 = 5e-2
"""The same where the trainer's precision is bfloat16."""
MOST_IDLE = 0.9
"""Share of rows without a legal action above which a run is mostly about nothing."""
LISTS_AT_ONCE = 16384
"""Observations whose lists are read at once."""

RATIO = "the importance ratio is 1 before the first update"
LOSSES = "losses, KL and entropy are finite"
GRADIENTS = "gradients and weights are finite"
REACHED = "a gradient reaches every parameter"
RELOADED = "a reloaded checkpoint gives the same log-probs"
IDLE = "not most rows are without a legal action"
STORED = "stored actions are in the lists of stored observations"
ARRIVED = "actions arrive in the environment as listed"

CHECKS = (RATIO, LOSSES, GRADIENTS, REACHED, RELOADED, IDLE, STORED, ARRIVED)
"""The names of all checks."""

WATCHED_LOSSES = (
    "policy_loss",
    "value_loss",
    "entropy",
    "old_approx_kl",
    "approx_kl",
    "clipfrac",
    "importance",
)
"""All that PuffeRL reports but explained_variance, which is NaN where values do not vary."""


def audit_trainer(
    trainer: Any,
    epochs: int = 3,
    *,
    spec: ActionSpec | None = None,
    layout: LegalLayout | Sequence[str] | None = None,
) -> Report:
    """Trains for some epochs, watching.

    The trainer is a PuffeRL and goes on from where it is: what it learns here it has learned. It is
    watched through hooks on its optimizer and parameters and through the ``step`` of environments
    in this process, all removed at the end; nothing of PufferLib is replaced. The audit stops at
    the first weight that is not finite (before the first epoch, if there is one), and where the
    policy refuses an update because its exploration was changed. The trainer's dashboard is not
    shown meanwhile, and its statistics are logged in every epoch. As after any training, PufferLib
    leaves autocast on.

    Args:
        trainer: a PuffeRL, between epochs.
        epochs: rollouts with an update each.
        spec: what tuples mean; the policy's or the environment's if left out.
        layout: where the legal list is, or the keys of count and list in a Dict observation; the
            policy's or the environment's if left out. Without either, what needs the lists is
            skipped.

    Raises:
        TypeError: a layout of keys where observations are not emulated from a Dict.
        ValueError: epochs below 1, two specs or layouts that disagree, or a list that is
            broken or not within the spec.
        RuntimeError: PufferLib or the policy raised, and nothing was found before that would
            explain it; as is every other exception of theirs.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if isinstance(layout, Sequence):
        count, actions = layout
        layout = LegalLayout.from_env(trainer.vecenv, count, actions, spec)
    return _Audit(trainer, spec, layout).run(epochs)


class _Audit:
    def __init__(self, trainer: Any, spec: ActionSpec | None, layout: LegalLayout | None) -> None:
        self.trainer = trainer
        self.policy: nn.Module = trainer.uncompiled_policy
        self.report = Report(
            f"PuffeRL with policy {type(self.policy).__name__} on {type(trainer.vecenv).__name__}"
        )
        self.spec = self.layout = None
        try:
            self.spec, self.layout = meaning(trainer.vecenv, self.policy, spec, layout, "an audit")
        except NoMeaning as error:
            for check in (IDLE, STORED, ARRIVED):
                self.report.skip(check, str(error))
        half = trainer.config["precision"] == "bfloat16"
        self.tolerance = RATIO_TOLERANCE_BFLOAT16 if half else RATIO_TOLERANCE
        self.parameters = {
            name: parameter
            for name, parameter in self.policy.named_parameters()
            if parameter.requires_grad
        }
        self.reached: set[str] = set()
        self.in_update = False
        self.stopped = False
        self.updates = 0  # optimizer steps of this epoch
        self.buffers: dict[str, Tensor] = {}
        self.rows = self.idle = self.noop_choices = self.noops = 0
        self.worst_ratio = 0.0
        # Unlisted actions of this epoch. Each is known by its observation, since one that was drawn
        # unlisted is stored and arrives, and is one action.
        self.stored: Counter[int] = Counter()
        self.arrivals: list[tuple[str, Counter[int]]] = []

    def run(self, epochs: int) -> Report:
        started, first_step = time.monotonic(), self.trainer.global_step
        blank = self._blank_copy()
        done = 0
        with self._watched():
            self._weights("before the first rollout")
            while done < epochs and not self.stopped:
                try:
                    self._epoch()
                except Exception as error:
                    if self.report.ok:
                        raise
                    self.report.subject += f"; it then raised {type(error).__name__}: {error}"
                    self.stopped = True
                done += 1
        if not self.stopped:
            self._unreached(done)
            self._reload(blank)
        self._shares()
        if self.stopped:
            for check in CHECKS:
                if check not in self.report.checks:
                    self.report.skip(check, "training broke off, see what was found")
        self.report.figures.update(
            {
                "epochs": done,
                "steps": self.trainer.global_step - first_step,
                "largest distance of the ratio from 1": self.worst_ratio,
                "seconds": time.monotonic() - started,
            }
        )
        for name in ("entropy", "approx_kl"):
            if name in self.trainer.losses:
                self.report.figures[name] = float(self.trainer.losses[name])
        return self.report

    def _epoch(self) -> None:
        trainer = self.trainer
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            # PuffeRL asks for autocast in float32 too, where torch says there is none on a CPU.
            warnings.filterwarnings("ignore", "In CPU autocast|CUDA is not available", UserWarning)
            self.buffers = {name: b.clone() for name, b in self.policy.named_buffers()}
            try:
                trainer.evaluate()
                self._lists()
            finally:  # after what was stored, whose message says more
                self._report_arrivals()
            # PuffeRL keeps an epoch's losses only if its last log is a quarter of a second old.
            trainer.last_log_time = min(trainer.last_log_time, time.time() - 0.5)
            self.updates = 0
            self.in_update = True
            try:
                trainer.train()
            except RuntimeError as error:
                if not exploration_changed(error):
                    raise
                self.stopped = True
                message = f"epoch {trainer.epoch}: the policy refused the update: {error}"
                self.report.found("T01", RATIO, message, trainer.epoch)
                return
            finally:
                self.in_update = False
        self._losses()

    # ---- what is watched

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        optimizer = self.trainer.optimizer
        with contextlib.ExitStack() as stack:
            handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
            for name, parameter in self.parameters.items():
                hook = self._on_gradient(name)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
            for handle in handles:
                stack.callback(handle.remove)
            if self.layout is not None:
                self._watch_environments(stack)
            yield

    def _on_gradient(self, name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None or not self.in_update:
                return
            if gradient.is_sparse:
                gradient = gradient.coalesce().values()
            self.report.looked(GRADIENTS)
            bad = int((~gradient.isfinite()).sum())
            if bad:
                self.report.found(
                    "T03",
                    GRADIENTS,
                    f"epoch {self.trainer.epoch}, update {self.updates}: {bad} of "
                    f"{gradient.numel()} values of the gradient of {name} are not finite",
                    self.trainer.epoch,
                )
            if name not in self.reached and bool((gradient != 0).any()):
                self.reached.add(name)

        return look

    def _before_step(self, *_: Any) -> None:
        # All minibatches up to here had the weights of the rollout.
        if self.in_update and not self.updates:
            self._ratio()

    def _after_step(self, *_: Any) -> None:
        if not self.in_update:
            return
        self.updates += 1
        self._weights(f"update {self.updates}")

    def _weights(self, when: str) -> None:
        """Stops at the first that is not finite."""
        for name, parameter in self.policy.named_parameters():
            bad = int((~parameter.detach().isfinite()).sum())
            if bad:
                self.stopped = True
                self.report.found(
                    "T03",
                    GRADIENTS,
                    f"epoch {self.trainer.epoch}, {when}: {bad} of {parameter.numel()} values of "
                    f"{name} are not finite",
                    self.trainer.epoch,
                )
                return

    def _ratio(self) -> None:
        trainer = self.trainer
        ratio = trainer.ratio.detach()
        minibatch = trainer.minibatch_size * trainer.accumulate_minibatches
        self.report.looked(RATIO, min(minibatch, ratio.numel()))
        bad = ~ratio.isfinite()
        if bad.any():
            segment, step = bad.nonzero()[0].tolist()
            self.report.found(
                "T02",
                LOSSES,
                f"epoch {trainer.epoch}: the importance ratio in segment {segment}, step {step} is "
                f"{float(ratio[segment, step])}",
                trainer.epoch,
                int(bad.sum()),
            )
        distance = (ratio - 1).abs().masked_fill(bad, 0.0)
        self.worst_ratio = max(self.worst_ratio, float(distance.max()))
        off = distance > self.tolerance
        if off.any():
            segment, step = divmod(int(distance.argmax()), ratio.shape[1])
            self.report.found(
                "T01",
                RATIO,
                f"epoch {trainer.epoch}: in {int(off.sum())} of {minibatch} steps of the first "
                f"minibatch the ratio is off 1 by more than {self.tolerance}, most in segment "
                f"{segment}, step {step}: {float(ratio[segment, step]):.6f}. {self._causes()}",
                trainer.epoch,
                int(off.sum()),
            )

    def _causes(self) -> str:
        """The usual causes, of which there is a sign."""
        trainer, config = self.trainer, self.trainer.config
        causes = []
        needed = trainer.total_agents * config["bptt_horizon"]
        if config["use_rnn"] and config["batch_size"] != needed:
            causes.append(
                f"recurrent training with batch_size {config['batch_size']}, which is not "
                f"total_agents * bptt_horizon = {trainer.total_agents} * {config['bptt_horizon']} "
                f"= {needed}: the rollout carries the state from segment to segment, the update "
                "does not"
            )
        changed = [
            name
            for name, buffer in self.policy.named_buffers()
            if name in self.buffers and not torch.equal(buffer, self.buffers[name])
        ]
        if changed:
            causes.append(
                f"these buffers changed since the rollout began: {', '.join(changed)} "
                "(exploration, running statistics)"
            )
        noisy = [
            name
            for name, module in self.policy.named_modules()
            if module.training
            and (
                (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
                or isinstance(module, nn.modules.batchnorm._BatchNorm)
            )
        ]
        if noisy:
            causes.append(f"dropout or batch norm in training mode: {', '.join(noisy)}")
        if config["precision"] == "bfloat16":
            causes.append(
                "autocast in bfloat16, whose cache keeps weights as they were cast in an earlier "
                "epoch: PufferLib never leaves it"
            )
        if not causes:
            return "No usual cause shows; audit_policy looks closer"
        return "Which may be for: " + "; ".join(causes)

    def _losses(self) -> None:
        losses = self.trainer.losses
        for name in WATCHED_LOSSES:
            if name not in losses:
                continue
            self.report.looked(LOSSES)
            if not math.isfinite(losses[name]):
                epoch = self.trainer.epoch - 1  # train() has counted it
                self.report.found("T02", LOSSES, f"epoch {epoch}: {name} is {losses[name]}", epoch)

    # ---- lists and actions

    def _lists(self) -> None:
        """What was stored: the lists shown, and the actions drawn."""
        if self.layout is None or self.spec is None:
            return
        trainer = self.trainer
        observations = trainer.observations.flatten(0, 1)
        actions = trainer.actions.flatten(0, 1).flatten(1 if trainer.actions.ndim > 2 else 0)
        actions = actions.reshape(len(observations), -1)
        horizon = trainer.observations.shape[1]
        noop = torch.as_tensor(self.spec.noop)
        for start in range(0, len(observations), LISTS_AT_ONCE):
            legal = self.layout.read(observations[start : start + LISTS_AT_ONCE]).to("cpu")
            legal = legal.distinct()
            some = legal.whole(actions[start : start + LISTS_AT_ONCE].cpu())
            for n in self._stored(legal, some, start, horizon):
                self.stored[_known_by(observations[start + n])] += 1
            offered = torch.zeros(len(legal), dtype=torch.bool)
            offered[legal.rows[(legal.actions == noop).all(1)]] = True
            offered &= legal.counts > 1
            self.rows += len(legal)
            self.idle += int((legal.counts == 0).sum())
            self.noop_choices += int(offered.sum())
            self.noops += int((offered & (some == noop).all(1)).sum())

    def _stored(self, legal: LegalActions, actions: Tensor, start: int, horizon: int) -> list[int]:
        """The rows whose stored action is not listed."""
        self.report.looked(STORED, len(legal))
        wrong: list[int] = (~legal.contains(actions)).nonzero()[:, 0].tolist()
        if wrong:
            assert self.spec is not None
            n = wrong[0]
            segment, step = divmod(start + n, horizon)
            self.report.found(
                "T07",
                STORED,
                f"epoch {self.trainer.epoch}, segment {segment}, step {step}: "
                f"{in_words(self.spec, actions[n].tolist())} is stored, which is not among the "
                f"{int(legal.counts[n])} tuples listed in the stored observation",
                self.trainer.epoch,
                len(wrong),
            )
        return wrong

    def _watch_environments(self, stack: contextlib.ExitStack) -> None:
        """What reaches the innermost environment of this process that holds observations."""
        vecenv = self.trainer.vecenv
        watched = 0
        for env in getattr(vecenv, "envs", None) or [vecenv]:
            layers = [
                layer
                for layer in env_layers(env)
                if callable(getattr(layer, "step", None))
                and isinstance(getattr(layer, "observations", None), np.ndarray)
            ]
            if not layers or not hasattr(env, "step"):
                continue
            try:
                self._watch(layers[-1], stack)
            except AttributeError:  # one that takes no new attributes
                continue
            watched += 1
        if not watched:
            self.report.skip(
                ARRIVED,
                f"{type(vecenv).__name__} has no environment in this process whose step could be "
                "watched; audit with pufferlib.vector.Serial",
            )

    def _watch(self, env: Any, stack: contextlib.ExitStack) -> None:
        step = env.step
        own = "step" in vars(env)

        def watched(actions: Any, *arguments: Any, **named: Any) -> Any:
            self._arrived(env, actions)
            return step(actions, *arguments, **named)

        env.step = watched

        def unwatch() -> None:
            if own:
                env.step = step
            else:
                del env.step

        stack.callback(unwatch)

    def _arrived(self, env: Any, actions: Any) -> None:
        assert self.layout is not None
        assert self.spec is not None
        observations = env.observations
        shown = torch.as_tensor(observations.reshape(-1, observations.shape[-1]))
        legal = self.layout.read(shown).distinct()
        sent = legal.whole(torch.as_tensor(np.asarray(actions)).reshape(len(legal), -1))
        self.report.looked(ARRIVED, len(legal))
        wrong = (~legal.contains(sent)).nonzero()[:, 0].tolist()
        if wrong:
            n = wrong[0]
            self.arrivals.append(
                (
                    f"epoch {self.trainer.epoch}: row {n} of {type(env).__name__} is given "
                    f"{in_words(self.spec, sent[n].tolist())}, which is not among the "
                    f"{int(legal.counts[n])} tuples that it shows",
                    Counter(_known_by(shown[row]) for row in wrong),
                )
            )

    def _report_arrivals(self) -> None:
        """What arrived unlisted; what was stored so is counted already."""
        for message, arrived in self.arrivals:
            again = arrived & self.stored
            self.stored -= again
            count = (arrived - again).total()
            self.report.found("T07", ARRIVED, message, self.trainer.epoch, count)
        self.stored.clear()
        self.arrivals.clear()

    # ---- at the end

    def _unreached(self, epochs: int) -> None:
        self.report.looked(REACHED, len(self.parameters))
        missing = [name for name in self.parameters if name not in self.reached]
        if missing:
            self.report.found(
                "T04",
                REACHED,
                f"in {epochs} epochs no gradient other than 0 reached {', '.join(missing)}",
                self.trainer.epoch,
                len(missing),
            )

    def _blank_copy(self) -> nn.Module | None:
        """The policy as it is now, with other weights: what it keeps outside them shows later."""
        try:
            blank = copy.deepcopy(self.policy)
        except Exception as error:
            self.report.skip(
                RELOADED,
                f"the policy cannot be copied ({type(error).__name__}: {error}); make it "
                "deep-copyable",
            )
            return None
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # By both, since a state_dict may leave parameters out.
            for value in [*blank.parameters(), *blank.state_dict(keep_vars=True).values()]:
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.copy_(torch.rand(value.shape, dtype=value.dtype))
        return blank

    def _reload(self, blank: nn.Module | None) -> None:
        """Log-probs of stored actions, by the policy and by its checkpoint loaded into the copy."""
        if blank is None:
            return
        trainer = self.trainer
        file = io.BytesIO()
        torch.save(self.policy.state_dict(), file)
        file.seek(0)
        try:
            blank.load_state_dict(torch.load(file, trainer.config["device"], weights_only=True))
        except RuntimeError as error:
            self.report.found("T05", RELOADED, f"it does not load: {error}", trainer.epoch)
            return
        segments = slice(0, trainer.minibatch_segments)
        before, after = self._log_probs(self.policy, segments), self._log_probs(blank, segments)
        self.report.looked(RELOADED, before.numel())
        off = ~((before == after) | (before.isnan() & after.isnan()))
        if off.any():
            n = int(off.nonzero()[0])
            segment, step = divmod(n, trainer.actions.shape[1])
            self.report.found(
                "T05",
                RELOADED,
                f"after epoch {trainer.epoch - 1}, segment {segment}, step {step}: the policy "
                f"gives the stored action log-prob {float(before[n]):.9g}, its checkpoint "
                f"{float(after[n]):.9g}",
                trainer.epoch - 1,
                int(off.sum()),
            )

    def _log_probs(self, policy: nn.Module, segments: slice) -> Tensor:
        """(S * T,) as the update asks for them, but without gradients."""
        trainer = self.trainer
        torch.clear_autocast_cache()  # else a policy may be asked with weights cast before
        device = torch.device(trainer.config["device"])
        observations = trainer.observations[segments].to(device)
        devices = [device] if device.type == "cuda" else []
        buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
        asked = Asked(policy, bool(trainer.config["use_rnn"]))
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            log_prob = asked.update(
                observations, trainer.actions[segments], learning=False
            ).log_prob
        with torch.no_grad():
            for name, buffer in policy.named_buffers():
                buffer.copy_(buffers[name])
        return log_prob

    def _shares(self) -> None:
        if not self.rows:
            return
        share = self.idle / self.rows
        self.report.looked(IDLE, self.rows)
        self.report.figures["share of rows with no legal action"] = share
        if self.noop_choices:
            self.report.figures["share of rows with the no-op as one of several"] = (
                self.noop_choices / self.rows
            )
            self.report.figures["share of the no-op where it is one of several"] = (
                self.noops / self.noop_choices
            )
        if share > MOST_IDLE:
            self.report.found(
                "T06",
                IDLE,
                f"{self.idle} of {self.rows} rows ({share:.1%}) have no legal action",
                self.trainer.epoch - 1,
                self.idle,
            )


def _known_by(observation: Tensor) -> int:
    """A number for what an observation (columns,) holds."""
    return hash(observation.detach().cpu().numpy().tobytes())
