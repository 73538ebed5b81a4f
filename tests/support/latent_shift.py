"""Latent-Shift by diffusers' own U-Net: its residual blocks' first convolutions read shifted channels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pylumiere.config import TemporalShiftConfig


def shifted(x: Tensor, shift: TemporalShiftConfig) -> Tensor:
    """Clips [B, T, C, H, W] whose first channels are those of a neighbouring frame, by indices into a longer clip."""
    frames, fold = x.shape[1], x.shape[2] // shift.div
    first, last, nothing = x[:, :1], x[:, -1:], torch.zeros_like(x[:, :1])
    before, after = {"zero": (nothing, nothing), "circular": (last, first), "replicate": (first, last)}[shift.pad]
    longer, result = torch.cat([before, x, after], 1), x.clone()
    for i, begin in enumerate({"both": (2, 0), "causal": (0,)}[shift.direction]):  # 1 is the frame itself
        channels = slice(i * fold, (i + 1) * fold)
        result[:, :, channels] = longer[:, begin : begin + frames, channels]
    return result


@contextlib.contextmanager
def shifting(model: UNet2DConditionModel, frames: int, shift: TemporalShiftConfig) -> Iterator[int]:
    """Pictures that the model is given are the frames of clips one after the other; their residual blocks' first
    convolutions read shifted channels. Gives the number of blocks."""

    def hook(conv, args):
        return (shifted(args[0].unflatten(0, (-1, frames)), shift).flatten(0, 1),)

    blocks = [module for module in model.modules() if type(module).__name__ == "ResnetBlock2D"]
    handles = [block.conv1.register_forward_pre_hook(hook) for block in blocks]
    try:
        yield len(blocks)
    finally:
        for handle in handles:
            handle.remove()
