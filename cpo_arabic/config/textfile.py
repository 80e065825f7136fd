"""Reading a configuration file as text, with a clear refusal for everything that is none."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from cpo_arabic.config.characters import escaped, hidden_character
from cpo_arabic.errors import ConfigError, Problem

MAX_BYTES = 256 * 1024

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte-order mark; raises :class:`ConfigError`."""
    found = hidden_character(str(path))
    if found:
        raise _refused(
            path, f"the path holds the invisible or control character {found}", "retype it"
        )
    return _decode(path, _read_bytes(path))


def _read_bytes(path: Path) -> bytes:
    try:
        # Not blocking, so that a pipe without a writer cannot hold the program.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(path, _open_verdict(error), _open_remedy(path, error)) from None
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_BYTES:
        raise _refused(path, f"is larger than {MAX_BYTES // 1024} KiB", "is it a data file?")
    return data


def _check_kind(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise _refused(path, "is a directory", "name the YAML file in it")
    if not stat.S_ISREG(mode):
        raise _refused(path, "is not a regular file", "name a YAML file")


def _decode(path: Path, data: bytes) -> str:
    if data.startswith(_UTF16):
        raise _refused(path, "is UTF-16 (byte-order mark at byte 0)", "save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise _refused(
            path, f"is not UTF-8: byte 0x{data[offset]:02x} at offset {offset}", "save it as UTF-8"
        ) from None
    for index, char in enumerate(text):
        if (char < " " and char not in "\n\r\t") or char == "\x7f":
            line = text.count("\n", 0, index) + 1
            raise _refused(
                path, f"holds the control character U+{ord(char):04X} in line {line}", "remove it"
            )
    return text


def _open_verdict(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "does not exist"
    return f"cannot be read: {error.strerror}"


def _open_remedy(path: Path, error: OSError) -> str:
    if error.errno != errno.ENOENT:
        return "check the path and its permissions"
    near = _neighbours(path)
    if near:
        return f"did you mean {near[0]}?"
    return "check the path; `cpo-arabic config init quick` writes a file to start from"


def _neighbours(path: Path) -> list[str]:
    from difflib import get_close_matches

    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
    return [
        escaped(str(path.parent / name))
        for name in get_close_matches(path.name, names, n=1, cutoff=0.6)
    ]


def _refused(path: Path, rule: str, remedy: str) -> ConfigError:
    return ConfigError([Problem(rule=rule, remedy=remedy, source=escaped(str(path)))])
