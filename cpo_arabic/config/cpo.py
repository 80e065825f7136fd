"""The section ``cpo``: the losses, their weights, the negatives, the lengths, the reference."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cpo_arabic.config.base import Follows, Section
from cpo_arabic.config.kinds import Name, Options

LossType = Literal["cpo", "sigmoid", "hinge", "ipo", "simpo"]
SamplingStrategy = Literal["random", "hard", "mixed"]
TruncationMode = Literal["keep_end", "keep_start"]


class CPOSpecificConfig(Section):
    """What is optimised: preference, behaviour-cloning and contrastive terms, and their inputs."""

    section: ClassVar[str] = "cpo"

    beta: Annotated[float, Field(gt=0, le=1000)] = 0.1
    """Reward scale β: the reward of a completion is β times its score (its log-probability)."""
    temperature: Annotated[float, Field(gt=0, le=1000)] = 0.1
    """Temperature τ of the preference term: rewards are compared as reward / τ."""
    alpha: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Length exponent α: scores are log-probability / tokens^α; 1 compares means, 0 sums."""
    loss_type: LossType = "cpo"
    """Preference loss: cpo (listwise), sigmoid (DPO's), hinge (SLiC's), ipo, or simpo."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share ε of preference labels that are wrong; only loss_type sigmoid has it."""
    reference_free: bool = False
    """States that no reference model may be in use; refuses settings that bring one in."""
    reference_model_name: Name | None = None
    """Model that scores are measured against; naming one puts it in use."""

    num_negatives: Annotated[int, Field(ge=1, le=1024)] = 1
    """Negative completions k per prompt that the losses see."""
    negative_sampling_strategy: SamplingStrategy = "random"
    """How the k negatives are chosen: random, hard (the hardest first), or mixed."""
    hard_negative_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the k negatives taken from the hard pool, under hard and mixed sampling."""
    margin: Annotated[float, Field(ge=0, le=2)] = 0.1
    """Margin subtracted from the positive's similarity in the contrastive term."""

    cpo_alpha: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Weight of the behaviour-cloning term, the mean negative log-likelihood of chosen tokens."""
    cpo_beta: Annotated[float, Field(ge=0, le=100)] = 0.1
    """Hard-negative concentration β_h (Robinson et al. 2021) in the contrastive term; 0 is none."""
    cpo_gamma: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Target reward margin γ of SimPO, taken from the chosen logit; only loss_type simpo has it."""
    simcse_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout rate on the embeddings of the contrastive term, in training only."""

    contrastive_temperature: Annotated[float, Field(gt=0, le=100)] = 0.05
    """Temperature τ_c of the contrastive term; sets its sharpness, not its weight."""
    contrastive_weight: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Weight of the contrastive term; 0 leaves it out together with its work."""
    preference_weight: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Weight of the preference term; 0 leaves it out together with its work."""

    max_length: Annotated[int, Field(ge=4, le=1_048_576), Follows("model.max_length")] = 2048
    """Longest prompt plus completion in tokens; unset, it follows model.max_length."""
    max_prompt_length: Annotated[int, Field(ge=1, le=1_048_576), Follows("cpo.max_length // 2")] = (
        1024
    )
    """Longest prompt in tokens; unset, it is half of max_length."""
    max_target_length: Annotated[
        int, Field(ge=1, le=1_048_576), Follows("cpo.max_length - cpo.max_prompt_length")
    ] = 1024
    """Longest completion in tokens; unset, it is what max_prompt_length leaves of max_length."""
    truncation_mode: TruncationMode = "keep_end"
    """Which end of a prompt that is too long survives."""

    precompute_ref_log_probs: bool = False
    """Whether the reference scores everything once before training and is then freed."""
    model_init_kwargs: Options | None = None
    """Further keyword arguments of from_pretrained for the model."""
    ref_model_init_kwargs: Options | None = None
    """Keyword arguments of from_pretrained for the named reference model."""
    force_use_ref_model: bool = False
    """Whether scores are measured against the starting model (or reference_model_name)."""

    use_momentum: bool = False
    """Whether keys come from a momentum encoder, a moving average of what trains (MoCo)."""
    momentum_beta: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of that moving average per optimizer step."""
    queue_size: Annotated[int, Field(ge=1, le=2**24)] = 65536
    """Keys of earlier steps that the queue holds as further negatives."""
    use_queue: bool = False
    """Whether keys of earlier steps join the negatives of the contrastive term (MoCo)."""
    normalize_embeddings: bool = True
    """Whether embeddings are scaled to length 1, so that similarities are cosines."""
    projection_dim: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Width of a two-layer projection head before the contrastive term; null means no head."""
