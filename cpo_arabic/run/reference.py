"""The reference's log-probabilities as tables (``cpo.precompute_ref_log_probs``)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from cpo_arabic.config import CPOConfig
from cpo_arabic.modeling.policy import Reference
from cpo_arabic.modeling.precompute import precompute
from cpo_arabic.run import data as run_data
from cpo_arabic.run import model as run_model
from cpo_arabic.run.directory import RunDirectory
from cpo_arabic.training.engine import Engine
from cpo_arabic.training.observer import Observer
from cpo_arabic.training.plan import Schedule


def tabulate(
    config: CPOConfig,
    engine: Engine,
    collate: Any,
    directory: RunDirectory,
    observer: Observer,
    groups: run_data.Groups,
    held: run_data.Groups | None,
    schedule: Schedule,
) -> Reference | None:
    """Puts a table in the reference's place where one is asked for; returns the held-out one."""
    reference = engine.reference
    if reference is None or not config.cpo.precompute_ref_log_probs:
        return reference
    table = partial(_table, config, engine, reference, collate, directory, observer)
    held_out = table(held, 1, "held-out") if held is not None else None
    epochs = -(-schedule.total_steps // schedule.steps_per_epoch)
    engine.reference = table(groups, epochs, "train")  # frees a reference model of its own
    return held_out


def _table(
    config: CPOConfig,
    engine: Engine,
    reference: Reference,
    collate: Any,
    directory: RunDirectory,
    observer: Observer,
    groups: run_data.Groups,
    epochs: int,
    split: str,
) -> Reference:
    """A table of the reference's log-probabilities for every draw of the epochs."""

    def log_probs(part: Any) -> Any:
        batch = collate(part).to(engine.accelerator.device)
        with engine.accelerator.autocast():
            return reference.log_probs(batch)

    folder = Path(config.data.cache_dir) if config.data.cache_dir else directory.root
    folder.mkdir(parents=True, exist_ok=True)
    identity = (
        config.model.name,
        config.model.revision,
        config.cpo.reference_model_name,
        config.cpo.ref_model_init_kwargs,
        str(run_model.weights_dtype(config)),
    )
    return precompute(
        (groups.group(row, epoch) for epoch in range(epochs) for row in range(len(groups))),
        log_probs,
        model_identity=repr(identity),
        path=folder / f"reference-log-probs-{split}.safetensors",
        batch_size=config.training.eval_batch_size or config.training.batch_size,
        progress=lambda done, total: observer.stage(
            f"reference log-probs: {done} of {total} {split} rows"
        ),
    )
