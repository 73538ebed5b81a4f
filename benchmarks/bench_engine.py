"""Requests one after the other and several at once: wall and CPU seconds a clip; and memory, planned against taken.

Run: python benchmarks/bench_engine.py [--json FILE] [--smoke]

`memory` rows come from a process each: the most that the planner counted while the requests ran, and the most that the
process held (VmHWM), both in bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

from _record import append_row

from pylumiere.engine import Engine

MEMORY_CASES = ((16, 1), (16, 4), (80, 1), (80, 3), (16, 8))  # frames, requests at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="append rows here")
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--frames", type=int, action="append", help="default: 16 and 80")
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--smoke", action="store_true", help="one short case of each")
    parser.add_argument("--memory-of", type=int, nargs=2, metavar=("FRAMES", "AT_ONCE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(memory_of(*options.memory_of, options.steps)))
        return

    def record(row: dict) -> None:
        print(json.dumps(row), flush=True)
        if options.json:
            append_row(options.json, {"bench": "engine", **row, "steps": options.steps})

    if options.only != "memory":
        with Engine.load("demo") as engine:
            for frames in (16,) if options.smoke else options.frames or (16, 80):
                for row in times(engine, frames, options.requests, options.steps):
                    record(row)
    if options.only != "time":
        for frames, at_once in MEMORY_CASES[:1] if options.smoke else MEMORY_CASES:
            command = [sys.executable, __file__, "--memory-of", str(frames), str(at_once), "--steps",
                       str(options.steps)]  # fmt: skip
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            record(json.loads(done.stdout))


def times(engine: Engine, frames: int, requests: int, steps: int):
    """One at a time, all at once, one at a time again."""
    fields = dict(num_frames=frames, num_inference_steps=steps)
    engine.generate("warm up", **fields)
    for at_once in (1, requests, 1):
        begun, cpu = time.perf_counter(), time.process_time()
        if at_once == 1:
            for seed in range(requests):
                engine.generate("a red circle", seed=seed, **fields)
        else:
            for job in [engine.submit("a red circle", seed=seed, **fields) for seed in range(at_once)]:
                job.result()
        yield {
            "case": "time", "frames": frames, "at_once": at_once,
            "seconds_per_clip": round((time.perf_counter() - begun) / requests, 4),
            "cpu_seconds_per_clip": round((time.process_time() - cpu) / requests, 4),
        }  # fmt: skip


def memory_of(frames: int, at_once: int, steps: int) -> dict:
    """Peaks of this process, which has done nothing before."""
    engine = Engine.load("demo", memory_budget=2**40, max_running=at_once)
    loaded, planned, ended = engine.metrics()["memory"]["resident"], [], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            planned.append(engine.metrics()["memory"]["planned"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    fields = dict(num_frames=frames, num_inference_steps=steps)
    jobs = [engine.submit("a red circle", seed=seed, **fields) for seed in range(at_once)]
    for job in jobs:
        job.result()
    ended.set()
    watcher.join()
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    return {"case": "memory", "frames": frames, "at_once": at_once, "loaded": loaded, "planned": max(planned),
            "peak": peak, "parts": engine._scheduler.budget.fixed}  # fmt: skip


if __name__ == "__main__":
    main()
