"""Observations normalised by statistics that stand still between a rollout and its update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tcg_flatpolicy.operators import wide


class RunningNorm(nn.Module):
    """Numbers less their mean, divided by their deviation, over all rollouts so far.

    Statistics are gathered in rollouts (forwards in train mode without gradients) and put in force
    at the first such forward after an update (one in train mode with gradients). So they stand
    still between a rollout and its update, and the importance ratio starts at 1. Before the first
    update the numbers pass as they are. NaN and numbers of 1e100 or more, inf among them, are left
    out of the statistics; inf comes out as clip, and NaN as NaN, of which the policy raises when it
    draws. Under torch.distributed the statistics are those of all processes, which must then begin
    their rollouts together.

    Args:
        size: F; below 1 raises a ValueError.
        clip: the result lies within -clip and clip.
        eps: added to the variance.
    """

    mean: Tensor
    scale: Tensor
    totals: Tensor
    gathered: Tensor
    due: Tensor

    def __init__(self, size: int, clip: float = 10.0, eps: float = 1e-5) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size, self.clip, self.eps = size, clip, eps
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(size, dtype=torch.float64))
        # Count, mean and sum of squared deviations, in force and gathered since then.
        self.register_buffer("totals", torch.zeros(3, size, dtype=torch.float64))
        self.register_buffer("gathered", torch.zeros(3, size, dtype=torch.float64))
        self.register_buffer("due", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """(..., F) floats -> (..., F), in their dtype; another F raises a ValueError."""
        if x.shape[-1] != self.size:
            raise ValueError(f"x must be (..., {self.size}), got {tuple(x.shape)}")
        if self.training and torch.is_grad_enabled():
            self.due.fill_(True)
        elif self.training:
            if self.due:
                self._put_in_force()
            numbers = x.detach().reshape(-1, self.size).double()
            known = numbers.abs() < 1e100
            rows = torch.stack([known.double(), numbers.where(known, 0), 0 * known.double()], 1)
            self.gathered.copy_(_together(torch.cat([self.gathered.unsqueeze(0), rows])))
        shifted = (wide(x) - self.mean) * self.scale
        return shifted.clamp(-self.clip, self.clip).to(x.dtype)

    def _put_in_force(self) -> None:
        parts = [self.gathered]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [torch.empty_like(part) for part in parts * torch.distributed.get_world_size()]
            torch.distributed.all_gather(parts, self.gathered)
        self.totals.copy_(_together(torch.stack([self.totals, *parts])))
        count, mean, squares = self.totals
        self.mean.copy_(mean)
        self.scale.copy_((squares / count + self.eps).rsqrt().where(count > 0, 1))
        self.gathered.zero_()
        self.due.fill_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningNorm:
        """Statistics keep their float64, whatever dtype the weights are cast to."""

        def only_moved(values: Tensor) -> Tensor:
            return fn(values) if values.is_meta else values.to(fn(values).device)

        super()._apply(only_moved, recurse)  # type: ignore[no-untyped-call]
        return self


def _together(parts: Tensor) -> Tensor:
    """Statistics (P, 3, F) of parts -> (3, F) of all together, after Chan et al. (1983)."""
    counts, means, squares = parts.unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp(min=1)
    return torch.stack([count, mean, (squares + counts * (means - mean) ** 2).sum(0)])
