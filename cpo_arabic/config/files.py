"""Configuration files: sections and fields by position, and ``extends``."""

from __future__ import annotations

from pathlib import Path

from cpo_arabic.config.characters import escaped, shortened
from cpo_arabic.config.document import Node, Source, parse
from cpo_arabic.config.fields import SECTIONS, all_fields, closest, did_you_mean, suggest_path
from cpo_arabic.config.settings import Collected, from_node
from cpo_arabic.config.textfile import read_text
from cpo_arabic.errors import ConfigError, Problem

EXTENDS = "extends"
MAX_FILES = 16


def collect_file(path: Path, collected: Collected) -> None:
    """Add a file's settings, those of the files it extends first."""
    _collect(path, (), collected)


def _collect(path: Path, parents: tuple[Path, ...], collected: Collected) -> None:
    root = parse(Source(escaped(str(path)), read_text(path)))
    if root.kind != "mapping":
        raise ConfigError([_root_problem(root)])
    here = (*parents, path.resolve())
    for key, value in root.pairs():
        if key.text == EXTENDS:
            for base in _bases(value, path, here, collected):
                _collect(base, here, collected)
    for key, value in root.pairs():
        if key.text != EXTENDS:
            _collect_section(key, value, collected)


def _bases(value: Node, path: Path, here: tuple[Path, ...], collected: Collected) -> list[Path]:
    nodes = value.items if value.kind == "list" else [value]
    bases = []
    for node in nodes:
        if node.kind != "scalar" or not isinstance(node.value(), str):
            collected.problems.append(
                node.problem(f"extends: {node.written()} is no path", "write the path of a file")
            )
            continue
        base = path.parent / node.text
        if base.resolve() in here:
            raise ConfigError(
                [node.problem(f"extends: {node.written()} builds on itself", "break the circle")]
            )
        if len(here) >= MAX_FILES:
            raise ConfigError([node.problem(f"extends: more than {MAX_FILES} deep", "shorten it")])
        _check_readable(base, node)
        bases.append(base)
    return bases


def _check_readable(base: Path, node: Node) -> None:
    try:
        read_text(base)
    except ConfigError as error:
        cause = error.problems[0]
        raise ConfigError(
            [node.problem(f"extends: {cause.source} {cause.rule}", cause.remedy)]
        ) from None


def _collect_section(key: Node, value: Node, collected: Collected) -> None:
    section = key.text
    if section not in SECTIONS:
        collected.problems.append(_unknown_section(key))
    elif value.kind == "mapping":
        for name, node in value.pairs():
            _collect_field(section, name, node, collected)
    elif value.kind != "scalar" or value.value() is not None:
        collected.problems.append(
            value.problem(
                f"{section}: {value.written()} is no section",
                "put its fields below it, indented by two spaces",
            )
        )


def _collect_field(section: str, name: Node, value: Node, collected: Collected) -> None:
    path = f"{section}.{name.text}"
    if path not in all_fields():
        remedy = did_you_mean(suggest_path(path)) or "`cpo-arabic config show` lists all fields"
        problem = name.problem(f"{shortened(path)}: there is no such field", remedy)
        collected.problems.append(problem)
        return
    collected.add(from_node(path, value))


def _unknown_section(key: Node) -> Problem:
    name = shortened(key.text)
    homes = [path for path in all_fields() if path.endswith(f".{key.text}")]
    near = closest(key.text, [*SECTIONS, EXTENDS])
    if homes and not near:
        return key.problem(
            f"{name}: there is no such section", f"{did_you_mean(homes)} (it goes in its section)"
        )
    remedy = did_you_mean(near) or f"the sections are {', '.join(SECTIONS)}"
    return key.problem(f"{name}: there is no such section", remedy)


def _root_problem(root: Node) -> Problem:
    if root.kind == "scalar" and root.value() is None:
        return root.source.problem(
            "the file is empty", "`cpo-arabic config init` writes a commented file to start from", 0
        )
    what = "a list" if root.kind == "list" else "plain text"
    return root.source.problem(
        f"the file holds {what}, not sections",
        f"write sections at the left margin: {', '.join(SECTIONS)}",
        root.start,
    )
