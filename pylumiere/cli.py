"""One command line: generate, upscale, doctor, and whatever else is installed.

Exit codes: 0 done; 2 the user's mistake, said in one line on standard error; 130 interrupted; 1 our own failure, with
its traceback. Results go to standard output (one JSON object with --json), everything else to standard error. The
heavy imports happen inside the commands: `pylumiere --help` loads no torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pylumiere.errors import USER_ERRORS, InvalidRequest

if TYPE_CHECKING:
    from pylumiere.request import Progress

app = typer.Typer(
    name="pylumiere",
    help="Text to video by a Space-Time U-Net.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Names in a request's errors, and what the user typed for them.
_OPTIONS = {
    "negative_prompt": "--negative", "num_frames": "--frames", "height": "--size (height)", "width": "--size (width)",
    "num_inference_steps": "--steps", "guidance_scale": "--guidance", "window_frames": "--window",
    "window_overlap": "--overlap",
    "style_strength": "--style-strength",
    **{name: f"--{name}" for name in ("fps", "seed", "sampler", "image", "video", "mask", "strength")},
    **{name: f"--{name}" for name in ("keyframes", "expand", "fit", "style", "loop")},
}  # fmt: skip

_MAX_TILES = 200  # of a streamed clip's contact sheet


class _Interrupted(Exception):
    """Ctrl-C or SIGTERM, in a form that Typer does not answer itself."""

    def __init__(self, exit_code: int):
        self.exit_code = exit_code


class _Terminated(KeyboardInterrupt):
    """SIGTERM: clean up as after Ctrl-C."""


def _interruptible(command):
    @functools.wraps(command)
    def run(*arguments, **options):
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt as error:
            raise _Interrupted(143 if isinstance(error, _Terminated) else 130) from error

    return run


Model = Annotated[str, typer.Option(help="A shipped model's name (demo), a model folder or a bundle (name.plm).")]
Output = Annotated[str, typer.Option("-o", "--output", help=".mp4, .webm, .gif, a PNG folder, or - (mp4 to stdout).")]
Backend = Annotated[str, typer.Option(help="auto or a backend's name; see doctor.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")]
Key = Annotated[str | None, typer.Option(help="Public key in PEM: only a bundle that it signed is taken.")]
Sheet = Annotated[str | None, typer.Option(help="Also write a contact sheet, a PNG of every 8th frame.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same bytes; drawn at random if not given.")]
Window = Annotated[int | None, typer.Option(help="Frames of a super-resolution window.")]
Against = Annotated[Path | None, typer.Option(help="Rows of an earlier run; exit code 1 if we became slower.")]
Overlap = Annotated[int | None, typer.Option(help="Frames that neighbouring windows share.")]


@app.command()
@_interruptible
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    output: Output = "clip.mp4",
    model: Model = "demo",
    backend: Backend = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    key: Key = None,
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
    _check_outputs(output, sheet)
    width, height = _parse_size(size)
    given = request_fields(
        image=image, video=video, mask=mask, keyframes=parse_keyframes(keyframes or []), fps=fps, num_frames=frames
    )
    if expand is not None:
        given["expand"] = parse_expand(expand)
    with _Bars() as bars:
        request = GenerationRequest(
            prompt=prompt, negative_prompt=negative, height=height, width=width,
            num_inference_steps=steps, guidance_scale=guidance, sampler=sampler,
            seed=secrets.randbits(32) if seed is None else seed,
            fit=fit, strength=strength, style=style, style_strength=style_strength, loop=loop,
            window_frames=window, window_overlap=overlap, callback_on_step_end=bars.callback, **given,
        )  # fmt: skip
        engine = _load(model, backend, device, precision, key)
        loaded = time.monotonic()
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


@app.command()
@_interruptible
def upscale(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A video, a picture, a folder of PNG, or - (stdin).")],
    output: Output,
    model: Model = "demo",
    backend: Backend = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    key: Key = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the super-resolution network.")] = None,
    seed: Seed = 0,
    fps: Annotated[float | None, typer.Option(help="Frames a second; the input's own if not given.")] = None,
    window: Window = None,
    overlap: Overlap = None,
    loop: Annotated[bool, typer.Option("--loop", help="The clip's end meets its start.")] = False,
    sheet: Sheet = None,
    as_json: Json = False,
) -> None:
    """Super-resolution alone, for clips of any length. Sound is dropped."""
    from pylumiere.media.ffmpeg import PIPE
    from pylumiere.media.readers import VideoReader

    begun = time.monotonic()
    _check_outputs(output, sheet)
    if loop and source == PIPE:
        raise InvalidRequest("--loop needs an input whose length is known; - is a pipe")
    with VideoReader(source) as reader, _Bars() as bars:
        engine = _load(model, backend, device, precision, key)
        loaded = time.monotonic()
        chunks = engine.upscale(
            reader, fps=fps or reader.fps, num_frames=None if source == PIPE else reader.num_frames, seed=seed,
            loop=loop, num_inference_steps=steps, window_frames=window, window_overlap=overlap,
            callback_on_step_end=bars.callback,
        )  # fmt: skip
        metadata = _write_stream(chunks, output, sheet, "")
    seconds = {"load": loaded - begun, "all": time.monotonic() - begun}
    _report(output, sheet, metadata, seconds, as_json, True)


@app.command()
@_interruptible
def doctor(as_json: Json = False) -> None:
    """Says what this machine can run, and what is missing for the rest."""
    from pylumiere.doctor import examine

    report = examine()
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print(report.to_text())


bench = typer.Typer(no_args_is_help=True)
app.add_typer(bench, name="bench", help="Measurements on this machine.")


@bench.command("ops")
@_interruptible
def bench_ops(
    op: Annotated[list[str] | None, typer.Option(help="An operator; may be repeated. All if not given.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few values, checked but not timed.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Search tiles on this GPU; prints rows for a table.")] = False,
    rows: Annotated[Path | None, typer.Option("--json", help="Append a JSON line per measurement here.")] = None,
    vs: Annotated[str | None, typer.Option(help="Rivals: eager,compile,diffusers.")] = None,
    against: Against = None,
) -> int:
    """Times each operator against PyTorch, after checking its result."""
    from pylumiere.bench.ops import run

    return run(op or (), smoke=smoke, tune=tune, path=rows, vs=vs.split(",") if vs else None, against=against)


@bench.command("model")
@_interruptible
def bench_model(
    model: Model = "demo",
    stage: Annotated[list[str] | None, typer.Option(help="base or ssr; may be repeated. Both if not given.")] = None,
    vs: Annotated[str | None, typer.Option(help="Rivals: eager,compile,onnxruntime,openvino.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Of the rivals: fp32, bf16. Both if not given.")] = None,
    max_autotune: Annotated[bool, typer.Option("--max-autotune", help="torch.compile also in this mode.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Check the results, time nothing.")] = False,
    repeats: Annotated[int | None, typer.Option(min=2, help="Of each provider.")] = None,
    rows: Annotated[Path | None, typer.Option("--json", help="Append a JSON line per measurement here.")] = None,
    against: Against = None,
) -> int:
    """Times a model's networks on the CPU beside other software, after checking their results."""
    from pylumiere.bench.networks import run

    return run(
        model, stages=stage or (), vs=vs.split(",") if vs else None, precisions=precision or (), smoke=smoke,
        max_autotune=max_autotune, repeats=repeats, path=rows, against=against,
    )  # fmt: skip


