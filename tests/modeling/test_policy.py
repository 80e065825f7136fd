"""The policy's forward: what it reads from hidden states."""

from __future__ import annotations

import torch

from cpo_arabic.modeling.policy import rows_at


def test_gradients_of_shared_rows_have_the_same_bits_every_time() -> None:
    """Three and more addends in an order that threads race for would differ in their last bits."""
    states = torch.randn(64, 4096, requires_grad=True)
    index = torch.arange(64).repeat(16)
    upstream = torch.randn(len(index), 4096)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (
            torch.autograd.grad(rows_at(states, index), states, upstream)[0] for _ in range(20)
        )
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(first, upstream.view(16, 64, -1).sum(0))
    assert all(torch.equal(first, other) for other in others)
