"""Streaming: bounded memory, early first frame, seams, the CPU step against copy bandwidth, the scheduler's rate.

Run: python benchmarks/bench_streaming.py [PART ...] --json benchmarks/results/streaming.jsonl --images docs/images
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _record import append_row

from pylumiere import _runtime
from pylumiere.diffusion.windows import WindowPlan, memory_bytes, sample_clip
from pylumiere.media.pixels import to_uint8
from pylumiere.scheduling.memory import peak_resident_bytes

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


def bounded(num_frames: int, steps: int, side: int) -> dict:
    """Peak memory over the level before the clip, in this process: call it in a fresh one."""
    shape = (side, side, 3)
    plan = WindowPlan(num_frames, WINDOW, OVERLAP)
    out = np.empty((1, 1, plan.call_frames, *shape), np.float32)

    def denoise(x, timesteps, windows, frames):
        return np.multiply(x[None], np.float32(0.5), out=out)

    before = peak_resident_bytes()
    start = time.perf_counter()
    done = 0
    for _, frames in sample_clip(
        denoise, num_frames=num_frames, frame_shape=shape, table=table(steps), plan=plan, seed=1, stage=1
    ):
        done += len(frames)
    seconds = time.perf_counter() - start
    peak = peak_resident_bytes()
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


def fused_step(
    threads: int, side: int, outputs: int, windows: int, multistep: bool, noise: bool, repeats: int
) -> dict:
    """Bytes are the fewest: each input read once, each result (x and x0) written once."""
    import torch
    from pylumiere.kernels import denoise_step

    torch.set_num_threads(threads)
    frames, values = 8, side * side * 3
    rng = np.random.default_rng(0)
    x, x0 = (rng.standard_normal((frames, values), np.float32) for _ in range(2))
    out = rng.standard_normal((outputs, frames * windows, values), np.float32)
    rows = np.arange(frames * windows, dtype=np.int32).reshape(frames, windows)
    weights = np.full((frames, windows), 1 / windows, np.float32)
    row = [0.5, 0.5, 0.6, 0.4, -0.1 if multistep else 0, 0.1 if noise else 0, 2, 1, 1, 1]
    coef = np.tile(np.array(row, np.float32), (frames, 1))
    key = np.zeros((frames, 5), np.int64)
    pool = _runtime.ThreadPool(threads)
    args = [torch.from_numpy(a) for a in (x, x0, out, rows, weights, coef, key)]
    expected = denoise_step.reference(*args)
    result = np.empty_like(x), np.empty_like(x)
    _runtime.denoise_step(x, x0, out, rows, weights, coef, key, *result, pool)
    if not all(np.array_equal(have, want.numpy()) for have, want in zip(result, expected, strict=True)):
        raise RuntimeError("the step does not equal its reference")
    target, source = (np.full(64 << 20, value, np.uint8) for value in (1, 2))
    seconds, copying = best_seconds(
        [
            lambda: _runtime.denoise_step(
                x, x0, out, rows, weights, coef, key, x, x0, pool
            ),  # in place, as the runtime runs it
            lambda: torch.from_numpy(target).copy_(torch.from_numpy(source)),
        ],
        repeats,
    )
    (eager,) = best_seconds([lambda: denoise_step.reference(*args)], 2)
    copy = 2 * len(source) / copying
    # The step always stores x0; it reads the one before only where the sampler asks for it.
    moved = 4 * frames * values * (1 + multistep + outputs * windows + 2)
    return {
        "threads": threads,
        "side": side,
        "outputs": outputs,
        "windows": windows,
        "multistep": multistep,
        "noise": noise,
        "bytes_per_value": moved // (frames * values),
        "ns_per_value": 1e9 * seconds / (frames * values),
        "instruction_set": _runtime.instruction_set(),
        "seconds": seconds,
        "gb_per_second": moved / seconds / 1e9,
        "copy_gb_per_second": copy / 1e9,
        "of_copy": moved / seconds / copy,
        "times_eager": eager / seconds,
    }


CLIPS = (
    ("red circle", "right", "grass"), ("blue ring", "up", "white"), ("dog_face", "grow", "desert"),
    ("car", "left", "sunset"), ("green square", "bounce", "black"), ("frog", "still", "night"),
)  # fmt: skip


def rendered_clips(num_frames: int, side: int) -> Iterator[tuple[str, np.ndarray]]:
    """Drawn clips uint8 [T, side, side, 3] of one object each, with their captions."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train_demo"))
    import data
    import torch

    renderer, rng = data.Renderer(), np.random.default_rng(0)
    for triple in CLIPS:
        frames = renderer.render(data.sample_scene(triple, rng), side, torch.arange(num_frames))
        yield data.caption(triple), to_uint8(frames.numpy())


def seams(num_frames: int, side: int, steps: int, seeds: int) -> list[dict]:
    """Change from frame to frame where windows meet, and elsewhere, on the demo's SSR with its own window weights.

    Windows meet between two frames that are not made of the same windows with the same weights. Averaging off: windows
    side by side, overlap 0.
    """
    from pylumiere import Engine

    rows, engine = [], Engine.load("demo")
    weights = engine.config.last.windows.weights
    for overlap in (OVERLAP, 0):
        plan = WindowPlan(num_frames, WINDOW, overlap, weights=weights)
        made_of = [(list(plan.writers(t)), list(plan.weights(t))) for t in range(num_frames)]
        border = np.array([made_of[t] != made_of[t + 1] for t in range(num_frames - 1)])
        changes = []
        for caption, low in rendered_clips(num_frames, side):
            for seed in range(seeds):
                stream = engine.upscale(
                    low, num_frames=num_frames, seed=seed, num_inference_steps=steps, window_frames=WINDOW,
                    window_overlap=overlap, output_type="float",
                )  # fmt: skip
                changes.append(np.abs(np.diff(stream.collect().frames, axis=0)).mean((1, 2, 3)))
                rows.append({"clip": caption, "seed": seed, **_ratio(changes[-1], border)})
        mean = np.mean(changes, 0)
        rows.append({"clip": "mean of all", "seed": None, **_ratio(mean, border), "changes": mean.round(6).tolist()})
        for row in rows:
            row.setdefault("overlap", overlap)
            row.setdefault("weights", weights)
    return rows


