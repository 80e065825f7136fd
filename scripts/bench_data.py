"""Rows a second from file to token ids, beside TRL's preparation; memory of a streamed file.

    python scripts/bench_data.py                      # 100,000 rows, one and two workers, and TRL
    python scripts/bench_data.py --rows 20000         # quicker
    python scripts/bench_data.py --stream-gb 1        # peak memory while a 1 GB file streams

Both read the same JSONL of conversational pairs, apply the tokenizer's chat template and tokenise.
TRL's side is what `CPOTrainer.__init__` does to a dataset: its own functions through
`datasets.map`, with caching off, `num_proc` set to the same number of workers. Ours includes
writing the memory-mapped cache.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
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


def compare(name: str, rows: int) -> None:
    """Both ways with one and two workers; print the ratios."""
    tokenizer = load_tokenizer(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "rows.jsonl"
        write_rows(path, rows=rows)
        print(f"{rows:,} rows, {path.stat().st_size / 2**20:.0f} MiB, tokenizer {name}")
        print(f"{'workers':>8} {'ours, rows/s':>14} {'TRL, rows/s':>13} {'ratio':>7}")
        for workers in (1, 2):
            mine = timed(ours, path, tokenizer, workers, folder)
            trl = timed(theirs, path, tokenizer, workers, folder)
            print(f"{workers:>8} {mine:>14,.0f} {trl:>13,.0f} {mine / trl:>6.1f}x", flush=True)


def stream(name: str, gigabytes: float, workers: int) -> None:
    """Stream a large file into the cache and print the peak of this process's memory."""
    import resource

    from cpo_arabic.data.records import iter_records
    from cpo_arabic.data.tokenize import tokenize_records

    def resident() -> float:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    tokenizer = load_tokenizer(name)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "rows.jsonl"
        rows = write_rows(path, size=int(gigabytes * 10**9))
        before = resident()
        start = time.perf_counter()
        dataset = tokenize_records(
            iter_records(str(path)),
            tokenizer,
            **LENGTHS,
            num_workers=workers,
            cache_dir=Path(temporary) / "cache",
        )
        assert len(dataset) == rows
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{rows:,} rows, {path.stat().st_size / 10**9:.2f} GB in {seconds:.0f} s "
            f"({rows / seconds:,.0f} rows/s, {workers} workers): resident {before:.0f} MiB before "
            f"the first row, {peak:.0f} MiB at the peak"
        )


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tokenizer", default=str(ROOT / "demo" / "base-model"))
    parser.add_argument("--stream-gb", type=float, help="stream a file of this size instead")
    parser.add_argument("--workers", type=int, default=2, help="for --stream-gb")
    options = parser.parse_args()
    if options.stream_gb:
        stream(options.tokenizer, options.stream_gb, options.workers)
    else:
        compare(options.tokenizer, options.rows)


if __name__ == "__main__":
    main()
