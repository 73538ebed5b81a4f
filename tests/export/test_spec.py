from __future__ import annotations

import pytest
from pylumiere.export.spec import NetworkSpec, network_specs, text_spec
from support.testing import with_stage
from support.toy import three_stages

from pylumiere.config import (
    AutoencoderKLConfig,
    DecoderConfig,
    ModelConfig,
    StageConfig,
    TemporalShiftConfig,
    UNet2DConfig,
    WindowConfig,
)
from pylumiere.errors import InvalidRequest
from pylumiere.networks.stunet.presets import model_preset


@pytest.mark.parametrize("model", ["demo", "tiny", "stunet-b", "stunet-l"])
def test_the_three_sizes_of_a_check_differ_and_suit_the_network(model):
    config = model_preset(model)
    specs = network_specs(config)
    assert list(specs) == ["base", "ssr"]
    for stage, spec in specs.items():
        sizes = dict(spec.check_sizes())
        assert list(sizes) == ["smallest", "odd", "largest"]
        assert sizes["smallest"] != sizes["odd"] != sizes["largest"] != sizes["smallest"]
        for these in sizes.values():
            for name, axis in spec.axes.items():
                assert axis.min <= these[name] <= axis.max
                assert these[name] % axis.multiple == 0
        odd = sizes["odd"]
        assert odd["H"] // spec.axes["H"].multiple % 2 == 1
        network = config.stage(stage).network
        assert sizes["largest"]["T"] >= network.num_frames
        assert (sizes["largest"]["H"], sizes["largest"]["W"]) == (network.height, network.width)


def test_the_odd_size_is_not_square_where_the_network_allows_that():
    odd = dict(network_specs(model_preset("demo"))["base"].check_sizes())["odd"]
    assert odd["H"] != odd["W"]


def test_one_profile_per_bucket_with_only_the_batch_free():
    specs = network_specs(model_preset("demo"), batch=4, frames=(16, 80), sizes=((128, 128), (128, 256)))
    profiles = specs["base"].profiles()
    assert len(profiles) == 4
    for profile in profiles:
        sample = profile["sample"]
        assert sample.min == (1, *sample.max[1:])
        assert sample.max[0] == 4
    assert {p["sample"].max[1:4] for p in profiles} == {(16, 32, 32), (16, 32, 64), (80, 32, 32), (80, 32, 64)}
    assert len(specs["ssr"].profiles()) == 2  # windows have one length
    whole = specs["base"].ranges()["sample"]
    assert all(whole.holds(p["sample"].max) and whole.holds(p["sample"].min) for p in profiles)


def test_a_later_stage_has_windows_of_one_length_also_where_the_model_names_none():
    """It may begin before the length of its clip is known."""
    specs = network_specs(three_stages(), frames=(4, 16))
    assert [specs[stage].axes["T"].max for stage in ("base", "middle", "last")] == [16, 8, 4]
    assert len(specs["base"].profiles()) == 2 and len(specs["middle"].profiles()) == 1


def test_windows_are_exported_with_their_halo():
    config = with_stage(model_preset("demo"), "ssr", windows=WindowConfig(8, overlap=2, halo=2))
    assert network_specs(config)["ssr"].axes["T"].max == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "--batch 0 is not in 1..64"),
        ({"frames": (81,)}, "--frames 81 is not a multiple of 4"),
        ({"frames": (0,)}, "--frames 0 is not"),
        ({"sizes": ((100, 128),)}, r"--size \(height\) 100 is not a multiple of 32"),
        ({"sizes": ((128, 10**6),)}, r"--size \(width\) 1000000 is not"),
    ],
)
def test_sizes_that_the_networks_cannot_have_are_refused(options, message):
    with pytest.raises(InvalidRequest, match=message):
        network_specs(model_preset("demo"), **options)


def test_a_spec_survives_json():
    import json

    for spec in network_specs(model_preset("tiny")).values():
        assert NetworkSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


