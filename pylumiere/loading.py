"""From a source to what runs: a shipped name, a model folder, a folder as diffusers saves it, or a bundle.

Nothing of a network's definition is imported for a bundle whose artefacts run it.
"""

from __future__ import annotations

import functools
import json
import logging
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylumiere.backends.artefacts import Selection, choose_from_bundle
from pylumiere.backends.choice import Choice, choose
from pylumiere.checkpoints.bundle import Bundle, is_bundle, open_bundle
from pylumiere.checkpoints.diffusers import DiffusersFolder, is_diffusers_folder, read_diffusers_folder
from pylumiere.checkpoints.native import (
    MAX_CONFIG_BYTES,
    SHIPPED,
    Checkpoint,
    find_model,
    load_checkpoint,
    read_config,
    read_weights,
)
from pylumiere.config import ModelConfig, TemporalShiftConfig
from pylumiere.errors import BundleError, InvalidRequest, one_line
from pylumiere.networks.text import HashEncoder, MiniLMEncoder, TextEncoder
from pylumiere.networks.text.clip import ClipTextConfig, ClipTextEncoder

if TYPE_CHECKING:
    from pylumiere.backends.torch import TorchBackend

logger = logging.getLogger("pylumiere")


class BundleModel:
    """A bundle and what was chosen from it: to an engine, the same as a `Checkpoint`."""

    def __init__(self, bundle: Bundle, selection: Selection):
        self.bundle, self.selection = bundle, selection
        self.config, self.folder = bundle.config, bundle.path

    @functools.cached_property
    def parameters(self) -> int:
        """Values in all networks, from the headers of their safetensors files."""
        return sum(_count_values(name, self.bundle.read(name)) for name in self.bundle.manifest.weights.values())

    @property
    def facts(self) -> dict[str, Any]:
        """What was chosen and what was not, for `Engine.info`."""
        manifest = self.bundle.manifest
        return {
            "bundle": {
                "created_by": manifest.created_by,
                "signature": _signature(self.bundle),
                "artefacts": {
                    stage: {"name": a.name, "target": a.target.label, "precision": a.precision,
                            "library": f"{a.library.name} {a.library.version}"}
                    for stage, a in self.selection.artefacts.items()
                },
                "passed_over": dict(self.selection.passed_over),
            }
        }  # fmt: skip

    def checkpoint(self) -> Checkpoint:
        """The networks' weights, for PyTorch and our kernels."""
        bundle, weights = self.bundle, self.bundle.manifest.weights

        def network(name: str, config) -> dict:
            return read_weights(bundle.path / weights[name], config, bundle.read(weights[name]))

        return Checkpoint(bundle.path, self.config, {n: network(n, c) for n, c in self.config.networks.items()})

    def text_encoder(self) -> TextEncoder:
        """The bundle's text encoder: its graph or its weights, as was chosen.

        Raises:
            BundleError: neither can be used here.
        """
        text, length = self.bundle.manifest.text, self.config.text_tokens
        if text.kind == "hash":
            return HashEncoder(length, text.width)
        if "text" in self.selection.artefacts:
            from pylumiere.backends.onnxruntime import OnnxTextEncoder

            return OnnxTextEncoder(self.bundle, self.selection.artefacts["text"])
        if text.kind == "minilm" and text.weights is not None:
            return MiniLMEncoder(length, self.bundle.read(text.tokenizer), self.bundle.read(text.weights))
        if text.kind == "clip" and text.weights is not None:
            return clip_encoder(self.bundle)
        raise BundleError(
            f"{self.folder}: its {text.kind} text encoder is an ONNX graph; install ONNX Runtime "
            "(pip install onnxruntime)"
        )


def clip_config(bundle: Bundle) -> ClipTextConfig:
    """The configuration of a bundle's CLIP.

    Raises:
        BundleError: it is malformed, or not what the manifest says.
    """
    text, length = bundle.manifest.text, bundle.config.text_tokens
    if (size := bundle.manifest.files[text.config].size) > MAX_CONFIG_BYTES:
        raise BundleError(f"{bundle.path}: {text.config} has {size} bytes; at most {MAX_CONFIG_BYTES} are read")
    raw = bundle.read(text.config)
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{bundle.path}: {text.config}: {one_line(error)}") from None
    config = ClipTextConfig.from_json(fields)
    if (config.hidden_size, config.max_position_embeddings) != (text.width, length):
        raise BundleError(
            f"{bundle.path}: {text.config} is of {config.max_position_embeddings} tokens of width "
            f"{config.hidden_size}; the manifest says {length} of width {text.width}"
        )
    return config