@bench.command("e2e")
@_interruptible
def bench_e2e(
    model: Model = "demo",
    vs: Annotated[str | None, typer.Option(help="Rivals: eager,compile,onnxruntime,openvino.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each provider; the first is dropped of three or more.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the clip.")] = 7,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of the base network.")] = None,
    rows: Annotated[Path | None, typer.Option("--json", help="Append a JSON line per provider here.")] = None,
    against: Against = None,
) -> int:
    """Times a clip from a cold command to the finished mp4, beside other software that makes the same clip."""
    from pylumiere.bench.e2e import run

    families = vs.split(",") if vs else None
    return run(model, vs=families, rounds=rounds, seed=seed, steps=steps, path=rows, against=against)


@bench.command("plan")
@_interruptible
def bench_plan(
    model: Annotated[str, typer.Option(help="A preset: demo, stunet-b or stunet-l.")] = "stunet-l",
    sku: Annotated[list[str] | None, typer.Option(help="A GPU; may be repeated. All with known rates if none.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the clip.")] = None,
    size: Annotated[int | None, typer.Option(help="Height and width of the result.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the base network.")] = None,
    ssr_steps: Annotated[int | None, typer.Option(help="Denoising steps of the super-resolution network.")] = None,
    window: Window = None,
    overlap: Overlap = None,
    doubling: Annotated[bool, typer.Option("--doubling", help="Also: cost of twice T, H and W.")] = False,
    rates: Annotated[Path | None, typer.Option(help="Rows of bench model and e2e: predicts for their machine.")] = None,
    rows: Annotated[Path | None, typer.Option("--json", help="Append a JSON line per GPU here.")] = None,
) -> None:
    """Counts a clip's arithmetic and memory, and the time that a GPU's peak rates allow. Runs nothing on a GPU."""
    from pylumiere.bench import plan, predict
    from pylumiere.bench.facts import append_row, read_rows

    chips = plan.find_chips(sku or [])
    options = dict(frames=frames, size=size, steps=steps, ssr_steps=ssr_steps, window=window, overlap=overlap)
    clip = plan.plan_clip(model, **options)
    predicted = None
    if rates is not None:
        known = read_rows(rates)
        seconds = predict.predict_clip(predict.measured_networks(known, model), clip)
        own_size = all(value is None for value in options.values())
        measured = predict.measured_clip(known, model) if own_size else None
        predicted = {"machine": predict.machine_of(known), "predicted": seconds, "measured": measured}
    for table in plan.to_tables(model, clip, chips, plan.doubling(model) if doubling else None, predicted):
        _print_table(table)
    if rows is not None:
        if predicted is not None:
            append_row(rows, {"benchmark": "plan", "model": model, **options, **predicted})
        for row in plan.to_rows(clip, chips):
            append_row(rows, {"benchmark": "plan", "model": model, **options, **row})


