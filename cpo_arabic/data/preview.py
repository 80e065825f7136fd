"""One row as the model will see it: which tokens are prompt, which train, which are cut."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cpo_arabic.data.encoding import Budgets, RowEncoder, TextEncoder, cut_completion
from cpo_arabic.data.records import PreferenceRecord
from cpo_arabic.data.templates import Template
from cpo_arabic.data.text import text_key, visible

Kind = Literal["prompt", "trains", "cut"]


@dataclass(frozen=True)
class Piece:
    """Tokens that spell whole characters together; mostly one."""

    text: str
    ids: tuple[int, ...]
    kind: Kind
    control: bool


@dataclass(frozen=True)
class Passage:
    """The prompt, or one completion."""

    label: str
    pieces: tuple[Piece, ...]
    kept: int
    whole: int  # tokens before the cut
    ends: bool  # closes with the token that ends a turn


@dataclass(frozen=True)
class Preview:
    """One group of one epoch."""

    place: str
    prompt: Passage
    completions: tuple[Passage, ...]

    def as_data(self) -> dict[str, Any]:
        """The preview as plain data."""
        return asdict(self)


def preview_group(
    record: PreferenceRecord,
    drawn: Sequence[tuple[str, str]],
    tokenizer: Any,
    template: Template,
    budgets: Budgets,
) -> Preview:
    """Lay a row out; ``drawn`` are (label, text) of its negatives in the order of the draw."""
    encoder = TextEncoder.from_json(tokenizer.backend_tokenizer.to_str())
    rows = RowEncoder(encoder, budgets, template.opening, template.tail, template.closing)
    control = set(tokenizer.all_special_ids)

    def pieces(ids: Sequence[int], kind: Kind) -> list[Piece]:
        return _pieces(ids, kind, tokenizer, control)

    ids = encoder.segments(template.render([record.turns])[0])
    start, stop, end = rows.prompt_cut(ids)
    shown = pieces(ids[:start], "prompt") + pieces(ids[start:stop], "cut") + pieces(end, "prompt")
    prompt = Passage("prompt", tuple(shown), start + len(end), len(ids), False)

    budget = budgets.completion(prompt.kept)
    passages = []
    for label, text in (("chosen", record.chosen), *drawn):
        whole = encoder(template.completion(text)) + list(template.closing)
        kept = cut_completion(whole, budget, len(template.closing))
        passages.append(
            Passage(
                label,
                (*pieces(kept, "trains"), *pieces(whole[len(kept) :], "cut")),
                len(kept),
                len(whole),
                bool(template.closing) and len(kept) == len(whole),
            )
        )
    return Preview(record.place, prompt, tuple(passages))


def label_of(record: PreferenceRecord, key: int) -> tuple[str, str]:
    """Which of a record's completions a hash names, with its text."""
    for number, text in enumerate(record.completions):
        if text_key(text) == key:
            if number == 0:
                return "chosen", text
            kind = "easy" if number <= len(record.easy_negatives) else "hard"
            return f"{kind} negative", text
    raise KeyError(key)


def _pieces(ids: Sequence[int], kind: Kind, tokenizer: Any, control: set[int]) -> list[Piece]:
    """Join tokens until they decode to whole characters (a letter may be two tokens)."""
    found: list[Piece] = []
    held: list[int] = []
    for position, token in enumerate(ids):
        held.append(token)
        text = tokenizer.decode(held, clean_up_tokenization_spaces=False)
        if "\ufffd" in text and len(held) < 8 and position + 1 < len(ids):
            continue
        found.append(Piece(text, tuple(held), kind, token in control))
        held = []
    return found


# --- HTML ---------------------------------------------------------------------------------------

_STYLE = """
body { font: 16px/1.9 system-ui, "Noto Naskh Arabic", "DejaVu Sans", sans-serif;
       margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1c2530; background: #fff; }
h1 { font-size: 1.2rem; } h2 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
small { color: #5a6675; font-weight: normal; }
.text { border: 1px solid #d5dbe3; border-radius: 8px; padding: .6rem .9rem;
        white-space: pre-wrap; overflow-wrap: anywhere;
        unicode-bidi: plaintext; text-align: start; }
.prompt { background: #e8edf3; } .prompt:nth-child(even) { background: #d9e1ea; }
.trains { background: #d6f0dc; } .trains:nth-child(even) { background: #bde4c7; }
.cut { color: #9a2b2b; background: #f7e3e3; text-decoration: line-through; }
.control { font: .8em monospace; color: #44208a; unicode-bidi: isolate; direction: ltr;
           border: 1px solid currentColor; border-radius: 4px; }
"""


def as_html(preview: Preview) -> str:
    """A page by itself: every text escaped, every paragraph with its own direction."""
    passages = "\n".join(map(_passage, (preview.prompt, *preview.completions)))
    place = html.escape(visible(preview.place, 300))
    return (
        '<!doctype html>\n<html lang="ar">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{place}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1 dir="auto">{place}</h1>\n'
        '<p><span class="prompt">prompt</span> <span class="trains">trains</span> '
        '<span class="cut">cut</span> <span class="control">control token</span>; '
        "hover over a token to see its id</p>\n"
        f"{passages}\n</body>\n</html>\n"
    )


def _passage(passage: Passage) -> str:
    cut = passage.whole - passage.kept
    note = f"{passage.kept} tokens" + (f", {cut} cut" if cut else "")
    spans = "".join(_span(piece) for piece in passage.pieces)
    return (
        f"<h2>{html.escape(passage.label)} <small>{note}</small></h2>\n"
        f'<div class="text" dir="auto">{spans}</div>'
    )


def _span(piece: Piece) -> str:
    classes = f"{piece.kind} control" if piece.control else piece.kind
    ids = " ".join(map(str, piece.ids))
    tag = "bdi" if piece.control else "span"  # what finds a paragraph's direction skips a bdi
    return f'<{tag} class="{classes}" title="{ids}">{html.escape(shown(piece.text))}</{tag}>'


def shown(text: str) -> str:
    """A token's text with its line ends marked and its invisible characters written out."""
    lines = [visible(line, len(line)) for line in text.split("\n")]
    return "⏎\n".join(lines)
