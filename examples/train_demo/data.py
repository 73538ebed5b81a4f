"""Procedural clips with captions: an object, a motion, a background, at any resolution.

A `Scene` is a resolution-independent description; `render` draws it at any size and at any frame times, so one scene
gives the 32 x 32 and the 128 x 128 clip of an exact pair. Times are in frames of an 80-frame clip.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

CLIP_FRAMES = 80

PALETTE = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 80, 230),
    "yellow": (250, 210, 40),
    "purple": (140, 50, 190),
    "orange": (250, 130, 20),
    "white": (245, 245, 245),
    "black": (20, 20, 25),
}
SHAPES = ("circle", "square", "triangle", "ring", "diamond")
SHAPE_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SPRITES = {
    "dog_face": ("a dog", "a puppy"),
    "cat_face": ("a cat", "a kitten"),
    "frog": ("a frog", "a green frog"),
    "tropical_fish": ("a fish", "a tropical fish"),
    "car": ("a car", "a red car"),
    "rocket": ("a rocket", "a space rocket"),
    "robot": ("a robot", "a small robot"),
    "red_heart": ("a heart", "a red heart"),
}
MOTIONS = {
    "right": ("moves right", "moving to the right", "goes from left to right"),
    "left": ("moves left", "moving to the left", "goes from right to left"),
    "up": ("moves up", "rising", "goes upwards"),
    "down": ("moves down", "falling", "goes downwards"),
    "grow": ("grows", "growing", "gets bigger"),
    "shrink": ("shrinks", "shrinking", "gets smaller"),
    "still": ("stays still", "standing still", "does not move"),
    "bounce": ("bounces", "bouncing up and down", "jumps up and down"),
}
BACKGROUNDS = {
    "white": ("on a white background", "against a plain white background"),
    "black": ("on a black background", "against a plain black background"),
    "blue": ("on a blue background", "against a plain blue background"),
    "yellow": ("on a yellow background", "against a plain yellow background"),
    "grass": ("over grass", "in a green meadow"),
    "sunset": ("at sunset", "in front of a sunset"),
    "desert": ("in the desert", "over sand dunes"),
    "night": ("at night", "under a night sky with stars"),
}

OBJECTS = tuple(f"{colour} {shape}" for shape in SHAPES for colour in SHAPE_COLOURS) + tuple(SPRITES)


def triples() -> list[tuple[str, str, str]]:
    """All (object, motion, background) that make sense: a shape never has the colour of a plain background."""
    return [(o, m, b) for o in OBJECTS for m in MOTIONS for b in BACKGROUNDS if o.split(" ")[0] != b]


def is_held_out(triple: tuple[str, str, str]) -> bool:
    """One triple in eight is kept out of training, chosen by a hash."""
    return hashlib.sha256("|".join(triple).encode()).digest()[0] % 8 == 0


def caption(triple: tuple[str, str, str], rng: np.random.Generator | None = None) -> str:
    """A sentence for a triple; without a generator the first phrasing of each part."""
    obj, motion, background = triple
    names = SPRITES.get(obj, (f"{'an' if obj[0] == 'o' else 'a'} {obj}",))

    def pick(options):
        return options[0 if rng is None else rng.integers(len(options))]

    name, moves, place = pick(names), pick(MOTIONS[motion]), pick(BACKGROUNDS[background])
    if rng is not None and rng.random() < 0.2:
        return f"{place}, {name} {moves}"
    return f"{name} {moves} {place}"


@dataclass(frozen=True)
class Scene:
    triple: tuple[str, str, str]
    start: tuple[float, float]  # centre at the first frame, 0..1, x to the right, y down
    end: tuple[float, float]
    size: tuple[float, float]  # half extent at the first and at the last frame
    bounces: int = 0


def sample_scene(triple: tuple[str, str, str], rng: np.random.Generator) -> Scene:
    """Draw place, size and path for a triple."""
    motion = triple[1]
    size = rng.uniform(0.21, 0.27)
    x, y = rng.uniform(0.38, 0.62, 2)
    low, high = rng.uniform(0.21, 0.33), rng.uniform(0.67, 0.79)
    if motion in ("right", "left"):
        a, b = (low, high) if motion == "right" else (high, low)
        return Scene(triple, (a, y), (b, y), (size, size))
    if motion in ("up", "down"):
        a, b = (high, low) if motion == "up" else (low, high)
        return Scene(triple, (x, a), (x, b), (size, size))
    if motion in ("grow", "shrink"):
        a, b = rng.uniform(0.09, 0.13), rng.uniform(0.30, 0.38)
        sizes = (a, b) if motion == "grow" else (b, a)
        x, y = rng.uniform(0.45, 0.55, 2)
        return Scene(triple, (x, y), (x, y), sizes)
    if motion == "bounce":
        return Scene(triple, (x, rng.uniform(0.66, 0.74)), (x, rng.uniform(0.26, 0.34)), (size, size), bounces=3)
    return Scene(triple, (x, y), (x, y), (size, size))


class Renderer:
    """Draws scenes. `sprites.npz` beside this file holds the sprites, 128 x 128 RGBA."""

    def __init__(self):
        data = np.load(Path(__file__).with_name("sprites.npz"))
        self.mips = {}
        for name in SPRITES:
            rgba = torch.from_numpy(data[name]).float().permute(2, 0, 1) / 255
            rgba = torch.cat([rgba[:3] * rgba[3:], rgba[3:]])  # premultiplied
            self.mips[name] = [rgba[None]] + [F.avg_pool2d(rgba[None], f) for f in (2, 4, 8, 16)]

    def render(self, scene: Scene, size: int, times: torch.Tensor, style: str | None = None) -> torch.Tensor:
        """Frames at the given times: [T, size, size, 3] float32 in -1..1; `style` is one of STYLES, or none."""
        u = times.float() / (CLIP_FRAMES - 1)
        (x0, y0), (x1, y1), (s0, s1) = scene.start, scene.end, scene.size
        path = (torch.pi * scene.bounces * u).sin().abs() if scene.bounces else u
        cx, cy, half = x0 + (x1 - x0) * path, y0 + (y1 - y0) * path, s0 + (s1 - s0) * u
        axis = (torch.arange(size) + 0.5) / size
        px = (axis[None, None, :] - cx[:, None, None]) / half[:, None, None]  # [T, 1, W]
        py = (axis[None, :, None] - cy[:, None, None]) / half[:, None, None]  # [T, H, 1]
        rgb, alpha = self._object(scene.triple[0], px, py, half, size)
        frame = background(scene.triple[2], size, times)  # [T or 1, H, W, 3]
        if style is not None:
            return STYLES[style](rgb, alpha, frame) * 2 - 1
        return (rgb + frame * (1 - alpha)) * 2 - 1

    def _object(self, name: str, px: torch.Tensor, py: torch.Tensor, half: torch.Tensor, size: int):
        """Premultiplied colour [T, H, W, 3] and alpha [T, H, W, 1]."""
        frames = half.shape[0]
        if name in self.mips:
            extent = 2 * float(half.max()) * size
            level = int(np.clip(np.round(np.log2(128 / extent)), 0, 4))
            grid = torch.stack([px.expand(frames, size, size), py.expand(frames, size, size)], -1)
            out = F.grid_sample(
                self.mips[name][level].expand(frames, -1, -1, -1), grid, mode="bilinear", align_corners=False
            )
            out = out.permute(0, 2, 3, 1)
            return out[..., :3], out[..., 3:]
        colour, shape = name.split(" ")
        ax, ay = px.abs(), py.abs()
        if shape == "circle":
            distance = (px * px + py * py).sqrt() - 0.95
        elif shape == "ring":
            distance = ((px * px + py * py).sqrt() - 0.68).abs() - 0.27
        elif shape == "square":
            distance = torch.maximum(ax, ay) - 0.84
        elif shape == "diamond":
            distance = (ax + ay - 1.0) / 2**0.5
        else:
            distance = torch.maximum(py - 0.8, (2 * ax - py - 1.0) / 5**0.5)
        alpha = (0.5 - distance * half[:, None, None] * size).clamp(0, 1)[..., None]
        return alpha * torch.tensor(PALETTE[colour]) / 255, alpha


PAPER, INK = (247, 236, 214), (28, 24, 48)


def ink_background(frame: torch.Tensor) -> torch.Tensor:
    """A background in 0..1 as a pale wash on paper."""
    return 0.3 * frame + 0.7 * torch.tensor(PAPER) / 255


def ink(rgb: torch.Tensor, alpha: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """A pen drawing on paper: pale background, light colours, a dark line, a 32nd of the frame wide, on each side
    of the edge. rgb [T, H, W, 3] is premultiplied with alpha [T, H, W, 1]; the frames are [T, H, W, 3] in 0..1."""
    paper = torch.tensor(PAPER) / 255
    drawn = 0.75 * rgb + 0.25 * alpha * paper + ink_background(frame) * (1 - alpha)
    reach = 2 * (rgb.shape[1] // 32) + 1
    planes = alpha.permute(0, 3, 1, 2)
    grown, shrunk = (s * F.max_pool2d(s * planes, reach, 1, reach // 2) for s in (1, -1))
    line = (grown - shrunk).permute(0, 2, 3, 1)
    return drawn * (1 - line) + line * torch.tensor(INK) / 255


STYLES = {"ink": ink}


def background(name: str, size: int, times: torch.Tensor) -> torch.Tensor:
    """[T or 1, size, size, 3] in 0..1."""
    y = ((torch.arange(size) + 0.5) / size)[:, None, None]
    x = ((torch.arange(size) + 0.5) / size)[None, :, None]

    def rgb(*values):
        return torch.tensor(values, dtype=torch.float32) / 255

    def blend(a, b, w):
        return a * (1 - w) + b * w

    def soft(distance):  # 1 where distance > 0, one pixel wide edge
        return (distance * size + 0.5).clamp(0, 1)

    if name in PALETTE:
        return rgb(*PALETTE[name]).expand(1, size, size, 3)
    if name == "grass":
        sky, meadow = (
            blend(rgb(90, 170, 250), rgb(190, 225, 250), y / 0.55),
            blend(rgb(110, 190, 80), rgb(40, 130, 40), (y - 0.55) / 0.45),
        )
        frame = blend(sky, meadow, soft(y - 0.55))
    elif name == "sunset":
        frame = blend(rgb(70, 45, 120), rgb(250, 120, 90), (y / 0.7).clamp(0, 1)) + 0 * x
        frame = blend(frame, rgb(60, 30, 60), soft(y - 0.8))
    elif name == "desert":
        dune = 0.62 + 0.07 * (x * 7).sin()
        frame = blend(
            blend(rgb(130, 200, 240), rgb(245, 235, 210), y / 0.6),
            blend(rgb(235, 195, 120), rgb(205, 150, 85), (y - 0.6) / 0.4),
            soft(y - dune),
        )
    else:
        frame = blend(rgb(8, 10, 40), rgb(25, 30, 80), y) + 0 * x
        stars = np.random.default_rng(5).uniform(0, 1, (14, 3))
        frame = frame.expand(size, size, 3)[None]
        for sx, sy, phase in stars:
            glow = torch.exp(-((x - sx) ** 2 + (y - sy) ** 2) / (2 * 0.016**2))[None]
            twinkle = 0.6 + 0.4 * torch.sin(2 * torch.pi * (times.float() / 40 + phase))[:, None, None, None]
            frame = frame + glow * twinkle * rgb(230, 230, 200)
        return frame.clamp(0, 1)
    return frame.expand(size, size, 3).clamp(0, 1)[None]
