"""Differentiable steps whose cost follows the numbers in a tensor, as one operator each.

Eagerly an operator is an autograd.Function; in a graph of torch.compile, which cannot look at those
numbers, a torch.library.custom_op, which is several times slower to call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

Forward = Callable[[list[Tensor], list[Tensor], list[int]], list[Tensor]]
Backward = Callable[[Tensor, list[Tensor], list[Tensor], list[int], list[Tensor]], list[Tensor]]


class Operator:
    """A function of tensors with a gradient of its own.

    Args:
        name: of the custom operator, in the namespace ``tcg_flatpolicy``.
        forward: (floats, others, sizes) -> the result, and what else the backward pass needs; none
            of it shares memory with an argument.
        backward: (gradient of the result, floats, others, sizes, what forward gave) -> a gradient
            for each of the floats.
        fake: (floats, others, sizes) -> tensors of the shapes and dtypes that forward gives.
    """

    def __init__(self, name: str, forward: Forward, backward: Backward, fake: Forward) -> None:
        self.forward, self.backward = forward, backward
        inputs = "Tensor[] floats, Tensor[] others, SymInt[] sizes"
        name = f"tcg_flatpolicy::{name}"
        self.op = custom_op(name, forward, mutates_args=(), schema=f"({inputs}) -> Tensor[]")
        self.op.register_fake(fake)
        with_grad = f"(Tensor grad, {inputs}, Tensor[] saved) -> Tensor[]"

        @custom_op(f"{name}_backward", mutates_args=(), schema=with_grad)
        def backward_op(grad: Tensor, *given: Any) -> list[Tensor]:
            """The gradients in memory of their own, as an operator's results must be."""
            memory = grad.untyped_storage().data_ptr()
            return [
                one.clone() if one.untyped_storage().data_ptr() == memory else one.contiguous()
                for one in backward(grad, *given)
            ]

        @backward_op.register_fake
        def _(grad: Tensor, floats: list[Tensor], *rest: Any) -> list[Tensor]:
            return [one.new_empty(one.shape) for one in floats]

        def remember(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
            floats, others, sizes = inputs
            ctx.counts, ctx.sizes = (len(floats), len(others)), sizes
            ctx.save_for_backward(*floats, *others, *output)

        def gradient(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
            floats, others, saved = _split(ctx.saved_tensors, ctx.counts)
            given = backward_op(grads[0], floats, others, ctx.sizes, saved)
            # An empty list, of whatever, is a list of no tensors to torch.
            return given, [None] * len(others), None if ctx.sizes else []

        self.op.register_autograd(gradient, setup_context=remember)

    def __call__(
        self, floats: Sequence[Tensor], others: Sequence[Tensor], sizes: Sequence[int] = ()
    ) -> Tensor:
        """The result, with gradients for the floats."""
        return self.run(floats, others, sizes)[0]

    def run(
        self, floats: Sequence[Tensor], others: Sequence[Tensor], sizes: Sequence[int] = ()
    ) -> Sequence[Tensor]:
        """The result, with gradients for the floats; and what else forward gives, without."""
        if torch.compiler.is_compiling():
            results: Sequence[Tensor] = self.op(list(floats), list(others), list(sizes))
        elif not torch.is_grad_enabled():
            results = self.forward(list(floats), list(others), list(sizes))
        else:
            results = _Eager.apply(self, len(floats), sizes, *floats, *others)  # type: ignore[no-untyped-call]
        return results


class _Eager(torch.autograd.Function):
    """In the two parts that torch.func.grad asks for."""

    @staticmethod
    def forward(
        operator: Operator, floats: int, sizes: Sequence[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(operator.forward(list(tensors[:floats]), list(tensors[floats:]), list(sizes)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operator, floats, ctx.sizes, *tensors = inputs
        ctx.counts = floats, len(tensors) - floats
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *of_saved: Tensor) -> tuple[Tensor | None, ...]:
        floats, others, saved = _split(ctx.saved_tensors, ctx.counts)
        grads = ctx.operator.backward(grad, floats, others, list(ctx.sizes), saved)
        return None, None, None, *grads, *([None] * len(others))

    @staticmethod
    def vmap(*arguments: Any) -> Any:
        raise RuntimeError(
            "a head cannot be inside torch.vmap, since its cost follows the numbers in a tensor: "
            "call it once with all rows as one batch"
        )


def _split(
    tensors: Sequence[Tensor], counts: tuple[int, int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    floats, others = counts
    end = floats + others
    return list(tensors[:floats]), list(tensors[floats:end]), list(tensors[end:])


def wide(values: Tensor) -> Tensor:
    """Floats in float32 or better: those of fewer bits as float32, others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
