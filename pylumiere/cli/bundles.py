"""`export`, `inspect`, `verify` and `keygen`: bundles and their keys; `inspect` also looks at model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pylumiere.cli.console import absolute, print_table
from pylumiere.cli.options import Backend, Json, Key, Precision, TemporalShift, parse_size
from pylumiere.errors import InvalidRequest

_Bundle = Annotated[str, typer.Argument(metavar="BUNDLE", help="A folder name.plm.")]


def export_model(
    output: Annotated[str, typer.Option("-o", "--output", help="The bundle: NAME.plm.")],
    model: Annotated[str, typer.Option(help="A shipped model's name (demo), a model's folder, or a bundle.")] = "demo",
    sku: Annotated[list[str] | None, typer.Option(help="rtx4090, h100, sm_89, ..., all, this; repeatable.")] = None,
    precision: Annotated[str, typer.Option(help="Of plans and cubins: auto, fp16, bf16 or fp32.")] = "auto",
    batch: Annotated[int, typer.Option(help="Largest batch; 2 is one clip with guidance.")] = 2,
    frames: Annotated[list[int] | None, typer.Option(help="Frames of a clip; repeatable.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="WIDTHxHEIGHT of a clip; repeatable.")] = None,
    per_sm: Annotated[bool, typer.Option("--per-sm", help="A plan per GPU kind beside the portable one.")] = False,
    memory_budget: Annotated[str | None, typer.Option(help="Workspace of a layer at most, such as 2GiB.")] = None,
    temporal_shift: TemporalShift = None,
    sign: Annotated[str | None, typer.Option(help="Private Ed25519 key in PEM; see keygen.")] = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Processes at once.")] = 2,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Builds a bundle for the GPUs of a fleet, on a machine that needs none of them."""
    from pylumiere.export.build import ExportOptions, export_bundle
    from pylumiere.export.console import Bars, parse_bytes, to_text

    sizes = tuple(parse_size(one) for one in size or ())
    options = ExportOptions(
        skus=tuple(sku or ()), precision=precision, batch=batch, frames=tuple(frames or ()),
        sizes=tuple((height, width) for width, height in sizes), per_sm=per_sm,
        memory_budget=None if memory_budget is None else parse_bytes(memory_budget), jobs=jobs,
    )  # fmt: skip
    with Bars() as bars:
        report = export_bundle(model, output, options, force=force, sign_key=sign,
                               temporal_shift=temporal_shift, on_progress=bars.update)  # fmt: skip
    print(json.dumps(report) if as_json else to_text(report))


def inspect_model(
    path: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A bundle, a shipped model's name, a model folder, or a folder of diffusers."
        ),
    ],
    key: Key = None,
    sku: Annotated[str | None, typer.Option(help="Ask for this card instead of this machine, such as rtx4090.")] = None,
    backend: Backend = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
) -> None:
    """Says what is in a bundle or a model folder, what would run here, and why; checks a bundle's hashes first."""
    from pylumiere.checkpoints.bundle import is_bundle
    from pylumiere.checkpoints.native import SHIPPED
    from pylumiere.inspecting import describe_model, inspect, inspect_tables, model_tables

    if path not in SHIPPED and is_bundle(path):
        report = inspect(path, key, sku, backend, precision)
        parts = inspect_tables(report)
    else:
        for option, value in (("--key", key), ("--sku", sku)):
            if value is not None:
                raise InvalidRequest(f"{option} is for bundles, and {path!r} is none")
        report = describe_model(path, backend, precision)
        parts = model_tables(report)
    if as_json:
        print(json.dumps(report, indent=1))
        return
    for part in parts:
        print_table(part)


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


def make_keys(
    private: Annotated[str, typer.Argument(help="File for the private key (PEM); for --sign, never for a server.")],
    public: Annotated[str | None, typer.Option(help="For the public key; PRIVATE with the ending .pub.pem.")] = None,
) -> None:
    """Makes an Ed25519 key pair for signing bundles."""
    from pylumiere.checkpoints.bundle import make_key_pair

    public = str(Path(private).with_suffix(".pub.pem")) if public is None else public
    make_key_pair(private, public)
    print(f"{absolute(private)}: private key\n{absolute(public)}: public key")
