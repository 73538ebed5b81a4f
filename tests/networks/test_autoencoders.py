"""Autoencoders of frames. Oracle: diffusers' AutoencoderKL and AutoencoderTiny with the same weights."""

from __future__ import annotations

import itertools

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pylumiere.kernels import launching
from support.testing import rel_rms
from torch.utils.flop_counter import FlopCounterMode

from pylumiere.backends.cpu_ops import CpuOps
from pylumiere.backends.triton import TritonOps
from pylumiere.config import AutoencoderKLConfig, AutoencoderTinyConfig
from pylumiere.config.networks import DecodingConfig, network_from
from pylumiere.networks.autoencoders import decode_tiled
from pylumiere.networks.families import build_network, expected_shapes, family_of

DEVICE = "cpu" if launching.interpreted() else "cuda"  # of the kernels
BLOCKS = {"down": "DownEncoderBlock2D", "up": "UpDecoderBlock2D"}


def kl(*widths: int, **fields) -> dict:
    """A published configuration of AutoencoderKL."""
    types = {f"{side}_block_types": [name] * len(widths) for side, name in BLOCKS.items()}
    return {"block_out_channels": list(widths), **types, **fields}


SD = kl(128, 256, 512, 512, layers_per_block=2, sample_size=512)  # Stable Diffusion 1.x and 2.x
SMALL_KL = {
    "four levels, as Stable Diffusion": kl(16, 32, 48, 48, layers_per_block=2, norm_num_groups=8),
    "two levels, as Flux": kl(
        16, 32, norm_num_groups=4, latent_channels=6, scaling_factor=0.3611, shift_factor=0.1159,
        use_quant_conv=False, use_post_quant_conv=False, force_upcast=True,
    ),
    "no attention": kl(16, 16, 24, norm_num_groups=8, mid_block_add_attention=False, scaling_factor=0.7),
}  # fmt: skip
SMALL_TINY = {
    "four levels, as TAESD": {"encoder_block_out_channels": [16] * 4, "decoder_block_out_channels": [24] * 4},
    "shifted": {
        "encoder_block_out_channels": [8] * 3, "decoder_block_out_channels": [8] * 3, "num_encoder_blocks": [1, 0, 2],
        "num_decoder_blocks": [2, 1, 1], "latent_channels": 5, "scaling_factor": 1.5, "shift_factor": 0.1,
    },
}  # fmt: skip
SMALL = [pytest.param(AutoencoderKLConfig, data, id=f"kl: {name}") for name, data in SMALL_KL.items()]
SMALL += [pytest.param(AutoencoderTinyConfig, data, id=f"tiny: {name}") for name, data in SMALL_TINY.items()]
TINY = SMALL_TINY["four levels, as TAESD"]


def theirs(kind: type, data: dict) -> torch.nn.Module:
    """diffusers' network; every parameter is random."""
    torch.manual_seed(0)
    network = getattr(diffusers, kind.__name__.removesuffix("Config"))(**data).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.03 * torch.randn(parameter.shape))
    return network


def pair(kind: type, data: dict):
    """diffusers' network and ours with the same tensors."""
    other = theirs(kind, data)
    return other, build_network(kind.from_diffusers(data), other.state_dict())


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_latents(network, batch: int = 1, frames: int = 3, height: int = 3, width: int = 5) -> torch.Tensor:
    return random(batch, frames, height, width, network.config.latent_channels)


def random_frames(network, batch: int = 1, frames: int = 3, height: int = 3, width: int = 5) -> torch.Tensor:
    scale = network.config.scale
    return random(batch, frames, height * scale, width * scale, 3).tanh()


def by_frame(function, x: torch.Tensor) -> torch.Tensor:
    """A function of pictures [N, C, H, W] on a clip [B, T, H, W, C]."""
    y = function(x.flatten(0, 1).permute(0, 3, 1, 2))
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


@pytest.mark.parametrize(("kind", "data"), SMALL)
@torch.no_grad()
def test_decoding_equals_diffusers(kind, data):
    other, network = pair(kind, data)
    latents = random_latents(network, batch=2)
    scaling, shift = other.config.scaling_factor, other.config.shift_factor or 0.0
    expected = by_frame(lambda z: other.decode(z / scaling + shift).sample, latents)
    assert rel_rms(network(latents), expected) < 1e-5
    assert expected.shape == (2, 3, 3 * network.config.scale, 5 * network.config.scale, 3)


