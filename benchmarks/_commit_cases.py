"""What `compare_commits.py` runs on each of its commits: python -P _commit_cases.py [TEXT ...]

Prints one JSON object: the files that pylumiere was imported from, and for each case whose name contains a TEXT (for
all of them without one) its fingerprint. Writes into the working directory. Pictures and clips are made here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import pylumiere

PROMPT = "a red circle moves right over grass"
FEW = {"seed": 7, "num_frames": 16, "num_inference_steps": 2}

# Cases that must give what another one gives.
TWINS = {
    "streamed": "text to video",
    "streamed, longer than the network": "longer than the network",
    "a whole request, one field replaced": "text to video, seed 8",
}

Result = np.ndarray | bytes | str
Cases = dict[str, Callable[[], Result]]


def picture(size: int = 64) -> np.ndarray:
    """A smooth colour field with a bright disc, [size, size, 3] uint8."""
    y, x = np.mgrid[:size, :size]
    disc = (x - size // 3) ** 2 + (y - size // 2) ** 2 < (size // 5) ** 2
    field = np.stack([x * 255 // size, y * 255 // size, (x + y) * 127 // size], -1)
    return np.where(disc[..., None], 250, field).astype(np.uint8)


def moving(num_frames: int = 16, size: int = 64) -> np.ndarray:
    """`picture`, two pixels further to the right in each frame, [num_frames, size, size, 3]."""
    return np.stack([np.roll(picture(size), 2 * t, axis=1) for t in range(num_frames)])


def middle(size: int = 64) -> np.ndarray:
    """A mask [size, size], white in the middle."""
    mask = np.zeros((size, size), np.uint8)
    mask[size // 4 : -size // 4, size // 4 : -size // 4] = 255
    return mask


def engine_cases(engine) -> Cases:
    """What `generate`, `stream`, `submit` and `upscale` give, few frames and steps each."""

    def clip(prompt: str = PROMPT, **fields) -> np.ndarray:
        return engine.generate(prompt, **{**FEW, **fields}).frames

    def streamed(**fields) -> np.ndarray:
        return np.concatenate([chunk.frames for chunk in engine.stream(PROMPT, **{**FEW, **fields})])

    def together() -> np.ndarray:
        jobs = [engine.submit(PROMPT, **{**FEW, "seed": seed}) for seed in (7, 8, 9)]
        return np.stack([job.result().frames for job in jobs])

    def upscaled(frames: np.ndarray, **fields) -> np.ndarray:
        return np.concatenate([chunk.frames for chunk in engine.upscale(frames, **fields)])

    def from_request() -> np.ndarray:
        return engine.generate(pylumiere.GenerationRequest(prompt=PROMPT, **FEW), seed=8).frames

    def clip_or_refusal(**fields) -> np.ndarray | str:
        try:
            return clip(**fields)
        except pylumiere.InvalidRequest as error:
            return str(error)

    ends = {0: picture(), -1: picture()[::-1]}
    return {
        "text to video": clip,
        "text to video, seed 8": lambda: clip(seed=8),
        "text to video, another prompt": lambda: clip("a blue square bounces over sand"),
        "a whole request, one field replaced": from_request,
        "image to video": lambda: clip(image=picture()),
        "image to video, pad": lambda: clip(image=picture()[:40], fit="pad"),
        "image to video, stretch": lambda: clip(image=picture()[:40], fit="stretch"),
        "keyframes": lambda: clip(keyframes=ends),
        "inpainting": lambda: clip(video=moving(), mask=middle()),
        "inpainting, a moving mask": lambda: clip(video=moving(), mask=np.stack([middle()] * 15 + [255 - middle()])),
        "outpainting": lambda: clip(video=moving(), expand={"left": 16, "right": 16}),
        "outpainting of a picture": lambda: clip(image=picture(), expand={"top": 32}),
        "cinemagraph": lambda: clip(image=picture(), mask=middle()),
        "style": lambda: clip(style="ink"),
        "style, half": lambda: clip(style="ink", style_strength=0.5),
        "video to video": lambda: clip(video=moving(), strength=0.6, num_inference_steps=4),
        "loop": lambda: clip(loop=True),
        "longer than the network": lambda: clip(num_frames=120),
        "longer, with keyframes": lambda: clip(num_frames=96, keyframes=ends),
        "windows of 16": lambda: clip(window_frames=16),
        "windows of 6, overlap 3": lambda: clip(window_frames=6, window_overlap=3),
        "windows of 8, overlap 0": lambda: clip(window_frames=8, window_overlap=0),
        "another size": lambda: clip(height=64, width=96),
        "sampler ddpm": lambda: clip(sampler="ddpm", num_inference_steps=4),
        "sampler ddim": lambda: clip(sampler="ddim", num_inference_steps=4),
        "sampler dpmpp_2m": lambda: clip(sampler="dpmpp_2m", num_inference_steps=4),
        "sampler euler": lambda: clip_or_refusal(sampler="euler", num_inference_steps=4),
        "17 frames, filled up": lambda: clip(num_frames=17),
        "100 rows": lambda: clip_or_refusal(height=100),
        "guidance 1": lambda: clip(guidance_scale=1.0),
        "guidance 5": lambda: clip(guidance_scale=5.0),
        "negative prompt": lambda: clip(negative_prompt="a blue square", guidance_scale=3.0),
        "floats": lambda: clip(output_type="float"),
        "streamed": streamed,
        "streamed, longer than the network": lambda: streamed(num_frames=120),
        "three at once": together,
        "upscale": lambda: upscaled(moving(10, 32)),
        "upscale, a size that is padded": lambda: upscaled(moving(8, 30)[:, :27], num_inference_steps=2),
        "upscale, loop": lambda: upscaled(moving(12, 32), num_frames=12, loop=True, num_inference_steps=2),
    }


def command_cases() -> Cases:
    """Files that the command line writes into the working directory."""
    from pylumiere.cli import main

    def file(name: str, *arguments: str) -> bytes:
        code = main([*arguments, "-o", name])
        if code != 0:
            raise RuntimeError(f"pylumiere {' '.join(arguments)} ended with {code}")
        return Path(name).read_bytes()

    def generated(name: str, steps: int, *arguments: str) -> bytes:
        return file(name, "generate", PROMPT, "--seed", "7", "--steps", str(steps), *arguments)

    def upscaled() -> bytes:
        from PIL import Image

        Path("small").mkdir()
        for t, frame in enumerate(moving(10, 32)):
            Image.fromarray(frame).save(f"small/{t:03}.png")
        return file("large.mp4", "upscale", "small", "--steps", "2")

    return {
        "command: mp4, 16 frames": lambda: generated("16.mp4", 4, "--frames", "16"),
        "command: mp4, 80 frames": lambda: generated("80.mp4", 2),
        "command: gif, streamed": lambda: generated("16.gif", 2, "--frames", "16", "--stream"),
        "command: webm": lambda: generated("16.webm", 2, "--frames", "16"),
        "command: upscale": upscaled,
    }


def all_cases() -> Iterator[tuple[str, Callable[[], Result]]]:
    """Every case; the engines are loaded as they are needed."""
    for precision in ("auto", "fp32"):
        with pylumiere.Engine.load("demo", precision=precision) as engine:
            cases = engine_cases(engine)
            if precision != "auto":
                cases = {f"{precision}: {name}": cases[name] for name in ("text to video", "inpainting", "upscale")}
            yield from cases.items()
    yield from command_cases().items()


def fingerprint(result: Result) -> str:
    """SHA-256 of bytes, or of an array's type, shape and values; a text is kept as it is."""
    if isinstance(result, str):
        return result
    digest = hashlib.sha256()
    if isinstance(result, np.ndarray):
        digest.update(f"{result.dtype.str} {result.shape}".encode())
        result = np.ascontiguousarray(result).tobytes()
    digest.update(result)
    return digest.hexdigest()


def run_cases(only: list[str]) -> dict[str, str]:
    """Name to fingerprint, of the cases whose name contains one of `only`; of all where it is empty.

    Raises:
        RuntimeError: a case failed, or is not the same as its twin.
    """
    results = {}
    for name, case in all_cases():
        if not only or any(text in name for text in only):
            print(name, file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(sys.stderr):  # the command line reports there
                results[name] = fingerprint(case())
    for name, twin in TWINS.items():
        if {name, twin} <= results.keys() and results[name] != results[twin]:
            raise RuntimeError(f"{name!r} is not the same as {twin!r}")
    return results


def imported() -> list[str]:
    """Files of the package's modules."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "pylumiere"]
    return sorted(module.__file__ for module in modules)


if __name__ == "__main__":
    results = run_cases(sys.argv[1:])
    json.dump({"modules": imported(), "results": results}, sys.stdout)
