"""The autoencoders as families. A model's decoder is one of them."""

from __future__ import annotations

from pylumiere.config import AutoencoderKLConfig, AutoencoderTinyConfig
from pylumiere.networks.autoencoders.kl import AutoencoderKL
from pylumiere.networks.autoencoders.tiny import AutoencoderTiny
from pylumiere.networks.families import Ports, decoder_ports


class _FrameByFrame:
    """See `pylumiere.networks.families.Family`."""

    def ports(self, config: AutoencoderKLConfig | AutoencoderTinyConfig, text_tokens: int) -> Ports:
        return decoder_ports(config)

    def is_temporal(self, config: AutoencoderKLConfig | AutoencoderTinyConfig, parameter: str) -> bool:
        return False


class AutoencoderKLFamily(_FrameByFrame):
    name = "autoencoder_kl"

    def build(self, config: AutoencoderKLConfig) -> AutoencoderKL:
        return AutoencoderKL(config)


class AutoencoderTinyFamily(_FrameByFrame):
    name = "autoencoder_tiny"

    def build(self, config: AutoencoderTinyConfig) -> AutoencoderTiny:
        return AutoencoderTiny(config)
