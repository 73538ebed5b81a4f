"""STUNet as a family."""

from __future__ import annotations

from pylumiere.config import STUNetConfig
from pylumiere.networks.families import Ports, denoiser_ports
from pylumiere.networks.stunet.stunet import STUNet, is_temporal


class STUNetFamily:
    """See `pylumiere.networks.families.Family`."""

    name = "stunet"

    def build(self, config: STUNetConfig) -> STUNet:
        return STUNet(config)

    def ports(self, config: STUNetConfig, text_tokens: int) -> Ports:
        return denoiser_ports(config, text_tokens)

    def is_temporal(self, config: STUNetConfig, parameter: str) -> bool:
        return is_temporal(config, parameter)
