"""`import_model`: what it writes is what diffusers would have loaded; what it refuses, it refuses in one line."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_diffusers import edit_json, write_tiny_sd
from support.tiny_ldm import ldm_tensors

from pylumiere.checkpoints.diffusers import read_diffusers_folder
from pylumiere.checkpoints.files import described
from pylumiere.checkpoints.importing import import_model
from pylumiere.checkpoints.single_file import SingleFile
from pylumiere.cli import main
from pylumiere.errors import BundleError


@pytest.fixture(scope="module", params=[False, True], ids=["sd1", "sd2"])
def made(request, tmp_path_factory):
    """A tiny pipeline, its folder, and its weights in a single file."""
    folder = tmp_path_factory.mktemp("sd") / "tiny"
    pipeline = write_tiny_sd(folder, sd2=request.param)
    file = folder.parent / "single" / "model.safetensors"
    file.parent.mkdir()
    save_file(ldm_tensors(pipeline), file)
    return pipeline, folder, file


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pickled") / "tiny"
    return write_tiny_sd(folder, safe=False), folder


@pytest.fixture
def copy(pickled, tmp_path):
    """A folder with pickles to be spoilt."""
    return shutil.copytree(pickled[1], tmp_path / "source")


def assert_same_model(folder, pipeline):
    weights = folder.weights()
    for name, module in (("unet", pipeline.unet), ("decoder", pipeline.vae)):
        expected = module.state_dict()
        assert weights[name].keys() == expected.keys()
        assert all(torch.equal(weights[name][key], tensor) for key, tensor in expected.items())
    inputs = pipeline.tokenizer(["a dog, and a cat"], padding="max_length", return_tensors="pt")
    expected = pipeline.text_encoder(inputs.input_ids).last_hidden_state
    torch.testing.assert_close(folder.text_encoder().encode(["a dog, and a cat"])[0], expected, rtol=1e-5, atol=1e-5)


def test_a_single_file_is_the_pipeline_that_it_was_made_from(made, tmp_path):
    pipeline, folder, file = made
    assert_same_model(import_model(file, tmp_path / "out", config=folder), pipeline)


def test_diffusers_loads_what_was_written(made, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipeline, folder, file = made
    import_model(file, tmp_path / "out", config=folder)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    for name in ("unet", "vae"):
        expected = getattr(pipeline, name).state_dict()
        assert all(torch.equal(t, expected[key]) for key, t in getattr(loaded, name).state_dict().items())
    assert loaded.scheduler.config.prediction_type == pipeline.scheduler.config.prediction_type
    assert loaded.tokenizer("a dog").input_ids == pipeline.tokenizer("a dog").input_ids


def test_pickled_weights_become_safetensors(pickled, tmp_path):
    pipeline, source = pickled
    with pytest.raises(BundleError, match="only pickled weights .*`pylumiere import`"):
        read_diffusers_folder(source).weights()
    assert_same_model(import_model(source, tmp_path / "out"), pipeline)
    assert not list((tmp_path / "out").rglob("*.bin")) and (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing else is left"


def test_fields_of_ours_and_16_bits_are_kept(copy, tmp_path):
    edit_json(copy / "unet" / "config.json", temporal_shift={"div": 4}, num_frames=6)
    half = {name: t.half() for name, t in torch.load(copy / "vae" / "diffusion_pytorch_model.bin").items()}
    (copy / "vae" / "diffusion_pytorch_model.bin").unlink()
    torch.save(half, copy / "vae" / "diffusion_pytorch_model.fp16.bin")
    folder = import_model(copy, tmp_path / "out")
    assert folder.config.first.network.temporal_shift.div == 4 and folder.config.first.network.num_frames == 6
    assert {tensor.dtype for tensor in folder.weights()["decoder"].values()} == {torch.float16}


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_configurations_of_the_layouts_are_those_of_diffusers(kind, tmp_path):
    """Of full size, on the meta device: the U-Net's and the autoencoder's parameters, and the text model's."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from pylumiere.checkpoints.single_file import _layout
    from pylumiere.config import AutoencoderKLConfig, UNet2DConfig
    from pylumiere.networks.families import expected_shapes
    from pylumiere.networks.text.clip import ClipTextConfig, clip_shapes

    layout = _layout(kind)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(layout["unet"]), AutoencoderKL.from_config(layout["vae"])
        text = CLIPTextModel(CLIPTextConfig(**layout["text_encoder"]))
    ours = expected_shapes(UNet2DConfig.from_diffusers(layout["unet"], num_frames=1, height=64, width=64))
    assert ours == {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    ours = expected_shapes(AutoencoderKLConfig.from_diffusers(layout["vae"]))
    assert ours == {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    ours = clip_shapes(ClipTextConfig.from_json(layout["text_encoder"]))
    theirs = {"text_model." + name.removeprefix("text_model."): t for name, t in text.state_dict().items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    millions = sum(tensor.numel() for tensor in unet.state_dict().values()) / 1e6
    assert round(millions) == (860 if kind == "sd1" else 866)


def test_without_a_configuration_the_file_says_which_model_it_is(made):
    pipeline, _, file = made
    is_second = pipeline.unet.config.use_linear_projection
    found = SingleFile(file)
    assert found.configs["unet"]["cross_attention_dim"] == (1024 if is_second else 768)
    assert found.configs["scheduler"]["prediction_type"] == ("v_prediction" if is_second else "epsilon")
    assert found.pad_token == ("!" if is_second else "<|endoftext|>")
    smaller = SingleFile(file, prediction_type="epsilon")
    assert smaller.configs["unet"]["sample_size"] == 64
    assert smaller.configs["scheduler"]["prediction_type"] == "epsilon"
    with pytest.raises(BundleError, match="does not fit the model: missing"):
        found.tensors("unet", dict.fromkeys(pipeline.unet.state_dict(), (1,)))


def test_the_channels_of_inpainting_are_the_file_s(made, tmp_path):
    tensors = load_file(made[2])
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.ones(32, 9, 3, 3)
    save_file(tensors, tmp_path / "inpainting.safetensors")
    assert SingleFile(tmp_path / "inpainting.safetensors").configs["unet"]["in_channels"] == 9


def test_the_padding_token_is_the_model_s(made, tmp_path, monkeypatch):
    """A tokenizer of CLIP pads with its end token, Stable Diffusion 2 with "!"."""
    import pylumiere.checkpoints.single_file as module

    pipeline, folder, file = made
    tiny = {name: json.loads(next((folder / name).glob("*config.json")).read_text())
            for name in ("unet", "vae", "text_encoder", "scheduler")}  # fmt: skip
    pad_token = module._layout("sd2" if pipeline.unet.config.use_linear_projection else "sd1")["pad_token"]
    monkeypatch.setattr(module, "_layout", lambda name: tiny | {"pad_token": pad_token})
    tokenizer = shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    edit_json(tokenizer / "tokenizer_config.json", pad_token="<|endoftext|>")
    assert_same_model(import_model(file, tmp_path / "out", tokenizer=tokenizer), pipeline)


def test_where_a_tokenizer_is_looked_for(made, tmp_path):
    pipeline, folder, file = made
    bare = shutil.copytree(folder, tmp_path / "bare")
    shutil.rmtree(bare / "tokenizer")
    with pytest.raises(BundleError, match="no tokenizer in .*bare/tokenizer or .*single/tokenizer: give the folder"):
        import_model(file, tmp_path / "out", config=bare)
    with pytest.raises(BundleError, match="no tokenizer in .*nowhere: give"):
        import_model(file, tmp_path / "out", config=folder, tokenizer=tmp_path / "nowhere")
    (tmp_path / "beside").mkdir()
    shutil.copy(file, tmp_path / "beside" / "model.safetensors")
    shutil.copytree(folder / "tokenizer", tmp_path / "beside" / "tokenizer")
    import_model(tmp_path / "beside" / "model.safetensors", tmp_path / "out", config=bare)
    assert (tmp_path / "out" / "tokenizer" / "vocab.json").is_file()


def test_command_line(made, tmp_path, capsys):
    _, folder, file = made
    assert main(["import", str(file), "-o", str(tmp_path / "out"), "--config", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"] == str(tmp_path / "out") and said["size"] == [16, 16] and said["parameters"] > 10**6
    assert main(["import", str(file), "-o", str(tmp_path / "out"), "--config", str(folder)]) == 2
    assert capsys.readouterr().err == f"pylumiere: {tmp_path / 'out'} exists; give a folder that does not\n"


# ---- what is refused -----------------------------------------------------------------------------------------------


def refusal(source, output, **options) -> str:
    before = sorted(output.parent.iterdir())
    with pytest.raises(BundleError) as caught:
        import_model(source, output, **options)
    assert sorted(output.parent.iterdir()) == before, "a refused import leaves nothing behind"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), "missing conv_out.bias"),
        (lambda t: t.pop("model.diffusion_model.input_blocks.1.0.in_layers.0.bias"), "missing down_blocks.0.resnets.0"),
        (lambda t: t.pop("first_stage_model.decoder.conv_in.weight"), "missing decoder.conv_in.weight"),
        (lambda t: t.update({"model.diffusion_model.label_emb.0.0.weight": torch.ones(2)}), "label_emb.0.0.wei"),
        (lambda t: t.update({"model.diffusion_model.out.2.bias": torch.ones(5)}), "wrong shape conv_out.bias [5]"),
        (lambda t: t.update({"model.diffusion_model.out.2.bias": torch.tensor([1, 1, 1, torch.nan])}),
         "NaN or infinity in conv_out.bias"),
        (lambda t: t.update({"model.diffusion_model.out.2.bias": torch.ones(4).double()}), "wrong dtype model.diff"),
        (lambda t: t.update({"model.diffusion_model.out.2.bias": torch.ones(4, dtype=torch.int64)}), "wrong dtype"),
        (lambda t: t.update({"model.diffusion_model.input_blocks.x.y": torch.ones(4)}), "input_blocks.x.y"),
        (lambda t: t.pop("model.diffusion_model.input_blocks.0.0.weight"), "holds no convolution model.diffusion_mod"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("cond_stage")], "holds no cond_stage_model."),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("first_stage")], "holds no first_stage_model."),
        (lambda t: t.clear(), "holds no model.diffusion_model."),
    ],
)  # fmt: skip
def test_single_files_that_are_refused(made, tmp_path, spoil, text):
    _, folder, file = made
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    assert text in refusal(tmp_path / "model.safetensors", tmp_path / "out", config=folder)


