"""What is legal but inert, risky or slow, each with its reason and a remedy.

A check sees the configuration as a rule does and returns what to say, or nothing. ``warning`` means
the run will probably not do what its author wants; ``advice`` means it will, at a price.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cpo_arabic.config.fields import all_fields
from cpo_arabic.config.findings import Finding, Severity
from cpo_arabic.config.inert import inert_reason
from cpo_arabic.config.objective import objective_statement
from cpo_arabic.config.padding import padding_share
from cpo_arabic.config.problems import as_written
from cpo_arabic.config.root import CPOConfig
from cpo_arabic.config.rules import Settled, has_package, train_files


class Said(NamedTuple):
    """What a check has to say, and which field it is about."""

    message: str
    remedy: str
    at: str = ""


@dataclass(frozen=True)
class Check:
    """A check with its severity and the field it is about."""

    severity: Severity
    field: str
    test: Callable[[Settled], Said | None]


CHECKS: list[Check] = []


def check(
    severity: Severity, field: str
) -> Callable[[Callable[[Settled], Said | None]], Callable[[Settled], Said | None]]:
    """Register a check."""

    def register(test: Callable[[Settled], Said | None]) -> Callable[[Settled], Said | None]:
        CHECKS.append(Check(severity, field, test))
        return test

    return register


def findings(config: CPOConfig) -> list[Finding]:
    """All warnings and advice that the configuration by itself gives rise to."""
    c = Settled(config)
    found = [
        Finding(one.severity, said.at or one.field, said.message, said.remedy, one.test.__name__)
        for one in CHECKS
        if (said := one.test(c)) is not None
    ]
    found = _inert(c) + found
    return sorted(found, key=lambda finding: finding.severity != "warning")


def file_findings(config: CPOConfig) -> list[Finding]:
    """Warnings for files that are named and missing; apart, since loading needs no data."""
    c = Settled(config)
    return [
        Finding(
            "warning",
            field,
            f"{field}: {as_written(path)} does not exist (from {as_written(str(Path.cwd()))}); "
            "the run will refuse to start",
            f"put the file there, or name another: --set {field}=PATH",
            "missing_file",
        )
        for field, path in _named_files(c)
        if not Path(path).exists()
    ]


def describe_objective(config: CPOConfig) -> str:
    """The objective that the configuration stands for, in one line."""
    return objective_statement(Settled(config))


def _named_files(c: Settled) -> list[tuple[str, str]]:
    named = []
    if c.data.dataset_name is None:
        named += [("data.train_file", path) for path in train_files(c)]
    if c.is_set("data.validation_file") and c.data.validation_file:
        named.append(("data.validation_file", c.data.validation_file))
    if c.data.test_file:
        named.append(("data.test_file", c.data.test_file))
    if c.data.conversation_template.endswith(".jinja"):
        named.append(("data.conversation_template", c.data.conversation_template))
    return named


def _inert(c: Settled) -> list[Finding]:
    found = []
    for path in all_fields():
        reason = inert_reason(path, c) if c.is_set(path) else None
        if reason and not reason.quiet:
            message = f"{path} is set, but has no effect: {reason.because}"
            remedy = f"take it out, or change {reason.switches}"
            found.append(Finding("warning", path, message, remedy, "inert"))
    return found


# Learning rate and schedule


@check("warning", "training.learning_rate")
def learning_rate_range(c: Settled) -> Said | None:
    """The learning rate is outside the range that works for the mode."""
    rate = c.training.learning_rate
    mode = "LoRA" if c.optimization.use_lora else "full fine-tuning"
    highest = 1e-4 if c.optimization.use_lora else 1e-5
    if 1e-7 <= rate <= highest:
        return None
    if rate < 1e-7:
        return Said(
            f"training.learning_rate {rate:g} is so low that {mode} will hardly move",
            "values from 1e-7 on are usual",
        )
    return Said(
        f"training.learning_rate {rate:g} is high for preference training with {mode}: "
        "the likelihood of both completions tends to collapse",
        f"stay at or below {highest:g}; 1e-6 is the documented default",
    )


@check("warning", "training.warmup_steps")
def warmup_longer_than_run(c: Settled) -> Said | None:
    """The warm-up does not end within the run."""
    steps = c.training.max_steps
    if steps is None or c.training.warmup_steps < steps:
        return None
    return Said(
        f"training.warmup_steps {c.training.warmup_steps} does not end within "
        f"training.max_steps {steps}: the peak learning rate is never reached",
        f"set warmup_steps well below {steps}",
    )


@check("warning", "training.eval_steps")
def interval_longer_than_run(c: Settled) -> Said | None:
    """Evaluation never comes round."""
    steps, every = c.training.max_steps, c.training.eval_steps
    if steps is None or every is None or every <= steps:
        return None
    return Said(
        f"training.eval_steps {every} is more than training.max_steps {steps}: "
        "no evaluation before the end",
        f"set eval_steps to at most {steps}",
    )


@check("advice", "training.max_grad_norm")
def no_clipping(c: Settled) -> Said | None:
    """Gradients are not clipped."""
    if c.training.max_grad_norm is not None:
        return None
    return Said(
        "training.max_grad_norm is null: one bad batch can undo the run", "1.0 is the usual bound"
    )


# The preference term


@check("warning", "cpo.temperature")
def preference_temperature_low(c: Settled) -> Said | None:
    """The preference temperature is under 0.02."""
    if c.cpo.temperature >= 0.02 or not c.cpo.preference_weight or c.cpo.loss_type == "ipo":
        return None
    return Said(
        f"cpo.temperature {c.cpo.temperature:g} is under 0.02: rewards are multiplied by "
        f"{1 / c.cpo.temperature:g}, and training tends to be unstable",
        "use 0.05 to 0.1; the documented cure for instability is a higher temperature",
    )


@check("warning", "cpo.contrastive_temperature")
def contrastive_temperature_low(c: Settled) -> Said | None:
    """The contrastive temperature is under 0.02."""
    if c.cpo.contrastive_temperature >= 0.02 or not c.cpo.contrastive_weight:
        return None
    return Said(
        f"cpo.contrastive_temperature {c.cpo.contrastive_temperature:g} is under 0.02: "
        "only the single hardest negative still counts",
        "use 0.02 to 0.1",
    )


@check("advice", "cpo.beta")
def reward_scale(c: Settled) -> Said | None:
    """β/τ is outside the range that suits mean log-probabilities."""
    scale = c.cpo.beta / c.cpo.temperature
    skip = c.cpo.alpha != 1 or c.cpo.loss_type == "ipo" or not c.cpo.preference_weight
    if skip or 0.5 <= scale <= 10:
        return None
    what = "hardly tells completions apart" if scale < 0.5 else "saturates at once"
    return Said(
        f"β/τ = cpo.beta {c.cpo.beta:g} / cpo.temperature {c.cpo.temperature:g} = {scale:g} "
        f"on mean log-probabilities: the preference term {what}",
        "the documented pairs give 1 to 2.5, and SimPO recommends 2 to 10",
    )


@check("warning", "cpo.alpha")
def sums_at_mean_scale(c: Settled) -> Said | None:
    """Summed log-probabilities are compared at a scale meant for means."""
    scale = c.cpo.beta / c.cpo.temperature
    if c.cpo.alpha > 0.25 or scale < 0.8 or c.cpo.loss_type == "ipo" or not c.cpo.preference_weight:
        return None
    return Said(
        f"cpo.alpha {c.cpo.alpha:g} sums log-probabilities, and β/τ = {scale:g} is a scale for "
        "means: rewards of hundreds make gradients about ten times larger",
        "write temperature: 1 with beta: 0.1 (published CPO and DPO), or alpha: 1",
    )


@check("warning", "cpo.cpo_gamma")
def gamma_against_beta(c: Settled) -> Said | None:
    """SimPO's margin is larger than its reward scale."""
    scale = c.cpo.beta / c.cpo.temperature
    if c.cpo.loss_type != "simpo" or c.cpo.cpo_gamma <= scale or not c.cpo.preference_weight:
        return None
    return Said(
        f"cpo.cpo_gamma {c.cpo.cpo_gamma:g} is more than β/τ = {scale:g}: the margin asks the "
        f"chosen completion to be {c.cpo.cpo_gamma / scale:.2g} nats per token likelier, "
        "more than SimPO's own settings do (γ/β from 0 to 1)",
        f"set cpo_gamma to about {scale / 2:g}, or raise beta (2 to 10 with temperature: 1)",
    )


