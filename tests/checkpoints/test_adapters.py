"""Styles: what they change, what they leave alone, and which files are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.testing import random_weights

from pylumiere.checkpoints.adapters import find_style, fingerprint, read_style, save_style, style_names
from pylumiere.checkpoints.native import find_model, load_checkpoint
from pylumiere.errors import InvalidRequest
from pylumiere.networks.stunet import STUNet
from pylumiere.networks.stunet.presets import model_preset

CONFIG = model_preset("tiny").first.network
BASE = random_weights(CONFIG, 0)
SPATIAL, TEMPORAL = "blocks.down0_resnet0.conv1.weight", "blocks.down0_temporal_conv0.temporal.weight"


def low_rank(rank=2, scale=1.0):
    shape = BASE[SPATIAL].shape
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(shape[0], rank, generator=generator) * scale
    return {f"{SPATIAL}.up": up, f"{SPATIAL}.down": torch.randn(rank, shape[1:].numel(), generator=generator)}


def test_mixture_of_whole_weights_and_of_factors(tmp_path):
    whole = torch.randn(BASE["conv_out.weight"].shape)
    save_style(tmp_path / "a.safetensors", {**low_rank(), "conv_out.weight": whole}, CONFIG, fingerprint(BASE))
    style = read_style(tmp_path / "a.safetensors", CONFIG, fingerprint(BASE))
    assert style.names == [SPATIAL, "conv_out.weight"] and style.name == "a"
    factors = low_rank()
    change = (factors[f"{SPATIAL}.up"] @ factors[f"{SPATIAL}.down"]).view(BASE[SPATIAL].shape)
    for strength in (0.0, 0.3, 0.5, 1.0):
        mixed = style.weights(BASE, strength)
        expected = strength * whole + (1 - strength) * BASE["conv_out.weight"]
        torch.testing.assert_close(mixed["conv_out.weight"], expected)
        torch.testing.assert_close(mixed[SPATIAL], BASE[SPATIAL] + strength * change)
    assert torch.equal(style.weights(BASE, 0.0)[SPATIAL], BASE[SPATIAL])
    assert torch.equal(style.weights(BASE, 1.0)["conv_out.weight"], whole)
    assert style.weights({k: v.bfloat16() for k, v in BASE.items()}, 0.5)[SPATIAL].dtype == torch.bfloat16


def write(path, tensors, metadata=None):
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({}, "changes no weight"),
        ({TEMPORAL: BASE[TEMPORAL]}, "changes the temporal weight"),
        ({"frame_embed.0.weight": BASE["frame_embed.0.weight"]}, "changes the temporal weight"),
        ({"blocks.other.weight": torch.zeros(2)}, "made for another model: this one has no weight 'blocks.other"),
        ({"conv_out.weight": torch.zeros(3, 3)}, r"made for another model: conv_out.weight is \[3, 3\], here"),
        ({"conv_out.weight": BASE["conv_out.weight"].double()}, "as F64; allowed are F32, F16, BF16"),
        ({"conv_out.weight": BASE["conv_out.weight"] * torch.nan}, "holds NaN or infinity in conv_out.weight"),
        ({f"{SPATIAL}.up": low_rank()[f"{SPATIAL}.up"]}, "holds no pair of factors"),
        ({**low_rank(), f"{SPATIAL}.down": torch.zeros(3, 9)}, "holds no pair of factors"),
        ({f"{SPATIAL}.up": torch.zeros(9, 1), f"{SPATIAL}.down": torch.zeros(1, 9)}, "another model: .* 9 x 9, here"),
        ({**low_rank(), SPATIAL: BASE[SPATIAL]}, "both whole and as factors"),
    ],
)
def test_styles_that_are_refused_in_one_line(tmp_path, tensors, text):
    path = write(tmp_path / "style.safetensors", tensors)
    with pytest.raises(InvalidRequest, match=text) as caught:
        read_style(path, CONFIG)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("style=")


def test_damaged_files(tmp_path):
    good = write(tmp_path / "good.safetensors", low_rank())
    for data in (b"", b"text", good.read_bytes()[:-5], b"\xff" * 100):
        (tmp_path / "bad.safetensors").write_bytes(data)
        with pytest.raises(InvalidRequest, match="truncated or no safetensors"):
            read_style(tmp_path / "bad.safetensors", CONFIG)
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(InvalidRequest, match="has 4294967296 bytes; a style of this model has at most"):
        read_style(tmp_path / "huge.safetensors", CONFIG)


def test_a_style_of_another_model_of_the_same_shape(tmp_path):
    other = random_weights(CONFIG, 5)
    save_style(tmp_path / "a.safetensors", low_rank(), CONFIG, fingerprint(other))
    with pytest.raises(InvalidRequest, match="made for another model: its weights are of the same shape"):
        read_style(tmp_path / "a.safetensors", CONFIG, fingerprint(BASE))
    assert read_style(tmp_path / "a.safetensors", CONFIG).names == [SPATIAL]


def test_styles_are_found_by_name_and_by_path(tmp_path):
    save_style(tmp_path / "styles" / "mine.safetensors", low_rank(), CONFIG, fingerprint(BASE))
    assert style_names(tmp_path) == ["mine"] and style_names(tmp_path / "none") == []
    path = tmp_path / "styles" / "mine.safetensors"
    assert find_style("mine", tmp_path) == path == find_style(path, None)
    with pytest.raises(InvalidRequest, match="style='yours': no such file, and no style of this model; it has: mine"):
        find_style("yours", tmp_path)
    assert read_style(path, CONFIG) == read_style(path, CONFIG)


def test_the_shipped_style_fits_the_demo_and_is_small():
    checkpoint = load_checkpoint(find_model("demo"))
    path = find_style("ink", checkpoint.folder)
    assert path.stat().st_size < 600_000
    network, base = checkpoint.config.first.network, checkpoint.weights["base"]
    style = read_style(path, network, fingerprint(base))
    with torch.device("meta"):
        model = STUNet(network)
    assert style.names and not any(model.is_temporal(name) for name in style.names)
    mixed = style.weights(base, 1.0)
    original = {name: base[name].float() for name in mixed}
    assert np.median([(mixed[n].float() - w).norm() / w.norm() for n, w in original.items()]) > 0.01
