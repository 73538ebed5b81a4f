"""STUNet: inflation, temporal resampling, conditioning, layout. Oracles: the image network, F.conv3d, slicing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pylumiere.networks.ops import Norm, PlainOps, Shift, shift_frames
from pylumiere.networks.stunet import STUNet, image_config, plan_blocks
from pylumiere.networks.stunet.blocks import (
    Context,
    TemporalDownsample,
    TemporalUpsample,
    depth_to_space,
    space_to_depth,
)
from pylumiere.networks.stunet.presets import stage_preset

TINY = stage_preset("tiny-base").network


def without_temporal_factors(config):
    return replace(config, levels=tuple(replace(level, temporal_factor=1) for level in config.levels))


def randomised(model: STUNet, seed: int = 0) -> STUNet:
    """Every parameter random, so that no zero-initialised projection hides a fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def inputs(config, batch=2, frames=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    frames = config.num_frames if frames is None else frames
    sample = torch.randn(batch, frames, config.height, config.width, config.in_channels, generator=generator)
    text = torch.randn(batch, 8, config.text_dim, generator=generator)
    mask = torch.arange(8)[None] < torch.tensor([[3], [8]])[:batch]
    return sample, torch.linspace(10, 900, batch), text, mask


@pytest.mark.parametrize("frame_embedding", [False, True])
@torch.no_grad()
def test_inflated_network_equals_the_image_network_on_every_frame(frame_embedding):
    config = replace(without_temporal_factors(TINY), frame_embedding=frame_embedding)
    image = randomised(STUNet(image_config(config)))
    video = STUNet.from_image_unet(image, config).eval()
    sample, timesteps, text, mask = inputs(config)
    clip, frames = video(sample, timesteps, text, mask), image(sample, timesteps, text, mask)
    if frame_embedding:  # conditioning per frame, not per clip: other shapes, which a matmul may round differently
        torch.testing.assert_close(clip, frames)
    else:
        assert torch.equal(clip, frames)
    for t in range(config.num_frames):
        torch.testing.assert_close(frames[:, t : t + 1], image(sample[:, t : t + 1], timesteps, text, mask))


@torch.no_grad()
def test_inflation_widens_the_input_with_zeros():
    config = without_temporal_factors(TINY)
    image = randomised(STUNet(replace(image_config(config), in_channels=3)))
    video = STUNet.from_image_unet(image, config).eval()
    sample, timesteps, text, mask = inputs(config)
    expected = torch.cat([image(frame[..., :3], timesteps, text, mask) for frame in sample.split(1, 1)], 1)
    torch.testing.assert_close(video(sample, timesteps, text, mask), expected, rtol=1e-5, atol=1e-5)


def test_inflation_names_what_does_not_fit():
    image = STUNet(image_config(stage_preset("tiny-ssr").network))
    with pytest.raises(ValueError, match="level_embed|conv_in"):
        STUNet.from_image_unet(image, TINY)


@pytest.mark.parametrize("factor", [2, 3])
@torch.no_grad()
def test_temporal_resampling_starts_as_nearest_neighbour(factor):
    x = torch.randn(2, 4 * factor, 3, 5, 6)
    context = Context(PlainOps(), torch.zeros(2, 1, 4), None, None, torch.arange(4.0))
    assert torch.equal(TemporalDownsample(6, factor)(x, context), x[:, ::factor])
    assert torch.equal(TemporalUpsample(6, factor)(x, context), x.repeat_interleave(factor, 1))


@pytest.mark.parametrize("direction", ["both", "causal"])
@torch.no_grad()
def test_shift_equals_a_one_hot_convolution_over_frames(direction):
    channels = 16
    x = torch.randn(2, 5, 3, 4, channels)
    weight = torch.zeros(channels, channels, 3, 1, 1)
    for c in range(channels):
        fold = c // (channels // 8)
        tap = {"both": {0: 2, 1: 0}, "causal": {0: 0}}[direction].get(fold, 1)
        weight[c, c, tap] = 1
    expected = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, padding=(1, 0, 0)).permute(0, 2, 3, 4, 1)
    assert torch.equal(shift_frames(x, Shift(8, direction, "zero")), expected)


