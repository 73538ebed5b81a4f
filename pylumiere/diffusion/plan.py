"""A request becomes a plan: every value concrete, checked against the model.

    prompts -> text embeddings, once
    first stage:   the whole clip in one window, a longer one in overlapping windows; guidance batches [with the prompt,
                   without it]; beside the noisy channels, where the network takes them, what the request's application
                   gives (`tasks.py`)
    later stages:  overlapping windows; each frame of the stage before, noised and upscaled once, stands beside the
                   noisy frame
    decoder:       groups of final frames, without steps

Frames inside are float32, pixels in -1..1. What a stage's network calls need is in `stages.py`.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from pylumiere.checkpoints.adapters import AdapterChoice
from pylumiere.config import DECODER, DecoderConfig, DecodingConfig, ModelConfig, NetworkConfig, StageConfig
from pylumiere.diffusion.samplers import SamplerTable, table_for
from pylumiere.diffusion.tasks import FREE, GIVEN, Task, make_task
from pylumiere.diffusion.windows import WindowPlan
from pylumiere.errors import InvalidRequest
from pylumiere.media.fitting import Frame, fit
from pylumiere.networks.autoencoders.tiling import tile_starts
from pylumiere.request import GenerationRequest

MAX_ENLARGEMENT = 4  # of a clip's sides over what the networks were made for


@dataclass(frozen=True)
class StagePlan:
    """One network's part of a request.

    Attributes:
        name: of the stage.
        number: in the key of the noise; the noise put on the frames of the stage before has the next one.
        height, width: of the stage's frames.
        clip: bound of |x0| at every step; None: it has none.
        threshold: quantile of the per-frame dynamic threshold; 0: x0 is clipped at `clip`.
        style: other weights than the network's own.
    """

    name: str
    number: int
    network: NetworkConfig
    table: SamplerTable
    windows: WindowPlan
    height: int
    width: int
    guidance_scale: float
    guidance_rescale: float
    clip: float | None
    threshold: float
    augmentation: float = 0.0
    style: AdapterChoice | None = None

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1.0

    @property
    def num_steps(self) -> int:
        return len(self.table)

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """Of the frames that leave the stage."""
        return self.height, self.width, self.network.out_channels

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of a frame that the network is given."""
        return self.height, self.width, self.network.in_channels

    @property
    def call_sizes(self) -> tuple[int, int, int, int]:
        """Rows, frames, height and width of a network call for this request alone."""
        return 2 if self.is_guided else 1, self.windows.call_frames, self.height, self.width

    @property
    def num_calls(self) -> int:
        """Of the network, for a clip of known length."""
        return self.windows.num_windows * self.num_steps


@dataclass(frozen=True)
class DecoderPlan:
    """The decoder's part of a request: a stage without steps, which takes its frames in groups.

    Attributes:
        config: the decoder's network, and what it decodes in tiles.
        windows: the groups, without overlap.
        height, width: of the frames that it makes.
    """

    config: DecoderConfig
    windows: WindowPlan
    height: int
    width: int
    name: ClassVar[str] = DECODER
    num_steps: ClassVar[int] = 1  # each group is done once
    is_guided: ClassVar[bool] = False
    style: ClassVar[None] = None

    @property
    def network(self) -> DecodingConfig:
        return self.config.network

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """Of the frames that leave the stage."""
        return self.height, self.width, self.network.out_channels

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Height and width of the latents of one call."""
        height, width, _ = self.input_shape
        return min(height, self.config.tile), min(width, self.config.tile)

    @property
    def call_sizes(self) -> tuple[int, int, int, int]:
        """Rows, frames, height and width of the latents of a network call."""
        return 1, self.windows.window, *self.tile_shape

    @property
    def num_calls(self) -> int:
        """Of the network: tiles of all groups."""
        tile, overlap = self.config.tile, self.config.tile_overlap
        return self.windows.num_windows * math.prod(len(tile_starts(n, tile, overlap)) for n in self.input_shape[:2])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of a frame of latents."""
        scale = self.network.scale
        return self.height // scale, self.width // scale, self.network.latent_channels


