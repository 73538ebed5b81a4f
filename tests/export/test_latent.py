"""Models of latents as bundles: the temporal shift, decoders, CLIP, and a folder that diffusers has written."""

from __future__ import annotations

import collections
import importlib.util
import json

import numpy as np
import pytest
import torch
from pylumiere.export import source, to_onnx
from pylumiere.export.build import ExportOptions, export_bundle
from pylumiere.export.spec import Axis, NetworkSpec, network_specs
from safetensors import SafetensorError
from safetensors.torch import load_file

from pylumiere.checkpoints.bundle import TensorSpec, open_bundle
from pylumiere.checkpoints.diffusers import read_diffusers_folder
from pylumiere.errors import BundleError, InvalidRequest
from pylumiere.networks.families import Port
from pylumiere.networks.ops import Shift, shift_frames

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
onnx = pytest.importorskip("onnx", reason="needs pip install 'pylumiere[export]'")


def graph_of(output, stage):
    return onnx.load(output / "onnx" / f"{stage}.onnx", load_external_data=False).graph


# ---- one bundle of everything ----------------------------------------------------------------------------------------


def test_every_graph_was_compared_at_three_sizes(exported_latent, latent_model):
    output, _ = exported_latent
    graphs = {a.stage: a for a in open_bundle(output).manifest.artefacts if a.kind == "onnx"}
    assert list(graphs) == ["decoder", "text", "unet"]
    specs = network_specs(read_diffusers_folder(latent_model).config)
    for stage, spec in specs.items():
        expected = [int(np.prod(spec.output.shape(sizes))) for _, sizes in spec.check_sizes()]
        assert [one.values for one in graphs[stage].receipt.compared] == expected
    for artefact in graphs.values():
        assert all(0 < one.rel_rms < 2e-5 for one in artefact.receipt.compared)
    assert graphs["unet"].profiles[0]["sample"].min[1] == 2  # one frame is another network
    assert graphs["decoder"].profiles[0]["latents"].max == (1, 8, 8, 8, 4)  # a group of frames
    assert graphs["text"].inputs == (TensorSpec(name="input_ids", dtype="int64"),)  # CLIP reads no mask


def test_weights_are_one_file_a_network_with_the_values_of_the_shards(exported_latent, latent_model):
    output, _ = exported_latent
    assert len(list((latent_model / "unet").glob("*.safetensors"))) > 1
    for name, expected in read_diffusers_folder(latent_model).weights().items():
        stored = load_file(output / "model" / f"{name}.safetensors")
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[key], tensor) for key, tensor in expected.items())


def test_graphs_take_their_weights_from_those_files(exported_latent):
    output, _ = exported_latent
    files = {"unet": "model/unet.safetensors", "decoder": "model/decoder.safetensors", "text": "text/clip.safetensors"}
    for stage, path in files.items():
        outside = [t for t in graph_of(output, stage).initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        stored = set(load_file(output / path))
        used = {name for name in stored if stage != "decoder" or name.startswith(("decoder.", "post_quant_conv."))}
        assert {t.name for t in outside} == used  # the encoder lies in the decoder's file, for PyTorch
        assert {e.value for t in outside for e in t.external_data if e.key == "location"} == {f"../{path}"}


def test_graphs_hold_no_operator_that_tensorrt_is_wrong_on(exported_latent):
    output, _ = exported_latent
    for stage in ("unet", "decoder"):
        operators = {node.op_type for node in graph_of(output, stage).node}
        assert not operators & {"GroupNormalization", "ScatterElements", "ScatterND", "Mod", "Loop", "If"}


def test_the_text_encoders_parts_are_small_files(exported_latent):
    output, _ = exported_latent
    text = open_bundle(output).manifest.text
    assert (text.kind, text.width) == ("clip", 32)
    config = json.loads((output / text.config).read_text())
    assert (config["hidden_size"], config["max_position_embeddings"]) == (32, 77)
    assert json.loads((output / text.tokenizer).read_text())["model"]["type"] == "BPE"


@pytest.mark.skipif(not HAS_RTX, reason="TensorRT-RTX is not installed: pip install 'pylumiere[export]'")
def test_a_decoder_that_is_for_fp32_gets_an_fp32_plan_beside_fp16(exported_latent):
    output, report = exported_latent
    plans = {a.stage: a for a in open_bundle(output).manifest.artefacts if a.kind == "plan"}
    assert {stage: plan.precision for stage, plan in plans.items()} == {"unet": "fp16", "decoder": "fp32"}
    assert "type.half" not in plans["decoder"].receipt.layers
    assert plans["unet"].receipt.layers["type.half"] > plans["unet"].receipt.layers["type.float"]
    latents = plans["decoder"].profiles[0]["latents"]
    assert (latents.min, latents.max) == ((1, 1, 8, 8, 4), (1, 8, 8, 8, 4))  # the last group may be short
    assert any(note.startswith("decoder: in fp32") for note in report["notes"])


def test_a_bundle_of_latents_is_exported_again_from_itself(exported_latent, cache_folder, tmp_path):
    output, first = exported_latent
    report = export_bundle(str(output), tmp_path / "again.plm", cache_folder=cache_folder)
    old, new = (open_bundle(path).manifest for path in (output, tmp_path / "again.plm"))
    assert (new.artefacts, new.text, new.files) == (old.artefacts, old.text, old.files)
    assert report["cached"] == report["steps"]


def test_one_frame_is_a_bundle_of_its_own(exported_picture):
    output, _ = exported_picture
    unet = next(a for a in open_bundle(output).manifest.artefacts if a.stage == "unet")
    sample = unet.profiles[0]["sample"]
    assert (sample.min[1], sample.max[1]) == (1, 1)
    assert "Pad" not in {node.op_type for node in graph_of(output, "unet").node}  # nothing is shifted


def test_the_tiny_decoder_has_a_graph(exported_picture):
    output, _ = exported_picture
    operators = {node.op_type for node in graph_of(output, "decoder").node}
    assert {"Conv", "Relu", "Tanh", "Resize"} <= operators
    assert "InstanceNormalization" not in operators


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_one_frame_beside_several_is_refused(latent_model, tmp_path):
    with pytest.raises(InvalidRequest, match="--frames 1 cannot stand beside 4: .* a bundle of its own"):
        export_bundle(str(latent_model), tmp_path / "a.plm", ExportOptions(frames=(1, 4)))
    assert not list(tmp_path.iterdir())


def test_a_shift_is_for_folders_of_diffusers(tiny_model, exported_latent, tmp_path):
    for model in (tiny_model, exported_latent[0]):
        with pytest.raises(InvalidRequest, match="--temporal-shift: model .* is no folder with a model_index.json"):
            export_bundle(str(model), tmp_path / "a.plm", temporal_shift=8)


def test_a_transformers_folder_as_text_encoder_is_refused(picture_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in picture_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "text_encoder": "clip:somewhere"}))
    with pytest.raises(BundleError, match="'clip:somewhere' cannot be put into a bundle; minilm, hash, and CLIP of"):
        export_bundle(str(folder), tmp_path / "a.plm")


