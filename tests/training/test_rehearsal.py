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
