"""Configurations: JSON round trip, validation that names the value."""

import json

import pytest

from pylumiere.config import LevelConfig, ModelConfig, STUNetConfig
from pylumiere.networks.stunet.presets import model_preset, stage_preset


@pytest.mark.parametrize("name", ["demo", "stunet-b", "stunet-l", "tiny"])
def test_json_round_trip(name):
    config = model_preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("fps",), 0, "fps=0 is not in 1..240"),
        (("fps",), "16", "ModelConfig.fps: expected int, got '16'"),
        (("fps",), True, "ModelConfig.fps: expected int, got True"),
        (("window_overlap",), 8, "window_overlap=8 is not in 0..7"),
        (("halo_frames",), -1, "halo_frames=-1 is not in 0..64"),
        (("window_weights",), "hann", "'hann' is not one of flat, linear, gaussian"),
        (("augmentation",), float("nan"), "not finite"),
        (("colour",), 1, "unknown field 'colour'"),
        (("base",), None, "StageConfig: expected an object, got NoneType"),
        (("base", "schedule", "name"), "sigmoid", "'sigmoid' is not one of cosine, linear, flow"),
        (("base", "schedule", "logsnr_shift"), 1e30, "is not in -30..30"),
        (("base", "sampling", "sampler"), "plms", "'plms' is not one of ddpm, ddim, euler, dpmpp_2m"),
        (("base", "sampling", "guidance_scale"), -1.0, "guidance_scale=-1.0 is not in 0..1000"),
        (("base", "network", "levels"), 3, "expected a list"),
        (("base", "network", "patch_size"), 3, "patch_size=3 is not one of"),
        (("base", "network", "height"), 33, "height=33 is not a positive multiple of 8"),
    ],
)
def test_bad_values_are_named(path, value, message):
    data = json.loads(json.dumps(model_preset("demo").to_dict()))
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(data)


def test_missing_field_is_named():
    with pytest.raises(ValueError, match="levels"):
        STUNetConfig.from_dict({})


def test_coarsest_level_cannot_divide_frames():
    with pytest.raises(ValueError, match="coarsest level"):
        STUNetConfig((LevelConfig(32, temporal_factor=2),))


def test_unknown_presets_list_the_known():
    with pytest.raises(ValueError, match="demo-base"):
        stage_preset("nope")
    with pytest.raises(ValueError, match="stunet-l"):
        model_preset("nope")
