"""Columns and conventions → one draft of a preference: turns, chosen, negatives.

The configured columns come first and, where they were named by the user, alone. A row that lacks
the *documented default* columns is read by the convention its columns show (TRL,
UltraFeedback-binarized, Argilla, ms-swift, LLaMA-Factory, Anthropic's dialogues, scored lists); the
name of the convention is reported. A row that fits none is refused with the nearest one.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NoReturn

from cpo_arabic.data.text import visible


class RowError(ValueError):
    """Why a row is refused, without its place; the reader adds file and line."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation. Roles are system, user, assistant and tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Columns:
    """Names of the columns; the defaults are the documented ones."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str | None = "system"
    multiple_negatives: str | None = "negatives"
    hard_negatives: str | None = "hard_negatives"


@dataclass
class Draft:
    """What a row says, before texts are compared, normalised or refused."""

    turns: list[Turn]
    chosen: str
    easy: list[str] = field(default_factory=list)
    hard: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Schema:
    """A convention: which column holds what. ``chosen=None``: the prompt's last message is it."""

    name: str
    prompt: str | None
    chosen: str | None
    rejected: str | None
    input: str | None = None  # appended to the prompt, LLaMA-Factory's habit
    history: str | None = None  # pairs of earlier turns
    responses: str | None = None  # a list to be ranked by its scores


DEFAULTS = Columns()
PROMPTS = ("prompt", "instruction", "question", "query", "input")
RESPONSES = ("responses", "completions", "generations", "candidates")
SCORE_COLUMNS = ("scores", "ratings", "rewards")
SCORE_KEYS = ("overall_score", "score", "rating", "reward")
TEXT_KEYS = ("response", "content", "text", "completion")

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    "system": "system",
}
_DIALOGUE = re.compile(r"\n\n(Human|Assistant):")

# What the refusal of a row is measured against: name → needed columns.
_KNOWN = {
    "prompt, chosen, rejected": {"prompt", "chosen", "rejected"},
    "chosen, rejected as conversations": {"chosen", "rejected"},
    "Argilla": {"instruction", "chosen_response", "rejected_response"},
    "ms-swift": {"messages", "rejected_response"},
    "LLaMA-Factory (alpaca)": {"instruction", "chosen", "rejected"},
    "LLaMA-Factory (sharegpt)": {"conversations", "chosen", "rejected"},
    "scored list": {"prompt", "responses", "scores"},
}


def draft_row(values: Mapping[str, Any], columns: Columns) -> tuple[str, Draft]:
    """Read one row; give the convention's name and what the row says."""
    present = frozenset(name for name, value in values.items() if value is not None)
    schema = recognise(present, columns)
    if schema is None or (schema.prompt is None and _plain_pair(values, schema)):
        _refuse(values, columns)
    try:
        draft = _draft(values, schema)
        _add_system(draft, values, columns)
        _add_negatives(draft, values, columns)
    except RowError as error:
        raise RowError(f"{error}. Columns found: {_names(values)}") from None
    return schema.name, draft


@lru_cache(maxsize=1024)
def recognise(present: frozenset[str], columns: Columns) -> Schema | None:
    """Choose the schema by the columns that hold something."""
    named = columns.prompt, columns.chosen, columns.rejected
    if present.issuperset(named):
        ultra = "score_chosen" in present and named == ("prompt", "chosen", "rejected")
        name = "UltraFeedback-binarized" if ultra else ", ".join(named)
        return Schema(name, *named)
    if columns.prompt != DEFAULTS.prompt and columns.prompt not in present:
        return None
    if {columns.chosen, columns.rejected} <= present:
        return _chosen_without_prompt(present, columns)
    if (columns.chosen, columns.rejected) != (DEFAULTS.chosen, DEFAULTS.rejected):
        return None
    return _foreign(present)


