"""Windows of one clip, computed in several places, bit for bit as in one.

The engine's scheduler walks the windows and steps of a clip by diagonals and hands out network calls. On a CPU each
call has one row and a fixed number of threads, so where it runs does not matter as long as the places agree in what
decides bits: library versions, instruction set, threads, device, weights. That agreement is a fingerprint. It comes
with every answer; an answer with another one is dropped and computed here, and so is what a lost place owed.

The noise, the averages of windows and the sampler's steps stay with the engine that owns the clip. Only network calls
of the super-resolution stage travel: a window of frames there and back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pylumiere.engine import Engine
from pylumiere.errors import InvalidRequest

logger = logging.getLogger("pylumiere")

Arrays = tuple["np.ndarray | None", ...]  # sample, timesteps, text, text_mask, noise_level
Place = Callable[[str, Arrays, int], tuple[str, np.ndarray]]  # (stage, arrays, threads) -> (fingerprint, prediction)


class PlaceLost(RuntimeError):
    """A place that did not answer."""


def facts(engine: Engine) -> dict[str, Any]:
    """What two engines must have in common for the same bits."""
    info = engine.info()
    on_gpu = info["device"].startswith("cuda")
    return {
        "versions": info["versions"], "backend": info["backend"], "precision": info["precision"],
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(), "threads": info["num_threads"],
        "reproducible": info["reproducible"], "model": info["model"], "weights": engine.weights_digest(),
    }  # fmt: skip


def fingerprint(engine: Engine) -> str:
    return hashlib.sha256(json.dumps(facts(engine), sort_keys=True).encode()).hexdigest()


def answer(engine: Engine, stage: str, arrays: Arrays, num_threads: int) -> np.ndarray:
    """One network call, where it was sent to."""
    tensors = [None if array is None else torch.from_numpy(np.array(array)) for array in arrays]
    return engine.backend.predict(stage, *tensors, num_threads=num_threads).numpy()


def spread(engine: Engine, place: Place, count: int) -> SpreadBackend:
    """Lets an engine that has not run yet send super-resolution calls to `count` further places.

    Load it with `max_batch` of at least `count` + 1, so that a call has a window for each.

    Raises:
        InvalidRequest: an engine whose results depend on what is batched together, or that is not on a CPU.
    """
    if not engine.reproducible or not engine.info()["device"].startswith("cpu"):
        raise InvalidRequest("windows are spread by engines on a CPU with reproducible=True only")
    mark = fingerprint(engine)
    stages = frozenset(stage.name for stage in engine.config.stages[1:])
    return engine.delegate_calls(lambda backend, lanes: SpreadBackend(backend, place, mark, stages, own=lanes), count)


class SpreadBackend:
    """A backend that computes in its own engine while that has a free thread, and elsewhere otherwise.

    Args:
        stages: whose calls may travel: those that work on windows.

    Attributes:
        computed: calls by place: "here", "away", and "again" for those that another place failed to give.
    """

    def __init__(self, backend: Any, place: Place, mark: str, stages: frozenset[str], *, own: int):
        self._backend, self._place, self._mark, self._stages = backend, place, mark, stages
        self._own = threading.Semaphore(own)
        self._lock = threading.Lock()
        self.computed = {"here": 0, "away": 0, "again": 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def predict(self, stage: str, sample: Tensor, *inputs: Any, num_threads: int | None = None, **more: Any) -> Tensor:
        threads = num_threads or self._backend.num_threads
        may_travel = stage in self._stages and not any(more.values())
        if not may_travel or self._own.acquire(blocking=False):
            try:
                self._count("here")
                return self._backend.predict(stage, sample, *inputs, num_threads=threads, **more)
            finally:
                if may_travel:
                    self._own.release()
        arrays = tuple(None if tensor is None else tensor.numpy() for tensor in (sample, *inputs))
        try:
            mark, result = self._place(stage, arrays, threads)
            if mark == self._mark:
                self._count("away")
                return torch.from_numpy(np.array(result))
            logger.warning("a place has another fingerprint; its windows are computed here")
        except PlaceLost as error:
            logger.warning("a place was lost (%s); its window is computed here", error)
        self._count("again")
        with self._own:
            return self._backend.predict(stage, sample, *inputs, num_threads=threads, **more)

    def _count(self, where: str) -> None:
        with self._lock:
            self.computed[where] += 1
