"""One rank or two with the same global batch take the same steps."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

DEMO = Path(__file__).resolve().parents[2] / "demo"


def launch(path: Path, ranks: int, *overrides: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sets = [part for o in overrides for part in ("--set", o)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CPO_ARABIC_")}
    if ranks > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                        "WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "cpo_arabic.cli", "train", path.name, *sets],
            cwd=path.parent,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            if ranks > 1
            else environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        (),
        ("cpo.use_momentum=true", "cpo.use_queue=true", "cpo.queue_size=24"),
        ("optimization.use_lora=false", "cpo.projection_dim=8"),
    ],
    ids=["plain", "momentum-and-queue", "full-with-head"],
)
def test_two_ranks_end_where_one_does(
    toy_model: Path, tmp_path: Path, way: tuple[str, ...]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        json.dumps(
            {
                "model": {"name": str(toy_model), "max_length": 192},
                "data": {
                    "train_file": str(DEMO / "data" / "train.jsonl"),
                    "validation_file": str(DEMO / "data" / "heldout.jsonl"),
                    # Windows of 8 rows: the last has 1, and leaves the second rank without any.
                    "max_samples": 17,
                    "padding": "packed",
                },
                "cpo": {"simcse_dropout": 0.0, "num_negatives": 2},
                "training": {"batch_size": 2, "max_steps": 4, "learning_rate": 1e-3,
                             "adam_epsilon": 1e-3},
                "logging": {"use_tensorboard": False},
            }
        )
    )  # fmt: skip
    launch(path, 1, "training.output_dir=one", "training.gradient_accumulation_steps=4", *way)
    launch(path, 2, "training.output_dir=two", "training.gradient_accumulation_steps=2", *way)
    one, two = tmp_path / "one" / "final", tmp_path / "two" / "final"
    for file in one.glob("*.safetensors"):
        expected, found = load_file(file), load_file(two / file.name)
        for name, value in expected.items():
            assert torch.allclose(value, found[name], atol=2e-6), name
    metrics = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    for a, b in zip(*metrics, strict=True):
        for key in ("loss", "eval_loss", "eval_rewards/margins"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6)
