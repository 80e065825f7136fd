"""Configuration → tokenizer, policy, reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cpo_arabic.config import CPOConfig
from cpo_arabic.errors import ModelError
from cpo_arabic.modeling.encoder import EmbeddingSettings, ProjectionHead
from cpo_arabic.modeling.loading import (
    LoraSettings,
    ModelSource,
    add_lora,
    check_quantization,
    disable_dropout,
    leave_boolean_buffers_out,
    load_adapter,
    load_model,
    load_projection,
    load_tokenizer,
)
from cpo_arabic.modeling.policy import Policy, Reference, causal_lm
from cpo_arabic.objective.contrastive import ContrastiveSettings
from cpo_arabic.objective.total import ObjectiveSettings


def check_hardware(config: CPOConfig) -> None:
    """Refuses what this machine cannot do, before anything is read.

    Raises:
        ModelError: naming the setting and the override.
    """
    if config.optimization.use_quantization:
        check_quantization()
    no_bf16 = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
    if config.optimization.bf16 and no_bf16:
        raise ModelError(
            "optimization.bf16 is true, but this GPU does not compute in bfloat16; "
            "use --set optimization.bf16=false"
        )


def tokenizer_of(config: CPOConfig) -> Any:
    """The run's tokenizer."""
    return load_tokenizer(
        config.model.tokenizer_name or config.model.name,
        revision=config.model.revision if config.model.tokenizer_name is None else None,
        trust_remote_code=config.model.trust_remote_code,
    )


def weights_dtype(config: CPOConfig) -> torch.dtype:
    """``auto``: bfloat16 for a frozen base under bf16, else float32 (master weights that train)."""
    if config.model.dtype == "auto":
        frozen = config.optimization.use_lora
        return torch.bfloat16 if config.optimization.bf16 and frozen else torch.float32
    dtype = getattr(torch, config.model.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def source_of(config: CPOConfig, name: str | Path | None = None) -> ModelSource:
    """How the trained model is loaded, or another folder in its place."""
    quantised = config.optimization.use_quantization
    return ModelSource(
        name=str(name or config.model.name),
        revision=config.model.revision if name is None else None,
        trust_remote_code=config.model.trust_remote_code,
        dtype=weights_dtype(config),
        attn_implementation=config.model.attn_implementation,
        quantization_bits=config.optimization.quantization_bits if quantised else None,
        init_kwargs=config.cpo.model_init_kwargs,
    )


def build_policy(config: CPOConfig, tokenizer: Any, *, saved: Path | None = None) -> Policy:
    """The model that trains, fresh or as saved in a checkpoint or final folder.

    Raises:
        ModelError: it cannot be loaded, or does not fit the tokenizer.
    """
    use_lora = config.optimization.use_lora
    model = load_model(source_of(config, None if use_lora else saved))
    check_vocabulary(model, tokenizer)
    return policy_around(config, model, saved=saved)


def policy_around(config: CPOConfig, model: Any, *, saved: Path | None = None) -> Policy:
    """The base model with what the configuration puts in and around it."""
    if config.optimization.use_lora:
        model = (
            add_lora(model, _lora(config), seed=config.training.seed)
            if saved is None
            else load_adapter(model, _own_adapter(config, saved))
        )
    projection = _projection(config, causal_lm(model).config.hidden_size)
    if projection is not None and saved is not None:
        load_projection(projection, saved)
    if config.data.disable_dropout:
        disable_dropout(model)
    if config.optimization.use_gradient_checkpointing:
        causal_lm(model).gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    settings = EmbeddingSettings(
        dropout=config.cpo.simcse_dropout, normalize=config.cpo.normalize_embeddings
    )
    policy = Policy(model, projection, settings)
    if config.data.ignore_bias_buffers:
        leave_boolean_buffers_out(policy)  # the module that is distributed
    if config.optimization.torch_compile:
        policy.decoder.compile(dynamic=True)
    return policy


def _own_adapter(config: CPOConfig, saved: Path) -> Path:
    """The folder, refused where its adapter was trained on another base model."""
    try:
        described = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
        base = str(described["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{saved} holds no adapter: {error}") from error
    if Path(base).resolve() != Path(config.model.name).resolve():
        raise ModelError(
            f"the adapter in {str(saved)!r} was trained on {base!r}, model.name is "
            f"{config.model.name!r}; name its own base model (where that one was only moved, "
            "correct base_model_name_or_path in adapter_config.json)"
        )
    return saved


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuses a tokenizer whose ids the model does not have."""
    rows = causal_lm(model).get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} ids, the model's embedding {rows} rows: they do "
            "not belong together; see model.tokenizer_name"
        )


def reference_in_use(config: CPOConfig) -> bool:
    """Whether scores are taken relative to a reference."""
    return config.cpo.force_use_ref_model or config.cpo.reference_model_name is not None


def queue_in_use(config: CPOConfig) -> bool:
    """Whether earlier keys join the contrastive term's negatives."""
    return config.cpo.use_queue and config.cpo.contrastive_weight > 0


def momentum_in_use(config: CPOConfig) -> bool:
    """Whether the contrastive term's keys come from a momentum encoder."""
    return config.cpo.use_momentum and config.cpo.contrastive_weight > 0


def build_reference(config: CPOConfig, policy: Policy, tokenizer: Any) -> Reference | None:
    """The reference in use: named, the adapter switched off, or a frozen copy of the start."""
    if not reference_in_use(config):
        return None
    source = reference_source(config)
    if source is None:
        return Reference(policy)
    model = load_model(source)
    check_vocabulary(model, tokenizer)
    return Reference(policy, model)


def reference_source(config: CPOConfig) -> ModelSource | None:
    """How a reference in use is loaded; None where it is the policy without its adapter."""
    name, source = config.cpo.reference_model_name, source_of(config)
    if name is None:
        return None if config.optimization.use_lora else source
    return ModelSource(
        name=name,
        trust_remote_code=source.trust_remote_code,
        dtype=source.dtype,
        attn_implementation=source.attn_implementation,
        init_kwargs=config.cpo.ref_model_init_kwargs,
    )


def objective_of(config: CPOConfig) -> ObjectiveSettings:
    """Every constant of the objective."""
    cpo = config.cpo
    return ObjectiveSettings(
        loss_type=cpo.loss_type,
        beta=cpo.beta,
        temperature=cpo.temperature,
        alpha=cpo.alpha,
        gamma=cpo.cpo_gamma,
        label_smoothing=cpo.label_smoothing,
        preference_weight=cpo.preference_weight,
        cpo_alpha=cpo.cpo_alpha,
        contrastive_weight=cpo.contrastive_weight,
        contrastive=ContrastiveSettings(
            temperature=cpo.contrastive_temperature,
            margin=cpo.margin,
            concentration=cpo.cpo_beta,
        ),
    )


def _lora(config: CPOConfig) -> LoraSettings:
    optimization = config.optimization
    assert optimization.lora_alpha is not None
    return LoraSettings(
        rank=optimization.lora_rank,
        alpha=optimization.lora_alpha,
        dropout=optimization.lora_dropout,
        target_modules=optimization.lora_target_modules,
    )


def _projection(config: CPOConfig, hidden_size: int) -> ProjectionHead | None:
    cpo = config.cpo
    if cpo.projection_dim is None or cpo.contrastive_weight == 0:
        return None
    torch.manual_seed(config.training.seed)
    return ProjectionHead(hidden_size, cpo.projection_dim)
