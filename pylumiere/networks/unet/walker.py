"""The arrangement of the public U-Nets: levels of layers on the way down, a middle, and the way up with skips.

The networks differ in what a layer holds and not in how the layers follow each other, so a network is a table of the
kinds in a layer, and a flat plan made from it that the forward pass walks.

Source: the classes UNet2DConditionModel, UNet3DConditionModel and UNetMotionModel of diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pylumiere.networks.unet.layers import Context

LISTS = {"resnet": "resnets", "transformer": "attentions"}  # by the kind of module, the name of its list in a block


class Levels(Protocol):
    """What the arrangement asks of a configuration: widths and layers, finest level first; up blocks as they run."""

    block_out_channels: Sequence[int]
    layers_per_block: Sequence[int]
    down_block_types: Sequence[str]
    up_block_types: Sequence[str]


class BlockSpec(NamedTuple):
    """One step of the walk. Kinds "push" and "concat" move the running activation to and from the stack of skips."""

    kind: str
    name: str  # of the module, as in the public layout
    level: int
    in_channels: int
    channels: int


def plan_blocks(config: Levels, layers: Mapping[bool, Sequence[str]]) -> list[BlockSpec]:
    """The blocks in the order in which they run, between `conv_in` and `conv_norm_out`.

    Args:
        layers: the kinds of module in a layer, in their order, of a block that attends to the text (True) and of one
            that does not (False). A residual block comes first.
    """
    plan: list[BlockSpec] = []
    channels, coarsest = config.block_out_channels, len(config.block_out_channels) - 1
    skips: list[int] = []
    width = channels[0]  # of the running activation

    def push(level: int) -> None:
        skips.append(width)
        plan.append(BlockSpec("push", "", level, width, width))

    def layer(block: str, j: int, level: int, in_channels: int, kinds: Sequence[str]) -> None:
        for kind in kinds:
            plan.append(BlockSpec(kind, f"{block}.{LISTS[kind]}.{j}", level, in_channels, channels[level]))
            in_channels = channels[level]

    push(0)
    for i, kind in enumerate(config.down_block_types):
        for j in range(config.layers_per_block[i]):
            layer(f"down_blocks.{i}", j, i, width, layers[kind.startswith("CrossAttn")])
            width = channels[i]
            push(i)
        if i < coarsest:
            plan.append(BlockSpec("down", f"down_blocks.{i}.downsamplers.0", i, width, width))
            push(i)
    kinds = layers[True]
    layer("mid_block", 0, coarsest, width, kinds)
    layer("mid_block", 1, coarsest, width, kinds[: kinds.index("transformer")])
    for i, kind in enumerate(config.up_block_types):
        level = coarsest - i
        for j in range(config.layers_per_block[level] + 1):
            joined = width + skips.pop()
            plan.append(BlockSpec("concat", "", level, width, joined))
            layer(f"up_blocks.{i}", j, level, joined, layers[kind.startswith("CrossAttn")])
            width = channels[level]
        if level > 0:
            plan.append(BlockSpec("up", f"up_blocks.{i}.upsamplers.0", level, width, width))
    return plan


def place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Makes `module` the submodule of this dotted name; modules that only hold others are made on the way."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(last, module)


def walk(root: nn.Module, plan: Sequence[BlockSpec], x: Tensor, context: Context) -> Tensor:
    """Runs the plan's modules, which are submodules of `root`. [B, T, H, W, C] -> [B, T, H, W, C]."""
    skips: list[Tensor] = []
    for spec in plan:
        if spec.kind == "push":
            skips.append(x)
        elif spec.kind == "concat":
            x = torch.cat([x, skips.pop()], -1)
        else:
            x = root.get_submodule(spec.name)(x, context)
    return x
