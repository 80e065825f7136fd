"""One proof per field that changing it changes the run: the table behind test_liveness.

Each proof says under which settings the field is live, to what it is changed, and what then
differs. It is shown on a toy run (``TOY``, on the files of :func:`tests.config.rooms.build_world`)
by the observer of that name in :mod:`tests.config.rooms`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TOY: dict[str, Any] = {
    "model.name": "toy",
    "model.max_length": 128,
    "data.padding": "packed",
    "data.conversation_template": "plain",
    "cpo.num_negatives": 2,
    "training.output_dir": "run",
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "training.learning_rate": 1e-2,
    "training.max_steps": 3,
    "logging.use_tensorboard": False,
    "optimization.lora_rank": 4,
}
"""A run of three steps over twelve rows, at the documented default paths."""

SEEN: dict[str, str] = {
    "at_once": "the rows held in memory when they are tokenised",
    "asked": "what transformers is asked to load as models, and how",
    "asked_tokenizer": "what it is asked to load as tokenizer, and how",
    "batches": "token ids, shapes and lengths of an epoch's batches",
    "buffers": "the buffers that a distributed model broadcasts",
    "compiled": "whether the decoder is the compiled one",
    "drawn": "the completions of every row's group",
    "folder": "the files that lie there before the first step",
    "held_out": "the rows of each evaluation batch",
    "loaders": "the loader's processes",
    "measured": "the rows that `evaluate` reads",
    "messages": "what the run's watcher is told",
    "outcome": "the batches, or the refusal",
    "rates": "the learning rate of every step",
    "refused": "the configuration's refusal",
    "skipping": "the steps taken until the run ends, every gradient being infinite",
    "step": "losses, metrics and gradient of the first step",
    "steps": "the rows of every micro-batch of every step",
    "texts": "the rows as text, as they are tokenised",
    "tokenisers": "the processes that tokenise",
    "trackers": "which trackers start, and how",
    "trained": "weights, metrics.jsonl and files after a real run",
    "trial": "the rows that are tried before training",
    "used_folder": "what a folder that holds a run is left with, or the refusal",
    "weights": "values, formats and shapes of all weights, and which train",
    "work": "layer calls, attention kernel and number formats of the first step",
}
"""Observers, and what they look at."""


@dataclass(frozen=True)
class Proof:
    """How one field shows that it is alive."""

    path: str
    value: Any
    """What it is changed to."""
    changes: str
    """What then differs in the run, in words."""
    seen: str
    """The observer by which it is seen."""
    given: dict[str, Any] = field(default_factory=dict)
    """The settings under which it is live."""


WITH_REFERENCE = {"cpo.force_use_ref_model": True}
WITH_NAMED_REFERENCE = {"cpo.reference_model_name": "other"}
WITH_MINING = {"data.create_hard_negatives": True}
WITH_OWN_ANSWERS = {
    "data.create_hard_negatives": True,
    "data.hard_negative_strategy": "self",
    "cpo.max_target_length": 8,
}
WITH_AUGMENTATION = {"data.augment_data": True}
WITH_DIGITS = {"data.augment_data": True, "data.augmentation_strategy": "digits"}
WITH_HUB_DATA = {"data.dataset_name": "org/data"}
WITH_HARD = {"cpo.hard_negative_ratio": 0.5}
WITH_MIXING = {"cpo.negative_sampling_strategy": "mixed"}
WITH_WANDB = {"logging.use_wandb": True}
WITH_QUEUE = {"cpo.use_queue": True}

PROOFS: tuple[Proof, ...] = (
    Proof("model.name", "other", "the weights and the tokenizer that are loaded", "weights"),
    Proof("model.revision", "v2", "the commit of the model that is loaded", "asked"),
    Proof("model.tokenizer_name", "other-tokenizer", "the token ids of every batch", "batches"),
    Proof("model.max_length", 96, "every length budget", "batches"),
    Proof("model.dtype", "bfloat16", "the number format of the loaded weights", "weights"),
    Proof("model.attn_implementation", "eager", "the attention kernel", "work",
          {"data.padding": "longest"}),
    Proof("model.trust_remote_code", True, "whether repository code may be imported", "asked"),
    Proof("training.output_dir", "elsewhere", "the folder that the artefacts are in", "trained"),
    Proof("training.overwrite_output_dir", True, "whether a used folder is accepted",
          "used_folder"),
    Proof("training.seed", 7, "the order of rows, the drawn negatives, new weights", "steps"),
    Proof("training.learning_rate", 1e-3, "the learning rate of each step", "rates"),
    Proof("training.batch_size", 4, "groups per micro-batch", "steps"),
    Proof("training.eval_batch_size", 3, "groups per evaluation batch", "held_out"),
    Proof("training.num_epochs", 2, "the number of optimizer steps", "steps",
          {"training.max_steps": None}),
    Proof("training.max_steps", 4, "the number of optimizer steps", "steps"),
    Proof("training.gradient_accumulation_steps", 1, "micro-batches per optimizer step", "steps"),
    Proof("training.warmup_steps", 2, "the learning rate of the first steps", "rates"),
    Proof("training.warmup_ratio", 0.5, "the learning rate of the first steps", "rates"),
    Proof("training.lr_scheduler_type", "cosine", "the learning rate of later steps", "rates"),
    Proof("training.weight_decay", 0.1, "the weights after an update", "trained"),
    Proof("training.adam_beta1", 0.5, "the weights from the second update on", "trained"),
    Proof("training.adam_beta2", 0.5, "the weights from the second update on", "trained"),
    Proof("training.adam_epsilon", 1e-2, "the weights after an update", "trained"),
    Proof("training.max_grad_norm", 1e-6, "the weights after an update", "trained"),
    Proof("training.eval_steps", 2, "the steps that are evaluated at", "trained"),
    Proof("training.save_steps", 2, "the checkpoints that are written", "trained"),
    Proof("training.logging_steps", 2, "the records in metrics.jsonl", "trained"),
    Proof("training.save_total_limit", 1, "the checkpoints that are kept", "trained",
          {"training.save_steps": 1}),
    Proof("training.max_skipped_steps", 1, "when a run of non-finite steps stops", "skipping",
          {"training.max_steps": 6}),
    Proof("training.dataloader_num_workers", 1, "the loader's processes; never the batches",
          "loaders"),
    Proof("data.train_file", "other.jsonl", "the training rows", "texts"),
    Proof("data.validation_file", None, "the held-out rows", "texts"),
    Proof("data.test_file", "test.jsonl", "the rows of cpo-arabic evaluate", "measured"),
    Proof("data.dataset_name", "org/data", "the training rows", "texts"),
    Proof("data.dataset_config_name", "ar", "the subset that is loaded", "texts", WITH_HUB_DATA),
    Proof("data.dataset_split", "other", "the split that is loaded", "texts", WITH_HUB_DATA),
    Proof("data.streaming", True, "rows go to the tokeniser one by one", "at_once",
          {"data.cache_dir": "cache"}),
    Proof("data.cache_dir", "cache", "the folder that prepared data is in", "folder"),
    Proof("data.max_samples", 10, "the number of training rows", "texts"),
    Proof("data.validation_split_percentage", 0.5, "the number of held-out rows", "texts",
          {"data.validation_file": None}),
    Proof("data.preprocessing_num_workers", 1, "the tokenising processes; never the result",
          "tokenisers"),
    Proof("data.prompt_column", "q", "the text of prompts", "texts"),
    Proof("data.chosen_column", "good", "the text of chosen completions", "texts"),
    Proof("data.rejected_column", "bad", "the text of rejected completions", "texts"),
    Proof("data.system_column", None, "whether system messages are in prompts", "texts"),
    Proof("data.multiple_negatives_column", None, "the easy pool of negatives", "texts"),
    Proof("data.hard_negatives_column", None, "the hard pool of negatives", "texts"),
    Proof("data.on_bad_row", "skip", "whether a bad row stops the run", "outcome",
          {"data.train_file": "bad.jsonl"}),
    Proof("data.conversation_template", "alpaca", "the text around prompt and completion",
          "batches"),
    Proof("data.normalization", "nfc", "the text of prompts that are not in NFC", "texts"),
    Proof("data.add_special_tokens", False, "the first and last token ids", "batches"),
    Proof("data.truncation", False, "whether a long row is cut or refused", "outcome"),
    Proof("data.padding", "longest", "the shape of batches", "batches"),
    Proof("data.max_tokens_per_row", 128, "the width of packed rows", "batches"),
    Proof("data.sanity_check", True, "a trial before training", "trial"),
    Proof("data.sanity_check_size", 3, "the rows of the trial", "trial",
          {"data.sanity_check": True}),
    Proof("data.ignore_bias_buffers", True, "boolean buffers are left out of broadcasts",
          "buffers"),
    Proof("data.disable_dropout", False, "the model's own dropout in training", "step"),
    Proof("data.generate_during_eval", True, "completions written at evaluations", "trained",
          {"cpo.max_target_length": 8}),
    Proof("data.augment_data", True, "the number of training rows", "texts",
          {"data.augmentation_strategy": "digits"}),
    Proof("data.augmentation_strategy", "digits", "the text of twins", "texts",
          WITH_AUGMENTATION),
    Proof("data.augmentation_ratio", 0.5, "the number of twins", "texts", WITH_DIGITS),
    Proof("data.paraphrase_model", "other", "the model that paraphrases", "texts",
          WITH_AUGMENTATION),
    Proof("data.create_hard_negatives", True, "the hard pool of negatives", "texts"),
    Proof("data.hard_negative_strategy", "self", "which hard negatives are mined", "texts",
          {**WITH_MINING, "cpo.max_target_length": 8}),
    Proof("data.mining_model", "other", "the model that mines", "texts", WITH_OWN_ANSWERS),
    Proof("cpo.beta", 0.5, "the preference loss", "step"),
    Proof("cpo.temperature", 0.5, "the preference loss", "step"),
    Proof("cpo.alpha", 0.0, "the preference loss", "step"),
    Proof("cpo.loss_type", "hinge", "the preference loss", "step"),
    Proof("cpo.label_smoothing", 0.1, "the preference loss", "step", {"cpo.loss_type": "sigmoid"}),
    Proof("cpo.reference_free", True, "settings with a reference are refused", "refused",
          WITH_REFERENCE),
    Proof("cpo.reference_model_name", "other", "the reference scores", "step"),
    Proof("cpo.num_negatives", 3, "the completions of a group", "drawn"),
    Proof("cpo.negative_sampling_strategy", "hard", "the drawn negatives", "drawn", WITH_HARD),
    Proof("cpo.hard_negative_ratio", 0.5, "the drawn negatives", "drawn", WITH_MIXING),
    Proof("cpo.margin", 0.5, "the contrastive loss", "step"),
    Proof("cpo.cpo_alpha", 0.5, "the total loss", "step"),
    Proof("cpo.cpo_beta", 1.0, "the contrastive loss", "step"),
    Proof("cpo.cpo_gamma", 0.5, "the preference loss", "step", {"cpo.loss_type": "simpo"}),
    Proof("cpo.simcse_dropout", 0.5, "the embeddings in training", "step"),
    Proof("cpo.contrastive_temperature", 0.2, "the contrastive loss", "step"),
    Proof("cpo.contrastive_weight", 0.5, "the total loss", "step"),
    Proof("cpo.preference_weight", 0.5, "the total loss", "step"),
    Proof("cpo.max_length", 96, "the length of sequences", "batches"),
    Proof("cpo.max_prompt_length", 48, "the length of prompts", "batches"),
    Proof("cpo.max_target_length", 32, "the length of completions", "batches"),
    Proof("cpo.truncation_mode", "keep_start", "which tokens of a long prompt survive",
          "batches"),
    Proof("cpo.precompute_ref_log_probs", True, "when the reference runs", "work",
          WITH_REFERENCE),
    Proof("cpo.model_init_kwargs", {"use_safetensors": True}, "the arguments of from_pretrained",
          "asked"),
    Proof("cpo.ref_model_init_kwargs", {"use_safetensors": True},
          "the arguments of from_pretrained for the reference", "asked", WITH_NAMED_REFERENCE),
    Proof("cpo.force_use_ref_model", True, "the reference scores", "work"),
    Proof("cpo.use_momentum", True, "the keys of the contrastive term", "step"),
    Proof("cpo.momentum_beta", 0.5, "the keys from the second step on", "trained",
          {"cpo.use_momentum": True}),
    Proof("cpo.queue_size", 12, "the negatives of later steps", "trained", WITH_QUEUE),
    Proof("cpo.use_queue", True, "the negatives from the second step on", "trained"),
    Proof("cpo.normalize_embeddings", False, "the contrastive loss", "step"),
    Proof("cpo.projection_dim", 8, "the contrastive loss", "step"),
    Proof("optimization.use_lora", False, "the weights that train", "weights"),
    Proof("optimization.lora_rank", 8, "the shape of adapters", "weights"),
    Proof("optimization.lora_alpha", 16, "the scale of adapters", "step"),
    Proof("optimization.lora_dropout", 0.5, "the gradient in training", "step",
          {"data.disable_dropout": False}),
    Proof("optimization.lora_target_modules", ["q_proj"], "the layers that get adapters",
          "weights"),
    Proof("optimization.use_quantization", True, "the storage of base weights", "asked"),
    Proof("optimization.quantization_bits", 8, "the storage of base weights", "asked",
          {"optimization.use_quantization": True}),
    Proof("optimization.use_gradient_checkpointing", True, "activations are recomputed", "work"),
    Proof("optimization.bf16", True, "the number format of activations", "work",
          {"model.dtype": "float32"}),
    Proof("optimization.torch_compile", True, "the model is compiled", "compiled"),
    Proof("logging.use_wandb", True, "a tracker", "trackers"),
    Proof("logging.wandb_project", "x", "the project of the tracker", "trackers", WITH_WANDB),
    Proof("logging.wandb_entity", "x", "the entity of the tracker", "trackers", WITH_WANDB),
    Proof("logging.wandb_mode", "offline", "the mode of the tracker", "trackers", WITH_WANDB),
    Proof("logging.use_tensorboard", True, "event files in the run's folder", "trained"),
    Proof("logging.run_name", "x", "the name in trackers", "trackers"),
    Proof("logging.log_level", "error", "the messages that are shown", "messages"),
)  # fmt: skip

FURTHER: tuple[Proof, ...] = (
    Proof("model.revision", "v2", "the commit of the tokenizer", "asked_tokenizer"),
    Proof("model.trust_remote_code", True, "the tokenizer's code", "asked_tokenizer"),
    Proof("training.seed", 7, "new weights", "weights"),
    Proof("training.seed", 7, "the drawn negatives", "drawn"),
    Proof("training.seed", 7, "which rows are held out", "texts", {"data.validation_file": None}),
    Proof("training.seed", 7, "which rows are taken", "texts", {"data.max_samples": 6}),
    Proof("data.on_bad_row", "skip", "rows over their budget", "outcome",
          {"data.truncation": False, "model.max_length": 512}),
    Proof("data.cache_dir", "cache", "the folder of reference scores", "folder",
          {**WITH_REFERENCE, "cpo.precompute_ref_log_probs": True}),
    Proof("data.disable_dropout", False, "the adapters' dropout", "step",
          {"optimization.lora_dropout": 0.5}),
    Proof("cpo.precompute_ref_log_probs", True, "the file of scores", "folder", WITH_REFERENCE),
    Proof("optimization.bf16", True, "the format of frozen weights", "weights"),
)  # fmt: skip
"""Further wires of fields that reach several places."""
