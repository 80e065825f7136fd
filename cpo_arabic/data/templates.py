"""Conversation templates: turns → prompt, completion text and the token that ends a turn.

A rendered prompt is a list of segments: an ``int`` is a control token that the *template* wrote, a
``str`` is text. Text is encoded with control tokens switched off, so whatever the data says,
``<|im_end|>`` for one, stays text. The template owns the special tokens: nothing is added to what
it renders, hence no doubled BOS or EOS.

| name | prompt | before the completion |
|---|---|---|
| ``default`` | the tokenizer's chat template, else ``plain`` | as the template says |
| ``chatml`` | ``<|im_start|>role\\n…<|im_end|>\\n`` a turn | ``<|im_start|>assistant\\n`` |
| ``plain`` | the turns, an empty line behind each | nothing |
| ``alpaca`` | ``### Instruction:`` / ``### Response:`` | nothing |
| ``translation`` | ``Translate this from … to …:``, by the text's script | a space |
| a path | the Jinja file, with the names a chat template has | as the template says |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cpo_arabic.data.schemas import Turn
from cpo_arabic.data.text import visible
from cpo_arabic.errors import DataError

Segment = str | int
Conversation = Sequence[Turn]

BUILT_IN = ("default", "chatml", "plain", "alpaca", "translation")

_BREAK = "\uf8fe"  # private use; stands inside a control token's text that came from data
_PROBE = "\uf8fdprobe\uf8fd"
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)


@dataclass(frozen=True)
class Template:
    """How one tokenizer's conversations are written."""

    name: str
    render: Callable[[Sequence[Conversation]], list[list[Segment]]]
    before: str  # stands in front of every completion and trains with it
    closing: tuple[int, ...]  # ends an uncut completion; empty without special tokens
    tail: tuple[Segment, ...]  # what the template puts behind the user's last words
    opening: tuple[int, ...]  # what it puts before everything (BOS), or nothing
    fingerprint: str  # equal for templates that render alike

    def completion(self, text: str) -> str:
        """The text that is tokenised for a completion."""
        return self.before + text


def load_template(name: str, tokenizer: Any, *, add_special_tokens: bool = True) -> Template:
    """Find the template a configuration names, for this tokenizer."""
    if name == "default":
        if getattr(tokenizer, "chat_template", None):
            return _jinja(name, None, tokenizer, add_special_tokens)
        return _plain_like("plain", tokenizer, add_special_tokens)
    if name == "chatml":
        return _chatml(tokenizer, add_special_tokens)
    if name in _WRITERS:
        return _plain_like(name, tokenizer, add_special_tokens)
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(
            f'conversation_template "{visible(name)}" is neither a template '
            f"({', '.join(BUILT_IN)}) nor a Jinja file that exists."
        )
    return _jinja(name, path.read_text(encoding="utf-8"), tokenizer, add_special_tokens)


def _fingerprint(*parts: object) -> str:
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _end_of_sequence(tokenizer: Any) -> tuple[int, ...]:
    """The tokenizer's EOS; a tokenizer without one cannot teach a model to stop."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no EOS token, so no completion could end; set eos_token in its "
            "folder, or data.add_special_tokens: false."
        )
    return (int(tokenizer.eos_token_id),)


def _beginning(tokenizer: Any) -> tuple[int, ...]:
    """BOS, where the tokenizer puts one before plain text."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("", add_special_tokens=True)["input_ids"] if bos is not None else []
    return (int(bos),) if ids and ids[0] == bos else ()


# --- templates written here ---------------------------------------------------------------------


def _plain(turns: Conversation) -> str:
    return "".join(f"{turn.content}\n\n" for turn in turns)


def _alpaca(turns: Conversation) -> str:
    heads = {"user": "### Instruction:\n", "assistant": "### Response:\n", "tool": "### Input:\n"}
    first = "" if turns[0].role == "system" else f"{_ALPACA}\n\n"
    body = "".join(f"{heads.get(turn.role, '')}{turn.content}\n\n" for turn in turns)
    return f"{first}{body}### Response:\n"


def _translation(turns: Conversation) -> str:
    system = "".join(f"{turn.content}\n\n" for turn in turns if turn.role == "system")
    text = turns[-1].content
    arabic = len(re.findall("[\u0600-\u06ff]", text)) > len(re.findall("[A-Za-z]", text))
    source, target = ("Arabic", "English") if arabic else ("English", "Arabic")
    return f"{system}Translate this from {source} to {target}:\n{source}: {text}\n{target}:"


# name → (writer, what stands before the completion, what stands behind the user's last words)
_WRITERS: dict[str, tuple[Callable[[Conversation], str], str, str]] = {
    "plain": (_plain, "", "\n\n"),
    "alpaca": (_alpaca, "", "\n\n### Response:\n"),
    "translation": (_translation, " ", "\nArabic:"),
}


def _plain_like(name: str, tokenizer: Any, add_special_tokens: bool) -> Template:
    writer, before, tail = _WRITERS[name]
    opening = _beginning(tokenizer) if add_special_tokens else ()
    closing = _end_of_sequence(tokenizer) if add_special_tokens else ()

    def render(conversations: Sequence[Conversation]) -> list[list[Segment]]:
        return [[*opening, writer(turns)] for turns in conversations]

    mark = _fingerprint(name, opening, closing)
    return Template(name, render, before, closing, (tail,), opening, mark)


