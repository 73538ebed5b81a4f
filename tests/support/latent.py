"""A latent model of a few thousand weights: a U-Net with the temporal shift, and a decoder."""

from __future__ import annotations

from pylumiere.config import (
    AutoencoderKLConfig,
    DecoderConfig,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    StageConfig,
    TemporalShiftConfig,
    UNet2DConfig,
)


def latent_config() -> ModelConfig:
    """Clips of 4 frames of 16 x 16 pixels, in latents of 8 x 8."""
    network = UNet2DConfig(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=(1, 1),
        transformer_layers_per_block=(1, 1),
        num_heads=(2, 2),
        cross_attention_dim=24,
        norm_num_groups=4,
        temporal_shift=TemporalShiftConfig(),
        num_frames=4,
        height=8,
        width=8,
    )
    schedule = ScheduleConfig("scaled_linear", "epsilon", clip=None)
    return ModelConfig(
        "latent",
        (StageConfig("unet", network, schedule, SamplerConfig("ddim", 3, 2.0)),),
        DecoderConfig(AutoencoderKLConfig(block_out_channels=(8, 16), norm_num_groups=4), 2, tile=8, tile_overlap=0),
        text_encoder="hash",
        text_tokens=6,
    )
