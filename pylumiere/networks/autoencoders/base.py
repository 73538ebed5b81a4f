"""What all autoencoders share: the scale of their latents, their checks, and the number format at both ends."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from pylumiere.config import AutoencoderKLConfig, AutoencoderTinyConfig
from pylumiere.networks.ops import PlainOps


class Autoencoder(nn.Module, abc.ABC):
    """Pictures to latents and back. Frames do not see each other.

    Latents are as a sampler holds them: (z - shift_factor) * scaling_factor, where z is what the layers make. Torch's
    own layers only hold the parameters: `ops` applies them, and pads convolutions by half their kernel.
    """

    def __init__(self, config: AutoencoderKLConfig | AutoencoderTinyConfig):
        super().__init__()
        self.config, self.ops = config, PlainOps()

    def forward(self, latents: Tensor) -> Tensor:
        """`decode`."""
        return self.decode(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, T, h, w, latent_channels] -> [B, T, h*scale, w*scale, out_channels] in about -1..1, not clipped.

        Returns:
            In the dtype of `latents`; it is computed in the dtype of the weights.

        Raises:
            ValueError: `latents` has another number of axes or channels.
        """
        self._check("latents", latents, self.config.latent_channels)
        z = latents / self.config.scaling_factor + self.config.shift_factor
        return self._to_frames(z.to(self._dtype)).to(latents.dtype)

    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, T, H, W, out_channels] in -1..1 -> [B, T, H/scale, W/scale, latent_channels].

        Args:
            noise: of the latents' shape, for a sample of the posterior; None for its mean. An autoencoder whose
                latents have no variance does not read it.

        Returns:
            In the dtype of `frames`; it is computed in the dtype of the weights.

        Raises:
            ValueError: H or W is not a multiple of the scale, or a tensor has another shape; its name is given.
        """
        self._check("frames", frames, self.config.out_channels)
        batch, times, *sides, _ = frames.shape
        for name, side in zip("HW", sides, strict=True):
            if side % self.config.scale:
                raise ValueError(f"{name}={side} is not a multiple of {self.config.scale}")
        shape = [batch, times, *(side // self.config.scale for side in sides), self.config.latent_channels]
        if noise is not None and list(noise.shape) != shape:
            raise ValueError(f"noise has shape {list(noise.shape)}, expected {shape}")
        z = self._to_latents(frames.to(self._dtype), noise).to(frames.dtype)
        return (z - self.config.shift_factor) * self.config.scaling_factor

    @abc.abstractmethod
    def _to_frames(self, z: Tensor) -> Tensor:
        """[B, T, h, w, latent_channels] to [B, T, H, W, out_channels], both in the dtype of the weights."""

    @abc.abstractmethod
    def _to_latents(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        """The other way; z, not yet shifted and scaled."""

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @staticmethod
    def _check(name: str, x: Tensor, channels: int) -> None:
        if x.ndim != 5 or x.shape[-1] != channels:
            raise ValueError(f"{name} has shape {list(x.shape)}, expected [B, T, H, W, {channels}]")
