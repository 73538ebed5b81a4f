"""The frame ring on the device: states, x0 and kept rows stay where the network computes.

The C++ wavefront decides: which (window, step) is next, which slot of a clip's ring holds which frame, which frames
step after a call and from which rows. Its decisions are small arrays of numbers; those of one call go up in one copy
from pinned memory. The work itself is on the device: noise of fresh frames, gathering the call's input, the fused step
in place (`pylumiere.kernels.denoise_step`), thresholds and gains, rows that a later step needs. What comes back is a
flag for each window of a call, and final frames when they are taken.

Nothing waits between the network and the step: the step looks at a flag on the device that says whether every output
is finite, and does nothing where one is not. The host learns of it with the flags, and once the faulty clip is removed,
the step of the others is made up for.

Results are those of `windows.BatchSampler`, bit for bit; with guidance rescale to rounding, because sums over a frame
are added in another order. On the device "cpu", with `graphs.HostCalls`, all of it runs on the reference of the step.
Tests have run that, and the kernel in Triton's interpreter; no GPU has run it yet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pylumiere import _runtime
from pylumiere.backends.graphs import HostCalls
from pylumiere.diffusion.guidance import dynamic_threshold, rescale_gain
from pylumiere.diffusion.windows import Batch, ClipSampler, NonFiniteOutput, WindowPlan
from pylumiere.kernels.denoise_step import denoise_step_, initial_coef

if TYPE_CHECKING:
    from pylumiere.backends.graphs import DeviceCalls

_NO_ROW = np.iinfo(np.int32).min  # of the wavefront
_ALIGNMENT = 16  # of every array in the packed buffer: kernels are compiled for aligned pointers


@dataclass
class _Clip:
    """A clip's rings, and the numbers of its steps."""

    timesteps: np.ndarray
    initial: Callable[[int], np.ndarray] | None
    stage: int
    ring: Tensor  # [slots, P]
    x0: Tensor | None  # [slots, P]: multistep samplers only
    kept: Tensor  # [G, rows, P]
    coef: np.ndarray  # [S, 10]
    start: np.ndarray  # [10], of the initial state
    key: np.ndarray  # [5]: seed, stage; step and frame are filled in
    writers: int  # sources of a frame that the step is compiled for
    bound: float  # smallest threshold
    threshold: float
    threshold_max: float
    rescale: float
    taken: int = 0
    final: int = 0  # frames whose last step has been computed

    @property
    def has_statistics(self) -> bool:
        return bool(self.threshold or self.rescale)


@dataclass
class _Frames:
    """Frames of one clip that step together: device arrays, one row a frame."""

    slots: Tensor  # [F] int32
    places: Tensor  # the same in int64, as torch's indexing wants them
    rows: Tensor  # [F, K]
    weights: Tensor
    coef: Tensor  # [F, 10]
    key: Tensor  # [F, 5]


@dataclass
class _Part:
    """What a call does with one clip."""

    clip: int
    fresh: _Frames | None
    clean: slice  # of the uploaded clean frames, for fresh ones of a clip with an initial clip
    steps: _Frames | None
    kept: tuple[Tensor, Tensor] | None  # rows of the call, kept rows


@dataclass
class _Call:
    tasks: np.ndarray  # [N, 3]
    parts: list[_Part]
    reads: list[tuple[int, slice, Tensor]]  # clip, rows of the call's frames, their slots
    judged: Tensor  # bool [rows * L]: positions that some frame is made of
    has_run: bool = False


