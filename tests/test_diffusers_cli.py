"""`pylumiere generate` with folders of diffusers: pictures, clips, LoRA; and folders that are broken or too large."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.tiny_diffusers import edit_json

from pylumiere.cli import main
from pylumiere.engine import Engine
from pylumiere.media.inputs import read_image
from pylumiere.media.video import read_video

FIELDS = {"num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(scope="module")
def folder(tiny_sd):
    return str(tiny_sd(sd2=False)[1])


@pytest.fixture
def copy(folder, tmp_path):
    """A folder to be spoilt."""
    return shutil.copytree(folder, tmp_path / "model")


def generate(folder, *arguments):
    return main(["generate", "a dog", "--model", str(folder), "--seed", "7", "--steps", "2", "--precision", "fp32",
                 *arguments])  # fmt: skip


def refusal(capsys, here) -> str:
    """The one line that was said; nothing else was said or written."""
    out, err = capsys.readouterr()
    assert err.startswith("pylumiere: ") and err.count("\n") == 1 and out == ""
    assert os.listdir(here) == []
    return err


# ---- what runs -------------------------------------------------------------------------------------------------------


def test_a_picture_model_makes_a_picture(folder, here, capsys):
    assert generate(folder, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["output"], report["num_frames"], report["sampler"]) == (str(here / "clip.png"), 1, "dpmpp_2m")
    with Engine.load(folder, precision="fp32") as engine:
        picture = engine.generate("a dog", **FIELDS).frames[0]
    assert np.array_equal(read_image("clip.png"), picture)
    assert generate(folder, "-o", "again.png") == 0
    assert (here / "again.png").read_bytes() == (here / "clip.png").read_bytes()


def test_a_shift_makes_a_clip_of_it_streamed_or_not(folder, here):
    options = ["--temporal-shift", "8", "--frames", "20", "--window", "8", "--overlap", "2", "--size", "24x16"]
    assert generate(folder, "-o", "clip", *options) == 0
    assert generate(folder, "-o", "streamed", "--stream", *options) == 0
    with Engine.load(folder, precision="fp32", temporal_shift=8) as engine:
        request = {"num_frames": 20, "window_frames": 8, "window_overlap": 2, "width": 24, "height": 16}
        clip = engine.generate("a dog", **FIELDS, **request).frames
    assert clip.shape == (20, 16, 24, 3)
    for name in ("clip", "streamed"):
        assert np.array_equal(read_video(name).frames, clip)
    assert generate(folder, "-o", "clip.mp4", "--temporal-shift", "8") == 0
    assert read_video("clip.mp4").frames.shape == (16, 16, 16, 3)


def test_lora_files_and_their_strengths(folder, here):
    module = "lora_unet_mid_block_resnets_0_conv1"
    save_file({f"{module}.lora_{part}.weight": torch.randn(*shape) for part, shape in
               (("up", (64, 4, 1, 1)), ("down", (4, 64, 3, 3)))}, "a.safetensors")  # fmt: skip
    made = []
    for lora in ([], ["--lora", "a.safetensors"], ["--lora", "a.safetensors:0.5", "--lora", "a.safetensors:0.5"]):
        assert generate(folder, *lora, "-o", "clip.png") == 0
        made.append(read_image("clip.png").astype(int))
    assert np.abs(made[1] - made[0]).max() > 1
    assert np.abs(made[2] - made[1]).max() <= 1, "two halves are a whole"


# ---- what is broken --------------------------------------------------------------------------------------------------


def with_tensor(model, component, name, change):
    (path,) = (model / component).glob("*.safetensors")
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name])}, path)


def spoilt(tensor):
    tensor.view(-1)[5] = torch.nan
    return tensor


def cut(model):
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "wrong shape": (
        lambda model: with_tensor(model, "unet", "conv_in.bias", lambda tensor: tensor[:-1]),
        "unet/diffusion_pytorch_model.safetensors",
    ),
    "NaN in the U-Net": (lambda model: with_tensor(model, "unet", "conv_in.weight", spoilt), "conv_in.weight"),
    "NaN in the decoder": (
        lambda model: with_tensor(model, "vae", "decoder.conv_in.weight", spoilt), "decoder.conv_in.weight",
    ),
    "NaN in the text encoder": (
        lambda model: with_tensor(model, "text_encoder", "final_layer_norm.bias", spoilt), "final_layer_norm.bias",
    ),
    "truncated": (cut, "vae/diffusion_pytorch_model.safetensors"),
    "unknown pipeline": (
        lambda model: edit_json(model / "model_index.json", _class_name="FluxPipeline"),
        "pipeline 'FluxPipeline' is not supported; supported: StableDiffusionPipeline",
    ),
    "unknown class": (
        lambda model: edit_json(model / "model_index.json", unet=["diffusers", "UNet3DConditionModel"]),
        "unet 'UNet3DConditionModel' is not supported; supported: UNet2DConditionModel",
    ),
    "unknown scheduler": (
        lambda model: edit_json(model / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler"),
        "LCMScheduler",
    ),
    "no component": (lambda model: shutil.rmtree(model / "vae"), "vae/config.json cannot be read: No such file"),
    "no index": (lambda model: (model / "model_index.json").unlink(), "config.json cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "text"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_one_line_and_exit_code_2(copy, here, capsys, damage, text):
    damage(copy)
    assert generate(copy) == 2
    assert text in (said := refusal(capsys, here)) and str(copy) in said


def test_a_missing_shard_is_named(tiny_sd, tmp_path, here, capsys):
    model = shutil.copytree(tiny_sd(sharded=True)[1], tmp_path / "model")
    capsys.readouterr()  # what diffusers said while it saved
    shard = sorted((model / "unet").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    assert generate(model) == 2
    assert f"shard {shard.name} is missing" in (said := refusal(capsys, here)) and str(model / "unet") in said


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_refused_and_never_read(copy, tmp_path, here, capsys, component):
    (path,) = (copy / component).glob("*.safetensors")
    path.unlink()
    bomb = tmp_path / "exploded"
    names = {"model.safetensors": "pytorch_model.bin"}
    (copy / component / names.get(path.name, f"{path.stem}.bin")).write_bytes(pickle.dumps(Bomb(bomb)))
    assert generate(copy) == 2
    said = refusal(capsys, here)
    assert f"{copy / component} has only pickled weights" in said and "pylumiere import" in said
    assert not bomb.exists()


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--memory-budget", "1MB"], "--memory-budget=1000000 bytes: "),
        (["--memory-budget", "lots"], "--memory-budget='lots' should be bytes"),
        (["--temporal-shift", "1"], "--temporal-shift: div=1 is below 2"),
        (["--frames", "3", "-o", "a.png"], "'a.png' holds one picture, and this clip has 3 frames"),
        (["--image", "../picture.png"], "take no pictures; it makes clips from a text"),
        (["--size", "18"], "--size (height)=18: this model makes multiples of 4"),
    ],
)
def test_what_the_model_cannot_do_is_one_line_and_exit_code_2(folder, here, capsys, options, text):
    Image.new("RGB", (16, 16)).save(here.parent / "picture.png")
    assert generate(folder, *options) == 2
    assert text in refusal(capsys, here)
