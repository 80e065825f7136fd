"""One proof per field that changing it changes the run: the table behind test_liveness.

Each proof says under which settings the field is live, to what it is changed, and what then
differs. ``observe`` computes what differs, from a configuration alone where that suffices. A proof
without it still waits for an observer that runs the rooms; ``PENDING`` in test_liveness.py counts
them, so none is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cpo_arabic.config import CPOConfig
from cpo_arabic.config.advice import describe_objective


@dataclass(frozen=True)
class Proof:
    """How one field shows that it is alive."""

    path: str
    value: Any
    """What it is changed to."""
    changes: str
    """What then differs in the run, in words."""
    given: dict[str, Any] = field(default_factory=dict)
    """The settings under which it is live."""
    observe: Callable[[CPOConfig], Any] | None = None
    """What is compared before and after; None where a room has to run."""


def resolved_lengths(config: CPOConfig) -> Any:
    """The budgets of prompt, completion and both."""
    cpo = config.resolved().cpo
    return cpo.max_length, cpo.max_prompt_length, cpo.max_target_length


def groups_per_step(config: CPOConfig) -> Any:
    """Groups in one optimizer step of one process, and their number of keys."""
    groups = config.training.batch_size * config.training.gradient_accumulation_steps
    return groups, groups * (1 + config.cpo.num_negatives)


def row_budget(config: CPOConfig) -> Any:
    """The token budget of a packed row."""
    return config.resolved().data.max_tokens_per_row


def evaluation_groups(config: CPOConfig) -> Any:
    """Groups of one evaluation batch."""
    return config.resolved().training.eval_batch_size


def adapter_scale(config: CPOConfig) -> Any:
    """The factor lora_alpha / r on the adapters."""
    chosen = config.resolved().optimization
    return (chosen.lora_alpha or 0) / chosen.lora_rank, chosen.lora_rank


OBJECTIVE = describe_objective

WITH_REFERENCE = {"cpo.force_use_ref_model": True}
WITH_MINING = {"data.create_hard_negatives": True}
WITH_AUGMENTATION = {"data.augment_data": True}
WITH_HUB_DATA = {"data.dataset_name": "org/data"}
WITH_MIXING = {"cpo.negative_sampling_strategy": "mixed", "cpo.num_negatives": 4}
WITH_WANDB = {"logging.use_wandb": True}

PROOFS: tuple[Proof, ...] = (
    Proof("model.name", "org/other", "the weights and the tokenizer that are loaded"),
    Proof("model.revision", "v2", "the commit of the model that is loaded"),
    Proof("model.tokenizer_name", "org/other", "the token ids of every batch"),
    Proof("model.max_length", 1024, "every length budget", observe=resolved_lengths),
    Proof("model.dtype", "float32", "the dtype of the loaded weights"),
    Proof("model.attn_implementation", "eager", "the attention kernel of the loaded model"),
    Proof("model.trust_remote_code", True, "whether repository code may be imported"),
    Proof("training.output_dir", "outputs/x", "the folder that the artefacts are in"),
    Proof("training.overwrite_output_dir", True, "whether a used folder is accepted"),
    Proof("training.seed", 7, "the order of rows and the drawn negatives"),
    Proof("training.learning_rate", 1e-5, "the learning rate of each step"),
    Proof("training.batch_size", 2, "groups per micro-batch", observe=groups_per_step),
    Proof("training.eval_batch_size", 9, "groups per evaluation batch", observe=evaluation_groups),
    Proof("training.num_epochs", 2, "the number of optimizer steps"),
    Proof("training.max_steps", 3, "the number of optimizer steps"),
    Proof(
        "training.gradient_accumulation_steps",
        2,
        "groups per optimizer step",
        observe=groups_per_step,
    ),
    Proof("training.warmup_steps", 5, "the learning rate of the first steps"),
    Proof("training.warmup_ratio", 0.1, "the learning rate of the first steps"),
    Proof("training.lr_scheduler_type", "cosine", "the learning rate of later steps"),
    Proof("training.weight_decay", 0.1, "the weights after one step"),
    Proof("training.adam_beta1", 0.5, "the weights after two steps"),
    Proof("training.adam_beta2", 0.5, "the weights after two steps"),
    Proof("training.adam_epsilon", 1e-2, "the weights after one step"),
    Proof("training.max_grad_norm", 1e-3, "the weights after one step"),
    Proof("training.eval_steps", 2, "the steps that are evaluated at"),
    Proof("training.save_steps", 2, "the checkpoints that are written"),
    Proof("training.logging_steps", 2, "the records in metrics.jsonl"),
    Proof("training.save_total_limit", 1, "the checkpoints that are kept"),
    Proof("training.max_skipped_steps", 1, "when a run of non-finite steps stops"),
    Proof("training.dataloader_num_workers", 1, "the worker processes; never the batches"),
    Proof("data.train_file", "other.jsonl", "the training rows"),
    Proof("data.validation_file", None, "the held-out rows"),
    Proof("data.test_file", "test.jsonl", "the rows of cpo-arabic evaluate"),
    Proof("data.dataset_name", "org/data", "the training rows"),
    Proof("data.dataset_config_name", "ar", "the subset that is loaded", WITH_HUB_DATA),
    Proof("data.dataset_split", "other", "the split that is loaded", WITH_HUB_DATA),
    Proof("data.streaming", True, "rows are read while training"),
    Proof("data.cache_dir", "cache", "the folder that prepared data is in"),
    Proof("data.max_samples", 10, "the number of training rows"),
    Proof(
        "data.validation_split_percentage",
        0.5,
        "the number of held-out rows",
        {"data.validation_file": None},
    ),
    Proof("data.preprocessing_num_workers", 1, "the tokenising processes; never the result"),
    Proof("data.prompt_column", "q", "the text of prompts"),
    Proof("data.chosen_column", "good", "the text of chosen completions"),
    Proof("data.rejected_column", "bad", "the text of rejected completions"),
    Proof("data.system_column", None, "whether system messages are in prompts"),
    Proof("data.multiple_negatives_column", None, "the easy pool of negatives"),
    Proof("data.hard_negatives_column", None, "the hard pool of negatives"),
    Proof("data.on_bad_row", "skip", "whether a bad row stops the run"),
    Proof("data.conversation_template", "plain", "the text around prompt and completion"),
    Proof("data.normalization", "nfc", "the text of rows that are not in NFC"),
    Proof("data.add_special_tokens", False, "the first and last token ids"),
    Proof("data.truncation", False, "whether a long row is cut or refused"),
    Proof("data.padding", "longest", "the shape of batches"),
    Proof(
        "data.max_tokens_per_row",
        4096,
        "the width of packed rows",
        {"data.padding": "packed"},
        row_budget,
    ),
    Proof("data.sanity_check", True, "a trial before training"),
    Proof("data.sanity_check_size", 8, "the rows of the trial", {"data.sanity_check": True}),
    Proof("data.ignore_bias_buffers", True, "the buffers left out of broadcasts"),
    Proof("data.disable_dropout", False, "the dropout modules of the model in training"),
    Proof("data.generate_during_eval", True, "completions written at evaluations"),
    Proof("data.augment_data", True, "the number of training rows"),
    Proof("data.augmentation_strategy", "digits", "the text of twins", WITH_AUGMENTATION),
    Proof("data.augmentation_ratio", 0.5, "the number of twins", WITH_AUGMENTATION),
    Proof("data.paraphrase_model", "org/m", "the model that paraphrases", WITH_AUGMENTATION),
    Proof("data.create_hard_negatives", True, "the hard pool of negatives"),
    Proof("data.hard_negative_strategy", "bm25", "which hard negatives are mined", WITH_MINING),
    Proof("data.mining_model", "org/m", "the model that mines", WITH_MINING),
    Proof("cpo.beta", 0.5, "the preference loss", observe=OBJECTIVE),
    Proof("cpo.temperature", 0.5, "the preference loss", observe=OBJECTIVE),
    Proof("cpo.alpha", 0.0, "the preference loss", observe=OBJECTIVE),
    Proof("cpo.loss_type", "hinge", "the preference loss", observe=OBJECTIVE),
    Proof(
        "cpo.label_smoothing",
        0.1,
        "the preference loss",
        {"cpo.loss_type": "sigmoid"},
        OBJECTIVE,
    ),
    Proof("cpo.reference_free", True, "settings with a reference are refused", WITH_REFERENCE),
    Proof("cpo.reference_model_name", "org/ref", "the reference scores", observe=OBJECTIVE),
    Proof("cpo.num_negatives", 3, "the completions of a group", observe=groups_per_step),
    Proof("cpo.negative_sampling_strategy", "hard", "the drawn negatives"),
    Proof("cpo.hard_negative_ratio", 0.5, "the drawn negatives", WITH_MIXING),
    Proof("cpo.margin", 0.5, "the contrastive loss", observe=OBJECTIVE),
    Proof("cpo.cpo_alpha", 0.5, "the total loss", observe=OBJECTIVE),
    Proof("cpo.cpo_beta", 1.0, "the contrastive loss", observe=OBJECTIVE),
    Proof("cpo.cpo_gamma", 0.5, "the preference loss", {"cpo.loss_type": "simpo"}, OBJECTIVE),
    Proof("cpo.simcse_dropout", 0.5, "the embeddings in training"),
    Proof("cpo.contrastive_temperature", 0.2, "the contrastive loss", observe=OBJECTIVE),
    Proof("cpo.contrastive_weight", 0.5, "the total loss", observe=OBJECTIVE),
    Proof("cpo.preference_weight", 0.5, "the total loss", observe=OBJECTIVE),
    Proof("cpo.max_length", 512, "the length of sequences", observe=resolved_lengths),
    Proof("cpo.max_prompt_length", 512, "the length of prompts", observe=resolved_lengths),
    Proof("cpo.max_target_length", 512, "the length of completions", observe=resolved_lengths),
    Proof("cpo.truncation_mode", "keep_start", "which tokens of a long prompt survive"),
    Proof("cpo.precompute_ref_log_probs", True, "when the reference runs", WITH_REFERENCE),
    Proof("cpo.model_init_kwargs", {"a": 1}, "the arguments of from_pretrained"),
    Proof(
        "cpo.ref_model_init_kwargs",
        {"a": 1},
        "the arguments of from_pretrained for the reference",
        {"cpo.reference_model_name": "org/ref"},
    ),
    Proof("cpo.force_use_ref_model", True, "the reference scores", observe=OBJECTIVE),
    Proof("cpo.use_momentum", True, "the keys of the contrastive term", observe=OBJECTIVE),
    Proof(
        "cpo.momentum_beta",
        0.5,
        "the keys from the second step on",
        {"cpo.use_momentum": True},
        OBJECTIVE,
    ),
    Proof(
        "cpo.queue_size",
        64,
        "the negatives from the second step on",
        {"cpo.use_queue": True},
        OBJECTIVE,
    ),
    Proof("cpo.use_queue", True, "the negatives from the second step on", observe=OBJECTIVE),
    Proof("cpo.normalize_embeddings", False, "the contrastive loss", observe=OBJECTIVE),
    Proof("cpo.projection_dim", 8, "the contrastive loss", observe=OBJECTIVE),
    Proof("optimization.use_lora", False, "the weights that train"),
    Proof("optimization.lora_rank", 8, "the shape of adapters", observe=adapter_scale),
    Proof("optimization.lora_alpha", 8, "the scale of adapters", observe=adapter_scale),
    Proof(
        "optimization.lora_dropout",
        0.5,
        "the loss in training",
        {"data.disable_dropout": False},
    ),
    Proof("optimization.lora_target_modules", ["q_proj"], "the layers that get adapters"),
    Proof("optimization.use_quantization", True, "the storage of base weights"),
    Proof(
        "optimization.quantization_bits",
        8,
        "the storage of base weights",
        {"optimization.use_quantization": True},
    ),
    Proof("optimization.use_gradient_checkpointing", True, "activations are recomputed"),
    Proof("optimization.bf16", True, "the dtype of activations"),
    Proof("optimization.torch_compile", True, "the model is compiled"),
    Proof("logging.use_wandb", True, "a tracker"),
    Proof("logging.wandb_project", "x", "the project of the tracker", WITH_WANDB),
    Proof("logging.wandb_entity", "x", "the entity of the tracker", WITH_WANDB),
    Proof("logging.wandb_mode", "offline", "the mode of the tracker", WITH_WANDB),
    Proof("logging.use_tensorboard", False, "event files in the run's folder"),
    Proof("logging.run_name", "x", "the name in trackers and the model card"),
    Proof("logging.log_level", "error", "the messages that are shown"),
)
