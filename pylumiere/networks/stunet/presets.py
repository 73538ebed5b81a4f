"""Named networks and models of this family: the shipped demo's, Lumiere's sizes, and small ones for tests."""

from __future__ import annotations

from pylumiere.config import (
    LevelConfig,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    StageConfig,
    STUNetConfig,
    WindowConfig,
)
from pylumiere.config.fields import check

LARGE = ScheduleConfig("cosine", "v_prediction")  # of the larger networks
SHORT = WindowConfig(8, 2)
MODELS = {  # by name: stages, and fields of the model
    "demo": (("demo-base", "demo-ssr"), {}),
    "stunet-b": (("stunet-b", "ssr-b"), {"text_encoder": "clip:", "text_tokens": 77}),
    "stunet-l": (("stunet-l", "ssr-l"), {"text_encoder": "t5:", "text_tokens": 77}),
    "tiny": (("tiny-base", "tiny-ssr"), {"text_encoder": "hash", "text_tokens": 8}),
}


def _levels(
    widths: tuple[int, ...],
    num_layers: int,
    *,
    factors: list[int] | None = None,
    attention_depth: int = 2,
    attention_levels: tuple[int, ...] | None = None,
) -> tuple[LevelConfig, ...]:
    """Lumiere's arrangement: temporal convolution at all levels but the coarsest, attention over time only there."""
    last = len(widths) - 1
    factors = factors or [2] * last + [1]
    attention_levels = tuple(range(1, last + 1)) if attention_levels is None else attention_levels
    return tuple(
        LevelConfig(
            channels=c,
            num_layers=num_layers,
            temporal_conv=i < last,
            temporal_factor=factors[i],
            temporal_attention=attention_depth if i == last else 0,
            spatial_attention=i in attention_levels,
            cross_attention=i in attention_levels,
        )
        for i, c in enumerate(widths)
    )


def stage_preset(name: str) -> StageConfig:
    """A named network: "demo-base", "demo-ssr", "stunet-b", "ssr-b", "stunet-l", "ssr-l", "tiny-base", "tiny-ssr".

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    presets = {
        "demo-base": lambda: StageConfig(
            "base",
            STUNetConfig(_levels((64, 128, 192), 1), patch_size=2, num_groups=4, head_dim=32, height=32, width=32),
            ScheduleConfig("cosine", "sample", -4.0),
            SamplerConfig("dpmpp_2m", 30, 2.0),
        ),
        "demo-ssr": lambda: _ssr(
            _levels((64, 96, 160), 1, factors=[1] * 3, attention_depth=1, attention_levels=()),
            128,
            ScheduleConfig("cosine", "sample"),
            8,
            augmentation=0.1,
            num_groups=4,
            head_dim=32,
        ),
        "stunet-b": lambda: _base((128, 256, 512, 512), 2, 2, 768),
        "ssr-b": lambda: _ssr(
            _levels((128, 256, 512, 512), 2, factors=[1] * 4, attention_depth=1, attention_levels=()), 512
        ),
        "stunet-l": lambda: _base((320, 640, 960, 1280), 3, 4, 4096),
        "ssr-l": lambda: _ssr(
            _levels((192, 384, 768, 768), 2, factors=[1] * 4, attention_depth=1, attention_levels=()), 1024
        ),
        "tiny-base": lambda: StageConfig(
            "base",
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
        "tiny-ssr": lambda: _ssr(
            _levels((16, 32), 1, factors=[1, 1], attention_depth=1, attention_levels=()),
            32,
            ScheduleConfig("cosine", "sample"),
            2,
            windows=WindowConfig(4, 1),
            num_groups=4,
            head_dim=16,
            num_frames=4,
        ),
    }
    check(name in presets, f"preset {name!r} is not one of {', '.join(presets)}")
    return presets[name]()


def _base(widths: tuple[int, ...], num_layers: int, attention_depth: int, text_dim: int) -> StageConfig:
    return StageConfig(
        "base",
        STUNetConfig(_levels(widths, num_layers, attention_depth=attention_depth), text_dim=text_dim),
        LARGE,
        SamplerConfig("dpmpp_2m", 50, 7.0),
    )


def _ssr(
    levels: tuple[LevelConfig, ...],
    side: int,
    schedule: ScheduleConfig = LARGE,
    steps: int = 30,
    windows: WindowConfig = SHORT,
    augmentation: float = 0.0,
    **network,
) -> StageConfig:
    """Spatial super-resolution: it reads the frames of the stage before, and predicts what they lack."""
    made = dict(in_channels=6, patch_size=4, noise_level=True, frame_embedding=False, skip_input=3, text_dim=0,
                num_frames=8, height=side, width=side)  # fmt: skip
    return StageConfig(
        "ssr",
        STUNetConfig(levels, **{**made, **network}),
        schedule,
        SamplerConfig("dpmpp_2m", steps, 1.0),
        windows,
        augmentation,
    )


def model_preset(name: str) -> ModelConfig:
    """A whole model: "demo", "stunet-b", "stunet-l" or "tiny" (for tests).

    Raises:
        ValueError: an unknown name.
    """
    check(name in MODELS, f"model {name!r} is not one of {', '.join(MODELS)}")
    stages, fields = MODELS[name]
    return ModelConfig(name, tuple(stage_preset(stage) for stage in stages), **fields)