@dataclass(frozen=True)
class Plan:
    """A request with every value concrete.

    Attributes:
        sampler, num_inference_steps, guidance_scale: of the first stage.
        height, width: of the result.
        stages: in the order in which they run; a decoder is the last.
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
    stages: tuple[StagePlan | DecoderPlan, ...]
    task: Task

    @property
    def first(self) -> StagePlan:
        return self.stages[0]

    def grouped(self, frames: int) -> Plan:
        """The same plan with at most so many frames in a call of the decoder."""
        last = self.stages[-1]
        if not isinstance(last, DecoderPlan) or last.windows.window <= frames:
            return self
        last = replace(last, windows=WindowPlan(self.num_frames, frames, 0))
        return replace(self, stages=(*self.stages[:-1], last))

    def styled(self, style: AdapterChoice) -> Plan:
        """The same plan with a style's weights in the first stage."""
        return replace(self, stages=(replace(self.first, style=style), *self.stages[1:]))

    def handed_on(self, low: np.ndarray) -> np.ndarray:
        """The first stage's whole clip [T, h, w, C] as the next one gets it."""
        return from_calmest(low) if self.request.loop and self.task.is_free else low

    def delivered(self, start: int, frames: np.ndarray) -> np.ndarray:
        """The last stage's final frames from `start` on, [n, H, W, C], as the user gets them: with the user's own
        pixels in their places; latents as the decoder would get them."""
        if self.request.output_type == "latent":
            return self.handed_on(frames) if len(self.stages) == 1 else frames  # those of a loop come all at once
        kept = self.task.kept
        return frames if kept is None else kept.compose(start, frames)


def size_step(config: ModelConfig, first: int = 0) -> int:
    """Height and width of a result are multiples of this, where the stages from `first` on run."""
    stages = zip(config.stages[first:], config.scales[first:], strict=True)
    return math.lcm(*(stage.network.spatial_factor * scale for stage, scale in stages))


