"""Train the demo checkpoint on procedural clips, in Lumiere's two stages: the image network, then time.

    python examples/train_demo/train.py base --out runs/base      # about 70 minutes on one CPU core
    python examples/train_demo/train.py ssr --out runs/ssr        # about 40
    python examples/train_demo/export.py --base runs/base --ssr runs/ssr -o pylumiere/demo
    python examples/train_demo/train.py style --out runs/ink      # about 16, on top of the finished base
    python examples/train_demo/export.py --style runs/ink -o pylumiere/demo/styles/ink.safetensors

The base sees clips at a low frame rate first (8 frames spread over the five seconds), where motion from frame to frame
is large and a clip is cheap, then 20 and at last all 80. Frame times are absolute, so what is learned at one rate
holds at the next. Each stage saves its weights every minute; the same command goes on from there.

A style is a low-rank change of the base's spatial convolutions, with their biases and norms, learnt from clips in that
style. Everything else is frozen, the temporal layers above all: a styled clip moves as before.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import CLIP_FRAMES, STYLES, Renderer, caption, is_held_out, sample_scene, triples
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from pylumiere.checkpoints.native import find_model, load_checkpoint
from pylumiere.diffusion.schedules import schedule_of
from pylumiere.networks.stunet import STUNet, image_config
from pylumiere.networks.stunet.presets import stage_preset
from pylumiere.networks.text import load_text_encoder

TEXT_TOKENS = 24


@dataclass(frozen=True)
class Stage:
    name: str
    minutes: float
    frames: int  # of the network's input
    stride: int  # between them, in frames of the 80-frame clip
    batch: int
    lr: float
    crop: int = 0  # SSR: side of a random crop; 0 for the whole frame


STAGES = {
    "base": [
        Stage("image", 10, 1, 1, 48, 1e-3),
        Stage("video8", 25, 8, 10, 12, 8e-4),
        Stage("video20", 15, 20, 4, 6, 6e-4),
        Stage("video80", 15, 80, 1, 2, 3e-4),
    ],
    "ssr": [
        Stage("image", 12, 1, 1, 16, 5e-4, crop=64),
        Stage("video4", 14, 4, 1, 6, 5e-4, crop=64),
        Stage("video8", 14, 8, 1, 1, 2.5e-4),
    ],
    "style": [Stage("style8", 8, 8, 10, 6, 2e-3), Stage("style20", 8, 20, 4, 2, 8e-4)],
}


class Captions:
    """A bank of encoded captions for all training triples, in several phrasings; the last entry is the empty prompt."""

    def __init__(self, count: int, rng: np.random.Generator):
        every = [t for t in triples() if not is_held_out(t)]
        self.triples = [
            every[i]
            for i in np.concatenate([rng.permutation(len(every)) for _ in range(count // len(every) + 1)])[:count]
        ]
        encoder = load_text_encoder("minilm", max_length=TEXT_TOKENS)
        texts = [caption(t, rng) for t in self.triples] + [""]
        parts = [encoder.encode(texts[i : i + 64]) for i in range(0, len(texts), 64)]
        self.embeddings = torch.cat([e.to(torch.bfloat16) for e, _ in parts])
        self.masks = torch.cat([m for _, m in parts])


class ClipBatches:
    """Draws batches: clean clips, and for the base the conditioning video and mask, text and its mask."""

    def __init__(self, network: str, seed: int, captions: int, style: str | None = None):
        self.rng = np.random.default_rng(seed)
        self.renderer, self.style = Renderer(), style
        self.captions = None if network == "ssr" else Captions(captions, self.rng)
        self.triples = [t for t in triples() if not is_held_out(t)]

    def base(self, stage: Stage):
        rng, rows = self.rng, self.rng.integers(len(self.captions.triples), size=stage.batch)
        first = int(rng.integers(CLIP_FRAMES)) if stage.frames == 1 else int(rng.integers(stage.stride))
        clips = []
        for row in rows:
            times = torch.arange(stage.frames) * stage.stride + (
                int(rng.integers(CLIP_FRAMES)) if stage.frames == 1 else first
            )
            scene = sample_scene(self.captions.triples[row], rng)
            clips.append(self.renderer.render(scene, 32, times, self.style))
        clean = torch.stack(clips)
        mask = torch.stack([self._mask(stage.frames, clean.shape[2]) for _ in rows])
        dropped = rng.random(stage.batch) < 0.1
        rows = np.where(dropped, len(self.captions.triples), rows)
        return clean, mask, self.captions.embeddings[rows].float(), self.captions.masks[rows], first

    def _mask(self, frames: int, size: int) -> torch.Tensor:
        """[T, H, W, 1]; 1 where the clip is given: mostly nowhere, else frame 0, some frames, or all but a region."""
        mask, rng = torch.zeros(frames, size, size, 1), self.rng
        kind = rng.random()
        if frames > 1 and kind < 0.15:
            mask[0] = 1
        elif frames > 1 and kind < 0.2:
            mask[rng.random(frames) < rng.uniform(0, 0.3)] = 1
        elif kind < 0.35:
            top, left = rng.integers(0, size // 2, 2)
            height, width = rng.integers(size // 4, size, 2)
            mask[:] = 1
            mask[:, top : top + height, left : left + width] = 0
            if rng.random() < 0.3:
                mask[0] = 1
        return mask

    def ssr(self, stage: Stage):
        rng, clean, low = self.rng, [], []
        for _ in range(stage.batch):
            scene = sample_scene(self.triples[rng.integers(len(self.triples))], rng)
            times = torch.arange(stage.frames) + int(rng.integers(CLIP_FRAMES - stage.frames + 1))
            high, small = self.renderer.render(scene, 128, times), self.renderer.render(scene, 32, times)
            if stage.crop:
                top, left = (4 * int(v) for v in rng.integers(0, (128 - stage.crop) // 4 + 1, 2))
                high = high[:, top : top + stage.crop, left : left + stage.crop]
                small = small[:, top // 4 : (top + stage.crop) // 4, left // 4 : (left + stage.crop) // 4]
            clean.append(high)
            low.append(small)
        return torch.stack(clean), torch.stack(low)


class LowRank(nn.Module):
    """weight + up @ down; starts as the weight itself."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        inputs = weight[0].numel()
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def add_low_rank(model: STUNet, rank: int) -> None:
    """Freezes the network but for a low-rank change of its spatial convolutions, their biases and the norms."""
    model.requires_grad_(False)
    convolutions = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.ndim == 4}
    for name, module in list(model.named_modules()):
        if model.is_temporal(f"{name}.weight"):
            continue
        if name in convolutions:
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
            module.bias.requires_grad_(True)
        elif type(module).__name__ == "GroupNorm":
            module.requires_grad_(True)


