"""The findings' codes: what each fault is, how it shows in training, how to fix it.

Codes are stable: they may be added to, never renumbered. ``docs/findings.md`` is this table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """A kind of fault."""

    title: str
    """What is wrong, in a few words."""
    example: str
    """A bug of that kind, as it comes about."""
    shows: str
    """How it shows in training."""
    fix: str
    """What to do."""


CODES: dict[str, Code] = {
    # The environment's lists.
    "E01": Code(
        "a listed tuple is outside the spec",
        "the engine writes the hand's place 30 where the spec knows 30 places, 0 to 29; or leaves "
        "in an unused slot what another action had there",
        "an exception where ranges are checked; elsewhere an embedding of something else, or an "
        "index error deep in the network",
        "correct the spec's sizes, or the engine's numbering; write 0 in unused slots",
    ),
    "E02": Code(
        "two slots are swapped",
        "the spec says attack(ally, enemy), the engine lists (attack, enemy, ally)",
        "nothing breaks where both slots are of the same size: the policy learns from the wrong "
        "embeddings, and slowly",
        "list the slots in the order in which the spec declares them",
    ),
    "E03": Code(
        "a tuple is listed twice",
        "two ways to pay for a card give the same tuple, and both are appended",
        "a trainer that does not merge repeats draws that action twice as often, and its entropy "
        "is wrong",
        "drop repeats when the list is made, or give the second way a slot of its own",
    ),
    "E04": Code(
        "the count does not fit the list",
        "the count is taken before the end of turn is appended: the last tuple lies behind it",
        "one action is never played, or padding is played as if it were the tuple of zeros",
        "write the count last, as the length of what was written",
    ),
    "E05": Code(
        "the list is cut off at its padding",
        "more tuples are legal than the observation has room for, and the rest is dropped",
        "strong actions are missing in just the states where there is most to choose from",
        "make room for the longest list, and raise on overflow: LegalLayout.write does",
    ),
    "E06": Code(
        "a listed action is refused",
        "the list is computed from a rule that the engine applies in another way",
        "an exception, or a no-op in the action's place: the policy is credited for something "
        "that did not happen",
        "make the list by the engine's own rules; enumerate_legal helps to compare",
    ),
    "E07": Code(
        "the list is that of another state",
        "the list is written before the opponent answers and not again afterwards",
        "actions are refused, or replaced, in every turn that follows an opponent's move",
        "write the list last in step, after everything that changes the state",
    ),
    "E08": Code(
        "a legal action is not listed",
        "abilities without a target are left out of the enumeration",
        "that action is never tried; nothing else shows",
        "compare the enumeration with the engine's own: compare_enumerations",
    ),
    "E09": Code(
        "the player to move has an empty list",
        "the mask is cleared for the next state before the observation is copied",
        "every step plays the no-op: episodes of the greatest length, entropy 0",
        "fill the list before the observation is handed out; list the pass or end of turn; where "
        "nobody is to move, say so with to_move(row) on the environment",
    ),
    "E10": Code(
        "a player who is not to move has a list",
        "both players get the mover's list",
        "the waiting player's draws enter the loss as if they had been played",
        "give the player who waits an empty list: count 0",
    ),
    "E11": Code(
        "a mask per head is not the projection of the list",
        "masks are made by another function than the list, and one of them was not updated",
        "policies that use the masks act otherwise than those that use the list",
        "make the masks from the list: LegalActions.head_masks",
    ),
    "E12": Code(
        "a mask per head is empty",
        "the mask array is zeroed for reuse after it was put into the observation",
        "a masked softmax over nothing is uniform: it plays anything, or always the no-op",
        "copy the mask into the observation, and zero it before it is filled, not after",
    ),
    "E13": Code(
        "the same seed gives other lists",
        "the engine draws from a generator of its own that reset(seed) does not set",
        "runs cannot be repeated, and a bug cannot be found again",
        "seed every generator in reset(seed)",
    ),
    "E14": Code(
        "an action sent as floats is another action",
        "the trainer stores actions as float32; the engine scales 0..23 to -1..1 and back, so that "
        "1 becomes 0.9999998, and truncates that to 0",
        "now and then another action is played than the one drawn; its credit goes astray",
        "round to the nearest whole number before use, or take integers (the audit sends whole "
        "numbers, which float32 holds exactly: an engine that only truncates those is right)",
    ),
    # A policy's actions and numbers.
    "P01": Code(
        "a drawn action is not in the list",
        "each head is masked by itself, and the combination is not legal",
        "the engine refuses or replaces it; the log-prob is of what was drawn, not of what was "
        "played",
        "draw from one distribution over the listed tuples",
    ),
    "P02": Code(
        "masks of another primary than the one played",
        "the later heads are masked for the most probable primary while the drawn one is played",
        "illegal actions whenever the draw is not the mode; they fade as the policy becomes sure, "
        "wrongly so",
        "mask the later heads for the drawn primary, or score whole tuples",
    ),
    "P03": Code(
        "the no-op is played in place of a draw",
        "masked logits are -1e9; where all are masked the softmax is uniform, and what comes out "
        "is caught and replaced by the no-op",
        "the no-op's share grows while its log-prob says nothing of it",
        "never mask with a large negative number; an empty list is a row of its own kind",
    ),
    "P04": Code(
        "the log-prob is not that of the distribution drawn from",
        "the temperature divides the logits in the rollout, and not in the update",
        "the importance ratio is off 1 before any update; clipping hides it",
        "make exploration part of the distribution: policy.explore",
    ),
    "P05": Code(
        "a stored action has another log-prob when it is replayed",
        "dropout, batch norm, running statistics that change in every forward, or state that the "
        "observation does not hold",
        "the importance ratio is off 1 before any update",
        "let the policy depend on the observation and the weights alone; replace batch norm and "
        "running statistics by layer norm or fp.encoders.RunningNorm, and leave dropout out",
    ),
    "P06": Code(
        "probabilities of the listed actions do not sum to 1",
        "mass on tuples that are not listed, or half precision",
        "log-probs too low; the policy gradient pushes mass from nowhere",
        "normalise over the list, in float32",
    ),
    "P07": Code(
        "the entropy is not that of the distribution",
        "entropies of heads are added up, as if they were drawn independently",
        "the entropy bonus pulls towards something else than variety",
        "take the entropy over the listed tuples",
    ),
    "P08": Code(
        "the order or the padding of the list matters",
        "the network reads the list as a fixed vector, padding included",
        "the same state is valued in different ways; learning is slow",
        "embed each tuple by what it means, not by where it is listed",
    ),
    "P09": Code(
        "a draw is not distributed as its log-probs say",
        "sampling uses other logits than log_prob, or a running sum in float32 over a batch",
        "frequent actions are rarer than they should be, or the other way round",
        "draw from the distribution whose log-prob is returned",
    ),
    # A policy that has become degenerate; a bug, or training gone wrong.
    "P20": Code(
        "all mass is on one action in most states",
        "a learning rate too high, or scores that grow without bound",
        "entropy near 0 early on, and a win rate that stays where it is",
        "lower the learning rate, raise the entropy's weight, normalise observations",
    ),
    "P21": Code(
        "the no-op is drawn almost whenever it is legal",
        "ending the turn ends the punishment for illegal or bad actions",
        "short turns, a low win rate",
        "look at the rewards, and whether the other actions' embeddings get gradients",
    ),
    "P22": Code(
        "a primary that is legal often is never drawn",
        "its slots' embeddings are those of another primary, or its logit was initialised low",
        "a part of the game is never explored",
        "compare its score with the others'; raise exploration for a while",
    ),
    # A training run.
    "T01": Code(
        "the importance ratio is not 1 before the first update",
        "recurrent training with batch_size other than agents times horizon; exploration changed "
        "in between; dropout, batch norm, running statistics that change in every forward; weights "
        "that autocast had cast before they changed",
        "PPO's clipping works on noise; learning is slow or stalls",
        "batch_size = agents * horizon for recurrent policies; explore() before evaluate(); layer "
        "norm or fp.encoders.RunningNorm for batch norm and running statistics; no dropout; "
        "autocast without its cache",
    ),
    "T02": Code(
        "a loss or statistic is not finite",
        "a -inf log-prob of an action that the current list does not hold, times 0",
        "NaN weights from the next step on",
        "find the row; check that observations hold the list that was drawn from",
    ),
    "T03": Code(
        "a gradient or weight is not finite",
        "the gradient of a softmax over nothing, or of log 0",
        "NaN weights from the next step on",
        "let empty rows have no gradient; mask before the logarithm",
    ),
    "T04": Code(
        "a parameter gets no gradient",
        "a layer that was replaced but not removed, or a slot that is never listed",
        "that part of the network stays as it was initialised",
        "remove it, or find out why what it embeds never comes up",
    ),
    "T05": Code(
        "a reloaded checkpoint gives other log-probs",
        "exploration, running statistics or a cache are not in the state_dict",
        "an evaluation plays another policy than the one trained",
        "keep what the policy depends on as parameters or buffers",
    ),
    "T06": Code(
        "most rows have no legal action",
        "the observation is read before the list is written, or nearly all rows wait",
        "the mean entropy and the advantages are those of rows that decide nothing",
        "check the lists with audit_env; weigh the entropy for the rows that decide",
    ),
    "T07": Code(
        "an action was sent that the list shown does not hold",
        "something between policy and environment changes actions: clipping, rounding, a wrapper",
        "the engine plays another action than the one drawn",
        "send actions on as they are drawn, in the action space's dtype",
    ),
}
"""By code: E of environments, P of policies, T of training."""


def markdown() -> str:
    """The table of all codes, as in docs/findings.md."""
    lines = [
        "# Findings",
        "",
        "What `python -m tcg_flatpolicy verify` and `tcg_flatpolicy.verify` report, by code. Codes",
        "are stable. E: an environment's lists; P: a policy's actions; T: a training run.",
    ]
    for code, about in CODES.items():
        lines += [
            "",
            f"## {code}: {about.title}",
            "",
            f"- **For example**: {about.example}.",
            f"- **In training**: {about.shows}.",
            f"- **To fix**: {about.fix}.",
        ]
    return "\n".join(lines) + "\n"
