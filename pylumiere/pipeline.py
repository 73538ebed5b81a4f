"""Base, then super-resolution: the only place that knows all the parts.

A request becomes a plan (`plan_request`: every value concrete, checked against the model), and a plan becomes frames:

    prompts -> text embeddings, once
    base:  the whole clip in one window; guidance batches [with the prompt, without it]; J | C | M on 7 channels
    SSR:   overlapping windows; each frame of the base's clip, noised and upscaled once, stands beside the noisy frame

Frames inside are float32 in -1..1. The generators here compute in the caller's thread when the next frames are asked
for, so a slow consumer slows them and a consumer that leaves stops them.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pylumiere.backends.torch import TorchBackend
from pylumiere.config import ModelConfig, StageConfig
from pylumiere.errors import InvalidRequest
from pylumiere.memory import activation_bytes
from pylumiere.request import GenerationRequest, Progress
from pylumiere.samplers import SamplerTable, make_table
from pylumiere.schedules import make_schedule
from pylumiere.text import TextEncoder
from pylumiere.windows import FrameBuffer, NonFiniteOutput, StepInfo, WindowPlan, frame_noise, memory_bytes, sample_clip

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

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1.0


@dataclass(frozen=True)
class Plan:
    """A request with every value concrete.

    Attributes:
        sampler, num_inference_steps, guidance_scale: of the base stage.
        height, width: of the result.
        conditioning: [T, h, w, 4] at the base's size: given pixels (0 where none are), and the mask, 1 where given.
        initial: [T, h, w, 3] that strength < 1 starts from, or None.
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
    conditioning: Tensor
    initial: np.ndarray | None


