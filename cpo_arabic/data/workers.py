"""What a tokenising worker process runs. Light imports, so that it starts in a moment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_arabic.data.encoding import EncodedRow, RenderedRow, RowEncoder, TextEncoder
from cpo_arabic.data.store import to_batch

Place = tuple[str, int]


@dataclass(frozen=True)
class Part:
    """Rows on their way to a worker, each with its file and line."""

    rows: list[RenderedRow]
    places: list[Place]


@dataclass(frozen=True)
class Encoded:
    """Rows on their way back: an Arrow batch, counts for the report, and refusals."""

    batch: bytes
    counts: dict[str, int]
    refused: list[tuple[Place, str]]


_worker: list[RowEncoder] = []  # this process's encoder, where it is a worker


def start_worker(tokenizer: Path, arguments: tuple[Any, ...]) -> None:
    """Build this process's encoder from a tokenizer's JSON file."""
    description = tokenizer.read_text(encoding="utf-8")
    _worker[:] = [RowEncoder(TextEncoder.from_json(description), *arguments)]


def work_on(part: Part) -> Encoded:
    """Encode a part in a worker."""
    return encode_part(_worker[0], part)


def encode_part(encode: RowEncoder, part: Part) -> Encoded:
    """Encode a part with the encoder given."""
    kept: list[EncodedRow] = []
    places: list[tuple[str, int]] = []
    refused = []
    for row, place in zip(part.rows, part.places, strict=True):
        encoded = encode(row)
        if encoded.refusal is not None:
            refused.append((place, encoded.refusal))
            continue
        kept.append(encoded)
        places.append(place)
    counts = {
        "rows": len(kept),
        "completions": sum(len(row.completion_ids) for row in kept),
        "prompts_truncated": sum(row.prompt_cut for row in kept),
        "completions_cut": sum(sum(row.cut) for row in kept),
        "chosen_cut": sum(row.cut[0] for row in kept),
        "negatives_alike_after_cut": sum(row.alike for row in kept),
        "open_seams": sum(row.open_seam for row in kept),
    }
    batch = to_batch(kept, places).serialize().to_pybytes()
    return Encoded(batch, counts, refused)
