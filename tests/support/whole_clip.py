"""What an engine must give, made stage after stage, step by step over the whole clip. Shares no code with it but the
backend's network calls and the numbers of the sampler's table.

A network is called with one row on one thread, as an engine with two threads and two lanes does it. So stages agree to
the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from pylumiere.backends.torch import TorchBackend
from pylumiere.config import ModelConfig, StageConfig
from pylumiere.diffusion.samplers import table_for
from pylumiere.networks.text import HashEncoder
from support.offline import normals, sample_offline


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As in a lane, and where frames are enlarged."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class WholeClip:
    """The stages of a model with the encoder "hash".

    Args:
        backend: holds the model's networks.
        steps: of the later stages, instead of their own.
    """

    def __init__(self, config: ModelConfig, backend: TorchBackend, steps: int | None = None):
        self.config, self.backend, self.steps = config, backend, steps

    @one_thread()
    def make(
        self, prompt: str, seed: int, num_frames: int, *, negative: str = "", guidance: float | None = None,
        height: int | None = None, width: int | None = None, loop: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """Frames [T, h, w, C] of the last stage, pixels in -1..1 or latents; height and width are the result's."""
        first, scale = self.config.first, self.config.scales[0]
        encoder = HashEncoder(self.config.text_tokens, first.network.text_dim)
        rows = [encoder.encode([text]) for text in (prompt, negative)]
        if guidance is not None:
            first = replace(first, sampling=replace(first.sampling, guidance_scale=guidance))
        height, width = (height or self.config.size[0]) // scale, (width or self.config.size[1]) // scale
        given = np.zeros((num_frames, height, width, first.network.given_channels), np.float32)
        frames = self._sample(first, 0, given, rows, seed, loop)
        if loop:  # it begins where it moves least
            moves = [np.abs(frames[t] - frames[t - 1]).mean(dtype=np.float64) for t in range(num_frames)]
            frames = np.roll(frames, -int(np.argmin(moves)), 0)
        return self.enlarge(frames, seed, rows=rows, loop=loop)

    @one_thread()
    def enlarge(self, frames: np.ndarray, seed: int, *, rows=(), loop: bool = False) -> np.ndarray:
        """The later stages, from the first one's frames [T, h, w, C]."""
        for index, stage in enumerate(self.config.stages[1:], 1):
            scale = stage.network.height // self.config.stages[index - 1].network.height
            size, given = (frames.shape[1] * scale, frames.shape[2] * scale), []
            for t, frame in enumerate(frames):
                if stage.augmentation:
                    noise = normals(seed, 2 * index, -1, t, frame.size).reshape(frame.shape)
                    frame = frame + np.float32(stage.augmentation) * noise
                planes = torch.from_numpy(frame).permute(2, 0, 1)[None]
                large = F.interpolate(planes, size, mode="bilinear", align_corners=False)[0]
                given.append(large.permute(1, 2, 0).numpy())
            if self.steps is not None:
                stage = replace(stage, sampling=replace(stage.sampling, num_inference_steps=self.steps))
            frames = self._sample(stage, 2 * index - 1, np.stack(given), rows, seed, loop)
        return frames

    def _sample(self, stage: StageConfig, number: int, given: np.ndarray, rows, seed: int, loop: bool) -> np.ndarray:
        network, sampling = stage.network, stage.sampling
        table = table_for(stage.schedule, sampling.sampler, sampling.num_inference_steps)
        (num_frames, height, width, _), channels = given.shape, network.out_channels
        if stage.windows is not None:
            how = dict(window=stage.windows.frames, overlap=min(stage.windows.overlap, stage.windows.frames - 1),
                       weights=stage.windows.weights, halo=stage.windows.halo)  # fmt: skip
        else:
            window = network.num_frames if number else min(num_frames, network.num_frames)
            is_one = window == num_frames and not loop
            how = dict(window=window, overlap=0 if is_one else window // 2, weights="flat" if is_one else "linear",
                       halo=0)  # fmt: skip
        level = torch.tensor([stage.augmentation]) if network.noise_level else None

        def denoise(x, step, window, read):
            sample = np.concatenate([x.reshape(-1, height, width, channels), given[read]], -1)[None]
            outs = []
            for text, mask in rows[: 2 if sampling.guidance_scale != 1 else 1] or [(None, None)]:
                words = (text, mask) if network.text_dim else (None, None)
                time = torch.tensor([float(table.timesteps[step])])
                out = self.backend.predict(stage.name, torch.from_numpy(sample), time, *words, level, num_threads=1)
                outs.append(out[0].reshape(len(x), -1).numpy())
            return np.stack(outs)

        frames = sample_offline(
            denoise, num_frames=num_frames, num_values=height * width * channels, coef=table.coef,
            init_sigma=table.init_sigma, init_alpha=table.init_alpha, loop=loop, multiple=network.temporal_factor,
            seed=seed, stage=number, guidance=sampling.guidance_scale, clip=stage.schedule.clip, **how,
        )  # fmt: skip
        return frames.reshape(num_frames, height, width, channels)


def decoded(mix: torch.Tensor, latents: np.ndarray, scale: int) -> np.ndarray:
    """What the toy decoder makes of latents [T, h, w, C], frame by frame, with other operations than its own."""
    frames = []
    for latent in torch.from_numpy(latents).double():
        colours = torch.einsum("hwc,cd->dhw", latent, mix.double()).tanh()
        large = F.interpolate(colours[None], scale_factor=scale, mode="nearest")[0]
        frames.append(large.permute(1, 2, 0).float().numpy())
    return np.stack(frames)


def in_unit_range(frames: np.ndarray) -> np.ndarray:
    """Pixels of -1..1 as a request's "float" output has them."""
    return ((frames + np.float32(1)) * np.float32(0.5)).clip(0, 1)