def _chosen_without_prompt(present: frozenset[str], columns: Columns) -> Schema:
    """Chosen and rejected are there; the prompt is elsewhere."""
    chosen, rejected = columns.chosen, columns.rejected
    if "instruction" in present:
        name = "LLaMA-Factory (alpaca)"
        extra = "input" if "input" in present else None
        history = "history" if "history" in present else None
        return Schema(name, "instruction", chosen, rejected, input=extra, history=history)
    if "conversations" in present:
        return Schema("LLaMA-Factory (sharegpt)", "conversations", chosen, rejected)
    if "messages" in present:
        return Schema("messages, chosen, rejected", "messages", chosen, rejected)
    for name in PROMPTS:
        if name in present:
            return Schema(f"{name}, chosen, rejected", name, chosen, rejected)
    return Schema("implicit prompt", None, chosen, rejected)


def _foreign(present: frozenset[str]) -> Schema | None:
    """Neither chosen nor rejected under the documented name."""
    prompt = next((name for name in PROMPTS if name in present), None)
    for rejected in ("rejected_response", "rejected_messages"):
        if {"messages", rejected} <= present:
            return Schema("ms-swift", "messages", None, rejected)
    if {"query", "response", "rejected_response"} <= present:
        history = "history" if "history" in present else None
        return Schema("ms-swift", "query", "response", "rejected_response", history=history)
    if prompt and {"chosen_response", "rejected_response"} <= present:
        return Schema("Argilla", prompt, "chosen_response", "rejected_response")
    responses = next((name for name in RESPONSES if name in present), None)
    if prompt and responses and "rejected" not in present and "chosen" not in present:
        return Schema("scored list", prompt, None, None, responses=responses)
    return None


def _refuse(values: Mapping[str, Any], columns: Columns) -> NoReturn:
    """Name what is missing, what was found, and the nearest convention."""
    needed = [columns.prompt, columns.chosen, columns.rejected]
    found = _names(values)
    nulls = [name for name in needed if name in values and values[name] is None]
    if nulls:
        raise RowError(f'column "{nulls[0]}" is null. Columns found: {found}')
    lacking = [name for name in needed if name not in values]
    close = difflib.get_close_matches(lacking[0], list(values), n=1, cutoff=0.7)
    hint = f' Did you mean "{visible(close[0], 40)}"?' if close else ""
    present = {name for name, value in values.items() if value is not None}
    name, wanted = min(_KNOWN.items(), key=lambda item: len(item[1] - present) / len(item[1]))
    rest = ", ".join(sorted(wanted - present))
    nearest = f' Nearest schema: "{name}"' + (f", which also needs {rest}." if rest else ".")
    raise RowError(
        f"needs the column{'s' if len(lacking) > 1 else ''} "
        f"{', '.join(visible(name, 40) for name in lacking)}. Columns found: {found}."
        f"{hint}{nearest} Set data.prompt_column, data.chosen_column and data.rejected_column "
        f"to the names in the file"
    )


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(visible(name, 40) for name in values) or "none"


# --- one row ------------------------------------------------------------------------------------


def _draft(values: Mapping[str, Any], schema: Schema) -> Draft:
    if schema.responses is not None:
        return _scored(values, schema)
    turns = _prompt(values, schema)
    if schema.chosen is None:  # ms-swift: the conversation's last message is the chosen one
        *turns, last = turns
        if last.role != "assistant" or not turns:
            raise RowError('column "messages" must end with the assistant\'s chosen message')
        chosen = Answer(None, last.content)
    else:
        chosen = _answer(values[schema.chosen], schema.chosen)
    assert schema.rejected is not None
    rejected = _answers(values[schema.rejected], schema.rejected)
    if schema.prompt is None:
        return _implicit(chosen, rejected, schema)
    turns = _context(turns, chosen, schema.chosen or "messages")
    for answer in rejected:
        _context(turns, answer, schema.rejected)
    return Draft(_check(turns), chosen.text, [answer.text for answer in rejected])


@dataclass(frozen=True)
class Answer:
    """A completion, and the conversation that stood before it in the same cell, if any."""

    before: list[Turn] | None
    text: str


