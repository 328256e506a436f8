"""One LSTM layer over whole segments, as one operator of a compiled graph.

torch.compile refuses nn.LSTM, and taken apart it is unrolled step by step, which takes minutes to
compile. Shapes: T steps (horizon), S segments, I inputs, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lstm(inputs: Tensor, weights: list[Tensor]) -> Tensor:
    """What nn.LSTM(I, D) gives from a zero state; the formulas are those of its documentation.

    Args:
        inputs: (T, S, I) floats.
        weights: weight_ih (4 D, I), weight_hh (4 D, D), bias_ih and bias_hh (4 D,), of one dtype
            with the inputs.

    Returns:
        (T, S, D) the hidden state after each step.
    """
    output: Tensor = _forward_op(inputs, *weights)[0]
    return output


def _forward(
    inputs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and cells (T, S, D), and what the gates let through (T, S, 4 D)."""
    gates = inputs @ weight_ih.t() + (bias_ih + bias_hh)
    size = weight_hh.shape[1]
    outputs = inputs.new_empty(*inputs.shape[:2], size)
    cells = torch.empty_like(outputs)
    hidden = cell = inputs.new_zeros(outputs.shape[1:])
    for step, of_step in enumerate(gates):
        of_step.addmm_(hidden, weight_hh.t())
        of_step[:, : 2 * size].sigmoid_()
        of_step[:, 2 * size : 3 * size].tanh_()
        of_step[:, 3 * size :].sigmoid_()
        enter, keep, new, leave = of_step.chunk(4, dim=1)
        cell = torch.addcmul(keep * cell, enter, new, out=cells[step])
        hidden = torch.mul(leave, cell.tanh(), out=outputs[step])
    return outputs, cells, gates


def _backward(
    grad: Tensor,
    inputs: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    outputs: Tensor,
    cells: Tensor,
    gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of inputs, weight_ih, weight_hh and either bias, backwards through time."""
    size = cells.shape[2]
    enter, keep, new, leave = gates.chunk(4, dim=2)
    squashed = cells.tanh()
    before = torch.cat([torch.zeros_like(cells[:1]), cells[:-1]])
    # What each gate's gradient is times the cell's, or the last one's times the hidden state's: of
    # all steps at once, so that little is left to do step by step.
    of_gates = torch.empty_like(gates)
    of_gates[..., :size] = new * enter * (1 - enter)
    of_gates[..., size : 2 * size] = before * keep * (1 - keep)
    of_gates[..., 2 * size : 3 * size] = enter * (1 - new * new)
    of_gates[..., 3 * size :] = squashed * leave * (1 - leave)
    through = leave * (1 - squashed * squashed)
    of_hidden = of_cell = torch.zeros_like(cells[0])
    for step in reversed(range(len(gates))):
        of_hidden = of_hidden + grad[step]
        of_cell = torch.addcmul(of_cell, of_hidden, through[step])
        of_step = of_gates[step].view(-1, 4, size)
        of_step[:, :3] *= of_cell.unsqueeze(1)
        of_step[:, 3] *= of_hidden
        of_cell = of_cell * keep[step]
        of_hidden = of_gates[step] @ weight_hh
    flat = of_gates.flatten(0, 1)
    of_ih = flat.t() @ inputs.flatten(0, 1)
    of_hh = of_gates[1:].flatten(0, 1).t() @ outputs[:-1].flatten(0, 1)
    return of_gates @ weight_ih, of_ih, of_hh, flat.sum(0)


_forward_op = torch.library.custom_op(
    "tcg_flatpolicy::lstm",
    _forward,
    mutates_args=(),
    schema="(Tensor inputs, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, Tensor bias_hh)"
    " -> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "tcg_flatpolicy::lstm_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor inputs, Tensor weight_ih, Tensor weight_hh, Tensor outputs, "
    "Tensor cells, Tensor gates) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(
    inputs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    steps, segments, _ = inputs.shape
    size = weight_hh.shape[1]
    outputs = inputs.new_empty(steps, segments, size)
    return outputs, torch.empty_like(outputs), inputs.new_empty(steps, segments, 4 * size)


@_backward_op.register_fake
def _(
    grad: Tensor,
    inputs: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    outputs: Tensor,
    cells: Tensor,
    gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_inputs = inputs.new_empty(inputs.shape)
    of_bias = weight_ih.new_empty(weight_ih.shape[0])
    return of_inputs, torch.empty_like(weight_ih), torch.empty_like(weight_hh), of_bias


def _context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    given, weight_ih, weight_hh, _, _ = inputs
    ctx.save_for_backward(given, weight_ih, weight_hh, *output)


def _gradient(ctx: Any, grad: Tensor, *of_the_rest: Tensor | None) -> tuple[Tensor, ...]:
    of_inputs, of_ih, of_hh, of_bias = _backward_op(grad, *ctx.saved_tensors)
    return of_inputs, of_ih, of_hh, of_bias, of_bias


_forward_op.register_autograd(_gradient, setup_context=_context)
