"""The configuration of the picture U-Net of Stable Diffusion 1 and 2, with the temporal shift of Latent-Shift."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from pylumiere.config.fields import Config, check
from pylumiere.config.networks import NetworkConfig, register_config

SHIFT_DIRECTIONS = ("both", "causal")
SHIFT_PADS = ("zero", "circular", "replicate")
SHIFT_PLACES = ("conv1",)
DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
_PER_LEVEL = ("down_block_types", "up_block_types", "layers_per_block", "transformer_layers_per_block", "num_heads")

# What a public unet/config.json may say of layers that this network has in one form only: diffusers' default first.
_SUPPORTED = {
    "_class_name": ("UNet2DConditionModel",),
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# What it may say that changes nothing here: beside names that begin with an underscore, the size of the training's
# pictures, what only training or an absent layer reads, and what diffusers' EMAModel leaves behind.
_IGNORED = {
    "addition_embed_type_num_heads", "decay", "dropout", "inv_gamma", "min_decay", "optimization_step", "power",
    "sample_size", "update_after_step", "use_ema_warmup",
}  # fmt: skip


@dataclass(frozen=True)
class TemporalShiftConfig(Config):
    """Channels of a frame are read from its neighbours, in the residual branch of each residual block. Weights that
    were not trained with it make worse pictures by it.

    Attributes:
        div: channels // div channels come from the next frame and as many from the previous one; 0 of them where a
            layer is narrower.
        direction: "both", or "causal": the first fold comes from the previous frame and nothing from the next.
        pad: what the ends see: "zero" zeros, "circular" the other end of the clip, "replicate" the end frame again.
        place: "conv1": what the branch's first convolution reads, after norm and SiLU.
    """

    div: int = 8
    direction: str = "both"
    pad: str = "zero"
    place: str = "conv1"

    def __post_init__(self):
        check(self.div >= 2, f"temporal_shift: div={self.div} is below 2")
        for name, allowed in (("direction", SHIFT_DIRECTIONS), ("pad", SHIFT_PADS), ("place", SHIFT_PLACES)):
            value = getattr(self, name)
            check(value in allowed, f"temporal_shift: {name} {value!r} is not one of {', '.join(allowed)}")


@register_config
@dataclass(frozen=True)
class UNet2DConfig(NetworkConfig):
    """A picture U-Net that is applied to every frame. See `pylumiere.networks.unet.UNet2D`. Words are those of
    diffusers' `UNet2DConditionModel`, and what stands once per level is a list, finest level first.

    Attributes:
        in_channels: 4; 9 for inpainting.
        block_out_channels: width of each level.
        down_block_types: "CrossAttnDownBlock2D" or "DownBlock2D" for each level.
        up_block_types: "CrossAttnUpBlock2D" or "UpBlock2D", in the order in which they run: coarsest level first.
        layers_per_block: residual blocks of each level on the way down; one more on the way up.
        transformer_layers_per_block: transformer blocks after each residual block of a level with attention, and in the
            middle as many as on the coarsest level.
        num_heads: attention heads of each level; diffusers calls it `attention_head_dim`.
        cross_attention_dim: width of the text embeddings.
        use_linear_projection: a transformer begins and ends with linear layers (Stable Diffusion 2), not with 1 x 1
            convolutions.
        upcast_attention: attention in float32 where the network computes in 16 bits.
        norm_num_groups, norm_eps: of the residual blocks' GroupNorms and the last one.
        flip_sin_to_cos, freq_shift: of the timestep's features: cosines first; their frequencies fall from 1 to
            1 / 10000 in half the first width minus freq_shift steps.
        temporal_shift: None: frames do not see each other.
        num_frames, height, width: the size the network is made for, in latents.
    """

    family: ClassVar[str] = "unet2d"
    masks_text: ClassVar[bool] = False  # trained to attend to the padding, too

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    upcast_attention: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    temporal_shift: TemporalShiftConfig | None = None
    num_frames: int = 16
    height: int = 64
    width: int = 64

    def __post_init__(self):
        levels = len(self.block_out_channels)
        check(1 <= levels <= 8, f"{levels} block_out_channels, allowed are 1..8")
        for name in _PER_LEVEL:
            count = len(getattr(self, name))
            check(count == levels, f"{count} {name} for {levels} levels")
        for name, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for value in getattr(self, name):
                check(value in allowed, f"{name}: {value!r} is not one of {', '.join(allowed)}")
        for name, most in (
            ("block_out_channels", 16384),
            ("layers_per_block", 32),
            ("transformer_layers_per_block", 64),
            ("num_heads", 1024),
        ):
            for value in getattr(self, name):
                check(1 <= value <= most, f"{name}: {value} is not in 1..{most}")
        for name in ("in_channels", "out_channels", "cross_attention_dim"):
            value = getattr(self, name)
            check(1 <= value <= 65536, f"{name}={value} is not in 1..65536")
        check(self.norm_num_groups >= 1, f"norm_num_groups={self.norm_num_groups} is not positive")
        check(self.norm_eps > 0, f"norm_eps={self.norm_eps} is not positive")
        for level, channels in enumerate(self.block_out_channels):
            check(
                channels % self.norm_num_groups == 0,
                f"block_out_channels: {channels} is not a multiple of norm_num_groups={self.norm_num_groups}",
            )
            kinds = self.down_block_types[level], self.up_block_types[-1 - level]
            if level == levels - 1 or any(kind.startswith("CrossAttn") for kind in kinds):  # the middle attends
                heads = self.num_heads[level]
                check(channels % heads == 0, f"block_out_channels: {channels} is not a multiple of num_heads {heads}")
        first = self.block_out_channels[0]
        check(first % 2 == 0, f"block_out_channels: the first, {first}, is not even")
        check(0 <= self.freq_shift < first // 2, f"freq_shift={self.freq_shift} is not in 0..{first // 2 - 1}")
        check(self.num_frames >= 1, f"num_frames={self.num_frames} is not positive")
        factor = self.spatial_factor
        for name, size in (("height", self.height), ("width", self.width)):
            check(size >= 1 and size % factor == 0, f"{name}={size} is not a positive multiple of {factor}")

    @property
    def text_dim(self) -> int:
        """Width of the text embeddings: the middle always attends to them."""
        return self.cross_attention_dim

    @property
    def min_frames(self) -> int:
        """One frame, which has no neighbours to shift from, is a network of its own, and is not counted."""
        return 1 if self.temporal_shift is None else 2

    @property
    def spatial_factor(self) -> int:
        """Height and width must be multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(
        cls,
        data: dict,
        *,
        num_frames: int,
        height: int,
        width: int,
        temporal_shift: TemporalShiftConfig | None = None,
    ) -> UNet2DConfig:
        """From the JSON of a public folder's `unet/config.json`; what it leaves out has diffusers' default.

        Args:
            data: may hold `temporal_shift`, too: the fields of `TemporalShiftConfig`.
            num_frames, height, width: the size that the network is made for, in latents.
            temporal_shift: used instead of that in `data`.

        Raises:
            ValueError: a key that asks for a layer that this network does not have, an unknown key, or a wrong value;
                key and value are named, and what is supported.
        """
        check(isinstance(data, dict), f"unet: expected an object, got {type(data).__name__}")
        values = {"num_frames": num_frames, "height": height, "width": width}
        for name, value in data.items():
            if name in _SUPPORTED:
                supported = _SUPPORTED[name]
                check(value in supported, f"unet: {name}={value!r} is not supported, only {_listed(supported)}")
            elif name in _PUBLIC:
                values[_PUBLIC[name]] = value
            else:
                check(name.startswith("_") or name in _IGNORED, f"unet: unknown key {name!r} with value {value!r}")
        widths = values.get("block_out_channels", cls.block_out_channels)
        check(isinstance(widths, (list, tuple)), f"unet: block_out_channels={widths!r} is not a list")
        for name in ("layers_per_block", "transformer_layers_per_block", "num_heads"):
            value = values.get(name, getattr(cls, name)[0])
            values[name] = value if isinstance(value, (list, tuple)) else [value] * len(widths)
        if temporal_shift is not None:
            values["temporal_shift"] = temporal_shift.to_dict()
        return cls.from_dict(values)


# Keys of a public unet/config.json that vary, and our fields.
_PUBLIC = {
    field.name: field.name for field in fields(UNet2DConfig) if field.name not in ("num_frames", "height", "width")
}
_PUBLIC["attention_head_dim"] = _PUBLIC.pop("num_heads")


def _listed(values: tuple) -> str:
    return " or ".join(map(repr, values))
