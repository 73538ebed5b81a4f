"""TensorRT and TensorRT-RTX: a bundle's plans. One file for both, since their Python interfaces are the same here.

A plan is machine code, and TensorRT's own check of a plan is no protection: it can call a changed plan valid. So a plan
reaches the library only after the bundle has verified its bytes, and after the manifest has said that it was built for
this GPU, this platform and this very version of the library.

Memory is PyTorch's: operands and results are tensors, and the plan's activations live in one tensor per stage, so that
its caching allocator sees all of it. Work runs on a stream of the stage's own; TensorRT would otherwise synchronise the
device around every call on the default stream.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pylumiere.backends.artefacts import DTYPES, ArtefactBackend, Machine, Piece, refusal, this_machine
from pylumiere.backends.choice import Choice
from pylumiere.checkpoints.bundle import Artefact, Bundle
from pylumiere.errors import BundleError, UnsupportedDevice

_DATA_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}


class TensorRTBackend(ArtefactBackend):
    """The networks of a bundle as plans on one GPU. Calls may come from any thread; those of a stage wait for another.

    Args:
        library: the module, `tensorrt` or `tensorrt_rtx`; None imports the one that the choice names.
        machine: what the plans must have been built for; None asks the device.

    Attributes:
        device, dtype: where and in what number format the networks compute. Samples and predictions are float32.
        weight_bytes: of the plans, which carry the weights.
    """

    num_threads = 1  # of the host; the GPU does the work

    def __init__(
        self,
        bundle: Bundle,
        artefacts: Mapping[str, Artefact],
        choice: Choice,
        *,
        library: Any = None,
        machine: Machine | None = None,
    ):
        super().__init__(bundle.config)
        self.name, self.device, self.dtype = choice.backend, choice.device, choice.dtype
        plans = {stage: artefact for stage, artefact in artefacts.items() if stage != "text"}
        machine = this_machine(choice.device) if machine is None else machine
        for artefact in plans.values():
            if artefact.backend != choice.backend or artefact.kind != "plan":
                raise UnsupportedDevice(f"artefact {artefact.name} is no plan of {choice.backend}")
            if why := refusal(artefact, machine, "auto"):
                raise UnsupportedDevice(f"artefact {artefact.name} cannot run on {machine.name}: {why}")
        library = importlib.import_module(choice.backend) if library is None else library
        self._plans = {
            stage: Plan(library, bundle.read(artefact.files[0]), artefact, choice.device)
            for stage, artefact in plans.items()
        }
        self.weight_bytes = sum(bundle.manifest.files[artefact.files[0]].size for artefact in plans.values())

    def artefact(self, stage: str) -> Artefact:
        return self._plans[stage].artefact

    def run(self, stage, operands, shape, piece, num_threads) -> Tensor:
        return self._plans[stage].run(operands, shape, piece)


class Plan:
    """A deserialised plan, its execution context, and the memory for its activations.

    Raises:
        BundleError: the library refuses the plan, or its tensors and profiles are not those of the manifest.
    """

    def __init__(self, library: Any, data: bytes, artefact: Artefact, device: torch.device):
        self.artefact, self.device = artefact, device
        self._lock = threading.Lock()
        self._log = _logger(library)
        # Objects keep what made them alive in this order: logger, runtime, engine, context.
        self._runtime = library.Runtime(self._log)
        self._runtime.engine_host_code_allowed = False
        with _on(device):
            self._engine = self._runtime.deserialize_cuda_engine(data)
            if self._engine is None:
                raise BundleError(f"artefact {artefact.name} is refused by {artefact.backend}: {self._log.last()}")
            self._compare(library)
            strategy = library.ExecutionContextAllocationStrategy.USER_MANAGED
            self._context = self._engine.create_execution_context(strategy)
        if self._context is None:
            raise BundleError(f"artefact {artefact.name}: {artefact.backend} made no context: {self._log.last()}")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._profile: int | None = None
        self._workspace = torch.empty(0, dtype=torch.uint8, device=device)

    def run(self, operands: Mapping[str, Tensor], shape: tuple[int, ...], piece: Piece) -> Tensor:
        """The first output in float32, of this shape."""
        spec = self.artefact.outputs[0]
        out = torch.empty(shape, dtype=DTYPES[spec.dtype], device=self.device)
        with self._lock, _on(self.device), self._own_stream([*operands.values(), out]) as stream:
            context = self._context
            if piece.profile != self._profile:
                self._did(context.set_optimization_profile_async(piece.profile, stream), "took no profile")
                self._profile = piece.profile
            for name, tensor in operands.items():
                self._did(context.set_input_shape(name, tuple(tensor.shape)), f"took no shape for {name}")
                self._did(context.set_tensor_address(name, tensor.data_ptr()), f"took no address for {name}")
            self._did(context.set_tensor_address(spec.name, out.data_ptr()), f"took no address for {spec.name}")
            wanted = context.update_device_memory_size_for_shapes()
            if wanted > self._workspace.numel():
                self._workspace = torch.empty(wanted, dtype=torch.uint8, device=self.device)
            context.set_device_memory(self._workspace.data_ptr(), self._workspace.numel())
            self._did(context.execute_async_v3(stream), "did not run")
        return out.float()

    @contextlib.contextmanager
    def _own_stream(self, tensors: list[Tensor]) -> Iterator[int]:
        """The handle of the plan's stream, ordered after what the caller's stream did and before what it does next."""
        if self._stream is None:
            yield 0
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield self._stream.cuda_stream
        for tensor in tensors:
            tensor.record_stream(self._stream)
        current.wait_stream(self._stream)

    def _compare(self, library: Any) -> None:
        """The engine's tensors and profiles against the manifest's."""
        engine, artefact = self._engine, self.artefact
        modes = {library.TensorIOMode.INPUT: artefact.inputs, library.TensorIOMode.OUTPUT: artefact.outputs}
        found: dict[Any, dict[str, Any]] = {mode: {} for mode in modes}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            found.setdefault(engine.get_tensor_mode(name), {})[name] = engine.get_tensor_dtype(name)
        for mode, specs in modes.items():
            expected = {spec.name: getattr(library.DataType, _DATA_TYPES[spec.dtype]) for spec in specs}
            if found[mode] != expected:
                raise BundleError(f"artefact {artefact.name}: the manifest says {expected}, the plan has {found[mode]}")
        if engine.num_optimization_profiles != len(artefact.profiles):
            raise BundleError(
                f"artefact {artefact.name}: the manifest has {len(artefact.profiles)} profiles, the plan "
                f"{engine.num_optimization_profiles}"
            )
        for index, profile in enumerate(artefact.profiles):
            for name, allowed in profile.items():
                there = [tuple(shape) for shape in engine.get_tensor_profile_shape(name, index)]
                if there != [allowed.min, allowed.opt, allowed.max]:
                    raise BundleError(
                        f"artefact {artefact.name}: profile {index} of {name} is {there} in the plan, "
                        f"{[allowed.min, allowed.opt, allowed.max]} in the manifest"
                    )

    def _did(self, worked: bool, what: str) -> None:
        if not worked:
            raise RuntimeError(f"{self.artefact.backend} {what} ({self.artefact.name}): {self._log.last()}")


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _logger(library: Any):
    """A logger that keeps the last error, for our own message, and prints nothing."""

    class Log(library.ILogger):
        def __init__(self):
            library.ILogger.__init__(self)
            self._last = ""

        def log(self, severity, message):
            if severity in (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR):
                self._last = message

        def last(self) -> str:
            return " ".join(self._last.split())[:300] or "it gave no reason"

    return Log()
