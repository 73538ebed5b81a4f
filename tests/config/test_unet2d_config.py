"""UNet2DConfig: what public unet/config.json files say, what is refused, JSON round trip."""

from __future__ import annotations

import inspect
import json

import pytest
from diffusers import UNet2DConditionModel

from pylumiere.config import StageConfig, TemporalShiftConfig, UNet2DConfig

# unet/config.json of a folder of Stable Diffusion 2.1, with what diffusers writes around it.
SD_2_1 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.10.0.dev0",
    "_name_or_path": "./somewhere",
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "sample_size": 96,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
    "upcast_attention": True,
}


def read(data: dict, **options) -> UNet2DConfig:
    return UNet2DConfig.from_diffusers(data, num_frames=16, height=96, width=64, **options)


def test_a_public_file_becomes_a_configuration():
    config = read(SD_2_1)
    assert config.num_heads == (5, 10, 20, 20) and config.layers_per_block == (2, 2, 2, 2)
    assert config.text_dim == 1024 and config.use_linear_projection and config.upcast_attention
    assert (config.num_frames, config.height, config.width) == (16, 96, 64)
    assert (config.spatial_factor, config.temporal_factor, config.given_channels) == (8, 1, 0)
    assert config.temporal_shift is None and config.min_frames == 1 and not config.masks_text
    assert read({**SD_2_1, "in_channels": 9}).takes_given


def test_what_a_file_leaves_out_has_the_default_of_diffusers():
    """All arguments of diffusers' class are known, and none of their defaults is refused."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
        if name != "self"
    }
    assert read(json.loads(json.dumps(defaults))) == read({}) == UNet2DConfig(height=96, width=64)


@pytest.mark.parametrize("shift", [None, TemporalShiftConfig(4, "causal", "replicate")])
def test_json_round_trip(shift):
    stage = StageConfig("base", read(SD_2_1, temporal_shift=shift))
    data = json.loads(json.dumps(stage.to_dict()))
    assert data["family"] == "unet2d" and StageConfig.from_dict(data) == stage


def test_the_shift_may_stand_in_the_file():
    data = {**SD_2_1, "temporal_shift": {"div": 4, "direction": "both", "pad": "circular"}}
    assert read(data).temporal_shift == TemporalShiftConfig(4, "both", "circular")
    assert read({**data, "temporal_shift": None}).temporal_shift is None
    assert read(data, temporal_shift=TemporalShiftConfig()).temporal_shift == TemporalShiftConfig()
    assert read(data).min_frames == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "_class_name",
            "UNet3DConditionModel",
            "_class_name='UNet3DConditionModel' is not supported, only 'UNet2DCond",
        ),
        ("class_embed_type", "timestep", "class_embed_type='timestep' is not supported, only None"),
        ("addition_embed_type", "text_time", "addition_embed_type='text_time' is not supported, only None"),
        ("dual_cross_attention", True, "dual_cross_attention=True is not supported, only False"),
        ("only_cross_attention", [True, False, False, False], "only_cross_attention=.* is not supported, only False"),
        ("mid_block_only_cross_attention", True, "=True is not supported, only None or False"),
        ("resnet_time_scale_shift", "scale_shift", "'scale_shift' is not supported, only 'default'"),
        ("center_input_sample", True, "center_input_sample=True"),
        ("act_fn", "gelu", "act_fn='gelu' is not supported, only 'silu'"),
        ("conv_in_kernel", 1, "conv_in_kernel=1 is not supported, only 3"),
        ("time_cond_proj_dim", 256, "time_cond_proj_dim=256"),
        ("encoder_hid_dim", 4096, "encoder_hid_dim=4096"),
        ("mid_block_type", None, "mid_block_type=None is not supported, only 'UNetMidBlock2DCrossAttn'"),
        ("num_attention_heads", 8, "num_attention_heads=8"),
        (
            "down_block_types",
            ["DownBlock2D"] * 3 + ["AttnDownBlock2D"],
            "down_block_types: 'AttnDownBlock2D' is not one",
        ),
        ("up_block_types", ["UpBlock2D"] * 3, "3 up_block_types for 4 levels"),
        (
            "up_block_types",
            ["UpBlock2D"] * 3 + ["UpBlock3D"],
            "'UpBlock3D' is not one of CrossAttnUpBlock2D, UpBlock2D",
        ),
        ("layers_per_block", [2, 2], "2 layers_per_block for 4 levels"),
        ("layers_per_block", 0, "layers_per_block: 0 is not in 1..32"),
        ("transformer_layers_per_block", [1, [1, 2], 1, 1], r"expected int, got \[1, 2\]"),
        ("block_out_channels", 320, "block_out_channels=320 is not a list"),
        ("block_out_channels", [320, 640, 1280, 1290], "1290 is not a multiple of norm_num_groups=32"),
        ("attention_head_dim", [5, 10, 20, 24], "1280 is not a multiple of num_heads 24"),
        ("attention_head_dim", "8", "num_heads: expected int, got '8'"),
        ("cross_attention_dim", [1024] * 4, "cross_attention_dim: expected int"),
        ("norm_num_groups", None, "norm_num_groups: expected int, got None"),
        ("norm_eps", float("inf"), "not finite"),
        ("freq_shift", 160, "freq_shift=160 is not in 0..159"),
        ("temporal_shift", {"div": 1}, "div=1 is below 2"),
        ("temporal_shift", {"pad": "mirror"}, "pad 'mirror' is not one of zero, circular, replicate"),
        ("temporal_shift", {"direction": "left"}, "direction 'left' is not one of both, causal"),
        ("temporal_shift", {"place": "norm1"}, "place 'norm1' is not one of conv1"),
        ("temporal_shift", {"folds": 2}, "unknown field 'folds'"),
        ("num_heads", 8, "unknown key 'num_heads' with value 8"),
        ("motion_module", "v2", "unknown key 'motion_module' with value 'v2'"),
    ],
)
def test_what_is_not_supported_is_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        read({**SD_2_1, key: value})


def test_levels_without_attention_need_no_heads_that_fit():
    types = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
             "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}  # fmt: skip
    read({"block_out_channels": [32, 64], "attention_head_dim": [7, 8], **types})
    with pytest.raises(ValueError, match="64 is not a multiple of num_heads 7"):
        read({"block_out_channels": [32, 64], "attention_head_dim": [8, 7], **types})


def test_sizes_that_the_levels_cannot_divide_are_named():
    for change, message in (
        (dict(height=60), "height=60 is not a positive multiple of 8"),
        (dict(width=0), "width=0 is not a positive multiple of 8"),
        (dict(num_frames=0), "num_frames=0 is not positive"),
    ):
        with pytest.raises(ValueError, match=message):
            UNet2DConfig(**change)
