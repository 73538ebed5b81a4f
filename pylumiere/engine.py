"""Engine: a loaded model that makes clips, for any number of threads and asyncio tasks at once.

`generate`, `stream`, `submit` and `upscale` are one path: a `Job` (jobs.py) that the engine's scheduler (scheduling.py)
works on together with all others. See docs/engine.md for threads, batching, budget and deadlines.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

import pylumiere
from pylumiere.arrays import as_array, is_image, rgb
from pylumiere.backends import Choice
from pylumiere.checkpoints.adapters import Adapter, AdapterChoice, find_style, read_style, style_names
from pylumiere.checkpoints.lora import find_lora, read_lora
from pylumiere.config import ModelConfig
from pylumiere.diffusion.plan import (
    DecoderPlan,
    Plan,
    StagePlan,
    num_frames_of,
    plan_request,
    plan_upscaling,
    size_step,
)
from pylumiere.diffusion.stages import Feed, Pipeline
from pylumiere.diffusion.windows import memory_bytes
from pylumiere.errors import InvalidRequest, one_line
from pylumiere.loading import load_model, make_backend
from pylumiere.media.video import Video
from pylumiere.networks.families import expected_shapes
from pylumiere.request import MAX_SIDE, GenerationRequest, Progress
from pylumiere.scheduling.batching import call_shape
from pylumiere.scheduling.jobs import Chunk, Job, Order, Stream
from pylumiere.scheduling.memory import (
    LIBRARY_BYTES,
    OWN_FACTOR,
    Budget,
    CallBytes,
    Need,
    activation_bytes,
    parse_bytes,
    resident_bytes,
)
from pylumiere.scheduling.scheduler import SPARE, Scheduler

if TYPE_CHECKING:
    from pylumiere.backends.torch import TorchBackend
    from pylumiere.checkpoints.native import Checkpoint
    from pylumiere.loading import BundleModel

__all__ = ["Chunk", "Engine", "Job", "Stream"]

logger = logging.getLogger("pylumiere")

OutputType = Literal["uint8", "float"]
MAX_ADAPTERS = 16  # in memory


class Engine:
    """Use `Engine.load`. See `info()` for what was chosen and why."""

    def __init__(
        self,
        checkpoint: Checkpoint | BundleModel,
        choice: Choice,
        memory_budget: int | None = None,
        reproducible: bool | None = None,
        *,
        max_batch: int | None = None,
        max_running: int = 8,
        max_queue: int = 1000,
    ):
        for name, value, least in (
            ("max_batch", 1 if max_batch is None else max_batch, 1),
            ("max_running", max_running, 1),
            ("max_queue", max_queue, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidRequest(f"{name}={value!r} should be an integer of at least {least}")
        self.config: ModelConfig = checkpoint.config
        self.scale = checkpoint.config.scales[0] // checkpoint.config.decoder_scale
        on_cpu = choice.device.type == "cpu"
        self.reproducible = on_cpu if reproducible is None else reproducible
        self.memory_budget = memory_budget
        self._choice = choice
        self._folder = checkpoint.folder
        self._parameters, self._facts = checkpoint.parameters, checkpoint.facts
        self._backend = make_backend(checkpoint, choice)
        self._read_adapters: dict[tuple, Adapter] = {}
        self._pipeline = Pipeline(self.config, self._backend, checkpoint.text_encoder())
        # On a CPU two lanes, each with half of the threads. A row is a part of its own, so that a call's shape is
        # fixed; without `reproducible` a lane takes its share of the rows at once. On a GPU one lane copies while the
        # other's call computes.
        self._lanes = min(2, self._backend.num_threads) if on_cpu else 2
        self._max_batch = max_batch
        fixed = {"weights": self._backend.weight_bytes}
        if on_cpu and memory_budget is not None:
            self._pipeline.encoder.encode([""])  # its weights are read at the first prompt
            fixed["process"] = max(0, resident_bytes() - self._backend.weight_bytes) + LIBRARY_BYTES
            fixed["weights"] += getattr(self._backend, "packed_bytes", 0)  # made at the first calls
        budget = Budget(memory_budget, fixed)
        budget.check()
        self._scheduler = Scheduler(
            self._pipeline, lanes=self._lanes, part_rows=1 if on_cpu and self.reproducible else None,
            part_threads=self._backend.num_threads // self._lanes if on_cpu else None,
            capacity={guided: self._capacity(guided) for guided in (False, True)},
            fixed_batch=self.reproducible and not on_cpu, budget=budget, max_running=max_running,
            max_queue=max_queue, device_calls=None if on_cpu else _device_calls(choice.device),
        )  # fmt: skip
        weakref.finalize(self, self._scheduler.close)  # when the engine goes, and when the interpreter ends

    @classmethod
    def load(
        cls,
        source: str | PathLike = "demo",
        *,
        backend: str = "auto",
        device: str = "auto",
        precision: str = "auto",
        memory_budget: int | str | None = None,
        reproducible: bool | None = None,
        trusted_key: Any = None,
        temporal_shift: Any = None,
        **limits: int | None,
    ) -> Engine:
        """Loads a model.

        Args:
            source: a shipped name ("demo"), a model folder, a folder as diffusers saves it, or a bundle (name.plm),
                which is verified first.
            backend, device, precision: what to run on; "auto" chooses, and `info()["reason"]` says why.
            memory_budget: most bytes, or a text like "4GiB", for weights and all requests that run; on a CPU for the
                whole process. None is no limit.
            reproducible: same seed, same bytes, however the work is batched: networks are called with one fixed shape.
                None: on for the CPU.
            trusted_key: an Ed25519 public key or its PEM file; a bundle without its signature is refused.
            temporal_shift: for a folder as diffusers saves it: 8, or {"div": 8, "direction": "both", "pad": "zero"}:
                its picture network becomes one for clips. None: what the folder says.
            limits: `max_batch`, windows of one network call (None: what suits the device); `max_running` (8), requests
                that are worked on at once; `max_queue` (1000), requests that wait.

        Raises:
            BundleError: the model cannot be read.
            UnsupportedDevice: what was asked for cannot run here.
            BudgetExceeded: the weights alone do not fit.
        """
        budget = parse_bytes(memory_budget)
        model, choice = load_model(source, backend, device, precision, trusted_key, temporal_shift)
        engine = cls(model, choice, budget, reproducible, **limits)
        logger.info("loaded %s: %s on %s in %s (%s)", engine.config.name, choice.backend, choice.device,
                    choice.precision, choice.reason)  # fmt: skip
        return engine

    def generate(self, prompt: str | GenerationRequest, **fields: Any) -> Video:
        """Makes a clip.

        Args:
            prompt: the prompt, or a whole request.
            fields: further fields of GenerationRequest, or replacements of the request's.

        Raises:
            InvalidRequest: a value that is not allowed; it is named with what is.
            BudgetExceeded: the request does not fit the memory budget.
            NonFiniteOutput: (RuntimeError) a network gave NaN or infinity; stage, step and window are named.
        """
        job = self._submit(_request(prompt, fields), None, None)
        try:
            if job.request.callback_on_step_end is not None:
                job._follow_to_the_end()
            return job.result()
        except BaseException:
            job.cancel()
            raise

    def stream(self, prompt: str | GenerationRequest, **fields: Any) -> Stream:
        """Makes a clip, yields frames as they become final. Raises as `generate`; for a wrong request, at once.

        The work begins when the first frames are asked for, and goes on while they are used, up to the next ones.
        """
        request = _request(prompt, fields)
        order, metadata = self._ordered(request)
        self._scheduler.budget.check(self._need(order, request, 1))
        return Stream(self._chunks(request, order, metadata), metadata)

    def upscale(
        self,
        frames: Iterable[np.ndarray],
        *,
        fps: float | None = None,
        num_frames: int | None = None,
        seed: int = 0,
        loop: bool = False,
        num_inference_steps: int | None = None,
        window_frames: int | None = None,
        window_overlap: int | None = None,
        callback_on_step_end: Callable[[Progress], None] | None = None,
        output_type: OutputType = "uint8",
    ) -> Stream:
        """Runs the super-resolution stage alone, over a video of any length, in memory that does not grow with it.

        Args:
            frames: frames [H, W, 3] or pieces [n, H, W, 3], uint8 or float in 0..1, numpy's or torch's, or Pillow
                images; read as they are needed. Any size: it is padded to what the network divides and cropped again.
            fps: for the result; the model's own if None.
            num_frames: if it is known. A window of frames is held back where it is not, because the place of the last
                window depends on the end.
            seed: of the clip.
            loop: the last frame runs into the first; needs num_frames.
            num_inference_steps, window_frames, window_overlap: None takes the model's.
            callback_on_step_end, output_type: as in GenerationRequest.

        The input is read, and the callback runs, in the thread that takes the frames.

        Raises:
            InvalidRequest: wrong values, frames that are no pictures or change their size, or none at all.
        """
        stages = self.config.stages[1:]
        if not stages:
            raise InvalidRequest(f"model {self.config.name!r} has no super-resolution stage")
        if self.config.decoder is not None:
            raise InvalidRequest(f"model {self.config.name!r}: its stages enlarge latents, not pixels")
        # The request's own checks, for the fields both have.
        fields = dict(
            num_frames=num_frames, fps=fps, seed=seed, num_inference_steps=num_inference_steps,
            window_frames=window_frames, window_overlap=window_overlap, callback_on_step_end=callback_on_step_end,
            output_type=output_type,
        )  # fmt: skip
        request = _request("upscale", fields)
        if loop and num_frames is None:
            raise InvalidRequest("loop=True needs num_frames: the length of the input is not known")
        if any(stage.network.text_dim for stage in stages):
            raise InvalidRequest(f"model {self.config.name!r}: its super-resolution stage needs a prompt")
        metadata = {
            "model": self.config.name, "seed": request.seed, "num_frames": num_frames,
            "fps": float(request.fps or self.config.fps), "height": None, "width": None, **self._choice_facts(),
            "seconds": {},
        }  # fmt: skip

        def plan(height: int, width: int) -> tuple[StagePlan, ...]:
            return plan_upscaling(
                self.config, height, width, num_frames=num_frames, window=window_frames, overlap=window_overlap,
                loop=loop, num_inference_steps=num_inference_steps,
            )  # fmt: skip

        plan(*self.config.size)  # refuses before the first frame is read
        return Stream(self._upscaled(frames, request, metadata, plan), metadata)

    def submit(
        self,
        prompt: str | GenerationRequest,
        *,
        timeout: float | None = None,
        buffer_frames: int | None = None,
        **fields: Any,
    ) -> Job:
        """Queues a request and returns at once. From any thread.

        A `callback_on_step_end` runs in a thread of its own (with `buffer_frames`: in the one that reads the frames);
        the request waits for it after every step, others do not.

        Args:
            timeout: seconds from now in which it must be done; then it ends with DeadlineExceeded.
            buffer_frames: most final frames that wait for `frames()`. None keeps the whole clip, for `result()` and any
                number of readers.

        Raises:
            InvalidRequest, BudgetExceeded: as `generate`.
            QueueFull: `max_queue` requests wait already.
        """
        if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout < float("inf")):
            raise InvalidRequest(f"timeout={timeout!r} should be a positive number of seconds, or None")
        if buffer_frames is not None and (not isinstance(buffer_frames, int) or buffer_frames < 1):
            raise InvalidRequest(f"buffer_frames={buffer_frames!r} should be a positive number of frames, or None")
        job = self._submit(_request(prompt, fields), timeout, buffer_frames)
        if job.request.callback_on_step_end is not None and buffer_frames is None:
            threading.Thread(target=job._follow_to_the_end, name="pylumiere-callback", daemon=True).start()
        return job

    def warm_up(self, shapes: Iterable[dict[str, Any]] = ({},)) -> float:
        """Prepares for requests of these shapes, so that none of them meets a compilation, an autotuning run, a capture
        or new buffers of calls later; see docs/engine.md for what that leaves out. Returns the seconds that it took.

        Args:
            shapes: fields of requests that decide the shape of network calls: num_frames, height, width, guidance_scale
                (1 or not), window_frames, window_overlap. {} is the model's defaults. A clip longer than the base's
                window prepares the calls of one such clip, or of one `upscale` of that size, at a time.

        Raises:
            InvalidRequest, BudgetExceeded: a shape that the model does not make, or that does not fit.
        """
        begun = time.monotonic()
        calls = {}
        for fields in shapes:
            order, _ = self._ordered(_request("warm up", {"seed": 0, **fields}))
            for stage in order.stages:
                calls[call_shape(stage, SPARE if order.is_fed(stage) else 0)] = self._call_bytes(stage)
        self._scheduler.warm_up(calls)
        self._pipeline.encoder.encode(["warm up"])
        return time.monotonic() - begun

    def metrics(self) -> dict[str, Any]:
        """What the engine did and does, as JSON values. Counters start at zero when it is loaded.

        requests (queued, running; completed, failed, cancelled since the start), frames (delivered), stages (calls,
        rows, seconds, windows per call), memory (the budget, what the planner counts now, the process's resident
        bytes), call_shapes (with buffers), graphs (captured).
        """
        return self._scheduler.metrics()

    def info(self) -> dict[str, Any]:
        """What is loaded and what was chosen, as JSON values."""
        stages, (height, width) = self.config.stages, self.config.size
        return {
            "model": self.config.name,
            "folder": str(self._folder),
            **self._choice_facts(),
            "reason": self._choice.reason,
            **self._facts,
            "reproducible": self.reproducible,
            "num_threads": self._backend.num_threads,
            "text_encoder": self.config.text_encoder,
            "parameters": self._parameters,
            "weight_bytes": self._backend.weight_bytes,
            "memory_budget": self.memory_budget,
            "defaults": {
                "num_frames": self.config.first.network.num_frames,
                "fps": self.config.fps,
                "height": height,
                "width": width,
            },
            "stages": {
                stage.name: {
                    "family": stage.network.family,
                    "sampling": stage.sampling.to_dict(),
                    "windows": stage.windows and stage.windows.to_dict(),
                }
                for stage in stages
            },
            "decoder": self.config.decoder and self.config.decoder.network.family,
            "versions": {
                "pylumiere": pylumiere.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
        }

    def close(self, drain: bool = False, timeout: float | None = None) -> None:
        """Takes no more requests and ends the engine's threads.

        Args:
            drain: lets the requests that are there end; otherwise they are cancelled.
            timeout: seconds to drain; what is left then is cancelled.
        """
        self._scheduler.close(drain, timeout)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- for this package (serve/spread.py) --------------------------------------------------------------------------

    @property
    def backend(self) -> TorchBackend:
        """What makes the networks' calls."""
        return self._pipeline.backend

    def delegate_calls(self, wrap: Callable[[TorchBackend, int], Any], further: int) -> Any:
        """Lets `wrap(backend, lanes)` make the networks' calls, up to `further` more than `lanes` at once. Before the
        first request, while nothing has been taken from the pipeline. Returns what `wrap` gave."""
        backend = wrap(self.backend, self._lanes)
        object.__setattr__(self._pipeline, "backend", backend)  # frozen for everyone else
        self._scheduler.add_lanes(further)
        return backend

    def weights_digest(self) -> str:
        """SHA-256 of the configuration and of every weight as it is held."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for stage, network in sorted(getattr(self._backend, "_networks", {}).items()):
            for name, tensor in sorted(network.state_dict().items()):
                digest.update(f"{stage}.{name}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _choice_facts(self) -> dict[str, str]:
        choice = self._choice
        return {"backend": choice.backend, "device": str(choice.device), "precision": choice.precision}

    def _capacity(self, guided: bool) -> int:
        """Windows of a call."""
        if self._max_batch is not None:
            return self._max_batch
        if self._choice.device.type != "cpu":
            return 8
        rows = self._lanes if self.reproducible else 2 * self._lanes
        return max(1, rows // (2 if guided else 1))

    def _ordered(self, request: GenerationRequest) -> tuple[Order, dict[str, Any]]:
        plan = plan_request(request, self.config)
        if plan.task.initial is not None and self.config.decoder is not None:
            self._backend.check_encoder()
        if self._choice.device.type == "cpu":
            plan = plan.grouped(self._lanes)  # a lane decodes one frame at a time; more would only leave later
        if (adapters := self._adapters(plan)) is not None:
            plan = plan.styled(adapters)
        metadata = {
            "model": self.config.name, "prompt": request.prompt, "negative_prompt": request.negative_prompt,
            "seed": plan.seed, "num_frames": plan.num_frames, "fps": plan.fps, "height": plan.height,
            "width": plan.width, "sampler": plan.sampler, "num_inference_steps": plan.num_inference_steps,
            "guidance_scale": plan.guidance_scale, "application": plan.task.name, "style": plan.task.style and
            plan.task.style[0], "lora": request.lora and [list(entry) for entry in request.lora], "loop": request.loop,
            "output_type": request.output_type, **self._choice_facts(),
            "seconds": {},
        }  # fmt: skip
        return self._fitting(plan, request), metadata

    def _fitting(self, plan: Plan, request: GenerationRequest) -> Order:
        """The order of a plan; where it does not fit the budget, with fewer frames in a call of the decoder."""
        while True:
            order = Order(plan, plan.stages, plan.seed, plan.stages[-1].frame_shape[:2])
            group = plan.stages[-1].windows.window
            smaller = plan.grouped(max(1, group // 2))
            if smaller is plan or self._scheduler.budget.fits([], self._need(order, request, None)):
                return order
            plan = smaller

    def num_frames(self, request: GenerationRequest) -> int:
        """How many frames a request makes with this model. Raises InvalidRequest for numbers that do not agree."""
        return num_frames_of(request, self.config)

    def styles(self) -> list[str]:
        """Names of the styles that the model brings; none where the backend cannot change weights."""
        return style_names(self._folder) if self.takes_adapters else []

    @property
    def takes_adapters(self) -> bool:
        """Whether requests may have a style or LoRA files: not where the backend holds graphs with their weights."""
        return getattr(self._backend, "takes_styles", False)

    def _adapters(self, plan: Plan) -> AdapterChoice | None:
        """Other weights for the first stage: the request's style, then its LoRA files."""
        named = [("style", plan.task.style)] if plan.task.style is not None else []
        named += [("lora", lora) for lora in plan.request.lora or ()]
        if not named:
            return None
        return AdapterChoice(tuple((self._adapter(kind, source), strength) for kind, (source, strength) in named))

    def _adapter(self, kind: str, source: str) -> Adapter:
        """A style or a LoRA file, read once as long as it stays the same."""
        if not self.takes_adapters:
            raise InvalidRequest(
                f"{kind}={source!r}: the {self._choice.backend} backend holds a graph with its weights inside; "
                "load the model with backend='torch'"
            )
        network = self.config.first.network
        path = find_style(source, self._folder) if kind == "style" else find_lora(source)
        stat = path.stat()
        key = (kind, path, stat.st_mtime_ns, stat.st_size)
        adapter = self._read_adapters.get(key)
        if adapter is None:
            if kind == "style":
                adapter = read_style(path, network, self._backend.fingerprint)
            else:
                adapter = read_lora(path, expected_shapes(network))
            if len(self._read_adapters) >= MAX_ADAPTERS:
                self._read_adapters.clear()
            self._read_adapters[key] = adapter
        return adapter

    def _submit(self, request: GenerationRequest, timeout: float | None, buffer_frames: int | None) -> Job:
        order, metadata = self._ordered(request)
        return self._queue(request, order, metadata, timeout, buffer_frames)

    def _queue(self, request, order, metadata, timeout=None, buffer_frames=None) -> Job:
        for stage in order.stages:
            self._backend.check(stage.name, (1, *stage.call_sizes[1:], stage.input_shape[2]))
        job = Job(self._scheduler, request, order, metadata, buffer_frames=buffer_frames, timeout=timeout,
                  keep_alive=self)  # fmt: skip
        self._scheduler.submit(job, self._need(order, request, buffer_frames))
        return job

    def _need(self, order: Order, request: GenerationRequest, buffer_frames: int | None) -> Need:
        """Bytes of a request; counted only where there is a budget."""
        if self.memory_budget is None:
            return Need(0, {})
        calls = {
            call_shape(stage, id(order) if order.is_fed(stage) else 0): self._call_bytes(stage)
            for stage in order.stages
        }
        own = max(sum(self._clip_bytes(stage) for stage in together) for together in order.together())
        if self._choice.device.type != "cpu":  # the rest is host memory
            return Need(int(own * OWN_FACTOR), calls)
        last = order.last
        kept = last.windows.num_frames if buffer_frames is None else buffer_frames + last.windows.window
        own += kept * math.prod(last.frame_shape) * (1 if request.output_type == "uint8" else 4)
        # Clips that go on to the next stage as a whole, once more while they are joined.
        whole = [stage for stage in order.stages[:-1] if not order.is_streamed(stage)]
        if order.plan is not None:
            whole = whole or [order.plan.first]
            own += order.plan.task.num_bytes
        own += max((4 * 2 * stage.windows.num_frames * math.prod(stage.frame_shape) for stage in whole), default=0)
        return Need(int(own * OWN_FACTOR), calls)

    def _clip_bytes(self, stage: StagePlan | DecoderPlan) -> int:
        """Frame states; on a CPU also conditioning frames that wait, and frames on their way out."""
        if isinstance(stage, DecoderPlan):
            return 4 * 2 * stage.windows.window * (math.prod(stage.frame_shape) + math.prod(stage.input_shape))
        steps, capacity = len(stage.table.timesteps), self._capacity(stage.is_guided)
        states = memory_bytes(
            stage.windows, frame_shape=stage.frame_shape, steps=steps, capacity=capacity,
            num_outputs=2 if stage.is_guided else 1, multistep=stage.table.uses_previous,
        )  # fmt: skip
        if self._choice.device.type != "cpu":
            return states
        slots, _ = stage.windows.buffer_sizes(steps, capacity)
        frame = 4 * math.prod(stage.frame_shape)
        return states + frame * (slots + stage.windows.call_frames)

    def _call_bytes(self, stage: StagePlan | DecoderPlan) -> CallBytes:
        network = stage.network
        on_cpu = self._choice.device.type == "cpu"
        if isinstance(stage, DecoderPlan):
            return self._decoder_bytes(stage, on_cpu)
        capacity = self._capacity(stage.is_guided)
        rows = (2 if stage.is_guided else 1) * capacity
        frames, values = stage.windows.call_frames, stage.windows.call_frames * stage.height * stage.width
        part_rows = rows if not on_cpu else 1 if self.reproducible else -(-rows // self._lanes)
        activations = activation_bytes(
            network, part_rows, frames, stage.height, stage.width, self._backend.dtype, self.config.text_tokens
        )
        if not on_cpu:  # the lanes' calls follow each other on one stream
            # States and conditioning once a window; the sample, the prediction and the step's copies of rows.
            channels, noisy = network.in_channels, network.out_channels
            return CallBytes(4 * values * (channels * capacity + (channels + 2 * noisy) * rows), activations)
        # x, the sample, the prediction and its copy, and a part's own sample.
        noisy = network.out_channels
        buffers = 4 * values * (rows * (network.in_channels + 2 * noisy) + self._lanes * part_rows * noisy)
        return CallBytes(buffers, min(self._lanes, rows) * activations)

    def _decoder_bytes(self, stage: DecoderPlan, on_cpu: bool) -> CallBytes:
        group, (height, width) = stage.windows.window, stage.tile_shape
        rows = 1 if on_cpu and self.reproducible else group
        parts = min(self._lanes, -(-group // rows)) if on_cpu else 1
        activations = activation_bytes(stage.network, 1, rows, height, width, self._backend.dtype)
        frame = math.prod(stage.frame_shape)
        return CallBytes(4 * group * (math.prod(stage.input_shape) + frame), parts * (activations + 4 * rows * frame))

    def _chunks(self, request: GenerationRequest, order: Order, metadata: dict[str, Any]) -> Iterator[Chunk]:
        job = self._queue(request, order, metadata, buffer_frames=1)
        try:
            yield from job._follow()
        finally:
            job.cancel()

    def _upscaled(self, frames: Iterable[np.ndarray], request: GenerationRequest, metadata, plan) -> Iterator[Chunk]:
        low = _checked_frames(frames)
        first = next(low, None)
        if first is None:
            raise InvalidRequest("the input holds no frames")
        height, width = first.shape[0] * self.scale, first.shape[1] * self.scale
        if max(height, width) > MAX_SIDE:
            raise InvalidRequest(
                f"frames of {first.shape[0]} x {first.shape[1]} (height x width) are too large: "
                f"at most {MAX_SIDE // self.scale} a side"
            )
        metadata["height"], metadata["width"] = height, width
        unit = size_step(self.config, first=1)
        step = unit // math.gcd(unit, self.scale)  # of the low-resolution sides
        edges = ((0, -first.shape[0] % step), (0, -first.shape[1] % step), (0, 0))
        stages = plan(height + edges[0][1] * self.scale, width + edges[1][1] * self.scale)
        feed = Feed()
        feed.put(np.pad(first, edges, mode="edge"))

        def read() -> np.ndarray | None:
            frame = next(low, None)
            return None if frame is None else np.pad(frame, edges, mode="edge")

        job = self._queue(request, Order(None, stages, request.seed, (height, width), feed), metadata, buffer_frames=1)
        count = 0
        try:
            for chunk in job._follow(read=read):
                count += len(chunk.frames)
                yield chunk
        finally:
            job.cancel()
            low.close()
        metadata["num_frames"] = count


def _checked_frames(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Single frames, float32 in -1..1, of one size."""
    size, index = None, 0
    for piece in frames:
        try:
            piece = rgb(piece) if is_image(piece) else as_array(piece)
        except Exception as error:  # Pillow raises many kinds
            raise InvalidRequest(f"frame {index} cannot be read: {one_line(error)}") from error
        if piece.ndim not in (3, 4) or piece.shape[-1] != 3 or 0 in piece.shape[-3:]:
            raise InvalidRequest(f"frame {index} has shape {list(piece.shape)}; [H, W, 3] or [n, H, W, 3] is expected")
        for frame in piece if piece.ndim == 4 else piece[None]:
            if size is not None and frame.shape != size:
                raise InvalidRequest(
                    f"frame {index} is {frame.shape[0]} x {frame.shape[1]} (height x width); "
                    f"the frames before are {size[0]} x {size[1]}"
                )
            size = frame.shape
            if frame.dtype == np.uint8:
                yield frame.astype(np.float32) / np.float32(127.5) - np.float32(1)
            elif frame.dtype in (np.float16, np.float32, np.float64):
                if not (frame.min() >= 0 and frame.max() <= 1):  # also true for NaN
                    raise InvalidRequest(
                        f"frame {index}: floats should lie in 0..1; found {frame.min():g} to {frame.max():g}"
                    )
                yield frame.astype(np.float32) * np.float32(2) - np.float32(1)
            else:
                raise InvalidRequest(f"frame {index} is {frame.dtype}; uint8 (0..255) or float (0..1) is expected")
            index += 1


def _request(prompt: str | GenerationRequest, fields: dict[str, Any]) -> GenerationRequest:
    if not isinstance(prompt, GenerationRequest):
        return GenerationRequest(prompt=prompt, **fields)
    if not fields:
        return prompt
    return GenerationRequest(**{**{name: getattr(prompt, name) for name in prompt.model_fields_set}, **fields})


def _device_calls(device: torch.device):
    from pylumiere.backends.graphs import DeviceCalls

    return DeviceCalls(device)
