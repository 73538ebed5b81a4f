"""A whole clip of a large model with random weights, through the engine: seconds, clips an hour, peak memory, profile.

Run on a GPU: python benchmarks/bench_clip.py --model stunet-l --steps 50 8 --json rows.jsonl
Without one: --smoke, the tiny model on the CPU. Random weights take the time of trained ones; the pictures are noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch
from _record import append_row

PROMPT = "a red circle moves right over grass"


def make_engine(model: str, device: str, precision: str):
    """The preset with random weights and an encoder that needs no files."""
    from pylumiere.backends import choose
    from pylumiere.bench.samples import random_weights
    from pylumiere.checkpoints.native import Checkpoint
    from pylumiere.engine import Engine
    from pylumiere.networks.stunet.presets import model_preset

    config = dataclasses.replace(model_preset(model), text_encoder="hash")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    weights = {
        stage: {name: value.to(dtype) for name, value in random_weights(network, seed=seed).items()}
        for seed, (stage, network) in enumerate(config.networks.items())
    }
    return Engine(Checkpoint(Path(model), config, weights), choose(device=device, precision=precision))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stunet-l")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 8], help="of the first stage, a clip each")
    parser.add_argument("--clips", type=int, default=1, help="after a short one that warms up")
    parser.add_argument("--smoke", action="store_true", help="the tiny model, on any device")
    parser.add_argument("--json", type=Path, help="append rows here")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        print("no GPU. Without one only --smoke runs.", file=sys.stderr)
        return 2
    model, steps = ("tiny", [2]) if options.smoke else (options.model, options.steps)
    precision = "fp32" if options.smoke and device == "cpu" else "auto"

    from pylumiere.bench.harness import kernel_shares
    from pylumiere.bench.plan import CHIPS, plan_clip

    engine = make_engine(model, device, precision)
    warm_up = engine.warm_up([{}])
    facts = engine.info()
    size = f"{facts['parameters'] / 1e9:.2f} G parameters"
    print(f"{model}: {size}, {facts['reason']}, warm in {warm_up:.1f} s", flush=True)
    with engine:
        for count in steps:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = []
            for seed in range(options.clips):
                begun = time.perf_counter()
                frames = engine.generate(PROMPT, seed=seed, num_inference_steps=count).frames
                seconds.append(time.perf_counter() - begun)
            if options.smoke:
                print(f"{model}: a clip {list(frames.shape)}; not timed")
                continue
            best = min(seconds)
            plan = plan_clip(model, steps=count)
            row = {
                "bench": "clip", "model": model, "device": device, "steps": count, "shape": list(frames.shape),
                "seconds": best, "clips_per_hour": 3600 / best, "flops": plan.flops, "warm_up_seconds": warm_up,
                "flops_per_s": plan.flops / best,
            }  # fmt: skip
            if device == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
                bound = sum(plan.seconds(CHIPS["h200"]).values())
                row["bound_by_data_sheet"] = bound if "H200" in torch.cuda.get_device_name() else None
            print(
                f"{model}, {count} steps: {best:.2f} s, {3600 / best:.0f} clips an hour, "
                f"{plan.flops / 1e15:.2f} PFLOP, {plan.flops / best / 1e12:.0f} TFLOP/s", flush=True,
            )  # fmt: skip
            if options.json:
                append_row(options.json, row)
        if device == "cuda" and not options.smoke:
            for kernel, share in kernel_shares(
                lambda: engine.generate(PROMPT, seed=0, num_inference_steps=min(steps)), 15
            ):
                print(f"{100 * share:5.1f} % {kernel}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