def upsample(low: torch.Tensor, factor: int) -> torch.Tensor:
    """Bilinear upsampling of [B, T, H, W, C]."""
    frames = low.flatten(0, 1).permute(0, 3, 1, 2)
    return (
        F.interpolate(frames, scale_factor=factor, mode="bilinear", align_corners=False)
        .permute(0, 2, 3, 1)
        .unflatten(0, low.shape[:2])
    )


def degrade(low: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """What the base network does to a clip, roughly: noise of a known level, and often some blur.

    Returns the clip and the levels [B].
    """
    level = torch.from_numpy(rng.uniform(0, 0.3, low.shape[0]).astype(np.float32))
    if rng.random() < 0.5:
        frames = low.flatten(0, 1).permute(0, 3, 1, 2)
        blurred = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, 1)
        weight = float(rng.uniform(0.2, 0.9))
        low = torch.lerp(frames, blurred, weight).permute(0, 2, 3, 1).unflatten(0, low.shape[:2])
    return low + level[:, None, None, None, None] * torch.randn_like(low), level


def sample_timesteps(batch: int, steps: int, rng: np.random.Generator) -> torch.Tensor:
    """Half of the draws uniform, half in the noisiest quarter, where layout and motion are decided."""
    u = rng.random(batch)
    return torch.from_numpy(((np.where(rng.random(batch) < 0.5, u, 0.75 + 0.25 * u)) * steps).astype(np.int64)).clamp(
        max=steps - 1
    )


