"""What a head tells its trainer, against the truth: entropy and policy gradient, by enumeration.

A head draws a tuple from pi. What is played is q: the tuple that was drawn, with 0 in the slots
that its primary does not use, since engines ignore what stands there; where that is illegal, one
drawn uniformly from the legal list, as the environment does. The return follows q. So the entropy
of q and the gradients of that entropy and of the mean advantage under q are the truth, by one
backward of the enumerated q. Against them stands what a trainer has of single draws:

- the entropy that the head reports, and its gradient;
- the policy gradient, advantage of what was played times the gradient of the log-prob of the tuple
  that was drawn; or of the one played, for engines that write back what they played.

Their means and variances over draws are exact too: every tuple that can be drawn is enumerated, and
the gradients of each come from one backward in which a state stands once for each of its tuples.
Gradients are with respect to the encoder's hidden (B, D), which all heads share.

Shapes: B states, N legal tuples in all, M tuples that can be drawn or are legal, H values in a
tuple, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from baselines import COLOURS, HEADS, FixedHead, IndependentHeads, MasksPerHead, ignore_unused
from measure import table
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.heads import make_head

KINDS = ("at initialisation", "sharpened")
SHARPENED = 0.5
"""The entropy of a sharpened policy, as a share of that of uniform play."""
STATES, QUICK_STATES = 256, 64
POLICIES, QUICK_POLICIES = 10, 2
CHUNK = 32
"""States at a time: each stands once for each of its tuples, some hundreds of times."""
LARGEST_FACTOR = 2.0**20

Figures = dict[str, float]


class Draws(NamedTuple):
    """The tuples that a head can draw in each state, and the legal ones."""

    rows: Tensor
    """(M,) int64, the state of each."""
    actions: Tensor
    """(M, H) int64."""
    position: Tensor
    """(M,) int64, where each, with unused slots ignored, stands in the legal list (N,); -1 for one
    that is illegal."""
    listed: Tensor
    """(M,) bool, whether each is itself in the list, as it is drawn."""


# The measurement.


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Every head on the same states of Essence Wars, as it starts and sharpened.

    Args:
        quick: fewer states, and two policies a head instead of ten.
        seed: of the states, the networks and the advantages.

    Returns:
        What :func:`report` and :func:`draw` take: ``states``, ``policies``, ``mean legal``,
        ``uniform entropy`` (nats), and ``heads``: {head: {kind: [figures of each policy]}}, figures
        as :func:`evaluate` gives them.
    """
    # Here, not above: PufferLib's trainer turns warnings of the importing process into errors.
    from end_to_end import SETTINGS, record

    from tcg_flatpolicy.games.essence_wars import SPEC, EssenceWarsEncoder

    torch.set_num_threads(1)
    layout, kept = record(16)
    rng = np.random.default_rng(seed)
    size = QUICK_STATES if quick else STATES
    policies = QUICK_POLICIES if quick else POLICIES
    seen = torch.cat(kept)
    observations = seen[torch.as_tensor(rng.choice(len(seen), size, replace=False))]
    legal = layout.read(observations).distinct()
    advantages = made_up_advantages(legal, seed)

    heads: dict[str, dict[str, list[Figures]]] = {
        name: {kind: [] for kind in KINDS} for name in HEADS
    }
    for policy in range(policies):
        torch.manual_seed(seed + policy)
        encoder = EssenceWarsEncoder(layout, SETTINGS.hidden_size, SETTINGS.entity_size)
        with torch.no_grad():
            hidden, entities = encoder(observations)
        for name, factory in HEADS.items():
            torch.manual_seed(seed + policy)
            head = make_head(
                factory, SPEC, encoder.hidden_size, encoder.entity_sizes, SETTINGS.head_width
            )
            sharp, factor = sharpened(head, hidden, entities, legal, SPEC)
            for kind, one, scale in zip(KINDS, (head, sharp), (1.0, factor), strict=True):
                figures = evaluate(one, hidden, entities, legal, advantages, SPEC)
                heads[name][kind].append({**figures, "last layer times": scale})
    return {
        "states": size,
        "policies": policies,
        "mean legal": legal.counts.double().mean().item(),
        "uniform entropy": legal.counts.double().log().mean().item(),
        "heads": heads,
    }


