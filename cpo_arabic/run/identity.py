"""What a checkpoint must agree on with the run that resumes it."""

from __future__ import annotations

from typing import Any

from cpo_arabic.config import CPOConfig
from cpo_arabic.errors import CheckpointError
from cpo_arabic.training.checkpoint import Checkpoint

FREE_ON_RESUME = frozenset(
    {
        "training.output_dir",
        "training.overwrite_output_dir",
        "training.eval_steps",
        "training.save_steps",
        "training.logging_steps",
        "training.save_total_limit",
        "training.eval_batch_size",
        "training.dataloader_num_workers",
        "data.preprocessing_num_workers",
        "data.cache_dir",
        "data.sanity_check",
        "data.sanity_check_size",
        "data.generate_during_eval",
    }
)
"""Fields a resumed run may change: they do not touch what is learnt."""


def settings_identity(config: CPOConfig, processes: int) -> dict[str, Any]:
    """The settings a checkpoint must agree on with the run that resumes it."""
    settings = {
        f"{name}.{field}": value
        for name, section in config.model_dump(mode="json").items()
        if name != "logging"
        for field, value in section.items()
        if f"{name}.{field}" not in FREE_ON_RESUME and not field.endswith("init_kwargs")
    }
    return {**settings, "processes": processes}


def check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Compares what a run knows of itself so far.

    Raises:
        CheckpointError: with every difference, old and new.
    """
    old = checkpoint.state["identity"]
    changed = [
        f"{key}: {old.get(key)!r} then, {value!r} now"
        for key, value in sorted(identity.items())
        if old.get(key) != value
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint.folder} is of another run and cannot be resumed: {'; '.join(changed)}. "
            "Put it back, or start afresh in another training.output_dir"
        )
