"""Rendered rows → token ids within their budgets. Runs in worker processes: light imports only.

A prompt and each of its completions are encoded apart and joined, so the prompt's ids are the same
before every sibling, and the same that generation sees. Unicode composition cannot cross that seam
either; where it would (a completion that opens with a combining mark right behind a letter), the
row is counted.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from cpo_arabic.data.byte_pairs import PATTERN
from cpo_arabic.data.text import text_key

Segment = str | int
TruncationMode = Literal["keep_end", "keep_start"]

_SPACES = re.compile(r"\s ")  # a run of white space is one word, or the next one's end


@dataclass(frozen=True)
class Budgets:
    """Tokens a sequence, its prompt and each completion (EOS included) may have."""

    max_length: int
    max_prompt_length: int
    max_target_length: int
    truncation_mode: TruncationMode = "keep_end"
    truncation: bool = True

    def completion(self, prompt_tokens: int) -> int:
        """What a prompt of that many tokens leaves to each completion."""
        return min(self.max_target_length, self.max_length - prompt_tokens)


@dataclass(frozen=True)
class RenderedRow:
    """What a worker needs of a record."""

    prompt: list[Segment]
    prompt_text: str
    completions: list[str]  # as the template writes them
    texts: Sequence[str]  # as the data has them
    easy: int  # how many of texts[1:] are easy negatives; the rest are hard


@dataclass
class EncodedRow:
    """One record as token ids, cut to its budgets."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    prompt_key: int
    completion_keys: list[int]
    easy: int
    prompt_tokens: int  # before the cut
    completion_tokens: list[int]  # before the cut
    prompt_cut: bool
    cut: list[bool]
    alike: int  # negatives dropped because the cut made them equal to a sibling
    open_seam: bool
    refusal: str | None = None


@lru_cache(maxsize=2)
def _backend(description: str) -> Any:
    """A copy of a fast tokenizer, without truncation, padding and control tokens in text."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(description)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


@dataclass
class TextEncoder:
    """Text → ids with control tokens switched off. ``backend`` is a `tokenizers.Tokenizer`.

    With ``by_words`` a text is encoded word by word, each one once: words come again, and looking
    one up takes a tenth of the time. Only for a tokenizer whose words stand alone.
    """

    backend: Any
    by_words: bool = False
    _known: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, description: str) -> TextEncoder:
        """Rebuild a fast tokenizer from its own JSON."""
        return cls(_backend(description), words_stand_alone(description))

    def __call__(self, text: str) -> list[int]:
        """Encode one text."""
        if not self.by_words or _SPACES.search(text):
            return self._encode(text)
        first, *words = text.split(" ")
        ids = list(self._remembered(first))
        for word in words:
            ids += self._remembered(" " + word)
        return ids

    def segments(self, parts: Sequence[Segment]) -> list[int]:
        """Encode a rendered prompt. Short parts are the template's own and come again."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self(part) if len(part) > 16 else self._remembered(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        # The batch call is the one that computes no offsets, a sixth of the time.
        ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _remembered(self, text: str) -> list[int]:
        ids = self._known.get(text)
        if ids is None:
            ids = self._encode(text)
            if len(text) <= 32:
                if len(self._known) >= 100_000:
                    self._known.clear()
                self._known[text] = ids
        return ids


def words_stand_alone(description: str) -> bool:
    """Whether a tokenizer's ids before a space never depend on what follows, nor the other way.

    True of every Qwen tokenizer: its pattern takes a space only as a word's first character or in
    a run of white space, byte pairs never leave a word, and nothing composes with a space. Added
    tokens that hold or swallow white space would break it.
    """
    parts = json.loads(description)
    split, *rest = (parts["pre_tokenizer"] or {}).get("pretokenizers", [None])
    qwen = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return (
        split == qwen
        and [(part["type"], part["use_regex"]) for part in rest] == [("ByteLevel", False)]
        and not rest[0]["add_prefix_space"]
        and parts["model"]["type"] == "BPE"
        and not parts["model"]["dropout"]
        and (parts["normalizer"] or {"type": "NFC"}) == {"type": "NFC"}
        and not any(
            " " in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]
            for token in parts["added_tokens"]
            if not token["special"]
        )
    )


