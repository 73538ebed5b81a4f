"""The service under load: many clients, mixed requests, against the same requests one at a time.

Run: python benchmarks/bench_serve.py --seconds 300 --json benchmarks/results/serve.jsonl --plot docs/images/serve.png

Every client sends a request, waits for its end, fetches the clip and decodes it, deletes it now and then, and goes on.
The server runs in a process of its own. Counted: errors, accepted jobs that did not end, latencies from
request to clip, resident memory of the server over time. "One at a time" is one client on an otherwise idle server.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
from _record import append_row

from pylumiere.media.readers import VideoReader
from pylumiere.scheduling.memory import parse_bytes

THINGS = ("a red circle moves right over grass", "a blue square falls", "a green star grows", "a yellow ring spins")
MIX = (  # short requests that differ in everything a batch may mix
    {"num_frames": 8, "num_inference_steps": 2},
    {"num_frames": 8, "num_inference_steps": 3, "guidance_scale": 1.0},
    {"num_frames": 16, "num_inference_steps": 2, "sampler": "ddim"},
    {"num_frames": 12, "num_inference_steps": 2, "guidance_scale": 3.0},
)


class Server:
    def __init__(self, model: str, folder: str, budget: str | None, concurrency: int):
        command = [sys.executable, "-P", "-m", "pylumiere.cli", "serve", "--model", model, "--port", "0",
                   "--data", folder, "--concurrency", str(concurrency), "--queue-limit", "1000"]  # fmt: skip
        command += [] if budget is None else ["--memory-budget", budget]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        match = re.search(r"http://\S+", self.process.stdout.readline())
        if match is None:
            raise SystemExit("the server did not start")
        self.url = match[0]
        while httpx.get(f"{self.url}/readyz").status_code != 200:
            time.sleep(0.1)

    def memory(self, name: str) -> int:
        """VmRSS now or VmHWM, its peak, in bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def load(server: Server, clients: int, seconds: float, seed: int) -> dict:
    """Closed loop: each client has one request under way."""
    latencies: list[float] = []
    accepted, ended, errors = set(), set(), []
    frames = [0]
    lock, begun = threading.Lock(), time.monotonic()

    def client(number: int) -> None:
        draw = random.Random(seed * 1000 + number)
        with httpx.Client(base_url=server.url, timeout=120) as http:
            while time.monotonic() - begun < seconds:
                request = {"prompt": draw.choice(THINGS), "seed": draw.randrange(2**31), **draw.choice(MIX)}
                sent = time.monotonic()
                try:
                    outcome = one(http, request, draw)
                except Exception as error:  # any failure of the service is an error of the row
                    outcome = f"{type(error).__name__}: {error}"
                with lock:
                    if outcome == "completed":
                        latencies.append(time.monotonic() - sent)
                        frames[0] += request["num_frames"]
                    else:
                        errors.append(outcome)

    def one(http: httpx.Client, request: dict, draw: random.Random) -> str:
        answer = http.post("/v1/videos", json=request)
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:100]}"
        id = answer.json()["id"]
        with lock:
            accepted.add(id)
        with http.stream("GET", f"/v1/videos/{id}/events") as events:
            last = [line[7:] for line in events.iter_lines() if line.startswith("event: ")][-1]
        with lock:
            ended.add(id)
        if last != "completed":
            return f"the job ended with {last}"
        content = http.get(f"/v1/videos/{id}/content")
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            file.write(content.content)
            file.flush()
            with VideoReader(file.name) as reader:
                if sum(1 for _ in reader) != request["num_frames"]:
                    return "the clip has another number of frames"
        if draw.random() < 0.5:
            http.delete(f"/v1/videos/{id}")
        return "completed"

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        memory.append((round(time.monotonic() - begun, 2), server.memory("VmRSS")))
        time.sleep(min(1.0, seconds / 20))
    took = time.monotonic() - begun
    quantiles = np.quantile(latencies, [0.5, 0.95, 0.99]).round(3).tolist() if latencies else [None] * 3
    return {
        "clients": clients, "seconds": round(took, 1), "requests": len(latencies), "errors": len(errors),
        "first_errors": errors[:3], "lost": len(accepted - ended), "p50": quantiles[0], "p95": quantiles[1],
        "p99": quantiles[2], "clips_per_second": round(len(latencies) / took, 3),
        "frames_per_second": round(frames[0] / took, 2), "memory": memory, "latencies": latencies,
    }  # fmt: skip


def slope(memory: list[tuple[float, int]]) -> float:
    """MiB a minute over the second half of the run, by least squares."""
    half = memory[len(memory) // 2 :]
    if len(half) < 3:
        return 0.0
    times, sizes = np.array(half, float).T
    return float(np.polyfit(times / 60, sizes / 2**20, 1)[0])


def plot(path: str, many: dict, one: dict, budget: int | None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for row, name in ((one, "1 client"), (many, f"{many['clients']} clients")):
        values = np.sort(row["latencies"])
        shares = np.arange(1, len(values) + 1) / len(values)
        left.plot(values, shares, label=f"{name}: {row['clips_per_second']:.2f} clips/s")
    left.set(xlabel="seconds from request to clip", ylabel="share of requests", xscale="log", ylim=(0, 1.02))
    left.legend(frameon=False)
    times, sizes = np.array(many["memory"], float).T
    right.plot(times, sizes / 2**20, label="resident memory of the server")
    if budget is not None:
        right.axhline(budget / 2**20, color="tab:red", linestyle="--", label="budget")
    right.set(xlabel="seconds", ylabel="MiB", ylim=(0, None))
    right.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--one-seconds", type=float, help="of the comparison; a fifth of --seconds if not given")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--memory-budget", default="4GiB")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot")
    options = parser.parse_args()
    one_seconds = options.one_seconds or options.seconds / 5
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.model, folder, options.memory_budget, options.concurrency)
        try:
            load(server, 1, min(5.0, one_seconds), seed=9)  # warm-up
            one = load(server, 1, one_seconds, seed=1)
            many = load(server, options.clients, options.seconds, seed=2)
            peak = server.memory("VmHWM")
            metrics = httpx.get(f"{server.url}/metrics").text
        finally:
            server.close()
    budget = parse_bytes(options.memory_budget)
    batches = re.findall(r"^pylumiere_engine_(\S+) (\S+)$", metrics, re.MULTILINE)
    row = {
        "bench": "serve", "model": options.model, "concurrency": options.concurrency, "cpus": os.cpu_count(),
        "one": {name: value for name, value in one.items() if name not in ("memory", "latencies")},
        "many": {name: value for name, value in many.items() if name not in ("memory", "latencies")},
        "speedup": round(many["clips_per_second"] / max(1e-9, one["clips_per_second"]), 3),
        "peak_MiB": round(peak / 2**20, 1), "budget_MiB": budget and round(budget / 2**20, 1),
        "under_budget": budget is None or peak <= budget, "growth_MiB_per_minute": round(slope(many["memory"]), 2),
        "engine": {name: float(value) for name, value in batches},
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    if options.json:
        append_row(options.json, row)
    if options.plot:
        plot(options.plot, many, one, budget)
    if many["errors"] or many["lost"] or one["errors"] or not row["under_budget"]:
        sys.exit("bench_serve: errors, lost jobs, or more memory than the budget; see the row")


if __name__ == "__main__":
    main()
