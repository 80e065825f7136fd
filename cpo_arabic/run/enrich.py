"""Training rows made more: mined hard negatives, augmented twins."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray

from cpo_arabic.config import CPOConfig
from cpo_arabic.data.augment import augment_records, remembered
from cpo_arabic.data.encoding import Budgets, RowEncoder, TextEncoder
from cpo_arabic.data.mining import (
    Mined,
    Progress,
    cached,
    own_answers,
    search_bm25,
    search_semantic,
    silent,
    with_mined,
)
from cpo_arabic.data.records import PreferenceRecord, Turn
from cpo_arabic.data.templates import load_template
from cpo_arabic.errors import ModelError
from cpo_arabic.modeling.helper import mean_pooled, sample
from cpo_arabic.modeling.loading import load_model, load_tokenizer
from cpo_arabic.run import model as run_model
from cpo_arabic.training.checkpoint import sha256
from cpo_arabic.training.observer import Observer

REQUEST = "أعد صياغة السؤال الآتي بكلمات أخرى من غير أن تغيّر معناه، واكتب السؤال وحده:\n"
"""Asks for a paraphrase: the question below in other words, its meaning unchanged, alone."""


def enrich(
    config: CPOConfig, records: list[PreferenceRecord], observer: Observer
) -> list[PreferenceRecord]:
    """The rows with what ``create_hard_negatives`` and ``augment_data`` add.

    What models write or rank is kept in files by content; with or without them the random state
    is left as it was, so that a run does not depend on what an earlier one left behind.

    Raises:
        DataError: a strategy's package is missing.
        ModelError: its model cannot be loaded.
    """
    data = config.data
    with torch.random.fork_rng(devices=_devices()):
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
                paraphrase=(
                    _paraphrase(config, observer)
                    if data.augmentation_strategy == "paraphrase"
                    else None
                ),
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
    how: tuple[Any, ...] = (data.hard_negative_strategy, count)
    match data.hard_negative_strategy:
        case "bm25":
            mine = partial(search_bm25, records, per_row=count)
        case "semantic_search":
            helper = _Helper(config, data.mining_model)
            how += (helper.identity(), config.cpo.max_length)
            mine = partial(
                _searched, config, helper, records, count, _progress(observer, "embedded")
            )
        case "self":
            helper = _Helper(config, data.mining_model)
            sampler = _Sampler(config, helper, _progress(observer, "sampled"))
            how += (helper.identity(), sampler.identity())
            mine = partial(own_answers, records, sampler, per_row=min(count, 2), source=helper.name)
    return cached(records, how, _folder(config), mine)


def _paraphrase(config: CPOConfig, observer: Observer) -> Callable[[Sequence[str]], list[str]]:
    """Texts → their paraphrases; each depends on the model, the settings and its text alone."""
    name, seed = config.data.paraphrase_model, config.training.seed
    budget, helper = config.cpo.max_prompt_length, _Helper(config, name)

    def paraphrased(texts: Sequence[str]) -> list[str]:
        template = load_template("default", helper.tokenizer)
        prompts = template.render([[Turn("user", REQUEST + text)] for text in texts])
        found = []
        for text, prompt in zip(texts, prompts, strict=True):
            ids = helper.encoder.segments(prompt)
            found += helper.sample([ids], min(budget, len(ids)), _number(seed, text))
        observer.stage(f"{len(texts)} prompts paraphrased")
        return found

    how = (REQUEST, seed, budget, helper.identity())
    return remembered(paraphrased, _folder(config) / f"paraphrased-{_number(*how):016x}.jsonl")


class _Sampler:
    """Rows, attempt → the model's own answers, as long as the longest chosen one at most."""

    def __init__(self, config: CPOConfig, helper: _Helper, progress: Progress) -> None:
        cpo, data = config.cpo, config.data
        self._helper, self._progress, self._seed = helper, progress, config.training.seed
        self._template = load_template(
            data.conversation_template,
            helper.tokenizer,
            add_special_tokens=data.add_special_tokens,
        )
        self._budgets = Budgets(
            cpo.max_length, cpo.max_prompt_length, cpo.max_target_length, cpo.truncation_mode
        )

    def identity(self) -> tuple[Any, ...]:
        """What the samples depend on beside the model and the rows."""
        return self._template.fingerprint, self._budgets, self._seed

    def __call__(self, records: Sequence[PreferenceRecord], attempt: int) -> list[str]:
        template, encoder = self._template, self._helper.encoder
        encode = RowEncoder(
            encoder, self._budgets, template.opening, template.tail, template.closing
        )
        prompts = template.render([record.turns for record in records])
        longest = max(len(encoder(template.completion(record.chosen))) for record in records)
        return self._helper.sample(
            [encode.prompt(segments) for segments in prompts],
            min(longest, self._budgets.max_target_length),
            self._seed + attempt * len(records),
            self._progress,
        )


def _searched(
    config: CPOConfig,
    helper: _Helper,
    records: Sequence[PreferenceRecord],
    count: int,
    progress: Progress,
) -> list[list[Mined]]:
    """By ``mining_model`` through sentence-transformers; without one, the policy's own states."""
    embed = (
        partial(
            mean_pooled,
            helper.model,
            helper.tokenizer,
            max_length=config.cpo.max_length,
            progress=silent,
        )
        if config.data.mining_model is None
        else _sentence_transformer(config.data.mining_model)
    )
    return search_semantic(records, embed, per_row=count, progress=progress)


def _sentence_transformer(name: str) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ModelError(
            "data.mining_model needs sentence-transformers; install it with "
            "pip install 'cpo-arabic[mining]', or leave mining_model null for the policy's states"
        ) from error
    try:
        model = SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"data.mining_model {name!r} cannot be loaded: {error}") from error
    return lambda texts: np.asarray(
        model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False),
        dtype=np.float32,
    )


class _Helper:
    """A model that only reads and writes, in evaluation mode; loaded at its first use."""

    def __init__(self, config: CPOConfig, name: str | None) -> None:
        self._config = config
        self._trained = name is None
        self._source = run_model.source_of(config, name)
        self.name = self._source.name

    @cached_property
    def model(self) -> Any:
        model = load_model(self._source).eval()
        on_device = self._source.quantization_bits is not None
        return model if on_device else model.to(PartialState().device)

    @cached_property
    def tokenizer(self) -> Any:
        if self._trained:
            return run_model.tokenizer_of(self._config)
        return load_tokenizer(
            self.name, revision=None, trust_remote_code=self._source.trust_remote_code
        )

    @cached_property
    def encoder(self) -> TextEncoder:
        return TextEncoder.from_json(self.tokenizer.backend_tokenizer.to_str())

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        seed: int,
        progress: Progress = silent,
    ) -> list[str]:
        return sample(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=progress,
        )

    def identity(self) -> tuple[Any, ...]:
        """What the model's words depend on: how it is loaded, and a local folder's content."""
        folder = Path(self.name)
        files = sorted(path for path in folder.glob("*") if path.is_file())  # none of a hub's name
        tokenizer = self._config.model.tokenizer_name if self._trained else None
        return (self._source, tokenizer, [(path.name, sha256(path)) for path in files])


def _devices() -> list[int]:
    """The device whose random state a helper may move."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def _folder(config: CPOConfig) -> Path:
    return Path(config.data.cache_dir or config.training.output_dir)


def _number(*parts: Any) -> int:
    """A 63-bit hash."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _progress(observer: Observer, what: str) -> Progress:
    def tell(done: int, total: int) -> None:
        if done == total or done % 256 == 0:
            observer.stage(f"{what} {done} of {total}")

    return tell
