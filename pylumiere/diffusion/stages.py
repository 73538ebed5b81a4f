"""One clip's way through one stage: what its network calls need beside the noisy frames.

A stage of a request is a `StageRun`: the engine's scheduler samples those of many requests together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pylumiere.config import ModelConfig
from pylumiere.diffusion.plan import DecoderPlan, Plan, StagePlan
from pylumiere.diffusion.windows import FrameBuffer, frame_noise
from pylumiere.errors import InvalidRequest
from pylumiere.networks.text import TextEncoder

if TYPE_CHECKING:
    from pylumiere.backends.torch import TorchBackend


class Feed:
    """Frames that another thread brings: an iterator that must only be advanced where `has` said so."""

    def __init__(self):
        self._frames: deque[np.ndarray] = deque()
        self._arrived = 0
        self._ended = False

    def put(self, frame: np.ndarray) -> None:
        self._frames.append(frame)
        self._arrived += 1

    def end(self) -> None:
        self._ended = True

    def has(self, num_frames: int) -> bool:
        """Whether that many frames have arrived in all, or no more will."""
        return self._ended or self._arrived >= num_frames

    @property
    def backlog(self) -> int:
        """Frames that nobody has taken yet."""
        return len(self._frames)

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> np.ndarray:
        if self._frames:
            return self._frames.popleft()
        if self._ended:
            raise StopIteration
        raise RuntimeError("a frame was asked for before it arrived")  # a fault of ours


@dataclass
class StageRun:
    """One clip's way through one stage.

    Attributes:
        stage, seed: as planned.
        text: rows [G, L, D] and mask [G, L]; None for a network without text.
        given: frames [L] -> [L, h, w, C], the channels that stand beside the noisy ones; None where none do.
        initial: the clip to start from, see `windows.sample_clip`.
        holds: given pixels are held at every step, see `tasks.hold`.
        source: frames of the stage before, as they are needed; None where there is none.
        feed: what `source` reads, where that arrives from outside.
        length: frames of the clip; None while that is not known.
    """

    stage: StagePlan | DecoderPlan
    seed: int
    text: tuple[Tensor, Tensor] | None = None
    given: Callable[[np.ndarray], Tensor] | None = None
    initial: np.ndarray | None = None
    holds: bool = False
    source: FrameBuffer | None = None
    feed: Feed | None = None
    length: int | None = field(init=False)

    def __post_init__(self):
        self.length = self.stage.windows.num_frames


@dataclass(frozen=True)
class Pipeline:
    """The parts of a loaded model, and what a stage needs of them. Immutable."""

    config: ModelConfig
    backend: TorchBackend
    encoder: TextEncoder

    def embed(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Text rows [G, L, D] and mask [G, L]: the prompt, and for guidance what to lead away from."""
        prompts = [plan.request.prompt]
        if any(stage.is_guided for stage in plan.stages):
            prompts.append(plan.request.negative_prompt)
        return self.encoder.encode(prompts)

    def encode(self, plan: Plan, num_threads: int | None = None) -> np.ndarray | None:
        """What the first stage starts from beside its own noise, [T, h, w, C]: the request's latents, or the task's
        clip, encoded where the stage makes latents."""
        if plan.request.latents is not None:
            return plan.request.latents
        if plan.task.initial is None or self.config.decoder is None:
            return plan.task.initial
        # Frame by frame: a frame's latents do not depend on how long the clip is.
        frames = (torch.from_numpy(frame)[None, None] for frame in plan.task.initial)
        return np.concatenate([self.backend.encode(frame, num_threads=num_threads)[0].numpy() for frame in frames])

    def start(self, plan: Plan, text: tuple[Tensor, Tensor], initial: np.ndarray | None) -> StageRun:
        """The first stage of a request; `initial` comes from `encode`."""
        stage, task = plan.first, plan.task
        given = task.given if stage.network.takes_given else None
        return StageRun(stage, plan.seed, text, given, initial, holds=task.holds)

    def follow(
        self,
        stage: StagePlan | DecoderPlan,
        frames: Iterable[np.ndarray],
        seed: int,
        text: tuple[Tensor, Tensor] | None = None,
    ) -> StageRun:
        """A later stage, or the decoder.

        Args:
            frames: of the stage before, [h, w, C] float32, read as they are needed; h, w are the stage's over a whole
                number. A Feed says when they are there.
            seed: of the clip.
            text: for a network with text; see `embed`.

        Raises:
            InvalidRequest: guidance for a network without text.
        """
        feed = frames if isinstance(frames, Feed) else None
        if isinstance(stage, DecoderPlan):
            return StageRun(stage, seed, source=FrameBuffer(frames), feed=feed)
        if not stage.network.text_dim:
            text = None
        if stage.is_guided and text is None:
            raise InvalidRequest(
                f"guidance_scale={stage.guidance_scale}: the {stage.name} network takes no text; use 1"
            )
        source = FrameBuffer(_upscaled(frames, stage, seed))
        return StageRun(
            stage, seed, text, lambda indices: torch.from_numpy(source.gather(indices)), source=source, feed=feed
        )


def _upscaled(frames: Iterable[np.ndarray], stage: StagePlan, seed: int) -> Iterator[np.ndarray]:
    """Noise of a known level on each frame of the stage before, then bilinear upscaling: a stage's conditioning."""
    num_frames, level = stage.windows.num_frames, np.float32(stage.augmentation)
    index = -1
    for index, frame in enumerate(frames):
        if level > 0:
            frame = frame + level * frame_noise(seed, stage.number + 1, -1, [index], frame.shape)[0]
        values = torch.from_numpy(np.ascontiguousarray(frame, np.float32)).permute(2, 0, 1)[None]
        large = F.interpolate(values, (stage.height, stage.width), mode="bilinear", align_corners=False)
        yield large[0].permute(1, 2, 0).contiguous().numpy()
    if num_frames is not None and index + 1 < num_frames:
        raise InvalidRequest(f"the input ended after {index + 1} of {num_frames} frames")
