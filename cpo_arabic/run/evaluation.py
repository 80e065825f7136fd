"""Held-out metrics of a trained run, beside those of the model it started from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cpo_arabic.config import CPOConfig, load_config
from cpo_arabic.errors import DataError, RunDirectoryError
from cpo_arabic.modeling.policy import Policy
from cpo_arabic.run import data as run_data
from cpo_arabic.run import model as run_model
from cpo_arabic.run.accelerator import build_accelerator
from cpo_arabic.run.directory import RunDirectory
from cpo_arabic.run.messages import levelled
from cpo_arabic.training.evaluation import evaluate
from cpo_arabic.training.observer import Observer


@dataclass(frozen=True)
class Comparison:
    """Held-out metrics of the base and of the trained model, over the same rows."""

    rows: int
    before: dict[str, float]
    after: dict[str, float]


def config_of(target: Path, overrides: list[str]) -> CPOConfig:
    """The configuration of a run directory, or of a YAML file.

    Raises:
        RunDirectoryError: a folder without a run.
    """
    if not target.is_dir():
        return load_config(target, overrides).config
    path = RunDirectory(target).config
    if not path.exists():
        raise RunDirectoryError(f"{str(target)!r} holds no run: {path.name} is missing")
    # What was run, whatever the environment says today.
    own = [f"training.output_dir={target}", *overrides]
    return load_config(path, own, environ={}, env_file=None).config


def compare(config: CPOConfig, observer: Observer) -> Comparison:
    """Measures ``test_file`` where the data has one, else the held-out rows of training.

    Raises:
        RunDirectoryError: the run has no final artefact.
        DataError: there are no held-out rows.
    """
    directory = RunDirectory(Path(config.training.output_dir))
    if not directory.final.is_dir():
        raise RunDirectoryError(
            f"{str(directory.final)!r} does not exist: the run is not finished. Train it with "
            "cpo-arabic train, or go on with --resume"
        )
    observer = levelled(config, observer)
    observer.stage("reading the data")
    records = run_data.read_test(config) or run_data.read(config).validation
    if not records:
        raise DataError(
            "there are no held-out rows: name data.validation_file or data.test_file, or set "
            "data.validation_split_percentage above 0"
        )
    tokenizer = run_model.tokenizer_of(config)
    groups = run_data.groups(config, run_data.tokenize(config, records, tokenizer))
    accelerator = build_accelerator(config, tracked=False)
    measure = partial(_measure, config, tokenizer, groups, accelerator)
    observer.stage("measuring the model it started from")
    before = measure(None)
    observer.stage("measuring the trained model")
    return Comparison(rows=len(groups), before=before, after=measure(directory.final))


def _measure(
    config: CPOConfig,
    tokenizer: Any,
    groups: run_data.Groups,
    accelerator: Accelerator,
    saved: Path | None,
) -> dict[str, float]:
    policy = run_model.build_policy(config, tokenizer, saved=saved)
    prepared = accelerator.prepare(policy)
    bare = accelerator.unwrap_model(prepared)
    assert isinstance(bare, Policy)
    reference = run_model.build_reference(config, bare, tokenizer)
    if reference is not None:
        reference.to(accelerator.device)
    return evaluate(
        bare,
        run_data.held_out_batches(
            groups,
            run_data.collation(config, tokenizer),
            config.training.eval_batch_size or config.training.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
        ),
        run_model.objective_of(config),
        accelerator=accelerator,
        reference=reference,
    )
