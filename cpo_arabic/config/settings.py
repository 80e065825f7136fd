"""One value with where it came from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cpo_arabic.config.document import Node, Source
from cpo_arabic.errors import Problem

OriginKind = Literal["default", "file", "dotenv", "environment", "flag", "resolved"]


@dataclass(frozen=True)
class Origin:
    """Where a value came from."""

    kind: OriginKind
    file: str | None = None
    line: int | None = None
    column: int | None = None
    name: str | None = None
    """The variable or the flag; for ``resolved``, the formula it follows."""

    def __str__(self) -> str:
        if self.kind == "file":
            return f"{self.file}:{self.line}:{self.column}"
        if self.kind == "dotenv":
            return f"{self.name} in {self.file}:{self.line}"
        if self.kind == "environment":
            return f"environment variable {self.name}"
        if self.kind == "flag":
            return str(self.name)
        if self.kind == "resolved":
            return f"follows {self.name}"
        return "default"


DEFAULT = Origin("default")


@dataclass(frozen=True)
class Setting:
    """A value that some source gives to a field, not yet checked."""

    path: str
    value: Any
    written: str
    origin: Origin
    excerpt: str | None = None
    width: int = 1

    def locate(self, problem: Problem) -> Problem:
        """The problem, pointing at this setting."""
        in_file = self.origin.kind == "file"
        return replace(
            problem,
            field=problem.field or self.path,
            source=str(self.origin.file) if in_file else str(self.origin),
            line=self.origin.line if in_file else None,
            column=self.origin.column if in_file else None,
            excerpt=self.excerpt,
            width=self.width,
        )


@dataclass
class Collected:
    """What the sources gave, in order of rising precedence, and what was wrong with them."""

    settings: dict[str, Setting] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, setting: Setting) -> None:
        """Let a setting take the place of an earlier one; an option joins its siblings."""
        section, name, *inner = setting.path.split(".")
        path = f"{section}.{name}"
        if not inner:
            self.settings[path] = setting
            return
        before = self.settings.get(path)
        options = dict(before.value) if before and isinstance(before.value, dict) else {}
        options[".".join(inner)] = setting.value
        self.settings[path] = replace(setting, path=path, value=options)


def from_node(path: str, node: Node) -> Setting:
    """The setting that a value of a file makes."""
    line, column, excerpt = node.source.locate(node.start)
    origin = Origin("file", file=node.source.name, line=line, column=column)
    width = max(1, min(node.end - node.start, len(excerpt) - column + 1))
    return Setting(path, node.value(), node.written(), origin, excerpt, width)


def from_text(path: str, text: str, origin: Origin) -> Setting:
    """The setting that a flag or a variable makes; raises ConfigError when it is no YAML value."""
    from cpo_arabic.config.document import parse
    from cpo_arabic.config.fields import all_fields
    from cpo_arabic.config.problems import as_written

    known = all_fields().get(".".join(path.split(".")[:2]))
    shown = as_written(text, key=path)
    takes_text = known is not None and str in known.kinds and not path.count(".") > 1
    if known is not None and takes_text and text.lstrip()[:1] not in ("[", "{", '"', "'"):
        unset = known.nullable and text.strip() in ("null", "~")
        return Setting(path, None if unset else text, shown, origin)
    if not text.strip():
        return Setting(path, text, shown, origin)
    node = parse(Source(str(origin), text, is_file=False))
    return Setting(path, node.value(), shown, origin)
