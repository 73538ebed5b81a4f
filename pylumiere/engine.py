"""Engine: a loaded model that makes clips. Immutable after loading; share it between threads.

`generate` collects what `stream` yields, so both give the same bytes. The work runs in the thread that asks for the
next frames; `submit` runs it in the engine's own thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import platform
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch

import pylumiere
from pylumiere.backends import Choice, choose
from pylumiere.backends.torch import TorchBackend
from pylumiere.checkpoint import Checkpoint, find_model, load_checkpoint
from pylumiere.config import ModelConfig
from pylumiere.errors import BudgetExceeded, Cancelled, InvalidRequest
from pylumiere.pipeline import Hooks, Pipeline, Plan, StagePlan, plan_request, plan_ssr, ssr_scale
from pylumiere.request import MAX_SIDE, GenerationRequest, Progress
from pylumiere.text import load_text_encoder
from pylumiere.video import Video
from pylumiere.windows import to_uint8

logger = logging.getLogger("pylumiere")

OutputType = Literal["uint8", "float"]


@dataclass(frozen=True)
class Chunk:
    """Consecutive final frames: uint8 (or float32 in 0..1) [n, H, W, 3]; the first is frame `start` of the clip."""

    start: int
    frames: np.ndarray


class Stream:
    """Iterator over the Chunks of one clip, in order and without gaps. Leaving it early stops the work.

    Attributes:
        fps, seed: of the clip.
        num_frames: None while an input of unknown length is read.
        height, width: of the frames; None for `upscale` before the first chunk.
        metadata: JSON values about the clip; `seconds` and `first_frame_seconds` fill up as it runs.
    """

    def __init__(self, chunks: Iterator[Chunk], metadata: dict[str, Any]):
        self._chunks = chunks
        self.metadata = metadata

    fps = property(lambda self: self.metadata["fps"])
    seed = property(lambda self: self.metadata["seed"])
    num_frames = property(lambda self: self.metadata["num_frames"])
    height = property(lambda self: self.metadata["height"])
    width = property(lambda self: self.metadata["width"])

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """Stops the work and frees its memory. Harmless after the end."""
        self._chunks.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def collect(self) -> Video:
        """The rest of the clip, which is all of it if nothing was taken before."""
        frames = np.concatenate([chunk.frames for chunk in self])
        return Video(frames, self.fps, self.metadata)


class Engine:
    """Use `Engine.load`. See `info()` for what was chosen and why."""

    def __init__(self, checkpoint: Checkpoint, choice: Choice, memory_budget: int | None, reproducible: bool | None):
        self.config: ModelConfig = checkpoint.config
        self.scale = ssr_scale(checkpoint.config)
        self.reproducible = choice.device.type == "cpu" if reproducible is None else reproducible
        self.memory_budget = memory_budget
        self._choice = choice
        self._folder = checkpoint.folder
        self._parameters = sum(t.numel() for stage in (checkpoint.base, checkpoint.ssr or {}) for t in stage.values())
        self._backend = _make_backend(checkpoint, choice)
        encoder = load_text_encoder(
            self.config.text_encoder, max_length=self.config.text_tokens, width=self.config.base.network.text_dim
        )
        # One window a call on a CPU: larger batches are no faster there and hold back the first frames.
        capacity = 1 if choice.device.type == "cpu" else 8
        self._pipeline = Pipeline(self.config, self._backend, encoder, capacity, self.reproducible)
        self._check_budget()
        self._jobs = _JobThread()
        weakref.finalize(self, self._jobs.close)  # when the engine goes, and when the interpreter ends

    @classmethod
    def load(
        cls,
        source: str | PathLike = "demo",
        *,
        backend: str = "auto",
        device: str = "auto",
        precision: str = "auto",
        memory_budget: int | None = None,
        reproducible: bool | None = None,
    ) -> Engine:
        """Loads a model.

        Args:
            source: a shipped name ("demo") or a model folder.
            backend, device, precision: what to run on; "auto" chooses, and `info()["reason"]` says why.
            memory_budget: bytes for the weights and for what one request needs beside them; None is no limit.
            reproducible: same seed, same bytes, however the work is batched: networks are called with one fixed shape.
                None: on for the CPU.

        Raises:
            BundleError: the model cannot be read.
            UnsupportedDevice: what was asked for cannot run here.
            BudgetExceeded: the weights alone do not fit.
        """
        if memory_budget is not None and (isinstance(memory_budget, bool) or memory_budget <= 0):
            raise InvalidRequest(f"memory_budget={memory_budget!r} should be a positive number of bytes, or None")
        choice = choose(backend, device, precision)
        engine = cls(load_checkpoint(find_model(source)), choice, memory_budget, reproducible)
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
        return self.stream(prompt, **fields).collect()

    def stream(self, prompt: str | GenerationRequest, **fields: Any) -> Stream:
        """Makes a clip, yields frames as they become final. Raises as `generate`; for a wrong request, at once."""
        return self._stream(_request(prompt, fields), should_stop=None)

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
            frames: frames [H, W, 3] or pieces [n, H, W, 3], uint8 or float in 0..1; read as they are needed. Any size:
                it is padded to what the network divides and cropped again.
            fps: for the result; the model's own if None.
            num_frames: if it is known. A window of frames is held back where it is not, because the place of the last
                window depends on the end.
            seed: of the clip.
            loop: the last frame runs into the first; needs num_frames.
            num_inference_steps, window_frames, window_overlap: None takes the model's.
            callback_on_step_end, output_type: as in GenerationRequest.

        Raises:
            InvalidRequest: wrong values, frames that are no pictures or change their size, or none at all.
        """
        if self.config.ssr is None:
            raise InvalidRequest(f"model {self.config.name!r} has no super-resolution stage")
        # The request's own checks, for the fields both have.
        fields = dict(
            num_frames=num_frames, fps=fps, seed=seed, num_inference_steps=num_inference_steps,
            window_frames=window_frames, window_overlap=window_overlap, callback_on_step_end=callback_on_step_end,
            output_type=output_type,
        )  # fmt: skip
        request = _request("upscale", fields)
        if loop and num_frames is None:
            raise InvalidRequest("loop=True needs num_frames: the length of the input is not known")
        if self.config.ssr.network.text_dim:
            raise InvalidRequest(f"model {self.config.name!r}: its super-resolution stage needs a prompt")
        metadata = {
            "model": self.config.name, "seed": request.seed, "num_frames": num_frames,
            "fps": float(request.fps or self.config.fps), "height": None, "width": None, **self._choice_facts(),
            "seconds": {},
        }  # fmt: skip

        def plan(height: int, width: int):
            return plan_ssr(
                self.config, height, width, num_frames=num_frames, window=window_frames, overlap=window_overlap,
                loop=loop, num_inference_steps=num_inference_steps,
            )  # fmt: skip

        plan(self.config.ssr.network.height, self.config.ssr.network.width)  # refuses before the first frame is read
        return Stream(self._upscaled(frames, request, metadata, plan), metadata)

    def submit(self, prompt: str | GenerationRequest, **fields: Any) -> Job:
        """Queues a request for the engine's own thread; requests run one after the other, in order."""
        request = _request(prompt, fields)
        self._stream(request, None)  # a wrong request is refused here, not in the thread
        job = Job(request)
        self._jobs.put(self._run, job)
        return job

    def info(self) -> dict[str, Any]:
        """What is loaded and what was chosen, as JSON values."""
        base, ssr = self.config.base, self.config.ssr
        return {
            "model": self.config.name,
            "folder": str(self._folder),
            **self._choice_facts(),
            "reason": self._choice.reason,
            "reproducible": self.reproducible,
            "num_threads": self._backend.num_threads,
            "text_encoder": self.config.text_encoder,
            "parameters": self._parameters,
            "weight_bytes": self._backend.weight_bytes,
            "memory_budget": self.memory_budget,
            "defaults": {
                "num_frames": base.network.num_frames,
                "fps": self.config.fps,
                "height": (ssr or base).network.height,
                "width": (ssr or base).network.width,
                "base": base.sampling.to_dict(),
                "ssr": ssr and ssr.sampling.to_dict(),
                "window_frames": self.config.window_frames,
                "window_overlap": self.config.window_overlap,
            },
            "versions": {
                "pylumiere": pylumiere.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
        }

    def close(self) -> None:
        """Cancels what was submitted and ends the engine's thread."""
        self._jobs.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _choice_facts(self) -> dict[str, str]:
        choice = self._choice
        return {"backend": choice.backend, "device": str(choice.device), "precision": choice.precision}

    def _check_budget(self, *stages: StagePlan | None) -> None:
        """Weights, and the largest stage: they run one after the other."""
        if self.memory_budget is None:
            return
        weights = self._backend.weight_bytes
        needs = {stage.name: self._pipeline.stage_bytes(stage) for stage in stages if stage is not None}
        required = weights + max(needs.values(), default=0)
        if required > self.memory_budget:
            parts = ", ".join(f"{name} {count}" for name, count in {"weights": weights, **needs}.items())
            raise BudgetExceeded(
                f"memory_budget={self.memory_budget} bytes: {required} are needed ({parts}); "
                "give more, or ask for a smaller size, fewer frames, or smaller windows"
            )

    def _stream(self, request: GenerationRequest, should_stop: Callable[[], bool] | None) -> Stream:
        plan = plan_request(request, self.config)
        self._check_budget(plan.base, plan.ssr)
        metadata = {
            "model": self.config.name, "prompt": request.prompt, "negative_prompt": request.negative_prompt,
            "seed": plan.seed, "num_frames": plan.num_frames, "fps": plan.fps, "height": plan.height,
            "width": plan.width,             "sampler": plan.sampler, "num_inference_steps": plan.num_inference_steps,
            "guidance_scale": plan.guidance_scale, **self._choice_facts(), "seconds": {},
        }  # fmt: skip
        hooks = Hooks(request.callback_on_step_end, should_stop)
        return Stream(self._chunks(plan, metadata, hooks), metadata)

    def _chunks(self, plan: Plan, metadata: dict[str, Any], hooks: Hooks) -> Iterator[Chunk]:
        clock = _Clock(metadata)
        text = self._pipeline.embed(plan)
        clock.lap("text")
        low = self._pipeline.base(plan, text, hooks)
        clock.lap("base")
        final = [(0, low)] if plan.ssr is None else self._pipeline.ssr(plan.ssr, low, plan.seed, hooks, text)
        yield from _delivered(final, plan.request.output_type, clock, "ssr")

    def _upscaled(self, frames: Iterable[np.ndarray], request: GenerationRequest, metadata, plan) -> Iterator[Chunk]:
        clock = _Clock(metadata)
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
        factor = self.config.ssr.network.spatial_factor
        step = factor // np.gcd(factor, self.scale)  # of the low-resolution sides
        bottom, right = -first.shape[0] % step, -first.shape[1] % step

        def padded() -> Iterator[np.ndarray]:
            yield np.pad(first, ((0, bottom), (0, right), (0, 0)), mode="edge")
            for frame in low:
                yield np.pad(frame, ((0, bottom), (0, right), (0, 0)), mode="edge")

        stage = plan(height + int(bottom) * self.scale, width + int(right) * self.scale)
        self._check_budget(stage)
        final = self._pipeline.ssr(stage, padded(), request.seed, Hooks(request.callback_on_step_end))
        cropped = ((start, np.ascontiguousarray(pixels[:, :height, :width])) for start, pixels in final)
        count = 0
        for chunk in _delivered(cropped, request.output_type, clock, "ssr"):
            count += len(chunk.frames)
            yield chunk
        metadata["num_frames"] = count

    def _run(self, job: Job) -> Video:
        """A job's work, in the engine's thread."""

        def follow(progress: Progress) -> None:
            job.progress = progress
            if job.request.callback_on_step_end is not None:
                job.request.callback_on_step_end(progress)

        request = _request(job.request, {"callback_on_step_end": follow})
        return self._stream(request, should_stop=job.is_cancelled).collect()


class Job:
    """A submitted request. Also awaitable; cancelling the task that awaits it cancels the job.

    Attributes:
        request: what was asked for.
        progress: the latest Progress; None before the first network call has ended.
    """

    def __init__(self, request: GenerationRequest):
        self.request = request
        self.progress: Progress | None = None
        self._future: concurrent.futures.Future[Video] = concurrent.futures.Future()
        self._cancelled = threading.Event()
        self._lock = threading.Lock()

    def cancel(self) -> bool:
        """Stops the work within one network call. False if the job had ended before."""
        self._cancelled.set()
        with self._lock:
            if self._future.done():
                return False
            if not self._future.running():
                self._future.set_exception(Cancelled("the job was cancelled before it started"))
            return True

    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    @property
    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Video:
        """Waits for the clip.

        Raises:
            TimeoutError: not done after `timeout` seconds; the job goes on.
            Cancelled: it was cancelled.
        """
        try:
            return self._future.result(timeout)
        except concurrent.futures.TimeoutError:
            if self._future.done():  # an error of the work itself
                raise
            raise TimeoutError(f"the job is not done after {timeout} s") from None

    def __await__(self):
        return self._wait().__await__()

    async def _wait(self) -> Video:
        try:
            # Shielded: a cancelled task must not cancel the future under the thread that will fill it.
            return await asyncio.shield(asyncio.wrap_future(self._future))
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _start(self) -> bool:
        """False if it was cancelled while it waited."""
        with self._lock:
            return not self._future.done() and self._future.set_running_or_notify_cancel()

    def _finish(self, result: Video | None, error: BaseException | None) -> None:
        with self._lock:
            if error is not None:
                self._future.set_exception(error)
            else:
                self._future.set_result(result)


class _JobThread:
    """One thread that runs jobs in order. It starts with the first job and does not keep the engine alive."""

    def __init__(self):
        self._lock = threading.RLock()  # the engine's finalizer may run inside
        self._changed = threading.Condition(self._lock)
        self._waiting: list[tuple[Callable[[Job], Video], Job]] = []
        self._running: Job | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def put(self, run: Callable[[Job], Video], job: Job) -> None:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            self._waiting.append((run, job))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="pylumiere-jobs", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            jobs = [job for _, job in self._waiting]
            if self._running is not None:
                jobs.append(self._running)
            self._changed.notify()
        for job in jobs:
            job.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """A function of its own: while the thread waits, none of its variables holds the engine."""
        with self._lock:
            self._running = None
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if not self._waiting:
                return False
            run, job = self._waiting.pop(0)
            self._running = job
        if job._start():
            try:
                result, error = run(job), None
            except BaseException as raised:  # to the one who waits for the job
                result, error = None, raised
            job._finish(result, error)
        return True


class _Clock:
    """Seconds of each part of the work, into the metadata."""

    def __init__(self, metadata: dict[str, Any]):
        self.metadata = metadata
        self.begun = self.last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.metadata["seconds"][name] = round(now - self.last, 3)
        self.metadata["seconds"]["total"] = round(now - self.begun, 3)
        self.last = now

    def first_frame(self) -> None:
        self.metadata.setdefault("first_frame_seconds", round(time.monotonic() - self.begun, 3))


def _delivered(
    final: Iterable[tuple[int, np.ndarray]], output_type: OutputType, clock: _Clock, stage: str
) -> Iterator[Chunk]:
    for start, frames in final:
        if output_type == "uint8":
            pixels = to_uint8(frames)
        else:
            pixels = ((frames + np.float32(1)) * np.float32(0.5)).clip(0, 1)
        clock.first_frame()
        yield Chunk(start, pixels)
    clock.lap(stage)


def _checked_frames(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Single frames, float32 in -1..1, of one size."""
    size, index = None, 0
    for piece in frames:
        piece = np.asarray(piece)
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


def _make_backend(checkpoint: Checkpoint, choice: Choice) -> TorchBackend:
    if choice.backend == "triton":
        from pylumiere.backends.triton import TritonBackend

        return TritonBackend(checkpoint, choice)
    return TorchBackend(checkpoint, choice)
