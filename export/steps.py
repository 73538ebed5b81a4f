"""The steps of an export and what they depend on: trace -> portable graph with its check; trace -> graph in the plans'
precision -> one plan per target; and cubins, which need the configuration alone.

Each step runs in a process of its own (`worker.py`) and is an entry of the cache.
"""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pylumiere.export import to_tensorrt
from pylumiere.export.cache import Cache, hash_sources, key_of
from pylumiere.export.spec import TOLERANCE, NetworkSpec, tensor_spec, text_spec
from pylumiere.export.targets import PlanTarget, local_gpu

import pylumiere
from pylumiere.backends.choice import precision_of
from pylumiere.checkpoints import bundle
from pylumiere.errors import BundleError

_EXPORT = Path(__file__).resolve().parent
_PACKAGE = Path(pylumiere.__file__).resolve().parent

Progress = Callable[[str, float, str], None]  # job, how much of it is done, what it does


class _Stopped(Exception):
    """Another step failed, or the user stopped the export."""


class Export:
    """The steps of one export, at most `jobs` of them at once."""

    def __init__(self, source, specs, targets, options, staging, cache: Cache, on_progress: Progress):
        self.source, self.targets, self.options, self.staging = source, targets, options, staging
        self.specs: dict[str, NetworkSpec] = dict(specs)
        if "text" in source.weights:
            self.specs["text"] = text_spec(
                source.config.text_tokens, source.text.width, source.vocabulary, is_masked=source.text.kind != "clip"
            )
        self.cache, self.on_progress = cache, on_progress
        self.steps = self.hits = self.peak_bytes = 0
        self.cached: set[str] = set()
        self._slots = threading.Semaphore(max(1, options.jobs))
        self._gpu = threading.Lock()  # TensorRT measures: one plan at a time
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._running: set[subprocess.Popen] = set()
        self._sources = hash_sources(
            [_PACKAGE / "networks", *(_EXPORT / f"{n}.py" for n in ("spec", "to_onnx", "worker"))]
        )
        self._versions = {name: _version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}

    def run(self) -> list[bundle.Artefact]:
        """All artefacts, their files in the staging folder."""
        networks = [stage for stage in self.specs if stage != "text"] if self.targets.cubins else []
        found: list[bundle.Artefact] = []
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            try:
                traces = {stage: pool.submit(self._trace, stage) for stage in self.specs}
                # One network after the other: cubins take longest, and all else is to go on beside them.
                pending = {pool.submit(lambda: [one for stage in networks for one in self._cubins(stage)])}
                for stage, traced in traces.items():
                    pending.add(pool.submit(lambda s=stage, t=traced: self._portable(s, t.result())))
                    if stage == "text":
                        continue
                    plans = [replace(p, precision=self._precision(stage, p.precision)) for p in self.targets.plans]
                    graphs = {
                        precision: pool.submit(lambda s=stage, t=traced, p=precision: self._graph(s, t.result(), p))
                        for precision in sorted({plan.precision for plan in plans})
                    }
                    for plan in plans:
                        graph = graphs[plan.precision]
                        pending.add(pool.submit(lambda s=stage, g=graph, p=plan: self._plan(s, g.result(), p)))
                while pending:
                    done, pending = concurrent.futures.wait(
                        pending, timeout=0.5, return_when=concurrent.futures.FIRST_EXCEPTION
                    )
                    for future in done:
                        found += future.result()
            except BaseException:
                self._stop.set()
                with self._lock:
                    for process in self._running:
                        with suppress(ProcessLookupError):
                            os.killpg(process.pid, signal.SIGKILL)
                raise
        return found

    # -- steps

    def _trace(self, stage: str) -> Path:
        spec = self.specs[stage]
        facts = {"spec": spec.to_json()["ports"], "multiples": [a.multiple for a in spec.axes.values()],
                 "model": self._network(stage), "sources": self._sources, "versions": self._versions}  # fmt: skip
        job = self._job(stage)
        folder, _, _ = self._step("trace", f"trace {stage}", facts, job)
        return folder

    def _portable(self, stage: str, trace: Path) -> list[bundle.Artefact]:
        spec, stored = self.specs[stage], self.source.weights[stage]
        job = {
            **self._job(stage), "trace": str(trace / "trace.onnx"), "location": f"../{stored}",
            "threads": self._threads(),
        }  # fmt: skip
        facts = {"trace": trace.name, "spec": spec.to_json(), "weights": self.source.hashes[stage],
                 "location": job["location"], "tolerance": TOLERANCE, "versions": self._versions}  # fmt: skip
        folder, told, hit = self._step("portable", f"ONNX {stage}", facts, job)
        path = f"onnx/{stage}.onnx"
        self._copy(folder / f"{stage}.onnx", path)
        name = f"{stage}-onnx-fp32"
        return [self._artefact(
            name, hit, kind="onnx", backend="onnxruntime", stage=stage, target=bundle.Target(), precision="fp32",
            library=bundle.Library(name="onnxruntime", version=told["library"]), files=(path, stored), spec=spec,
            profiles=(spec.ranges(),),
            receipt=bundle.Receipt(
                build_seconds=told["seconds"],
                compared=tuple(bundle.Comparison.model_validate_json(json.dumps(one)) for one in told["compared"]),
                tolerance=told["tolerance"], reference=told["reference"],
                layers={"total": sum(told["operators"].values()), **dict(list(told["operators"].items())[:16])},
            ),
        )]  # fmt: skip

    def _graph(self, stage: str, trace: Path, precision: str) -> tuple[Path, dict[str, Any]]:
        spec = self.specs[stage]
        job = {**self._job(stage), "trace": str(trace / "trace.onnx"), "precision": precision,
               "threads": self._threads()}  # fmt: skip
        facts = {"trace": trace.name, "spec": spec.to_json(), "weights": self.source.hashes[stage],
                 "precision": precision, "versions": self._versions}  # fmt: skip
        folder, told, _ = self._step("graph", f"graph {stage} {precision}", facts, job)
        return folder, told

    def _plan(self, stage: str, graph: tuple[Path, dict], plan: PlanTarget) -> list[bundle.Artefact]:
        spec, (folder, graph_facts) = self.specs[stage], graph
        library = to_tensorrt.flavour_library(plan.flavour)
        profiles = spec.profiles()
        label = f"plan {stage} {plan.folder} {plan.precision}"
        cache_path = f"engines/{plan.folder}/{stage}.{plan.precision}.cache" if plan.flavour == "tensorrt" else None
        job = {
            "graph": str(folder / f"{stage}.onnx"), "flavour": plan.flavour, "label": label,
            "sm": plan.sm if plan.flavour == "tensorrt_rtx" else None,
            "profiles": [{n: r.model_dump(mode="json") for n, r in one.items()} for one in profiles],
            "memory_budget": self.options.memory_budget,
        }  # fmt: skip
        facts = {key: job[key] for key in ("flavour", "sm", "profiles", "memory_budget")} | {
            "graph": folder.name, "library": library.model_dump(), "platform": to_tensorrt.plan_platform(),
            "sources": hash_sources([_EXPORT / "to_tensorrt.py"]),
            "gpu": local_gpu() if plan.flavour == "tensorrt" else None,
        }  # fmt: skip

        def prepare(out: Path) -> dict:
            if cache_path is None:
                return {"timing_cache": None}
            earlier = self.staging / cache_path  # of the bundle that is finished here
            if earlier.exists():
                shutil.copyfile(earlier, out / "timing.cache")
            return {"timing_cache": str(out / "timing.cache")}

        exclusive = self._gpu if plan.flavour == "tensorrt" else None
        built, told, hit = self._step("plan", label, facts, job, prepare=prepare, exclusive=exclusive)
        path = f"engines/{plan.folder}/{stage}.{plan.precision}.{plan.flavour}.plan"
        self._copy(built / "network.plan", path)
        files = [path]
        if cache_path is not None:
            self._copy(built / "timing.cache", cache_path)
            files.append(cache_path)
        is_run = told["layers_of"] == "engine"
        notes = ["layers of the engine" if is_run else "layers of the parsed network; an engine reports on a GPU only"]
        if trial := graph_facts.get("trial"):
            notes.append(
                f"the graph it was built from, run by onnxruntime on the CPU: relative RMS {trial['rel_rms']:.2g} "
                f"against eager fp32, {trial['values']} values; the plan itself was not run"
            )
        name = f"{stage}-{plan.flavour}-{plan.sku or plan.folder}-{plan.precision}"
        return [self._artefact(
            name, hit, kind="plan", backend=plan.flavour, stage=stage, precision=plan.precision, library=library,
            target=bundle.Target(sku=plan.sku, sms=plan.sms, platform=to_tensorrt.plan_platform()),
            files=tuple(files), spec=spec, profiles=profiles,
            receipt=bundle.Receipt(build_seconds=told["seconds"], layers=told["layers"], notes=tuple(notes)),
        )]  # fmt: skip

    def _cubins(self, stage: str) -> list[bundle.Artefact]:
        import pylumiere.kernels

        spec = self.specs[stage]
        targets = [[arch, self._precision(stage, precision)] for arch, precision in self.targets.cubins]
        job = {"spec": spec.to_json(), "model": self.source.config.to_dict(), "targets": targets, "jobs": 1,
               "compiled": str(self.cache.folder / "cubins")}  # fmt: skip
        sources = [Path(folder) for folder in pylumiere.kernels.__path__]
        sources += [_PACKAGE / "networks", _PACKAGE / "backends" / "triton.py", _EXPORT / "cubins.py"]
        version = _version("triton")
        facts = {"spec": spec.to_json(), "model": self._network(stage), "targets": targets, "triton": version,
                 "torch": self._versions["torch"], "sources": hash_sources(sources)}  # fmt: skip
        folder, told, hit = self._step("cubins", f"cubins {stage}", facts, job)
        total = sum(row["kernels"] for row in told["targets"].values())
        found = []
        for arch, precision in targets:
            row, below = told["targets"][str(arch)], f"kernels/sm_{arch}/{stage}"
            files = [f"{below}/index.json"]
            files += sorted(f"{below}/{p.name}" for p in (folder / f"sm_{arch}" / stage).glob("*.cubin"))
            for path in files:
                self._copy(folder / f"sm_{arch}" / stage / Path(path).name, path)
            found.append(self._artefact(
                f"{stage}-cubins-sm_{arch}-{precision}", hit, kind="cubins", backend="triton", stage=stage,
                target=bundle.Target(sms=(arch,)), precision=precision,
                library=bundle.Library(name="triton", version=version), files=tuple(files),
                receipt=bundle.Receipt(
                    build_seconds=told["seconds"] * row["kernels"] / max(1, total),
                    layers={key: row[key] for key in ("kernels", "launches", "spills")},
                    notes=("layers are kernels, launches of the largest call, and spill instructions; not run",),
                ),
            ))  # fmt: skip
        return found

    # -- shared

    def _artefact(self, name: str, hit: bool, *, spec: NetworkSpec | None = None, **fields) -> bundle.Artefact:
        if hit:
            self.cached.add(name)
        if spec is not None:
            fields["inputs"] = tuple(tensor_spec(port) for port in spec.inputs)
            fields["outputs"] = (tensor_spec(spec.output),)
        return bundle.Artefact(name=name, **fields)

    def _network(self, stage: str) -> Any:
        if stage == "text":
            return self.source.text_model
        network = self.source.config.networks[stage]
        return {"family": network.family, **network.to_dict()}

    def _precision(self, stage: str, precision: str) -> str:
        return precision_of(self.source.config.networks[stage], precision)

    def _job(self, stage: str) -> dict[str, Any]:
        """What steps that trace or run a network are told."""
        return {"spec": self.specs[stage].to_json(), "model": self.source.config.to_dict(),
                "text": self.source.text_model, "weights": str(self.staging / self.source.weights[stage])}  # fmt: skip

    def _threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // max(1, self.options.jobs))

    def _copy(self, source: Path, path: str) -> None:
        target = self.staging / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def _step(
        self, kind: str, label: str, facts: dict, job: dict, *, prepare: Callable[[Path], dict] | None = None,
        exclusive: Any = None,
    ) -> tuple[Path, dict[str, Any], bool]:  # fmt: skip
        """The cache's entry of a step, its facts, and whether it was there."""

        def build(out: Path) -> None:
            with self._slots:
                if exclusive is not None:
                    with exclusive:
                        return self._process(label, {**job, **(prepare(out) if prepare else {})}, kind, out)
                return self._process(label, {**job, **(prepare(out) if prepare else {})}, kind, out)

        folder, hit = self.cache.get(key_of(kind, facts), build)
        told = json.loads((folder / "facts.json").read_text())
        with self._lock:
            self.steps += 1
            self.hits += hit
            self.peak_bytes = max(self.peak_bytes, 0 if hit else told["peak_bytes"])
        self.on_progress(label, 1.0, "from the cache" if hit else "done")
        return folder, told, hit

    def _process(self, label: str, job: dict, kind: str, out: Path) -> None:
        if self._stop.is_set():
            raise _Stopped
        self.on_progress(label, 0.0, "started")
        with tempfile.TemporaryDirectory(prefix="pylumiere-") as folder:
            path, log = Path(folder) / "job.json", Path(folder) / "log"
            path.write_text(json.dumps({"step": kind, "out": str(out), **job}))
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            environment.setdefault("OMP_NUM_THREADS", str(self._threads()))
            command = [sys.executable, "-P", "-m", "pylumiere.export.worker", str(path)]
            with log.open("wb") as errors, self._lock:
                if self._stop.is_set():
                    raise _Stopped
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True,
                    env=environment, start_new_session=True,
                )  # fmt: skip
                self._running.add(process)
            error = None
            try:
                for line in process.stdout:
                    told = json.loads(line)
                    error = told.get("error")
                    if error is None:
                        self.on_progress(label, told["done"], told["phase"])
                process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)
                process.stdout.close()
            if self._stop.is_set():
                raise _Stopped
            if error is not None:
                raise BundleError(error)
            if process.returncode == -signal.SIGKILL:
                raise BundleError(
                    f"{label}: its process was killed, most likely for want of memory; "
                    "try smaller --frames, --size or --batch, or --jobs 1"
                )
            if process.returncode:
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
                raise RuntimeError(f"{label}: its process ended with status {process.returncode}: {last[0][:300]}")


def _version(package: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "none"
