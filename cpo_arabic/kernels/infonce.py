"""InfoNCE over in-batch keys and a queue, without the [queries, keys + queue] matrix.

Equation, for query b with positive key k⁺ and unmasked negatives j = 1 … N_b::

    s_j  = q · k_j          z⁺ = (q · k⁺ − margin) / τ          a = 1/τ + β
    lse  = LSE_j(a·s_j) − LSE_j(β·s_j) + log N_b
    loss = −z⁺ + log(exp z⁺ + exp lse) = softplus(lse − z⁺)             (0 where N_b = 0)

    ∂loss/∂q   = σ(lse − z⁺) · (Σ_j (a·p_j − β·r_j) k_j − k⁺/τ)
    ∂loss/∂k_j = σ(lse − z⁺) · (a·p_j − β·r_j) q                        p = softmax(a·s)
    ∂loss/∂k⁺  = −σ(lse − z⁺) · q/τ                                     r = softmax(β·s)

β = 0 is the loss of van den Oord et al. 2018 (arXiv 1807.03748); β > 0 weights every negative by
exp(β·s) over its mean, Robinson et al. 2021 (arXiv 2010.04592). The queue is He et al. 2020's
(arXiv 1911.05722). Keeping the positive out of the log-sum-exp and finishing with softplus keeps
float32 accurate where the positive dominates: 1 − p⁺ is never formed by subtraction.

One pass over keys and queue keeps, per query, the running maximum, both exponential sums and both
weighted key sums (Milakov & Gimelshein 2018, arXiv 1805.02867; the weighted sum as in Dao et al.
2022, arXiv 2205.14135). That is already the query's gradient up to the incoming factor, so
backward passes over the live keys only, when they need a gradient, and never over the queue.

Shapes: B queries, N live keys, Q queue entries, D dimensions, n keys of one tile, S scales (1 or 2)
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpo_arabic.kernels.common import (
    LOG2_E,
    Scratch,
    accumulation_dtype,
    spans,
    without_autocast,
)
from cpo_arabic.kernels.products import multiply
from cpo_arabic.kernels.reference import excluded_pairs

TILE_ELEMENTS = 1 << 19
"""Similarities of one tile on a CPU: 2 MiB in float32, about a core's second-level cache."""
TILE_KEYS = (128, 8192)
"""Fewest and most keys of one tile: fewer starve the product, more gain nothing."""
CONVERTED_ELEMENTS = 1 << 20
"""Elements of a tile of keys that is converted from a lower dtype: 4 MiB in float32."""
CUDA_TILES = 8
"""How much larger all these may be on CUDA: within the second-level cache, few launches."""
SUSPECTS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Problem:
    """The inputs of one call, without the gradient's side of things."""

    queries: Tensor  # (B, D) in the accumulation dtype
    keys: Tensor  # (N, D)
    positives: Tensor  # (B,)
    query_labels: Tensor  # (B, 3)
    key_labels: Tensor  # (N, 3)
    queue: Tensor | None  # (Q, D)
    queue_labels: Tensor | None  # (Q, 3)
    queue_scale: Tensor | None  # (Q,)
    temperature: float
    concentration: float
    tile: int | None = None  # keys of one tile; from B and D where None

    @property
    def scales(self) -> tuple[float, ...]:
        """The sharpnesses at which exponentials are summed: a, and β unless it is 0."""
        sharp = 1 / self.temperature + self.concentration
        return (sharp, self.concentration) if self.concentration else (sharp,)

    @cached_property
    def suspects(self) -> _Suspects:
        """The queue's entries that some query must not see."""
        assert self.queue_labels is not None
        return _Suspects(self.query_labels, self.queue_labels)


@dataclass(frozen=True)
class Sweep:
    """What one pass over all negatives leaves behind."""

    peak: Tensor  # (B,) largest similarity; −inf without a negative
    totals: Tensor  # (S, B) Σ_j exp(scale · (s_j − peak))
    count: Tensor  # (B,) negatives
    means: Tensor | None  # (S, B, D) Σ_j softmax_j(scale · s) k_j


