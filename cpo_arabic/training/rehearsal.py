"""A step gone through on tensors that have a shape and no storage: what would be alive, and when.

The code that runs is the training step's own, so nothing here knows how a layer, a kernel or a loss
is made. Two things are rehearsed smaller than they are, since they repeat: of the layers, the
first, one for all between, and the last; of the vocabulary, as much as the log-probability kernel
needs to keep all the logits it ever keeps. Tensors that span it count for what is missing.

Integers are computed: they say where tokens lie.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from cpo_arabic.training.footprint import Stretch

LAYERS = 3
"""The first, one for all between, the last."""

_DEVICE = torch.ops.prim.device.default
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ONEDNN = "mkldnn::_linear_pointwise"
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Rehearsal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps book of bytes and work while it is active.

    Args:
        vocabulary: rows of embedding and head as rehearsed; no other dimension has this size.
        scale: how many times the real vocabulary is larger.
    """

    def __init__(self, vocabulary: int, scale: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.stretches: list[Stretch] = []
        self._vocabulary, self._scale = vocabulary, scale
        self._sizes: dict[int, int] = {}  # storage → bytes, of all that are alive
        self._gradients: set[int] = set()
        self._in_backward = False
        self._live = self._live_gradients = self._top = self._top_gradients = 0
        self._begin("start", 1)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A tensor without storage that says it lies on the device."""
        with self.fake:
            return torch.empty(tuple(shape), dtype=dtype, device=device)

    def embody(self, model: nn.Module, device: torch.device | str) -> None:
        """Gives the parameters and buffers of a model on ``meta`` a device, but no storage."""
        made: dict[int, Any] = {}  # tied weights stay tied

        def on_device(old: Tensor) -> Tensor:
            if id(old) not in made:
                new = self.empty(old.shape, old.dtype, device)
                trains = old.requires_grad
                parameter = isinstance(old, nn.Parameter)
                made[id(old)] = nn.Parameter(new, requires_grad=trains) if parameter else new
                self._watch(made[id(old)])
            found: Tensor = made[id(old)]
            return found

        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, old in held.items():
                    if old is not None:
                        held[name] = on_device(old)  # type: ignore[assignment]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the operation on shapes and books it."""
        if func is _DEVICE:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if inputs:
            result = func(*args, **kwargs)
        else:
            with self.fake:
                result = func(*args, **kwargs)
            if isinstance(result, Tensor) and not result.is_floating_point():
                result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        for tensor in outputs:
            self._watch(tensor)
        if outputs:
            self._book(func, args, kwargs, result, [*inputs, *outputs])
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = self._size(tensor, storage.nbytes())
        self._sizes[key] = size
        self._live += size
        weakref.finalize(storage, self._release, key)
        self._reached(self._live)

    def _size(self, tensor: Tensor, stored: int) -> int:
        return int(stored * (self._scale if self._vocabulary in tensor.shape else 1))

    def _reached(self, live: int) -> None:
        if live > self._top:
            self._top, self._top_gradients = live, self._live_gradients

    def _release(self, key: int) -> None:
        size = self._sizes.pop(key)
        self._live -= size
        if key in self._gradients:
            self._gradients.discard(key)
            self._live_gradients -= size

    def _book(self, func: Any, args: Any, kwargs: Any, result: Any, tensors: list[Tensor]) -> None:
        packet = func._overloadpacket
        shapes = [x.shape for x in args[:4] if isinstance(x, Tensor)]
        if packet in flop_registry:
            self._work += flop_registry[packet](*args, **kwargs, out_val=result)
        elif func.name() == _ONEDNN:
            left, right = args[:2]
            self._work += 2 * left.numel() * len(right)
            if not left.is_contiguous():  # the operator makes a copy that it shows to nobody
                self._reached(self._live + self._size(left, left.nbytes))
        elif packet is _ATTENTION:
            self._work += sdpa_flop_count(*shapes[:3])  # type: ignore[no-untyped-call]
        elif packet is _ATTENTION_BACKWARD:
            self._work += sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
        elif not func.is_view:
            self._traffic += sum(t.numel() * t.element_size() for t in tensors)

    # --- where one stretch ends and the next begins ---

    def follow(self, decoder: nn.Module, depth: int, whose: str) -> None:
        """Makes each layer's forward and backward a stretch, the middle one for all between.

        Args:
            decoder: the stack with its rehearsed ``layers``; its call begins a forward.
            depth: how many there really are.
            whose: the model's name in stretches.
        """
        decoder.register_forward_pre_hook(lambda *_: self._forward_begins(f"{whose}: embedding"))
        layers: Any = decoder.layers
        for number, layer in enumerate(layers):
            middle = depth > len(layers) and number == 1
            repeats = depth - len(layers) + 1 if middle else 1
            place = ("first layer", "a layer", "last layer")[
                0 if number == 0 else 2 if number == len(layers) - 1 else 1
            ]
            layer.register_forward_pre_hook(self._entering(f"{whose}: {place}, forward", repeats))
            last = number == len(layers) - 1
            layer.register_forward_hook(self._leaving(whose, place, repeats, last))

    def _forward_begins(self, name: str) -> None:
        self._in_backward = False
        self._next(name, 1)

    def _entering(self, name: str, repeats: int) -> Any:
        def hook(*_: Any) -> None:
            if not self._in_backward:  # there, a checkpointed layer is computed again
                self._next(name, repeats)

        return hook

    def _leaving(self, whose: str, place: str, repeats: int, last: bool) -> Any:
        def backward(_gradient: Tensor) -> None:
            self._in_backward = True
            self._next(f"{whose}: {place}, backward", repeats)

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._in_backward:
                return
            if last:
                self._next(f"{whose}: log-probabilities and losses", 1)
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(backward)

        return hook

    def track_gradients(self, parameters: Iterator[nn.Parameter]) -> None:
        """Tells the parameters' gradients from what else is alive."""

        def mark(parameter: Tensor) -> None:
            assert parameter.grad is not None
            key = parameter.grad.untyped_storage()._cdata
            if key not in self._gradients:
                self._gradients.add(key)
                self._live_gradients += self._sizes[key]

        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(mark)  # type: ignore[no-untyped-call]

    def give_gradients(self, parameters: Iterator[nn.Parameter]) -> None:
        """The gradients that an earlier micro-batch would have left."""
        for parameter in parameters:
            if parameter.requires_grad:
                gradient = self.empty(parameter.shape, parameter.dtype, parameter.device)
                self._watch(gradient)
                self._gradients.add(gradient.untyped_storage()._cdata)
                parameter.grad = gradient

    def restart(self) -> None:
        """Forgets what was booked; what is alive is the step's beginning."""
        self.stretches.clear()
        self._begin("start", 1)

    def finish(self) -> list[Stretch]:
        """The stretches since :meth:`restart`."""
        self._next("end", 1)
        return self.stretches

    def _begin(self, name: str, repeats: int) -> None:
        self._name, self._repeats = name, repeats
        self._from = self._top = self._live
        self._from_gradients = self._top_gradients = self._live_gradients
        self._work = self._traffic = 0.0

    def _next(self, name: str, repeats: int) -> None:
        self.stretches.append(
            Stretch(
                name=self._name,
                repeats=self._repeats,
                peak=self._top - self._from,
                peak_gradients=self._top_gradients - self._from_gradients,
                left=self._live - self._from,
                left_gradients=self._live_gradients - self._from_gradients,
                work=self._work,
                traffic=self._traffic,
            )
        )
        self._begin(name, repeats)
