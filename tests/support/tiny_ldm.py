"""A tiny pipeline's weights under the names of the original Stable Diffusion code: diffusers' translation, inverted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def ldm_tensors(pipeline) -> dict[str, Tensor]:
    """All three networks of a pipeline of `tiny_diffusers`. Of SD 2's kind if its U-Net has linear projections."""
    unet, vae, text = (_public(module) for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in _unet(unet, pipeline.unet.config).items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in _vae(vae).items()}
    if pipeline.unet.config.use_linear_projection:
        tensors |= {f"cond_stage_model.model.{name}": tensor for name, tensor in _open_clip(text).items()}
    else:
        tensors |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.items()}
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["alphas_cumprod"], tensors["model_ema.decay"] = torch.ones(1000), torch.ones(())
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _public(module) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items()}


def _replaced(name: str, pairs: Mapping[str, str]) -> str:
    for ours, theirs in pairs.items():
        name = name.replace(ours, theirs)
    return name


def _unet(state: Mapping[str, Tensor], config) -> dict[str, Tensor]:
    """By the tree of blocks; the numbers of blocks are counted as the original code appends them."""
    rooms = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
             "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
             "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
    levels, layers = len(config.block_out_channels), config.layers_per_block
    number = 1
    for level in range(levels):
        for layer in range(layers):
            rooms[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            rooms[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if level < levels - 1:
            rooms[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for level in range(levels):
        for layer in range(layers + 1):
            rooms[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            rooms[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        with_attention = config.up_block_types[level].startswith("CrossAttn")
        rooms[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{1 + with_attention}.conv"
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
             "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
    return _moved(state, rooms, lambda room, rest: _replaced(rest, inner) if ".resnets." in room else rest)


def _vae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention as 1 x 1 convolutions, and the decoder's levels counted from the other end."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks."))
    rooms = {}
    for side, blocks, inner in (("encoder", "down_blocks", "down"), ("decoder", "up_blocks", "up")):
        rooms |= {f"{side}.conv_norm_out": f"{side}.norm_out", f"{side}.mid_block.resnets.0": f"{side}.mid.block_1",
                  f"{side}.mid_block.resnets.1": f"{side}.mid.block_2",
                  f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1"}  # fmt: skip
        for level in range(levels):
            place = level if side == "encoder" else levels - 1 - level
            for layer in range(4):
                rooms[f"{side}.{blocks}.{level}.resnets.{layer}"] = f"{side}.{inner}.{place}.block.{layer}"
            rooms[f"{side}.{blocks}.{level}.{inner}samplers.0"] = f"{side}.{inner}.{place}.{inner}sample"
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    moved = _moved(
        state,
        rooms,
        lambda room, rest: _replaced(rest, attention if ".attentions." in room else {"conv_shortcut": "nin_shortcut"}),
    )
    is_matrix = {name for name, tensor in moved.items() if ".attn_1." in name and tensor.ndim == 2}
    return {name: tensor[:, :, None, None] if name in is_matrix else tensor for name, tensor in moved.items()}


def _moved(
    state: Mapping[str, Tensor], rooms: Mapping[str, str], inside: Callable[[str, str], str]
) -> dict[str, Tensor]:
    moved = {}
    for name, tensor in state.items():
        room = next((room for room in rooms if name.startswith(room + ".")), None)
        rest = name if room is None else name.removeprefix(room)
        moved[(rooms[room] if room else "") + inside(room or "", rest)] = tensor
    assert len(moved) == len(state)
    return moved


def _open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v as one, and a last layer that Stable Diffusion 2 does not use."""
    pairs = {"encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
             "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
             "final_layer_norm": "ln_final", "embeddings.token_embedding": "token_embedding",
             "embeddings.position_embedding.weight": "positional_embedding"}  # fmt: skip
    found = {_replaced(name, pairs): tensor for name, tensor in state.items() if "_proj." not in name or "out_" in name}
    for name, tensor in state.items():
        if ".q_proj." in name:
            together = torch.cat([tensor, *(state[name.replace("q_proj", part)] for part in ("k_proj", "v_proj"))])
            packed = _replaced(name, {"self_attn.q_proj.": "attn.in_proj_", **pairs})
            found[packed] = together
    width = state["final_layer_norm.weight"].numel()
    found["text_projection"], found["logit_scale"] = torch.eye(width), torch.ones(())
    found["transformer.resblocks.23.ln_1.weight"] = torch.ones(width)
    return found
