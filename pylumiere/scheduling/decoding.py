"""The decoder's calls: a stage without steps, whose tasks are groups of a clip's final frames.

To the scheduler a `DecodeBucket` is what a `Bucket` is: it holds the clips of one call shape, hands out calls, and the
lanes compute their parts. A call is one group of one clip. On a CPU every frame is a part of its own, so that a frame's
bytes do not depend on the group that it stood in.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from pylumiere.config import DecodingConfig
from pylumiere.diffusion.stages import StageRun
from pylumiere.diffusion.windows import NonFiniteOutput, WindowPlan
from pylumiere.errors import InvalidRequest
from pylumiere.scheduling.batching import Call, CallShape

if TYPE_CHECKING:
    from pylumiere.backends.graphs import DeviceCalls
    from pylumiere.backends.torch import TorchBackend


@dataclass(frozen=True)
class Group:
    """Consecutive frames of one clip that are decoded together. Has what `Call` asks of a sampler's batch.

    Attributes:
        clips: the clip, once.
        num_tasks: 1.
        x: the rows of the call: frames `start` to `start + count`, and repetitions of the last.
    """

    clips: np.ndarray
    start: int
    count: int
    x: range
    num_tasks: int = 1


@dataclass
class _Clip:
    plan: WindowPlan
    given_out: int = 0  # frames in groups that were handed out
    decoded: int = 0
    taken: int = 0
    is_paused: bool = False
    waiting: list[np.ndarray] = field(default_factory=list)  # decoded, not taken


class GroupSampler:
    """Which group is next, and what is decoded: the part of a sampler that the scheduler knows."""

    capacity = 1

    def __init__(self):
        self._clips: dict[int, _Clip] = {}
        self._next_handle = 0

    def add(self, plan: WindowPlan) -> int:
        self._next_handle += 1
        self._clips[self._next_handle] = _Clip(plan)
        return self._next_handle

    def remove(self, handle: int) -> None:
        del self._clips[handle]

    def next_frames(self, handle: int) -> range | None:
        """The frames of a clip's next group; None when all are handed out."""
        clip = self._clips[handle]
        end = min(clip.given_out + clip.plan.window, clip.plan.num_frames)
        return range(clip.given_out, end) if end > clip.given_out else None

    def hand_out(self) -> tuple[int, range] | None:
        """The next group; clips take turns."""
        for handle, clip in list(self._clips.items()):
            frames = None if clip.is_paused else self.next_frames(handle)
            if frames is not None:
                clip.given_out = frames.stop
                self._clips[handle] = self._clips.pop(handle)  # to the end of the row
                return handle, frames
        return None

    def put(self, handle: int, frames: np.ndarray) -> None:
        clip = self._clips[handle]
        clip.decoded += len(frames)
        clip.waiting.append(frames)

    def plan(self, handle: int) -> WindowPlan:
        return self._clips[handle].plan

    def set_paused(self, handle: int, paused: bool) -> None:
        self._clips[handle].is_paused = paused

    def frames_final(self, handle: int) -> int:
        return self._clips[handle].decoded

    def is_finished(self, handle: int) -> bool:
        clip = self._clips[handle]
        return clip.decoded == clip.plan.num_frames

    def take_final(self, handle: int) -> tuple[int, np.ndarray] | None:
        """New decoded frames in order: (start, float32 [n, H, W, C]), or None."""
        clip = self._clips[handle]
        if not clip.waiting:
            return None
        frames, clip.waiting = np.concatenate(clip.waiting), []
        start, clip.taken = clip.taken, clip.taken + len(frames)
        return start, frames


