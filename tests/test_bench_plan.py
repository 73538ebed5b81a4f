"""Plans: FLOPs against PyTorch's own counter, the bound by hand, how cost grows with each axis."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pylumiere.bench.plan import CHIPS, doubling, find_chips, plan_clip, plan_network, to_rows
from pylumiere.errors import InvalidRequest
from pylumiere.networks.stunet import STUNet
from pylumiere.networks.stunet.presets import stage_preset


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
    # Theirs has the layers of the embeddings too: a good part of a tiny network.
    rest = sum(c.flops for kind in ("linear", "attention in space and to text") for c in plan.work.get(kind, []))
    rest += sum(c.flops for c in plan.work.get("temporal attention", []))
    assert 0.5 * (sum(counted.values()) - counted["aten.convolution"]) <= rest <= sum(counted.values())


def test_parameters_are_those_of_the_shipped_networks():
    plan = plan_clip("demo")
    assert round(plan.base.parameters / 1e6, 2) == 8.67 and round(plan.ssr.parameters / 1e6, 2) == 3.99
    assert (plan.base_calls, plan.ssr_calls) == (30, 13 * 8)


def test_bound_of_one_operation():
    plan = plan_network(stage_preset("tiny-base").network, 1, 8, 16, 16)
    chip = CHIPS["h200"]
    by_hand = sum(max(c.flops / 989e12, c.bytes / 4.8e12) for costs in plan.work.values() for c in costs)
    assert plan.seconds(chip) == pytest.approx(by_hand)
    assert plan.seconds(chip) >= plan.total.seconds(chip.flops, chip.bandwidth)


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
        ({"model": "huge"}, "'huge' is not one of"),
        ({"model": "demo", "frames": 7}, "T=7"),
        ({"model": "demo", "overlap": 8}, "--overlap 8 should be in 0..7"),
    ],
)
def test_what_cannot_be_planned_is_named(fields, message):
    with pytest.raises(InvalidRequest, match=message):
        plan_clip(**fields)


def test_unknown_chips_are_named():
    with pytest.raises(InvalidRequest, match="'rtx1' has no rates; known are t4"):
        find_chips(["h100", "rtx1"])