@dataclass(frozen=True)
class Hooks:
    """How a caller follows and stops a run: called between the network's calls, from the thread that computes."""

    on_progress: Callable[[Progress], None] | None = None
    should_stop: Callable[[], bool] | None = None


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
    num_frames = _num_frames(request, network.num_frames, network.temporal_factor)
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
        WindowPlan(num_frames, window=num_frames, overlap=0, multiple=network.temporal_factor),
        *base_size, float(guidance), defaults.guidance_rescale, defaults.threshold_percentile,
    )  # fmt: skip
    ssr = None
    if config.ssr is not None:
        ssr = plan_ssr(
            config, height, width, num_frames=num_frames, window=request.window_frames, overlap=request.window_overlap
        )
    conditioning, initial = _given(request, num_frames, *base_size)
    return Plan(
        request, num_frames, float(request.fps or config.fps), height, width, seed, sampler, steps, float(guidance),
        base, ssr, conditioning, initial,
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


def _num_frames(request: GenerationRequest, most: int, factor: int) -> int:
    default = most if request.video is None else len(request.video)
    num_frames = default if request.num_frames is None else request.num_frames
    if num_frames % factor or num_frames > most:
        steps = f" in steps of {factor}" if factor > 1 else ""
        raise InvalidRequest(f"num_frames={num_frames}: this model makes {factor}..{most} frames{steps}")
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


# ---- what is given: image, video, mask ------------------------------------------------------------------------------


def _given(request: GenerationRequest, num_frames: int, height: int, width: int) -> tuple[Tensor, np.ndarray | None]:
    """The conditioning (C, M) and the clip to start from. M is 1 where pixels are given; C is 0 where they are not.

    Image: frame 0. Image and mask: a cinemagraph, all of frame 0 and the rest outside the mask. Video and mask: outside
    the mask. Video alone conditions nothing; it is what `strength` starts from.
    """
    given = torch.zeros(num_frames, height, width, 3)
    keep = torch.zeros(num_frames, height, width, 1)
    outside = None
    if request.mask is not None:
        # A pixel of the small frame is kept only where all of its area is: the seam is made anew.
        mask = request.mask.reshape(-1, *request.mask.shape[-2:], 1)
        outside = (_fit(mask, height, width) < 0.001).float()
    if request.image is not None:
        given[:] = _fit(request.image[None], height, width) * 2 - 1
        keep[0] = 1
        if outside is not None:
            keep[1:] = outside.expand(num_frames, -1, -1, -1)[1:]
    elif request.video is not None:
        clip = _fit(request.video, height, width) * 2 - 1
        if outside is None:
            return torch.cat([given, keep], -1), None if request.strength == 1.0 else clip.numpy()
        given, keep = clip, outside.expand(num_frames, -1, -1, -1)
        initial = None if request.strength == 1.0 else clip.numpy()
        return torch.cat([given * keep, keep], -1), initial
    return torch.cat([given * keep, keep], -1), None


def _fit(frames: np.ndarray, height: int, width: int) -> Tensor:
    """[T, H, W, C], uint8 or float in 0..1, as float32 [T, height, width, C]: scaled to cover, middle cropped."""
    scale = max(height / frames.shape[1], width / frames.shape[2])
    covering = [max(height, round(frames.shape[1] * scale)), max(width, round(frames.shape[2] * scale))]
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    fitted = []
    for frame in frames:  # one at a time: the input may be large
        pixels = torch.from_numpy(frame.astype(np.float32)).permute(2, 0, 1)[None]
        if frame.dtype == np.uint8:
            pixels = pixels / 255
        pixels = F.interpolate(pixels, covering, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
        fitted.append(pixels[top : top + height, left : left + width])
    return torch.stack(fitted)


# ---- stages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pipeline:
    """The parts of a loaded model. Immutable; each call's state lives in the generators it returns.

    Attributes:
        capacity: windows of one SSR call.
        fixed_batch: every call has exactly that many rows, so that a row's bits do not depend on its neighbours.
    """

    config: ModelConfig
    backend: TorchBackend
    encoder: TextEncoder
    capacity: int = 1
    fixed_batch: bool = True

    def stage_bytes(self, stage: StagePlan) -> int:
        """Bytes that a stage needs while it runs, beside the weights: activations, frame states, conditioning."""
        network = (self.config.base if stage.name == "base" else self.config.ssr).network
        rows = (2 if stage.is_guided else 1) * (1 if stage.name == "base" else self.capacity)
        frames, steps = stage.windows.call_frames, len(stage.table.timesteps)
        call = 4 * rows * frames * stage.height * stage.width * (network.in_channels + 3 + 3)  # sample, x, prediction
        slots, _ = stage.windows.buffer_sizes(steps, self.capacity)
        given = 4 * (slots + frames) * stage.height * stage.width * 4
        states = memory_bytes(
            stage.windows, frame_shape=(stage.height, stage.width, 3), steps=steps, capacity=self.capacity,
            num_outputs=2 if stage.is_guided else 1, multistep=stage.table.uses_previous,
        )  # fmt: skip
        activations = activation_bytes(
            network, rows, frames, stage.height, stage.width, self.backend.dtype, self.config.text_tokens
        )
        return call + given + states + activations

    def embed(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Text rows [G, L, D] and mask [G, L] on the device: the prompt, and for guidance what to lead away from."""
        prompts = [plan.request.prompt]
        if plan.base.is_guided:
            prompts.append(plan.request.negative_prompt)
        embeddings, mask = self.encoder.encode(prompts)
        return embeddings.to(self.backend.device), mask.to(self.backend.device)

    def base(self, plan: Plan, text: tuple[Tensor, Tensor], hooks: Hooks = Hooks()) -> np.ndarray:
        """The base clip, float32 [T, h, w, 3]."""
        stage = plan.base
        call = _Call(self, stage, 1, text, plan.conditioning[None])
        pieces = _sample(stage, call, plan.seed, 1, True, hooks, initial=plan.initial)
        return np.concatenate([frames for _, frames in pieces])

    def ssr(
        self,
        stage: StagePlan,
        low: Iterable[np.ndarray],
        seed: int,
        hooks: Hooks = Hooks(),
        text: tuple[Tensor, Tensor] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Final frames, in order, as (first index, float32 [n, H, W, 3]).

        Args:
            stage: from `plan_ssr`.
            low: low-resolution frames [h, w, 3] float32, read as they are needed; h, w are the stage's over the scale.
            seed: of the clip.
            text: for an SSR with text; see `embed`.
        """
        level = self.config.augmentation
        num_frames = stage.windows.num_frames
        source = FrameBuffer(_upscaled(low, num_frames, stage.height, stage.width, seed, level))
        if not self.config.ssr.network.text_dim:
            text = None
        call = _Call(self, stage, self.capacity, text, source, level)
        return _sample(stage, call, seed, self.capacity, self.fixed_batch, hooks, source=source)


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


class _Call:
    """One stage's network call, as `sample_clip` wants it: noisy frames in, predictions out.

    Args:
        rows: most windows of a call.
        text: rows [G, L, D] and mask; None for a network without text.
        given: what stands beside the noisy channels: a tensor [1, L, h, w, C], or a FrameBuffer of [H, W, C].
        noise_level: for a network that takes one.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        stage: StagePlan,
        rows: int,
        text: tuple[Tensor, Tensor] | None,
        given: Tensor | FrameBuffer,
        noise_level: float = 0.0,
    ):
        self.stage, self.backend = stage, pipeline.backend
        self.groups = 2 if stage.is_guided else 1
        stage_config = pipeline.config.base if stage.name == "base" else pipeline.config.ssr
        network = stage_config.network
        if self.groups == 2 and text is None:
            raise InvalidRequest(
                f"guidance_scale={stage.guidance_scale}: the {stage.name} network takes no text; use 1"
            )
        self.text = self.text_mask = None
        if network.text_dim:
            # [G, L, D] -> [G * rows, L, D], group by group.
            self.text, self.text_mask = (t[: self.groups].repeat_interleave(rows, 0) for t in text)
        device = self.backend.device
        self.noise_level = (
            torch.full((self.groups * rows,), noise_level, device=device) if network.noise_level else None
        )
        shape = (self.groups, rows, stage.windows.call_frames, stage.height, stage.width, network.in_channels)
        self.sample = torch.zeros(shape, device=device)
        self.source = given if isinstance(given, FrameBuffer) else None
        if self.source is None:
            self.sample[..., 3:] = given.to(device)

    def __call__(self, x: np.ndarray, timesteps: np.ndarray, windows: np.ndarray, frames: np.ndarray) -> Tensor:
        rows = len(x)
        sample = self.sample[:, :rows]
        sample[..., :3] = torch.from_numpy(x).to(sample.device)
        if self.source is not None:
            sample[..., 3:] = torch.from_numpy(self.source.gather(frames)).to(sample.device)
        batch = self.groups * rows
        steps = torch.from_numpy(np.tile(timesteps, self.groups)).to(sample.device)
        out = self.backend.predict(
            self.stage.name, sample.reshape(batch, *sample.shape[2:]), steps, self._rows(self.text, rows),
            self._rows(self.text_mask, rows), self._rows(self.noise_level, rows),
        )  # fmt: skip
        return out.view(self.groups, rows, *out.shape[1:]).cpu()

    def _rows(self, tensor: Tensor | None, rows: int) -> Tensor | None:
        return None if tensor is None else tensor.unflatten(0, (self.groups, -1))[:, :rows].flatten(0, 1)


def _sample(
    stage: StagePlan, call: _Call, seed: int, capacity: int, fixed_batch: bool, hooks: Hooks, **start
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    begun = time.monotonic()
    steps = len(stage.table.timesteps)

    def report(info: StepInfo) -> None:
        if info.num_tasks is None:
            progress = Progress(stage.name, info.tasks_done, None, info.frames_final, None, None)
        else:
            left = (time.monotonic() - begun) / info.tasks_done * (info.num_tasks - info.tasks_done)
            done = info.tasks_done * steps // info.num_tasks
            progress = Progress(stage.name, done, steps, info.frames_final, info.num_frames, left)
        hooks.on_progress(progress)

    try:
        yield from sample_clip(
            call, num_frames=stage.windows.num_frames, frame_shape=(stage.height, stage.width, 3), table=stage.table,
            plan=stage.windows, seed=seed, stage=stage.number, guidance_scale=stage.guidance_scale,
            guidance_rescale=stage.guidance_rescale, clip=1.0, threshold=stage.threshold or None, capacity=capacity,
            fixed_batch=fixed_batch, on_step=report if hooks.on_progress else None,
            should_stop=hooks.should_stop, num_threads=call.backend.num_threads, **start,
        )  # fmt: skip
    except NonFiniteOutput as error:
        text = (
            f"the {stage.name} network gave NaN or infinity at step {error.step + 1} of {steps}, window {error.window}"
        )
        raise NonFiniteOutput(text, error.clip, error.stage, error.step, error.window) from None
