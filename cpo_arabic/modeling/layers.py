"""A transformers model's linear layers, RMS norms and gated MLPs, computed by our kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpo_arabic.kernels import linear, rms_norm, swiglu

NORMS = (
    "LlamaRMSNorm", "MistralRMSNorm",
    "Qwen2RMSNorm", "Qwen2MoeRMSNorm", "Qwen3RMSNorm", "Qwen3MoeRMSNorm",
)  # fmt: skip
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen2MoeMLP", "Qwen3MLP", "Qwen3MoeMLP")
"""Classes of transformers that compute what the kernels do; the others stay as they are."""


def fuse_layers(model: nn.Module) -> None:
    """Gives each layer that a kernel can compute a forward of its own; repeating changes nothing.

    Under ``torch.compile`` the model's own forward is traced: the compiler fuses it, too.
    """
    for module in model.modules():
        ours = _forward_of(module)
        if ours is not None and "forward" not in vars(module):
            module.forward = partial(_forward, module, ours, module.forward)


def _forward_of(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    name = type(module).__name__
    if type(module) is nn.Linear:
        return _linear
    if name in NORMS:
        return _norm
    if name in MLPS and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        return _mlp
    return None


def _forward(
    module: Any,
    ours: Callable[[Any, Tensor], Tensor],
    plain: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
) -> Tensor:
    if torch.compiler.is_compiling():
        return plain(hidden_states)
    return ours(module, hidden_states)


def _linear(module: Any, hidden_states: Tensor) -> Tensor:
    if torch.is_autocast_enabled(hidden_states.device.type):
        return F.linear(hidden_states, module.weight, module.bias)
    return linear(hidden_states, module.weight, module.bias)


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _mlp(module: Any, hidden_states: Tensor) -> Tensor:
    inner = swiglu(module.gate_proj(hidden_states), module.up_proj(hidden_states))
    result: Tensor = module.down_proj(inner)
    return result