def clip_encoder(bundle: Bundle) -> ClipTextEncoder:
    """CLIP from the parts in a bundle.

    Raises:
        BundleError: a part that is malformed, or does not fit the others.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    text, config = bundle.manifest.text, clip_config(bundle)
    stored = bundle.read(text.weights)
    try:
        weights = load(stored)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(f"{bundle.path}: {text.weights} is no safetensors file: {one_line(error)}") from None
    return ClipTextEncoder(config, {"tokenizer.json": bundle.read(text.tokenizer)}, weights)


Model = Checkpoint | DiffusersFolder | BundleModel


def load_model(
    source: str | PathLike,
    backend: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    trusted_key: Any = None,
    temporal_shift: Any = None,
) -> tuple[Model, Choice]:
    """Finds a model, checks it, and chooses what runs it.

    Args:
        source: a shipped name, a model folder, a folder as diffusers saves it, or a bundle.
        backend, device, precision: "auto" or a wish; see `choice.choose`.
        trusted_key: an Ed25519 public key, or its PEM file; a source that does not carry its signature is refused.
        temporal_shift: for a folder as diffusers saves it: see `shift_config`.

    Raises:
        InvalidRequest: a temporal shift that is none, or for a model that has its own.
        BundleError: the model cannot be read, or (IntegrityError) is not what it should be.
        UnsupportedDevice: what was asked for cannot run here.
    """
    shift = shift_config(temporal_shift)
    if str(source) not in SHIPPED and is_diffusers_folder(source) and trusted_key is None:
        folder = read_diffusers_folder(source, temporal_shift=shift)
        return folder, choose(backend, device, precision)
    if shift is not None:
        raise InvalidRequest(f"temporal_shift: model {str(source)!r} is no folder with a model_index.json, and only "
                             "those can be given one")  # fmt: skip
    if str(source) not in SHIPPED and is_bundle(source):
        bundle = open_bundle(source, trusted_key)
        choice, selection = choose_from_bundle(bundle.manifest, backend, device, precision)
        return BundleModel(bundle, selection), choice
    if trusted_key is not None:
        raise BundleError(f"model {str(source)!r} is no bundle, and only a bundle can be signed; drop the trusted key")
    choice = choose(backend, device, precision)
    return load_checkpoint(find_model(source)), choice


def read_model_config(
    source: str | PathLike, trusted_key: Any = None, temporal_shift: Any = None, *, check_hashes: bool = True
) -> ModelConfig:
    """What a model is, without its weights. Arguments and errors are those of `load_model`; the hashes of a bundle's
    files may be left to who reads them."""
    if str(source) not in SHIPPED and is_diffusers_folder(source):
        return read_diffusers_folder(source, temporal_shift=shift_config(temporal_shift)).config
    if str(source) not in SHIPPED and is_bundle(source):
        return open_bundle(source, trusted_key, check_hashes=check_hashes).config
    return read_config(find_model(source))


def shift_config(value: Any) -> TemporalShiftConfig | None:
    """A temporal shift from what a caller gives: None, the number by which channels are divided (8 shifts an eighth
    each way), or an object such as {"div": 8, "direction": "both", "pad": "zero"}.

    Raises:
        InvalidRequest: anything else.
    """
    if value is None or isinstance(value, TemporalShiftConfig):
        return value
    try:
        if isinstance(value, bool) or not isinstance(value, (int, dict)):
            raise ValueError(f"should be a number such as 8, or an object, not {type(value).__name__}")
        return TemporalShiftConfig.from_dict(value if isinstance(value, dict) else {"div": value})
    except ValueError as error:
        raise InvalidRequest(f"temporal_shift: {str(error).removeprefix('temporal_shift: ')}") from None


def make_backend(model: Model, choice: Choice) -> TorchBackend:
    """What runs a model's networks: a TorchBackend, or something with the same methods."""
    if choice.backend == "onnxruntime":
        from pylumiere.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(model.bundle, model.selection.artefacts, choice)
    if choice.backend in ("tensorrt", "tensorrt_rtx"):
        from pylumiere.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(model.bundle, model.selection.artefacts, choice)
    checkpoint = model if isinstance(model, Checkpoint) else model.checkpoint()
    if choice.backend == "triton":
        from pylumiere.backends.triton import TritonBackend

        return TritonBackend(checkpoint, choice)
    from pylumiere.backends.torch import TorchBackend

    return TorchBackend(checkpoint, choice)


def _signature(bundle: Bundle) -> str:
    if bundle.is_trusted:
        return "the trusted key's"
    return "there, not checked (no trusted key was given)" if bundle.is_signed else "none"


def _count_values(name: str, data: bytes) -> int:
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        shapes = [entry["shape"] for key, entry in header.items() if key != "__metadata__"]
        return sum(functools.reduce(lambda a, b: a * b, shape, 1) for shape in shapes)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BundleError(f"{Path(name).name} is no safetensors file") from None
