"""A Ray Serve application: engine replicas on many machines behind the same HTTP API. Extra `[ray]`.

    serve run pylumiere.serve.ray_app:build model=demo data=/shared/pylumiere replicas=4

One front replica owns the records and files (`store.py`) and answers HTTP; engine replicas compute. Ray starts and
stops engine replicas by the number of clips that wait for one. A replica that dies in mid-clip takes nothing with it:
the clip goes back into the queue and runs on another one, from its stored request and seed, so its bytes are the same
wherever the replicas' fingerprints agree.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayError

from pylumiere.checkpoints.adapters import style_names
from pylumiere.checkpoints.native import find_model
from pylumiere.engine import Chunk, Engine
from pylumiere.errors import BudgetExceeded, Cancelled, DeadlineExceeded, InvalidRequest
from pylumiere.loading import read_model_config
from pylumiere.request import GenerationRequest, Progress
from pylumiere.serve import spread
from pylumiere.serve.app import Limits, Service, create_app
from pylumiere.serve.jobs import BUFFER_FRAMES, Work, WorkerLost, check_style
from pylumiere.serve.keys import KeyRing, read_keys
from pylumiere.serve.loras import find_loras, lora_files
from pylumiere.serve.store import Store

WINDOW_SECONDS = 600.0

logger = logging.getLogger("pylumiere")

_REFUSALS = {kind.__name__: kind for kind in (InvalidRequest, BudgetExceeded, DeadlineExceeded)}


@dataclass(frozen=True)
class RayOptions:
    """Arguments of `build`, from Ray's command line as texts.

    Attributes:
        data: on the machine of the front replica, or on a disk that all machines share.
        replicas: most engine replicas; one is always there.
        clips_per_replica: in one engine at once.
        num_cpus, num_gpus: that Ray reserves for a replica.
        key: PEM file of a public key; only a bundle that it signed is served.
        temporal_shift: for a folder as diffusers saves it; see `Engine.load`.
        loras: folder of the LoRA files that requests may name, on a disk that all machines share.
        deadline: seconds for a clip that asks for none.
        threads: of torch in a replica; the same everywhere, or results differ in their last bits.
        windows: further replicas that compute windows of the super-resolution stage for the engines (`spread.py`).
    """

    model: str = "demo"
    data: str = "pylumiere-data"
    api_keys: str | None = None
    key: str | None = None
    temporal_shift: int | None = None
    loras: str | None = None
    replicas: int = 2
    min_replicas: int = 1
    clips_per_replica: int = 2
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 1
    windows: int = 0
    deadline: float | None = None
    memory_budget: str | None = None
    backend: str = "auto"
    device: str = "auto"
    precision: str = "auto"

    @classmethod
    def parse(cls, arguments: dict[str, Any]) -> RayOptions:
        unknown = arguments.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            allowed = ", ".join(cls.__dataclass_fields__)
            raise InvalidRequest(f"unknown argument {sorted(unknown)[0]!r}; allowed: {allowed}")
        kinds = {"replicas": int, "min_replicas": int, "clips_per_replica": int, "threads": int, "windows": int,
                 "temporal_shift": int, "num_cpus": float, "num_gpus": float, "deadline": float}  # fmt: skip
        try:
            return cls(**{name: kinds.get(name, lambda v: v)(value) for name, value in arguments.items()})
        except ValueError as error:
            raise InvalidRequest(f"an argument is no number: {error}") from None


def _load(options: RayOptions, **more: Any) -> Engine:
    import torch

    torch.set_num_threads(options.threads)
    return Engine.load(
        options.model, backend=options.backend, device=options.device, precision=options.precision,
        memory_budget=options.memory_budget, trusted_key=options.key, temporal_shift=options.temporal_shift, **more,
    )  # fmt: skip


@serve.deployment(name="windows")
class WindowReplica:
    """Computes single network calls for the engines."""

    def __init__(self, options: RayOptions):
        self._engine = _load(options)
        self._mark = spread.fingerprint(self._engine)

    def predict(self, stage: str, arrays: spread.Arrays, num_threads: int) -> tuple[str, np.ndarray]:
        return self._mark, spread.answer(self._engine, stage, arrays, num_threads)


@serve.deployment(name="engine")
class EngineReplica:
    """One engine. Its clips are streams of messages, so that the front sees frames as they become final."""

    def __init__(self, options: RayOptions, windows=None):
        self._spread = None
        self._loras = find_loras(options.loras)
        if windows is None:
            self._engine = _load(options)
            return
        self._engine = _load(options, max_batch=2 * (options.windows + options.threads))

        def place(stage: str, arrays: spread.Arrays, num_threads: int) -> tuple[str, np.ndarray]:
            try:
                return windows.predict.remote(stage, arrays, num_threads).result(timeout_s=WINDOW_SECONDS)
            except (RayError, serve.exceptions.RayServeException, TimeoutError) as error:
                raise spread.PlaceLost(type(error).__name__) from error

        self._spread = spread.spread(self._engine, place, options.windows)

    async def generate(self, fields: dict[str, Any], timeout: float | None = None) -> AsyncIterator[tuple]:
        """("progress", fields), ("frames", start, pixels), then ("done", metadata) or ("refused", kind, text).

        A caller that leaves cancels the clip at the next message.
        """
        loop, messages = asyncio.get_running_loop(), asyncio.Queue()

        def put(message: tuple) -> None:
            loop.call_soon_threadsafe(messages.put_nowait, message)

        def work() -> None:
            try:
                for chunk in job.frames():
                    put(("frames", chunk.start, np.ascontiguousarray(chunk.frames)))
                put(("done", job.metadata))
            except tuple(_REFUSALS.values()) as error:
                put(("refused", type(error).__name__, str(error)))
            except BaseException as error:
                put(("failed", error))

        try:
            request = GenerationRequest(
                **fields, callback_on_step_end=lambda progress: put(("progress", vars(progress)))
            )
            check_style(request, self._engine.styles())
            with lora_files(request, self._loras) as request:
                job = self._engine.submit(request, buffer_frames=BUFFER_FRAMES, timeout=timeout)
        except tuple(_REFUSALS.values()) as error:
            yield ("refused", type(error).__name__, str(error))
            return
        thread = loop.run_in_executor(None, work)
        try:
            while True:
                message = await messages.get()
                if message[0] == "failed":
                    raise message[1]
                yield message
                if message[0] in ("done", "refused"):
                    return
        finally:
            job.cancel()
            await thread

    async def fingerprint(self) -> dict[str, Any]:
        """Also the process, and how many calls were computed where."""
        computed = None if self._spread is None else dict(self._spread.computed)
        return {**spread.facts(self._engine), "pid": os.getpid(), "computed": computed}


class RayWorker:
    """Engine replicas, behind a handle that chooses one."""

    def __init__(self, handle):
        self._handle = handle.options(stream=True)

    def check(self, request: GenerationRequest) -> None:
        """The front checks requests against the model; a replica's memory is known to the replica."""

    def start(
        self, request: GenerationRequest, on_progress: Callable[[Progress], None], timeout: float | None
    ) -> Work:
        fields = {name: getattr(request, name) for name in request.model_fields_set}
        # Their read-only views cannot travel.
        fields |= {name: dict(fields[name]) for name in ("keyframes", "expand") if fields.get(name) is not None}
        return _RayWork(self._handle.generate.remote(fields, timeout), on_progress)


