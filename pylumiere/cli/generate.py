"""`generate` and `upscale`: clips to files."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any

import typer

from pylumiere.cli.console import Bars, absolute
from pylumiere.cli.options import (
    Backend,
    Device,
    Json,
    Key,
    MemoryBudget,
    Model,
    Overlap,
    Precision,
    TemporalShift,
    Window,
    parse_size,
)
from pylumiere.errors import InvalidRequest

DEFAULT_OUTPUT = "clip.mp4"
FORMATS_HELP = ".mp4, .webm, .gif, .png (one frame), a PNG folder, or - (mp4 to stdout)"
Output = Annotated[str, typer.Option("-o", "--output", help=f"{FORMATS_HELP}.")]
OptionalOutput = Annotated[
    str | None,
    typer.Option("-o", "--output", help=f"{FORMATS_HELP}; clip.mp4, or clip.png for one frame.", show_default=False),
]
Sheet = Annotated[str | None, typer.Option(help="Also write a contact sheet, a PNG of every 8th frame.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same bytes; drawn at random if not given.")]

_MAX_TILES = 200  # of a streamed clip's contact sheet


def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    output: OptionalOutput = None,
    model: Model = "demo",
    backend: Backend = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    key: Key = None,
    memory_budget: MemoryBudget = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the base network.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 turns guidance off.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddpm, ddim, dpmpp_2m or euler.")] = None,
    seed: Seed = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, or one number for a square.")] = None,
    negative: Annotated[str, typer.Option(help="What to lead away from.")] = "",
    image: Annotated[str | None, typer.Option(help="A picture: the first frame.")] = None,
    keyframes: Annotated[
        list[str] | None, typer.Option(metavar="N:FILE...", help="More given frames: 0:a.png 79:b.png, or last:b.png.")
    ] = None,
    video: Annotated[str | None, typer.Option(help="A clip to start from, or to keep in part.")] = None,
    mask: Annotated[str | None, typer.Option(help="A picture or clip: white is made anew, black is kept.")] = None,
    expand: Annotated[
        str | None, typer.Option(help="Pixels of the result to make beside the picture: left=16,right=16, or all=16.")
    ] = None,
    fit: Annotated[str, typer.Option(help="How pictures go into the frame: crop, pad or stretch.")] = "crop",
    strength: Annotated[float, typer.Option(help="With --video: how much of the noise schedule to run, 0 to 1.")] = 1.0,
    style: Annotated[str | None, typer.Option(help="A style of the model (demo: ink), or a style's file.")] = None,
    style_strength: Annotated[float, typer.Option(help="0 is the model as it is, 1 is the style.")] = 1.0,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:STRENGTH]...", help="LoRA files; several are applied in order.")
    ] = None,
    temporal_shift: TemporalShift = None,
    loop: Annotated[bool, typer.Option("--loop", help="The last frame runs into the first.")] = False,
    window: Window = None,
    overlap: Overlap = None,
    stream: Annotated[bool, typer.Option("--stream", help="Encode frames while later ones are computed.")] = False,
    sheet: Sheet = None,
    as_json: Json = False,
) -> None:
    """Makes a clip from a text."""
    from pylumiere.media.inputs import parse_expand, parse_keyframes, request_fields
    from pylumiere.request import GenerationRequest

    begun = time.monotonic()
    _check_outputs(output or DEFAULT_OUTPUT, sheet)
    width, height = parse_size(size)
    given = request_fields(
        image=image, video=video, mask=mask, keyframes=parse_keyframes(keyframes or []), fps=fps, num_frames=frames
    )
    if expand is not None:
        given["expand"] = parse_expand(expand)
    with Bars() as bars:
        request = GenerationRequest(
            prompt=prompt, negative_prompt=negative, height=height, width=width,
            num_inference_steps=steps, guidance_scale=guidance, sampler=sampler,
            seed=secrets.randbits(32) if seed is None else seed,
            fit=fit, strength=strength, style=style, style_strength=style_strength, lora=lora or None,
            loop=loop,
            window_frames=window, window_overlap=overlap, callback_on_step_end=bars.callback, **given,
        )  # fmt: skip
        engine = _load(model, backend, device, precision, key, memory_budget, temporal_shift)
        loaded = time.monotonic()
        output = _picture_or_clip(output, request, engine)
        if stream:
            metadata = _write_stream(engine.stream(request), output, sheet, prompt)
        else:
            result = engine.generate(request)
            bars.close()
            metadata = result.metadata
            result.save(output)
            if sheet is not None:
                result.sheet(sheet)
    seconds = {"load": loaded - begun, "all": time.monotonic() - begun}
    _report(output, sheet, metadata, seconds, as_json, stream)


def upscale(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A video, a picture, a folder of PNG, or - (stdin).")],
    output: Output,
    model: Model = "demo",
    backend: Backend = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    key: Key = None,
    memory_budget: MemoryBudget = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the super-resolution network.")] = None,
    seed: Seed = 0,
    fps: Annotated[float | None, typer.Option(help="Frames a second; the input's own if not given.")] = None,
    window: Window = None,
    overlap: Overlap = None,
    loop: Annotated[bool, typer.Option("--loop", help="The clip's end meets its start.")] = False,
    sheet: Sheet = None,
    as_json: Json = False,
) -> None:
    """Super-resolution alone, for clips of any length. Each frame keeps its time. Sound is dropped."""
    from pylumiere.media.readers import VideoReader, is_pipe

    begun = time.monotonic()
    _check_outputs(output, sheet)
    if loop and is_pipe(source):
        raise InvalidRequest(f"--loop needs an input whose length is known; {source} is a pipe")
    with VideoReader(source) as reader, Bars(reader.num_frames) as bars:
        rate = fps or (reader.fps and min(reader.fps, 1000.0))
        times = _Times(reader) if fps is None and _has_own_times(reader) else None
        engine = _load(model, backend, device, precision, key, memory_budget)
        loaded = time.monotonic()
        chunks = engine.upscale(
            reader if times is None else times, fps=rate, num_frames=_count(source) if loop else None, seed=seed,
            loop=loop, num_inference_steps=steps, window_frames=window, window_overlap=overlap,
            callback_on_step_end=bars.callback,
        )  # fmt: skip
        metadata = _write_stream(chunks, output, sheet, "", times, reader.pixel_aspect)
    seconds = {"load": loaded - begun, "all": time.monotonic() - begun}
    _report(output, sheet, metadata, seconds, as_json, True)


def _load(model: str, backend: str, device: str, precision: str, key: str | None, memory_budget: str | None,
          temporal_shift: int | None = None):  # fmt: skip
    from pylumiere.engine import Engine

    return Engine.load(model, backend=backend, device=device, precision=precision, trusted_key=key,
                       memory_budget=memory_budget, temporal_shift=temporal_shift)  # fmt: skip


def _picture_or_clip(output: str | None, request, engine) -> str:
    """The output's name; for one frame a picture's where none was given. Refuses a picture for more frames."""
    num_frames = engine.num_frames(request)
    if output is None:
        return "clip.png" if num_frames == 1 else DEFAULT_OUTPUT
    if output.lower().endswith(".png") and num_frames != 1:
        raise InvalidRequest(f"--output {output!r} holds one picture, and this clip has {num_frames} frames; give a "
                             "name in .mp4, .webm, .gif, a folder, or --frames 1")  # fmt: skip
    return output


def _check_outputs(output: str, sheet: str | None) -> None:
    """Before anything is computed: can the results be written?"""
    from pylumiere.media.writers import check_sheet_path, output_format

    output_format(output)
    if sheet is not None:
        check_sheet_path(sheet)


class _Times:
    """A reader's frames; their times wait here for the frames that are made of them."""

    def __init__(self, reader):
        self.reader = reader
        self._waiting: deque = deque()

    def __iter__(self) -> Iterator:
        for start, frame in self.reader.timed():
            self._waiting.append(start)
            yield frame

    def take(self, count: int) -> list:
        """Of the next frames."""
        return [self._waiting.popleft() for _ in range(count)]


