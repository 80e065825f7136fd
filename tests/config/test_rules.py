"""Every rule between fields: a configuration that breaks it, and the nearest that does not."""

from __future__ import annotations

from typing import Any

import pytest

from cpo_arabic.config import ConfigError, CPOConfig
from cpo_arabic.config.rules import RULES, has_package

# rule: (breaks it, does not break it), each over the defaults
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "length_within_model": ({"cpo.max_length": 2049}, {"cpo.max_length": 2048}),
    "prompt_leaves_room": ({"cpo.max_prompt_length": 2048}, {"cpo.max_prompt_length": 2047}),
    "target_leaves_room": ({"cpo.max_target_length": 2048}, {"cpo.max_target_length": 2047}),
    "packed_row_holds_a_sequence": (
        {"data.max_tokens_per_row": 2047},
        {"data.max_tokens_per_row": 2048},
    ),
    "reference_free_means_none": (
        {"cpo.reference_free": True, "cpo.reference_model_name": "x"},
        {"cpo.reference_free": True},
    ),
    "precompute_needs_reference": (
        {"cpo.precompute_ref_log_probs": True},
        {"cpo.precompute_ref_log_probs": True, "cpo.force_use_ref_model": True},
    ),
    "something_to_optimise": (
        {"cpo.preference_weight": 0, "cpo.cpo_alpha": 0, "cpo.contrastive_weight": 0},
        {"cpo.preference_weight": 0, "cpo.cpo_alpha": 1e-9, "cpo.contrastive_weight": 0},
    ),
    "smoothing_is_sigmoids": (
        {"cpo.label_smoothing": 0.1},
        {"cpo.label_smoothing": 0.1, "cpo.loss_type": "sigmoid"},
    ),
    "hard_negatives_have_a_source": (
        {
            "cpo.hard_negative_ratio": 0.5,
            "cpo.negative_sampling_strategy": "mixed",
            "data.hard_negatives_column": None,
        },
        {"cpo.hard_negative_ratio": 0.5, "data.hard_negatives_column": None},
    ),
    "streaming_holds_no_rows": (
        {"data.streaming": True, "data.cache_dir": "cache", "data.max_samples": 5},
        {"data.streaming": True, "data.cache_dir": "cache"},
    ),
    "projection_needs_contrast": (
        {"cpo.projection_dim": 8, "cpo.contrastive_weight": 0},
        {"cpo.projection_dim": 8},
    ),
    "queue_holds_a_step": (
        {"cpo.use_queue": True, "cpo.queue_size": 31},  # 4 groups × 4 micro-batches × 2 keys
        {"cpo.use_queue": True, "cpo.queue_size": 32},
    ),
    "quantised_weights_do_not_train": (
        {"optimization.use_quantization": True, "optimization.use_lora": False},
        {"optimization.use_quantization": True},
    ),
    "adapters_leave_embeddings": (
        {"optimization.lora_target_modules": ["q_proj", "model.embed_tokens"]},
        {"optimization.lora_target_modules": ["q_proj"]},
    ),
    "one_sixteen_bit_format": (
        {"optimization.bf16": True, "model.dtype": "float16"},
        {"optimization.bf16": True, "model.dtype": "float32"},
    ),
    "flash_attention_is_sixteen_bit": (
        {"model.attn_implementation": "flash_attention_2", "model.dtype": "float32"},
        {
            "model.attn_implementation": "flash_attention_2",
            "model.dtype": "float32",
            "optimization.bf16": True,
        },
    ),
    "one_warmup": (
        {"training.warmup_steps": 1, "training.warmup_ratio": 0.1},
        {"training.warmup_steps": 1, "training.warmup_ratio": 0.0},
    ),
    "one_source_of_rows": (
        {"data.dataset_name": "x", "data.train_file": "data/cpo_train.jsonl"},
        {"data.dataset_name": "x"},
    ),
    "one_source_of_held_out_rows": (
        {"data.validation_split_percentage": 0.1, "data.validation_file": "v.jsonl"},
        {"data.validation_split_percentage": 0.0, "data.validation_file": "v.jsonl"},
    ),
    "held_out_rows_are_not_trained_on": (
        {"data.validation_file": "data/cpo_train.jsonl"},
        {"data.validation_file": "data/other.jsonl"},
    ),
    "test_rows_are_not_trained_on": (
        {"data.test_file": "a.jsonl", "data.train_file": {"a.jsonl": 1.0}},
        {"data.test_file": "a.jsonl", "data.train_file": ["b.jsonl"]},
    ),
    "columns_differ": (
        {"data.rejected_column": "chosen"},
        {"data.system_column": None, "data.hard_negatives_column": None},
    ),
}


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", CASES)
def test_a_broken_rule_is_refused_with_its_fields_and_a_remedy(name: str) -> None:
    broken, _ = CASES[name]
    rule = next(rule for rule in RULES if rule.name == name)
    with pytest.raises(ConfigError) as caught:
        CPOConfig().updated(broken)
    found = next(one for one in caught.value.problems if one.field in rule.fields)
    assert found.remedy
    assert {found.field, *found.also} == set(rule.fields)
    assert rule.sentence


@pytest.mark.parametrize("name", CASES)
def test_the_nearest_legal_configuration_passes(name: str) -> None:
    changes = CASES[name][1]
    made = CPOConfig().updated(changes)
    assert {field: made.get(field) for field in changes} == changes


@pytest.mark.parametrize("name", CASES)
def test_each_case_breaks_no_other_rule(name: str) -> None:
    """A rule that fires for another's case would hide that the other is gone."""
    with pytest.raises(ConfigError) as caught:
        CPOConfig().updated(CASES[name][0])
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"cpo.reference_free": True, "cpo.force_use_ref_model": True},
        {"optimization.lora_target_modules": "lm_head"},
        {"data.multiple_negatives_column": "hard_negatives"},
    ],
)
def test_further_ways_to_break_a_rule(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CPOConfig().updated(changes)


def test_mining_is_a_source_of_hard_negatives() -> None:
    broken = CASES["hard_negatives_have_a_source"][0]
    made = CPOConfig().updated(broken | {"data.create_hard_negatives": True})
    assert made.cpo.hard_negative_ratio == broken["cpo.hard_negative_ratio"]


def test_a_validation_file_may_be_null_beside_a_percentage() -> None:
    made = CPOConfig().updated(
        {"data.validation_file": None, "data.validation_split_percentage": 0.2}
    )
    assert made.data.validation_split_percentage == 0.2


def test_packages_are_found_without_importing_them() -> None:
    assert has_package("pydantic") and not has_package("no_such_package_here")


def test_streaming_without_a_folder_for_its_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere to go"):
        CPOConfig().data.streaming = True
