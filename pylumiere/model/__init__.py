"""STUNet in plain PyTorch: the definition of correctness for every backend."""

from .ops import Norm, PlainOps, Shift
from .stunet import STUNet, image_config, plan_blocks

__all__ = ["Norm", "PlainOps", "STUNet", "Shift", "image_config", "plan_blocks"]
