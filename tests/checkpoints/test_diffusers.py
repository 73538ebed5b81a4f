"""diffusers folders read as they lie on disk: the tensors, settings and embeddings that diffusers has; and refusals."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_diffusers import edit_json, write_tiny_sd

from pylumiere.checkpoints.diffusers import is_diffusers_folder, read_diffusers_folder
from pylumiere.config import TemporalShiftConfig
from pylumiere.errors import BundleError

VARIANTS = {
    "sd1": {},
    "sd2": {"sd2": True},
    "tiny": {"decoder": "tiny"},
    "sharded": {"sharded": True},
    "fp16": {"variant": "fp16"},
    "sharded-fp16": {"sharded": True, "variant": "fp16"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / request.param
    return write_tiny_sd(folder, **VARIANTS[request.param]), folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / "plain"
    return write_tiny_sd(folder), folder


@pytest.fixture
def copy(plain, tmp_path):
    """A folder to be spoilt."""
    return shutil.copytree(plain[1], tmp_path / "sd")


def refusal(folder) -> str:
    with pytest.raises(BundleError) as caught:
        found = read_diffusers_folder(folder)
        found.weights()
        found.text_encoder()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def test_weights_are_those_that_diffusers_saved(variant):
    pipeline, folder = variant
    found = read_diffusers_folder(folder)
    weights = found.weights()
    assert list(weights) == ["unet", "decoder"] == list(found.config.networks)
    for name, module in (("unet", pipeline.unet), ("decoder", pipeline.vae)):
        assert weights[name].keys() == module.state_dict().keys()
        for key, tensor in module.state_dict().items():
            assert torch.equal(weights[name][key].float(), tensor)
            assert weights[name][key].dtype == (torch.float16 if "fp16" in folder.name else torch.float32)
    assert found.parameters == sum(tensor.numel() for part in weights.values() for tensor in part.values())


def test_text_is_embedded_as_by_the_pipeline(variant):
    pipeline, folder = variant
    prompts = ["a dog", "", "A cat and a dog " * 40]
    embeddings, mask = read_diffusers_folder(folder).text_encoder().encode(prompts)
    inputs = pipeline.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    expected = pipeline.text_encoder(inputs.input_ids).last_hidden_state
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-5)
    assert mask.all()


def test_the_config_is_what_the_files_say(variant):
    pipeline, folder = variant
    config = read_diffusers_folder(folder).config
    (stage,) = config.stages
    assert (config.name, stage.name, config.text_encoder, config.text_tokens) == (folder.name, "unet", "clip", 77)
    assert (stage.network.height, stage.network.width, config.size) == (8, 8, (16, 16))
    assert (stage.network.num_frames, stage.network.temporal_shift, config.fps) == (1, None, 8)
    assert stage.network.in_channels == 4 and stage.network.text_dim == 32
    assert (stage.sampling.num_inference_steps, stage.sampling.guidance_scale) == (50, 7.5)
    assert stage.schedule.prediction_type == pipeline.scheduler.config.prediction_type
    assert stage.schedule.clip is None and stage.schedule.betas == (0.00085, 0.012)
    assert config.decoder.network.family == ("autoencoder_tiny" if folder.name == "tiny" else "autoencoder_kl")


def test_a_folder_may_carry_the_shift_and_its_frames(copy):
    shift = TemporalShiftConfig(div=4)
    assert read_diffusers_folder(copy, temporal_shift=shift).config.first.network.temporal_shift == shift
    assert read_diffusers_folder(copy, temporal_shift=shift).config.first.network.num_frames == 16
    edit_json(copy / "unet" / "config.json", temporal_shift={"div": 8, "pad": "circular"})
    network = read_diffusers_folder(copy).config.first.network
    assert network.temporal_shift == TemporalShiftConfig(div=8, pad="circular") and network.num_frames == 16
    edit_json(copy / "unet" / "config.json", num_frames=24)
    assert read_diffusers_folder(copy).config.first.network.num_frames == 24
    assert read_diffusers_folder(copy, temporal_shift=shift).config.first.network.temporal_shift == shift
    assert len(read_diffusers_folder(copy).weights()["unet"]) == 208, "the shift has no weights"


def test_sizes_that_are_missing_or_not_square(copy):
    edit_json(copy / "unet" / "config.json", sample_size=[8, 16])
    assert read_diffusers_folder(copy).config.size == (16, 32)
    edit_json(copy / "unet" / "config.json", sample_size=...)
    assert read_diffusers_folder(copy).config.size == (128, 128)


@pytest.mark.parametrize("as_convolution", [False, True], ids=["linear", "convolution"])
def test_old_names_of_the_autoencoder_s_attention(plain, copy, as_convolution):
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(path).items():
        for present, before in old.items():
            if f".attentions.0.{present}." in name:
                name = name.replace(present, before)
                tensor = tensor[:, :, None, None] if as_convolution and tensor.ndim == 2 else tensor
        tensors[name] = tensor
    assert len(tensors.keys() - load_file(path).keys()) == 16
    save_file(tensors, path)
    decoder = read_diffusers_folder(copy).weights()["decoder"]
    expected = plain[0].vae.state_dict()
    assert all(torch.equal(decoder[name], tensor) for name, tensor in expected.items())


def test_the_text_model_s_old_names(plain, copy):
    path = copy / "text_encoder" / "model.safetensors"
    old = {f"text_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(old | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    ours = read_diffusers_folder(copy).text_encoder().encode(["a dog"])[0]
    assert torch.equal(ours, read_diffusers_folder(plain[1]).text_encoder().encode(["a dog"])[0])


def test_a_folder_is_known_by_its_index(plain, tmp_path):
    assert is_diffusers_folder(plain[1]) and is_diffusers_folder(str(plain[1]))
    assert not is_diffusers_folder(tmp_path) and not is_diffusers_folder(plain[1] / "model_index.json")


def test_neither_diffusers_nor_transformers_is_imported(plain):
    code = (
        "import sys\n"
        "from pylumiere.checkpoints.diffusers import read_diffusers_folder\n"
        f"folder = read_diffusers_folder({str(plain[1])!r})\n"
        "folder.weights(), folder.text_encoder()\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert not {"diffusers", "transformers", "huggingface_hub", "requests"} & set(done.stdout.split())


def test_components_that_are_not_used_are_noted(copy, caplog):
    edit_json(copy / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
              feature_extractor=["transformers", "CLIPImageProcessor"])  # fmt: skip
    with caplog.at_level(logging.INFO, logger="pylumiere"):
        read_diffusers_folder(copy)
    assert [record.getMessage() for record in caplog.records] == [
        f"{copy}: safety_checker, feature_extractor is not used"
    ]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        *(({"_class_name": name}, f"pipeline '{name}' is not supported; supported: StableDiffusionPipeline")
          for name in ("TextToVideoSDPipeline", "AnimateDiffPipeline", "StableVideoDiffusionPipeline",
                       "StableDiffusionXLPipeline", "WanPipeline")),
        ({"_class_name": ...}, "pipeline None is not supported"),
        ({"_class_name": ["x"]}, "pipeline ['x'] is not supported"),
        ({"_class_name": "x\n" * 1000}, "pipeline 'x\\nx"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "unet 'UNet3DConditionModel' is not supported"),
        ({"vae": ["diffusers", "AutoencoderKLWan"]}, "supported: AutoencoderKL, AutoencoderTiny"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder 'T5EncoderModel' is not supported"),
        ({"tokenizer": ["transformers", "T5Tokenizer"]}, "supported: CLIPTokenizer, CLIPTokenizerFast"),
        ({"unet": ["my_code", "UNet2DConditionModel"]}, "is no class of diffusers or transformers"),
        ({"unet": ["diffusers"]}, "unet ['diffusers'] is no class of diffusers or transformers"),
        ({"unet": ["diffusers", None]}, "is no class of diffusers or transformers"),
        ({"unet": "UNet2DConditionModel"}, "unet is missing"),
        ({"unet": [None, None], "vae": ...}, "unet, vae is missing"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "component controlnet is not supported; supported: unet"),
        ({"../../unet": ["diffusers", "UNet2DConditionModel"]}, "component ../../unet is not supported"),
    ],
)  # fmt: skip
def test_an_index_of_another_model(copy, fields, text):
    edit_json(copy / "model_index.json", **fields)
    assert text in (said := refusal(copy)) and str(copy / "model_index.json") in said


@pytest.mark.parametrize(
    ("file", "fields", "text"),
    [
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "_class_name='UNet3DConditionModel' is not"),
        ("unet/config.json", {"sample_size": "big"}, "height"),
        ("unet/config.json", {"num_frames": 0}, "num_frames=0 is not positive"),
        ("unet/config.json", {"temporal_shift": {"div": 1}}, "temporal_shift: div=1 is below 2"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time' is not supported"),
        ("unet/config.json", {"cross_attention_dim": 64}, "the text encoder is 32 wide; the U-Net expects 64"),
        ("unet/config.json", {"in_channels": 8, "out_channels": 8}, "the decoder takes 4 channels"),
        ("unet/config.json", {"block_out_channels": [64, 64]}, "wrong shape"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "_class_name='AutoencoderTiny' is not supported"),
        ("vae/config.json", {"in_channels": 4, "out_channels": 4}, "the decoder makes frames of 4"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type 't5' is not supported"),
        ("text_encoder/config.json", {"vocab_size": 100}, "wrong shape text_model.embeddings.token_embedding"),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "_class_name='LCMScheduler' is not one"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid' is not followed"),
    ],
)  # fmt: skip
def test_settings_that_are_not_supported(copy, file, fields, text):
    edit_json(copy / file, **fields)
    assert text in refusal(copy)


JSON_FILES = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)


@pytest.mark.parametrize("file", JSON_FILES)
def test_json_files_that_are_missing_malformed_or_huge(copy, file, tmp_path):
    path = copy / file
    whole = path.read_text()
    for data in (b"", b"{", b"[]", b"[" * 10**5, b"\xff\xff\xff"):
        path.write_bytes(data)
        assert str(path) in refusal(copy)
    with path.open("wb") as stream:
        stream.truncate(2**31)
    assert f"{path} has 2147483648 bytes; at most 1048576 are expected" in refusal(copy)
    path.unlink()
    assert f"{path} cannot be read: No such file" in refusal(copy)
    (tmp_path / "outside.json").write_text(whole)
    path.symlink_to(tmp_path / "outside.json")
    assert f"{path} is a link out of the folder" in refusal(copy)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_are_missing_pickled_or_outside(copy, component, tmp_path):
    (path,) = (copy / component).glob("*.safetensors")
    moved = shutil.move(path, tmp_path / "outside")
    assert f"{copy / component} has no {path.name}" in refusal(copy)
    path.symlink_to(moved)
    assert f"{path} is a link out of the folder" in refusal(copy)
    path.unlink()
    path.with_suffix(".bin").write_bytes(b"never opened")
    assert f"{copy / component} has only pickled weights" in refusal(copy)


def test_a_component_that_is_a_link_out_of_the_folder(copy, tmp_path):
    moved = shutil.move(copy / "vae", tmp_path / "outside")
    (copy / "vae").symlink_to(moved)
    assert f"{copy / 'vae' / 'config.json'} is a link out of the folder" in refusal(copy)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_files_that_are_malformed_huge_or_outside(copy, file, tmp_path):
    path = copy / "tokenizer" / file
    (copy / "tokenizer" / "tokenizer.json").unlink()
    path.write_text("{ no")
    refusal(copy)
    with path.open("wb") as stream:
        stream.truncate(2**31)
    assert f"{path} has 2147483648 bytes; at most" in refusal(copy)
    path.unlink()
    path.symlink_to(shutil.copy(copy / "model_index.json", tmp_path / "outside"))
    assert f"{path} is a link out of the folder" in refusal(copy)


def test_no_tokenizer(copy):
    shutil.rmtree(copy / "tokenizer")
    assert "neither tokenizer.json nor vocab.json and merges.txt" in refusal(copy)


def test_a_tokenizer_with_more_words_than_the_model(copy):
    path = copy / "tokenizer" / "vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"more": 10**6}))
    (copy / "tokenizer" / "tokenizer.json").unlink()
    assert "the tokenizer has a token 1000000" in refusal(copy)
