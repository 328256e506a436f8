"""Faults of a policy's actions and numbers; `audit_policy` looks for them."""

from tcg_flatpolicy.verify.checks import Fault


class NotListed(Fault):
    """A drawn action is not in the list.

    Why: the engine refuses or replaces it; the log-prob is of what was drawn, not of what was
    played.

    Example: each head is masked by itself, and the combination is not legal.

    Fix: draw from one distribution over the listed tuples.
    """

    code = "P01"


class MaskOfAnotherPrimary(Fault):
    """Masks of another primary than the one played.

    Why: illegal actions whenever the draw is not the mode; they fade as the policy becomes
    sure, wrongly so.

    Example: the later heads are masked for the most probable primary while the drawn one is
    played.

    Fix: mask the later heads for the drawn primary, or score whole tuples.
    """

    code = "P02"


class NoopInPlace(Fault):
    """The no-op is played in place of a draw.

    Why: the no-op's share grows while its log-prob says nothing of it.

    Example: masked logits are -1e9; where all are masked the softmax is uniform, and what comes
    out is caught and replaced by the no-op.

    Fix: never mask with a large negative number; an empty list is a row of its own kind.
    """

    code = "P03"


class AnotherLogProb(Fault):
    """The log-prob is not that of the distribution drawn from.

    Why: the importance ratio is off 1 before any update; clipping hides it.

    Example: the temperature divides the logits in the rollout, and not in the update.

    Fix: make exploration part of the distribution: policy.explore.
    """

    code = "P04"


class AnotherReplay(Fault):
    """A stored action has another log-prob when it is replayed.

    Why: the importance ratio is off 1 before any update.

    Example: dropout, batch norm, running statistics that change in every forward, or state that
    the observation does not hold.

    Fix: let the policy depend on the observation and the weights alone; replace batch norm and
    running statistics by layer norm or fp.encoders.RunningNorm, and leave dropout out.
    """

    code = "P05"


class NotNormalised(Fault):
    """Probabilities of the listed actions do not sum to 1.

    Why: log-probs too low; the policy gradient pushes mass from nowhere.

    Example: mass on tuples that are not listed, or half precision.

    Fix: normalise over the list, in float32.
    """

    code = "P06"


class AnotherEntropy(Fault):
    """The entropy is not that of the distribution.

    Why: the entropy bonus pulls towards something else than variety.

    Example: entropies of heads are added up, as if they were drawn independently.

    Fix: take the entropy over the listed tuples.
    """

    code = "P07"


class OrderMatters(Fault):
    """The order or the padding of the list matters.

    Why: the same state is valued in different ways; learning is slow.

    Example: the network reads the list as a fixed vector, padding included.

    Fix: embed each tuple by what it means, not by where it is listed.
    """

    code = "P08"


class AnotherDraw(Fault):
    """A draw is not distributed as its log-probs say.

    Why: frequent actions are rarer than they should be, or the other way round.

    Example: sampling uses other logits than log_prob, or a running sum in float32 over a batch.

    Fix: draw from the distribution whose log-prob is returned.
    """

    code = "P09"


class OneAction(Fault):
    """All mass is on one action in most states.

    Why: entropy near 0 early on, and a win rate that stays where it is.

    Example: a learning rate too high, or scores that grow without bound.

    Fix: lower the learning rate, raise the entropy's weight, normalise observations.
    """

    code = "P20"


class AlwaysNoop(Fault):
    """The no-op is drawn almost whenever it is legal.

    Why: short turns, a low win rate.

    Example: ending the turn ends the punishment for illegal or bad actions.

    Fix: look at the rewards, and whether the other actions' embeddings get gradients.
    """

    code = "P21"


class NeverDrawn(Fault):
    """A primary that is legal often is never drawn.

    Why: a part of the game is never explored.

    Example: its slots' embeddings are those of another primary, or its logit was initialised
    low.

    Fix: compare its score with the others'; raise exploration for a while.
    """

    code = "P22"
