"""Do the applications do what they should? Pixels only, on captions and pictures kept out of training.

    python benchmarks/eval_tasks.py                          # every application: a table, and a contact sheet of each
    python benchmarks/eval_tasks.py --tasks style loop --count 4 --steps 10

Inputs are drawn by examples/train_demo/data.py for objects, motions and backgrounds that training never saw together.
What each application must show:

    image        frame 0 within 25 dB of the given one at the base's size; motion as prompted in 75 %
    keyframes    first and last frame within 25 dB at the base's size
    inpainting   outside the mask not one byte changed; inside the prompt's colour or object in 75 %
    outpainting  inside the box not one byte changed; outside the prompt's background in 75 %
    cinemagraph  outside the region temporal standard deviation under 1/255; inside at least 8/255 in 80 %
    style        distance to the style's statistics at least halved in 90 %; of the motions that held before, 80 % hold
    video        strength 0.3: the input's motion in 80 %; 0.9: the prompt's colour in 80 %; monotone between
    loop         of clips that move: step from last to first frame at most 1.2 times the median step
    long         320 frames: no step at a window's border larger than elsewhere; memory as for 80
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "train_demo"))
import data  # noqa: E402
from _record import append_row  # noqa: E402
from eval_demo import SIZE, Judge, held_out  # noqa: E402

CELL = SIZE // 32  # pixels of the result for one of the base
STILL = ("still",)


@dataclass
class Result:
    """What an application showed.

    Attributes:
        checks: statement to (share or value, bound, whether larger is better).
        rows: strips of the contact sheet, (label, frames).
    """

    count: int
    checks: dict[str, tuple[float, float, bool]]
    notes: dict[str, float] = field(default_factory=dict)
    rows: list[tuple[str, np.ndarray]] = field(default_factory=list)
    seconds: float = 0.0

    def holds(self, name: str) -> bool:
        value, bound, larger = self.checks[name]
        return value >= bound if larger else value <= bound


class Bench:
    """The engine, the judge and the drawn inputs.

    Args:
        steps: of the base; the model's own number if None.
    """

    def __init__(self, model: str, steps: int | None, seed: int):
        import pylumiere

        self.engine, self.model = pylumiere.Engine.load(model), model
        self.options = {} if steps is None else {"num_inference_steps": steps}
        self.judge, self.renderer = Judge(), data.Renderer()
        self.rng, self.times = np.random.default_rng(seed), torch.arange(data.CLIP_FRAMES)

    def captions(self, count: int, *, motions=None, shapes_only: bool = False) -> list[tuple[tuple, str]]:
        """(triple, caption) pairs kept out of training."""
        wanted = set(data.MOTIONS) - set(STILL) if motions is None else set(motions)
        pairs = [
            (triple, text)
            for triple, text in held_out(200, seed=3)
            if triple[1] in wanted and not (shapes_only and triple[0] in data.SPRITES)
        ]
        order = np.random.default_rng(7).permutation(len(pairs))  # else those on white come first
        return [pairs[i] for i in order[:count]]

    def draw(self, triple, style: str | None = None) -> np.ndarray:
        """A drawn clip, uint8 [80, 128, 128, 3]."""
        clip = self.renderer.render(data.sample_scene(triple, self.rng), SIZE, self.times, style)
        return ((clip + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()

    def make(self, prompt: str, seed: int, **fields) -> np.ndarray:
        return self.engine.generate(prompt, seed=seed, **{**self.options, **fields}).frames

    def other_colour(self, triple) -> tuple[str, str, str]:
        """The same shape in another colour."""
        colour, shape = triple[0].split(" ")
        choices = [c for c in data.SHAPE_COLOURS if c not in (colour, triple[2])]
        return (f"{choices[self.rng.integers(len(choices))]} {shape}", *triple[1:])

    def region(self, clip: np.ndarray, background: str, margin: int = 6) -> np.ndarray:
        """The box around everything that is not background in any frame, [128, 128] bool, on whole cells."""
        reference = self.judge.backgrounds[background].astype(np.int16)
        moved = (np.abs(clip.astype(np.int16) - reference).sum(-1) > 60).any(0)
        rows, columns = np.flatnonzero(moved.any(1)), np.flatnonzero(moved.any(0))
        box = np.zeros((SIZE, SIZE), bool)
        first = [max(0, (side[0] - margin) // CELL * CELL) for side in (rows, columns)]
        last = [min(SIZE, -(-(side[-1] + 1 + margin) // CELL) * CELL) for side in (rows, columns)]
        box[first[0] : last[0], first[1] : last[1]] = True
        return box


def small(frame: np.ndarray) -> np.ndarray:
    """A frame at the base's size, in 0..255."""
    return frame.astype(np.float64).reshape(32, CELL, 32, CELL, 3).mean((1, 3))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.square(small(a) - small(b)).mean())))