def _print_table(table) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 200).print(table)


@app.command()
@_interruptible
def serve(
    model: Model = "demo",
    host: Annotated[str, typer.Option(help="Address; other than loopback needs --api-keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    data: Annotated[Path, typer.Option(help="Folder of jobs and results; made if missing.")] = Path("pylumiere-data"),
    api_keys: Annotated[Path | None, typer.Option(help="Key file; see serve-key. Without one: loopback only.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="Another name for the model; may be repeated.")] = None,
    backend: Backend = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    key: Key = None,
    memory_budget: Annotated[str | None, typer.Option(help="Of the engine, such as 4GiB.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Jobs in the engine at once.")] = 4,
    queue_limit: Annotated[int, typer.Option(min=1, max=10**6, help="Jobs that wait; more get 429.")] = 256,
    max_body: Annotated[str, typer.Option(help="Largest request.")] = "12MiB",
    max_pixels: Annotated[int, typer.Option(min=1, max=2**28, help="Largest input picture, or frame.")] = 2**24,
    max_decoded: Annotated[str, typer.Option(help="Largest input clip, once it is decoded.")] = "256MiB",
    max_frames: Annotated[
        int | None, typer.Option(min=1, max=10**6, help="Longest clip; 8 times the model's own length if not given.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(help="Time for a clip that asks for none, such as 10m; then it fails.")
    ] = None,
    keep_for: Annotated[str | None, typer.Option(help="Ended jobs are removed after this, such as 7d or 12h.")] = None,
    keep_size: Annotated[str | None, typer.Option(help="The oldest results are removed beyond this.")] = None,
) -> None:
    """Serves OpenAI's video API and a page."""
    try:
        from pylumiere.serve.app import Limits
        from pylumiere.serve.server import ServeOptions, parse_bytes, parse_seconds
        from pylumiere.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise InvalidRequest(f"the package {error.name} is missing; install pylumiere[serve]") from None
    limits = Limits(
        queue=queue_limit, body_bytes=parse_bytes("--max-body", max_body), image_pixels=max_pixels, frames=max_frames,
        decoded_bytes=parse_bytes("--max-decoded", max_decoded),
        deadline=None if deadline is None else parse_seconds("--deadline", deadline),
    )  # fmt: skip
    options = ServeOptions(
        model=model, aliases=tuple(alias or ()), host=host, port=port, data=data, api_keys=api_keys, backend=backend,
        device=device, precision=precision, trusted_key=key, concurrency=concurrency, limits=limits,
        memory_budget=None if memory_budget is None else parse_bytes("--memory-budget", memory_budget),
        keep_seconds=None if keep_for is None else parse_seconds("--keep-for", keep_for),
        keep_bytes=None if keep_size is None else parse_bytes("--keep-size", keep_size),
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended in order, then repeats the signal
        run(options)


@app.command()
@_interruptible
def serve_key(
    name: Annotated[str, typer.Argument(help="Of the key's owner.")],
    file: Annotated[Path | None, typer.Option(help="Key file to add it to; made if missing.")] = None,
    jobs: Annotated[int, typer.Option(min=1, max=10**6, help="Jobs of this key that wait or run.")] = 16,
    requests_per_minute: Annotated[int, typer.Option(min=1, max=10**6, help="Of this key.")] = 1200,
) -> None:
    """Makes an API key. It is shown once; the key file holds its hash."""
    from pylumiere.serve.keys import append_key, make_key

    key, line = make_key(name, jobs, requests_per_minute)
    if file is None:
        print(f"add to the key file:\n{line}", file=sys.stderr)
    else:
        append_key(file, line)
    print(key)


_Bundle = Annotated[str, typer.Argument(metavar="BUNDLE", help="A folder name.plm.")]


@app.command("export")
@_interruptible
def export_model(
    output: Annotated[str, typer.Option("-o", "--output", help="The bundle: NAME.plm.")],
    model: Annotated[str, typer.Option(help="A shipped model's name (demo), a model folder, or a bundle.")] = "demo",
    sku: Annotated[list[str] | None, typer.Option(help="rtx4090, h100, sm_89, ..., all, this; repeatable.")] = None,
    precision: Annotated[str, typer.Option(help="Of plans and cubins: auto, fp16, bf16 or fp32.")] = "auto",
    batch: Annotated[int, typer.Option(help="Largest batch; 2 is one clip with guidance.")] = 2,
    frames: Annotated[list[int] | None, typer.Option(help="Frames of a clip; repeatable.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="WIDTHxHEIGHT of a clip; repeatable.")] = None,
    per_sm: Annotated[bool, typer.Option("--per-sm", help="A plan per GPU kind beside the portable one.")] = False,
    memory_budget: Annotated[str | None, typer.Option(help="Workspace of a layer at most, such as 2GiB.")] = None,
    sign: Annotated[str | None, typer.Option(help="Private Ed25519 key in PEM; see keygen.")] = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Processes at once.")] = 2,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Builds a bundle for the GPUs of a fleet, on a machine that needs none of them."""
    from pylumiere.export.build import ExportOptions, export_bundle
    from pylumiere.export.console import Bars, parse_bytes, to_text

    sizes = tuple(_parse_size(one) for one in size or ())
    options = ExportOptions(
        skus=tuple(sku or ()), precision=precision, batch=batch, frames=tuple(frames or ()),
        sizes=tuple((height, width) for width, height in sizes), per_sm=per_sm,
        memory_budget=None if memory_budget is None else parse_bytes(memory_budget), jobs=jobs,
    )  # fmt: skip
    with Bars() as bars:
        report = export_bundle(model, output, options, force=force, sign_key=sign, on_progress=bars.update)
    print(json.dumps(report) if as_json else to_text(report))


@app.command("inspect")
@_interruptible
def inspect_bundle(
    path: _Bundle,
    key: Key = None,
    sku: Annotated[str | None, typer.Option(help="Ask for this card instead of this machine, such as rtx4090.")] = None,
    backend: Backend = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
) -> None:
    """Says what is in a bundle, what would run here, and why; checks hashes first."""
    from pylumiere.inspecting import inspect, inspect_tables

    report = inspect(path, key, sku, backend, precision)
    if as_json:
        print(json.dumps(report, indent=1))
        return
    for part in inspect_tables(report):
        _print_table(part)


@app.command("verify")
@_interruptible
def verify_bundle(
    path: _Bundle,
    key: Key = None,
    full: Annotated[bool, typer.Option("--full", help="Also at every size of the receipts, the largest too.")] = False,
    as_json: Json = False,
) -> None:
    """Checks a bundle's hashes and signature, and runs its graphs beside its weights."""
    from pylumiere.inspecting import verify, verify_lines

    report = verify(path, key, full=full)
    print(json.dumps(report, indent=1) if as_json else "\n".join(verify_lines(report)))


@app.command("keygen")
@_interruptible
def make_keys(
    private: Annotated[str, typer.Argument(help="File for the private key (PEM); for --sign, never for a server.")],
    public: Annotated[str | None, typer.Option(help="For the public key; PRIVATE with the ending .pub.pem.")] = None,
) -> None:
    """Makes an Ed25519 key pair for signing bundles."""
    from pylumiere.checkpoints.bundle import make_key_pair

    public = str(Path(private).with_suffix(".pub.pem")) if public is None else public
    make_key_pair(private, public)
    print(f"{_absolute(private)}: private key\n{_absolute(public)}: public key")


def _load(model: str, backend: str, device: str, precision: str, key: str | None):
    from pylumiere.engine import Engine

    return Engine.load(model, backend=backend, device=device, precision=precision, trusted_key=key)


def _check_outputs(output: str, sheet: str | None) -> None:
    """Before anything is computed: can the results be written?"""
    from pylumiere.media.writers import check_sheet_path, output_format

    output_format(output)
    if sheet is not None:
        check_sheet_path(sheet)


def _parse_size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text.strip().lower())
    if match is None:
        raise InvalidRequest(f"--size {text!r} is neither WIDTHxHEIGHT nor one number, such as 128x128 or 128")
    return int(match[1]), int(match[2] or match[1])


def _write_stream(chunks, output: str, sheet: str | None, caption: str) -> dict[str, Any]:
    """Encodes chunks while the next are computed; keeps every 8th frame for the sheet."""
    import numpy as np

    from pylumiere.media.writers import BackgroundWriter, VideoWriter, write_sheet

    kept: list[tuple[int, Any]] = []
    num_frames = 0
    with chunks, VideoWriter(output, chunks.fps) as writer, BackgroundWriter(writer.write) as encoder:
        for chunk in chunks:
            encoder.put(chunk.frames)
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

    outputs = {"output": _absolute(output), "sheet": None if sheet is None else _absolute(sheet)}
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


def _absolute(path: str) -> str:
    return path if path == "-" else str(Path(path).absolute())


class _Bars:
    """One progress bar per stage on a terminal; nothing elsewhere."""

    def __init__(self):
        self._progress = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Bars:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            name, left = TextColumn("{task.description:<17}"), TextColumn("{task.fields[left]}")
            self._progress = Progress(name, BarColumn(), MofNCompleteColumn(), left, console=Console(stderr=True))
            self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @property
    def callback(self):
        return None if self._progress is None else self._on_step

    def _on_step(self, progress: Progress) -> None:
        bars = self._progress
        if bars is None:
            return
        if progress.stage not in self._tasks:
            name = {"base": "base", "ssr": "super-resolution"}.get(progress.stage, progress.stage)
            self._tasks[progress.stage] = bars.add_task(name, total=progress.steps, left="")
        left = "" if progress.seconds_left is None else f"{progress.seconds_left:.0f} s left"
        bars.update(self._tasks[progress.stage], completed=progress.step, total=progress.steps, left=left)


def _on_sigterm(number, frame):
    raise _Terminated


def _explain(error: BaseException) -> str:
    """A user's error in one line, in the names that were typed."""
    names = "|".join(_OPTIONS)
    text = " ".join(str(error).split())
    return re.sub(rf"(^|; |, )({names})(?=[=:])", lambda match: match[1] + _OPTIONS[match[2]], text)


def _spread(arguments: list[str]) -> list[str]:
    """`--keyframes A B` as `--keyframes A --keyframes B`: an option with several values, which click does not know."""
    spread: list[str] = []
    values = -1  # that the option has had; -1: another option
    for argument in arguments:
        if values >= 0 and (values == 0 or re.match(r"(-?\d+|first|last):", argument)):
            spread += ["--keyframes", argument]
            values += 1
        elif argument == "--keyframes":
            values = 0
        else:
            spread.append(argument)
            values = -1
    return spread + ["--keyframes"] * (values == 0)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _on_sigterm)
    arguments = _spread(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(arguments, prog_name="pylumiere", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except USER_ERRORS as error:
        return _fail(_explain(error))
    except _Interrupted as error:
        print("pylumiere: interrupted; nothing was written", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # Typer's usage errors share no public base over its versions
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 2
        if hasattr(error, "format_message"):
            return _fail(" ".join(error.format_message().split()))
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nobody to tell
            return 0
        raise


def _fail(text: str) -> int:
    print(f"pylumiere: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
