"""Which of a bundle's artefacts runs on this machine, and why; and how a network call is cut to what it takes.

The order is TensorRT, Triton, ONNX Runtime, PyTorch. Among plans: built for this very card, then for its compute
capability, then portable. A plan is refused here, by what the manifest says of it, before a library sees it: TensorRT
itself cannot tell from a plan which GPU it was built for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pylumiere.backends.choice import (
    ARTEFACT_BACKENDS,
    PRECISIONS,
    Choice,
    check_backend,
    find_device,
    find_precision,
    precision_of,
    triton_missing,
)
from pylumiere.checkpoints.bundle import Artefact, Manifest, ShapeRange
from pylumiere.checkpoints.skus import Sku, find_sku, has_bf16, match_device
from pylumiere.config import DECODER, ModelConfig
from pylumiere.errors import BundleError, InvalidRequest, UnsupportedDevice

ORDER = ("tensorrt", "tensorrt_rtx", "triton", "onnxruntime", "torch")
DTYPES = {"fp32": torch.float32, "int32": torch.int32, "int64": torch.int64, "bool": torch.bool,
          "fp16": torch.float16, "bf16": torch.bfloat16}  # fmt: skip
_LONG_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Machine:
    """What decides about artefacts.

    Attributes:
        sm: compute capability of the GPU, 89 for 8.9; None for a CPU.
        sku: the card's name in the SKU table; None for one that is not listed, and for a CPU.
        platform: as in `Target.platform`.
        versions: of the libraries that can run here, by backend; None for a backend means any version (a machine that
            is only imagined).
        missing: why a backend cannot run here, by backend.
    """

    sm: int | None
    sku: str | None
    name: str
    platform: str
    versions: Mapping[str, str | None]
    missing: Mapping[str, str]


def this_machine(device: torch.device) -> Machine:
    """The machine that a device is in. Imports the TensorRT libraries only where there is a GPU."""
    versions: dict[str, str | None] = {"torch": torch.__version__}
    missing: dict[str, str] = {}
    if reason := triton_missing(device):
        missing["triton"] = reason
    else:
        versions["triton"] = importlib.metadata.version("triton")
    if importlib.util.find_spec("onnxruntime") is None:
        missing["onnxruntime"] = "the package onnxruntime is not installed (pip install onnxruntime)"
    else:
        onnxruntime = importlib.import_module("onnxruntime")
        if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            missing["onnxruntime"] = "this onnxruntime is built for the CPU (pip install onnxruntime-gpu)"
        else:
            versions["onnxruntime"] = onnxruntime.__version__
    for name in ("tensorrt", "tensorrt_rtx"):
        if device.type != "cuda":
            missing[name] = "it needs an NVIDIA GPU"
        elif importlib.util.find_spec(name) is None:
            package = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}[name]
            missing[name] = f"the package {package} is not installed (pip install {package})"
        else:
            try:
                versions[name] = str(importlib.import_module(name).__version__)
            except (ImportError, OSError) as error:
                missing[name] = f"its library does not load: {' '.join(str(error).split())[:200]}"
    here = f"{platform.system().lower()}-{platform.machine()}"
    if device.type == "cpu":
        return Machine(None, None, "CPU", here, versions, missing)
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    sku = match_device(name, 10 * major + minor)
    return Machine(10 * major + minor, sku and sku.name, name, here, versions, missing)


def imagined_machine(name: str) -> Machine:
    """A machine with a card of the SKU table and every library in the version that it needs.

    Raises:
        InvalidRequest: an unknown SKU.
    """
    sku = find_sku(name)
    sm = sku.sm if isinstance(sku, Sku) else sku
    versions = dict.fromkeys(ORDER)
    label = sku.name if isinstance(sku, Sku) else f"sm_{sku}"
    return Machine(sm, sku.name if isinstance(sku, Sku) else None, label, "linux-x86_64", versions, {})


@dataclass(frozen=True)
class Selection:
    """What runs a bundle here.

    Attributes:
        artefacts: of each stage, "text" too where an artefact does that; empty stages are PyTorch's.
        reason: why this backend and these artefacts.
        passed_over: backends and artefacts that come before it, or that were not needed, with the reason.
    """

    backend: str
    precision: str
    artefacts: Mapping[str, Artefact]
    reason: str
    passed_over: Mapping[str, str] = field(default_factory=dict)


def choose_from_bundle(
    manifest: Manifest, backend: str = "auto", device: str = "auto", precision: str = "auto"
) -> tuple[Choice, Selection]:
    """`choice.choose` for a bundle.

    Raises:
        UnsupportedDevice: an explicit wish that cannot be fulfilled, with each reason.
    """
    check_backend(backend)
    reasons: list[str] = []
    target = find_device(device, reasons)
    selection = select(manifest, this_machine(target), backend, precision)
    number_format = selection.precision
    if selection.backend not in ARTEFACT_BACKENDS:
        number_format = find_precision(number_format, target, reasons)
    reasons.append(selection.reason)
    return Choice(selection.backend, target, number_format, "; ".join(reasons)), selection


def select(manifest: Manifest, machine: Machine, backend: str = "auto", precision: str = "auto") -> Selection:
    """Goes through the backends in order and takes the first that can run every stage.

    Raises:
        UnsupportedDevice: none can; or the one that was asked for cannot.
    """
    precision = _LONG_NAMES.get(precision, precision)
    if precision not in ("auto", *PRECISIONS):
        raise UnsupportedDevice(f"precision {precision!r} is unknown; allowed: auto, {', '.join(PRECISIONS)}")
    stages = list(manifest.config.networks)
    passed: dict[str, str] = {}
    for name in ORDER if backend == "auto" else (backend,):
        if name in machine.missing:
            passed[name] = machine.missing[name]
            continue
        chosen: dict[str, Artefact] | None = {}
        if name in ARTEFACT_BACKENDS:
            chosen = _best(manifest, machine, name, stages, precision, passed)
            if chosen is None:
                continue
        found = precision if not chosen else chosen[stages[0]].precision
        text = _text_artefact(manifest, machine, name)
        if text is not None:
            chosen["text"] = text
        reason = _reason(name, chosen, machine, backend == "auto", passed)
        for artefact in manifest.artefacts:
            if artefact not in chosen.values() and artefact.name not in passed:
                wished = _wish(manifest, artefact.stage, precision)
                passed[artefact.name] = refusal(artefact, machine, wished) or _not_needed(artefact, name, chosen)
        return Selection(name, found, chosen, reason, passed)
    details = "; ".join(f"{name}: {why}" for name, why in passed.items())
    asked = "no backend" if backend == "auto" else f"backend {backend!r}"
    remedy = "device='cpu' or backend='torch'" if backend == "auto" else "backend='auto'"
    raise UnsupportedDevice(
        f"{asked} can run bundle {manifest.name!r} on {machine.name} ({details}); use {remedy}, or export the bundle "
        "for this machine"
    )


def _best(
    manifest: Manifest, machine: Machine, backend: str, stages: list[str], precision: str, passed: dict[str, str]
) -> dict[str, Artefact] | None:
    """The best artefact of each stage, all in one precision, or in what a stage has instead of it; None, with the
    reason in `passed`."""
    fitting: dict[tuple[str, str], list[Artefact]] = {}
    refused: dict[str, str] = {}
    for artefact in manifest.artefacts:
        if artefact.backend != backend or artefact.stage not in stages:
            continue
        why = refusal(artefact, machine, _wish(manifest, artefact.stage, precision))
        if why is None:
            fitting.setdefault((artefact.precision, artefact.stage), []).append(artefact)
        else:
            refused[artefact.name] = why
    passed.update(refused)
    networks = manifest.config.networks
    needed = {p: {stage: (precision_of(networks[stage], p), stage) for stage in stages} for p in _preference(machine)}
    complete = [p for p, keys in needed.items() if all(key in fitting for key in keys.values())]
    if not complete:
        nothing = "the bundle has none of its artefacts"
        partly = "its artefacts do not cover every stage in one precision"
        passed[backend] = partly if fitting else "; ".join(f"{n}: {why}" for n, why in refused.items()) or nothing
        return None
    best = {p: {stage: min(fitting[key], key=_distance) for stage, key in needed[p].items()} for p in complete}
    # The nearest target first; the precision decides among equals.
    return min(best.values(), key=lambda found: max(_distance(artefact) for artefact in found.values()))


def _wish(manifest: Manifest, stage: str, precision: str) -> str:
    """What a wish for a precision asks of a stage."""
    network = manifest.config.networks.get(stage)
    return precision if precision == "auto" or network is None else precision_of(network, precision)


def _preference(machine: Machine) -> tuple[str, ...]:
    if machine.sm is None:
        return ("fp32",)
    return ("bf16", "fp16", "fp32") if has_bf16(machine.sm) else ("fp16", "fp32")


def _distance(artefact: Artefact) -> int:
    if artefact.target.sku is not None:
        return 0
    return 1 if len(artefact.target.sms) == 1 else 2


def refusal(artefact: Artefact, machine: Machine, precision: str) -> str | None:
    """Why an artefact cannot run on a machine; None if it can."""
    target, name = artefact.target, artefact.backend
    if artefact.kind == "cubins":
        return "for programs without a compiler; the triton backend compiles its kernels when they are first called"
    if target.sms and machine.sm is None:
        return f"built for {target.label}; there is no GPU"
    if target.sku is not None and target.sku != machine.sku:
        return f"built for {target.sku}; this is {machine.sku or machine.name}"
    if target.sms and machine.sm not in target.sms:
        return f"built for {', '.join(f'sm_{sm}' for sm in target.sms)}; this GPU is sm_{machine.sm}"
    if target.platform not in ("any", machine.platform):
        return f"built for {target.platform}; this is {machine.platform}"
    if name in machine.missing:
        return f"{name}: {machine.missing[name]}"
    version = machine.versions.get(name)
    if artefact.kind == "plan" and version is not None and version != artefact.library.version:
        return (
            f"built by {artefact.library.name} {artefact.library.version}; {version} is installed, which does not load "
            "other versions' plans"
        )
    if precision not in ("auto", artefact.precision):
        return f"computes in {artefact.precision}; {precision} was asked for"
    if machine.sm is None and artefact.precision != "fp32":
        return f"ONNX Runtime has no {artefact.precision} convolutions on a CPU"
    if machine.sm is not None and artefact.precision == "bf16" and not has_bf16(machine.sm):
        return f"sm_{machine.sm} has no bf16"
    return None


def _not_needed(artefact: Artefact, backend: str, chosen: Mapping[str, Artefact]) -> str:
    if artefact.stage == "text":
        return "the text encoder runs once a clip, by PyTorch" if "text" not in chosen else "another one was taken"
    taken = chosen.get(artefact.stage)
    if taken is not None and artefact.backend == backend:
        nearer = "is nearer to this GPU" if _distance(taken) < _distance(artefact) else "comes first"
        return f"{taken.name} ({taken.target.label}, {taken.precision}) {nearer}"
    return f"{backend} was taken"


def _text_artefact(manifest: Manifest, machine: Machine, backend: str) -> Artefact | None:
    """The text encoder's graph, on the CPU; None where PyTorch has the weights for it, or nothing is needed."""
    text = manifest.text
    if text.kind == "hash" or (backend in ("torch", "triton") and text.weights is not None):
        return None
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    graphs = [a for a in manifest.artefacts if a.stage == "text" and a.kind == "onnx" and a.precision == "fp32"]
    return graphs[0] if graphs else None


