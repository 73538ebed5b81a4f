"""Network calls that several clips share, and the threads that compute them.

A bucket holds all clips whose calls have one shape: stage, frames, size, guidance. Its `BatchSampler` hands out tasks
(window, step) of those clips in turn; a task brings its own timestep, text and conditioning, so tasks of different
requests and steps stand beside each other.

Lanes are threads that compute parts of a call. On a CPU every row is a part of its own, and rows are computed side by
side, each with its share of the threads: every network call has one row, whatever the row was batched with. What more
threads gain is in benchmarks/results/cpu.jsonl ("scaling").

On a GPU a call is one part. States, the step and the network's result stay on the device (`device_sampler.py`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pylumiere.checkpoints.adapters import AdapterChoice
from pylumiere.config import NetworkConfig
from pylumiere.diffusion.plan import DecoderPlan, StagePlan
from pylumiere.diffusion.stages import StageRun
from pylumiere.diffusion.tasks import hold
from pylumiere.diffusion.windows import Batch, BatchSampler, NonFiniteOutput
from pylumiere.errors import InvalidRequest
from pylumiere.scheduling.tracing import Tracer

if TYPE_CHECKING:
    from pylumiere.backends.graphs import DeviceCalls
    from pylumiere.backends.torch import TorchBackend


@dataclass(frozen=True)
class CallShape:
    """What network calls must have in common to be made together."""

    stage: str
    frames: int
    height: int
    width: int
    guided: bool
    owner: int = 0  # of a clip that shares with nobody, because its input may be late; 0: shared; -1: to be lent
    style: AdapterChoice | None = None  # weights


def call_shape(stage: StagePlan | DecoderPlan, owner: int = 0) -> CallShape:
    """The shape of a stage's calls."""
    frames = stage.windows.call_frames
    return CallShape(stage.name, frames, stage.height, stage.width, stage.is_guided, owner, stage.style)


