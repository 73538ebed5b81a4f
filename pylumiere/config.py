"""Frozen, validated configurations that round-trip through JSON.

`ModelConfig` is what a checkpoint folder's `config.json` holds: the base network, the super-resolution network, their
noise schedules and the defaults of a request.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass, field

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
SCHEDULES = ("cosine", "linear", "flow")
SAMPLERS = ("ddpm", "ddim", "euler", "dpmpp_2m")
WINDOW_WEIGHTS = ("flat", "linear", "gaussian")


def _check(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


class _Json:
    """to_dict and from_dict for frozen dataclasses with nested dataclasses and tuples of them."""

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict):
        """Build from plain JSON values.

        Raises:
            ValueError: unknown, missing or wrongly typed fields, or values the class refuses; the field is named.
        """
        _check(isinstance(data, dict), f"{cls.__name__}: expected an object, got {type(data).__name__}")
        hints = _type_hints(cls)
        unknown = sorted(set(data) - set(hints))
        _check(not unknown, f"{cls.__name__}: unknown field {', '.join(map(repr, unknown))}")
        try:
            return cls(**{name: _convert(value, hints[name], f"{cls.__name__}.{name}") for name, value in data.items()})
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error


_type_hints = functools.cache(typing.get_type_hints)  # it compiles every annotation


def _convert(value, hint, where: str):
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            _check(type(None) in typing.get_args(hint), f"{where}: null is not allowed")
            return None
        return _convert(value, next(a for a in typing.get_args(hint) if a is not type(None)), where)
    if origin is tuple:
        _check(isinstance(value, (list, tuple)), f"{where}: expected a list, got {type(value).__name__}")
        return tuple(_convert(item, typing.get_args(hint)[0], where) for item in value)
    if isinstance(hint, type) and issubclass(hint, _Json):
        return hint.from_dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    _check(
        isinstance(value, hint) and (hint is bool or not isinstance(value, bool)),
        f"{where}: expected {hint.__name__}, got {value!r}",
    )
    if hint is float:
        _check(math.isfinite(value), f"{where}: {value} is not finite")
    return value


@dataclass(frozen=True)
class LevelConfig(_Json):
    """One resolution of the U-Net. Level 0 is the finest.

    Attributes:
        channels: width of the level.
        num_layers: residual blocks on the way down; as many on the way up, each joined with one skip.
        temporal_conv: a convolution-inflation block after each residual block.
        temporal_attention: stacked temporal attention blocks after each residual block; 0 for none.
        temporal_factor: frames are divided by this after the spatial down-sampling that leaves this level.
        spatial_attention, cross_attention: self-attention within a frame; attention to the text.
        shift: temporal shift before the first convolution of each residual block.
    """

    channels: int
    num_layers: int = 1
    temporal_conv: bool = True
    temporal_attention: int = 0
    temporal_factor: int = 1
    spatial_attention: bool = False
    cross_attention: bool = False
    shift: bool = False

    def __post_init__(self):
        _check(1 <= self.channels <= 16384, f"channels={self.channels} is not in 1..16384")
        _check(1 <= self.num_layers <= 32, f"num_layers={self.num_layers} is not in 1..32")
        _check(0 <= self.temporal_attention <= 32, f"temporal_attention={self.temporal_attention} is not in 0..32")
        _check(1 <= self.temporal_factor <= 8, f"temporal_factor={self.temporal_factor} is not in 1..8")


@dataclass(frozen=True)
class STUNetConfig(_Json):
    """A Space-Time U-Net: levels, conditioning and stem. See `pylumiere.networks.stunet.STUNet`.

    Attributes:
        levels: finest first.
        in_channels: 7 for the base (noisy 3, conditioning 3, mask 1), 6 for the SSR (noisy 3, low resolution 3).
        patch_size: space-to-depth factor of the stem; 1 is a plain 3 x 3 convolution.
        num_groups: groups of each GroupNorm.
        head_dim: width of one attention head.
        text_dim: width of the text embeddings; 0 for a network without text.
        noise_level: the network takes a second, per-element noise level (the SSR's augmentation).
        frame_embedding: frame times enter the conditioning of each block through an MLP with time and text.
        skip_input: first of three input channels that are added to the output (the SSR predicts a residual on
            the upscaled low resolution); -1 for none.
        num_frames, height, width: the size the network is made for.
        shift_div, shift_pad, shift_direction: the temporal shift's fraction 1/shift_div, ends and directions.
    """

    levels: tuple[LevelConfig, ...]
    in_channels: int = 7
    out_channels: int = 3
    patch_size: int = 1
    num_groups: int = 32
    head_dim: int = 64
    text_dim: int = 384
    noise_level: bool = False
    frame_embedding: bool = True
    skip_input: int = -1
    num_frames: int = 80
    height: int = 128
    width: int = 128
    shift_div: int = 8
    shift_pad: str = "zero"
    shift_direction: str = "both"

    def __post_init__(self):
        _check(1 <= len(self.levels) <= 8, f"{len(self.levels)} levels, allowed are 1..8")
        _check(self.in_channels >= 1 and self.out_channels >= 1, "in_channels and out_channels must be at least 1")
        _check(self.patch_size in (1, 2, 4, 8), f"patch_size={self.patch_size} is not one of 1, 2, 4, 8")
        _check(self.text_dim >= 0, f"text_dim={self.text_dim} is negative")
        _check(self.shift_pad in ("zero", "circular", "replicate"), f"shift_pad={self.shift_pad!r} is unknown")
        _check(self.shift_direction in ("both", "causal"), f"shift_direction={self.shift_direction!r} is unknown")
        _check(
            -1 <= self.skip_input <= self.in_channels - self.out_channels,
            f"skip_input={self.skip_input} does not fit in_channels={self.in_channels}",
        )
        for level in self.levels:
            _check(
                level.channels % self.num_groups == 0,
                f"channels={level.channels} is not a multiple of num_groups={self.num_groups}",
            )
            if level.temporal_attention or level.spatial_attention or level.cross_attention:
                _check(
                    level.channels % self.head_dim == 0,
                    f"channels={level.channels} is not a multiple of head_dim={self.head_dim}",
                )
            _check(not level.cross_attention or self.text_dim > 0, "cross_attention needs text_dim > 0")
        _check(self.levels[-1].temporal_factor == 1, "the coarsest level cannot have a temporal_factor")
        for name, size, factor in (
            ("num_frames", self.num_frames, self.temporal_factor),
            ("height", self.height, self.spatial_factor),
            ("width", self.width, self.spatial_factor),
        ):
            _check(size >= 1 and size % factor == 0, f"{name}={size} is not a positive multiple of {factor}")

    @property
    def temporal_factor(self) -> int:
        """The number of frames must be a multiple of this."""
        return math.prod(level.temporal_factor for level in self.levels)

    @property
    def spatial_factor(self) -> int:
        """Height and width must be multiples of this."""
        return self.patch_size * 2 ** (len(self.levels) - 1)


@dataclass(frozen=True)
class ScheduleConfig(_Json):
    """The noise schedule that a network was trained with."""

    name: str = "cosine"
    prediction_type: str = "sample"
    logsnr_shift: float = 0.0
    num_train_timesteps: int = 1000

    def __post_init__(self):
        _check(self.name in SCHEDULES, f"schedule {self.name!r} is not one of {', '.join(SCHEDULES)}")
        _check(
            self.prediction_type in PREDICTION_TYPES,
            f"prediction_type {self.prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}",
        )
        _check(
            1 <= self.num_train_timesteps <= 100_000,
            f"num_train_timesteps={self.num_train_timesteps} is not in 1..100000",
        )
        _check(-30 <= self.logsnr_shift <= 30, f"logsnr_shift={self.logsnr_shift} is not in -30..30")


@dataclass(frozen=True)
class SamplerConfig(_Json):
    """Defaults of one stage: sampler, steps, guidance."""

    sampler: str = "dpmpp_2m"
    num_inference_steps: int = 30
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    threshold_percentile: float = 0.0  # 0: static clip to [-1, 1]; else per-frame dynamic thresholding

    def __post_init__(self):
        _check(
            1 <= self.num_inference_steps <= 1000, f"num_inference_steps={self.num_inference_steps} is not in 1..1000"
        )
        _check(self.sampler in SAMPLERS, f"sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        _check(0 <= self.guidance_scale <= 1000, f"guidance_scale={self.guidance_scale} is not in 0..1000")
        _check(0 <= self.guidance_rescale <= 1, f"guidance_rescale={self.guidance_rescale} is not in 0..1")
        _check(0 <= self.threshold_percentile <= 1, f"threshold_percentile={self.threshold_percentile} is not in 0..1")


@dataclass(frozen=True)
class StageConfig(_Json):
    """A network with its schedule and its defaults."""

    network: STUNetConfig
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampling: SamplerConfig = field(default_factory=SamplerConfig)


@dataclass(frozen=True)
class ModelConfig(_Json):
    """Everything `config.json` of a checkpoint folder says.

    Attributes:
        base: text to a small clip, all frames in one pass.
        ssr: spatial super-resolution over temporal windows; None for a base-only model.
        fps: frames per second of the training clips.
        text_encoder: "minilm", "hash", or "t5:FOLDER" / "clip:FOLDER".
        text_tokens: length that prompts are padded or cut to.
        window_frames, window_overlap: windows of the SSR.
        halo_frames: frames on either side of a window that the SSR reads as context and does not write. Advised where
            its levels shift: a shifted channel at a window's end would otherwise see zeros.
        window_weights: how the outputs of overlapping windows are weighed, "flat", "linear" or "gaussian".
        augmentation: noise level (0..1) put on the low-resolution clip before the SSR.
    """

    name: str
    base: StageConfig
    ssr: StageConfig | None = None
    fps: int = 16
    text_encoder: str = "minilm"
    text_tokens: int = 24
    window_frames: int = 8
    window_overlap: int = 2
    halo_frames: int = 0
    window_weights: str = "flat"
    augmentation: float = 0.0

    def __post_init__(self):
        _check(1 <= self.fps <= 240, f"fps={self.fps} is not in 1..240")
        _check(1 <= self.text_tokens <= 512, f"text_tokens={self.text_tokens} is not in 1..512")
        _check(
            0 <= self.window_overlap < self.window_frames,
            f"window_overlap={self.window_overlap} is not in 0..{self.window_frames - 1}",
        )
        _check(0 <= self.halo_frames <= 64, f"halo_frames={self.halo_frames} is not in 0..64")
        _check(
            self.window_weights in WINDOW_WEIGHTS,
            f"window_weights {self.window_weights!r} is not one of {', '.join(WINDOW_WEIGHTS)}",
        )
        _check(0 <= self.augmentation <= 1, f"augmentation={self.augmentation} is not in 0..1")


def _levels(
    widths, num_layers, *, factors=None, attention_depth=2, attention_levels=None, **kw
) -> tuple[LevelConfig, ...]:
    """Lumiere's arrangement: temporal convolution at all levels but the coarsest, attention over time only there."""
    last = len(widths) - 1
    factors = factors or [2] * last + [1]
    attention_levels = range(1, last + 1) if attention_levels is None else attention_levels
    return tuple(
        LevelConfig(
            channels=c,
            num_layers=num_layers,
            temporal_conv=i < last,
            temporal_factor=factors[i],
            temporal_attention=attention_depth if i == last else 0,
            spatial_attention=i in attention_levels and kw.get("spatial", True),
            cross_attention=i in attention_levels and kw.get("text", True),
        )
        for i, c in enumerate(widths)
    )


def stage_preset(name: str) -> StageConfig:
    """A named network: "demo-base", "demo-ssr", "stunet-b", "ssr-b", "stunet-l", "ssr-l", "tiny-base", "tiny-ssr".

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    cosine = ScheduleConfig("cosine", "v_prediction")
    guided = SamplerConfig("dpmpp_2m", 50, 7.0)
    upscale = SamplerConfig("dpmpp_2m", 30, 1.0)
    ssr = dict(in_channels=6, noise_level=True, frame_embedding=False, skip_input=3, num_frames=8)
    presets = {
        "demo-base": lambda: StageConfig(
            STUNetConfig(
                _levels((64, 128, 192), 1, attention_depth=2),
                patch_size=2,
                num_groups=4,
                head_dim=32,
                height=32,
                width=32,
            ),
            ScheduleConfig("cosine", "sample", -4.0),
            SamplerConfig("dpmpp_2m", 30, 2.0),
        ),
        "demo-ssr": lambda: StageConfig(
            STUNetConfig(
                _levels(
                    (64, 96, 160),
                    1,
                    factors=[1, 1, 1],
                    attention_depth=1,
                    attention_levels=(),
                    spatial=False,
                    text=False,
                ),
                patch_size=4,
                num_groups=4,
                head_dim=32,
                text_dim=0,
                height=128,
                width=128,
                **ssr,
            ),
            ScheduleConfig("cosine", "sample", 0.0),
            SamplerConfig("dpmpp_2m", 8, 1.0),
        ),
        "stunet-b": lambda: StageConfig(STUNetConfig(_levels((128, 256, 512, 512), 2), text_dim=768), cosine, guided),
        "ssr-b": lambda: StageConfig(
            STUNetConfig(
                _levels((128, 256, 512, 512), 2, factors=[1] * 4, attention_depth=1, attention_levels=()),
                patch_size=4,
                text_dim=0,
                height=512,
                width=512,
                **ssr,
            ),
            cosine,
            upscale,
        ),
        "stunet-l": lambda: StageConfig(
            STUNetConfig(_levels((320, 640, 960, 1280), 3, attention_depth=4), text_dim=4096), cosine, guided
        ),
        "ssr-l": lambda: StageConfig(
            STUNetConfig(
                _levels((192, 384, 768, 768), 2, factors=[1] * 4, attention_depth=1, attention_levels=()),
                patch_size=4,
                text_dim=0,
                height=1024,
                width=1024,
                **ssr,
            ),
            cosine,
            upscale,
        ),
        "tiny-base": lambda: StageConfig(
            STUNetConfig(
                _levels((16, 32), 1, attention_depth=1),
                patch_size=2,
                num_groups=4,
                head_dim=16,
                text_dim=32,
                num_frames=8,
                height=16,
                width=16,
            ),
            ScheduleConfig("cosine", "sample"),
            SamplerConfig("dpmpp_2m", 4, 2.0),
        ),
        "tiny-ssr": lambda: StageConfig(
            STUNetConfig(
                _levels((16, 32), 1, factors=[1, 1], attention_depth=1, attention_levels=(), text=False),
                patch_size=4,
                num_groups=4,
                head_dim=16,
                text_dim=0,
                height=32,
                width=32,
                **{**ssr, "num_frames": 4},
            ),
            ScheduleConfig("cosine", "sample"),
            SamplerConfig("dpmpp_2m", 2, 1.0),
        ),
    }
    _check(name in presets, f"preset {name!r} is not one of {', '.join(presets)}")
    return presets[name]()


def model_preset(name: str) -> ModelConfig:
    """A whole model: "demo", "stunet-b", "stunet-l" or "tiny" (for tests).

    Raises:
        ValueError: an unknown name.
    """
    models = {
        "demo": lambda: ModelConfig("demo", stage_preset("demo-base"), stage_preset("demo-ssr"), augmentation=0.1),
        "stunet-b": lambda: ModelConfig(
            "stunet-b", stage_preset("stunet-b"), stage_preset("ssr-b"), text_encoder="clip:", text_tokens=77
        ),
        "stunet-l": lambda: ModelConfig(
            "stunet-l", stage_preset("stunet-l"), stage_preset("ssr-l"), text_encoder="t5:", text_tokens=77
        ),
        "tiny": lambda: ModelConfig(
            "tiny",
            stage_preset("tiny-base"),
            stage_preset("tiny-ssr"),
            text_encoder="hash",
            text_tokens=8,
            window_frames=4,
            window_overlap=1,
        ),
    }
    _check(name in models, f"model {name!r} is not one of {', '.join(models)}")
    return models[name]()