@check("advice", "cpo.cpo_gamma")
def simpo_without_margin(c: Settled) -> Said | None:
    """SimPO with a margin of 0 is the listwise loss."""
    if c.cpo.loss_type != "simpo" or c.cpo.cpo_gamma or not c.cpo.preference_weight:
        return None
    return Said(
        "cpo.cpo_gamma is 0: simpo without a margin is exactly loss_type cpo",
        "set cpo_gamma to about half of β/τ, or write loss_type: cpo",
    )


@check("advice", "cpo.cpo_alpha")
def cpo_simpo(c: Settled) -> Said | None:
    """SimPO with a behaviour-cloning term is CPO-SimPO."""
    if c.cpo.loss_type != "simpo" or not c.cpo.cpo_alpha or not c.cpo.preference_weight:
        return None
    return Said(
        f"cpo.cpo_alpha is {c.cpo.cpo_alpha:g} under loss_type simpo: this is CPO-SimPO",
        "that is fine if meant; published SimPO has cpo_alpha: 0",
    )


@check("warning", "cpo.loss_type")
def reference_expected(c: Settled) -> Said | None:
    """IPO compares with a reference, and none is in use."""
    if c.cpo.loss_type != "ipo" or c.reference_in_use or not c.cpo.preference_weight:
        return None
    return Said(
        "cpo.loss_type is ipo and no reference is in use: its fixed target is then asked of raw "
        "log-probabilities, which is not published IPO",
        "set force_use_ref_model: true",
    )