class DeviceSampler(ClipSampler):
    """As `windows.BatchSampler`, on a device.

    Args:
        device: of the rings.
        calls: streams of the device; None for the CPU.
        out_dtype: of the denoiser's output.
    The others are those of ClipSampler.

    Attributes:
        x: [capacity, L, H, W, C], the input of a call; always this memory.
    """

    def __init__(self, *, frame_shape: tuple[int, ...], call_frames: int, guided: bool = False, capacity: int = 1,
                 fixed_batch: bool = True, device: torch.device | str = "cpu", calls: DeviceCalls | None = None,
                 out_dtype: torch.dtype = torch.float32):  # fmt: skip
        super().__init__(_runtime.Wavefront(), frame_shape, call_frames, guided, capacity, fixed_batch)
        self._device, self._calls, self._out_dtype = torch.device(device), calls or HostCalls(), out_dtype
        self._values = math.prod(self.frame_shape)
        with self._calls.computing():
            self.x = torch.zeros(capacity, call_frames, *self.frame_shape, device=self._device)
            self._flags = torch.zeros(capacity, dtype=torch.bool, device=self._device)
            self._halt = torch.zeros(1, dtype=torch.int32, device=self._device)
            self._none = torch.zeros(1, 1, self._values, dtype=out_dtype, device=self._device)  # an output of no window
        self._flags_host = self._calls.pinned(self._flags)
        self._frames_host = self._calls.pinned(self.x[0])  # final frames on their way out
        self._clean_host: Tensor | None = None  # initial frames on their way in
        self._numbers = _Numbers(self._calls, self._device)
        self._numbers.begin(self._number_bytes(4))
        self._call: _Call | None = None

    def add_clip(self, plan: WindowPlan, table, *, seed: int, stage: int = 1, guidance_scale: float = 1.0,
                 clip: float | None = 1.0, threshold: float | None = None, threshold_max: float = 0.0,
                 guidance_rescale: float = 0.0, initial=None) -> int:  # fmt: skip
        """Adds a clip at any time; arguments as in `windows.sample_clip`. Returns its handle.

        Raises:
            ValueError: the plan's call length is not the sampler's, or an argument is out of range.
        """
        timesteps, steps, initial = self._checked(plan, table, seed, guidance_scale, clip, threshold, initial)
        bound = math.inf if clip is None else float(np.float32(clip))
        coef = np.zeros((len(steps), 10), np.float32)
        coef[:, :6], coef[:, 6:] = steps, (guidance_scale, 1.0, bound, 1.0)
        coef[0, 4] = 0.0  # no step was before the first
        start = initial_coef(1.0 if initial is None else float(table.init_alpha), float(table.init_sigma))
        slots, rows = plan.buffer_sizes(len(steps), self.capacity)
        with self._calls.computing():
            ring = torch.empty(slots, self._values, device=self._device)
            x0 = torch.empty_like(ring) if steps[:, 4].any() else None
            kept = torch.empty(self.num_outputs, rows, self._values, dtype=self._out_dtype, device=self._device)
        if initial is not None and self._clean_host is None:
            self._clean_host = self._calls.pinned(self.x)
        handle = self._core.add_clip(plan, len(steps), self.capacity)
        self._clips[handle] = _Clip(
            timesteps, initial, stage, ring, x0, kept, coef, np.array(start, np.float32),
            np.array([seed - 2**64 if seed >= 2**63 else seed, stage, 0, 0, 0], np.int64),
            max(2, 1 << (plan.max_writers - 1).bit_length()), bound, threshold or 0.0, threshold_max, guidance_rescale,
        )  # fmt: skip
        return handle

    def next_batch(self) -> Batch | None:
        """The next denoiser call, or None when no clip can go on before frames are taken or arrive.

        `x` is filled on the compute stream; nothing waits for it here.
        """
        if self._call is not None:
            raise RuntimeError("the batch before has not been completed")
        tasks, fresh = self._core.next(self.capacity)
        if len(tasks) == 0:
            return None
        frames, slots = self._core.reads()
        clips = {clip: self._clips[clip] for clip in dict.fromkeys(tasks[:, 0].tolist())}
        writers = max(state.writers for state in clips.values())
        steps, rows, weights, kept = self._core.complete(writers)
        rows = np.where(rows >= 0, -2 - rows, np.where(rows == _NO_ROW, -1, -1 - rows)).astype(np.int32)

        numbers = self._numbers
        numbers.begin(self._number_bytes(writers))
        parts, clean = [], []
        for clip, state in clips.items():
            part = _Part(clip, None, slice(0, 0), None, None)
            mine = fresh[fresh[:, 0] == clip]
            if len(mine):
                if state.initial is not None:
                    part.clean = slice(len(clean), len(clean) + len(mine))
                    clean += [state.initial(frame).reshape(self.frame_shape) for frame in mine[:, 1].tolist()]
                no_rows = np.full((len(mine), 2), -1, np.int32)
                part.fresh = numbers.frames(
                    state, mine[:, 2], no_rows, no_rows.astype(np.float32), np.repeat(state.start[None], len(mine), 0),
                    mine[:, 1], -1,
                )  # fmt: skip
            chosen = steps[:, 0] == clip
            mine = steps[chosen]
            if len(mine):
                part.steps = numbers.frames(
                    state, mine[:, 3], rows[chosen, : state.writers], weights[chosen, : state.writers],
                    state.coef[mine[:, 2]], mine[:, 1], mine[:, 2],
                )  # fmt: skip
            mine = kept[kept[:, 0] == clip]
            if len(mine):
                part.kept = numbers.put(mine[:, 1]), numbers.put(mine[:, 2])
            parts.append(part)
        reads, row = [], 0
        for clip, group in itertools.groupby(tasks[:, 0].tolist()):
            count = len(list(group))
            span = slice(row * self.call_frames, (row + count) * self.call_frames)
            reads.append((clip, span, numbers.put(slots[row : row + count].ravel())))
            row += count
        num_rows = self._rows(len(tasks))
        call = self._call = _Call(tasks, parts, reads, numbers.put(self._judged(tasks, num_rows)))
        uploads = [numbers.upload()]
        if clean:
            staged = self._clean_host.view(-1, *self.frame_shape)[: len(clean)]
            np.stack(clean, out=staged.numpy())
            uploads.append((self.x.view(-1, *self.frame_shape)[: len(clean)], staged))
        self._calls.enqueue(lambda: self._load(call, uploads, num_rows))
        return self._batch(self.x[:num_rows], tasks, frames)

    def run(self, network: Callable[[], object], out: Tensor) -> None:
        """Lets `network` fill `out`, makes the step of the current batch from it, and waits for the flags; from any
        thread. `complete` takes what came of it."""
        call = self._call

        def compute() -> None:
            network()
            self._judge(call, out)
            self._step(call, out)

        self._calls.run(compute, self._flags, self._flags_host)
        call.has_run = True

    def complete(self, out: Tensor) -> None:
        """Takes the denoiser's output for the batch: [G, N, L, H, W, C] of `out_dtype`, on the device, contiguous.

        Raises:
            ValueError: the shape is not that.
            NonFiniteOutput: NaN or infinity. The batch stays current: remove the clip, then complete with that output.
        """
        call = self._call
        if call is None:
            raise RuntimeError("there is no batch to complete")
        self._check_output(out, len(call.tasks))
        if any(part.clip in self._clips for part in call.parts):
            if not call.has_run:
                self.run(lambda: None, out)
            bad = self._flags_host[: len(call.tasks)].tolist()
            for (clip, window, step), is_bad in zip(call.tasks.tolist(), bad, strict=True):
                if is_bad and clip in self._clips:
                    raise _not_finite(clip, self._clips[clip].stage, step, window)
            if any(bad):  # of clips that were removed; the others' step was halted
                self._calls.run(lambda: (self._halt.zero_(), self._step(call, out)), self._flags, self._flags_host)
            for part in call.parts:
                if part.clip in self._clips:
                    self._clips[part.clip].final = self._core.final_end(part.clip)
        elif not call.has_run:  # its numbers may still be on their way, and the next call's take their place
            self._calls.run(lambda: None, self._flags, self._flags_host)
        self._call = None

    def take_final(self, clip: int) -> tuple[int, np.ndarray] | None:
        """A clip's new final frames, in order: (start, float32 [n, H, W, C]), or None. Frees their slots.

        Waits for their copy alone, not for a call that is being computed.
        """
        state = self._clips[clip]
        start, count = state.taken, state.final - state.taken
        if count == 0:
            return None
        frames = np.empty((count, *self.frame_shape), np.float32)
        slots = [self._core.slot(clip, frame) for frame in range(start, start + count)]
        ring, host = state.ring.view(-1, *self.frame_shape), self._frames_host
        for first in range(0, count, len(host)):
            some = slots[first : first + len(host)]
            copies, begin = [], 0
            for end in range(1, len(some) + 1):
                if end == len(some) or some[end] != some[end - 1] + 1:
                    copies.append((host[begin:end], ring[some[begin] : some[begin] + end - begin]))
                    begin = end
            self._calls.fetch(copies)
            frames[first : first + len(some)] = host[: len(some)].numpy()
        self._core.release(clip, count)
        state.taken += count
        return start, frames

    def is_finished(self, clip: int) -> bool:
        """All frames are final, taken or not."""
        return self._clips[clip].final == self._core.plan(clip).num_frames

    def frames_final(self, clip: int) -> int:
        return self._clips[clip].final

    def clip_bytes(self, clip: int) -> int:
        """Of the rings."""
        state = self._clips[clip]
        return sum(tensor.nbytes for tensor in (state.ring, state.x0, state.kept) if tensor is not None)

    def warm_up(self) -> None:
        """Samples short clips with every form of the step, so that all kernels are compiled and loaded; waits."""
        length = self.call_frames
        scratch = DeviceSampler(
            frame_shape=self.frame_shape, call_frames=length, guided=self.num_outputs == 2, device=self._device,
            calls=self._calls, out_dtype=self._out_dtype,
        )  # fmt: skip
        with self._calls.computing():
            out = torch.zeros(self.num_outputs, *scratch.x.shape, dtype=self._out_dtype, device=self._device)
        for is_multistep, windows in itertools.product((False, True), (1, 2)):
            overlap = length // 2 if windows == 2 else 0
            plan = WindowPlan(length + (windows - 1) * (length - overlap), length, overlap)
            settings = dict(seed=0, threshold=0.9, guidance_rescale=0.5 if self.num_outputs == 2 else 0.0)
            handle = scratch.add_clip(plan, _WarmUpTable(is_multistep), **settings)
            while not scratch.is_finished(handle):
                scratch.next_batch()
                scratch.complete(out)
                scratch.take_final(handle)
            scratch.remove_clip(handle)

    # ---- on the compute stream -------------------------------------------------------------------------------------

    def _load(self, call: _Call, uploads: list[tuple[Tensor, Tensor]], num_rows: int) -> None:
        """Initial states of fresh frames, and the call's input. Clips that have gone meanwhile are left out."""
        for buffer, source in uploads:  # behind all that reads what these held before
            buffer.copy_(source, non_blocking=True)
        x = self.x.view(-1, self._values)
        for part in call.parts:
            state, fresh = self._clips.get(part.clip), part.fresh
            if state is None or fresh is None:
                continue
            if state.initial is None:
                state.ring.index_fill_(0, fresh.places, -0.0)
            else:
                state.ring.index_copy_(0, fresh.places, x[part.clean])
            denoise_step_(state.ring, None, self._none, None, fresh.slots, fresh.rows, fresh.weights, fresh.coef,
                          fresh.key)  # fmt: skip
        for clip, span, slots in call.reads:
            state = self._clips.get(clip)
            if state is not None:
                torch.index_select(state.ring, 0, slots, out=x[span])
        count = len(call.tasks)
        if num_rows > count:
            self.x[count:num_rows] = self.x[0]

    def _judge(self, call: _Call, out: Tensor) -> None:
        """A flag for each window whose output is not finite, and one for all. Context and padding are not judged."""
        rows = out.view(self.num_outputs, -1, self._values)
        largest = torch.linalg.vector_norm(rows, math.inf, dim=(0, 2))  # NaN where one is
        bad = (~largest.isfinite() & call.judged).view(-1, self.call_frames).any(1)
        self._flags[: len(bad)] = bad
        self._halt[0] = bad.any()

    def _step(self, call: _Call, out: Tensor) -> None:
        """The step of every frame that all have read, then the rows that later steps need."""
        rows = out.view(self.num_outputs, -1, self._values)
        for part in call.parts:
            state = self._clips.get(part.clip)
            if state is None:
                continue
            if part.steps is not None:
                f = part.steps
                if state.has_statistics:
                    self._set_statistics(state, f, rows)
                denoise_step_(state.ring, state.x0, rows, state.kept, f.slots, f.rows, f.weights, f.coef, f.key,
                              self._halt)  # fmt: skip
            if part.kept is not None:
                source, target = part.kept
                new, old = rows.index_select(1, source), state.kept.index_select(1, target)
                state.kept.index_copy_(1, target, torch.where(self._halt != 0, old, new))

    def _set_statistics(self, state: _Clip, frames: _Frames, rows: Tensor) -> None:
        """Gain, bound and scale of each frame, see guidance.py. Some frames at a time: the averages are temporary."""
        for first in range(0, len(frames.slots), self.call_frames):
            some = slice(first, first + self.call_frames)
            coef = frames.coef[some]
            cond, guided = _averages(rows, state.kept, frames.rows[some], frames.weights[some], coef[:, 6:7])
            if state.rescale and self.num_outputs == 2:
                coef[:, 7] = rescale_gain(cond, guided, state.rescale)
            if state.threshold:
                x = state.ring.index_select(0, frames.places[some])
                x0 = coef[:, 0:1] * x + coef[:, 1:2] * (guided * coef[:, 7:8])
                bound, scale = dynamic_threshold(
                    x0, state.threshold, floor=state.bound, ceiling=state.threshold_max or None
                )
                coef[:, 8:9], coef[:, 9:10] = bound, scale

    def _number_bytes(self, writers: int) -> int:
        """At most; no call has more fresh frames, or more frames that step, than positions."""
        arrays = 16  # of a clip
        return self.capacity * (self.call_frames * (224 + 8 * writers) + arrays * _ALIGNMENT)

    def _judged(self, tasks: np.ndarray, num_rows: int) -> np.ndarray:
        """Positions of a call that a window writes, bool [num_rows * L]."""
        judged = np.zeros((num_rows, self.call_frames), bool)
        plans = {clip: self._core.plan(clip) for clip in set(tasks[:, 0].tolist())}
        for row, clip in enumerate(tasks[:, 0].tolist()):
            plan = plans[clip]
            end = plan.halo + plan.window
            if not plan.loop and plan.num_frames is not None:
                end = min(end, plan.halo + plan.num_frames)
            judged[row, plan.halo : end] = True
        return judged.ravel()


