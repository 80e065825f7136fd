"""The gated activation: exact, bit for bit what the models' own layers compute, and smaller."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cpo_arabic.kernels import swiglu
from cpo_arabic.modeling.layers import MLPS, fuse_layers

from .cases import gradients, layer_class, saved_shapes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(name: str, activation: str = "silu") -> nn.Module:
    """A small MLP of that transformers class."""
    config = SimpleNamespace(
        hidden_size=8, intermediate_size=12, hidden_act=activation, mlp_bias=False
    )
    found: nn.Module = layer_class(name)(config)
    return found


def test_a_worked_example_comes_out() -> None:
    """silu(0) = 0 and silu(log 3) = 3/4 · log 3."""
    got = swiglu(torch.tensor([1.0, 3.0]).log(), torch.tensor([5.0, 2.0]))
    torch.testing.assert_close(got, torch.tensor([0.0, 1.5 * math.log(3)]))


def test_gradcheck_passes() -> None:
    both = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(swiglu, both)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 16), (1, 1, 7), (0, 8)])
def test_outputs_and_gradients_are_the_very_bits_of_the_two_operators(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    gate, up, upstream = (torch.randn(shape, device=device).to(dtype) * 4 for _ in range(3))
    inputs = [gate.requires_grad_(), up.requires_grad_()]
    ours, plain = swiglu(gate, up), F.silu(gate) * up
    assert torch.equal(ours, plain)
    assert all(
        map(torch.equal, gradients(ours, inputs, upstream), gradients(plain, inputs, upstream))
    )


def test_its_two_inputs_are_kept_and_nothing_else() -> None:
    gate, up = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
    with saved_shapes() as shapes:
        swiglu(gate, up)
    assert shapes == [(6, 8), (6, 8)]


def test_backward_may_run_twice() -> None:
    inputs = [torch.randn(6, 8, requires_grad=True) for _ in range(2)]
    output, ones = swiglu(*inputs), torch.ones(6, 8)
    once = gradients(output, inputs, ones, retain_graph=True)
    assert all(map(torch.equal, once, gradients(output, inputs, ones)))


@pytest.mark.parametrize("name", MLPS)
def test_a_models_layer_computes_the_same_and_keeps_one_tensor_less(name: str) -> None:
    mlp, x = layer(name), torch.randn(2, 9, 8, requires_grad=True)
    leaves, upstream = [x, *mlp.parameters()], torch.randn(2, 9, 8)
    with saved_shapes() as before:
        plain = mlp(x)
    theirs = gradients(plain, leaves, upstream)
    fuse_layers(mlp)
    with saved_shapes() as after:
        ours = mlp(x)
    assert torch.equal(ours, plain)
    assert all(map(torch.equal, gradients(ours, leaves, upstream), theirs))
    wide = [[math.prod(shape) for shape in shapes].count(2 * 9 * 12) for shapes in (before, after)]
    assert wide[1] == wide[0] - 1


def test_another_activation_is_left_to_the_model() -> None:
    mlp = layer("Qwen2MLP", activation="gelu")
    fuse_layers(mlp)
    assert "forward" not in vars(mlp)
