"""A sampler is a table with one row a step, made once in float64; every backend runs the same two formulas.

    x0 = u * x + v * out                                   (then x0 is clipped)
    x' = p * x + q * x0 + r * x0_prev + n * noise

`out` is the network's output and x0_prev the clipped x0 of the step before. With x = a * x0 + s * noise now, and
a', s' at the next timestep:

    epsilon       out = noise                 u = 1 / a                  v = -s / a
    v_prediction  out = a * noise - s * x0    u = a / (a^2 + s^2)        v = -s / (a^2 + s^2)
    sample        out = x0                    u = 0                      v = 1
    flow          out = noise - x0            u = 1 / (a + s)            v = -s / (a + s)

    euler, ddim   p = s' / s, q = a' - a * p: the noise is kept, its level follows the schedule
    ddim, eta     p = sqrt(s'^2 - n^2) / s, q = a' - a * p, n = eta * posterior deviation
    ddpm          mean and deviation of the posterior of x' given x and x0
    dpmpp_2m      as ddim, but q is split: x0 is extrapolated in log(a / s) from this step and the one before

All hold for any a and s, so each sampler runs on each schedule. On a flow, Euler's straight line is the schedule's own.
Elsewhere Euler steps y = x / a, whose noise has the level z = s / a:

    y' = y + (z' - z) * (y - x0) / z,    and times a' that is ddim's row

so it differs from ddim in its levels alone: with linspace spacing timesteps are real numbers, and z is a straight line
between those of two training timesteps. Where a is 0 (zero terminal SNR), Euler and DPM-Solver++ take 2^-12 for it, as
in diffusers: z and log(a / s) stay finite.

The last step's a', s' are 1, 0, and its row gives x' = x0. DDIM may be told otherwise, as public folders do: to go
N // steps timesteps down, wherever the next step is, and to end at the level of timestep 0.

Source: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Salimans and Ho 2022 (v), Lu et al. 2022 (DPM-Solver++),
Lipman et al. 2022 (flow). Spacings: Lin et al. 2023, table 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pylumiere.config.sampling import (
    DDIM_TARGETS,
    FINAL_ALPHAS,
    INITIAL_NOISES,
    PREDICTION_TYPES,
    SAMPLERS,
    TIMESTEP_SPACINGS,
    ScheduleConfig,
)
from pylumiere.diffusion.schedules import NoiseSchedule, schedule_of, shift_flow
from pylumiere.errors import InvalidRequest

VARIANCES = ("fixed_small", "fixed_large")
COLUMNS = ("u", "v", "p", "q", "r", "n")
_SMALLEST_ALPHA = 2.0**-12  # in place of 0, see above


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """What a sampler does, as numbers.

    Attributes:
        timesteps: float32 [S], fed to the network, noisiest first.
        coef: float64 [S, 6], columns u, v, p, q, r, n.
        init_sigma, init_alpha: x at the first step is init_alpha * clean + init_sigma * noise. Without a clip to start
            from, clean is 0.
        uses_previous: r is not 0 somewhere.
        stochastic: n is not 0 somewhere.
    """

    timesteps: np.ndarray
    coef: np.ndarray
    init_sigma: float
    init_alpha: float
    uses_previous: bool
    stochastic: bool

    def __len__(self) -> int:
        return len(self.timesteps)


def table_for(schedule: ScheduleConfig, sampler: str, steps: int, *, strength: float = 1.0) -> SamplerTable:
    """The table of a sampler on the schedule of a network's config.

    With the settings of a diffusers folder it is what diffusers' class computes with them: DDPMScheduler for "ddpm",
    DDIMScheduler (with `ddim_target` "stride") for "ddim", EulerDiscreteScheduler for "euler" and
    DPMSolverMultistepScheduler for "dpmpp_2m". Where it is not:

    - With a clip, every sampler clips and takes the noise from the clipped x0. In diffusers Euler and DPM-Solver++ do
      not clip, and DDIM takes the noise from the unclipped x0 unless it is called with `use_clipped_model_output`.
    - One step with linspace spacing starts at the noisiest timestep, there at the cleanest (not DPM-Solver++).
    - `initial_noise` is the schedule's; in diffusers Euler has 1 with leading spacing, sigma otherwise, others have 1.

    Args:
        steps, strength: as in `make_table`.

    Raises:
        InvalidRequest: as in `make_table`.
    """
    ddim = {"final_alpha": schedule.final_alpha, "ddim_target": schedule.ddim_target} if sampler == "ddim" else {}
    return make_table(
        sampler, schedule_of(schedule), schedule.prediction_type, steps, strength=strength,
        timestep_spacing=schedule.timestep_spacing, steps_offset=schedule.steps_offset,
        initial_noise=schedule.initial_noise, **ddim,
    )  # fmt: skip


def make_table(
    sampler: str,
    schedule: NoiseSchedule,
    prediction_type: str,
    num_inference_steps: int,
    *,
    eta: float = 0.0,
    variance: str = "fixed_small",
    strength: float = 1.0,
    timestep_spacing: str = "trailing",
    steps_offset: int = 0,
    final_alpha: str = "one",
    ddim_target: str = "next",
    initial_noise: str = "sigma",
) -> SamplerTable:
    """The table of a sampler.

    Args:
        sampler: "ddpm", "ddim", "euler" or "dpmpp_2m".
        schedule: the one that the network was trained with.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow".
        num_inference_steps: steps from pure noise, 1..num_train_timesteps.
        eta: of DDIM, 0 (deterministic) .. 1 (the noise of DDPM).
        variance: of DDPM. "fixed_small" is exact for data without variance, "fixed_large" for unit-variance data.
        strength: share of the steps to run, from the noise level where they begin; the others are left out. At least
            one step is run.
        timestep_spacing: "trailing" starts at the last training timestep, "leading" ends at the first, "linspace"
            does both, with diffusers' meanings: DPM-Solver++ places one point more for the last two and leaves out
            the cleanest; Euler's linspace is not rounded to training timesteps.
        steps_offset: added to every timestep of "leading".
        final_alpha: of DDIM. The last step goes to "one", the clean end, or to "first", the level of timestep 0.
        ddim_target: of DDIM, not on a flow. A step goes to the "next" step's timestep, or by a "stride" of
            num_train_timesteps // num_inference_steps; past timestep 0 is the end.
        initial_noise: of a start from pure noise (strength 1). "sigma" is the first step's level, "one" is 1.

    Raises:
        InvalidRequest: an unknown name or a value out of range, an option of another sampler, timesteps that repeat or
            reach past the last, or an epsilon prediction where alpha is 0.
    """
    _one_of("sampler", sampler, SAMPLERS)
    _one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    _one_of("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
    _one_of("variance", variance, VARIANCES)
    _one_of("final_alpha", final_alpha, FINAL_ALPHAS)
    _one_of("ddim_target", ddim_target, DDIM_TARGETS)
    _one_of("initial_noise", initial_noise, INITIAL_NOISES)
    most = schedule.num_train_timesteps
    if not _is_integer(num_inference_steps) or not 1 <= num_inference_steps <= most:
        raise InvalidRequest(f"num_inference_steps={num_inference_steps!r} is not an integer in 1..{most}")
    if not _is_integer(steps_offset) or not 0 <= steps_offset < most:
        raise InvalidRequest(f"steps_offset={steps_offset!r} is not an integer in 0..{most - 1}")
    if not 0 < strength <= 1:
        raise InvalidRequest(f"strength={strength} is not in 0..1 without 0")
    if not 0 <= eta <= 1:
        raise InvalidRequest(f"eta={eta} is not in 0..1")
    for option, value, default, owner in (
        ("eta", eta, 0, "ddim"),
        ("final_alpha", final_alpha, "one", "ddim"),
        ("ddim_target", ddim_target, "next", "ddim"),
        ("variance", variance, "fixed_small", "ddpm"),
    ):
        if value != default and sampler != owner:
            raise InvalidRequest(f"{option}={value!r} is of {owner} alone; sampler {sampler!r} has none")
    if ddim_target == "stride" and schedule.is_flow:
        raise InvalidRequest("ddim_target='stride' counts training timesteps, which a flow has none of; use 'next'")

    steps = int(num_inference_steps)
    timesteps, alphas, sigmas = _levels(schedule, steps, timestep_spacing, int(steps_offset), sampler)
    end = (schedule.alphas[0], schedule.sigmas[0]) if final_alpha == "first" else (1.0, 0.0)
    if ddim_target == "stride":
        alphas_next, sigmas_next = _strides(schedule, timesteps, most // steps, end)
    else:
        alphas_next, sigmas_next = np.append(alphas[1:], end[0]), np.append(sigmas[1:], end[1])
    first = steps - max(1, math.floor(steps * strength + 1e-9))  # 100 * 0.29 is a little less than 29
    timesteps, alphas, sigmas, alphas_next, sigmas_next = (
        values[first:] for values in (timesteps, alphas, sigmas, alphas_next, sigmas_next)
    )

    u, v = _to_x0(prediction_type, alphas, sigmas)
    r = np.zeros_like(alphas)
    if sampler == "ddpm":
        p, q, n = _ddpm(alphas, sigmas, alphas_next, sigmas_next, large=variance == "fixed_large")
    else:
        n = eta * np.sqrt(_posterior_variance(alphas, sigmas, alphas_next, sigmas_next))
        p = np.sqrt((sigmas_next - n) * (sigmas_next + n)) / sigmas
        q = alphas_next - alphas * p
    if sampler == "dpmpp_2m":
        extra = _extrapolation(alphas, sigmas)
        q, r = q * (1 + extra), -q * extra
    coef = np.stack([u, v, p, q, r, n], axis=1)
    if sigmas_next[-1] == 0:
        coef[-1, 2:] = (0.0, 1.0, 0.0, 0.0)
    from_noise = strength == 1  # less of it starts from a clip
    return SamplerTable(
        timesteps=timesteps.astype(np.float32),
        coef=coef,
        init_sigma=1.0 if from_noise and initial_noise == "one" else float(sigmas[0]),
        init_alpha=float(alphas[0]),
        uses_previous=bool(coef[:, 4].any()),
        stochastic=bool(coef[:, 5].any()),
    )


def apply_step(table: SamplerTable, index: int, x, out, x0_prev=None, noise=None, clip=math.inf):
    """One row of the table, in the dtype of x: the definition that kernels and the C++ runtime are compared with.

    Args:
        x, out, x0_prev, noise: arrays or tensors of one shape. x0_prev may be None where r is 0, noise where n is 0.
        clip: bound of |x0|; or, for tensors, a function of x0 that gives (bound, scale) per frame, such as a partial
            of `guidance.dynamic_threshold`. x0 is clamped to the bound, then multiplied by the scale.

    Returns:
        (x', x0).
    """
    u, v, p, q, r, n = table.coef[index].tolist()  # Python floats keep the arrays' dtype
    x0 = u * x + v * out
    if callable(clip):
        bound, scale = clip(x0)
        x0 = x0.clip(-bound, bound) * scale
    elif clip != math.inf:
        x0 = x0.clip(-clip, clip)
    x = p * x + q * x0
    if r:
        x = x + r * x0_prev
    if n:
        x = x + n * noise
    return x, x0


def sample(denoise: Callable, noise: Callable, table: SamplerTable, *, clean=None, clip=math.inf):
    """All steps on the whole clip in memory. The plain form of what `pylumiere.diffusion.windows` does as a stream.

    Args:
        denoise: (x, timestep: float) -> the network's output, after guidance.
        noise: (step: int) -> standard normal array or tensor; step -1 is the noise to start from.
        clean: what to start from (`strength` below 1); None for pure noise.
        clip: as in `apply_step`.

    Returns:
        The sample, of the type, shape and dtype of `noise(-1)`.
    """
    x = table.init_sigma * noise(-1)
    if clean is not None:
        x = table.init_alpha * clean + x
    x0 = None
    for index, timestep in enumerate(table.timesteps.tolist()):
        fresh = noise(index) if table.coef[index, 5] else None
        x, x0 = apply_step(table, index, x, denoise(x, timestep), x0, fresh, clip)
    return x


# ---- where the steps are ---------------------------------------------------------------------------------------------


def _levels(schedule: NoiseSchedule, steps: int, spacing: str, offset: int, sampler: str):
    """(timesteps, alphas, sigmas), float64 [steps] each, noisiest first."""
    count = schedule.num_train_timesteps
    if schedule.is_flow and spacing != "leading":
        # A flow has a level for every real time; only leading counts training timesteps.
        if spacing == "trailing":
            s = 1 - np.arange(steps) / steps
        else:
            s = np.linspace(1.0, schedule.sigmas[0], steps)
        sigmas = shift_flow(s, schedule.shift)
        return sigmas * count, (1 - s) / (1 + (schedule.shift - 1) * s), sigmas
    alphas, sigmas = schedule.alphas, schedule.sigmas
    if sampler in ("euler", "dpmpp_2m") and alphas[-1] == 0 and not schedule.is_flow:
        alphas = np.append(alphas[:-1], _SMALLEST_ALPHA)
        sigmas = np.append(sigmas[:-1], math.sqrt(1 - _SMALLEST_ALPHA**2))
    if sampler == "euler" and spacing == "linspace":
        timesteps = np.linspace(0, count - 1, steps)[::-1] if steps > 1 else np.array([count - 1.0])
        z = np.interp(timesteps, schedule.timesteps, sigmas / alphas)
        alphas = 1 / np.hypot(1, z)
        return timesteps, alphas, z * alphas
    points = steps + (sampler == "dpmpp_2m")
    if spacing == "trailing":
        index = np.arange(count, 0, -count / steps)[:steps].round() - 1
    elif spacing == "leading":
        index = (np.arange(points) * (count // points))[::-1][:steps] + offset
    else:
        index = np.linspace(0, count - 1, points).round()[::-1][:steps] if points > 1 else np.array([count - 1])
    index = index.astype(np.int64)
    if (np.diff(index) >= 0).any():
        raise InvalidRequest(
            f"num_inference_steps={steps} with {spacing!r} spacing meets a timestep twice; allowed are 1..{count - 1}"
        )
    if index[0] == 0 and count > 1:
        raise InvalidRequest(
            f"{spacing!r} spacing with {steps} step starts at timestep 0, the cleanest; use 'trailing'"
        )
    if index[0] >= count:
        raise InvalidRequest(
            f"num_inference_steps={steps} with {spacing!r} spacing and steps_offset={offset} starts at timestep "
            f"{index[0]}; the last is {count - 1}"
        )
    return schedule.timesteps[index], alphas[index], sigmas[index]


def _strides(schedule: NoiseSchedule, timesteps, stride: int, end: tuple[float, float]):
    """(alphas, sigmas) that DDIM's steps go to: those `stride` timesteps below, or the end."""
    index = timesteps.astype(np.int64) - stride
    below = index.clip(0)
    return tuple(
        np.where(index >= 0, levels[below], last)
        for levels, last in zip((schedule.alphas, schedule.sigmas), end, strict=True)
    )


# ---- columns ---------------------------------------------------------------------------------------------------------


def _to_x0(prediction_type: str, alphas, sigmas):
    """Columns u and v."""
    if prediction_type == "sample":
        return np.zeros_like(alphas), np.ones_like(alphas)
    if prediction_type == "v_prediction":
        power = alphas**2 + sigmas**2
        return alphas / power, -sigmas / power
    if prediction_type == "flow":
        return 1 / (alphas + sigmas), -sigmas / (alphas + sigmas)
    if alphas[0] == 0:
        raise InvalidRequest(
            "prediction_type='epsilon' says nothing about x0 at the first step, where alpha is 0 (zero terminal SNR); "
            "allowed are v_prediction, sample, flow"
        )
    return 1 / alphas, -sigmas / alphas


def _conditional_variance(alphas, sigmas, alphas_next, sigmas_next):
    """Variance of x given x': s^2 - (a / a')^2 * s'^2, as a product without cancellation of squares."""
    kept = alphas / alphas_next * sigmas_next
    return (sigmas - kept) * (sigmas + kept)


def _posterior_variance(alphas, sigmas, alphas_next, sigmas_next):
    """Variance of x' given x and x0."""
    return _conditional_variance(alphas, sigmas, alphas_next, sigmas_next) * (sigmas_next / sigmas) ** 2


def _ddpm(alphas, sigmas, alphas_next, sigmas_next, *, large: bool):
    """Columns p, q, n."""
    variance = _conditional_variance(alphas, sigmas, alphas_next, sigmas_next)
    p = alphas / alphas_next * (sigmas_next / sigmas) ** 2
    q = alphas_next * variance / sigmas**2
    return p, q, np.sqrt(variance) if large else np.sqrt(variance) * sigmas_next / sigmas


def _extrapolation(alphas, sigmas):
    """h / (2 h_prev) in l = log(a / s) for every row; 0 in the first row and the last, which are first order.

    After a first step from pure noise (l = -infinity) it is 0 too: the limit.
    """
    extra = np.zeros_like(alphas)
    with np.errstate(divide="ignore"):
        logs = np.log(alphas) - np.log(sigmas)
    h = np.diff(logs)
    extra[1:-1] = h[1:] / (2 * h[:-1])
    return extra


# ---- checks ----------------------------------------------------------------------------------------------------------


def _one_of(field: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidRequest(f"{field}={value!r} is not one of {', '.join(allowed)}")


def _is_integer(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
