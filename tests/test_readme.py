"""What the README says is so: its commands, tree, links, examples and numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_its_python_runs() -> None:
    for block in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "1024"


def test_its_row_is_read(tmp_path: Path) -> None:
    from cpo_arabic.data.records import read_records

    (block,) = blocks("json")
    path = tmp_path / "rows.jsonl"
    path.write_text(block, encoding="utf-8")
    (record,) = read_records(str(path)).records
    assert len(record.easy_negatives) == 3
    assert len(record.hard_negatives) == 1


def test_its_commands_exist() -> None:
    from typer.main import get_command

    from cpo_arabic.cli import app

    group = get_command(app)
    for block in blocks("bash"):
        for line in re.findall(r"^cpo-arabic (.+?)(?:\s+#.*)?$", block, flags=re.MULTILINE):
            command = group
            for word in line.split():
                found = getattr(command, "commands", {}).get(word)
                if found is None:
                    break
                command = found
            known = {o for p in command.params for o in p.opts}
            assert not hasattr(command, "commands"), line
            assert set(re.findall(r"--[a-z-]+", line)) <= known, line
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets


def test_its_tree_is_the_tree() -> None:
    (tree,) = re.findall(r"```\n(cpo_arabic/\n.*?)```", README, flags=re.DOTALL)
    rooms = set(re.findall(r"^  ([a-z]+)/", tree, flags=re.MULTILINE))
    packages = {p.parent.name for p in (ROOT / "cpo_arabic").glob("*/__init__.py")}
    assert rooms == packages
    for name in re.findall(r"^([a-z_]+)/", tree, flags=re.MULTILINE):
        assert (ROOT / name).is_dir()


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/config.md"])
def test_its_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert ((ROOT / page).parent / link).exists(), link


def test_its_numbers_are_those_of_the_recorded_runs() -> None:
    script = ROOT / "scripts" / "build_readme.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_recorded_demo_learnt_something() -> None:
    demo = json.loads((ROOT / "docs" / "demo.json").read_text())
    key = "eval_rewards/accuracies"
    assert demo["held_out_after"][key] > demo["held_out_before"][key] + 0.2
