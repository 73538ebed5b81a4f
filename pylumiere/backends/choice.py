"""Which backend runs on this machine, and why.

A backend turns a checkpoint into two functions, one per stage, that predict what the network predicts. `choose` names
the backend, device and number format for a request like `backend="auto"`; whatever was asked for explicitly and cannot
run is an error with the reason and the remedy, never a silent replacement.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pylumiere.errors import UnsupportedDevice
from pylumiere.networks.families import AnyConfig, computing_dtype

BACKENDS = ("torch", "triton", "onnxruntime", "tensorrt", "tensorrt_rtx")
ARTEFACT_BACKENDS = ("onnxruntime", "tensorrt", "tensorrt_rtx")  # run what an exporter made, from a bundle only
_LONG_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in PRECISIONS.items()}


@dataclass(frozen=True)
class Choice:
    """What runs, and the reason for each part that was left to "auto"."""

    backend: Literal["torch", "triton", "onnxruntime", "tensorrt", "tensorrt_rtx"]
    device: torch.device
    precision: str  # a key of PRECISIONS
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


def choose(backend: str = "auto", device: str = "auto", precision: str = "auto") -> Choice:
    """Decides what runs a model folder. For a bundle, see `artefacts.select`.

    Args:
        backend: "auto" or one of BACKENDS.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "auto", a key of PRECISIONS, or torch's name of the dtype.

    Raises:
        UnsupportedDevice: an explicit wish that this machine cannot fulfil, or a name that is not known.
    """
    reasons = []
    target = find_device(device, reasons)
    name = _backend(backend, target, reasons)
    number_format = find_precision(precision, target, reasons)
    return Choice(name, target, number_format, "; ".join(reasons) or "as asked for")


def find_device(name: str, reasons: list[str]) -> torch.device:
    """The device of a name; what was left to "auto" is explained in `reasons`. Raises UnsupportedDevice."""
    if name == "auto":
        if torch.cuda.is_available():
            reasons.append(f"device cuda: {torch.cuda.get_device_name(0)} is there")
            return torch.device("cuda", 0)
        reasons.append(f"device cpu: {_no_cuda()}")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UnsupportedDevice(f"device {name!r} is unknown; allowed: auto, cpu, cuda, cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UnsupportedDevice(f"device {name!r} cannot be used: {_no_cuda()}; use device='cpu'")
        index = device.index or 0
        if index >= torch.cuda.device_count():
            raise UnsupportedDevice(f"device {name!r} does not exist: there are {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", index)
    return torch.device("cpu")


def _no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA (install the CUDA build of torch to use a GPU)"
    return "no NVIDIA GPU or driver was found"


def _backend(name: str, device: torch.device, reasons: list[str]) -> str:
    check_backend(name)
    if name in ARTEFACT_BACKENDS:
        raise UnsupportedDevice(
            f"backend {name!r} cannot run a model folder, only a bundle: make one with "
            "`pylumiere export --model FOLDER -o name.plm`, or use backend='torch'"
        )
    missing = triton_missing(device)
    if name == "auto":
        reasons.append(
            f"backend torch: triton cannot be used ({missing})" if missing else "backend triton: the GPU runs it"
        )
        return "torch" if missing else "triton"
    if name == "triton" and missing:
        raise UnsupportedDevice(f"backend 'triton' cannot run: {missing}; use backend='torch'")
    return name


def check_backend(name: str) -> None:
    """Raises UnsupportedDevice for a name that is no backend of this version."""
    if name not in ("auto", *BACKENDS):
        raise UnsupportedDevice(f"backend {name!r} is not part of this version; allowed: auto, {', '.join(BACKENDS)}")


def triton_missing(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device; None if they can."""
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if importlib.util.find_spec("pylumiere.backends.triton") is None:
        return "pylumiere.backends.triton is not part of this installation"
    return None


def find_precision(name: str, device: torch.device, reasons: list[str]) -> str:
    """The precision of a name for PyTorch and our kernels on a device. Raises UnsupportedDevice."""
    name = _LONG_NAMES.get(name, name)
    if name not in ("auto", *PRECISIONS):
        raise UnsupportedDevice(f"precision {name!r} is unknown; allowed: auto, {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if name == "auto":
            name = "bf16" if major >= 8 else "fp16"
            reasons.append(f"precision {name}: compute capability {major}.{minor}")
        elif name == "bf16" and major < 8:
            raise UnsupportedDevice(
                f"precision 'bf16' cannot run on compute capability {major}.{minor}; use precision='fp16' or 'fp32'"
            )
        return name
    if name == "auto":
        # Measured on the demo networks (benchmarks/results/cpu.jsonl): bf16 takes 0.54 of the time of fp32 with
        # avx512_bf16 (Zen 5; base, 0.57 for the SSR). Without bf16 instructions torch converts around every product.
        units = bf16_units()
        reasons.append(f"precision bf16: the CPU has {units}" if units else "precision fp32: the CPU has no bf16 units")
        return "bf16" if units else "fp32"
    if name == "fp16":
        raise UnsupportedDevice("precision 'fp16' cannot run on the CPU; use precision='bf16' or 'fp32'")
    return name


def precision_of(network: AnyConfig, precision: str) -> str:
    """`computing_dtype` by names of precisions."""
    return _NAMES[computing_dtype(network, PRECISIONS[precision])]


def bf16_units() -> str | None:
    """The instruction set with which this CPU multiplies bf16 matrices, or None."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    if "amx_bf16" in flags:
        return "AMX bf16"
    if "avx512_bf16" in flags:
        return "AVX-512 bf16"
    return None
