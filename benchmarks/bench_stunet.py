"""Forward pass of a network on the Triton kernels, CUDA-graphed, against eager and torch.compile.

Run: python benchmarks/bench_stunet.py --network stunet-l --json rows.jsonl
The share of each kernel is printed from the profiler. Without a GPU: TRITON_INTERPRET=1 ... --smoke.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from _bench import measure, measure_device
from _record import append_row
from pylumiere.kernels import launching

from pylumiere.backends.triton import set_backend
from pylumiere.config import STUNetConfig, stage_preset
from pylumiere.model import STUNet
from pylumiere.testing import random_weights, rel_rms


def make(config: STUNetConfig, backend: str, dtype: torch.dtype, device: str) -> STUNet:
    with torch.device("meta"):
        model = STUNet(config)
    model.load_state_dict(random_weights(config, seed=0), assign=True)
    model = model.to(device, dtype).eval().requires_grad_(False)
    if backend == "torch":
        set_backend(model, "triton")  # for its channels-last weights, which eager's convolutions want too
    return set_backend(model, backend)


def make_inputs(config: STUNetConfig, device: str) -> dict[str, torch.Tensor]:
    sizes = (1, config.num_frames, config.height, config.width, config.in_channels)
    values = {"sample": torch.randn(sizes), "timesteps": torch.tensor([500.0])}
    if config.text_dim:
        values["text"], values["text_mask"] = torch.randn(1, 77, config.text_dim), torch.ones(1, 77, dtype=torch.bool)
    if config.noise_level:
        values["noise_level"] = torch.tensor([0.1])
    return {name: value.to(device) for name, value in values.items()}


def kernel_shares(model: STUNet, values: dict[str, torch.Tensor]) -> list[tuple[str, float]]:
    """(kernel, share of the GPU's time), largest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        model(**values)
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profile.key_averages():
        times[event.key[:60]] += event.self_device_time_total
    total = sum(times.values())
    return [(name, time / total) for name, time in times.most_common(12)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="stunet-l")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, checked but not timed")
    parser.add_argument("--compile", choices=("off", "default", "max-autotune"), default="default")
    parser.add_argument("--json", type=Path, help="append rows here")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not (options.smoke and launching.interpreted()):
        print("no GPU. Without one only `TRITON_INTERPRET=1 ... --smoke` runs.", file=sys.stderr)
        return 2
    name = "tiny-ssr" if options.smoke else options.network
    dtype = torch.float32 if options.smoke else torch.bfloat16
    config = stage_preset(name).network
    values = make_inputs(config, device)
    with torch.inference_mode():
        model, plain = make(config, "triton", dtype, device), make(config, "torch", dtype, device)
        ours, eager = model(**values), plain(**values)
        difference = rel_rms(ours, eager)
        row = {"op": "forward", "case": name, "dtype": str(dtype), "difference_from_eager": difference}
        allowed = 1e-4 if dtype == torch.float32 else 0.1  # two roundings in bf16 through a hundred random layers
        if difference > allowed:
            print(f"{name}: WRONG, relative RMS difference from eager {difference:.2e}; not timed")
            return 1
        if options.smoke:
            print(f"{name}: equals eager to {difference:.2e}; not timed")
            return 0
        providers = {"pylumiere": lambda: model(**values), "eager": lambda: plain(**values)}
        if options.compile != "off":
            compiled = torch.compile(plain, mode=None if options.compile == "default" else options.compile)
            providers[f"compile-{options.compile}"] = lambda: compiled(**values)
        bounds = measure_device()
        for provider, function in providers.items():
            timing = measure(function, repeats=5)
            print(f"{name} {provider:12} {1e3 * timing.median:9.2f} ms +- {1e3 * timing.spread:.2f}", flush=True)
            if options.json:
                append_row(options.json, {**row, "provider": provider, "seconds": timing.median, **bounds})
        for kernel, share in kernel_shares(model, values):
            print(f"{100 * share:5.1f} % {kernel}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
