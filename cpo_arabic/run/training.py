"""A training run from its configuration to its last file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import set_seed

from cpo_arabic.config import CPOConfig
from cpo_arabic.data.pack import PreferenceBatch, TokenizedGroup
from cpo_arabic.data.tokenize import PreferenceDataset
from cpo_arabic.files import write_whole
from cpo_arabic.modeling.encoder import EmbeddingQueue, MomentumEncoder
from cpo_arabic.modeling.loading import save_policy
from cpo_arabic.modeling.policy import Policy, Reference
from cpo_arabic.report.card import model_card
from cpo_arabic.report.curves import draw_curves
from cpo_arabic.run import data as run_data
from cpo_arabic.run import model as run_model
from cpo_arabic.run.accelerator import build_accelerator, check_trackers
from cpo_arabic.run.directory import RunDirectory, check_usable, claimed, empty
from cpo_arabic.run.enrich import enrich
from cpo_arabic.run.explain import explained
from cpo_arabic.run.identity import check_identity, settings_identity
from cpo_arabic.run.messages import levelled
from cpo_arabic.run.reference import tabulate
from cpo_arabic.run.stream import stream
from cpo_arabic.training.checkpoint import CheckpointStore, write_folder
from cpo_arabic.training.engine import Engine
from cpo_arabic.training.evaluation import SamplePrompt
from cpo_arabic.training.metrics import MetricsFile
from cpo_arabic.training.observer import Observer, SilentObserver
from cpo_arabic.training.plan import Schedule, WindowLoader
from cpo_arabic.training.sanity import check_learning
from cpo_arabic.training.trainer import (
    OptimizerSettings,
    Outcome,
    StopRequest,
    Trainer,
    TrainerSettings,
    build_optimizer,
)

SAMPLES = 4
"""Held-out prompts that ``data.generate_during_eval`` completes."""


@dataclass(frozen=True)
class Result:
    """What ``train`` leaves behind."""

    directory: RunDirectory
    outcome: Outcome
    summary: dict[str, Any]


class _Inputs(NamedTuple):
    """What is read before the run claims its directory."""

    tokenizer: Any
    records: run_data.Records | None  # None where rows are streamed
    train: PreferenceDataset
    held_out: PreferenceDataset | None


class _Rows(NamedTuple):
    """What the loop draws its batches from."""

    groups: run_data.Groups
    held_out: run_data.Groups | None
    schedule: Schedule
    collate: Callable[[Sequence[TokenizedGroup]], PreferenceBatch]


def train(
    config: CPOConfig, observer: Observer, *, resume: bool = False, stop: StopRequest | None = None
) -> Result:
    """Trains as the resolved configuration says.

    Args:
        config: resolved; every field is read from here.
        observer: who watches.
        resume: continue the run in ``training.output_dir`` from its newest whole checkpoint.
        stop: set by a signal handler to save and stop at the next step's end.

    Raises:
        CPOArabicError: a mistake in data, model, directory or checkpoint; nothing is half-written.
    """
    directory = RunDirectory(Path(config.training.output_dir))
    overwrite = config.training.overwrite_output_dir
    check_usable(directory.root, resume=resume, overwrite=overwrite)
    observer = levelled(config, observer)
    run_model.check_hardware(config)
    check_trackers(config)
    accelerator = build_accelerator(config)
    if not accelerator.is_main_process:
        observer = SilentObserver()
    inputs = _inputs(config, observer)
    claim = claimed(directory.root) if accelerator.is_main_process else nullcontext()
    with explained(config), claim:
        return _run(
            config, directory, accelerator, inputs, observer,
            resume=resume, stop=stop or StopRequest(),
        )  # fmt: skip


def _inputs(config: CPOConfig, observer: Observer) -> _Inputs:
    observer.stage("loading the tokenizer")
    tokenizer = run_model.tokenizer_of(config)
    observer.stage("reading the data")
    records = None if config.data.streaming else run_data.read(config)
    for note in records.notes if records is not None else ():
        observer.stage(note)
    observer.stage("tokenising")
    if records is None:
        train_set, held_out = stream(config, tokenizer)
    else:
        train_set = run_data.tokenize(config, records.train, tokenizer)
        held = records.validation
        held_out = run_data.tokenize(config, held, tokenizer) if held else None
    _tell(train_set, observer)
    if held_out is not None:
        _tell(held_out, observer, "held out: ")
    return _Inputs(tokenizer, records, train_set, held_out)


def _run(
    config: CPOConfig,
    directory: RunDirectory,
    accelerator: Accelerator,
    inputs: _Inputs,
    observer: Observer,
    *,
    resume: bool,
    stop: StopRequest,
) -> Result:
    set_seed(config.training.seed)
    store = CheckpointStore(directory.root, config.training.save_total_limit)
    settings = settings_identity(config, accelerator.num_processes)
    checkpoint = store.newest(observer.warning) if resume else None
    if checkpoint is not None:
        check_identity(checkpoint, settings)
    observer.stage("loading the model")
    saved = checkpoint.folder if checkpoint else None
    policy = run_model.build_policy(config, inputs.tokenizer, saved=saved)
    reference = run_model.build_reference(config, policy, inputs.tokenizer)
    # Whatever could refuse this run has had its say: an earlier one may be replaced now.
    if accelerator.is_main_process:
        if not resume:
            empty(directory.root)
        config.to_yaml(directory.config)
    rows = _rows(config, accelerator, inputs, observer)
    fingerprint = run_data.fingerprint(rows.groups)
    identity = {**settings, "rows": len(rows.groups), "data": fingerprint}
    if checkpoint is not None:
        check_identity(checkpoint, identity)
    engine, optimizer = _engine(config, accelerator, policy, reference)
    eval_reference = tabulate(
        config, engine, rows.collate, directory, observer,
        rows.groups, rows.held_out, rows.schedule,
    )  # fmt: skip
    if config.data.sanity_check and checkpoint is None:
        observer.stage("sanity check")
        batches = partial(_fixed_batches, rows, config)
        check_learning(engine, batches, learning_rate=config.training.learning_rate)
    trainer = Trainer(
        engine, optimizer, _loader(config, accelerator, rows),
        _held_out_pass(config, accelerator, rows), _settings(config, rows.schedule),
        store, MetricsFile(directory.metrics), observer,
        identity=identity, tokenizer=inputs.tokenizer,
        samples=_samples(config, rows, inputs.tokenizer),
        stop=stop, eval_reference=eval_reference,
    )  # fmt: skip
    if checkpoint is not None:
        trainer.resume(checkpoint)
    _start_trackers(config, accelerator, directory)
    try:
        outcome = trainer.train()
    finally:
        accelerator.end_training()
    summary: dict[str, Any] = {}
    if outcome.stopped_by is None and accelerator.is_main_process:
        summary = _finish(config, directory, engine, inputs.tokenizer, outcome, trainer)
    return Result(directory=directory, outcome=outcome, summary=summary)


def _rows(
    config: CPOConfig, accelerator: Accelerator, inputs: _Inputs, observer: Observer
) -> _Rows:
    groups = run_data.groups(config, _enriched(config, accelerator, inputs, observer))
    return _Rows(
        groups,
        run_data.groups(config, inputs.held_out) if inputs.held_out is not None else None,
        run_data.schedule(config, len(groups), accelerator.num_processes),
        run_data.collation(config, inputs.tokenizer),
    )


def _enriched(
    config: CPOConfig, accelerator: Accelerator, inputs: _Inputs, observer: Observer
) -> PreferenceDataset:
    """The training rows with mined negatives and twins, tokenised anew where there are any."""
    asked = config.data.create_hard_negatives or config.data.augment_data
    if not asked or inputs.records is None:
        return inputs.train
    with accelerator.main_process_first():
        rows = enrich(config, inputs.records.train, observer)
    enriched = run_data.tokenize(config, rows, inputs.tokenizer)
    _tell(enriched, observer)
    return enriched


def _tell(dataset: PreferenceDataset, observer: Observer, prefix: str = "") -> None:
    """What tokenising met."""
    for line in dataset.report.lines():
        observer.stage(prefix + line)


def _loader(config: CPOConfig, accelerator: Accelerator, rows: _Rows) -> WindowLoader:
    return WindowLoader(
        source=rows.groups,
        schedule=rows.schedule,
        order=run_data.order(config, rows.groups),
        collate=rows.collate,
        workers=config.training.dataloader_num_workers,
        rank=accelerator.process_index,
    )


def _held_out_pass(
    config: CPOConfig, accelerator: Accelerator, rows: _Rows
) -> Callable[[], Iterator[PreferenceBatch]] | None:
    """A fresh pass over this rank's held-out batches at every call."""
    if rows.held_out is None:
        return None
    return partial(
        run_data.held_out_batches,
        rows.held_out,
        rows.collate,
        config.training.eval_batch_size or config.training.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )


