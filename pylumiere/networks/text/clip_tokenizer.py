"""CLIP's tokenizer: byte-level pairs, lower case, `</w>` at the end of a word, from the files of a `tokenizer/` folder.

The pipeline is that of transformers' CLIPTokenizer, built with the library tokenizers. Contents come in as bytes that
somebody has read; `TOKENIZER_FILES` says which files and how large each may be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pylumiere.errors import BundleError
from pylumiere.networks.text.encoder import readable_tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

# Bytes at most. tokenizer.json, or vocab.json and merges.txt must be there; CLIP's own have 2.2, 0.9 and 0.5 MiB.
TOKENIZER_FILES = {
    "tokenizer.json": 16 * 2**20,
    "vocab.json": 4 * 2**20,
    "merges.txt": 4 * 2**20,
    "tokenizer_config.json": 2**20,
    "special_tokens_map.json": 2**20,
    "added_tokens.json": 2**20,
}

_END = "<|endoftext|>"
_SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": _END, "unk_token": _END, "pad_token": _END}
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def tokenizer_json(files: Mapping[str, bytes]) -> bytes:
    """The tokenizer of these files as one JSON of the library tokenizers, for `encoder.load_tokenizer` or a bundle.

    It pads with the token that special_tokens_map.json or tokenizer_config.json name ("!" in Stable Diffusion 2), else
    with that of tokenizer.json, else with the end token.

    Args:
        files: contents by name, as far as they are there. The result can stand here too, as tokenizer.json alone.

    Raises:
        BundleError: files that are missing, too large, malformed, or do not fit each other.
    """
    from tokenizers import Tokenizer

    for name, data in files.items():
        limit = TOKENIZER_FILES.get(name)
        if limit is None:
            raise BundleError(f"{name!r} is no file of a tokenizer; allowed: {', '.join(TOKENIZER_FILES)}")
        if len(data) > limit:
            raise BundleError(f"{name} has {len(data)} bytes; at most {limit} are expected")
    with readable_tokenizer():
        special, added = _named_tokens(files)
        if "tokenizer.json" in files:
            tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        else:
            special = {name: _token(content) for name, content in _SPECIAL.items()} | special
            tokenizer = _from_vocabulary(files, {name: token.content for name, token in special.items()})
        _add_tokens(tokenizer, special, added)
        pad = (tokenizer.padding or {}).get("pad_token", _END)
        if "pad_token" in special:
            pad = special["pad_token"].content
        tokenizer.enable_padding(pad_id=_number(tokenizer, pad), pad_token=pad)
        return tokenizer.to_str().encode()


def _add_tokens(tokenizer: Tokenizer, special: Mapping[str, AddedToken], added: Mapping[int, AddedToken]) -> None:
    """Tokens that are found in a prompt before it is cut into words. Each must get the number that it has."""
    tokenizer.add_tokens([added[number] for number in sorted(added)])
    for number, token in added.items():
        if tokenizer.token_to_id(token.content) != number:
            raise BundleError(f"the tokenizer's added token {token.content!r} cannot have the number {number}")
    for token in special.values():
        _number(tokenizer, token.content)  # one that is not in the vocabulary would be given a new number
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}  # with flags of their own
    tokenizer.add_special_tokens([token for token in special.values() if token.content not in known])


def _from_vocabulary(files: Mapping[str, bytes], special: Mapping[str, str]) -> Tokenizer:
    """From vocab.json and merges.txt; `special` are tokens by their names in the files."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    if "vocab.json" not in files or "merges.txt" not in files:
        raise BundleError("the tokenizer has neither tokenizer.json nor vocab.json and merges.txt")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=_object(files, "vocab.json"),
            merges=_merges(files["merges.txt"]),
            end_of_word_suffix="</w>",
            unk_token=special["unk_token"],
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    start, end = ((special[name], _number(tokenizer, special[name])) for name in ("bos_token", "eos_token"))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return tokenizer


def _merges(data: bytes) -> list[tuple[str, str]]:
    """Pairs of tokens, one pair a line, under a line with the version."""
    pairs = []
    for number, line in enumerate(data.decode().split("\n"), 1):  # not splitlines: tokens hold other separators
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2:
            raise BundleError(f"merges.txt: line {number} is no pair of tokens: {line[:40]!r}")
        pairs.append(pair)
    return pairs


def _named_tokens(files: Mapping[str, bytes]) -> tuple[dict[str, AddedToken], dict[int, AddedToken]]:
    """The special tokens that the files name, by name, and tokens added to the vocabulary, by number.

    A tokenizer_config.json that lists added tokens is the whole truth; older ones stand under the two other files.
    """
    from tokenizers import AddedToken

    settings = _object(files, "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        added = {int(number): _token(token) for number, token in settings["added_tokens_decoder"].items()}
    else:
        settings |= _object(files, "special_tokens_map.json")
        added = {number: AddedToken(token) for token, number in _object(files, "added_tokens.json").items()}
    return {name: _token(settings[name]) for name in _SPECIAL if settings.get(name)}, added


def _token(value: str | dict[str, Any]) -> AddedToken:
    """A token as the files write it. A bare string is a special token, found in the prompt as it was typed."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, normalized=False, special=True)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(value["content"], **{flag: value[flag] for flag in flags if flag in value})


def _number(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise BundleError(f"the tokenizer's special token {token!r} is not in its vocabulary")
    return number


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in a file; empty where the file is not there."""
    if name not in files:
        return {}
    try:
        found = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name}: {error}") from None
    if not isinstance(found, dict):
        raise BundleError(f"{name} is no JSON object")
    return found
