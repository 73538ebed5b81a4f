"""The families of public U-Nets, by the layouts of diffusers: parameters have the names of its files.

`walker` holds the arrangement that they share, `layers` what they are made of, and a file per network the rest.
"""

from pylumiere.networks.unet.unet2d import UNet2D

__all__ = ["UNet2D"]