class Tile(NamedTuple):
    """Some keys, and every query's similarity to them."""

    rows: Tensor  # (n, D) in the queries' dtype
    similarity: Tensor  # (B, n), contiguous; the next tile's, too, so it may be overwritten
    labels: Tensor  # (n, 3)
    start: int  # place of the first key among the live ones, or in the queue
    live: bool

    @property
    def stop(self) -> int:
        """Place after the last key."""
        return self.start + len(self.rows)


class Body(Protocol):
    """The elementwise work on one tile, which a backend provides."""

    def mask(self, problem: Problem, tile: Tile) -> tuple[Tensor, Tensor | int]:
        """Puts −inf where a key is no negative; (B,) the largest that is left, (B,) negatives."""
        ...

    def exponentials(
        self, similarity: Tensor, floor: Tensor, scales: tuple[float, ...]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each of the S scales, by its index: (B, n) exp(scale · (s − floor)), (B,) its sums.

        What was yielded is no longer valid when the next is; ``similarity`` is written over.
        """
        ...


class InfoNCEFunction(torch.autograd.Function):
    """Differentiable in ``queries`` and ``keys``, once."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        positives: Tensor,
        query_labels: Tensor,
        key_labels: Tensor,
        queue: Tensor | None,
        queue_labels: Tensor | None,
        queue_scale: Tensor | None,
        temperature: float,
        margin: float,
        concentration: float,
        tile: int | None,
        body: Body,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B) losses, hardest negatives' and positives' similarities, from one sweep."""
        with without_autocast(queries.device):
            q = queries.to(accumulation_dtype(queries))
            problem = Problem(
                q, keys, positives, query_labels, key_labels, queue, queue_labels, queue_scale,
                temperature, concentration, tile,
            )  # fmt: skip
            result = sweep(problem, body, want_means=ctx.needs_input_grad[0])
            positive_key = keys.index_select(0, positives).to(q.dtype)
            positive = (q * positive_key).sum(1)
            gap = _gap(problem, result, positive, margin)
            loss = torch.logaddexp(gap, torch.zeros_like(gap))
            rate = torch.sigmoid(gap)
            direction = None
            if result.means is not None:
                direction = _pull(problem, result.means).sub_(positive_key / temperature)
                direction.mul_(rate[:, None])
        ctx.save_for_backward(
            direction, queries, keys, positives, query_labels, key_labels, result.peak,
            result.totals, rate,
        )  # fmt: skip
        ctx.settings = (temperature, concentration, tile, body)
        ctx.mark_non_differentiable(result.peak, positive)
        return loss, result.peak, positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The queries' gradient was kept; the keys' takes one more pass over the keys."""
        direction, queries, keys, positives, query_labels, key_labels, peak, totals, rate = (
            ctx.saved_tensors
        )
        temperature, concentration, tile, body = ctx.settings
        grad_queries = grad_keys = None
        with without_autocast(queries.device):
            if ctx.needs_input_grad[0]:
                grad_queries = (grad_loss[:, None] * direction).to(queries.dtype)
            if ctx.needs_input_grad[1]:
                q = queries.to(rate.dtype)
                problem = Problem(
                    q, keys, positives, query_labels, key_labels, None, None, None,
                    temperature, concentration, tile,
                )  # fmt: skip
                pushed = grad_loss * rate
                grad_keys = key_gradient(problem, body, peak, totals, pushed)
                grad_keys.index_add_(0, positives, q * (pushed / -temperature)[:, None])
                grad_keys = grad_keys.to(keys.dtype)
        return (grad_queries, grad_keys, *[None] * 11)