def made_up_advantages(legal: fp.LegalActions, seed: int) -> Tensor:
    """(N,) float64: standard normal, with mean 0 over each state's list."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(legal.rows), generator=generator, dtype=torch.float64)
    return values - (row_sum(values, legal.rows, len(legal)) / legal.counts)[legal.rows]


def evaluate(
    head: nn.Module,
    hidden: Tensor,
    entities: Mapping[str, Tensor],
    legal: fp.LegalActions,
    advantages: Tensor,
    spec: fp.ActionSpec,
) -> Figures:
    """Bias and variance over draws, by enumeration.

    Args:
        head: any of baselines.HEADS, made.
        hidden: (B, D).
        entities: {name: (B, n, E)}.
        legal: B lists, none of them empty, no tuple twice in one, 0 in unused slots.
        advantages: (N,) float64 of the legal tuples.
        spec: says which slots a primary uses.

    Returns:
        ``entropy``: H(q) in nats, the mean over states; ``entropy bias`` and ``entropy sd``: of
        what is reported less H(q), the mean over states and draws, and the standard deviation over
        draws within a state. Of three gradients g, "entropy gradient", "policy gradient" (of the
        tuple drawn) and "policy gradient of the played", against the true g*: ``... bias``, the
        norm of E[g] - g* over that of g*, both over all states and dimensions; ``... cosine`` of
        E[g] and g*; and ``... variance``, E|g - E[g]|^2 over the square of the norm of g*. (Masks
        that follow from logits count as given in g*, which leaves out how they jump.)
        ``not listed share``: of draws, those not listed as they are drawn; ``illegal share``: those
        not listed with unused slots ignored; ``mass off by``: how far from 1 the sum of
        exp(log_prob) over a state's legal list is, at most.

    Raises:
        ValueError: an empty list, or a legal tuple with something in an unused slot.
    """
    if (legal.counts == 0).any():
        row = int((legal.counts == 0).nonzero()[0])
        raise ValueError(f"row {row}: legal.counts is 0; leave out states without a legal tuple")
    changed = (ignore_unused(spec, legal.actions) != legal.actions).any(1)
    if changed.any():
        at = int(changed.nonzero()[0])
        raise ValueError(
            f"row {int(legal.rows[at])}: legal.actions has {tuple(legal.actions[at].tolist())}, of "
            "which the primary does not use every slot that is not 0; set the others to 0"
        )
    sums: dict[str, float] = {}
    largest = 0.0
    for rows in torch.arange(len(legal)).split(CHUNK):
        picked = positions(legal, rows)
        some, off = moments(
            head,
            hidden[rows],
            {name: things[rows] for name, things in entities.items()},
            repeated(legal, rows),
            advantages[picked],
            spec,
        )
        largest = max(largest, off)
        for key, value in some.items():
            sums[key] = sums.get(key, 0.0) + value
    states = len(legal)
    figures = {
        "entropy": sums["entropy"] / states,
        "entropy bias": sums["entropy bias"] / states,
        "entropy sd": (sums["entropy variance"] / states) ** 0.5,
        "not listed share": sums["not listed"] / states,
        "illegal share": sums["illegal"] / states,
        "mass off by": largest,
    }
    for name in ("entropy gradient", "policy gradient", "policy gradient of the played"):
        true, mean = sums[f"{name} true^2"], sums[f"{name} mean^2"]
        figures[f"{name} bias"] = (sums[f"{name} off^2"] / true) ** 0.5
        figures[f"{name} cosine"] = sums[f"{name} product"] / (true * mean) ** 0.5
        figures[f"{name} variance"] = max(sums[f"{name} second"] - mean, 0.0) / true
    return figures


def moments(
    head: nn.Module,
    hidden: Tensor,
    entities: Mapping[str, Tensor],
    legal: fp.LegalActions,
    advantages: Tensor,
    spec: fp.ActionSpec,
) -> tuple[dict[str, float], float]:
    """The sums over states that :func:`evaluate` divides, and ``mass off by``."""
    states = len(legal)
    leaf = hidden.detach().requires_grad_()
    distribution = head(leaf, entities, legal)
    draws = drawable(distribution, legal, spec)
    q = played(log_probs(distribution, draws), draws, legal)
    # 0 log 0 = 0, also in the gradient.
    entropy = -row_sum(q * torch.where(q > 0, q, 1.0).log(), legal.rows, states)
    true_entropy = torch.autograd.grad(entropy.sum(), leaf, retain_graph=True)[0].double()
    true_policy = torch.autograd.grad((q * advantages).sum(), leaf)[0].double()
    q, entropy = q.detach(), entropy.detach()

    log_prob, log_prob_grad, told, told_grad = each_draw(head, hidden, entities, legal, draws)
    prob, accepted = log_prob.exp(), draws.position >= 0
    # Of each draw, what is played in its place: itself, unused slots ignored, or any of the list.
    lists = legal.counts
    of_played = torch.where(
        accepted,
        advantages[draws.position],
        (row_sum(advantages, legal.rows, states) / lists)[draws.rows],
    )
    of_played_squared = torch.where(
        accepted,
        advantages[draws.position].square(),
        (row_sum(advantages.square(), legal.rows, states) / lists)[draws.rows],
    )
    norm = log_prob_grad.square().sum(1)

    mean_told = row_sum(prob * told, draws.rows, states)
    sums = {
        "entropy": entropy.sum().item(),
        "entropy bias": (mean_told - entropy).sum().item(),
        "entropy variance": (prob * (told - mean_told[draws.rows]).square()).sum().item(),
        "not listed": (prob * ~draws.listed).sum().item(),
        "illegal": (prob * ~accepted).sum().item(),
    }
    # The same draws, by the tuple that is played: each legal one with probability q. It stands at
    # the draw that is itself that tuple, not at others of which it is played.
    in_list = torch.zeros_like(draws.rows, dtype=torch.float64)
    in_list[draws.listed] = q[draws.position[draws.listed]]
    for name, true, weight, second, grad in (
        (
            "entropy gradient",
            true_entropy,
            prob,
            (prob * told_grad.square().sum(1)).sum(),
            told_grad,
        ),
        (
            "policy gradient",
            true_policy,
            prob * of_played,
            (prob * of_played_squared * norm).sum(),
            log_prob_grad,
        ),
        (
            "policy gradient of the played",
            true_policy,
            in_list * of_played,
            (in_list * of_played_squared * norm).sum(),
            log_prob_grad,
        ),
    ):
        mean = row_sum(weight.unsqueeze(1) * grad, draws.rows, states)
        sums[f"{name} true^2"] = true.square().sum().item()
        sums[f"{name} mean^2"] = mean.square().sum().item()
        sums[f"{name} off^2"] = (mean - true).square().sum().item()
        sums[f"{name} product"] = (mean * true).sum().item()
        sums[f"{name} second"] = second.item()
    mass = row_sum(prob * draws.listed, draws.rows, states)
    return sums, (mass - 1).abs().amax().item()


# What can be drawn, and what is played.


def drawable(distribution: Any, legal: fp.LegalActions, spec: fp.ActionSpec) -> Draws:
    """Every tuple that can be drawn: of independent heads all combinations of unmasked values."""
    if not isinstance(distribution, IndependentHeads):
        position = torch.arange(len(legal.rows))
        return Draws(legal.rows, legal.actions, position, torch.ones_like(position).bool())
    sizes = [head.shape[1] for head in distribution.heads]
    step = int(np.prod(sizes))
    masks = distribution.masks.split(sizes, dim=1)
    keys = []
    for row in range(len(legal)):
        values = [mask[row].nonzero().squeeze(1) for mask in masks]
        product = torch.cartesian_prod(*values).view(-1, len(sizes))
        keys.append(row * step + number(product, sizes))
    listed = legal.rows * step + number(legal.actions, sizes)
    every = torch.cat([*keys, listed]).unique()  # also the legal tuples that cannot be drawn
    rows, within = every // step, every % step
    actions = torch.as_tensor(np.stack(np.unravel_index(within.numpy(), sizes), axis=1))
    plays = rows * step + number(ignore_unused(spec, actions), sizes)
    ascending, order = listed.sort()
    at = torch.searchsorted(ascending, plays).clamp(max=len(listed) - 1)
    accepted = ascending[at] == plays
    return Draws(rows, actions, torch.where(accepted, order[at], -1), accepted & (plays == every))


def number(actions: Tensor, sizes: list[int]) -> Tensor:
    """(M, H) -> (M,): tuples numbered, the last value running fastest."""
    return torch.as_tensor(np.ravel_multi_index(tuple(actions.numpy().T), sizes))


def log_probs(distribution: Any, draws: Draws) -> Tensor:
    """(M,) float64 with a graph: the log-probability of each of them, from one row a state."""
    if isinstance(distribution, IndependentHeads):
        total = torch.zeros(len(draws.rows), dtype=torch.float64)
        for slot, head in enumerate(distribution.heads):
            total = total + head[draws.rows, draws.actions[:, slot]].double()
        return total
    if isinstance(distribution, fp.LegalAutoregressive):
        distribution = distribution.enumerated()
    return distribution.logits.double()


def played(log_prob: Tensor, draws: Draws, legal: fp.LegalActions) -> Tensor:
    """(N,) q: the probability that each legal tuple is played."""
    prob, accepted = log_prob.exp(), draws.position >= 0
    illegal = row_sum(prob * ~accepted, draws.rows, len(legal))
    spread = (illegal / legal.counts)[legal.rows]
    return spread.index_add(0, draws.position[accepted], prob[accepted])


def each_draw(
    head: nn.Module,
    hidden: Tensor,
    entities: Mapping[str, Tensor],
    legal: fp.LegalActions,
    draws: Draws,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the trainer has of each draw, as it asks for it: a state stands once for each tuple.

    Returns:
        log_prob (M,), its gradient (M, D), the entropy reported (M,), its gradient (M, D); float64.
    """
    leaf = hidden.index_select(0, draws.rows).detach().requires_grad_()
    things = {name: one.index_select(0, draws.rows) for name, one in entities.items()}
    distribution = head(leaf, things, repeated(legal, draws.rows))
    log_prob = distribution.log_prob(draws.actions)
    if isinstance(distribution, fp.LegalAutoregressive) and getattr(head, "path_entropy", False):
        entropy = distribution.path_entropy(draws.actions)
    else:
        entropy = distribution.entropy()
    log_prob_grad = torch.autograd.grad(log_prob.sum(), leaf, retain_graph=True)[0]
    entropy_grad = torch.autograd.grad(entropy.sum(), leaf)[0]
    log_prob, entropy = log_prob.detach(), entropy.detach()
    return log_prob.double(), log_prob_grad.double(), entropy.double(), entropy_grad.double()


