"""A mistake gets one message with its place and remedy, status 2, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "demo"


def cpo_arabic(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CPO_ARABIC_")}
    return subprocess.run(
        [sys.executable, "-m", "cpo_arabic.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env=environment | {"COLUMNS": "200", "NO_COLOR": "1"},
    )


@pytest.fixture
def run_yaml(toy_model: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(**data: object) -> Path:
        path = tmp_path / "run.yaml"
        sections = {
            "model": {"name": str(toy_model), "max_length": 192},
            "data": {
                "train_file": str(DEMO / "data" / "train.jsonl"),
                "validation_file": str(DEMO / "data" / "heldout.jsonl"),
                "max_samples": 8,
                "padding": "packed",
            },
            "training": {"output_dir": str(tmp_path / "out"), "batch_size": 2, "max_steps": 2,
                         "gradient_accumulation_steps": 1, "learning_rate": 0.01},
            "logging": {"use_tensorboard": False},
        }  # fmt: skip
        sections["data"] |= data
        path.write_text(json.dumps(sections))  # JSON is YAML
        return path

    return write


def test_train_then_evaluate(run_yaml: Callable[..., Path], tmp_path: Path) -> None:
    path = run_yaml()
    trained = cpo_arabic("train", str(path), cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "reward accuracy" in trained.stdout
    assert (tmp_path / "out" / "final" / "adapter_model.safetensors").exists()
    for target in (path, tmp_path / "out"):
        done = cpo_arabic("evaluate", str(target), "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        for side in ("before", "after"):
            key = "eval_rewards/margins"
            assert found[side][key] == pytest.approx(summary[f"held_out_{side}"][key], abs=1e-5)
    again = cpo_arabic("train", str(path), cwd=tmp_path)
    assert again.returncode == 2
    assert "already used" in again.stderr
    assert "--resume" in again.stderr


REFUSED = {
    "missing config": (["train", "no.yaml"], "no.yaml"),
    "missing data": (["train", "run.yaml", "--set", "data.train_file=gone.jsonl"], "gone.jsonl"),
    "unknown key": (["train", "run.yaml", "--set", "cpo.bta=0.2"], "beta"),
    "wrong type": (["train", "run.yaml", "--set", "training.batch_size=many"], "batch_size"),
    "missing model": (["train", "run.yaml", "--set", "model.name=./gone"], "gone"),
    "quantisation": (
        ["train", "run.yaml", "--set", "optimization.use_quantization=true"],
        "use_quantization=false",
    ),
    "budget": (
        ["train", "run.yaml", "--set", "cpo.max_prompt_length=4", "--set", "data.truncation=false"],
        "max_prompt_length",
    ),
    "nothing to evaluate": (["evaluate", "run.yaml"], "not finished"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused(case: str, run_yaml: Callable[..., Path], tmp_path: Path) -> None:
    run_yaml()
    arguments, told = REFUSED[case]
    done = cpo_arabic(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [("", "empty"), ('{"prompt": "س", "chosen": "ج"}\n', "rejected"), ('{"prompt": ', ":1")],
)
def test_a_bad_data_file_is_refused_with_its_line(
    run_yaml: Callable[..., Path], tmp_path: Path, content: str, told: str
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(content, encoding="utf-8")
    run_yaml(train_file=str(data))
    done = cpo_arabic("train", "run.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "rows.jsonl" in done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_a_run_that_resumes_to_the_same_weights(
    run_yaml: Callable[..., Path], tmp_path: Path, sent: signal.Signals
) -> None:
    run_yaml()
    long = ["--set", "training.max_steps=30", "--set", "training.save_steps=3"]
    whole = ["train", "run.yaml", *long, "--set", "training.output_dir=whole"]
    assert cpo_arabic(*whole, cwd=tmp_path).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "cpo_arabic.cli", "train", "run.yaml", *long],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    expected = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[sent]
    assert process.wait(timeout=60) == expected
    assert not (tmp_path / "out" / "final").exists()
    resumed = cpo_arabic("train", "run.yaml", *long, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    name = "final/adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
