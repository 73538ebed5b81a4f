"""CUDA graphs of network calls, captured when an engine warms up and replayed without Python or launches in between;
and the streams that they, the sampler and copies run on.

All graphs of an engine share one memory pool. They are captured largest first, so that a smaller one lives in what a
larger one has let go of; and they replay on one stream, since two at once would write the same memory. What a graph
reads and writes from outside lies in buffers of its bucket, not in the pool: nothing of a call that has ended is in the
way of the next one.

Frame states live on the device, and the sampler's step runs on the compute stream behind the network. Operands come
from pinned memory on a stream of their own, and final frames leave on another, so that copies of one call pass beside
the computation of another. Torch's streams do not wait for the default stream: whatever a call reads must have been
written on one of the three here, or by a copy that the host waited for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # before a capture: autotuning, workspaces, lazily loaded modules


class DeviceCalls:
    """The streams of one device and the graphs on them.

    Attributes:
        captured: graphs captured so far; does not change after the warm-up.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.captured = 0
        self._compute, self._copy_in, self._copy_out = (torch.cuda.Stream(device) for _ in range(3))
        self._pool = None
        self._lock = threading.Lock()

    def making(self) -> AbstractContextManager:
        """Buffers that `copy_in` fills are made inside: they belong to its stream, after their first filling."""
        return torch.cuda.stream(self._copy_in)

    def computing(self) -> AbstractContextManager:
        """Memory that only the compute stream writes is made inside. It may be dropped while work on it is queued."""
        return torch.cuda.stream(self._compute)

    def pinned(self, like: Tensor) -> Tensor:
        """Zeros on the host, from and to which copies pass beside other work."""
        return torch.zeros(like.shape, dtype=like.dtype, pin_memory=True)

    def capture(self, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Captures `function`, which must read and write the same buffers at every call. No call may be under way."""
        self._compute.wait_stream(self._copy_in)  # the buffers' first filling
        with torch.cuda.stream(self._compute):
            for _ in range(WARM_UP_CALLS):
                function()
        self._compute.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of the program may use the GPU meanwhile: only what this one does is checked.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._compute, capture_error_mode="thread_local"):
            function()
        self._pool = graph.pool()
        self.captured += 1
        return graph

    def copy_in(self, operands: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Pairs (buffer, pinned source); the next `enqueue` or `run` waits for them. The sources must not change until
        a `run` after that returns.

        No call that reads these buffers may be under way."""
        with torch.cuda.stream(self._copy_in):
            for buffer, source in operands:
                buffer.copy_(source, non_blocking=True)

    def enqueue(self, function: Callable[[], object]) -> None:
        """Lets `function` put work on the compute stream, after what was copied in. Does not wait."""
        self._compute.wait_stream(self._copy_in)
        with torch.cuda.stream(self._compute):
            function()

    def run(self, compute: Callable[[], object], result: Tensor, target: Tensor) -> None:
        """Lets `compute` (a replay, or calls of the network, and the step) put its work on the compute stream, copies
        the few bytes of `result` to pinned memory behind it and waits for that, which lets go of Python's lock. From
        any thread: they queue on the compute stream.
        """
        try:
            with self._lock:  # a call waits for its own work, not for that of one that another thread put in between
                self._compute.wait_stream(self._copy_in)
                with torch.cuda.stream(self._compute):
                    compute()
                    target.copy_(result, non_blocking=True)
                    done = torch.cuda.Event(blocking=True)
                    done.record()
            done.synchronize()
        except BaseException:
            # The buffers may be freed next, and nothing may be on its way to or from them then.
            for stream in (self._copy_in, self._compute, self._copy_out):
                stream.synchronize()
            raise

    def fetch(self, copies: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Pairs (pinned target, buffer whose work a `run` has waited for): copies and waits, beside what computes."""
        with torch.cuda.stream(self._copy_out):
            for target, buffer in copies:
                target.copy_(buffer, non_blocking=True)
            done = torch.cuda.Event(blocking=True)
            done.record()
        done.synchronize()


class HostCalls:
    """The same for a sampler whose device is the CPU: everything happens at once."""

    def computing(self) -> AbstractContextManager:
        return contextlib.nullcontext()

    def pinned(self, like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=like.dtype)

    def enqueue(self, function: Callable[[], object]) -> None:
        function()

    def run(self, compute: Callable[[], object], result: Tensor, target: Tensor) -> None:
        compute()
        target.copy_(result)

    def fetch(self, copies: Iterable[tuple[Tensor, Tensor]]) -> None:
        for target, buffer in copies:
            target.copy_(buffer)
