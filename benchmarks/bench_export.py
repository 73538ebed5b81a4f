"""What an export costs: seconds, memory of all its processes together, sizes. Cold, then from the cache.

Run: python benchmarks/bench_export.py --model demo --sku all --json benchmarks/results/export.jsonl
A preset's name (stunet-b) is exported with random weights and the hash text encoder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from _record import append_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sku", action="append", default=[])
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--runs", type=int, default=2, help="the first is cold, the others are from the cache")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-export-") as folder:
        model = options.model
        if model not in ("demo",) and not Path(model).exists():
            model = str(Path(folder) / model)
            write_random(options.model, Path(model))
        command = [sys.executable, "-P", "-m", "pylumiere.cli", "export", "--model", model, "--json", "--force",
                   "-o", str(Path(folder) / "out.plm"), "--precision", options.precision]  # fmt: skip
        for sku in options.sku:
            command += ["--sku", sku]
        for name, value in (("--frames", options.frames), ("--size", options.size), ("--batch", options.batch)):
            command += [] if value is None else [name, str(value)]
        for run in range(options.runs):
            row = measure(command, Path(folder) / "cache")
            row = {"op": "export", "model": options.model, "skus": options.sku, "run": "cold" if run == 0 else "cached",
                   "frames": options.frames, "size": options.size, "batch": options.batch, **row}  # fmt: skip
            print(json.dumps({k: v for k, v in row.items() if k != "artefacts"}))
            if options.json:
                append_row(Path(options.json), row)


def write_random(preset: str, folder: Path) -> None:
    """A model folder with random weights in bf16."""
    import torch

    from pylumiere.checkpoints.native import save_checkpoint
    from pylumiere.networks.families import family_of
    from pylumiere.networks.stunet.presets import model_preset

    config = dataclasses.replace(model_preset(preset), text_encoder="hash")
    torch.manual_seed(0)

    def weights(network):
        state = family_of(network).build(network).state_dict()
        return {n: v if v.any() else torch.randn_like(v) * 0.02 for n, v in state.items()}

    networks = {name: weights(network) for name, network in config.networks.items()}
    save_checkpoint(folder, config, networks, dtype=torch.bfloat16)


def measure(command: list[str], cache: Path) -> dict:
    """Wall and CPU seconds of a command, and the most memory that it and its descendants held at once."""
    before, begun = os.times(), time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "XDG_CACHE_HOME": str(cache)}
    )
    peak, stop = [0], threading.Event()

    def watch():
        while not stop.wait(0.25):
            peak[0] = max(peak[0], sum(_private_bytes(pid) for pid in _family(process.pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    stop.set()
    watcher.join()
    after = os.times()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    report = json.loads(output)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "seconds": round(time.monotonic() - begun, 1), "cpu_seconds": round(cpu, 1), "peak_bytes": peak[0],
        "bundle_bytes": report["bytes"], "steps": report["steps"], "from_cache": report["cached"],
        "artefacts": report["artefacts"],
    }  # fmt: skip


def _family(root: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(
                    int(entry.name)
                )
            except (OSError, ValueError, IndexError):
                continue
    found, queue = [], [root]
    while queue:
        found.append(queue.pop())
        queue += parents.get(found[-1], [])
    return found


def _private_bytes(pid: int) -> int:
    """Memory of a process; what several map is counted by its share."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


if __name__ == "__main__":
    main()