def _start_trackers(config: CPOConfig, accelerator: Accelerator, directory: RunDirectory) -> None:
    log = config.logging
    flat = {
        f"{name}.{field}": value if isinstance(value, bool | int | float | str) else str(value)
        for name, section in config.model_dump().items()
        for field, value in section.items()
        if not field.endswith("init_kwargs")  # may hold credentials
    }
    wandb = {
        "entity": log.wandb_entity,
        "mode": log.wandb_mode,
        "name": log.run_name,
        "dir": str(directory.root),
    }
    project = log.wandb_project if log.use_wandb else (log.run_name or "tensorboard")
    accelerator.init_trackers(project, config=flat, init_kwargs={"wandb": wandb})


def _engine(
    config: CPOConfig, accelerator: Accelerator, policy: Policy, reference: Reference | None
) -> tuple[Engine, Any]:
    cpo, training = config.cpo, config.training
    if reference is not None:
        reference.to(accelerator.device)
    optimizer = build_optimizer(
        policy,
        OptimizerSettings(
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_epsilon=training.adam_epsilon,
        ),
    )
    prepared, optimizer = accelerator.prepare(policy, optimizer)
    engine = Engine(
        accelerator=accelerator,
        policy=prepared,
        objective=run_model.objective_of(config),
        reference=reference,
        momentum=MomentumEncoder(policy.trainable(), cpo.momentum_beta)
        if run_model.momentum_in_use(config)
        else None,
        queue=EmbeddingQueue(cpo.queue_size) if run_model.queue_in_use(config) else None,
        seed=training.seed,
    )
    return engine, optimizer