def steps_between(clip: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring frames, in 1/255."""
    return np.array([np.abs(b.astype(np.int16) - a).mean() for a, b in itertools.pairwise(clip)])


def share(values) -> float:
    values = list(values)
    return sum(map(bool, values)) / len(values) if values else float("nan")


# ---- applications ---------------------------------------------------------------------------------------------------


def image(bench: Bench, count: int) -> Result:
    ratios, motions, rows = [], [], []
    for seed, (triple, text) in enumerate(bench.captions(count, motions=data.MOTIONS)):
        first = bench.draw(triple)[0]
        clip = bench.make(text, seed, image=first)
        ratios.append(psnr(clip[0], first))
        motions.append(bench.judge.measure(clip)["motion"] == triple[1])
        rows.append((f"{text}  (given: first frame, {ratios[-1]:.0f} dB)", np.concatenate([first[None], _eight(clip)])))
    within = share(r >= 25 for r in ratios)
    checks = {"frame 0 within 25 dB": (within, 1.0, True), "motion": (share(motions), 0.75, True)}
    return Result(count, checks, {"median dB": float(np.median(ratios)), "lowest dB": min(ratios)}, rows)


def keyframes(bench: Bench, count: int) -> Result:
    ratios, rows = [], []
    for seed, (triple, text) in enumerate(bench.captions(count)):
        drawn = bench.draw(triple)
        clip = bench.make(text, seed, keyframes={0: drawn[0], -1: drawn[-1]})
        ratios += [psnr(clip[0], drawn[0]), psnr(clip[-1], drawn[-1])]
        label = f"{text}  (given: first and last, {ratios[-2]:.0f} and {ratios[-1]:.0f} dB)"
        rows.append((label, np.concatenate([drawn[:1], _eight(clip), drawn[-1:]])))
    checks = {"within 25 dB": (share(r >= 25 for r in ratios), 1.0, True)}
    return Result(count, checks, {"median dB": float(np.median(ratios))}, rows)


def inpainting(bench: Bench, count: int) -> Result:
    identical, found, rows = [], [], []
    for seed, (triple, _) in enumerate(bench.captions(count, shapes_only=True)):
        wanted = bench.other_colour(triple)
        drawn = bench.draw(triple)
        mask = bench.region(drawn, triple[2])
        clip = bench.make(data.caption(wanted), seed, video=drawn, mask=mask)
        identical.append(np.array_equal(clip[:, ~mask], drawn[:, ~mask]))
        measured = bench.judge.measure(clip)
        found.append(measured["colour"] == wanted[0].split(" ")[0] or measured["object"] == wanted[0])
        shown = drawn.copy()
        shown[:, mask] = shown[:, mask] // 2 + 127
        rows += [(f"given: {data.caption(triple)}", _eight(shown)), (data.caption(wanted), _eight(clip))]
    checks = {"outside identical": (share(identical), 1.0, True), "colour or object": (share(found), 0.75, True)}
    return Result(count, checks, rows=rows)


def outpainting(bench: Bench, count: int) -> Result:
    identical, grounds, rows = [], [], []
    for seed, (triple, text) in enumerate(bench.captions(count, motions=("still", "grow", "bounce", "up", "down"))):
        drawn = bench.draw(triple)[:, :, 16:-16]
        clip = bench.make(text, seed, video=drawn, expand={"left": 16, "right": 16})
        identical.append(np.array_equal(clip[:, :, 16:-16], drawn))
        outside = np.ones((SIZE, SIZE), bool)
        outside[:, 16:-16] = False
        errors = {
            name: np.abs(clip.astype(np.int16) - reference)[:, outside].mean()
            for name, reference in bench.judge.backgrounds.items()
        }
        grounds.append(min(errors, key=errors.get) == triple[2])
        rows.append((f"{text}  (given: the middle three quarters)", _eight(clip)))
    checks = {"inside identical": (share(identical), 1.0, True), "background": (share(grounds), 0.75, True)}
    return Result(count, checks, rows=rows)


def cinemagraph(bench: Bench, count: int) -> Result:
    outside, inside, rows = [], [], []
    for seed, (triple, text) in enumerate(bench.captions(count)):
        drawn = bench.draw(triple)
        mask = bench.region(drawn, triple[2])
        clip = bench.make(text, seed, image=drawn[0], mask=mask)
        deviation = clip.astype(np.float32).std(0).mean(-1)
        outside.append(float(deviation[~mask].max()))
        inside.append(float(deviation[mask].mean()))
        shown = drawn[0].copy()
        shown[mask] = shown[mask] // 2 + 127
        rows.append((f"{text}  (inside {inside[-1]:.0f}/255)", np.concatenate([shown[None], _eight(clip)])))
    checks = {
        "outside, largest deviation /255": (max(outside), 1.0, False),
        "inside at least 8/255": (share(v >= 8 for v in inside), 0.8, True),
    }
    return Result(count, checks, {"median inside /255": float(np.median(inside))}, rows)


def style(bench: Bench, count: int) -> Result:
    halved, kept, rows, distances = [], [], [], []
    styled_judge = Judge()
    styled_judge.backgrounds = {
        b: Judge._uint8(data.ink_background(data.background(b, SIZE, bench.times)))
        .expand(len(bench.times), -1, -1, -1).numpy().astype(np.int16)
        for b in data.BACKGROUNDS
    }  # fmt: skip
    for seed, (triple, text) in enumerate(bench.captions(count, motions=data.MOTIONS)):
        plain, styled = (bench.make(text, seed, style="ink", style_strength=a) for a in (0.0, 1.0))
        drawn = [statistics(bench.draw(triple, "ink")) for _ in range(4)]
        target = tuple(np.mean(part, 0) for part in zip(*drawn, strict=True))
        before, after = (distance(statistics(clip), target) for clip in (plain, styled))
        distances.append((before, after))
        halved.append(after <= before / 2)
        if bench.judge.measure(plain)["motion"] == triple[1]:
            kept.append(styled_judge.measure(styled)["motion"] == triple[1])
        rows.append((f"{text}  (without and with the style: distance {before:.2f} to {after:.2f})", _eight(plain)))
        if seed == 0:
            rows.append(("", _eight(bench.make(text, seed, style="ink", style_strength=0.5))))
        rows.append(("", _eight(styled)))
    checks = {"distance halved": (share(halved), 0.9, True), "motion kept": (share(kept), 0.8, True)}
    notes = {"median distance before": np.median([d[0] for d in distances]),
             "after": np.median([d[1] for d in distances]), "motion held before": len(kept)}  # fmt: skip
    return Result(count, checks, {k: float(v) for k, v in notes.items()}, rows)


def statistics(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of colour and edge strength over the pixels of a clip at the base's size, in 0..1."""
    frames = np.stack([small(frame) for frame in clip[::8]]) / 255
    luma = frames @ np.array([0.2126, 0.7152, 0.0722])
    edges = np.abs(np.diff(luma, axis=2))[:, 1:] + np.abs(np.diff(luma, axis=1))[:, :, 1:]
    pixels = np.concatenate([frames[:, 1:, 1:], edges[..., None]], -1).reshape(-1, 4)
    return pixels.mean(0), np.cov(pixels.T)


def distance(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """Wasserstein-2 distance of two normal distributions (mean, covariance)."""

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    half = root(a[1])
    spread = np.trace(a[1] + b[1] - 2 * root(half @ b[1] @ half))
    return float(np.sqrt(max(0.0, np.square(a[0] - b[0]).sum() + spread)))


def video(bench: Bench, count: int, strengths=(0.3, 0.6, 0.9)) -> Result:
    motions, colours, change, rows = ({s: [] for s in strengths} for _ in range(4))
    sheet = []
    for seed, (triple, _) in enumerate(bench.captions(count, shapes_only=True)):
        wanted = bench.other_colour(triple)
        drawn, text = bench.draw(triple), data.caption(wanted)
        sheet.append((f"given: {data.caption(triple)};  prompt: {text}", _eight(drawn)))
        for strength in strengths:
            clip = bench.make(text, seed, video=drawn, strength=strength)
            measured = bench.judge.measure(clip)
            motions[strength].append(measured["motion"] == triple[1])
            colours[strength].append(measured["colour"] == wanted[0].split(" ")[0])
            change[strength].append(float(np.abs(clip.astype(np.int16) - drawn).mean()))
            sheet.append((f"strength {strength}", _eight(clip)))
    clips = zip(*change.values(), strict=True)
    monotone = [all(a <= b + 0.5 for a, b in itertools.pairwise(clip)) for clip in clips]
    checks = {
        f"motion at {strengths[0]}": (share(motions[strengths[0]]), 0.8, True),
        f"colour at {strengths[-1]}": (share(colours[strengths[-1]]), 0.8, True),
        "change grows with strength": (share(monotone), 1.0, True),
    }
    notes = {f"colour at {s}": share(colours[s]) for s in strengths}
    notes |= {f"motion at {s}": share(motions[s]) for s in strengths}
    notes |= {f"change at {s} /255": float(np.mean(change[s])) for s in strengths}
    return Result(count, checks, notes, sheet)


def loop(bench: Bench, count: int) -> Result:
    ratios, rows = [], []
    pairs = bench.captions(count, motions=("bounce",))[: -(-count // 2)]
    pairs += bench.captions(count - len(pairs), motions=set(data.MOTIONS) - {"bounce", "still"})
    for seed, (_, text) in enumerate(pairs):
        clip = bench.make(text, seed, loop=True)
        median = float(np.median(steps_between(clip)))
        last = float(np.abs(clip[0].astype(np.int16) - clip[-1]).mean())
        if median >= 2:
            ratios.append(last / median)
        label = f"{text}  (median step {median:.1f}, last to first {last:.1f})"
        rows.append((label, np.concatenate([_eight(clip), clip[:1]])))
    checks = {"last to first / median, largest": (max(ratios, default=float("nan")), 1.2, False)}
    return Result(count, checks, {"clips that move": len(ratios)}, rows)


def long(bench: Bench, count: int, num_frames: int = 320) -> Result:
    ratios, rows = [], []
    network = bench.engine.config.first.network
    stride = network.num_frames // 2
    for seed, (_, text) in enumerate(bench.captions(count, motions=("bounce", "right", "still"))):
        clip = bench.make(text, seed, num_frames=num_frames)
        steps = steps_between(clip)
        borders = [b - 1 for b in range(stride, num_frames, stride)]  # steps[b - 1] leads into frame b
        at_borders = max(_jump(steps, b) for b in borders)
        elsewhere = max(_jump(steps, b + stride // 2) for b in borders[:-1])
        ratios.append((at_borders, elsewhere))
        rows.append((f"{text}  ({num_frames} frames, every 20th)", clip[::20]))
    peaks = {n: _peak(bench, n) for n in (network.num_frames, num_frames)}
    memory = peaks[num_frames] / peaks[network.num_frames]
    checks = {
        "step at a border / near it, largest": (max(r[0] for r in ratios), 1.5, False),
        "memory over that of 80 frames": (memory, 1.1, False),
    }
    notes = {"step half-way / near it, largest": max(r[1] for r in ratios)}
    return Result(count, checks, notes | {f"MB for {n}": p / 1e6 for n, p in peaks.items()}, rows)


def _jump(steps: np.ndarray, place: int) -> float:
    """A step over the median of those around it."""
    return float(steps[place] / np.median(np.r_[steps[max(0, place - 12) : place - 1], steps[place + 2 : place + 13]]))


def _peak(bench: Bench, num_frames: int) -> int:
    """Resident bytes of a whole run of the command line, streamed to a file."""
    prompt = "a red circle bounces over grass"
    target = "/dev/shm/eval_tasks.mp4"
    options = ["--seed", "1", "--frames", str(num_frames), "--steps", "2", "--stream", "--json", "-o", target]
    command = [sys.executable, "-P", "-m", "pylumiere.cli", "generate", prompt, "--model", bench.model, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    Path(target).unlink()
    return json.loads(done.stdout)["peak_resident_bytes"]


# Function, clips if not told otherwise, and how many of the first strips go into the gallery.
TASKS = {
    "image": (image, 8, 1), "inpainting": (inpainting, 8, 2), "cinemagraph": (cinemagraph, 6, 1),
    "style": (style, 6, 3), "video": (video, 5, 4), "loop": (loop, 6, 1), "long": (long, 1, 1),
    "keyframes": (keyframes, 3, 1), "outpainting": (outpainting, 3, 1),
}  # fmt: skip


# ---- output ---------------------------------------------------------------------------------------------------------


def _eight(clip: np.ndarray) -> np.ndarray:
    return clip[np.linspace(0, len(clip) - 1, 8).astype(int)]


def contact_sheet(rows: list[tuple[str, np.ndarray]], path: Path, side: int = 96) -> None:
    """One strip a row, under its label."""
    font = ImageFont.load_default(12)
    width = max(len(frames) for _, frames in rows) * side
    heights = [side + (16 if label else 2) for label, _ in rows]
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for (label, frames), height in zip(rows, heights, strict=True):
        draw.text((2, y), label, fill="black", font=font)
        for i, frame in enumerate(frames):
            tile = Image.fromarray(frame).resize((side, side), Image.Resampling.BOX)
            sheet.paste(tile, (i * side, y + height - side))
        y += height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def gallery(sheets: Path, path: Path) -> None:
    """The first strips of all applications that have been run into one folder, as one small PNG."""
    parts = [Image.open(file) for name in TASKS if (file := sheets / f"{name}.gallery.png").exists()]
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    y = 0
    for part in parts:
        whole.paste(part, (0, y))
        y += part.height
    path.parent.mkdir(parents=True, exist_ok=True)
    ImageOps.posterize(whole, 6).save(path, optimize=True)  # noise in the last bits is what makes a PNG large


def report(name: str, result: Result) -> str:
    lines = []
    for check, (value, bound, larger) in result.checks.items():
        shown = f"{value:.0%}" if larger else f"{value:.2f}"
        limit = f">= {bound:.0%}" if larger else f"<= {bound:.2f}"
        lines.append(f"{name:<12}{check:<38}{shown:>8}   {limit:<10}{'yes' if result.holds(check) else 'NO':<5}"
                     f"{result.count:>4} clips")  # fmt: skip
        name = ""
    if result.notes:
        lines.append(f"{'':<12}" + ", ".join(f"{key} {value:.3g}" for key, value in result.notes.items()))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--count", type=int, help="clips of each application; 1 to 8 if not given")
    parser.add_argument("--steps", type=int, help="base steps; the model's default if not given")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn inputs")
    parser.add_argument("--sheets", type=Path, default=Path("eval_tasks"), help="folder for the contact sheets")
    parser.add_argument("--gallery", type=Path, help="also write the first strips of all in that folder as one PNG")
    parser.add_argument("--json", type=Path, help="append a JSON line for each application to this file")
    args = parser.parse_args()
    all_hold = True
    for name in args.tasks:
        task, count, shown = TASKS[name]
        bench, begun = Bench(args.model, args.steps, args.seed), time.monotonic()
        result = task(bench, args.count or count)
        result.seconds = time.monotonic() - begun
        contact_sheet(result.rows, args.sheets / f"{name}.png")
        print(report(name, result) + f"   {result.seconds:.0f} s", flush=True)
        strips = [(f"{name}: {label}" if label else "", _eight(frames)) for label, frames in result.rows[:shown]]
        contact_sheet(strips, args.sheets / f"{name}.gallery.png", side=72)
        if args.gallery:
            gallery(args.sheets, args.gallery)
        all_hold &= all(map(result.holds, result.checks))
        if args.json:
            checks = {check: round(value, 4) for check, (value, _, _) in result.checks.items()}
            append_row(args.json, {"benchmark": "eval_tasks", "task": name, "count": result.count, "steps": args.steps,
                                   **checks, **{k: round(v, 4) for k, v in result.notes.items()},
                                   "seconds": round(result.seconds, 1)})  # fmt: skip
        bench.engine.close()
    print(f"contact sheets: {args.sheets}/")
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
