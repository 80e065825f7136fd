"""One optimizer step of ours and of TRL's CPOTrainer: same model, same pairs, same objective.

A step is forward, loss, backward and AdamW (fused on both sides) from batches that are already
collated; neither side clips. The objective is the published CPO (beta 0.1, sums of
log-probabilities, cpo_alpha 1, no contrastive term): the mean over all (chosen, negative) pairs of
−log σ(beta·(log π chosen − log π negative)), plus the chosen answers' mean negative log-likelihood
per token. TRL reads k negatives of a prompt as k pairs. The learning rate is 0, so that all turns
and the check compute the same; both sides get the very same (peft-wrapped) model.

- tokens: those of the data set's rows, each prompt once and each completion once, without padding.
- peak: over what was in use before the first step, when libraries, model and data were loaded.
  Gradients and Adam's moments (``state``) are part of it, and the same for all; ``working`` is the
  rest. What a compiler keeps in the process counts, too.
- loss and gradient error: against the definition in float64, one row per completion, written below.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from cpo_arabic.data.pack import Padding, TokenizedGroup
from scripts.bench.cases import HALF_BILLION, Case, Shape, needed_flops, sizes, unpadded
from scripts.bench.goals import TRL as TRL_NAMES
from scripts.bench.measure import (
    MIB,
    Job,
    Turns,
    Watch,
    computed,
    matmul_rate,
    missing,
    outcomes,
    relative_error,
    take_turns,
)  # fmt: skip
from scripts.bench.ours import OurStep, pairwise_cpo

CASES = (
    "512,64,1", "512,64,3", "256,256,3", "512,64,1,lora", "512,64,3,lora",
    "demo,1", "demo,3,16", "wmt24pp,1,16", "512,256,3,gpu",
)  # fmt: skip
BETA, CPO_ALPHA = 0.1, 1.0
OBJECTIVE = pairwise_cpo(BETA, CPO_ALPHA)
OURS: dict[str, Padding] = {
    "ours": "packed",
    "ours, compiled": "packed",
    "ours, a row per completion": "longest",
}
TRL: dict[str, dict[str, Any]] = dict(
    zip(
        TRL_NAMES,
        (
            {},
            {"gradient_checkpointing": False},
            {"gradient_checkpointing": False, "torch_compile": True},
        ),
        strict=True,
    )
)
VARIANTS = (*OURS, *TRL)


@dataclass(frozen=True)
class Settings:
    """Of the random model, the packed rows and the run."""

    hidden: int = 512
    layers: int = 6
    vocab: int = 32_000
    most_groups: int = 32
    repeats: int = 3
    threads: int = 1
    compiled: bool = True

    def shape(self, case: Case) -> Shape:
        """The random model of a case."""
        own = Shape(self.hidden, self.layers, self.vocab)
        return replace(own, **HALF_BILLION) if case.gpu else own


QUICK = Settings(hidden=256, layers=3, vocab=8000, most_groups=4, repeats=1, compiled=False)


def variants(name: str, settings: Settings) -> list[str]:
    """Those of a case that the settings ask for; our other ways only where the rows are plain."""
    case = Case.parse(name)
    return [
        each
        for each in VARIANTS
        if (settings.compiled or "compiled" not in each)
        and not (each.startswith("ours,") and (case.data or case.lora))
    ]


def measure(name: str, wanted: list[str], settings: Settings, watch: Watch) -> dict[str, Any]:
    """The variants of a case, taking turns, beside the truth.

    Raises:
        WorkerError: the truth could not be computed.
    """
    case = Case.parse(name)
    case = replace(case, groups=min(case.groups, settings.most_groups))
    if note := case.missing():
        return {"case": name, "note": note}
    facts, turns, notes = taken_turns(case, wanted, settings, watch)
    floor = needed_flops(facts) / matmul_rate(case.device, case.dtype)
    element = torch.finfo(case.dtype).bits // 8
    state = 3 * element * facts["trained_parameters"] / MIB
    found = outcomes(turns, notes, wanted, facts["loss"], lambda _: not case.gpu)
    for known in found.values():
        if "peak_mib" in known:
            peak = known["peak_mib"]
            known["working_mib"] = None if peak is None else peak - state
    clock = "wall_seconds" if case.gpu else "cpu_seconds"
    record = {"case": name, "clock": clock, **facts, "state_mib": state, "floor_seconds": floor}
    return {**record, "variants": found}


def taken_turns(
    case: Case, wanted: list[str], settings: Settings, watch: Watch, clock: type[Turns] = Turns
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], dict[str, str]]:
    """What the definition says, what each variant's turns cost, and why some have none.

    Raises:
        WorkerError: the truth could not be computed.
    """
    notes = {
        each: note
        for each in wanted
        if (note := missing("trl" if each in TRL else "", compiled="compiled" in each))
    }
    shape = settings.shape(case)
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder) / "gradient.safetensors"
        facts = computed(Job(work_truth, (case, shape, truth)), settings.threads)
        common = (case, shape, settings, truth, clock)
        jobs = {
            each: Job(work_trl if each in TRL else work_ours, (each, *common))
            for each in wanted
            if each not in notes
        }
        turns, died = take_turns(jobs, settings.repeats, settings.threads, watch)
    return facts, turns, notes | died


# --- one variant in its own process --------------------------------------------------------------


def work_ours(
    pipe: Any,
    variant: str,
    case: Case,
    shape: Shape,
    settings: Settings,
    truth: Path,
    clock: type[Turns] = Turns,
) -> None:
    """Steps as the training loop takes them: accumulate, then AdamW."""
    model = case.model(shape).to(case.device, case.dtype)
    step = OurStep(
        model,
        case.draw(shape),
        OBJECTIVE,
        padding=OURS[variant],
        pad_id=case.tokenizer().pad_token_id,
        compiled="compiled" in variant,
    )
    turns = clock(pipe, case.device)
    error: float | None = None
    for _ in range(1 + settings.repeats):
        turns.begin()
        sums = step.accumulate()
        error = gradient_error(model, truth) if error is None else error
        step.update()
        turns.stop()
        means = sums.means()
        turns.tell(
            loss=means["preference_loss"] + CPO_ALPHA * means["nll_loss"],
            gradient_error=error,
            positions=step.batch.input_ids.numel(),
            head_rows=len(step.batch.token_targets),
            fused_optimizer=bool(step.optimizer.defaults["fused"]),
        )


def work_trl(
    pipe: Any,
    variant: str,
    case: Case,
    shape: Shape,
    settings: Settings,
    truth: Path,
    clock: type[Turns] = Turns,
) -> None:
    """TRL's own loop, asked for its times at the beginning and the end of each step."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    turns = clock(pipe, case.device)
    found: dict[str, Any] = {}

    class Watched(CPOTrainer):
        def training_step(self, *arguments: Any, **named: Any) -> Tensor:
            found["loss"] = super().training_step(*arguments, **named)
            return found["loss"]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            if "gradient_error" not in found:
                found["gradient_error"] = gradient_error(model, truth)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.stop()
            turns.tell(
                **found | {"loss": float(found["loss"])},
                positions=positions,
                head_rows=positions,
                fused_optimizer=bool(trainer.optimizer.defaults.get("fused")),
            )

    features = [pair for group in case.draw(shape) for pair in pairs_of(group)]
    width = max(len(f[f"{side}_input_ids"]) for f in features for side in ("chosen", "rejected"))
    positions = 2 * len(features) * width
    model = case.model(shape).to(case.device, case.dtype)
    with tempfile.TemporaryDirectory() as folder:
        config = CPOConfig(
            output_dir=folder,
            loss_type="sigmoid",
            beta=BETA,
            cpo_alpha=CPO_ALPHA,
            bf16=case.gpu,
            use_cpu=not case.gpu,
            max_steps=1 + settings.repeats,
            per_device_train_batch_size=len(features),
            learning_rate=0.0,
            weight_decay=0.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            seed=shape.seed,
            **TRL[variant],
        )
        trainer = Watched(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=case.tokenizer(),
            callbacks=[Clock()],
        )
        trainer.train_dataset = features  # the very ids that ours get, as its tokenize_row has them
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def pairs_of(group: TokenizedGroup) -> list[dict[str, Any]]:
    """The group's k pairs as CPOTrainer's collator reads them."""

    def side(name: str, completion: list[int]) -> dict[str, list[int]]:
        ids = group.prompt_ids + completion
        return {
            f"{name}_input_ids": ids,
            f"{name}_attention_mask": [1] * len(ids),
            f"{name}_labels": [-100] * len(group.prompt_ids) + completion,
        }

    chosen, *negatives = group.completion_ids
    prompt = {
        "prompt_input_ids": group.prompt_ids,
        "prompt_attention_mask": [1] * len(group.prompt_ids),
    }
    return [prompt | side("chosen", chosen) | side("rejected", each) for each in negatives]


