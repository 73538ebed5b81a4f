"""Base, then super-resolution: the only place that knows all the parts.

A request becomes a plan (`plan_request`: every value concrete, checked against the model), and a plan becomes frames:

    prompts -> text embeddings, once
    base:  the whole clip in one window, a longer one in overlapping windows; guidance batches [with the prompt, without
           it]; J | C | M on 7 channels, C and M from the request's application (`tasks.py`)
    SSR:   overlapping windows; each frame of the base's clip, noised and upscaled once, stands beside the noisy frame

Frames inside are float32 in -1..1. A stage of a request is a `StageRun`: the engine's scheduler samples those of many
requests together (`batching.py`, `scheduling.py`).
"""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pylumiere.checkpoints.adapters import StyleChoice
from pylumiere.config import ModelConfig, StageConfig, STUNetConfig
from pylumiere.diffusion.samplers import SamplerTable, make_table
from pylumiere.diffusion.schedules import make_schedule
from pylumiere.diffusion.tasks import Task, make_task
from pylumiere.diffusion.windows import FrameBuffer, WindowPlan, frame_noise
from pylumiere.errors import InvalidRequest
from pylumiere.media.fitting import Frame, fit
from pylumiere.networks.text import TextEncoder
from pylumiere.request import GenerationRequest

if TYPE_CHECKING:
    from pylumiere.backends.torch import TorchBackend

# Stage numbers in the key of the noise; 2 is the noise on the SSR's low-resolution input.
BASE, SSR, AUGMENTATION = 0, 1, 2
MAX_ENLARGEMENT = 4  # of a clip's sides over what the networks were made for


@dataclass(frozen=True)
class StagePlan:
    """One network's part of a request."""

    name: str  # "base" or "ssr"
    number: int  # in the noise's key
    table: SamplerTable
    windows: WindowPlan
    height: int
    width: int
    guidance_scale: float
    guidance_rescale: float
    threshold: float  # quantile of the per-frame dynamic threshold; 0 is a static clip to -1..1
    style: StyleChoice | None = None  # other weights than the network's own

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1.0


@dataclass(frozen=True)
class Plan:
    """A request with every value concrete.

    Attributes:
        sampler, num_inference_steps, guidance_scale: of the base stage.
        height, width: of the result.
        task: what the user's pictures, clips and masks are to the networks.
    """

    request: GenerationRequest
    num_frames: int
    fps: float
    height: int
    width: int
    seed: int
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    base: StagePlan
    ssr: StagePlan | None
    task: Task

    def styled(self, style: StyleChoice) -> Plan:
        """The same plan with a style's weights in the base."""
        return replace(self, base=replace(self.base, style=style))

    def handed_on(self, low: np.ndarray) -> np.ndarray:
        """The base's whole clip [T, h, w, 3] as the super-resolution gets it."""
        return from_calmest(low) if self.request.loop and self.task.is_free else low


def ssr_scale(config: ModelConfig) -> int:
    """How much larger the result is than the base's clip; 1 for a model without SSR."""
    return 1 if config.ssr is None else config.ssr.network.height // config.base.network.height


def size_step(config: ModelConfig) -> int:
    """Height and width of a result are multiples of this."""
    step = config.base.network.spatial_factor * ssr_scale(config)
    return step if config.ssr is None else math.lcm(step, config.ssr.network.spatial_factor)


