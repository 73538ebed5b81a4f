"""The noise of frames: a function of (seed, stage, step, frame, position), the same bits on every backend."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from pylumiere import _runtime


def frame_noise(
    seed: int, stage: int, step: int, frames: Iterable[int], frame_shape: tuple[int, ...], num_threads: int | None = 1
) -> np.ndarray:
    """Standard normals float32 [n, *frame_shape] of whole frames; see `pylumiere.kernels.denoise_step.frame_noise`.

    Args:
        seed: 0 to 2^64 - 1.
        stage: 0 base, 1 SSR, 2 noise augmentation of the SSR's low-resolution input.
        step: index of the sampler step; -1 for the initial noise.
        frames: indices of the frames in the clip.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} is outside [0, 2^64)")
    indices = np.asarray(frames, np.int64).ravel()
    key = np.zeros((len(indices), 5), np.int64)
    key[:, 0] = np.uint64(seed).astype(np.int64)
    key[:, 1], key[:, 2], key[:, 3] = stage, step, indices
    out = np.empty((len(indices), math.prod(frame_shape)), np.float32)
    _runtime.frame_noise(key, out, _runtime.ThreadPool(num_threads or _runtime.default_num_threads()))
    return out.reshape(len(indices), *frame_shape)
