"""Compile kernels ahead of time for GPUs that are not here: `python -m pylumiere.kernels.aot --sku all`.

The launches to compile come from recordings on meta tensors: of the named networks, each in the number format that
the chip runs them in, and of every operator's `aot_cases` in that format and in float32. What two recordings share is
compiled once. float16 takes the tiles of bfloat16: `--dtype fp16` compiles it on chips that have both.
Compilation runs in worker processes without the interpreter, and results are kept in the user's cache folder under a
hash of the kernel's source, its constants, the target and the Triton version.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib
import json
import os
import pkgutil
import queue
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
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
# What a matrix product in 16 bits must become on each chip; Triton has no matrix instruction for sm 75.
EXPECTED = {75: "fma", 80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
# Called with one of `NETWORKS`, a capability and a dtype; returns a Recording. Found by its name when it is needed,
# since the kernels import nothing of the networks that run on them.
RECORDER = "pylumiere.backends.triton:record_preset"
NETWORKS = ("demo-base", "demo-ssr", "stunet-b", "ssr-b", "stunet-l", "ssr-l")


# ---- what to compile -----------------------------------------------------------------------------------------------


def op_launches(arch: int, dtype: torch.dtype, ops: Iterable[str] = OPS) -> dict[str, launching.Launch]:
    """Distinct launches of the operators' own cases, by kernel and first case."""

    def named() -> Iterator[tuple[str, launching.Launch]]:
        for op in ops:
            for case, run in importlib.import_module(f"pylumiere.kernels.{op}").aot_cases(dtype):
                with launching.record(arch) as recording:
                    run()
                for launch in recording.launches:
                    yield f"{_function(launch)}: {case}", launch

    return _distinct(named())


def network_launches(arch: int, dtype: torch.dtype, networks: Iterable[str] = NETWORKS) -> dict[str, launching.Launch]:
    """Distinct launches of named networks, by kernel and the first network and sizes that need it."""
    record = pkgutil.resolve_name(RECORDER)

    def named() -> Iterator[tuple[str, launching.Launch]]:
        for network in networks:
            for launch in record(network, arch, dtype).launches:
                sizes = "-".join(f"{name}{launch.args[name]}" for name in ("T", "H", "C", "O") if name in launch.args)
                yield f"{_function(launch)}: {network} {sizes}", launch

    return _distinct(named())


def _function(launch: launching.Launch) -> str:
    return launch.kernel.rpartition(":")[2]


def _distinct(named: Iterable[tuple[str, launching.Launch]]) -> dict[str, launching.Launch]:
    """The first launch of each compiled kernel; a name that is taken gets a number."""
    found: dict[str, tuple[str, launching.Launch]] = {}
    uses: Counter[str] = Counter()
    for name, launch in named:
        if launch.key() not in found:
            uses[name] += 1
            found[launch.key()] = (name if uses[name] == 1 else f"{name} ({uses[name]})", launch)
    return dict(found.values())


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
        **inspect_cubin(compiled.asm["cubin"], has_products(specialisation["constants"])),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for path, data in ((cubin_path, compiled.asm["cubin"]), (facts_path, json.dumps(facts).encode())):
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    return facts


_FORMAT = 3  # raise when the facts change


def inspect_cubin(cubin: bytes, has_products: bool = True) -> dict[str, Any]:
    """Registers, stack, local memory, spill instructions and the matrix instruction, read from machine code.

    Disassembly, a third of a small kernel's time, is left out where nothing is on the stack and no product looked for.
    """
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def read(tool: str, *options: str) -> str:
            command = [tools / tool, *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = read("cuobjdump", "--dump-resource-usage")
        numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
        is_plain = not (has_products or numbers["STACK"] or numbers["LOCAL"])
        code = "" if is_plain else read("nvdisasm", "-c", "-ndf")
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "local": numbers["LOCAL"],
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E\S*\.128\b|\bUTMALDG", code)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "instruction": next((name for name, pattern in _INSTRUCTIONS if re.search(pattern, code)), "none"),
    }


def has_products(constants: dict[str, Any]) -> bool:
    """Whether a kernel multiplies matrices, by its constants: a tile of output channels, or `MATRIX`."""
    return constants.get("MATRIX", "BLOCK_O" in constants)


# ---- compile many --------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pylumiere" / "kernels"


