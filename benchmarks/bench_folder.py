"""A full-size Stable Diffusion 1.5 folder with random weights: what loading and one step of it take.

    python benchmarks/bench_folder.py make FOLDER           # 4.3 GB in float32; --fp16 halves it
    python benchmarks/bench_folder.py measure FOLDER --json benchmarks/results/folder.jsonl

`measure` loads the folder in a process of its own, and reports the anonymous memory that this took at most (what is
mapped from the files is not counted) beside the size of the weights as they are held. Then it makes one step of one
picture under a memory budget, and shows what a budget that is too small is answered.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from _record import append_row
from safetensors.torch import save_file

PROMPT = "a red circle moves right over grass"


def make(folder: Path, dtype: torch.dtype) -> None:
    """Weights with the spread of freshly initialised layers, so that activations stay in range."""
    from pylumiere.config import AutoencoderKLConfig, UNet2DConfig
    from pylumiere.networks.families import expected_shapes
    from pylumiere.networks.text.clip import ClipTextConfig, clip_shapes

    layouts = json.loads((importlib.resources.files("pylumiere.checkpoints") / "layouts" / "sd1.json").read_text())
    unet = UNet2DConfig.from_diffusers(layouts["unet"], num_frames=1, height=64, width=64)
    parts = {
        "unet": (expected_shapes(unet), "diffusion_pytorch_model"),
        "vae": (expected_shapes(AutoencoderKLConfig.from_diffusers(layouts["vae"])), "diffusion_pytorch_model"),
        "text_encoder": (clip_shapes(ClipTextConfig.from_json(layouts["text_encoder"])), "model"),
    }
    generator = torch.Generator().manual_seed(0)
    for name, (shapes, stem) in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(layouts[name]))
        save_file(
            {key: _random(key, shape, generator).to(dtype) for key, shape in shapes.items()},
            folder / name / f"{stem}.safetensors",
            {"format": "pt"},
        )
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(layouts["scheduler"]))
    _write_tokenizer(folder / "tokenizer", layouts["text_encoder"]["vocab_size"])
    classes = {
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", layouts["scheduler"]["_class_name"]],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **classes}))


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape) if "norm" in name and name.endswith("weight") else torch.zeros(shape)
    fan_in = torch.Size(shape[1:]).numel()
    return torch.randn(shape, generator=generator) * (0.02 if "embedding" in name else (3 * fan_in) ** -0.5)


def _write_tokenizer(folder: Path, size: int) -> None:
    """Every byte, alone and at a word's end, and made-up tokens up to the vocabulary's size; no merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [f"unused{i}" for i in range(size - len(tokens) - 2)] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


# ---- measuring -----------------------------------------------------------------------------------------------------


def measure(folder: Path, precision: str) -> dict:
    """One row, from a process of its own."""
    command = [sys.executable, __file__, "child", str(folder), "--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return {"bench": "folder", "folder": folder.name, "precision": precision, **json.loads(done.stdout)}


def child(folder: Path, precision: str) -> dict:
    from pylumiere.engine import Engine
    from pylumiere.errors import BudgetExceeded

    before, peak = _anonymous_bytes(), _Peak()
    begun = time.monotonic()
    with peak, Engine.load(folder, precision=precision, memory_budget="20GiB") as engine:
        loaded = time.monotonic() - begun
        weights, most = engine.info()["weight_bytes"], peak.read() - before
        begun = time.monotonic()
        video = engine.generate(PROMPT, num_inference_steps=1, seed=7)
        seconds = time.monotonic() - begun
        planned = engine.metrics()["memory"]
    refused = ""
    try:
        Engine.load(folder, precision=precision, memory_budget=2 * weights).generate(PROMPT, num_inference_steps=1)
    except BudgetExceeded as error:
        refused = str(error)
    return {
        "load_seconds": loaded, "weight_bytes": weights, "load_peak_anonymous_bytes": most,
        "step_seconds": seconds, "stage_seconds": video.metadata["seconds"], "shape": list(video.frames.shape),
        "resident_bytes": planned["resident"], "refused": refused,
    }  # fmt: skip


class _Peak:
    """Watches this process's anonymous memory."""

    def __enter__(self):
        self._most, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._most = max(self._most, _anonymous_bytes())

    def read(self) -> int:
        return max(self._most, _anonymous_bytes())

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()


def _anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "measure", "child"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fp16", action="store_true", help="make: 16-bit weights")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--json", type=Path, help="append the row to this file")
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, torch.float16 if args.fp16 else torch.float32)
    elif args.what == "child":
        print(json.dumps(child(args.folder, args.precision)))
    else:
        row = measure(args.folder, args.precision)
        print(json.dumps(row, indent=1))
        if args.json:
            append_row(args.json, row)


if __name__ == "__main__":
    main()
