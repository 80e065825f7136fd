"""Pre-train a toy Qwen2 language model from scratch on one text file, on a CPU.

The text holds one sentence a line, in any order. A part of the sentences, drawn by the seed, is
held out. The others are shuffled anew in every epoch and joined into documents of several
sentences; a modest share becomes ChatML conversations built from the same sentences, so that the
control tokens are trained as well.

    python scripts/pretrain_base.py train --text path/to/text.txt \\
        --tokenizer path/to/folder --out path/to/folder --steps 2600
    python scripts/pretrain_base.py measure --text path/to/text.txt --model path/to/folder
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

BIDI_CONTROLS = dict.fromkeys([0x200E, 0x200F, *range(0x202A, 0x202F), 0x200B, 0xFEFF])
SYSTEM_PROMPTS = (
    "أنت مساعد يجيب باللغة العربية.",
    "أجب بجملة عربية قصيرة.",
    "أكمل النص التالي.",
)
END = "<|endoftext|>"


@dataclass(frozen=True)
class Shape:
    """The size of the model."""

    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 1024


@dataclass(frozen=True)
class Split:
    """Sentences to train on, sentences held out, and those held out that are unlike the others."""

    train: list[str]
    held_out: list[str]
    novel: list[str]


def read_sentences(path: Path) -> list[str]:
    """Read the sentences, without direction marks and surrounding space; no empty ones."""
    lines = path.read_text(encoding="utf-8").split("\n")
    cleaned = (line.translate(BIDI_CONTROLS).strip() for line in lines)
    return list(dict.fromkeys(line for line in cleaned if line))


def word_pairs(sentence: str) -> set[tuple[str, str]]:
    """Give the pairs of neighbouring words."""
    words = sentence.split()
    return set(pairwise(words))


def split_sentences(sentences: Sequence[str], share: float, seed: int) -> Split:
    """Hold out a random share; `novel` has few word pairs in common with the training part.

    Collected sentences often come in families that differ in one word. A held-out sentence counts
    as novel when fewer than half of its word pairs occur in the training part.
    """
    order = list(sentences)
    random.Random(seed).shuffle(order)
    count = max(1, round(share * len(order)))
    held_out, train = order[:count], order[count:]
    known = {pair for sentence in train for pair in word_pairs(sentence)}
    novel = [s for s in held_out if (p := word_pairs(s)) and 2 * len(p & known) < len(p)]
    return Split(train, held_out, novel)


def conversation(take: Callable[[], str], rng: random.Random) -> list[dict[str, str]]:
    """Build a conversation: a sentence and its continuation, or sentences taking turns."""
    messages = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    first = take()
    words = first.split()
    if len(words) >= 4 and rng.random() < 0.6:
        cut = rng.randint(2, len(words) - 2)
        turns = [" ".join(words[:cut]), " ".join(words[cut:])]
    else:
        turns = [first, take()]
        if rng.random() < 0.3:
            turns += [take(), take()]
    roles = ("user", "assistant")
    messages += [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return messages


def make_documents(
    sentences: Sequence[str], tokenizer: Any, rng: random.Random, chat_share: float
) -> list[str]:
    """Join shuffled sentences into documents, `chat_share` of them conversations."""
    left = list(sentences)
    rng.shuffle(left)

    def take() -> str:
        return left.pop() if left else rng.choice(sentences)

    documents = []
    while left:
        if rng.random() < chat_share:
            chat = conversation(take, rng)
            text = str(tokenizer.apply_chat_template(chat, tokenize=False))
        else:
            text = rng.choice((" ", "\n")).join(take() for _ in range(rng.randint(3, 8)))
        documents.append(text + END)
    return documents


def encode(documents: list[str], tokenizer: Any) -> Tensor:
    """Encode the documents into one stream of ids."""
    return torch.tensor([i for ids in tokenizer(documents)["input_ids"] for i in ids])


def training_batches(
    sentences: Sequence[str],
    tokenizer: Any,
    rng: random.Random,
    chat_share: float,
    shape: tuple[int, int],
) -> Iterator[Tensor]:
    """Yield packed batches of `shape` (rows, context) without end, each epoch shuffled anew."""
    rows, context = shape
    stream = torch.empty(0, dtype=torch.long)
    while True:
        fresh = encode(make_documents(sentences, tokenizer, rng, chat_share), tokenizer)
        stream = torch.cat([stream, fresh])
        while len(stream) >= rows * context:
            yield stream[: rows * context].view(rows, context)
            stream = stream[rows * context :]


def perplexity(model: nn.Module, stream: Tensor, context: int) -> float:
    """Give the perplexity per token over neighbouring windows of `context` ids."""
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for window in torch.split(stream, context):
            if len(window) < 2:
                continue
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            loss = nn.functional.cross_entropy(logits, window[1:], reduction="sum")
            total += float(loss)
            count += len(window) - 1
    return math.exp(total / count)


def fixed_stream(
    sentences: Sequence[str], tokenizer: Any, seed: int, chat_share: float = 0.0
) -> Tensor:
    """Encode the sentences as documents that are the same at every call."""
    documents = make_documents(sentences, tokenizer, random.Random(seed), chat_share)
    return encode(documents, tokenizer)


def measure(
    model: nn.Module, tokenizer: Any, split: Split, context: int, seed: int
) -> dict[str, float | int]:
    """Measure on held-out documents, on those of novel sentences and on conversations."""
    text = fixed_stream(split.held_out, tokenizer, seed)
    novel = fixed_stream(split.novel, tokenizer, seed)
    chats = fixed_stream(split.held_out, tokenizer, seed, chat_share=1.0)
    words = sum(len(sentence.split()) for sentence in split.held_out)
    tokens = sum(len(ids) for ids in tokenizer(split.held_out)["input_ids"])
    return {
        "held_out_sentences": len(split.held_out),
        "held_out_tokens": len(text),
        "held_out_tokens_per_word": round(tokens / words, 3),
        "held_out_perplexity": round(perplexity(model, text, context), 2),
        "novel_sentences": len(split.novel),
        "novel_perplexity": round(perplexity(model, novel, context), 2),
        "chat_perplexity": round(perplexity(model, chats, context), 2),
    }


def build_model(tokenizer: Any, shape: Shape) -> Qwen2ForCausalLM:
    """Make an untrained Qwen2 model with the vocabulary of the tokenizer."""
    end, turn_end = tokenizer.convert_tokens_to_ids([END, "<|im_end|>"])
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=turn_end,
        pad_token_id=end,
        **asdict(shape),
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=end, eos_token_id=[turn_end, end], pad_token_id=end
    )
    return model


def add_dropout(model: Qwen2ForCausalLM, rate: float) -> Callable[[], None]:
    """Drop from the embedding and from what each block adds; return what undoes it.

    Qwen2 has no such dropout of its own, and a small text is seen many times.
    """

    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (nn.functional.dropout(output[0], rate, module.training), *output[1:])
        return nn.functional.dropout(output, rate, module.training)

    parts: list[nn.Module] = [model.model.embed_tokens]
    for layer in model.model.layers:
        parts += [layer.self_attn, layer.mlp]
    handles = [part.register_forward_hook(drop) for part in parts]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def make_optimizer(model: nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    """Make AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def rate_factor(progress: float, warm_up: float = 0.04, floor: float = 0.02) -> float:
    """Give the share of the peak learning rate: a linear warm-up, then half a cosine."""
    if progress < warm_up:
        return max(progress, 1e-3) / warm_up
    turn = (min(progress, 1.0) - warm_up) / (1 - warm_up)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * turn))


