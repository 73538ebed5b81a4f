"""The byte count against sums that can be done by hand, and against itself."""

from __future__ import annotations

import torch

from pylumiere.config import model_preset
from pylumiere.memory import MARGIN_BYTES, _LiveBytes, activation_bytes

NETWORK = model_preset("tiny").base.network


def test_storages_count_from_making_to_dropping():
    with torch.device("meta"), _LiveBytes() as live:
        a = torch.empty(1000)  # 4,000 bytes
        b = a * 2  # and as many again
        assert live.now == 8000
        c = b.view(10, 100)  # a view is no storage
        del a
        assert live.now == 4000
        c.add_(1)
        del b, c
        assert live.now == 0
        d = torch.empty(500) + torch.empty(500)
    assert live.peak == 8000 and d.shape == (500,)


def test_peak_follows_shapes_and_dtype():
    def count(*shape, dtype=torch.float32):
        return activation_bytes(NETWORK, *shape, dtype) - MARGIN_BYTES

    one = count(1, 4, 32, 32)
    assert one > 1.5 * 4 * 32 * (4 * 32 * 32 // 4), "more than a level 0 activation and its skip"
    assert 1.9 < count(2, 4, 32, 32) / one < 2.1
    assert 3.8 < count(1, 4, 64, 64) / one < 4.2
    assert 0.45 < count(1, 4, 32, 32, dtype=torch.bfloat16) / one < 0.55