@pytest.mark.parametrize(("kind", "data"), SMALL)
@torch.no_grad()
def test_encoding_equals_diffusers(kind, data):
    other, network = pair(kind, data)
    frames = random_frames(network, batch=2)

    def encode(x):
        encoded = other.encode(x)
        z = encoded.latents if kind is AutoencoderTinyConfig else encoded.latent_dist.mode()
        return (z - (other.config.shift_factor or 0.0)) * other.config.scaling_factor

    expected = by_frame(encode, frames)
    assert rel_rms(network.encode(frames), expected) < 1e-5
    assert expected.shape == (2, 3, 3, 5, network.config.latent_channels)


@pytest.mark.parametrize("data", SMALL_KL.values(), ids=SMALL_KL)
@torch.no_grad()
def test_a_sample_of_the_posterior_equals_diffusers(data, monkeypatch):
    other, network = pair(AutoencoderKLConfig, data)
    frames, noise = random_frames(network), random_latents(network)
    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda *_, **__: noise[0].permute(0, 3, 1, 2))
    scaling, shift = other.config.scaling_factor, other.config.shift_factor or 0.0
    expected = by_frame(lambda x: (other.encode(x).latent_dist.sample() - shift) * scaling, frames)
    sample = network.encode(frames, noise)
    assert rel_rms(sample, expected) < 1e-5
    assert rel_rms(sample, network.encode(frames)) > 0.1


@torch.no_grad()
def test_log_variances_are_clamped_as_in_diffusers():
    other, network = pair(AutoencoderKLConfig, SMALL_KL["no attention"])
    channels = network.config.latent_channels
    other.quant_conv.bias[channels:] = torch.tensor([-1e3, 50.0, 0.0, 1.0])  # tensors are shared with `network`
    frames, noise = random_frames(network), random_latents(network)
    moments = by_frame(lambda x: other.encode(x).latent_dist.parameters, frames)
    posterior = DiagonalGaussianDistribution(moments.movedim(-1, 1))
    expected = (posterior.mean + posterior.std * noise.movedim(-1, 1)).movedim(1, -1) * network.config.scaling_factor
    assert posterior.std.amax() > 1e4
    for channel in range(channels):
        assert rel_rms(network.encode(frames, noise)[..., channel], expected[..., channel]) < 1e-5


@torch.no_grad()
def test_the_tiny_autoencoder_reads_no_noise():
    _, network = pair(AutoencoderTinyConfig, TINY)
    frames = random_frames(network)
    assert torch.equal(network.encode(frames, random_latents(network)), network.encode(frames))


@pytest.mark.parametrize(("kind", "data"), SMALL)
@torch.no_grad()
def test_frames_do_not_see_each_other(kind, data):
    _, network = pair(kind, data)
    network.double()
    for function, clip in ((network.decode, random_latents(network)), (network.encode, random_frames(network))):
        clip = clip.double()
        alone = torch.cat([function(frame) for frame in clip.split(1, 1)], 1)
        assert rel_rms(function(clip), alone) < 1e-12


@pytest.mark.parametrize(("kind", "data"), SMALL)
@torch.no_grad()
def test_the_operators_for_a_cpu_compute_the_same(kind, data):
    _, network = pair(kind, data)
    latents, frames = random_latents(network), random_frames(network)
    expected = network.decode(latents), network.encode(frames)
    network.ops = CpuOps()
    assert rel_rms(network.decode(latents), expected[0]) < 1e-5
    assert rel_rms(network.encode(frames), expected[1]) < 1e-5


@pytest.mark.parametrize(("kind", "data"), [SMALL[1], SMALL[-1]])
@torch.no_grad()
def test_the_triton_kernels_compute_the_same(kind, data):
    _, network = pair(kind, data)
    size = {"frames": 1, "height": 1, "width": 2}
    latents, frames = random_latents(network, **size), random_frames(network, **size)
    expected = network.decode(latents), network.encode(frames)
    network.to(DEVICE).ops = TritonOps()
    assert rel_rms(network.decode(latents.to(DEVICE)), expected[0]) < 1e-5
    assert rel_rms(network.encode(frames.to(DEVICE)), expected[1]) < 1e-5


@torch.no_grad()
def test_weights_in_16_bits_take_and_give_float32():
    _, network = pair(AutoencoderTinyConfig, TINY)
    latents, frames = random_latents(network), random_frames(network)
    expected = network.decode(latents), network.encode(frames)
    network.bfloat16()
    for result, exact in zip((network.decode(latents), network.encode(frames)), expected, strict=True):
        assert result.dtype == torch.float32
        assert 1e-4 < rel_rms(result, exact) < 3e-2


@pytest.mark.parametrize(
    ("kind", "data"),
    [(AutoencoderKLConfig, SD), (AutoencoderKLConfig, SMALL_KL["two levels, as Flux"]), (AutoencoderTinyConfig, {})],
    ids=["Stable Diffusion", "without quant_conv", "TAESD"],
)
def test_names_and_shapes_are_the_published_ones(kind, data):
    with torch.device("meta"):
        other = getattr(diffusers, kind.__name__.removesuffix("Config"))(**data)
    assert expected_shapes(kind.from_diffusers(data)) == {n: tuple(t.shape) for n, t in other.state_dict().items()}


