"""Decoding in overlapping tiles: the memory of the layers does not grow with the frame."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pylumiere.config import DecodingConfig


def decode_tiled(
    decode: Callable[[Tensor], Tensor], config: DecodingConfig, latents: Tensor, tile: int, overlap: int
) -> Tensor:
    """A decoder's call in tiles of `tile` x `tile` latents, blended linearly where they overlap.

    Tiles start every `tile - overlap` latents; the last ones are moved back to end with the frame, so all calls have
    one shape. A frame that one tile covers is decoded as a whole, bit for bit. Otherwise the result differs from the
    whole frame's: a tile does not see what is around it, and the norms and the attention of AutoencoderKL are over the
    tile alone, which may change its colours slightly.

    Args:
        decode: [B, T, h, w, latent_channels] -> [B, T, h*scale, w*scale, out_channels].
        config: of the decoder.
        latents: [B, T, h, w, latent_channels].
        tile, overlap: in latents, along height and width.

    Returns:
        [B, T, h*scale, w*scale, out_channels] in the dtype of `latents`.

    Raises:
        ValueError: `overlap` is not in 0..tile-1.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap={overlap} is not in 0..{tile - 1}")
    height, width = latents.shape[2:4]
    if height <= tile and width <= tile:
        return decode(latents)
    scale = config.scale
    rows, columns = (_cut(side, tile, overlap, scale, latents.device) for side in (height, width))
    frames = latents.new_zeros(*latents.shape[:2], height * scale, width * scale, config.out_channels)
    for top, row_weights in rows:
        for left, column_weights in columns:
            part = decode(latents[:, :, top : top + tile, left : left + tile].contiguous())
            weights = (row_weights[:, None] * column_weights).to(part.dtype)[..., None]
            y, x = top * scale, left * scale
            frames[:, :, y : y + part.shape[2], x : x + part.shape[3]] += part * weights
    return frames


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of a side begin."""
    last = max(0, side - tile)
    return [*range(0, last, tile - overlap), last]


def _cut(side: int, tile: int, overlap: int, scale: int, device: torch.device) -> list[tuple[int, Tensor]]:
    """Where tiles start along one side, and the weights of their pixels; at each pixel those of all tiles sum to 1."""
    starts, tile = tile_starts(side, tile, overlap), min(tile, side)
    pixels = torch.arange(side * scale, device=device) + 0.5
    first = torch.tensor(starts, device=device)[:, None] * scale
    # The distance to a tile's nearer end. Where two tiles overlap by half or less, their distances to the ends that lie
    # in the overlap sum to its length: the weights are linear across it.
    weights = torch.minimum(pixels - first, first + tile * scale - pixels).clamp(min=0)
    weights = weights / weights.sum(0)
    return [(start, row[start * scale : (start + tile) * scale]) for start, row in zip(starts, weights, strict=True)]
