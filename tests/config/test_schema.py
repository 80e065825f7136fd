"""The JSON Schema: current, valid by its draft, and in agreement with the loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from cpo_arabic.config import ConfigError, load_config
from cpo_arabic.config.fields import all_fields
from cpo_arabic.config.schema import FILE_NAME, json_schema, schema_text
from cpo_arabic.config.templates import template_folder, templates


def validator() -> Any:
    return jsonschema.Draft202012Validator(json_schema())


def test_it_is_valid_by_its_own_draft() -> None:
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    jsonschema.Draft202012Validator.check_schema(schema)


def test_the_shipped_copy_is_current() -> None:
    """`cpo-arabic config schema > configs/cpo-arabic.schema.json` makes it so."""
    assert (template_folder() / FILE_NAME).read_text(encoding="utf-8") == schema_text()


def test_every_field_has_description_and_default() -> None:
    definitions = json_schema()["$defs"]
    by_section = {
        name: definitions[section["anyOf"][0]["$ref"].rpartition("/")[2]]["properties"]
        for name, section in json_schema()["properties"].items()
        if name != "extends"
    }
    for field in all_fields().values():
        entry = by_section[field.section][field.name]
        assert entry["description"] == field.description
        assert entry["default"] == field.default
        if field.choices:
            assert list(field.choices) == entry["enum"]


@pytest.mark.parametrize("name", templates())
def test_shipped_files_fit_it_and_name_it(name: str) -> None:
    path = templates()[name].path
    text = path.read_text(encoding="utf-8")
    assert list(validator().iter_errors(YAML(typ="safe", pure=True).load(text))) == []
    line = text.splitlines()[0]
    assert line.startswith("# yaml-language-server: $schema=")
    assert (path.parent / line.partition("$schema=")[2]).resolve() == template_folder() / FILE_NAME


@pytest.mark.parametrize(
    "document",
    [
        {"cpo": {"betta": 1}},
        {"cpo": {"beta": -1}},
        {"cpo": {"beta": "0.1"}},
        {"cpo": {"beta": True}},
        {"cpo": {"num_negatives": 1.5}},
        {"cpo": {"loss_type": "dpo"}},
        {"data": {"train_file": 3}},
        {"data": {"train_file": {"a": 0}}},
        {"data": {"validation_split_percentage": 5}},
        {"model": {"max_length": None}},
        {"modle": {}},
        {"extends": 3},
    ],
)
def test_editor_and_loader_refuse_the_same(tmp_path: Path, document: dict[str, Any]) -> None:
    assert list(validator().iter_errors(document))
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError):
        load_config(path, environ={}, env_file=None)


@pytest.mark.parametrize(
    "document",
    [
        {"cpo": None},
        {"cpo": {"max_length": None, "projection_dim": None, "beta": 1}},
        {"optimization": {"lora_alpha": None, "quantization_bits": 8}},
        {"data": {"train_file": ["a"], "max_samples": None}},
    ],
)
def test_editor_and_loader_accept_the_same(tmp_path: Path, document: dict[str, Any]) -> None:
    assert list(validator().iter_errors(document)) == []
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps(document))
    load_config(path, environ={}, env_file=None)
