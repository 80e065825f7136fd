"""Matrix products, by the faster of the two libraries that PyTorch carries for a CPU.

PyTorch hands float32 products to MKL, which runs at full width on Intel's processors only. oneDNN,
to which it hands bfloat16, generates its loops for the processor at hand: on an AMD EPYC with
AVX-512 it takes 0.45 of MKL's time for the same float32 products, with AVX2 alone 0.87. Its
operator writes into fresh memory and takes 10 µs a call, so small products stay where they are.

It generates its loops for each shape anew and keeps them for the last 1,024 shapes, and PyTorch's
layer above it keeps them once more: half a MiB a shape, and every batch of text has lengths of its
own. Here one cache holds a step's shapes, which are 30 to 40 and in bfloat16 more; the other, none.

Shapes: (m, k) · (k, n) → (m, n)
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

CACHED_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "1"}
for _name, _shapes in CACHED_SHAPES.items():
    # read by the libraries at their first product; the user's own value stays
    os.environ.setdefault(_name, _shapes)  # noqa: TID251

WORTHWHILE = 1 << 21
"""Multiply-adds of the smallest product that oneDNN computes: it takes as long as MKL here."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """left (m, k) · right (k, n), both of one dtype and with any strides; contiguous."""
    return _onednn(left, right) if by_onednn(left, right) else torch.mm(left, right)


def multiply(left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """``out`` (+)= left · right, accumulated in ``out``'s dtype.

    A ``right`` in a lower dtype stays so, and ``left`` follows it: CUDA's bfloat16 product with
    float32 accumulation and output. The CPU has none, so its callers convert ``right`` first.
    """
    if right.dtype != out.dtype:
        lower = left.to(right.dtype)
        if not accumulate:
            torch.mm(lower, right, out_dtype=out.dtype, out=out)
            return
        fresh = torch.mm(lower, right, out_dtype=out.dtype)
    elif not by_onednn(left, right):
        out.addmm_(left, right, beta=float(accumulate))
        return
    elif _to_copy(right.T) < _to_copy(left):
        fresh = _onednn(right.T, left.T).T
    else:
        fresh = _onednn(left, right)
    if accumulate:
        out.add_(fresh)
    else:
        out.copy_(fresh)


def _onednn(left: Tensor, right: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return found


def _to_copy(left: Tensor) -> int:
    """Elements that oneDNN's operator copies first, since it wants the left rows contiguous."""
    return 0 if left.is_contiguous() else left.numel()


def by_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether :func:`product` of these two is oneDNN's."""
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == "cpu"
        and left.numel() * right.shape[1] >= WORTHWHILE
        and _onednn_is_faster()
    )


@cache
def _onednn_is_faster() -> bool:
    """Where PyTorch has both libraries, and the processor is not one that MKL is made for."""
    libraries = (torch.backends.mkl, torch.backends.mkldnn)
    carried = all(library.is_available() for library in libraries)
    return carried and "Intel" not in str(torch.cpu.get_capabilities()["cpu_name"])
