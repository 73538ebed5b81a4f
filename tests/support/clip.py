"""A small tokenizer of CLIP's kind, with merges learned from our licence."""

from __future__ import annotations

import functools
import json
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
_LETTERS = "Naïve cafés, 狗 и собака, Ünïcödé 🐶 don't we'll it's they've I'm he'd you're. " * 4


@functools.cache
def vocabulary(size: int = 1500) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Numbers of tokens, and merges in their order. As OpenAI's: bytes, bytes that end a word, merges, START, END."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    text = (Path(__file__).parents[2] / "LICENSE").read_text() + _LETTERS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=size, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    merges = tuple(tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def tokenizer_files(pad: str = END) -> dict[str, bytes]:
    """The files of `tokenizer/` in public folders of Stable Diffusion 1 (which pads with END) and 2 (with "!")."""
    tokens, merges = vocabulary()
    special = {
        name: {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for name, content in (("bos_token", START), ("eos_token", END), ("unk_token", END))
    }
    settings = {name: {"__type": "AddedToken", **token} for name, token in special.items()}
    settings |= {"do_lower_case": True, "model_max_length": 77, "pad_token": END, "tokenizer_class": "CLIPTokenizer"}
    return {
        "vocab.json": json.dumps(tokens).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""]).encode(),
        "special_tokens_map.json": json.dumps(special | {"pad_token": pad}).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
