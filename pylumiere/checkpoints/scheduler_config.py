"""What a diffusers folder says about sampling: `scheduler/scheduler_config.json` as a schedule and a sampler.

A key that is missing has the default of the class that the file names. A setting that would change the result, and that
no sampler here follows, is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pylumiere.config import ScheduleConfig
from pylumiere.errors import BundleError

_BETAS = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon",
}  # fmt: skip
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_SOLVER = {**_BETAS, **_SIGMAS, "thresholding": False, "use_flow_sigmas": False}

# Class -> sampler, and what the class reads with its defaults. Keys that are not here change nothing for that sampler.
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIMScheduler": ("ddim", {
        **_BETAS, **_LEADING, **_CLIPPED, "set_alpha_to_one": True, "thresholding": False,
        "rescale_betas_zero_snr": False,
    }),
    "DDPMScheduler": ("ddpm", {
        **_BETAS, **_LEADING, **_CLIPPED, "thresholding": False, "rescale_betas_zero_snr": False,
        "variance_type": "fixed_small",
    }),
    "EulerDiscreteScheduler": ("euler", {
        **_BETAS, **_LINSPACE, **_SIGMAS, "interpolation_type": "linear", "timestep_type": "discrete",
        "final_sigmas_type": "zero", "rescale_betas_zero_snr": False,
    }),
    "EulerAncestralDiscreteScheduler": ("ddpm", {**_BETAS, **_LINSPACE, "rescale_betas_zero_snr": False}),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", {
        **_SOLVER, **_LINSPACE, "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
        "use_lu_lambdas": False, "lambda_min_clipped": -math.inf, "variance_type": None, "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False,
    }),
    "PNDMScheduler": ("dpmpp_2m", {**_BETAS, **_LEADING, "set_alpha_to_one": False}),
    "LMSDiscreteScheduler": ("dpmpp_2m", {**_BETAS, **_LINSPACE, **_SIGMAS}),
    "HeunDiscreteScheduler": ("dpmpp_2m", {
        **_BETAS, **_LINSPACE, **_SIGMAS, **_CLIPPED, "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
    }),
    "DEISMultistepScheduler": ("dpmpp_2m", {**_SOLVER, **_LINSPACE}),
    "UniPCMultistepScheduler": ("dpmpp_2m", {
        **_SOLVER, **_LINSPACE, "final_sigmas_type": "zero", "rescale_betas_zero_snr": False,
    }),
    "DPMSolverSinglestepScheduler": ("dpmpp_2m", {  # its timesteps are always those of linspace
        **_SOLVER, "algorithm_type": "dpmsolver++", "lambda_min_clipped": -math.inf, "variance_type": None,
        "final_sigmas_type": "zero",
    }),
}  # fmt: skip

_ALLOWED: dict[str, tuple] = {
    "trained_betas": (None,),
    "thresholding": (False,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "variance_type": ("fixed_small", None),
    # Names of other solvers' algorithms, which diffusers reads as the first.
    "algorithm_type": ("dpmsolver++", "deis"),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    "solver_order": (2,),
    "lambda_min_clipped": (-math.inf,),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
_KINDS = {bool: "true or false", int: "an integer", float: "a number"}
# Their states are x / alpha. They start from noise of the largest sigma / alpha; with leading spacing of size 1 in x.
_OVER_ALPHA = (
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
)  # fmt: skip


def schedule_from_diffusers(config: Mapping[str, Any]) -> tuple[ScheduleConfig, str]:
    """The schedule of a folder, and the sampler that its file names.

    DDIM, DDPM, Euler and multistep DPM-Solver++ of second order are run as they are (but see
    `pylumiere.diffusion.samplers.table_for` for what a clip changes), Euler ancestral as "ddpm": the same posterior,
    with linspace spacing at timesteps rounded to integers. PNDM, LMS, Heun, DEIS, UniPC and single-step DPM-Solver++,
    which are of second order or higher, get the nearest that is deterministic: "dpmpp_2m".

    Args:
        config: the JSON object in `scheduler_config.json`.

    Raises:
        BundleError: a class that is not known, a setting that no sampler follows, or a value that is malformed.
    """
    kind = config.get("_class_name") if isinstance(config, Mapping) else None
    if not isinstance(kind, str) or kind not in CLASSES:
        raise BundleError(f"scheduler _class_name={_short(kind)} is not one of {', '.join(CLASSES)}")
    sampler, defaults = CLASSES[kind]
    values = {key: _checked(kind, key, config.get(key, default), default) for key, default in defaults.items()}
    spacing = values.get("timestep_spacing", "linspace")
    has_betas = values["beta_schedule"] != "squaredcos_cap_v2"
    try:
        schedule = ScheduleConfig(
            values["beta_schedule"] if has_betas else "cosine",
            values["prediction_type"],
            num_train_timesteps=values["num_train_timesteps"],
            beta_start=values["beta_start"] if has_betas else None,
            beta_end=values["beta_end"] if has_betas else None,
            zero_terminal_snr=values.get("rescale_betas_zero_snr", False),
            timestep_spacing=spacing,
            steps_offset=values.get("steps_offset", 0),
            final_alpha="one" if values.get("set_alpha_to_one", True) else "first",
            ddim_target="stride",
            initial_noise="sigma" if kind in _OVER_ALPHA and spacing != "leading" else "one",
            clip=values["clip_sample_range"] if values.get("clip_sample") else None,
        )
    except ValueError as error:
        raise BundleError(f"{kind}: {error}") from error
    return schedule, sampler


def _checked(kind: str, key: str, value: Any, default: Any) -> Any:
    """A value of the type of its default, and an allowed one where only some are."""
    if key in _ALLOWED:
        allowed = _ALLOWED[key]
        if not any(type(value) is type(one) and value == one for one in allowed):  # 0 == False
            raise BundleError(f"{kind}: {key}={_short(value)} is not followed; allowed: {', '.join(map(str, allowed))}")
        return value
    if type(default) is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not type(default):
        raise BundleError(f"{kind}: {key}={_short(value)} is not {_KINDS[type(default)]}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