def train(
    model: Qwen2ForCausalLM,
    batches: Iterator[Tensor],
    held_out: Tensor,
    arguments: argparse.Namespace,
) -> dict[str, float | int]:
    """Train for the number of steps or minutes asked for."""
    optimizer = make_optimizer(model, arguments.learning_rate, arguments.weight_decay)
    remove_dropout = add_dropout(model, arguments.dropout)
    model.train()
    begun = time.monotonic()
    seconds = None if arguments.steps else arguments.minutes * 60
    total = arguments.steps if seconds is None else round(seconds)
    step, tokens = 0, 0
    with tqdm(total=total, unit="step" if seconds is None else "s", mininterval=5) as bar:
        while bar.n < total:
            factor = rate_factor(bar.n / total)
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * factor
            batch = next(batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=not arguments.float32):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, tokens = step + 1, tokens + batch.numel()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            now = step if seconds is None else int(time.monotonic() - begun)
            bar.update(min(now, total) - bar.n)
            if arguments.check_every and step % arguments.check_every == 0:
                checked = perplexity(model, held_out, arguments.context)
                bar.write(f"step {step}: held-out perplexity {checked:.1f}")
                model.train()
    remove_dropout()
    return {
        "steps": step,
        "tokens": tokens,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "last_training_loss": round(loss.item(), 3),
    }