def test_files_that_are_no_single_files(made, tmp_path):
    _, folder, file = made
    for name in ("model.ckpt", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps({}))
        assert f"{name} is a pickle" in refusal(tmp_path / name, tmp_path / "out")
    assert "cannot be read: No such file" in refusal(tmp_path / "none.safetensors", tmp_path / "out")
    assert "neither a diffusers folder" in refusal(tmp_path, tmp_path / "out")
    damaged = tmp_path / "model.safetensors"
    for data in (b"", b"text", file.read_bytes()[:-5], b"PK\x03\x04" + bytes(50)):
        damaged.write_bytes(data)
        assert "is truncated or no safetensors file" in refusal(damaged, tmp_path / "out", config=folder)
    with damaged.open("wb") as stream:
        stream.write((100 * 2**20).to_bytes(8, "little"))
        stream.truncate(110 * 2**20)
    assert "says that its header has 104857600 bytes" in refusal(damaged, tmp_path / "out", config=folder)
    with damaged.open("wb") as stream:
        stream.truncate(2**40)
    assert "has 1099511627776 bytes; at most" in refusal(damaged, tmp_path / "out", config=folder)


def test_prediction_types_that_are_unknown(made, tmp_path):
    _, folder, file = made
    text = refusal(file, tmp_path / "out", config=folder, prediction_type="velocity")
    assert "prediction_type='velocity' is not followed; allowed: epsilon, sample, v_prediction" in text
    assert "is a folder with its own configuration" in refusal(folder, tmp_path / "out", prediction_type="epsilon")


