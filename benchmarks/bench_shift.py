"""What the temporal shift costs a network call on a CPU: Stable Diffusion 1.5's U-Net, with and without it, in turn.

    python benchmarks/bench_shift.py --json benchmarks/results/shift.jsonl

Weights are random. The shift moves a fourth of the channels of what each residual block's first convolution reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch
from _record import append_row

from pylumiere.backends.cpu_ops import CpuOps
from pylumiere.backends.torch import channels_last
from pylumiere.bench.samples import random_weights
from pylumiere.config import TemporalShiftConfig
from pylumiere.networks.families import build_network
from pylumiere.networks.unet.presets import model_preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=16, help="of a latent frame")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="append the row to this file")
    args = parser.parse_args()

    plain = dataclasses.replace(
        model_preset("sd-1.5").first.network, num_frames=args.frames, height=args.side, width=args.side
    )
    shifted = dataclasses.replace(plain, temporal_shift=TemporalShiftConfig())
    weights = {name: channels_last(value.bfloat16()) for name, value in random_weights(plain, seed=0).items()}
    networks = {"plain": build_network(plain, weights), "shifted": build_network(shifted, weights)}
    sample = torch.randn(1, args.frames, args.side, args.side, 4)
    operands = (sample, torch.tensor([500.0]), torch.randn(1, 77, plain.text_dim))
    seconds = {name: [] for name in networks}
    ops = CpuOps()
    with torch.inference_mode():
        for turn in range(args.repeats + 1):
            for name, network in networks.items():
                network.ops = ops
                begun = time.perf_counter()
                network(*operands)
                if turn:  # the first packs the weights
                    seconds[name].append(time.perf_counter() - begun)
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["shifted"], strict=True)]
    row = {
        "bench": "shift", "shape": list(sample.shape), "precision": "bf16", "repeats": args.repeats,
        "plain_seconds": statistics.median(seconds["plain"]), "shifted_seconds": statistics.median(seconds["shifted"]),
        "median_ratio": statistics.median(ratios), "ratios": [round(ratio, 4) for ratio in ratios],
    }  # fmt: skip
    print(row)
    if args.json:
        append_row(args.json, row)


if __name__ == "__main__":
    main()
