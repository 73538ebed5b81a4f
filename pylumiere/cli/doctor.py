"""`doctor`: what this machine can run."""

from __future__ import annotations

import json

from pylumiere.cli.options import Json


def doctor(as_json: Json = False) -> None:
    """Says what this machine can run, and what is missing for the rest."""
    from pylumiere.doctor import examine

    report = examine()
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print(report.to_text())
