"""Requests one after the other and several at once: wall and CPU seconds a clip; memory, planned against taken; and how
long a cancelled request holds its place.

Run: python benchmarks/bench_engine.py [--json FILE] [--smoke]

`memory` rows come from a process each: the most that the planner counted while the requests ran, and the most that the
process held (VmHWM), both in bytes.

`cancel` rows: requests run and others wait; at random moments one that runs is cancelled. The time is that from the
call of `cancel()` to the admission of the request that waited longest, beside the mean time of one network call of each
stage in the same run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from _record import append_row

from pylumiere.engine import Engine
from pylumiere.scheduling.memory import peak_resident_bytes

MEMORY_CASES = ((16, 1), (16, 4), (80, 1), (80, 3), (16, 8))  # frames, requests at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="append rows here")
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--frames", type=int, action="append", help="default: 16 and 80")
    parser.add_argument("--only", choices=("time", "memory", "cancel"))
    parser.add_argument("--cancels", type=int, default=250)
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

    if options.only in (None, "time"):
        with Engine.load("demo") as engine:
            for frames in (16,) if options.smoke else options.frames or (16, 80):
                for row in times(engine, frames, options.requests, options.steps):
                    record(row)
    if options.only in (None, "cancel"):
        record(cancels(5 if options.smoke else options.cancels, 16, options.steps))
    if options.only in (None, "memory"):
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


def cancels(count: int, frames: int, steps: int, running: int = 3) -> dict:
    """Samples in which another request ended by itself at the same time do not count."""
    rng, milliseconds = random.Random(0), []
    with Engine.load("demo", max_running=running) as engine:
        fields = dict(num_frames=frames, num_inference_steps=steps)
        engine.generate("warm up", **fields)
        before, jobs = engine.metrics()["stages"], []
        while len(milliseconds) < count:
            jobs = [job for job in jobs if not job.done]
            while len(jobs) < running + 2:
                jobs.append(engine.submit("a red circle", seed=rng.getrandbits(32), **fields))
            time.sleep(rng.uniform(0.0, 0.3))
            working = [job for job in jobs if job.status == "running"]
            waiting = [job for job in jobs if job.status == "queued"]
            completed = engine.metrics()["requests"]["completed"]
            if len(working) < running or not waiting:
                continue
            begun = time.monotonic()
            if not rng.choice(working).cancel():
                continue
            while waiting[0].status == "queued":
                time.sleep(0.0002)
            if engine.metrics()["requests"]["completed"] == completed:
                milliseconds.append(1e3 * (waiting[0]._stage_begun - begun))
        after = engine.metrics()["stages"]
    calls = {
        stage: 1e3 * (after[stage]["call_seconds"] - before[stage]["call_seconds"])
        / max(1, after[stage]["calls"] - before[stage]["calls"])
        for stage in after
    }  # fmt: skip
    return {
        "case": "cancel", "frames": frames, "running": running, "cancels": count,
        "p50_ms": round(statistics.median(milliseconds), 3),
        "p99_ms": round(statistics.quantiles(milliseconds, n=100, method="inclusive")[98], 3),
        "max_ms": round(max(milliseconds), 3), "call_ms": {stage: round(ms, 2) for stage, ms in calls.items()},
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
    return {"case": "memory", "frames": frames, "at_once": at_once, "loaded": loaded, "planned": max(planned),
            "peak": peak_resident_bytes(), "parts": engine._scheduler.budget.fixed}  # fmt: skip


if __name__ == "__main__":
    main()
