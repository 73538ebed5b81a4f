"""Model folders: an exact round trip, and one clear line for everything that can be wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pylumiere
from pylumiere.checkpoints.native import find_model, load_checkpoint, save_checkpoint
from pylumiere.config import ModelConfig
from pylumiere.errors import BundleError
from pylumiere.networks.families import build_network, expected_shapes
from pylumiere.networks.stunet import STUNet
from pylumiere.networks.stunet.presets import model_preset

CONFIG = model_preset("tiny")
BASE, SSR = CONFIG.first.network, CONFIG.last.network


def random_weights(config, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(config).items()}


@pytest.fixture(scope="module")
def weights():
    return {"base": random_weights(BASE, 0), "ssr": random_weights(SSR, 1)}


@pytest.fixture
def folder(weights, tmp_path):
    save_checkpoint(tmp_path, CONFIG, weights)
    return tmp_path


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_round_trip_is_exact(folder, weights):
    checkpoint = load_checkpoint(folder)
    assert checkpoint.config == CONFIG
    assert checkpoint.weights.keys() == weights.keys()
    for stage, saved in weights.items():
        loaded = checkpoint.weights[stage]
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert sorted(path.name for path in folder.iterdir()) == ["base.safetensors", "config.json", "ssr.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_dtype(weights, tmp_path, dtype):
    save_checkpoint(tmp_path, CONFIG, weights, dtype=dtype)
    base = load_checkpoint(tmp_path).weights["base"]
    assert {tensor.dtype for tensor in base.values()} == {dtype}
    assert torch.equal(base["conv_in.weight"], weights["base"]["conv_in.weight"].to(dtype))


def test_base_only_model(weights, tmp_path):
    config = ModelConfig("small", CONFIG.stages[:1], text_encoder="hash")
    save_checkpoint(tmp_path, config, {"base": weights["base"]})
    assert list(load_checkpoint(tmp_path).weights) == ["base"]
    save_file(weights["ssr"], tmp_path / "ssr.safetensors")
    with pytest.raises(BundleError, match="config.json has no ssr stage"):
        load_checkpoint(tmp_path)


def test_network_holds_the_tensors_themselves(folder):
    base = load_checkpoint(folder).weights["base"]
    network = build_network(BASE, base)
    assert network.conv_in.weight.data_ptr() == base["conv_in.weight"].data_ptr()
    assert not network.training and not any(p.requires_grad or p.is_meta for p in network.parameters())


def test_expected_shapes_are_those_of_the_network():
    network = STUNet(SSR)
    assert expected_shapes(SSR) == {n: tuple(t.shape) for n, t in network.state_dict().items()}


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("conv_in.bias"), "missing conv_in.bias"),
        (put("lora.down", torch.zeros(2)), "unexpected lora.down"),
        (put("conv_in.bias", torch.zeros(5)), r"wrong shape conv_in.bias \[5\] \(expected \[16\]\)"),
        (put("conv_in.bias", torch.zeros(16, dtype=torch.int32)), "dtype conv_in.bias I32 .allowed: F32, F16, BF16"),
        (put("conv_in.bias", torch.zeros(16, dtype=torch.float64)), "wrong dtype conv_in.bias F64"),
        (put("conv_in.bias", torch.full((16,), float("nan"))), "NaN or infinity in conv_in.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, edit, message):
    change(folder / "base.safetensors", edit)
    with pytest.raises(BundleError, match=message) as caught:
        load_checkpoint(folder)
    assert "base.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_only_the_first_few_names_are_listed(folder):
    def drop_all_but_one(tensors):
        for name in list(tensors)[1:]:
            del tensors[name]

    change(folder / "ssr.safetensors", drop_all_but_one)
    with pytest.raises(BundleError, match=r"missing \S+, \S+, \S+ and \d+ more$"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder, keep):
    path = folder / "base.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BundleError, match="base.safetensors is truncated or no safetensors file") as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_header_that_claims_an_absurd_size(folder):
    path = folder / "base.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    with pytest.raises(BundleError, match="truncated or no safetensors"):
        load_checkpoint(folder)


def test_no_pickle_is_read(folder):
    torch.save({"conv_in.bias": torch.zeros(16)}, folder / "base.safetensors")
    with pytest.raises(BundleError, match="truncated or no safetensors"):
        load_checkpoint(folder)


def test_oversized_files_are_refused_before_reading(folder):
    for name in ("base.safetensors", "config.json"):
        with (folder / name).open("r+b") as file:
            file.truncate(2**40)  # sparse: reading it would not end
        with pytest.raises(BundleError, match=f"{name} has 1099511627776 bytes; at most"):
            load_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "base.safetensors", "ssr.safetensors"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name} cannot be read: No such file"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: Expecting"),
        ("[]", "config.json: ModelConfig: expected an object, got list"),
        ("[" * 100_000, "config.json: "),
        ("\udcff", "config.json: "),
    ],
)
def test_config_that_is_no_json_object(folder, text, message):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BundleError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["colour"], 1, "'colour'"),
        (["fps"], "16", "fps"),
        (["stages", 0, "network", "head_dim"], 7, "head_dim=7"),
        (["stages", 0, "network", "num_frames"], 7, "num_frames=7"),
        (["stages", 0, "schedule", "prediction_type"], "score", "'score'"),
    ],
)
def test_config_values_that_are_refused(folder, keys, value, message):
    config = json.loads((folder / "config.json").read_text())
    place = config
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=message):
        load_checkpoint(folder)


def test_a_folder_nearby_does_not_hide_a_shipped_model(folder, monkeypatch):
    (folder / "demo").mkdir()
    monkeypatch.chdir(folder)
    assert find_model("./demo").resolve() == folder / "demo"
    shipped = Path(pylumiere.__file__).parent / "demo"
    if (shipped / "config.json").is_file():
        assert find_model("demo").resolve() == shipped.resolve()
    else:  # an installation without the weights
        with pytest.raises(BundleError, match="'demo' is not part of this installation"):
            find_model("demo")


def test_sources(folder, tmp_path):
    assert find_model(folder) == folder
    with pytest.raises(BundleError, match="'nothing/here' does not exist; give a folder, a bundle or one of: demo"):
        find_model("nothing/here")
    with pytest.raises(BundleError, match="is not a folder"):
        find_model(tmp_path / "config.json")


def test_saving_refuses_what_loading_would(weights, tmp_path):
    base = weights["base"]
    target = tmp_path / "model"
    with pytest.raises(BundleError, match="missing conv_in.weight"):
        save_checkpoint(target, CONFIG, {**weights, "base": {n: t for n, t in base.items() if n != "conv_in.weight"}})
    with pytest.raises(BundleError, match="NaN or infinity in conv_in.bias"):
        save_checkpoint(target, CONFIG, {**weights, "base": {**base, "conv_in.bias": torch.full((16,), float("inf"))}})
    with pytest.raises(BundleError, match="weights are given for base; the model has base, ssr"):
        save_checkpoint(target, CONFIG, {"base": base})
    with pytest.raises(BundleError, match="weights are given for base, decoder, ssr; the model has base, ssr"):
        save_checkpoint(target, CONFIG, {**weights, "decoder": {}})
    assert not target.exists(), "a refused model leaves nothing behind"


def test_a_failed_write_leaves_the_old_model(folder, weights, monkeypatch):
    import pylumiere.checkpoints.native as module

    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(folder, CONFIG, weights, dtype=torch.float16)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
