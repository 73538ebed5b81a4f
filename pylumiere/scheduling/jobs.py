"""A request on its way: progress, frames as they become final, cancelling, the result.

Whoever works on a job watches it (`Watcher`) and lends it the lock that guards everything here. One thread fills it;
any number of threads and asyncio tasks follow it.

A `callback_on_step_end` and an input that is read as it is needed run in the thread that follows the job, never in the
scheduler's: a slow one, and a slow reader, slow only their own request.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from pylumiere.diffusion.plan import DecoderPlan, Plan, StagePlan
from pylumiere.diffusion.stages import Feed
from pylumiere.errors import Cancelled, DeadlineExceeded
from pylumiere.media.pixels import to_uint8
from pylumiere.media.video import Video
from pylumiere.request import GenerationRequest, Progress

Status = Literal["queued", "running", "completed", "failed", "cancelled"]


@dataclass(frozen=True)
class Chunk:
    """Consecutive final frames: uint8 (or float32 in 0..1, or latents) [n, H, W, C]; the first is frame `start` of the
    clip."""

    start: int
    frames: np.ndarray


@dataclass(frozen=True)
class Order:
    """What a job is to do.

    Attributes:
        plan: of a generated clip; None for a video that is only upscaled.
        stages: in the order in which they run.
        seed: of the clip.
        crop: height and width of the delivered frames.
        feed: frames of a video that is upscaled.
    """

    plan: Plan | None
    stages: tuple[StagePlan | DecoderPlan, ...]
    seed: int
    crop: tuple[int, int]
    feed: Feed | None = None

    @property
    def last(self) -> StagePlan | DecoderPlan:
        """The stage whose frames are delivered."""
        return self.stages[-1]

    def after(self, stage: StagePlan | DecoderPlan) -> StagePlan | DecoderPlan:
        """The stage that follows."""
        return self.stages[self.stages.index(stage) + 1]

    def is_streamed(self, stage: StagePlan | DecoderPlan) -> bool:
        """Whether a stage's frames go to the next one before it has ended. Those of a single window, and of a loop, are
        final together."""
        return stage is not self.last and stage.windows.num_windows != 1 and not stage.windows.loop

    def together(self) -> Iterator[list[StagePlan | DecoderPlan]]:
        """The stages that run at the same time."""
        group = []
        for stage in self.stages:
            group.append(stage)
            if not self.is_streamed(stage):
                yield group
                group = []

    def is_fed(self, stage: StagePlan | DecoderPlan) -> bool:
        """Whether a stage begins before all of its input is there."""
        index = self.stages.index(stage)
        return self.feed is not None if index == 0 else self.is_streamed(self.stages[index - 1])


class Watcher(Protocol):
    """What a job tells of itself, with `lock` held."""

    lock: threading.RLock

    def notify(self) -> None:
        """Something changed: there is room again, a callback has returned, input has arrived."""
        ...

    def ended(self, job: Job) -> None:
        """It has a result or an error."""
        ...


class Job:
    """A submitted request. Also awaitable; cancelling the task that awaits it cancels the job.

    Attributes:
        request: what was asked for.
        progress: the latest Progress; None before the first network call has ended.
        metadata: JSON values about the clip; `seconds` and `first_frame_seconds` fill up as it runs.
    """

    def __init__(self, watcher: Watcher, request: GenerationRequest, order: Order, metadata: dict[str, Any],
                 *, buffer_frames: int | None, timeout: float | None, keep_alive: Any = None):  # fmt: skip
        self.request, self.metadata = request, metadata
        self.progress: Progress | None = None
        self._watcher, self._order = watcher, order
        self._keep_alive = keep_alive  # the engine; let go of at the end
        self._changed = threading.Condition(watcher.lock)
        self._future: concurrent.futures.Future[Video] = concurrent.futures.Future()
        self._status: Status = "queued"
        self._error: BaseException | None = None
        self._submitted = time.monotonic()
        self._deadline = None if timeout is None else self._submitted + timeout
        self._timeout = timeout
        self._is_done = False
        # Frames: the whole clip in one array, or a bounded number of them in chunks.
        self._limit = buffer_frames
        self._pixels: np.ndarray | None = None
        self._chunks: deque[Chunk] = deque()
        self._num_waiting = 0  # frames in _chunks
        self._num_final = 0  # frames delivered
        # What the following thread is asked to do.
        self._callback = request.callback_on_step_end
        self._steps_ended: deque[Progress] = deque()  # that the callback has not returned from
        self._frames_wanted = 0
        self._stage_begun = self._submitted
        self._span = None  # OpenTelemetry

    def __repr__(self) -> str:
        return f"<Job {self._status}, seed {self.metadata['seed']}>"

    # ---- for everyone ------------------------------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        return self._status

    @property
    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self._is_done

    def cancel(self) -> bool:
        """Stops the work; what it held is freed before the next network call begins. False if the job had ended."""
        text = "before it started" if self._status == "queued" else f"after {self._num_final} final frames"
        return self._finish(Cancelled(f"the job was cancelled {text}"))

    def result(self, timeout: float | None = None) -> Video:
        """Waits for the clip. With `buffer_frames`, it is what frames() has not yet given.

        Raises:
            TimeoutError: not done after `timeout` seconds; the job goes on.
            Cancelled: it was cancelled.
            DeadlineExceeded: its own time was up.
        """
        if self._limit is not None:
            chunks = [chunk.frames for chunk in self._follow(timeout)]
            if not chunks:
                raise RuntimeError("the frames of this job have already been taken; submit it without buffer_frames")
            return self._video(np.concatenate(chunks))
        try:
            return self._future.result(timeout)
        except concurrent.futures.TimeoutError:
            if self._future.done():  # an error of the work itself
                raise
            raise TimeoutError(f"the job is not done after {timeout} s") from None

    def frames(self) -> Iterator[Chunk]:
        """Chunks of final frames, in order and without gaps, as they become final.

        Without `buffer_frames` the whole clip is kept: any number of readers, each from the first frame, and none
        slows the work. With it one reader takes the frames, and the work waits while so many are not taken.

        Raises:
            Cancelled, DeadlineExceeded, or what ended the work, after the frames that were final.
        """
        return self._follow(None) if self._limit is not None else self._replay()

    def __await__(self):
        return self._wait().__await__()

    async def _wait(self) -> Video:
        try:
            if self._limit is not None:
                return await asyncio.to_thread(self.result)
            # Shielded: a cancelled task must not cancel the future under the thread that will fill it.
            return await asyncio.shield(asyncio.wrap_future(self._future))
        except asyncio.CancelledError:
            self.cancel()
            raise

    # ---- for the thread that follows the job -------------------------------------------------------------------------

    def _replay(self) -> Iterator[Chunk]:
        position = 0
        while True:
            with self._changed:
                while self._num_final == position and not self._is_done:
                    self._changed.wait()
                start, position = position, self._num_final
                pixels = self._pixels
            if position > start:
                frames = pixels[start:position]
                frames.flags.writeable = False
                yield Chunk(start, frames)
            elif self._error is not None:
                raise self._error
            else:
                return

    def _follow(self, timeout: float | None = None, read: Callable[[], np.ndarray | None] | None = None):
        """Takes chunks, and does meanwhile what has to be done in this thread: callbacks, reading the input."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            chunk = self._next_chunk(until, timeout, read)
            if chunk is None:
                return
            yield chunk

    def _next_chunk(self, until: float | None, timeout: float | None, read) -> Chunk | None:
        while True:
            with self._changed:
                self._watcher.notify()  # there is room again
                while not (self._chunks or self._steps_ended or self._is_done or (read and self._frames_wanted)):
                    left = None if until is None else until - time.monotonic()
                    if left is not None and left <= 0:
                        raise TimeoutError(f"the job is not done after {timeout} s")
                    self._changed.wait(left)
                step_ended = self._steps_ended[0] if self._steps_ended else None
                if step_ended is None:
                    if self._chunks:
                        chunk = self._chunks.popleft()
                        self._num_waiting -= len(chunk.frames)
                        return chunk
                    if self._is_done:
                        if self._error is not None:
                            raise self._error
                        return None
            if step_ended is not None:
                self._call_back(step_ended)
            else:
                self._feed(read)

    def _follow_to_the_end(self) -> None:
        """Runs the callbacks of a job whose clip is kept whole."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._steps_ended or self._is_done)
                step_ended = self._steps_ended[0] if self._steps_ended else None
                if step_ended is None:
                    return
            self._call_back(step_ended)

    def _call_back(self, progress: Progress) -> None:
        try:
            self._callback(progress)
        except BaseException as error:
            self._finish(error)
        finally:
            with self._changed:
                if self._steps_ended:  # an end of the job has cleared it
                    self._steps_ended.popleft()
                self._watcher.notify()

    def _feed(self, read: Callable[[], np.ndarray | None]) -> None:
        """One more frame of the input, outside the lock: it may take its time."""
        try:
            frame = read()
        except BaseException as error:
            self._finish(error)
            return
        with self._changed:
            feed = self._order.feed
            if frame is None:
                feed.end()
            else:
                feed.put(frame)
            if feed.has(self._frames_wanted):
                self._frames_wanted = 0
                self._watcher.notify()

    # ---- for the scheduler; with its lock held -----------------------------------------------------------------------

    def _has_room(self) -> bool:
        return self._limit is None or self._num_waiting < self._limit

    def _deliver(self, frames: np.ndarray) -> None:
        """Final frames: pixels, float32 in -1..1, or latents."""
        height, width = self._order.crop
        frames = frames[:, :height, :width]
        if self.request.output_type == "uint8":
            pixels = to_uint8(frames)
        elif self.request.output_type == "latent":
            pixels = frames
        else:
            pixels = ((frames + np.float32(1)) * np.float32(0.5)).clip(0, 1)
        with self._changed:
            if self._is_done:
                return
            self.metadata.setdefault("first_frame_seconds", round(time.monotonic() - self._submitted, 3))
            if self._limit is None:
                if self._pixels is None:
                    shape = (self._order.last.windows.num_frames, *pixels.shape[1:])
                    self._pixels = np.empty(shape, pixels.dtype)
                self._pixels[self._num_final : self._num_final + len(pixels)] = pixels
            else:
                self._chunks.append(Chunk(self._num_final, pixels))
                self._num_waiting += len(pixels)
            self._num_final += len(pixels)
            self._changed.notify_all()

    def _video(self, frames: np.ndarray) -> Video:
        is_latent = self.request.output_type == "latent"
        return Video(frames, self.metadata["fps"], self.metadata, is_latent)

    def _lap(self, name: str) -> None:
        now = time.monotonic()
        self.metadata["seconds"][name] = round(now - self._stage_begun, 3)
        self.metadata["seconds"]["total"] = round(now - self._submitted, 3)
        self._stage_begun = now

    def _expire(self, now: float) -> None:
        if self._deadline is not None and now >= self._deadline:
            self._finish(DeadlineExceeded(f"the request was not done in its {self._timeout:g} s"))

    def _finish(self, error: BaseException | None = None) -> bool:
        """Ends the job. False if it had ended before. Takes the lock itself."""
        with self._changed:
            if self._is_done:
                return False
            self._is_done, self._error, self._keep_alive = True, error, None
            if error is None:
                self._status = "completed"
            else:
                self._status = "cancelled" if isinstance(error, Cancelled) else "failed"
            self._steps_ended.clear()
            if error is not None:
                self._future.set_exception(error)
            elif self._limit is None:
                self._future.set_result(self._video(self._pixels))
            self._changed.notify_all()
            self._watcher.ended(self)
            return True


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
        return Video(frames, self.fps, self.metadata, self.metadata.get("output_type") == "latent")
