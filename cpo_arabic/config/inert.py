"""When a field has no effect, and which switch says so: one table.

The table serves three: the warning for a field that was set for nothing, the reference page, and
the test that changes every field and demands a visible effect unless this table excuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cpo_arabic.config.problems import as_written
from cpo_arabic.config.rules import Settled


@dataclass(frozen=True)
class Inert:
    """Fields that have no effect while a switch stands as it does."""

    fields: tuple[str, ...]
    switches: tuple[str, ...]
    when: str
    """The condition in words, for the reference."""
    holds: Callable[[Settled], bool]
    quiet: bool = False
    """Setting it is a statement rather than a mistake, so no warning is given."""


@dataclass(frozen=True)
class Reason:
    """Why one field has no effect now."""

    because: str
    """``cpo.use_queue is false``."""
    switches: str
    quiet: bool


def inert_reason(path: str, c: Settled) -> Reason | None:
    """Why the field has no effect in this configuration, or None where it has one."""
    for entry in INERT:
        if path in entry.fields and entry.holds(c):
            states = (f"{s} is {as_written(c.resolved.get(s))}" for s in entry.switches)
            return Reason(" and ".join(states), " or ".join(entry.switches), entry.quiet)
    return None


def _no_contrast(c: Settled) -> bool:
    return c.cpo.contrastive_weight == 0


def _no_preference(c: Settled) -> bool:
    return c.cpo.preference_weight == 0


def _no_negatives(c: Settled) -> bool:
    return _no_contrast(c) and _no_preference(c)


def _no_held_out_rows(c: Settled) -> bool:
    return c.data.validation_file is None and c.data.validation_split_percentage == 0


_WEIGHTS = ("cpo.preference_weight", "cpo.contrastive_weight")
_PREFERENCE = ("cpo.preference_weight",)
_CONTRAST = ("cpo.contrastive_weight",)

INERT: tuple[Inert, ...] = (
    Inert(
        (
            "cpo.num_negatives",
            "cpo.negative_sampling_strategy",
            "cpo.hard_negative_ratio",
            "data.multiple_negatives_column",
            "data.hard_negatives_column",
            "data.create_hard_negatives",
        ),
        _WEIGHTS,
        "both are 0: no term has negatives",
        _no_negatives,
    ),
    Inert(
        (
            "cpo.beta",
            "cpo.temperature",
            "cpo.alpha",
            "cpo.loss_type",
            "cpo.label_smoothing",
            "cpo.cpo_gamma",
            "cpo.reference_model_name",
            "cpo.force_use_ref_model",
            "cpo.ref_model_init_kwargs",
            "cpo.precompute_ref_log_probs",
        ),
        _PREFERENCE,
        "it is 0: there is no preference term",
        _no_preference,
    ),
    Inert(
        (
            "cpo.margin",
            "cpo.cpo_beta",
            "cpo.simcse_dropout",
            "cpo.contrastive_temperature",
            "cpo.use_momentum",
            "cpo.momentum_beta",
            "cpo.use_queue",
            "cpo.queue_size",
            "cpo.normalize_embeddings",
            "cpo.projection_dim",
        ),
        _CONTRAST,
        "it is 0: there is no contrastive term",
        _no_contrast,
    ),
    Inert(
        ("cpo.temperature",),
        ("cpo.loss_type",),
        "it is ipo, which compares scores and not rewards",
        lambda c: c.cpo.loss_type == "ipo",
    ),
    Inert(
        ("cpo.cpo_gamma",),
        ("cpo.loss_type",),
        "it is not simpo",
        lambda c: c.cpo.loss_type != "simpo",
    ),
    Inert(
        ("cpo.label_smoothing",),
        ("cpo.loss_type",),
        "it is not sigmoid (a value above 0 is refused)",
        lambda c: c.cpo.loss_type != "sigmoid",
        quiet=True,
    ),
    Inert(
        ("cpo.reference_free",),
        ("cpo.force_use_ref_model", "cpo.reference_model_name"),
        "no reference is in use anyway; true refuses settings that bring one in",
        lambda c: not c.reference_in_use,
        quiet=True,
    ),
    Inert(
        ("cpo.force_use_ref_model",),
        ("cpo.reference_model_name",),
        "a named reference is in use anyway",
        lambda c: c.cpo.reference_model_name is not None,
        quiet=True,
    ),
    Inert(
        ("cpo.ref_model_init_kwargs",),
        ("cpo.reference_model_name",),
        "it is null: the starting model serves, or none",
        lambda c: c.cpo.reference_model_name is None,
    ),
    Inert(
        ("cpo.hard_negative_ratio",),
        ("cpo.negative_sampling_strategy",),
        "it is random, which draws from both pools together",
        lambda c: c.cpo.negative_sampling_strategy == "random",
    ),
    Inert(
        ("cpo.momentum_beta",),
        ("cpo.use_momentum",),
        "it is false",
        lambda c: not c.cpo.use_momentum,
    ),
    Inert(("cpo.queue_size",), ("cpo.use_queue",), "it is false", lambda c: not c.cpo.use_queue),
    Inert(
        ("cpo.truncation_mode",),
        ("data.truncation",),
        "it is false: long rows are refused",
        lambda c: not c.data.truncation,
    ),
    Inert(
        (
            "optimization.lora_rank",
            "optimization.lora_alpha",
            "optimization.lora_dropout",
            "optimization.lora_target_modules",
        ),
        ("optimization.use_lora",),
        "it is false: all weights train",
        lambda c: not c.optimization.use_lora,
    ),
    Inert(
        ("optimization.lora_dropout",),
        ("data.disable_dropout",),
        "it is true",
        lambda c: c.data.disable_dropout,
    ),
    Inert(
        ("optimization.quantization_bits",),
        ("optimization.use_quantization",),
        "it is false",
        lambda c: not c.optimization.use_quantization,
    ),
    Inert(
        ("data.sanity_check_size",),
        ("data.sanity_check",),
        "it is false",
        lambda c: not c.data.sanity_check,
    ),
    Inert(
        ("data.augmentation_strategy", "data.augmentation_ratio", "data.paraphrase_model"),
        ("data.augment_data",),
        "it is false",
        lambda c: not c.data.augment_data,
    ),
    Inert(
        ("data.paraphrase_model",),
        ("data.augmentation_strategy",),
        "it is not paraphrase",
        lambda c: c.data.augmentation_strategy != "paraphrase",
    ),
    Inert(
        ("data.hard_negative_strategy", "data.mining_model"),
        ("data.create_hard_negatives",),
        "it is false",
        lambda c: not c.data.create_hard_negatives,
    ),
    Inert(
        ("data.mining_model",),
        ("data.hard_negative_strategy",),
        "it is bm25, which counts words",
        lambda c: c.data.hard_negative_strategy == "bm25",
    ),
    Inert(
        ("data.max_tokens_per_row",),
        ("data.padding",),
        "it is not packed",
        lambda c: c.data.padding != "packed",
    ),
    Inert(
        ("data.validation_split_percentage",),
        ("data.validation_file",),
        "a file was named",
        lambda c: c.is_set("data.validation_file") and c.data.validation_file is not None,
    ),
    Inert(
        ("data.dataset_config_name", "data.dataset_split"),
        ("data.dataset_name",),
        "it is null: rows come from train_file",
        lambda c: c.data.dataset_name is None,
    ),
    Inert(
        ("data.train_file",),
        ("data.dataset_name",),
        "rows come from that data set (naming both is refused)",
        lambda c: c.data.dataset_name is not None,
    ),
    Inert(
        ("training.num_epochs",),
        ("training.max_steps",),
        "a number of steps was given",
        lambda c: c.training.max_steps is not None,
    ),
    Inert(
        ("training.warmup_steps", "training.warmup_ratio"),
        ("training.lr_scheduler_type",),
        "it is constant; constant_with_warmup has a warm-up",
        lambda c: c.training.lr_scheduler_type == "constant",
    ),
    Inert(
        ("training.eval_steps", "training.eval_batch_size", "data.generate_during_eval"),
        ("data.validation_file", "data.validation_split_percentage"),
        "there are no held-out rows",
        _no_held_out_rows,
    ),
    Inert(
        ("logging.wandb_project", "logging.wandb_entity", "logging.wandb_mode"),
        ("logging.use_wandb",),
        "it is false",
        lambda c: not c.logging.use_wandb,
    ),
)
