"""The family STUNet: Lumiere's Space-Time U-Net, its blocks and its presets.

Nothing here is shared with other families.
"""

from pylumiere.networks.stunet.stunet import STUNet, image_config, plan_blocks

__all__ = ["STUNet", "image_config", "plan_blocks"]
