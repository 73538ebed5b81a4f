"""The one way to launch a kernel, and the recording of a whole forward pass.

`launch` runs a Triton kernel: on the GPU, or under the interpreter when Triton was imported with TRITON_INTERPRET=1.
Inside `with record() as recording:` nothing is run on meta or fake tensors. Instead the recording receives, in order,
every kernel launch (kernel, grid, arguments, constants) and every PyTorch operator between them, over numbered buffers.
`Recording.replay` then computes the same values from real inputs, with the references or with the kernels themselves.
"""

import functools
import importlib
import itertools
import json
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_MAX_GRID = (2**31 - 1, 65535, 65535)
_recording: ContextVar["Recording | None"] = ContextVar("pylumiere_recording", default=None)


# ---- run ---------------------------------------------------------------------------------------------------------


@triton.jit
def _empty_kernel():
    pass


def interpreted() -> bool:
    """Whether this module was imported with TRITON_INTERPRET=1, so that kernels run on CPU tensors."""
    return not isinstance(_empty_kernel, triton.JITFunction)


def is_symbolic(x: torch.Tensor) -> bool:
    """A tensor without data: meta or fake."""
    return x.is_meta or hasattr(x, "fake_mode")


def arch_of(x: torch.Tensor) -> int:
    """Compute capability (90 for an H100) that a launch on `x` is tuned for; 0 for the interpreter."""
    recording = _recording.get()
    if recording is not None:
        return recording.arch
    if x.is_cuda and not is_symbolic(x):
        return _device_arch(x.device.index if x.device.index is not None else torch.cuda.current_device())
    return 0


@functools.cache
def _device_arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: dict[str, Any],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    fp_fusion: bool = True,
) -> None:
    """Run `kernel` over `grid`, or note the launch in the active recording.

    Args:
        kernel: a `@triton.jit` function.
        grid: up to three positive sizes; a zero means that there is nothing to do.
        args: run-time arguments by parameter name: tensors, ints, floats; None for an absent tensor.
        constants: `tl.constexpr` parameters by name.
        fp_fusion: let the compiler contract multiply and add. False where the bits matter.

    Raises:
        ValueError: a grid larger than the hardware's limits, or parameter names that are not the kernel's.
        RuntimeError: CPU tensors without the interpreter.
    """
    grid = tuple(int(size) for size in grid)
    if any(size == 0 for size in grid):
        return
    for size, limit in zip(grid, _MAX_GRID, strict=False):
        if not 0 < size <= limit:
            raise ValueError(f"{kernel_name(kernel)}: grid={grid} is beyond the limits {_MAX_GRID}")
    if set(args) | set(constants) != set(kernel.arg_names):
        wrong = set(args) ^ (set(kernel.arg_names) - set(constants))
        raise ValueError(f"{kernel_name(kernel)}: arguments do not match its parameters: {sorted(wrong)}")
    tensors = [value for value in args.values() if isinstance(value, torch.Tensor)]
    recording = _recording.get()
    if recording is not None:
        recording.add_launch(kernel, grid, args, constants, num_warps, num_stages, fp_fusion)
    if any(is_symbolic(x) for x in tensors):
        if recording is None:
            raise RuntimeError(f"{kernel_name(kernel)}: tensors without data can only be launched while recording")
        return
    if tensors and not tensors[0].is_cuda and isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"{kernel_name(kernel)} needs a GPU (its tensors are on {tensors[0].device}); "
            "on the CPU set TRITON_INTERPRET=1 before Triton is imported, or use the plain backend"
        )
    on_device = torch.cuda.device(tensors[0].device) if tensors and tensors[0].is_cuda else nullcontext()
    with on_device:  # Triton launches on the current device, whatever the tensors' is
        kernel[grid](**args, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fp_fusion)


def kernel_name(kernel: Any) -> str:
    """`module:function`, from which the kernel can be imported again in another process."""
    return f"{kernel.fn.__module__}:{kernel.fn.__qualname__}"


