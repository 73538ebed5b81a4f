"""Noise schedules: how much signal and how much noise a sample holds at each training timestep.

    x_t = alpha_t * x0 + sigma_t * noise,    t = 0 is the cleanest

    cosine: acp_t = prod (1 - beta), beta_t = min(1 - f(t + 1) / f(t), 0.999), f(t) = cos^2(pi/2 (t/N + 0.008) / 1.008)
    linear: acp_t = prod (1 - beta), beta_t evenly spaced;  scaled_linear: sqrt(beta_t) evenly spaced
            these three: alpha = sqrt(acp), sigma = sqrt(1 - acp)
    flow:   s_t = (t + 1) / N, alpha = 1 - s, sigma = s

With zero terminal SNR, alpha_t becomes (alpha_t - alpha_last) * alpha_0 / (alpha_0 - alpha_last), and sigma follows.

All in float64. 1 - acp is summed from positive terms and never subtracted from 1, so that sigma and the log-SNR keep
their digits at the clean end.

Source: Nichol and Dhariwal 2021 (cosine), Ho et al. 2020 (linear), Rombach et al. 2022 (scaled linear), Lipman et al.
2022 and Esser et al. 2024 (flow and its shift), Hoogeboom et al. 2023 (log-SNR shift), Lin et al. 2023 (zero terminal
SNR).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pylumiere.config.sampling import BETAS, SCHEDULES, ScheduleConfig
from pylumiere.errors import InvalidRequest

OPTIONS = {
    "cosine": {"max_beta": 0.999, "zero_terminal_snr": False},
    **{name: {"beta_start": b[0], "beta_end": b[1], "zero_terminal_snr": False} for name, b in BETAS.items()},
    "flow": {"shift": 1.0},
}
MAX_LOGSNR_SHIFT = 30.0


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Signal and noise of every training timestep.

    Attributes:
        name: "cosine", "linear", "scaled_linear" or "flow".
        alphas, sigmas: float64 [num_train_timesteps].
        timesteps: float64 [num_train_timesteps], what the network is told: the index t, or sigma * N for flow.
        shift: of a flow schedule, s -> shift * s / (1 + (shift - 1) * s); 1 otherwise.
    """

    name: str
    alphas: np.ndarray
    sigmas: np.ndarray
    timesteps: np.ndarray
    shift: float = 1.0

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas)

    @property
    def is_flow(self) -> bool:
        return self.name == "flow"


def make_schedule(
    name: str, num_train_timesteps: int = 1000, logsnr_shift: float = 0.0, **options: float
) -> NoiseSchedule:
    """A noise schedule by name.

    Args:
        name: "cosine" (diffusers' squaredcos_cap_v2), "linear", "scaled_linear" (both as in diffusers) or "flow".
        num_train_timesteps: N.
        logsnr_shift: added to log(alpha^2 / sigma^2) everywhere; negative is noisier. On a flow schedule it equals
            a shift of exp(-logsnr_shift / 2).
        options: max_beta (cosine); beta_start, beta_end (linear, scaled_linear); zero_terminal_snr (these three): alpha
            is moved and scaled so that the last timestep is pure noise; shift (flow).

    Raises:
        InvalidRequest: an unknown name or option, or a value out of range.
    """
    if name not in SCHEDULES:
        raise InvalidRequest(f"schedule {name!r} is not one of {', '.join(SCHEDULES)}")
    if not isinstance(num_train_timesteps, int | np.integer) or num_train_timesteps < 1:
        raise InvalidRequest(f"num_train_timesteps={num_train_timesteps!r} is not an integer of at least 1")
    if not abs(logsnr_shift) <= MAX_LOGSNR_SHIFT:  # NaN fails too
        raise InvalidRequest(f"logsnr_shift={logsnr_shift} is not in -{MAX_LOGSNR_SHIFT:g}..{MAX_LOGSNR_SHIFT:g}")
    unknown = sorted(set(options) - set(OPTIONS[name]))
    if unknown:
        raise InvalidRequest(f"schedule {name!r} has no option {unknown[0]!r}; it has {', '.join(OPTIONS[name])}")
    options = {**OPTIONS[name], **options}
    count = int(num_train_timesteps)
    if name == "flow":
        return _flow(count, logsnr_shift, options["shift"])
    if name == "cosine":
        betas = _cosine_betas(count, options["max_beta"])
    else:
        betas = _linear_betas(count, options["beta_start"], options["beta_end"], of_roots=name == "scaled_linear")
    signal, noise = _powers(betas)
    gain = math.exp(logsnr_shift)
    total = signal * gain + noise
    alphas, sigmas = np.sqrt(signal * gain / total), np.sqrt(noise / total)
    if options["zero_terminal_snr"]:
        if count < 2:
            raise InvalidRequest(f"zero_terminal_snr with num_train_timesteps={count}: needs at least 2")
        alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
        sigmas = np.sqrt((1 - alphas) * (1 + alphas))
    return NoiseSchedule(name, alphas, sigmas, np.arange(count, dtype=np.float64))


def schedule_of(config: ScheduleConfig) -> NoiseSchedule:
    """The noise schedule that a network's config names."""
    options = {}
    if config.name in BETAS:
        options["beta_start"], options["beta_end"] = config.betas
    if config.zero_terminal_snr:
        options["zero_terminal_snr"] = True
    return make_schedule(config.name, config.num_train_timesteps, config.logsnr_shift, **options)


def shift_flow(s: np.ndarray, shift: float) -> np.ndarray:
    """Moves flow times in 0..1 to the noisy side (shift > 1); 0 and 1 stay."""
    return shift * s / (1 + (shift - 1) * s)


def _flow(count: int, logsnr_shift: float, shift: float) -> NoiseSchedule:
    if not 0 < shift < math.inf:
        raise InvalidRequest(f"shift={shift} is not a positive finite number")
    shift = shift * math.exp(-logsnr_shift / 2)
    s = np.arange(1, count + 1) / count
    sigmas = shift_flow(s, shift)
    alphas = (1 - s) / (1 + (shift - 1) * s)
    return NoiseSchedule("flow", alphas, sigmas, sigmas * count, shift)


def _cosine_betas(count: int, max_beta: float) -> np.ndarray:
    if not 0 < max_beta < 1:
        raise InvalidRequest(f"max_beta={max_beta} is not between 0 and 1")
    angle = (np.arange(count + 1) / count + 0.008) / 1.008 * (math.pi / 2)
    low, high = angle[:-1], angle[1:]
    # 1 - cos^2(high) / cos^2(low), without the subtraction from 1.
    return np.minimum(np.sin(high - low) * np.sin(high + low) / np.cos(low) ** 2, max_beta)


def _linear_betas(count: int, start: float, end: float, *, of_roots: bool) -> np.ndarray:
    if not 0 < start <= end < 1:
        raise InvalidRequest(f"beta_start={start}, beta_end={end}: allowed are 0 < beta_start <= beta_end < 1")
    return np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2 if of_roots else np.linspace(start, end, count)


def _powers(betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """acp and 1 - acp, the latter as a sum of positive terms."""
    acp = np.cumprod(1 - betas)
    return acp, np.cumsum(np.concatenate([[1.0], acp[:-1]]) * betas)
