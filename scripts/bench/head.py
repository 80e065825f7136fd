"""The CPO loss from hidden states and a head, forward and backward: ours, TRL's way, Liger, CCE.

T tokens make ``pairs`` chosen completions and as many rejected ones, all of one length; the loss
is −log σ(0.1·(log π chosen − log π rejected)), averaged over the pairs. Case ``trained``:
gradients of the hidden states and the head; ``frozen``: of the hidden states alone, as with an
adapter. Peak memory is over what was in use before any call: inputs are not in it; gradients are,
and so is what a variant keeps from one call to the next.

Shapes: T tokens, D features, V vocabulary
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from cpo_arabic.kernels import token_log_probs
from scripts.bench.measure import (
    Job,
    Turns,
    Watch,
    computed,
    matmul_rate,
    missing,
    outcomes,
    relative_error,
    take_turns,
)  # fmt: skip

CASES = ("trained", "frozen")
BETA = 0.1


@dataclass(frozen=True)
class Settings:
    """Of the inputs and the run."""

    tokens: int = 512
    dim: int = 512
    head_vocab: int = 151_936
    pairs: int = 4
    repeats: int = 5
    threads: int = 1
    compiled: bool = True


QUICK = Settings(head_vocab=32_000, repeats=2)


class Inputs(NamedTuple):
    """What every variant gets."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (T)
    pairs: int

    @staticmethod
    def draw(settings: Settings, trained: bool) -> Inputs:
        """The same in every process."""
        torch.manual_seed(0)
        hidden = torch.randn(settings.tokens, settings.dim)
        weight = torch.randn(settings.head_vocab, settings.dim) / settings.dim**0.5
        targets = torch.randint(0, settings.head_vocab, (settings.tokens,))
        weight = weight.requires_grad_(trained)
        return Inputs(hidden.requires_grad_(), weight, targets, settings.pairs)

    def leaves(self) -> dict[str, Tensor]:
        """What needs a gradient."""
        both = {"hidden": self.hidden, "weight": self.weight}
        return {name: tensor for name, tensor in both.items() if tensor.requires_grad}


def cpo_loss(log_probs: Tensor, pairs: int) -> Tensor:
    """(T) token log-probabilities of ``pairs`` chosen, then ``pairs`` rejected completions."""
    chosen, rejected = log_probs.view(2 * pairs, -1).sum(1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def ours(x: Inputs) -> Tensor:
    """Tiled; a trained head keeps its logits where its gradient is going to be."""
    return cpo_loss(token_log_probs(x.hidden, x.weight, x.targets), x.pairs)


def all_logits(x: Inputs) -> Tensor:
    """What CPOTrainer does: all logits, log_softmax, gather."""
    log_probs = torch.log_softmax(x.hidden @ x.weight.T, dim=-1)
    return cpo_loss(log_probs.gather(1, x.targets[:, None])[:, 0], x.pairs)


def liger(x: Inputs, *, chunk: int, compiled: bool) -> Tensor:
    """Liger's fused CPO, ``chunk`` pairs at a time."""
    from liger_kernel.chunked_loss import LigerFusedLinearCPOLoss

    loss = LigerFusedLinearCPOLoss(
        beta=BETA, compute_nll_loss=False, compiled=compiled, chunk_size=chunk
    )
    rows = 2 * x.pairs
    hidden = x.hidden.view(rows, -1, x.hidden.shape[1])
    result: Tensor = loss(x.weight, hidden, x.targets.view(rows, -1))[0]
    return result


def cut_cross_entropy(x: Inputs) -> Tensor:
    """CCE's form for machines without its CUDA kernels."""
    from cut_cross_entropy import linear_cross_entropy

    negative = linear_cross_entropy(
        x.hidden, x.weight, x.targets, reduction="none", impl="torch_compile"
    )
    return cpo_loss(-negative, x.pairs)


class Variant(NamedTuple):
    """A function of the inputs, and the package it needs."""

    function: Callable[[Inputs], Tensor]
    package: str = ""
    compiled: bool = False


def _liger(chunk: int, *, compiled: bool) -> Variant:
    return Variant(partial(liger, chunk=chunk, compiled=compiled), "liger_kernel", compiled)


def table(settings: Settings) -> dict[str, Variant]:
    """Name → variant."""
    every = settings.pairs
    return {
        "ours": Variant(ours),
        "TRL's log-softmax": Variant(all_logits),
        "Liger, eager, a pair a chunk": _liger(1, compiled=False),
        "Liger, compiled, a pair a chunk": _liger(1, compiled=True),
        "Liger, compiled, one chunk": _liger(every, compiled=True),
        "CCE, torch_compile": Variant(cut_cross_entropy, "cut_cross_entropy", compiled=True),
    }


def variants(_case: str, settings: Settings) -> list[str]:
    """All, or those of them that need no compiler."""
    return [name for name, v in table(settings).items() if settings.compiled or not v.compiled]


def measure(name: str, wanted: list[str], settings: Settings, watch: Watch) -> dict[str, Any]:
    """The variants of a case, taking turns, beside the truth.

    Raises:
        WorkerError: the truth could not be computed.
    """
    trained, known = name == "trained", table(settings)
    notes = {
        each: note
        for each in wanted
        if (note := missing(known[each].package, compiled=known[each].compiled))
    }
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder) / "gradient.safetensors"
        loss = computed(Job(work_truth, (settings, trained, truth)), settings.threads)
        jobs = {
            each: Job(work, (settings, trained, each, truth))
            for each in wanted
            if each not in notes
        }
        turns, died = take_turns(jobs, settings.repeats, settings.threads, watch)
    flops = (6 if trained else 4) * settings.tokens * settings.dim * settings.head_vocab
    return {
        "case": name,
        "clock": "cpu_seconds",
        "loss": loss,
        "tokens": settings.tokens,
        "floor_seconds": flops / matmul_rate(),
        "variants": outcomes(turns, notes | died, wanted, loss),
    }


def work(pipe: Any, settings: Settings, trained: bool, variant: str, truth: Path) -> None:
    """One variant in its own process."""
    turns, function = Turns(pipe, warm=True), table(settings)[variant].function
    error: float | None = None
    for number in range(1 + settings.repeats):
        if number < 2:  # the first turn compiles; its inputs go, with all that hangs on them
            inputs = Inputs.draw(settings, trained)
            leaves = inputs.leaves()
        turns.begin()
        loss = function(inputs)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        turns.stop()
        if error is None:
            with safe_open(truth, "pt") as file:
                error = max(
                    relative_error([(gradient, file.get_tensor(name))])
                    for name, gradient in zip(leaves, gradients, strict=True)
                )
        turns.tell(loss=float(loss.detach()), gradient_error=error)
        del loss, gradients


def work_truth(pipe: Any, settings: Settings, trained: bool, truth: Path) -> None:
    """All logits in float64, a pair at a time; the gradients go into a file."""
    x = Inputs.draw(settings, trained)
    hidden = x.hidden.detach().double().requires_grad_()
    weight = x.weight.detach().double().requires_grad_(trained)
    per_row = settings.tokens // (2 * x.pairs)
    places = torch.arange(settings.tokens).view(2, x.pairs, per_row)
    loss = 0.0
    for pair in range(x.pairs):
        here = places[:, pair].flatten()
        part = all_logits(Inputs(hidden[here], weight, x.targets[here], 1)) / x.pairs
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.item()
    leaves = Inputs(hidden, weight, x.targets, x.pairs).leaves()
    save_file({n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}, truth)
    pipe.send(loss)
