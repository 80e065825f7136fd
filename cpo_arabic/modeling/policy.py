"""The policy: one forward that gives what the objective reads.

(R) rows  (L) tokens of a row  (H) hidden size  (V) vocabulary
(G) groups  (S) completions  (T) completion tokens  (D) embedding size
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from cpo_arabic.data.pack import PreferenceBatch
from cpo_arabic.errors import ModelError
from cpo_arabic.kernels import token_log_probs
from cpo_arabic.modeling.encoder import EmbeddingSettings, embed, pool_keys, pool_queries
from cpo_arabic.modeling.layers import fuse_layers
from cpo_arabic.modeling.tree import hidden_states


class Wanted(NamedTuple):
    """What a forward is to compute; anything else is skipped, not thrown away."""

    log_probs: bool = False
    only_chosen: bool = False  # log-probabilities of the chosen completions alone
    queries: bool = False
    keys: bool = False


class PolicyOutput(NamedTuple):
    """Parts that were not wanted are None."""

    log_probs: Tensor | None  # (S) float64 sums in nats; 0 for negatives under ``only_chosen``
    queries: Tensor | None  # (G, D)
    keys: Tensor | None  # (S, D)


def causal_lm(model: nn.Module) -> Any:
    """The transformers causal LM inside a model that peft may have wrapped."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def completion_log_probs(
    model: nn.Module, hidden: Tensor, batch: PreferenceBatch, *, only_chosen: bool = False
) -> Tensor:
    """log π(y|x) of each completion, (S) float64, the sum over its tokens' float32.

    What trains is the difference of two such sums, hundreds of nats each: a float32 sum would round
    it to some 1e-5 of a nat.

    Args:
        model: the language model whose head predicts.
        hidden: (R, L, H) last hidden states.
        batch: where the tokens lie.
        only_chosen: leave the negatives' head work out; their sums are then 0.
    """
    predictors, targets, owners = (
        batch.token_predictors, batch.token_targets, batch.token_completions,
    )  # fmt: skip
    if only_chosen:
        kept = batch.chosen_tokens
        predictors, targets, owners = predictors[kept], targets[kept], owners[kept]
    head = causal_lm(model).get_output_embeddings()
    config = causal_lm(model).config
    each = token_log_probs(
        rows_at(hidden.flatten(0, 1), predictors),
        head.weight,
        targets,
        bias=getattr(head, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    wide = sum_dtype(each.device)
    sums = each.new_zeros(len(batch.completion_lengths), dtype=wide)
    return sums.index_add(0, owners, each.to(wide))


def rows_at(states: Tensor, index: Tensor) -> Tensor:
    """states[index], (N, H) and (T) → (T, H), whose gradient has the same bits every time.

    The completions of a group share their first token's predictor. Where an index repeats, the
    gradients of PyTorch's indexing are added in a fixed order on CUDA, but on a CPU as threads
    happen to come; ``index_select`` does it the other way round.
    """
    return states[index] if states.is_cuda else states.index_select(0, index)


def sum_dtype(device: torch.device) -> torch.dtype:
    """What log-probabilities are summed in: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Policy(nn.Module):
    """The language model that trains, with the contrastive projection head beside it."""

    def __init__(
        self, model: nn.Module, projection: nn.Module | None, embedding: EmbeddingSettings
    ) -> None:
        super().__init__()
        fuse_layers(model)
        self.model = model
        self.projection = projection
        self.embedding = embedding

    @property
    def decoder(self) -> nn.Module:
        """The decoder stack under the head, adapters included."""
        decoder = causal_lm(self.model).get_decoder()
        if not isinstance(decoder, nn.Module):
            raise ModelError(f"{type(causal_lm(self.model)).__name__} has no decoder to train")
        return decoder

    def forward(
        self, batch: PreferenceBatch, wanted: Wanted, dropout_seed: int | None = None
    ) -> PolicyOutput:
        """One pass over the batch's rows.

        Args:
            batch: rows or trees.
            wanted: which parts to compute.
            dropout_seed: of the embeddings' dropout masks (and of the model's own dropout, when it
                has any), so that equal seeds give equal masks; None in evaluation.
        """
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        hidden = hidden_states(self.decoder, batch)
        log_probs = queries = keys = None
        if wanted.log_probs:
            log_probs = completion_log_probs(
                self.model, hidden, batch, only_chosen=wanted.only_chosen
            )
        if wanted.queries:
            seed = None if dropout_seed is None else 2 * dropout_seed
            pooled = pool_queries(hidden, batch)
            queries = embed(pooled, self.projection, self.embedding, dropout_seed=seed)
        if wanted.keys:
            seed = None if dropout_seed is None else 2 * dropout_seed + 1
            pooled = pool_keys(hidden, batch).to(hidden.dtype)
            keys = embed(pooled, self.projection, self.embedding, dropout_seed=seed)
        return PolicyOutput(log_probs=log_probs, queries=queries, keys=keys)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name → parameter of everything that receives a gradient."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


class Reference:
    """log π_ref of a batch's completions, (S), without gradient.

    ``model`` None: the policy's own starting weights, that is its adapter switched off.
    """

    def __init__(self, policy: Policy, model: nn.Module | None = None) -> None:
        self._policy = policy
        if model is not None:
            fuse_layers(model)
            model = model.eval().requires_grad_(False)
        self._model = model

    def to(self, device: torch.device) -> None:
        """Moves a model of its own to the device."""
        if self._model is not None:
            self._model.to(device)

    @torch.no_grad()
    def log_probs(self, batch: PreferenceBatch) -> Tensor:
        """(S) float64 sums in nats."""
        with self._active() as model:
            hidden = hidden_states(causal_lm(model).get_decoder(), batch)
            return completion_log_probs(model, hidden, batch)

    @contextmanager
    def _active(self) -> Iterator[nn.Module]:
        if self._model is not None:
            yield self._model
            return
        was_training = self._policy.training
        self._policy.eval()
        try:
            assert isinstance(self._policy.model, PeftModel)
            with self._policy.model.disable_adapter():
                yield self._policy.model
        finally:
            self._policy.train(was_training)