def _has_own_times(reader) -> bool:
    """Would even frames lose something of its clip?"""
    if reader.time_base is None:
        return False
    return not reader.is_even or abs(reader.last_duration * Fraction(reader.fps) - 1) > 0.5


def _count(source: str) -> int:
    """Frames of a file, by decoding them: what a container says of their number is a hint."""
    from pylumiere.media.readers import VideoReader

    with VideoReader(source) as reader:
        return sum(1 for _ in reader)


def _write_stream(
    chunks, output: str, sheet: str | None, caption: str, times: _Times | None = None, pixel_aspect: float = 1
) -> dict[str, Any]:
    """Encodes chunks while the next are computed; keeps every 8th frame for the sheet."""
    import numpy as np

    from pylumiere.media.writers import BackgroundWriter, VideoWriter, write_sheet

    kept: list[tuple[int, Any]] = []
    num_frames = 0
    unit = None if times is None else times.reader.time_base
    with (
        chunks,
        VideoWriter(output, chunks.fps, time_base=unit, pixel_aspect=pixel_aspect) as writer,
        BackgroundWriter(lambda item: writer.write(*item)) as encoder,
    ):
        for chunk in chunks:
            if times is not None:
                writer.last_duration = times.reader.last_duration  # of a pipe known at its end
            encoder.put((chunk.frames, None if times is None else times.take(len(chunk.frames))))
            num_frames += len(chunk.frames)
            if sheet is not None and len(kept) < _MAX_TILES:
                first = -chunk.start % 8
                kept += [(chunk.start + i, chunk.frames[i].copy()) for i in range(first, len(chunk.frames), 8)]
    if sheet is not None and kept:
        numbers, frames = zip(*kept, strict=True)
        write_sheet(sheet, np.stack(frames), numbers, caption=caption)
    return {**chunks.metadata, "num_frames": num_frames}


def _report(
    output: str, sheet: str | None, metadata: dict[str, Any], seconds: dict[str, float], as_json: bool, streamed: bool
) -> None:
    from pylumiere.scheduling.memory import peak_resident_bytes

    outputs = {"output": absolute(output), "sheet": None if sheet is None else absolute(sheet)}
    file = sys.stderr if output == "-" else sys.stdout  # standard output carries the clip
    if as_json:
        inner = metadata.get("seconds")
        times = {**(inner if isinstance(inner, dict) else {}), **seconds}
        times = {name: round(value, 3) for name, value in times.items()}
        measured = {"seconds": times, "peak_resident_bytes": peak_resident_bytes()}
        print(json.dumps({**outputs, **metadata, **measured}), file=file)
        return
    facts = [
        f"{metadata['num_frames']} frames", f"{metadata['width']} x {metadata['height']}", f"{metadata['fps']:g} fps",
        f"seed {metadata['seed']}", f"{seconds['all']:.1f} s",
    ]  # fmt: skip
    if streamed:
        facts.append(f"first frames after {metadata['first_frame_seconds']:.1f} s")
    print(f"{outputs['output']}: {', '.join(facts)}", file=file)
    if sheet is not None:
        print(f"{outputs['sheet']}: contact sheet, every 8th frame", file=file)
