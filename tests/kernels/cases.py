"""Random inputs, and how errors and memory are measured, for the tests of both kernels.

Shapes: T tokens, D features, V vocabulary, B queries, N live keys, Q queue entries
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from cpo_arabic.kernels import InfoNCEOutput, infonce, token_log_probs


def relative(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth, in float64."""
    truth = truth.detach().double()
    return float((value.detach().double() - truth).norm() / truth.norm().clamp_min(1e-300))


@dataclass(frozen=True)
class HeadCase:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def random(
        cls, t: int, d: int, v: int, *, seed: int = 0, with_bias: bool = False, **rest: Any
    ) -> HeadCase:
        make = torch.Generator().manual_seed(seed)
        weight = torch.randn(v, d, generator=make, dtype=torch.float64)
        targets = torch.randint(0, v, (t,), generator=make)
        hidden = torch.randn(t, d, generator=make, dtype=torch.float64) / d**0.5
        bias = torch.randn(v, generator=make, dtype=torch.float64) if with_bias else None
        return cls(2 * hidden, weight, targets, bias, **rest)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> HeadCase:
        def move(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device=device, dtype=dtype)

        bias = None if self.bias is None else move(self.bias)
        targets = self.targets.to(device)
        return replace(
            self, hidden=move(self.hidden), weight=move(self.weight), bias=bias, targets=targets
        )

    def inputs(self, names: str) -> list[Tensor]:
        """The tensors named by their first letters, e.g. "hw", set to require a gradient."""
        found = {"h": self.hidden, "w": self.weight, "b": self.bias}
        tensors = [tensor for name in names if (tensor := found[name]) is not None]
        return [tensor.requires_grad_() for tensor in tensors]

    def run(self, **options: Any) -> Tensor:
        return token_log_probs(
            self.hidden,
            self.weight,
            self.targets,
            bias=self.bias,
            softcap=self.softcap,
            scale=self.scale,
            **options,
        )


@dataclass(frozen=True)
class ContrastCase:
    queries: Tensor
    keys: Tensor
    positives: Tensor
    query_labels: Tensor
    key_labels: Tensor
    queue: Tensor | None
    queue_labels: Tensor | None
    queue_scale: Tensor | None = None
    temperature: float = 0.1
    margin: float = 0.0
    concentration: float = 0.0

    @classmethod
    def random(cls, b: int, n: int, q: int, d: int, *, seed: int = 0, **rest: Any) -> ContrastCase:
        """Unit vectors; a few prompts and texts coincide, so that every kind of mask occurs."""
        make = torch.Generator().manual_seed(seed)

        def unit(rows: int) -> Tensor:
            return normalize(torch.randn(rows, d, generator=make, dtype=torch.float64), dim=1)

        def draw(rows: int, distinct: int) -> Tensor:
            return torch.randint(0, distinct, (rows,), generator=make)

        group = torch.arange(n) % b
        prompt = draw(b, 3 * b)[group]
        key_labels = torch.stack([group, prompt, draw(n, 4 * n)], 1)
        queue_labels = torch.stack(
            [torch.full((q,), -1), draw(q, 3 * b + q // 2), draw(q, 4 * n + q // 2)], 1
        )
        return cls(
            unit(b), unit(n), torch.arange(b), key_labels[:b].clone(), key_labels,
            unit(q) if q else None, queue_labels if q else None, **rest,
        )  # fmt: skip

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> ContrastCase:
        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            floating = tensor.is_floating_point()
            return tensor.detach().to(device=device, dtype=dtype if floating else None)

        changed: dict[str, Any] = {
            name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)

    def inputs(self, names: str) -> list[Tensor]:
        found = {"q": self.queries, "k": self.keys}
        return [found[name].requires_grad_() for name in names]

    def run(self, **options: Any) -> InfoNCEOutput:
        return infonce(**vars(self), **options)


def layer_class(name: str) -> Any:
    """The transformers class of that name, such as ``Qwen2MoeMLP``."""
    family = name.removesuffix("RMSNorm").removesuffix("MLP")
    folder = {"Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe"}.get(family, family.lower())
    return getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)


def gradients(
    output: Tensor, inputs: list[Tensor], upstream: Tensor, **options: Any
) -> list[Tensor]:
    return list(torch.autograd.grad(output, inputs, upstream.to(output), **options))


class Operations(TorchDispatchMode):
    """Remembers which operators ran, by name and overload."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operator's output had."""

    elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in _tensors(result):
            size = value.untyped_storage().nbytes() // value.element_size()
            self.elements = max(self.elements, size)
        return result


class AllocatedBytes(TorchDispatchMode):
    """What operators in the block allocate of a MiB and more: in all, and the most held at once."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}  # storage → bytes
        self.total = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
        result = func(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in _tensors(result)):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._alive and size >= 1 << 20:
                self._alive[key] = size
                self.total += size
                weakref.finalize(storage, self._alive.pop, key)
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def _tensors(values: Any) -> list[Tensor]:
    """Those of an operator's arguments or results."""
    listed = values if isinstance(values, tuple | list) else [values]
    return [value for value in listed if isinstance(value, Tensor)]


@contextmanager
def saved_shapes() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what autograd saves for backward inside the block."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield shapes
