"""Temporal windows, walked as a wavefront: final frames come out early and memory does not grow with the clip.

A network that sees `window` frames at a time is run over a long clip in overlapping windows whose outputs are averaged
at every sampler step (MultiDiffusion along time, Lumiere sec. 3.2). Instead of a step over the whole clip after the
other, tasks (window, step) are run as soon as the frames they read are ready, oldest frames first. The result is bit
for bit that of the step-by-step walk, as long as the denoiser's result for a row does not depend on the rows beside it.

The averaged quantity is the model's output. Per frame and step, all in fp32 with each product and sum rounded
(`pylumiere.kernels.denoise_step` is the definition):

    avg = sum over the windows that cover the frame of weight * (uncond + guidance * (cond - uncond))
    x0  = clamp(u x + v (gain avg)) ;  x' = p x + q x0 + r x0_prev + n noise(seed, stage, step, frame)

This module is the Python face of the C++ core in `runtime/`. Here states live on the CPU; `device_sampler.py` keeps
them on the device of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylumiere import _runtime
from pylumiere._runtime import FrameQueue, WindowPlan
from pylumiere.diffusion.noise import frame_noise
from pylumiere.diffusion.sources import FrameBuffer, FrameSource, in_background

__all__ = [
    "Batch", "BatchSampler", "ClipSampler", "FrameBuffer", "FrameQueue", "FrameSource", "NonFiniteOutput", "StepInfo",
    "WindowPlan", "frame_noise", "in_background", "memory_bytes", "sample_clip",
]  # fmt: skip


class NonFiniteOutput(RuntimeError):
    """The denoiser returned NaN or infinity. Nothing of that batch entered any clip.

    Attributes:
        clip: handle in the BatchSampler (0 under `sample_clip`).
        stage, step, window: where.
    """

    def __init__(self, message: str, clip: int, stage: int, step: int, window: int):
        super().__init__(message)
        self.clip, self.stage, self.step, self.window = clip, stage, step, window


@dataclass(frozen=True)
class StepInfo:
    """Where a clip stands after a denoiser call.

    Attributes:
        tasks_done, num_tasks: (window, step) tasks; num_tasks is None while the clip's length is unknown.
        steps: sampler steps; a clip's num_tasks is windows * steps.
        frames_final, num_frames: frames that will not change any more, of how many (None: unknown).
    """

    tasks_done: int
    num_tasks: int | None
    steps: int
    frames_final: int
    num_frames: int | None


def memory_bytes(
    plan: WindowPlan, *, frame_shape: tuple[int, ...], steps: int, capacity: int = 1, num_outputs: int = 1,
    multistep: bool = False, output_bytes: int = 4,
) -> int:  # fmt: skip
    """Bytes of one clip's buffers: frame states, x0 of multistep samplers, and outputs that wait for a neighbour.

        slots = call_frames + stride * (reach * (steps - 1) + max(1, reach) * capacity)
        reach = (call_frames - 1) // stride
        bytes = values of a frame * (4 * slots * (2 if multistep else 1) + output_bytes * num_outputs * rows)

    A loop has up to halo + stride * (reach * steps + 1) more slots; a clip with fewer frames than that has one slot a
    frame. `rows` is, per stride, the number of frames that two windows write (all windows' frames when there is context
    from a halo). See `plan.buffer_sizes`. The denoiser's own input and output are not counted.
    """
    slots, rows = plan.buffer_sizes(steps, capacity)
    return math.prod(frame_shape) * (4 * slots * (1 + multistep) + output_bytes * num_outputs * rows)


@dataclass(frozen=True)
class Batch:
    """One denoiser call.

    Attributes:
        x: float32 [N, L, H, W, C], states of the frames at `frames`: an array, on a device a tensor. Reused by the
            next batch.
        timesteps: float32 [N].
        clips, windows, steps: int64 [N].
        frames: int64 [N, L], frame indices in each row's clip, held to its ends or wrapped in a loop.
        num_tasks: rows that count; the others repeat row 0 so that every call has one shape.
    """

    x: Any
    timesteps: np.ndarray
    clips: np.ndarray
    windows: np.ndarray
    steps: np.ndarray
    frames: np.ndarray
    num_tasks: int


class _Clip:
    def __init__(self, timesteps: np.ndarray, initial):
        self.timesteps = timesteps
        self.initial = initial
        self.taken = 0


class ClipSampler:
    """What samplers share: clips that share denoiser calls, by handle. Not for several threads at once.

    All clips have one frame size and one call length; they may differ in windows, steps, sampler, seed and guidance
    scale. Clips are served in turn, each clip's oldest frames first.

    Args:
        core: decides what is next; one of the C++ classes.
        frame_shape: (H, W, C).
        call_frames: frames of a denoiser call, `plan.call_frames`.
        guided: the denoiser returns two outputs (conditional, unconditional).
        capacity: rows of a call.
        fixed_batch: every call has `capacity` rows. Needed for results that do not depend on the company.
    """

    def __init__(self, core, frame_shape: tuple[int, ...], call_frames: int, guided: bool, capacity: int,
                 fixed_batch: bool):  # fmt: skip
        if capacity < 1:
            raise ValueError(f"capacity={capacity} is less than 1")
        self._core = core
        self.frame_shape = tuple(int(n) for n in frame_shape)
        self.call_frames, self.capacity, self.fixed_batch = call_frames, capacity, fixed_batch
        self.num_outputs = 2 if guided else 1
        self._clips: dict[int, Any] = {}

    def _checked(self, plan: WindowPlan, table, seed: int, guidance_scale: float, clip: float | None,
                 threshold: float | None, initial):  # fmt: skip
        """Timesteps [S], coefficients [S, 6] and a function of the initial frames, or ValueError."""
        if plan.call_frames != self.call_frames:
            raise ValueError(f"the plan's calls have {plan.call_frames} frames, the sampler's have {self.call_frames}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} is outside [0, 2^64)")
        if self.num_outputs == 1 and guidance_scale != 1.0:
            raise ValueError(f"guidance_scale={guidance_scale} needs a sampler made with guided=True")
        if threshold and not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} is not in 0..1")
        if threshold and not (clip is not None and 0 < clip < 1e30):
            raise ValueError("dynamic thresholding needs a finite clip above 0")
        initial = _initial_frames(initial, plan.num_frames, self.frame_shape)
        timesteps = np.asarray(table.timesteps, np.float32)
        coef = np.ascontiguousarray(table.coef, np.float32)
        if coef.ndim != 2 or coef.shape[1] != 6 or timesteps.shape != coef.shape[:1]:
            raise ValueError(f"the table has timesteps {timesteps.shape}, coef {coef.shape}; expected [S] and [S, 6]")
        if len(coef) == 0:
            raise ValueError("the sampler table has no steps")
        return timesteps, coef, initial

    def _rows(self, num_tasks: int) -> int:
        return self.capacity if self.fixed_batch else num_tasks

    def _batch(self, x, tasks: np.ndarray, frames: np.ndarray) -> Batch:
        """tasks [N, 3] and frames [N, L] of the rows that count."""
        num_tasks = len(tasks)
        padding = self._rows(num_tasks) - num_tasks
        if padding:
            tasks = np.concatenate([tasks, np.repeat(tasks[:1], padding, axis=0)])
            frames = np.concatenate([frames, np.repeat(frames[:1], padding, axis=0)])
        clips, windows, steps = (np.ascontiguousarray(tasks[:, column]) for column in range(3))
        timesteps = np.array(
            [self._clips[c].timesteps[s] for c, s in zip(clips.tolist(), steps.tolist(), strict=True)], np.float32
        )
        return Batch(x, timesteps, clips, windows, steps, frames, num_tasks)

    def _check_output(self, out, num_tasks: int) -> None:
        shape = tuple(out.shape)
        expected = (self.num_outputs, self._rows(num_tasks), self.call_frames, *self.frame_shape)
        if shape != expected:
            raise ValueError(f"the denoiser returned shape {shape}, expected {expected}")

    def remove_clip(self, clip: int) -> None:
        """Drops a clip at any time and frees its buffers. What the current batch computes for it is ignored."""
        self._core.remove_clip(clip)
        del self._clips[clip]

    def set_paused(self, clip: int, paused: bool) -> None:
        """A paused clip keeps its buffers and is given no new tasks. Its task in the current batch still completes."""
        self._core.set_paused(clip, paused)

    def extend(self, clip: int, available: int, ended: bool) -> None:
        """A clip of unknown length: `available` frames have arrived; `ended`: there will be no more."""
        self._core.extend(clip, available, ended)

    def is_finished(self, clip: int) -> bool:
        """All frames are final, taken or not."""
        return self._core.is_finished(clip)

    def frames_final(self, clip: int) -> int:
        return self._core.final_end(clip)

    def first_needed(self, clip: int) -> int:
        """No call from now on reads a frame of the clip below this one. For use between batches."""
        return self._core.first_needed(clip)

    def frames_wanted(self, clip: int) -> int:
        """Frames that must have arrived before the clip's next window can start. For use between batches.

        0 while it waits for something else, or while a batch can be filled without it.
        """
        return self._core.frames_wanted(clip, self.capacity)

    def plan(self, clip: int) -> WindowPlan:
        """The clip's plan as it is known now (a clip of unknown length gets its number of frames at the end)."""
        return self._core.plan(clip)


