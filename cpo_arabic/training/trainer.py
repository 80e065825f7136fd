"""The loop: accumulate, step, log, evaluate, save."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import get_scheduler

from cpo_arabic.data.pack import PreferenceBatch
from cpo_arabic.errors import TrainingError
from cpo_arabic.modeling.loading import save_policy
from cpo_arabic.modeling.policy import Reference
from cpo_arabic.objective.contrastive import Keys
from cpo_arabic.objective.total import ObjectiveSettings, term_weights
from cpo_arabic.training import state as saved_state
from cpo_arabic.training.checkpoint import Checkpoint, CheckpointStore
from cpo_arabic.training.engine import Engine
from cpo_arabic.training.evaluation import SamplePrompt, evaluate, generate_samples
from cpo_arabic.training.metrics import MetricsFile, MetricSums
from cpo_arabic.training.observer import Observer
from cpo_arabic.training.plan import Share, WindowLoader
from cpo_arabic.training.step import accumulate

TERMS = {
    "preference": "preference_loss",
    "nll": "nll_loss",
    "contrastive": "contrastive/loss",
}
"""Term of the objective → the metric that holds its mean."""


@dataclass(frozen=True)
class OptimizerSettings:
    """Constants of AdamW, named as in the configuration."""

    learning_rate: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float


@dataclass(frozen=True)
class TrainerSettings:
    """Constants of the loop, named as in the configuration; steps are optimizer steps."""

    learning_rate: float
    max_grad_norm: float | None
    lr_scheduler_type: str
    warmup_steps: int
    eval_steps: int
    save_steps: int
    logging_steps: int
    max_skipped_steps: int
    max_new_tokens: int


@dataclass
class StopRequest:
    """Set from a signal handler; the loop saves and stops at the next step's end."""

    signal: int | None = None


@dataclass
class Outcome:
    """How a run ended."""

    step: int
    stopped_by: int | None
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)


def build_optimizer(policy: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); weight decay for matrices only, as is the habit."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=True,
    )


