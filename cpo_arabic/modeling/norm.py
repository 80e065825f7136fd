"""A transformers model's RMS norms, computed by our kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cpo_arabic.kernels import rms_norm

SAME_FORMULA = (
    "LlamaRMSNorm", "MistralRMSNorm",
    "Qwen2RMSNorm", "Qwen2MoeRMSNorm", "Qwen3RMSNorm", "Qwen3MoeRMSNorm",
)  # fmt: skip
"""Classes of transformers that compute what the kernel does; the others stay as they are."""


def fuse_norms(model: nn.Module) -> None:
    """Gives each norm that the kernel can compute a forward of its own; repeating changes nothing.

    Under ``torch.compile`` the model's own forward is traced: the compiler fuses it, too.
    """
    for module in model.modules():
        if type(module).__name__ in SAME_FORMULA and "forward" not in vars(module):
            module.forward = partial(_forward, module, module.forward)


def _forward(module: Any, plain: Callable[[Tensor], Tensor], hidden_states: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return plain(hidden_states)
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)
