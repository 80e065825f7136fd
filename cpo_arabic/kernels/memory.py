"""Memory of a large gradient, kept from one step to the next.

``zero_grad(set_to_none=True)`` frees every gradient. CUDA's caching allocator keeps what is freed;
on a CPU, blocks of more than 32 MiB go back to the kernel, which faults the next step's in page by
page and zeroes them: a tenth of the time of a head's forward. What is kept here has been in use at
every step's peak, when all gradients lie side by side, so it adds nothing to that.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_idle: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight → blocks that nothing uses


def gradient_memory(weight: Tensor) -> Tensor:
    """A tensor like ``weight``, of undefined content.

    Of a plain tensor on a CPU it may lie where an earlier one of the same weight was, all of whose
    views are gone. The memory goes when the weight does.
    """
    if weight.device.type != "cpu" or type(weight) not in (Tensor, nn.Parameter):
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    idle: list[Tensor] = _idle.setdefault(weight, [])  # type: ignore[no-untyped-call]
    block = idle.pop() if idle else torch.empty(weight.nbytes, dtype=torch.uint8)
    loan = block.numpy()  # lives as long as a tensor that shares it
    weakref.finalize(loan, idle.append, block)
    return torch.from_numpy(loan).view(weight.dtype).view(weight.shape)