def test_a_disk_that_is_full_while_weights_are_written_is_one_line_and_leaves_nothing(
    latent_model, tmp_path, monkeypatch
):
    def fail(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(source, "save_file", fail)
    with pytest.raises(BundleError, match=r"model/unet.safetensors cannot be written: .* No space left on device"):
        export_bundle(str(latent_model), tmp_path / "a.plm")
    assert not list(tmp_path.iterdir())


# ---- operators in a graph --------------------------------------------------------------------------------------------


def traced(function, precision="fp32"):
    """The graph of a function of [B, T, H, W, 4], computed in the placeholder precision."""
    axes = {name: Axis(name, 2 if name == "T" else 1, 4, 8) for name in "BTHW"}
    ports = [Port(name, "fp32", ("B", "T", "H", "W", 4)) for name in ("sample", "prediction")]
    spec = NetworkSpec("part", (ports[0],), ports[1], axes, ({"B": 1, "T": 4, "H": 4, "W": 4},))
    model = to_onnx.trace(lambda weights, inputs: function(inputs["sample"].double()).float(), {}, spec)
    return to_onnx.lower(model, precision)


@pytest.mark.parametrize("pad", ["zero", "circular", "replicate"])
def test_a_shift_is_slices_and_a_pad_or_concatenation_for_any_number_of_frames(pad, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = traced(lambda x: shift_frames(x, Shift(4, "both", pad)))
    assert set(to_onnx.save(model, tmp_path / "a.onnx")) <= {"Pad", "Slice", "Concat", "Constant", "Cast"}
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    for frames in (2, 3, 7):
        x = torch.randn(2, frames, 3, 2, 4, generator=torch.Generator().manual_seed(frames))
        expected = torch.cat([x[..., :1].roll(-1, 1), x[..., 1:2].roll(1, 1), x[..., 2:]], -1)
        if pad != "circular":
            expected[:, -1, ..., 0] = x[:, -1, ..., 0] if pad == "replicate" else 0
            expected[:, 0, ..., 1] = x[:, 0, ..., 1] if pad == "replicate" else 0
        assert np.array_equal(session.run(None, {"sample": x.numpy()})[0], expected.numpy())


def test_attention_that_is_for_float32_stays_there_in_a_graph_of_16_bits():
    import onnx_ir as ir

    ops = to_onnx.ExportOps()

    def attend(x, upcast):
        q = x.flatten(2, 3).flatten(0, 1)
        q = ops.upcast(q) if upcast else q
        return ops.attention(q, q, q, 2).to(x.dtype).view(x.shape)

    types = {}
    for upcast in (False, True):
        nodes = collections.Counter(
            (node.op_type, node.outputs[0].dtype) for node in traced(lambda x, u=upcast: attend(x, u), "fp16").graph
        )
        types[upcast] = {dtype for (kind, dtype), _ in nodes.items() if kind in ("MatMul", "Softmax")}
    assert types == {False: {ir.DataType.FLOAT16}, True: {ir.DataType.FLOAT}}
