"""The sections that any fine-tuning run has: model, training, optimization, logging."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from cpo_arabic.config.base import Follows, Section
from cpo_arabic.config.kinds import Name, PathText

SchedulerType = Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]
LogLevel = Literal["debug", "info", "warning", "error"]


def _run_name(text: str) -> str:
    allowed = all(char.isalnum() or char in "._-" for char in text)
    if not text or not allowed or text.startswith((".", "-")):
        raise ValueError(
            "is not a plain name: use letters, digits, '.', '_' and '-', "
            "and start with a letter, a digit or '_'"
        )
    return text


class ModelConfig(Section):
    """Which model is trained, and how its weights are held in memory."""

    section: ClassVar[str] = "model"

    name: Name = "Qwen/Qwen2.5-0.5B"
    """Model to fine-tune: a Hugging Face name, or the path of a local model folder."""
    revision: Name | None = None
    """Branch, tag or commit of the model on the hub; null takes the default branch."""
    tokenizer_name: Name | None = None
    """Tokenizer to use, a hub name or a path; null takes the model's own."""
    max_length: Annotated[int, Field(ge=4, le=1_048_576)] = 2048
    """Longest prompt plus completion in tokens; every other length stays within it."""
    dtype: DType = "auto"
    """Number format of the weights; auto: bfloat16 under LoRA with bf16, otherwise float32."""
    attn_implementation: Attention = "sdpa"
    """Attention kernel; flash_attention_2 needs its package, a GPU and 16-bit weights."""
    trust_remote_code: bool = False
    """Whether code from the model's repository may run on this machine."""


class TrainingConfig(Section):
    """The training loop: steps, batch sizes, AdamW, schedule, evaluation and checkpoints."""

    section: ClassVar[str] = "training"

    output_dir: PathText = "outputs/cpo"
    """Folder of the run: checkpoints, metrics, resolved configuration and the trained model."""
    overwrite_output_dir: bool = False
    """Whether a run may start in a folder that already holds one, which is then replaced."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything random: data order, negatives, dropout, new weights."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-6
    """Peak learning rate of AdamW."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 4
    """Groups (a prompt with its completions) per micro-batch and device."""
    eval_batch_size: Annotated[
        int | None, Field(ge=1, le=65_536), Follows("training.batch_size")
    ] = None
    """Groups per evaluation batch and device; null follows batch_size."""
    num_epochs: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Passes over the training rows."""
    max_steps: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Optimizer steps after which training ends, in place of num_epochs; null counts epochs."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65_536)] = 4
    """Micro-batches that are summed into one optimizer step."""
    warmup_steps: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Optimizer steps over which the learning rate rises from 0 to its peak."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of all optimizer steps used for that rise, in place of warmup_steps."""
    lr_scheduler_type: SchedulerType = "linear"
    """Shape of the learning rate after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of AdamW, applied to matrices only."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's running mean of the gradient (β₁)."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's running mean of the squared gradient (β₂)."""
    adam_epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Term that keeps AdamW's denominator above zero (ε)."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Global gradient norm above which gradients are scaled down; null turns clipping off."""
    eval_steps: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Optimizer steps between evaluations; null evaluates at the end of each epoch."""
    save_steps: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Optimizer steps between checkpoints; null saves at the end of each epoch."""
    logging_steps: Annotated[int, Field(ge=1, le=2**31)] = 1
    """Optimizer steps between records of the training metrics."""
    save_total_limit: Annotated[int, Field(ge=1, le=100_000)] | None = 3
    """Newest checkpoints that are kept; null keeps all."""
    max_skipped_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 3
    """Updates in a row skipped for a non-finite loss or gradient before the run stops."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that prepare batches beside training; 0 prepares them in the training process."""


class OptimizationConfig(Section):
    """What trains and what it costs: LoRA, quantisation, checkpointing, mixed precision."""

    section: ClassVar[str] = "optimization"

    use_lora: bool = True
    """Whether low-rank adapters train in place of all weights."""
    lora_rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank r of the adapters."""
    lora_alpha: Annotated[
        int | None, Field(ge=1, le=65_536), Follows("2 × optimization.lora_rank")
    ] = None
    """Scale of the adapters: they are multiplied by lora_alpha / r; null follows 2 × lora_rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout rate on the adapters' inputs; needs data.disable_dropout: false to take effect."""
    lora_target_modules: Annotated[str | list[Name], Field(min_length=1)] = "all-linear"
    """Modules that get an adapter: all-linear, or a list of names such as [q_proj, v_proj]."""
    use_quantization: bool = False
    """Whether the frozen base weights are held in quantization_bits bits (QLoRA); needs LoRA."""
    quantization_bits: Literal[4, 8] = 4
    """Bits per quantised base weight."""
    use_gradient_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass: less memory, more time."""
    bf16: bool = False
    """Whether the forward pass runs in bfloat16 mixed precision."""
    torch_compile: bool = False
    """Whether the model is compiled before training: a slow start, faster steps."""


class LoggingConfig(Section):
    """Where the run reports to."""

    section: ClassVar[str] = "logging"

    use_wandb: bool = False
    """Whether metrics go to Weights & Biases as well."""
    wandb_project: Name = "arabic-qwen-cpo"
    """Weights & Biases project."""
    wandb_entity: Name | None = None
    """Weights & Biases user or team; null takes the account's default."""
    wandb_mode: Literal["online", "offline"] = "online"
    """Whether Weights & Biases sends metrics at once or keeps them for `wandb sync`."""
    use_tensorboard: bool = True
    """Whether metrics are written as TensorBoard event files to the run's folder."""
    run_name: Annotated[str, AfterValidator(_run_name)] | None = None
    """Name of the run in trackers; letters, digits, '.', '_' and '-'; null makes one."""
    log_level: LogLevel = "info"
    """Least severe message that is shown."""