def unspecialised(kernel: Any) -> frozenset[str]:
    """Integer parameters whose value says nothing to the compiler: one kernel serves all of them."""
    options = vars(kernel) if isinstance(kernel, triton.JITFunction) else kernel.kwargs
    return frozenset(options["do_not_specialize"] or ())


def find_kernel(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


# ---- what a recording is made of -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorRef:
    """A view into a numbered buffer. Sizes and strides in elements."""

    buffer: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch: all that a driver-level caller needs beside the machine code."""

    kernel: str
    grid: tuple[int, ...]
    args: dict[str, Any]  # TensorRef, int, float or None, in the kernel's own order
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool

    def tensors(self) -> list[TensorRef]:
        return [value for value in self.args.values() if isinstance(value, TensorRef)]

    def key(self) -> str:
        """Launches with equal keys share one compiled kernel."""
        return json.dumps(self.specialisation(), sort_keys=True)

    def specialisation(self) -> dict[str, Any]:
        """Signature and constants as JSON: what the compiler sees, without sizes and addresses."""
        signature, aligned, constants = {}, [], dict(self.constants)
        plain = unspecialised(find_kernel(self.kernel))
        for name, value in self.args.items():
            if value is None:
                signature[name], constants[name] = "constexpr", None
            elif isinstance(value, TensorRef):
                signature[name] = "*" + _TYPES[value.dtype]
                if value.offset * value.dtype.itemsize % 16 == 0:
                    aligned.append(name)
            elif isinstance(value, bool):
                signature[name] = "i1"
            elif isinstance(value, int):
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and name not in plain:
                    aligned.append(name)
            else:
                signature[name] = "fp32"
        return {
            "kernel": self.kernel, "signature": signature, "aligned": aligned, "constants": constants,
            "num_warps": self.num_warps, "num_stages": self.num_stages, "fp_fusion": self.fp_fusion,
        }  # fmt: skip


_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int8: "i8",
    torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


@dataclass
class Call:
    """One operator call: ours (with the launches it made) or PyTorch's (`aten.…`, no launches)."""

    name: str
    function: Callable
    args: Any  # nested tuples, lists and dicts; tensors are TensorRefs
    outputs: Any
    launches: list[Launch] = field(default_factory=list)


@dataclass
class Buffer:
    """Memory behind one or more tensors. `first` and `last` are indices into `Recording.calls`."""

    bytes: int
    kind: str  # "input", "weight", "temporary" or "output"
    name: str = ""
    first: int = -1
    last: int = -1


class Recording:
    """The flat list of what a forward pass does, over numbered buffers."""

    def __init__(self, arch: int):
        self.arch = arch
        self.calls: list[Call] = []
        self.buffers: list[Buffer] = []
        self._storages: dict[int, tuple[int, Any]] = {}  # address -> (index, the storage, kept alive)
        self._layouts: dict[str, TensorRef] = {}  # of the named tensors
        self._scope: Call | None = None
        self.outputs: Any = None

    @property
    def launches(self) -> list[Launch]:
        return [launch for call in self.calls for launch in call.launches]

    # -- writing

    def name_tensors(self, tensors: dict[str, torch.Tensor], kind: str) -> None:
        """Say which tensors come from outside: `kind` is "input" or "weight"."""
        for name, tensor in tensors.items():
            ref = self._ref(tensor)
            buffer = self.buffers[ref.buffer]
            if ref.offset or buffer.bytes != tensor.nbytes:
                raise ValueError(f"{name!r} must be alone in its memory of {buffer.bytes} bytes, got {ref}")
            if buffer.name:
                raise ValueError(f"{name!r} shares its memory with {buffer.name!r}")
            buffer.name, buffer.kind = name, kind
            self._layouts[name] = ref

    def mark_outputs(self, outputs: Any) -> Any:
        refs = self._refs(outputs)
        for ref in _tensor_refs(refs):
            buffer = self.buffers[ref.buffer]
            buffer.kind = "output" if buffer.kind == "temporary" else buffer.kind
            buffer.last = len(self.calls)
        self.outputs = refs
        return refs

    def add_launch(self, kernel, grid, args, constants, num_warps, num_stages, fp_fusion) -> None:
        ordered = {name: self._refs(args[name]) for name in kernel.arg_names if name in args}
        entry = Launch(kernel_name(kernel), grid, ordered, dict(constants), num_warps, num_stages, fp_fusion)
        if self._scope is not None:
            self._scope.launches.append(entry)
        else:
            raise RuntimeError(f"{entry.kernel} was launched outside an operator: decorate its launch with @recorded")

    def add_call(self, call: Call) -> None:
        for ref in _tensor_refs((call.args, call.outputs, [launch.args for launch in call.launches])):
            buffer = self.buffers[ref.buffer]
            buffer.first = len(self.calls) if buffer.first < 0 else buffer.first
            buffer.last = len(self.calls)
        self.calls.append(call)

    def _refs(self, tree: Any) -> Any:
        return tree_map(lambda leaf: self._ref(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)

    def _ref(self, x: torch.Tensor) -> TensorRef:
        storage = x.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = (len(self.buffers), storage)
            self.buffers.append(Buffer(storage.nbytes(), "temporary"))
        index = self._storages[storage._cdata][0]
        return TensorRef(index, x.dtype, tuple(x.shape), tuple(x.stride()), x.storage_offset())

    # -- reading

    def replay(self, values: dict[str, torch.Tensor], *, use: str = "references", device: str = "cpu") -> Any:
        """Compute the outputs from real tensors.

        Args:
            values: every input and weight that was named, by name.
            use: "references" calls each operator's reference; "launches" runs the recorded launches one by one.

        Raises:
            ValueError: a named tensor is missing, or something reads memory that nothing wrote.
        """
        if use not in ("references", "launches"):
            raise ValueError(f"use={use!r} is neither 'references' nor 'launches'")
        memory: dict[int, torch.Tensor] = {}
        for index, buffer in enumerate(self.buffers):
            if buffer.kind in ("input", "weight"):
                if buffer.name not in values:
                    raise ValueError(f"the recording needs {buffer.name!r}, which is not among the values")
                layout, value = self._layouts[buffer.name], values[buffer.name].detach()
                if value.shape != layout.shape or value.dtype != layout.dtype:
                    raise ValueError(f"{buffer.name!r}: got {value.dtype} {tuple(value.shape)}, recorded was {layout}")
                memory[index] = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=device)
                memory[index].copy_(value)

        def resolve(leaf: Any, create: bool = False) -> Any:
            if not isinstance(leaf, TensorRef):
                return torch.device(device) if isinstance(leaf, torch.device) else leaf
            if leaf.buffer not in memory:
                if not create:
                    raise ValueError(f"buffer {leaf.buffer} ({leaf.shape}, {leaf.dtype}) is read before it is written")
                memory[leaf.buffer] = torch.empty(self.buffers[leaf.buffer].bytes, dtype=torch.uint8, device=device)
            storage = memory[leaf.buffer].untyped_storage()
            empty = torch.empty(0, dtype=leaf.dtype, device=device)
            return empty.set_(storage, leaf.offset, leaf.shape, leaf.stride)

        dead_after: dict[int, list[int]] = {}
        for index, buffer in enumerate(self.buffers):
            if buffer.kind == "temporary" and buffer.last >= 0:
                dead_after.setdefault(id(self.calls[buffer.last]), []).append(index)
        for call in self.calls:
            if call.launches and use == "launches":
                for entry in call.launches:
                    args = {name: resolve(value, create=True) for name, value in entry.args.items()}
                    launch(
                        find_kernel(entry.kernel), entry.grid, args, entry.constants,
                        num_warps=entry.num_warps, num_stages=entry.num_stages, fp_fusion=entry.fp_fusion,
                    )  # fmt: skip
            else:
                args, kwargs = _map_refs(resolve, call.args)
                results = call.function(*args, **kwargs)
                for ref, result in zip(_leaves(call.outputs), _leaves(results), strict=True):
                    if isinstance(ref, TensorRef):
                        target = resolve(ref, create=True)
                        if target.data_ptr() != result.data_ptr():
                            target.copy_(result)
            for index in dead_after.get(id(call), ()):
                memory.pop(index, None)
        return _map_refs(resolve, self.outputs)

    def peak_bytes(self) -> int:
        """Most bytes of temporaries and outputs that are alive at once, each from its first call to its last."""
        change = [0] * (len(self.calls) + 2)
        for buffer in self.buffers:
            if buffer.kind in ("temporary", "output") and buffer.first >= 0:
                change[buffer.first] += buffer.bytes
                change[min(buffer.last, len(self.calls)) + 1] -= buffer.bytes
        return max(itertools.accumulate(change))

    def to_json(self) -> dict[str, Any]:
        """Plain data: buffers with lifetimes, and the launches with argument layout."""

        def plain(value: Any) -> Any:
            if isinstance(value, TensorRef):
                dtype = str(value.dtype).removeprefix("torch.")
                layout = {"dtype": dtype, "shape": value.shape, "stride": value.stride}
                return {"buffer": value.buffer, "offset": value.offset, **layout}
            return value if isinstance(value, (int, float, bool, str, type(None))) else str(value)

        return {
            "arch": self.arch,
            "buffers": [vars(buffer) for buffer in self.buffers],
            "calls": [
                {
                    "name": call.name,
                    "args": _map_refs(plain, call.args),
                    "outputs": _map_refs(plain, call.outputs),
                    "launches": [{**vars(entry), "args": _map_refs(plain, entry.args)} for entry in call.launches],
                }
                for call in self.calls
            ],
        }


def _leaves(tree: Any) -> list[Any]:
    return tree_flatten(tree, is_leaf=lambda leaf: isinstance(leaf, TensorRef))[0]


def _tensor_refs(tree: Any) -> list[TensorRef]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, TensorRef)]


