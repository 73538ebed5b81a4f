"""The index of a network's cubins: every call that is made at the exported sizes, in the precision of its network. What
is compiled is the concern of `tests/kernels/test_aot.py`; here the compiler is a stand-in."""

from __future__ import annotations

import json

import pytest
from pylumiere.export.cubins import compile_network
from pylumiere.export.spec import network_specs

from pylumiere.config import (
    AutoencoderKLConfig,
    DecoderConfig,
    ModelConfig,
    StageConfig,
    TemporalShiftConfig,
    UNet2DConfig,
)

pytest.importorskip("triton")


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """What the compiler was asked for."""
    from pylumiere.kernels import aot

    (tmp_path / "a.cubin").write_bytes(b"machine code")
    asked = []

    def compile_many(tasks, **_):
        asked.extend(tasks)
        facts = {"cubin": str(tmp_path / "a.cubin"), "name": "kernel", "num_warps": 4, "shared": 0, "tmem": 0,
                 "global_scratch": 0, "registers": 32, "spills": 0}  # fmt: skip
        return [{**facts, "parameters": list(specialisation["signature"])} for specialisation, _ in tasks]

    monkeypatch.setattr(aot, "compile_many", compile_many)
    return asked


def test_the_calls_of_a_shifted_unet_and_of_its_decoder_are_listed(compiled, tmp_path):
    unet = UNet2DConfig(
        block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=(1, 1),
        transformer_layers_per_block=(1, 1), num_heads=(2, 2), cross_attention_dim=24, norm_num_groups=8,
        temporal_shift=TemporalShiftConfig(), num_frames=4, height=8, width=8,
    )  # fmt: skip
    vae = AutoencoderKLConfig((16, 32), norm_num_groups=8)
    config = ModelConfig("latent", (StageConfig("unet", unet),), DecoderConfig(vae, group_frames=2), text_tokens=5)
    specs = network_specs(config, frames=(4, 6))
    found = {}
    for stage, precision in (("unet", "bf16"), ("decoder", "fp32")):
        facts = compile_network(
            config.networks[stage], specs[stage], [(89, precision)], tmp_path / "out", text_tokens=5, compiled=tmp_path
        )
        found[stage] = json.loads((tmp_path / "out" / "sm_89" / stage / "index.json").read_text())
        assert facts["89"]["precision"] == found[stage]["precision"] == precision
        assert facts["89"]["launches"] > 20
    sizes = {stage: [tuple(call["sizes"][axis] for axis in "BTHW") for call in index["calls"]]
             for stage, index in found.items()}  # fmt: skip
    assert sizes["unet"] == [(1, 4, 8, 8), (2, 4, 8, 8), (1, 6, 8, 8), (2, 6, 8, 8)]
    assert sizes["decoder"] == [(1, 2, 8, 8)]
    for stage, given in (("unet", {"sample", "timesteps", "text"}), ("decoder", {"latents"})):
        buffers = found[stage]["calls"][0]["buffers"]
        assert {buffer["name"] for buffer in buffers if buffer["kind"] == "input"} == given
    pointers = {value for specialisation, _ in compiled for value in specialisation["signature"].values()}
    assert {"*bf16", "*fp32"} <= pointers and "*fp16" not in pointers
