"""Stable Diffusion folders of a million weights, made and saved by diffusers itself: the oracle of what is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

BYTES = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
MERGES = ("a n", "an d</w>", "d o", "do g</w>", "c a", "ca t</w>")


def write_tiny_sd(
    folder: Path,
    *,
    sd2: bool = False,
    decoder: str = "kl",
    sharded: bool = False,
    variant: str | None = None,
    safe: bool = True,
    seed: int = 0,
    unet_extra: dict[str, Any] | None = None,
):
    """Saves a pipeline whose every weight counts (none is left at 0 or 1) and returns it.

    The U-Net has latents of 8 x 8 and a text width of 32, the pictures are 16 x 16.

    Args:
        sd2: like SD 2.1: v_prediction, heads per level, linear projections, the padding token "!".
        decoder: "kl" (AutoencoderKL) or "tiny" (AutoencoderTiny).
        sharded: weights in shards of at most 200 kB, with an index.
        variant: "fp16" saves 16-bit weights under that name.
        safe: False saves pickles, under the names of old folders.
        unet_extra: fields added to unet/config.json, such as `temporal_shift` and `num_frames`.
    """
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(folder / "tokenizer", pad_token="!" if sd2 else "<|endoftext|>")
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = (
        DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
        if sd2
        else PNDMScheduler(**schedule, skip_prk_steps=True)
    )
    pipeline = StableDiffusionPipeline(
        vae=shaken(tiny_vae(decoder)),
        text_encoder=shaken(tiny_clip(len(tokenizer), sd2=sd2)),
        tokenizer=tokenizer,
        unet=shaken(tiny_unet(sd2=sd2)),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    saved = pipeline.to(torch.float16) if variant == "fp16" else pipeline
    options = {"max_shard_size": "200KB"} if sharded else {}
    saved.save_pretrained(folder, safe_serialization=safe, variant=variant, **options)
    if not safe:  # transformers writes none any more
        (folder / "text_encoder" / "model.safetensors").unlink()
        old = {f"text_model.{name}": tensor for name, tensor in pipeline.text_encoder.state_dict().items()}
        old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        torch.save(old, folder / "text_encoder" / "pytorch_model.bin")
    edit_json(folder / "unet" / "config.json", **(unet_extra or {}))
    return pipeline.to(torch.float32)


def tiny_unet(*, sd2: bool = False):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=(2, 4) if sd2 else 2,
        use_linear_projection=sd2,
        norm_num_groups=8,
    )


def tiny_vae(kind: str = "kl"):
    from diffusers import AutoencoderKL, AutoencoderTiny

    if kind == "tiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(32, 32),
            decoder_block_out_channels=(32, 32),
            num_encoder_blocks=(1, 2),
            num_decoder_blocks=(2, 1),
        )
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=16,
    )


def tiny_clip(vocabulary: int, *, sd2: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=vocabulary,
        max_position_embeddings=77,
        hidden_act="gelu" if sd2 else "quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0 if sd2 else vocabulary - 1,
    )
    return CLIPTextModel(config).eval()


def tiny_tokenizer(folder: Path, pad_token: str = "<|endoftext|>"):
    """CLIP's tokenizer with every byte and a few merges; its vocab.json and merges.txt lie in `folder`, as in public
    folders."""
    from transformers import CLIPTokenizer

    letters = [chr(byte) for byte in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in MERGES)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in MERGES], pad_token=pad_token,
                         model_max_length=77)  # fmt: skip


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """The module with noise on its biases and norms, which start at 0 and 1, in eval mode."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return module.eval()


def edit_json(path: Path, **fields) -> None:
    """Sets fields of a JSON file; a field set to `...` is removed."""
    data = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}, indent=1))