def run_training(arguments: argparse.Namespace) -> None:
    """Train a model, save it, and measure what was saved."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    split = split_sentences(
        read_sentences(arguments.text), arguments.held_out, arguments.split_seed
    )
    torch.manual_seed(arguments.seed)
    model = build_model(tokenizer, Shape())
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(split.train):,} sentences to train on")
    batches = training_batches(
        split.train,
        tokenizer,
        random.Random(arguments.seed),
        arguments.chat_share,
        (arguments.batch, arguments.context),
    )
    held_out = fixed_stream(split.held_out, tokenizer, arguments.split_seed)
    history = train(model, batches, held_out, arguments)

    model.to(torch.bfloat16).save_pretrained(arguments.out)
    saved = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    settings = ("seed", "split_seed", "context", "batch", "learning_rate", "weight_decay")
    report = {
        "parameters": parameters,
        "vocabulary": len(tokenizer),
        **{name: getattr(arguments, name) for name in (*settings, "dropout", "chat_share")},
        **history,
        **measure(saved, tokenizer, split, arguments.context, arguments.split_seed),
    }
    text = json.dumps(report, indent=2)
    (arguments.out / "pretraining.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def run_measurement(arguments: argparse.Namespace) -> None:
    """Measure a saved model on the held-out sentences."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    split = split_sentences(
        read_sentences(arguments.text), arguments.held_out, arguments.split_seed
    )
    measured = measure(model, tokenizer, split, arguments.context, arguments.split_seed)
    print(json.dumps(measured, indent=2))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--text", type=Path, required=True, help="one sentence a line, UTF-8")
    common.add_argument("--held-out", type=float, default=0.04, help="share held out")
    common.add_argument("--split-seed", type=int, default=1, help="draws the held-out part")
    common.add_argument("--context", type=int, default=512, help="tokens in a packed row")
    common.add_argument("--threads", type=int, default=1)

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    trainer = commands.add_parser("train", parents=[common], help="train, save and measure")
    trainer.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    trainer.add_argument("--out", type=Path, required=True, help="folder for the weights")
    budget = trainer.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="repeatable: the same steps every time")
    budget.add_argument("--minutes", type=float, help="as many steps as fit")
    trainer.add_argument("--seed", type=int, default=1)
    trainer.add_argument("--batch", type=int, default=4, help="packed rows in a step")
    trainer.add_argument("--learning-rate", type=float, default=2e-3)
    trainer.add_argument("--weight-decay", type=float, default=0.1)
    trainer.add_argument("--dropout", type=float, default=0.2)
    trainer.add_argument("--chat-share", type=float, default=0.2, help="conversations' share")
    trainer.add_argument("--check-every", type=int, default=200, help="steps; 0: never")
    trainer.add_argument("--float32", action="store_true", help="no bfloat16 arithmetic")
    trainer.set_defaults(run=run_training)
    measurer = commands.add_parser("measure", parents=[common], help="measure a saved model")
    measurer.add_argument("--model", type=Path, required=True, help="model folder")
    measurer.set_defaults(run=run_measurement)
    return parser.parse_args()


def main() -> None:
    """Run the command asked for."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
