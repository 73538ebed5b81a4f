"""Machine code of our Triton kernels for one model: what its networks launch at the exported sizes, for each GPU.

A recording on tensors without data says which kernels a network launches, with which constants; each distinct one is
compiled for its capability, without a GPU. The folder of a capability and stage holds the cubins and an index:

    {"format": 1, "arch": 90, "stage": "base", "precision": "bf16", "triton": "3.9.0",
     "kernels": {"k0": {"file": "k0-….cubin", "kernel", "name", "num_warps", "shared", "tmem", "global_scratch",
                        "registers", "spills", "parameters", "signature", "constants"}},
     "calls": [{"sizes": {"B": 2, "T": 80, …}, "launches": [{"kernel": "k0", "grid", "args"}], "buffers": […]}]}

`name` is the function in the cubin. `parameters` are the kernel's run-time arguments in order: pointers and numbers as
`signature` says, then two pointers of Triton's own (global and profile scratch), null where `global_scratch` is 0.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pylumiere.export.spec import NetworkSpec

from pylumiere.networks.families import AnyConfig

FORMAT = 1


def compile_network(
    config: AnyConfig,
    spec: NetworkSpec,
    targets: list[tuple[int, str]],
    folder: Path,
    *,
    text_tokens: int,
    compiled: Path,
    jobs: int = 1,
    report: Callable[[float, str], None] = lambda fraction, phase: None,
) -> dict[str, Any]:
    """Writes `sm_NN/STAGE/index.json` and the cubins below `folder`, for each (capability, precision).

    Args:
        compiled: where the compiler keeps what it made.
        jobs: compiler processes.

    Returns:
        facts by capability: kernels, launches, spills, bytes, and what the compiler warns of.

    Raises:
        RuntimeError: a kernel that does not compile, or that does not fit the chip.
    """
    import triton
    from pylumiere.kernels import aot

    from pylumiere.backends.triton import record_network

    plans = []
    for arch, precision in targets:
        calls = []
        for bucket in spec.buckets:
            for sizes in ({**bucket, "B": batch} for batch in sorted({1, bucket["B"]})):
                recording = record_network(
                    config, arch, aot.DTYPES[precision], batch=sizes["B"], text_tokens=text_tokens, sizes=sizes
                )
                calls.append((sizes, recording))
        distinct = {launch.key(): launch for _, recording in calls for launch in recording.launches}
        plans.append((arch, precision, calls, distinct))
    total, done, found = sum(len(plan[3]) for plan in plans), 0, {}
    for arch, precision, calls, distinct in plans:
        report(done / max(1, total), f"cubins sm_{arch} {spec.stage}")
        tasks = [(launch.specialisation(), arch) for launch in distinct.values()]
        results = aot.compile_many(tasks, jobs=jobs, folder=compiled)
        done += len(tasks)
        found[str(arch)] = _write(folder / f"sm_{arch}" / spec.stage, spec.stage, arch, precision, triton.__version__,
                                  calls, distinct, results)  # fmt: skip
    report(1.0, f"cubins {spec.stage}")
    return found


def _write(folder, stage, arch, precision, version, calls, distinct, results) -> dict[str, Any]:
    from pylumiere.kernels.tuning import SHARED_MEMORY

    folder.mkdir(parents=True)
    kernels, names = {}, {}
    for (key, launch), facts in zip(distinct.items(), results, strict=True):
        if "error" in facts:
            raise RuntimeError(f"{launch.kernel} for sm_{arch}: {facts['error']}")
        if facts["shared"] > SHARED_MEMORY[arch]:
            raise RuntimeError(f"{launch.kernel} for sm_{arch}: {facts['shared']} bytes of shared memory")
        name = names[key] = f"k{len(kernels)}"
        file = f"{name}-{launch.kernel.rpartition(':')[2].strip('_')}.cubin"
        shutil.copyfile(facts["cubin"], folder / file)
        specialisation = launch.specialisation()
        kernels[name] = {
            "file": file,
            "kernel": launch.kernel,
            **{k: facts[k] for k in ("name", "num_warps", "shared", "tmem", "global_scratch", "registers", "spills")},
            "parameters": facts["parameters"],
            "signature": {n: specialisation["signature"][n] for n in facts["parameters"]},
            "constants": specialisation["constants"],
        }
    index = {
        "format": FORMAT, "arch": arch, "stage": stage, "precision": precision, "triton": version, "kernels": kernels,
        "calls": [{"sizes": sizes, **_call(recording, names)} for sizes, recording in calls],
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index, separators=(",", ":")) + "\n")
    return {
        "precision": precision,
        "kernels": len(kernels),
        "launches": len(calls[-1][1].launches),
        "spills": sum(kernel["spills"] for kernel in kernels.values()),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }


def _call(recording, names: dict[str, str]) -> dict[str, Any]:
    """The launches of one network call in order, and the buffers that their arguments name."""
    plain = recording.to_json()
    launches = []
    for call, entry in zip(recording.calls, plain["calls"], strict=True):
        rows = [
            {"kernel": names[launch.key()], "grid": list(launch.grid), "args": told["args"]}
            for launch, told in zip(call.launches, entry["launches"], strict=True)
        ]
        launches += rows or [{"torch": call.name, "args": entry["args"], "outputs": entry["outputs"]}]
    return {"buffers": plain["buffers"], "launches": launches}
