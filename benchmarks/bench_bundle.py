"""A bundle's graphs through ONNX Runtime beside PyTorch: how far apart, and how fast. For example:

    pylumiere export --model demo -o demo.plm
    python benchmarks/bench_bundle.py demo.plm --json benchmarks/results/bundle.jsonl

Errors are stated on the networks' outputs first, since a clip hides or enlarges them. Then clips of one seed are
compared, beside two differences that are known: another seed, and bf16 instead of fp32. Speed is of single calls, the
providers in turn, so that a change of the machine's load meets all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from _record import append_row

import pylumiere
from pylumiere.bench.compare import rel_rms
from pylumiere.bench.networks import make_operands
from pylumiere.loading import load_model, make_backend

PROMPT = "a red circle moves right over grass"


def compare_outputs(backends: dict, config, stage: str) -> dict:
    """ONNX Runtime and bf16, each against eager fp32 on one call of the network's own size."""
    given = make_operands(config, stage, rows=1)
    expected = backends["torch fp32"].predict(stage, *given)
    actual = backends["onnxruntime fp32"].predict(stage, *given)
    half = backends["torch bf16"].predict(stage, *given)
    return {
        "kind": "outputs", "stage": stage, "shape": list(given[0].shape), "rel_rms": rel_rms(actual, expected),
        "max_abs": (actual - expected).abs().max().item(), "bf16_rel_rms": rel_rms(half, expected),
    }  # fmt: skip


def compare_clips(bundle: str, model: str, seed: int, steps: int | None, frames: int | None) -> dict:
    """One seed through ONNX Runtime from the bundle and through PyTorch from the checkpoint; and the two yardsticks."""
    fields = dict(num_inference_steps=steps, num_frames=frames, output_type="float")
    fields = {name: value for name, value in fields.items() if value is not None}

    def clip(source: str, backend: str, precision: str, seed: int) -> np.ndarray:
        with pylumiere.Engine.load(source, backend=backend, precision=precision, device="cpu") as engine:
            return engine.generate(PROMPT, seed=seed, **fields).frames

    expected = clip(model, "torch", "fp32", seed)
    others = {
        "onnxruntime": clip(bundle, "onnxruntime", "fp32", seed),
        "bf16": clip(model, "torch", "bf16", seed),
        "another_seed": clip(model, "torch", "fp32", seed + 1),
    }
    row = {"kind": "frames", "prompt": PROMPT, "seed": seed, "steps": steps, "shape": list(expected.shape)}
    for name, frames_of in others.items():
        difference = frames_of.astype(np.float64) - expected
        row[name] = {
            "mean_abs": float(np.abs(difference).mean()), "max_abs": float(np.abs(difference).max()),
            "psnr_db": float(-10 * np.log10(np.square(difference).mean())),
            "pixels_that_differ": float((np.rint(frames_of * 255) != np.rint(expected * 255)).mean()),
        }  # fmt: skip
    return row


def time_calls(backends: dict, config, stage: str, threads: int, rounds: int) -> dict:
    """Seconds of a call of one row; the providers in turn, the first round dropped."""
    given, seconds = make_operands(config, stage, rows=1), {name: [] for name in backends}
    for number in range(rounds + 1):
        for name, backend in backends.items():
            begun = time.perf_counter()
            backend.predict(stage, *given, num_threads=threads)
            if number:
                seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    spreads = {name: max(values) - min(values) for name, values in seconds.items()}
    return {
        "kind": "speed", "stage": stage, "shape": list(given[0].shape), "call_threads": threads, "rounds": rounds,
        "seconds": medians, "range": spreads, "onnxruntime_times_torch_fp32":
        medians["torch fp32"] / medians["onnxruntime fp32"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--model", default="demo", help="the checkpoint that the bundle was made of")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, help="of the first stage; the model's own if not given")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=["outputs", "frames", "speed"], nargs="+")
    parser.add_argument("--json", type=Path, help="append rows here")
    options = parser.parse_args()
    parts = options.only or ["outputs", "frames", "speed"]
    rows = []
    if {"outputs", "speed"} & set(parts):
        backends = {
            "onnxruntime fp32": make_backend(*load_model(options.bundle, "onnxruntime", "cpu", "fp32")),
            "torch fp32": make_backend(*load_model(options.model, "torch", "cpu", "fp32")),
            "torch bf16": make_backend(*load_model(options.model, "torch", "cpu", "bf16")),
        }
        config = load_model(options.bundle, "torch", "cpu", "fp32")[0].config
        stages = [stage.name for stage in config.stages]
        rows += [compare_outputs(backends, config, stage) for stage in stages]
        if any(row["rel_rms"] > 1e-4 for row in rows):
            print(f"wrong outputs, nothing was timed: {rows}", file=sys.stderr)
            return 1
        if "speed" in parts:
            rows += [time_calls(backends, config, s, n, options.rounds) for s in stages for n in options.threads]
    if "frames" in parts:
        rows.append(compare_clips(options.bundle, options.model, options.seed, options.steps, options.frames))
    import onnxruntime

    for row in rows:
        if row["kind"] in parts:
            row = {"bench": "bundle", **row, "onnxruntime_version": onnxruntime.__version__}
            print(row, flush=True)
            if options.json:
                append_row(options.json, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
