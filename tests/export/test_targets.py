from __future__ import annotations

import pytest
from pylumiere.export import targets
from pylumiere.export.targets import ExportOptions, choose_targets

from pylumiere.config import AutoencoderKLConfig, UNet2DConfig
from pylumiere.errors import InvalidRequest, UnsupportedDevice


def _plans(*skus, gpu=None, **options):
    found = choose_targets(ExportOptions(skus=skus, **options), gpu)
    return [(p.flavour, p.folder, p.precision) for p in found.plans], found


def test_without_a_sku_there_are_the_portable_graphs_alone():
    plans, found = _plans()
    assert not plans
    assert not found.cubins
    assert not found.notes


def test_one_portable_plan_serves_ampere_and_later():
    plans, found = _plans("rtx4090", "a100", "rtx5090")
    assert plans == [("tensorrt_rtx", "portable", "fp16")]
    assert found.plans[0].sms == (80, 86, 89, 120, 121)
    assert found.plans[0].sm is None
    assert found.cubins == [(80, "bf16"), (89, "bf16"), (120, "bf16")]


def test_turing_has_a_plan_of_its_own():
    plans, found = _plans("t4", "rtx4090")
    assert plans == [("tensorrt_rtx", "portable", "fp16"), ("tensorrt_rtx", "sm_75", "fp16")]
    assert found.cubins[0] == (75, "fp16")


def test_all_means_six_plans_and_the_portable_one_and_seven_kinds_of_cubins():
    plans, found = _plans("all")
    assert [folder for _, folder, _ in plans] == ["portable", "sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"]
    assert [arch for arch, _ in found.cubins] == [75, 80, 86, 89, 90, 100, 120]
    assert _plans("all", per_sm=True)[0] == plans


def test_bf16_where_the_chip_has_it():
    plans, found = _plans("t4", "l4", per_sm=True, precision="bf16")
    assert plans == [("tensorrt_rtx", "portable", "bf16"), ("tensorrt_rtx", "sm_75", "fp16"),
                     ("tensorrt_rtx", "sm_89", "bf16")]  # fmt: skip
    assert found.cubins == [(75, "fp16"), (89, "bf16")]


def test_fp32_is_passed_over_where_the_library_has_no_such_products():
    plans, found = _plans("t4", precision="fp32")
    assert not plans
    assert any("sm_75" in note and "fp32" in note for note in found.notes)


def test_what_must_be_finished_elsewhere_is_said():
    plans, found = _plans("h100", "b200")
    assert not plans
    assert [arch for arch, _ in found.cubins] == [90, 100]
    for sm, card in ((90, "h100"), (100, "b200")):
        assert any(f"sm_{sm}" in note and card in note and "--sku this" in note for note in found.notes)


def test_this_needs_a_gpu():
    with pytest.raises(UnsupportedDevice, match="--sku this needs an NVIDIA GPU"):
        _plans("this")


def test_this_gpu_gets_a_tensorrt_plan_where_the_library_is(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: object())
    plans, found = _plans("this", gpu=("NVIDIA H100 80GB HBM3", 90))
    assert plans == [("tensorrt", "h100", "fp16")]
    assert found.plans[0].sku == "h100"
    assert found.cubins == [(90, "bf16")]
    assert not found.notes


def test_this_gpu_without_the_library_is_said(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    plans, found = _plans("this", gpu=("NVIDIA H100 80GB HBM3", 90))
    assert not plans
    assert any("pylumiere[tensorrt]" in note for note in found.notes)


def test_unknown_names_are_refused():
    with pytest.raises(InvalidRequest, match="'rtx9'"):
        _plans("rtx4090", "rtx9")
    with pytest.raises(InvalidRequest, match="--precision 'int4' is not one of auto, fp16"):
        _plans("rtx4090", precision="int4")


@pytest.mark.parametrize("upcast", [True, False])
def test_a_decoder_that_is_for_fp32_leaves_turing_without_plans(upcast):
    _, found = _plans("t4", "l4")
    found.fit({"unet": UNet2DConfig(), "decoder": AutoencoderKLConfig(force_upcast=upcast)})
    assert [plan.folder for plan in found.plans] == (["portable"] if upcast else ["portable", "sm_75"])
    assert [arch for arch, _ in found.cubins] == [75, 89]
    assert any("sm_75: no plans; decoder is for fp32" in note for note in found.notes) == upcast
    assert any(note.startswith("decoder: in fp32") for note in found.notes) == upcast


@pytest.mark.parametrize("skus, precision", [((), "auto"), (("l4",), "fp32")])
def test_where_nothing_is_in_16_bits_no_precision_needs_a_note(skus, precision):
    _, found = _plans(*skus, precision=precision)
    plans = list(found.plans)
    found.fit({"decoder": AutoencoderKLConfig()})
    assert not found.notes and found.plans == plans
