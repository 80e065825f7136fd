"""Characters that are dangerous to echo: controls, bidirectional marks, zero-width characters."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # part of ordinary spelling in some languages
_VISIBLE = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u08e2"  # format characters that print


def hidden_character(text: str, *, allow_joiners: bool = False) -> str | None:
    """The first control or invisible format character of ``text`` as ``U+XXXX NAME``, if any."""
    for char in text:
        if _is_hidden(char) and not (allow_joiners and char in _JOINERS):
            return f"U+{ord(char):04X} {unicodedata.name(char, 'CONTROL')}"
    return None


def escaped(text: str) -> str:
    """``text`` with everything that does not print written as an escape; all else as it is."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _VISIBLE else escape(c) for c in text)


def escape(char: str) -> str:
    """A character as YAML, Python and a reader write it: ``\\u202e``."""
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"


def shortened(text: str, limit: int = 80) -> str:
    """``text`` escaped and cut to ``limit`` characters."""
    cut = text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
    return escaped(cut)


def _is_hidden(char: str) -> bool:
    return char not in _VISIBLE and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
