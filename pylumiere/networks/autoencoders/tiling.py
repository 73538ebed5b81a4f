"""Decoding in overlapping tiles: the memory of the layers does not grow with the frame."""

from __future__ import annotations

import torch
from torch import Tensor

from pylumiere.networks.autoencoders.base import Autoencoder


def decode_tiled(network: Autoencoder, latents: Tensor, tile: int, overlap: int) -> Tensor:
    """`network.decode` in tiles of `tile` x `tile` latents, blended linearly where they overlap.

    Tiles start every `tile - overlap` latents; the last ones are moved back to end with the frame, so all calls have
    one shape. A frame that one tile covers is decoded as a whole, bit for bit. Otherwise the result differs from the
    whole frame's: a tile does not see what is around it, and the norms and the attention of AutoencoderKL are over the
    tile alone, which may change its colours slightly.

    Args:
        latents: [B, T, h, w, latent_channels].
        tile, overlap: in latents, along height and width.

    Returns:
        [B, T, h*scale, w*scale, out_channels] in the dtype of `latents`.

    Raises:
        ValueError: `overlap` is not in 0..tile-1, or the network refuses the latents.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap={overlap} is not in 0..{tile - 1}")
    height, width = latents.shape[2:4]
    if height <= tile and width <= tile:
        return network.decode(latents)
    scale = network.config.scale
    rows, columns = (_cut(side, tile, overlap, scale, latents.device) for side in (height, width))
    frames = latents.new_zeros(*latents.shape[:2], height * scale, width * scale, network.config.out_channels)
    for top, row_weights in rows:
        for left, column_weights in columns:
            part = network.decode(latents[:, :, top : top + tile, left : left + tile].contiguous())
            weights = (row_weights[:, None] * column_weights).to(part.dtype)[..., None]
            y, x = top * scale, left * scale
            frames[:, :, y : y + part.shape[2], x : x + part.shape[3]] += part * weights
    return frames


def _cut(side: int, tile: int, overlap: int, scale: int, device: torch.device) -> list[tuple[int, Tensor]]:
    """Where tiles start along one side, and the weights of their pixels; at each pixel those of all tiles sum to 1."""
    step, tile = tile - overlap, min(tile, side)
    starts = [*range(0, side - tile, step), side - tile]
    pixels = torch.arange(side * scale, device=device) + 0.5
    first = torch.tensor(starts, device=device)[:, None] * scale
    # The distance to a tile's nearer end. Where two tiles overlap by half or less, their distances to the ends that lie
    # in the overlap sum to its length: the weights are linear across it.
    weights = torch.minimum(pixels - first, first + tile * scale - pixels).clamp(min=0)
    weights = weights / weights.sum(0)
    return [(start, row[start * scale : (start + tile) * scale]) for start, row in zip(starts, weights, strict=True)]