def _prompt(values: Mapping[str, Any], schema: Schema) -> list[Turn]:
    if schema.prompt is None:
        return []
    value = values[schema.prompt]
    turns: list[Turn] = []
    for pair in values[schema.history] if schema.history else ():
        if not (isinstance(pair, Sequence) and len(pair) == 2):
            raise RowError(f'column "{schema.history}" must hold pairs of question and answer')
        turns += [Turn("user", str(pair[0])), Turn("assistant", str(pair[1]))]
    if isinstance(value, str):
        extra = values.get(schema.input) if schema.input else None
        text = f"{value}\n{extra}" if isinstance(extra, str) and extra.strip() else value
        return [*turns, Turn("user", text)]
    return turns + _turns(value, schema.prompt)


def _turns(value: Any, column: str) -> list[Turn]:
    """A list of messages, by either spelling."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError(f'column "{column}" must be text or a list of messages, not {_kind(value)}')
    return [_turn(message, column) for message in value]


def _turn(message: Any, column: str) -> Turn:
    if not isinstance(message, Mapping):
        raise RowError(f'column "{column}": a message must be an object, not {_kind(message)}')
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = _parts(content, column)
    if not isinstance(role, str) or not isinstance(content, str):
        raise RowError(
            f'column "{column}": a message needs role and content (or from and value) as text'
        )
    if role.lower() not in _ROLES:
        raise RowError(
            f'column "{column}": unknown role "{visible(role, 40)}"; '
            f"known are {', '.join(sorted(_ROLES))}"
        )
    return Turn(_ROLES[role.lower()], content)


def _parts(parts: list[Any], column: str) -> str:
    """Content as a list of typed parts; only text trains."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise RowError(f'column "{column}": only text parts can be trained on')
        texts.append(part["text"])
    return "".join(texts)


def _answer(value: Any, column: str) -> Answer:
    """One completion: text, a message, or a conversation that ends with it."""
    if isinstance(value, str):
        return Answer(None, value)
    if not isinstance(value, list | Mapping):
        raise RowError(f'column "{column}" must be text or messages, not {_kind(value)}')
    *before, last = _turns(value, column)
    if last.role != "assistant":
        raise RowError(f'column "{column}": its last message is the {last.role}\'s, not an answer')
    return Answer(before or None, last.content)


def _answers(value: Any, column: str) -> list[Answer]:
    """One completion or a list of them."""
    if not isinstance(value, list):
        return [_answer(value, column)]
    if not value:
        raise RowError(f'column "{column}" is an empty list')
    if not all(isinstance(item, Mapping) for item in value):
        return [_answer(item, column) for item in value]
    roles = {_turn(item, column).role for item in value}
    if roles == {"assistant"}:  # several single answers, not one conversation
        return [_answer(item, column) for item in value]
    return [_answer(value, column)]


def _context(turns: list[Turn], answer: Answer, column: str) -> list[Turn]:
    """The prompt, checked against the conversation that a completion's own cell repeats."""
    if answer.before is None or answer.before == turns:
        return turns
    spoken = [turn for turn in turns if turn.role != "system"]
    repeated = [turn for turn in answer.before if turn.role != "system"]
    inside = len(spoken) == 1 and any(turn.content == spoken[0].content for turn in repeated)
    if repeated != spoken and not inside:
        raise RowError(f'column "{column}" holds a conversation that is not the prompt\'s')
    return answer.before if len(answer.before) >= len(turns) else turns


def _implicit(chosen: Answer, rejected: list[Answer], schema: Schema) -> Draft:
    """No prompt column: the leading turns that chosen and rejected share are the prompt."""
    if chosen.before is None and all(answer.before is None for answer in rejected):
        chosen, *rejected = (_dialogue(answer, schema) for answer in (chosen, *rejected))
    turns = chosen.before or []
    for answer in rejected:
        if (answer.before or []) != turns:
            raise RowError(
                f'columns "{schema.chosen}" and "{schema.rejected}" part before their last '
                f"answer, so they are not answers to one prompt"
            )
    return Draft(_check(turns), chosen.text, [answer.text for answer in rejected])


def _plain_pair(values: Mapping[str, Any], schema: Schema) -> bool:
    """Chosen is plain text without a prompt in it, so the prompt is missing."""
    if schema.chosen is None or schema.responses is not None:
        return False
    chosen = values[schema.chosen]
    return isinstance(chosen, str) and not _DIALOGUE.search("\n\n" + chosen)


