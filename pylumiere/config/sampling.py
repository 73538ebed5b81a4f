"""Noise schedules, and the defaults of sampling."""

from __future__ import annotations

from dataclasses import dataclass

from pylumiere.config.fields import Config, check

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
SCHEDULES = ("cosine", "linear", "flow")
SAMPLERS = ("ddpm", "ddim", "euler", "dpmpp_2m")


@dataclass(frozen=True)
class ScheduleConfig(Config):
    """The noise schedule that a network was trained with."""

    name: str = "cosine"
    prediction_type: str = "sample"
    logsnr_shift: float = 0.0
    num_train_timesteps: int = 1000

    def __post_init__(self):
        check(self.name in SCHEDULES, f"schedule {self.name!r} is not one of {', '.join(SCHEDULES)}")
        check(
            self.prediction_type in PREDICTION_TYPES,
            f"prediction_type {self.prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}",
        )
        check(
            1 <= self.num_train_timesteps <= 100_000,
            f"num_train_timesteps={self.num_train_timesteps} is not in 1..100000",
        )
        check(-30 <= self.logsnr_shift <= 30, f"logsnr_shift={self.logsnr_shift} is not in -30..30")


@dataclass(frozen=True)
class SamplerConfig(Config):
    """Defaults of one stage: sampler, steps, guidance."""

    sampler: str = "dpmpp_2m"
    num_inference_steps: int = 30
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    threshold_percentile: float = 0.0  # 0: static clip to [-1, 1]; else per-frame dynamic thresholding

    def __post_init__(self):
        check(
            1 <= self.num_inference_steps <= 1000, f"num_inference_steps={self.num_inference_steps} is not in 1..1000"
        )
        check(self.sampler in SAMPLERS, f"sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        check(0 <= self.guidance_scale <= 1000, f"guidance_scale={self.guidance_scale} is not in 0..1000")
        check(0 <= self.guidance_rescale <= 1, f"guidance_rescale={self.guidance_rescale} is not in 0..1")
        check(0 <= self.threshold_percentile <= 1, f"threshold_percentile={self.threshold_percentile} is not in 0..1")