class _Numbers:
    """Small arrays of one call, in one buffer that goes to the device in one copy."""

    def __init__(self, calls: DeviceCalls, device: torch.device):
        self._calls, self._device = calls, device
        self._buffer = self._host = None
        self._used = 0

    def begin(self, num_bytes: int) -> None:
        """Room for at most so many bytes; the arrays of the call before are gone."""
        self._used = 0
        if self._buffer is None or self._buffer.numel() < num_bytes:
            with self._calls.computing():
                self._buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
            self._host = self._calls.pinned(self._buffer)

    def put(self, array: np.ndarray) -> Tensor:
        """The array as it will stand on the device."""
        array = np.ascontiguousarray(array)
        begin, end = self._used, self._used + array.nbytes
        self._host[begin:end].numpy()[:] = array.reshape(-1).view(np.uint8)
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        dtype = torch.from_numpy(array).dtype
        return self._buffer[begin:end].view(dtype).view(array.shape)

    def frames(self, clip: _Clip, slots, rows, weights, coef, frames, step) -> _Frames:
        key = np.repeat(clip.key[None], len(slots), 0)
        key[:, 2], key[:, 3] = step, frames
        return _Frames(
            self.put(slots.astype(np.int32)), self.put(slots), self.put(rows), self.put(weights), self.put(coef),
            self.put(key),
        )  # fmt: skip

    def upload(self) -> tuple[Tensor, Tensor]:
        return self._buffer[: self._used], self._host[: self._used]


