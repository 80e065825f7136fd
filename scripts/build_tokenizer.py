"""Make a small Qwen tokenizer: the real byte-pair ranks, trimmed to what a text uses.

The ranks are Qwen's own (`qwen.tiktoken`, which the PyPI package `dashscope` carries under
Apache-2.0). Kept are the 256 single bytes, every token that the full tokenizer uses at least
`--min-count` times on the text, a short list of characters and words that must stay cheap, the
first merges of all (Latin letter groups, so that Latin text is not spelt byte by byte), and the
intermediate tokens that the merges of all of these pass through. The result has Qwen2's layout
(`tokenizer.json`, `tokenizer_config.json`) and the three ChatML control tokens at the end.

    python scripts/build_tokenizer.py --ranks path/to/qwen.tiktoken \\
        --text path/to/text.txt --out path/to/folder
"""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from cpo_arabic.data.byte_pairs import PATTERN, Ranks, bpe, byte_alphabet, merge_pair, read_ranks

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

ARABIC_LETTERS = "ءآأؤإئابةتثجحخدذرزسشصضطظعغفقكلمنهوىيٱپچڤگیک"
ARABIC_MARKS = "ًٌٍَُِّْٰـ"
ARABIC_PUNCTUATION = "،؛؟٪«»“”‘’…–—"
DIGITS = "0123456789٠١٢٣٤٥٦٧٨٩"
LATIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASCII_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[]_"
WORDS = ("system", "user", "assistant", "\n", "\n\n", ".\n", "؟\n", " .", " ،", " ؟")


def count_tokens(ranks: Ranks, lines: Iterable[str]) -> Counter[bytes]:
    """Count the tokens of the full vocabulary over the lines, NFC first, as Qwen does."""
    split = Split(Regex(PATTERN), behavior="isolated")
    words: Counter[str] = Counter()
    for line in lines:
        text = unicodedata.normalize("NFC", line)
        words.update(piece for piece, _ in split.pre_tokenize_str(text))
    counts: Counter[bytes] = Counter()
    for word, times in words.items():
        for token in bpe(ranks, word.encode("utf-8")):
            counts[token] += times
    return counts


def required_pieces() -> list[str]:
    """Characters and words that must not cost more tokens than in the full tokenizer."""
    letters = ARABIC_LETTERS + LATIN
    single = letters + ARABIC_MARKS + ARABIC_PUNCTUATION + DIGITS + ASCII_PUNCTUATION
    spaced = letters + ARABIC_PUNCTUATION + ASCII_PUNCTUATION
    return [*single, *(" " + char for char in spaced), *WORDS]


def close_under_merges(ranks: Ranks, wanted: Iterable[bytes]) -> dict[bytes, tuple[bytes, bytes]]:
    """Map each multi-byte token that is needed to its merge pair, intermediate ones included."""
    pairs: dict[bytes, tuple[bytes, bytes]] = {}
    todo = [token for token in wanted if len(token) > 1]
    while todo:
        token = todo.pop()
        if token in pairs:
            continue
        pairs[token] = merge_pair(ranks, token)
        todo.extend(part for part in pairs[token] if len(part) > 1)
    return pairs


def tokenizer_json(ranks: Ranks, pairs: Mapping[bytes, tuple[bytes, bytes]]) -> dict[str, Any]:
    """Lay the trimmed vocabulary out as Qwen2's `tokenizer.json`; ids follow the ranks."""
    alphabet = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    kept = sorted((bytes([b]) for b in range(256)), key=ranks.__getitem__)
    merged = sorted(pairs, key=ranks.__getitem__)
    vocab = {spell(token): i for i, token in enumerate([*kept, *merged])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(vocab) + i, "content": token, **added, "special": True}
            for i, token in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**byte_level, "use_regex": False},
            ],
        },
        "post_processor": {**byte_level, "use_regex": False},
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[spell(part) for part in pairs[token]] for token in merged],
        },
    }


def tokenizer_config(first_special: int, max_length: int) -> dict[str, Any]:
    """Give the settings that make transformers load the folder as a Qwen2 tokenizer."""
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(first_special + i): {"content": token, **added, "special": True}
            for i, token in enumerate(SPECIAL_TOKENS)
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_json(path: Path, content: Mapping[str, Any], indent: int | None) -> None:
    """Write JSON as UTF-8 with a final newline."""
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    path.write_text(text + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=Path, required=True, help="Qwen's qwen.tiktoken")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to count over")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--min-count", type=int, default=3, help="least uses of a kept token")
    parser.add_argument("--first-merges", type=int, default=800, help="merges kept in any case")
    parser.add_argument("--max-length", type=int, default=1024, help="model_max_length")
    return parser.parse_args()


def main() -> None:
    """Build the tokenizer and say how large it is."""
    arguments = parse_arguments()
    ranks = read_ranks(arguments.ranks)
    with arguments.text.open(encoding="utf-8") as lines:
        counts = count_tokens(ranks, lines)
    used = {token for token, times in counts.items() if times >= arguments.min_count}
    required = set(count_tokens(ranks, required_pieces()))
    first = {token for token, rank in ranks.items() if rank < 256 + arguments.first_merges}
    pairs = close_under_merges(ranks, used | required | first)
    layout = tokenizer_json(ranks, pairs)
    vocab_size = len(layout["model"]["vocab"])

    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "tokenizer.json", layout, indent=None)
    config = tokenizer_config(vocab_size, arguments.max_length)
    write_json(arguments.out / "tokenizer_config.json", config, indent=2)
    print(
        f"{vocab_size + len(SPECIAL_TOKENS)} ids: 256 bytes, {len(pairs)} merges "
        f"({len(used)} tokens used {arguments.min_count} times or more, "
        f"{len(required)} required), {len(SPECIAL_TOKENS)} control tokens"
    )


if __name__ == "__main__":
    main()