class BatchSampler(ClipSampler):
    """Frame states and the sampler step on the CPU; `pylumiere.diffusion.device_sampler` has both on a device.

    Args:
        num_threads: of the sampler step; all cores of this process if None.
    The others are those of ClipSampler.
    """

    def __init__(self, *, frame_shape: tuple[int, ...], call_frames: int, guided: bool = False, capacity: int = 1,
                 fixed_batch: bool = True, num_threads: int | None = None):  # fmt: skip
        core = _runtime.Sampler(
            math.prod(frame_shape), 2 if guided else 1, num_threads or _runtime.default_num_threads()
        )
        super().__init__(core, frame_shape, call_frames, guided, capacity, fixed_batch)
        self._x = np.empty((capacity, call_frames, *self.frame_shape), np.float32)
        self._num_tasks = 0

    def add_clip(self, plan: WindowPlan, table, *, seed: int, stage: int = 1, guidance_scale: float = 1.0,
                 clip: float | None = 1.0, threshold: float | None = None, threshold_max: float = 0.0,
                 guidance_rescale: float = 0.0, initial=None) -> int:  # fmt: skip
        """Adds a clip between two batches; arguments as in `sample_clip`. Returns its handle.

        Raises:
            ValueError: the plan's call length is not the sampler's, or an argument is out of range.
        """
        timesteps, coef, initial = self._checked(plan, table, seed, guidance_scale, clip, threshold, initial)
        handle = self._core.add_clip(
            plan, coef, seed=seed, stage=stage, init_alpha=float(table.init_alpha), init_sigma=float(table.init_sigma),
            guidance=guidance_scale, clip=math.inf if clip is None else clip, rescale=guidance_rescale,
            threshold=threshold or 0.0, threshold_max=threshold_max, has_initial=initial is not None,
            capacity=self.capacity,
        )  # fmt: skip
        self._clips[handle] = _Clip(timesteps, initial)
        return handle

    def next_batch(self) -> Batch | None:
        """The next denoiser call, or None when no clip can go on before frames are taken or arrive."""
        tasks, fresh = self._core.next(self.capacity)
        num_tasks = self._num_tasks = len(tasks)
        if num_tasks == 0:
            return None
        for index, (clip, frame, _) in enumerate(fresh.tolist()):
            self._core.fill_initial(index, self._clips[clip].initial(frame))
        self._core.gather(self._x, num_tasks * self.call_frames)
        rows = self._rows(num_tasks)
        self._x[num_tasks:rows] = self._x[0]
        plans = {clip: self._core.plan(clip) for clip in set(tasks[:, 0].tolist())}
        frames = np.stack([plans[clip].frames(window) for clip, window, _ in tasks.tolist()])
        return self._batch(self._x[:rows], tasks, frames)

    def complete(self, out) -> None:
        """Takes the denoiser's output for the batch: [G, N, L, H, W, C], fp32, bf16 or fp16, on the CPU, contiguous.

        Raises:
            ValueError: the shape is not that.
            NonFiniteOutput: NaN or infinity. The batch stays current: remove the clip, then complete with that output.
        """
        self._check_output(out, self._num_tasks)
        self._core.complete(out, out.shape[1])
        self._num_tasks = 0

    def take_final(self, clip: int) -> tuple[int, np.ndarray] | None:
        """A clip's new final frames, in order: (start, float32 [n, H, W, C]), or None. Frees their slots."""
        count = self._core.num_final(clip)
        if count == 0:
            return None
        frames = np.empty((count, *self.frame_shape), np.float32)
        self._core.take_final(clip, frames)
        state = self._clips[clip]
        start, state.taken = state.taken, state.taken + count
        return start, frames

    def clip_bytes(self, clip: int) -> int:
        return self._core.clip_bytes(clip)


