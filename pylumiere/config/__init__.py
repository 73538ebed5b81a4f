"""Frozen, validated configurations that round-trip through JSON: of models, stages, schedules and networks.

Data alone: nothing here imports torch, and no other room of the package is needed.
"""

from pylumiere.config.autoencoder import AutoencoderKLConfig, AutoencoderTinyConfig
from pylumiere.config.model import (
    DECODER,
    MAX_STAGES,
    SCHEMA_VERSION,
    WINDOW_WEIGHTS,
    DecoderConfig,
    ModelConfig,
    StageConfig,
    WindowConfig,
)
from pylumiere.config.networks import COLOURS, DecodingConfig, NetworkConfig, register_config
from pylumiere.config.sampling import PREDICTION_TYPES, SAMPLERS, SCHEDULES, SamplerConfig, ScheduleConfig
from pylumiere.config.stunet import LevelConfig, STUNetConfig
from pylumiere.config.unet2d import TemporalShiftConfig, UNet2DConfig

__all__ = [
    "COLOURS",
    "DECODER",
    "MAX_STAGES",
    "PREDICTION_TYPES",
    "SAMPLERS",
    "SCHEDULES",
    "SCHEMA_VERSION",
    "WINDOW_WEIGHTS",
    "AutoencoderKLConfig",
    "AutoencoderTinyConfig",
    "DecoderConfig",
    "DecodingConfig",
    "LevelConfig",
    "ModelConfig",
    "NetworkConfig",
    "STUNetConfig",
    "SamplerConfig",
    "ScheduleConfig",
    "StageConfig",
    "TemporalShiftConfig",
    "UNet2DConfig",
    "WindowConfig",
    "register_config",
]
