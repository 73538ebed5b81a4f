"""Latent-Shift by diffusers' own U-Net: its residual blocks' first convolutions read shifted channels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from pylumiere.config import TemporalShiftConfig


def shifted(x, channels, div, direction, pad):
    """The shift as a convolution over frames [B, C, T, H, W] with one 1 for each channel."""
    weight = torch.zeros(channels, 1, 3, 1, 1, dtype=x.dtype)
    for c in range(channels):
        tap = {"both": {0: 2, 1: 0}, "causal": {0: 0}}[direction].get(c // (channels // div), 1)
        weight[c, 0, tap] = 1
    x = F.pad(x, (0, 0, 0, 0, 1, 1), mode={"zero": "constant"}.get(pad, pad))
    return F.conv3d(x, weight, groups=channels)


@contextlib.contextmanager
def shifting(model: UNet2DConditionModel, frames: int, shift: TemporalShiftConfig) -> Iterator[int]:
    """Pictures that the model is given are the frames of clips one after the other; their residual blocks' first
    convolutions read shifted channels. Gives the number of blocks."""

    def hook(conv, args):
        clips = args[0].unflatten(0, (-1, frames)).transpose(1, 2)
        moved = shifted(clips, conv.in_channels, shift.div, shift.direction, shift.pad)
        return (moved.transpose(1, 2).flatten(0, 1),)

    blocks = [module for module in model.modules() if type(module).__name__ == "ResnetBlock2D"]
    handles = [block.conv1.register_forward_pre_hook(hook) for block in blocks]
    try:
        yield len(blocks)
    finally:
        for handle in handles:
            handle.remove()
