"""What a text encoder is, which one a model's configuration names, and tokenizers set to one fixed length."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from pylumiere.errors import BundleError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
            embeddings [N, L, D] float32 and mask [N, L] bool, on the CPU; the mask is True where a network attends: at
            the prompt's tokens, at least one of them per prompt (the empty prompt included), or everywhere where
            networks were trained so (`clip.py`). Longer prompts are cut at L tokens.
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
    # Here, because they import this file.
    from pylumiere.networks.text.hashing import HashEncoder
    from pylumiere.networks.text.local import TransformersEncoder
    from pylumiere.networks.text.minilm import MiniLMEncoder

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


def load_tokenizer(data: bytes, max_length: int) -> Tokenizer:
    """A tokenizer from its JSON, set to one fixed length: longer prompts are cut, their end token stays. Shorter ones
    are filled with the token that the JSON pads with, or with token 0.

    Raises:
        BundleError: it is no tokenizer's JSON.
    """
    from tokenizers import Tokenizer

    with readable_tokenizer():
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(length=max_length, pad_id=(tokenizer.padding or {}).get("pad_id", 0))
    return tokenizer


@contextlib.contextmanager
def readable_tokenizer() -> Iterator[None]:
    """Turns what the library tokenizers raises, plain Exceptions, into a BundleError of one line."""
    try:
        yield
    except BundleError:
        raise
    except Exception as error:
        raise BundleError(f"the tokenizer cannot be read: {' '.join(str(error).split())[:200]}") from None


def encode_ids(tokenizer: Tokenizer, prompt: str, max_length: int) -> tuple[list[int], list[int]]:
    """Token numbers and mask (1 at the prompt's tokens) of one prompt, by a tokenizer of `load_tokenizer`."""
    tokens = tokenizer.encode(prompt)
    warn_if_cut(prompt, bool(tokens.overflowing), max_length)
    return tokens.ids, tokens.attention_mask


def warn_if_cut(prompt: str, is_cut: bool, max_length: int) -> None:
    if is_cut:
        start = prompt[:40] + ("..." if len(prompt) > 40 else "")
        logger.warning("prompt %r is longer than %d tokens; the rest is not used", start, max_length)
