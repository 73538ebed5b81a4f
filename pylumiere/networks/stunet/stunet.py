"""The Space-Time U-Net: a list of typed blocks, walked once for all frames of the clip.

A `STUNetConfig` says for each level which blocks stand on it; `plan_blocks` turns it into the flat list that the
forward pass walks, the image network inflates from, and the exporters read.

Source: Bar-Tal et al. 2024, "Lumiere: A Space-Time Diffusion Model for Video Generation", section 3.1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylumiere.config import STUNetConfig
from pylumiere.networks.ops import PlainOps, Shift
from pylumiere.networks.stunet import blocks

TEMPORAL_KINDS = ("conv_inflation", "attention_inflation", "temporal_down", "temporal_up")


class BlockSpec(NamedTuple):
    """One step of the walk. Kinds "push" and "concat" move the running activation to and from the stack of skips."""

    kind: str
    name: str
    level: int
    in_channels: int
    channels: int
    factor: int = 1


def plan_blocks(config: STUNetConfig) -> list[BlockSpec]:
    """The blocks in the order in which they run.

    Temporal down-sampling follows each spatial one, temporal up-sampling each spatial one on the way up; skips are
    saved after each layer, at the frame rate of their level, so every join agrees in time.
    """
    plan: list[BlockSpec] = []
    levels = config.levels

    def layer(side: str, i: int, j: int, in_channels: int) -> None:
        level = levels[i]
        c, tag = level.channels, f"{side}{i}"
        plan.append(BlockSpec("resnet", f"{tag}_resnet{j}", i, in_channels, c))
        if level.spatial_attention or level.cross_attention:
            plan.append(BlockSpec("transformer", f"{tag}_attention{j}", i, c, c))
        if level.temporal_conv:
            plan.append(BlockSpec("conv_inflation", f"{tag}_temporal_conv{j}", i, c, c))
        if level.temporal_attention:
            plan.append(
                BlockSpec("attention_inflation", f"{tag}_temporal_attention{j}", i, c, c, level.temporal_attention)
            )

    for i, level in enumerate(levels):
        for j in range(level.num_layers):
            layer("down", i, j, level.channels)
            plan.append(BlockSpec("push", "", i, level.channels, level.channels))
        if i + 1 < len(levels):
            c = levels[i + 1].channels
            plan.append(BlockSpec("spatial_down", f"down{i}_space", i + 1, level.channels, c))
            if level.temporal_factor > 1:
                plan.append(BlockSpec("temporal_down", f"down{i}_time", i + 1, c, c, level.temporal_factor))
    for i in reversed(range(len(levels))):
        level = levels[i]
        for j in range(level.num_layers):
            plan.append(BlockSpec("concat", "", i, level.channels, 2 * level.channels))
            layer("up", i, j, 2 * level.channels)
        if i > 0:
            c = levels[i - 1].channels
            plan.append(BlockSpec("spatial_up", f"up{i}_space", i - 1, level.channels, c))
            if levels[i - 1].temporal_factor > 1:
                plan.append(BlockSpec("temporal_up", f"up{i}_time", i - 1, c, c, levels[i - 1].temporal_factor))
    return plan


def is_temporal(config: STUNetConfig, parameter: str) -> bool:
    """Whether a parameter belongs to the layers that inflation adds."""
    parts = parameter.split(".")
    if parts[0] == "frame_embed":
        return True
    return parts[0] == "blocks" and any(s.name == parts[1] and s.kind in TEMPORAL_KINDS for s in plan_blocks(config))


class STUNet(nn.Module):
    """Denoises a whole clip in one pass.

    Args of `forward`:
        sample: [B, T, H, W, in_channels]; the noisy clip first, then the conditioning channels.
        timesteps: [B], in units of the training schedule.
        text: [B, L, text_dim] and text_mask: [B, L] bool (True for real tokens); None for a network without text.
        noise_level: [B] in 0..1, for a network with `noise_level`.
        first_frame, frame_stride: place of the given frames in their clip, for the frame times.

    Returns:
        [B, T, H, W, out_channels] in the dtype of `sample`.

    Raises:
        ValueError: sizes that the levels cannot divide, wrong channels, or missing conditioning.
    """

    def __init__(self, config: STUNetConfig):
        super().__init__()
        self.config, self.ops = config, PlainOps()
        c0 = config.levels[0].channels
        self.emb_dim = d = max(4 * c0, 256)
        patch = config.patch_size**2
        self.conv_in = blocks.Conv2d(config.in_channels * patch, c0, 3)
        self.time_embed = nn.Sequential(nn.Linear(128, d), nn.SiLU(), nn.Linear(d, d))
        if config.noise_level:
            self.level_embed = nn.Sequential(nn.Linear(128, d), nn.SiLU(), nn.Linear(d, d))
        if config.text_dim:
            self.text_pool = nn.Linear(config.text_dim, d)
        if config.frame_embedding:
            self.frame_embed = nn.Sequential(
                nn.Linear(64 + d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d)
            )
            nn.init.zeros_(self.frame_embed[-1].weight)
            nn.init.zeros_(self.frame_embed[-1].bias)
        self.plan = plan_blocks(config)
        self.blocks = nn.ModuleDict({spec.name: self._build(spec) for spec in self.plan if spec.name})
        self.norm_out = blocks.GroupNorm(c0, config.num_groups)
        self.conv_out = blocks.Conv2d(c0, config.out_channels * patch, 3, zero=True)

    def _build(self, spec: BlockSpec) -> nn.Module:
        config, level = self.config, self.config.levels[spec.level]
        groups, d = config.num_groups, self.emb_dim
        match spec.kind:
            case "resnet":
                shift = Shift(config.shift_div, config.shift_direction, config.shift_pad) if level.shift else None
                return blocks.ResnetBlock(spec.in_channels, spec.channels, d, groups, shift)
            case "transformer":
                return blocks.SpatialTransformer(
                    spec.channels,
                    d,
                    groups,
                    config.head_dim,
                    config.text_dim,
                    level.spatial_attention,
                    level.cross_attention,
                )
            case "conv_inflation":
                return blocks.ConvolutionInflationBlock(spec.channels, d, groups)
            case "attention_inflation":
                return blocks.AttentionInflationBlock(spec.channels, d, groups, config.head_dim, spec.factor)
            case "spatial_down":
                return blocks.SpatialDownsample(spec.in_channels, spec.channels)
            case "spatial_up":
                return blocks.SpatialUpsample(spec.in_channels, spec.channels)
            case "temporal_down":
                return blocks.TemporalDownsample(spec.channels, spec.factor)
            case "temporal_up":
                return blocks.TemporalUpsample(spec.channels, spec.factor)
        raise AssertionError(spec)

    @classmethod
    def from_image_unet(cls, image: STUNet, config: STUNetConfig) -> STUNet:
        """Inflate an image network: its weights are copied, the temporal blocks start as the identity.

        With temporal factors of 1 the result equals the image network on every frame: bit for bit without
        `frame_embedding`, to rounding with it (the conditioning is then computed per frame, in other shapes).

        Args:
            image: a STUNet whose config has no temporal blocks (see `image_config`).
            config: the same network with temporal blocks. It may take more input channels; those start at zero.

        Raises:
            ValueError: the spatial parts differ; the first parameter that does not fit is named.
        """
        model = cls(config)
        source, target = image.state_dict(), model.state_dict()
        for name, value in source.items():
            if name not in target:
                raise ValueError(f"the image network's {name} has no place in the video network")
            if name == "conv_in.weight" and value.shape != target[name].shape:
                value = _widen_input(value, image.config, config)
            if value.shape != target[name].shape:
                raise ValueError(
                    f"{name}: the image network has {list(value.shape)}, the video network {list(target[name].shape)}"
                )
            target[name] = value
        missing = [n for n in target if n not in source and not model.is_temporal(n)]
        if missing:
            raise ValueError(f"the image network lacks {missing[0]}")
        model.load_state_dict(target)
        return model

    def is_temporal(self, parameter: str) -> bool:
        """Whether a parameter belongs to the layers that inflation adds."""
        return is_temporal(self.config, parameter)

    def _check(self, sample: Tensor, text: Tensor | None, noise_level: Tensor | None) -> None:
        config = self.config
        if sample.ndim != 5 or sample.shape[-1] != config.in_channels:
            raise ValueError(f"sample has shape {list(sample.shape)}, expected [B, T, H, W, {config.in_channels}]")
        for name, size, factor in (
            ("T", sample.shape[1], config.temporal_factor),
            ("H", sample.shape[2], config.spatial_factor),
            ("W", sample.shape[3], config.spatial_factor),
        ):
            if size % factor or size < 1:
                raise ValueError(f"{name}={size} is not a positive multiple of {factor}")
        if config.text_dim and text is None:
            raise ValueError("this network needs text embeddings")
        if config.noise_level and noise_level is None:
            raise ValueError("this network needs a noise_level")

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        noise_level: Tensor | None = None,
        first_frame: int = 0,
        frame_stride: int = 1,
    ) -> Tensor:
        self._check(sample, text, noise_level)
        config, dtype = self.config, self.conv_in.weight.dtype
        emb = self.time_embed(blocks.sinusoid(timesteps, 128).to(dtype))
        if noise_level is not None and config.noise_level:
            emb = emb + self.level_embed(blocks.sinusoid(noise_level * 1000, 128).to(dtype))
        if config.text_dim:
            text = text.to(dtype)
            emb = emb + self.text_pool(_mean_tokens(text, text_mask))
        emb = emb[:, None]  # [B, 1, D]
        times = first_frame + frame_stride * torch.arange(sample.shape[1], device=sample.device, dtype=torch.float32)
        if config.frame_embedding and sample.shape[1] > 1:
            features = blocks.sinusoid(times, 64, 400.0).to(dtype).expand(sample.shape[0], -1, -1)
            emb = emb + self.frame_embed(torch.cat([features, emb.expand(-1, sample.shape[1], -1)], -1))
        context = {
            i: blocks.Context(self.ops, F.silu(emb[:, ::f]), text, text_mask, times[::f])
            for i, f in enumerate(self._strides())
        }

        x = blocks.space_to_depth(sample.to(dtype), config.patch_size)
        x = self.ops.spatial_conv(x, self.conv_in.weight, self.conv_in.bias)
        skips = []
        for spec in self.plan:
            if spec.kind == "push":
                skips.append(x)
            elif spec.kind == "concat":
                x = torch.cat([x, skips.pop()], -1)
            else:
                x = self.blocks[spec.name](x, context[spec.level])
        x = self.ops.spatial_conv(x, self.conv_out.weight, self.conv_out.bias, norm=self.norm_out.spec, silu=True)
        x = blocks.depth_to_space(x, config.patch_size).to(sample.dtype)
        if config.skip_input >= 0:
            x = x + sample[..., config.skip_input : config.skip_input + config.out_channels]
        return x

    def _strides(self) -> list[int]:
        strides = [1]
        for level in self.config.levels[:-1]:
            strides.append(strides[-1] * level.temporal_factor)
        return strides


def _mean_tokens(text: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens: [B, L, D] -> [B, D]."""
    if mask is None:
        return text.mean(1)
    weight = mask.to(text.dtype)[..., None]
    return (text * weight).sum(1) / weight.sum(1).clamp(min=1)


def _widen_input(weight: Tensor, old: STUNetConfig, new: STUNetConfig) -> Tensor:
    """conv_in.weight with more input channels; new ones start at zero. Channels stand inside each patch position."""
    if old.patch_size != new.patch_size or old.in_channels > new.in_channels:
        raise ValueError(
            f"conv_in cannot go from {old.in_channels} channels, patch {old.patch_size}, "
            f"to {new.in_channels} channels, patch {new.patch_size}"
        )
    patch = old.patch_size**2
    wide = weight.new_zeros(weight.shape[0], patch, new.in_channels, *weight.shape[2:])
    wide[:, :, : old.in_channels] = weight.unflatten(1, (patch, old.in_channels))
    return wide.flatten(1, 2)


def image_config(config: STUNetConfig) -> STUNetConfig:
    """The image network under a video network: the same levels without temporal blocks."""

    levels = tuple(
        replace(level, temporal_conv=False, temporal_attention=0, temporal_factor=1, shift=False)
        for level in config.levels
    )
    return replace(config, levels=levels, frame_embedding=False, num_frames=1)
