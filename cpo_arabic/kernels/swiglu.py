"""The gated activation of an MLP (Shazeer 2020, arXiv 2002.05202) as one differentiable function.

Equation, elementwise::

    y = silu(g)·u                  silu(g) = g·σ(g)
    ∂L/∂g = silu'(g)·(ȳ·u)         ∂L/∂u = ȳ·silu(g)         ȳ = ∂L/∂y

Operator by operator, autograd keeps silu(g) beside g and u: with y, which the next product keeps,
a fourth tensor of the MLP's width. Here it is computed again, in the same operations and bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, rounded as transformers' layers round it.

    Args:
        gate: any shape and floating dtype.
        up: like ``gate``.

    Returns:
        Like ``gate``.
    """
    result: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        for_up = F.silu(gate).mul_(grad)
        for_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(for_gate, gate, grad_input=for_gate)
        return for_gate, for_up
