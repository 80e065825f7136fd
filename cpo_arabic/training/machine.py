"""What the machine at hand can do: measured in a fraction of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cpo_arabic.kernels import product

SECONDS = 0.15
"""Of each measurement."""
ELEMENTS = 1 << 24
"""Of the tensor that is read and of that which is written: 64 MiB each."""

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """Rates of a device, and what of its memory is to be had."""

    device: str
    kind: str  # cpu, cuda
    work_rate: float  # FLOPs a second in matrix products of the model's size and dtype
    traffic_rate: float  # bytes a second, read or written
    free: int | None  # bytes; None where nobody says


def measure(device: torch.device, rows: int, inner: int, outer: int, dtype: torch.dtype) -> Machine:
    """Times a (rows, inner) · (inner, outer) product, and a sum from one memory into another."""
    left = torch.ones(rows, inner, dtype=dtype, device=device)
    right = torch.ones(inner, outer, dtype=dtype, device=device)
    seconds = _fastest(lambda: product(left, right), device)
    long = torch.ones(ELEMENTS, device=device)
    other = torch.zeros(ELEMENTS, device=device)
    passing = _fastest(lambda: torch.add(long, 1.0, out=other), device)
    return Machine(
        device=_name(device),
        kind=device.type,
        work_rate=2 * rows * inner * outer / seconds,
        traffic_rate=2 * 4 * ELEMENTS / passing,
        free=_free(device),
    )


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of the calls that fit into :data:`SECONDS`, after one to warm up."""
    best, begun = float("inf"), time.perf_counter()
    call()
    while best == float("inf") or time.perf_counter() - begun < SECONDS:
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMINFO.exists():
        return None
    lines = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else min(available, max(0, limit - used))


def _number(path: Path) -> int | None:
    """The container's figure, where there is a container with one."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
