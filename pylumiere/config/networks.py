"""What the runtime asks of a network's configuration, and the configurations by the name of their family."""

from __future__ import annotations

from typing import ClassVar

from pylumiere.config.fields import Config, check

COLOURS = 3  # channels of a picture


class NetworkConfig(Config):
    """What the runtime asks of a denoising network's configuration, whatever its family. A frozen dataclass.

    Attributes:
        family: name in the registry.
        in_channels: noisy channels, then what stands beside them: nothing; given pixels C and their mask M (one channel
            more than the noisy ones); or the frames of the stage before (as many).
        out_channels: of the prediction, and of the noisy frames.
        num_frames, height, width: the size that the network is made for.
        text_dim: width of the text embeddings; 0 for a network without text.
        noise_level: it takes a second, per-element noise level.
        temporal_factor, spatial_factor: frames, height and width must be multiples of these.
        min_frames: of a call; one frame may be a network of its own.
        masks_text: whether it is told which text tokens are real.
    """

    family: ClassVar[str]
    in_channels: int
    out_channels: int
    num_frames: int
    height: int
    width: int
    text_dim: int = 0
    noise_level: bool = False
    temporal_factor: int = 1
    spatial_factor: int = 1
    min_frames: int = 1
    masks_text: bool = True

    @property
    def given_channels(self) -> int:
        """Channels beside the noisy ones."""
        return self.in_channels - self.out_channels

    @property
    def takes_given(self) -> bool:
        """Whether C and M of an application stand beside the noisy channels."""
        return self.given_channels == self.out_channels + 1


class DecodingConfig(Config):
    """What the runtime asks of a decoder's configuration. A frozen dataclass.

    Attributes:
        family: name in the registry.
        latent_channels: of what it takes.
        out_channels: of what it gives.
        scale: height and width of a frame over those of its latent.
        temporal_factor, spatial_factor, min_frames: as a NetworkConfig's, of latents.
        force_upcast: to be computed in float32, whatever the precision of the other networks.
    """

    family: ClassVar[str]
    latent_channels: int
    out_channels: int = COLOURS
    scale: int = 1
    temporal_factor: int = 1
    spatial_factor: int = 1
    min_frames: int = 1
    force_upcast: bool = False


_FAMILIES: dict[str, type[NetworkConfig] | type[DecodingConfig]] = {}


def register_config(kind: type) -> type:
    """Makes a family's configuration known to those that name it. A decorator."""
    _FAMILIES[kind.family] = kind
    return kind


def network_from(data: dict, kind: type, where: str):
    """A network's configuration from `family` and `network`, which are taken out of a stage's or decoder's JSON values.
    Files that name no family are of the time when there was one.

    Raises:
        ValueError: an unknown family, or what its configuration refuses.
    """
    known = sorted(family for family, config in _FAMILIES.items() if issubclass(config, kind))
    name = data.pop("family", "stunet")
    check(isinstance(name, str) and name in known, f"{where}: family {name!r} is not one of {', '.join(known)}")
    check("network" in data, f"{where}: network is missing")
    return _FAMILIES[name].from_dict(data.pop("network"))
