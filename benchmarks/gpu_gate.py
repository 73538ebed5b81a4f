"""Everything that needs a GPU, in one go: python benchmarks/gpu_gate.py --out FOLDER

Builds the C++ extension, runs the tests that want a GPU and the kernel tests on it, then the benchmarks. Each step is
a process of its own with a time limit; a step that fails does not stop the others. FOLDER receives `log.txt`,
`rows.jsonl` (the benchmarks' rows) and `summary.json` (each step with its status and seconds). Exit status 0 means
that every step passed. `--smoke` runs what can run without a GPU, under Triton's interpreter, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from _record import machine_facts

ROOT = Path(__file__).resolve().parent.parent
OPS = tuple(
    path.stem.removeprefix("bench_")
    for path in sorted(Path(__file__).parent.glob("bench_*.py"))
    if path.stem != "bench_stunet"
)


@dataclass(frozen=True)
class Step:
    """A command that is run from the repository's root."""

    name: str
    command: list[str]
    limit: int  # seconds


def steps(rows: Path, smoke: bool) -> list[Step]:
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    install = [python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
    found = []
    if not smoke:
        found.append(Step("build", install, 300))
        found.append(Step("tests marked gpu", [*pytest, "-m", "gpu", "tests"], 300))
        found.append(Step("kernel tests", [*pytest, "tests/kernels", "tests/backends"], 600))
    for op in OPS:
        found.append(Step(f"bench {op}", _benchmark(op, rows, smoke), 300))
    found.append(Step("bench forward", _benchmark("stunet", rows, smoke), 600))
    return found


def _benchmark(name: str, rows: Path, smoke: bool) -> list[str]:
    command = [sys.executable, f"benchmarks/bench_{name}.py", "--json", str(rows)]
    return [*command, "--smoke"] if smoke else command


def run(step: Step, log, environment: dict[str, str]) -> dict:
    """Run one step; its output goes to the log and its last line to the summary."""
    started = time.monotonic()
    print(f"== {step.name}: {' '.join(step.command)}", file=log, flush=True)
    try:
        done = subprocess.run(
            step.command, cwd=ROOT, env=environment, timeout=step.limit, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output, status = done.stdout, "passed" if done.returncode == 0 else f"failed with status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        status = f"stopped after {step.limit} s"
    print(output, file=log, flush=True)
    lines = output.strip().splitlines() or [""]
    seconds = round(time.monotonic() - started, 1)
    print(f"{step.name}: {status}, {seconds} s | {lines[-1][:120]}", flush=True)
    return {"step": step.name, "status": status, "seconds": seconds, "last_line": lines[-1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for log, rows and summary")
    parser.add_argument("--smoke", action="store_true", help="without a GPU: small shapes, nothing timed")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="steps whose name contains TEXT")
    options = parser.parse_args()
    facts = machine_facts()
    if not options.smoke and "gpu" not in facts:
        print("gpu_gate: torch sees no GPU here; --smoke runs what can run without one", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if options.smoke:
        environment["TRITON_INTERPRET"] = "1"
    chosen = steps((options.out / "rows.jsonl").resolve(), options.smoke)
    chosen = [step for step in chosen if not options.only or any(text in step.name for text in options.only)]
    if not chosen:
        print(f"gpu_gate: no step contains {options.only}", file=sys.stderr)
        return 2
    with (options.out / "log.txt").open("w") as log:
        print(json.dumps(facts, indent=1), file=log)
        results = []
        for step in chosen:
            results.append(run(step, log, environment))
            summary = {"facts": facts, "smoke": options.smoke, "steps": results}
            (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return 0 if all(result["status"] == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
