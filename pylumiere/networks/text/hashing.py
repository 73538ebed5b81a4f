"""Words hashed to vectors: an encoder without a model."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from pylumiere.errors import BundleError
from pylumiere.networks.text.encoder import warn_if_cut


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
            warn_if_cut(prompt, len(words) > self.max_length, self.max_length)
            for column, word in enumerate(words[: self.max_length]):
                embeddings[row, column] = self._vector(f"{column}:{word}")
                mask[row, column] = True
        return torch.from_numpy(embeddings), torch.from_numpy(mask)

    def _vector(self, word: str) -> np.ndarray:
        """[D], uniform with mean 0 and variance 1."""
        bits = np.frombuffer(hashlib.shake_128(word.encode()).digest(4 * self.width), "<u4")
        return ((bits >> 8).astype(np.float64) * 2.0**-23 - 1.0) * 3.0**0.5
