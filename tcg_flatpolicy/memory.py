"""What a policy remembers between steps, behind one interface: nothing, or an LSTM's state.

A memory takes hidden (S, T, D), what it carried so far (None at the start) and which steps are a
game's first, where it forgets (None if unknown). It gives the hidden after remembering, (S, T, D),
and what it carries on. Shapes: S segments, T steps, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcg_flatpolicy.operators import Operator

Carried = tuple[Tensor, ...]
"""(S, D) each; () of a memory that remembers nothing."""
NAMES = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
"""Of the parameters of an LSTM, as torch.nn.LSTM has them."""


class LSTM(nn.Module):
    """One LSTM layer over steps, by the names and formulas of torch.nn.LSTM(size, size).

    Not an nn.LSTM, which torch.compile refuses to look into. A call with first steps, or in a
    compiled graph, is a single operator.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.input_size = self.hidden_size = size
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * size, size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * size, size))
        self.bias_ih_l0 = nn.Parameter(torch.zeros(4 * size))
        self.bias_hh_l0 = nn.Parameter(torch.zeros(4 * size))
        for weight in (self.weight_ih_l0, self.weight_hh_l0):
            nn.init.orthogonal_(weight, 1.0)

    @classmethod
    def of(cls, lstm: nn.LSTM) -> LSTM:
        """With the parameters of an nn.LSTM, shared.

        Raises:
            ValueError: more than one layer, two directions, a projection, no biases, or another
                input than hidden size.
        """
        if [n for n, _ in lstm.named_parameters()] != NAMES or lstm.input_size != lstm.hidden_size:
            raise ValueError(
                f"{lstm} must be one layer in one direction with biases, whose input is as wide as "
                f"its state: nn.LSTM({lstm.input_size}, {lstm.input_size})"
            )
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.input_size = made.hidden_size = lstm.hidden_size
        for name in NAMES:
            setattr(made, name, getattr(lstm, name))
        return made

    def forward(
        self, hidden: Tensor, carried: Carried | None = None, first: Tensor | None = None
    ) -> tuple[Tensor, Carried]:
        """One step or more: hidden (S, T, D) -> (S, T, D), and (h, c) after the last step.

        Args:
            carried: (h, c), each (S, D); zeros if None.
            first: (S, T) bool, where h and c are zeros before the step.
        """
        weights: list[Tensor] = [getattr(self, name) for name in NAMES]
        if carried is None:
            carried = (hidden.new_zeros(hidden.shape[0], self.hidden_size),) * 2
        in_time = hidden.transpose(0, 1)
        dtype, device = weights[0].dtype, in_time.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # Torch's own rounds a step alone otherwise than a step of several in bfloat16 on a CPU, and
        # not every CPU has it.
        exact = device != "cpu" or dtype in (torch.float32, torch.float64)
        if first is None and exact and not torch.compiler.is_compiling():
            state = [one.to(hidden.dtype).unsqueeze(0) for one in carried]
            options = True, 1, 0.0, self.training, False, False
            output, h, c = torch.lstm(in_time, state, weights, *options)
            return output.transpose(0, 1), (h.squeeze(0), c.squeeze(0))
        floats = [one.to(dtype) for one in (in_time, *carried, *weights)]
        keep = torch.ones_like(in_time[..., :1]) if first is None else ~first.t().unsqueeze(2)
        both = _lstm(floats, [keep.to(dtype)])[0]  # (T, S, 2 D)
        h, c = both[-1].chunk(2, dim=1)
        return both[..., : self.hidden_size].transpose(0, 1), (h, c)


# Floats: inputs (T, S, D), h and c (S, D), weight_ih and weight_hh (4 D, D), bias_ih and bias_hh
# (4 D,). Others: keep (T, S, 1), 0 where h and c are zeros before the step and else 1. Result:
# (T, S, 2 D), h and c after each step; and the gates (T, S, 4 D), after their functions.


def _forward(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    inputs, h, c, weight_ih, weight_hh, bias_ih, bias_hh = floats
    gates = inputs @ weight_ih.t() + (bias_ih + bias_hh)
    size = weight_hh.shape[1]
    both = inputs.new_empty(*inputs.shape[:2], 2 * size)
    for step, (of_step, keep) in enumerate(zip(gates, others[0], strict=True)):
        of_step.addmm_(h * keep, weight_hh.t())
        of_step[:, : 2 * size].sigmoid_()
        of_step[:, 2 * size : 3 * size].tanh_()
        of_step[:, 3 * size :].sigmoid_()
        enter, stay, new, leave = of_step.chunk(4, dim=1)
        c = torch.addcmul(stay * (c * keep), enter, new)
        h = leave * c.tanh()
        both[step, :, :size], both[step, :, size:] = h, c
    return [both, gates]


def _backward(
    grad: Tensor, floats: list[Tensor], others: list[Tensor], sizes: list[int], saved: list[Tensor]
) -> list[Tensor]:
    inputs, h, c, weight_ih, weight_hh, _, _ = floats
    (keep,), (both, gates) = others, saved
    size = weight_hh.shape[1]
    outputs, cells = both.chunk(2, dim=2)
    enter, stay, new, leave = gates.chunk(4, dim=2)
    squashed = cells.tanh()
    before = torch.cat([c.unsqueeze(0), cells[:-1]]) * keep
    # What each gate's gradient is times the cell's, or the last one's times the hidden state's: of
    # all steps at once, so that little is left to do step by step.
    of_gates = torch.empty_like(gates)
    of_gates[..., :size] = new * enter * (1 - enter)
    of_gates[..., size : 2 * size] = before * stay * (1 - stay)
    of_gates[..., 2 * size : 3 * size] = enter * (1 - new * new)
    of_gates[..., 3 * size :] = squashed * leave * (1 - leave)
    through = leave * (1 - squashed * squashed)
    of_h = of_c = torch.zeros_like(h)
    for step in reversed(range(len(gates))):
        of_h = of_h + grad[step, :, :size]
        of_c = torch.addcmul(of_c + grad[step, :, size:], of_h, through[step])
        of_step = of_gates[step].view(-1, 4, size)
        of_step[:, :3] *= of_c.unsqueeze(1)
        of_step[:, 3] *= of_h
        of_c = of_c * stay[step] * keep[step]
        of_h = of_gates[step] @ weight_hh * keep[step]
    flat = of_gates.flatten(0, 1)
    entered = (torch.cat([h.unsqueeze(0), outputs[:-1]]) * keep).flatten(0, 1)
    of_bias = flat.sum(0)
    of_weights = flat.t() @ inputs.flatten(0, 1), flat.t() @ entered
    return [of_gates @ weight_ih, of_h, of_c, *of_weights, of_bias, of_bias.clone()]


def _fake(floats: list[Tensor], others: list[Tensor], sizes: list[int]) -> list[Tensor]:
    shape, size = floats[0].shape[:2], floats[1].shape[1]
    return [floats[0].new_empty(*shape, 2 * size), floats[0].new_empty(*shape, 4 * size)]


_lstm = Operator("lstm", _forward, _backward, _fake)
