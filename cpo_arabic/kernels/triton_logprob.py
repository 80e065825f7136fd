# ruff: noqa: N803 - Triton's compile-time constants are written in capitals
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""CUDA body of :mod:`.logprob`: the elementwise work on one tile of logits, in one launch.

Equation and references: :mod:`.logprob`. The products stay with the vendor's library, which runs
them near the device's peak; what surrounds them (cap, masking the target, running maximum and sum,
exponential, slope) is one kernel that reads a tile which the product has just left in the
second-level cache. Elementwise PyTorch would take about ten launches and as many passes over it.

Covered: tiles in float32 and float64.

Shapes: t rows and v tokens of one tile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 4096


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _absorb_kernel(
    logits, local, peak, total, decay, columns, stride, softcap,
    CAPPED: tl.constexpr, PULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: running peak and total; PULL overwrites the logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(local + row)
    old = tl.load(peak + row)
    best, mass = old, tl.load(total + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = tl.load(logits + row * stride + column, mask=inside, other=float("-inf"))
        if CAPPED:
            z = softcap * _tanh(z / softcap)
        z = tl.where(inside & (column != target), z, float("-inf"))
        raised = tl.maximum(best, tl.max(z, 0))
        mass = mass * tl.exp(best - raised) + tl.sum(tl.exp(z - raised), 0)
        best = raised
    tl.store(peak + row, best)
    tl.store(total + row, mass)
    tl.store(decay + row, tl.exp(old - best))
    if PULL:
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < columns
            at = logits + row * stride + column
            z = tl.load(at, mask=inside, other=0.0)
            slope = 1.0
            if CAPPED:
                bent = _tanh(z / softcap)
                z, slope = softcap * bent, 1.0 - bent * bent
            tl.store(at, tl.where(column != target, tl.exp(z - best) * slope, 0.0), mask=inside)


@triton.jit
def _differentiate_kernel(
    pull, out, local, factors, slopes, columns, pull_stride, out_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(pull + row * pull_stride + column, mask=inside, other=0.0)
    value *= tl.load(factors + row)
    value = tl.where(column == tl.load(local + row), -tl.load(slopes + row), value)
    tl.store(out + row * out_stride + column, value, mask=inside)


class TritonBody:
    """:class:`.logprob.Body` as two Triton kernels."""

    def absorb(
        self,
        logits: Tensor,
        local: Tensor,
        peak: Tensor,
        total: Tensor,
        *,
        softcap: float | None,
        pulling: bool,
    ) -> Tensor:
        rows, columns = logits.shape
        decay = torch.empty_like(peak)
        _absorb_kernel[(rows,)](
            logits, local, peak, total, decay, columns, logits.stride(0), softcap or 1.0,
            CAPPED=softcap is not None, PULL=pulling, BLOCK=_block(columns),
        )  # fmt: skip
        return decay

    def differentiate(
        self, pull: Tensor, local: Tensor, factor: Tensor, slope: Tensor, out: Tensor
    ) -> None:
        rows, columns = pull.shape
        block = _block(columns)
        _differentiate_kernel[(rows, triton.cdiv(columns, block))](
            pull, out, local, factor, slope, columns, pull.stride(0), out.stride(0), BLOCK=block
        )


def _block(columns: int) -> int:
    block: int = min(MAX_BLOCK, triton.next_power_of_2(columns))
    return block
