"""Pooling's companions: dropout by seed, the queue's ring, the momentum encoder's swap."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cpo_arabic.modeling.encoder import (
    EmbeddingQueue,
    EmbeddingSettings,
    MomentumEncoder,
    ProjectionHead,
    embed,
)


def keys(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.arange(first, first + count)
    return numbers[:, None].float(), torch.stack([numbers] * 3, dim=1)


@pytest.mark.parametrize("pushes", [[3, 3, 3], [2, 7, 1], [5, 5], [12], [1] * 9])
def test_the_queue_holds_the_newest_keys_whatever_the_batches(pushes: list[int]) -> None:
    queue, pushed = EmbeddingQueue(5), 0
    for count in pushes:
        queue.push(*keys(pushed, count))
        pushed += count
    entries = queue.entries()
    assert entries is not None
    embeddings, labels = entries
    expected = set(range(max(0, pushed - 5), pushed))
    assert {int(e) for e in embeddings[:, 0]} == expected
    assert labels[:, 1].tolist() == [int(e) for e in embeddings[:, 0]]


def test_a_queued_key_has_no_group_and_an_empty_queue_no_entries() -> None:
    queue = EmbeddingQueue(4)
    assert queue.entries() is None
    queue.push(*keys(7, 2))
    entries = queue.entries()
    assert entries is not None
    assert entries[1].tolist() == [[-1, 7, 7], [-1, 8, 8]]


def test_momentum_averages_after_a_step_and_is_only_in_place_within_its_block() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    momentum = MomentumEncoder({"w": weight}, beta=0.9)
    with torch.no_grad():
        weight.fill_(2.0)
    momentum.update()  # 0.9·1 + 0.1·2
    with momentum.applied():
        assert weight.item() == pytest.approx(1.1)
    assert weight.item() == 2.0
    assert momentum.averages["w"].item() == pytest.approx(1.1)


def test_an_error_inside_the_block_still_puts_the_weights_back() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    momentum = MomentumEncoder({"w": weight}, beta=0.0)
    with torch.no_grad():
        weight.fill_(3.0)
    with pytest.raises(RuntimeError), momentum.applied():
        raise RuntimeError
    assert weight.item() == 3.0


def test_equal_seeds_drop_the_same_units_and_evaluation_drops_none() -> None:
    pooled, settings = torch.ones(4, 64), EmbeddingSettings(dropout=0.5, normalize=False)
    first, again, other = (embed(pooled, None, settings, dropout_seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(embed(pooled, None, settings, dropout_seed=None), pooled)


def test_normalised_embeddings_have_length_one_behind_the_head() -> None:
    head = ProjectionHead(16, 4)
    settings = EmbeddingSettings(dropout=0.1, normalize=True)
    embedded = embed(torch.randn(3, 16), head, settings, dropout_seed=5)
    assert embedded.shape == (3, 4)
    assert torch.allclose(embedded.norm(dim=1), torch.ones(3))