def _gap(problem: Problem, result: Sweep, positive: Tensor, margin: float) -> Tensor:
    """(B,) lse − z⁺; −inf for a query without negatives.

    a·peak − β·peak is peak/τ, so the large terms are subtracted as similarities, before 1/τ
    magnifies their rounding.
    """
    logs = result.totals.log()
    gap = (result.peak - positive + margin) / problem.temperature + logs[0]
    if problem.concentration:
        gap = gap - logs[1] + result.count.to(gap.dtype).log()
    return gap.masked_fill(result.count == 0, -math.inf)


def _pull(problem: Problem, means: Tensor) -> Tensor:
    """(B, D) ∂lse/∂q = a Σ p_j k_j − β Σ r_j k_j."""
    pull = means[0] * problem.scales[0]
    return pull.sub_(means[1], alpha=problem.concentration) if len(means) > 1 else pull


def sweep(problem: Problem, body: Body, *, want_means: bool) -> Sweep:
    """Online log-sum-exps at every scale over keys and queue, with mean keys where wanted."""
    q, scales = problem.queries, problem.scales
    peak = q.new_full((len(q),), -math.inf)
    totals = q.new_zeros(len(scales), len(q))
    count = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    sums = q.new_zeros(len(scales), *q.shape) if want_means else None
    for tile in _tiles(problem):
        highest, negatives = body.mask(problem, tile)
        count += negatives
        raised = torch.maximum(peak, highest)
        floor = _finite(raised)
        for index, weights, total in body.exponentials(tile.similarity, floor, scales):
            decay = (peak - floor).mul_(scales[index]).exp_()
            totals[index].mul_(decay).add_(total)
            if sums is not None:
                multiply(weights, tile.rows, sums[index].mul_(decay[:, None]), accumulate=True)
        peak = raised
    if sums is not None:
        sums /= totals.masked_fill(totals == 0, 1.0)[:, :, None]
    return Sweep(peak, totals, count, sums)


def key_gradient(
    problem: Problem, body: Body, peak: Tensor, totals: Tensor, rate: Tensor
) -> Tensor:
    """(N, D) Σ_b rate_b (a·p_bj − β·r_bj) q_b, the positives' own term left out."""
    q, scales = problem.queries, problem.scales
    gradient = q.new_zeros(problem.keys.shape)
    floor = _finite(peak)
    factors = [
        sign * scale * rate / total.masked_fill(total == 0, 1.0)
        for sign, scale, total in zip((1.0, -1.0), scales, totals, strict=False)
    ]
    for tile in _tiles(problem):
        body.mask(problem, tile)
        part = gradient[tile.start : tile.stop]
        for index, weights, _ in body.exponentials(tile.similarity, floor, scales):
            multiply(weights.T, q * factors[index][:, None], part, accumulate=True)
    return gradient


def _finite(peak: Tensor) -> Tensor:
    """0 where there is no negative: −inf − −inf is not a number."""
    return peak.masked_fill(peak == -math.inf, 0.0)


def _tiles(problem: Problem) -> Iterator[Tile]:
    """The live keys, then the queue."""
    q = problem.queries
    products, converted = Scratch(q, q.dtype), Scratch(q, q.dtype)

    def tile(keys: Tensor, labels: Tensor, start: int, stop: int, live: bool) -> Tile:
        rows = converted.load(keys[start:stop])
        if not live and problem.queue_scale is not None:  # int8, so rows is a copy
            rows.mul_(problem.queue_scale[start:stop, None])
        similarity = products.take(len(q), len(rows))
        multiply(q, rows.T, similarity)
        return Tile(rows, similarity, labels[start:stop], start, live)

    for start, stop in spans(len(problem.keys), _tile_keys(problem, problem.keys)):
        yield tile(problem.keys, problem.key_labels, start, stop, True)
    if problem.queue is not None and problem.queue_labels is not None:
        for start, stop in spans(len(problem.queue), _tile_keys(problem, problem.queue)):
            yield tile(problem.queue, problem.queue_labels, start, stop, False)


