"""The byte count against sums that can be done by hand, and against itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pylumiere.config import AutoencoderKLConfig
from pylumiere.networks.stunet.presets import model_preset
from pylumiere.scheduling.memory import MARGIN_BYTES, _LiveBytes, activation_bytes, peak_resident_bytes, resident_bytes

NETWORK = model_preset("tiny").first.network


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


def test_a_decoder_in_float32_counts_as_such():
    wide, narrow = (AutoencoderKLConfig((8, 16), norm_num_groups=4, force_upcast=upcast) for upcast in (True, False))
    sizes = (1, 2, 32, 32)
    assert activation_bytes(wide, *sizes, torch.bfloat16) == activation_bytes(narrow, *sizes, torch.float32)
    assert activation_bytes(narrow, *sizes, torch.bfloat16) < activation_bytes(narrow, *sizes, torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell them apart")
def test_the_peak_is_of_this_program_not_of_the_one_that_started_it():
    held = torch.ones(2**28, dtype=torch.uint8)  # 256 MiB, touched
    assert peak_resident_bytes() >= resident_bytes() > held.numel()
    program = "import sys; from pylumiere.scheduling.memory import peak_resident_bytes; print(peak_resident_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    alone = subprocess.run(["/bin/sh", "-c", f"'{sys.executable}' -c '{program}'"], capture_output=True, text=True)
    assert abs(int(done.stdout) - int(alone.stdout)) < 2**25
