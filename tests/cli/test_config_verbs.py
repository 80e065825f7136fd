"""The verbs that look at configurations, as a person at a terminal meets them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cpo_arabic import __version__
from cpo_arabic.cli import main
from cpo_arabic.cli.show import show_error
from cpo_arabic.errors import DataError

CONFIGS = Path(__file__).parents[2] / "configs"


class Terminal:
    """Runs the command line in a folder of its own and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys = capsys
        self.monkeypatch = monkeypatch
        self.out = ""
        self.err = ""

    def __call__(self, *words: str | Path) -> int:
        self.monkeypatch.setattr(sys, "argv", ["cpo-arabic", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        self.out, self.err = self.capsys.readouterr()
        assert "Traceback" not in self.out + self.err
        return int(caught.value.code or 0)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("FORCE_COLOR", "CPO_ARABIC_CPO__BETA"):
        monkeypatch.delenv(name, raising=False)
    return Terminal(capsys, monkeypatch)


def write(text: str) -> Path:
    path = Path("run.yaml")
    path.write_text(text, encoding="utf-8")
    return path


def test_a_legal_file_is_valid_with_its_objective(run: Terminal) -> None:
    assert run("validate-config", CONFIGS / "prod.yaml") == 0
    assert "is valid" in run.out and "minimise 1·CPO listwise(k = 3" in run.out
    assert run.out.index("Warnings") < run.out.index("Advice") < run.out.index("Objective")
    assert run.err == ""


def test_an_error_points_at_the_value_and_exits_with_2(run: Terminal) -> None:
    assert run("validate-config", write("cpo:\n  temprature: 0.1\n  beta: -1\n")) == 2
    assert run.out == ""
    assert "--> run.yaml:2:3" in run.err and "did you mean cpo.temperature" in run.err
    assert "3 |   beta: -1" in run.err and "^^" in run.err
    assert "2 problems; nothing was started or written" in run.err


def test_a_rule_shows_the_other_fields(run: Terminal) -> None:
    assert run("validate-config", write("cpo: {max_length: 4096}")) == 2
    assert "with: model.max_length = 2048 (default)" in run.err


def test_json_holds_errors_warnings_and_advice(run: Terminal) -> None:
    assert run("validate-config", write("cpo: {beta: -1}"), "--json") == 2
    told: dict[str, Any] = json.loads(run.out)
    assert told["valid"] is False
    error = told["errors"][0]
    assert (error["field"], error["value"], error["line"], error["column"]) == (
        "cpo.beta",
        "-1",
        1,
        13,
    )
    assert run("validate-config", write("cpo: {queue_size: 100}"), "--json") == 0
    told = json.loads(run.out)
    assert told["valid"] is True and told["errors"] == []
    assert {one["code"] for one in told["warnings"]} == {"inert", "missing_file"}
    assert told["advice"] and told["objective"].startswith("minimise")


def test_strict_lets_warnings_count(run: Terminal) -> None:
    config = write("data: {train_file: run.yaml}\ncpo: {queue_size: 100}\n")
    assert run("validate-config", config) == 0
    assert run("validate-config", config, "--strict") == 2
    assert "refused by --strict" in run.out
    assert run("validate-config", config, "--strict", "--json") == 2
    assert run("validate-config", write("data: {train_file: run.yaml}"), "--strict") == 0


def test_a_missing_data_file_is_a_warning_and_with_data_an_error(run: Terminal) -> None:
    config = write("data: {train_file: none.jsonl}")
    assert run("validate-config", config) == 0
    assert "none.jsonl does not exist" in run.out
    assert run("validate-config", config, "--data") == 2
    assert "--> run.yaml:1:20" in run.err
    assert run("validate-config", config, "--data", "--json") == 2
    assert json.loads(run.out)["errors"][0]["field"] == "data.train_file"


def test_set_overrides_and_is_named(run: Terminal) -> None:
    config = write("cpo: {beta: 0.2}")
    assert run("config", "show", config, "--set", "cpo.beta=0.5", "--json") == 0
    shown = json.loads(run.out)["cpo.beta"]
    assert shown["value"] == 0.5 and shown["origin"]["name"] == "--set cpo.beta"
    assert run("validate-config", config, "--set", "cpo.beta=x") == 2
    assert "--set cpo.beta" in run.err


def test_show_prints_values_and_origins(run: Terminal) -> None:
    assert run("config", "show", write("cpo: {beta: 0.2}\ndata: {prompt_column: سؤال}\n")) == 0
    assert "run.yaml:1:13" in run.out and "follows model.max_length" in run.out
    assert "سؤال" in run.out  # logical order
    assert run("config", "show") == 0
    assert "default" in run.out and "run.yaml" not in run.out


def test_show_tells_the_written_value_beside_the_resolved_one(run: Terminal) -> None:
    assert run("config", "show", write("cpo: {max_length: null}"), "--json") == 0
    shown = json.loads(run.out)["cpo.max_length"]
    assert (shown["value"], shown["written"]) == (2048, None)
    assert shown["origin"]["kind"] == "resolved"


def test_set_edits_a_file(run: Terminal) -> None:
    config = write("cpo:\n  beta: 0.2  # keep me\n")
    assert run("config", "set", config, "cpo.beta=0.5", "cpo.queue_size=99") == 0
    assert config.read_text() == "cpo:\n  beta: 0.5  # keep me\n  queue_size: 99\n"
    assert "has no effect" in run.out and "wrote run.yaml" in run.out
    assert run("config", "set", config, "cpo.beta=-5") == 2
    assert "0.5" in config.read_text()


def test_schema_is_json(run: Terminal) -> None:
    assert run("config", "schema") == 0
    assert json.loads(run.out)["properties"]["cpo"]


def test_init_lists_and_writes(run: Terminal) -> None:
    assert run("config", "init") == 0
    assert "quick" in run.out and "paper-cpo" in run.out
    assert run("config", "init", "simpo") == 0
    assert Path("paper-simpo.yaml").is_file() and Path("cpo-arabic.schema.json").is_file()
    assert run("validate-config", "paper-simpo.yaml") == 0
    assert run("config", "init", "simpo") == 2
    assert "exists already" in run.err
    assert run("config", "init", "simpo", "--force", "-o", "paper-simpo.yaml") == 0
    assert run("config", "init", "nothing") == 2


def test_help_teaches_and_version_is_told(run: Terminal) -> None:
    assert run("--help") == 0
    assert "validate-config" in run.out and "config init" in run.out
    assert run("validate-config", "--help") == 0
    assert "--strict" in run.out and "--set" in run.out
    assert run("--version") == 0
    assert run.out == f"cpo-arabic {__version__}\n"


@pytest.mark.parametrize("words", [[], ["validate-config"], ["nonsense"], ["config", "set", "x"]])
def test_wrong_use_exits_with_2(run: Terminal, words: list[str]) -> None:
    assert run(*words) == 2


def test_control_characters_are_escaped(run: Terminal) -> None:
    assert run("validate-config", write('cpo: {"be\\u202e\\u001bta": 1}')) == 2
    assert "\u202e" not in run.err and "\x1b" not in run.err and "\\u202e" in run.err


def test_the_package_s_other_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(DataError("rows.jsonl:3: no prompt"))
    assert capsys.readouterr().err == "error: rows.jsonl:3: no prompt\n"