def plan_request(request: GenerationRequest, config: ModelConfig) -> Plan:
    """Fills in the model's defaults and checks the request against the model.

    Raises:
        InvalidRequest: a value that this model does not take; the value and what is allowed are named.
    """
    first, as_latents = config.first, request.output_type == "latent"
    if as_latents and config.decoder is None:
        raise InvalidRequest(f"output_type='latent': model {config.name!r} has no decoder, its stages make pixels")
    num_frames = num_frames_of(request, config)
    height = _side("height", request.height, config.size[0], size_step(config))
    width = _side("width", request.width, config.size[1], size_step(config))
    seed = secrets.randbits(63) if request.seed is None else request.seed
    defaults = first.sampling
    sampler = request.sampler or defaults.sampler
    steps = request.num_inference_steps or defaults.num_inference_steps
    guidance = float(defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale)
    scale = config.scales[0]
    own = (request.window_frames, request.window_overlap) if len(config.stages) == 1 else (None, None)
    task = make_task(request, fit(request, Frame(height, width, scale // config.decoder_scale, num_frames)))
    _check_task(task, config)
    windows = _windows(first, num_frames, request.loop, *own)
    table = table_for(first.schedule, sampler, steps, strength=request.strength)
    if request.latents is not None:
        # The starting noise itself, and no other: it stands where a clip to start from would.
        table = replace(table, init_alpha=table.init_sigma, init_sigma=0.0)
    start = _stage(first, 0, height // scale, width // scale, windows, table, guidance)
    _check_latents(request, start, num_frames)
    later = plan_upscaling(
        config, height, width, num_frames=num_frames, window=request.window_frames, overlap=request.window_overlap,
        loop=request.loop,
    )  # fmt: skip
    return Plan(
        request, num_frames, float(request.fps or config.fps), height, width, seed, sampler, steps, guidance,
        (start, *later, *(() if as_latents else _decoder(config, num_frames, height, width))),
        task,
    )  # fmt: skip


def plan_upscaling(
    config: ModelConfig,
    height: int,
    width: int,
    *,
    num_frames: int | None,
    window: int | None = None,
    overlap: int | None = None,
    loop: bool = False,
    num_inference_steps: int | None = None,
) -> tuple[StagePlan, ...]:
    """The stages after the first, for a result of this size; `num_frames` None is an input of unknown length.

    Raises:
        InvalidRequest: an overlap that is not smaller than the window.
    """
    plans = []
    for index, stage in enumerate(config.stages[1:], 1):
        sampling, scale = stage.sampling, config.scales[index]
        steps = num_inference_steps or sampling.num_inference_steps
        windows = _windows(stage, num_frames, loop, window, overlap, is_later=True)
        table = table_for(stage.schedule, sampling.sampler, steps)
        guidance = sampling.guidance_scale
        plans.append(_stage(stage, index, height // scale, width // scale, windows, table, guidance))
    return tuple(plans)


def _stage(stage: StageConfig, index: int, height: int, width: int, windows: WindowPlan, table: SamplerTable,
           guidance: float) -> StagePlan:  # fmt: skip
    sampling = stage.sampling
    return StagePlan(
        stage.name, max(0, 2 * index - 1), stage.network, table, windows, height, width, guidance,
        sampling.guidance_rescale, stage.schedule.clip, sampling.threshold_percentile, stage.augmentation,
    )  # fmt: skip


def applications(config: ModelConfig) -> tuple[str, ...]:
    """The applications that a model takes, by `Task.name`."""
    return (*FREE, *GIVEN) if config.first.network.takes_given else FREE


def _check_task(task: Task, config: ModelConfig) -> None:
    """Whether the first network can be given what the application gives."""
    if task.holds and not config.first.network.takes_given:
        raise InvalidRequest(
            f"{task.name}: the networks of model {config.name!r} take no pictures; it makes clips from a text, and "
            "from a video with a strength below 1"
        )


def _check_latents(request: GenerationRequest, stage: StagePlan, num_frames: int) -> None:
    expected = (num_frames, *stage.frame_shape)
    if request.latents is not None and request.latents.shape != expected:
        raise InvalidRequest(
            f"latents have shape {list(request.latents.shape)}; stage {stage.name} of this model makes {list(expected)}"
        )


def _decoder(config: ModelConfig, num_frames: int, height: int, width: int) -> tuple[DecoderPlan, ...]:
    if config.decoder is None:
        return ()
    group = min(num_frames, config.decoder.group_frames)
    return (DecoderPlan(config.decoder, WindowPlan(num_frames, group, 0), height, width),)


def from_calmest(frames: np.ndarray) -> np.ndarray:
    """A loop [T, h, w, C], turned so that the step from its last frame to its first is its smallest.

    A loop begins nowhere; players pause where it ends, and that shows least where the picture changes least.
    """
    steps = np.abs(frames - np.roll(frames, 1, 0)).mean((1, 2, 3), dtype=np.float64)
    return np.roll(frames, -int(steps.argmin()), 0)


def _windows(
    stage: StageConfig, num_frames: int | None, loop: bool, window: int | None = None, overlap: int | None = None,
    *, is_later: bool = False,
) -> WindowPlan:  # fmt: skip
    """How a clip is cut for a stage.

    By default a clip that fits into the network is one window. Else, and in a loop, windows share half of their frames;
    towards its ends a window counts less, so that the picture passes from one to the next without a step. The window of
    a later stage, which may begin before the clip's length is known, does not become shorter with the clip.
    """
    network, made = stage.network, stage.windows
    if made is None and window is None and overlap is None:
        window = network.num_frames if is_later else min(num_frames, network.num_frames)
        if num_frames == window and not loop:
            return WindowPlan(num_frames, window, 0, multiple=network.temporal_factor)
    window = window or (network.num_frames if made is None else made.frames)
    if overlap is None:
        overlap = window // 2 if made is None else min(made.overlap, window - 1)
    if overlap >= window:
        raise InvalidRequest(f"window_overlap={overlap} should be smaller than window_frames={window}")
    weights, halo = ("linear", 0) if made is None else (made.weights, made.halo)
    return WindowPlan(
        num_frames, window, overlap, weights=weights, loop=loop, halo=halo, multiple=network.temporal_factor
    )


def num_frames_of(request: GenerationRequest, config: ModelConfig) -> int:
    """The request's, or those of the clip or the latents, or the network's.

    Raises:
        InvalidRequest: numbers that do not agree.
    """
    most = config.first.network.num_frames
    default = next((len(given) for given in (request.video, request.latents) if given is not None), most)
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
