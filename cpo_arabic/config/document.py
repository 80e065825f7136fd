"""A YAML 1.2 document as a tree that keeps the position of every value.

The tree is built from ruamel's events with a stack of our own, so depth, size and aliases are
bounded, and plain scalars follow the YAML 1.2 core schema and nothing older: ``1e-6`` is a number;
``no``, ``010`` and ``1:30`` are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StringMark, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from cpo_arabic.config.characters import shortened
from cpo_arabic.config.secrets import line_without_secrets
from cpo_arabic.errors import ConfigError, Problem

MAX_DEPTH = 16
MAX_NODES = 5_000
MAX_DIGITS = 40

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOLEAN = {
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_RADIX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")


@dataclass(frozen=True)
class Source:
    """A text that is parsed, and how to point into it."""

    name: str
    """File name, variable or flag, as shown in messages."""
    text: str
    is_file: bool = True

    def problem(self, rule: str, remedy: str, at: int, end: int | None = None) -> Problem:
        """A problem at a character of the text; only files have lines and columns."""
        if not self.is_file:
            return Problem(rule=rule, remedy=remedy, source=self.name)
        line, column, excerpt = self.locate(at)
        width = max(1, min((end or at + 1) - at, len(excerpt) - column + 1))
        return Problem(
            rule=rule,
            remedy=remedy,
            source=self.name,
            line=line,
            column=column,
            excerpt=excerpt,
            width=width,
        )

    def locate(self, at: int) -> tuple[int, int, str]:
        """Line and column, both from 1, and the line itself, safe to print."""
        start = self.text.rfind("\n", 0, at) + 1
        stop = self.text.find("\n", at)
        line = self.text[start : len(self.text) if stop < 0 else stop].rstrip("\r")
        shown = "".join(char if char.isprintable() else "·" for char in line_without_secrets(line))
        return self.text.count("\n", 0, at) + 1, at - start + 1, shown[:200]


@dataclass
class Node:
    """A value of the document: scalar, list or mapping, with where it stands."""

    kind: str
    start: int
    end: int
    source: Source
    text: str = ""
    plain: bool = False
    flow: bool = False
    anchored: bool = False
    """Whether an alias may stand for it elsewhere."""
    size: int = 1
    items: list[Node] = field(default_factory=list)
    """The members of a list; keys and values in turn of a mapping."""

    def pairs(self) -> Iterator[tuple[Node, Node]]:
        """Keys and values of a mapping."""
        return zip(self.items[::2], self.items[1::2], strict=True)

    def written(self) -> str:
        """The value as it stands in the text."""
        text = self.source.text[self.start : self.end].strip() or "null"
        return shortened("\n".join(map(line_without_secrets, text.split("\n"))))

    def problem(self, rule: str, remedy: str) -> Problem:
        """A problem at this value."""
        return self.source.problem(rule, remedy, self.start, self.end)

    def value(self) -> Any:
        """The plain Python value."""
        if self.kind == "scalar":
            return self._scalar()
        if self.kind == "list":
            return [item.value() for item in self.items]
        return {self.key_text(key): value.value() for key, value in self.pairs()}

    def key_text(self, key: Node) -> str:
        """A key as text; keys are always read as text."""
        return key.text

    def _scalar(self) -> Any:
        return plain_scalar(self.text) if self.plain else self.text


def plain_scalar(text: str) -> Any:
    """Resolve an unquoted scalar by the YAML 1.2 core schema; an older notation stays text."""
    if text in _NULL:
        return None
    if text in _BOOLEAN:
        return _BOOLEAN[text]
    if len(text) > MAX_DIGITS:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _RADIX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text) and not _LEADING_ZERO.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def parse(source: Source) -> Node:
    """Parse a text that holds exactly one value; raises :class:`ConfigError`."""
    builder = _Builder(source)
    try:
        for event in YAML(typ="safe", pure=True).parse(source.text):
            builder.take(event)
    except MarkedYAMLError as error:
        raise ConfigError([_syntax_problem(error, source)]) from None
    except (YAMLError, ValueError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = shortened(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise ConfigError([source.problem(f"not valid YAML: {reason}", "", 0)]) from None
    return builder.finish()


def _syntax_problem(error: MarkedYAMLError, source: Source) -> Problem:
    mark = error.problem_mark or error.context_mark
    what = " ".join(part for part in (error.context, error.problem) if part)
    at = min(mark.index if isinstance(mark, StringMark) else 0, len(source.text))
    return source.problem(f"not valid YAML: {shortened(what, 160)}", _syntax_remedy(source, at), at)


def _syntax_remedy(source: Source, at: int) -> str:
    if "\t" in source.text[max(0, at - 1) : at + 1]:
        return "indent with spaces; YAML allows no tabs there"
    return "check the indentation, colons and quotes here; text with ': ' or '#' needs quotes"


class _Builder:
    """Builds the tree from events."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.open: list[Node] = []
        self.root: Node | None = None
        self.documents = 0
        self.nodes = 0
        self.anchors: dict[str, Node] = {}

    def take(self, event: Event) -> None:
        """Add one event to the tree."""
        if isinstance(event, DocumentStartEvent):
            self._document(event)
        elif isinstance(event, AliasEvent):
            self._add(self._alias(event))
        elif isinstance(event, ScalarEvent):
            self._add(self._scalar(event))
        elif isinstance(event, MappingStartEvent | SequenceStartEvent):
            self._start(event)
        elif isinstance(event, MappingEndEvent | SequenceEndEvent):
            self._end(event)

    def finish(self) -> Node:
        """The finished tree."""
        if self.root is None:
            raise ConfigError([self.source.problem("the file is empty", _EMPTY_REMEDY, 0)])
        return self.root

    def _document(self, event: DocumentStartEvent) -> None:
        self.documents += 1
        at = event.start_mark.index
        if self.documents > 1:
            raise self._refused("a second document starts here", "keep one document per file", at)
        if event.version or event.tags:
            raise self._refused(
                "YAML directives are not read", "remove the line; files are YAML 1.2", at
            )

    def _scalar(self, event: ScalarEvent) -> Node:
        node = self._node("scalar", event)
        node.text = event.value
        node.plain = event.implicit[0] and not event.style
        if node.plain and len(node.text) > MAX_DIGITS and re.fullmatch(r"[-+]?[\d_]+", node.text):
            digits = f"a number of {len(node.text)} digits"
            raise self._refused(digits + " is refused", "write a shorter number", node.start)
        return node

    def _start(self, event: MappingStartEvent | SequenceStartEvent) -> None:
        node = self._node("mapping" if isinstance(event, MappingStartEvent) else "list", event)
        node.flow = bool(event.flow_style)
        if len(self.open) >= MAX_DEPTH:
            raise self._refused(
                f"nested deeper than {MAX_DEPTH} levels", "a configuration is 2 deep", node.start
            )
        self.open.append(node)

    def _end(self, event: MappingEndEvent | SequenceEndEvent) -> None:
        node = self.open.pop()
        node.end = event.end_mark.index
        node.size = 1 + sum(item.size for item in node.items)
        if node.kind == "mapping":
            self._check_keys(node)
        self._add(node)

    def _add(self, node: Node) -> None:
        if self.open:
            self.open[-1].items.append(node)
        else:
            self.root = node

    def _node(self, kind: str, event: Any) -> Node:
        at = event.start_mark.index
        self._count(1, at)
        if event.tag is not None:
            raise self._refused(
                f"the tag {shortened(str(event.tag))} is refused: a configuration is plain data",
                "remove the tag; quote the value if it is meant as text",
                at,
            )
        node = Node(kind, at, event.end_mark.index, self.source)
        if event.anchor is not None:
            node.anchored = True
            self.anchors[event.anchor] = node
        return node

    def _alias(self, event: AliasEvent) -> Node:
        at = event.start_mark.index
        node = self.anchors.get(event.anchor)
        name = shortened(event.anchor)
        if node is None:
            raise self._refused(f"the alias *{name} has no anchor", f"define &{name} first", at)
        if any(node is parent for parent in self.open):
            raise self._refused(f"the alias *{name} refers to itself", "write the value out", at)
        self._count(node.size, at)
        return node

    def _count(self, size: int, at: int) -> None:
        self.nodes += size
        if self.nodes > MAX_NODES:
            raise self._refused(
                f"more than {MAX_NODES} values, aliases expanded",
                "a configuration has about a hundred",
                at,
            )

    def _check_keys(self, node: Node) -> None:
        seen: dict[str, Node] = {}
        for key, _ in node.pairs():
            if key.kind != "scalar":
                raise self._refused(
                    "a key must be text", "write one name before the colon", key.start
                )
            if key.plain and key.text == "<<":
                raise self._refused(
                    "merge keys are not part of YAML 1.2",
                    "use `extends: other.yaml` at the top to build on another file",
                    key.start,
                )
            if key.text in seen:
                first = self.source.locate(seen[key.text].start)[0]
                raise self._refused(
                    f"the key {shortened(key.text)} is given twice, first in line {first}",
                    "keep one of the two lines",
                    key.start,
                    key.end,
                )
            seen[key.text] = key

    def _refused(self, rule: str, remedy: str, at: int, end: int | None = None) -> ConfigError:
        return ConfigError([self.source.problem(rule, remedy, at, end)])


_EMPTY_REMEDY = "`cpo-arabic config init` writes a commented file to start from"
