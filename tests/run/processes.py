"""The command line in processes of their own, forked from one that has the libraries loaded.

Signals, exit statuses and ranks are then real ones, and no process spends seconds on imports.
"""

from __future__ import annotations

import errno
import faulthandler
import itertools
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpo_arabic.config import load_config

DEMO = Path(__file__).resolve().parents[2] / "demo"
PATIENCE = 90.0
"""Seconds after which a process counts as hanging."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["cpo_arabic.cli", "cpo_arabic.run.training"])

_numbers = itertools.count()

Hook = Callable[[], None]


def write_config(path: Path, model: Path, *overrides: str) -> Path:
    """A file for a short run of the toy model into ``run`` beside it."""
    defaults = [
        f"model.name={model}",
        "model.max_length=192",
        f"data.train_file={DEMO / 'data' / 'train.jsonl'}",
        "data.validation_file=null",
        "data.validation_split_percentage=0",
        "data.max_samples=12",
        "data.padding=packed",
        "data.preprocessing_num_workers=1",
        "data.conversation_template=plain",
        "cpo.max_prompt_length=64",
        "cpo.max_target_length=64",
        "cpo.num_negatives=2",
        f"training.output_dir={path.parent / 'run'}",
        "training.batch_size=2",
        "training.gradient_accumulation_steps=2",
        "training.learning_rate=1e-2",
        "training.logging_steps=1",
        "logging.use_tensorboard=false",
        "optimization.lora_rank=4",
    ]
    config = load_config(None, [*defaults, *overrides], environ={}, env_file=None).config
    path.parent.mkdir(parents=True, exist_ok=True)
    config.to_yaml(path)
    return path


class Command:
    """``cpo-arabic …`` running; ``hook`` breaks something in it first."""

    def __init__(
        self,
        folder: Path,
        *arguments: str | Path,
        environment: Mapping[str, str] | None = None,
        hook: Hook | None = None,
    ) -> None:
        number = next(_numbers)
        self._out, self._err = folder / f"stdout-{number}", folder / f"stderr-{number}"
        self._process = _context.Process(
            target=_main,
            args=(list(map(str, arguments)), dict(environment or {}), self._out, self._err, hook),
        )
        self._process.start()

    @property
    def out(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        assert self._process.pid is not None
        (os.killpg if group else os.kill)(self._process.pid, number)

    def status(self) -> int:
        """The exit status; −9 after SIGKILL. A process that hangs is killed and fails the test."""
        self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise AssertionError(f"hangs:\n{self.out}\n{self.err}")
        assert self._process.exitcode is not None
        return self._process.exitcode

    def wait_for(self, reached: Callable[[], Any]) -> None:
        """Until something is so; a process that ends before it fails the test."""
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert self._process.is_alive(), f"ended early:\n{self.out}\n{self.err}"
            assert time.monotonic() < deadline, f"never so:\n{self.out}\n{self.err}"
            time.sleep(0.005)


def run(folder: Path, *arguments: str | Path, hook: Hook | None = None) -> tuple[int, Command]:
    """Runs a command to its end."""
    command = Command(folder, *arguments, hook=hook)
    return command.status(), command


def two_ranks(folder: Path, *arguments: str | Path, hook: Hook | None = None) -> list[Command]:
    """The command as two processes of one run, on the CPU."""
    port = _free_port()
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    return [
        Command(
            folder,
            *arguments,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            hook=hook,
        )
        for rank in range(2)
    ]


def _free_port() -> int:
    """Below the ports that the system hands out, where a rank could connect to itself."""
    while True:
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def _main(
    arguments: list[str], environment: dict[str, str], out: Path, err: Path, hook: Hook | None
) -> None:
    import torch

    from cpo_arabic.cli import main

    os.setpgrp()  # the group is this run's
    # how a command from a shell starts its loaders, not how this process was started
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    for name in [name for name in os.environ if name.startswith("CPO_ARABIC_")]:
        del os.environ[name]
    os.environ.update(environment, COLUMNS="200", NO_COLOR="1")
    for number, path in ((1, out), (2, err)):
        with path.open("w") as stream:
            os.dup2(stream.fileno(), number)
    faulthandler.dump_traceback_later(PATIENCE - 5)  # says where it hangs
    torch.set_num_threads(1)
    if hook is not None:
        hook()
    sys.argv = ["cpo-arabic", *arguments]
    main()


# --- hooks: what breaks ---------------------------------------------------------------------------


def die() -> None:
    """SIGKILL, at just this line."""
    os.kill(os.getpid(), signal.SIGKILL)


def start_children_slowly(started: Path) -> None:
    """Each process that the run forks says that it is there, and then takes a second."""

    def wait() -> None:
        started.touch()
        time.sleep(1)

    os.register_at_fork(after_in_child=wait)


def die_before_the_manifest() -> None:
    """Killed in the second save, its files half there."""
    from cpo_arabic.training import checkpoint

    real, saves = checkpoint._write_manifest, []

    def write(folder: Path) -> None:
        saves.append(folder)
        if len(saves) == 2:
            die()
        real(folder)

    checkpoint._write_manifest = write


def die_after_the_rename() -> None:
    """Killed in the second save, the folder just under its final name."""
    from cpo_arabic.training import checkpoint

    real = checkpoint._sync_folder

    def sync(folder: Path) -> None:
        if (folder / "checkpoint-10").exists():
            die()
        real(folder)

    checkpoint._sync_folder = sync


def die_in_rotation() -> None:
    """Killed as an old checkpoint has been renamed and is still there."""
    from cpo_arabic.training import checkpoint

    real = checkpoint._remove

    def remove(path: Path) -> None:
        if path.name.startswith(".old-") and path.exists():
            die()
        real(path)

    checkpoint._remove = remove


def fill_disk_at_metrics() -> None:
    """No file grows any more from the third step's metrics on."""
    from cpo_arabic.training.metrics import MetricsFile

    real = MetricsFile.append

    def append(self: MetricsFile, record: Mapping[str, Any]) -> None:
        if record["step"] == 3:
            limit_files(self.path.stat().st_size + 10)
        real(self, record)

    MetricsFile.append = append  # type: ignore[method-assign]


def limit_files(size: int) -> None:
    """The disk is full for every file at ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def no_room_for_samples() -> None:
    """The folder of samples cannot be made."""
    real = Path.mkdir

    def mkdir(self: Path, *arguments: Any, **named: Any) -> None:
        if self.name == "samples":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        real(self, *arguments, **named)

    Path.mkdir = mkdir  # type: ignore[method-assign]


def poison_the_second_rank() -> None:
    """Rank 1's loss is NaN in step 2."""
    from cpo_arabic.training import step as steps

    real, calls = steps._micro_loss, []

    def poisoned(*arguments: Any) -> Any:
        calls.append(1)
        wrong = os.environ["RANK"] == "1" and len(calls) == 2
        return real(*arguments) * (float("nan") if wrong else 1.0)

    steps._micro_loss = poisoned
