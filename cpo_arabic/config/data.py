"""The section ``data``: files, columns, text processing, padding, augmentation and mining."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from cpo_arabic.config.base import Section
from cpo_arabic.config.kinds import Column, Name, PathText, Weight

Padding = Literal["max_length", "longest", "packed"]
AugmentationStrategy = Literal["paraphrase", "diacritics", "orthography", "digits"]
HardNegativeStrategy = Literal["semantic_search", "bm25", "self"]
TrainFiles = PathText | list[PathText] | dict[PathText, Weight]

TEMPLATES = ("default", "chatml", "plain", "alpaca", "translation")


def _template(text: str) -> str:
    if text not in TEMPLATES and not text.endswith(".jinja"):
        raise ValueError(
            f"is no template: use one of {', '.join(TEMPLATES)}, or a path that ends in .jinja"
        )
    return text


def _not_empty(files: TrainFiles) -> TrainFiles:
    if not files:
        raise ValueError("names no file")
    return files


class CPODataConfig(Section):
    """Where preference data comes from, and how rows become token sequences."""

    section: ClassVar[str] = "data"

    train_file: Annotated[TrainFiles, AfterValidator(_not_empty)] = "data/cpo_train.jsonl"
    """Training data: a file or folder, a list of them, or a mapping of path to sampling weight."""
    validation_file: PathText | None = "data/cpo_validation.jsonl"
    """Held-out data for evaluation while training; null splits it off the training data."""
    test_file: PathText | None = None
    """Held-out data for `cpo-arabic evaluate` after training."""
    dataset_name: Name | None = None
    """Data set on the Hugging Face hub, in place of train_file."""
    dataset_config_name: Name | None = None
    """Configuration (subset) of that data set."""
    dataset_split: Name = "train"
    """Split of that data set to train on."""
    streaming: bool = False
    """Whether rows stream into memory-mapped tokens in cache_dir, never held in memory at once."""
    cache_dir: PathText | None = None
    """Folder that keeps tokens, mined rows and reference scores between runs; null: this run's."""
    max_samples: Annotated[int, Field(ge=1, le=2**40)] | None = None
    """Training rows that are used, drawn after shuffling by the seed; null uses all."""
    validation_split_percentage: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction in [0, 1) of training rows held out where no validation file is (0.1 = 10 %)."""
    preprocessing_num_workers: Annotated[int, Field(ge=1, le=1024)] = 4
    """Processes that tokenise; the result does not depend on their number."""

    prompt_column: Column = "prompt"
    """Column that holds the prompt."""
    chosen_column: Column = "chosen"
    """Column that holds the preferred completion."""
    rejected_column: Column = "rejected"
    """Column that holds the rejected completion."""
    system_column: Column | None = "system"
    """Column that holds a system message, where a row has one; null reads none."""
    multiple_negatives_column: Column | None = "negatives"
    """Column that holds a list of further rejected completions; null reads none."""
    hard_negatives_column: Column | None = "hard_negatives"
    """Column that holds a list of hard negatives; null reads none."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that cannot be used does: stop with its place, or be left out and counted."""

    conversation_template: Annotated[PathText, AfterValidator(_template)] = "default"
    """Text around prompt and completion: default (the tokenizer's own), a name, or a .jinja."""
    normalization: Literal["none", "nfc", "light"] = "none"
    """Treatment of prompts, never of answers: none, nfc, or light (nfc, no tatweel)."""
    add_special_tokens: bool = True
    """Whether the template's begin and end tokens are added."""
    truncation: bool = True
    """Whether rows over their budget are cut; false refuses them."""
    padding: Padding = "max_length"
    """Shape of a batch: pad to max_length, to the longest row, or pack groups into full rows."""
    max_tokens_per_row: Annotated[int | None, Field(ge=4, le=2**24)] = None
    """Token budget of one packed row; null packs a batch into one row, without padding."""

    sanity_check: bool = False
    """Whether a few steps on a copy must succeed before the run starts."""
    sanity_check_size: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    """Training rows that the sanity check uses."""
    ignore_bias_buffers: bool = False
    """Whether boolean buffers of old checkpoints are left out of distributed broadcasts."""
    disable_dropout: bool = True
    """Whether every dropout of the base model and of LoRA is 0 in training."""
    generate_during_eval: bool = False
    """Whether every evaluation writes completions of fixed held-out prompts."""

    augment_data: bool = False
    """Whether a share of training rows gets one augmented twin."""
    augmentation_strategy: AugmentationStrategy = "paraphrase"
    """How twins differ: paraphrase, diacritics (off; on as the data has), orthography or digits."""
    augmentation_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of training rows that get a twin."""
    paraphrase_model: Name | None = None
    """Model that paraphrases; null takes the model in training."""
    create_hard_negatives: bool = False
    """Whether hard negatives are mined from other rows."""
    hard_negative_strategy: HardNegativeStrategy = "semantic_search"
    """How they are found: by embeddings, by bm25 word overlap, or by self (the model's answers)."""
    mining_model: Name | None = None
    """Model whose embeddings or answers are used for mining; null takes the model in training."""
