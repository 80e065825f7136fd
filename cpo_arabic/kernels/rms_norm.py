"""RMS normalisation (Zhang & Sennrich 2019, arXiv 1910.07467) as one differentiable function.

Equation, for a row x of D features::

    r = (mean(x²) + ε)^(−1/2)      x̂ = r·x      y = w ⊙ x̂
    ∂L/∂x = r·(w ⊙ g − x̂·mean(w ⊙ g ⊙ x̂))       ∂L/∂w = Σ_rows g ⊙ x̂       g = ∂L/∂y

Operator by operator, autograd keeps x̂ beside x, and forward and backward make 15 passes over
tensors of their size. Here x and one number a row are kept, and 10 passes made.

Shapes: (…, D) any number of rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpo_arabic.kernels.common import accumulation_dtype, without_autocast


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """w ⊙ x / √(mean(x²) + ε), rounded as transformers' Qwen and Llama layers round it.

    Args:
        x: (…, D), any floating dtype; computed in float32, or in float64 where x is.
        weight: (D,).
        epsilon: ε > 0.

    Returns:
        (…, D) in the common dtype of ``x`` and ``weight``.
    """
    result: Tensor = _RMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        dtype, features = accumulation_dtype(x), x.shape[-1]
        with without_autocast(x.device):
            rate = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
            rate = rate.square_().div_(features).add_(epsilon).rsqrt_()
            ctx.save_for_backward(x, weight, rate)
            normal: Tensor = (x * rate).to(x.dtype)
            # in place where the product has that dtype: one allocation less
            fits = torch.promote_types(x.dtype, weight.dtype) == x.dtype
            return normal.mul_(weight) if fits else normal * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rate = ctx.saved_tensors
        with without_autocast(x.device):
            grad, wide = grad.to(rate.dtype), weight.to(rate.dtype)
            normal = x * rate
            product = grad * normal
            for_weight = None
            if ctx.needs_input_grad[1]:
                for_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
            shrink = (product @ wide)[..., None].div_(-x.shape[-1])
            for_x = normal.mul_(shrink).addcmul_(grad, wide).mul_(rate)
        return for_x.to(x.dtype), for_weight, None
