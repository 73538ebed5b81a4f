"""Guidance and what it makes necessary: contrast held by a rescale, range held by a threshold. All per frame.

    guided = uncond + guidance * (cond - uncond)
    gain   = phi * std(cond) / std(guided) + 1 - phi                       (Lin et al. 2023, eq. 15 and 16)
    bound  = quantile of |x0|, at least `floor`, at most `ceiling`         (Saharia et al. 2022: dynamic thresholding)
    x0     = clamp(x0, -bound, bound) * floor / bound

A frame's numbers depend on that frame alone: a statistic over the clip would tie all frames together and forbid
streaming. `gain`, `bound` and `scale` enter the fused step as one number a frame (`pylumiere.kernels.denoise_step`);
on CPU the C++ runtime computes the same. Tensors are [F, ...], frames first; arrays are taken too and come back as
tensors; sums are in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pylumiere.errors import InvalidRequest


def guide(cond, uncond, guidance_scale: float):
    """Classifier-free guidance, with 1 = the conditional output. Any arrays or tensors."""
    if not math.isfinite(guidance_scale):
        raise InvalidRequest(f"guidance_scale={guidance_scale} is not finite")
    return uncond + guidance_scale * (cond - uncond)


def rescale_gain(cond, guided, phi: float) -> Tensor:
    """Factor on each frame of the guided output that pulls its deviation towards the conditional one's.

    Args:
        cond, guided: [F, ...].
        phi: 0 (no change) .. 1 (the conditional output's deviation).

    Returns:
        float64 [F]; 1 where the guided output is constant.
    """
    if not 0 <= phi <= 1:
        raise InvalidRequest(f"guidance_rescale={phi} is not in 0..1")
    cond, guided = (_frames(v).var(1, correction=0).sqrt() for v in (cond, guided))
    return torch.where(guided > 0, phi * (cond / guided) + (1 - phi), 1.0)


def dynamic_threshold(
    x0, percentile: float, *, floor: float = 1.0, ceiling: float | None = None
) -> tuple[Tensor, Tensor]:
    """Bound and scale of each frame for dynamic thresholding.

    Args:
        x0: [F, ...], not yet clipped.
        percentile: quantile of |x0| in 0..1 without 0, linear between the two nearest values.
        floor: smallest bound, and what x0 is scaled back to.
        ceiling: largest bound (but never below `floor`), or None.

    Returns:
        (bound, scale) in x0's dtype, shaped [F, 1, ...] so that they broadcast against x0. A frame within the floor
        gets (floor, 1): the static clip.
    """
    if not 0 < percentile <= 1:
        raise InvalidRequest(f"threshold percentile={percentile} is not in 0..1 without 0")
    if not 0 < floor < math.inf:
        raise InvalidRequest(f"threshold floor={floor} is not a positive finite number")
    if ceiling is not None and not ceiling > 0:
        raise InvalidRequest(f"threshold ceiling={ceiling} is not a positive number")
    x0 = torch.as_tensor(x0)
    magnitude = x0.abs().flatten(1)
    place = percentile * (magnitude.shape[1] - 1)
    low = math.floor(place)
    ordered = magnitude.sort(1).values.double()  # torch.quantile refuses more than 2^24 values
    below, above = ordered[:, low], ordered[:, min(low + 1, magnitude.shape[1] - 1)]
    bound = (below + (above - below) * (place - low)).clamp(min=floor)
    if ceiling is not None:
        bound = bound.clamp(max=max(floor, ceiling))
    bound = bound.to(x0.dtype)
    scale = (floor / bound.double()).to(x0.dtype)
    shape = (-1, *[1] * (x0.ndim - 1))
    return bound.view(shape), scale.view(shape)


def _frames(value) -> Tensor:
    return torch.as_tensor(value).double().flatten(1)