class _Opened:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def zipped(compression) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(10**7))
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (pickle.dumps(_Opened()), "is no file that torch 1.6 or later has saved"),
        (b"", "is no file that torch 1.6 or later has saved"),
        (saved(_Opened()), "is damaged or holds more than tensors; nothing of it was run"),
        (saved({"conv_in.weight": _Opened()}), "is damaged or holds more than tensors; nothing of it was run"),
        (saved({})[:-30], "is no file that torch 1.6 or later has saved"),
        (saved([torch.ones(2)]), "holds no tensors by name"),
        (saved({1: torch.ones(2)}), "holds no tensors by name"),
        (saved({}), "missing conv_in.weight"),
        (zipped(zipfile.ZIP_DEFLATED), "has compressed parts, as torch.save makes none"),
        (zipped(zipfile.ZIP_STORED), "is damaged or holds more than tensors"),
    ],
)
def test_pickles_that_are_refused(copy, tmp_path, data, text):
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(data)
    assert text in refusal(copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"conv_out.bias": torch.full((4,), torch.inf)}, "NaN or infinity in conv_out.bias"),
        ({"conv_out.bias": torch.ones(5)}, "wrong shape conv_out.bias [5] (expected [4])"),
        ({"conv_out.bias": torch.ones(4).double()}, "wrong dtype conv_out.bias torch.float64"),
        ({"conv_out.bias": torch.ones(()).expand(10**9)}, "wrong shape conv_out.bias [1000000000]"),
        ({"more": torch.ones(4)}, "unexpected more"),
        ({"more": torch.ones(10**7)}, "bytes; at most"),
        ({"conv_out.bias": 3}, "missing conv_out.bias"),
    ],
)
def test_pickled_tensors_that_do_not_fit(copy, tmp_path, change, text):
    path = copy / "unet" / "diffusion_pytorch_model.bin"
    torch.save(torch.load(path) | change, path)
    assert text in refusal(copy, tmp_path / "out")


def test_a_pickle_that_is_a_link_out_of_the_folder(copy, tmp_path):
    path = copy / "unet" / "diffusion_pytorch_model.bin"
    shutil.move(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    assert "is a link out of the folder" in refusal(copy, tmp_path / "out")


def test_the_inverted_translation_is_right(made):
    """diffusers' own translation of the single file gives the pipeline's tensors: the oracle of this module's files."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    pipeline, _, file = made
    tensors = load_file(file)
    for module, convert in ((pipeline.unet, convert_ldm_unet_checkpoint), (pipeline.vae, convert_ldm_vae_checkpoint)):
        assert described(convert(tensors, module.config)) == described(module.state_dict())