class Bucket:
    """The clips of one call shape, their buffers and the call that is being computed. For one thread.

    Args:
        network, text_tokens: what the calls are made of.
        capacity: windows of a call.
        fixed_batch: every call has exactly that many; missing ones repeat the first.
        device_calls: streams and graphs of a GPU.
    """

    def __init__(self, backend: TorchBackend, network: NetworkConfig, text_tokens: int, shape: CallShape, *,
                 capacity: int, fixed_batch: bool, device_calls: DeviceCalls | None = None):  # fmt: skip
        self.shape, self.backend = shape, backend
        self.groups = 2 if shape.guided else 1
        frame = (shape.height, shape.width, network.out_channels)
        self._noisy = network.out_channels  # channels; the others stand beside them
        rows, device = self.groups * capacity, backend.device
        self._device_calls = device_calls
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by rows
        options = dict(frame_shape=frame, call_frames=shape.frames, guided=shape.guided, capacity=capacity,
                       fixed_batch=fixed_batch)  # fmt: skip
        # What `fill` writes, and where it ends up: on a CPU the operands themselves; on a GPU pinned copies of them,
        # and for the channels beside the noisy ones a buffer of their own.
        self._operands: dict[str, tuple[Tensor, Tensor]] = {}
        if device_calls is None:
            values = shape.frames * math.prod(frame)
            self.sampler = BatchSampler(**options, num_threads=backend.num_threads if values > 2**21 else 1)
        else:
            from pylumiere.diffusion.device_sampler import DeviceSampler  # here, because a CPU may have no Triton

            self.sampler = DeviceSampler(**options, device=device, calls=device_calls)
            self._given = self._operand("given", (capacity, shape.frames, *frame[:2], network.given_channels))
        with contextlib.nullcontext() if device_calls is None else device_calls.computing():
            self._sample = torch.zeros(rows, shape.frames, *frame[:2], network.in_channels, device=device)
            self._out = torch.zeros(rows, shape.frames, *frame, device=device)
        self._times = self._operand("times", (rows,))
        self._text = self._mask = self._level = None
        if network.text_dim:
            self._text = self._operand("text", (rows, text_tokens, network.text_dim))
            if network.masks_text:
                self._mask = self._operand("mask", (rows, text_tokens), torch.bool)
        if network.noise_level:
            self._level = self._operand("level", (rows,))
        self.runs: dict[int, StageRun] = {}
        self.call: Call | None = None
        self.service = 0.0  # seconds of a lane that each clip here has had
        self.is_spare = False  # it goes back to those that are lent when its clip has ended

    def _operand(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        calls = self._device_calls
        with contextlib.nullcontext() if calls is None else calls.making():
            buffer = torch.zeros(shape, dtype=dtype, device=self.backend.device)
        self._operands[name] = (buffer, buffer if calls is None else calls.pinned(buffer))
        return buffer

    def add(self, run: StageRun) -> int:
        """Adds a clip between two batches or while one is computed; returns its handle."""
        stage = run.stage
        handle = self.sampler.add_clip(
            stage.windows, stage.table, seed=run.seed, stage=stage.number, guidance_scale=stage.guidance_scale,
            clip=stage.clip, threshold=stage.threshold or None, guidance_rescale=stage.guidance_rescale,
            initial=run.initial,
        )  # fmt: skip
        self.runs[handle] = run
        return handle

    def remove(self, handle: int) -> None:
        """Drops a clip at any time. What the current call computes for it is ignored."""
        self.sampler.remove_clip(handle)
        del self.runs[handle]

    def extend(self, handle: int) -> int:
        """Tells the sampler how much input there is. Returns how many frames must arrive before the clip can go on.

        Raises:
            InvalidRequest: the input ended without a frame.
        """
        run = self.runs[handle]
        if run.source is None:
            return 0
        while run.length is None and (wanted := self.sampler.frames_wanted(handle)) > 0:
            if run.feed is not None and not run.feed.has(wanted):
                return wanted
            available, ended = run.source.require(wanted)
            if ended and available == 0:
                raise InvalidRequest("the input holds no frames")
            self.sampler.extend(handle, available, ended)
            run.length = available if ended else None
        run.source.release(self.sampler.first_needed(handle))
        return 0

    def begin(self) -> Call | None:
        """The next call, to be filled; None when no clip can go on."""
        batch = self.sampler.next_batch()
        if batch is None:
            return None
        self.call = Call(self, batch)
        return self.call

    def frames_missing(self) -> int:
        """How many frames must have arrived before the current call can be filled; 0: it can."""
        batch = self.call.batch
        for row in range(batch.num_tasks):
            run = self.runs.get(int(batch.clips[row]))
            needed = int(batch.frames[row].max()) + 1
            if run is not None and run.feed is not None and not run.feed.has(needed):
                return needed
        return 0

    def fill(self) -> None:
        """Puts the current call's operands in place.

        Raises:
            InvalidRequest: an input that ended too early.
        """
        batch, rows = self.call.batch, len(self.call.batch.x)
        to = {name: self._rows(source, rows) for name, (_, source) in self._operands.items() if name != "given"}
        if self._device_calls is None:
            sample = self._rows(self._sample, rows)
            sample[..., : self._noisy] = torch.from_numpy(batch.x)
            given = sample[..., self._noisy :]
        else:
            given = self._operands["given"][1][None]  # both groups have the same
        to["times"][:] = torch.from_numpy(batch.timesteps)
        for row in range(rows):
            source = row if row < batch.num_tasks else 0  # the others repeat the first
            run = self.runs.get(int(batch.clips[source]))
            if run is None:
                continue  # removed meanwhile; the row is computed and ignored
            frames = batch.frames[source]
            if run.source is not None:
                available, _ = run.source.require(int(frames.max()) + 1)
                if available <= int(frames.max()):
                    raise InvalidRequest(f"the input ended after {available} of {run.length} frames")
            if run.given is not None:
                given[:, row] = run.given(frames)
            if "text" in to:
                text, mask = run.text
                to["text"][:, row] = text[: self.groups]
                if "mask" in to:
                    to["mask"][:, row] = mask[: self.groups]
            if "level" in to:
                to["level"][:, row] = run.stage.augmentation
        self.call.held = self._held()
        if self._device_calls is not None:
            self._device_calls.copy_in(
                (buffer[:count], source[:count])
                for name, (buffer, source) in self._operands.items()
                for count in [rows if name == "given" else self.groups * rows]
            )

    def compute(self, rows: slice, num_threads: int | None) -> None:
        """Computes some rows of the current call; on a GPU all of them, and the step. From any thread, several at once.
        """
        if self._device_calls is None:
            self._out[rows].copy_(self._predict(rows, num_threads))
            self._hold(rows)
            return
        graph = self._graphs.get(rows.stop)

        def network() -> None:
            if graph is None:
                self._compute_all(rows.stop)
            else:
                graph.replay()
            self._hold(rows)

        self.sampler.run(network, self._rows(self._out, rows.stop // self.groups))

    def _compute_all(self, rows: int) -> None:
        """The call on the device, from states that the sampler has gathered and operands that were copied in."""
        windows = rows // self.groups
        sample = self._rows(self._sample, windows)
        sample[..., : self._noisy] = self.sampler.x[:windows]
        sample[..., self._noisy :] = self._given[:windows]
        self._out[:rows].copy_(self._predict(slice(0, rows)))

    def warm_up(self, num_threads: int | None, part_rows: int | None) -> None:
        """Calls the network once, in the shape of a part, so that what libraries prepare is prepared; from a lane. On a
        GPU makes the sampler's steps as well."""
        if self._device_calls is None:
            self._predict(slice(0, part_rows or len(self._sample)), num_threads)
        else:
            self._device_calls.enqueue(lambda: self._predict(slice(0, len(self._sample))))
            self.sampler.warm_up()

    def graph_sizes(self) -> list[int]:
        """Numbers of windows of the calls that are captured as CUDA graphs: all that there can be. None without a GPU,
        for a style (its network may be let go of), or for a backend that cannot be captured.
        """
        can_capture = self.shape.style is None and getattr(self.backend, "can_capture", False)
        if self._device_calls is None or not can_capture:
            return []
        capacity = self.sampler.capacity
        return [capacity] if self.sampler.fixed_batch else list(range(1, capacity + 1))

    def capture(self, windows: int) -> None:
        """Captures the call of that many windows as a CUDA graph; once."""
        rows = self.groups * windows
        if rows not in self._graphs:
            self._graphs[rows] = self._device_calls.capture(lambda: self._compute_all(rows))

    def _predict(self, rows: slice, num_threads: int | None = None) -> Tensor:
        part = [None if t is None else t[rows] for t in (self._text, self._mask, self._level)]
        style = {} if self.shape.style is None else {"style": self.shape.style}
        return self.backend.predict(
            self.shape.stage, self._sample[rows], self._times[rows], *part, num_threads=num_threads, **style
        )

    def _hold(self, rows: slice) -> None:
        """Given pixels are held in the rows of clips that ask for it."""
        for row in range(rows.start, rows.stop):
            coefficients = self.call.held.get(row % len(self.call.batch.x))
            if coefficients is not None:
                noisy, given = self._sample[row].tensor_split([self._noisy], -1)
                self._out[row] = hold(self._out[row], noisy, given, *coefficients)

    def _held(self) -> dict[int, tuple[float, float]]:
        """The windows of the current call whose given pixels are held, with u and v of their step."""
        batch, held = self.call.batch, {}
        for row, (clip, step) in enumerate(zip(batch.clips.tolist(), batch.steps.tolist(), strict=True)):
            run = self.runs.get(clip)
            if run is not None and run.holds:
                u, v = run.stage.table.coef[step, :2].tolist()
                held[row] = (u, v)
        return held

    def complete(self) -> list[tuple[int, BaseException]]:
        """Takes the current call's result. Clips whose result is not finite, or failed, are removed and returned."""
        call, failed = self.call, []
        for row, error in call.errors.items():
            clip = int(call.batch.clips[row % len(call.batch.x)])
            if clip in self.runs:
                self.remove(clip)
                failed.append((clip, error))
        while True:
            try:
                self.sampler.complete(self._rows(self._out, len(call.batch.x)))
                break
            except NonFiniteOutput as error:
                failed.append((error.clip, self._named(error)))
                self.remove(error.clip)
        self.call = None
        return failed

    def _rows(self, tensor: Tensor, rows: int) -> Tensor:
        """The first rows of a buffer as [groups, rows, ...], contiguous."""
        return tensor[: self.groups * rows].view(self.groups, rows, *tensor.shape[1:])

    def _named(self, error: NonFiniteOutput) -> NonFiniteOutput:
        steps = len(self.runs[error.clip].stage.table.timesteps)
        text = (
            f"the {self.shape.stage} network gave NaN or infinity at step {error.step + 1} of {steps}, "
            f"window {error.window}"
        )
        return NonFiniteOutput(text, error.clip, error.stage, error.step, error.window)


@dataclass
class Call:
    """One network call of a bucket, in parts.

    Attributes:
        is_sent: its parts are with the lanes; until then its input may be missing.
        held: see `Bucket._held`.
        missing: parts that are not computed yet.
        errors: what a row's computation raised, by row.
        seconds: of a lane, summed over the parts.
    """

    bucket: Bucket
    batch: Batch
    is_sent: bool = False
    missing: int = 0
    errors: dict[int, BaseException] = field(default_factory=dict)
    seconds: float = 0.0
    begun: float = 0.0

    @property
    def rows(self) -> int:
        return self.bucket.groups * len(self.batch.x)


def use_threads(count: int | None) -> None:
    """Sets how many threads torch's operators take when this thread calls them, because roundings may depend on it; a
    thread would otherwise begin with what any thread has set last. None leaves it."""
    if count is not None and torch.get_num_threads() != count:
        torch.set_num_threads(count)


class Lanes:
    """Threads that compute parts of calls, and embed prompts. They start with the first call and hold nothing while
    they wait.

    Args:
        count: parts that are computed at once.
        num_threads: of one part; None where the device decides.
        part_rows: rows of one part; None for the whole call.
        done: called with a call and seconds after each of its parts, from a lane.
        tracer: makes a range of every part.
    """

    def __init__(self, count: int, num_threads: int | None, part_rows: int | None,
                 done: Callable[[Call, float], None], tracer: Tracer):  # fmt: skip
        self._tracer = tracer
        self.count, self.num_threads, self.part_rows = count, num_threads, part_rows
        self._done = done
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def put(self, call: Call) -> int:
        """Queues a call's parts; returns how many."""
        if not self._threads:
            self._start()
        step = self.part_rows or call.rows
        parts = [slice(first, min(first + step, call.rows)) for first in range(0, call.rows, step)]
        call.missing, call.is_sent = len(parts), True
        for part in parts:
            self._queue.put(functools.partial(self._compute, call, part))
        return len(parts)

    def run(self, function: Callable[[], None]) -> None:
        """Runs a function that raises nothing in one of the lanes, with a lane's threads."""
        if not self._threads:
            self._start()

        def once() -> None:
            use_threads(self.num_threads)
            function()

        self._queue.put(once)

    def in_each(self, function: Callable[[int | None, int | None], None]) -> None:
        """Runs `function(num_threads, part_rows)` once in every lane, and waits; raises what it raised."""
        if not self._threads:
            self._start()
        barrier, errors, done = threading.Barrier(self.count), [], threading.Semaphore(0)

        def once() -> None:
            try:
                barrier.wait()
                function(self.num_threads, self.part_rows)
            except BaseException as error:
                errors.append(error)
            finally:
                done.release()

        for _ in range(self.count):
            self._queue.put(once)
        for _ in range(self.count):
            done.acquire()
        if errors:
            raise errors[0]

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _start(self) -> None:
        for index in range(self.count):
            thread = threading.Thread(target=self._work, name=f"pylumiere-lane-{index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while self._compute_next():
            pass

    def _compute_next(self) -> bool:
        """A function of its own: while the thread waits, none of its variables holds a call."""
        item = self._queue.get()
        if item is None:
            return False
        item()
        return True

    def _compute(self, call: Call, rows: slice) -> None:
        begun = time.perf_counter()
        try:
            with self._tracer.range(call.bucket.shape.stage):
                call.bucket.compute(rows, self.num_threads)
        except BaseException as error:  # to those whose rows they are
            call.errors.update(dict.fromkeys(range(rows.start, rows.stop), error))
        self._done(call, time.perf_counter() - begun)
