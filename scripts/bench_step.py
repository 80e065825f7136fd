"""One optimizer step of ours and of TRL's CPOTrainer: same model, same pairs, same objective.

    OMP_NUM_THREADS=1 python scripts/bench_step.py --json step.json --plot step.png

A step is forward, loss, backward and AdamW, full fine-tuning in float32 on the CPU, from batches
that are already collated; neither side clips. The objective is the published CPO (beta 0.1, sums of
log-probabilities, cpo_alpha 1, no contrastive term): the mean over all (chosen, negative) pairs of
−log σ(beta·(log π chosen − log π negative)), plus the chosen answers' mean negative log-likelihood
per token. TRL reads k negatives of a prompt as k pairs.

A case is ``P,C,k[,G]``: G groups (1 if left out) of a prompt of P random tokens and k + 1
completions of C tokens, with a random Qwen2; or ``demo,k[,G]``: G (32) rows of the demo's Arabic
training data with the first k negatives that were written for each, with the demo's model.

What is reported:

- tokens: those of the data set's rows in a step, each prompt once and each completion once, without
  padding: the same number for every variant, so tokens per second compare as times do.
- seconds: medians over repeats in which the variants take turns, each in a process of its own. CPU
  seconds are the steadier where other work shares the machine.
- peak: the resident set's high-water mark during a step over what it was before the first, when
  libraries, model and data were loaded. Gradients and Adam's moments (``state``) are part of it,
  and the same for all; ``working`` is the rest: activations, logits and what is passed by.
  What a compiler keeps in the process counts, too.
- loss and gradient error: against a definition in float64, one row per completion, written below.
  The learning rate is 0, so that all repeats and the check compute the same.
- floor: the seconds that the arithmetic nobody can leave out would take at the machine's measured
  matrix-product speed: each token once through the decoder's matrices, each completion token once
  through the head, times 6 (forward and backward). Attention, norms and AdamW are not in it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from cpo_arabic.data.pack import Padding, TokenizedGroup, collate

DEMO = Path(__file__).resolve().parents[1] / "demo"
CASES = ["512,64,1", "512,64,3", "256,256,3", "demo,1", "demo,3"]
BETA, CPO_ALPHA = 0.1, 1.0
PADDING: dict[str, Padding] = {
    "ours, packed": "packed",
    "ours, packed, compiled": "packed",
    "ours, longest": "longest",
}
TRL: dict[str, dict[str, Any]] = {
    "TRL, defaults": {},
    "TRL, not checkpointed": {"gradient_checkpointing": False},
    "TRL, compiled": {"gradient_checkpointing": False, "torch_compile": True},
}
VARIANTS = [*PADDING, *TRL]
GOALS = {"512,64,1": 3.5, "512,64,3": 7.0, "256,256,3": 3.5, "demo,1": 2.0, "demo,3": 2.0}
TOLERANCE = {"loss": 1e-5, "gradient": 1e-4}


@dataclass(frozen=True)
class Options:
    """What every process of a run must know."""

    hidden: int
    layers: int
    vocab: int
    row_tokens: int
    threads: int
    repeats: int
    warmup: int
    seed: int

    @property
    def steps(self) -> int:
        """Warm-up, timed steps, and the one whose gradient is checked."""
        return self.warmup + self.repeats + 1


@dataclass(frozen=True)
class Case:
    """G groups of one chosen completion and k negatives; ``prompt`` 0: rows of the demo."""

    name: str
    prompt: int
    completion: int
    negatives: int
    count: int

    @staticmethod
    def parse(text: str) -> Case:
        """``512,64,3`` or ``demo,3``, each with the number of groups behind it if wanted."""
        demo = text.startswith("demo,")
        numbers = [int(part) for part in text.removeprefix("demo,").split(",")]
        prompt, completion = (0, 0) if demo else numbers[:2]
        negatives, count = (*numbers[0 if demo else 2 :], 32 if demo else 1)[:2]
        return Case(text, prompt, completion, negatives, count)

    def groups(self, options: Options) -> list[TokenizedGroup]:
        """Its rows, the same in every process."""
        if not self.prompt:
            return _demo_groups(self, options)
        generator = torch.Generator().manual_seed(options.seed)

        def draw(count: int) -> list[int]:
            return torch.randint(1, options.vocab, (count,), generator=generator).tolist()

        return [
            TokenizedGroup(
                row=row,
                prompt_ids=draw(self.prompt),
                completion_ids=[draw(self.completion) for _ in range(self.negatives + 1)],
                prompt_key=row,
                completion_keys=list(range(self.negatives + 1)),
            )
            for row in range(self.count)
        ]

    def tokenizer(self) -> Any:
        """The demo's; for random ids one that only knows how to pad."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if not self.prompt:
            return AutoTokenizer.from_pretrained(DEMO / "base-model")
        from tokenizers import Tokenizer, models

        words = models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="</s>"
        )

    def model(self, options: Options) -> Any:
        """The causal language model in float32, the same in every process."""
        from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

        if not self.prompt:
            path = DEMO / "base-model"
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
        heads = max(options.hidden // 64, 2)
        torch.manual_seed(options.seed)
        config = Qwen2Config(
            vocab_size=options.vocab,
            hidden_size=options.hidden,
            intermediate_size=4 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=heads,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
        return Qwen2ForCausalLM(config).train()


def _demo_groups(case: Case, options: Options) -> list[TokenizedGroup]:
    """Rows of the demo that have k negatives of their own, drawn at random, the first k of each."""
    from cpo_arabic.config import load_config
    from cpo_arabic.run import data as run_data

    files = [
        f"data.train_file={DEMO / 'data' / 'train.jsonl'}",
        f"data.validation_file={DEMO / 'data' / 'heldout.jsonl'}",
        f"model.name={DEMO / 'base-model'}",
    ]
    config_file = DEMO.parent / "configs" / "demo.yaml"
    config = load_config(config_file, files, environ={}, env_file=None).config
    dataset = run_data.tokenize(config, run_data.read(config).train, case.tokenizer())
    wanted = range(case.negatives + 1)
    fit = [row for row in range(len(dataset)) if len(dataset.lengths(row)[1]) >= len(wanted)]
    return [
        TokenizedGroup(
            row=row,
            prompt_ids=dataset.store.prompt_ids(row),
            completion_ids=[dataset.store.completion_ids(row, number) for number in wanted],
            prompt_key=dataset.prompt_key(row),
            completion_keys=list(dataset.completion_keys(row))[: len(wanted)],
        )
        for row in random.Random(options.seed).sample(fit, case.count)
    ]


# --- one variant in its own process --------------------------------------------------------------


class Turns:
    """A worker's side of the run: it waits for its turn and says what the step took."""

    def __init__(self, pipe: Connection, truth: Path) -> None:
        self._pipe, self._truth = pipe, truth
        self._before: float | None = None
        self.gradient_error = float("nan")

    def begin(self) -> None:
        """Wait; the clock runs from here."""
        if self._before is None:
            settle()
            self._before = status_mib("VmRSS")
        self._pipe.recv()
        clear_refs = Path("/proc/self/clear_refs")
        if clear_refs.exists():
            clear_refs.write_text("5")  # the high-water mark counts from here
        self._started = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Stop the clock and send it."""
        wall, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        peak = status_mib("VmHWM")
        extra = None if peak is None or self._before is None else peak - self._before
        self._pipe.send((wall, cpu, extra))

    def check(self, model: torch.nn.Module) -> None:
        """Compare the gradient that lies in the model with the true one, over all parameters."""
        squared = norm = 0.0
        with safe_open(self._truth, "pt") as file:
            for name, parameter in model.named_parameters():
                true = file.get_tensor(name)
                assert parameter.grad is not None, name
                squared += float((parameter.grad.double() - true).square().sum())
                norm += float(true.square().sum())
        self.gradient_error = (squared / norm) ** 0.5

    def finish(self, **facts: Any) -> None:
        """What is known at the end."""
        self._pipe.send({"gradient_error": self.gradient_error, **facts})


def work(pipe: Connection, case: Case, variant: str, options: Options, truth: Path) -> None:
    """A process's main function."""
    quiet(options)
    turns = Turns(pipe, truth)
    if variant in TRL:
        work_trl(turns, case, TRL[variant], options)
    else:
        work_ours(turns, case, PADDING[variant], options, compiled="compiled" in variant)


def work_ours(
    turns: Turns, case: Case, padding: Padding, options: Options, *, compiled: bool
) -> None:
    """Steps as the training loop takes them: accumulate, then AdamW."""
    from accelerate import Accelerator

    from cpo_arabic.modeling.encoder import EmbeddingSettings
    from cpo_arabic.modeling.policy import Policy
    from cpo_arabic.objective.contrastive import ContrastiveSettings
    from cpo_arabic.objective.total import ObjectiveSettings
    from cpo_arabic.training.engine import Engine
    from cpo_arabic.training.plan import Share
    from cpo_arabic.training.step import accumulate
    from cpo_arabic.training.trainer import OptimizerSettings, build_optimizer

    objective = ObjectiveSettings(
        loss_type="sigmoid",
        beta=BETA,
        temperature=1.0,
        alpha=0.0,
        gamma=0.0,
        label_smoothing=0.0,
        preference_weight=1.0,
        cpo_alpha=CPO_ALPHA,
        contrastive_weight=0.0,
        contrastive=ContrastiveSettings(temperature=1.0, margin=0.0, concentration=0.0),
    )
    settings = OptimizerSettings(
        learning_rate=0.0, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8
    )
    policy = Policy(case.model(options), None, EmbeddingSettings(dropout=0.0, normalize=True))
    if compiled:
        policy.decoder.compile(dynamic=True)
    optimizer = build_optimizer(policy, settings)
    accelerator = Accelerator(cpu=True)
    engine = Engine(
        accelerator=accelerator,
        policy=accelerator.prepare(policy),
        objective=objective,
        reference=None,
        momentum=None,
        queue=None,
        seed=options.seed,
    )
    groups = case.groups(options)
    batch = collate(
        groups,
        padding=padding,
        pad_id=case.tokenizer().pad_token_id,
        max_length=options.row_tokens,
        max_tokens_per_row=options.row_tokens,
    )
    share = Share(batches=[batch], rows=[[group.row for group in groups]], counted=True)
    for step in range(options.steps):
        turns.begin()
        sums, _ = accumulate(engine, share, step)
        if step == options.steps - 1:
            turns.check(policy.model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.end()
    means = sums.means()
    turns.finish(
        loss=means["preference_loss"] + CPO_ALPHA * means["nll_loss"],
        positions=batch.input_ids.numel(),
        head_rows=len(batch.token_targets),
    )


def work_trl(turns: Turns, case: Case, chosen: dict[str, Any], options: Options) -> None:
    """TRL's own loop, asked for its times at the beginning and the end of each step."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == args.max_steps - 1:
                turns.check(model)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end()

    features = [pair for group in case.groups(options) for pair in pairs_of(group)]
    model = case.model(options)
    with tempfile.TemporaryDirectory() as folder:
        config = CPOConfig(
            output_dir=folder,
            loss_type="sigmoid",
            beta=BETA,
            cpo_alpha=CPO_ALPHA,
            bf16=False,
            use_cpu=True,
            max_steps=options.steps,
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
            seed=options.seed,
            **chosen,
        )
        trainer = CPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=case.tokenizer(),
            callbacks=[Clock()],
        )
        trainer.train_dataset = features  # the very ids that ours get, as its tokenize_row has them
        outcome = trainer.train()
    width = max(len(f[f"{side}_input_ids"]) for f in features for side in ("chosen", "rejected"))
    positions = 2 * len(features) * width
    turns.finish(loss=outcome.training_loss, positions=positions, head_rows=positions)


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


def work_truth(pipe: Connection, case: Case, options: Options, truth: Path) -> None:
    """The definition in float64, a completion at a time; its gradient goes into a file."""
    quiet(options)
    model, groups = case.model(options).double(), case.groups(options)

    def log_prob(prompt: list[int], completion: list[int]) -> Tensor:
        ids = torch.tensor([prompt + completion])
        logits = model(ids, use_cache=False, logits_to_keep=len(completion) + 1).logits[0, :-1]
        return -F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")

    tokens = sum(len(group.completion_ids[0]) for group in groups)
    pairs = sum(len(group.completion_ids) - 1 for group in groups)
    loss = 0.0
    for group in groups:
        chosen, *negatives = (log_prob(group.prompt_ids, ids) for ids in group.completion_ids)
        losses = -F.logsigmoid(BETA * (chosen - torch.stack(negatives)))
        share = losses.sum() / pairs - CPO_ALPHA * chosen / tokens
        share.backward()
        loss += share.item()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    save_file(gradients, truth)
    layers = model.get_decoder().layers
    pipe.send(
        {
            "loss": loss,
            "pairs": pairs,
            "tokens": sum(len(g.prompt_ids) + sum(map(len, g.completion_ids)) for g in groups),
            "completion_tokens": sum(len(ids) for g in groups for ids in g.completion_ids),
            "parameters": sum(p.numel() for p in model.parameters()),
            "decoder_weights": sum(p.numel() for p in layers.parameters() if p.ndim == 2),
            "head_weights": model.get_output_embeddings().weight.numel(),
        }
    )


def quiet(options: Options) -> None:
    """As many threads as asked for, and no progress bars."""
    import datasets
    from transformers.utils import logging

    torch.set_num_threads(options.threads)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def settle() -> None:
    """Give back what has been freed, so that the resident set is what is in use."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def status_mib(field: str) -> float | None:
    """A figure of this process's memory; None off Linux."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


# --- a run ---------------------------------------------------------------------------------------


def start(target: Callable[..., None], *arguments: Any) -> tuple[Connection, Any]:
    """A fresh process and the pipe to it; reading the pipe of a dead one raises EOFError."""
    spawn = multiprocessing.get_context("spawn")
    mine, its = spawn.Pipe()
    process = spawn.Process(target=target, args=(its, *arguments))
    process.start()
    its.close()
    return mine, process


def measure(case: Case, variants: list[str], options: Options, peak_flops: float) -> dict[str, Any]:
    """All variants of a case, taking turns."""
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder) / "gradient.safetensors"
        pipe, process = start(work_truth, case, options, truth)
        facts = pipe.recv()
        process.join()
        notes = {variant: reason for variant in variants if (reason := missing(variant))}
        workers = {
            variant: start(work, case, variant, options, truth)
            for variant in variants
            if variant not in notes
        }
        samples: dict[str, list[tuple[float, float, float | None]]] = {v: [] for v in workers}
        ends: dict[str, dict[str, Any]] = {}
        for turn in range(options.steps):
            order = list(workers)
            order = order[turn % len(order) :] + order[: turn % len(order)]
            for variant in order:
                try:
                    workers[variant][0].send(True)
                    samples[variant].append(workers[variant][0].recv())
                    if turn == options.steps - 1:
                        ends[variant] = workers[variant][0].recv()
                except (EOFError, BrokenPipeError):
                    notes[variant] = "failed: see the messages above"
                    workers.pop(variant)
        for _, process in workers.values():
            process.join()
    flops = 6 * facts["decoder_weights"] * facts["tokens"]
    flops += 6 * facts["head_weights"] * facts["completion_tokens"]
    result = {
        "case": case.name,
        "goal": GOALS.get(case.name),
        **facts,
        "state_mib": 12 * facts["parameters"] / 2**20,
        "floor_seconds": flops / peak_flops,
        "variants": {},
    }
    for variant in variants:
        result["variants"][variant] = (
            summary(samples[variant][options.warmup : -1], ends[variant], result)
            if variant in ends
            else {"note": notes[variant]}
        )
    result["ratios"] = ratios(result["variants"])
    return result


def missing(variant: str) -> str:
    """Why a variant cannot be run here, or nothing."""
    if variant in TRL and importlib.util.find_spec("trl") is None:
        return "not installed"
    if "compiled" in variant:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "no C++ compiler"
    return ""


def summary(
    samples: list[tuple[float, float, float | None]], end: dict[str, Any], case: dict[str, Any]
) -> dict[str, Any]:
    """One variant's figures."""
    wall, cpu, memory = zip(*samples, strict=True)
    known = [mib for mib in memory if mib is not None]
    peak = max(known) if known else None
    return {
        "wall_seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(cpu),
        "all_wall_seconds": wall,
        "all_cpu_seconds": cpu,
        "tokens_per_cpu_second": case["tokens"] / statistics.median(cpu),
        "peak_mib": peak,
        "working_mib": None if peak is None else peak - case["state_mib"],
        "floors": statistics.median(cpu) / case["floor_seconds"],
        "loss": end["loss"],
        "loss_error": abs(end["loss"] / case["loss"] - 1),
        "gradient_error": end["gradient_error"],
        "positions": end["positions"],
        "head_rows": end["head_rows"],
        "agrees": abs(end["loss"] / case["loss"] - 1) < TOLERANCE["loss"]
        and end["gradient_error"] < TOLERANCE["gradient"],
    }


def ratios(variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Ours → TRL's → how many times faster, and which part of the memory."""
    measured = {name: v for name, v in variants.items() if "note" not in v}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for ours in (name for name in measured if name not in TRL):
        found[ours] = {}
        for peer in (name for name in measured if name in TRL):
            a, b = measured[ours], measured[peer]
            found[ours][peer] = {
                "cpu_speed": b["cpu_seconds"] / a["cpu_seconds"],
                "wall_speed": b["wall_seconds"] / a["wall_seconds"],
                "positions": b["positions"] / a["positions"],
            }
            if a["peak_mib"] is not None:
                found[ours][peer]["peak_memory"] = a["peak_mib"] / b["peak_mib"]
                found[ours][peer]["working_memory"] = a["working_mib"] / b["working_mib"]
    return found


def fastest(names: set[str], variants: dict[str, dict[str, Any]]) -> str | None:
    """The one of ``names`` that took the fewest CPU seconds, if any was measured."""
    measured = [name for name in names if "cpu_seconds" in variants.get(name, {})]
    return min(measured, key=lambda name: variants[name]["cpu_seconds"]) if measured else None


def matmul_flops() -> float:
    """Multiply-adds × 2 per CPU second of a large float32 product: the machine's, not anyone's."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(6):
        started = time.process_time()
        torch.mm(a, b)
        best = min(best, time.process_time() - started)
    return 2 * 2048**3 / best


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


def hardware(options: Options) -> dict[str, Any]:
    """The machine and the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    packages = ["torch", "transformers", "accelerate", "trl"]
    return {
        "processor": next(named, platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in packages if importlib.util.find_spec(name)},
    }


# --- showing -------------------------------------------------------------------------------------


def show(report: dict[str, Any], console: Console) -> None:
    """The table: ratios are those of each row against the fastest TRL variant of its case."""
    table = Table(title="One optimizer step; × against TRL's fastest variant of the case")
    table.add_column("case")
    table.add_column("variant", no_wrap=True)
    heads = ["wall s", "CPU s", "tok/CPU s", "× CPU", "× wall", "goal", "floors"]
    heads += ["peak MiB", "part", "working", "part", "loss", "loss err", "grad err"]
    for head in heads:
        table.add_column(head, justify="right")
    for case in report["cases"]:
        variants = case["variants"]
        best = fastest(set(TRL), variants)
        for number, (name, v) in enumerate(variants.items()):
            label = "" if number else f"{case['case']}\n{case['tokens']} tokens"
            if "note" in v:
                table.add_row(label, name, v["note"])
                continue
            b = variants[best] if best else None
            table.add_row(
                label,
                name,
                f"{v['wall_seconds']:.3f}",
                f"{v['cpu_seconds']:.3f}",
                f"{v['tokens_per_cpu_second']:.0f}",
                _times(b and b["cpu_seconds"] / v["cpu_seconds"]),
                _times(b and b["wall_seconds"] / v["wall_seconds"]),
                _times(case["goal"] if name == VARIANTS[0] else None),
                f"{v['floors']:.2f}",
                *_memory(v, b, "peak_mib"),
                *_memory(v, b, "working_mib"),
                f"{v['loss']:.6f}",
                f"{v['loss_error']:.0e}",
                f"{v['gradient_error']:.0e}" + ("" if v["agrees"] else " ✗"),
            )
        table.add_section()
    console.print(table)
    for name, reason in report["unsupported"].items():
        console.print(f"TRL, {name}: {reason}", style="dim")


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def _memory(v: dict[str, Any], b: dict[str, Any] | None, key: str) -> tuple[str, str]:
    if v[key] is None:
        return "?", ""
    return f"{v[key]:.0f}", f"{v[key] / b[key]:.2f}" if b else ""


def draw(report: dict[str, Any], path: Path) -> None:
    """Speed and memory of our variants against TRL's fastest, a panel each."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cases = [case for case in report["cases"] if fastest(set(TRL), case["variants"])]
    names = [n for n in VARIANTS if any("cpu_seconds" in c["variants"].get(n, {}) for c in cases)]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(17, 4.8), layout="constrained")
    width = 0.8 / max(len(names), 1)
    for number, name in enumerate(names):
        places, faster, part = [], [], []
        for place, case in enumerate(cases):
            best = case["variants"][fastest(set(TRL), case["variants"])]
            v = case["variants"].get(name, {})
            if "cpu_seconds" in v:
                places.append(place + (number - (len(names) - 1) / 2) * width)
                faster.append(best["cpu_seconds"] / v["cpu_seconds"])
                part.append(v["peak_mib"] / best["peak_mib"] if v["peak_mib"] else 0.0)
        colour = plt.get_cmap("Greens" if name in PADDING else "Greys")(0.85 - 0.12 * number)
        bars = speed.bar(places, faster, width, label=name, color=colour)
        speed.bar_label(bars, fmt="%.1f", fontsize=6)
        bars = memory.bar(places, part, width, label=name, color=colour)
        memory.bar_label(bars, fmt="%.2f", fontsize=6)
    for place, case in enumerate(cases):
        if case["goal"]:
            ends = (place - 0.4, place + 0.4)
            label = "" if place else "goal"
            speed.plot(ends, (case["goal"],) * 2, color="tab:red", lw=1, ls="--", label=label)
    speed.set_title("Speed, CPU time (higher is better; TRL's fastest = 1)")
    memory.set_title("Peak memory over the loaded model (lower is better; the same = 1)")
    for axes in (speed, memory):
        axes.set_xticks(range(len(cases)), [case["case"] for case in cases])
        axes.set_xlabel("case: prompt, completion, negatives; or the demo's rows, negatives")
        axes.spines[["top", "right"]].set_visible(False)
    speed.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main(
    case: Annotated[list[str] | None, typer.Option(help="P,C,k[,G] or demo,k[,G]")] = None,
    variant: Annotated[list[str] | None, typer.Option(help=" | ".join(VARIANTS))] = None,
    hidden: Annotated[int, typer.Option(help="hidden size of the random Qwen2")] = 512,
    layers: Annotated[int, typer.Option(help="its layers")] = 6,
    vocab: Annotated[int, typer.Option(help="its vocabulary")] = 32_000,
    row_tokens: Annotated[int, typer.Option(help="token budget of a packed row")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, help="timed steps of each variant")] = 5,
    warmup: Annotated[int, typer.Option(min=1, help="steps before them")] = 1,
    threads: Annotated[int, typer.Option(min=1, envvar="OMP_NUM_THREADS")] = 1,
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    plot: Annotated[Path | None, typer.Option(help="a picture, .png or .svg")] = None,
) -> None:
    """One optimizer step of ours and of TRL's CPOTrainer: speed, peak memory and agreement."""
    for name in variant or []:
        if name not in VARIANTS:
            raise typer.BadParameter(f"{name!r} is not one of: {', '.join(VARIANTS)}")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes to come
    torch.set_num_threads(threads)
    options = Options(hidden, layers, vocab, row_tokens, threads, repeats, warmup, seed)
    peak = matmul_flops()
    console = Console(width=None if sys.stdout.isatty() else 190)
    report: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "hardware": hardware(options),
        "matmul_gflops_per_cpu_second": peak / 1e9,
        "settings": {k: v for k, v in vars(options).items() if k != "threads"},
        "objective": {"loss_type": "sigmoid", "beta": BETA, "cpo_alpha": CPO_ALPHA},
        "tolerance": TOLERANCE,
        "unsupported": unsupported(),
        "cases": [],
    }
    console.print_json(json.dumps(report["hardware"]))
    for each in map(Case.parse, case or CASES):
        with console.status(each.name):
            report["cases"].append(measure(each, variant or VARIANTS, options, peak))
    show(report, console)
    if json_file:
        json_file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if plot:
        draw(report, plot)
    every = [v for c in report["cases"] for v in c["variants"].values()]
    if not all(v.get("agrees", True) for v in every):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
