"""The last layer's MLP, at the positions whose output something reads.

(R) rows  (L) tokens of a row  (D) hidden  (N) positions that are read

After the last attention no position hears of another any more, and of a prompt only the last
token's state is read: it predicts the first token of every branch and is the contrastive query.
What the MLP makes of the other prompt tokens and of padding would be thrown away. The MLP is most
of a layer's work, so the last layer costs a tree little more than its completions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cpo_arabic.modeling.layout import TreeLayout


class ReadPositions:
    """Hooks of one layer: its attention says what is read, its MLP computes no more than that.

    The attention's hook runs again where gradient checkpointing repeats the layer, so the MLP
    always meets the layout of the batch that is being computed.
    """

    def __init__(self) -> None:
        self._layout: TreeLayout | None = None
        self._shape = torch.Size()

    def install(self, attention: nn.Module, mlp: nn.Module) -> None:
        """Puts the hooks on a layer's two halves."""
        attention.register_forward_pre_hook(self._before_attention, with_kwargs=True)
        mlp.register_forward_pre_hook(self._before_mlp)
        mlp.register_forward_hook(self._after_mlp)

    def _before_attention(self, _: nn.Module, __: Any, options: dict[str, Any]) -> None:
        self._layout = options.get("tree_layout")

    def _before_mlp(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(R, L, D) → (1, N, D)"""
        if self._layout is None:
            return inputs
        states, *others = inputs
        self._shape = states.shape
        read = self._layout.read_positions(states.device)
        return (states.flatten(0, 1).index_select(0, read)[None], *others)

    def _after_mlp(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        """(1, N, D) → (R, L, D), zero where nothing reads"""
        if self._layout is None:
            return output
        read = self._layout.read_positions(output.device)
        rows = output.new_zeros(self._shape[:2].numel(), output.shape[-1])
        return rows.index_copy(0, read, output[0]).view(*self._shape[:2], -1)