def _averages(out: Tensor, kept: Tensor, rows: Tensor, weights: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
    """The windows' average of the conditional and of the guided output, [F, P] each, rounded as the step does it."""
    cond = guided = torch.full((len(rows), out.shape[2]), -0.0, device=out.device)
    for k in range(rows.shape[1]):
        row, weight = rows[:, k], weights[:, k, None]
        value = out.index_select(1, row.clamp(min=0))
        if kept.shape[1]:
            value = torch.where(row[:, None] >= 0, value, kept.index_select(1, (-2 - row).clamp(min=0)))
        value = value.float()
        covered = row[:, None] != -1
        cond = torch.where(covered, cond + weight * value[0], cond)
        mixed = value[0] if len(value) == 1 else value[1] + guidance * (value[0] - value[1])
        guided = torch.where(covered, guided + weight * mixed, guided)
    return cond, guided


def _not_finite(clip: int, stage: int, step: int, window: int) -> NonFiniteOutput:
    text = f"the denoiser's output is not finite (NaN or infinity): stage {stage}, step {step}, window {window}"
    return NonFiniteOutput(text, clip, stage, step, window)


class _WarmUpTable:
    init_alpha, init_sigma = 0.0, 1.0

    def __init__(self, is_multistep: bool):
        self.timesteps = np.zeros(2, np.float32)
        self.coef = np.array([[0.5, 0.5, 0.5, 0.5, 0.0, 0.1], [0.5, 0.5, 0.0, 1.0, 0.1 * is_multistep, 0.0]])
