"""Credentials: found in values, and hidden wherever a value is echoed."""

from __future__ import annotations

import re

HIDDEN = "[hidden]"

_KEY_WORDS = r"api[-_]?key|access[-_]?key|secret|passw(?:or)?d|credential|(?:^|[-_.])token$|auth"
_KEY = re.compile(_KEY_WORDS, re.IGNORECASE)
_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bsk-[A-Za-z0-9_-]{16,}"  # OpenAI and look-alikes
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}"  # GitHub
    r"|\bwandb_v\d+_[A-Za-z0-9_]{16,}"  # Weights & Biases
    r"|(?<=://)[^/\s@:]+(?::[^/\s@]*)?(?=@)"  # user:password@ of a URL
)
_KEYED_LINE = re.compile(r"""(?P<key>[\w.-]+)["']?\s*[:=]\s*(?=(?P<value>\S.*))""")


def is_secret_key(key: str) -> bool:
    """Whether a key is named as one that holds a credential."""
    return bool(_KEY.search(key))


def holds_secret(text: str) -> bool:
    """Whether a text holds something shaped like a credential."""
    return bool(_VALUE.search(text))


def without_secrets(text: str, key: str = "") -> str:
    """``text`` with credentials hidden: all of it when ``key`` names a credential."""
    if key and is_secret_key(key):
        return HIDDEN
    return _VALUE.sub(HIDDEN, text)


def line_without_secrets(line: str) -> str:
    """A line of a file with the values of credential-like keys hidden, its length kept."""

    def stars(match: re.Match[str]) -> str:
        return "*" * len(match.group())

    for match in reversed(list(_KEYED_LINE.finditer(line))):
        if is_secret_key(match["key"]):
            start, end = match.span("value")
            line = line[:start] + "*" * (end - start) + line[end:]
    return _VALUE.sub(stars, line)
