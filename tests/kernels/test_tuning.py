"""The tile table: which row is taken, and that every architecture is served."""

import pytest
import torch
from pylumiere.kernels import tuning

SHAPE = dict(dtype=torch.bfloat16, C=320, O=320, pixels=16384, prologue=True)


def test_an_architecture_without_rows_takes_the_nearest_lower_one(monkeypatch):
    low, high = tuning.Config({"BLOCK": 1}), tuning.Config({"BLOCK": 2})
    monkeypatch.setitem(tuning.TABLE, "op", {0: [], 75: [tuning.Row(low)], 90: [tuning.Row(high)]})
    assert [tuning.choose("op", arch) for arch in (75, 89, 90, 120)] == [low, low, high, high]
    assert not tuning.has_row("op", 70)
    with pytest.raises(ValueError, match=r"no configuration for compute capability 70; listed: \[0, 75, 90\]"):
        tuning.choose("op", 70)


def test_the_first_row_that_fits_is_taken(monkeypatch):
    rows = [tuning.Row(tuning.Config({"BLOCK": n}), lambda s, n=n: s["C"] < 8 * n) for n in (1, 2)]
    monkeypatch.setitem(tuning.TABLE, "op", {0: rows})
    assert [tuning.choose("op", 0, C=c).constants["BLOCK"] for c in (4, 8)] == [1, 2]
    with pytest.raises(ValueError, match="no configuration for {'C': 99}"):
        tuning.choose("op", 0, C=99)


@pytest.mark.parametrize("arch", (0, *tuning.ARCHITECTURES))
@pytest.mark.parametrize("op", ["spatial_conv", "temporal_conv"])
def test_convolutions_have_a_tile_everywhere(op, arch):
    for dtype in (torch.float32, torch.float16):
        for sizes in (dict(C=7, O=320), dict(C=64, O=64), dict(C=1280, O=1280, pixels=64)):
            constants = tuning.choose(op, arch, **SHAPE | {"dtype": dtype} | sizes).constants
            assert all(value >= 16 and value & (value - 1) == 0 for value in constants.values())
