"""Processes that take turns, and what a turn cost: wall and CPU seconds, peak memory.

Each variant of a case works in a process of its own, so that its memory is its own; turns rotate,
so that what else happens on the machine happens to all. The first turn warms up and is checked,
the others are timed. A variant that dies says why and leaves what it had measured.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import multiprocessing
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_arabic.kernels import product

MIB = 1 << 20
PATIENCE_S = 900.0
"""A turn that takes longer, compilation included, counts as died."""
TOLERANCE = {"loss": 1e-5, "gradient": 1e-4}
"""Largest relative errors of float32; a lower precision has 1000 times as much."""


Watch = Callable[[str], None]
"""Told the name of a variant after each of its turns."""

PRELOADED = [
    "scripts.bench.cost",
    "scripts.bench.head",
    "scripts.bench.queue",
    "scripts.bench.step",
    "datasets",
    "peft",
    "transformers.models.qwen2.modeling_qwen2",
    "trl.experimental.cpo",
]


class WorkerError(Exception):
    """A worker died; the text says of what."""


class Job(NamedTuple):
    """``function(pipe, *arguments)``, to be called in a fresh process."""

    function: Callable[..., None]
    arguments: tuple[Any, ...] = ()


class Turns:
    """A worker's side: it waits for its turn and says what the turn cost.

    Args:
        pipe: to the parent.
        device: whose memory is measured.
        warm: peak memory is over what was in use before the second turn, with all compiled, rather
            than before the first.
    """

    def __init__(self, pipe: Any, device: str = "cpu", *, warm: bool = False) -> None:
        self._pipe, self._device = pipe, device
        self._before: float | None = None
        self._number, self._baselines = 0, (0, 1) if warm else (0,)

    def begin(self) -> None:
        """Wait for the turn; the clock runs from here."""
        if self._number in self._baselines:
            settle()
            self._before = memory_mib(self._device)
        self._pipe.recv()
        reset_peak(self._device)
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Stop the clock."""
        if self._device != "cpu":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        peak = memory_mib(self._device, peak=True)
        extra = None if peak is None or self._before is None else peak - self._before
        self._cost = {"wall_seconds": wall, "cpu_seconds": cpu, "peak_mib": extra}
        self._number += 1

    def tell(self, **facts: Any) -> None:
        """Send the turn's cost, with what else is known."""
        self._pipe.send(self._cost | facts)


class Worker:
    """The parent's side of one process."""

    def __init__(self, job: Job, threads: int) -> None:
        # Forked from a server that has imported everything and done nothing: a fresh process
        # without the seconds that the imports take.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipe, its = context.Pipe()
        self._process = context.Process(target=_work, args=(its, job, threads))
        self._process.start()
        its.close()

    def answer(self) -> Any:
        """The next thing it sends.

        Raises:
            WorkerError: it died, or is silent for too long.
        """
        try:
            if not self._pipe.poll(PATIENCE_S):
                raise WorkerError(f"no answer in {PATIENCE_S:.0f} s")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise WorkerError(f"killed, exit status {self._process.exitcode}") from error
        if isinstance(answer, WorkerError):
            raise answer
        return answer

    def turn(self) -> dict[str, Any]:
        """Let it work once."""
        with suppress(ConnectionError):  # dead: the answer says of what
            self._pipe.send(True)
        found: dict[str, Any] = self.answer()
        return found

    def close(self) -> None:
        """End it, if it has not ended."""
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(pipe: Any, job: Job, threads: int) -> None:
    quiet(threads)
    try:
        job.function(pipe, *job.arguments)
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        pipe.send(WorkerError(f"{type(error).__name__}: {first}"))
        raise


def computed(job: Job, threads: int) -> Any:
    """What a job sends, computed in a process whose memory is then given back.

    Raises:
        WorkerError: it died.
    """
    worker = Worker(job, threads)
    try:
        return worker.answer()
    finally:
        worker.close()


