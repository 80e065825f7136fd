"""Rows a second from file to token ids, beside TRL's preparation; memory of a streamed file.

    python scripts/bench_data.py                      # 100,000 rows, one and two workers, and TRL
    python scripts/bench_data.py --rows 20000         # quicker
    python scripts/bench_data.py --rows 0 --stream-gb 1      # peak memory while 1 GB streams
    python scripts/bench_data.py --stream-gb 1 --json docs/bench/data.json       # all of it, kept

Both read the same JSONL of conversational pairs, apply the tokenizer's chat template and tokenise;
they take turns, each from a cold cache, after a first turn of a few rows that imports what either
needs. TRL's side is what `CPOTrainer.__init__` does to a dataset: its own functions through
`datasets.map`, with caching off, `num_proc` set to the same number of workers. Ours includes
writing the memory-mapped cache. The rows' words are the demo's, so they come again more often than
those of a text would.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cpo-arabic", "trl", "datasets", "tokenizers", "transformers", "pyarrow")
LENGTHS = {"max_length": 512, "max_prompt_length": 256, "max_target_length": 256}


def vocabulary() -> list[str]:
    """Arabic words: those of the demo's own answers."""
    lines = (ROOT / "demo" / "data" / "train.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    return sorted({word for row in rows for word in row["chosen"].split()})


def generated_rows(words: list[str], seed: int) -> Iterator[str]:
    """Conversational pairs without end, one JSON line each."""
    generator = random.Random(seed)
    number = 0
    while True:
        number += 1
        question, good, bad = (
            " ".join(generator.choices(words, k=generator.randint(*bounds)))
            for bounds in ((6, 30), (20, 80), (5, 60))
        )
        row = {
            "prompt": [{"role": "user", "content": f"{question} {number}؟"}],
            "chosen": [{"role": "assistant", "content": good}],
            "rejected": [{"role": "assistant", "content": bad}],
        }
        yield json.dumps(row, ensure_ascii=False) + "\n"


def write_rows(path: Path, *, rows: int | None = None, size: int | None = None) -> int:
    """Write so many rows, or so many bytes; give the rows."""
    written = count = 0
    with path.open("wb") as file:
        for line in generated_rows(vocabulary(), seed=0):
            if count == rows or (size is not None and written >= size):
                return count
            count += 1
            written += file.write(line.encode())
    return count


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def ours(path: Path, tokenizer: Any, workers: int, folder: Path) -> int:
    """Read, render, tokenise, write the cache."""
    from cpo_arabic.data.records import read_records
    from cpo_arabic.data.tokenize import tokenize_records

    records = read_records(str(path)).records
    dataset = tokenize_records(
        records, tokenizer, **LENGTHS, num_workers=workers, cache_dir=folder / f"ours-{workers}"
    )
    return len(dataset)


def theirs(path: Path, tokenizer: Any, workers: int, folder: Path) -> int:
    """What TRL's CPOTrainer does to a dataset before training."""
    from datasets import disable_caching, disable_progress_bars, load_dataset
    from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
    from trl.experimental.cpo import CPOTrainer

    disable_caching()
    disable_progress_bars()
    trainer = SimpleNamespace(
        processing_class=tokenizer,
        is_encoder_decoder=False,
        max_length=LENGTHS["max_length"],
        max_prompt_length=LENGTHS["max_prompt_length"],
        truncation_mode="keep_end",
        padding_value=tokenizer.pad_token_id,
    )
    trainer.build_tokenized_answer = CPOTrainer.build_tokenized_answer.__get__(trainer)
    tokenize = CPOTrainer.tokenize_row.__get__(trainer)
    number = workers if workers > 1 else None
    dataset = load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(folder / f"trl-{workers}")
    )
    dataset = dataset.map(maybe_extract_prompt, num_proc=number)
    dataset = dataset.map(
        maybe_apply_chat_template, fn_kwargs={"processing_class": tokenizer}, num_proc=number
    )
    return len(dataset.map(tokenize, num_proc=number))


def timed(what: Callable[..., int], *arguments: Any) -> float:
    """Rows a second."""
    start = time.perf_counter()
    rows = what(*arguments)
    return rows / (time.perf_counter() - start)


