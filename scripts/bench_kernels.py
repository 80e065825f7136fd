"""Both kernels against their peers: time, extra memory and error, side by side in one run.

    python scripts/bench_kernels.py                      # both tables, JSON beside them
    python scripts/bench_kernels.py queue --repeats 9

Two pieces of work:

``head``   CPO loss of P pairs of completions from hidden states (T, D) and a head (V, D), forward
           and backward; once with the head frozen, once with it trained.
``queue``  MoCo's InfoNCE: B queries against one positive each and a queue (Q, D), forward and
           backward to the queries.

Every implementation computes the same loss from the same tensors. Times are medians of repeats
interleaved over the implementations. Extra memory is the peak resident set during one call over
the resident set before it, inputs included in neither, each in a process of its own after one
warm-up call. Processor time is shown beside wall time because it is the steadier of the two on a
machine that others use (with one thread; waiting threads spin). Errors are norms relative to the
definition in float64. A peer that is not installed is marked so, and a mode that a peer does not
have is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import normalize

from cpo_arabic.kernels import infonce, token_log_probs

MIB = 1 << 20
Implementation = Callable[[dict[str, Any]], Tensor]


@dataclass
class Result:
    """One line of a table. ``note`` is set instead of numbers where there is nothing to measure."""

    name: str
    seconds: float | None = None
    processor_seconds: float | None = None
    extra_mib: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    note: str = ""


# --- the head ----------------------------------------------------------------------------------


def head_inputs(args: argparse.Namespace, trained: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.dim)
    weight = torch.randn(args.vocabulary, args.dim) / args.dim**0.5
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(trained),
        "targets": torch.randint(0, args.vocabulary, (args.tokens,)),
        "pairs": args.pairs,
        "leaves": ["hidden", "weight"] if trained else ["hidden"],
    }


def cpo_loss(log_probs: Tensor, pairs: int) -> Tensor:
    """(T,) token log-probabilities of ``pairs`` chosen, then ``pairs`` rejected completions."""
    chosen, rejected = log_probs.view(2 * pairs, -1).sum(1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def head_ours(x: dict[str, Any], **options: Any) -> Tensor:
    log_probs = token_log_probs(x["hidden"], x["weight"], x["targets"], **options)
    return cpo_loss(log_probs, x["pairs"])


def head_log_softmax(x: dict[str, Any]) -> Tensor:
    """What trainers do: all logits, log_softmax, gather."""
    log_probs = torch.log_softmax(x["hidden"] @ x["weight"].T, dim=-1)
    return cpo_loss(log_probs.gather(1, x["targets"][:, None])[:, 0], x["pairs"])


def head_liger(x: dict[str, Any], *, chunk: int) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearCPOLoss

    loss = LigerFusedLinearCPOLoss(compute_nll_loss=False, compiled=True, chunk_size=chunk)
    rows = 2 * x["pairs"]
    hidden = x["hidden"].view(rows, -1, x["hidden"].shape[1])
    result: Tensor = loss(x["weight"], hidden, x["targets"].view(rows, -1))[0]
    return result


def head_cce(x: dict[str, Any]) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    negative = linear_cross_entropy(
        x["hidden"], x["weight"], x["targets"], reduction="none", impl="torch_compile"
    )
    return cpo_loss(-negative, x["pairs"])


def head_implementations(args: argparse.Namespace) -> dict[str, tuple[str, Implementation]]:
    """Name → (package it needs, function)."""
    return {
        "ours": ("", head_ours),
        "ours, budget 0": ("", partial(head_ours, memory_budget=0)),
        "ours, budget 96 MiB": ("", partial(head_ours, memory_budget=96 * MIB)),
        "eager log-softmax": ("", head_log_softmax),
        "liger CPO, compiled, 1 pair a chunk": ("liger-kernel", partial(head_liger, chunk=1)),
        "liger CPO, compiled, 1 chunk": ("liger-kernel", partial(head_liger, chunk=args.pairs)),
        "cut-cross-entropy, torch_compile": ("cut-cross-entropy", head_cce),
    }


# --- the queue ---------------------------------------------------------------------------------


def queue_inputs(args: argparse.Namespace, _: bool) -> dict[str, Any]:
    """One prompt key for all queries: their in-batch keys are masked out, as MoCo has none."""
    torch.manual_seed(0)
    b, q, d = args.queries, args.queue, args.queue_dim
    one, index, later = torch.ones(b, dtype=torch.long), torch.arange(b), torch.arange(q)
    queries = normalize(torch.randn(b, d), dim=1)
    queue = normalize(torch.randn(q, d), dim=1)
    scale = queue.abs().amax(1) / 127
    labels = torch.stack([index, one, index], 1)
    return {
        "queries": queries.requires_grad_(),
        "keys": normalize(queries.detach() + 0.5 * torch.randn(b, d) / d**0.5, dim=1),
        "labels": labels,
        "queue": queue,
        "columns": queue.T.contiguous(),
        "bf16": queue.bfloat16(),
        "int8": (queue / scale[:, None]).round().to(torch.int8),
        "scale": scale,
        "queue_labels": torch.stack([later * 0 - 1, later + b + 7, later + b + 7], 1),
        "leaves": ["queries"],
    }


def queue_ours(
    x: dict[str, Any], *, stored: str = "queue", concentration: float = 0.0, backend: str = "auto"
) -> Tensor:
    return infonce(
        x["queries"],
        x["keys"],
        torch.arange(len(x["keys"])),
        temperature=0.07,
        concentration=concentration,
        query_labels=x["labels"],
        key_labels=x["labels"],
        queue=x[stored],
        queue_labels=x["queue_labels"],
        queue_scale=x["scale"] if stored == "int8" else None,
        backend=backend,  # type: ignore[arg-type]
    ).loss.mean()


def queue_moco(x: dict[str, Any], *, clone: bool) -> Tensor:
    """He et al.'s code: the queue as columns, cloned because training goes on to overwrite it."""
    queue = x["columns"].clone() if clone else x["columns"]
    positive = torch.einsum("nc,nc->n", x["queries"], x["keys"])[:, None]
    negative = torch.einsum("nc,ck->nk", x["queries"], queue.detach())
    logits = torch.cat([positive, negative], dim=1) / 0.07
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def queue_implementations(_: argparse.Namespace) -> dict[str, tuple[str, Implementation]]:
    return {
        "ours, float32 queue": ("", queue_ours),
        "ours, bfloat16 queue": ("", partial(queue_ours, stored="bf16")),
        "ours, int8 queue": ("", partial(queue_ours, stored="int8")),
        "MoCo, with its clone": ("", partial(queue_moco, clone=True)),
        "MoCo, without the clone": ("", partial(queue_moco, clone=False)),
        "ours, concentration 0.5": ("", partial(queue_ours, concentration=0.5)),
        "eager definition, concentration 0.5": (
            "",
            partial(queue_ours, concentration=0.5, backend="eager"),
        ),
    }


