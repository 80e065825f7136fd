"""The rehearsal's books: work is counted whichever library a product goes to."""

from __future__ import annotations

import pytest
import torch

from cpo_arabic.kernels import product, products
from cpo_arabic.training.rehearsal import Rehearsal


@pytest.mark.parametrize("by_onednn", [False, True])
def test_a_product_is_work_and_not_traffic(
    by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: by_onednn)
    rehearsal = Rehearsal(vocabulary=7, scale=1.0)
    left, right = (rehearsal.empty(size, torch.float32, "cpu") for size in ((300, 200), (200, 90)))
    with rehearsal:
        rehearsal.restart()
        product(left, right)
        (stretch,) = rehearsal.finish()
    assert stretch.work == 2 * 300 * 200 * 90
    assert stretch.traffic == 0


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)
@pytest.mark.parametrize("contiguous", [False, True])
def test_what_onednn_copies_for_itself_counts_while_it_works(
    contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    rehearsal = Rehearsal(vocabulary=7, scale=1.0)
    with rehearsal:
        right = torch.empty(200, 90)
        left = torch.empty(300, 200) if contiguous else torch.empty(200, 300).T
        rehearsal.restart()
        product(left, right)
        (stretch,) = rehearsal.finish()
    assert stretch.peak == 4 * (300 * 90 + (0 if contiguous else 300 * 200))
    assert stretch.left == 0
