"""The specification's fields, defaults, YAML files and Python lines, all as they are printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cpo_arabic.config import CPOConfig, CPODataConfig, CPOSpecificConfig
from cpo_arabic.config.fields import all_fields
from tests.config.helpers import load

CPO = {
    "beta": 0.1,
    "temperature": 0.1,
    "alpha": 1.0,
    "loss_type": "cpo",
    "reference_free": False,
    "reference_model_name": None,
    "num_negatives": 1,
    "negative_sampling_strategy": "random",
    "hard_negative_ratio": 0.0,
    "margin": 0.1,
    "cpo_alpha": 1.0,
    "cpo_beta": 0.1,
    "cpo_gamma": 1.0,
    "simcse_dropout": 0.1,
    "contrastive_temperature": 0.05,
    "contrastive_weight": 1.0,
    "preference_weight": 1.0,
    "max_length": 2048,
    "max_prompt_length": 1024,
    "max_target_length": 1024,
    "truncation_mode": "keep_end",
    "precompute_ref_log_probs": False,
    "model_init_kwargs": None,
    "ref_model_init_kwargs": None,
    "force_use_ref_model": False,
    "use_momentum": False,
    "momentum_beta": 0.999,
    "queue_size": 65536,
    "use_queue": False,
    "normalize_embeddings": True,
    "projection_dim": None,
}
DATA = {
    "train_file": "data/cpo_train.jsonl",
    "validation_file": "data/cpo_validation.jsonl",
    "test_file": None,
    "max_samples": None,
    "validation_split_percentage": 0.1,
    "preprocessing_num_workers": 4,
    "prompt_column": "prompt",
    "chosen_column": "chosen",
    "rejected_column": "rejected",
    "system_column": "system",
    "multiple_negatives_column": "negatives",
    "hard_negatives_column": "hard_negatives",
    "conversation_template": "default",
    "add_special_tokens": True,
    "truncation": True,
    "padding": "max_length",
    "sanity_check": False,
    "sanity_check_size": 100,
    "ignore_bias_buffers": False,
    "disable_dropout": True,
    "generate_during_eval": False,
    "augment_data": False,
    "augmentation_strategy": "paraphrase",
    "augmentation_ratio": 0.1,
    "create_hard_negatives": False,
    "hard_negative_strategy": "semantic_search",
}

EXAMPLE = """
# config/cpo_config.yaml
model:
  name: "Qwen/Qwen-7B"
  max_length: 2048

training:
  learning_rate: 1.0e-6
  batch_size: 4
  num_epochs: 1
  gradient_accumulation_steps: 4
  warmup_steps: 100

data:
  train_file: "data/cpo_train.jsonl"
  validation_file: "data/cpo_validation.jsonl"
  prompt_column: "prompt"
  chosen_column: "chosen"
  rejected_column: "rejected"
  multiple_negatives_column: "negatives"
  augment_data: true
  augmentation_ratio: 0.1

cpo:
  beta: 0.1
  temperature: 0.1
  alpha: 1.0

  # Contrastive learning
  num_negatives: 2
  negative_sampling_strategy: "random"
  hard_negative_ratio: 0.2
  margin: 0.1

  # CPO parameters
  cpo_alpha: 1.0
  cpo_beta: 0.1
  cpo_gamma: 1.0
  simcse_dropout: 0.1

  # Contrastive loss
  contrastive_temperature: 0.05
  contrastive_weight: 1.0
  preference_weight: 1.0

  # Advanced features
  use_momentum: false
  use_queue: false
  normalize_embeddings: true

  max_length: 2048
  max_prompt_length: 1024

optimization:
  use_lora: true
  lora_rank: 16
  use_quantization: true
  bf16: true

logging:
  use_wandb: true
  wandb_project: "arabic-qwen-cpo"
"""

QUICK = """
model:
  name: "Qwen/Qwen-1_8B"
  max_length: 1024
training:
  learning_rate: 1e-6
  batch_size: 2
  num_epochs: 1
  gradient_accumulation_steps: 8
data:
  train_file: "data/cpo_train_small.jsonl"
  max_samples: 1000
cpo:
  beta: 0.1
  temperature: 0.1
  num_negatives: 1
  contrastive_weight: 1.0
optimization:
  use_lora: true
  lora_rank: 8
  use_quantization: true
"""

PROD = """
model:
  name: "Qwen/Qwen-7B"
  max_length: 2048
training:
  learning_rate: 5e-7
  batch_size: 4
  num_epochs: 1
  gradient_accumulation_steps: 8
cpo:
  beta: 0.1
  temperature: 0.05
  num_negatives: 3
  negative_sampling_strategy: "mixed"
  hard_negative_ratio: 0.3
  contrastive_temperature: 0.02
  contrastive_weight: 1.2
  use_momentum: true
  normalize_embeddings: true
optimization:
  use_lora: true
  lora_rank: 16
  use_gradient_checkpointing: true
  bf16: true
logging:
  use_wandb: true
  wandb_project: "arabic-qwen-cpo-prod"
"""

RESEARCH = """
model:
  name: "Qwen/Qwen-14B"
  max_length: 4096
