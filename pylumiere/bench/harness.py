"""Measuring operators: results checked first, cold caches, all providers in turn, speed against measured bounds.

On a GPU each provider is captured once into a CUDA graph, so that no Python is in its time. On a CPU the operators'
references are timed, which is what the plain path runs there.
"""

from __future__ import annotations

import datetime
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pylumiere.bench.compare import rel_rms
from pylumiere.bench.facts import append_row
from pylumiere.kernels import launching, tuning
from pylumiere.kernels.cost import Cost


@dataclass(frozen=True)
class Site:
    """Where operators run, and at which sizes.

    Args:
        device: "cuda" or "cpu".
        size: "full", the levels of the large networks; "small", what a CPU does in a moment; "smoke", a few values,
            through the kernels even where only the interpreter runs them.
    """

    device: str
    size: str

    @property
    def dtype(self) -> torch.dtype:
        return {"full": torch.bfloat16, "small": torch.float32, "smoke": torch.float16}[self.size]

    @property
    def runs_kernels(self) -> bool:
        return self.size != "small"

    def function(self, module: ModuleType) -> Callable:
        """An operator as it runs here: by its kernels, or by its reference."""
        return module.launch if self.runs_kernels else module.reference

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=self.device)).to(self.dtype)


@dataclass(frozen=True)
class Case:
    """One shape of an operator.

    Args:
        name: of the shape.
        run: the function under test.
        rivals: the same computation by PyTorch, by name.
        oracle: the result in higher precision, or a leading part of it (first frames, first pixels), for the check
            before the clock starts.
        cost: fewest arithmetic and bytes.
        compiled: what torch.compile is given as one more rival; the rival "eager" if None.
    """

    name: str
    run: Callable[[], Tensor]
    rivals: dict[str, Callable[[], Tensor]]
    oracle: Callable[[], Tensor]
    cost: Cost
    compiled: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, the distance between the quartiles, and the least."""

    median: float
    spread: float
    best: float


# ---- the clock -----------------------------------------------------------------------------------------------------


def measure(functions: dict[str, Callable[[], Any]], device: str, repeats: int | None = None) -> dict[str, Timing]:
    """Time each function in turn, `repeats` times over, so that a drift of the machine meets all of them."""
    on_gpu = device == "cuda"
    repeats = repeats or (20 if on_gpu else 7)
    flush = torch.empty(2**29 if on_gpu else 2**26, dtype=torch.int8, device=device)  # larger than the last cache
    pool = torch.cuda.graph_pool_handle() if on_gpu else None  # one for all: only times are taken from the graphs
    calls = {name: _captured(function, pool) if on_gpu else _warmed(function) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            flush.zero_()
            seconds[name].append(_gpu_seconds(call) if on_gpu else _cpu_seconds(call))
    timings = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, high - low, min(values))
    return timings


def _captured(function: Callable[[], Any], pool: Any) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    return graph.replay


def _warmed(function: Callable[[], Any]) -> Callable[[], Any]:
    function()
    return function


def _gpu_seconds(call: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(end)


def _cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_device(device: str) -> dict[str, float]:
    """What the device reaches at its best: bytes/s of a copy (reads plus writes) and FLOP/s of products.

    `matmul_flops_per_s` is the product's in bf16 on a GPU, else in fp32; on a CPU both have their own entries, too.
    There the better of a matrix product and a large convolution counts, since PyTorch's libraries for the two differ.
    """
    size, side = (2**30, 8192) if device == "cuda" else (2**27, 1536)
    source = torch.empty(size, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    functions: dict[str, Callable] = {"copy": lambda: target.copy_(source)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name == "bf16" or device == "cpu":
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            functions[name] = lambda a=a, b=b: a @ b
        if device == "cpu":
            x = torch.randn(8, 256, 32, 32).to(dtype, memory_format=torch.channels_last)
            w = torch.randn(256, 256, 3, 3).to(dtype, memory_format=torch.channels_last)
            functions[f"{name} convolution"] = lambda x=x, w=w: F.conv2d(x, w, padding=1)
    timings = measure(functions, device)
    rates = {name: 2 * side**3 / timings[name].best for name in ("fp32", "bf16") if name in timings}
    for name in rates:
        if (convolution := timings.get(f"{name} convolution")) is not None:
            rates[name] = max(rates[name], 2 * 8 * 256 * 32 * 32 * 256 * 9 / convolution.best)
    found = {"copy_bytes_per_s": 2 * size / timings["copy"].best, "matmul_flops_per_s": next(iter(rates.values()))}
    if device == "cpu":
        found |= {f"matmul_{name}_flops_per_s": rate for name, rate in rates.items()}
    return found


def kernel_shares(run: Callable[[], Any], count: int) -> list[tuple[str, float]]:
    """(kernel, share of the GPU's time) of one run, the `count` largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profile.key_averages():
        times[event.key[:60]] += event.self_device_time_total
    total = sum(times.values()) or 1.0
    return [(name, time / total) for name, time in times.most_common(count)]


# ---- one case ------------------------------------------------------------------------------------------------------


def check(case: Case, rivals: dict[str, Callable[[], Tensor]]) -> tuple[float, float, Tensor]:
    """Relative RMS error of the case, what is allowed (4 eps and twice the worst rival's error), and the result."""
    expected = case.oracle()
    part = tuple(slice(size) for size in expected.shape)
    actual = case.run()[part]
    allowed = 4 * torch.finfo(actual.dtype).eps
    if rivals:
        allowed += 2 * max(rel_rms(rival()[part], expected) for rival in rivals.values())
    return rel_rms(actual, expected), allowed, actual


def report(
    op: str, case: Case, site: Site, bounds: dict[str, float], vs: set[str], emit: Callable[[dict], None]
) -> bool:
    """Check, time and print one case; `emit` takes its rows. A wrong result is reported, not timed, and gives False."""
    rivals = _rivals(op, case, site, vs)
    error, allowed, actual = check(case, rivals)
    row = {"bench": "ops", "op": op, "case": case.name, "device": site.device, "dtype": str(actual.dtype)}
    row |= {"error": error, "flops": case.cost.flops, "bytes": case.cost.bytes}
    is_correct = error <= allowed
    if not is_correct or site.size == "smoke":
        told = "correct" if is_correct else "WRONG"
        print(f"{op} {case.name}: {told}, relative RMS error {error:.2e}, allowed {allowed:.2e}; not timed", flush=True)
        emit({**row, "correct": is_correct, "smoke": site.size == "smoke"})
        return is_correct
    bound = case.cost.seconds(bounds["matmul_flops_per_s"], bounds["copy_bytes_per_s"])
    ours = "pylumiere" if site.runs_kernels or op == "layers" else "reference"
    try:
        timings = measure({ours: case.run, **rivals}, site.device)
    except RuntimeError as error:  # a rival that runs, but not in a captured graph
        print(f"{op} {case.name}: rivals left out, {str(error).strip().splitlines()[0][:100]}", flush=True)
        timings = measure({ours: case.run}, site.device)
    for provider, timing in timings.items():
        seconds = timing.median
        print(
            f"{op} {case.name} {provider:12} {1e6 * seconds:9.1f} us +- {1e6 * timing.spread:.1f} | "
            f"{case.cost.flops / seconds / 1e12:6.3g} TFLOP/s | {case.cost.bytes / seconds / 1e9:7.4g} GB/s | "
            f"{100 * bound / seconds:5.1f} % of the bound | {seconds / timings[ours].median:5.2f} x {ours}",
            flush=True,
        )
        measured = {"provider": provider, "seconds": timing.median, "spread": timing.spread, "bound": bound}
        emit({**row, **measured, **bounds, "correct": True})
    return True


def _rivals(op: str, case: Case, site: Site, vs: set[str]) -> dict[str, Callable[[], Tensor]]:
    """The rivals that are wanted and can run; one that cannot is named, with the reason."""
    wanted = {name: r for name, r in case.rivals.items() if ("diffusers" if name == "diffusers" else "eager") in vs}
    source = case.compiled or case.rivals.get("eager")
    if "compile" in vs and source is not None and site.size != "smoke":
        torch._dynamo.reset()  # its limit of recompilations is per function, and shapes are many
        wanted["compile"] = torch.compile(source)
    found = {}
    for name, rival in wanted.items():
        try:
            rival()
        except RuntimeError as error:  # out of memory, no such attention backend, a compiler that is missing
            print(f"{op} {case.name} {name}: cannot run, {str(error).strip().splitlines()[0][:100]}", flush=True)
        else:
            found[name] = rival
    return found


# ---- tiles ---------------------------------------------------------------------------------------------------------


def tune(table: str, case: Case, site: Site, path: Path | None) -> None:
    """Time a case with each candidate tile and print the best three as rows for kernels/tuning.py."""
    arch = launching.arch_of(torch.empty(0, device=site.device))
    candidates = candidates_of(table, arch)
    if site.size == "smoke":
        candidates = itertools.islice(candidates, 2)
    timed: list[tuple[float, tuning.Config]] = []
    kept = tuning.TABLE[table]
    try:
        for config in candidates:
            tuning.TABLE[table] = {arch: [tuning.Row(config)]}
            try:
                error, allowed, _ = check(case, {})
                seconds = measure({"run": case.run}, site.device, repeats=5 if site.device == "cuda" else 2)["run"]
            except Exception as error:  # whatever the compiler or the driver refuses is no candidate
                print(f"{table} {case.name} {config.constants}: {type(error).__name__}", flush=True)
                continue
            if error <= 4 * allowed:  # sums of thousands of products, without a rival to say what is usual
                timed.append((seconds.median, config))
            else:
                print(f"{table} {case.name} {config.constants}: WRONG, error {error:.2e}", flush=True)
    finally:
        tuning.TABLE[table] = kept
    name = torch.cuda.get_device_name() if site.device == "cuda" else "interpreter"
    for seconds, config in sorted(timed, key=lambda pair: pair[0])[:3]:
        note = f"{name}, {datetime.date.today()}, {case.name}, {1e6 * seconds:.0f} us"
        row = f"Row(Config({config.constants}, {config.num_warps}, {config.num_stages}, {note!r}))"
        print(f"{table} sm {arch}: {row}", flush=True)
        if path:
            append_row(path, {"op": table, "case": case.name, "arch": arch, "row": row, "seconds": seconds})


def candidates_of(table: str, arch: int) -> Iterator[tuning.Config]:
    """Tiles worth timing, small first."""
    if table in ("spatial_conv", "temporal_conv"):
        limit = tuning.SHARED_MEMORY.get(arch, 2**30)
        sizes = ((64, 128, 256), (16, 64, 128, 256), (32, 64), (4, 8), (2, 3, 4))
        for m, o, c, warps, stages in itertools.product(*sizes):
            if stages * (m + o) * c * 2 <= limit and m * o <= 128 * 256:
                yield tuning.Config({"BLOCK_M": m, "BLOCK_O": o, "BLOCK_C": c}, warps, stages)
    elif table == "factorized_conv":
        for pixels, c, frames, warps in itertools.product((64, 128), (16, 32, 64), (8, 16, 32), (4, 8)):
            yield tuning.Config({"BLOCK_P": pixels, "BLOCK_C": c, "FRAMES": frames}, warps, 2)
    elif table == "temporal_attention":
        for block, matrix, warps in itertools.product((16, 32, 64, 128), (True, False), (4, 8)):
            yield tuning.Config({"BLOCK_M": block, "MATRIX": matrix}, warps, 1)
    elif table == "layer_norm":
        for s, warps in itertools.product((1, 2, 4, 8, 16), (2, 4, 8)):
            yield tuning.Config({"BLOCK_S": s}, warps, 1)
    elif table == "denoise_step":
        for block, warps in itertools.product((512, 1024, 2048, 4096), (4, 8)):
            yield tuning.Config({"BLOCK": block}, warps, 1)
    else:
        for s, c, warps in itertools.product((16, 32, 64, 128, 256), (32, 64, 128), (4, 8)):
            if 2**11 <= s * c <= 2**14:
                yield tuning.Config({"BLOCK_S": s, "BLOCK_C": c}, warps, 1)
