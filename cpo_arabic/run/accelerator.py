"""The accelerator of a run: devices, ranks, precision, trackers."""

from __future__ import annotations

import atexit
import gc
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from cpo_arabic.config import CPOConfig
from cpo_arabic.errors import ModelError

_groups: list[Any] = []
"""Process groups in use, held until the process ends.

Were the distributed policy's reducer a group's last owner, torch would free the group with the
interpreter's lock held and wait for gloo's thread, which may be waiting for the lock.
"""


@atexit.register
def _let_go() -> None:
    gc.collect()
    _groups.clear()


def check_trackers(config: CPOConfig) -> None:
    """Refuses a tracker that is not installed.

    Raises:
        ModelError: with the remedy.
    """
    if config.logging.use_wandb and find_spec("wandb") is None:
        raise ModelError(
            "logging.use_wandb is true, but wandb is not installed; install it with "
            "pip install 'cpo-arabic[wandb]', or turn it off with --set logging.use_wandb=false"
        )


def build_accelerator(config: CPOConfig, *, tracked: bool = True) -> Accelerator:
    """Devices and precision of this run, whatever an earlier run of the process used."""
    log = config.logging
    trackers = {"tensorboard": log.use_tensorboard, "wandb": log.use_wandb}
    AcceleratorState._reset_state()  # precision is a run's, the process group stays
    accelerator = Accelerator(
        mixed_precision="bf16" if config.optimization.bf16 else "no",
        log_with=[name for name, used in trackers.items() if used and tracked] or None,
        project_dir=config.training.output_dir if tracked else None,
        # A rank's forwards differ in number from another's, and each would broadcast the buffers.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if torch.distributed.is_initialized():
        _groups.append(torch.distributed.group.WORLD)
    return accelerator
