"""What a text encoder is, and tokenizers set to one fixed length."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from pylumiere.errors import BundleError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger("pylumiere")


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
