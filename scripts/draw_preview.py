"""Draw the preview of one row as a picture for the docs: docs/preview.png.

    python scripts/draw_preview.py CONFIG --row 3 --out docs/preview.png

Tokens are shaded boxes behind one shaped line, so Arabic letters join as they do on a page. Needs
Pillow with raqm (its wheels have it) and matplotlib's DejaVu Sans.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, features

from cpo_arabic.cli.data import run_preview
from cpo_arabic.config import load_config
from cpo_arabic.data.preview import Passage, Piece, Preview, shown

WIDTH, MARGIN, LINE, SIZE = 1100, 28, 44, 24
SHADES = {
    "prompt": ("#e8edf3", "#d3dce7"),
    "trains": ("#d6f0dc", "#b4dfc0"),
    "cut": ("#f7e3e3", "#efcaca"),
}
INK, CONTROL_INK, NOTE_INK = "#1c2530", "#44208a", "#5a6675"
ARABIC = re.compile("[\u0600-\u06ff]")

FONT = ImageFont.truetype(
    str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"),
    SIZE,
    layout_engine=ImageFont.Layout.RAQM,
)

Shaded = tuple[Piece, int]  # a piece and its place, which picks its shade


def width(text: str, rtl: bool | None = None) -> float:
    """Width of a text, in its own direction unless said."""
    rtl = bool(ARABIC.search(text)) if rtl is None else rtl
    return FONT.getlength(text, direction="rtl" if rtl else "ltr")


def lines_of(passage: Passage) -> Iterator[list[Shaded]]:
    """Break at line ends, and between tokens where a line is full."""
    line: list[Shaded] = []
    used = 0.0
    for number, piece in enumerate(passage.pieces):
        label = shown(piece.text).rstrip("\n")
        size = width(label)
        starts_word = label.startswith(" ") or piece.control
        if line and used + size > WIDTH - 2 * MARGIN - 40 and starts_word:
            yield line
            line, used = [], 0.0
        line.append((Piece(label, piece.ids, piece.kind, piece.control), number))
        used += size
        if "\n" in piece.text:
            yield line
            line, used = [], 0.0
    if line:
        yield line


def draw_line(canvas: ImageDraw.ImageDraw, top: int, line: Sequence[Shaded]) -> None:
    """Runs of text from the line's own side; a control token is a run by itself."""
    rtl = any(ARABIC.search(piece.text) for piece, _ in line)
    x = float(WIDTH - MARGIN if rtl else MARGIN)
    runs = groupby(line, key=lambda item: (item[0].control, item[1] if item[0].control else -1))
    for (control, _), group in runs:
        pieces = list(group)
        text = "".join(piece.text for piece, _ in pieces)
        size = width(text)
        left = x - size if rtl else x
        own_rtl = bool(ARABIC.search(text))
        at = 0
        for piece, number in pieces:
            start = width(text[:at], own_rtl)
            at += len(piece.text)
            end = max(start, width(text[:at], own_rtl))
            box = (
                (left + size - end, left + size - start) if own_rtl else (left + start, left + end)
            )
            shade = SHADES[piece.kind][number % 2]
            canvas.rectangle((box[0], top + 3, box[1], top + LINE - 5), fill=shade)
        ink = CONTROL_INK if control else INK
        direction = "rtl" if own_rtl else "ltr"
        canvas.text((left, top + 7), text, font=FONT, fill=ink, direction=direction)
        x = left if rtl else left + size


def draw(preview: Preview, out: Path) -> None:
    """One picture, as tall as its lines."""
    rows: list[str | list[Shaded]] = []
    for passage in (preview.prompt, *preview.completions):
        cut = passage.whole - passage.kept
        rows.append(f"{passage.label}: {passage.kept} tokens" + (f", {cut} cut" if cut else ""))
        rows += lines_of(passage)
    image = Image.new("RGB", (WIDTH, 2 * MARGIN + LINE * len(rows)), "white")
    canvas = ImageDraw.Draw(image)
    for index, row in enumerate(rows):
        top = MARGIN + index * LINE
        if isinstance(row, str):
            canvas.text((MARGIN, top + 12), row, font=FONT.font_variant(size=18), fill=NOTE_INK)
        else:
            draw_line(canvas, top, row)
    image.save(out, optimize=True)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--row", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/preview.png"))
    options = parser.parse_args()
    if not features.check("raqm"):
        parser.error("this Pillow has no raqm, so it cannot join Arabic letters")
    config = load_config(options.config).config
    draw(run_preview(config, row=options.row, split="train", epoch=0), options.out)


if __name__ == "__main__":
    main()
