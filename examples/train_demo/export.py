"""Put the trained networks into a model folder: bf16 safetensors and config.json.

python examples/train_demo/export.py --base runs/base --ssr runs/ssr -o pylumiere/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from train import STAGES

from pylumiere.checkpoint import save_checkpoint
from pylumiere.config import model_preset


def newest(network: str, folder: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of the last stage that has any; only stages that hold the whole network count."""
    for stage in reversed([s for s in STAGES[network] if s.frames > 1]):
        file = folder / f"{stage.name}.safetensors"
        if file.exists():
            print(f"{network}: {file}")
            return {k.removeprefix("ema."): v for k, v in load_file(file).items() if k.startswith("ema.")}
    raise SystemExit(f"{folder} holds no video stage of the {network} network yet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--ssr", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    save_checkpoint(
        args.output, model_preset("demo"), newest("base", args.base), newest("ssr", args.ssr), dtype=torch.bfloat16
    )


if __name__ == "__main__":
    main()
