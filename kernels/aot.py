"""Compile kernels ahead of time for GPUs that are not here: `python -m pylumiere.kernels.aot --sku all`.

The launches to compile come from recordings on meta tensors: here of each operator's `aot_cases`, in the exporter of a
whole network. Compilation runs in worker processes without the interpreter, and results are kept in the user's cache
folder under a hash of the kernel's source, its constants, the target and the Triton version.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from pylumiere.kernels import OPS, launching
from pylumiere.kernels.tuning import ARCHITECTURES, SHARED_MEMORY

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Matrix instructions by their name in the machine code, most capable first.
_INSTRUCTIONS = (
    ("tcgen05", r"\bUTC[A-Z]*MMA"), ("wgmma", r"\b[HQI]GMMA"), ("mma", r"\b[HQID]MMA"), ("fma", r"\b(FFMA|HFMA2)"),
)  # fmt: skip


# ---- what to compile -----------------------------------------------------------------------------------------------


def op_launches(arch: int, dtype: torch.dtype, ops: Iterable[str] = OPS) -> dict[str, launching.Launch]:
    """Distinct launches of the operators' own cases: kernel and first case that makes it -> launch."""
    found: dict[str, tuple[str, launching.Launch]] = {}
    for op in ops:
        module = importlib.import_module(f"pylumiere.kernels.{op}")
        for name, run in module.aot_cases(dtype):
            with launching.record(arch) as recording:
                run()
            for launch in recording.launches:
                found.setdefault(launch.key(), (f"{launch.kernel.rpartition(':')[2]}: {name}", launch))
    return dict(found.values())


def distinct(launches: Iterable[launching.Launch]) -> dict[str, launching.Launch]:
    """Launches of a recording that need a compiled kernel of their own, named after kernel and number."""
    found: dict[str, launching.Launch] = {}
    for launch in launches:
        found.setdefault(launch.key(), launch)
    return {f"{i}: {launch.kernel.rpartition(':')[2]}": launch for i, launch in enumerate(found.values())}


# ---- compile one ---------------------------------------------------------------------------------------------------


