"""Put the trained networks into a model folder (bf16 safetensors and config.json), or a trained style into its file.

    python examples/train_demo/export.py --base runs/base --ssr runs/ssr -o pylumiere/demo
    python examples/train_demo/export.py --style runs/ink -o pylumiere/demo/styles/ink.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from train import STAGES

from pylumiere.checkpoints.adapters import fingerprint, save_style
from pylumiere.checkpoints.native import find_model, load_checkpoint, save_checkpoint
from pylumiere.networks.stunet.presets import model_preset


def newest(network: str, folder: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of the last stage that has any; only stages that hold the whole network count."""
    for stage in reversed([s for s in STAGES[network] if s.frames > 1]):
        file = folder / f"{stage.name}.safetensors"
        if file.exists():
            print(f"{network}: {file}")
            return {k.removeprefix("ema."): v for k, v in load_file(file).items() if k.startswith("ema.")}
    raise SystemExit(f"{folder} holds no video stage of the {network} network yet")


def style_tensors(folder: Path, model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The averaged change in bf16: factors of the convolutions, and the other weights that are not the model's."""
    tensors = {}
    for name, value in newest("style", folder).items():
        if ".parametrizations.weight.0." in f".{name}":
            tensors[name.replace("parametrizations.weight.0.", "weight.")] = value
        elif ".parametrizations." not in f".{name}" and not torch.allclose(value, model[name].float(), atol=1e-6):
            tensors[name] = value
    return {name: value.to(torch.bfloat16) for name, value in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--ssr", type=Path)
    parser.add_argument("--style", type=Path, help="a style's run instead of networks")
    parser.add_argument("--model", default="demo", help="with --style: the model that it was trained on")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    if args.style is not None:
        checkpoint = load_checkpoint(find_model(args.model))
        first = checkpoint.config.first
        weights = checkpoint.weights[first.name]
        save_style(args.output, style_tensors(args.style, weights), first.network, fingerprint(weights))
        return
    if args.base is None or args.ssr is None:
        parser.error("give --base and --ssr, or --style")
    weights = {"base": newest("base", args.base), "ssr": newest("ssr", args.ssr)}
    save_checkpoint(args.output, model_preset("demo"), weights, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
