"""Tile sizes as data: operator -> architecture -> rows; the first row whose condition holds is taken.

Nothing is searched for at run time. `pylumiere bench ops --tune` measures candidates on a GPU and prints rows to
commit, with device and date. Rows without a measurement say "not measured".
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

# Most shared memory that one block may use, in bytes.
SHARED_MEMORY = {
    75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A tile choice: constexpr values by name, and how to compile."""

    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    note: str = "not measured"


@dataclass(frozen=True)
class Row:
    """`config` is used where `when(shape)` holds; `shape` is the dict of sizes that the caller passes."""

    config: Config
    when: Callable[[dict[str, Any]], bool] = field(default=lambda shape: True)


# Architecture 0 is the interpreter: small tiles, so that tests reach tile borders with small tensors.
TABLE: dict[str, dict[int, list[Row]]] = {}


def _gemm(m: int, o: int, c: int, warps: int = 4, stages: int = 3) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_O": o, "BLOCK_C": c}, warps, stages)


def _is_fp32(shape: dict[str, Any]) -> bool:
    return shape["dtype"] == torch.float32


def _is_tiny(shape: dict[str, Any]) -> bool:
    return shape["O"] <= 16


def _is_thin(shape: dict[str, Any]) -> bool:
    """Latents to latents: a deep tile would be empty for the most part, and too large for the registers."""
    return _is_tiny(shape) and shape["C"] <= 16


def _is_small(shape: dict[str, Any]) -> bool:
    return shape["pixels"] <= 64


def _is_narrow(shape: dict[str, Any]) -> bool:
    return shape["O"] <= 64


def _is_ragged(shape: dict[str, Any]) -> bool:
    """Tiles of 128 output channels would compute up to 64 for nothing; 320 is 5 * 64."""
    return 0 < shape["O"] % 128 <= 64 and shape["pixels"] >= 256


def _tiles(fp32: Config, small: Config, narrow: Config, ragged: Config) -> list[Row]:
    return [
        Row(fp32, _is_fp32),
        Row(_gemm(128, 16, 16), _is_thin),
        Row(_gemm(128, 16, 64), _is_tiny),
        Row(small, _is_small),
        Row(narrow, _is_narrow),
        Row(ragged, _is_ragged),
        Row(_gemm(128, 128, 64, 8)),
    ]


# Not measured, but each compiles without spills in every use that the networks make of it.
_mma_tiles = _tiles(
    fp32=_gemm(64, 32, 16, 4, 2), small=_gemm(64, 128, 64, 8), narrow=_gemm(128, 64, 32), ragged=_gemm(256, 64, 32, 8)
)
_wgmma_tiles = _tiles(
    fp32=_gemm(64, 32, 16, 8, 3), small=_gemm(64, 128, 64), narrow=_gemm(128, 64, 64, 8, 4),
    ragged=_gemm(256, 64, 32, 8, 4),
)  # fmt: skip
_conv = {
    0: [Row(_gemm(64, 32, 32, 1, 1))], 75: [Row(_gemm(64, 64, 16, 4, 2))], 80: _mma_tiles, 86: _mma_tiles,
    89: _mma_tiles, 90: _wgmma_tiles, 100: _wgmma_tiles, 120: _mma_tiles,
}  # fmt: skip
TABLE["spatial_conv"] = _conv
TABLE["temporal_conv"] = _conv
TABLE["channel_statistics"] = {
    0: [Row(Config({"BLOCK_S": 16, "BLOCK_C": 16}, 1, 1))],
    75: [Row(Config({"BLOCK_S": 128, "BLOCK_C": 64}, 4, 1))],
}


def _fused(pixels: int, channels: int, frames: int, warps: int, stages: int = 2) -> Config:
    return Config({"BLOCK_P": pixels, "BLOCK_C": channels, "FRAMES": frames}, warps, stages)


def _up_to(channels: int) -> Callable[[dict[str, Any]], bool]:
    return lambda shape: max(shape["mid"], shape["out"]) <= channels and not _is_fp32(shape)


# Beyond 64 channels the accumulators spill on mma chips.
_fused_narrow = Row(_fused(64, 32, 16, 8), _up_to(64))
_fused_wide = Row(_fused(64, 16, 16, 8, 1), _up_to(128))
TABLE["factorized_conv"] = {
    0: [Row(_fused(64, 32, 4, 1))], 80: [_fused_narrow], 90: [_fused_narrow, _fused_wide],
    100: [_fused_narrow, _fused_wide], 120: [_fused_narrow],
}  # fmt: skip

