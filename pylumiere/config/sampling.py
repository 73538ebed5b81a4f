"""Noise schedules, and the defaults of sampling."""

from __future__ import annotations

from dataclasses import dataclass

from pylumiere.config.fields import Config, check

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
SCHEDULES = ("cosine", "linear", "flow", "scaled_linear")
SAMPLERS = ("ddpm", "ddim", "euler", "dpmpp_2m")
TIMESTEP_SPACINGS = ("trailing", "leading", "linspace")
FINAL_ALPHAS = ("one", "first")
DDIM_TARGETS = ("next", "stride")
INITIAL_NOISES = ("sigma", "one")
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}  # first and last, of the schedules that have them


@dataclass(frozen=True)
class ScheduleConfig(Config):
    """The noise schedule that a network was trained with, and how samplers walk it.

    The defaults are those of this project's own networks. `pylumiere.checkpoints.scheduler_config` reads a diffusers
    folder's; `pylumiere.diffusion.samplers.table_for` makes the numbers of the steps from all of them.

    Attributes:
        name: see `pylumiere.diffusion.schedules`.
        prediction_type: what the network's output is.
        logsnr_shift: added to log(alpha^2 / sigma^2) everywhere; negative is noisier.
        num_train_timesteps: N.
        beta_start, beta_end: of "linear" and "scaled_linear"; None is the schedule's own.
        zero_terminal_snr: the last timestep is moved to pure noise; not for a flow, which has it.
        timestep_spacing: "trailing" starts at the last timestep, "leading" ends at the first, "linspace" does both.
        steps_offset: added to every timestep of "leading".
        final_alpha: where DDIM's last step goes: "one" is the clean end, "first" the level of timestep 0. Other
            samplers always end clean.
        ddim_target: where DDIM's other steps go: "next" is the next step's timestep, "stride" the one N // steps
            below, as in diffusers. They differ where the timesteps are not evenly spaced.
        initial_noise: size of the noise that a clip is made from: "sigma" is that of the first step, "one" is 1. A clip
            that starts from another clip has the first step's in any case.
        clip: bound of |x0| at every step; None for none, as latents need.
    """

    name: str = "cosine"
    prediction_type: str = "sample"
    logsnr_shift: float = 0.0
    num_train_timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool = False
    timestep_spacing: str = "trailing"
    steps_offset: int = 0
    final_alpha: str = "one"
    ddim_target: str = "next"
    initial_noise: str = "sigma"
    clip: float | None = 1.0

    def __post_init__(self):
        check(self.name in SCHEDULES, f"schedule {self.name!r} is not one of {', '.join(SCHEDULES)}")
        for field_name, allowed in (
            ("prediction_type", PREDICTION_TYPES),
            ("timestep_spacing", TIMESTEP_SPACINGS),
            ("final_alpha", FINAL_ALPHAS),
            ("ddim_target", DDIM_TARGETS),
            ("initial_noise", INITIAL_NOISES),
        ):
            value = getattr(self, field_name)
            check(value in allowed, f"{field_name} {value!r} is not one of {', '.join(allowed)}")
        check(
            1 <= self.num_train_timesteps <= 100_000,
            f"num_train_timesteps={self.num_train_timesteps} is not in 1..100000",
        )
        check(-30 <= self.logsnr_shift <= 30, f"logsnr_shift={self.logsnr_shift} is not in -30..30")
        if self.name in BETAS:
            start, end = self.betas
            check(
                0 < start <= end < 1,
                f"beta_start={start}, beta_end={end}: allowed are 0 < beta_start <= beta_end < 1",
            )
        else:
            for field_name, value in (("beta_start", self.beta_start), ("beta_end", self.beta_end)):
                check(value is None, f"{field_name}={value}: schedule {self.name!r} has none; {', '.join(BETAS)} have")
        for field_name, default in (("zero_terminal_snr", False), ("final_alpha", "one"), ("ddim_target", "next")):
            value = getattr(self, field_name)
            check(self.name != "flow" or value == default, f"{field_name}={value!r}: a flow takes {default!r} alone")
        check(
            not self.zero_terminal_snr or self.num_train_timesteps > 1,
            f"zero_terminal_snr with num_train_timesteps={self.num_train_timesteps}: needs at least 2",
        )
        check(
            0 <= self.steps_offset < self.num_train_timesteps,
            f"steps_offset={self.steps_offset} is not in 0..{self.num_train_timesteps - 1}",
        )
        check(self.clip is None or 0 < self.clip <= 1000, f"clip={self.clip} is neither in 0..1000 without 0 nor null")

    @property
    def betas(self) -> tuple[float, float]:
        """The first and the last beta of a schedule that has them."""
        start, end = BETAS[self.name]
        return start if self.beta_start is None else self.beta_start, end if self.beta_end is None else self.beta_end


@dataclass(frozen=True)
class SamplerConfig(Config):
    """Defaults of one stage: sampler, steps, guidance."""

    sampler: str = "dpmpp_2m"
    num_inference_steps: int = 30
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    threshold_percentile: float = 0.0  # 0: the schedule's clip; else per-frame dynamic thresholding

    def __post_init__(self):
        check(
            1 <= self.num_inference_steps <= 1000, f"num_inference_steps={self.num_inference_steps} is not in 1..1000"
        )
        check(self.sampler in SAMPLERS, f"sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        check(0 <= self.guidance_scale <= 1000, f"guidance_scale={self.guidance_scale} is not in 0..1000")
        check(0 <= self.guidance_rescale <= 1, f"guidance_rescale={self.guidance_rescale} is not in 0..1")
        check(0 <= self.threshold_percentile <= 1, f"threshold_percentile={self.threshold_percentile} is not in 0..1")