def _tile_keys(problem: Problem, keys: Tensor) -> int:
    b, d = problem.queries.shape
    factor = CUDA_TILES if keys.is_cuda else 1
    fewest, most = TILE_KEYS
    fitting = min(factor * TILE_ELEMENTS // max(b, 1), factor * most)
    if keys.dtype != problem.queries.dtype:
        fitting = min(fitting, factor * CONVERTED_ELEMENTS // max(d, 1))
    return problem.tile or max(fitting, fewest)


class TiledBody:
    """Plain PyTorch on one tile, on any device."""

    def __init__(self) -> None:
        self._spare: Scratch | None = None

    def mask(self, problem: Problem, tile: Tile) -> tuple[Tensor, Tensor | int]:
        similarity = tile.similarity
        if tile.live:
            excluded = excluded_pairs(problem.query_labels, tile.labels)
            places = torch.arange(tile.start, tile.stop, device=similarity.device)
            excluded |= problem.positives[:, None] == places
            similarity.masked_fill_(excluded, -math.inf)
            removed: Tensor | int = excluded.sum(1)
        else:
            removed = problem.suspects.mask(similarity, tile.start, tile.stop)
        return similarity.amax(1), len(tile.rows) - removed

    def exponentials(
        self, similarity: Tensor, floor: Tensor, scales: tuple[float, ...]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        similarity.sub_(floor[:, None])
        for index in reversed(range(len(scales))):
            target = similarity
            if index > 0:
                self._spare = self._spare or Scratch(similarity, similarity.dtype)
                target = self._spare.take(*similarity.shape)
            torch.mul(similarity, scales[index] * LOG2_E, out=target).exp2_()
            yield index, target, target.sum(1)


class _Suspects:
    """Finds the few queue entries that some query must not see, without comparing all pairs.

    Looking up the low bits of every entry's text and prompt costs Q where the comparison costs
    B·Q; those that it finds are compared. Positions are read back to the host, so only the CPU
    takes it; elsewhere all pairs are compared.
    """

    def __init__(self, query_labels: Tensor, labels: Tensor) -> None:
        self._query_labels, self._labels = query_labels, labels
        self._columns: list[int] | None = None
        if labels.device.type == "cpu":
            self._columns = []
            for start, stop in spans(len(labels), SUSPECTS_AT_ONCE):
                alike = _alike(query_labels[:, 1:], labels[start:stop, 1:]).nonzero()[:, 0] + start
                excluded = excluded_pairs(query_labels, labels[alike]).any(0)
                self._columns += alike[excluded].tolist()

    def mask(self, similarity: Tensor, start: int, stop: int) -> Tensor | int:
        """Puts −inf at the excluded pairs of queue entries start … stop; (B,) how many fell."""
        if self._columns is None:
            excluded = excluded_pairs(self._query_labels, self._labels[start:stop])
            similarity.masked_fill_(excluded, -math.inf)
            return excluded.sum(1)
        first, last = (bisect_left(self._columns, bound) for bound in (start, stop))
        if first == last:
            return 0
        columns = torch.tensor(self._columns[first:last])
        excluded = excluded_pairs(self._query_labels, self._labels[columns])
        columns -= start
        similarity[:, columns] = similarity[:, columns].masked_fill_(excluded, -math.inf)
        return excluded.sum(1)


def _alike(own: Tensor, others: Tensor) -> Tensor:
    """(n,) whether ``others`` (n, C) has a value with the low bits of one of ``own`` (B, C)."""
    low_bits = (1 << (256 * len(own)).bit_length()) - 1  # chance finds fewer than 1 in 256
    found = torch.zeros(len(others), dtype=torch.bool, device=others.device)
    for mine, theirs in zip(own.T, others.T, strict=True):
        seen = found.new_zeros(low_bits + 1).index_fill_(0, mine & low_bits, True)
        found |= seen[theirs & low_bits]
    return found
