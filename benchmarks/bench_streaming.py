"""Streaming: bounded memory, early first frame, the CPU step against copy bandwidth, the scheduler's rate.

Run: python benchmarks/bench_streaming.py --json benchmarks/results/streaming.jsonl [--plot docs/images/first_frame.png]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _record import append_row

from pylumiere import _runtime
from pylumiere.windows import WindowPlan, memory_bytes, sample_clip

WINDOW, OVERLAP = 8, 2


@dataclass
class Table:
    timesteps: np.ndarray
    coef: np.ndarray
    init_sigma: float = 1.0
    init_alpha: float = 0.0


def table(steps: int, *, multistep: bool = True) -> Table:
    coef = np.tile([0.5, 0.5, 0.6, 0.4, -0.1 if multistep else 0.0, 0.0], (steps, 1))
    coef[0, 4] = 0
    coef[-1] = 0.5, 0.5, 0, 1, 0, 0
    return Table(np.arange(steps, dtype=np.float32), coef)


def peak_memory() -> int:
    """Largest resident size of this program, in bytes. (getrusage would count the parent's memory before exec.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def bounded(num_frames: int, steps: int, side: int) -> dict:
    """Peak memory over the level before the clip, in this process: call it in a fresh one."""
    shape = (side, side, 3)
    plan = WindowPlan(num_frames, WINDOW, OVERLAP)
    out = np.empty((1, 1, plan.call_frames, *shape), np.float32)

    def denoise(x, timesteps, windows, frames):
        return np.multiply(x[None], np.float32(0.5), out=out)

    before = peak_memory()
    start = time.perf_counter()
    done = 0
    for _, frames in sample_clip(
        denoise, num_frames=num_frames, frame_shape=shape, table=table(steps), plan=plan, seed=1, stage=1
    ):
        done += len(frames)
    seconds = time.perf_counter() - start
    peak = peak_memory()
    if done != num_frames:
        raise RuntimeError(f"{done} of {num_frames} frames came out")
    return {
        "frames": num_frames,
        "steps": steps,
        "side": side,
        "peak_bytes": peak,
        "growth_bytes": peak - before,
        "formula_bytes": memory_bytes(plan, frame_shape=shape, steps=steps, multistep=True),
        "ms_per_frame": 1e3 * seconds / num_frames,
    }


def first_frame(steps: int, windows: int, capacity: int) -> dict:
    """Denoiser evaluations and time before the first final frame; the cheap denoiser's own time is nearly nothing."""
    plan = WindowPlan(WINDOW + (WINDOW - OVERLAP) * (windows - 1), WINDOW, OVERLAP)
    evaluations = 0

    def denoise(x, *_):
        nonlocal evaluations
        evaluations += len(x)
        return x[None]

    start = time.perf_counter()
    chunks = sample_clip(
        denoise,
        num_frames=plan.num_frames,
        frame_shape=(8, 8, 3),
        table=table(steps),
        plan=plan,
        seed=1,
        stage=1,
        capacity=capacity,
    )
    next(chunks)
    seconds = time.perf_counter() - start
    chunks.close()
    # Step by step, the last step's first call ends the first frames: all calls of the steps before, and one.
    step_by_step = ((steps - 1) * math.ceil(windows / capacity) + 1) * capacity
    return {
        "steps": steps,
        "windows": windows,
        "capacity": capacity,
        "evaluations": evaluations,
        "step_by_step": step_by_step,
        "times_earlier": step_by_step / evaluations,
        "overhead_ms": 1e3 * seconds,
    }


def scheduler(capacity: int, num_windows: int = 20000, steps: int = 8) -> dict:
    plan = WindowPlan(WINDOW + (WINDOW - OVERLAP) * (num_windows - 1), WINDOW, OVERLAP)
    wavefront = _runtime.Wavefront()
    clip = wavefront.add_clip(plan, steps, capacity)
    tasks = 0
    start = time.thread_time()  # the processor's time: other work on the machine does not count
    while not wavefront.is_finished(clip):
        tasks += len(wavefront.next(capacity)[0])
        wavefront.complete(plan.max_writers)
        wavefront.release(clip, wavefront.final_end(clip) - wavefront.released(clip))
    seconds = time.thread_time() - start
    return {"capacity": capacity, "tasks": tasks, "tasks_per_second": tasks / seconds}


def best_seconds(functions: list, repeats: int) -> list[float]:
    """The fastest call of each, taken in turn, so that a busy machine slows all of them alike."""
    best = [math.inf] * len(functions)
    for _ in range(repeats):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def fused_step(threads: int, side: int, outputs: int, windows: int, noise: bool, repeats: int) -> dict:
    import torch
    from pylumiere.kernels import denoise_step

    torch.set_num_threads(threads)
    frames, values = 8, side * side * 3
    rng = np.random.default_rng(0)
    x, x0 = (rng.standard_normal((frames, values), np.float32) for _ in range(2))
    out = rng.standard_normal((outputs, frames * windows, values), np.float32)
    rows = np.arange(frames * windows, dtype=np.int32).reshape(frames, windows)
    weights = np.full((frames, windows), 1 / windows, np.float32)
    coef = np.tile(np.array([0.5, 0.5, 0.6, 0.4, -0.1, 0.1 if noise else 0, 2, 1, 1, 1], np.float32), (frames, 1))
    key = np.zeros((frames, 5), np.int64)
    pool = _runtime.ThreadPool(threads)
    args = [torch.from_numpy(a) for a in (x, x0, out, rows, weights, coef, key)]
    expected = denoise_step.reference(*args)
    result = np.empty_like(x), np.empty_like(x)
    _runtime.denoise_step(x, x0, out, rows, weights, coef, key, *result, pool)
    if not all(np.array_equal(have, want.numpy()) for have, want in zip(result, expected, strict=True)):
        raise RuntimeError("the step does not equal its reference")
    target, source = (np.full(64 << 20, value, np.uint8) for value in (1, 2))
    seconds, copying, eager = best_seconds(
        [
            lambda: _runtime.denoise_step(
                x, x0, out, rows, weights, coef, key, x, x0, pool
            ),  # in place, as the runtime runs it
            lambda: torch.from_numpy(target).copy_(torch.from_numpy(source)),
            lambda: denoise_step.reference(*args),
        ],
        repeats,
    )
    copy = 2 * len(source) / copying
    moved = 4 * frames * values * (2 + 2 + outputs * windows)
    return {
        "threads": threads,
        "side": side,
        "outputs": outputs,
        "windows": windows,
        "noise": noise,
        "instruction_set": _runtime.instruction_set(),
        "seconds": seconds,
        "gb_per_second": moved / seconds / 1e9,
        "copy_gb_per_second": copy / 1e9,
        "of_copy": moved / seconds / copy,
        "times_eager": eager / seconds,
    }


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    steps = sorted({row["steps"] for row in rows})
    for colour, count in enumerate(steps):
        some = [row for row in rows if row["steps"] == count and row["capacity"] == 1]
        x = [row["windows"] for row in some]
        axes.plot(x, [row["evaluations"] for row in some], f"C{colour}-", label=f"{count} steps, wavefront")
        axes.plot(x, [row["step_by_step"] for row in some], f"C{colour}--", label=f"{count} steps, step by step")
    axes.set(
        xscale="log", yscale="log", xlabel="windows in the clip", ylabel="evaluations before the first final frame"
    )
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG of the evaluations before the first frame")
    parser.add_argument("--smoke", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--bounded", type=int, help=argparse.SUPPRESS)  # one measurement, in this process
    options = parser.parse_args()
    side = 32 if options.smoke else 128
    if options.bounded:
        print(json.dumps(bounded(options.bounded, 8, side)))
        return 0

    def record(kind: str, row: dict) -> dict:
        print(f"{kind:12}", ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
        if options.json and not options.smoke:
            append_row(options.json, {"bench": "streaming", "kind": kind, **row})
        return row

    peaks = []
    for num_frames in (80, 160) if options.smoke else (80, 800, 8000):
        command = [sys.executable, __file__, "--bounded", str(num_frames)] + ["--smoke"] * options.smoke
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(record("bounded", json.loads(done.stdout))["peak_bytes"])
    print(f"largest peak / smallest peak: {max(peaks) / min(peaks):.3f}")
    rows = [
        record("first_frame", first_frame(steps, windows, capacity))
        for steps in ((4, 8) if options.smoke else (4, 8, 20, 50))
        for windows in ((13,) if options.smoke else (13, 50, 130, 400, 1000))
        for capacity in (1, 8, 16)
    ]
    for capacity in (1, 16):
        record("scheduler", scheduler(capacity, 500 if options.smoke else 20000))
    threads = _runtime.default_num_threads()
    for count in sorted({1, threads}):
        for outputs, windows, noise in ((1, 1, False), (2, 1, False), (2, 2, False), (1, 1, True)):
            record(
                "fused_step",
                fused_step(count, 64 if options.smoke else 1024, outputs, windows, noise, 3 if options.smoke else 15),
            )
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
