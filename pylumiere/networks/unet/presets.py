"""Public layouts by name: what the folders of Stable Diffusion say, without weights.

The U-Nets and autoencoders are given in the words of those folders (see `UNet2DConfig.from_diffusers`); what they leave
out has diffusers' default.
"""

from __future__ import annotations

from pylumiere.config import (
    AutoencoderKLConfig,
    DecoderConfig,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    StageConfig,
    UNet2DConfig,
)
from pylumiere.config.fields import check

FRAMES = 16  # of a clip; these networks are made for single pictures

AUTOENCODER = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
UNETS = {
    "sd-1.5": {
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "layers_per_block": 2,
        "sample_size": 64,
    },
    "sd-2.1": {
        "attention_head_dim": [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "layers_per_block": 2,
        "sample_size": 96,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
}
SAMPLING = {"sd-1.5": ("epsilon", "dpmpp_2m"), "sd-2.1": ("v_prediction", "ddim")}  # prediction type and sampler
MODELS = tuple(UNETS)


def model_preset(name: str) -> ModelConfig:
    """A whole model: "sd-1.5" or "sd-2.1", at its public size.

    Raises:
        ValueError: an unknown name.
    """
    check(name in MODELS, f"model {name!r} is not one of {', '.join(MODELS)}")
    size = UNETS[name]["sample_size"]
    network = UNet2DConfig.from_diffusers(UNETS[name], num_frames=FRAMES, height=size, width=size)
    prediction_type, sampler = SAMPLING[name]
    schedule = ScheduleConfig(
        "scaled_linear", prediction_type, timestep_spacing="leading", steps_offset=1, final_alpha="first",
        ddim_target="stride", initial_noise="one", clip=None,
    )  # fmt: skip
    return ModelConfig(
        name,
        (StageConfig("unet", network, schedule, SamplerConfig(sampler, 50, 7.5)),),
        DecoderConfig(AutoencoderKLConfig.from_diffusers(AUTOENCODER)),
        fps=8,
        text_encoder="clip",
        text_tokens=77,
    )
