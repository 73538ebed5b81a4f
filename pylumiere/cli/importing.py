"""`import`: files of other programs as a model folder."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pylumiere.cli.console import absolute
from pylumiere.cli.options import Json


def import_source(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A .safetensors file of Stable Diffusion 1 or 2, or a diffusers folder."),
    ],
    output: Annotated[str, typer.Option("-o", "--output", help="The folder to write; it must not exist.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with tokenizer.json, or with vocab.json and merges.txt.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="A diffusers folder whose JSON files describe the single file.")
    ] = None,
    prediction_type: Annotated[str | None, typer.Option(help="Of a single file: epsilon or v_prediction.")] = None,
    as_json: Json = False,
) -> None:
    """Writes a folder that --model takes from a single file, or from a diffusers folder with pickled weights."""
    from pylumiere.checkpoints.importing import import_model

    folder = import_model(source, output, tokenizer=tokenizer, config=config, prediction_type=prediction_type)
    height, width = folder.config.size
    if as_json:
        print(json.dumps({"folder": absolute(output), "parameters": folder.parameters, "size": [width, height]}))
    else:
        print(f"{absolute(output)}: {folder.parameters:,} weights, {width} x {height} pixels")