class DecodeBucket:
    """The clips whose latents are decoded in calls of one shape. For one thread; see `batching.Bucket`.

    Args:
        shape: of a call: frames of a group, height and width of the decoded frames.
        fixed_batch: every call has that many frames; missing ones repeat the last.
        device_calls: streams and graphs of a GPU.
    """

    groups = 1

    def __init__(self, backend: TorchBackend, network: DecodingConfig, shape: CallShape, *, fixed_batch: bool,
                 device_calls: DeviceCalls | None = None):  # fmt: skip
        self.shape, self.backend = shape, backend
        self.sampler = GroupSampler()
        self.runs: dict[int, StageRun] = {}
        self.call: Call | None = None
        self.service = 0.0
        self.is_spare = False
        self._fixed_batch, self._device_calls = fixed_batch, device_calls
        self._graph: torch.cuda.CUDAGraph | None = None
        latent = (shape.height // network.scale, shape.width // network.scale, network.latent_channels)
        with contextlib.nullcontext() if device_calls is None else device_calls.making():
            self._latents = torch.zeros(shape.frames, *latent, device=backend.device)
        with contextlib.nullcontext() if device_calls is None else device_calls.computing():
            self._frames = torch.zeros(
                shape.frames, shape.height, shape.width, network.out_channels, device=backend.device
            )
        # On a GPU what the host writes and reads; on a CPU the operands themselves.
        self._source = self._latents if device_calls is None else device_calls.pinned(self._latents)
        self._result = self._frames if device_calls is None else device_calls.pinned(self._frames)

    def add(self, run: StageRun) -> int:
        handle = self.sampler.add(run.stage.windows)
        self.runs[handle] = run
        return handle

    def remove(self, handle: int) -> None:
        self.sampler.remove(handle)
        del self.runs[handle]

    def extend(self, handle: int) -> int:
        """How many frames must arrive before the clip can go on; 0: it can."""
        feed, frames = self.runs[handle].feed, self.sampler.next_frames(handle)
        return frames.stop if feed is not None and frames is not None and not feed.has(frames.stop) else 0

    def begin(self) -> Call | None:
        found = self.sampler.hand_out()
        if found is None:
            return None
        handle, frames = found
        rows = self.shape.frames if self._fixed_batch else len(frames)
        group = Group(np.array([handle]), frames.start, len(frames), range(frames.start, frames.start + rows))
        self.call = Call(self, group)
        return self.call

    def frames_missing(self) -> int:
        return 0  # `extend` has seen to it

    def fill(self) -> None:
        """Raises InvalidRequest for an input that ended too early."""
        group = self.call.batch
        run = self.runs.get(int(group.clips[0]))
        if run is None:
            return  # removed meanwhile; what is computed is ignored
        last = group.start + group.count - 1
        available, _ = run.source.require(last + 1)
        if available <= last:
            raise InvalidRequest(f"the input ended after {available} of {run.length} frames")
        rows = len(group.x)
        self._source[:rows] = torch.from_numpy(run.source.gather(np.minimum(np.array(group.x), last)))
        run.source.release(last + 1)
        if self._device_calls is not None:
            self._device_calls.copy_in([(self._latents[:rows], self._source[:rows])])

    def compute(self, rows: slice, num_threads: int | None) -> None:
        """Decodes some rows of the current call; on a GPU all of them. From any thread, several at once."""
        if self._device_calls is None:
            self._decode(rows, num_threads)
            return
        compute = self._graph.replay if self._graph is not None else lambda: self._decode(rows)
        self._device_calls.run(compute, self._frames[rows], self._result[rows])

    def _decode(self, rows: slice, num_threads: int | None = None) -> None:
        self._frames[rows].copy_(self.backend.decode(self._latents[rows][None], num_threads=num_threads)[0])

    def complete(self) -> list[tuple[int, BaseException]]:
        """Takes the current call's result. A clip whose frames are not finite, or failed, is removed and returned."""
        call, self.call = self.call, None
        group = call.batch
        handle = int(group.clips[0])
        if handle not in self.runs:
            return []
        error = next(iter(call.errors.values()), None)
        frames = self._result[: group.count].numpy()
        if error is None and not np.isfinite(frames).all():
            where = f"frames {group.start} to {group.start + group.count - 1}"
            window = group.start // self.sampler.plan(handle).window
            error = NonFiniteOutput(f"the decoder gave NaN or infinity in {where}", handle, 0, 0, window)
        if error is not None:
            self.remove(handle)
            return [(handle, error)]
        self.sampler.put(handle, frames.copy())
        return []

    def warm_up(self, num_threads: int | None, part_rows: int | None) -> None:
        if self._device_calls is None:
            self.backend.decode(self._latents[: part_rows or self.shape.frames][None], num_threads=num_threads)
        else:
            self._device_calls.enqueue(lambda: self._decode(slice(0, self.shape.frames)))

    def graph_sizes(self) -> list[int]:
        """Frames of the calls that are captured as CUDA graphs: whole groups, where every call is one."""
        if self._device_calls is None or not self._fixed_batch or not getattr(self.backend, "can_capture", False):
            return []
        return [self.shape.frames]

    def capture(self, frames: int) -> None:
        if self._graph is None:
            self._graph = self._device_calls.capture(lambda: self._decode(slice(0, frames)))
