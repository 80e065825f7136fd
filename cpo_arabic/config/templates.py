"""The shipped configuration files: one copy, in ``configs/``, carried into the wheel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpo_arabic.config.characters import shortened
from cpo_arabic.config.fields import closest, did_you_mean
from cpo_arabic.config.schema import FILE_NAME, schema_text
from cpo_arabic.config.writing import write_text
from cpo_arabic.errors import ConfigError, Problem

MODELINE = "# yaml-language-server: $schema="


@dataclass(frozen=True)
class Template:
    """A shipped file."""

    name: str
    """``quick``, ``paper-cpo``, ``overlay-memory``."""
    path: Path

    @property
    def summary(self) -> str:
        """Its first comment."""
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return next((line[2:] for line in lines if line[:2] == "# " and MODELINE not in line), "")


def template_folder() -> Path:
    """Where the shipped files are: in the installed package, else in the working tree."""
    installed = Path(__file__).parent / "shipped"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def templates() -> dict[str, Template]:
    """All shipped files by name."""
    root = template_folder()
    found = {}
    for path in [*sorted(root.glob("*.yaml")), *sorted(root.glob("*/*.yaml"))]:
        folder = path.parent.name
        name = path.stem if path.parent == root else f"{folder.rstrip('s')}-{path.stem}"
        found[name] = Template(name, path)
    return found


def template(name: str) -> Template:
    """The file of that name; ``cpo`` finds ``paper-cpo``, ``memory`` finds ``overlay-memory``."""
    known = templates()
    for candidate in (name, f"paper-{name}", f"overlay-{name}"):
        if candidate in known:
            return known[candidate]
    near = did_you_mean(closest(name, list(known))) or f"there are: {', '.join(known)}"
    raise ConfigError(f"there is no template {shortened(name)}; {near}")


def starting_text(chosen: Template) -> str:
    """The text for a user's own folder, where the schema lies beside it."""
    lines = chosen.path.read_text(encoding="utf-8").split("\n")
    return "\n".join(
        f"{MODELINE}{FILE_NAME}" if line.startswith(MODELINE) else line for line in lines
    )


def write_start(chosen: Template, target: Path, *, force: bool = False) -> list[Path]:
    """Write a template and the schema beside it; an existing file is kept unless ``force``."""
    if target.exists() and not force:
        raise ConfigError(
            [
                Problem(
                    rule="exists already",
                    remedy="name another with --output, or replace it with --force",
                    source=shortened(str(target)),
                )
            ]
        )
    schema = target.parent / FILE_NAME
    write_text(target, starting_text(chosen))
    write_text(schema, schema_text())
    return [target, schema]