def _chatml(tokenizer: Any, add_special_tokens: bool) -> Template:
    control = _Control(tokenizer)
    start, end = control.ids.get("<|im_start|>"), control.ids.get("<|im_end|>")
    if start is None or end is None:
        raise DataError(
            'conversation_template "chatml" needs <|im_start|> and <|im_end|> as special tokens, '
            'which this tokenizer lacks; use "plain", or a tokenizer of the Qwen family.'
        )

    def render(conversations: Sequence[Conversation]) -> list[list[Segment]]:
        return [
            [
                *(
                    part
                    for turn in turns
                    for part in (start, f"{turn.role}\n{turn.content}", end, "\n")
                ),
                start,
                "assistant\n",
            ]
            for turns in conversations
        ]

    closing = (end,) if add_special_tokens else ()
    tail = (end, "\n", start, "assistant\n")
    mark = _fingerprint("chatml", start, end, closing)
    return Template("chatml", render, "", closing, tail, (), mark)


# --- Jinja --------------------------------------------------------------------------------------


class _Control:
    """The special tokens of a tokenizer: find those a template wrote, disarm those in data."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder
        special = {token.content: index for index, token in added.items() if token.special}
        self.ids: dict[str, int] = special
        self._swallow = {
            index: (bool(token.lstrip), bool(token.rstrip))
            for index, token in added.items()
            if token.special and (token.lstrip or token.rstrip)
        }
        longest_first = sorted(special, key=len, reverse=True)
        choices = "|".join(re.escape(text) for text in longest_first)
        broken = "|".join(re.escape(text[:1] + _BREAK + text[1:]) for text in longest_first)
        self._find = re.compile(f"({choices})" if choices else "(?!)()")
        self._broken = re.compile(broken if broken else "(?!)")

    def disarm(self, text: str) -> str:
        """Break up what would read as a control token."""
        return self._find.sub(lambda match: match[0][:1] + _BREAK + match[0][1:], text)

    def restore(self, text: str) -> str:
        """Undo `disarm`."""
        if _BREAK not in text:
            return text
        return self._broken.sub(lambda match: match[0].replace(_BREAK, "", 1), text)

    def segments(self, rendered: str) -> list[Segment]:
        """Cut at the control tokens, which become ids, and restore the text between."""
        parts: list[Segment] = []
        for index, piece in enumerate(self._find.split(rendered)):
            if index % 2:
                parts.append(self.ids[piece])
            elif piece:
                parts.append(self.restore(piece))
        return self._strip(parts) if self._swallow else parts

    def _strip(self, parts: list[Segment]) -> list[Segment]:
        """Some control tokens swallow the white space beside them."""
        for index, part in enumerate(parts):
            left, right = self._swallow.get(part, (False, False)) if isinstance(part, int) else (
                False, False)  # fmt: skip
            before, after = index - 1, index + 1
            if left and before >= 0 and isinstance(text := parts[before], str):
                parts[before] = text.rstrip()
            if right and after < len(parts) and isinstance(text := parts[after], str):
                parts[after] = text.lstrip()
        return [part for part in parts if part != ""]


def _jinja(name: str, source: str | None, tokenizer: Any, add_special_tokens: bool) -> Template:
    """A chat template in Jinja: the tokenizer's own where ``source`` is None."""
    from jinja2 import TemplateError

    control = _Control(tokenizer)
    bos = tokenizer.bos_token_id

    def write(conversations: Sequence[Sequence[dict[str, str]]], generate: bool) -> list[str]:
        texts: list[str] = tokenizer.apply_chat_template(
            list(conversations),
            chat_template=source,
            tokenize=False,
            add_generation_prompt=generate,
        )
        return texts

    def render(conversations: Sequence[Conversation]) -> list[list[Segment]]:
        messages = [
            [{"role": turn.role, "content": control.disarm(turn.content)} for turn in turns]
            for turns in conversations
        ]
        try:
            texts = write(messages, True)
        except TemplateError as error:
            raise DataError(f'conversation_template "{name}" refuses a row: {error}.') from None
        segments = [control.segments(text) for text in texts]
        if not add_special_tokens:
            segments = [part[1:] if part[:1] == [bos] else part for part in segments]
        return segments

    try:
        before, ending, tail = _probe(write)
    except TemplateError as error:
        raise DataError(f'conversation_template "{name}" cannot be used: {error}.') from None
    controls = [part for part in control.segments(ending) if isinstance(part, int)]
    closing = tuple(controls[:1]) or _end_of_sequence(tokenizer)
    if not add_special_tokens:
        closing = ()
    first = render([[Turn("user", "؟")]])[0][:1]
    opening = (int(bos),) if bos is not None and first == [bos] else ()
    text = source if source is not None else tokenizer.chat_template
    mark = _fingerprint("jinja", str(text), sorted(control.ids.items()), closing, opening)
    tail_segments = tuple(control.segments(tail))
    if any(isinstance(part, int) for part in control.segments(before)):
        before = ""
    return Template(name, render, before, closing, tail_segments, opening, mark)


def _probe(
    write: Callable[[Sequence[Sequence[dict[str, str]]], bool], list[str]],
) -> tuple[str, str, str]:
    """Learn what a template puts before an answer, behind it, and behind the user's last words."""
    question = {"role": "user", "content": _PROBE}
    answer = {"role": "assistant", "content": _PROBE + _PROBE}
    prompt = write([[question]], True)[0]
    full = write([[question, answer]], False)[0]
    head, found, ending = full.partition(_PROBE + _PROBE)
    if _PROBE not in prompt or not found:
        raise DataError(
            "conversation_template does not write the messages' content; it must use "
            "messages[…]['content']."
        )
    before = head[len(prompt) :] if head.startswith(prompt) else ""
    return before, ending, prompt.rpartition(_PROBE)[2]
