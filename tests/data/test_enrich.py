"""Mining and paraphrasing by real models: asked once, kept by content, no trace in the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpo_arabic.data.records import PreferenceRecord
from cpo_arabic.run import data as run_data
from cpo_arabic.run import enrich as enriching
from cpo_arabic.run.enrich import enrich
from cpo_arabic.training.observer import SilentObserver

Make = Callable[..., Any]


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call of the real sampling function got."""
    counts: list[int] = []
    real = enriching.sample

    def counting(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> list[str]:
        counts.append(len(prompts))
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(enriching, "sample", counting)
    return counts


def enriched(config: Any) -> list[PreferenceRecord]:
    return enrich(config, run_data.read(config).train, SilentObserver())


PARAPHRASE = (
    "data.augment_data=true",
    "data.augmentation_strategy=paraphrase",
    "data.augmentation_ratio=0.3",
    "cpo.max_prompt_length=16",
)


def test_a_prompt_is_paraphrased_once_by_each_model(
    toy_config: Make, toy_model: Path, tmp_path: Path, sampled: list[int]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(toy_model, other)
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    first = enriched(toy_config(*PARAPHRASE, cache))
    asked = sum(sampled)
    assert len(first) - 12 == 4
    assert 4 <= asked < 12, "more prompts were paraphrased than twins were wanted"
    before = torch.get_rng_state()
    assert enriched(toy_config(*PARAPHRASE, cache)) == first
    assert sum(sampled) == asked, "the second run called the model"
    enriched(toy_config(*PARAPHRASE, cache, f"data.paraphrase_model={other}"))
    assert sum(sampled) == 2 * asked, "another model was answered for by the first"
    enriched(toy_config(*PARAPHRASE, cache, "cpo.max_prompt_length=12"))
    assert sum(sampled) == 3 * asked, "another length was answered for by the first"
    assert torch.equal(torch.get_rng_state(), before)
    (other / "note.txt").write_text("the folder has changed", encoding="utf-8")
    enriched(toy_config(*PARAPHRASE, cache, f"data.paraphrase_model={other}"))
    assert sum(sampled) == 4 * asked, "a changed model folder was served stale"


def test_a_paraphrase_does_not_depend_on_what_was_kept_before(
    toy_config: Make, tmp_path: Path
) -> None:
    few = toy_config(*PARAPHRASE, f"data.cache_dir={tmp_path / 'a'}")
    enriched(few)
    more = (*PARAPHRASE, "data.augmentation_ratio=0.6")
    grown = enriched(toy_config(*more, f"data.cache_dir={tmp_path / 'a'}"))
    assert grown == enriched(toy_config(*more, f"data.cache_dir={tmp_path / 'b'}"))


def test_own_answers_differ_by_attempt_and_are_kept_beside_their_rows(
    toy_config: Make, tmp_path: Path, sampled: list[int]
) -> None:
    own = ("data.create_hard_negatives=true", "data.hard_negative_strategy=self",
           "cpo.max_target_length=8", "data.max_samples=6",
           f"data.cache_dir={tmp_path / 'cache'}")  # fmt: skip
    rows = enriched(toy_config(*own))
    assert sampled == [6, 6]
    (path,) = (tmp_path / "cache").glob("mined-*.jsonl")
    mined = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row, line in zip(rows, mined, strict=True):
        texts = [found["text"] for found in line["mined"]]
        assert line["prompt"] == row.prompt_text
        assert list(row.hard_negatives[-len(texts) :]) == texts
    assert any(len(line["mined"]) == 2 for line in mined), "the second attempt repeated the first"
    enriched(toy_config(*own))
    assert sampled == [6, 6], "the second run called the model"
    enriched(toy_config(*own, "data.conversation_template=alpaca"))
    assert sampled == [6, 6, 6, 6], "answers to another template's prompts were served"
