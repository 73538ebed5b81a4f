"""Everything that needs a GPU, in one go: python benchmarks/gpu_gate.py --out FOLDER

Builds the C++ extension, runs the tests that want a GPU and the kernel tests on it, then the benchmarks. Each step is
a process of its own with a time limit; a step that fails does not stop the others. Once --seconds are spent, the rest
is listed as not started: run it with --only. FOLDER receives `log.txt`, `rows.jsonl` (the benchmarks' rows) and
`summary.json` (each step with its status and seconds). A table of the benchmarks comes last. Exit status 0 means that
every step passed. `--smoke` runs what can run without a GPU, under Triton's interpreter, and times nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from _record import machine_facts

ROOT = Path(__file__).resolve().parent.parent
OPS = (
    "spatial_conv", "temporal_conv", "temporal_attention", "groupnorm_silu", "norm_affine", "layer_norm", "geglu",
    "denoise_step", "temporal_shift", "factorized_conv",
)  # fmt: skip
LEAST = 15  # seconds that are worth starting a step for


@dataclass(frozen=True)
class Step:
    """A command that is run from the repository's root."""

    name: str
    command: list[str]
    limit: int  # seconds


def steps(rows: Path, smoke: bool) -> list[Step]:
    found = []
    if not smoke:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # most of the time goes into compiling
        marked = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("tests/**/test_*.py")) if _has_gpu_tests(p)]
        found.append(Step("build", install, 200))
        found.append(Step("tests marked gpu", [*pytest, "-m", "gpu", *marked], 200))
        kernel_tests = ["tests/kernels", "tests/backends/test_triton.py"]
        found.append(Step("kernel tests", [*pytest, *parallel, "-m", "not gpu", *kernel_tests], 400))
    found.append(Step("bench forward stunet-b", _script("stunet", rows, smoke, "--network", "stunet-b"), 200))
    found.append(Step("bench forward stunet-l", _script("stunet", rows, smoke, "--network", "stunet-l"), 300))
    found.append(Step("bench forward ssr-l", _script("stunet", rows, smoke, "--network", "ssr-l"), 200))
    found.append(Step("bench clip", _script("clip", rows, smoke), 400))
    found += [Step(f"bench {op}", _script(op, rows, smoke), 300) for op in OPS]
    batches = ("--network", "stunet-b", "--batch", "1", "2", "4", "8", "--compile", "off")
    found.append(Step("bench batches", _script("stunet", rows, smoke, *batches), 200))
    return found


def _has_gpu_tests(path: Path) -> bool:
    return "mark.gpu" in path.read_text()


def _script(name: str, rows: Path, smoke: bool, *options: str) -> list[str]:
    command = [sys.executable, f"benchmarks/bench_{name}.py", "--json", str(rows), *options]
    return [*command, "--smoke"] if smoke else command


def run(step: Step, limit: float, log, environment: dict[str, str]) -> dict:
    """Run one step; its output goes to the log and its last line to the summary."""
    started = time.monotonic()
    print(f"== {step.name}: {' '.join(step.command)}", file=log, flush=True)
    try:
        done = subprocess.run(
            step.command, cwd=ROOT, env=environment, timeout=limit, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output, status = done.stdout, "passed" if done.returncode == 0 else f"failed with status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        status = f"stopped after {limit:.0f} s"
    print(output, file=log, flush=True)
    lines = output.strip().splitlines() or [""]
    seconds = round(time.monotonic() - started, 1)
    print(f"{step.name}: {status}, {seconds} s | {lines[-1][:120]}", flush=True)
    return {"step": step.name, "status": status, "seconds": seconds, "last_line": lines[-1]}


def table(rows: Path) -> list[str]:
    """A line for each measured case: our time, our share of the bound, and the best rival in multiples of our time."""
    cases: dict[tuple[str, str], dict[str, dict]] = {}
    for line in rows.read_text().splitlines() if rows.exists() else []:
        row = json.loads(line)
        if "seconds" in row and "provider" in row:
            cases.setdefault((row["op"], row["case"]), {})[row["provider"]] = row
    lines = []
    for (op, case), providers in cases.items():
        ours = providers.pop("pylumiere", None)
        if ours is None:
            continue
        text = f"{op:18} {case:34} {1e3 * ours['seconds']:9.3f} ms"
        text += f" {100 * ours['bound'] / ours['seconds']:5.1f} % of the bound" if "bound" in ours else ""
        if providers:
            name, best = min(providers.items(), key=lambda item: item[1]["seconds"])
            text += f", {name} takes {best['seconds'] / ours['seconds']:.2f} x"
        lines.append(text)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for log, rows and summary")
    parser.add_argument("--smoke", action="store_true", help="without a GPU: small shapes, nothing timed")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="steps whose name contains TEXT")
    parser.add_argument("--seconds", type=float, default=560, help="start no step beyond this; default 560")
    options = parser.parse_args()
    facts = machine_facts()
    if not options.smoke and "gpu" not in facts:
        print("gpu_gate: torch sees no GPU here; --smoke runs what can run without one", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    rows = (options.out / "rows.jsonl").resolve()
    chosen = steps(rows, options.smoke)
    chosen = [step for step in chosen if not options.only or any(text in step.name for text in options.only)]
    if not chosen:
        print(f"gpu_gate: no step contains {options.only}", file=sys.stderr)
        return 2
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    end = time.monotonic() + options.seconds
    with (options.out / "log.txt").open("w") as log:
        print(json.dumps(facts, indent=1), file=log)
        results = []
        for step in chosen:
            limit = min(step.limit, end - time.monotonic())
            if limit >= LEAST:
                results.append(run(step, limit, log, environment))
            else:
                results.append({"step": step.name, "status": "not started", "seconds": 0, "last_line": ""})
            summary = {"facts": facts, "smoke": options.smoke, "steps": results}
            (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    passed = sum(result["status"] == "passed" for result in results)
    print("\n".join(table(rows)))
    print(f"{passed} of {len(results)} steps passed")
    for result in results:
        if result["status"] != "passed":
            print(f"{result['step']}: {result['status']}")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
