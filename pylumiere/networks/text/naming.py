"""The text encoder that a model's configuration names."""

from __future__ import annotations

from pathlib import Path

from pylumiere.errors import BundleError
from pylumiere.networks.text.encoder import TextEncoder
from pylumiere.networks.text.hashing import HashEncoder
from pylumiere.networks.text.local import TransformersEncoder
from pylumiere.networks.text.minilm import MiniLMEncoder

ENCODER_NAMES = ("minilm", "t5:FOLDER", "clip:FOLDER", "hash")


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