@torch.no_grad()
def test_decoding_a_frame_of_256_x_256_costs_0_62_teraflop():
    network = build_network(AutoencoderKLConfig.from_diffusers(SD))
    with torch.device("meta"):
        other, latents = diffusers.AutoencoderKL(**SD), torch.empty(1, 1, 32, 32, 4)
    with FlopCounterMode(display=False) as ours:
        assert network(latents).shape == (1, 1, 256, 256, 3)
    with FlopCounterMode(display=False) as published:
        other.decode(latents[0].permute(0, 3, 1, 2))
    assert ours.get_total_flops() == published.get_total_flops() == pytest.approx(0.62e12, rel=0.01)


@pytest.mark.parametrize(("kind", "data"), SMALL)
def test_ports_say_what_goes_in_and_what_comes_out(kind, data):
    config = kind.from_diffusers(data)
    ports = family_of(config).ports(config, text_tokens=77)
    operands = ports.operands({"B": 2, "T": 3, "H": 4, "W": 5})
    assert list(operands) == ["latents"] and ports.output.axes[:2] == ("B", "T")
    assert build_network(config)(**operands).shape == ports.output.shape({"B": 2, "T": 3, "H": 4, "W": 5})
    assert not any(family_of(config).is_temporal(config, name) for name in expected_shapes(config))


# ---- tiles ---------------------------------------------------------------------------------------------------------


class Enlarged:
    """A decoder by nearest neighbours, which no tile changes; it counts its calls."""

    def __init__(self):
        self.config = AutoencoderKLConfig((8, 8, 8), norm_num_groups=1)
        self.calls = []

    def decode(self, latents):
        self.calls.append(tuple(latents.shape))
        return latents[..., :3].repeat_interleave(4, 2).repeat_interleave(4, 3)


class Numbered(Enlarged):
    """All pixels of a tile are the number of the call."""

    def decode(self, latents):
        return torch.zeros_like(super().decode(latents)) + len(self.calls)


@pytest.mark.parametrize(("kind", "data"), SMALL)
@torch.no_grad()
def test_one_tile_is_the_whole_frame_bit_for_bit(kind, data):
    _, network = pair(kind, data)
    latents = random_latents(network)
    assert torch.equal(decode_tiled(network, latents, 5, 2), network.decode(latents))


@pytest.mark.parametrize(("tile", "overlap"), [(1, 0), (4, 0), (4, 1), (4, 3), (6, 2), (9, 8)])
def test_tiles_put_together_what_they_cut_apart(tile, overlap):
    for height, width in itertools.product((1, 4, 9, 10, 17), repeat=2):
        network, latents = Enlarged(), random(1, 2, height, width, 4)
        tiled = decode_tiled(network, latents, tile, overlap)
        torch.testing.assert_close(tiled, Enlarged().decode(latents), rtol=1e-6, atol=1e-6)
        assert set(network.calls) == {(1, 2, min(tile, height), min(tile, width), 4)}


def test_tiles_are_blended_linearly_where_they_overlap():
    row = decode_tiled(Numbered(), torch.zeros(1, 1, 6, 10, 4), tile=6, overlap=2)[0, 0, 0, :, 0]
    ramp = 1 + (torch.arange(8) + 0.5) / 8  # 2 latents, 4 pixels each
    torch.testing.assert_close(row, torch.cat([torch.ones(16), ramp, torch.full((16,), 2.0)]))


@torch.no_grad()
def test_a_tile_differs_from_the_whole_frame_only_where_it_misses_context():
    _, network = pair(AutoencoderTinyConfig, SMALL_TINY["shifted"])
    latents = random_latents(network, height=4, width=40)
    whole, tiled = network.decode(latents), decode_tiled(network, latents, tile=24, overlap=8)
    error = (whole - tiled).abs().amax((0, 1, 2, 4)).view(40, -1).amax(1)  # by column of latents
    assert error[:8].amax() < 1e-5 and error[-8:].amax() < 1e-5
    assert error[16:24].amax() > 1e-4


@pytest.mark.parametrize(("tile", "overlap"), [(4, 4), (4, -1), (0, 0)])
def test_a_wrong_overlap_is_named(tile, overlap):
    with pytest.raises(ValueError, match=f"overlap={overlap} is not in 0..{tile - 1}"):
        decode_tiled(Enlarged(), torch.zeros(1, 1, 8, 8, 4), tile, overlap)


