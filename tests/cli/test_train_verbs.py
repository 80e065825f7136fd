"""``train`` and ``evaluate`` as a person at a terminal meets them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cpo_arabic.cli import main
from cpo_arabic.cli.show import show_error
from cpo_arabic.cli.train import ProgressObserver
from cpo_arabic.errors import DataError
from tests.run.processes import write_config

ESCAPES = "\x1b]0;owned\x07\x1b[31m\u202e\u2066"


class Terminal:
    """Runs the command line in this process and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch
        self.out = self.err = ""

    def __call__(self, *words: str | Path) -> int:
        self._monkeypatch.setattr(sys, "argv", ["cpo-arabic", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        self.out, self.err = self._capsys.readouterr()
        return status


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "200")
    for name in [name for name in os.environ if name.startswith("CPO_ARABIC_")]:
        monkeypatch.delenv(name)
    return Terminal(capsys, monkeypatch)


@pytest.fixture
def config(toy_model: Path, tmp_path: Path) -> Path:
    return write_config(
        tmp_path / "toy.yaml",
        toy_model,
        "training.max_steps=2",
        "data.validation_split_percentage=0.02",
    )


def shell(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own, without this project's variables."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CPO_ARABIC_")}
    return subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_console_script_trains_evaluates_and_refuses(config: Path, tmp_path: Path) -> None:
    script = shutil.which("cpo-arabic", path=str(Path(sys.executable).parent))
    assert script is not None
    trained = shell(script, "train", config, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "held-out metrics" in trained.stdout
    assert "reward accuracy" in trained.stdout
    assert str(tmp_path / "run" / "final") in trained.stdout
    # From another folder: the run directory says all that is needed.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for target in (tmp_path / "run", config):
        measured = shell(sys.executable, "-m", "cpo_arabic.cli", "evaluate", target,
                         "--json", cwd=elsewhere)  # fmt: skip
        assert measured.returncode == 0, measured.stderr
        found = json.loads(measured.stdout)
        for side in ("before", "after"):
            for key in ("eval_rewards/accuracies", "eval_rewards/margins"):
                expected = summary[f"held_out_{side}"][key]
                assert found[side][key] == pytest.approx(expected, abs=1e-5)
    again = shell(script, "train", config, cwd=tmp_path)
    assert again.returncode == 2
    assert "already used" in again.stderr
    assert "--resume" in again.stderr
    assert "Traceback" not in again.stderr


def test_what_is_printed_stands_beside_names_that_look_like_markup(
    terminal: Terminal, config: Path, tmp_path: Path
) -> None:
    """A console that reads markup stumbles over ``[/…]`` after hours of training."""
    root = tmp_path / "[bold]run[" / "x]"
    assert terminal("train", config, "--set", f"training.output_dir={root}") == 0
    assert f"run directory  {root}" in terminal.out
    assert terminal("evaluate", config, "--set", f"training.output_dir={root}") == 0
    assert "reward accuracy" in terminal.out


def rows(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def torn(path: Path) -> Path:
    path.write_text('{"prompt": ')
    return path


ROW = {"prompt": "س", "chosen": "ج", "rejected": "خ"}

REFUSALS: dict[str, Callable[[Path], tuple[list[str], list[str]]]] = {
    "no configuration": lambda f: (["train", str(f / "toi.yaml")], ["toi.yaml"]),
    "no data file": lambda f: (["data.train_file=gone.jsonl"], ["gone.jsonl: no such file"]),
    "unknown key": lambda f: (["cpo.temprature=1"], ["temprature", "temperature"]),
    "wrong type": (lambda f: (["training.batch_size=two"], ["training.batch_size", "two"])),
    "empty data": lambda f: (
        [f"data.train_file={rows(f / 'empty.jsonl')}"],
        ["empty.jsonl", "the source is empty"],
    ),
    "no column": lambda f: (
        [f"data.train_file={rows(f / 'rows.jsonl', ROW, {'prompt': 'س', 'chosen': 'ج'})}"],
        ["rows.jsonl:2", "rejected", "Columns found: prompt, chosen", "on_bad_row: skip"],
    ),
    "cut-off JSON": lambda f: (
        [f"data.train_file={torn(f / 'torn.jsonl')}"],
        ["torn.jsonl:1"],
    ),
    "a prompt over its budget": lambda f: (
        ["cpo.max_prompt_length=4", "data.truncation=false"],
        ["cpo.max_prompt_length is 4", "data.truncation is false"],
    ),
    "quantisation": lambda f: (
        ["optimization.use_quantization=true"],
        ["no CUDA device", "--set optimization.use_quantization=false"],
    ),
    "no model": lambda f: ([f"model.name={f / 'gone'}"], [str(f / "gone"), "cannot be loaded"]),
    "a hub's name without a network": lambda f: (
        ["model.name=nobody/nothing"],
        ["nobody/nothing", "Check the spelling"],
    ),
    "another's tokenizer": lambda f: (
        [f"model.name={f / 'small'}", f"model.tokenizer_name={f / 'toy'}"],
        ["rows: they do not belong together", "model.tokenizer_name"],
    ),
    "a file where the folder goes": lambda f: (
        [f"training.output_dir={f / 'toy.yaml'}"],
        ["is a file; choose a folder"],
    ),
    "nothing to resume": lambda f: (
        ["--resume"],
        ["holds no run to resume", "leave --resume out"],
    ),
    "nothing to evaluate": lambda f: (
        ["evaluate", str(f / "toy.yaml")],
        ["the run is not finished", "cpo-arabic train"],
    ),
    "a folder without a run": lambda f: (["evaluate", str(f)], ["config.yaml is missing"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_mistake_is_one_message_with_its_remedy_and_writes_nothing(
    terminal: Terminal,
    toy_model: Path,
    config: Path,
    tmp_path: Path,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if case == "quantisation":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if case == "another's tokenizer":
        with_fewer_rows(toy_model, tmp_path / "small")
        shutil.copytree(toy_model, tmp_path / "toy")
    words, told = REFUSALS[case](tmp_path)
    if words[0] == "--resume":
        words = ["train", str(config), *words]
    if words[0] not in ("train", "evaluate"):
        words = ["train", str(config), *(part for word in words for part in ("--set", word))]
    before = set(tmp_path.rglob("*"))
    assert terminal(*words) == 2, terminal.out
    for text in told:
        assert text in terminal.err
    assert terminal.err.count("error: ") == 1
    assert "Traceback" not in terminal.out + terminal.err
    assert set(tmp_path.rglob("*")) == before


def with_fewer_rows(model: Path, folder: Path) -> None:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    shape = Qwen2Config.from_pretrained(model)
    shape.vocab_size = 100
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], ["train", "evaluate", "validate-config", "One YAML file describes a run"]),
        (["train"], ["--resume", "--set", "checkpoint", "Ctrl-C"]),
        (["evaluate"], ["CONFIG|RUN", "--json", "before against after"]),
        (["validate-config"], ["--strict", "--data"]),
        (["config"], ["init", "show", "schema"]),
        (["data"], ["check", "preview"]),
    ],
    ids=lambda value: value[0] if value else "root",
)
def test_help_teaches(terminal: Terminal, words: list[str], told: list[str]) -> None:
    assert terminal(*words, "--help") == 0
    for text in told:
        assert text in " ".join(terminal.out.split())


# --- what plays tricks on a terminal --------------------------------------------------------------


def assert_harmless(printed: str) -> None:
    assert not any(char in printed for char in ESCAPES if not char.isprintable())


def test_control_characters_of_data_are_escaped(
    terminal: Terminal, config: Path, tmp_path: Path
) -> None:
    bad = {f"{ESCAPES}chosen": "x", "prompt": ESCAPES}
    good = [{**ROW, "prompt": f"س{n}{ESCAPES}"} for n in range(4)]
    where = ["--set", f"data.train_file={rows(tmp_path / 'rows.jsonl', *good, bad)}"]
    assert terminal("train", config, *where) == 2
    assert "\\u{202e}" in terminal.err
    assert_harmless(terminal.out + terminal.err)
    skip = ["--set", "data.on_bad_row=skip", "--set", "data.max_samples=2"]
    assert terminal("train", config, *where, *skip) == 0, terminal.err
    assert "1 bad rows skipped" in terminal.out
    assert "rows.jsonl:5: " in terminal.out
    assert "\\u{202e}" in terminal.out
    assert_harmless(terminal.out + terminal.err)


def test_whatever_a_run_says_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    observer = ProgressObserver(Console())
    observer.stage(f"[b]{ESCAPES}")
    observer.warning(f"[/b]{ESCAPES}")
    observer.saved(1, f"[/b]{ESCAPES}")
    show_error(DataError(f"rows.jsonl:1: {ESCAPES}\nsecond line"))
    printed = capsys.readouterr()
    assert_harmless(printed.out + printed.err)
    assert "[b]" in printed.out
    assert "\nsecond line" in printed.err
