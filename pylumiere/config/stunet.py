"""The configuration of Lumiere's Space-Time U-Net."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pylumiere.config.fields import Config, check
from pylumiere.config.networks import NetworkConfig, register_config


@dataclass(frozen=True)
class LevelConfig(Config):
    """One resolution of the U-Net. Level 0 is the finest.

    Attributes:
        channels: width of the level.
        num_layers: residual blocks on the way down; as many on the way up, each joined with one skip.
        temporal_conv: a convolution-inflation block after each residual block.
        temporal_attention: stacked temporal attention blocks after each residual block; 0 for none.
        temporal_factor: frames are divided by this after the spatial down-sampling that leaves this level.
        spatial_attention, cross_attention: self-attention within a frame; attention to the text.
        shift: temporal shift before the first convolution of each residual block.
    """

    channels: int
    num_layers: int = 1
    temporal_conv: bool = True
    temporal_attention: int = 0
    temporal_factor: int = 1
    spatial_attention: bool = False
    cross_attention: bool = False
    shift: bool = False

    def __post_init__(self):
        check(1 <= self.channels <= 16384, f"channels={self.channels} is not in 1..16384")
        check(1 <= self.num_layers <= 32, f"num_layers={self.num_layers} is not in 1..32")
        check(0 <= self.temporal_attention <= 32, f"temporal_attention={self.temporal_attention} is not in 0..32")
        check(1 <= self.temporal_factor <= 8, f"temporal_factor={self.temporal_factor} is not in 1..8")


@register_config
@dataclass(frozen=True)
class STUNetConfig(NetworkConfig):
    """A Space-Time U-Net: levels, conditioning and stem. See `pylumiere.networks.stunet.STUNet`.

    Attributes:
        levels: finest first.
        in_channels: 7 for the base (noisy 3, conditioning 3, mask 1), 6 for the SSR (noisy 3, low resolution 3).
        patch_size: space-to-depth factor of the stem; 1 is a plain 3 x 3 convolution.
        num_groups: groups of each GroupNorm.
        head_dim: width of one attention head.
        text_dim: width of the text embeddings; 0 for a network without text.
        noise_level: the network takes a second, per-element noise level (the SSR's augmentation).
        frame_embedding: frame times enter the conditioning of each block through an MLP with time and text.
        skip_input: first of three input channels that are added to the output (the SSR predicts a residual on
            the upscaled low resolution); -1 for none.
        num_frames, height, width: the size the network is made for.
        shift_div, shift_pad, shift_direction: the temporal shift's fraction 1/shift_div, ends and directions.
    """

    family: ClassVar[str] = "stunet"

    levels: tuple[LevelConfig, ...]
    in_channels: int = 7
    out_channels: int = 3
    patch_size: int = 1
    num_groups: int = 32
    head_dim: int = 64
    text_dim: int = 384
    noise_level: bool = False
    frame_embedding: bool = True
    skip_input: int = -1
    num_frames: int = 80
    height: int = 128
    width: int = 128
    shift_div: int = 8
    shift_pad: str = "zero"
    shift_direction: str = "both"

    def __post_init__(self):
        check(1 <= len(self.levels) <= 8, f"{len(self.levels)} levels, allowed are 1..8")
        check(self.in_channels >= 1 and self.out_channels >= 1, "in_channels and out_channels must be at least 1")
        check(self.patch_size in (1, 2, 4, 8), f"patch_size={self.patch_size} is not one of 1, 2, 4, 8")
        check(self.text_dim >= 0, f"text_dim={self.text_dim} is negative")
        check(self.shift_pad in ("zero", "circular", "replicate"), f"shift_pad={self.shift_pad!r} is unknown")
        check(self.shift_direction in ("both", "causal"), f"shift_direction={self.shift_direction!r} is unknown")
        check(
            -1 <= self.skip_input <= self.in_channels - self.out_channels,
            f"skip_input={self.skip_input} does not fit in_channels={self.in_channels}",
        )
        for level in self.levels:
            check(
                level.channels % self.num_groups == 0,
                f"channels={level.channels} is not a multiple of num_groups={self.num_groups}",
            )
            if level.temporal_attention or level.spatial_attention or level.cross_attention:
                check(
                    level.channels % self.head_dim == 0,
                    f"channels={level.channels} is not a multiple of head_dim={self.head_dim}",
                )
            check(not level.cross_attention or self.text_dim > 0, "cross_attention needs text_dim > 0")
        check(self.levels[-1].temporal_factor == 1, "the coarsest level cannot have a temporal_factor")
        for name, size, factor in (
            ("num_frames", self.num_frames, self.temporal_factor),
            ("height", self.height, self.spatial_factor),
            ("width", self.width, self.spatial_factor),
        ):
            check(size >= 1 and size % factor == 0, f"{name}={size} is not a positive multiple of {factor}")

    @property
    def temporal_factor(self) -> int:
        """The number of frames must be a multiple of this."""
        return math.prod(level.temporal_factor for level in self.levels)

    @property
    def min_frames(self) -> int:
        """One frame is a network of its own where frames are shifted or embedded, and is not counted."""
        has_single = not self.frame_embedding and not any(level.shift for level in self.levels)
        return self.temporal_factor if self.temporal_factor > 1 or has_single else 2

    @property
    def spatial_factor(self) -> int:
        """Height and width must be multiples of this."""
        return self.patch_size * 2 ** (len(self.levels) - 1)
