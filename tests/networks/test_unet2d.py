"""UNet2D against diffusers' UNet2DConditionModel frame by frame, and Latent-Shift against it with shifted inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.latent_shift import shifting
from support.testing import rel_rms
from torch.utils.flop_counter import FlopCounterMode

from pylumiere.backends.cpu_ops import CpuOps
from pylumiere.config import TemporalShiftConfig, UNet2DConfig
from pylumiere.networks.families import build_network, expected_shapes, family_of
from pylumiere.networks.ops import PlainOps

# What `unet/config.json` of the public folders says beside diffusers' defaults.
SD_1_5 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD_2_1 = {
    "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
    "upcast_attention": True,
}  # fmt: skip
TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
CASES = {
    "sd1": {**TINY, "attention_head_dim": 8},
    "sd2": {
        **TINY, "attention_head_dim": [2, 4, 4], "use_linear_projection": True, "upcast_attention": True,
    },
    "inpainting": {**TINY, "in_channels": 9, "attention_head_dim": 4},
    "other levels": {
        **TINY,
        "block_out_channels": [8, 16, 24, 40],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": [1, 2, 1, 3],
        "transformer_layers_per_block": [1, 2, 3, 1],
        "attention_head_dim": [1, 2, 3, 5],
        "norm_eps": 1e-3,
        "out_channels": 3,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
    "one level": {
        **TINY, "block_out_channels": [16], "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"], "attention_head_dim": 2,
    },
}  # fmt: skip


def random_diffusers(public: dict, seed: int = 0) -> UNet2DConditionModel:
    """Every parameter random, so that no layer hides a fault."""
    model = UNet2DConditionModel(**public)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def ours(model: UNet2DConditionModel, shift: TemporalShiftConfig | None = None):
    """Our network on the same parameters."""
    config = UNet2DConfig.from_diffusers(dict(model.config), num_frames=3, height=16, width=24, temporal_shift=shift)
    return build_network(config, model.state_dict())


def inputs(model: UNet2DConditionModel, batch=2, frames=3, height=16, width=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, frames, height, width, model.config.in_channels, generator=generator)
    text = torch.randn(batch, 7, model.config.cross_attention_dim, generator=generator)
    return sample.to(dtype), torch.tensor([10.25, 987.5, 3.0])[:batch], text.to(dtype)


def frame_by_frame(model: UNet2DConditionModel, sample, timesteps, text, text_mask=None):
    """All frames of all clips as one batch of pictures."""
    batch, frames = sample.shape[:2]
    mask = None if text_mask is None else text_mask.repeat_interleave(frames, 0)
    pictures = model(
        sample.flatten(0, 1).permute(0, 3, 1, 2),
        timesteps.repeat_interleave(frames),
        text.repeat_interleave(frames, 0),
        encoder_attention_mask=mask,
    ).sample
    return pictures.permute(0, 2, 3, 1).unflatten(0, (batch, frames))


@pytest.fixture(scope="module")
def tiny():
    return random_diffusers(CASES["sd1"])


# ---- the picture network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_frame_is_that_of_diffusers(case, frames):
    model = random_diffusers(CASES[case])
    given = inputs(model, frames=frames)
    assert rel_rms(ours(model)(*given), frame_by_frame(model, *given)) < 1e-5
    model, given = model.double(), inputs(model, frames=frames, dtype=torch.double)
    result = ours(model)(*given)
    assert result.dtype == torch.double
    assert rel_rms(result, frame_by_frame(model, *given)) < 1e-10


@pytest.mark.parametrize(("frames", "height", "width"), [(5, 4, 36), (2, 20, 4)])
@torch.no_grad()
def test_sizes_other_than_those_the_network_is_made_for(tiny, frames, height, width):
    given = inputs(tiny, frames=frames, height=height, width=width)
    result = ours(tiny)(*given)
    assert result.shape == (2, frames, height, width, 4) and result.is_contiguous()
    assert rel_rms(result, frame_by_frame(tiny, *given)) < 1e-5


@torch.no_grad()
def test_masked_text_is_masked_as_in_diffusers(tiny):
    sample, timesteps, text = inputs(tiny)
    mask = torch.arange(7)[None] < torch.tensor([[3], [7]])
    result = ours(tiny)(sample, timesteps, text, mask)
    assert rel_rms(result, frame_by_frame(tiny, sample, timesteps, text, mask)) < 1e-5
    assert rel_rms(result, ours(tiny)(sample, timesteps, text)) > 1e-3


@torch.no_grad()
def test_each_element_of_a_batch_has_its_own_timestep_and_text(tiny):
    network = ours(random_diffusers(CASES["sd1"]).double(), TemporalShiftConfig())
    sample, timesteps, text = inputs(tiny, batch=3, dtype=torch.double)
    together = network(sample, timesteps, text)
    for i in range(3):
        alone = network(sample[i : i + 1], timesteps[i : i + 1], text[i : i + 1])
        assert rel_rms(together[i : i + 1], alone) < 1e-12
    assert rel_rms(network(sample, timesteps.flip(0), text)[0], together[0]) > 1e-3
    assert rel_rms(network(sample, timesteps, text.flip(0))[0], together[0]) > 1e-3


@pytest.mark.parametrize("case", ["sd1", "sd2"])
@torch.inference_mode()
def test_bfloat16_and_the_operators_of_the_cpu(case):
    model = random_diffusers(CASES[case])
    given = inputs(model)
    expected = ours(model, TemporalShiftConfig())(*given)
    for dtype, ops, bound in (
        (torch.float32, CpuOps(), 1e-5),
        (torch.bfloat16, PlainOps(), 3e-2),
        (torch.bfloat16, CpuOps(), 3e-2),
    ):
        network = ours(model.to(dtype), TemporalShiftConfig())
        network.ops = ops
        result = network(*given)
        assert result.dtype == torch.float32 and rel_rms(result, expected) < bound, (dtype, ops.name)


@torch.no_grad()
def test_every_layer_returns_contiguous_clips(tiny):
    network = ours(tiny)
    seen = []

    def check(module, args, output):
        assert output.is_contiguous(), type(module).__name__
        seen.append(output.shape[1])

    for spec in network.plan:
        if spec.name:
            network.get_submodule(spec.name).register_forward_hook(check)
    network(*inputs(tiny, frames=5))
    assert len(seen) == sum(bool(spec.name) for spec in network.plan) and set(seen) == {5}


# ---- Latent-Shift ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shift",
    [
        TemporalShiftConfig(),
        TemporalShiftConfig(4, "causal", "zero"),
        TemporalShiftConfig(8, "both", "circular"),
        TemporalShiftConfig(4, "both", "replicate"),
    ],
    ids=lambda s: f"{s.direction}-{s.pad}-{s.div}",
)
@pytest.mark.parametrize("frames", [2, 5])
@torch.no_grad()
def test_latent_shift_is_diffusers_with_shifted_inputs_of_conv1(shift, frames):
    model = random_diffusers(CASES["sd2"]).double()
    network, given = ours(model, shift), inputs(model, frames=frames, dtype=torch.double)
    result = network(*given)
    with shifting(model, frames, shift) as blocks:
        assert blocks == 2 * 3 + 2 + 3 * 3, "down, middle, up"
        assert rel_rms(result, frame_by_frame(model, *given)) < 1e-10
    assert rel_rms(result, frame_by_frame(model, *given)) > 1e-2


@torch.no_grad()
def test_one_frame_is_a_picture_bit_for_bit(tiny):
    given = inputs(tiny, frames=1)
    for pad in ("zero", "circular", "replicate"):
        assert torch.equal(ours(tiny, TemporalShiftConfig(pad=pad))(*given), ours(tiny)(*given))


@torch.no_grad()
def test_a_shift_of_no_channels_is_the_plain_network_bit_for_bit(tiny):
    given = inputs(tiny)
    assert torch.equal(ours(tiny, TemporalShiftConfig(div=128))(*given), ours(tiny)(*given))


# ---- the family ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("public", "parameters"), [(SD_1_5, 859_520_964), (SD_2_1, 865_910_724)], ids=["1.5", "2.1"])
def test_parameters_are_those_of_the_public_layout(public, parameters):
    with torch.device("meta"):
        model = UNet2DConditionModel(**public)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config = UNet2DConfig.from_diffusers(public, num_frames=16, height=64, width=64)
    assert expected_shapes(config) == expected
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == parameters
    family = family_of(config)
    assert not any(family.is_temporal(config, name) for name in expected)


def test_the_ports_are_the_arguments_of_forward_without_a_mask():
    config = UNet2DConfig.from_diffusers(SD_1_5, num_frames=16, height=32, width=64)
    ports = family_of(config).ports(config, 77)
    assert [port.name for port in ports.inputs] == ["sample", "timesteps", "text"]
    operands = ports.operands({"B": 2, "T": 3, "H": 32, "W": 64})
    assert operands["text"].shape == (2, 77, 768)
    with torch.no_grad():
        result = build_network(config)(**operands)
    assert result.shape == ports.output.shape({"B": 2, "T": 3, "H": 32, "W": 64}) == (2, 3, 32, 64, 4)


def flops_of(network, frames: int) -> int:
    config = network.config
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        sample = torch.empty(1, frames, config.height, config.width, config.in_channels)
        network(sample, torch.empty(1), torch.empty(1, 77, config.text_dim))
    return counter.get_total_flops()


def test_a_frame_of_stable_diffusion_costs_what_it_should_and_text_is_projected_once_per_clip():
    config = UNet2DConfig.from_diffusers(SD_1_5, num_frames=16, height=64, width=64)
    network = build_network(replace(config, temporal_shift=TemporalShiftConfig()))
    frame = flops_of(network, 1)
    assert frame == pytest.approx(0.8e12, rel=0.01)
    once = sum(
        2 * 77 * tensor.numel()
        for name, tensor in network.named_parameters()
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    )
    once += sum(2 * t.numel() for n, t in network.named_parameters() if "time_emb" in n and n.endswith("weight"))
    assert flops_of(network, 3) == 3 * (frame - once) + once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(height=18), "H=18 is not a positive multiple of 4"),
        (dict(width=6), "W=6 is not a positive multiple of 4"),
        (dict(frames=0), "T=0 is not a positive multiple of 1"),
    ],
)
def test_wrong_sizes_are_named(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        ours(tiny)(*inputs(tiny, **change))


def test_wrong_channels_and_missing_text_are_named(tiny):
    sample, timesteps, text = inputs(tiny)
    with pytest.raises(ValueError, match=r"sample has shape \[2, 3, 16, 24, 3\], expected \[B, T, H, W, 4\]"):
        ours(tiny)(sample[..., :3], timesteps, text)
    with pytest.raises(ValueError, match="needs text embeddings"):
        ours(tiny)(sample, timesteps)
