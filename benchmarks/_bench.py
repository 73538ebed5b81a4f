"""Measuring one operator: cold caches, one captured graph, results checked first, speed against a measured bound."""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from _record import append_row
from pylumiere.kernels import launching, tuning
from pylumiere.kernels.cost import Cost

from pylumiere.testing import rel_rms


@dataclass(frozen=True)
class Case:
    """One shape of an operator.

    Args:
        name: of the shape.
        run: the function under test.
        rivals: the same computation by other means, by name.
        oracle: the result, or its first frame, in higher precision, for the check before the clock starts.
        cost: fewest arithmetic and bytes.
    """

    name: str
    run: Callable[[], torch.Tensor]
    rivals: dict[str, Callable[[], torch.Tensor]]
    oracle: Callable[[], torch.Tensor]
    cost: Cost


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, and the distance between the quartiles."""

    median: float
    spread: float


def measure(function: Callable[[], Any], repeats: int = 20) -> Timing:
    """Time on the GPU, captured in a CUDA graph so that no Python is in it, with the L2 cache flushed before each."""
    flush = torch.empty(512 * 2**20, dtype=torch.int8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    seconds = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(1e-3 * start.elapsed_time(end))
    low, median, high = statistics.quantiles(seconds, n=4)
    return Timing(median, high - low)


def measure_device() -> dict[str, float]:
    """What this GPU reaches: bytes/s of a copy (reads plus writes) and FLOP/s of a bfloat16 product."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return {
        "copy_bytes_per_s": 2 * source.numel() / measure(lambda: target.copy_(source)).median,
        "matmul_flops_per_s": 2 * 8192**3 / measure(lambda: a @ b).median,
    }


def tune_convolution(op: str, name: str, run: Callable[[], Any]) -> None:
    """Time `run` with each candidate tile of a convolution and print the best as a row for kernels/tuning.py."""
    arch = launching.arch_of(torch.empty(0, device="cuda"))
    timed: list[tuple[float, tuple[int, ...]]] = []
    kept = tuning.TABLE[op]
    try:
        for tile in itertools.product((64, 128, 256), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)):
            m, o, c, warps, stages = tile
            if stages * (m + o) * c * 2 > tuning.SHARED_MEMORY[arch] or m * o > 128 * 256:
                continue
            constants = {"BLOCK_M": m, "BLOCK_O": o, "BLOCK_C": c}
            tuning.TABLE[op] = {arch: [tuning.Row(tuning.Config(constants, warps, stages))]}
            try:
                timed.append((measure(run, repeats=5).median, tile))
            except triton.runtime.errors.OutOfResources:
                continue
    finally:
        tuning.TABLE[op] = kept
    for seconds, (m, o, c, warps, stages) in sorted(timed)[:3]:
        note = f"{torch.cuda.get_device_name()}, {datetime.date.today()}, {1e6 * seconds:.0f} us"
        print(f"{op} sm {arch} {name}: Row(_gemm({m}, {o}, {c}, {warps}, {stages}))  # {note}", flush=True)


def main(op: str, cases: Callable[[str, bool], Iterable[Case]], tune: Callable[[str], None] | None = None) -> int:
    """The command line that every operator benchmark shares.

    `cases(device, smoke)` yields the shapes. With --smoke they are small, run under the interpreter where there is no
    GPU, and only checked. `tune(device)` measures candidate tiles and prints rows for kernels/tuning.py.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="small shapes, checked but not timed; works without a GPU")
    parser.add_argument("--json", type=Path, help="append rows here")
    parser.add_argument("--tune", action="store_true", help="measure candidate tiles and print rows for tuning.py")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not (options.smoke and launching.interpreted()):
        print(f"{op}: no GPU. Without one only `TRITON_INTERPRET=1 ... --smoke` runs.", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if options.tune:
        if tune is None or device == "cpu":
            print(f"{op}: nothing to tune here", file=sys.stderr)
            return 2
        tune(device)
        return 0
    bounds = {} if options.smoke else measure_device()
    wrong = 0
    with torch.inference_mode():
        for case in cases(device, options.smoke):
            wrong += not _report(op, case, bounds, options.smoke, options.json)
    return 1 if wrong else 0


def _report(op: str, case: Case, bounds: dict[str, float], smoke: bool, path: Path | None) -> bool:
    """Check, time and print one case. A wrong result is reported and not timed."""
    expected, actual = case.oracle(), case.run()
    frames = expected.shape[1]  # of [B, T, ...]; the oracle may hold the first ones only
    error = rel_rms(actual[:, :frames], expected)
    allowed = 4 * torch.finfo(actual.dtype).eps
    if case.rivals:
        allowed += 2 * max(rel_rms(rival()[:, :frames], expected) for rival in case.rivals.values())
    row = {"op": op, "case": case.name, "dtype": str(actual.dtype), "error": error}
    if error > allowed:
        print(f"{op} {case.name}: WRONG, relative RMS error {error:.2e}, allowed {allowed:.2e}; not timed")
        if path:
            append_row(path, {**row, "correct": False})
        return False
    if smoke:
        print(f"{op} {case.name}: correct, relative RMS error {error:.2e}; not timed")
        if path:
            append_row(path, {**row, "correct": True, "smoke": True})
        return True
    bound = case.cost.seconds(bounds["matmul_flops_per_s"], bounds["copy_bytes_per_s"])
    ours = measure(case.run)
    others = {name: measure(rival) for name, rival in case.rivals.items()}
    for provider, timing in {"pylumiere": ours, **others}.items():
        seconds = timing.median
        print(
            f"{op} {case.name} {provider:12} {1e6 * seconds:9.1f} us +- {1e6 * timing.spread:.1f} | "
            f"{case.cost.flops / seconds / 1e12:6.1f} TFLOP/s | {case.cost.bytes / seconds / 1e9:7.0f} GB/s | "
            f"{100 * bound / seconds:5.1f} % of the bound | {seconds / ours.median:5.2f} x ours",
            flush=True,
        )
        if path:
            measured = {"provider": provider, "seconds": timing.median, "spread": timing.spread, "bound": bound}
            append_row(path, {**row, **measured, **bounds, "correct": True})
    return True
