"""CUDA graphs of network calls: captured when an engine warms up, replayed without Python or launches in between.

All graphs of an engine share one memory pool. They are captured largest first, so that a smaller one lives in what a
larger one has let go of; and they replay on one stream, since two at once would write the same memory. A graph reads
and writes the buffers that it was captured with: a bucket's own, which live as long as the bucket.

Operands come from pinned memory on a stream of their own, and results leave on another, so that copies of one call pass
beside the computation of another.
"""

from __future__ import annotations

from collections.abc import Callable

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
        with torch.cuda.device(device):
            self._compute, self._copy_in, self._copy_out = (torch.cuda.Stream() for _ in range(3))
        self._pool = None

    def capture(self, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Captures `function`, which must read and write the same memory at every call. Returns the graph and its
        result, whose memory every replay fills anew."""
        self._compute.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._compute):
            for _ in range(WARM_UP_CALLS):
                function()
        self._compute.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._compute):
            result = function()
        self._pool = graph.pool()
        self.captured += 1
        return graph, result

    def copy_in(self, target: Tensor, source: Tensor) -> None:
        """From pinned memory; the next `run` waits for it. The source must stay unchanged until `run` has returned."""
        with torch.cuda.stream(self._copy_in):
            target.copy_(source, non_blocking=True)

    def run(self, compute: Callable[[], Tensor], target: Tensor) -> None:
        """Computes (a replay, or calls of the network), copies the result to pinned memory and waits for that.

        From one thread or several: they queue on the compute stream, and waiting lets go of Python's lock.
        """
        self._compute.wait_stream(self._copy_in)
        with torch.cuda.stream(self._compute):
            result = compute()
        self._copy_out.wait_stream(self._compute)
        with torch.cuda.stream(self._copy_out):
            target.copy_(result, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        # The next replay writes the result's memory again.
        self._compute.wait_event(done)
        done.synchronize()