def positions(legal: fp.LegalActions, rows: Tensor) -> Tensor:
    """Where the lists of ``rows`` (M,), one after the other, stand in the packed list."""
    counts = legal.counts[rows]
    ends = counts.cumsum(0)
    place = torch.arange(int(ends[-1])) - (ends - counts).repeat_interleave(counts)
    return legal.starts[rows].repeat_interleave(counts) + place


def repeated(legal: fp.LegalActions, rows: Tensor) -> fp.LegalActions:
    """The lists of ``rows`` (M,), in that order, any of them more than once."""
    return fp.LegalActions.trusted(
        legal.actions[positions(legal, rows)], legal.counts[rows], legal.noop, distinct=True
    )


def row_sum(values: Tensor, rows: Tensor, states: int) -> Tensor:
    """(M, ...) -> (states, ...): the sum over each state's."""
    return values.new_zeros(states, *values.shape[1:]).index_add(0, rows, values)


# Policies that are surer.


def sharpened(
    head: nn.Module,
    hidden: Tensor,
    entities: Mapping[str, Tensor],
    legal: fp.LegalActions,
    spec: fp.ActionSpec,
) -> tuple[nn.Module, float]:
    """A copy whose last layer is multiplied so that what it plays has half the uniform entropy.

    Where no factor gets there, since what replaces illegal draws is uniform, the one at which what
    it draws has half the entropy that it has at first.

    Returns:
        The copy and the factor.
    """

    @torch.no_grad()
    def entropy_played(factor: float) -> float:
        distribution = scaled(head, factor)(hidden, entities, legal)
        draws = drawable(distribution, legal, spec)
        q = played(log_probs(distribution, draws), draws, legal)
        return -(q * torch.where(q > 0, q, 1.0).log()).sum().item() / len(legal)

    @torch.no_grad()
    def entropy_drawn(factor: float) -> float:
        return scaled(head, factor)(hidden, entities, legal).entropy().mean().item()

    uniform = legal.counts.double().log().mean().item()
    factor = factor_for(entropy_played, SHARPENED * uniform)
    if factor is None:
        factor = factor_for(entropy_drawn, SHARPENED * entropy_drawn(1.0)) or LARGEST_FACTOR
    return scaled(head, factor), factor


