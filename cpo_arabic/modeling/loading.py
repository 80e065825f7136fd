"""Base model, tokenizer and adapter: loaded, checked and saved in their libraries' own formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from cpo_arabic.errors import ModelError
from cpo_arabic.modeling.legacy_qwen import (
    hub_options,
    legacy_settings,
    load_legacy_model,
    load_legacy_tokenizer,
    qwen2_config,
)

PROJECTION_FILE = "projection_head.safetensors"
UNREADABLE = (OSError, ValueError, SafetensorError, UnpicklingError)
"""What the libraries raise for a file that is missing, damaged or not to be trusted."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and how it is to be loaded; fields as in the configuration."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: torch.dtype = torch.float32
    attn_implementation: str = "sdpa"
    quantization_bits: int | None = None
    init_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2022); fields as in the configuration."""

    rank: int
    alpha: int
    dropout: float
    target_modules: str | Sequence[str]


def load_tokenizer(name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder or hub name; first-generation Qwen's is made from its ranks.

    Raises:
        ModelError: it cannot be found, or has no token to end a completion with.
    """
    try:
        tokenizer = _legacy_tokenizer(name, revision)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code
            )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(_cannot_load("tokenizer", name, error)) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {name!r} has no end-of-sequence token, so a completion cannot end; "
            "name another with model.tokenizer_name"
        )
    return tokenizer


def _legacy_tokenizer(name: str, revision: str | None) -> Any | None:
    try:
        settings = legacy_settings(name, revision, {})
    except OSError:  # a tokenizer's folder needs no config.json
        return None
    return None if settings is None else load_legacy_tokenizer(name, settings, revision=revision)


def load_model(source: ModelSource) -> Any:
    """A transformers causal language model; first-generation Qwen becomes a Qwen2.

    Raises:
        ModelError: it cannot be found, its class is unknown, its code is not trusted, or the
            machine cannot quantise.
    """
    quantization = _quantization(source.quantization_bits)
    options = _loading_options(source, quantization)
    with _refusing_unloadable(source.name):
        legacy = legacy_settings(source.name, source.revision, options)
        if legacy is not None:
            return load_legacy_model(source.name, legacy, revision=source.revision, options=options)
        return AutoModelForCausalLM.from_pretrained(
            source.name,
            config=_settings(source),
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            **options,
        )


def load_architecture(source: ModelSource) -> Any:
    """The model's configuration in transformers; first-generation Qwen's is that of a Qwen2.

    Raises:
        ModelError: it cannot be found, its class is unknown, or its code is not trusted.
    """
    with _refusing_unloadable(source.name):
        legacy = legacy_settings(source.name, source.revision, source.init_kwargs or {})
        return _settings(source) if legacy is None else qwen2_config(legacy)


def _settings(source: ModelSource) -> Any:
    """The model's ``config.json`` as transformers reads it."""
    return AutoConfig.from_pretrained(
        source.name,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        **hub_options(source.init_kwargs or {}),
    )


