"""The benchmark: all sides compute the same, and the table says how they compare."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cpo_arabic.data.pack import TokenizedGroup
from scripts.bench import cost, goals, head, law, measure, ours, page, profile, queue, step, table
from scripts.bench.__main__ import continued, in_order
from scripts.bench.cases import ROOT, Case, Shape

SHAPE = Shape(hidden=32, layers=1, vocab=100)
STEP = step.Settings(hidden=32, layers=1, vocab=100, repeats=1, compiled=False)


class Pipe:
    """A pipe that always says go and keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def recv(self) -> bool:
        return True

    def send(self, message: Any) -> None:
        self.told.append(message)


# --- the same work on all sides ------------------------------------------------------------------


@pytest.mark.slow
def test_ours_and_trl_agree_and_all_that_was_promised_is_written(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    changes = ["hidden=32", "layers=1", "vocab=100", "repeats=1", "compiled=0"]
    cases = ["24,8,3,2", "~24,8,1,2,lora", "demo,1,3", "8,8,1,gpu"]
    command = [sys.executable, "-m", "scripts.bench", "step", f"--output={tmp_path}"]
    command += [f"--set={change}" for change in changes] + [f"--case={case}" for case in cases]
    subprocess.run(
        command, check=True, timeout=600, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "step.json").read_text())
    assert [case["case"] for case in record["cases"]] == cases
    *measured, gpu = record["cases"]
    assert gpu["note"] == "no GPU here"
    assert list(measured[0]["variants"]) == [n for n in step.VARIANTS if "compiled" not in n]
    for case in measured:
        for name, variant in case["variants"].items():
            assert variant["loss_error"] < 1e-5, name
            assert variant["gradient_error"] < 1e-4, name
            assert variant["fused_optimizer"], name
    trees, peer = (measured[0]["variants"][name] for name in ("ours", "TRL, defaults"))
    assert measured[0]["tokens"] == trees["positions"] == 2 * (24 + 4 * 8)
    assert peer["positions"] == 2 * 3 * 2 * 32  # 3 pairs of rows for each group
    assert measured[1]["frozen_head"] and measured[1]["trained_parameters"] < SHAPE.vocab * 32 * 4
    assert "| 24,8,3,2 | ours |" in (tmp_path / "README.md").read_text()


def test_our_step_is_the_definition(tmp_path: Path) -> None:
    """And the gradient of another beta is far beyond the tolerance."""
    case, truth = Case.parse("24,8,3,2"), tmp_path / "truth.safetensors"
    true = Pipe()
    step.work_truth(true, case, SHAPE, truth)
    step.work_ours(pipe := Pipe(), "ours", case, SHAPE, STEP, truth)
    found = measure.figures(pipe.told, true.told[0]["loss"])
    assert found["agrees"]
    assert found["gradient_error"] < 1e-5
    model = case.model(SHAPE)
    wrong = ours.OurStep(
        model, case.draw(SHAPE), ours.pairwise_cpo(0.11, 1.0),
        padding="packed", pad_id=0,
    )  # fmt: skip
    wrong.accumulate()
    assert step.gradient_error(model, truth) > 10 * measure.TOLERANCE["gradient"]


@pytest.mark.parametrize("trained", [True, False])
def test_the_heads_agree(tmp_path: Path, trained: bool) -> None:
    settings = head.Settings(tokens=32, dim=16, head_vocab=300, repeats=1)
    truth = tmp_path / "truth.safetensors"
    head.work_truth(true := Pipe(), settings, trained, truth)
    for name in ("ours", "TRL's log-softmax"):
        head.work(pipe := Pipe(), settings, trained, name, truth)
        assert measure.figures(pipe.told, true.told[0])["agrees"], name


@pytest.mark.parametrize("case", queue.CASES)
def test_the_queues_agree(tmp_path: Path, case: str) -> None:
    settings = queue.Settings(queries=4, queue=128, queue_dim=16, repeats=1)
    truth = tmp_path / "truth.safetensors"
    queue.work_truth(true := Pipe(), settings, case, truth)
    for name, variant in queue.table(case).items():
        queue.work(pipe := Pipe(), settings, case, name, truth)
        found = measure.figures(pipe.told, true.told[0], exact=variant.exact)
        assert found["agrees"], (name, found)


# --- rows and cases ------------------------------------------------------------------------------


def test_cases_are_read_as_documented() -> None:
    plain = Case("512,64,3", "", 512, 64, 3, 1, ragged=False, lora=False, gpu=False)
    assert Case.parse("512,64,3") == plain
    assert Case.parse("~512,64,3") == replace(plain, name="~512,64,3", ragged=True)
    assert Case.parse("512,64,3,lora") == replace(plain, name="512,64,3,lora", lora=True)
    assert Case.parse("256,32,1,8").groups == 8
    demo = Case.parse("demo,3")
    assert (demo.data, demo.negatives, demo.groups) == ("demo", 3, 32)
    assert Case.parse("wmt24pp,1,5").groups == 5
    for wrong in ("512,64", "demo", "512,64,1,2,3", "512,64,1,adapter"):
        with pytest.raises(ValueError, match="no case"):
            Case.parse(wrong)