def factor_for(entropy: Callable[[float], float], goal: float) -> float | None:
    """The factor at which an entropy falls to the goal, by bisection; None if none is found."""
    low, high = 1.0, 2.0
    while entropy(high) > goal:
        low, high = high, 2 * high
        if high > LARGEST_FACTOR:
            return None
    for _ in range(12):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy(middle) > goal else (low, middle)
    return high


def scaled(head: nn.Module, factor: float) -> nn.Module:
    """A copy whose logits are multiplied by ``factor``."""
    copied = copy.deepcopy(head)
    with torch.no_grad():
        for parameter in last_layer(copied):
            parameter.mul_(factor)
    return copied


def last_layer(head: nn.Module) -> list[nn.Parameter]:
    """The parameters in which each logit of a head is linear.

    Raises:
        TypeError: a head of another kind than those of baselines.HEADS.
    """
    if isinstance(head, fp.FlatHead):
        return [head.scorer.readout, head.scorer.readout_of_state]
    if isinstance(head, MasksPerHead | FixedHead):
        return [head.net[2].weight, head.net[2].bias]
    if isinstance(head, fp.AutoregressiveHead):
        return [parameter for name, parameter in head.named_parameters() if "keys" in name]
    raise TypeError(
        f"head is {type(head).__name__}, which has no known last layer; say here which it is"
    )