training:
  learning_rate: 1e-7
  batch_size: 2
  num_epochs: 1
  gradient_accumulation_steps: 16
cpo:
  beta: 0.05
  temperature: 0.02
  num_negatives: 5
  negative_sampling_strategy: "hard"
  hard_negative_ratio: 0.6
  margin: 0.2
  contrastive_temperature: 0.01
  contrastive_weight: 2.0
  use_momentum: true
  momentum_beta: 0.9999
  queue_size: 131072
  use_queue: true
  projection_dim: 256
  normalize_embeddings: true
data:
  augment_data: true
  augmentation_ratio: 0.2
  create_hard_negatives: true
  hard_negative_strategy: "semantic_search"
optimization:
  use_lora: false  # Full fine-tuning
  use_gradient_checkpointing: true
  bf16: true
"""

INSTABILITY = """
training:
  learning_rate: 1e-7  # Lower LR
cpo:
  temperature: 0.1  # Higher temperature
  contrastive_temperature: 0.05
  contrastive_weight: 0.5  # Lower weight
"""

POOR_CONTRAST = """
cpo:
  num_negatives: 5  # More negatives
  hard_negative_ratio: 0.4  # More hard negatives
  contrastive_temperature: 0.02  # Lower temperature
  normalize_embeddings: true
"""

MEMORY = """
training:
  batch_size: 2
  gradient_accumulation_steps: 16
cpo:
  num_negatives: 2  # Fewer negatives
  use_queue: false  # Disable queue
optimization:
  use_gradient_checkpointing: true
"""


@pytest.mark.parametrize("name", CPO)
def test_cpo_fields_have_the_documented_default(name: str) -> None:
    value = getattr(CPOSpecificConfig(), name)
    assert value == CPO[name] and type(value) is type(CPO[name])


@pytest.mark.parametrize("name", DATA)
def test_data_fields_have_the_documented_default(name: str) -> None:
    value = getattr(CPODataConfig(), name)
    assert value == DATA[name] and type(value) is type(DATA[name])


def test_every_field_has_a_one_line_description() -> None:
    """A second string under one field is dropped in silence; so the words are looked at too."""
    for field in all_fields().values():
        assert field.description, field.path
        assert "\n" not in field.description and field.description.endswith("."), field.path
        assert field.expected, field.path


def test_no_two_fields_share_a_description() -> None:
    texts = [field.description for field in all_fields().values()]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize(
    "text", [EXAMPLE, QUICK, PROD, RESEARCH, INSTABILITY, POOR_CONTRAST, MEMORY]
)
def test_the_documented_yaml_loads(tmp_path: Path, text: str) -> None:
    loaded = load(tmp_path, text)
    from_file = [origin for origin in loaded.provenance.values() if origin.kind == "file"]
    leaves = [line for line in text.splitlines() if re.match(r"\s+\w+: *[^#\s]", line)]
    assert len(from_file) == len(leaves)


def test_values_of_the_documented_example_arrive(tmp_path: Path) -> None:
    config = load(tmp_path, EXAMPLE).config
    assert config.training.learning_rate == 1e-6
    assert config.cpo.hard_negative_ratio == 0.2
    assert config.optimization.use_quantization is True
    assert config.logging.wandb_project == "arabic-qwen-cpo"


def test_research_lengths_follow_the_model(tmp_path: Path) -> None:
    cpo = load(tmp_path, RESEARCH).config.cpo
    assert (cpo.max_length, cpo.max_prompt_length, cpo.max_target_length) == (4096, 2048, 2048)


def test_documented_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cpo_config = CPOSpecificConfig(
        beta=0.2,
        temperature=0.05,
        num_negatives=3,
        contrastive_temperature=0.02,
        contrastive_weight=1.5,
        use_momentum=True,
        normalize_embeddings=True,
    )
    config = CPOConfig(cpo=cpo_config)
    config.to_yaml("my_cpo_config.yaml")
    config = CPOConfig.from_yaml("my_cpo_config.yaml")
    assert config.cpo.contrastive_weight == 1.5
    config.cpo.num_negatives = 5
    config.training.learning_rate = 1e-6
    assert config.cpo.num_negatives == 5


def test_documented_assignments_run_in_their_printed_order() -> None:
    config = CPOConfig()
    config.cpo.negative_sampling_strategy = "random"
    config.cpo.num_negatives = 2
    config.cpo.negative_sampling_strategy = "hard"
    config.cpo.hard_negative_ratio = 0.5
    config.cpo.num_negatives = 3
    config.cpo.negative_sampling_strategy = "mixed"
    config.cpo.hard_negative_ratio = 0.3
    config.cpo.num_negatives = 4
    config.cpo.contrastive_temperature = 0.05
    config.cpo.contrastive_weight = 1.0
    config.cpo.normalize_embeddings = True
    config.cpo.use_momentum = True
    config.cpo.momentum_beta = 0.999
    config.cpo.queue_size = 65536
    config.cpo.use_queue = True
    config.cpo.temperature = 0.05
    config.cpo.contrastive_temperature = 0.02
    config.cpo.temperature = 0.2
    config.cpo.contrastive_temperature = 0.1
    assert config.cpo.num_negatives == 4
