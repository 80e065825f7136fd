"""What both kernels share: the accumulation dtype, autocast off, tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LOG2_E = 1 / math.log(2)

Backend = Literal["auto", "eager", "tiled", "triton"]
"""``auto`` goes by the tensors' device; any other name is obeyed or refused, never replaced."""


def choose_backend(asked: Backend, tensor: Tensor) -> Backend:
    """``asked``, or for "auto" the fastest that the tensor's device has.

    A tensor without storage, as an estimate has them, goes through plain PyTorch: Triton launches
    with addresses.
    """
    if asked == "auto":
        stored = tensor.is_cuda and not isinstance(tensor, FakeTensor)
        return "triton" if stored and find_spec("triton") else "tiled"
    if asked not in ("eager", "tiled", "triton"):
        raise ValueError(f"backend must be auto, eager, tiled or triton, not {asked!r}")
    if asked == "triton":
        _require_triton(tensor)
    return asked


def _require_triton(tensor: Tensor) -> None:
    if find_spec("triton") is None:
        raise ValueError("backend triton needs the triton package, which is not installed")
    if not tensor.is_cuda:
        import triton

        if not triton.knobs.runtime.interpret:
            raise ValueError(
                f"backend triton needs CUDA tensors, not {tensor.device.type} ones, unless "
                "TRITON_INTERPRET=1 was set before triton was imported"
            )


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything below it."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast would turn the float32 products inside a kernel into lower ones."""
    return torch.autocast(device_type=device.type, enabled=False)


def exponentials_(values: Tensor, peak: Tensor) -> None:
    """``values`` (t, v) become exp(values − peak), with one finite ``peak`` (t,) a row.

    By powers of 2: on a CPU PyTorch computes ``exp2`` itself and hands ``exp`` to a library that
    takes up to three times as long.
    """
    torch.add((peak * -LOG2_E)[:, None], values, alpha=LOG2_E, out=values).exp2_()


def spans(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Half-open intervals of at most ``size`` that cover ``range(length)``."""
    for start in range(0, length, size):
        yield start, min(start + size, length)


class Scratch:
    """A buffer allocated once and lent, reshaped, to every tile in turn.

    A fresh megabyte-sized tensor per tile would be mapped, faulted in and unmapped again by the
    CPU allocator; at 30 to 300 tiles a call that costs more than the softmax does.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._flat = torch.empty(0, dtype=dtype, device=like.device)

    def take(self, rows: int, columns: int) -> Tensor:
        """(rows, columns), contiguous, of undefined content; the earlier loan ends."""
        if self._flat.numel() < rows * columns:
            self._flat = self._flat.new_empty(rows * columns)
        return self._flat[: rows * columns].view(rows, columns)

    def load(self, source: Tensor) -> Tensor:
        """``source`` itself where it already has the buffer's dtype, else a converted copy."""
        if source.dtype == self._flat.dtype:
            return source
        return self.take(*source.shape).copy_(source)
