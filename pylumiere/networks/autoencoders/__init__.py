"""The published autoencoders of frames: pictures to latents and back, each frame by itself."""

from pylumiere.networks.autoencoders.kl import AutoencoderKL
from pylumiere.networks.autoencoders.tiling import decode_tiled
from pylumiere.networks.autoencoders.tiny import AutoencoderTiny

__all__ = ["AutoencoderKL", "AutoencoderTiny", "decode_tiled"]
