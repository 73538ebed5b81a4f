"""Facts that every measured row carries: machine, versions, commit, date."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pylumiere.errors import InvalidRequest

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, when installed from one
_ALL = ("pylumiere", "kernels", "export", "runtime")
_SOURCES = {".py", ".cpp", ".hpp", ".cu", ".cuh"}


def machine_facts() -> dict:
    """CPU, cores, GPU if any, library versions, commit and UTC date."""
    facts = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    for package in ("torch", "triton", "numpy"):
        facts[package] = package_version(package)
    import torch

    facts["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_hash(paths: Iterable[str]) -> str | None:
    """Of the Python and C++ sources under these paths of the repository: what a row measured, whatever the commit.

    None where there is no checkout.
    """
    digest = hashlib.sha256()
    for path in paths:
        place = ROOT / path
        if not place.exists():
            return None
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in _SOURCES)
        for file in files:
            digest.update(f"{file.relative_to(ROOT)}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def append_row(path: Path, row: dict) -> None:
    """Append one JSON line with the machine's facts, and the hash of all sources where the row names no smaller part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        row = {"source": source_hash(_ALL), **row, **machine_facts()}
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict]:
    """Rows of JSON lines.

    Raises:
        InvalidRequest: the file cannot be read or holds something else.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: {getattr(error, 'strerror', None) or 'is no text'}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line or "{}")
        except json.JSONDecodeError:
            raise InvalidRequest(f"{path}: line {number} is no JSON") from None
        if not isinstance(row, dict):
            raise InvalidRequest(f"{path}: line {number} is no row")
        rows.append(row)
    return rows


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"
