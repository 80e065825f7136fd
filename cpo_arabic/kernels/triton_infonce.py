# ruff: noqa: N803, N806 - Triton's compile-time constants are written in capitals
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""CUDA body of :mod:`.infonce`: the elementwise work on one tile of similarities, in two launches.

Equation and references: :mod:`.infonce`. As in :mod:`.triton_logprob`, the products stay with the
vendor's library and a tile with the second-level cache. One kernel compares labels and finds the
largest negatives, the other takes the exponentials at both scales; each program walks over its
share of the keys, and what the shares found is merged. Nothing is read back to the host.

Covered: tiles in float32

Shapes: B queries, n keys of one tile, P shares of them, S scales (1 or 2)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpo_arabic.kernels.infonce import Problem, Tile

ALIGNED = 128
"""Keys of a share are a multiple of this, so that every load is a wide one."""

_CONFIGS = [
    triton.Config({"BLOCK_B": b, "BLOCK_N": n}, num_warps=warps)
    for b, n, warps in [(1, 1024, 4), (4, 256, 4), (8, 128, 4), (8, 256, 8), (16, 64, 4)]
]
if triton.knobs.runtime.interpret:  # there is nothing to time
    _CONFIGS = [triton.Config({"BLOCK_B": 4, "BLOCK_N": 32})]


# The choices are kept on disk: another one would round a resumed run in other places.
@triton.autotune(_CONFIGS, key=["LIVE"], cache_results=True)
@triton.jit
def _mask_kernel(
    similarity, query_labels, key_labels, positives, highest, negatives, B, N, share, start,
    LIVE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """−inf where a key is no negative; (P, B) largest others and (P, B) their number."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = rows < B
    q_group = tl.load(query_labels + 3 * rows, mask=inside, other=0)[:, None]
    q_prompt = tl.load(query_labels + 3 * rows + 1, mask=inside, other=0)[:, None]
    q_text = tl.load(query_labels + 3 * rows + 2, mask=inside, other=0)[:, None]
    own = tl.load(positives + rows, mask=inside, other=-1)[:, None]
    best = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    count = tl.zeros((BLOCK_B,), tl.int32)
    last = tl.minimum(part * share + share, N)
    for first in range(part * share, last, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        there = columns < last
        k_group = tl.load(key_labels + 3 * columns, mask=there, other=0)[None, :]
        k_prompt = tl.load(key_labels + 3 * columns + 1, mask=there, other=0)[None, :]
        k_text = tl.load(key_labels + 3 * columns + 2, mask=there, other=0)[None, :]
        excluded = (q_text == k_text) | ((q_prompt == k_prompt) & (q_group != k_group))
        if LIVE:
            excluded |= own == (start + columns)[None, :]
        bounds = inside[:, None] & there[None, :]
        at = similarity + rows.to(tl.int64)[:, None] * N + columns[None, :]
        found = tl.load(at, mask=bounds & ~excluded, other=float("-inf"))
        tl.store(at, float("-inf"), mask=bounds & excluded)
        best = tl.maximum(best, tl.max(found, 1))
        count += tl.sum((bounds & ~excluded).to(tl.int32), 1)
    tl.store(highest + part * B + rows, best, mask=inside)
    tl.store(negatives + part * B + rows, count, mask=inside)


@triton.autotune(_CONFIGS, key=["TWO"], restore_value=["similarity"], cache_results=True)
@triton.jit
def _exponentials_kernel(
    similarity, other, floor, totals, B, N, share, sharp, soft,
    TWO: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Exponentials at ``sharp`` in place, at ``soft`` into ``other``; (P, S, B) their sums."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = rows < B
    under = tl.load(floor + rows, mask=inside, other=0.0)[:, None]
    total_a, total_b = tl.zeros((BLOCK_B,), tl.float32), tl.zeros((BLOCK_B,), tl.float32)
    last = tl.minimum(part * share + share, N)
    for first in range(part * share, last, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        bounds = inside[:, None] & (columns < last)[None, :]
        at = rows.to(tl.int64)[:, None] * N + columns[None, :]
        below = tl.load(similarity + at, mask=bounds, other=float("-inf")) - under
        weights = tl.exp(sharp * below)
        total_a += tl.sum(weights, 1)
        tl.store(similarity + at, weights, mask=bounds)
        if TWO:
            weights = tl.exp(soft * below)
            total_b += tl.sum(weights, 1)
            tl.store(other + at, weights, mask=bounds)
    S: tl.constexpr = 2 if TWO else 1
    tl.store(totals + part * S * B + rows, total_a, mask=inside)
    if TWO:
        tl.store(totals + part * S * B + B + rows, total_b, mask=inside)


class TritonBody:
    """:class:`.infonce.Body` as two Triton kernels."""

    def mask(self, problem: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
        similarity = tile.similarity
        b, n = similarity.shape
        share, parts = _shares(similarity)
        highest = similarity.new_empty(parts, b)
        negatives = torch.empty(parts, b, dtype=torch.int32, device=similarity.device)
        _mask_kernel[_grid(b, parts)](
            similarity, problem.query_labels.contiguous(), tile.labels.contiguous(),
            problem.positives.contiguous(), highest, negatives, b, n, share, tile.start,
            LIVE=tile.live,
        )  # fmt: skip
        return highest.amax(0), negatives.sum(0)

    def exponentials(
        self, similarity: Tensor, floor: Tensor, scales: tuple[float, ...]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        b, n = similarity.shape
        share, parts = _shares(similarity)
        totals = similarity.new_empty(parts, len(scales), b)
        two = len(scales) > 1
        other = torch.empty_like(similarity) if two else similarity
        _exponentials_kernel[_grid(b, parts)](
            similarity, other, floor, totals, b, n, share, scales[0], scales[-1], TWO=two
        )
        yield from zip(range(len(scales)), (similarity, other), totals.sum(0), strict=False)


def _grid(queries: int, parts: int):
    return lambda meta: (triton.cdiv(queries, meta["BLOCK_B"]), parts)


def _shares(similarity: Tensor) -> tuple[int, int]:
    """Keys of one share, and how many shares: a few programs for every multiprocessor."""
    b, n = similarity.shape
    processors = 2
    if similarity.is_cuda:
        processors = torch.cuda.get_device_properties(similarity.device).multi_processor_count
    parts = max(1, 4 * processors // triton.cdiv(max(b, 1), 16))
    share = ALIGNED * triton.cdiv(triton.cdiv(max(n, 1), parts), ALIGNED)
    return share, triton.cdiv(max(n, 1), share)
