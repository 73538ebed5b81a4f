"""Does the demo do what the prompt says? Pixels only, no learned judge.

    python benchmarks/eval_demo.py            # 200 captions kept out of training: a table and a contact sheet
    python benchmarks/eval_demo.py --truth    # the same checks on rendered clips: what the measure itself can reach

Each clip is checked for its background (border pixels, nearest of all backgrounds), the colour of a shape (nearest
palette entry over the object's pixels), kind and direction of motion (centroid and area over time), and the object
(template matching of silhouette and colours among all objects).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "train_demo"))
import data  # noqa: E402
from _record import append_row  # noqa: E402

SIZE = 128


def held_out(count: int, seed: int = 0) -> list[tuple[tuple[str, str, str], str]]:
    """`count` (triple, caption) pairs, no triple seen in training; every motion and background about equally often."""
    rng = np.random.default_rng(seed)
    by_motion = defaultdict(list)
    for triple in data.triples():
        if data.is_held_out(triple):
            by_motion[triple[1]].append(triple)
    for group in by_motion.values():
        rng.shuffle(group)
    order = [
        tuple(group[i])
        for i in range(max(map(len, by_motion.values())))
        for group in by_motion.values()
        if i < len(group)
    ]
    if count > len(order):
        raise SystemExit(f"--count {count}: only {len(order)} triples were kept out of training")
    return [(t, data.caption(t, rng)) for t in order[:count]]


class Judge:
    """Measures clips, uint8 [T, 128, 128, 3]."""

    def __init__(self, times: torch.Tensor | None = None):
        self.times = times = torch.arange(data.CLIP_FRAMES) if times is None else times
        self.backgrounds = {
            b: self._uint8(data.background(b, SIZE, self.times)).expand(len(times), -1, -1, -1).numpy().astype(np.int16)
            for b in data.BACKGROUNDS
        }
        border = np.zeros((SIZE, SIZE), bool)
        border[:5], border[-5:], border[:, :5], border[:, -5:] = True, True, True, True
        self.border = border
        self.templates = self._templates()

    @staticmethod
    def _uint8(frames: torch.Tensor) -> torch.Tensor:
        return (frames * 255).round().to(torch.uint8)

    def _templates(self) -> dict[str, np.ndarray]:
        """Each object alone, 24 x 24 RGBA within its own bounding box."""
        out, renderer = {}, data.Renderer()
        for name in data.OBJECTS:
            scene = data.Scene((name, "still", "white"), (0.5, 0.5), (0.5, 0.5), (0.45, 0.45))
            axis = ((torch.arange(96) + 0.5) / 96 - 0.5) / 0.45
            rgb, alpha = renderer._object(
                scene.triple[0], axis[None, None, :], axis[None, :, None], torch.tensor([0.45]), 96
            )
            rgba = torch.cat([rgb, alpha], -1)[0].numpy()
            out[name] = _crop_resize(rgba, rgba[..., 3] > 0.5)
        return out

    def measure(self, frames: np.ndarray) -> dict:
        """Background, colour, motion and object of a clip as the pixels show them."""
        frames = frames.astype(np.int16)
        found = {
            b: np.abs(np.median(frames - reference, 0))[self.border].mean() for b, reference in self.backgrounds.items()
        }
        background = min(found, key=found.get)
        distance = np.sqrt(((frames - self.backgrounds[background]).astype(np.float32) ** 2).sum(-1))  # [T, H, W]
        mask = distance > 70
        mask &= ~_edge_noise(mask)
        result = dict(
            background=background if found[background] < 40 else "none", background_error=float(found[background])
        )
        areas = mask.mean((1, 2))
        if np.median(areas) < 0.004:
            return {**result, "motion": "none", "colour": "none", "object": "none"}
        return {**result, "motion": self._motion(mask, areas), **self._object(frames, mask, areas)}

    def _motion(self, mask: np.ndarray, areas: np.ndarray) -> str:
        seen = areas > 0.002
        t = np.flatnonzero(seen) / (len(areas) - 1)
        axis = (np.arange(SIZE) + 0.5) / SIZE
        weight = mask[seen].sum((1, 2))
        cx = (mask[seen] * axis[None, None, :]).sum((1, 2)) / weight
        cy = (mask[seen] * axis[None, :, None]).sum((1, 2)) / weight
        growth = np.polyfit(t, np.log(areas[seen]), 1)[0]
        (dx, _), (dy, y0) = np.polyfit(t, cx, 1), np.polyfit(t, cy, 1)
        wobble = np.std(cy - dy * t - y0)
        if abs(growth) > 0.7 and max(abs(dx), abs(dy)) < 0.3:
            return "grow" if growth > 0 else "shrink"
        if max(abs(dx), abs(dy)) > 0.2:
            return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
        return "bounce" if wobble > 0.06 else "still"

    def _object(self, frames: np.ndarray, mask: np.ndarray, areas: np.ndarray) -> dict:
        palette = {c: np.array(data.PALETTE[c]) for c in data.SHAPE_COLOURS}
        votes, scores = Counter(), defaultdict(float)
        for i in np.argsort(areas)[len(areas) // 4 :: 8]:
            pixels = frames[i][mask[i]]
            if len(pixels) == 0:
                continue
            colour = np.median(pixels, 0)
            votes[min(palette, key=lambda c: np.abs(palette[c] - colour).sum())] += 1
            patch = _crop_resize(
                np.concatenate([frames[i] / 255 * mask[i][..., None], mask[i][..., None]], -1), mask[i]
            )
            for name, template in self.templates.items():
                scores[name] += float(np.abs(template - patch).mean())
        return {"colour": votes.most_common(1)[0][0], "object": min(scores, key=scores.get)}


def _edge_noise(mask: np.ndarray) -> np.ndarray:
    """Set pixels with fewer than five set neighbours in their 3 x 3 block: specks, not objects."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1))).astype(np.int8)
    count = sum(padded[:, i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3))
    return mask & (count < 5)


