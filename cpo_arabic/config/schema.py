"""JSON Schema (draft 2020-12) of a configuration file, for editors."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from cpo_arabic.config.root import CPOConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FILE_NAME = "cpo-arabic.schema.json"

_EXTENDS = {
    "description": "File or files this one builds on, relative to it; a later one wins.",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}},
    ],
}


def json_schema() -> dict[str, Any]:
    """The schema, with descriptions, ranges, choices and defaults."""
    made = TypeAdapter(CPOConfig).json_schema(schema_generator=_FileSchema)
    sections = {
        name: {
            "description": CPOConfig.model_fields[name].description,
            "anyOf": [{"$ref": section["$ref"]}, {"type": "null"}],
        }
        for name, section in made["properties"].items()
    }
    return {
        "$schema": DIALECT,
        "title": "Configuration of cpo-arabic",
        "description": "One run: model, training, data, losses, optimization, logging.",
        "type": "object",
        "additionalProperties": False,
        "properties": {"extends": _EXTENDS, **sections},
        "$defs": made["$defs"],
    }


def schema_text() -> str:
    """The schema as the text of a file."""
    return json.dumps(json_schema(), ensure_ascii=False, indent=2) + "\n"


class _FileSchema(GenerateJsonSchema):
    """Says what a file may hold: finite numbers within the documented ranges."""

    ignored_warning_kinds = {"non-serializable-default"}  # noqa: RUF012  (pydantic's own form)
