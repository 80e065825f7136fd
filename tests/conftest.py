"""A toy model with the demo's real tokenizer, and runs of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"

if not torch.cuda.is_available():
    # read when triton is first imported, which any test's imports may do
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2 whose vocabulary is the demo tokenizer's."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("toy-model")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base-model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def toy_config(toy_model: Path, tmp_path: Path) -> Callable[..., Any]:
    """A resolved configuration of a short run of the toy model on the demo's data."""
    from cpo_arabic.config import load_config

    def make(*overrides: str) -> Any:
        defaults = [
            f"model.name={toy_model}",
            "model.max_length=192",
            f"data.train_file={DEMO / 'data' / 'train.jsonl'}",
            f"data.validation_file={DEMO / 'data' / 'heldout.jsonl'}",
            "data.max_samples=12",
            "data.padding=packed",
            "data.preprocessing_num_workers=1",
            "data.conversation_template=plain",
            "cpo.max_prompt_length=64",
            "cpo.max_target_length=64",
            "cpo.num_negatives=2",
            f"training.output_dir={tmp_path / 'run'}",
            "training.batch_size=2",
            "training.gradient_accumulation_steps=2",
            "training.learning_rate=1e-2",
            "training.max_steps=4",
            "logging.use_tensorboard=false",
            "optimization.lora_rank=4",
        ]
        return load_config(None, [*defaults, *overrides], environ={}, env_file=None).config

    return make
