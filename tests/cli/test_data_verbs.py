"""``data preview`` shows what a run would train on, what it adds to the data included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpo_arabic.cli.data import run_preview
from cpo_arabic.run import data as run_data


def test_mined_negatives_and_twins_are_shown(toy_config: Callable[..., Any]) -> None:
    config = toy_config(
        "data.create_hard_negatives=true", "data.hard_negative_strategy=bm25",
        "cpo.negative_sampling_strategy=hard", "cpo.hard_negative_ratio=1",
        "data.augment_data=true", "data.augmentation_strategy=orthography",
        "data.augmentation_ratio=0.5",
    )  # fmt: skip
    read = len(run_data.read(config).train)
    shown = [run_preview(config, row=row, split="train", epoch=0) for row in range(read + 1)]

    def beginnings(of: slice) -> set[str]:
        passages = [passage for preview in shown for passage in preview.completions[of]]
        return {"".join(piece.text for piece in p.pieces)[:20] for p in passages}

    # a mined negative is another row's chosen answer
    assert beginnings(slice(1)) & beginnings(slice(1, None))
    *originals, twin = (preview.place for preview in shown)
    assert "(augmented)" in twin
    assert not any("augmented" in place for place in originals)
    assert not Path(config.training.output_dir).exists()
