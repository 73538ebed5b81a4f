"""What `pylumiere export` shows: bars while it builds, a table when it is done."""

from __future__ import annotations

import re
import sys
import threading
from typing import Any

from pylumiere.errors import InvalidRequest

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(text: str) -> int:
    """ "2GiB", "512MB" or a number of bytes; units are powers of 1024."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    value = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if value < 1:
        raise InvalidRequest(f"--memory-budget {text!r} is no size such as 2GiB or 512MiB")
    return value


class Bars:
    """One bar per step on a terminal; nothing elsewhere. Calls come from several threads."""

    def __init__(self):
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Bars:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[phase]}"), console=Console(stderr=True),
            )  # fmt: skip
            self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, job: str, done: float, phase: str) -> None:
        if self._progress is None:
            return
        with self._lock:
            if job not in self._tasks:
                self._tasks[job] = self._progress.add_task(job, total=1.0, phase="")
            # Builders count from the start again in each of their phases: only ever forward, full when done.
            self._progress.update(self._tasks[job], completed=done, phase=phase[:48])


def to_text(report: dict[str, Any]) -> str:
    """The report of `export_bundle` as a table."""
    rows = [("artefact", "for", "MB", "seconds", "")]
    for artefact in report["artefacts"]:
        cached = "from the cache" if artefact["cached"] else ""
        size, seconds = f"{artefact['bytes'] / 1e6:.1f}", f"{artefact['seconds']:.1f}"
        rows.append((artefact["name"], artefact["target"], size, seconds, cached))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for name, target, size, seconds, note in rows:
        cells = f"{name:<{widths[0]}}  {target:<{widths[1]}}  {size:>{widths[2]}}  {seconds:>{widths[3]}}"
        lines.append(f"{cells}  {note}".rstrip())
    lines += [f"not built: {note}" for note in report["notes"]]
    lines.append(
        f"{report['output']}: {report['bytes'] / 1e6:.1f} MB, {report['seconds']:.1f} s, "
        f"{report['cached']} of {report['steps']} steps from the cache"
    )
    return "\n".join(lines)
