"""MoCo's InfoNCE against a queue of keys, forward and backward to the queries: ours and eager.

B queries, each against one positive and all of a queue (Q, D). Case ``plain`` is MoCo's loss; case
``concentration 0.5`` weights hard negatives (Robinson et al. 2021), which MoCo does not have,
beside the eager definition. Peak memory is over what was in use before the call: queue and queries
are not in it.

Shapes: B queries, Q queue entries, D dimensions
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import normalize

from cpo_arabic.kernels import infonce
from scripts.bench.measure import (
    Job,
    Turns,
    Watch,
    computed,
    matmul_rate,
    outcomes,
    relative_error,
    take_turns,
)  # fmt: skip

CASES = ("plain", "concentration 0.5")
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Settings:
    """Of the inputs and the run."""

    queries: int = 64
    queue: int = 131_072
    queue_dim: int = 256
    repeats: int = 9
    threads: int = 1


QUICK = Settings(repeats=3)


class Inputs(NamedTuple):
    """What every variant gets, and the queue in the form it wants."""

    queries: Tensor  # (B, D)
    keys: Tensor  # (B, D) the positives
    queue: Tensor  # (Q, D); (D, Q) for MoCo
    scale: Tensor | None  # (Q) of an int8 queue
    labels: Tensor  # (B, 3) one prompt for all masks the in-batch keys out, as MoCo has none
    queue_labels: Tensor  # (Q, 3)

    @staticmethod
    def draw(settings: Settings, form: str, dtype: torch.dtype = torch.float32) -> Inputs:
        """The same in every process; ``form``: rows, columns, bf16 or int8."""
        torch.manual_seed(0)
        b, q, d = settings.queries, settings.queue, settings.queue_dim
        queries = normalize(torch.randn(b, d), dim=1)
        queue = normalize(torch.randn(q, d), dim=1)
        keys = normalize(queries + 0.5 * torch.randn(b, d) / d**0.5, dim=1).to(dtype)
        scale = None
        if form == "int8":
            scale = queue.abs().amax(1) / 127
            queue = (queue / scale[:, None]).round().to(torch.int8)
        else:
            queue = queue.to(torch.bfloat16 if form == "bf16" else dtype)
            queue = queue.T.contiguous() if form == "columns" else queue
        index, later = torch.arange(b), torch.arange(q)
        return Inputs(
            queries.to(dtype).requires_grad_(),
            keys,
            queue,
            scale,
            labels=torch.stack([index, torch.ones_like(index), index], 1),
            queue_labels=torch.stack([later * 0 - 1, later + b + 7, later + b + 7], 1),
        )


def ours(x: Inputs, *, concentration: float, backend: str = "auto") -> Tensor:
    """The kernel, or its eager definition."""
    return infonce(
        x.queries,
        x.keys,
        torch.arange(len(x.keys)),
        temperature=TEMPERATURE,
        concentration=concentration,
        query_labels=x.labels,
        key_labels=x.labels,
        queue=x.queue,
        queue_labels=x.queue_labels,
        queue_scale=x.scale,
        backend=backend,  # type: ignore[arg-type]
    ).loss.mean()


def moco(x: Inputs, *, clone: bool) -> Tensor:
    """He et al.'s code: the queue as columns, cloned since training goes on to overwrite it."""
    queue = x.queue.clone() if clone else x.queue
    positive = torch.einsum("nc,nc->n", x.queries, x.keys)[:, None]
    negative = torch.einsum("nc,ck->nk", x.queries, queue.detach())
    logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


class Variant(NamedTuple):
    """A function of the inputs, and the form of the queue it wants."""

    function: Callable[[Inputs], Tensor]
    form: str
    exact: bool = True


def table(case: str) -> dict[str, Variant]:
    """Name → variant."""
    concentration = 0.0 if case == "plain" else 0.5
    function = partial(ours, concentration=concentration)
    peers = {
        "MoCo, with its clone": Variant(partial(moco, clone=True), "columns"),
        "MoCo, without the clone": Variant(partial(moco, clone=False), "columns"),
    }
    eager = Variant(partial(function, backend="eager"), "rows")
    return {
        "ours": Variant(function, "rows"),
        "ours, bfloat16 queue": Variant(function, "bf16", exact=False),
        "ours, int8 queue": Variant(function, "int8", exact=False),
        **(peers if case == "plain" else {"the definition, eager": eager}),
    }


def variants(case: str, _: Settings) -> list[str]:
    """All of the case."""
    return list(table(case))


def measure(name: str, wanted: list[str], settings: Settings, watch: Watch) -> dict[str, Any]:
    """The variants of a case, taking turns, beside the truth.

    Raises:
        WorkerError: the truth could not be computed.
    """
    known = table(name)
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder) / "gradient.safetensors"
        loss = computed(Job(work_truth, (settings, name, truth)), settings.threads)
        jobs = {each: Job(work, (settings, name, each, truth)) for each in wanted}
        turns, died = take_turns(jobs, settings.repeats, settings.threads, watch)
    products = 2 * 2 * settings.queries * settings.queue * settings.queue_dim
    return {
        "case": name,
        "clock": "cpu_seconds",
        "loss": loss,
        "floor_seconds": products / matmul_rate(),
        "variants": outcomes(turns, died, wanted, loss, lambda each: known[each].exact),
    }


def work(pipe: Any, settings: Settings, case: str, variant: str, truth: Path) -> None:
    """One variant in its own process."""
    function, form, _ = table(case)[variant]
    turns, inputs = Turns(pipe, warm=True), Inputs.draw(settings, form)
    true = load_file(truth)["queries"]
    for _turn in range(1 + settings.repeats):
        turns.begin()
        loss = function(inputs)
        (gradient,) = torch.autograd.grad(loss, [inputs.queries])
        turns.stop()
        error = relative_error([(gradient, true)])
        turns.tell(loss=float(loss.detach()), gradient_error=error)
        del loss, gradient


def work_truth(pipe: Any, settings: Settings, case: str, truth: Path) -> None:
    """In float64; the gradient goes into a file."""
    inputs = Inputs.draw(settings, "columns" if case == "plain" else "rows", torch.float64)
    eager = partial(ours, concentration=0.5, backend="eager")
    loss = moco(inputs, clone=False) if case == "plain" else eager(inputs)
    (gradient,) = torch.autograd.grad(loss, [inputs.queries])
    save_file({"queries": gradient}, truth)
    pipe.send(float(loss.detach()))
