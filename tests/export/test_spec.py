from __future__ import annotations

import pytest
from pylumiere.export.spec import NetworkSpec, network_specs
from support.testing import with_stage

from pylumiere.config import WindowConfig
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
