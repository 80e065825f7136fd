"""Reference log-probabilities, computed once and looked up afterwards.

(N) pairs of a row and a completion
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cpo_arabic.data.pack import PreferenceBatch, TokenizedGroup, sent
from cpo_arabic.files import whole
from cpo_arabic.modeling.policy import Reference, sum_dtype


class PrecomputedReference(Reference):
    """log π_ref by (row, completion's text hash); the model it came from may be gone."""

    def __init__(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        pairs = zip(rows.tolist(), keys.tolist(), strict=True)
        self._values = dict(zip(pairs, values.tolist(), strict=True))

    def log_probs(self, batch: PreferenceBatch) -> Tensor:
        """(S) float64 sums in nats."""
        rows = batch.group_rows.tolist()
        groups, keys = batch.completion_groups.tolist(), batch.completion_keys.tolist()
        found = [self._values[rows[group], key] for group, key in zip(groups, keys, strict=True)]
        device = batch.input_ids.device
        return sent(torch.tensor(found, dtype=sum_dtype(device)), device)


def precompute(
    drawn: Iterable[TokenizedGroup],
    log_probs: Callable[[Sequence[TokenizedGroup]], Tensor],
    *,
    model_identity: str,
    path: Path,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> PrecomputedReference:
    """Every (row, completion) that the run will see, from ``path`` when it holds just these.

    Args:
        drawn: the groups of every epoch; pairs that recur are computed once.
        log_probs: groups → (S) reference sums, in the order of their completions.
        model_identity: what tells this reference from another.
        path: a safetensors file, written atomically, with a hash of model and tokens.
        batch_size: groups at once.
        progress: told (groups done, all groups).
    """
    groups = _united(drawn)
    identity = _identity(model_identity, groups)
    rows = torch.tensor([g.row for g in groups for _ in g.completion_ids])
    keys = torch.tensor([key for g in groups for key in g.completion_keys])
    stored = _stored(path, identity)
    if stored is not None:
        return PrecomputedReference(rows, keys, stored)
    parts = []
    for start in range(0, len(groups), batch_size):
        parts.append(log_probs(groups[start : start + batch_size]).cpu())
        progress(min(start + batch_size, len(groups)), len(groups))
    values = torch.cat(parts)
    with whole(path) as temporary:
        save_file({"log_probs": values}, temporary, metadata={"identity": identity})
    return PrecomputedReference(rows, keys, values)


def _stored(path: Path, identity: str) -> Tensor | None:
    """The table, unless it is of other tokens or another model, or damaged: then it is remade."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            if (stored.metadata() or {}).get("identity") != identity:
                return None
            values = stored.get_tensor("log_probs")
    except SafetensorError:
        return None
    return values if isinstance(values, Tensor) else None


def _united(drawn: Iterable[TokenizedGroup]) -> list[TokenizedGroup]:
    """One group a row, with every distinct completion it is ever drawn with."""
    united: dict[int, TokenizedGroup] = {}
    for group in drawn:
        known = united.setdefault(
            group.row, TokenizedGroup(group.row, group.prompt_ids, [], group.prompt_key, [])
        )
        seen = set(known.completion_keys)
        for ids, key in zip(group.completion_ids, group.completion_keys, strict=True):
            if key not in seen:
                seen.add(key)
                known.completion_ids.append(ids)
                known.completion_keys.append(key)
    return [united[row] for row in sorted(united)]


def _identity(model: str, groups: list[TokenizedGroup]) -> str:
    digest = hashlib.blake2b(model.encode(), digest_size=16)
    for group in groups:
        digest.update(repr((group.row, group.prompt_ids, group.completion_ids)).encode())
    return digest.hexdigest()
