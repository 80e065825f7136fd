"""What ``cpo-arabic estimate`` predicts beside what training then needs: peak memory and time.

    OMP_NUM_THREADS=1 python scripts/bench_estimate.py --json docs/bench/estimate.json

Each case trains a random Qwen2 (hidden 512, 6 layers, 32,000 tokens) on the demo's rows through
``run.training.train``, in a process of its own: one step of a tiny model first, so that all
libraries are loaded, then three steps of the real one.

- measured: the resident set's high-water mark in the second and third step, over what it was just
  before the model was loaded. Memory that tensors hold is seen with glibc told to hand every block
  of a MiB and more back to the system (``MALLOC_MMAP_THRESHOLD_``); ``heap`` is the same with
  glibc's own settings, under which freed memory stays with the process.
- seconds: CPU seconds of the faster of the two steps, glibc's own settings.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.bench.measure import hardware, memory_mib, reset_peak, settle  # noqa: E402

MIB = 2**20
STEPS = 3
TOLERANCE = 0.15
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}
BASE = [
    f"data.train_file={DEMO / 'data' / 'train.jsonl'}",
    "data.validation_file=null",
    "data.validation_split_percentage=0",
    "data.padding=packed",
    "data.preprocessing_num_workers=1",
    "model.max_length=384",
    "cpo.max_prompt_length=128",
    "cpo.num_negatives=3",
    "cpo.contrastive_weight=0",
    "training.batch_size=4",
    "training.gradient_accumulation_steps=1",
    f"training.max_steps={STEPS}",
    "logging.use_tensorboard=false",
    "optimization.use_lora=false",
]
CHECKPOINTED = "optimization.use_gradient_checkpointing=true"
CASES: dict[str, list[str]] = {
    "full, packed": [],
    "full, longest": ["data.padding=longest"],
    "full, max_length": ["data.padding=max_length", "training.batch_size=2"],
    "full, accumulated": ["training.gradient_accumulation_steps=2"],
    "full, eager attention": ["model.attn_implementation=eager"],
    "full, checkpointed": [CHECKPOINTED],
    "LoRA": ["optimization.use_lora=true", "training.batch_size=8"],
    "LoRA, checkpointed": ["optimization.use_lora=true", "training.batch_size=8", CHECKPOINTED],
    "bf16": ["optimization.bf16=true"],
    "contrastive, momentum, queue": [
        "cpo.contrastive_weight=1",
        "cpo.use_momentum=true",
        "cpo.use_queue=true",
        "cpo.queue_size=16384",
        "cpo.projection_dim=128",
    ],
    "contrastive, accumulated": [
        "cpo.contrastive_weight=1",
        "training.gradient_accumulation_steps=2",
    ],
    "reference model": ["cpo.force_use_ref_model=true"],
}


def make_model(folder: Path, *, hidden: int, layers: int, vocabulary: int) -> None:
    """A random Qwen2 with the demo's tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 64),
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO / "base-model").save_pretrained(folder)


def configured(model: Path, overrides: list[str], output: Path) -> Any:
    """The case's configuration, as it is written."""
    from cpo_arabic.config import load_config

    own = [f"model.name={model}", f"training.output_dir={output}"]
    return load_config(None, [*own, *BASE, *overrides], environ={}, env_file=None).written


# --- one case in its own process -----------------------------------------------------------------


class EnoughError(Exception):
    """The steps that are measured are over."""


class Gauge:
    """An observer that reads memory and the clock."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.before: float | None = None
        self.peaks: list[float] = []
        self.seconds: list[float] = []

    def stage(self, text: str) -> None:
        if text == "loading the model":
            settle()
            self.before = memory_mib("cpu")

    def started(self, *_: int) -> None:
        self._begin()

    def stepped(self, step: int, _record: dict[str, Any] | None) -> None:
        self.seconds.append(time.process_time() - self._started)
        peak = memory_mib("cpu", peak=True)
        if peak is not None and self.before is not None:
            self.peaks.append(peak - self.before + unread_mib())
        if step == self.steps:
            raise EnoughError
        self._begin()

    def _begin(self) -> None:
        reset_peak("cpu")
        self._started = time.process_time()

    def warning(self, text: str) -> None: ...

    def evaluated(self, step: int, metrics: dict[str, float]) -> None: ...

    def saved(self, step: int, folder: str) -> None: ...


def unread_mib() -> float:
    """Of the weights, which are mapped from their files, what no step has read so far.

    The rows of a frozen embedding whose tokens have not occurred: a longer run reads them, too.
    """
    kib, weights = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # a mapping begins
            weights = line.endswith(".safetensors")
        elif weights and first in ("Size:", "Rss:"):
            kib += int(rest[0]) if first == "Size:" else -int(rest[0])
    return kib / 1024


def work(model: Path, overrides: list[str]) -> None:
    """The process's main function: prints what the steps took as JSON."""
    with tempfile.TemporaryDirectory() as tiny:
        make_model(Path(tiny), hidden=32, layers=2, vocabulary=4000)
        _train(Path(tiny), overrides, steps=1)
    gauge = _train(model, overrides, steps=STEPS)
    print(json.dumps({"peak": max(gauge.peaks[1:]), "seconds": min(gauge.seconds[1:])}))