# --- measuring ---------------------------------------------------------------------------------

INPUTS = {"head, trained": head_inputs, "head, frozen": head_inputs, "queue": queue_inputs}
BASELINES = {
    "head, trained": "eager log-softmax",
    "head, frozen": "eager log-softmax",
    "queue": "MoCo, with its clone",
}


def implementations(case: str, args: argparse.Namespace) -> dict[str, tuple[str, Implementation]]:
    found = queue_implementations(args) if case == "queue" else head_implementations(args)
    if case == "head, frozen":  # a budget is for logits that only a trained head reads again
        found = {name: value for name, value in found.items() if "budget" not in name}
    return found


def run(implementation: Implementation, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    loss = implementation(inputs)
    gradients = torch.autograd.grad(loss, [inputs[name] for name in inputs["leaves"]])
    return loss.detach(), list(gradients)


def truth_of(case: str, inputs: dict[str, Any]) -> dict[float, tuple[Tensor, list[Tensor]]]:
    """Loss and gradients in float64, by concentration (0 for the head)."""
    exact = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.dtype == torch.float32
        else value
        for name, value in inputs.items()
    }
    if case != "queue":
        return {0.0: run(head_log_softmax, exact)}
    plain = run(partial(queue_moco, clone=False), exact)
    return {0.0: plain, 0.5: run(partial(queue_ours, concentration=0.5, backend="eager"), exact)}


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def missing(package: str) -> str:
    try:
        if package:
            version(package)
    except PackageNotFoundError:
        return f"{package} is not installed"
    return ""