def test_ragged_lengths_lie_around_those_of_the_case_and_are_the_same_each_time() -> None:
    case = Case.parse("~40,20,1,16")
    groups = case.draw(SHAPE)
    assert groups == case.draw(SHAPE)
    lengths = {len(group.prompt_ids) for group in groups}
    assert len(lengths) > 4 and lengths <= set(range(20, 61))


def test_a_group_becomes_k_pairs_with_the_chosen_one_in_each() -> None:
    group = TokenizedGroup(0, [1, 2], [[3], [4, 5], [6]], 0, [0, 1, 2])
    first, second = step.pairs_of(group)
    assert first["chosen_input_ids"] == second["chosen_input_ids"] == [1, 2, 3]
    assert first["rejected_input_ids"] == [1, 2, 4, 5]
    assert first["rejected_labels"] == [-100, -100, 4, 5]
    assert second["rejected_attention_mask"] == [1, 1, 1]


# --- processes -----------------------------------------------------------------------------------


def steady(pipe: Any, cost: float) -> None:
    turns = measure.Turns(pipe)
    for _ in range(3):
        turns.begin()
        turns.stop()
        turns.tell(loss=cost)


def dies_in_its_last_turn(pipe: Any) -> None:
    turns = measure.Turns(pipe)
    for number in range(3):
        turns.begin()
        if number == 2:
            raise MemoryError("nothing left")
        turns.stop()
        turns.tell(loss=2.0)


def is_killed(pipe: Any) -> None:
    pipe.recv()
    os._exit(3)


@pytest.mark.slow
def test_one_that_dies_leaves_what_it_had_and_the_others_go_on() -> None:
    jobs = {
        "steady": measure.Job(steady, (1.0,)),
        "dies": measure.Job(dies_in_its_last_turn),
        "killed": measure.Job(is_killed),
    }
    seen: list[str] = []
    turns, died = measure.take_turns(jobs, repeats=2, threads=1, watch=seen.append)
    assert {name: len(taken) for name, taken in turns.items()} == {
        "steady": 3,
        "dies": 2,
        "killed": 0,
    }
    assert died == {"dies": "MemoryError: nothing left", "killed": "killed, exit status 3"}
    assert len(seen) == 9


def test_a_package_that_is_not_there_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "trl" else find(name, *a)
    )
    assert measure.missing("trl") == "not installed"
    assert measure.missing("torch") == ""
    assert step.unsupported() == {}


# --- what is said of it --------------------------------------------------------------------------


def variant(cpu: float, peak: float = 100.0) -> dict[str, Any]:
    return {
        "wall_seconds": cpu,
        "cpu_seconds": cpu,
        "peak_mib": peak,
        "working_mib": peak - 10,
        "loss_error": 1e-8,
        "gradient_error": 1e-7,
        "agrees": True,
    }


def recorded(**variants: dict[str, Any]) -> goals.Records:
    names = {"ours": "ours", "slow": "TRL, defaults", "fast": "TRL, compiled"}
    case = {
        "case": "512,64,1",
        "clock": "cpu_seconds",
        "floor_seconds": 0.5,
        "variants": {names[name]: value for name, value in variants.items()},
    }
    hardware = {"processor": "p", "cores": 2, "python": "3"}
    about = {"command": "x", "hardware": hardware, "matmul_gflops_per_second": 99.6}
    settings = vars(step.Settings())
    return {"step": {**about, "tolerance": {}, "settings": settings, "cases": [case]}}


