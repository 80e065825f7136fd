"""A model at work before training: embeddings for mining, text for twins and on-policy negatives.

(N) texts  (L) tokens  (H) hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

BATCH = 32


@torch.no_grad()
def mean_pooled(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int,
    progress: Callable[[int, int], None],
) -> NDArray[np.float32]:
    """(N, H) unit vectors: the mean of the last hidden states over each text's tokens."""
    decoder, parts = model.get_decoder(), []
    for start in range(0, len(texts), BATCH):
        ids = [
            tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)[:max_length]
            for text in texts[start : start + BATCH]
        ]
        longest = max(1, *map(len, ids))
        rows = torch.zeros(len(ids), longest, dtype=torch.long)
        seen = torch.zeros(len(ids), longest)
        for row, tokens in enumerate(ids):
            rows[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            seen[row, : max(1, len(tokens))] = 1
        # Padding stands on the right, where a causal decoder's earlier states cannot see it.
        hidden = decoder(input_ids=rows.to(model.device), use_cache=False).last_hidden_state
        weights = seen.to(hidden.device)[..., None]
        pooled = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)
        parts.append(F.normalize(pooled, dim=1).cpu().numpy())
        progress(min(start + BATCH, len(texts)), len(texts))
    return np.concatenate(parts)


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[str]:
    """One sampled completion (temperature 1) of each prompt's token ids, a function of the seed."""
    texts = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for number, prompt in enumerate(prompts):
        torch.manual_seed(seed + number)
        ids = torch.tensor([list(prompt)], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
        )
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
        progress(number + 1, len(prompts))
    return texts
