"""What this library relies on in PufferLib, asked of the one that is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tcg_flatpolicy.distribution import LegalCategorical
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.puffer.face import LegalNormal


def compensated(config: Mapping[str, Any], share: float = 0.5) -> dict[str, Any]:
    """A trainer's config for an environment in which some rows have empty lists.

    The trainer's loss is a mean over all rows, and the policy's part of it has a gradient in those
    with a list only. So this gives the value loss and the clip of the gradient's norm the size that
    they have without the others: ``vf_coef`` and ``max_grad_norm`` times ``share``. ``ent_coef``
    stays, since the entropy shrinks as the policy gradient does.

    Args:
        config: of PuffeRL; it is not changed.
        share: of rows with a list, half with two players; a ValueError if not above 0 and at most
            1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    return {**config, **{name: config[name] * share for name in ("vf_coef", "max_grad_norm")}}


def check_contract() -> None:
    """Asks the installed PufferLib whether it still treats a Normal as this library relies on.

    An ImportError says that there is none; a RuntimeError what differs, and which versions work.
    """
    try:
        from pufferlib.pytorch import sample_logits
    except ImportError as error:
        raise ImportError(MISSING_PUFFERLIB) from error
    try:
        wrong = _departure(sample_logits)
    except Exception as error:
        wrong = f"sample_logits raised {type(error).__name__}: {error}"
    if wrong is not None:
        raise RuntimeError(
            "the installed PufferLib does not treat a Normal as tcg_flatpolicy relies on: "
            f"{wrong}. Known to work: pufferlib 3.0.0 and pufferlib-core 3.0.23"
        )


def _departure(sample_logits: Any) -> str | None:
    """How this sample_logits departs from what LegalNormal needs, in words; None if it does not."""
    legal = LegalActions.from_lists([[(1, 2), (3, 0)], [(0, 5)], []])
    categorical = LegalCategorical(legal, torch.tensor([0.3, -0.2, 0.1]))
    face = LegalNormal(categorical)
    actions, log_probs, entropy = sample_logits(face)
    again, log_probs_again, _ = sample_logits(face, action=actions)
    if not legal.contains(actions).all() or not torch.equal(again, actions):
        return f"sample_logits changed the drawn tuples: {actions.tolist()}"
    if not torch.equal(log_probs, categorical.log_prob(actions)):
        return f"sample_logits changed the log-probs: {log_probs.tolist()}"
    if not torch.equal(log_probs_again, log_probs):
        return "sample_logits gives another log-prob for the same tuples"
    if not torch.equal(entropy, categorical.entropy()):
        return f"sample_logits changed the entropy: {entropy.tolist()}"
    return None


MISSING_PUFFERLIB = (
    "PufferLib is not installed. Install it the way your project does (a fork is fine), or, from a "
    "checkout of this library: pip install '.[puffer]' 'setuptools>=77' wheel, then "
    "PUFFERLIB_DISABLE_CUDA=1 pip install --no-deps --no-build-isolation "
    "--no-binary pufferlib-core pufferlib-core==3.0.23 (without the variable where there is a GPU)"
)
