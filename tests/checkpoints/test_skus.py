from __future__ import annotations

import pytest
from pylumiere.kernels.tuning import ARCHITECTURES

from pylumiere.checkpoints.skus import CUBIN_SMS, SKUS, find_sku, match_device, sms_of
from pylumiere.errors import InvalidRequest


def test_every_name_and_alias_is_found_however_it_is_written():
    names = [alias for sku in SKUS for alias in (sku.name, *sku.aliases)]
    assert len(names) == len(set(names))
    for sku in SKUS:
        for name in (sku.name, *sku.aliases):
            assert find_sku(name) is sku
    assert find_sku("RTX 4090").sm == 89
    assert find_sku("sm_89") == find_sku("sm89") == 89


@pytest.mark.parametrize("name", ["rtx9090", "", "sm_42", "h-100", "../x"])
def test_an_unknown_sku_is_refused_with_the_known_ones(name):
    with pytest.raises(InvalidRequest, match="rtx4090.*h100.*sm_89.*all, this") as caught:
        find_sku(name)
    assert "\n" not in str(caught.value)


def test_a_slip_gets_a_suggestion():
    with pytest.raises(InvalidRequest, match=r"did you mean rtx4090\?"):
        find_sku("rtx409O")


def test_skus_come_to_distinct_capabilities():
    assert sms_of(["rtx4090", "l4", "h100", "sm_90"]) == (89, 90)
    assert set(CUBIN_SMS) < set(sms_of(["all"]))
    assert CUBIN_SMS == ARCHITECTURES


@pytest.mark.parametrize(
    ("device", "sm", "name"),
    [
        ("NVIDIA GeForce RTX 4090", 89, "rtx4090"), ("Tesla T4", 75, "t4"), ("NVIDIA A100-SXM4-80GB", 80, "a100"),
        ("NVIDIA A10G", 86, "a10"), ("NVIDIA H100 80GB HBM3", 90, "h100"), ("NVIDIA L40S", 89, "l40s"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 89, None), ("NVIDIA GB200", 100, "gb200"),
        ("NVIDIA GH200 480GB", 90, "gh200"),
        ("NVIDIA GeForce RTX 4070", 89, None), ("NVIDIA H100 80GB HBM3", 89, None),
    ],
)  # fmt: skip
def test_a_device_is_matched_by_its_drivers_name_and_capability(device, sm, name):
    found = match_device(device, sm)
    assert (None if found is None else found.name) == name
