"""The public U-Nets as families."""

from __future__ import annotations

from pylumiere.config import UNet2DConfig
from pylumiere.networks.families import Ports, denoiser_ports
from pylumiere.networks.unet.unet2d import UNet2D


class UNet2DFamily:
    """See `pylumiere.networks.families.Family`."""

    name = "unet2d"

    def build(self, config: UNet2DConfig) -> UNet2D:
        return UNet2D(config)

    def ports(self, config: UNet2DConfig, text_tokens: int) -> Ports:
        return denoiser_ports(config, text_tokens)

    def is_temporal(self, config: UNet2DConfig, parameter: str) -> bool:
        """Never: the temporal shift has no parameters."""
        return False