# Datasheet rates of the usual chip of each architecture: dense 16-bit matrix FLOP/s with fp32 sums, and bytes/s.
RATES = {
    75: (65e12, 0.32e12), 80: (312e12, 2.0e12), 86: (125e12, 0.6e12), 89: (362e12, 0.86e12), 90: (989e12, 3.35e12),
    100: (2250e12, 8.0e12), 120: (209e12, 1.79e12),
}  # fmt: skip


def has_row(op: str, arch: int, **shape: Any) -> bool:
    try:
        choose(op, arch, **shape)
    except ValueError:
        return False
    return True


def choose(op: str, arch: int, **shape: Any) -> Config:
    """The configuration of `op` for these sizes on compute capability `arch` (0 for the interpreter).

    An architecture without rows takes those of the nearest lower one that has some.

    Raises:
        ValueError: no row fits.
    """
    rows = TABLE[op]
    known = [listed for listed in rows if listed <= arch and (listed == 0) == (arch == 0)]
    if not known:
        raise ValueError(f"{op} has no configuration for compute capability {arch}; listed: {sorted(rows)}")
    for row in rows[max(known)]:
        if row.when(shape):
            return row.config
    raise ValueError(f"{op} has no configuration for {shape} on compute capability {arch}")


# ---- memory-bound operators and attention over frames ----------------------------------------------------------------

TABLE["denoise_step"] = {
    0: [Row(Config({"BLOCK": 64}, 1, 1))],
    75: [Row(Config({"BLOCK": 1024}, 4, 1))],
}
_tiles = [  # whole tiles where the channels allow
    Row(Config({"BLOCK_S": 32, "BLOCK_C": 128}, 4, 1), lambda shape: shape["C"] % 128 == 0),
    Row(Config({"BLOCK_S": 64, "BLOCK_C": 64}, 4, 1), lambda shape: shape["C"] > 32),
    Row(Config({"BLOCK_S": 128, "BLOCK_C": 32}, 4, 1), lambda shape: shape["C"] > 8),
    Row(Config({"BLOCK_S": 512, "BLOCK_C": 8}, 4, 1)),
]
TABLE["temporal_shift"] = {0: [Row(Config({"BLOCK_S": 4, "BLOCK_C": 16}, 1, 1))], 75: _tiles}
TABLE["groupnorm_silu"] = {0: [Row(Config({"BLOCK_S": 8, "BLOCK_C": 16}, 1, 1))], 75: _tiles}
TABLE["geglu"] = {
    0: [Row(Config({"BLOCK_S": 8, "BLOCK_C": 32}, 1, 1))],
    75: [Row(Config({"BLOCK_S": 16, "BLOCK_C": 128}, 4, 1))],
}
TABLE["layer_norm"] = {  # whole tokens: BLOCK_C is C, rounded up
    0: [Row(Config({"BLOCK_S": 4}, 1, 1))],
    75: [
        Row(Config({"BLOCK_S": 8}, 4, 1), lambda shape: shape["C"] <= 512),
        Row(Config({"BLOCK_S": 4}, 4, 1), lambda shape: shape["C"] <= 1024),
        Row(Config({"BLOCK_S": 2}, 4, 1), lambda shape: shape["C"] <= 2048),
        Row(Config({"BLOCK_S": 1}, 8, 1)),
    ],
}


def _fills(block: int) -> Callable[[dict[str, Any]], bool]:
    """Whole sequences of T frames fill at least three quarters of `block` rows, or no larger tile would hold more."""
    return lambda shape: shape["T"] <= block and (block // shape["T"]) * shape["T"] >= 0.75 * block


def _float32_and(when: Callable[[dict[str, Any]], bool]) -> Callable[[dict[str, Any]], bool]:
    return lambda shape: shape["dtype"] == torch.float32 and when(shape)


def _attention(block: int, num_warps: int, matrix: bool = True) -> Config:
    return Config({"BLOCK_M": block, "MATRIX": matrix}, num_warps, 1)


_by_rows = [  # one key frame after the other, where there is no matrix instruction
    Row(_attention(32, 4, False), _fills(32)),
    Row(_attention(64, 8, False), _fills(64)),
    Row(_attention(128, 16, False)),
]
TABLE["temporal_attention"] = {
    0: [
        Row(_attention(32, 1, False), lambda shape: shape["dtype"] == torch.float32 and shape["T"] <= 32),
        Row(_attention(128, 1, False), lambda shape: shape["dtype"] == torch.float32),
        Row(_attention(16, 1), lambda shape: shape["T"] <= 8),
        Row(_attention(64, 1), lambda shape: shape["T"] <= 32),
        Row(_attention(128, 1)),
    ],
    75: _by_rows,
    80: [
        *(Row(row.config, _float32_and(row.when)) for row in _by_rows),
        Row(_attention(64, 4), _fills(64)),
        Row(_attention(128, 8)),
    ],
}