def plan_request(request: GenerationRequest, config: ModelConfig) -> Plan:
    """Fills in the model's defaults and checks the request against the model.

    Raises:
        InvalidRequest: a value that this model does not take; the value and what is allowed are named.
    """
    network = config.base.network
    num_frames = _num_frames(request, network.num_frames)
    made_for = network if config.ssr is None else config.ssr.network
    height = _side("height", request.height, made_for.height, size_step(config))
    width = _side("width", request.width, made_for.width, size_step(config))
    seed = secrets.randbits(63) if request.seed is None else request.seed
    defaults = config.base.sampling
    sampler = request.sampler or defaults.sampler
    steps = request.num_inference_steps or defaults.num_inference_steps
    guidance = defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
    scale = ssr_scale(config)
    base_size = (height // scale, width // scale)
    base = StagePlan(
        "base", BASE, _table(config.base, sampler, steps, request.strength),
        _base_windows(num_frames, network, request.loop), *base_size, float(guidance), defaults.guidance_rescale,
        defaults.threshold_percentile,
    )  # fmt: skip
    ssr = None
    if config.ssr is not None:
        ssr = plan_ssr(
            config, height, width, num_frames=num_frames, window=request.window_frames,
            overlap=request.window_overlap, loop=request.loop,
        )  # fmt: skip
    return Plan(
        request, num_frames, float(request.fps or config.fps), height, width, seed, sampler, steps, float(guidance),
        base, ssr, make_task(request, fit(request, Frame(height, width, scale, num_frames))),
    )  # fmt: skip


def plan_ssr(
    config: ModelConfig,
    height: int,
    width: int,
    *,
    num_frames: int | None,
    window: int | None = None,
    overlap: int | None = None,
    loop: bool = False,
    num_inference_steps: int | None = None,
) -> StagePlan:
    """The SSR's part; `num_frames` None is an input of unknown length.

    Raises:
        InvalidRequest: an overlap that is not smaller than the window.
    """
    sampling = config.ssr.sampling
    window = config.window_frames if window is None else window
    if overlap is None:
        overlap = min(config.window_overlap, window - 1)
    if overlap >= window:
        raise InvalidRequest(f"window_overlap={overlap} should be smaller than window_frames={window}")
    steps = num_inference_steps or sampling.num_inference_steps
    windows = WindowPlan(
        num_frames, window, overlap, weights=config.window_weights, loop=loop, halo=config.halo_frames,
        multiple=config.ssr.network.temporal_factor,
    )  # fmt: skip
    return StagePlan(
        "ssr", SSR, _table(config.ssr, sampling.sampler, steps), windows, height, width, sampling.guidance_scale,
        sampling.guidance_rescale, sampling.threshold_percentile,
    )  # fmt: skip


def from_calmest(frames: np.ndarray) -> np.ndarray:
    """A loop [T, h, w, C], turned so that the step from its last frame to its first is its smallest.

    A loop begins nowhere; players pause where it ends, and that shows least where the picture changes least.
    """
    steps = np.abs(frames - np.roll(frames, 1, 0)).mean((1, 2, 3), dtype=np.float64)
    return np.roll(frames, -int(steps.argmin()), 0)


def _base_windows(num_frames: int, network: STUNetConfig, loop: bool) -> WindowPlan:
    """One window where the clip fits into it. Else, and in a loop, windows that share half of their frames; towards its
    ends a window counts less, so that the picture passes from one to the next without a step."""
    window = min(num_frames, network.num_frames)
    if num_frames == window and not loop:
        return WindowPlan(num_frames, window, 0, multiple=network.temporal_factor)
    return WindowPlan(num_frames, window, window // 2, weights="linear", loop=loop, multiple=network.temporal_factor)


def _num_frames(request: GenerationRequest, most: int) -> int:
    """The request's, or the clip's own, or the network's."""
    default = most if request.video is None else len(request.video)
    num_frames = default if request.num_frames is None else request.num_frames
    for name in ("video", "mask"):
        given = getattr(request, name)
        if given is not None and given.ndim == (4 if name == "video" else 3) and len(given) != num_frames:
            raise InvalidRequest(f"num_frames={num_frames}: {name} has {len(given)} frames; give equal numbers")
    return num_frames


def _side(name: str, value: int | None, made_for: int, step: int) -> int:
    value = made_for if value is None else value
    most = MAX_ENLARGEMENT * made_for
    if value % step or value > most:
        raise InvalidRequest(f"{name}={value}: this model makes multiples of {step} up to {most}")
    return value


def _table(stage: StageConfig, sampler: str, steps: int, strength: float = 1.0) -> SamplerTable:
    settings = stage.schedule
    schedule = make_schedule(settings.name, settings.num_train_timesteps, settings.logsnr_shift)
    return make_table(sampler, schedule, settings.prediction_type, steps, strength=strength)


# ---- stages ---------------------------------------------------------------------------------------------------------


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
    """One clip's way through one stage: what a network call needs of it beside the noisy frames.

    Attributes:
        stage, seed: as planned.
        text: rows [G, L, D] and mask [G, L]; None for a network without text.
        given: (window, frames [L]) -> [L, h, w, C], the channels that stand beside the noisy ones.
        initial: the clip to start from, see `windows.sample_clip`.
        noise_level: for a network that takes one.
        holds: given pixels are held at every step, see `tasks.hold`.
        source: conditioning frames that are made as they are needed; None where all are there.
        feed: what `source` reads, where that arrives from outside.
        length: frames of the clip; None while that is not known.
    """

    stage: StagePlan
    seed: int
    text: tuple[Tensor, Tensor] | None
    given: Callable[[int, np.ndarray], Tensor]
    initial: np.ndarray | None = None
    noise_level: float = 0.0
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

    def network(self, stage: str) -> STUNetConfig:
        return (self.config.base if stage == "base" else self.config.ssr).network

    def embed(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Text rows [G, L, D] and mask [G, L]: the prompt, and for guidance what to lead away from."""
        prompts = [plan.request.prompt]
        if plan.base.is_guided:
            prompts.append(plan.request.negative_prompt)
        return self.encoder.encode(prompts)

    def base(self, plan: Plan, text: tuple[Tensor, Tensor]) -> StageRun:
        """The base stage of a request."""
        task = plan.task
        return StageRun(
            plan.base, plan.seed, text, lambda window, frames: task.given(frames), task.initial, holds=task.holds
        )

    def ssr(
        self,
        stage: StagePlan,
        low: Iterable[np.ndarray],
        seed: int,
        text: tuple[Tensor, Tensor] | None = None,
    ) -> StageRun:
        """The super-resolution stage.

        Args:
            stage: from `plan_ssr`.
            low: low-resolution frames [h, w, 3] float32, read as they are needed; h, w are the stage's over the scale.
                A Feed says when they are there.
            seed: of the clip.
            text: for an SSR with text; see `embed`.

        Raises:
            InvalidRequest: guidance for a network without text.
        """
        network, level = self.config.ssr.network, self.config.augmentation
        if not network.text_dim:
            text = None
        if stage.is_guided and text is None:
            raise InvalidRequest(f"guidance_scale={stage.guidance_scale}: the ssr network takes no text; use 1")
        source = FrameBuffer(_upscaled(low, stage.windows.num_frames, stage.height, stage.width, seed, level))
        return StageRun(
            stage, seed, text, lambda window, frames: torch.from_numpy(source.gather(frames)), noise_level=level,
            source=source, feed=low if isinstance(low, Feed) else None,
        )  # fmt: skip


def _upscaled(
    low: Iterable[np.ndarray], num_frames: int | None, height: int, width: int, seed: int, level: float
) -> Iterator[np.ndarray]:
    """Noise of a known level on each low-resolution frame, then bilinear upscaling: the SSR's conditioning."""
    index = -1
    for index, frame in enumerate(low):
        if level > 0:
            frame = frame + np.float32(level) * frame_noise(seed, AUGMENTATION, -1, [index], frame.shape)[0]
        pixels = torch.from_numpy(np.ascontiguousarray(frame, np.float32)).permute(2, 0, 1)[None]
        large = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
        yield large[0].permute(1, 2, 0).contiguous().numpy()
    if num_frames is not None and index + 1 < num_frames:
        raise InvalidRequest(f"the input ended after {index + 1} of {num_frames} frames")