# What is said of it.


def report(results: dict[str, Any]) -> str:
    """Markdown: what was measured, and a table each for entropy and policy gradient, by kind."""
    exact, mean = results["uniform entropy"], results["mean legal"]
    several = results["policies"] > 1
    body = (
        f"On {results['states']} states of Essence Wars (random legal play, {mean:.1f} legal "
        f"tuples a state), every tuple that can be drawn enumerated, so that means and variances "
        f"over draws are exact up to float32. Uniform play has an entropy of {exact:.2f} nats; "
        f"sharpened policies have their last layer multiplied until what they play has "
        f"{SHARPENED:.0%} of that (or, where uniform replacements keep it above, until what they "
        f"draw has {SHARPENED:.0%} of its first entropy). The truth is that of what is played: "
        "what stands in a slot that the primary does not use is ignored, as engines do, and a "
        "tuple that is illegal even so is replaced by a legal one drawn uniformly. Gradients are "
        "with respect to the encoder's hidden, relative to the norm of the true one over all "
        "states (variance: to its square, for one draw a state); near uniform play the gradient "
        "of the entropy is itself close to 0, and what is relative to it says little. Advantages "
        "are made up: standard normal, with mean 0 over each list."
    )
    if several:
        body += f" Figures are means over {results['policies']} policies (least to most)."
    body += "\n"
    for kind in KINDS:
        entropy_rows, policy_rows = [], []
        for name, of_kind in results["heads"].items():
            policies = of_kind[kind]

            def cell(key: str, form: str, policies: list[Figures] = policies) -> str:
                return _cell([figures[key] for figures in policies], form)

            entropy_rows.append(
                [
                    name,
                    cell("not listed share", "%"),
                    cell("illegal share", "%"),
                    cell("entropy", ".2f"),
                    cell("entropy bias", "+.3f"),
                    cell("entropy sd", ".3f"),
                    cell("entropy gradient bias", ".3f"),
                    cell("entropy gradient cosine", ".3f"),
                    cell("entropy gradient variance", ".3f"),
                ]
            )
            variants = [("drawn", "policy gradient")]
            if any(figures["not listed share"] > 0 for figures in policies):
                variants.append(("played", "policy gradient of the played"))
            for stored, key in variants:
                policy_rows.append(
                    [
                        name,
                        stored,
                        cell(f"{key} bias", ".3f"),
                        cell(f"{key} cosine", ".3f"),
                        cell(f"{key} variance", ".2f"),
                    ]
                )
        body += f"\nEntropy, {kind}:\n\n" + table(
            [
                "head",
                "not listed as drawn",
                "illegal, unused slots ignored",
                "entropy of what is played, nats",
                "bias of the entropy reported",
                "sd over draws",
                "gradient: bias",
                "cosine",
                "variance",
            ],
            entropy_rows,
        )
        body += f"\nPolicy gradient, {kind}:\n\n" + table(
            ["head", "tuple stored", "bias", "cosine", "variance"], policy_rows
        )
    off = max(
        figures["mass off by"]
        for name in fp.HEADS
        for policies in results["heads"][name].values()
        for figures in policies
    )
    body += (
        f"\nOver a legal list, exp(log_prob) of the flat and the autoregressive head sums to 1 "
        f"within {off:.1g}.\n"
    )
    return body