@check("advice", "cpo.loss_type")
def sigmoid_without_reference(c: Settled) -> Said | None:
    """The sigmoid loss without a reference is not DPO."""
    if c.cpo.loss_type != "sigmoid" or c.reference_in_use or not c.cpo.preference_weight:
        return None
    return Said(
        "cpo.loss_type is sigmoid and no reference is in use: this is CPO's pairwise form, not DPO",
        "for DPO set force_use_ref_model: true, or use configs/papers/dpo.yaml",
    )


@check("warning", "cpo.loss_type")
def simpo_with_reference(c: Settled) -> Said | None:
    """SimPO has no reference model."""
    if c.cpo.loss_type != "simpo" or not c.reference_in_use or not c.cpo.preference_weight:
        return None
    return Said(
        "cpo.loss_type is simpo and a reference is in use: published SimPO has none, "
        "and its γ is meant for rewards without one",
        "set force_use_ref_model: false and reference_model_name: null",
    )


@check("advice", "cpo.force_use_ref_model")
def reference_copy_costs_memory(c: Settled) -> Said | None:
    """A frozen copy of the model stays in memory."""
    copy = c.cpo.force_use_ref_model and not c.optimization.use_lora
    if not copy or c.cpo.precompute_ref_log_probs or c.cpo.reference_model_name:
        return None
    return Said(
        "the reference is a frozen second copy of the model, held for the whole run",
        "set precompute_ref_log_probs: true to free it after one pass, or use_lora: true",
    )


@check("advice", "cpo.preference_weight")
def no_preference_term(c: Settled) -> Said | None:
    """Nothing compares chosen with rejected completions."""
    if c.cpo.preference_weight:
        return None
    return Said(
        "cpo.preference_weight is 0: no likelihood of a completion is compared with another's",
        "that is fine for supervised or purely contrastive training",
    )


