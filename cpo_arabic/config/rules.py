"""The rules that join fields: each names its fields, says what is wrong, and what to write.

A rule sees the configuration with unset values resolved, and whether a field was set. It returns
the sentence and the remedy, or nothing. It never changes a value.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from cpo_arabic.config.problems import as_written
from cpo_arabic.config.secrets import HIDDEN, holds_secret, is_secret_key
from cpo_arabic.errors import Problem

if TYPE_CHECKING:
    from cpo_arabic.config.base import Section
    from cpo_arabic.config.root import CPOConfig


class Broken(NamedTuple):
    """A broken rule: the sentence, the remedy, and the field to point at."""

    rule: str
    remedy: str
    at: str = ""


@dataclass(frozen=True)
class Rule:
    """A rule with the fields it reads."""

    fields: tuple[str, ...]
    test: Callable[[Settled], Broken | None]

    @property
    def name(self) -> str:
        """The name it has in the reference."""
        return self.test.__name__

    @property
    def sentence(self) -> str:
        """What it demands, for the reference."""
        return (self.test.__doc__ or "").strip()


class Settled:
    """A configuration as a rule sees it: resolved values, and what was set by hand."""

    def __init__(self, config: CPOConfig) -> None:
        resolved = config.resolved()
        self.written = config
        self.model = resolved.model
        self.training = resolved.training
        self.data = resolved.data
        self.cpo = resolved.cpo
        self.optimization = resolved.optimization
        self.logging = resolved.logging
        self.resolved = resolved

    def is_set(self, path: str) -> bool:
        """Whether the field was given a value."""
        return self.written.is_set(path)

    @property
    def reference_in_use(self) -> bool:
        """Whether scores are measured against a reference model."""
        return self.cpo.force_use_ref_model or self.cpo.reference_model_name is not None

    @property
    def step_keys(self) -> int:
        """Keys that one optimizer step of one process adds to the queue."""
        groups = self.training.batch_size * self.training.gradient_accumulation_steps
        return groups * (1 + self.cpo.num_negatives)


RULES: list[Rule] = []


def rule(*fields: str) -> Callable[[Callable[[Settled], Broken | None]], Rule]:
    """Register a rule over these fields; the first is the one it points at by default."""

    def register(test: Callable[[Settled], Broken | None]) -> Rule:
        made = Rule(fields, test)
        RULES.append(made)
        return made

    return register


def whole_problems(config: CPOConfig, without: Collection[str] = ()) -> list[Problem]:
    """All broken rules, but for those that read a field already known to be wrong."""
    seen = Settled(config)
    rules = [r for r in RULES if not set(r.fields) & set(without)]
    return [*_broken(rules, seen), *_secrets(config, without)]


def section_problems(section: Section) -> list[Problem]:
    """The broken rules whose fields are all in one section that stands alone."""
    from cpo_arabic.config.root import CPOConfig

    name = section.section
    whole = CPOConfig.assembled({**_default_sections(), name: section})
    rules = [r for r in RULES if all(field.startswith(f"{name}.") for field in r.fields)]
    return _broken(rules, Settled(whole))


@cache
def _default_sections() -> dict[str, Section]:
    from cpo_arabic.config.fields import SECTIONS

    return {name: cls.model_construct() for name, cls in SECTIONS.items()}


def _broken(rules: Iterable[Rule], seen: Settled) -> list[Problem]:
    return [_problem(found, one, seen) for one in rules if (found := one.test(seen)) is not None]


def _problem(found: Broken, one: Rule, seen: Settled) -> Problem:
    at = found.at or _most_explicit(one.fields, seen)
    return Problem(
        rule=found.rule,
        remedy=found.remedy,
        field=at,
        value=as_written(seen.resolved.get(at)),
        also=tuple(field for field in one.fields if field != at),
    )


def _most_explicit(fields: tuple[str, ...], seen: Settled) -> str:
    return next((field for field in fields if seen.is_set(field)), fields[0])


def _secrets(config: CPOConfig, without: Collection[str]) -> list[Problem]:
    from cpo_arabic.config.fields import all_fields

    return [
        Problem(
            rule="holds a credential, which would be saved with the run",
            remedy="take it out; log in with `hf auth login` or `wandb login`, or set HF_TOKEN",
            field=path,
            value=HIDDEN,
        )
        for path in all_fields()
        if path not in without and config.is_set(path) and _holds_secret(config.get(path))
    ]


def _holds_secret(value: Any) -> bool:
    if isinstance(value, str):
        return holds_secret(value)
    if isinstance(value, dict):
        return any(
            (is_secret_key(key) and isinstance(item, str))
            or holds_secret(key)
            or _holds_secret(item)
            for key, item in value.items()
        )
    return isinstance(value, list) and any(_holds_secret(item) for item in value)


# Lengths


@rule("cpo.max_length", "model.max_length")
def length_within_model(c: Settled) -> Broken | None:
    """``cpo.max_length`` is at most ``model.max_length``."""
    if c.cpo.max_length <= c.model.max_length:
        return None
    return Broken(
        f"cpo.max_length {c.cpo.max_length} is more than model.max_length {c.model.max_length}",
        f"set model.max_length to {c.cpo.max_length} (first), or leave cpo.max_length out: "
        "unset, it follows model.max_length",
    )


@rule("cpo.max_prompt_length", "cpo.max_length", "model.max_length")
def prompt_leaves_room(c: Settled) -> Broken | None:
    """``cpo.max_prompt_length`` is less than ``cpo.max_length``, so that a completion fits."""
    if c.cpo.max_prompt_length < c.cpo.max_length:
        return None
    return Broken(
        f"cpo.max_prompt_length {c.cpo.max_prompt_length} leaves no token of "
        f"cpo.max_length {c.cpo.max_length} to a completion",
        f"set cpo.max_prompt_length below {c.cpo.max_length}; unset, it is {c.cpo.max_length // 2}",
    )


@rule("cpo.max_target_length", "cpo.max_length", "model.max_length")
def target_leaves_room(c: Settled) -> Broken | None:
    """``cpo.max_target_length`` is less than ``cpo.max_length``, so that a prompt fits."""
    if c.cpo.max_target_length < c.cpo.max_length:
        return None
    return Broken(
        f"cpo.max_target_length {c.cpo.max_target_length} leaves no token of "
        f"cpo.max_length {c.cpo.max_length} to a prompt",
        f"set cpo.max_target_length below {c.cpo.max_length}; unset, it is what the prompt leaves",
    )


@rule("data.max_tokens_per_row", "cpo.max_length", "model.max_length")
def packed_row_holds_a_sequence(c: Settled) -> Broken | None:
    """``data.max_tokens_per_row`` is at least ``cpo.max_length``."""
    if (c.data.max_tokens_per_row or c.cpo.max_length) >= c.cpo.max_length:
        return None
    return Broken(
        f"data.max_tokens_per_row {c.data.max_tokens_per_row} cannot hold one sequence of "
        f"cpo.max_length {c.cpo.max_length}",
        f"set it to at least {c.cpo.max_length}, or lower cpo.max_length",
    )


# Reference model


@rule("cpo.reference_free", "cpo.force_use_ref_model", "cpo.reference_model_name")
def reference_free_means_none(c: Settled) -> Broken | None:
    """``cpo.reference_free`` excludes ``force_use_ref_model`` and ``reference_model_name``."""
    if not (c.cpo.reference_free and c.reference_in_use):
        return None
    brings = (
        "cpo.force_use_ref_model is true"
        if c.cpo.force_use_ref_model
        else f"cpo.reference_model_name is {as_written(c.cpo.reference_model_name)}"
    )
    return Broken(
        f"cpo.reference_free is true, but {brings}",
        "set reference_free: false to use the reference, or take the reference out",
    )


@rule("cpo.precompute_ref_log_probs", "cpo.force_use_ref_model", "cpo.reference_model_name")
def precompute_needs_reference(c: Settled) -> Broken | None:
    """``cpo.precompute_ref_log_probs`` needs a reference model in use."""
    if not c.cpo.precompute_ref_log_probs or c.reference_in_use:
        return None
    return Broken(
        "cpo.precompute_ref_log_probs is true, but no reference model is in use "
        "(cpo.force_use_ref_model is false and cpo.reference_model_name is null)",
        "set force_use_ref_model: true first, or precompute_ref_log_probs: false",
    )


# Losses and their inputs


@rule("cpo.preference_weight", "cpo.cpo_alpha", "cpo.contrastive_weight")
def something_to_optimise(c: Settled) -> Broken | None:
    """At least one of the three weights is above 0."""
    if c.cpo.preference_weight or c.cpo.cpo_alpha or c.cpo.contrastive_weight:
        return None
    return Broken(
        "cpo.preference_weight, cpo.cpo_alpha and cpo.contrastive_weight are all 0: "
        "nothing would be optimised",
        "give at least one of them a weight above 0",
    )


@rule("cpo.label_smoothing", "cpo.loss_type")
def smoothing_is_sigmoids(c: Settled) -> Broken | None:
    """``cpo.label_smoothing`` above 0 needs ``loss_type: sigmoid``."""
    if not c.cpo.label_smoothing or c.cpo.loss_type == "sigmoid":
        return None
    return Broken(
        f"cpo.label_smoothing is {c.cpo.label_smoothing}, but cpo.loss_type "
        f"{c.cpo.loss_type} has no label smoothing",
        "set loss_type: sigmoid first, or label_smoothing: 0",
    )


@rule(
    "cpo.hard_negative_ratio",
    "cpo.negative_sampling_strategy",
    "data.hard_negatives_column",
    "data.create_hard_negatives",
)
def hard_negatives_have_a_source(c: Settled) -> Broken | None:
    """``cpo.hard_negative_ratio`` above 0 needs a column of hard negatives, or mining."""
    drawn = c.cpo.hard_negative_ratio and c.cpo.negative_sampling_strategy != "random"
    if not drawn or c.data.hard_negatives_column is not None or c.data.create_hard_negatives:
        return None
    return Broken(
        f"cpo.hard_negative_ratio is {c.cpo.hard_negative_ratio} under "
        f"{c.cpo.negative_sampling_strategy} sampling, but there is no hard pool "
        "(data.hard_negatives_column is null and data.create_hard_negatives is false)",
        "name a hard_negatives_column, or set create_hard_negatives: true, "
        "or hard_negative_ratio: 0",
    )


@rule(
    "data.streaming",
    "data.cache_dir",
    "data.train_file",
    "data.max_samples",
    "data.create_hard_negatives",
    "data.augment_data",
)
def streaming_holds_no_rows(c: Settled) -> Broken | None:
    """``data.streaming`` needs a folder for the tokens, and nothing that needs all rows at once."""
    if not c.data.streaming:
        return None
    if c.data.cache_dir is None:
        return Broken(
            "data.streaming is true, but data.cache_dir is null: the tokens have nowhere to go",
            "name a folder in cache_dir first, or streaming: false",
        )
    needs_all = {
        "data.train_file as a mixture": isinstance(c.data.train_file, dict),
        "data.max_samples": c.data.max_samples is not None,
        "data.create_hard_negatives": c.data.create_hard_negatives,
        "data.augment_data": c.data.augment_data,
    }
    for name, used in needs_all.items():
        if used:
            return Broken(
                f"data.streaming is true, but {name} needs every row at once",
                "leave one of them out",
            )
    return None


@rule("cpo.projection_dim", "cpo.contrastive_weight")
def projection_needs_contrast(c: Settled) -> Broken | None:
    """``cpo.projection_dim`` needs a contrastive term."""
    if c.cpo.projection_dim is None or c.cpo.contrastive_weight:
        return None
    return Broken(
        f"cpo.projection_dim is {c.cpo.projection_dim}, but cpo.contrastive_weight is 0: "
        "no term would train the projection head",
        "give contrastive_weight a value above 0 first, or projection_dim: null",
    )


@rule(
    "cpo.queue_size",
    "cpo.use_queue",
    "cpo.num_negatives",
    "training.batch_size",
    "training.gradient_accumulation_steps",
)
def queue_holds_a_step(c: Settled) -> Broken | None:
    """A queue in use holds at least the keys of one optimizer step."""
    if not c.cpo.use_queue or c.cpo.queue_size >= c.step_keys:
        return None
    return Broken(
        f"cpo.queue_size {c.cpo.queue_size} is less than the {c.step_keys} keys of one step "
        f"(batch_size {c.training.batch_size} × gradient_accumulation_steps "
        f"{c.training.gradient_accumulation_steps} × (1 + num_negatives {c.cpo.num_negatives}))",
        f"set queue_size to at least {c.step_keys} (first), or use_queue: false",
    )


# Model, precision and memory


@rule("optimization.use_quantization", "optimization.use_lora")
def quantised_weights_do_not_train(c: Settled) -> Broken | None:
    """``optimization.use_quantization`` needs LoRA: quantised weights do not train."""
    if not c.optimization.use_quantization or c.optimization.use_lora:
        return None
    return Broken(
        "optimization.use_quantization is true and optimization.use_lora is false, "
        "but quantised weights cannot be trained in full",
        "set use_lora: true first, or use_quantization: false",
    )


@rule("optimization.lora_target_modules")
def adapters_leave_embeddings(c: Settled) -> Broken | None:
    """``optimization.lora_target_modules`` names no embedding and no output head."""
    targets = c.optimization.lora_target_modules
    names = [targets] if isinstance(targets, str) else targets
    bad = [n for n in names if n.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte")]
    if not bad:
        return None
    return Broken(
        f"optimization.lora_target_modules names {', '.join(bad)}: "
        "embeddings and the output head get no adapter",
        "leave it out, or write all-linear, which adapts every linear layer but the head",
    )


@rule("optimization.bf16", "model.dtype")
def one_sixteen_bit_format(c: Settled) -> Broken | None:
    """``optimization.bf16`` excludes ``model.dtype: float16``."""
    if not c.optimization.bf16 or c.model.dtype != "float16":
        return None
    return Broken(
        "optimization.bf16 is true, but model.dtype is float16: two 16-bit formats",
        "write dtype: auto, float32 or bfloat16 first, or bf16: false",
    )


@rule("model.attn_implementation", "model.dtype", "optimization.bf16")
def flash_attention_is_sixteen_bit(c: Settled) -> Broken | None:
    """``flash_attention_2`` excludes ``model.dtype: float32`` without ``optimization.bf16``."""
    flash = c.model.attn_implementation == "flash_attention_2"
    if not flash or c.model.dtype != "float32" or c.optimization.bf16:
        return None
    return Broken(
        "model.attn_implementation is flash_attention_2, but model.dtype is float32 "
        "and optimization.bf16 is false: that kernel has no float32",
        "write dtype: bfloat16 first, or attn_implementation: sdpa",
    )


# Training schedule


@rule("training.warmup_ratio", "training.warmup_steps")
def one_warmup(c: Settled) -> Broken | None:
    """Only one of ``training.warmup_steps`` and ``training.warmup_ratio`` is above 0."""
    if not (c.training.warmup_ratio and c.training.warmup_steps):
        return None
    return Broken(
        f"training.warmup_steps is {c.training.warmup_steps} and training.warmup_ratio is "
        f"{c.training.warmup_ratio}: one warm-up has two lengths",
        "keep one of the two and set the other to 0",
    )


# Data


@rule("data.dataset_name", "data.train_file")
def one_source_of_rows(c: Settled) -> Broken | None:
    """Only one of ``data.dataset_name`` and ``data.train_file`` is set."""
    if c.data.dataset_name is None or not c.is_set("data.train_file"):
        return None
    return Broken(
        f"data.dataset_name is {as_written(c.data.dataset_name)} and data.train_file is "
        f"{as_written(c.data.train_file)}: rows come from one source",
        "keep one of the two",
    )


@rule("data.validation_split_percentage", "data.validation_file")
def one_source_of_held_out_rows(c: Settled) -> Broken | None:
    """``data.validation_split_percentage`` is not set above 0 beside a named validation file."""
    both = c.is_set("data.validation_split_percentage") and c.is_set("data.validation_file")
    if not both or not c.data.validation_split_percentage or c.data.validation_file is None:
        return None
    return Broken(
        f"data.validation_split_percentage is {c.data.validation_split_percentage} and "
        f"data.validation_file is {as_written(c.data.validation_file)}: "
        "held-out rows come from one source",
        "leave the percentage out, or write validation_file: null to split the training rows",
    )


@rule("data.validation_file", "data.train_file")
def held_out_rows_are_not_trained_on(c: Settled) -> Broken | None:
    """``data.validation_file`` is not a training file."""
    return _leak(c, "data.validation_file", c.data.validation_file)


@rule("data.test_file", "data.train_file")
def test_rows_are_not_trained_on(c: Settled) -> Broken | None:
    """``data.test_file`` is not a training file."""
    return _leak(c, "data.test_file", c.data.test_file)


def _leak(c: Settled, field: str, path: str | None) -> Broken | None:
    if path is None or c.data.dataset_name is not None or path not in train_files(c):
        return None
    return Broken(
        f"{field} {as_written(path)} is also trained on (data.train_file)",
        "name a file of rows that are held out",
        at=field,
    )


def train_files(c: Settled) -> list[str]:
    """The paths of ``data.train_file``, whichever form it has."""
    files = c.data.train_file
    return [files] if isinstance(files, str) else list(files)


_COLUMNS = (
    "data.prompt_column",
    "data.chosen_column",
    "data.rejected_column",
    "data.system_column",
    "data.multiple_negatives_column",
    "data.hard_negatives_column",
)


@rule(*_COLUMNS)
def columns_differ(c: Settled) -> Broken | None:
    """No two of the data columns have the same name."""
    seen: dict[str, str] = {}
    for field in _COLUMNS:
        name = c.resolved.get(field)
        if name is not None and name in seen:
            return Broken(
                f"{seen[name]} and {field} are both {as_written(name)}",
                "give each its own column; write null for an optional one that the data lacks",
                at=field,
            )
        seen[name] = field
    return None


@cache
def has_package(name: str) -> bool:
    """Whether a package is installed, without importing it."""
    return importlib.util.find_spec(name) is not None
