"""The step benchmark: both sides compute the same, and the report says how they compare."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cpo_arabic.data.pack import TokenizedGroup
from scripts import bench_step

SCRIPT = Path(bench_step.__file__)
OURS = ["ours, packed", "ours, longest"]
PEERS = ["TRL, not checkpointed"]


@pytest.mark.slow
def test_ours_and_trl_agree_and_the_report_has_their_ratios(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    found = run(tmp_path, [*OURS, *PEERS])
    assert [case["case"] for case in found["cases"]] == ["24,8,3,2", "demo,1,3"]
    for case in found["cases"]:
        for name, variant in case["variants"].items():
            assert variant["loss_error"] < 1e-5, name
            assert variant["gradient_error"] < 1e-4, name
            assert variant["loss"] == pytest.approx(case["loss"], rel=1e-5)
        ratios = case["ratios"]
        assert set(ratios) == set(OURS)
        for ours in OURS:
            assert set(ratios[ours]) == set(PEERS)
            assert all(value > 0 for peer in PEERS for value in ratios[ours][peer].values())
    synthetic = found["cases"][0]
    assert synthetic["tokens"] == 2 * (24 + 4 * 8)
    # 3 pairs of rows for each group of TRL's, one tree for ours
    assert synthetic["ratios"]["ours, packed"][PEERS[0]]["positions"] == 2 * 3 * 32 / 56


@pytest.mark.slow
def test_another_objective_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a gradient of another beta is far beyond the tolerance."""
    options = bench_step.Options(32, 1, 100, 256, 1, 1, 1, 0)
    case, truth = bench_step.Case.parse("24,8,3,2"), tmp_path / "truth.safetensors"
    bench_step.work_truth(Sink(), case, options, truth)  # type: ignore[arg-type]
    monkeypatch.setattr(bench_step, "BETA", 0.11)
    turns = bench_step.Turns(Sink(), truth)  # type: ignore[arg-type]
    bench_step.work_ours(turns, case, "packed", options, compiled=False)
    assert turns.gradient_error > 10 * bench_step.TOLERANCE["gradient"]


class Sink:
    """A pipe that always says go and forgets what it is told."""

    def recv(self) -> bool:
        return True

    def send(self, _: Any) -> None: ...


def run(folder: Path, variants: list[str]) -> dict[str, Any]:
    sizes = ["--hidden=32", "--layers=1", "--vocab=100", "--repeats=1", "--row-tokens=256"]
    cases = ["--case=24,8,3,2", "--case=demo,1,3"]
    output = [f"--json={folder / 'step.json'}", f"--plot={folder / 'step.png'}"]
    command = [sys.executable, str(SCRIPT), *sizes, *cases, *output]
    command += [f"--variant={name}" for name in variants]
    subprocess.run(command, check=True, timeout=600)
    assert (folder / "step.png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads((folder / "step.json").read_text())
    return found


def test_cases_are_read_as_documented() -> None:
    parse = bench_step.Case.parse
    assert parse("512,64,3") == bench_step.Case("512,64,3", 512, 64, 3, 1)
    assert parse("256,32,1,8") == bench_step.Case("256,32,1,8", 256, 32, 1, 8)
    assert parse("demo,3") == bench_step.Case("demo,3", 0, 0, 3, 32)
    assert parse("demo,1,5") == bench_step.Case("demo,1,5", 0, 0, 1, 5)


def test_a_group_becomes_k_pairs_with_the_chosen_one_in_each() -> None:
    group = TokenizedGroup(0, [1, 2], [[3], [4, 5], [6]], 0, [0, 1, 2])
    first, second = bench_step.pairs_of(group)
    assert first["chosen_input_ids"] == second["chosen_input_ids"] == [1, 2, 3]
    assert first["rejected_input_ids"] == [1, 2, 4, 5]
    assert first["rejected_labels"] == [-100, -100, 4, 5]
    assert second["rejected_attention_mask"] == [1, 1, 1]


def test_without_trl_its_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "trl" else find(name, *a)
    )
    assert bench_step.missing("TRL, defaults") == "not installed"
    assert bench_step.missing("ours, packed") == ""
    assert bench_step.unsupported() == {}
    variants = {"ours, packed": variant(cpu=1.0), "TRL, defaults": {"note": "not installed"}}
    assert bench_step.ratios(variants) == {"ours, packed": {}}
    text = shown(variants)
    assert "not installed" in text
    assert "11.5" in text


def test_ratios_are_theirs_over_ours_in_time_and_ours_over_theirs_in_memory() -> None:
    variants = {"ours, packed": variant(cpu=1.0, peak=100.0), "TRL, defaults": variant(4.0, 400.0)}
    found = bench_step.ratios(variants)["ours, packed"]["TRL, defaults"]
    assert found["cpu_speed"] == 4.0
    assert found["peak_memory"] == 0.25
    assert found["working_memory"] == pytest.approx(90 / 390)
    assert "4.00×" in shown(variants)


def variant(cpu: float, peak: float = 100.0) -> dict[str, Any]:
    return {
        "wall_seconds": cpu,
        "cpu_seconds": cpu,
        "tokens_per_cpu_second": 100 / cpu,
        "peak_mib": peak,
        "working_mib": peak - 10,
        "floors": 1.5,
        "loss": 11.5,
        "loss_error": 1e-8,
        "gradient_error": 1e-7,
        "positions": 10,
        "agrees": True,
    }


def shown(variants: dict[str, Any]) -> str:
    case = {"case": "8,8,1", "tokens": 24, "goal": None, "variants": variants}
    console = Console(file=io.StringIO(), width=200)
    bench_step.show({"cases": [case], "unsupported": {}}, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
