"""What an engine's memory goes to: bytes of a network call, of a request, of all that run; and the budget for them.

The network is walked on the meta device, where tensors have shapes and no memory; every storage that an operation
makes is counted until it is dropped. Weights and inputs are not counted. What a library allocates inside one operation
(oneDNN's reordered operands, cuDNN's workspace) is not seen, so a margin is added: measured on a CPU with the demo
networks, resident memory grew by 1.2 to 1.9 times the count, and never by more than count and margin.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import weakref
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pylumiere.errors import BudgetExceeded, InvalidRequest
from pylumiere.networks.families import AnyConfig, build_network, computing_dtype, family_of

MARGIN_FACTOR, MARGIN_BYTES = 1.5, 32 * 2**20
# Measured with the demo in bf16 on a CPU with two lanes (`memory` rows of benchmarks/results/engine.jsonl): one clip of
# 16 frames grew the process by 116 MiB more than was counted for it, which stays (generated kernels, reordered weights,
# heaps of threads); seven more at once grew it by 1.04 times what was counted for them. The rest is margin.
LIBRARY_BYTES = 160 * 2**20
OWN_FACTOR = 1.3


@functools.lru_cache(maxsize=64)
def activation_bytes(config: AnyConfig, batch: int, frames: int, height: int, width: int, dtype: torch.dtype,
                     text_tokens: int = 1) -> int:  # fmt: skip
    """Peak bytes of one call on a float32 input [batch, frames, height, width, channels], margin included.

    `dtype` is the engine's; a decoder may compute in a wider one.
    """
    sizes = {"B": batch, "T": frames, "H": height, "W": width}
    with torch.inference_mode():
        network = build_network(config).to(computing_dtype(config, dtype))
        operands = family_of(config).ports(config, text_tokens).operands(sizes)
        with _LiveBytes() as live, torch.device("meta"):
            network(**operands)
    return int(live.peak * MARGIN_FACTOR) + MARGIN_BYTES


# ---- what requests need, and what there is ---------------------------------------------------------------------------


@dataclass(frozen=True)
class CallBytes:
    """What network calls of one shape take, however many requests share them.

    Attributes:
        buffers: operands and results of a call.
        activations: of all parts that are computed at once, at their peak.
    """

    buffers: int
    activations: int


@dataclass(frozen=True)
class Need:
    """What a request takes while it runs.

    Attributes:
        own: frame states, conditioning, frames that wait: of this request alone. On a GPU its rings of frame states:
            bytes of the device.
        calls: by call shape; shared with other requests.
    """

    own: int
    calls: Mapping[Hashable, CallBytes]


class Budget:
    """Bytes that an engine may take. Not for several threads at once.

    Args:
        limit: None is no limit.
        fixed: taken whatever runs: weights, and on a CPU what the process held when the model had been loaded.
    """

    def __init__(self, limit: int | None, fixed: Mapping[str, int]):
        self.limit, self.fixed = limit, dict(fixed)
        self.warm: dict[Hashable, CallBytes] = {}  # call shapes whose buffers stay

    def total(self, needs: Iterable[Need]) -> int:
        """Bytes with these requests running: calls of one shape are made together, and lanes are shared by all."""
        needs = list(needs)
        calls = {**self.warm, **{shape: size for need in needs for shape, size in need.calls.items()}}
        peak = max((size.activations for size in calls.values()), default=0)
        return sum(self.fixed.values()) + sum(n.own for n in needs) + sum(c.buffers for c in calls.values()) + peak

    def fits(self, running: Iterable[Need], need: Need) -> bool:
        return self.limit is None or self.total([*running, need]) <= self.limit

    def check(self, need: Need | None = None) -> None:
        """Raises BudgetExceeded for what does not fit even alone."""
        required = self.total([] if need is None else [need])
        if self.limit is None or required <= self.limit:
            return
        parts = dict(self.fixed)
        if need is not None:
            parts["request"] = need.own
            for shape, size in need.calls.items():
                parts[getattr(shape, "stage", "calls")] = size.buffers + size.activations
        text = ", ".join(f"{name} {count}" for name, count in parts.items())
        raise BudgetExceeded(
            f"memory_budget={self.limit} bytes: {required} are needed ({text}); "
            "give more, or ask for a smaller size, fewer frames, or smaller windows"
        )


def parse_bytes(value: int | str | None) -> int | None:
    """A number of bytes, or a text like "4GiB", "512 MiB", "1.5GB".

    Raises:
        InvalidRequest: it is neither, or not positive.
    """
    if value is None:
        return None
    count = value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", value, re.IGNORECASE)
        count = 0
        if match:
            power = " KMGT".index(match[2].upper() or " ")
            count = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if isinstance(count, bool) or not isinstance(count, int) or count <= 0:
        raise InvalidRequest(f'memory_budget={value!r} should be bytes, positive, a text like "4GiB", or None')
    return count


def resident_bytes() -> int:
    """What this process holds in memory now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def peak_resident_bytes() -> int:
    """The most that this process has held.

    Linux says so itself; getrusage, the answer elsewhere, also counts what held the place before the program began.
    """
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, from their making to their end."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in inputs and storage not in self._seen:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._seen.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size
