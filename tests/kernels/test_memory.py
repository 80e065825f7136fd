"""The memory of a head's gradient: used again, never shared, never outliving the head."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cpo_arabic.kernels import memory, token_log_probs
from cpo_arabic.kernels.memory import gradient_memory


def test_memory_that_is_free_is_used_again_and_that_of_a_live_view_is_not() -> None:
    weight = torch.empty(1000, 8)
    first = gradient_memory(weight)
    at, view = first.data_ptr(), first[10:20].T
    del first
    assert gradient_memory(weight).data_ptr() != at
    del view
    assert at in {gradient_memory(weight).data_ptr(), gradient_memory(weight).data_ptr()}


def test_it_is_like_the_weight_and_another_weights_is_left_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = torch.empty(8, 30, dtype=dtype).T
        found = gradient_memory(weight)
        assert (found.shape, found.dtype, found.is_contiguous()) == (weight.shape, dtype, True)
    one, other = torch.empty(50, 4), torch.empty(50, 4)
    at = gradient_memory(one).data_ptr()
    assert gradient_memory(other).data_ptr() != at
    assert gradient_memory(one).data_ptr() == at


def test_a_tensor_without_storage_gets_one_of_its_kind() -> None:
    """As the estimate's are: they have a shape and say that they are on the CPU."""
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(1 << 20, 1 << 20))
    found = gradient_memory(weight)
    assert isinstance(found, FakeTensor)
    assert found.shape == weight.shape


def test_it_goes_when_the_weight_does() -> None:
    weight = torch.empty(100, 8)
    gradient_memory(weight)
    (block,) = memory._idle[weight]
    gone = weakref.ref(block)
    del weight, block
    assert gone() is None


def test_a_gradient_that_is_kept_survives_the_next_step() -> None:
    """Two steps whose first gradient is held, as when gradients are summed over micro-batches."""
    hidden, weight = torch.randn(6, 8), torch.randn(200, 8, requires_grad=True)
    targets = torch.randint(0, 200, (6,))

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(token_log_probs(hidden, weight, targets).sum(), weight)[0]

    first = gradient()
    copy = first.clone()
    second = gradient()
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, copy)
    assert torch.equal(first, second)
    at = {first.data_ptr(), second.data_ptr()}
    del first, second
    assert gradient().data_ptr() in at