# Negatives


@check("advice", "cpo.num_negatives")
def one_negative_with_mixing(c: Settled) -> Said | None:
    """Mixed or hard sampling whose share of hard negatives rounds to none or all."""
    k, ratio = c.cpo.num_negatives, c.cpo.hard_negative_ratio
    strategy = c.cpo.negative_sampling_strategy
    if strategy == "random" or not ratio or 0 < round(k * ratio) < k or ratio == 1:
        return None
    drawn = "every negative is hard" if round(k * ratio) else "no negative is drawn as hard"
    return Said(
        f"cpo.num_negatives {k} × cpo.hard_negative_ratio {ratio:g} rounds to {round(k * ratio)}: "
        f"{drawn}, so {strategy} sampling mixes nothing",
        "use 2 to 3 negatives or more, as the best practices say",
    )


@check("advice", "cpo.hard_negative_ratio")
def strategy_without_hard_share(c: Settled) -> Said | None:
    """Hard or mixed sampling with a hard share of 0."""
    strategy = c.cpo.negative_sampling_strategy
    if strategy == "random" or c.cpo.hard_negative_ratio:
        return None
    return Said(
        f"cpo.negative_sampling_strategy is {strategy}, but cpo.hard_negative_ratio is 0: "
        "no negative is drawn as hard",
        "set hard_negative_ratio to 0.3 to 0.5, or the strategy to random",
    )


# The contrastive term


@check("warning", "cpo.use_queue")
def queue_without_momentum(c: Settled) -> Said | None:
    """A queue filled by an encoder that moves."""
    if not c.cpo.use_queue or c.cpo.use_momentum or not c.cpo.contrastive_weight:
        return None
    return Said(
        "cpo.use_queue is true without cpo.use_momentum: old keys come from older weights "
        "and grow stale (a memory bank)",
        "set use_momentum: true, or use a short queue",
    )


@check("warning", "cpo.normalize_embeddings")
def unbounded_similarities(c: Settled) -> Said | None:
    """Raw dot products at a temperature meant for cosines."""
    if c.cpo.normalize_embeddings or not c.cpo.contrastive_weight:
        return None
    return Said(
        "cpo.normalize_embeddings is false: similarities are unbounded, and margin and "
        "temperature are made for cosines",
        "set normalize_embeddings: true for stable training",
    )


@check("warning", "cpo.simcse_dropout")
def views_without_noise(c: Settled) -> Said | None:
    """No dropout, no momentum encoder: query and key see the very same function."""
    quiet = c.cpo.simcse_dropout or c.cpo.use_momentum or not c.cpo.contrastive_weight
    if quiet:
        return None
    return Said(
        "cpo.simcse_dropout is 0 and keys come from the same encoder as queries: "
        "nothing varies between two views, and embeddings tend to collapse",
        "set simcse_dropout to 0.1, or use_momentum: true",
    )


@check("advice", "cpo.contrastive_temperature")
def same_temperatures(c: Settled) -> Said | None:
    """One number for two temperatures that mean different things."""
    if c.cpo.temperature != c.cpo.contrastive_temperature or not c.is_set("cpo.temperature"):
        return None
    if not c.cpo.contrastive_weight or not c.cpo.preference_weight:
        return None
    return Said(
        f"cpo.temperature and cpo.contrastive_temperature are both {c.cpo.temperature:g}, "
        "but scale different things (rewards and cosines)",
        "tune them apart; the defaults are 0.1 and 0.05",
    )


@check("advice", "cpo.use_momentum")
def momentum_copies_weights(c: Settled) -> Said | None:
    """Under full fine-tuning the momentum encoder is a second copy of the model."""
    if not c.cpo.use_momentum or c.optimization.use_lora or not c.cpo.contrastive_weight:
        return None
    return Said(
        "cpo.use_momentum under full fine-tuning holds a second copy of all weights",
        "use_lora: true keeps a copy of the adapter only",
    )