def take_turns(
    jobs: dict[str, Job], repeats: int, threads: int, watch: Watch
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Every job ``1 + repeats`` times, in turns.

    Args:
        jobs: variant → its work.
        repeats: timed turns.
        threads: of each process.
        watch: told of every turn.

    Returns:
        Variant → what its turns cost, and variant → why it died.
    """
    workers = {name: Worker(job, threads) for name, job in jobs.items()}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    died: dict[str, str] = {}
    try:
        for number in range(1 + repeats):
            names = list(jobs)
            first = number % max(len(names), 1)
            for name in names[first:] + names[:first]:
                if name not in died:
                    try:
                        turns[name].append(workers[name].turn())
                    except WorkerError as error:
                        died[name] = str(error)
                watch(name)
    finally:
        for worker in workers.values():
            worker.close()
    return turns, died


def figures(turns: list[dict[str, Any]], true_loss: float, *, exact: bool = True) -> dict[str, Any]:
    """One variant's medians, peak and errors; its first turn is the checked one.

    Args:
        turns: what :meth:`Turns.tell` said, in order; two or more.
        true_loss: the loss in float64.
        exact: computed in float32, so that the tolerance is that of float32.
    """
    checked, timed = turns[0], turns[1:]
    peaks = [turn["peak_mib"] for turn in timed if turn["peak_mib"] is not None]
    loss_error = abs(checked["loss"] / true_loss - 1)
    slack = 1 if exact else 1000
    return {
        **checked,
        **{
            name: statistics.median(turn[name] for turn in timed)
            for name in ("wall_seconds", "cpu_seconds")
        },
        "warmup_wall_seconds": checked["wall_seconds"],
        "peak_mib": max(peaks) if peaks else None,
        "all_wall_seconds": [turn["wall_seconds"] for turn in timed],
        "all_cpu_seconds": [turn["cpu_seconds"] for turn in timed],
        "loss_error": loss_error,
        "agrees": loss_error < slack * TOLERANCE["loss"]
        and checked["gradient_error"] < slack * TOLERANCE["gradient"],
    }


def outcomes(
    turns: dict[str, list[dict[str, Any]]],
    notes: dict[str, str],
    wanted: list[str],
    true_loss: float,
    exact: Callable[[str], bool] = lambda _: True,
) -> dict[str, dict[str, Any]]:
    """Each wanted variant's figures, its note, or both where it died after some turns.

    Args:
        turns: what each variant's turns cost.
        notes: why some have none, or no more.
        wanted: the variants, in the order of the result.
        true_loss: the loss in float64.
        exact: whether a variant computes in float32.
    """
    found: dict[str, dict[str, Any]] = {each: {} for each in wanted}
    for each, known in found.items():
        if len(taken := turns.get(each, [])) > 1:
            known |= figures(taken, true_loss, exact=exact(each))
        if each in notes:
            known["note"] = notes[each]
    return {each: known for each, known in found.items() if known}


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """‖got − true‖ / ‖true‖ over all the pairs (got, true) together."""
    difference = norm = 0.0
    for got, true in pairs:
        difference += float((got.detach().cpu().double() - true).square().sum())
        norm += float(true.square().sum())
    return float((difference / norm) ** 0.5)


def missing(package: str = "", *, compiled: bool = False) -> str:
    """Why a variant cannot be run here, or nothing."""
    if package and importlib.util.find_spec(package) is None:
        return "not installed"
    if compiled:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "no C++ compiler"
    return ""


# --- the machine ---------------------------------------------------------------------------------


def hardware(threads: int) -> dict[str, Any]:
    """The machine and the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    packages = {
        "torch": "torch",
        "transformers": "transformers",
        "accelerate": "accelerate",
        "trl": "trl",
        "liger-kernel": "liger_kernel",
        "cut-cross-entropy": "cut_cross_entropy",
    }
    return {
        "processor": next(named, platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name, module in packages.items() if not missing(module)},
    }


def matmul_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP a second of a large product: the machine's own speed. CPU seconds on a CPU."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock = time.process_time if device == "cpu" else time.perf_counter
    best = float("inf")
    for _ in range(6):
        started = clock()
        product(a, b)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, clock() - started)
    return 2 * size**3 / best


def memory_mib(device: str, *, peak: bool = False) -> float | None:
    """Memory in use, or its high-water mark since :func:`reset_peak`; None off Linux."""
    if device != "cpu":
        used = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        return used / MIB
    path, field = Path("/proc/self/status"), "VmHWM" if peak else "VmRSS"
    if not path.exists():
        return None
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def reset_peak(device: str) -> None:
    """Let the high-water mark count from here."""
    clear_refs = Path("/proc/self/clear_refs")
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif clear_refs.exists():
        clear_refs.write_text("5")


def settle() -> None:
    """Give back what has been freed, so that the resident set is what is in use."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def quiet(threads: int) -> None:
    """As many threads as asked for, and no progress bars of libraries."""
    import datasets
    from transformers.utils import logging

    torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