# ---- configurations and sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "data"), SMALL)
def test_a_configuration_goes_through_the_registry_and_json(kind, data):
    config = kind.from_diffusers(data)
    assert network_from({"family": kind.family, "network": config.to_dict()}, DecodingConfig, "decoder") == config


@pytest.mark.parametrize("kind", [AutoencoderKLConfig, AutoencoderTinyConfig])
def test_what_is_not_said_has_diffusers_default(kind):
    published = dict(getattr(diffusers, kind.__name__.removesuffix("Config"))().config)
    assert kind.from_diffusers(published) == kind.from_diffusers({}) == kind()


def test_scale_and_precision_are_asked_of_any_decoder():
    assert [AutoencoderKLConfig((32,) * levels).scale for levels in (1, 2, 4)] == [1, 2, 8]
    assert AutoencoderTinyConfig().scale == 8
    assert AutoencoderKLConfig.from_diffusers(SD).force_upcast and not AutoencoderTinyConfig().force_upcast
    assert not AutoencoderKLConfig.from_diffusers(SD | {"force_upcast": False}).force_upcast


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (AutoencoderKLConfig, {"act_fn": "mish"}, "act_fn='mish' is not supported; supported is 'silu'"),
        (AutoencoderKLConfig, {"latents_mean": [0.1]}, r"latents_mean=\[0.1\] is not supported; supported is None"),
        (AutoencoderKLConfig, {"in_channels": 4}, "in_channels=4 is not supported; supported is 3"),
        (AutoencoderKLConfig, {"_class_name": "VQModel"}, "'VQModel' is not supported; supported is 'AutoencoderKL'"),
        (
            AutoencoderKLConfig,
            {"up_block_types": ["AttnUpDecoderBlock2D"]},
            r"up_block_types=\['AttnUpDecoderBlock2D'\] is not supported; supported is 'UpDecoderBlock2D' for each",
        ),
        (AutoencoderKLConfig, {"block_out_channels": [64, 64]}, "supported is 'DownEncoderBlock2D' for each of 2"),
        (AutoencoderKLConfig, {"block_out_channels": [48]}, "48 is not a multiple of norm_num_groups=32"),
        (AutoencoderKLConfig, {"block_out_channels": []}, "block_out_channels has 0 levels, allowed are 1..8"),
        (AutoencoderKLConfig, {"layers_per_block": "2"}, "layers_per_block: expected int, got '2'"),
        (AutoencoderKLConfig, {"layers_per_block": 0}, "layers_per_block=0 is not in 1..32"),
        (AutoencoderKLConfig, {"scaling_factor": 0}, "scaling_factor=0.0 is not positive"),
        (AutoencoderKLConfig, {"patch_size": [2, 2]}, r"AutoencoderKLConfig: patch_size=\[2, 2\] is not known"),
        (AutoencoderTinyConfig, {"upsample_fn": "bilinear"}, "upsample_fn='bilinear' is not supported"),
        (AutoencoderTinyConfig, {"upsampling_scaling_factor": 3}, "=3 is not supported; supported is 2"),
        (AutoencoderTinyConfig, {"encoder_block_out_channels": [64, 64, 64, 32]}, "should have one width"),
        (AutoencoderTinyConfig, {"num_decoder_blocks": [3, 3, 1]}, "is not 4 numbers in 0..32, one for each level"),
        (
            AutoencoderTinyConfig,
            {"num_decoder_blocks": [3, 1], "decoder_block_out_channels": [64, 64]},
            "differ in their number of levels",
        ),
        (AutoencoderTinyConfig, {"latent_channels": 0}, "latent_channels=0 is not in 1..1024"),
    ],
)
def test_what_cannot_be_built_is_named(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind.from_diffusers(change)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: n.decode(torch.zeros(1, 3, 5, 4)), r"latents has shape \[1, 3, 5, 4\], expected \[B, T, H, W, 4\]"),
        (lambda n: n.decode(torch.zeros(1, 1, 3, 5, 3)), r"latents has shape .* expected \[B, T, H, W, 4\]"),
        (lambda n: n.encode(torch.zeros(1, 1, 24, 40, 4)), r"frames has shape .* expected \[B, T, H, W, 3\]"),
        (lambda n: n.encode(torch.zeros(1, 1, 24, 41, 3)), "W=41 is not a multiple of 8"),
        (
            lambda n: n.encode(torch.zeros(1, 1, 24, 40, 3), torch.zeros(1, 1, 1, 1, 4)),
            r"noise has shape \[1, 1, 1, 1, 4\], expected \[1, 1, 3, 5, 4\]",
        ),
    ],
)
def test_wrong_sizes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(build_network(AutoencoderKLConfig.from_diffusers(SMALL_KL["four levels, as Stable Diffusion"])))