def measure(case: str, args: argparse.Namespace) -> list[Result]:
    inputs = INPUTS[case](args, case == "head, trained")
    truths = truth_of(case, inputs)
    results, ready = [], {}
    for name, (package, function) in implementations(case, args).items():
        result = Result(name, note=missing(package))
        results.append(result)
        if result.note:
            continue
        loss, gradients = run(function, inputs)  # the warm-up, too
        true_loss, true_gradients = truths[0.5 if "concentration" in name else 0.0]
        result.loss_error = relative(loss, true_loss)
        pairs = zip(gradients, true_gradients, strict=True)
        result.gradient_error = max(relative(got, true) for got, true in pairs)
        ready[name] = function
        del loss, gradients
    del truths, true_gradients, true_loss
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    for _ in range(args.repeats):
        for name, function in ready.items():
            gc.collect()
            wall, processor = time.perf_counter(), time.process_time()
            run(function, inputs)
            spent = time.perf_counter() - wall, time.process_time() - processor
            times[name].append(spent)
    for result in results:
        if result.name in ready:
            wall_times, processor_times = zip(*times[result.name], strict=True)
            result.seconds = statistics.median(wall_times)
            result.processor_seconds = statistics.median(processor_times)
            result.extra_mib = memory_in_child(case, result.name, args)
    return results


def memory_in_child(case: str, name: str, args: argparse.Namespace) -> float | None:
    """Extra peak memory, measured by this script in a fresh process; None off Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    shape = [f"--{key.replace('_', '-')}={value}" for key, value in shapes(args).items()]
    command = [sys.executable, __file__, "memory", "--case", case, "--name", name, *shape]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory_here(case: str, name: str, args: argparse.Namespace) -> float:
    inputs = INPUTS[case](args, case == "head, trained")
    _, function = implementations(case, args)[name]
    run(function, inputs)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status_kib("VmRSS")
    run(function, inputs)
    return (status_kib("VmHWM") - before) / 1024


def status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


# --- printing ----------------------------------------------------------------------------------


def shapes(args: argparse.Namespace) -> dict[str, int]:
    names = ["tokens", "dim", "vocabulary", "pairs", "queries", "queue", "queue_dim", "threads"]
    return {name: getattr(args, name) for name in names}


def show(case: str, results: list[Result]) -> None:
    base = next(result for result in results if result.name == BASELINES[case])
    print(f"\n{case}  (ratios to: {base.name})")
    head = f"{'ms':>8}{'speed':>8}{'cpu ms':>8}{'speed':>8}{'MiB':>8}{'memory':>8}"
    print(f"  {'':38}{head}{'loss err':>10}{'grad err':>10}")
    for r in results:
        if r.seconds is None:
            print(f"  {r.name:38}{r.note}")
            continue
        wall = ratio(r.seconds, base.seconds, inverse=True)
        processor = ratio(r.processor_seconds, base.processor_seconds, inverse=True)
        memory = f"{'?':>8}{'':>8}" if r.extra_mib is None else f"{r.extra_mib:8.1f}"
        memory += ratio(r.extra_mib, base.extra_mib)
        cpu = 1e3 * (r.processor_seconds or 0.0)
        print(
            f"  {r.name:38}{1e3 * r.seconds:8.0f}{wall}{cpu:8.0f}{processor}{memory}"
            f"{r.loss_error:10.1e}{r.gradient_error:10.1e}"
        )


def ratio(value: float | None, base: float | None, *, inverse: bool = False) -> str:
    if not value or not base:
        return " " * 8
    return f"{base / value if inverse else value / base:7.2f}×"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", nargs="?", choices=["all", "head", "queue", "memory"])
    parser.add_argument("--tokens", type=int, default=512, help="T")
    parser.add_argument("--dim", type=int, default=512, help="D of the head")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="V")
    parser.add_argument("--pairs", type=int, default=4, help="completion pairs the T tokens make")
    parser.add_argument("--queries", type=int, default=64, help="B")
    parser.add_argument("--queue", type=int, default=131_072, help="Q")
    parser.add_argument("--queue-dim", type=int, default=256, help="D of queries and queue")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=Path("bench_kernels.json"))
    parser.add_argument("--case", choices=list(INPUTS), help="(memory) internal")
    parser.add_argument("--name", help="(memory) internal")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.work == "memory":
        print(memory_here(args.case, args.name, args))
        return
    work = args.work or "all"
    cases = [case for case in INPUTS if work == "all" or case.startswith(work)]
    about = {
        "processor": processor(),
        "torch": torch.__version__,
        "repeats": args.repeats,
        "command": " ".join(sys.argv),
        **shapes(args),
    }
    print(json.dumps(about))
    tables = {}
    for case in cases:
        tables[case] = measure(case, args)
        show(case, tables[case])
    found = {case: [asdict(result) for result in results] for case, results in tables.items()}
    args.json.write_text(json.dumps({"about": about, "results": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