@torch.no_grad()
def test_shift_ends():
    x = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(1, 4, 1, 1, 8).contiguous()
    assert shift_frames(x, Shift(8, "both", "circular"))[0, :, 0, 0, 0].tolist() == [1, 2, 3, 0]
    assert shift_frames(x, Shift(8, "both", "replicate"))[0, :, 0, 0, 0].tolist() == [1, 2, 3, 3]
    assert shift_frames(x, Shift(8, "both", "zero"))[0, :, 0, 0, 1].tolist() == [0, 0, 1, 2]
    assert torch.equal(shift_frames(x[:, :1], Shift()), x[:, :1])


@pytest.mark.parametrize("preset", ["tiny-base", "tiny-ssr"])
@torch.no_grad()
def test_each_element_of_a_batch_has_its_own_timestep_text_and_level(preset):
    config = stage_preset(preset).network
    model = randomised(STUNet(config)).double()
    sample, timesteps, text, mask = inputs(config)
    levels = torch.tensor([0.1, 0.4])
    given = dict(text=text, text_mask=mask) if config.text_dim else dict(noise_level=levels)
    together = model(sample.double(), timesteps, **given)
    for i in range(2):
        alone = model(sample[i : i + 1].double(), timesteps[i : i + 1], **{k: v[i : i + 1] for k, v in given.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)
    assert (together[0] - model(sample.double(), timesteps.flip(0), **given)[0]).abs().max() > 1e-3


@torch.no_grad()
def test_masked_text_tokens_are_not_seen():
    model = randomised(STUNet(TINY)).double()
    sample, timesteps, text, mask = inputs(TINY)
    noise = text + 5 * torch.randn(text.shape) * ~mask[..., None]
    torch.testing.assert_close(
        model(sample.double(), timesteps, text, mask),
        model(sample.double(), timesteps, noise, mask),
        rtol=1e-9,
        atol=1e-9,
    )


@torch.no_grad()
def test_attention_over_time_knows_the_order_of_frames():
    model = randomised(STUNet(without_temporal_factors(replace(TINY, frame_embedding=False)))).double()
    block = next(s for s in model.plan if s.kind == "attention_inflation")
    channels = block.channels
    x = torch.randn(1, 6, 2, 2, channels, dtype=torch.double)
    context = Context(PlainOps(), torch.zeros(1, 1, model.emb_dim, dtype=torch.double), None, None, torch.arange(6.0))
    permutation = torch.tensor([3, 1, 5, 0, 2, 4])
    module = model.blocks[block.name]
    assert (module(x, context)[:, permutation] - module(x[:, permutation], context)).abs().max() > 1e-3


@torch.no_grad()
def test_every_block_returns_contiguous_channels_last_clips():
    model = randomised(STUNet(TINY))
    shapes = []

    def check(module, args, output):
        assert output.is_contiguous(), type(module).__name__
        shapes.append(output.shape)

    for module in model.blocks.values():
        module.register_forward_hook(check)
    sample, timesteps, text, mask = inputs(TINY)
    assert model(sample, timesteps, text, mask).shape == (2, 8, 16, 16, 3)
    assert {s[1] for s in shapes} == {8, 4}, "temporal down-sampling by two between the levels"


def test_lumiere_arrangement_of_the_presets():
    for name in ("demo-base", "stunet-b", "stunet-l"):
        config = stage_preset(name).network
        coarsest = len(config.levels) - 1
        plan = plan_blocks(config)
        assert {s.level for s in plan if s.kind == "attention_inflation"} == {coarsest}
        assert {s.level for s in plan if s.kind == "conv_inflation"} == set(range(coarsest))
        kinds = [s.kind for s in plan]
        for kind, after in (("temporal_down", "spatial_down"), ("temporal_up", "spatial_up")):
            assert kinds.count(kind) == coarsest
            assert all(kinds[i - 1] == after for i, k in enumerate(kinds) if k == kind)
    large = stage_preset("stunet-l").network
    frames, rates = large.num_frames, []
    for level in large.levels:
        rates.append(frames)
        frames //= level.temporal_factor
    assert rates == [80, 40, 20, 10] and [level.channels for level in large.levels] == [320, 640, 960, 1280]


@pytest.mark.parametrize("preset", ["stunet-b", "stunet-l", "ssr-b", "ssr-l"])
def test_large_presets_run_on_meta_tensors(preset):
    config = stage_preset(preset).network
    with torch.device("meta"):
        model = STUNet(config)
        sample = torch.empty(1, config.num_frames, config.height, config.width, config.in_channels)
        text = torch.empty(1, 4, config.text_dim) if config.text_dim else None
        level = torch.empty(1) if config.noise_level else None
        with torch.no_grad():
            out = model(sample, torch.empty(1), text, noise_level=level)
    assert out.shape == (*sample.shape[:-1], 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(frames=6, levels=4), r"T=6 is not a positive multiple of 4"),
        (dict(height=18), r"H=18 is not a positive multiple of 4"),
        (dict(channels=6), r"sample has shape .* expected \[B, T, H, W, 7\]"),
        (dict(text=False), "needs text embeddings"),
    ],
)
def test_wrong_sizes_are_named(change, message):
    config = TINY
    if change.pop("levels", None):
        config = replace(
            config, levels=tuple(replace(v, temporal_factor=f) for v, f in zip(config.levels, (4, 1), strict=True))
        )
    sample, timesteps, text, mask = inputs(config, frames=change.get("frames"))
    sample = sample[:, :, : change.get("height"), :, : change.get("channels")]
    if "height" in change:
        sample = torch.cat([sample, sample], 2)[:, :, : change["height"]]
    with pytest.raises(ValueError, match=message):
        STUNet(config)(sample, timesteps, text if change.get("text", True) else None, mask)