def _crop_resize(rgba: np.ndarray, mask: np.ndarray, side: int = 24) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    crop = rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    x = torch.from_numpy(np.ascontiguousarray(crop)).float().permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(x, (side, side), mode="area")[0].permute(1, 2, 0).numpy()


def score(triple: tuple[str, str, str], measured: dict) -> dict[str, bool]:
    """Which of the caption's statements the clip shows; "colour" only for shapes."""
    obj, motion, background = triple
    right = {
        "background": measured["background"] == background,
        "motion": measured["motion"] == motion,
        "object": measured["object"] == obj,
    }
    if obj not in data.SPRITES:
        right["colour"] = measured["colour"] == obj.split(" ")[0]
    return right


def table(rows: list[dict]) -> str:
    lines = ["statement    right     of    share"]
    for key in ("background", "colour", "motion", "object"):
        values = [r["right"][key] for r in rows if key in r["right"]]
        if values:
            lines.append(f"{key:<12}{sum(values):>6}{len(values):>7}{sum(values) / len(values):>9.1%}")
    lines.append("\nmotion       right     of    taken for")
    for motion in data.MOTIONS:
        seen = [r["measured"]["motion"] for r in rows if r["triple"][1] == motion]
        if seen:
            wrong = ", ".join(f"{m} {n}" for m, n in Counter(m for m in seen if m != motion).most_common(3))
            lines.append(f"{motion:<12}{seen.count(motion):>6}{len(seen):>7}    {wrong}")
    return "\n".join(lines)


def contact_sheet(strips: list[np.ndarray], path: Path) -> None:
    """One row of eight frames for each of the given clips."""
    rows = [np.concatenate([clip[i] for i in np.linspace(0, len(clip) - 1, 8).astype(int)], 1) for clip in strips]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--count", type=int, default=200, help="captions, at most the number of triples kept out of training"
    )
    parser.add_argument("--steps", type=int, help="base steps; the model's default if not given")
    parser.add_argument("--guidance", type=float, help="guidance scale; the model's default if not given")
    parser.add_argument("--truth", action="store_true", help="judge rendered clips instead of generated ones")
    parser.add_argument("--sheet", type=Path, default=Path("eval_demo.png"))
    parser.add_argument("--json", type=Path, help="append the summary as a JSON line to this file")
    args = parser.parse_args()
    judge, rows, strips, begun = Judge(), [], [], time.monotonic()
    if args.truth:
        renderer, rng = data.Renderer(), np.random.default_rng(1)

        def make(index, triple, prompt):
            clip = renderer.render(data.sample_scene(triple, rng), SIZE, judge.times)
            return ((clip + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    else:
        import pylumiere

        engine = pylumiere.Engine.load(args.model)
        options = {
            k: v for k, v in (("num_inference_steps", args.steps), ("guidance_scale", args.guidance)) if v is not None
        }

        def make(index, triple, prompt):
            return engine.generate(prompt, seed=index, **options).frames

    for index, (triple, prompt) in enumerate(held_out(args.count)):
        clip = make(index, triple, prompt)
        measured = judge.measure(clip)
        rows.append({"triple": triple, "prompt": prompt, "measured": measured, "right": score(triple, measured)})
        if index < 24:
            strips.append(clip)
        if sys.stderr.isatty() or (index + 1) % 20 == 0:
            print(f"{index + 1}/{args.count} clips, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    contact_sheet(strips, args.sheet)
    print(table(rows))
    print(f"contact sheet: {args.sheet}")
    if args.json:
        shares = {}
        for key in ("background", "colour", "motion", "object"):
            values = [r["right"][key] for r in rows if key in r["right"]]
            shares[key] = round(sum(values) / len(values), 4)
        append_row(
            args.json,
            {
                "benchmark": "eval_demo",
                "model": args.model,
                "truth": args.truth,
                "count": args.count,
                "steps": args.steps,
                "guidance": args.guidance,
                **shares,
                "seconds": round(time.monotonic() - begun, 1),
            },
        )


if __name__ == "__main__":
    main()
