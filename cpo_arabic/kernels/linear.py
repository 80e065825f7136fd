"""A linear layer, y = x·Wᵀ + b, by :mod:`.products`.

Equation, with ȳ = ∂L/∂y::

    ∂L/∂x = ȳ·W        ∂L/∂W = ȳᵀ·x        ∂L/∂b = Σ ȳ

The three products have the same number of multiply-adds, so one library computes all of them. Where
that is PyTorch's choice, so is the layer: on a GPU it adds the bias within the product, and a
function in Python would only keep the device waiting.

Shapes: T tokens, in any number of leading dimensions; I inputs; O outputs
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cpo_arabic.kernels.products import by_onednn, product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias.

    Args:
        x: (…, I).
        weight: (O, I), of the same dtype.
        bias: (O,).

    Returns:
        (…, O).
    """
    flat = x.reshape(-1, x.shape[-1])
    if not by_onednn(flat, weight.T):
        return F.linear(x, weight, bias)
    rows: Tensor = _Linear.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        y = product(x, weight.T)
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            product(grad, weight) if for_x else None,
            product(grad.T, x) if for_weight else None,
            grad.sum(0) if for_bias else None,
        )