def run_stage(network: str, stage: Stage, model: STUNet, batches: ClipBatches, out: Path, minutes_scale: float) -> None:
    schedule = schedule_of(stage_preset("demo-ssr" if network == "ssr" else "demo-base").schedule)
    alphas, sigmas = (torch.from_numpy(v).float() for v in (schedule.alphas, schedule.sigmas))
    state_file, weight_file = out / f"{stage.name}.json", out / f"{stage.name}.safetensors"
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, spent = 0, 0.0
    if state_file.exists():
        state = json.loads(state_file.read_text())
        step, spent = state["step"], state["seconds"]
        saved = load_file(weight_file)
        model.load_state_dict({k.removeprefix("raw."): v for k, v in saved.items() if k.startswith("raw.")})
        ema = {k.removeprefix("ema."): v for k, v in saved.items() if k.startswith("ema.")}
    budget = stage.minutes * 60 * minutes_scale
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    temporal = [p for n, p in trained if model.is_temporal(n)]
    spatial = [p for n, p in trained if not model.is_temporal(n)]
    factor = 0.4 if temporal else 1.0
    optimizer = torch.optim.AdamW(
        [{"params": p, "scale": f} for p, f in ((spatial, factor), (temporal, 1.0)) if p],
        lr=stage.lr,
        weight_decay=0.01,
        betas=(0.9, 0.99),
    )
    begun, last_save, first_step, losses = time.monotonic() - spent, time.monotonic(), step, []

    def save() -> None:
        save_file(
            {**{f"raw.{k}": v for k, v in model.state_dict().items()}, **{f"ema.{k}": v for k, v in ema.items()}},
            out / "tmp.safetensors",
        )
        (out / "tmp.safetensors").replace(weight_file)
        state_file.write_text(
            json.dumps({"step": step, "seconds": time.monotonic() - begun, "done": time.monotonic() - begun >= budget})
        )

    while time.monotonic() - begun < budget:
        progress = (time.monotonic() - begun) / budget
        warm = min(1.0, (step - first_step + 1) / 100)
        decay = 1.0 if progress < 0.5 else 0.15 + 0.85 * (1 - progress) / 0.5
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * warm * decay * group["scale"]
        timesteps = sample_timesteps(stage.batch, len(alphas), batches.rng)
        a, s = (v[timesteps][:, None, None, None, None] for v in (alphas, sigmas))
        if network != "ssr":
            clean, mask, text, text_mask, first = batches.base(stage)
            noisy = a * clean + s * torch.randn_like(clean)
            inputs, given = (
                torch.cat([noisy, clean * mask, mask], -1),
                dict(text=text, text_mask=text_mask, first_frame=first, frame_stride=stage.stride),
            )
        else:
            clean, low = batches.ssr(stage)
            low, level = degrade(low, batches.rng)
            noisy = a * clean + s * torch.randn_like(clean)
            inputs, given = torch.cat([noisy, upsample(low, 4)], -1), dict(noise_level=level)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(inputs, timesteps, **given)
        weight = (1 / s.square()).clamp(max=5.0)
        loss = (weight * (predicted.float() - clean).square()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        momentum = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            current = model.state_dict()
            torch._foreach_lerp_(list(ema.values()), [current[k] for k in ema], 1 - momentum)
        if step % 100 == 0:
            spent = f"{time.monotonic() - begun:.0f}/{budget:.0f} s"
            print(f"{network} {stage.name} step {step} {spent} loss {np.mean(losses[-100:]):.4f}", flush=True)
        if time.monotonic() - last_save > 60:
            save()
            last_save = time.monotonic()
    save()
    model.load_state_dict(ema)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=STAGES)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for weights and progress; the run resumes from it"
    )
    parser.add_argument("--minutes-scale", type=float, default=1.0, help="factor on the length of every stage")
    parser.add_argument("--captions", type=int, default=10000, help="size of the caption bank")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--style", choices=STYLES, default="ink", help="for `style`: the look")
    parser.add_argument("--model", default="demo", help="for `style`: the model to start from")
    parser.add_argument("--rank", type=int, default=8, help="for `style`: rank of the change of each convolution")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    # A resumed run must not see the same draws again.
    restarts = len(list(args.out.glob("started.*")))
    (args.out / f"started.{restarts}").touch()
    torch.manual_seed(args.seed + restarts)
    is_style = args.network == "style"
    batches = ClipBatches(args.network, args.seed + restarts, args.captions, args.style if is_style else None)
    if is_style:
        checkpoint = load_checkpoint(find_model(args.model))
        first = checkpoint.config.first
        config = first.network
        model = STUNet(config)
        model.load_state_dict(checkpoint.weights[first.name])
        add_low_rank(model, args.rank)
    else:
        config = stage_preset(f"demo-{args.network}").network
        model = STUNet(image_config(config))
    for stage in STAGES[args.network]:
        if stage.frames > 1 and model.config.num_frames == 1:
            model = STUNet.from_image_unet(model, config)
        state_file = args.out / f"{stage.name}.json"
        if state_file.exists() and json.loads(state_file.read_text())["done"]:
            saved = load_file(args.out / f"{stage.name}.safetensors")
            model.load_state_dict({k.removeprefix("ema."): v for k, v in saved.items() if k.startswith("ema.")})
            continue
        run_stage(args.network, stage, model, batches, args.out, args.minutes_scale)


if __name__ == "__main__":
    main()