def _initial_frames(initial, num_frames: int | None, frame_shape: tuple[int, ...]):
    """`initial` as a function of one frame index, or None."""
    if initial is None:
        return None
    if callable(initial):

        def frame_of(frame: int) -> np.ndarray:
            clean = np.ascontiguousarray(initial(np.array([frame], np.int64)), np.float32)
            if clean.shape != (1, *frame_shape):
                raise ValueError(f"the initial frame {frame} has shape {clean.shape[1:]}, expected {frame_shape}")
            return clean

        return frame_of  # fmt: skip
    if num_frames is None:
        raise ValueError("an initial clip of unknown length must be given as a function of frame indices")
    clip = np.asarray(initial, np.float32)
    if clip.shape != (num_frames, *frame_shape):
        raise ValueError(f"the initial clip has shape {clip.shape}, expected {(num_frames, *frame_shape)}")
    return lambda frame: np.ascontiguousarray(clip[frame])


def sample_clip(
    denoise: Callable[..., Any], *, num_frames: int | None, frame_shape: tuple[int, ...], table, plan: WindowPlan,
    seed: int, stage: int, guidance_scale: float = 1.0, clip: float | None = 1.0, threshold: float | None = None,
    threshold_max: float = 0.0, guidance_rescale: float = 0.0, initial=None, source: FrameSource | None = None,
    capacity: int = 1, fixed_batch: bool = True, on_step: Callable[[StepInfo], Any] | None = None,
    should_stop: Callable[[], bool] | None = None, num_threads: int | None = None,
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """Samples one clip; yields final frames in order, as early as the windows allow.

    A generator that works in the caller's thread: it computes when the consumer asks, and closing it frees everything.

    Args:
        denoise: called as denoise(x [N, L, H, W, C] float32, timesteps [N] float32, windows [N] int64, frames [N, L]
            int64); returns [G, N, L, H, W, C], fp32, bf16 or fp16, on the CPU, contiguous. G is 2 (conditional,
            unconditional) unless guidance_scale is 1. L is plan.call_frames. `x` is reused by the next call.
        num_frames: None for an input of unknown length: then `source` says when it ends. A window starts once
            `window + halo` frames more than it reads have arrived, since the place of the last window is not known.
        frame_shape: (H, W, C).
        table: a `pylumiere.diffusion.samplers.SamplerTable`.
        plan: made with the same num_frames.
        seed, stage: of the frame noise.
        clip: x0 is clamped to [-clip, clip]; None for not.
        threshold: quantile in (0, 1] of |x0| for dynamic thresholding per frame: s = quantile, held to
            [clip, threshold_max (0: no limit)]; x0 is clamped to [-s, s] and scaled by clip / s.
        guidance_rescale: phi; the guided average is scaled per frame by phi * std(cond) / std(guided) + 1 - phi.
        initial: clean clip [T, H, W, C], or a function of frame indices [n] -> [n, H, W, C]; the sampler then starts
            from init_alpha * clean + init_sigma * noise.
        source: frames that arrive while sampling (see FrameSource). With a known num_frames, too few are an error.
        capacity: windows of a call. More of them keep more frames in flight.
        fixed_batch: every call has `capacity` rows; missing ones repeat row 0 and are discarded. Without it the last
            rows of a result may depend on the batch in which they were computed, if the denoiser's do.
        on_step: called after every denoiser call. What it raises ends the clip.
        should_stop: asked before every denoiser call.
        num_threads: of the sampler step; all cores of this process if None.

    Yields:
        (start, frames float32 [n, H, W, C]), n >= 1, consecutive.

    Raises:
        ValueError: an argument is out of range, or the denoiser's output has another shape.
        NonFiniteOutput: NaN or infinity in the denoiser's output, named with stage, step and window.
        Cancelled: should_stop said so.
    """
    if num_frames != plan.num_frames:
        raise ValueError(f"num_frames={num_frames}, but the plan was made for {plan.num_frames}")
    if num_frames is None and source is None:
        raise ValueError("num_frames=None needs a source that says when the clip ends")
    sampler = BatchSampler(frame_shape=frame_shape, call_frames=plan.call_frames, guided=guidance_scale != 1.0,
                           capacity=capacity, fixed_batch=fixed_batch, num_threads=num_threads)  # fmt: skip
    handle = sampler.add_clip(
        plan, table, seed=seed, stage=stage, guidance_scale=guidance_scale, clip=clip, threshold=threshold,
        threshold_max=threshold_max, guidance_rescale=guidance_rescale, initial=initial,
    )  # fmt: skip
    # A generator's body runs at the first next(); the arguments above are checked at the call.
    return _run(denoise, sampler, handle, len(table.timesteps), source, on_step, should_stop)


def _run(denoise, sampler: BatchSampler, handle: int, steps: int, source: FrameSource | None, on_step, should_stop):
    tasks_done = 0
    length = sampler.plan(handle).num_frames
    while True:
        if should_stop is not None and should_stop():
            from pylumiere.errors import Cancelled

            raise Cancelled(f"cancelled after {sampler.frames_final(handle)} final frames")
        if source is not None:
            while length is None and (wanted := sampler.frames_wanted(handle)) > 0:
                available, ended = source.require(wanted)
                if ended and available == 0:
                    raise ValueError("the input has no frames")
                sampler.extend(handle, available, ended)
                length = available if ended else None
            source.release(sampler.first_needed(handle))
        batch = sampler.next_batch()
        if batch is None:
            raise RuntimeError("no window can run although the clip is not finished")  # a fault of ours
        if source is not None and length is not None:
            needed = int(batch.frames.max()) + 1
            available, ended = source.require(needed)
            if available < needed:
                raise ValueError(f"the input ended after {available} of {length} frames")
        sampler.complete(denoise(batch.x, batch.timesteps, batch.windows, batch.frames))
        tasks_done += batch.num_tasks
        final = sampler.take_final(handle)
        if on_step is not None:
            plan = sampler.plan(handle)
            num_tasks = None if plan.num_windows is None else plan.num_windows * steps
            on_step(StepInfo(tasks_done, num_tasks, steps, sampler.frames_final(handle), plan.num_frames))
        if final is not None:
            yield final
        if sampler.is_finished(handle):
            return