class _RayWork:
    def __init__(self, messages, on_progress: Callable[[Progress], None]):
        self._messages, self._on_progress = messages, on_progress
        self._is_cancelled = False
        self.metadata: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Chunk]:
        try:
            for kind, *content in self._messages:
                if self._is_cancelled:
                    break
                if kind == "progress":
                    self._on_progress(Progress(**content[0]))
                elif kind == "frames":
                    yield Chunk(*content)
                elif kind == "done":
                    self.metadata = content[0]
                    return
                else:
                    raise _REFUSALS[content[0]](content[1])
        except RayError as error:
            if not self._is_cancelled:
                if isinstance(error, ray.exceptions.RayTaskError):
                    raise  # the engine's own failure; another replica would fail as well
                raise WorkerLost(type(error).__name__) from error
        except serve.exceptions.RayServeException as error:
            if not self._is_cancelled:
                raise WorkerLost(type(error).__name__) from error
        if self._is_cancelled:
            raise Cancelled("the job was cancelled")
        raise WorkerLost("the replica ended the stream early")

    def cancel(self) -> None:
        self._is_cancelled = True
        self._messages.cancel()


def make_service(options: RayOptions, handle) -> Service:
    """The front's service: the store, and replicas for a worker."""
    keys = None if options.api_keys is None else KeyRing(read_keys(options.api_keys))
    config = read_model_config(options.model, options.key, options.temporal_shift)
    service = Service(
        config, Store(Path(options.data)), keys, Limits(deadline=options.deadline),
        options.replicas * options.clips_per_replica, (config.name,), tuple(style_names(find_model(options.model))),
        tuple(find_loras(options.loras)),
    )  # fmt: skip
    service.start(RayWorker(handle))
    return service


def _make_front(options: RayOptions):
    """The deployment of the routes. Its ASGI application is made in the replica, never pickled."""

    def make_app():
        name = serve.get_replica_context().app_name
        return create_app(make_service(options, serve.get_deployment_handle("engine", app_name=name)))

    @serve.deployment(name="front", num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
    @serve.ingress(make_app)
    class Front:
        def __init__(self, engine):
            """`engine` ties the engine's deployment to this application."""

    return Front


def build(arguments: dict[str, Any]) -> Any:
    """The application, for `serve run pylumiere.serve.ray_app:build model=... data=...`.

    Raises:
        InvalidRequest: an argument that is unknown or of the wrong kind.
    """
    options = RayOptions.parse(arguments)
    resources = {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus}
    helpers = []
    if options.windows:
        helpers = [
            WindowReplica.options(
                num_replicas=options.windows, max_ongoing_requests=1, health_check_period_s=5,
                ray_actor_options=resources,
            ).bind(options)
        ]  # fmt: skip
    engine = EngineReplica.options(
        max_ongoing_requests=options.clips_per_replica, health_check_period_s=5, graceful_shutdown_timeout_s=10,
        autoscaling_config={
            "min_replicas": options.min_replicas, "max_replicas": options.replicas,
            "target_ongoing_requests": max(1, options.clips_per_replica), "upscale_delay_s": 5,
            "downscale_delay_s": 300,
        },
        ray_actor_options=resources,
    ).bind(options, *helpers)  # fmt: skip
    return _make_front(options).bind(engine)


__all__ = ["EngineReplica", "RayOptions", "RayWorker", "WindowReplica", "build", "make_service"]