def _cell(values: list[float], form: str) -> str:
    """The mean, and the range where there is one to tell."""

    def say(value: float) -> str:
        text = f"{value:.1%}" if form == "%" else f"{value:{form}}"
        if abs(value) >= 100:
            text = f"{value:.0f}"
        zero = not any(digit in text for digit in "123456789")
        return text.lstrip("+-") if zero else text.replace("-", "−")

    mean, low, high = say(sum(values) / len(values)), say(min(values)), say(max(values))
    return mean if low == high else f"{mean} ({low} to {high})"


def draw(results: dict[str, Any], path: Path) -> None:
    """A picture (PNG): four figures of each head, as it starts and sharpened.

    Args:
        results: as measure gives them.
        path: of the picture; written whole.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    names = list(results["heads"])
    panels = [
        ("Entropy reported less\nentropy played (nats)", "entropy bias", None),
        ("Gradient of the entropy:\nbias / norm of the true", "entropy gradient bias", None),
        (
            "Policy gradient:\nbias / norm of the true",
            "policy gradient bias",
            "policy gradient of the played bias",
        ),
        (
            "Policy gradient: variance\n/ squared norm of the true",
            "policy gradient variance",
            "policy gradient of the played variance",
        ),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 3.9), sharey=True)
    for axis, (title, key, other) in zip(axes, panels, strict=True):
        for place, name in enumerate(names):
            for kind, shift in zip(KINDS, (-0.17, 0.17), strict=True):
                policies = results["heads"][name][kind]
                replaced = any(figures["not listed share"] > 0 for figures in policies)
                for measured, marker in ((key, "o"), (other, "s")):
                    if measured is None or (marker == "s" and not replaced):
                        continue
                    value = sum(figures[measured] for figures in policies) / len(policies)
                    axis.plot(
                        [value],
                        [place + shift],
                        marker=marker,
                        markersize=8,
                        color=COLOURS[name],
                        markerfacecolor=COLOURS[name] if kind == KINDS[1] else "white",
                        markeredgewidth=1.8,
                        clip_on=False,
                        zorder=3,
                    )
        axis.set_title(title, fontsize=10)
        axis.axvline(0, color="#888888", linewidth=1)
        axis.grid(axis="x", color="#dddddd")
        axis.grid(axis="y", color="#f0f0f0")
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(names)), names)
    for label, name in zip(axes[0].get_yticklabels(), names, strict=True):
        label.set_color(COLOURS[name])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    # Near 0 linear: one head's bias is many times that of the others.
    axes[1].set_xscale("symlog", linthresh=1.0, linscale=1.0)
    axes[1].set_xticks([0, 1, 2, 5, 10, 20], ["0", "1", "2", "5", "10", "20"])
    axes[1].set_xlim(left=-0.3)
    axes[3].set_xscale("log")
    # Else each of 2, 3, 4, ... is written as a power, one over the other, where a decade is wide.
    axes[3].xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[3].xaxis.set_major_formatter("{x:g}")
    axes[3].xaxis.set_minor_locator(NullLocator())
    figure.legend(
        handles=[
            Line2D([], [], marker=marker, color="#333333", markerfacecolor=face, linestyle="")
            for marker, face in (("o", "white"), ("o", "#333333"), ("s", "#333333"))
        ],
        labels=[*KINDS, "square: the tuple played is stored, not the one drawn"],
        loc="lower center",
        ncols=3,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=150, format="png")
    pyplot.close(figure)
    part.replace(path)
