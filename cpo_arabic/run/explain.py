"""What the disk, the memory and other processes do to a run, said with a remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from cpo_arabic.config import CPOConfig
from cpo_arabic.errors import CPOArabicError, RunDirectoryError, TrainingError
from cpo_arabic.training.checkpoint import from_disk, reason_of

DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""What a disk answers that is full, read-only or broken."""

NO_MEMORY = ("out of memory", "can't allocate memory")
NO_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe")


@contextmanager
def explained(config: CPOConfig) -> Iterator[None]:
    """Gives what the disk, the memory and other processes do to a run a name and a remedy."""
    try:
        yield
    except CPOArabicError:
        raise
    except (OSError, SafetensorError) as error:
        if not from_disk(error) or getattr(error, "errno", errno.EIO) not in DISK:
            raise
        place = getattr(error, "filename", None) or config.training.output_dir
        raise RunDirectoryError(
            f"{place}: cannot be written: {reason_of(error)}. Checkpoints are intact; free room, "
            "then go on with --resume"
        ) from error
    except (RuntimeError, MemoryError) as error:
        said = str(error).lower()
        if isinstance(error, MemoryError) or any(sign in said for sign in NO_MEMORY):
            raise TrainingError(_memory_levers(config, str(error))) from error
        if any(sign in said for sign in NO_PEER):
            raise TrainingError(
                "another process of this run has ended, so this one ends too; see its message, "
                "then go on from the newest checkpoint with --resume"
            ) from error
        raise


def _memory_levers(config: CPOConfig, reason: str) -> str:
    first = reason.strip().partition("\n")[0] or "the machine's own"
    return (
        f"out of memory ({first}). Levers, the strongest first: "
        f"training.batch_size (now {config.training.batch_size}; raise "
        "gradient_accumulation_steps in its place), optimization.use_gradient_checkpointing: true, "
        f"data.padding: packed, cpo.max_length (now {config.cpo.max_length}), "
        f"cpo.num_negatives (now {config.cpo.num_negatives})"
    )