def compile_many(
    tasks: list[tuple[dict[str, Any], int]], *, jobs: int = 2, folder: Path | None = None
) -> list[dict[str, Any]]:
    """Facts of each (specialisation, arch), compiled in `jobs` worker processes; a failure gives {"error": text}.

    Equal tasks are compiled once.
    """
    folder = folder or cache_folder()
    lines = [json.dumps(task, sort_keys=True) for task in tasks]
    distinct_lines = list(dict.fromkeys(lines))
    workers: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
    started = [_start_worker(folder) for _ in range(max(1, min(jobs, len(distinct_lines))))]
    for worker in started:
        workers.put(worker)

    def run(task: str) -> dict[str, Any]:
        worker = workers.get()
        try:
            worker.stdin.write(task + "\n")
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
            facts = dict(zip(distinct_lines, pool.map(run, distinct_lines), strict=True))
        return [facts[line] for line in lines]
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


def verdict(facts: dict[str, Any], arch: int, instruction: str | None = None) -> str:
    """ "ok", or what forbids shipping this kernel. `instruction` is what its matrix products must become, if any."""
    if "error" in facts:
        return facts["error"]
    faults = []
    if facts["spills"] or facts["local"]:
        faults.append(f"{facts['spills']} spill instructions")
    if facts["shared"] > SHARED_MEMORY[arch]:
        faults.append(f"shared memory {facts['shared']} of {SHARED_MEMORY[arch]}")
    if instruction and facts["instruction"] != instruction:
        faults.append(f"{facts['instruction']} instead of {instruction}")
    return ", ".join(faults) or "ok"


def expected_instruction(launch: launching.Launch, arch: int) -> str | None:
    """What the products of a launch must become in machine code; None for a launch without products in 16 bits."""
    return EXPECTED[arch] if has_products(launch.constants) and launch.tensors()[0].dtype.itemsize == 2 else None


def build_table(
    archs: Iterable[int],
    dtypes: Iterable[str] | None = None,
    ops: Iterable[str] = OPS,
    networks: Iterable[str] = NETWORKS,
    *,
    jobs: int = 2,
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """One row per architecture, dtype and distinct launch of the operators' cases and of the networks.

    `dtypes` None means the 16-bit format that the chip runs networks in, and float32 for the operators alone.
    """
    rows, launches = [], []
    for arch in archs:
        auto = "bf16" if arch >= 80 else "fp16"
        for dtype in dtypes or dict.fromkeys(("fp32", auto, "bf16")):
            if arch < 80 and dtype == "bf16":
                rows.append({"case": "all", "dtype": dtype, "arch": arch, "verdict": "not on this chip"})
                continue
            cases = network_launches(arch, DTYPES[dtype], networks) if dtypes or dtype == auto else {}
            known = {launch.key() for launch in cases.values()}
            of_ops = op_launches(arch, DTYPES[dtype], ops)
            cases |= {case: launch for case, launch in of_ops.items() if launch.key() not in known}
            for case, launch in cases.items():
                rows.append({"case": case, "dtype": dtype, "arch": arch, "kernel": launch.kernel})
                launches.append(launch)
    compiled = [row for row in rows if "verdict" not in row]
    tasks = [(launch.specialisation(), row["arch"]) for row, launch in zip(compiled, launches, strict=True)]
    results = compile_many(tasks, jobs=jobs, folder=folder)
    for row, launch, facts in zip(compiled, launches, results, strict=True):
        row |= facts | {"verdict": verdict(facts, row["arch"], expected_instruction(launch, row["arch"]))}
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pylumiere.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--sku", action="append", help="all, or a compute capability such as sm90; may be repeated")
    formats = "default: fp32, and the 16-bit format of the chip"
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help=formats)
    parser.add_argument("--op", action="append", choices=OPS, help="only the cases of these operators")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="only what these networks need")
    parser.add_argument("--jobs", type=int, default=2, help="compiler processes (default 2)")
    parser.add_argument("--json", metavar="FILE", help="write the table here as JSON")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        _work(Path(options.worker))
        return 0
    archs = _architectures(parser, options.sku or ["all"])
    is_limited = bool(options.op or options.network)
    ops, networks = options.op or (() if is_limited else OPS), options.network or (() if is_limited else NETWORKS)
    rows = build_table(archs, options.dtype, ops, networks, jobs=options.jobs)
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
