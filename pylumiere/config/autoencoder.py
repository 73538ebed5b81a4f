"""The configurations of the published autoencoders of frames, in diffusers' words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from pylumiere.config.fields import check
from pylumiere.config.networks import COLOURS, DecodingConfig, register_config

MOST_LEVELS = 8


@register_config
@dataclass(frozen=True)
class AutoencoderKLConfig(DecodingConfig):
    """Stable Diffusion's autoencoder. See `pylumiere.networks.autoencoders.AutoencoderKL`.

    Attributes:
        block_out_channels: width of each level, finest first; each further level halves height and width.
        layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
        out_channels: of a frame, which the encoder takes and the decoder gives.
        scaling_factor, shift_factor: latents as a sampler holds them are (z - shift_factor) * scaling_factor.
        force_upcast: 16 bits are too few for these weights; they are to be computed in float32.
        use_quant_conv, use_post_quant_conv: a 1 x 1 convolution after the encoder, before the decoder.
        mid_block_add_attention: attention within a frame, with one head, on the coarsest level.
    """

    family: ClassVar[str] = "autoencoder_kl"

    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    out_channels: int = COLOURS
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        _check_latents(self)
        _check_widths("block_out_channels", self.block_out_channels)
        check(1 <= self.layers_per_block <= 32, f"layers_per_block={self.layers_per_block} is not in 1..32")
        check(self.norm_num_groups >= 1, f"norm_num_groups={self.norm_num_groups} is not positive")
        for width in self.block_out_channels:
            check(
                width % self.norm_num_groups == 0,
                f"block_out_channels: {width} is not a multiple of norm_num_groups={self.norm_num_groups}",
            )

    @property
    def scale(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, data: dict[str, Any]) -> AutoencoderKLConfig:
        """From the values of a published `config.json`; what it does not say has diffusers' default.

        Raises:
            ValueError: a value that this network cannot be built with, or that is not known; its key is named.
        """
        config = _from_published(
            cls,
            data,
            only={"_class_name": "AutoencoderKL", "act_fn": "silu", "latents_mean": None, "latents_std": None},
            others={"sample_size", "down_block_types", "up_block_types"},  # the first is of diffusers' own tiles
        )
        levels = len(config.block_out_channels)
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            kinds = data.get(key, [kind])
            check(
                kinds in ([kind] * levels, (kind,) * levels),
                f"{key}={kinds!r} is not supported; supported is {kind!r} for each of {levels} levels",
            )
        return config


@register_config
@dataclass(frozen=True)
class AutoencoderTinyConfig(DecodingConfig):
    """A small distilled autoencoder (TAESD). See `pylumiere.networks.autoencoders.AutoencoderTiny`.

    Attributes:
        encoder_block_out_channels, decoder_block_out_channels: width of each level; one and the same, since no layer of
            the published network changes it.
        num_encoder_blocks: blocks of each level, finest first; each further level halves height and width.
        num_decoder_blocks: blocks of each level, coarsest first.
        out_channels: of a frame, which the encoder takes and the decoder gives.
        scaling_factor, shift_factor: latents as a sampler holds them are (z - shift_factor) * scaling_factor.
    """

    family: ClassVar[str] = "autoencoder_tiny"

    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    out_channels: int = COLOURS
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def __post_init__(self):
        _check_latents(self)
        for side in ("encoder", "decoder"):
            widths, blocks = getattr(self, f"{side}_block_out_channels"), getattr(self, f"num_{side}_blocks")
            _check_widths(f"{side}_block_out_channels", widths)
            check(len(set(widths)) == 1, f"{side}_block_out_channels={widths}: all levels should have one width")
            check(
                len(blocks) == len(widths) and all(0 <= count <= 32 for count in blocks),
                f"num_{side}_blocks={blocks} is not {len(widths)} numbers in 0..32, one for each level",
            )
        check(
            len(self.num_encoder_blocks) == len(self.num_decoder_blocks),
            f"num_encoder_blocks={self.num_encoder_blocks} and num_decoder_blocks={self.num_decoder_blocks} differ in "
            "their number of levels",
        )

    @property
    def scale(self) -> int:
        return 2 ** (len(self.num_decoder_blocks) - 1)

    @classmethod
    def from_diffusers(cls, data: dict[str, Any]) -> AutoencoderTinyConfig:
        """From the values of a published `config.json`; what it does not say has diffusers' default.

        Raises:
            ValueError: a value that this network cannot be built with, or that is not known; its key is named.
        """
        return _from_published(
            cls,
            data,
            only={
                "_class_name": "AutoencoderTiny",
                "act_fn": "relu",
                "upsample_fn": "nearest",
                "upsampling_scaling_factor": 2,
            },
            # diffusers keeps latents as bytes with the first two, outside of encode and decode; it writes the third
            # beside its original and takes the last for False.
            others={"latent_magnitude", "latent_shift", "block_out_channels", "force_upcast"},
        )


def _check_latents(config: AutoencoderKLConfig | AutoencoderTinyConfig) -> None:
    for name in ("latent_channels", "out_channels"):
        check(1 <= getattr(config, name) <= 1024, f"{name}={getattr(config, name)} is not in 1..1024")
    check(config.scaling_factor > 0, f"scaling_factor={config.scaling_factor} is not positive")


def _check_widths(name: str, widths: tuple[int, ...]) -> None:
    check(1 <= len(widths) <= MOST_LEVELS, f"{name} has {len(widths)} levels, allowed are 1..{MOST_LEVELS}")
    for width in widths:
        check(1 <= width <= 16384, f"{name}: {width} is not in 1..16384")


def _from_published(cls, data: dict[str, Any], only: dict[str, Any], others: set[str]):
    """A configuration from a published one.

    Args:
        only: keys that have no field here, and the one value that is supported.
        others: keys that change nothing in encode or decode, or that the caller checks.
    """
    check(isinstance(data, dict), f"{cls.__name__}: expected an object, got {type(data).__name__}")
    only = {"in_channels": data.get("out_channels", COLOURS), **only}
    fields = {field.name for field in dataclasses.fields(cls)}
    known = {*fields, *only, *others}
    for key, value in data.items():
        check(key in known or key.startswith("_"), f"{cls.__name__}: {key}={value!r} is not known")
        if key in only:
            check(value == only[key], f"{key}={value!r} is not supported; supported is {only[key]!r}")
    values = {key: data[key] for key in fields & data.keys()}
    if values.get("shift_factor", 0.0) is None:
        values["shift_factor"] = 0.0
    return cls.from_dict(values)
