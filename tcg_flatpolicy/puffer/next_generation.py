"""A policy for the torch trainer of PufferLib's next generation, ``pufferlib.torch_pufferl``.

Written from pufferlib/torch_pufferl.py of PufferAI/PufferLib at commit
0eed1d6d6b1e7bdf996ab896e09fdadbfc130acd. Its ``sample_logits`` asks of a Normal what that of 3.0
asks, so LegalNormal serves both. What differs is how a policy is called: it makes its own initial
state, takes and returns it as a tuple in the rollout, always gets whole segments in the update, and
its actions are stored and sent as float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcg_flatpolicy.puffer.face import LegalNormal
from tcg_flatpolicy.puffer.policy import Policy

FLOAT32_EXACT = 2**24
"""Up to here float32 holds every whole number."""


class NextGenerationPolicy(nn.Module):
    """Any Policy as ``pufferlib.torch_pufferl.PuffeRL(args, vec, policy)`` calls one.

    Each of its rollouts starts from a zero state, and so does each segment of an update, so the
    importance ratio starts at 1 for a recurrent policy too, whatever the sizes.

    Args:
        policy: a Policy, FlatPolicy or RecurrentPolicy. That trainer's environments have no Python
            object to bring spec and layout: pass both to the policy. Its observations are uint8 or
            float32; the layout's dtype must be what their rows hold.

    Raises:
        TypeError: it is none of those.
        ValueError: an action slot has more values than float32 can tell apart.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        if not isinstance(policy, Policy):
            raise TypeError(
                "NextGenerationPolicy takes a Policy, FlatPolicy or RecurrentPolicy, got a "
                f"{type(policy).__name__}"
            )
        for slot, size in enumerate(policy.spec.nvec.tolist()):
            if size - 1 > FLOAT32_EXACT:
                raise ValueError(
                    f"slot {slot} of the spec has values up to {size - 1}, but this trainer stores "
                    f"actions in float32, which is exact up to {FLOAT32_EXACT}: split it in two"
                )
        self.policy = policy
        self.hidden_size = policy.hidden_size

    def initial_state(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, ...]:
        """The state before the first step: (h, c), each (batch_size, D) float32 zeros; or ()."""
        shape, parts = (batch_size, self.hidden_size), 2 if self.policy.recurrent else 0
        return tuple(torch.zeros(shape, device=device) for _ in range(parts))

    def forward_eval(
        self, observations: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[LegalNormal, Tensor, tuple[Tensor, ...]]:
        """One step: a LegalNormal of B rows, values (B, 1), and the state after it.

        Observations are (B, columns) uint8 or float32, as LegalLayout.read takes them; state is
        what initial_state or the step before returned. A broken legal list, or a state of another
        size, raises a ValueError.
        """
        carried = dict(zip(("lstm_h", "lstm_c"), state, strict=self.policy.recurrent))
        face, value = self.policy.forward_eval(observations, carried)
        return face, value, tuple(carried.values())

    def forward(self, observations: Tensor) -> tuple[LegalNormal, Tensor]:
        """The update: whole segments (S, T, columns), each from a zero state.

        Gives a LegalNormal of S * T rows, and values (S, T). Another number of dimensions, or a
        broken legal list, raises a ValueError.
        """
        if observations.ndim != 3:
            raise ValueError(
                "observations must be (segments, horizon, columns), got "
                f"{tuple(observations.shape)}"
            )
        decided: tuple[LegalNormal, Tensor] = self.policy(observations)
        return decided
