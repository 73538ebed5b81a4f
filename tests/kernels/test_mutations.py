"""Deliberate faults in the convolution kernel, each of which the comparison must catch.

The kernel's source is copied with one change and run in place of the original. `none` changes nothing and must pass.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from pylumiere.kernels import implicit_gemm, launching, spatial_conv
from support.testing import assert_close

FAULTS = {
    "none": ("", ""),
    "dropped mask": ("x = tl.where(mask, value, 0.0)", "x = value"),
    "wrong stride": ("* stride_h + w * stride_w", "* stride_w + w * stride_w"),
    "fp16 accumulation": ("dtype=tl.float32)\n    for", "dtype=tl.float16)\n    for"),
    "unwritten tail": ("mask_y = mask_m[:, None]", "mask_y = (offs_m < pixels_out - 1)[:, None]"),
    "swapped shift direction": ("offs_c < fold_next, 1, tl.where(", "offs_c < fold_next, -1, tl.where("),
    "channel tail": ("mask_c = offs_c < C * is_inside", "mask_c = offs_c < (C - 1) * is_inside"),
    "affine of the wrong frame": ("(frame - t) * C + offs_c", "offs_c"),
}


def load_with(fault, folder, monkeypatch):
    before, after = FAULTS[fault]
    source = Path(implicit_gemm.__file__).read_text()
    if before:
        assert source.count(before) == 1, f"{before!r} must stand once in implicit_gemm.py"
        source = source.replace(before, after)
    path = folder / "mutant.py"
    path.write_text(source)
    name = f"mutant_{folder.name}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def compare():
    generator = torch.Generator().manual_seed(0)

    def random(*size, dtype=torch.float16):
        return torch.randn(*size, generator=generator).to(dtype)

    x, weight = random(1, 3, 4, 5, 49), random(17, 49, 3, 3)
    mul, add = random(3, 49, dtype=torch.float32), random(3, 49, dtype=torch.float32)
    options = dict(silu=True, fold_next=6, fold_prev=6)
    device = "cpu" if launching.interpreted() else "cuda"
    operands = (t.to(device) for t in (x, implicit_gemm.pack_weight(weight)))
    y, _ = spatial_conv.launch(*operands, None, mul.to(device), add.to(device), **options)
    wide = (t.double() for t in (x, weight))
    expected, _ = spatial_conv.reference(*wide, None, mul.double(), add.double(), **options)
    assert_close(y.cpu(), expected, kind="matmul")


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(spatial_conv, "convolve", load_with(fault, tmp_path, monkeypatch).convolve)
    if fault == "none":
        compare()
    else:
        with pytest.raises(AssertionError, match="relative RMS error"):
            compare()
