"""Plans: FLOPs against PyTorch's own counter, the bound by hand, how cost grows with each axis."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import torch
from support.latent import latent_config
from support.testing import write_random_model
from torch.utils.flop_counter import FlopCounterMode

from pylumiere.bench.plan import CHIPS, doubling, find_chips, find_config, plan_clip, plan_network, to_rows
from pylumiere.checkpoints.scheduler_config import schedule_from_diffusers
from pylumiere.errors import InvalidRequest
from pylumiere.networks.families import build_network, family_of
from pylumiere.networks.stunet import STUNet
from pylumiere.networks.stunet.presets import stage_preset

ATTENTION = ("attention in space and to text", "temporal attention")


@pytest.mark.parametrize("stage", ["tiny-base", "demo-base", "tiny-ssr", "demo-ssr"])
def test_flops_agree_with_pytorchs_counter(stage):
    config = stage_preset(stage).network
    frames, height, width = config.num_frames, config.height, config.width
    plan = plan_network(config, 2, frames, height, width, text_tokens=5)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        text = torch.empty(2, 5, config.text_dim) if config.text_dim else None
        level = torch.empty(2) if config.noise_level else None
        sample = torch.empty(2, frames, height, width, config.in_channels)
        STUNet(config)(sample, torch.empty(2), text, None, level)
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    convolutions = sum(c.flops for kind in ("spatial conv", "temporal conv") for c in plan.work[kind])
    assert convolutions == counted["aten.convolution"]
    # Theirs has the embeddings' layers too (times, positions, the text's mean): a third of a tiny network's.
    rest = sum(c.flops for kind in ("linear", *ATTENTION) for c in plan.work.get(kind, []))
    assert 0.6 <= rest / (sum(counted.values()) - counted["aten.convolution"]) <= 1


# diffusers' networks of the public layouts; what is not said is its default.
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
BETAS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False,
}  # fmt: skip
SCHEDULERS = {
    "sd-1.5": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **BETAS},
    "sd-2.1": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", **BETAS},
}
UNETS = {
    "sd-1.5": {"cross_attention_dim": 768},
    "sd-2.1": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
}


def counted_flops(network, *operands, **named):
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(*operands, **named)
    return counter.get_total_flops()


@pytest.mark.parametrize(("model", "size"), [("sd-1.5", 512), ("sd-2.1", 768)])
def test_flops_of_public_layouts_are_those_of_diffusers(model, size):
    unet, decoder = plan_clip(model, frames=1, size=size).stages
    with torch.device("meta"):
        network, autoencoder = diffusers.UNet2DConditionModel(**UNETS[model]), diffusers.AutoencoderKL(**AUTOENCODER)
        latents, text = torch.empty(2, 4, size // 8, size // 8), torch.empty(2, 77, UNETS[model]["cross_attention_dim"])
        flops = counted_flops(network, latents, torch.ones(2), text)
        assert unet.network.total.flops == pytest.approx(flops, rel=0.01)
        flops = counted_flops(autoencoder.decode, latents[:1])
        assert decoder.network.total.flops == pytest.approx(flops, rel=0.01)
    for mine, theirs in ((unet, network), (decoder, autoencoder)):
        assert mine.network.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    assert (unet.calls, unet.rows, decoder.calls, decoder.rows) == (50, 2, 1, 1)


def test_flops_of_sixteen_frames_agree_with_pytorchs_counter():
    """Here texts are read once for all frames of a clip; diffusers' network would be given each 16 times."""
    stages = plan_clip("sd-1.5", frames=16, size=256).stages
    assert [(stage.calls, stage.rows) for stage in stages] == [(50, 2), (2, 8)]
    sizes = {"unet": {"B": 2, "T": 16, "H": 32, "W": 32}, "decoder": {"B": 1, "T": 8, "H": 32, "W": 32}}
    for stage, network in zip(stages, find_config("sd-1.5").networks.values(), strict=True):
        operands = family_of(network).ports(network, 77).operands(sizes[stage.name])
        flops = counted_flops(build_network(network), **operands)
        assert stage.network.total.flops == pytest.approx(flops, rel=0.01)


