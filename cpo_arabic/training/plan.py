"""Which rows each optimizer step sees: a pure function of (seed, epoch, step).

A *window* is one optimizer step: the micro-batches of every rank. It is planned globally, then
dealt out, so that one rank or two with the same global batch take the same steps.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from cpo_arabic.data.pack import PreferenceBatch, TokenizedGroup

STOPS = {signal.SIGTERM, signal.SIGINT}


class GroupSource(Protocol):
    """Rows of tokenised preferences; picklable, so that loader processes can hold it."""

    def __len__(self) -> int: ...

    def group(self, row: int, epoch: int) -> TokenizedGroup:
        """The row's prompt, chosen completion and the negatives drawn for this epoch."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Steps of a run, from its sizes."""

    rows: int
    batch_size: int  # groups of a micro-batch
    accumulation_steps: int
    world_size: int
    epochs: int
    max_steps: int | None

    @property
    def groups_per_step(self) -> int:
        """Groups of a full window, over all ranks."""
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """The last window of an epoch may be short."""
        return -(-self.rows // self.groups_per_step)

    @property
    def total_steps(self) -> int:
        """``max_steps`` where set, even past the epochs; else the epochs' steps."""
        return self.max_steps or self.epochs * self.steps_per_epoch

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, window within it) of the 0-based ``step``."""
        return divmod(step, self.steps_per_epoch)


@dataclass(frozen=True)
class Share:
    """One rank's micro-batches of a window.

    ``counted`` is False for the stand-in of a rank that a short window leaves without rows: it
    takes part in the collectives and adds nothing.
    """

    batches: list[PreferenceBatch]
    rows: list[list[int]]
    counted: bool

    def pin_memory(self) -> Share:
        """In page-locked memory, from where copies to the GPU overlap with its work."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


def rank_share(
    micro_batches: Sequence[list[int]], rank: int, world_size: int
) -> tuple[list[list[int]], bool]:
    """The rank's run of the window's micro-batches, or a stand-in and False.

    Runs, not every n-th: rank after rank is then the window's own order, which the queue keeps.
    """
    least, more = divmod(len(micro_batches), world_size)
    start = rank * least + min(rank, more)
    mine = list(micro_batches[start : start + least + (rank < more)])
    return (mine, True) if mine else ([micro_batches[0]], False)


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals to stop wait, in this thread and in the processes that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _apart(_worker: int) -> None:
    """Moves a loader process out of reach of signals that mean the whole group, such as Ctrl-C.

    One that came while the process was starting meant the group, too.
    """
    os.setpgrp()
    while came := signal.sigpending() & STOPS:
        signal.sigwait(came)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


class _Windows(Dataset[Share]):
    """Window index → this rank's share, collated."""

    def __init__(
        self,
        source: GroupSource,
        windows: list[list[list[int]]],
        collate: Callable[[Sequence[TokenizedGroup]], PreferenceBatch],
        epoch: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._source, self._windows, self._collate = source, windows, collate
        self._epoch, self._rank, self._world_size = epoch, rank, world_size

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Share:
        rows, counted = rank_share(self._windows[index], self._rank, self._world_size)
        batches = [
            self._collate([self._source.group(row, self._epoch) for row in each]) for each in rows
        ]
        return Share(batches=batches, rows=rows, counted=counted)


@dataclass(frozen=True)
class WindowLoader:
    """Deals the windows of an epoch to this rank, prefetched by ``workers`` processes.

    ``order(epoch)`` gives the epoch's micro-batches as row numbers; the batches do not depend on
    the number of workers.
    """

    source: GroupSource
    schedule: Schedule
    order: Callable[[int], list[list[int]]]
    collate: Callable[[Sequence[TokenizedGroup]], PreferenceBatch]
    workers: int
    rank: int

    def windows(self, epoch: int) -> list[list[list[int]]]:
        """The epoch's windows, each a list of micro-batches of row numbers."""
        order = self.order(epoch)
        size = self.schedule.accumulation_steps * self.schedule.world_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def shares(self, epoch: int, first: int) -> Iterator[Share]:
        """This rank's shares of the epoch's windows from the ``first`` on."""
        windows = self.windows(epoch)[first:]
        dataset = _Windows(
            self.source, windows, self.collate, epoch, self.rank, self.schedule.world_size
        )
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=_apart,
            pin_memory=torch.cuda.is_available(),
        )
        with _held_back() if self.workers else nullcontext():
            shares = iter(loader)
        yield from shares
