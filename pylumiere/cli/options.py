"""Options that several verbs have."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from pylumiere.errors import InvalidRequest

Model = Annotated[
    str, typer.Option(help="A shipped model's name (demo), a model folder, one of diffusers, or a bundle (name.plm).")
]
Backend = Annotated[str, typer.Option(help="auto or a backend's name; see doctor.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")]
Key = Annotated[str | None, typer.Option(help="Public key in PEM: only a bundle that it signed is taken.")]
MemoryBudget = Annotated[str | None, typer.Option(help="Most memory of the engine, such as 4GiB.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")]
Window = Annotated[int | None, typer.Option(help="Frames of a window, of super-resolution or of the only network.")]
Overlap = Annotated[int | None, typer.Option(help="Frames that neighbouring windows share.")]

TemporalShift = Annotated[
    int | None,
    typer.Option(metavar="N", help="For a picture model: a clip by shifting 1/N of the channels each way; 8."),
]


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text.strip().lower())
    if match is None:
        raise InvalidRequest(f"--size {text!r} is neither WIDTHxHEIGHT nor one number, such as 128x128 or 128")
    return int(match[1]), int(match[2] or match[1])