def _map_refs(function: Callable, tree: Any) -> Any:
    leaves, spec = tree_flatten(tree, is_leaf=lambda leaf: isinstance(leaf, TensorRef))
    return tree_unflatten([function(leaf) for leaf in leaves], spec)


# ---- recording -----------------------------------------------------------------------------------------------------


class _Listener(TorchDispatchMode):
    """Notes PyTorch operators that compute; views need no note, since tensors are noted as views of buffers."""

    def __init__(self, recording: Recording):
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        recording = self.recording
        if recording._scope is None and not _only_views_or_allocates(function):
            refs = (recording._refs(tuple(args)), recording._refs(dict(kwargs)))
            call = Call(str(function), function, refs, recording._refs(result))
            if _tensor_refs((call.args, call.outputs)):  # else a question about dtypes
                recording.add_call(call)
        return result


def _only_views_or_allocates(function: Any) -> bool:
    return function.is_view or function in (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten._unsafe_view.default,
        torch.ops.aten.detach.default,
    )


@contextmanager
def record(arch: int = 90):
    """Record the forward pass that is run inside the block, tuned for compute capability `arch`.

    With meta or fake tensors nothing is computed and no GPU is needed.
    """
    if _recording.get() is not None:
        raise RuntimeError("a recording is already active in this context")
    recording = Recording(arch)
    token = _recording.set(recording)
    try:
        with torch.no_grad(), _Listener(recording):
            yield recording
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    return _recording.get() is not None


def recorded(name: str, reference: Callable) -> Callable:
    """Decorator for an operator's `launch` function: its launches are noted as one call with this reference.

    `reference` takes the same arguments and returns tensors in the same order.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            recording = _recording.get()
            if recording is None or recording._scope is not None:
                return function(*args, **kwargs)
            refs = (recording._refs(args), recording._refs(kwargs))
            call = recording._scope = Call(name, reference, refs, None)
            try:
                result = function(*args, **kwargs)
            finally:
                recording._scope = None
            call.outputs = recording._refs(result)
            recording.add_call(call)
            return result

        return wrapper

    return decorate
