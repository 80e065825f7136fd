"""Changing values in a file: only the value's own characters change."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from cpo_arabic.config import ConfigError, load_config
from cpo_arabic.config import editing as room
from cpo_arabic.config.editing import edited, set_values
from cpo_arabic.config.fields import all_fields
from cpo_arabic.config.templates import templates
from cpo_arabic.config.writing import yaml_value

TEXT = """\
# تعليق في الأول
cpo:   # the losses
  beta: 0.1   # scale
  temperature: '0.1x'

  margin: >-
    folded
# last
training: {batch_size: 2, seed: 1}   # flow
data:
logging: null
"""


@pytest.mark.parametrize(
    ("path", "value", "lines"),
    [
        ("cpo.beta", "0.25", ["-  beta: 0.1   # scale", "+  beta: 0.25   # scale"]),
        ("cpo.temperature", "0.2", ["-  temperature: '0.1x'", "+  temperature: 0.2"]),
        ("cpo.margin", "0.2", ["-  margin: >-", "-    folded", "+  margin: 0.2"]),
        ("cpo.alpha", "0.0", ["+  alpha: 0.0"]),
        (
            "training.seed",
            "77",
            [
                "-training: {batch_size: 2, seed: 1}   # flow",
                "+training: {batch_size: 2, seed: 77}   # flow",
            ],
        ),
        (
            "training.max_steps",
            "3",
            [
                "-training: {batch_size: 2, seed: 1}   # flow",
                "+training: {batch_size: 2, seed: 1, max_steps: 3}   # flow",
            ],
        ),
        ("data.max_samples", "3", ["+  max_samples: 3"]),
        ("logging.use_wandb", "true", ["-logging: null", "+logging:", "+  use_wandb: true"]),
        ("model.name", "x", ["+", "+model:", "+  name: x"]),
    ],
)
def test_an_edit_changes_its_own_lines_only(path: str, value: str, lines: list[str]) -> None:
    after = edited(TEXT, [(path, value)], "x")
    changed = [
        line
        for line in difflib.unified_diff(TEXT.splitlines(), after.splitlines(), n=0, lineterm="")
        if not line.startswith(("---", "+++", "@@"))
    ]
    assert changed == lines


def test_edits_in_a_row_keep_crlf_and_a_missing_last_newline() -> None:
    after = edited("cpo:\r\n  beta: 0.1", [("cpo.beta", "1.0"), ("cpo.alpha", "0")], "x")
    assert after == "cpo:\r\n  beta: 1.0\r\n  alpha: 0\r\n"


def test_a_value_that_is_missing_after_its_key_is_filled_in() -> None:
    assert edited("cpo:\n  max_length:\n", [("cpo.max_length", "9")], "x") == (
        "cpo:\n  max_length: 9\n"
    )


def test_flow_mappings_without_members_and_at_the_root() -> None:
    assert edited("{cpo: {}}\n", [("cpo.beta", "1")], "x") == "{cpo: {beta: 1}}\n"
    assert edited("{cpo: {beta: 1}}", [("data.padding", "packed")], "x") == (
        "{cpo: {beta: 1}, data: {padding: packed}}"
    )
    assert edited("{}", [("data.padding", "packed")], "x") == "{data: {padding: packed}}"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("cpo: {temperature: &t 0.1, contrastive_temperature: *t}", "cpo.temperature"),
        ("cpo: {temperature: &t 0.1, contrastive_temperature: *t}", "cpo.contrastive_temperature"),
        ("cpo: &c {beta: 0.1}\ndata: *c\n", "data.beta"),
        ("cpo: &c {beta: 0.1}\ndata: *c\n", "cpo.beta"),
        ("cpo:\n  beta: 0.2\n...\n", "model.name"),
    ],
)
def test_what_an_edit_would_break_is_refused(text: str, path: str) -> None:
    with pytest.raises(ConfigError, match=r"anchor or alias|remove that line"):
        edited(text, [(path, "0.3")], "x")


def test_setting_values_writes_a_legal_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("\ufeffcpo:  # نص\r\n  beta: 0.1\r\n".encode())
    loaded = set_values(path, ["cpo.beta=0.3", "data.train_file=[a b.jsonl, ج.jsonl]"])
    assert loaded.config.cpo.beta == 0.3
    assert loaded.config.data.train_file == ["a b.jsonl", "ج.jsonl"]
    assert path.read_bytes().startswith("\ufeffcpo:  # نص\r\n  beta: 0.3\r\n".encode())


@pytest.mark.parametrize(
    "assignments",
    [["cpo.beta=-1"], ["cpo.betta=1"], ["cpo.max_length=9999"], ["cpo.model_init_kwargs.a=1"]],
)
def test_an_illegal_result_is_refused_and_nothing_is_written(
    tmp_path: Path, assignments: list[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("cpo:\n  margin: 0.1\n")
    with pytest.raises(ConfigError):
        set_values(path, assignments)
    assert path.read_text() == "cpo:\n  margin: 0.1\n"


@pytest.mark.parametrize("wrong", ["cpo: {beta: 9, margin: 0.1}", "cpo: {", "cpo: {beta: 0.3}"])
def test_an_edit_that_would_change_more_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("cpo: {margin: 0.1}")
    monkeypatch.setattr(room, "edited", lambda *_: wrong)
    with pytest.raises(ConfigError, match="by hand"):
        set_values(path, ["cpo.beta=0.3"])
    assert path.read_text() == "cpo: {margin: 0.1}"


@pytest.mark.parametrize("layout", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("path", list(all_fields()))
def test_any_field_can_be_set_in_any_layout(tmp_path: Path, path: str, layout: int) -> None:
    section, _, name = path.partition(".")
    default = yaml_value(all_fields()[path].default)
    text = [
        "{}",
        f"{section}:",
        f"{section}: {{{name}: {default}}}\n",
        f"{section}:\n    # before\n    {name}:   {default}   # after\n\n\n# end",
        f"{section}:  # nothing yet\n  # {name}: {default}\n",
        f'"{section}": {{\n  "{name}":\n    {default}\n}}\n',
    ][layout]
    file = tmp_path / "a.yaml"
    file.write_text(text)
    set_values(file, [f"{path}={default}"])
    loaded = load_config(file, environ={}, env_file=None)
    assert loaded.written.get(path) == all_fields()[path].default


@pytest.mark.parametrize("name", templates())
def test_every_shipped_file_can_be_edited(tmp_path: Path, name: str) -> None:
    text = templates()[name].path.read_text(encoding="utf-8")
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    set_values(path, ["training.learning_rate=2e-6", "data.max_samples=9", "model.revision=main"])
    loaded = load_config(path, environ={}, env_file=None)
    assert loaded.config.training.learning_rate == 2e-6
    assert loaded.config.data.max_samples == 9
    comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert all(comment in path.read_text(encoding="utf-8") for comment in comments)
