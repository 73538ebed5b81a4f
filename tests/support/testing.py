"""Comparisons, tolerances and shapes, shared by tests and benchmarks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pylumiere.bench.compare import rel_rms
from pylumiere.bench.samples import random_weights

if TYPE_CHECKING:
    from pylumiere.config import ModelConfig

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Relative RMS error against the float64 reference on the same rounded inputs, in multiples of finfo(dtype).eps.
# "elementwise": a handful of fp32 operations and one rounding at the store. Rounding alone costs about 0.2 to 0.4 eps
#     in 16 bits; fp32 transcendental functions cost about 1 eps.
# "matmul": sums over K products in fp32; the error grows like sqrt(K), in practice below 4 eps for K up to 3,000 in
#     fp32. In 16 bits the products are exact and the store rounds, but a prologue rounds its activation once more.
#     bf16 has twice the bound because Triton's interpreter truncates to bf16 where the GPU rounds to nearest.
# The bounds of rounding are averages over many values. Of few values (`effective_count`) each may be rounded as badly
# as can be: by eps / 2 to nearest, by eps when truncated. From 256 values on, whose mean squared error is 0.18 eps^2
# when truncated, Hoeffding's inequality gives less than 1e-7 for an RMS above 0.6 eps.
TOLERANCE = {
    "elementwise": {torch.float64: 8.0, torch.float32: 4.0, torch.float16: 0.5, torch.bfloat16: 0.6},
    "matmul": {torch.float64: 8.0, torch.float32: 4.0, torch.float16: 0.5, torch.bfloat16: 1.0},
}


WORST_ROUNDING = {torch.float16: 0.501, torch.bfloat16: 1.001}
FEW = 256


def effective_count(x: torch.Tensor) -> float:
    """How many values carry the energy of x: all of them if they are of one size, 1 if one outweighs the rest."""
    square = x.detach().double().square()
    fourth = square.square().sum().item()
    return square.sum().item() ** 2 / fourth if fourth > 0 else float(x.numel())


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    kind: str = "elementwise",
    plain: torch.Tensor | None = None,
    name: str = "output",
    dtype: torch.dtype | None = None,
) -> None:
    """Fail unless `actual` is as close to the oracle as its dtype allows.

    Args:
        actual: the result under test.
        expected: the oracle, computed in float64 from the same rounded inputs.
        kind: row of `TOLERANCE`.
        plain: the same computation by plain PyTorch in the dtype under test. Its error, doubled, is allowed too:
            the rule for attention and matrix products.
        dtype: precision that the tolerance is taken from, if it is not `actual.dtype`.
    """
    dtype = dtype or actual.dtype
    eps = torch.finfo(dtype).eps
    bound = TOLERANCE[kind][dtype] * eps
    if effective_count(expected) < FEW:
        bound = max(bound, WORST_ROUNDING.get(dtype, 0.0) * eps)
    if plain is not None:
        bound += 2 * rel_rms(plain, expected)
    error = rel_rms(actual, expected)
    if error <= bound:
        return
    difference = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs()
    finite = torch.isfinite(difference)
    worst = int(torch.where(finite, difference, torch.inf).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), difference.shape))
    raise AssertionError(
        f"{name}: relative RMS error {error:.3e} = {error / eps:.2f} eps of {dtype}, allowed {bound / eps:.2f} eps; "
        f"worst at {index}: {actual[index].item()} instead of {expected[index].item()}; "
        f"{int((~torch.isfinite(actual)).sum())} of {actual.numel()} values are not finite"
    )


def shapes(names: str, rows: Iterable[tuple]) -> list[Any]:
    """pytest parameters whose ids name each size: `shapes("N C", [(2, 8)])` gives the id N2-C8."""
    import pytest

    letters = names.split()
    return [pytest.param(row, id="-".join(f"{n}{v}" for n, v in zip(letters, row, strict=True))) for row in rows]


def no_new_threads(before: int) -> bool:
    """Whether no more threads than that are left, at the latest after 5 seconds."""
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    return threading.active_count() <= before


# ---- models of a few thousand weights ------------------------------------------------------------------------------


def with_stage(config: ModelConfig, name: str, **fields: Any) -> ModelConfig:
    """The same model with some fields of one stage replaced."""
    stages = tuple(replace(stage, **fields) if stage.name == name else stage for stage in config.stages)
    return replace(config, stages=stages)


def write_random_model(folder: Path, config: ModelConfig | None = None, seed: int = 0) -> Path:
    """A model folder with random weights; of the preset "tiny" if no config is given. Networks take seeds in turn."""
    from pylumiere.checkpoints.native import save_checkpoint
    from pylumiere.networks.stunet.presets import model_preset

    config = model_preset("tiny") if config is None else config
    networks = {name: random_weights(network, seed + i) for i, (name, network) in enumerate(config.networks.items())}
    save_checkpoint(folder, config, networks)
    return folder


def psnr(actual: Any, expected: Any) -> float:
    """Decibels of two clips of floats in 0..1; infinity for equal ones."""
    actual, expected = (torch.as_tensor(clip, dtype=torch.float64) for clip in (actual, expected))
    assert actual.shape == expected.shape
    return -10 * (actual - expected).square().mean().log10().item()


def wait_until(condition, seconds=10):
    """Returns as soon as `condition()` holds; fails after that many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