@dataclass(frozen=True)
class RowEncoder:
    """Everything a row's encoding depends on; picklable through its parts."""

    encoder: TextEncoder
    budgets: Budgets
    opening: tuple[int, ...]
    tail: tuple[Segment, ...]
    closing: tuple[int, ...]

    def __call__(self, row: RenderedRow) -> EncodedRow:
        """Encode one record."""
        full_prompt = self.encoder.segments(row.prompt)
        prompt = self._cut_prompt(full_prompt)
        budget = self.budgets.completion(len(prompt))
        whole = [self.encoder(text) + list(self.closing) for text in row.completions]
        keys = [text_key(text) for text in row.texts]
        encoded = EncodedRow(
            prompt_ids=prompt,
            completion_ids=[],
            prompt_key=text_key(row.prompt_text),
            completion_keys=[],
            easy=0,
            prompt_tokens=len(full_prompt),
            completion_tokens=[],
            prompt_cut=len(full_prompt) > self.budgets.max_prompt_length,
            cut=[],
            alike=0,
            open_seam=_open_seam(row),
        )
        encoded.refusal = self._refusal(encoded, whole, budget)
        if encoded.refusal is None:
            self._add_completions(encoded, whole, keys, row.easy, budget)
            if len(encoded.completion_ids) < 2:
                encoded.refusal = (
                    f"chosen and every negative are equal in the {budget} tokens they may have; "
                    f"raise cpo.max_target_length"
                )
        return encoded

    def prompt(self, rendered: Sequence[Segment]) -> list[int]:
        """A rendered prompt's ids within their budget, as training and generation see them."""
        return self._cut_prompt(self.encoder.segments(rendered))

    def _refusal(self, encoded: EncodedRow, whole: list[list[int]], budget: int) -> str | None:
        if not encoded.prompt_ids:
            return "the prompt has no token"
        if budget < 1:
            return (
                f"its prompt of {len(encoded.prompt_ids)} tokens leaves a completion no token of "
                f"cpo.max_length {self.budgets.max_length}; lower cpo.max_prompt_length"
            )
        if any(len(ids) <= len(self.closing) for ids in whole):
            return "a completion has no token"
        if self.budgets.truncation:
            return None
        if encoded.prompt_cut:
            return (
                f"its prompt has {encoded.prompt_tokens} tokens, cpo.max_prompt_length is "
                f"{self.budgets.max_prompt_length} and data.truncation is false"
            )
        longest = max(len(ids) for ids in whole)
        if longest > budget:
            return (
                f"a completion has {longest} tokens, its budget is {budget} and data.truncation "
                f"is false"
            )
        return None

    def _add_completions(
        self,
        encoded: EncodedRow,
        whole: list[list[int]],
        keys: list[int],
        easy: int,
        budget: int,
    ) -> None:
        """Cut each completion by itself; drop a negative that the cut made equal to a sibling."""
        seen: set[tuple[int, ...]] = set()
        for number, (ids, key) in enumerate(zip(whole, keys, strict=True)):
            kept = cut_completion(ids, budget, len(self.closing))
            mark = tuple(kept)
            if mark in seen:
                encoded.alike += 1
                continue
            seen.add(mark)
            encoded.completion_ids.append(kept)
            encoded.completion_keys.append(key)
            encoded.completion_tokens.append(len(ids))
            encoded.cut.append(len(ids) > budget)
            encoded.easy += 1 <= number <= easy

    def _cut_prompt(self, ids: list[int]) -> list[int]:
        start, _, end = self.prompt_cut(ids)
        return ids[:start] + end

    def prompt_cut(self, ids: list[int]) -> tuple[int, int, list[int]]:
        """Where a long prompt is cut, [start, stop), and the tokens behind the cut.

        ``keep_end`` keeps the last tokens (behind BOS, where there is one). ``keep_start`` keeps
        the first ones and the template's tail, without which no answer would begin.
        """
        limit = self.budgets.max_prompt_length
        if len(ids) <= limit:
            return len(ids), len(ids), []
        opening = len(self.opening)
        if self.budgets.truncation_mode == "keep_end":
            room = limit - opening
            if room < 1:
                return 0, len(ids) - limit, ids[-limit:]
            return opening, len(ids) - room, ids[-room:]
        tail = self.encoder.segments(self.tail)
        if limit - len(tail) < 1:
            return limit, len(ids), []
        return limit - len(tail), len(ids) - len(tail), tail


def cut_completion(ids: list[int], budget: int, closing: int) -> list[int]:
    """Cut at the end. A completion that is cut has lost its EOS: the text does not end there."""
    if len(ids) <= budget:
        return ids
    return ids[: min(budget, len(ids) - closing)]


def _open_seam(row: RenderedRow) -> bool:
    """True where NFC of the joined text differs from the parts' own NFC."""
    last = row.prompt[-1] if row.prompt else ""
    if isinstance(last, int) or not last:
        return False
    if last[-1].isspace():  # nothing composes with white space
        return False
    left = unicodedata.normalize("NFC", last[-8:])
    for text in row.completions:
        right = unicodedata.normalize("NFC", text[:8])
        if unicodedata.normalize("NFC", left + right) != left + right:
            return True
    return False
