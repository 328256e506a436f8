"""Faults of a training run; `audit_trainer` and `LegalityMonitor` look for them."""

from tcg_flatpolicy.verify.checks import Fault


class RatioOffOne(Fault):
    """The importance ratio is not 1 before the first update.

    Why: PPO's clipping works on noise; learning is slow or stalls.

    Example: recurrent training with batch_size other than agents times horizon; exploration
    changed in between; dropout, batch norm, running statistics that change in every forward;
    weights that autocast had cast before they changed.

    Fix: batch_size = agents * horizon for recurrent policies; explore() before evaluate();
    layer norm or fp.encoders.RunningNorm for batch norm and running statistics; no dropout;
    autocast without its cache.
    """

    code = "T01"


class LossNotFinite(Fault):
    """A loss or statistic is not finite.

    Why: NaN weights from the next step on.

    Example: a -inf log-prob of an action that the current list does not hold, times 0.

    Fix: find the row; check that observations hold the list that was drawn from.
    """

    code = "T02"


class WeightNotFinite(Fault):
    """A gradient or weight is not finite.

    Why: NaN weights from the next step on.

    Example: the gradient of a softmax over nothing, or of log 0.

    Fix: let empty rows have no gradient; mask before the logarithm.
    """

    code = "T03"


class NoGradient(Fault):
    """A parameter gets no gradient.

    Why: that part of the network stays as it was initialised.

    Example: a layer that was replaced but not removed, or a slot that is never listed.

    Fix: remove it, or find out why what it embeds never comes up.
    """

    code = "T04"


class AnotherAfterLoading(Fault):
    """A reloaded checkpoint gives other log-probs.

    Why: an evaluation plays another policy than the one trained.

    Example: exploration, running statistics or a cache are not in the state_dict.

    Fix: keep what the policy depends on as parameters or buffers.
    """

    code = "T05"


class NothingToDecide(Fault):
    """Most rows have no legal action.

    Why: the mean entropy and the advantages are those of rows that decide nothing.

    Example: the observation is read before the list is written, or nearly all rows wait.

    Fix: check the lists with audit_env; weigh the entropy for the rows that decide.
    """

    code = "T06"


class SentUnlisted(Fault):
    """An action was sent that the list shown does not hold.

    Why: the engine plays another action than the one drawn.

    Example: something between policy and environment changes actions: clipping, rounding, a
    wrapper.

    Fix: send actions on as they are drawn, in the action space's dtype.
    """

    code = "T07"
