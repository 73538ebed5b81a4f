"""`describe_model` and `pylumiere inspect` of model folders: what they hold, what they need, what is not supported."""

from __future__ import annotations

import json

import pytest
import torch
from support.latent import latent_config
from support.testing import write_random_model
from support.tiny_diffusers import edit_json, write_tiny_sd

from pylumiere.checkpoints.native import load_checkpoint
from pylumiere.cli import main
from pylumiere.errors import BundleError, UnsupportedDevice
from pylumiere.inspecting import describe_model
from pylumiere.scheduling.memory import activation_bytes


@pytest.fixture
def diffusers_folder(tmp_path):
    write_tiny_sd(tmp_path / "sd")
    return tmp_path / "sd"


def test_a_folder_is_described_by_its_stages():
    report = describe_model("demo", precision="fp32")
    assert [(stage["name"], stage["family"]) for stage in report["stages"]] == [("base", "stunet"), ("ssr", "stunet")]
    base, ssr = report["stages"]
    assert base["call"] | {"activation_bytes": 0} == {
        "rows": 2, "frames": 80, "height": 32, "width": 32, "activation_bytes": 0,
    }  # fmt: skip
    assert (base["calls"], ssr["calls"]) == (30, 13 * 8)
    assert (report["num_frames"], report["height"], report["width"], report["fps"]) == (80, 128, 128, 16)
    assert report["text_encoder"] == {"name": "minilm", "tokens": 24, "width": 384}
    assert report["problem"] is None and "components" not in report


def test_memory_is_that_of_all_weights_and_the_largest_call(tmp_path):
    config = latent_config()
    folder = write_random_model(tmp_path / "latent", config)
    memory = {name: describe_model(folder, precision=name)["memory"] for name in ("fp32", "bf16")}
    held = {name: sum(t.numel() for t in w.values()) for name, w in load_checkpoint(folder).weights.items()}
    assert memory["fp32"]["weights"] == 4 * (held["unet"] + held["decoder"])
    assert memory["bf16"]["weights"] == 2 * held["unet"] + 4 * held["decoder"], "the decoder stays in float32"
    calls = (config.first.network, 2, 4, 8, 8), (config.decoder.network, 1, 2, 8, 8)
    largest = max(activation_bytes(*call, torch.float32, config.text_tokens) for call in calls)
    assert memory["fp32"]["activations"] == largest
    assert memory["fp32"]["total"] == memory["fp32"]["weights"] + largest


def test_a_folder_of_diffusers_says_what_is_used(diffusers_folder):
    report = describe_model(diffusers_folder)
    assert [(stage["name"], stage["family"]) for stage in report["stages"]] == [
        ("unet", "unet2d"), ("decoder", "autoencoder_kl"),
    ]  # fmt: skip
    parts = report["components"]
    assert {name for name, part in parts.items() if part["is_used"]} == {
        "unet", "vae", "text_encoder", "tokenizer", "scheduler",
    }  # fmt: skip
    assert parts["unet"]["class"] == "UNet2DConditionModel"
    file = diffusers_folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert parts["unet"]["bytes"] == file.stat().st_size and parts["scheduler"]["bytes"] is None
    assert report["problem"] is None and all(part["problem"] is None for part in parts.values())


def test_a_component_that_is_not_used_is_no_problem(diffusers_folder):
    edit_json(diffusers_folder / "model_index.json", safety_checker=["stable_diffusion", "SafetyChecker"])
    report = describe_model(diffusers_folder)
    assert report["components"]["safety_checker"] == {
        "class": "SafetyChecker", "is_used": False, "bytes": None, "problem": None,
    }  # fmt: skip
    assert report["problem"] is None


@pytest.mark.parametrize(
    ("change", "component", "message"),
    [
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "unet", "supported: UNet2DConditionModel"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet", "not supported; supported: unet, vae"),
        ({"vae": None}, "vae", "not supported"),
    ],
)
def test_what_is_not_supported_is_named(diffusers_folder, change, component, message):
    edit_json(diffusers_folder / "model_index.json", **change)
    report = describe_model(diffusers_folder)
    assert message in report["components"][component]["problem"]
    assert component in report["problem"] and "stages" not in report


def test_missing_weights_are_named_beside_the_rest(diffusers_folder):
    (diffusers_folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    report = describe_model(diffusers_folder)
    assert report["problem"].startswith("vae: ") and "has no diffusion_pytorch_model.safetensors" in report["problem"]
    assert len(report["stages"]) == 2


def test_the_command_line_shows_folders(diffusers_folder, capsys):
    assert main(["inspect", "demo"]) == 0
    assert "80 of 128 x 128 at 16 fps" in capsys.readouterr().out
    assert main(["inspect", str(diffusers_folder), "--json", "--precision", "fp32"]) == 0
    assert json.loads(capsys.readouterr().out) == describe_model(diffusers_folder, precision="fp32")
    (diffusers_folder / "unet" / "config.json").write_text('{"class_embed_type": "timestep"}')
    assert main(["inspect", str(diffusers_folder)]) == 0
    shown = capsys.readouterr().out
    assert "AutoencoderKL" in shown and "cannot be run: " in shown and "class_embed_type" in shown
    for command in (["demo", "--sku", "h100"], ["demo", "--key", "k.pem"], ["nowhere"]):
        assert main(["inspect", *command]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1


def test_mistakes_are_errors(tmp_path):
    with pytest.raises(BundleError, match="does not exist"):
        describe_model("nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"config\.json"):
        describe_model(tmp_path)
    with pytest.raises(UnsupportedDevice, match="precision 'int8' is unknown"):
        describe_model("demo", precision="int8")


def test_doctor_looks_at_a_model_too(diffusers_folder, capsys):
    assert main(["doctor", str(diffusers_folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["findings"] and report["model"] == json.loads(json.dumps(describe_model(diffusers_folder)))
    assert main(["doctor", str(diffusers_folder / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
