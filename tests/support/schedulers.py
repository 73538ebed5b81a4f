"""diffusers' schedulers as oracles: in float64, in a loop over a toy denoiser, on the settings of public folders."""

from __future__ import annotations

import math
import sys

import diffusers
import numpy as np
import torch

from pylumiere.diffusion.samplers import SamplerTable, sample

CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}

# scheduler/scheduler_config.json of the public folders. AnimateDiff's is that of its model cards' example.
_LATENT = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None,
}  # fmt: skip
FOLDERS = {
    "sd-1.5": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **_LATENT},
    "sd-2.1": {
        "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", **_LATENT, "prediction_type": "v_prediction",
    },
    "modelscope": {
        "_class_name": "DDIMScheduler", "_diffusers_version": "0.15.0.dev0", **_LATENT, "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995, "prediction_type": "epsilon", "sample_max_value": 1.0,
        "thresholding": False,
    },
    "animatediff": {
        "_class_name": "DDIMScheduler", "_diffusers_version": "0.25.0", **_LATENT, "beta_schedule": "linear",
        "timestep_spacing": "linspace",
    },
}  # fmt: skip


def rel_rms(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return math.sqrt(((actual - expected) ** 2).mean() / (expected**2).mean())


class _Double:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name: str):
        return getattr(self._module, "float64" if name == "float32" else name)


def in_double(monkeypatch, class_name: str) -> type:
    """The scheduler class, computing in float64 all that it computes in float32."""
    scheduler = getattr(diffusers, class_name)
    module = sys.modules[scheduler.__module__]
    for name in ("torch", "np"):
        monkeypatch.setattr(module, name, _Double(getattr(module, name)))
    return scheduler


def toy(x: np.ndarray, timestep: float) -> np.ndarray:
    """A denoiser that is not linear in x and knows the timestep, which it is told in float32."""
    return 0.3 * np.tanh(x) + 0.1 * np.cos(np.float64(np.float32(timestep)) / 50 + np.arange(x.size).reshape(x.shape))


def their_loop(monkeypatch, scheduler, steps: int, noises: np.ndarray, denoise=toy) -> tuple[np.ndarray, np.ndarray]:
    """The clip and the timesteps of a diffusers pipeline's loop: from noises[0], with noises[i + 1] at step i."""
    scheduler.set_timesteps(steps)
    module, step_noise = sys.modules[type(scheduler).__module__], {}
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: torch.from_numpy(step_noise["now"]))
    x = torch.from_numpy(noises[0]) * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        step_noise["now"] = noises[index + 1]
        seen = scheduler.scale_model_input(x, timestep).numpy()
        x = scheduler.step(torch.from_numpy(denoise(seen, float(timestep))), timestep, x).prev_sample
    return x.numpy(), scheduler.timesteps.numpy()


def our_loop(table: SamplerTable, noises: np.ndarray, clip: float | None, denoise=toy) -> np.ndarray:
    """The clip of `sample` from the same noises."""
    return sample(denoise, lambda step: noises[step + 1], table, clip=np.inf if clip is None else clip)
