"""The model card beside a trained artefact."""

from __future__ import annotations

from typing import Any

SHOWN = (
    ("reward accuracy", "eval_rewards/accuracies"),
    ("reward margin", "eval_rewards/margins"),
    ("NLL of chosen, nats per token", "eval_nll_loss"),
    ("loss", "eval_loss"),
)


def model_card(base: str, summary: dict[str, Any], *, is_adapter: bool) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        base: the base model's name.
        summary: of the run; see ``summary.json``.
        is_adapter: whether the artefact is a PEFT adapter.
    """
    before, after = summary["held_out_before"], summary["held_out_after"]
    rows = [
        f"| {title} | {before.get(key, float('nan')):.4f} | {after[key]:.4f} |"
        for title, key in SHOWN
        if key in after
    ]
    held_out = "\n".join(["| held out | before | after |", "|---|---|---|", *rows])
    library = "peft" if is_adapter else "transformers"
    return f"""---
base_model: {base}
library_name: {library}
language: ar
tags: [cpo, preference-optimization, arabic]
---

# {"Adapter" if is_adapter else "Model"} trained by Contrastive Preference Optimization

Base model: `{base}`. {summary["steps"]} optimizer steps over {summary["train_rows"]} rows of
preferences with cpo-arabic; `config.yaml` in the run directory repeats the run.

{held_out if rows else "No held-out rows were set apart."}

Held-out accuracy says that preferred answers became likelier than the others of this data set. It
says nothing of facts, safety or other data.
"""