def test_space_to_depth_round_trip():
    x = torch.randn(2, 3, 8, 12, 5)
    assert space_to_depth(x, 4).shape == (2, 3, 2, 3, 80)
    assert torch.equal(depth_to_space(space_to_depth(x, 4), 4), x)


@torch.no_grad()
def test_plain_ops_prologue_and_epilogue_against_their_formula():
    ops = PlainOps()
    x, residual = torch.randn(2, 3, 5, 6, 8, dtype=torch.double), torch.randn(2, 3, 5, 6, 4, dtype=torch.double)
    norm = Norm(torch.randn(8).double(), torch.randn(8).double(), 2, 1e-5)
    scale, shift = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 8).double()
    grouped = x.view(2, 3, 30, 2, 4)
    mean, var = grouped.mean((2, 4), keepdim=True), grouped.var((2, 4), keepdim=True, correction=0)
    y = ((grouped - mean) / (var + 1e-5).sqrt()).view(x.shape) * norm.weight + norm.bias
    y = F.silu(y * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    weight, bias = torch.randn(4, 8, 3).double(), torch.randn(4).double()
    expected = F.conv3d(y.permute(0, 4, 1, 2, 3), weight[..., None, None], bias, padding=(1, 0, 0)).permute(
        0, 2, 3, 4, 1
    )
    out = ops.temporal_conv(x, weight, bias, norm=norm, scale=scale, shift=shift, silu=True, residual=residual)
    torch.testing.assert_close(out, expected + residual, rtol=1e-10, atol=1e-10)
    weight = torch.randn(4, 8, 3, 3).double()
    up = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.conv3d(up.permute(0, 4, 1, 2, 3), weight[:, :, None], bias, padding=(0, 1, 1)).permute(0, 2, 3, 4, 1)
    out = ops.spatial_conv(x, weight, bias, norm=norm, scale=scale, shift=shift, silu=True, upsample=True)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