@contextmanager
def _refusing_unloadable(name: str) -> Iterator[None]:
    """What the libraries raise for a model becomes a :class:`ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except (*UNREADABLE, KeyError, ImportError, TypeError) as error:
        raise ModelError(_cannot_load("model", name, error)) from error


def outline(architecture: Any, source: ModelSource) -> Any:
    """The causal language model that :func:`load_model` would fill, with tensors as torch makes
    them at the moment: none has storage where the default device is ``meta``."""
    return AutoModelForCausalLM.from_config(
        architecture,
        dtype=source.dtype,
        attn_implementation=source.attn_implementation,
        trust_remote_code=source.trust_remote_code,
    ).train()


def _loading_options(
    source: ModelSource, quantization: BitsAndBytesConfig | None
) -> dict[str, Any]:
    given = dict(source.init_kwargs or {})
    ours = {"dtype": source.dtype, "attn_implementation": source.attn_implementation}
    if quantization is not None:
        ours["quantization_config"] = quantization
    reserved = {*ours, "config", "revision", "state_dict", "trust_remote_code"}
    twice = sorted(reserved & given.keys())
    if twice:
        raise ModelError(
            f"model_init_kwargs sets {', '.join(twice)}, which fields of the model section and "
            "optimization.use_quantization set; use those"
        )
    return {**ours, **given}


def check_quantization() -> None:
    """Refuses quantised loading where it cannot work, before any weight is read.

    Raises:
        ModelError: no CUDA device, or no bitsandbytes.
    """
    remedy = "turn it off with --set optimization.use_quantization=false"
    if not torch.cuda.is_available():
        raise ModelError(
            f"optimization.use_quantization is true, but this machine has no CUDA device; {remedy}"
        )
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "optimization.use_quantization is true, but bitsandbytes is not installed; install it "
            f"with pip install 'cpo-arabic[quant]', or {remedy}"
        )


def _quantization(bits: int | None) -> BitsAndBytesConfig | None:
    if bits is None:
        return None
    check_quantization()
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def add_lora(model: Any, settings: LoraSettings, *, seed: int) -> PeftModel:
    """Wraps the model with freshly initialised adapters, a pure function of ``seed``.

    Raises:
        ModelError: a target module that the model does not have.
    """
    targets = settings.target_modules
    torch.manual_seed(seed)
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                target_modules=targets if isinstance(targets, str) else list(targets),
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        linear = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, m in model.named_modules()
                if isinstance(m, nn.Linear)
            }
        )
        raise ModelError(
            f"optimization.lora_target_modules {targets!r} does not fit this model: {error}. "
            f'Its linear modules are {", ".join(linear)}; "all-linear" takes all but the head'
        ) from error


def load_adapter(model: Any, folder: Path) -> PeftModel:
    """The model with a saved adapter, ready to train on.

    Raises:
        ModelError: the folder holds no adapter, or one made for another model.
    """
    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    except (*UNREADABLE, RuntimeError, KeyError) as error:
        raise ModelError(_cannot_load("adapter", str(folder), error)) from error


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability of the model and of its adapters to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def leave_boolean_buffers_out(model: nn.Module) -> None:
    """Keeps boolean (mask) buffers of old checkpoints out of distributed broadcasts."""
    model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
        name for name, buffer in model.named_buffers() if buffer.dtype == torch.bool
    ]


def save_policy(model: Any, projection: nn.Module | None, folder: Path) -> None:
    """Adapter or whole model in peft's or transformers' format, and the projection head beside."""
    model.save_pretrained(folder)
    if projection is not None:
        state = {name: value.contiguous() for name, value in projection.state_dict().items()}
        save_file(state, folder / PROJECTION_FILE)


def load_projection(projection: nn.Module, folder: Path) -> None:
    """Fills the projection head from :func:`save_policy`'s file.

    Raises:
        ModelError: the file is missing or of another shape.
    """
    path = folder / PROJECTION_FILE
    if not path.exists():
        raise ModelError(f"{path} is missing: the run was trained without cpo.projection_dim")
    try:
        projection.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise ModelError(f"{path} is not a safetensors file: {error}") from error
    except RuntimeError as error:
        raise ModelError(f"{path} does not fit cpo.projection_dim: {error}") from error


def _cannot_load(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    local = Path(name).expanduser()
    if "trust_remote_code" in str(error):
        return (
            f"{what} {name!r} brings code of its own; read that code, then allow it with "
            "model.trust_remote_code: true"
        )
    if local.exists() or name.startswith((".", "/")):
        return f"the {what} in {name!r} cannot be loaded: {reason}"
    return (
        f"the {what} {name!r} is neither a folder here nor a name the hub answers for: {reason}. "
        "Check the spelling, the network and, for a gated model, HF_TOKEN"
    )