def compile_one(specialisation: dict[str, Any], arch: int, folder: Path) -> dict[str, Any]:
    """Compile, or take from `folder`. Must run without TRITON_INTERPRET.

    Returns:
        facts: cubin (path), name, num_warps, shared, tmem, global_scratch, registers, stack, local, wide_loads,
        spills, instruction, parameters (run-time parameters of the machine code, in order).
    """
    kernel = launching.find_kernel(specialisation["kernel"])
    key = json.dumps([specialisation, arch, triton.__version__, kernel.cache_key, _FORMAT], sort_keys=True)
    stem = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
    facts_path, cubin_path = stem.with_suffix(".json"), stem.with_suffix(".cubin")
    if facts_path.exists() and cubin_path.exists():
        return json.loads(facts_path.read_text())

    names = kernel.arg_names
    signature = {n: specialisation["signature"].get(n, "constexpr") for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in specialisation["aligned"]}
    source = triton.compiler.ASTSource(kernel, signature, specialisation["constants"], aligned)
    options = {k: specialisation[k] for k in ("num_warps", "num_stages")}
    options["enable_fp_fusion"] = specialisation["fp_fusion"]
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=options)
    meta = compiled.metadata
    facts = {
        "cubin": str(cubin_path),
        "name": meta.name,
        "arch": arch,
        "num_warps": meta.num_warps,
        "shared": meta.shared,
        "tmem": getattr(meta, "tmem_size", None) or 0,
        "global_scratch": getattr(meta, "global_scratch_size", None) or 0,
        "parameters": [n for n in names if signature[n] != "constexpr"],
        **inspect_cubin(compiled.asm["cubin"]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for path, data in ((cubin_path, compiled.asm["cubin"]), (facts_path, json.dumps(facts).encode())):
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    return facts


_FORMAT = 2  # raise when the facts change


def inspect_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers, stack, local memory, spill instructions and the matrix instruction, read from machine code."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run(
            [tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    instruction = next((name for name, pattern in _INSTRUCTIONS if re.search(pattern, code)), "none")
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "local": numbers["LOCAL"],
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E\S*\.128\b|\bUTMALDG", code)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "instruction": instruction,
    }


# ---- compile many --------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pylumiere" / "kernels"


def compile_many(
    tasks: list[tuple[dict[str, Any], int]], *, jobs: int = 2, folder: Path | None = None
) -> list[dict[str, Any]]:
    """Facts of each (specialisation, arch), compiled in `jobs` worker processes; a failure gives {"error": text}."""
    folder = folder or cache_folder()
    workers: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
    started = [_start_worker(folder) for _ in range(max(1, min(jobs, len(tasks))))]
    for worker in started:
        workers.put(worker)

    def run(task: tuple[dict[str, Any], int]) -> dict[str, Any]:
        worker = workers.get()
        try:
            worker.stdin.write(json.dumps(task) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:  # the compiler took the process down
            worker.wait()
            workers.put(started.append(_start_worker(folder)) or started[-1])
            return {"error": f"the compiler process ended with status {worker.returncode}"}
        workers.put(worker)
        return json.loads(line)

    try:
        with concurrent.futures.ThreadPoolExecutor(len(started)) as pool:
            return list(pool.map(run, tasks))
    finally:
        for worker in started:
            worker.stdin.close()
            worker.stdout.close()
            worker.wait()


def _start_worker(folder: Path) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "pylumiere.kernels.aot", "--worker", str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _work(folder: Path) -> None:
    """A worker: one task a line in, one line of facts out. Anything else that prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        specialisation, arch = json.loads(line)
        try:
            facts = compile_one(specialisation, arch, folder)
        except Exception as error:  # any compiler error belongs in the table
            facts = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"}
        answers.write(json.dumps(facts) + "\n")
        answers.flush()


# ---- the table -----------------------------------------------------------------------------------------------------


def verdict(facts: dict[str, Any], arch: int) -> str:
    """ "ok", or what forbids shipping this kernel."""
    if "error" in facts:
        return facts["error"]
    faults = []
    if facts["spills"] or facts["local"]:
        faults.append(f"{facts['spills']} spill instructions")
    if facts["shared"] > SHARED_MEMORY[arch]:
        faults.append(f"shared memory {facts['shared']} of {SHARED_MEMORY[arch]}")
    return ", ".join(faults) or "ok"


def build_table(
    archs: Iterable[int], dtypes: Iterable[str], ops: Iterable[str] = OPS, *, jobs: int = 2, folder: Path | None = None
) -> list[dict[str, Any]]:
    """One row per operator case, dtype and architecture."""
    rows, tasks = [], []
    for arch in archs:
        for dtype in dtypes:
            if arch < 80 and dtype == "bf16":
                rows.append({"case": "all", "dtype": dtype, "arch": arch, "verdict": "not on this chip"})
                continue
            for case, launch in op_launches(arch, DTYPES[dtype], ops).items():
                rows.append({"case": case, "dtype": dtype, "arch": arch, "kernel": launch.kernel})
                tasks.append((launch.specialisation(), arch))
    results = iter(compile_many(tasks, jobs=jobs, folder=folder))
    for row in rows:
        if "verdict" not in row:
            facts = next(results)
            row.update(facts, verdict=verdict(facts, row["arch"]))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pylumiere.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--sku", action="append", help="all, or a compute capability such as sm90; may be repeated")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="default: all three")
    parser.add_argument("--op", action="append", choices=OPS, help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="compiler processes (default 2)")
    parser.add_argument("--json", metavar="FILE", help="write the table here as JSON")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        _work(Path(options.worker))
        return 0
    archs = _architectures(parser, options.sku or ["all"])
    rows = build_table(archs, options.dtype or tuple(DTYPES), options.op or OPS, jobs=options.jobs)
    print(f"{'sm':>4} {'dtype':5} {'regs':>4} {'stack':>5} {'spill':>5} {'shared':>7} {'instr':8} {'verdict':10} case")
    for row in rows:
        cells = [row.get(k, "-") for k in ("registers", "stack", "spills", "shared", "instruction")]
        regs, stack, spills, shared, instruction = cells
        print(
            f"{row['arch']:>4} {row['dtype']:5} {regs:>4} {stack:>5} {spills:>5} {shared:>7} {instruction:8} "
            f"{row['verdict']:10} {row['case']}"
        )
    bad = [row for row in rows if row["verdict"] not in ("ok", "not on this chip")]
    print(f"{len(rows)} rows, {len(bad)} not fit to ship")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if bad else 0


def _architectures(parser: argparse.ArgumentParser, names: list[str]) -> list[int]:
    archs: list[int] = []
    for name in names:
        if name == "all":
            archs += ARCHITECTURES
        elif name.removeprefix("sm").isdigit() and int(name.removeprefix("sm")) in ARCHITECTURES:
            archs.append(int(name.removeprefix("sm")))
        else:
            parser.error(f"--sku {name}: expected all or one of {', '.join(f'sm{a}' for a in ARCHITECTURES)}")
    return list(dict.fromkeys(archs))


if __name__ == "__main__":
    sys.exit(main())