# Cost


@check("advice", "data.padding")
def padding_to_the_maximum(c: Settled) -> Said | None:
    """Every row is padded to the longest allowed one."""
    if c.data.padding != "max_length":
        return None
    share = padding_share(train_files(c), c)
    seen = f" (about {share:.0%} of the tokens, estimated from the data)" if share else ""
    return Said(
        f"data.padding is max_length: every row is padded to {c.cpo.max_length} tokens{seen}",
        "padding: packed or longest gives the same numbers for less work",
    )


@check("advice", "data.truncation")
def refuses_long_rows(c: Settled) -> Said | None:
    """Rows over their budget stop the run."""
    if c.data.truncation or c.data.on_bad_row == "skip":
        return None
    return Said(
        "data.truncation is false: one row over its budget stops the run",
        "set on_bad_row: skip to leave such rows out, or truncation: true",
    )


@check("advice", "optimization.use_gradient_checkpointing")
def large_model_without_checkpointing(c: Settled) -> Said | None:
    """A model of 7B or more keeps all its activations."""
    size = re.search(r"(?<![\d.])(\d+(?:[._]\d+)?)B\b", c.model.name)
    if c.optimization.use_gradient_checkpointing or not size:
        return None
    if float(size[1].replace("_", ".")) < 7:
        return None
    return Said(
        f"{as_written(c.model.name)} without gradient checkpointing keeps all activations",
        "set use_gradient_checkpointing: true if memory runs out",
    )


# Packages and models


_LEGACY = re.compile(r"(?:^|/)Qwen-(1_8B|7B|14B|72B)(-Chat)?$")
_SUCCESSORS = {"1_8B": "1.5B", "7B": "7B", "14B": "14B", "72B": "72B"}


@check("warning", "model.name")
def legacy_model(c: Settled) -> Said | None:
    """A first-generation Qwen checkpoint."""
    found = _LEGACY.search(c.model.name)
    if not found:
        return None
    return Said(
        f"{as_written(c.model.name)} is first-generation Qwen: transformers has no class for it "
        "and its own code fails under transformers 5; its weights are mapped onto the Qwen2 "
        "architecture when loaded",
        f"prefer its successor: --set model.name=Qwen/Qwen2.5-{_SUCCESSORS[found[1]]}",
    )


@check("warning", "model.trust_remote_code")
def remote_code(c: Settled) -> Said | None:
    """Code from the model's repository will run."""
    if not c.model.trust_remote_code:
        return None
    return Said(
        "model.trust_remote_code is true: code from the model's repository runs on this machine",
        "Qwen2, Qwen2.5 and Qwen3 need none; pin model.revision if yours does",
    )


_EXTRAS = (
    ("optimization.use_quantization", "bitsandbytes", "quant"),
    ("logging.use_wandb", "wandb", "wandb"),
)


@check("warning", "optimization.use_quantization")
def missing_bitsandbytes(c: Settled) -> Said | None:
    """Quantisation without its package."""
    return _missing(c.optimization.use_quantization, *_EXTRAS[0])


@check("warning", "logging.use_wandb")
def missing_wandb(c: Settled) -> Said | None:
    """Weights & Biases without its package."""
    return _missing(c.logging.use_wandb, *_EXTRAS[1])


@check("warning", "data.hard_negative_strategy")
def missing_miner(c: Settled) -> Said | None:
    """Mining by word overlap without its package."""
    wanted = c.data.create_hard_negatives and c.data.hard_negative_strategy == "bm25"
    return _missing(wanted, "data.hard_negative_strategy", "bm25s", "mining")


def _missing(wanted: bool, field: str, package: str, extra: str) -> Said | None:
    if not wanted or has_package(package):
        return None
    off = "semantic_search" if extra == "mining" else "false"
    return Said(
        f"{field} needs the package {package}, which is not installed; the run will refuse",
        f"pip install 'cpo-arabic[{extra}]', or --set {field}={off}",
    )
