"""`serve` and `serve-key`: the HTTP service."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from pylumiere.cli.options import Backend, Device, Key, MemoryBudget, Model, Precision, TemporalShift
from pylumiere.errors import InvalidRequest


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
    temporal_shift: TemporalShift = None,
    loras: Annotated[Path | None, typer.Option(help="Folder of LoRA files that requests may name.")] = None,
    memory_budget: MemoryBudget = None,
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
        device=device, precision=precision, trusted_key=key, temporal_shift=temporal_shift, loras=loras,
        concurrency=concurrency, limits=limits,
        memory_budget=None if memory_budget is None else parse_bytes("--memory-budget", memory_budget),
        keep_seconds=None if keep_for is None else parse_seconds("--keep-for", keep_for),
        keep_bytes=None if keep_size is None else parse_bytes("--keep-size", keep_size),
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended in order, then repeats the signal
        run(options)


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
