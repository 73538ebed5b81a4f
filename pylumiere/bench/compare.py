"""How far a result is from what it should be."""

from __future__ import annotations

import torch


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of `expected`; NaN and infinity in `actual` give infinity."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    if actual.numel() == 0:
        raise AssertionError("nothing was compared: the tensors are empty")
    if not torch.isfinite(actual).all():
        return float("inf")
    scale = expected.square().mean().sqrt().item()
    error = (actual - expected).square().mean().sqrt().item()
    return error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))
