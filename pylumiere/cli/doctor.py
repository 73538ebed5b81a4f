"""`doctor`: what this machine can run, and how a model would."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pylumiere.cli.console import print_table
from pylumiere.cli.options import Json


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model to look at, too: a shipped name or a folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Says what this machine can run, and what is missing for the rest."""
    from pylumiere.doctor import examine

    described = None
    if model is not None:
        from pylumiere.inspecting import describe_model, model_tables

        described = describe_model(model)  # refuses before the machine is looked at
    report = examine()
    if as_json:
        print(json.dumps(report.to_dict() | ({} if described is None else {"model": described}), indent=1))
        return
    print(report.to_text())
    if described is not None:
        print()
        for part in model_tables(described):
            print_table(part)