def _settings(config: CPOConfig, schedule: Schedule) -> TrainerSettings:
    training = config.training
    warmup = math.ceil(training.warmup_ratio * schedule.total_steps)
    return TrainerSettings(
        learning_rate=training.learning_rate,
        max_grad_norm=training.max_grad_norm,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps or warmup,
        eval_steps=training.eval_steps or schedule.steps_per_epoch,
        save_steps=training.save_steps or schedule.steps_per_epoch,
        logging_steps=training.logging_steps,
        max_skipped_steps=training.max_skipped_steps,
        max_new_tokens=config.cpo.max_target_length or 1,
    )


def _fixed_batches(rows: _Rows, config: CPOConfig) -> list[PreferenceBatch]:
    """The first ``sanity_check_size`` rows in batches of the training's size."""
    size = config.training.batch_size
    last = min(config.data.sanity_check_size, len(rows.groups))
    return [
        rows.collate([rows.groups.group(row, 0) for row in range(start, min(start + size, last))])
        for start in range(0, last, size)
    ]


def _samples(config: CPOConfig, rows: _Rows, tokenizer: Any) -> list[SamplePrompt]:
    if not config.data.generate_during_eval or rows.held_out is None:
        return []
    found = []
    for row in range(min(SAMPLES, len(rows.held_out))):
        group = rows.held_out.group(row, 0)
        chosen, rejected = (
            tokenizer.decode(ids, skip_special_tokens=True) for ids in group.completion_ids[:2]
        )
        prompt = tokenizer.decode(group.prompt_ids)
        found.append(SamplePrompt(row, group.prompt_ids, prompt, chosen, rejected))
    return found


def _finish(
    config: CPOConfig,
    directory: RunDirectory,
    engine: Engine,
    tokenizer: Any,
    outcome: Outcome,
    trainer: Trainer,
) -> dict[str, Any]:
    """Final artefact, summary and picture."""
    records = trainer.metrics.read()
    before = outcome.before or trainer.metrics.held_out(0)
    summary = {
        "steps": outcome.step,
        "train_rows": trainer.loader.schedule.rows,
        "held_out_before": before,
        "held_out_after": outcome.after,
        "objective": asdict(engine.objective),
        "final": str(directory.final),
    }

    def write(folder: Path) -> None:
        save_policy(engine.bare.model, engine.bare.projection, folder)
        tokenizer.save_pretrained(folder)
        card = model_card(config.model.name, summary, is_adapter=config.optimization.use_lora)
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_folder(directory.final, write)
    write_whole(directory.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    draw_curves(records, directory.curves)
    return summary
