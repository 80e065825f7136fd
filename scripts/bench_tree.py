"""Time and peak memory of one forward and backward: a row per completion against packed trees.

    python scripts/bench_tree.py [--repeats 3] [--case 512,64,1 ...] [--json FILE]

A case is P,C,k[,G]: G groups (1 if left out) of a prompt of P tokens with k + 1 completions of C
tokens; with ``~`` before P, lengths are drawn between half and one and a half times those. The
model has random weights and its loss reads the hidden states at the predicting positions only, so
the figures are those of the decoder, without the head. Layouts take turns within every repeat, in
one process each (peak memory is a process's own), and the reported ratio is that of the medians.
Where other work shares the machine, ``--threads 1`` and the CPU seconds are the steadier figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from cpo_arabic.data.pack import Padding, TokenizedGroup, collate
from cpo_arabic.modeling.tree import hidden_states

CASES = ("512,64,1", "512,64,3", "256,256,3", "1024,128,4", "~256,64,1,4", "~256,64,3,4")
LAYOUTS: tuple[Padding, ...] = ("longest", "packed")
VOCAB = 1000
HEADING = (
    f"{'P,C,k,G':>14} {'rows s':>8} {'packed s':>8} {'faster':>7} {'in CPU':>7} {'tokens':>7} "
    f"{'rows MB':>8} {'packed MB':>9} {'memory':>7} {'padding':>13}"
)


@dataclass(frozen=True)
class Case:
    """P prompt tokens, C completion tokens, k negatives, G groups."""

    name: str
    prompt: int
    completion: int
    negatives: int
    groups: int
    ragged: bool

    @staticmethod
    def parse(text: str) -> Case:
        """``~256,64,3,4`` → ragged, P 256, C 64, k 3, G 4."""
        numbers = [int(part) for part in text.removeprefix("~").split(",")]
        prompt, completion, negatives, groups = (*numbers, 1)[:4]
        return Case(text, prompt, completion, negatives, groups, text.startswith("~"))

    def make(self) -> list[TokenizedGroup]:
        """Its groups, the same in every process."""
        rng = torch.Generator().manual_seed(0)

        def draw(count: int) -> list[int]:
            if self.ragged:
                count = int(torch.randint(count // 2, count * 3 // 2 + 1, (), generator=rng))
            return torch.randint(1, VOCAB, (count,), generator=rng).tolist()

        return [
            TokenizedGroup(
                row=row,
                prompt_ids=draw(self.prompt),
                completion_ids=[draw(self.completion) for _ in range(self.negatives + 1)],
                prompt_key=row,
                completion_keys=list(range(self.negatives + 1)),
            )
            for row in range(self.groups)
        ]


def build_model(options: argparse.Namespace) -> Any:
    """The decoder, in training mode."""
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=8192,
        attn_implementation=options.attention,
    )
    return Qwen2Model(config).to(options.device, getattr(torch, options.dtype)).train()


def work(pipe: Connection, case: Case, layout: Padding, options: argparse.Namespace) -> None:
    """One layout in its own process: a step whenever asked; at last the figures."""
    torch.set_num_threads(options.threads)
    model = build_model(options)
    batch = collate(
        case.make(), padding=layout, pad_id=0, max_length=0, max_tokens_per_row=options.budget
    )
    batch = batch.to(options.device)
    weights = torch.linspace(-1, 1, len(batch.token_predictors), device=options.device)
    before = peak_mb(options.device)

    def step() -> tuple[float, float]:
        start, start_cpu = time.perf_counter(), time.process_time()
        model.zero_grad(set_to_none=False)
        hidden = hidden_states(model, batch).flatten(0, 1)[batch.token_predictors]
        loss = (hidden.float().mean(-1) * weights).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        synchronize(options.device)
        return time.perf_counter() - start, time.process_time() - start_cpu

    step()
    while pipe.recv():
        pipe.send(step())
    gradient = sum(float(p.grad.double().norm()) for p in model.parameters() if p.grad is not None)
    pipe.send(
        {
            "positions": batch.input_ids.numel(),
            "padding_share": batch.padding_share,
            "extra_mb": peak_mb(options.device) - before,
            "gradient_norms": gradient,
        }
    )


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_mb(device: str) -> float:
    """Peak so far: of the allocator on CUDA, else of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Both layouts, taking turns."""
    spawn = multiprocessing.get_context("spawn")
    workers = {}
    for layout in LAYOUTS:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=work, args=(theirs, case, layout, options))
        process.start()
        workers[layout] = (ours, process)
    times: dict[str, list[tuple[float, float]]] = {layout: [] for layout in LAYOUTS}
    for _ in range(options.repeats):
        for layout, (pipe, _process) in workers.items():
            pipe.send(True)
            times[layout].append(pipe.recv())
    result: dict[str, Any] = {"case": case.name}
    for layout, (pipe, process) in workers.items():
        pipe.send(False)
        wall, cpu = zip(*times[layout], strict=True)
        result[layout] = {
            "seconds": statistics.median(wall),
            "cpu_seconds": statistics.median(cpu),
            "all_seconds": wall,
            "all_cpu_seconds": cpu,
            **pipe.recv(),
        }
        process.join()
    rows, trees = (result[layout] for layout in LAYOUTS)
    result["speedup"] = rows["seconds"] / trees["seconds"]
    result["cpu_speedup"] = rows["cpu_seconds"] / trees["cpu_seconds"]
    result["memory_ratio"] = trees["extra_mb"] / rows["extra_mb"]
    result["position_ratio"] = rows["positions"] / trees["positions"]
    result["gradient_difference"] = abs(trees["gradient_norms"] / rows["gradient_norms"] - 1)
    return result


def line(result: dict[str, Any]) -> str:
    """One case as a line under ``HEADING``."""
    rows, trees = result["longest"], result["packed"]
    padding = f"{rows['padding_share']:.0%} → {trees['padding_share']:.0%}"
    return (
        f"{result['case']:>14} {rows['seconds']:8.3f} {trees['seconds']:8.3f} "
        f"{result['speedup']:6.2f}× {result['cpu_speedup']:6.2f}× "
        f"{result['position_ratio']:6.2f}× {rows['extra_mb']:8.0f} {trees['extra_mb']:9.0f} "
        f"{result['memory_ratio']:6.2f}× {padding:>13}"
    )


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", default=CASES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a packed row")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    print(HEADING)
    results = []
    for case in map(Case.parse, options.case):
        results.append(measure(case, options))
        print(line(results[-1]), flush=True)
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "case")}
    report = {
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__},
        "settings": settings,
        "results": results,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
