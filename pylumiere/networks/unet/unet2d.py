"""The picture U-Net of Stable Diffusion 1 and 2 on the frames of a clip, and Latent-Shift.

Sources: Rombach et al. 2022 ("High-Resolution Image Synthesis with Latent Diffusion Models"), in the layout of
diffusers' UNet2DConditionModel; An et al. 2023 ("Latent-Shift") for the temporal shift in the residual blocks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pylumiere.config import UNet2DConfig
from pylumiere.networks.ops import PlainOps, Shift
from pylumiere.networks.unet import layers
from pylumiere.networks.unet.walker import BlockSpec, place, plan_blocks, walk

LAYERS = {True: ("resnet", "transformer"), False: ("resnet",)}


class UNet2D(nn.Module):
    """Denoises all frames of a clip in one pass. They see each other by the temporal shift only.

    Args of `forward`:
        sample: [B, T, H, W, in_channels] latents.
        timesteps: [B] real numbers, in units of the training schedule.
        text: [B, L, text_dim], one for all frames of a clip.
        text_mask: [B, L] bool, True for tokens that are seen; None: all of them, as these networks are trained.
        noise_level: not taken; there for calls that are alike for all networks.

    Returns:
        [B, T, H, W, out_channels] in the dtype of `sample`.

    Raises:
        ValueError: sizes that the levels cannot divide, wrong channels, or missing text.
    """

    def __init__(self, config: UNet2DConfig):
        super().__init__()
        self.config, self.ops = config, PlainOps()
        first = config.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, first, 3)
        self.emb_dim = 4 * first
        self.time_embedding = layers.TimestepEmbedding(first, self.emb_dim)
        self.plan = plan_blocks(config, LAYERS)
        for spec in self.plan:
            if spec.name:
                place(self, spec.name, self._build(spec))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3)

    def _build(self, spec: BlockSpec) -> nn.Module:
        config, groups = self.config, self.config.norm_num_groups
        match spec.kind:
            case "resnet":
                given = config.temporal_shift
                shift = None if given is None else Shift(given.div, given.direction, given.pad)
                return layers.ResnetBlock(spec.in_channels, spec.channels, self.emb_dim, groups, config.norm_eps, shift)
            case "transformer":
                return layers.SpatialTransformer(
                    spec.channels,
                    config.num_heads[spec.level],
                    config.transformer_layers_per_block[spec.level],
                    config.text_dim,
                    groups,
                    config.use_linear_projection,
                    config.upcast_attention,
                )
            case "down":
                return layers.Downsample(spec.channels)
            case "up":
                return layers.Upsample(spec.channels)
        raise AssertionError(spec)

    def _check(self, sample: Tensor, text: Tensor | None) -> None:
        config = self.config
        if sample.ndim != 5 or sample.shape[-1] != config.in_channels:
            raise ValueError(f"sample has shape {list(sample.shape)}, expected [B, T, H, W, {config.in_channels}]")
        factors = (config.temporal_factor, config.spatial_factor, config.spatial_factor)
        for name, size, factor in zip("THW", sample.shape[1:4], factors, strict=True):
            if size % factor or size < 1:
                raise ValueError(f"{name}={size} is not a positive multiple of {factor}")
        if text is None:
            raise ValueError("this network needs text embeddings")

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        self._check(sample, text)
        config, ops, dtype = self.config, self.ops, self.conv_in.weight.dtype
        features = layers.timestep_features(
            timesteps, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        )
        emb = F.silu(self.time_embedding(features.to(dtype), ops))[:, None]
        x = ops.spatial_conv(sample.to(dtype), self.conv_in.weight, self.conv_in.bias)
        x = walk(self, self.plan, x, layers.Context(ops, emb, text.to(dtype), text_mask))
        x = ops.spatial_conv(
            x, self.conv_out.weight, self.conv_out.bias, norm=layers.norm_spec(self.conv_norm_out), silu=True
        )
        return x.to(sample.dtype)
