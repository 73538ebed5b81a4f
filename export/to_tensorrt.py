"""Plans from ONNX graphs, by TensorRT-RTX or TensorRT: one code path, two flavours.

TensorRT-RTX builds for other GPUs than the one that is there, and for none: a capability is set, or none for a plan
that is portable from Ampere on. TensorRT measures on the GPU itself. After one failed build, TensorRT-RTX fails every
later one in the same process, so each plan is built in a process of its own (`worker.py`).
"""

from __future__ import annotations

import importlib
import os
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pylumiere.checkpoints.bundle import Library, ShapeRange
from pylumiere.errors import UnsupportedDevice

FLAVOURS = {"tensorrt_rtx": "export", "tensorrt": "tensorrt"}  # module -> extra that installs it

Report = Callable[[float, str], None]


class BuildFailed(RuntimeError):
    """The library's own words, in one line."""


def plan_platform() -> str:
    """The platform that plans built here run on."""
    return f"{sys.platform.rstrip('0123456789')}-{platform.machine()}"


def load_flavour(flavour: str):
    """The library's module.

    Raises:
        UnsupportedDevice: it is not installed; the extra is named.
    """
    try:
        return importlib.import_module(flavour)
    except ImportError as error:
        raise UnsupportedDevice(
            f"{flavour} is not installed, and plans need it: pip install 'pylumiere[{FLAVOURS[flavour]}]'"
        ) from error


def flavour_library(flavour: str) -> Library:
    return Library(name=flavour, version=load_flavour(flavour).__version__)


def build_plan(
    graph: Path,
    output: Path,
    *,
    flavour: str,
    sm: int | None,
    profiles: list[dict[str, ShapeRange]],
    memory_budget: int | None = None,
    timing_cache: Path | None = None,
    report: Report = lambda fraction, phase: None,
) -> dict[str, Any]:
    """Parses a graph and writes a plan.

    Args:
        graph: ONNX with its weights.
        output: the plan's file.
        flavour: "tensorrt_rtx" or "tensorrt".
        sm: capability to build for without it; None for a portable plan, and always for "tensorrt".
        profiles: sets of shapes, each with kernels of its own.
        memory_budget: most bytes of workspace that a layer may use.
        timing_cache: measurements of an earlier build, read if there and written after; "tensorrt" only.
        report: called with how much of the build is done (0 to 1) and what is being done.

    Returns:
        facts: library and version, seconds, bytes, layers (counts by kind), layers_of ("network" or "engine"),
        peak_bytes of this process.

    Raises:
        BuildFailed: the library refused the graph or the target.
    """
    begun = time.monotonic()
    trt = load_flavour(flavour)
    messages: list[str] = []
    logger = _logger(trt, messages)
    builder = trt.Builder(logger)
    if not builder:
        raise BuildFailed(f"{flavour} did not start: {_last(messages)}")
    flags = 0  # strongly typed is the only kind of network of recent versions
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    if strongly_typed is not None:
        flags |= 1 << int(strongly_typed)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise BuildFailed(f"{flavour} does not take the graph: {_last(errors or messages)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if memory_budget is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, memory_budget)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, allowed in shapes.items():
            profile.set_shape(name, allowed.min, allowed.opt, allowed.max)
        config.add_optimization_profile(profile)
    if flavour == "tensorrt_rtx" and sm is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    if timing_cache is not None and flavour == "tensorrt":
        earlier = timing_cache.read_bytes() if timing_cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(earlier), ignore_mismatch=False)
    config.progress_monitor = _monitor(trt, report)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildFailed(f"{flavour} built nothing: {_last(messages)}")
    with output.open("wb") as file:
        file.write(plan)
        file.flush()
        os.fsync(file.fileno())
    if timing_cache is not None and flavour == "tensorrt":
        timing_cache.write_bytes(config.get_timing_cache().serialize())
    layers, layers_of = _network_layers(network), "network"
    if flavour == "tensorrt":
        layers, layers_of = _engine_layers(trt, logger, plan) or layers, "engine"
    return {
        "library": {"name": flavour, "version": trt.__version__},
        "seconds": time.monotonic() - begun,
        "bytes": output.stat().st_size,
        "layers": layers,
        "layers_of": layers_of,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _logger(trt, messages: list[str]):
    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, text):
            if severity <= trt.ILogger.Severity.ERROR:
                messages.append(text)

    return Logger()


def _monitor(trt, report: Report):
    """Progress of the outermost phase, since inner ones come and go."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int]] = {}

        def phase_start(self, phase_name, parent_phase, num_steps):
            self.phases[phase_name] = (parent_phase, max(1, num_steps))

        def step_complete(self, phase_name, step):
            parent, steps = self.phases.get(phase_name, (None, 1))
            if parent is None:
                report(min(1.0, (step + 1) / steps), phase_name)
            return True

        def phase_finish(self, phase_name):
            self.phases.pop(phase_name, None)

    return Monitor()


def _network_layers(network) -> dict[str, int]:
    """Counts of the parsed network's layers: all, by kind of the commonest, and by output type."""
    kinds, types = Counter(), Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kinds[layer.type.name.lower()] += 1
        if layer.num_outputs:
            types[layer.get_output(0).dtype.name.lower()] += 1
    return {
        "total": network.num_layers,
        **{f"kind.{name}": count for name, count in kinds.most_common(16)},
        **{f"type.{name}": count for name, count in types.items()},
    }


def _engine_layers(trt, logger, plan) -> dict[str, int] | None:
    """The same from the engine's own report, after fusion; None where no GPU can read the plan."""
    import json

    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return None
    report = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    layers = [layer for layer in report.get("Layers", []) if isinstance(layer, dict)]
    kinds = Counter(str(layer.get("LayerType", "unknown")).lower() for layer in layers)
    types = Counter(
        output.get("Format/Datatype", "unknown").split()[0].lower()
        for layer in layers for output in layer.get("Outputs", [])[:1]
    )  # fmt: skip
    return {
        "total": len(layers),
        **{f"kind.{_name(n)}": count for n, count in kinds.most_common(16)},
        **{f"type.{_name(n)}": count for n, count in types.most_common(8)},
    }


def _name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in text)[:60] or "unknown"


def _last(messages: list[str]) -> str:
    return " ".join((messages[-1] if messages else "no message").split())[:300]