def test_public_layouts_are_what_their_folders_say():
    for name, scheduler in SCHEDULERS.items():
        stage = find_config(name).first
        schedule, sampler = schedule_from_diffusers(scheduler)
        assert stage.schedule.betas == schedule.betas and stage.sampling.sampler == sampler
        assert stage.schedule == dataclasses.replace(schedule, beta_start=None, beta_end=None)
    assert find_config("sd-2.1").size == (768, 768) and find_config("sd-1.5").size == (512, 512)
    assert find_config("sd-2.1").first.network.upcast_attention


def test_parameters_are_those_of_the_shipped_networks():
    base, ssr = plan_clip("demo").stages
    assert round(base.network.parameters / 1e6, 2) == 8.67 and round(ssr.network.parameters / 1e6, 2) == 3.99
    assert (base.name, base.calls, base.rows) == ("base", 30, 2)
    assert (ssr.name, ssr.calls, ssr.rows) == ("ssr", 13 * 8, 1)


def test_a_decoder_is_a_stage_whose_calls_are_groups_of_frames(tmp_path):
    folder = str(write_random_model(tmp_path / "latent", latent_config()))
    unet, decoder = plan_clip(folder, frames=6).stages
    assert (unet.name, unet.calls, unet.rows) == ("unet", 3 * 2, 2), "two windows of 4 frames"
    assert (decoder.name, decoder.calls, decoder.rows) == ("decoder", 3, 2)
    assert decoder.network.weight_bytes == 4 * decoder.network.parameters, "it is computed in float32"
    tiled = plan_clip(folder, frames=6, size=32).stages[1]
    assert tiled.calls == 3 * 4 and tiled.network == decoder.network, "tiles of 8 x 8 latents, 2 a side"


def test_longer_clips_are_counted_in_the_windows_of_the_engine():
    base, ssr = plan_clip("demo", frames=160, steps=2, ssr_steps=3, window=16, overlap=4).stages
    assert base.network.work == plan_clip("demo").stages[0].network.work
    assert base.calls == 3 * 2, "windows that share half of their 80 frames"
    assert ssr.calls == 13 * 3, "windows of 16 frames that share 4"


def test_bound_of_one_operation():
    plan = plan_network(stage_preset("tiny-base").network, 1, 8, 16, 16)
    chip = CHIPS["h200"]
    by_hand = sum(max(c.flops / 989e12, c.bytes / 4.8e12) for costs in plan.work.values() for c in costs)
    assert plan.seconds(chip) == pytest.approx(by_hand)
    assert plan.seconds(chip) >= plan.total.seconds(chip.flops, chip.bandwidth) * (1 - 1e-9)


def test_temporal_attention_alone_grows_with_the_square_of_time():
    growth = doubling("demo")
    assert growth["T"].pop("temporal attention") == pytest.approx(4)
    assert all(ratio == pytest.approx(2, rel=0.01) for ratio in growth["T"].values())
    assert growth["H"]["spatial conv"] == growth["W"]["spatial conv"] == 2
    assert 2.5 < growth["H"]["attention in space and to text"] < 4  # between frames' own pixels, and pixels and words


def test_rows_say_what_fits():
    rows = to_rows(plan_clip("stunet-l", steps=2, ssr_steps=1), find_chips(["t4", "h200"]))
    assert [row["fits"] for row in rows] == [False, True]
    assert rows[0]["seconds_at_bound"]["clip"] > 10 * rows[1]["seconds_at_bound"]["clip"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "huge"}, "'huge' is no folder and not one of demo, "),
        ({"model": "demo", "frames": 0}, "num_frames=0"),
        ({"model": "demo", "size": 100}, "height=100: this model makes multiples of 32 up to 512"),
        ({"model": "demo", "ssr_steps": 0}, "stage ssr: num_inference_steps=0"),
        ({"model": "demo", "overlap": 8}, "window_overlap=8 should be smaller than window_frames=8"),
    ],
)
def test_what_cannot_be_planned_is_named(fields, message):
    with pytest.raises(InvalidRequest, match=message):
        plan_clip(**fields)


def test_unknown_chips_are_named():
    with pytest.raises(InvalidRequest, match="'rtx1' has no rates; known are t4"):
        find_chips(["h100", "rtx1"])
