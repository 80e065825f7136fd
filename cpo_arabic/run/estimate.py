"""Peak memory and time of a run's steps, from its configuration, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from accelerate import Accelerator

from cpo_arabic.config import CPOConfig
from cpo_arabic.data.pack import PreferenceBatch
from cpo_arabic.errors import ConfigError
from cpo_arabic.kernels.logprob import MEMORY_BUDGET
from cpo_arabic.modeling.loading import load_architecture, outline
from cpo_arabic.modeling.policy import Policy, causal_lm
from cpo_arabic.run import model as run_model
from cpo_arabic.run.accelerator import build_accelerator
from cpo_arabic.run.rehearse import (
    lodged_in_gradient,
    reference_is_run,
    rehearsed,
    rehearsed_batches,
    rehearsed_vocabulary,
)
from cpo_arabic.run.workload import Shape, Workload, shaped, surveyed, tokens_of
from cpo_arabic.training.footprint import Moment, Stretch, head_work, highest, work_of
from cpo_arabic.training.machine import Machine, measure

EFFICIENCY = {"cpu": 0.8, "cuda": 0.5}
"""Share of the machine's measured rates that a whole step reaches: on a CPU calibrated with
``scripts/bench_estimate.py``, where the cases lie within a fifth of it; on CUDA assumed."""
ROWS = 1024
"""Tokens of the product that the rate is measured on."""
HEAD_PASSES = 10
"""Times that the log-probability kernel reads or writes a logit, forward and backward."""
STEP_PASSES = 10
"""Times that clipping and AdamW read or write each byte of the gradients or its like."""


@dataclass(frozen=True)
class Estimate:
    """What a step is going to need."""

    items: dict[str, int]  # bytes at the peak, largest first
    moment: str
    step_seconds: float
    parameters: int
    trainable: int
    workload: Workload
    machine: Machine

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.items.values())


@dataclass(frozen=True)
class Lever:
    """A legal change of the configuration and what it would lead to."""

    changes: dict[str, Any]
    estimate: Estimate


@dataclass(frozen=True)
class Report:
    """The estimate of a configuration, its levers with the strongest first, the machine."""

    estimate: Estimate
    levers: list[Lever]
    machine: Machine


def estimate(config: CPOConfig, shape: Shape | None = None) -> Report:
    """Predicts the peak and the time of a step, and what each legal change would save.

    Args:
        config: as it was written; values that follow others may be unset.
        shape: of the groups, in place of the configured data.

    Raises:
        CPOArabicError: a mistake in data or model, or a machine that cannot run it.
    """
    predict = _Prediction(config, shape)
    now = predict(config)
    levers = [Lever(changes, predict(changed)) for changes, changed in _legal(config)]
    levers.sort(key=lambda lever: lever.estimate.peak)
    return Report(estimate=now, levers=levers, machine=now.machine)


def estimate_alone(config: CPOConfig, shape: Shape | None = None) -> Estimate:
    """:func:`estimate` without levers."""
    return _Prediction(config, shape)(config)


class _Prediction:
    """Configuration → estimate; the rows are read once for all that differ in other settings."""

    def __init__(self, config: CPOConfig, shape: Shape | None) -> None:
        resolved = config.resolved()
        run_model.check_hardware(resolved)
        self._shape = shape
        self._tokens = tokens_of(resolved) if shape is None else None

    def __call__(self, config: CPOConfig) -> Estimate:
        config = config.updated({"optimization.torch_compile": False}).resolved()
        accelerator = build_accelerator(config, tracked=False)
        if self._shape is not None:
            work = shaped(config, self._shape)
        else:
            assert self._tokens is not None
            work = surveyed(config, *self._tokens, accelerator.num_processes)
        return _estimated(config, accelerator, work)


def _legal(config: CPOConfig) -> Iterator[tuple[dict[str, Any], CPOConfig]]:
    """The changes that would alter something and leave a valid configuration."""
    resolved, size = config.resolved(), config.training.batch_size
    halved = {
        "training.batch_size": size // 2,
        "training.gradient_accumulation_steps": 2 * config.training.gradient_accumulation_steps,
    }
    candidates: list[dict[str, Any]] = [
        {"data.padding": "packed"},
        {"optimization.use_gradient_checkpointing": True},
        {"optimization.use_lora": True},
        {"optimization.bf16": True},
        {"model.attn_implementation": "sdpa"},
    ]
    if size % 2 == 0:
        candidates.append(halved)
    if run_model.reference_in_use(resolved):
        candidates.append({"cpo.precompute_ref_log_probs": True})
    for changes in candidates:
        if all(resolved.get(path) == value for path, value in changes.items()):
            continue
        with suppress(ConfigError):
            yield changes, config.updated(changes)


def _estimated(config: CPOConfig, accelerator: Accelerator, work: Workload) -> Estimate:
    source = run_model.source_of(config)
    architecture = load_architecture(source)
    with torch.device("meta"):
        whole = run_model.policy_around(config, outline(architecture, source))
    trainable = [p for p in whole.parameters() if p.requires_grad]
    gradients = _bytes(trainable)
    standing = {
        "weights": _weights(config, whole),
        "optimizer moments": 2 * gradients,
        "momentum encoder": gradients if run_model.momentum_in_use(config) else 0,
        "reference model": _reference_bytes(config),
        "queue": _queue_bytes(config, architecture.hidden_size),
    }
    stretches = rehearsed(config, accelerator, work, architecture, gradients)
    moment = highest(stretches)
    if gradients > moment.total:
        moment = Moment("optimizer step", gradients, 0, 0)
    items = {
        **standing,
        "gradients": moment.gradients,
        "kept for the backward pass": moment.saved,
        "passing": moment.passing,
    }
    return Estimate(
        items=dict(sorted(((k, v) for k, v in items.items() if v), key=lambda item: -item[1])),
        moment=moment.name,
        step_seconds=_seconds(config, work, architecture, stretches, gradients, accelerator.device),
        parameters=sum(p.numel() for p in whole.parameters()),
        trainable=sum(p.numel() for p in trainable),
        workload=work,
        machine=_machine(accelerator.device, architecture, _working_dtype(config)),
    )


def _weights(config: CPOConfig, policy: Policy) -> int:
    """Parameters and buffers; quantised ones in their bits and half a bit of scales."""
    whole = _bytes(policy.parameters()) + _bytes(policy.buffers())
    if not config.optimization.use_quantization:
        return whole
    head = causal_lm(policy.model).get_output_embeddings()
    quantised = [
        module.weight
        for module in policy.modules()
        if isinstance(module, torch.nn.Linear)
        and module is not head
        and not module.weight.requires_grad
    ]
    bits = config.optimization.quantization_bits + 0.5
    return whole - _bytes(quantised) + int(sum(w.numel() for w in quantised) * bits / 8)


def _reference_bytes(config: CPOConfig) -> int:
    source = run_model.reference_source(config) if reference_is_run(config) else None
    if source is None:
        return 0
    with torch.device("meta"):
        return _bytes(outline(load_architecture(source), source).parameters())


def _queue_bytes(config: CPOConfig, hidden_size: int) -> int:
    """Embeddings in float32 and labels of three int64."""
    cpo = config.cpo
    if not run_model.queue_in_use(config):
        return 0
    return cpo.queue_size * (4 * (cpo.projection_dim or hidden_size) + 3 * 8)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- time ----------------------------------------------------------------------------------------


def _working_dtype(config: CPOConfig) -> torch.dtype:
    """What matrix products are computed in."""
    return torch.bfloat16 if config.optimization.bf16 else run_model.weights_dtype(config)


def _seconds(
    config: CPOConfig,
    work: Workload,
    architecture: Any,
    stretches: Sequence[Stretch],
    gradients: int,
    device: torch.device,
) -> float:
    """Work and traffic of a step at the machine's rates; its micro-batches as they are on average.

    On a CPU the log-probability kernel computes in float32 whatever the rest computes in.
    """
    machine = _machine(device, architecture, _working_dtype(config))
    in_head = _machine(device, architecture, torch.float32) if device.type == "cpu" else machine
    flops, traffic = work_of(stretches)
    batches = rehearsed_batches(config, work)
    whole = architecture.vocab_size
    part = rehearsed_vocabulary(config, work.largest, architecture)
    head, rows = _head(config, batches, architecture.hidden_size)
    seconds = (flops - head(part)) / machine.work_rate
    seconds += head(whole) / in_head.work_rate
    seconds += (traffic + HEAD_PASSES * 4 * rows * (whole - part)) / machine.traffic_rate
    seconds *= work.positions * work.micro_batches / sum(b.input_ids.numel() for b in batches)
    seconds += STEP_PASSES * gradients / machine.traffic_rate
    return float(seconds / EFFICIENCY.get(device.type, EFFICIENCY["cuda"]))


def _head(
    config: CPOConfig, batches: Sequence[PreferenceBatch], hidden: int
) -> tuple[Callable[[int], float], int]:
    """Vocabulary → FLOPs of the batches' log-probabilities; and for how many tokens they are."""
    cpo = config.cpo
    each = [0] * len(batches)
    if cpo.preference_weight:
        each = [len(batch.token_targets) for batch in batches]
    elif cpo.cpo_alpha:
        each = [len(batch.chosen_tokens) for batch in batches]
    passes = 1 if reference_is_run(config) and cpo.preference_weight else 0
    trained = not config.optimization.use_lora

    def flops(vocabulary: int) -> float:
        total = passes * 2.0 * hidden * vocabulary * sum(each)
        for rows in each:
            lodged = lodged_in_gradient(config, rows, hidden)
            total += head_work(
                rows, hidden, vocabulary, trained=trained, lodged=lodged, budget=MEMORY_BUDGET
            )
        return total

    return flops, sum(each)


@cache
def _rates(device: torch.device, rows: int, inner: int, outer: int, dtype: torch.dtype) -> Machine:
    return measure(device, rows, inner, outer, dtype)


def _machine(device: torch.device, architecture: Any, dtype: torch.dtype) -> Machine:
    """The machine's rates for this model's widest product."""
    return _rates(device, ROWS, architecture.hidden_size, architecture.intermediate_size, dtype)