def _reason(
    backend: str, chosen: Mapping[str, Artefact], machine: Machine, is_auto: bool, passed: Mapping[str, str]
) -> str:
    built = ", ".join(f"{a.name} ({a.target.label}, {a.precision})" for s, a in chosen.items() if s != "text")
    parts = [f"backend {backend}" + (f" with {built}" if built else "")]
    if not is_auto:
        parts.append("as asked for")
    elif before := [f"{name}: {passed[name]}" for name in ORDER[: ORDER.index(backend)] if name in passed]:
        parts.append(f"the first in order that runs on {machine.name} ({'; '.join(before)})")
    else:
        parts.append(f"the first in order, and it runs on {machine.name}")
    return ", ".join(parts)


# ---- calls -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a call, for one profile; `padded` rows are given, the last one repeated."""

    start: int
    stop: int
    padded: int
    profile: int


def cut(artefact: Artefact, shapes: Mapping[str, Iterable[int]]) -> list[Piece]:
    """Cuts a call into pieces along its first axis, so that each fits a profile. The same call is always cut alike.

    Args:
        shapes: of the operands, by name; their first axes are equal.

    Raises:
        InvalidRequest: no profile takes these sizes, whatever the number of rows; what they take is named.
        BundleError: operands that the artefact does not have, or the other way round.
    """
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    expected = {spec.name for spec in artefact.inputs}
    if set(shapes) != expected:
        raise BundleError(
            f"artefact {artefact.name} takes {', '.join(sorted(expected))}; the model gives {', '.join(sorted(shapes))}"
        )
    rows = next(iter(shapes.values()))[0]
    best: tuple[tuple[int, int], int, int, int] | None = None  # most rows at once, then least padding
    for number, profile in enumerate(artefact.profiles):
        if all(_takes(profile[name], shape) for name, shape in shapes.items()):
            most = min(profile[name].max[0] for name in shapes)
            least = max(profile[name].min[0] for name in shapes)
            key = (-min(most, rows), max(least, rows))
            if best is None or key < best[0]:
                best = (key, number, most, least)
    if best is None:
        raise InvalidRequest(
            f"the {artefact.stage} network of this bundle was exported for other sizes: {_sizes(artefact)}; asked for "
            f"{'x'.join(map(str, shapes[artefact.inputs[0].name][1:]))}. Export it for these, or use backend='torch'"
        )
    _, number, most, least = best
    pieces = []
    for start in range(0, rows, most):
        stop = min(start + most, rows)
        pieces.append(Piece(start, stop, max(stop - start, least), number))
    return pieces