def _train(model: Path, overrides: list[str], *, steps: int) -> Gauge:
    from transformers.utils import logging

    from cpo_arabic.run.training import train

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    gauge = Gauge(steps)
    with tempfile.TemporaryDirectory() as folder:
        config = configured(model, overrides, Path(folder) / "run").resolved()
        with contextlib.suppress(EnoughError):
            train(config, gauge)
    return gauge


# --- a run ---------------------------------------------------------------------------------------


def measured(model: Path, overrides: list[str], allocator: dict[str, str]) -> dict[str, float]:
    """Peak MiB and CPU seconds of a step, with the C library's allocator set so."""
    command = [sys.executable, __file__, "--worker", str(model), json.dumps(overrides)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | allocator, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def predicted(model: Path, overrides: list[str]) -> dict[str, Any]:
    """What the estimate says, without levers."""
    from cpo_arabic.run.estimate import estimate_alone

    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = estimate_alone(configured(model, overrides, Path("unused")))
    return {
        "predicted_mib": found.peak / MIB,
        "predicted_seconds": found.step_seconds,
        "items_mib": {name: size / MIB for name, size in found.items.items()},
        "peak_at": found.moment,
        "took_seconds": time.perf_counter() - started,
    }


def compare(model: Path, overrides: list[str], *, heap: bool) -> dict[str, Any]:
    """One case: predicted and measured."""
    found = predicted(model, overrides)
    found["measured_mib"] = measured(model, overrides, GIVEN_BACK)["peak"]
    if heap:
        plain = measured(model, overrides, {})
        found |= {"heap_mib": plain["peak"], "measured_seconds": plain["seconds"]}
    return found


def ratio(case: dict[str, Any]) -> float:
    """Predicted over measured peak, of what tensors hold."""
    return float(case["predicted_mib"] / case["measured_mib"])


def show(cases: dict[str, dict[str, Any]], console: Console) -> None:
    """The table."""
    table = Table(title="Predicted beside measured, one optimizer step")
    table.add_column("case", no_wrap=True)
    heads = ["predicted MiB", "tensors", "ratio", "with glibc's heap", "predicted s", "CPU s"]
    for head in [*heads, "ratio"]:
        table.add_column(head, justify="right")
    for name, c in cases.items():
        table.add_row(
            name,
            f"{c['predicted_mib']:.0f}",
            f"{c['measured_mib']:.0f}",
            f"{ratio(c):.2f}",
            f"{c['heap_mib']:.0f}",
            f"{c['predicted_seconds']:.2f}",
            f"{c['measured_seconds']:.2f}",
            f"{c['predicted_seconds'] / c['measured_seconds']:.2f}",
        )
    console.print(table)


def main(
    case: Annotated[list[str] | None, typer.Option(help=" | ".join(CASES))] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Predicted beside measured peak memory and time, with a random 45-million-parameter model."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    console = Console(width=None if sys.stdout.isatty() else 140)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        make_model(model, hidden=512, layers=6, vocabulary=32_000)
        for name in case or CASES:
            found[name] = compare(model, CASES[name], heap=True)
            show(found, console)
            if json_file is not None:
                report = {
                    "command": " ".join(["OMP_NUM_THREADS=1 python", *sys.argv]),
                    "hardware": hardware(1),
                    "model": {"hidden": 512, "layers": 6, "vocabulary": 32_000},
                    "tolerance": TOLERANCE,
                    "cases": found,
                }
                json_file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    off = [
        n for n, c in found.items() if abs(c["predicted_mib"] / c["measured_mib"] - 1) > TOLERANCE
    ]
    if off:
        console.print(f"off by more than {TOLERANCE:.0%}: {', '.join(off)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        typer.run(main)
