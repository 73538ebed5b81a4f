"""CLIP's text model (Radford et al. 2021), as latent U-Nets of the Stable Diffusion kind were trained with it.

A causal transformer with norms before its parts. The embedding is its last hidden state after the final norm. Those
U-Nets attend to all positions, those after the prompt's end included, so the mask is True everywhere.

The model is written out here in plain torch, because importing transformers costs seconds. Parameters have the names of
the public folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylumiere.config.fields import Config, check
from pylumiere.errors import BundleError
from pylumiere.networks.text.clip_tokenizer import tokenizer_json
from pylumiere.networks.text.encoder import encode_ids, load_tokenizer

_PREFIX = "text_model."  # transformers 5 saves without it
_ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}
_LARGEST = {
    "vocab_size": 2**20,
    "hidden_size": 2**13,
    "intermediate_size": 2**15,
    "num_hidden_layers": 2**7,
    "num_attention_heads": 2**7,
    "max_position_embeddings": 2**12,
}


@dataclass(frozen=True)
class ClipTextConfig(Config):
    """What `text_encoder/config.json` says about the network; defaults are those of transformers.

    The numbers of special tokens are not here: the tokenizer's files say them, and public config.json files are wrong
    about padding.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"  # quick_gelu | gelu
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            smallest = 2 if name == "max_position_embeddings" else 1  # a start and an end
            value = getattr(self, name)
            check(smallest <= value <= largest, f"{name} {value} is outside {smallest}..{largest}")
        check(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}",
        )
        check(
            self.hidden_act in _ACTIVATIONS,
            f"hidden_act {self.hidden_act!r} is not supported; allowed: {', '.join(_ACTIVATIONS)}",
        )
        check(0 < self.layer_norm_eps < 1, f"layer_norm_eps {self.layer_norm_eps} is outside 0..1")

    @classmethod
    def from_json(cls, data: dict) -> ClipTextConfig:
        """From the content of config.json, whose other keys say nothing about what is computed here.

        Raises:
            BundleError: another model's configuration, or a value of the wrong type or out of range; it is named.
        """
        try:
            check(isinstance(data, dict), "its configuration is no JSON object")
            kind = data.get("model_type", "clip_text_model")
            check(kind == "clip_text_model", f"model_type {kind!r} is not supported; allowed: clip_text_model")
            return cls.from_dict({f.name: data[f.name] for f in fields(cls) if f.name in data})
        except ValueError as error:
            raise BundleError(f"clip text encoder: {error}") from None


class ClipTextModel(nn.Module):
    """Token numbers [B, L] int64, L up to max_position_embeddings, to the last hidden state [B, L, D].

    Position i sees the positions up to i; there is no other mask.
    """

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.text_model = _Transformer(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.text_model(input_ids)


class _Transformer(nn.Module):
    def __init__(self, config: ClipTextConfig):
        super().__init__()
        width = config.hidden_size
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocab_size, width),
                "position_embedding": nn.Embedding(config.max_position_embeddings, width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))})
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = self.embeddings["token_embedding"](input_ids) + self.embeddings["position_embedding"].weight[:length]
        # Added to the scores rather than `is_causal`, which a graph would spell out once a layer.
        later = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        for layer in self.encoder["layers"]:
            x = layer(x, later)
        return self.final_layer_norm(x)


class _Layer(nn.Module):
    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _Mlp(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nn.Module):
    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, heads, L, D / heads]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = _ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def clip_shapes(config: ClipTextConfig) -> dict[str, tuple[int, ...]]:
    """Name, as in public folders, and shape of every tensor of the model, without allocating it."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in ClipTextModel(config).state_dict().items()}


def fit_clip_weights(config: ClipTextConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors in their dtypes, by their public names, of a checkpoint with or without that prefix.

    What else is there is left out: `position_ids`, `text_projection`, a vision model.

    Raises:
        BundleError: tensors that are missing, of another shape, or not of real numbers; the first few are named.
    """
    shapes = clip_shapes(config)
    found = {_PREFIX + name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
    both = [(name, found[name]) for name in shapes if name in found]
    problems = {
        "missing": [name for name in shapes if name not in found],
        "wrong shape": [
            f"{name} {list(t.shape)} (expected {list(shapes[name])})" for name, t in both if t.shape != shapes[name]
        ],
        "wrong dtype": [f"{name} {t.dtype}" for name, t in both if not t.is_floating_point()],
    }
    texts = [f"{problem} {_first_few(names)}" for problem, names in problems.items() if names]
    if texts:
        raise BundleError(f"clip text encoder: the weights do not fit its configuration: {'; '.join(texts)}")
    return dict(both)


class ClipTextEncoder:
    """CLIP's text model and tokenizer from the parts of a diffusers folder or a bundle.

    Args:
        config: of `text_encoder/config.json`.
        tokenizer: contents by name of those files of `tokenizer/` that `clip_tokenizer.TOKENIZER_FILES` lists; or
            `{"tokenizer.json": ...}` alone, as `clip_tokenizer.tokenizer_json` writes it.
        weights: of `text_encoder/`, in any floating-point dtype; computed with in float32. See `fit_clip_weights`.

    Raises:
        BundleError: a part that is malformed, or parts that do not fit each other.
    """

    name = "clip"

    def __init__(self, config: ClipTextConfig, tokenizer: Mapping[str, bytes], weights: Mapping[str, Tensor]):
        self.max_length = config.max_position_embeddings
        self.width = config.hidden_size
        self._tokenizer = load_tokenizer(tokenizer_json(tokenizer), self.max_length)
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        if largest >= config.vocab_size:
            raise BundleError(
                f"clip text encoder: the tokenizer has a token {largest}, the model only {config.vocab_size} tokens"
            )
        with torch.device("meta"):
            self.model = ClipTextModel(config)
        fitting = {name: tensor.float() for name, tensor in fit_clip_weights(config, weights).items()}
        self.model.load_state_dict(fitting, assign=True)
        self.model.eval().requires_grad_(False)

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """See `TextEncoder.encode`. The mask is True everywhere."""
        rows = [self._encode_one(prompt) for prompt in prompts]
        return torch.cat(rows), torch.ones(len(rows), self.max_length, dtype=torch.bool)

    def _encode_one(self, prompt: str) -> Tensor:
        ids, _ = encode_ids(self._tokenizer, prompt, self.max_length)
        return self.model(torch.tensor([ids]))


def _first_few(items: Iterable[str], count: int = 3) -> str:
    items = list(items)
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more