def _takes(allowed: ShapeRange, shape: tuple[int, ...]) -> bool:
    """Whether an operand fits but for the number of its rows."""
    return allowed.holds((allowed.min[0], *shape[1:])) if len(shape) == len(allowed.min) else False


def _sizes(artefact: Artefact) -> str:
    """The first input's sizes in words, without rows: 80x32x32x7 or 8..80x32..128x32..128x7."""
    texts = []
    for profile in artefact.profiles:
        allowed = profile[artefact.inputs[0].name]
        axes = zip(allowed.min[1:], allowed.max[1:], strict=True)
        texts.append("x".join(str(low) if low == high else f"{low}..{high}" for low, high in axes))
    return ", ".join(dict.fromkeys(texts))


def operands_of(artefact: Artefact, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """A network call's operands by name, contiguous and in the dtypes of the artefact's inputs; None is none.

    Raises:
        BundleError: an input that the model does not give.
    """
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    if set(given) != {spec.name for spec in artefact.inputs}:
        names = ", ".join(spec.name for spec in artefact.inputs)
        raise BundleError(f"artefact {artefact.name} takes {names}; the model gives {', '.join(given)}")
    return {spec.name: given[spec.name].to(DTYPES[spec.dtype]).contiguous() for spec in artefact.inputs}


def rows_of(tensor: Tensor, piece: Piece) -> Tensor:
    """The rows of a piece, the last one repeated up to its padded number."""
    rows = tensor[piece.start : piece.stop]
    missing = piece.padded - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


class ArtefactBackend:
    """What backends share that run a bundle's artefacts: a call is cut into pieces that fit the artefact's profiles.

    There are no styles: the weights are in the artefact.
    """

    takes_styles = False
    device: torch.device

    def __init__(self, config: ModelConfig):
        self._networks = config.networks

    def artefact(self, stage: str) -> Artefact:
        """What runs a network."""
        raise NotImplementedError

    def run(self, stage: str, operands: dict[str, Tensor], shape: tuple[int, ...], piece: Piece,
            num_threads: int | None) -> Tensor:  # fmt: skip
        """The output of one piece, float32, of this shape."""
        raise NotImplementedError

    def predict(
        self,
        stage: str,
        sample: Tensor,
        timesteps: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        noise_level: Tensor | None = None,
        *,
        num_threads: int | None = None,
        style: None = None,
    ) -> Tensor:
        """One network call; see `TorchBackend.predict`.

        Raises:
            InvalidRequest: sizes that the artefact was not exported for.
        """
        operands = {"sample": sample, "timesteps": timesteps, "text": text, "text_mask": text_mask,
                    "noise_level": noise_level}  # fmt: skip
        shape = (*sample.shape[:-1], self._networks[stage].out_channels)
        return self._call(stage, operands, shape, num_threads)

    def decode(self, latents: Tensor, *, num_threads: int | None = None) -> Tensor:
        """Pixels of latents; see `TorchBackend.decode`."""
        network = self._networks[DECODER]
        height, width = (side * network.scale for side in latents.shape[2:4])
        shape = (*latents.shape[:2], height, width, network.out_channels)
        return self._call(DECODER, {"latents": latents}, shape, num_threads)

    def check_encoder(self) -> None:
        """Raises InvalidRequest: graphs are built of decoders alone."""
        raise InvalidRequest(
            "this backend has no encoder for pictures and clips, only the decoder; load the model with backend='torch'"
        )

    def check(self, stage: str, shape: tuple[int, ...]) -> None:
        """Raises InvalidRequest where an input of this shape [B, T, H, W, C] does not fit the stage's artefact."""
        artefact = self.artefact(stage)
        others = {name: (shape[0], *allowed.opt[1:]) for name, allowed in artefact.profiles[0].items()}
        cut(artefact, {**others, artefact.inputs[0].name: shape})

    def _call(self, stage: str, given: Mapping[str, Tensor | None], shape: tuple[int, ...],
              num_threads: int | None) -> Tensor:  # fmt: skip
        artefact = self.artefact(stage)
        operands = operands_of(artefact, given)
        out = torch.empty(shape, device=self.device)
        for piece in cut(artefact, {name: tensor.shape for name, tensor in operands.items()}):
            rows = {name: rows_of(tensor, piece) for name, tensor in operands.items()}
            result = self.run(stage, rows, (piece.padded, *shape[1:]), piece, num_threads)
            out[piece.start : piece.stop] = result[: piece.stop - piece.start]
        return out
