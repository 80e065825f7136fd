"""A configuration's step, made smaller where it repeats, and gone through without storage."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import Accelerator

from cpo_arabic.config import CPOConfig
from cpo_arabic.data.pack import PreferenceBatch
from cpo_arabic.kernels.logprob import MEMORY_BUDGET, TILE_TOKENS, lodged_rows
from cpo_arabic.modeling.encoder import EmbeddingQueue, MomentumEncoder
from cpo_arabic.modeling.loading import load_architecture, outline
from cpo_arabic.modeling.policy import Policy, Reference, causal_lm
from cpo_arabic.run import model as run_model
from cpo_arabic.run.workload import Workload
from cpo_arabic.training.engine import Engine
from cpo_arabic.training.footprint import Stretch
from cpo_arabic.training.plan import Share
from cpo_arabic.training.rehearsal import LAYERS, Rehearsal
from cpo_arabic.training.step import accumulate


def rehearsed(
    config: CPOConfig, accelerator: Accelerator, work: Workload, architecture: Any, gradients: int
) -> list[Stretch]:
    """The gradient of one step, gone through on the largest micro-batch without storage.

    Args:
        config: resolved.
        accelerator: the run's device and precision.
        work: its micro-batches.
        architecture: of the model.
        gradients: bytes of the whole model's gradients.
    """
    vocabulary = rehearsed_vocabulary(config, work.largest, architecture)
    mode = Rehearsal(vocabulary, architecture.vocab_size / vocabulary)
    source = run_model.source_of(config)
    with torch.device("meta"):
        model = outline(_smaller(architecture, vocabulary), source)
        policy = run_model.policy_around(config, model)
    mode.embody(policy, accelerator.device)
    engine = _engine(config, accelerator, policy, mode, vocabulary)
    mode.follow(policy.decoder, architecture.num_hidden_layers, "policy")
    mode.track_gradients(policy.parameters())
    batches = rehearsed_batches(config, work)
    earlier = []
    if work.micro_batches > 1:  # then a gradient of an earlier one is there
        mode.give_gradients(policy.parameters())
        earlier = [Stretch("earlier micro-batch", left=gradients, left_gradients=gradients)]
    mode.restart()
    with mode:
        kept_alive = accumulate(engine, Share(batches, [[0]] * len(batches), True), 0)
        stretches = mode.finish()
    del kept_alive
    return [*earlier, *stretches]


def _engine(
    config: CPOConfig, accelerator: Accelerator, policy: Policy, mode: Rehearsal, vocabulary: int
) -> Engine:
    """What a step works with, a queue that is full included."""
    cpo = config.cpo
    queue = EmbeddingQueue(cpo.queue_size) if run_model.queue_in_use(config) else None
    if queue is not None:
        width = cpo.projection_dim or causal_lm(policy.model).config.hidden_size
        queue.embeddings = mode.empty((cpo.queue_size, width), torch.float32, accelerator.device)
        queue.labels = torch.zeros(cpo.queue_size, 3, dtype=torch.int64, device=accelerator.device)
        queue.filled = cpo.queue_size
    momentum = None
    if run_model.momentum_in_use(config):
        with mode:
            momentum = MomentumEncoder(policy.trainable(), cpo.momentum_beta)
    return Engine(
        accelerator=accelerator,
        policy=accelerator.prepare(policy, device_placement=[False]),
        objective=run_model.objective_of(config),
        reference=_reference(config, policy, mode, vocabulary, accelerator.device),
        momentum=momentum,
        queue=queue,
        seed=config.training.seed,
    )


def _reference(
    config: CPOConfig, policy: Policy, mode: Rehearsal, vocabulary: int, device: torch.device
) -> Reference | None:
    """The one that is there in a step: a table of its scores needs nothing."""
    if not reference_is_run(config):
        return None
    source = run_model.reference_source(config)
    if source is None:
        return Reference(policy)
    architecture = load_architecture(source)
    with torch.device("meta"):
        model = outline(_smaller(architecture, vocabulary), source)
    mode.embody(model, device)
    mode.follow(model.get_decoder(), architecture.num_hidden_layers, "reference")
    return Reference(policy, model)


def reference_is_run(config: CPOConfig) -> bool:
    """Whether a step runs a reference, rather than look its scores up."""
    return run_model.reference_in_use(config) and not config.cpo.precompute_ref_log_probs


def rehearsed_batches(config: CPOConfig, work: Workload) -> list[PreferenceBatch]:
    """The largest; a group before it where the contrastive term joins micro-batches (GradCache)."""
    joined = config.cpo.contrastive_weight > 0 and not config.cpo.use_momentum
    return [work.single, work.largest] if joined and work.micro_batches > 1 else [work.largest]


def rehearsed_vocabulary(config: CPOConfig, batch: PreferenceBatch, architecture: Any) -> int:
    """As many tokens as fill the kernel's budget of kept logits, and tiles of every width."""
    rows = len(batch.token_targets)
    others = rows - lodged_in_gradient(config, rows, architecture.hidden_size)
    enough = max(2 * TILE_TOKENS[1], MEMORY_BUDGET // (4 * others) if others else 0)
    # odd: no other dimension is
    return min(int(architecture.vocab_size), enough + TILE_TOKENS[1] + 1)


def lodged_in_gradient(config: CPOConfig, rows: int, hidden: int) -> int:
    """Of ``rows`` predicted tokens, how many keep their logits at no cost."""
    if config.optimization.use_lora:
        return 0
    return lodged_rows(rows, hidden, run_model.weights_dtype(config).itemsize)


def _smaller(architecture: Any, vocabulary: int) -> Any:
    """The model's configuration as it is rehearsed."""
    small = copy.deepcopy(architecture)
    small.num_hidden_layers = min(LAYERS, architecture.num_hidden_layers)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: small.num_hidden_layers]
    small.vocab_size, small.pad_token_id = vocabulary, None
    return small
