"""Has something become slower? Two sets of rows compared by ratio to a rival of the same run, never by absolute time.

A row counts if it has "seconds". Rows of one measurement agree in "bench", "op", "case", "device" and "call_threads";
among them ours is divided by the reference, plain PyTorch in the same run.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pylumiere.bench.facts import read_rows
from pylumiere.errors import InvalidRequest

TOLERANCE = 0.15  # of the ratio; two runs on a quiet machine differ by less
OURS = ("pylumiere", "pylumiere bf16", "reference")
REFERENCES = ("eager", "eager fp32", "rival eager-fp32")


def read(path: Path) -> dict[tuple, float]:
    """The last ratio of each measurement in a file of rows.

    Raises:
        InvalidRequest: the file cannot be read, is not JSON lines, or holds nothing to compare with.
    """
    found = ratios(read_rows(path))
    if not found:
        raise InvalidRequest(f"--against {path}: no row of ours stands beside one of {' or '.join(REFERENCES)}")
    return found


def ratios(rows: Iterable[dict]) -> dict[tuple, float]:
    """Our seconds over the reference's, by measurement; later rows replace earlier ones."""
    ours: dict[tuple, float] = {}
    references: dict[tuple, float] = {}
    for row in rows:
        seconds, key = row.get("seconds"), tuple(row.get(k) for k in ("bench", "op", "case", "device", "call_threads"))
        if not isinstance(seconds, (int, float)) or seconds <= 0:
            continue
        if row.get("provider") in OURS:
            ours[key] = seconds
        elif row.get("provider") in REFERENCES:
            references[key] = seconds
    return {key: ours[key] / references[key] for key in ours if key in references}


def report(rows: Iterable[dict], earlier: dict[tuple, float], tolerance: float = TOLERANCE) -> int:
    """Prints each measurement that both have; returns how many are slower than before by more than `tolerance`.

    Raises:
        InvalidRequest: they have none in common.
    """
    now = ratios(rows)
    common = [key for key in now if key in earlier]
    if not common:
        raise InvalidRequest("--against: none of its measurements was made in this run")
    slower = 0
    for key in common:
        change = now[key] / earlier[key]
        slower += change > 1 + tolerance
        told = "SLOWER" if change > 1 + tolerance else "faster" if change < 1 - tolerance else "as before"
        name = " ".join(str(part) for part in key[:3] if part is not None)
        print(f"{name}: {now[key]:.3f} of the reference's time, before {earlier[key]:.3f}: {told}", flush=True)
    return slower