def _dialogue(answer: Answer, schema: Schema) -> Answer:
    r"""Split ``\n\nHuman: …\n\nAssistant: …``."""
    pieces = _DIALOGUE.split("\n\n" + answer.text.lstrip("\n"))
    if len(pieces) < 5 or pieces[0].strip():
        raise RowError(
            f'"{schema.chosen}" and "{schema.rejected}" are not both dialogues of Human and '
            f"Assistant"
        )
    speakers = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(pieces[1::2], pieces[2::2], strict=True)
    *before, last = (Turn(speakers[who], text.strip()) for who, text in pairs)
    if last.role != "assistant":
        raise RowError("the dialogue does not end with the assistant's answer")
    return Answer(before, last.content)


def _scored(values: Mapping[str, Any], schema: Schema) -> Draft:
    """Several responses with scores: the best is chosen, the strictly worse are negatives."""
    assert schema.responses is not None
    responses = values[schema.responses]
    if not isinstance(responses, list) or len(responses) < 2:
        raise RowError(f'column "{schema.responses}" must list two responses or more')
    scores = next((values[name] for name in SCORE_COLUMNS if values.get(name)), None)
    if scores is None:
        scores = [_first(item, SCORE_KEYS) for item in responses]
    if not isinstance(scores, list) or len(scores) != len(responses):
        raise RowError(f'"{schema.responses}" and its scores differ in number')
    texts = [item if isinstance(item, str) else _first(item, TEXT_KEYS) for item in responses]
    if not all(isinstance(text, str) for text in texts):
        raise RowError(f'column "{schema.responses}": a response must be text')
    ranked = [(number, text) for text, score in zip(texts, scores, strict=True)
              if (number := _number(score)) is not None]  # fmt: skip
    ranked.sort(key=lambda item: -item[0])
    worse = [text for number, text in ranked if number < ranked[0][0]]
    if not worse:
        raise RowError(f'no response in "{schema.responses}" has a lower score than the best')
    return Draft(_check(_prompt(values, schema)), ranked[0][1], worse)


def _first(item: Any, keys: Sequence[str]) -> Any:
    return (
        next((item[key] for key in keys if key in item), None)
        if isinstance(item, Mapping)
        else None
    )


def _number(value: Any) -> float | None:
    """A score as a number; one that is absent or a word leaves its response out."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _check(turns: list[Turn]) -> list[Turn]:
    """A prompt asks something: its last turn is the user's, and a system turn is the first."""
    if not turns:
        raise RowError("the prompt is empty")
    if any(turn.role == "system" for turn in turns[1:]):
        raise RowError("a system message stands after the first place")
    if turns[-1].role not in ("user", "tool"):
        raise RowError(f"the prompt ends with the {turns[-1].role}'s turn, not the user's")
    return turns


def _add_system(draft: Draft, values: Mapping[str, Any], columns: Columns) -> None:
    text = values.get(columns.system) if columns.system else None
    if text is None:
        return
    if not isinstance(text, str):
        raise RowError(f'column "{columns.system}" must be text, not {_kind(text)}')
    if not text.strip():
        return
    if draft.turns[0].role == "system":
        if draft.turns[0].content != text:
            raise RowError(
                f'column "{columns.system}" and the conversation\'s own system message differ; '
                f"set data.system_column: null to keep the conversation's"
            )
        return
    draft.turns = [Turn("system", text), *draft.turns]


def _add_negatives(draft: Draft, values: Mapping[str, Any], columns: Columns) -> None:
    pools = (columns.multiple_negatives, draft.easy), (columns.hard_negatives, draft.hard)
    for name, pool in pools:
        value = values.get(name) if name else None
        if value is None:
            continue
        assert name is not None
        if not isinstance(value, list):
            raise RowError(f'column "{name}" must be a list of texts, not {_kind(value)}')
        for item in value:
            answer = _answer(item, name)
            pool.append(answer.text)


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", type(None): "null"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