def _ratio(change: np.ndarray, border: np.ndarray) -> dict:
    at, inside = float(change[border].mean()), float(change[~border].mean())
    return {"at_borders": at, "inside": inside, "ratio": at / inside}


def upscaled(num_frames: int, side: int, steps: int) -> dict:
    """`pylumiere upscale` from an mp4 to an mp4 with the demo's SSR, in this process: call it in a fresh one.

    The formula counts the frame states; reader, network, encoder and libraries are in the peak too.
    """
    import contextlib
    import io
    import tempfile

    from pylumiere.cli import main
    from pylumiere.media.writers import VideoWriter

    with tempfile.TemporaryDirectory() as folder:
        source = str(Path(folder, "in.mp4"))
        ramp = np.add.outer(np.arange(side), np.arange(side))[..., None] * np.array([1, 2, 3])
        with VideoWriter(source, 16) as writer:
            for index in range(num_frames):
                writer.write(((ramp + 4 * index) % 256).astype(np.uint8))
        printed = io.StringIO()
        start = time.perf_counter()
        with contextlib.redirect_stdout(printed):
            code = main(["upscale", source, "-o", str(Path(folder, "out.mp4")), "--steps", str(steps), "--json"])
        seconds = time.perf_counter() - start
        facts = json.loads(printed.getvalue())
        if code or facts["num_frames"] != num_frames:
            raise RuntimeError(f"exit code {code}, {facts['num_frames']} of {num_frames} frames")
    plan = WindowPlan(num_frames, WINDOW, OVERLAP)
    shape = (facts["height"], facts["width"], 3)
    return {
        "frames": num_frames,
        "steps": steps,
        "side": side,
        "peak_bytes": peak_resident_bytes(),
        "formula_bytes": memory_bytes(plan, frame_shape=shape, steps=steps, capacity=2, multistep=True),
        "ms_per_frame": 1e3 * (seconds - facts["seconds"]["load"]) / num_frames,
    }


def plot_seams(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    for row in sorted((row for row in rows if "changes" in row), key=lambda row: row["overlap"]):
        name = f"averaging, overlap {row['overlap']}, {row['weights']}" if row["overlap"] else "windows side by side"
        axes.plot(row["changes"], label=f"{name}: borders {row['ratio']:.2f} x inside", lw=1.2)
    axes.set(xlabel="frame", ylabel="mean |change| to the next frame", ylim=(0, None))
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


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


STEP_FORMS = {  # outputs, windows, multistep, noise
    "plain": (1, 1, False, False),
    "multistep": (1, 1, True, False),
    "guided": (2, 1, True, False),
    "two windows": (1, 2, True, False),
    "guided, two windows": (2, 2, True, False),
    "noise": (1, 1, False, True),
}
PARTS = ("bounded", "upscale", "first_frame", "scheduler", "fused_step", "seams")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--images", type=Path, help="folder for first_frame.png and seams.png")
    parser.add_argument("--smoke", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # one measurement of memory, in this process
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(PARTS)}")
    smoke = options.smoke
    memory = {"bounded": (bounded, 8, 32 if smoke else 128), "upscale": (upscaled, 2, 16)}
    if options.child:
        part, num_frames = options.child
        function, steps, side = memory[part]
        values = {"num_frames": int(num_frames), "side": side, "steps": steps}
        print(json.dumps(function(**values)))
        return 0

    def record(kind: str, row: dict) -> dict:
        shown = {key: value for key, value in row.items() if not isinstance(value, list)}
        print(f"{kind:12}", ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()))
        if options.json and not smoke:
            append_row(options.json, {"bench": "streaming", "kind": kind, **row})
        return row

    parts = options.parts or PARTS
    for part in memory.keys() & set(parts):
        peaks = []
        for num_frames in (80, 160) if smoke else (80, 800, 8000):
            command = [sys.executable, __file__, "--child", part, str(num_frames)] + ["--smoke"] * smoke
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            peaks.append(record(part, json.loads(done.stdout))["peak_bytes"])
        print(f"{part}: largest peak / smallest peak: {max(peaks) / min(peaks):.3f}")
    if "first_frame" in parts:
        rows = [
            record("first_frame", first_frame(steps, windows, capacity))
            for steps in ((4, 8) if smoke else (4, 8, 20, 50))
            for windows in ((13,) if smoke else (13, 50, 130, 400, 1000))
            for capacity in (1, 8, 16)
        ]
        if options.images:
            plot(rows, options.images / "first_frame.png")
    if "scheduler" in parts:
        for capacity in (1, 16):
            record("scheduler", scheduler(capacity, 500 if smoke else 20000))
    if "fused_step" in parts:
        for form, values in STEP_FORMS.items():
            threads = _runtime.default_num_threads()
            measured = fused_step(threads, 64 if smoke else 1024, *values, 3 if smoke else 15)
            record("fused_step", {"form": form, **measured})
    if "seams" in parts:
        rows = [record("seams", row) for row in (seams(20, 8, 1, 1) if smoke else seams(80, 32, 8, 1))]
        if options.images:
            plot_seams(rows, options.images / "seams.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
