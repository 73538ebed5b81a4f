"""Files that an earlier version wrote, in `data/old`: they load, and give the frames that it gave.

`config.json` and the weights in `tiny.plm/model` are a model folder with random weights. `tiny.plm` is that folder,
exported and signed. `frames.npz` is what the commit in `expected.json` made of the folder. That commit wrote all of it;
none of it is ever written anew.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import pylumiere

OLD = Path(__file__).resolve().parent / "data" / "old"
BUNDLE, KEY = OLD / "tiny.plm", OLD / "tiny.pub.pem"
EXPECTED = json.loads((OLD / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path):
    shutil.copyfile(OLD / "config.json", tmp_path / "config.json")
    for stage in ("base", "ssr"):
        shutil.copyfile(BUNDLE / "model" / f"{stage}.safetensors", tmp_path / f"{stage}.safetensors")
    return tmp_path


def load(source, backend="torch", **options):
    return pylumiere.Engine.load(source, backend=backend, device="cpu", precision=EXPECTED["precision"], **options)


def assert_gives_the_recorded_frames(engine):
    """Within one level of 255: another processor adds in another order, which can tip a pixel over."""
    with np.load(OLD / "frames.npz") as file:
        recorded = file["frames"]
    frames = engine.generate(**EXPECTED["request"]).frames
    assert frames.dtype == recorded.dtype
    assert frames.shape == recorded.shape
    assert np.abs(frames.astype(int) - recorded).max() <= 1


def test_an_old_folder_gives_its_frames(folder):
    with load(folder) as engine:
        assert engine.info()["parameters"] == EXPECTED["parameters"]
        assert_gives_the_recorded_frames(engine)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_an_old_bundle_gives_its_frames_and_its_signature_holds(backend):
    with load(BUNDLE, backend, trusted_key=KEY) as engine:
        assert engine.info()["parameters"] == EXPECTED["parameters"]
        assert engine.info()["bundle"]["signature"] == "the trusted key's"
        assert_gives_the_recorded_frames(engine)


def test_an_old_folder_and_its_bundle_are_the_same_model_to_the_bit(folder):
    with load(folder) as one, load(BUNDLE) as other:
        assert one.weights_digest() == other.weights_digest()


@pytest.mark.parametrize("version", [0, 1000])
def test_an_unknown_schema_version_is_refused_by_name(tmp_path, version):
    bundle = tmp_path / "tiny.plm"
    shutil.copytree(BUNDLE, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["schema_version"] = version
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(pylumiere.BundleError, match=rf"schema.version.*{version}\b"):
        load(bundle)


def test_an_unknown_field_of_the_config_is_refused_by_name(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "colour_space": "rgb"}))
    with pytest.raises(pylumiere.BundleError, match=r"config.json: .*'colour_space'"):
        load(folder)