def compare(name: str, rows: int, turns: int) -> dict[str, Any]:
    """Both ways with one and two workers, in turns; print and give every turn."""
    tokenizer = load_tokenizer(name)
    ways = {"ours": ours, "trl": theirs}
    found: dict[str, Any] = {str(workers): {way: [] for way in ways} for workers in (1, 2)}
    with tempfile.TemporaryDirectory() as temporary:
        few, path = Path(temporary) / "few.jsonl", Path(temporary) / "rows.jsonl"
        write_rows(few, rows=10)
        write_rows(path, rows=rows)
        size = path.stat().st_size
        print(f"{rows:,} rows, {size / 2**20:.0f} MiB, tokenizer {name}")
        for way in ways.values():
            way(few, tokenizer, 1, Path(temporary) / "few")
        print(f"{'turn':>5} {'workers':>8} {'ours, rows/s':>14} {'TRL, rows/s':>13} {'ratio':>7}")
        for turn in range(turns):
            for workers, speeds in found.items():
                for label, way in ways.items():
                    with tempfile.TemporaryDirectory(dir=temporary) as folder:
                        speed = timed(way, path, tokenizer, int(workers), Path(folder))
                    speeds[label].append(round(speed, 1))
                mine, trl = speeds["ours"][-1], speeds["trl"][-1]
                print(f"{turn:>5} {workers:>8} {mine:>14,.0f} {trl:>13,.0f} {mine / trl:>6.1f}x",
                      flush=True)  # fmt: skip
        for workers, speeds in found.items():
            mine, trl = (statistics.median(speeds[label]) for label in ways)
            speeds["ratio"] = round(mine / trl, 2)
            print(f"{'all':>5} {workers:>8} {mine:>14,.0f} {trl:>13,.0f} {mine / trl:>6.1f}x")
    return {"rows": rows, "bytes": size, "rows_a_second_by_workers": found}


def stream(name: str, gigabytes: float, workers: int) -> dict[str, Any]:
    """Stream a large file into the cache; print and give the peak of resident memory."""
    from cpo_arabic.data.records import iter_records
    from cpo_arabic.data.tokenize import tokenize_records

    def peak(who: int) -> float:
        return round(resource.getrusage(who).ru_maxrss / 1024, 1)

    tokenizer = load_tokenizer(name)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "rows.jsonl"
        rows = write_rows(path, size=int(gigabytes * 10**9))
        before = peak(resource.RUSAGE_SELF)
        start = time.perf_counter()
        dataset = tokenize_records(
            iter_records(str(path)),
            tokenizer,
            **LENGTHS,
            num_workers=workers,
            cache_dir=Path(temporary) / "cache",
        )
        assert len(dataset) == rows
        found = {
            "rows": rows,
            "bytes": path.stat().st_size,
            "workers": workers,
            "seconds": round(time.perf_counter() - start, 1),
            "peak_mib_before_the_first_row": before,
            "peak_mib": peak(resource.RUSAGE_SELF),
            "largest_worker_peak_mib": peak(resource.RUSAGE_CHILDREN),
        }
    print(
        f"{rows:,} rows, {found['bytes'] / 10**9:.2f} GB in {found['seconds']:.0f} s, {workers} "
        f"worker(s): resident {before:.0f} MiB before the first row, {found['peak_mib']:.0f} MiB "
        f"at the peak, the largest worker {found['largest_worker_peak_mib']:.0f} MiB"
    )
    return found


def surroundings() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").split("\n")
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = next(iter(names), model)
    return {
        "command": " ".join(["python", *sys.argv]),
        "hardware": {"processor": model, "cores": os.cpu_count()},
        "load_average_before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
    }


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="0 compares nothing")
    parser.add_argument("--turns", type=int, default=3, help="of each way")
    parser.add_argument("--tokenizer", default="demo/base-model")
    parser.add_argument("--stream-gb", type=float, help="also stream a file of this size")
    parser.add_argument("--workers", type=int, default=1, help="for --stream-gb")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    options = parser.parse_args()
    found = surroundings()
    if options.stream_gb:  # first, while this process has imported little
        found["stream"] = stream(options.tokenizer, options.stream_gb, options.workers)
    if options.rows:
        found["preparation"] = compare(options.tokenizer, options.rows, options.turns)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