def learning_rates(
    settings: TrainerSettings, optimizer: torch.optim.Optimizer, total_steps: int
) -> Callable[[int], float]:
    """0-based optimizer step → learning rate: a function of the step, so never a state."""
    scheduler = get_scheduler(
        settings.lr_scheduler_type,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=total_steps,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: settings.learning_rate * float(factor(step))


def total_of_means(means: dict[str, float], objective: ObjectiveSettings) -> float:
    """L as it is optimised, from the means of its terms; a term that is off adds nothing."""
    weights = term_weights(objective)
    return sum(weight * means.get(TERMS[term], 0.0) for term, weight in weights.items())


class Trainer:
    """One run of the loop over an engine.

    Args:
        engine: policy, objective, reference, momentum encoder and queue.
        optimizer: prepared by the accelerator.
        loader: the training windows of this rank.
        evaluation: a fresh pass over this rank's held-out batches, or None.
        settings: constants of the loop.
        store: where checkpoints go.
        metrics: ``metrics.jsonl``.
        observer: who watches.
        identity: what a checkpoint must agree on with the run that resumes it.
        tokenizer: saved with every checkpoint; also for samples.
        samples: held-out prompts to complete at every evaluation.
        stop: set by a signal.
        eval_reference: the reference for held-out rows, where one is in use.
    """

    def __init__(
        self,
        engine: Engine,
        optimizer: torch.optim.Optimizer,
        loader: WindowLoader,
        evaluation: Callable[[], Iterable[PreferenceBatch]] | None,
        settings: TrainerSettings,
        store: CheckpointStore,
        metrics: MetricsFile,
        observer: Observer,
        *,
        identity: dict[str, Any],
        tokenizer: Any,
        samples: list[SamplePrompt],
        stop: StopRequest,
        eval_reference: Reference | None,
    ) -> None:
        self.engine, self.optimizer, self.loader = engine, optimizer, loader
        self.evaluation, self.settings, self.store = evaluation, settings, store
        self.metrics, self.observer, self.identity = metrics, observer, identity
        self.tokenizer, self.samples, self.stop = tokenizer, samples, stop
        self.eval_reference = eval_reference
        self.total_steps = loader.schedule.total_steps
        self.parameters = engine.bare.trainable()
        self.learning_rate = learning_rates(settings, optimizer, self.total_steps)
        self.step = 0
        self.skipped = 0
        self.saved_step: int | None = None
        self._window_tokens, self._window_started = 0, time.perf_counter()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint; the policy's weights are already its own."""
        state, folder, engine = checkpoint.state, checkpoint.folder, self.engine
        self.step, self.skipped = checkpoint.step, int(state["skipped_in_a_row"])
        saved_state.load_optimizer(_plain(self.optimizer), self.parameters, folder)
        if engine.momentum is not None:
            saved_state.load_momentum(engine.momentum, folder)
        if engine.queue is not None:
            saved_state.load_queue(engine.queue, folder, engine.accelerator.device)
        if engine.accelerator.is_main_process:
            self.store.sweep()
            self.metrics.rewind(self.step)

    def train(self) -> Outcome:
        """Runs to the last step, or to the step at which a stop was asked for.

        Raises:
            TrainingError: too many updates in a row were not finite.
        """
        outcome = Outcome(step=self.step, stopped_by=None)
        self.engine.policy.train()
        if self.engine.accelerator.is_main_process:
            self.observer.started(self.step, self.total_steps)
        if self.step == 0:
            outcome.before = self._evaluate()
        self._window_started = time.perf_counter()
        while self.step < self.total_steps and outcome.stopped_by is None:
            epoch, first = self.loader.schedule.epoch_of(self.step)
            for share in self.loader.shares(epoch, first):
                self._one_step(share)
                outcome.stopped_by = self._stop_asked()
                if outcome.stopped_by is not None or self.step >= self.total_steps:
                    break
        if outcome.stopped_by is None:
            outcome.after = self._last_evaluation()
        elif self.saved_step != self.step:
            self._save()
        outcome.step = self.step
        return outcome

    def _one_step(self, share: Share) -> None:
        engine, settings = self.engine, self.settings
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums, keys = accumulate(engine, share, self.step)
        norm = self._clip()
        if math.isfinite(norm):
            self.optimizer.step()
            self._remember(keys)
            self.skipped = 0
        else:
            self._skip(share, norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._window_tokens += sum(batch.tokens for batch in share.batches)
        record = self._log(sums, norm, rate) if self._due(settings.logging_steps) else None
        if engine.accelerator.is_main_process:
            self.observer.stepped(self.step, record)
        if self._due(settings.eval_steps) and self.step < self.total_steps:
            self._evaluate()
        if self._due(settings.save_steps) or self.step == self.total_steps:
            self._save()

    def _due(self, every: int) -> bool:
        return self.step % every == 0

    def _clip(self) -> float:
        limit = self.settings.max_grad_norm
        norm = self.engine.accelerator.clip_grad_norm_(
            self.parameters.values(), math.inf if limit is None else limit
        )
        return float(norm)

    def _remember(self, keys: Keys | None) -> None:
        if self.engine.momentum is not None:
            self.engine.momentum.update()
        if self.engine.queue is not None and keys is not None:
            self.engine.queue.push(keys.embeddings.detach(), keys.labels)

    def _skip(self, share: Share, norm: float) -> None:
        """Leaves weights and moments as they are and names the rows."""
        self.skipped += 1
        own = [row for each in share.rows for row in each] if share.counted else []
        rows = sorted(gather_object(own))
        text = f"step {self.step + 1}: the gradient norm is {norm}; update skipped. Rows: {rows}"
        self.observer.warning(text)
        if self.skipped > self.settings.max_skipped_steps:
            raise TrainingError(
                f"{text}. That is more than training.max_skipped_steps = "
                f"{self.settings.max_skipped_steps} in a row: lower training.learning_rate, raise "
                "the temperatures, or look at these rows"
            )

    def _log(self, sums: MetricSums, norm: float, rate: float) -> dict[str, Any]:
        engine = self.engine
        now = time.perf_counter()
        means = sums.means(engine.reduce)
        tokens = self._window_tokens * engine.accelerator.num_processes
        record = {
            "step": self.step,
            "epoch": round(self.step / self.loader.schedule.steps_per_epoch, 4),
            "loss": total_of_means(means, engine.objective),
            **means,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens_per_second": tokens / (now - self._window_started),
        }
        self._window_tokens, self._window_started = 0, now
        self._write(record)
        return record

    def _write(self, record: dict[str, Any]) -> None:
        if self.engine.accelerator.is_main_process:
            self.metrics.append(record)
        values = {k: v for k, v in record.items() if k != "step"}
        self.engine.accelerator.log(values, step=record["step"])

    def _evaluate(self) -> dict[str, float]:
        if self.evaluation is None:
            return {}
        engine, main = self.engine, self.engine.accelerator.is_main_process
        paused = time.perf_counter()
        found = evaluate(
            engine.bare,
            self.evaluation(),
            engine.objective,
            accelerator=engine.accelerator,
            reference=self.eval_reference,
        )
        self._write({"step": self.step, **found})
        if main and self.samples:
            self._write_samples()
        if main:
            self.observer.evaluated(self.step, found)
        self._window_started += time.perf_counter() - paused
        return found

    def _last_evaluation(self) -> dict[str, float]:
        """The final metrics; read back when the run had already reached its end."""
        return self.metrics.held_out(self.step) or self._evaluate()

    def _write_samples(self) -> None:
        samples = generate_samples(
            self.engine.bare,
            self.samples,
            self.tokenizer,
            accelerator=self.engine.accelerator,
            max_new_tokens=self.settings.max_new_tokens,
        )
        folder = self.store.root / "samples"
        folder.mkdir(exist_ok=True)
        text = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)
        (folder / f"step-{self.step}.jsonl").write_text(text, encoding="utf-8")

    def _stop_asked(self) -> int | None:
        """The signal, agreed on by all ranks so that they stop at the same step."""
        engine = self.engine
        if engine.accelerator.num_processes == 1:
            return self.stop.signal
        mine = torch.tensor([self.stop.signal or 0], device=engine.accelerator.device)
        everyone: Any = engine.accelerator.gather(mine)
        return int(everyone.max()) or None

    def _save(self) -> None:
        accelerator = self.engine.accelerator
        paused = time.perf_counter()
        if accelerator.is_main_process:
            state = {
                "skipped_in_a_row": self.skipped,
                "identity": self.identity,
            }
            folder = self.store.save(self.step, state, self._write_state)
            self.observer.saved(self.step, str(folder))
        accelerator.wait_for_everyone()
        self.saved_step = self.step
        self._window_started += time.perf_counter() - paused

    def _write_state(self, folder: Path) -> None:
        engine = self.engine
        save_policy(engine.bare.model, engine.bare.projection, folder)
        saved_state.save_optimizer(_plain(self.optimizer), self.parameters, folder)
        if engine.momentum is not None:
            saved_state.save_momentum(engine.momentum, folder)
        if engine.queue is not None:
            saved_state.save_queue(engine.queue, folder)
        self.tokenizer.save_pretrained(folder)


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer under accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, torch.optim.Optimizer)
    return inner
