"""One step of an export in a process of its own: `python -m pylumiere.export.worker JOB.json`.

A step writes its files into the job's folder and facts into `facts.json` there. On standard output it says how far it
is, one JSON object a line; a refusal is such a line too, with exit code 2.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from pylumiere.export.spec import TOLERANCE, NetworkSpec

from pylumiere.checkpoints.bundle import ShapeRange
from pylumiere.config import ModelConfig
from pylumiere.errors import USER_ERRORS, BundleError

# Graphs for TensorRT are run once on the CPU to see what their precision costs, unless the output is larger than this.
_TRIAL_VALUES = 2**20


def main(path: str) -> int:
    job = json.loads(Path(path).read_text())
    out, begun = Path(job["out"]), time.monotonic()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print

    def report(fraction: float, phase: str) -> None:
        print(json.dumps({"done": round(fraction, 3), "phase": phase}), file=answers, flush=True)

    try:
        facts = _STEPS[job["step"]](job, out, report)
    except (*USER_ERRORS, OSError) as error:
        print(json.dumps({"error": " ".join(str(error).split())}), file=answers, flush=True)
        return 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    facts = {"seconds": time.monotonic() - begun, "peak_bytes": peak, **facts}
    (out / "facts.json").write_text(json.dumps(facts))
    return 0


def _trace(job: dict[str, Any], out: Path, report) -> dict[str, Any]:
    from pylumiere.export import to_onnx

    spec = NetworkSpec.from_json(job["spec"])
    model = to_onnx.trace(*_forward(job, spec), spec)
    return {"operators": to_onnx.save(model, out / "trace.onnx")}


def _forward(job: dict[str, Any], spec: NetworkSpec):
    from pylumiere.export import to_onnx

    if spec.stage == "text":
        header, _ = to_onnx.read_safetensors_header(Path(job["weights"]))
        return to_onnx.text_forward(job["text"], {name: tuple(entry["shape"]) for name, entry in header.items()})
    return to_onnx.network_forward(ModelConfig.from_dict(job["model"]).networks[spec.stage])


def _portable(job: dict[str, Any], out: Path, report) -> dict[str, Any]:
    """The float32 graph over the stored weights, compared with the eager model at three sizes."""
    import onnxruntime
    import torch
    from pylumiere.export import to_onnx

    torch.set_num_threads(job["threads"])
    spec, weights = NetworkSpec.from_json(job["spec"]), Path(job["weights"])
    model = to_onnx.lower(to_onnx.load_trace(Path(job["trace"])), "fp32")
    to_onnx.with_safetensors(model, spec, weights, job["location"], "fp32")
    graph = out / f"{spec.stage}.onnx"
    operators = to_onnx.save(model, graph)
    session = to_onnx.open_session(graph, {job["location"]: weights}, job["threads"])
    eager = _eager(job, spec, weights)
    compared = []
    sizes = list(dict(spec.check_sizes()).items())
    for i, (name, these) in enumerate(sizes):
        report(i / len(sizes), f"check {spec.stage} ({name})")
        compared.append(to_onnx.compare(session, eager, spec, these, TOLERANCE["fp32"]))
    return {
        "operators": operators, "compared": compared, "tolerance": TOLERANCE["fp32"],
        "reference": f"torch {torch.__version__} eager fp32 cpu", "library": onnxruntime.__version__,
    }  # fmt: skip


def _eager(job: dict[str, Any], spec: NetworkSpec, weights: Path):
    from pylumiere.export import to_onnx
    from safetensors.torch import load_file

    from pylumiere.networks.families import build_network

    tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
    if spec.stage == "text":
        forward, _ = to_onnx.text_forward(job["text"], {})
        return lambda inputs: forward(tensors, inputs)
    network = build_network(ModelConfig.from_dict(job["model"]).networks[spec.stage], tensors)
    return lambda inputs: network(**inputs)


def _graph(job: dict[str, Any], out: Path, report) -> dict[str, Any]:
    """The graph that plans are built from: weights in its own precision. In fp16 it is run once on the CPU."""
    import torch
    from pylumiere.export import to_onnx
    from safetensors.torch import load_file

    torch.set_num_threads(job["threads"])
    spec, weights, precision = NetworkSpec.from_json(job["spec"]), Path(job["weights"]), job["precision"]
    model = to_onnx.lower(to_onnx.load_trace(Path(job["trace"])), precision)
    to_onnx.fix_axes(model, spec)
    to_onnx.with_values(model, spec, load_file(weights), precision)
    path = out / f"{spec.stage}.onnx"
    to_onnx.save_with_data(model, path)
    facts: dict[str, Any] = {"precision": precision}
    sizes = _trial_sizes(spec)
    if precision == "fp16" and math.prod(spec.output.shape(sizes)) <= _TRIAL_VALUES:
        session = to_onnx.open_session(path, threads=job["threads"])
        facts["trial"] = to_onnx.compare(session, _eager(job, spec, weights), spec, sizes, TOLERANCE[precision])
    return facts


def _trial_sizes(spec: NetworkSpec) -> dict[str, int]:
    """The smallest bucket, for one element of the batch."""
    return {**min(spec.buckets, key=lambda bucket: math.prod(bucket.values())), "B": 1}


def _plan(job: dict[str, Any], out: Path, report) -> dict[str, Any]:
    from pylumiere.export.to_tensorrt import BuildFailed, build_plan

    profiles = [{n: ShapeRange.model_validate_json(json.dumps(r)) for n, r in one.items()} for one in job["profiles"]]
    try:
        return build_plan(
            Path(job["graph"]), out / "network.plan", flavour=job["flavour"], sm=job["sm"], profiles=profiles,
            memory_budget=job["memory_budget"], report=report,
            timing_cache=Path(job["timing_cache"]) if job["timing_cache"] else None,
        )  # fmt: skip
    except BuildFailed as error:
        raise BundleError(f"{job['label']}: {error}") from error


def _cubins(job: dict[str, Any], out: Path, report) -> dict[str, Any]:
    from pylumiere.export.cubins import compile_network

    spec = NetworkSpec.from_json(job["spec"])
    config = ModelConfig.from_dict(job["model"])
    found = compile_network(
        config.networks[spec.stage], spec, [tuple(target) for target in job["targets"]], out,
        text_tokens=config.text_tokens, compiled=Path(job["compiled"]), jobs=job["jobs"], report=report,
    )  # fmt: skip
    return {"targets": found}


_STEPS = {"trace": _trace, "portable": _portable, "graph": _graph, "plan": _plan, "cubins": _cubins}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
