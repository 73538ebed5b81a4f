"""Forward pass of a network on the Triton kernels, CUDA-graphed, against eager and torch.compile.

Run: python benchmarks/bench_stunet.py --network stunet-l --json rows.jsonl
The share of each kernel is printed from the profiler. Without a GPU: --smoke, under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from _record import append_row

COMPILE = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}  # we capture the graph ourselves


def make(config, dtype: torch.dtype, device: str):
    """The network twice on the same weights: by the kernels, and eager. Both channels-last."""
    from pylumiere.backends.triton import set_backend
    from pylumiere.bench.samples import random_weights
    from pylumiere.networks.stunet import STUNet

    weights = {name: value.to(device, dtype) for name, value in random_weights(config, seed=0).items()}
    models = []
    for backend in ("triton", "torch"):
        with torch.device("meta"):
            model = STUNet(config)
        model.load_state_dict(models[0].state_dict() if models else weights, assign=True)
        models.append(set_backend(model.eval().requires_grad_(False), backend))
    return models


def make_inputs(config, device: str, batch: int = 1) -> dict[str, torch.Tensor]:
    sizes = (batch, config.num_frames, config.height, config.width, config.in_channels)
    values = {"sample": torch.randn(sizes), "timesteps": torch.full((batch,), 500.0)}
    if config.text_dim:
        values["text"] = torch.randn(batch, 77, config.text_dim)
        values["text_mask"] = torch.ones(batch, 77, dtype=torch.bool)
    if config.noise_level:
        values["noise_level"] = torch.full((batch,), 0.1)
    return {name: value.to(device) for name, value in values.items()}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="stunet-l")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, checked but not timed")
    parser.add_argument("--compile", choices=("off", *COMPILE), default="default")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="samples of a call; each is a case")
    parser.add_argument("--json", type=Path, help="append rows here")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        print("no GPU. Without one only --smoke runs.", file=sys.stderr)
        return 2
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is now
    from pylumiere.networks.stunet.presets import stage_preset

    name = "tiny-ssr" if options.smoke else options.network
    dtype = torch.float32 if options.smoke else torch.bfloat16
    config = stage_preset(name).network
    with torch.inference_mode():
        made = make(config, dtype, device)
        results = [one_case(name, config, dtype, device, made, batch, options) for batch in options.batch]
    return 0 if all(results) else 1


def one_case(name: str, config, dtype: torch.dtype, device: str, models, batch: int, options) -> bool:
    """Checks and times one size of call; False where the result is wrong."""
    from pylumiere.bench.compare import rel_rms
    from pylumiere.bench.harness import kernel_shares, measure, measure_device
    from pylumiere.bench.plan import plan_network

    torch.manual_seed(0)
    model, plain = models
    values = make_inputs(config, device, batch)
    difference = rel_rms(model(**values), plain(**values))
    allowed = 1e-4 if dtype == torch.float32 else 0.1  # two roundings in bf16 through a hundred random layers
    case = name if batch == 1 else f"{name}-batch{batch}"
    row = {"op": "forward", "case": case, "device": device, "dtype": str(dtype), "difference_from_eager": difference}
    row["correct"] = difference <= allowed
    if options.smoke or not row["correct"]:
        told = "equals eager" if row["correct"] else "WRONG, differs from eager"
        print(f"{case}: {told} to {difference:.2e}; not timed")
        if options.json:
            append_row(options.json, {**row, "smoke": options.smoke})
        return row["correct"]
    providers = {"pylumiere": lambda: model(**values), "eager": lambda: plain(**values)}
    if options.compile != "off":
        torch._dynamo.reset()
        compiled = torch.compile(plain, mode=COMPILE[options.compile])
        providers[f"compile-{options.compile}"] = lambda: compiled(**values)
    peaks = {provider: peak_bytes(call) for provider, call in providers.items()}
    bounds = measure_device(device)
    cost = plan_network(config, batch, config.num_frames, config.height, config.width).total
    for provider, timing in measure(providers, device, repeats=5).items():
        rate = cost.flops / timing.median / 1e12
        print(
            f"{case} {provider:12} {1e3 * timing.median:9.2f} ms +- {1e3 * timing.spread:.2f}, {rate:.0f} TFLOP/s, "
            f"peak {peaks[provider] / 1e9:.1f} GB", flush=True,
        )  # fmt: skip
        if options.json:
            measured = {"provider": provider, "seconds": timing.median, "spread": timing.spread}
            measured |= {"peak_bytes": peaks[provider], "flops": cost.flops, "bytes": cost.bytes}
            append_row(options.json, {**row, **measured, **bounds})
    for kernel, share in kernel_shares(lambda: model(**values), 12):
        print(f"{100 * share:5.1f} % {kernel}")
    return True


def peak_bytes(call) -> int:
    """Of the device, with the weights, over one call outside of a graph."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    sys.exit(main())