def work_truth(pipe: Any, case: Case, shape: Shape, truth: Path) -> None:
    """The definition in float64, a completion at a time; its gradient goes into a file."""
    model, groups = case.model(shape), case.draw(shape)
    model = model.to(case.dtype).double()

    def log_prob(prompt: list[int], completion: list[int]) -> Tensor:
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(completion) + 1).logits
        return -F.cross_entropy(logits[0, :-1], ids[0, len(prompt) :], reduction="sum")

    chosen_tokens = sum(len(group.completion_ids[0]) for group in groups)
    pairs = sum(len(group.completion_ids) - 1 for group in groups)
    loss = 0.0
    for group in groups:
        chosen, *negatives = (log_prob(group.prompt_ids, ids) for ids in group.completion_ids)
        losses = -F.logsigmoid(BETA * (chosen - torch.stack(negatives)))
        share = losses.sum() / pairs - CPO_ALPHA * chosen / chosen_tokens
        share.backward()
        loss += share.item()
    save_file({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, truth)
    tokens, completion_tokens = unpadded(groups)
    facts = {"tokens": tokens, "completion_tokens": completion_tokens, "pairs": pairs}
    pipe.send({"loss": loss, **facts, **sizes(model)})


def gradient_error(model: torch.nn.Module, truth: Path) -> float:
    """Of the gradient that lies in the model, over all its parameters together."""
    with safe_open(truth, "pt") as file:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        assert {name for name, _ in trained} == set(file.keys())
        return relative_error(
            (p.grad, file.get_tensor(n)) for n, p in trained if p.grad is not None
        )


def unsupported() -> dict[str, str]:
    """Settings that could make CPOTrainer faster and cannot be used here, with the reason."""
    if importlib.util.find_spec("trl") is None:
        return {}
    from trl.experimental.cpo import CPOConfig

    known = CPOConfig.__dataclass_fields__
    found = {
        name: "CPOConfig has no such field"
        for name in ("padding_free", "use_logits_to_keep")
        if name not in known
    }
    found["attn_implementation=flash_attention_2"] = "has no CPU kernel"
    found["use_liger_kernel"] = "its Triton kernels have no CPU backend"
    found["bf16"] = "left out: the comparison is in float32"
    found["group_by_length"] = "changes which rows share a batch, not the step; same rows here"
    return found
