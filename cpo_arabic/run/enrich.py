"""Training rows made more: mined hard negatives, augmented twins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpo_arabic.config import CPOConfig
from cpo_arabic.data.augment import augment_records
from cpo_arabic.data.mining import (
    Mined,
    cached,
    own_answers,
    search_bm25,
    search_semantic,
    with_mined,
)
from cpo_arabic.data.records import PreferenceRecord
from cpo_arabic.errors import ModelError
from cpo_arabic.modeling.helper import mean_pooled, sample
from cpo_arabic.modeling.loading import load_model, load_tokenizer
from cpo_arabic.run import data as run_data
from cpo_arabic.run import model as run_model
from cpo_arabic.training.observer import Observer

REQUEST = "أعد صياغة السؤال الآتي بكلمات أخرى من غير أن تغيّر معناه، واكتب السؤال وحده:\n"
"""Asks for a paraphrase: the question below in other words, its meaning unchanged, alone."""


def enrich(
    config: CPOConfig, records: list[PreferenceRecord], observer: Observer
) -> list[PreferenceRecord]:
    """The rows with what ``create_hard_negatives`` and ``augment_data`` add.

    Raises:
        DataError: a strategy's package is missing.
        ModelError: its model cannot be loaded.
    """
    data = config.data
    if data.create_hard_negatives:
        observer.stage(f"mining hard negatives ({data.hard_negative_strategy})")
        mined, path = _mined(config, records, observer)
        records = with_mined(records, mined)
        observer.stage(f"{sum(map(len, mined))} hard negatives mined; see {path}")
    if data.augment_data:
        found = augment_records(
            records,
            strategy=data.augmentation_strategy,
            ratio=data.augmentation_ratio,
            seed=config.training.seed,
            paraphrase=lambda texts: _paraphrased(config, texts, observer),
        )
        records = found.records
        note = f"{found.twins} augmented twins ({data.augmentation_strategy})"
        if found.unchanged:
            note += f"; {found.unchanged} prompts passed over, since they would not change"
        observer.stage(note)
    return records


def _mined(
    config: CPOConfig, records: Sequence[PreferenceRecord], observer: Observer
) -> tuple[list[list[Mined]], Path]:
    data, count = config.data, config.cpo.num_negatives

    def mine() -> list[list[Mined]]:
        match data.hard_negative_strategy:
            case "bm25":
                return search_bm25(records, per_row=count)
            case "semantic_search":
                return search_semantic(records, _embedder(config, observer), per_row=count)
            case "self":
                return own_answers(
                    records,
                    lambda rows: _answers(config, rows, observer),
                    per_row=min(count, 2),
                    source=data.mining_model or config.model.name,
                )

    folder = Path(data.cache_dir) if data.cache_dir else Path(config.training.output_dir)
    model = data.mining_model or config.model.name
    how = (data.hard_negative_strategy, model, count, config.training.seed)
    return cached(records, how, folder, mine)


def _embedder(
    config: CPOConfig, observer: Observer
) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """``mining_model`` through sentence-transformers; without one, the policy's own states."""
    if config.data.mining_model is not None:
        return _sentence_transformer(config.data.mining_model)
    model, tokenizer = _helper(config, None)
    return lambda texts: mean_pooled(
        model,
        tokenizer,
        texts,
        max_length=config.cpo.max_length or config.model.max_length,
        progress=_progress(observer, "embedded"),
    )


def _sentence_transformer(name: str) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ModelError(
            "data.mining_model needs sentence-transformers; install it with "
            "pip install 'cpo-arabic[mining]', or leave mining_model null for the policy's states"
        ) from error
    model = SentenceTransformer(name)
    return lambda texts: np.asarray(
        model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False),
        dtype=np.float32,
    )


def _answers(
    config: CPOConfig, records: Sequence[PreferenceRecord], observer: Observer
) -> list[str]:
    model, tokenizer = _helper(config, config.data.mining_model)
    dataset = run_data.tokenize(config, records, tokenizer)
    prompts = [dataset.store.prompt_ids(row) for row in range(len(dataset))]
    longest = max(dataset.lengths(row)[1][0] for row in range(len(dataset)))
    return sample(
        model,
        tokenizer,
        prompts,
        max_new_tokens=longest,  # of the chosen answers: a longer one is no better a negative
        seed=config.training.seed,
        progress=_progress(observer, "sampled"),
    )


def _paraphrased(config: CPOConfig, texts: Sequence[str], observer: Observer) -> list[str]:
    model, tokenizer = _helper(config, config.data.paraphrase_model)
    prompts = [_chat(tokenizer, REQUEST + text) for text in texts]
    return sample(
        model,
        tokenizer,
        prompts,
        max_new_tokens=min(config.cpo.max_prompt_length or 1, max(map(len, prompts))),
        seed=config.training.seed,
        progress=_progress(observer, "paraphrased"),
    )


def _chat(tokenizer: Any, text: str) -> list[int]:
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(text + "\n", add_special_tokens=False))
    turns = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(rendered, add_special_tokens=False))


def _helper(config: CPOConfig, name: str | None) -> tuple[Any, Any]:
    """A model that only reads and writes, in evaluation mode."""
    source = run_model.source_of(config, name)
    if name is None:
        return load_model(source).eval(), run_model.tokenizer_of(config)
    tokenizer = load_tokenizer(
        name, revision=None, trust_remote_code=config.model.trust_remote_code
    )
    return load_model(source).eval(), tokenizer


def _progress(observer: Observer, what: str) -> Callable[[int, int], None]:
    def tell(done: int, total: int) -> None:
        if done == total or done % 256 == 0:
            observer.stage(f"{what} {done} of {total}")

    return tell