# ---- models of latents -----------------------------------------------------------------------------------------------


def latent(shift: TemporalShiftConfig | None = TemporalShiftConfig(), **decoder) -> ModelConfig:  # noqa: B008
    """Networks as large as Stable Diffusion 1's."""
    unet = UNet2DConfig(temporal_shift=shift, num_frames=16, height=32, width=32, cross_attention_dim=768)
    vae = AutoencoderKLConfig((128, 256, 512, 512), 2)
    return ModelConfig("latent", (StageConfig("unet", unet),), DecoderConfig(vae, **decoder), text_tokens=77)


def test_a_decoder_takes_groups_of_latents_and_gives_pixels():
    spec = network_specs(latent(), sizes=((256, 512),))["decoder"]
    assert [port.name for port in spec.inputs] == ["latents"]
    sizes = dict(spec.check_sizes())
    assert spec.inputs[0].shape(sizes["largest"]) == (1, 8, 32, 64, 4)
    assert spec.output.shape(sizes["largest"]) == (1, 8, 256, 512, 3)
    assert spec.output.shape(sizes["smallest"]) == (1, 1, 8, 8, 3)
    (profile,) = spec.profiles()
    assert (profile["latents"].min, profile["latents"].max) == ((1, 1, 32, 64, 4), (1, 8, 32, 64, 4))


def test_a_decoder_of_large_frames_takes_their_tiles():
    specs = network_specs(latent(tile=40), sizes=((256, 512), (512, 512), (1024, 512)))
    latents = [profile["latents"].max[2:4] for profile in specs["decoder"].profiles()]
    assert latents == [(32, 40), (40, 40)]
    assert [profile["sample"].max[2:4] for profile in specs["unet"].profiles()] == [(32, 64), (64, 64), (128, 64)]


def test_fixed_axes_are_numbers_in_their_multiples_too():
    output = network_specs(latent())["decoder"].output
    assert output.axes == ("B", "T", "8*H", "8*W", 3)
    assert output.fixed({"H": 4, "B": 1}).axes == (1, "T", 32, "8*W", 3)


def test_shifted_frames_are_two_or_more_and_others_any():
    assert network_specs(latent())["unet"].axes["T"].min == 2
    assert network_specs(latent(shift=None))["unet"].axes["T"].min == 1


def test_one_frame_fixes_the_axis_where_frames_are_shifted():
    spec = network_specs(latent(), frames=(1,))["unet"]
    assert list(spec.axes) == ["B", "H", "W"]
    assert spec.inputs[0].axes == ("B", 1, "H", "W", 4)
    assert spec.output.axes == ("B", 1, "H", "W", 4)
    assert spec.profiles()[0]["sample"].max == (2, 1, 32, 32, 4)
    assert list(network_specs(latent(shift=None), frames=(1,))["unet"].axes) == ["B", "T", "H", "W"]
    with pytest.raises(InvalidRequest, match="--frames 1 cannot stand beside 16"):
        network_specs(latent(), frames=(16, 1))
    network_specs(latent(shift=None), frames=(16, 1))


def test_windows_of_the_first_stage_are_its_calls():
    config = with_stage(latent(), "unet", windows=WindowConfig(16, overlap=4, halo=2))
    assert network_specs(config)["unet"].axes["T"].max == 20


def test_specs_of_latents_and_text_survive_json():
    import json

    specs = [*network_specs(latent()).values(), text_spec(77, 768, 49408, is_masked=False)]
    for spec in specs:
        assert NetworkSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_text_encoder_takes_a_mask_only_if_it_reads_it():
    masked, plain = (text_spec(77, 768, 49408, is_masked=is_masked) for is_masked in (True, False))
    assert [port.name for port in masked.inputs] == ["input_ids", "attention_mask"]
    assert [port.name for port in plain.inputs] == ["input_ids"]
