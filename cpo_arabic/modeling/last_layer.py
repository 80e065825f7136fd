"""The last layer, computed only where something reads its output.

(R) rows  (L) tokens of a row  (D) hidden  (N) positions that are read

Of a prompt, only the last token's final state is read: it predicts the first token of every branch
and is the contrastive query. The other prompt tokens are needed in the last layer as keys and
values and for nothing else. Its query and output projections and its MLP, nearly all of its work,
go without them, and without padding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cpo_arabic.modeling.layout import TreeLayout

NARROWED = ("mlp", "q_proj", "o_proj")
"""Modules of the last layer that act on each position by itself, by the names they usually have."""


class ReadPositions:
    """Hooks of one layer: its attention says what is read, its parts compute no more than that.

    The attention's hook runs again where gradient checkpointing repeats the layer, so the parts
    always meet the layout of the batch that is being computed.
    """

    def __init__(self) -> None:
        self._layout: TreeLayout | None = None

    def install(self, layer: nn.Module, attention: nn.Module) -> None:
        """Puts the hooks on a decoder layer, of which ``attention`` is a child."""
        attention.register_forward_pre_hook(self._before_attention, with_kwargs=True)
        for parent in (layer, attention):
            for name, part in parent.named_children():
                if name in NARROWED:
                    part.register_forward_pre_hook(self._select)
                    part.register_forward_hook(self._spread)

    def _before_attention(self, _: nn.Module, __: Any, options: dict[str, Any]) -> None:
        self._layout = options.get("tree_layout")

    def _select(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(R, L, D) → (1, N, D)"""
        if self._layout is None:
            return inputs
        states, *others = inputs
        return (self._layout.gather_read(states.flatten(0, 1))[None], *others)

    def _spread(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        """(1, N, D) → (R, L, D), zero where nothing reads"""
        layout = self._layout
        if layout is None:
            return output
        return layout.spread_read(output[0]).view(layout.rows, layout.length, -1)
