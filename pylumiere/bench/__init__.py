"""Measurements: `pylumiere bench`, and what the scripts in benchmarks/ share."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from pylumiere.errors import InvalidRequest


def check_names(option: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raises InvalidRequest for a name that is not known; the option and what is allowed are named."""
    for name in names:
        if name not in known:
            raise InvalidRequest(f"{option} {name!r} is not one of {', '.join(known)}")
