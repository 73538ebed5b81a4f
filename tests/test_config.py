"""Configurations: JSON round trip, validation that names the value."""

import dataclasses
import json

import pytest

from pylumiere.config import LevelConfig, ModelConfig, STUNetConfig, WindowConfig
from pylumiere.networks.stunet.presets import model_preset, stage_preset


@pytest.mark.parametrize("name", ["demo", "stunet-b", "stunet-l", "tiny"])
def test_json_round_trip(name):
    config = model_preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def changed(data: dict, path: tuple, value) -> dict:
    """A copy of JSON values with one of them replaced."""
    data = json.loads(json.dumps(data))
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return data


BASE, SSR = ("stages", 0), ("stages", 1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("fps",), 0, "fps=0 is not in 1..240"),
        (("fps",), "16", "ModelConfig.fps: expected int, got '16'"),
        (("fps",), True, "ModelConfig.fps: expected int, got True"),
        (("schema_version",), 3, "schema_version 3 is not one of 1, 2"),
        ((*SSR, "windows", "overlap"), 8, "windows: overlap=8 is not in 0..7"),
        ((*SSR, "windows", "halo"), -1, "windows: halo=-1 is not in 0..64"),
        ((*SSR, "windows", "weights"), "hann", "'hann' is not one of flat, linear, gaussian"),
        ((*SSR, "augmentation"), float("nan"), "not finite"),
        ((*SSR, "augmentation"), 1.5, "stage ssr: augmentation=1.5 is not in 0..1"),
        (("colour",), 1, "ModelConfig: unknown field 'colour'"),
        ((*BASE, "colour"), 1, "StageConfig: unknown field 'colour'"),
        (BASE, None, "a stage should be an object, not NoneType"),
        (("stages",), 3, "ModelConfig.stages: expected a list, got int"),
        ((*BASE, "schedule", "name"), "sigmoid", "'sigmoid' is not one of cosine, linear, flow"),
        ((*BASE, "schedule", "logsnr_shift"), 1e30, "is not in -30..30"),
        ((*BASE, "sampling", "sampler"), "plms", "'plms' is not one of ddpm, ddim, euler, dpmpp_2m"),
        ((*BASE, "sampling", "guidance_scale"), -1.0, "guidance_scale=-1.0 is not in 0..1000"),
        ((*BASE, "network", "levels"), 3, "expected a list"),
        ((*BASE, "network", "patch_size"), 3, "patch_size=3 is not one of"),
        ((*BASE, "network", "height"), 33, "height=33 is not a positive multiple of 8"),
    ],
)
def test_bad_values_are_named(path, value, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(changed(model_preset("demo").to_dict(), path, value))


# ---- the first version of the schema ---------------------------------------------------------------------------------


def first_version(config: ModelConfig) -> dict:
    """What the first version wrote of a model with the stages base and ssr."""
    data = config.to_dict()
    base, ssr = ({n: stage[n] for n in ("network", "schedule", "sampling")} for stage in data["stages"])
    windows = data["stages"][1]["windows"]
    return {
        "name": data["name"], "base": base, "ssr": ssr, "fps": data["fps"], "text_encoder": data["text_encoder"],
        "text_tokens": data["text_tokens"], "window_frames": windows["frames"], "window_overlap": windows["overlap"],
        "halo_frames": windows["halo"], "window_weights": windows["weights"],
        "augmentation": data["stages"][1]["augmentation"],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["demo", "stunet-b", "stunet-l", "tiny"])
@pytest.mark.parametrize("version", [{}, {"schema_version": 1}], ids=["unnamed", "named"])
def test_the_first_version_means_the_same_model(name, version):
    config = model_preset(name)
    assert ModelConfig.from_dict(version | first_version(config)) == config


def test_the_first_version_of_a_model_of_one_network():
    config = model_preset("demo")
    data = first_version(config) | {"ssr": None, "augmentation": 0.0}
    base = dataclasses.replace(config, stages=config.stages[:1])
    assert ModelConfig.from_dict(data) == base
    assert ModelConfig.from_dict({name: value for name, value in data.items() if name != "ssr"}) == base


def test_the_first_version_had_defaults_of_its_own():
    data = first_version(model_preset("demo"))
    for name in ("fps", "text_encoder", "text_tokens", "window_frames", "window_overlap", "halo_frames",
                 "window_weights", "augmentation"):  # fmt: skip
        del data[name]
    config = ModelConfig.from_dict(data)
    assert (config.fps, config.text_encoder, config.text_tokens) == (16, "minilm", 24)
    assert config.last.windows == WindowConfig(frames=8, overlap=2, halo=0, weights="flat")
    assert config.last.augmentation == 0.0 and config.first.windows is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("fps",), 0, "fps=0 is not in 1..240"),
        (("window_overlap",), 8, "overlap=8 is not in 0..7"),
        (("window_frames",), 2, "overlap=2 is not in 0..1"),
        (("halo_frames",), -1, "halo=-1 is not in 0..64"),
        (("window_weights",), "hann", "'hann' is not one of flat, linear, gaussian"),
        (("augmentation",), float("nan"), "not finite"),
        (("colour",), 1, "unknown field 'colour'"),
        (("stages",), [], "unknown field 'stages'"),
        (("base",), None, "base: expected an object"),
        (("ssr",), 3, "ssr: expected an object"),
        (("base", "network"), None, "STUNetConfig: expected an object, got NoneType"),
        (("base", "schedule", "name"), "sigmoid", "'sigmoid' is not one of cosine, linear, flow"),
        (("ssr", "network", "height"), 33, "height=33 is not a positive multiple of"),
    ],
)
def test_bad_values_of_the_first_version_are_named(path, value, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({"schema_version": 1} | changed(first_version(model_preset("demo")), path, value))


def test_missing_field_is_named():
    with pytest.raises(ValueError, match="levels"):
        STUNetConfig.from_dict({})
    data = model_preset("demo").to_dict()
    with pytest.raises(ValueError, match="ModelConfig: .*'stages'"):
        ModelConfig.from_dict({name: value for name, value in data.items() if name != "stages"})
    del data["stages"][1]["network"]
    with pytest.raises(ValueError, match="stage ssr: network is missing"):
        ModelConfig.from_dict(data)


def test_coarsest_level_cannot_divide_frames():
    with pytest.raises(ValueError, match="coarsest level"):
        STUNetConfig((LevelConfig(32, temporal_factor=2),))


def test_unknown_presets_list_the_known():
    with pytest.raises(ValueError, match="demo-base"):
        stage_preset("nope")
    with pytest.raises(ValueError, match="stunet-l"):
        model_preset("nope")
