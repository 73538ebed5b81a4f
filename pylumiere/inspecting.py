"""What a model folder holds and needs; what a bundle holds, what would run where and why, and whether its graphs
compute what its weights say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from pylumiere.backends.artefacts import Machine, imagined_machine, select, this_machine
from pylumiere.checkpoints.bundle import Artefact, Bundle, open_bundle
from pylumiere.checkpoints.diffusers import is_diffusers_folder, list_components
from pylumiere.checkpoints.native import find_model
from pylumiere.errors import BundleError, IntegrityError, UnsupportedDevice
from pylumiere.loading import clip_config, clip_encoder, read_model_config
from pylumiere.request import GenerationRequest

if TYPE_CHECKING:
    import torch

# Most relative RMS error of a graph's outputs against the eager model in fp32, of its weights' precision. Another order
# of sums gives about 1e-6 in fp32; in 16 bits every activation is rounded.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}


def inspect(
    path: str | PathLike,
    trusted_key: Any = None,
    sku: str | None = None,
    backend: str = "auto",
    precision: str = "auto",
) -> dict[str, Any]:
    """A verified bundle's contents and what would run, as JSON values.

    Args:
        sku: asks for a card of the SKU table instead of this machine.

    Raises:
        BundleError, IntegrityError: see `open_bundle`.
        InvalidRequest: an unknown SKU.
    """
    bundle = open_bundle(path, trusted_key)
    machine = _this_machine() if sku is None else imagined_machine(sku)
    try:
        selection, problem = select(bundle.manifest, machine, backend, precision), None
    except UnsupportedDevice as error:
        selection, problem = None, str(error)
    manifest = bundle.manifest
    chosen = {} if selection is None else {a.name: stage for stage, a in selection.artefacts.items()}
    return {
        "bundle": str(path),
        "model": manifest.name,
        "schema_version": manifest.schema_version,
        "created_by": manifest.created_by,
        "signed": bundle.is_signed,
        "trusted": bundle.is_trusted,
        "files": len(manifest.files),
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "weights": {stage: {"path": name, "bytes": manifest.files[name].size}
                    for stage, name in manifest.weights.items()},
        "text_encoder": manifest.text.kind,
        "artefacts": [_artefact(bundle, artefact) for artefact in manifest.artefacts],
        "machine": {"name": machine.name, "sku": machine.sku, "sm": machine.sm},
        "backend": selection and selection.backend,
        "chosen": chosen,
        "reason": problem if selection is None else selection.reason,
        "passed_over": {} if selection is None else dict(selection.passed_over),
    }  # fmt: skip


def inspect_tables(report: Mapping[str, Any]) -> Iterator[Any]:
    """What `inspect` found, as rich tables and lines."""
    from rich.markup import escape
    from rich.table import Table

    signature = "none"
    if report["signed"]:
        signature = "the trusted key's" if report["trusted"] else "there, not checked (no key was given)"
    yield escape(
        f"{report['bundle']}: model {report['model']}, by {report['created_by']}; {report['files']} files, "
        f"{_megabytes(report['bytes'])}, all hashes right; signature: {signature}"
    )
    table = Table(box=None, pad_edge=False)
    for title in ("artefact", "for", "runs on", "precision", "size", "built by", "error", "here"):
        table.add_column(title, overflow="fold", justify="right" if title == "size" else "left")
    for stage, weights in report["weights"].items():
        here = "chosen" if report["backend"] in ("torch", "triton") else ""
        table.add_row(escape(weights["path"]), stage, "torch, triton", "", _megabytes(weights["bytes"]), "", "", here)
    for entry in report["artefacts"]:
        error = "" if entry["rel_rms"] is None else f"{entry['rel_rms']:.1e}"
        here = "chosen" if entry["name"] in report["chosen"] else report["passed_over"].get(entry["name"], "")
        table.add_row(
            escape(entry["name"]), entry["stage"], f"{entry['backend']}, {entry['target']}", entry["precision"],
            _megabytes(entry["bytes"]), escape(entry["library"]), error, escape(here),
        )  # fmt: skip
    yield table
    machine = report["machine"]
    where = machine["name"] + (f" (sm_{machine['sm']})" if machine["sm"] else "")
    yield escape(f"on {where}: {report['reason']}")


def describe_model(source: str | PathLike, backend: str = "auto", precision: str = "auto") -> dict[str, Any]:
    """What a model folder holds, and what runs one clip of its own size here with how much memory, as JSON values.

    No weights are read. Bytes of memory are those of the networks' weights and of the largest call; text encoder,
    libraries and frames that wait are not in them.

    Args:
        source: a shipped name, a model folder, or a folder as diffusers saves it.

    Returns:
        Of a folder as diffusers saves it also its `components`, and as `problem` what keeps it from being run. There is
        nothing beside them where its configuration is not supported.

    Raises:
        BundleError: no such model, or its configuration cannot be read.
        UnsupportedDevice: the backend or the precision cannot be had here.
    """
    from pylumiere.backends.choice import choose
    from pylumiere.diffusion.plan import plan_request
    from pylumiere.networks.families import computing_dtype, expected_shapes
    from pylumiere.scheduling.memory import activation_bytes

    folder = find_model(source)
    report: dict[str, Any] = {"model": folder.resolve().name, "folder": str(folder), "problem": None}
    if is_diffusers_folder(folder):
        components = report["components"] = list_components(folder)
        problems = (f"{name}: {entry['problem']}" for name, entry in components.items() if entry["problem"])
        report["problem"] = next(problems, None)
    try:
        config = read_model_config(source, check_hashes=False)
    except BundleError as error:
        if "components" not in report:
            raise
        return {**report, "problem": str(error)}
    choice = choose(backend, "auto", precision)
    plan = plan_request(GenerationRequest(prompt="a clip"), config)
    stages, weights, largest = [], 0, 0
    for stage in plan.stages:
        parameters = sum(math.prod(shape) for shape in expected_shapes(stage.network).values())
        rows, frames, height, width = stage.call_sizes
        activations = activation_bytes(stage.network, rows, frames, height, width, choice.dtype, config.text_tokens)
        weights += parameters * computing_dtype(stage.network, choice.dtype).itemsize
        largest = max(largest, activations)
        stages.append({
            "name": stage.name, "family": stage.network.family, "parameters": parameters,
            "call": {"rows": rows, "frames": frames, "height": height, "width": width, "activation_bytes": activations},
            "calls": stage.num_calls,
        })  # fmt: skip
    return {
        **report,
        "model": config.name,
        "num_frames": plan.num_frames, "height": plan.height, "width": plan.width, "fps": config.fps,
        "sampler": plan.sampler, "num_inference_steps": plan.num_inference_steps,
        "guidance_scale": plan.guidance_scale,
        "stages": stages,
        "text_encoder": {"name": config.text_encoder, "tokens": config.text_tokens,
                         "width": config.first.network.text_dim},
        "backend": choice.backend, "precision": choice.precision, "reason": choice.reason,
        "memory": {"weights": weights, "activations": largest, "total": weights + largest},
    }  # fmt: skip


def model_tables(report: Mapping[str, Any]) -> Iterator[Any]:
    """What `describe_model` found, as rich tables and lines."""
    from rich.markup import escape
    from rich.table import Table

    if "stages" in report:
        text, memory = report["text_encoder"], report["memory"]
        yield escape(
            f"{report['folder']}: model {report['model']}; frames: {report['num_frames']} of {report['width']} x "
            f"{report['height']} at {report['fps']} fps; {report['num_inference_steps']} steps of {report['sampler']}, "
            f"guidance {report['guidance_scale']:g}; text by {text['name']}, {text['tokens']} tokens"
        )
        table = Table(box=None, pad_edge=False)
        for title in ("stage", "family", "parameters", "calls", "of", "activations"):
            table.add_column(title, justify="left" if title in ("stage", "family", "of") else "right")
        for stage in report["stages"]:
            call = stage["call"]
            sizes = f"{call['rows']} x {call['frames']} x {call['width']} x {call['height']}"
            table.add_row(
                stage["name"], stage["family"], f"{stage['parameters'] / 1e6:.1f} M", str(stage["calls"]), sizes,
                _megabytes(call["activation_bytes"]),
            )  # fmt: skip
        yield table
        yield escape(
            f"one clip in {report['precision']}: {_megabytes(memory['weights'])} of weights and "
            f"{_megabytes(memory['activations'])} of activations"
        )
        yield escape(f"here: {report['reason']}")
    if "components" in report:
        table = Table(box=None, pad_edge=False)
        for title in ("component", "class", "weights", "here"):
            table.add_column(title, overflow="fold", justify="right" if title == "weights" else "left")
        for name, entry in report["components"].items():
            size = "" if entry["bytes"] is None else _megabytes(entry["bytes"])
            here = entry["problem"] or ("used" if entry["is_used"] else "not used")
            table.add_row(escape(name), escape(entry["class"] or "missing"), size, escape(here))
        yield table
    if report["problem"] is not None:
        yield escape(f"cannot be run: {report['problem']}")


def verify(path: str | PathLike, trusted_key: Any = None, *, full: bool = False) -> dict[str, Any]:
    """Checks hashes and signature, then runs each graph beside the eager model of the bundle's weights on the CPU.

    Args:
        full: compare at every set of shapes in the receipts too, the largest included; else at each profile's smallest.

    Raises:
        BundleError, IntegrityError: see `open_bundle`; IntegrityError too for a graph that computes something else.
        UnsupportedDevice: there are graphs, and ONNX Runtime is not installed.
    """
    bundle = open_bundle(path, trusted_key)
    manifest = bundle.manifest
    compared, not_run = [], {}
    for artefact in manifest.artefacts:
        if artefact.kind != "onnx":
            not_run[artefact.name] = "runs on a GPU; its hashes are right"
        elif artefact.precision == "bf16":
            not_run[artefact.name] = "ONNX Runtime has no bf16 on a CPU; its hashes are right"
        elif artefact.stage == "text" and manifest.text.weights is None:
            not_run[artefact.name] = "the bundle has no weights to compare it with; its hashes are right"
        else:
            compared += _compare(bundle, artefact, full)
    return {
        "bundle": str(path),
        "files": len(manifest.files),
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "hashes": "right",
        "signature": "right" if bundle.is_trusted else "not checked" if bundle.is_signed else "none",
        "compared": compared,
        "not_run": not_run,
    }


def verify_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """What `verify` found, in lines."""
    yield f"{report['bundle']}: {report['files']} files, {_megabytes(report['bytes'])}"
    yield "hashes: right"
    notes = {"right": "the trusted key's", "not checked": "there, not checked; give --key", "none": "none"}
    yield f"signature: {notes[report['signature']]}"
    for entry in report["compared"]:
        yield (
            f"{entry['name']}: as {entry['reference']} at {entry['shape']}, relative RMS error {entry['rel_rms']:.1e} "
            f"(at most {entry['tolerance']:g}), largest {entry['max_abs']:.1e}, {entry['values']} values"
        )
    for name, why in report["not_run"].items():
        yield f"{name}: {why}"


def _artefact(bundle: Bundle, artefact: Artefact) -> dict[str, Any]:
    files = bundle.manifest.files
    errors = [comparison.rel_rms for comparison in artefact.receipt.compared]
    return {
        "name": artefact.name, "kind": artefact.kind, "backend": artefact.backend, "stage": artefact.stage,
        "target": artefact.target.label, "sms": list(artefact.target.sms), "precision": artefact.precision,
        "library": f"{artefact.library.name} {artefact.library.version}",
        "bytes": sum(files[name].size for name in artefact.files), "files": len(artefact.files),
        "build_seconds": artefact.receipt.build_seconds, "rel_rms": max(errors, default=None),
    }  # fmt: skip


def _this_machine() -> Machine:
    from pylumiere.backends.choice import find_device

    return this_machine(find_device("auto", []))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


# ---- a graph beside the eager model ----------------------------------------------------------------------------------


def _compare(bundle: Bundle, artefact: Artefact, full: bool) -> Iterator[dict[str, Any]]:
    import importlib.util

    import torch

    if importlib.util.find_spec("onnxruntime") is None:
        raise UnsupportedDevice("comparing ONNX graphs needs the package onnxruntime: pip install onnxruntime")
    from pylumiere.backends.artefacts import DTYPES
    from pylumiere.backends.onnxruntime import Graph

    eager = _eager(bundle, artefact)
    graph = Graph(bundle, artefact, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for shapes in _shapes(artefact, full):
        operands = {
            spec.name: _operand(bundle, spec.name, DTYPES[spec.dtype], shapes[spec.name], generator)
            for spec in artefact.inputs
        }
        with torch.inference_mode():
            expected = eager(**operands)
        actual = graph.run(operands, tuple(expected.shape), torch.get_num_threads())
        yield _difference(bundle, artefact, actual, expected, shapes)


def _difference(
    bundle: Bundle, artefact: Artefact, actual: torch.Tensor, expected: torch.Tensor, shapes: Mapping[str, tuple]
) -> dict[str, Any]:
    difference = actual.double() - expected.double()
    scale = expected.double().square().mean().sqrt().item()
    error = difference.square().mean().sqrt().item()
    tolerance = TOLERANCE[artefact.precision]
    shape = "x".join(map(str, shapes[artefact.inputs[0].name]))
    if not expected.numel() or not error <= tolerance * max(scale, 1e-12):  # a NaN is no pass
        raise IntegrityError(
            f"{bundle.path}: artefact {artefact.name} does not compute what the weights say: at {shape} its outputs "
            f"are {error:.2e} (RMS) from those of the eager model, whose RMS is {scale:.2e}"
        )
    text = bundle.manifest.text.weights
    return {
        "name": artefact.name, "reference": text if artefact.stage == "text" else
        bundle.manifest.weights[artefact.stage], "shape": shape, "values": expected.numel(),
        "max_abs": difference.abs().max().item(), "rel_rms": error / max(scale, 1e-12), "tolerance": tolerance,
    }  # fmt: skip


def _shapes(artefact: Artefact, full: bool) -> list[dict[str, tuple[int, ...]]]:
    sets = [{name: allowed.min for name, allowed in profile.items()} for profile in artefact.profiles]
    if full:
        sets += [dict(comparison.shapes) for comparison in artefact.receipt.compared]
    return [shapes for index, shapes in enumerate(sets) if shapes not in sets[:index]]


def _eager(bundle: Bundle, artefact: Artefact):
    """The stage's eager model in fp32, as a function of the artefact's inputs by name."""
    from pylumiere.checkpoints.native import read_weights
    from pylumiere.networks.families import build_network

    text = bundle.manifest.text
    if artefact.stage == "text" and text.kind == "clip":
        model = clip_encoder(bundle).model
        return lambda input_ids, **mask: model(input_ids)  # it attends to all
    if artefact.stage == "text":
        from pylumiere.networks.text import MiniLMEncoder

        encoder = MiniLMEncoder(bundle.config.text_tokens, bundle.read(text.tokenizer), bundle.read(text.weights))
        return lambda input_ids, attention_mask: encoder._forward(input_ids, attention_mask.bool())
    config = bundle.config.networks[artefact.stage]
    path = bundle.manifest.weights[artefact.stage]
    weights = read_weights(bundle.path / path, config, bundle.read(path))
    network = build_network(config, {name: tensor.float() for name, tensor in weights.items()})

    def run(**operands):
        return network(**{n: t.float() if t.is_floating_point() else t for n, t in operands.items()})

    return run


def _operand(bundle: Bundle, name: str, dtype: torch.dtype, shape: tuple[int, ...], generator) -> torch.Tensor:
    """Plausible random values: noise, times, levels, token numbers, and a mask with a gap in each row."""
    import torch

    if name in ("text_mask", "attention_mask"):
        kept = torch.ones(shape, dtype=torch.bool)
        if shape[1] > 1:
            kept[:, shape[1] // 2 + 1 :] = False
        return kept.to(dtype)
    if name == "input_ids":
        known = clip_config(bundle).vocab_size if bundle.manifest.text.kind == "clip" else 1000
        return torch.randint(0, known, shape, generator=generator).to(dtype)
    if name == "timesteps":
        last = bundle.config.first.schedule.num_train_timesteps
        return (torch.rand(shape, generator=generator) * last).to(dtype)
    if name == "noise_level":
        return torch.rand(shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)
