"""The norm: exact, in every dtype, and what the models' own layers compute."""

from __future__ import annotations

import pytest
import torch

from cpo_arabic.kernels import rms_norm
from cpo_arabic.modeling.layers import NORMS, fuse_layers

from .cases import gradients, layer_class, relative, saved_shapes

SHAPES = [(37, 16), (1, 1, 7), (2, 5, 3, 33), (0, 8)]


def definition(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


def test_a_worked_example_comes_out() -> None:
    """x = (3, 4), ε = 0: mean square 12.5, so y = w ⊙ (3, 4) / √12.5."""
    got = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(got, torch.tensor([3.0, 8.0]) / 12.5**0.5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_both_gradients_equal_autograd_of_the_definition(
    shape: tuple[int, ...], frozen: bool
) -> None:
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    weight = torch.randn(shape[-1], dtype=torch.float64).requires_grad_(not frozen)
    inputs = [x] if frozen else [x, weight]
    upstream = torch.randn(shape, dtype=torch.float64)
    ours, truth = rms_norm(x, weight, 0.1), definition(x, weight, 0.1)
    torch.testing.assert_close(ours, truth)
    for got, expected in zip(
        gradients(ours, inputs, upstream), gradients(truth, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_gradcheck_passes() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *both: rms_norm(*both, 1e-2), (x, weight))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_a_models_layer_computes_the_same_with_no_larger_error(
    name: str, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    norm = layer_class(name)(32, eps=1e-5).to(weight_dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    x = torch.randn(2, 9, 32).to(dtype).requires_grad_()
    wide = [x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()]
    exact = definition(*wide, 1e-5)
    upstream = torch.randn(2, 9, 32)
    plain = norm(x)
    results = [(exact, *gradients(exact, wide, upstream))]
    results.append((plain, *gradients(plain, [x, norm.weight], upstream)))
    fuse_layers(norm)
    ours = norm(x)
    assert ours.grad_fn is not None and "_RMSNorm" in ours.grad_fn.name()
    results.append((ours, *gradients(ours, [x, norm.weight], upstream)))
    assert ours.dtype == plain.dtype
    assert torch.allclose(ours, plain, rtol=4 * torch.finfo(dtype).eps, atol=0)
    for truth, theirs, mine in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert relative(mine, truth) <= 1.1 * relative(theirs, truth) + 1e-7


def test_only_its_input_and_a_number_a_row_are_kept() -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    with saved_shapes() as shapes:
        rms_norm(x, weight, 1e-6)
    assert sorted(shapes) == [(6, 1), (6, 8), (8,)]


def test_autocast_changes_nothing() -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    outside = rms_norm(x, weight, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rms_norm(x, weight, 1e-6)
        grads = gradients(inside, [x, weight], torch.ones(6, 8))
    assert torch.equal(outside, inside)
    assert all(map(torch.equal, grads, gradients(outside, [x, weight], torch.ones(6, 8))))
