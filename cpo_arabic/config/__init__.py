"""Configuration: what may be set, from where, and what is wrong with it.

Light on purpose: pydantic and ruamel.yaml only, so that a mistake is answered at once.
"""

from __future__ import annotations

from cpo_arabic.config.cpo import CPOSpecificConfig
from cpo_arabic.config.data import CPODataConfig
from cpo_arabic.config.findings import Finding
from cpo_arabic.config.root import CPOConfig
from cpo_arabic.config.sections import (
    LoggingConfig,
    ModelConfig,
    OptimizationConfig,
    TrainingConfig,
)
from cpo_arabic.config.settings import Origin
from cpo_arabic.config.sources import LoadedConfig, load_config
from cpo_arabic.errors import ConfigError, Problem

__all__ = [
    "CPOConfig",
    "CPODataConfig",
    "CPOSpecificConfig",
    "ConfigError",
    "Finding",
    "LoadedConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizationConfig",
    "Origin",
    "Problem",
    "TrainingConfig",
    "load_config",
]