def shown(records: goals.Records) -> str:
    console = Console(file=io.StringIO(), width=220)
    table.show(records, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_case_measured_again_takes_its_place_among_the_others(tmp_path: Path) -> None:
    path = tmp_path / "head.json"
    fresh = {"command": "b", "hardware": "h", "quick": False, "settings": {"dim": 8}, "cases": []}
    assert continued(path, fresh, ["trained"]) == fresh
    cases = [{"case": "trained", "at": 1}, {"case": "frozen", "at": 1}]
    path.write_text(json.dumps(fresh | {"command": "a", "cases": cases}))
    found = continued(path, fresh, ["trained"])
    assert found == fresh | {"command": "a", "cases": [{"case": "frozen", "at": 1}]}
    assert in_order("head", [*found["cases"], {"case": "trained", "at": 2}])[0]["at"] == 2
    assert continued(path, fresh, ["trained", "frozen"]) == fresh
    for name, other in (("hardware", "g"), ("quick", True), ("settings", {"dim": 9})):
        changed = fresh | {name: other}
        assert continued(path, changed, ["trained"]) == changed


def test_a_goal_is_held_against_the_peers_fastest_setting() -> None:
    records = recorded(ours=variant(1.0, 30.0), slow=variant(8.0, 20.0), fast=variant(4.0, 100.0))
    found = goals.lines(records)[0]
    assert (found.peer, found.speed, found.memory) == ("TRL, compiled", 4.0, 0.3)
    assert found.fast and found.small
    assert (found.floors, found.speed_at_floor) == (2.0, 8.0)
    text = shown(records)
    assert "≥ 3.5× ✓" in text and "≤ 0.40 ✓" in text and "8.00×" in text
    assert "4.00× (≥ 3.5) ✓ | 0.30 (≤ 0.4) ✓" in page.summary(records)
    slower = recorded(ours=variant(2.0, 30.0), fast=variant(4.0, 60.0))
    assert not goals.lines(slower)[0].fast and not goals.lines(slower)[0].small
    assert "2.00× (≥ 3.5) ✗ | 0.50 (≤ 0.4) ✗" in page.summary(slower)


def test_a_memory_goal_below_what_a_step_must_hold_says_so() -> None:
    records = recorded(ours=variant(1.0, 50.0), fast=variant(4.0, 100.0))
    (case,) = records["step"]["cases"]
    for state, floor in ((47.0, "; floor 0.47"), (40.0, "")):
        case["state_mib"] = state
        assert goals.lines(records)[0].memory_at_floor == pytest.approx(state / 100)
        assert f"0.50 (≤ 0.4{floor}) ✗" in page.summary(records)


def test_what_was_not_measured_has_a_note_and_no_figure() -> None:
    records = recorded(ours=variant(1.0), slow={"note": "not installed"})
    found = goals.lines(records)
    assert (found[0].note, found[0].speed) == ("not installed", None)
    assert {line.note for line in found[1:]} == {"not run"}
    assert "not installed" in shown(records) and "not installed" in page.written(records)
    assert page.summary({}) == "No benchmark has been recorded yet."


def test_a_quick_look_says_that_it_is_one() -> None:
    records = recorded(ours=variant(1.0), fast=variant(4.0))
    assert "quick look" not in shown(records) + page.written(records)
    records["step"]["quick"] = True
    assert "quick look" in shown(records) and "quick look" in page.written(records)


def test_only_our_own_disagreement_is_a_failure() -> None:
    wrong = variant(1.0) | {"agrees": False}
    assert page.all_agree(recorded(ours=variant(1.0), slow=wrong))
    assert not page.all_agree(recorded(ours=wrong, slow=variant(1.0)))
    assert "1e-07 ✗" in page.written(recorded(ours=wrong))


def test_a_law_is_told_from_the_other() -> None:
    points = {case: cost.Settings().points(case) for case in law.FITTED}
    cases = [
        {
            "case": case,
            "points": [vars(point) for point in found],
            "cpu_seconds": {"ours": [0.5 + 0.001 * point.tree_tokens for point in found]},
        }
        for case, found in points.items()
    ]
    found = law.laws(cases, "ours")
    assert found["tree"].r_squared == pytest.approx(1.0)
    assert found["tree"].slope == pytest.approx(0.001)
    assert found["tree"].worst < 1e-9
    assert found["rows"].r_squared < 0.8
    assert found["rows"].worst > 0.2


def test_an_operator_has_the_kind_of_its_name_and_the_rest_is_what_is_left() -> None:
    times = {"aten::addmm": 2.0, "aten::bmm": 1.0, "aten::expand": 0.5, "aten::exp_": 0.25}
    found = profile.by_kind(times, 5.0)
    assert found["matrix products"] == 3.0
    assert found["copies and look-ups"] == 0.5
    assert found["softmax and its backward"] == 0.25
    assert found[profile.REST] == 1.25


def test_the_page_takes_in_what_the_other_benchmarks_kept() -> None:
    hardware = {"processor": "p", "cores": 2, "python": "3"}
    speeds = {"1": {"ours": [90.0, 110.0, 100.0], "trl": [20.0], "ratio": 5.0}}
    data = {
        "command": "d", "hardware": hardware, "versions": {"trl": "1"},
        "preparation": {"rows": 10, "bytes": 1000, "rows_a_second_by_workers": speeds},
    }  # fmt: skip
    case = {
        "predicted_mib": 90.0, "measured_mib": 100.0, "heap_mib": 110.0,
        "predicted_seconds": 1.0, "measured_seconds": 2.0,
    }  # fmt: skip
    model = {"hidden": 8, "layers": 1, "vocabulary": 9}
    estimate = {
        "command": "e", "hardware": hardware, "model": model, "tolerance": 0.15,
        "cases": {"full": case},
    }  # fmt: skip
    records = {**recorded(ours=variant(1.0)), "data": data, "estimate": estimate}
    text = page.written(records)
    assert "| 1 | 100 | 20 | 5.0× |" in text
    assert "| full | 90 | 100 | 0.90 | 110 | 1.00 | 2.00 |" in text
    assert page.all_agree(records)
