"""T5 or CLIP from a local transformers folder, run by the library transformers."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pylumiere.errors import BundleError
from pylumiere.networks.text.encoder import warn_if_cut


class TransformersEncoder:
    """T5 (encoder half) or CLIP (text half) from a local transformers folder; the last hidden state."""

    def __init__(self, kind: str, folder: Path, max_length: int):
        if not (folder / "config.json").is_file():
            raise BundleError(f"{kind} text encoder: {folder} has no config.json; give a local transformers folder")
        auto_tokenizer, model_class = _import_transformers(kind)
        self.name = f"{kind}:{folder}"
        self.max_length = max_length
        try:
            self._tokenizer = auto_tokenizer.from_pretrained(folder, local_files_only=True)
            self._model = model_class.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BundleError(f"{kind} text encoder: {folder} cannot be loaded: {reason}") from error
        self._model.requires_grad_(False)
        self.width = self._model.config.hidden_size
        positions = getattr(self._model.config, "max_position_embeddings", None)
        if positions is not None and max_length > positions:
            raise BundleError(f"{kind} text encoder: text length {max_length} is above the model's {positions}")

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings, masks = [], []
        for prompt in prompts:
            # Called per prompt with explicit arguments: a fast tokenizer's padding state is shared between threads.
            ids = self._tokenizer(prompt, truncation=False, padding=False)["input_ids"]
            warn_if_cut(prompt, len(ids) > self.max_length, self.max_length)
            if len(ids) > self.max_length:
                ids = [*ids[: self.max_length - 1], ids[-1]]  # the end token stays: CLIP and T5 were trained with it
            pad = self._tokenizer.pad_token_id or 0
            if not ids:  # a tokenizer without special tokens, and the empty prompt
                ids = [pad]
            mask = torch.arange(self.max_length)[None] < len(ids)
            tokens = torch.tensor([ids + [pad] * (self.max_length - len(ids))])
            hidden = self._model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
            embeddings.append(hidden.float())
            masks.append(mask)
        return torch.cat(embeddings), torch.cat(masks)


def _import_transformers(kind: str):
    """The tokenizer class and the model class of an encoder, from transformers.

    transformers looks for an optional package named `kernels`. When Python runs in our repository, our source folder
    of that name would be found and refuse to be imported, so the name is hidden meanwhile.
    """
    is_hidden = "kernels" not in sys.modules
    if is_hidden:
        sys.modules["kernels"] = None
    try:
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"text encoder {kind!r} needs the package transformers: pip install transformers") from None
    finally:
        if is_hidden:
            del sys.modules["kernels"]
    return AutoTokenizer, {"t5": T5EncoderModel, "clip": CLIPTextModel}[kind]
