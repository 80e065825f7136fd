"""Arabic text as data: equality, visible normalisation, and what is safe to print.

Nothing here changes a text unless it is asked to. Two texts are *equal* when their keys are, that
is after Unicode NFC and stripping; the texts themselves stay as they were written.
"""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b
from typing import Literal

Normalization = Literal["none", "nfc", "light"]

TATWEEL = "\u0640"
DIACRITICS = re.compile("[\u064b-\u0652\u0670\u0653-\u0655\u0610-\u061a\u06d6-\u06dc\u06df-\u06e8]")
"""Short vowels, tanwin, shadda, sukun, superscript alef, combining madda/hamza, Quranic marks."""

_INVISIBLE = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\u061c\u00ad]")
_SPACES = re.compile("[\u0009\u000b\u000c\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000 ]+")
_PRESENTATION = re.compile("[\ufb50-\ufdff\ufe70-\ufefc]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# C0 and C1 controls (a tab and a line end are shown as escapes too), bidirectional and zero-width
# controls, line and paragraph separators: what moves a terminal's cursor or reorders its line.
_UNSAFE = re.compile(
    "[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def canonical(text: str) -> str:
    """The form in which two texts are compared: NFC, without surrounding white space."""
    return unicodedata.normalize("NFC", text).strip()


def text_key(text: str) -> int:
    """A 63-bit hash of the canonical text: equal texts have equal keys, in any process."""
    digest = blake2b(canonical(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normalize(text: str, how: Normalization) -> str:
    """Normalise as the user asked.

    ``none`` returns the text. ``nfc`` composes. ``light`` composes, drops tatweel and invisible
    formatting characters, writes presentation forms as letters, and makes runs of blanks one
    space; letters, hamzas, diacritics, digits, punctuation and line breaks stay.
    """
    if how == "none":
        return text
    if how == "light":
        text = _PRESENTATION.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
        text = _INVISIBLE.sub("", text.replace(TATWEEL, ""))
        text = _SPACES.sub(" ", text)
    return unicodedata.normalize("NFC", text)


def has_lone_surrogate(text: str) -> bool:
    """True where the text cannot be written as UTF-8."""
    return _SURROGATE.search(text) is not None


def visible(text: str, limit: int = 80) -> str:
    r"""A text that is safe in a terminal or a log: controls as ``\u{…}``, long ones cut."""
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return _UNSAFE.sub(lambda match: f"\\u{{{ord(match[0]):04x}}}", shown)
