"""CLIP's tokenizer against transformers, from every kind of folder, and files that are not what they should be."""

from __future__ import annotations

import json
import random

import pytest
from support.clip import END, START, tokenizer_files, vocabulary

from pylumiere.errors import BundleError
from pylumiere.networks.text.clip_tokenizer import TOKENIZER_FILES, tokenizer_json
from pylumiere.networks.text.encoder import load_tokenizer

PROMPTS = [
    "a red circle moves right over grass",
    "",
    "  \t\n ",
    "Hello, World! IT'S 12345 and DON'T, we'll they've I'm he'd you're 's",
    "naïve CAFÉ Ünïcödé e\u0301 é ẞ ß ΑΣ İstanbul",
    "狗 и собака 🐶🐕‍🦺 👩‍👩‍👧 ﬁne Ⅷ ² ½ ٣",
    "a\tb\n\nc\u00a0 d\u2028e\u3000f\x85g \x00\x01\x7f",
    '!!! wow !!, 3D 4k 16:9 f/1.8 (a_b-c):1.2 [x|y] \\ "q" “q” ’s',
    f"{START}licensed{END} {START} <|EndOfText|> <|other|>",
    "license " * 100,
    "incomprehensibilities" * 20,
]


def _random_prompts(count: int) -> list[str]:
    rng = random.Random(0)
    ranges = [(32, 127), (32, 127), (1, 0x250), (0x250, 0xD800), (0xE000, 0x30000)]
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40))) for _ in range(count)]


def _write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def _read(folder):
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}


def _assert_same_ids(tokenizer, expected):
    for prompt in PROMPTS + _random_prompts(200):
        ids = expected(prompt, padding="max_length", truncation=True, max_length=77)["input_ids"]
        assert tokenizer.encode(prompt).ids == ids, ascii(prompt)


@pytest.mark.parametrize("pad", [END, "!"])
def test_ids_are_those_of_transformers(pad, tmp_path):
    """Folders as they were published, and as transformers saves them today: one tokenizer.json with bare names."""
    from transformers import CLIPTokenizerFast

    files = tokenizer_files(pad)
    oracle = CLIPTokenizerFast.from_pretrained(_write(tmp_path / "published", files))
    tokenizer = load_tokenizer(tokenizer_json(files), 77)
    _assert_same_ids(tokenizer, oracle)
    assert tokenizer.encode("").ids[2:] == [oracle.convert_tokens_to_ids(pad)] * 75

    oracle.save_pretrained(tmp_path / "saved")
    saved = _read(tmp_path / "saved")
    assert "tokenizer.json" in saved
    _assert_same_ids(load_tokenizer(tokenizer_json(saved), 77), CLIPTokenizerFast.from_pretrained(tmp_path / "saved"))


def test_ids_of_letters_alone_are_those_of_transformers(tmp_path):
    """No merges: every byte is a token, and characters that are not in the vocabulary are the unknown token."""
    from transformers import CLIPTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,'-"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), START, END]
    vocab = {token: number for number, token in enumerate(tokens)}
    files = {"vocab.json": json.dumps(vocab).encode(), "merges.txt": b"#version: 0.2\n"}
    oracle = CLIPTokenizerFast.from_pretrained(_write(tmp_path, files))
    _assert_same_ids(load_tokenizer(tokenizer_json(files), 77), oracle)


def test_the_merges_matter():
    tokens, merges = vocabulary()
    assert len(merges) > 800
    ids = load_tokenizer(tokenizer_json(tokenizer_files()), 77).encode("The licensed Licenses").ids
    assert ids[:3] == [tokens[START], tokens["the</w>"], tokens["licensed</w>"]]
    assert ids.index(tokens[END]) < 10


def test_every_byte_has_a_token():
    """The byte-level alphabet: no character of any script is unknown."""
    tokenizer = load_tokenizer(tokenizer_json(tokenizer_files()), 77)
    for prompt in _random_prompts(200):
        tokens = tokenizer.encode(prompt)
        assert END not in tokens.tokens[1 : sum(tokens.attention_mask) - 1]


def test_added_tokens_are_found_whole(tmp_path):
    """Folders with a learned word, as older and newer versions of transformers saved them."""
    from transformers import CLIPTokenizerFast

    files = tokenizer_files()
    number = len(vocabulary()[0])
    old = {"added_tokens.json": json.dumps({"<cat toy>": number}).encode()}
    settings = json.loads(files["tokenizer_config.json"])
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": False, "normalized": True}
    settings["added_tokens_decoder"] = {
        str(vocabulary()[0][END]): {**flags, "content": END, "special": True},
        str(number): {**flags, "content": "<cat toy>"},
    }
    new = {"tokenizer_config.json": json.dumps(settings).encode()}
    for index, more in enumerate((old, new)):
        oracle = CLIPTokenizerFast.from_pretrained(_write(tmp_path / str(index), files | more))
        tokenizer = load_tokenizer(tokenizer_json(files | more), 77)
        for prompt in ["a <cat toy> in grass", "<CAT \t TOY><cat toy>s", f"{END} <|ENDOFTEXT|>"]:
            expected = oracle(prompt, padding="max_length", truncation=True, max_length=77)["input_ids"]
            assert tokenizer.encode(prompt).ids == expected, prompt
        assert tokenizer.encode("a <cat toy>").ids[2] == number


def test_the_json_is_the_whole_tokenizer():
    """What a bundle keeps: the padding is in it, and it is a tokenizer's file itself."""
    data = tokenizer_json(tokenizer_files("!"))
    assert tokenizer_json({"tokenizer.json": data}) == data
    assert load_tokenizer(data, 77).encode("grass").ids[-1] == 0
    assert tokenizer_json(tokenizer_files("!")) == data


def test_the_end_token_stays_where_a_prompt_is_cut():
    tokens = load_tokenizer(tokenizer_json(tokenizer_files()), 8).encode("license " * 20)
    assert len(tokens.ids) == 8 and tokens.overflowing
    assert tokens.ids[0] == vocabulary()[0][START] and tokens.ids[-1] == vocabulary()[0][END]


def _with(**changes):
    """The files with contents replaced; None takes one away."""
    files = tokenizer_files() | {name.replace("__", "."): data for name, data in changes.items()}
    return {name: data for name, data in files.items() if data is not None}


def _without_end():
    return json.dumps({token: n for token, n in vocabulary()[0].items() if token != END}).encode()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither tokenizer.json nor vocab.json and merges.txt"),
        (_with(merges__txt=None), "neither tokenizer.json nor vocab.json and merges.txt"),
        (_with(vocab__json=b"{"), "vocab.json: Expecting property name"),
        (_with(vocab__json=b"[" * 100_000), "vocab.json: "),
        (_with(vocab__json=b"[1]"), "vocab.json is no JSON object"),
        (_with(vocab__json=b'{"a": -1}'), "the tokenizer cannot be read"),
        (_with(vocab__json=b'{"a": "b"}'), "the tokenizer cannot be read"),
        (_with(vocab__json=b"\xff\xfe\xff"), "vocab.json: "),
        (_with(vocab__json=_without_end()), r"special token '<\|endoftext\|>' is not in its vocabulary"),
        (_with(vocab__json=b" " * (4 * 2**20 + 1)), "vocab.json has 4194305 bytes; at most 4194304 are expected"),
        (_with(merges__txt=b" " * (4 * 2**20 + 1)), "merges.txt has 4194305 bytes; at most 4194304"),
        (_with(tokenizer__json=b" " * (16 * 2**20 + 1)), "tokenizer.json has 16777217 bytes; at most 16777216"),
        (_with(merges__txt=b"#version: 0.2\na b\nabc\n"), "merges.txt: line 3 is no pair of tokens: 'abc'"),
        (_with(merges__txt=b"a b c\n"), "merges.txt: line 1 is no pair"),
        (_with(merges__txt=b"zz qq\n"), "the tokenizer cannot be read: .*out of vocabulary"),
        (_with(merges__txt=b"\xff\n"), "the tokenizer cannot be read: .*decode"),
        (_with(tokenizer__json=b"{}"), "the tokenizer cannot be read"),
        (_with(tokenizer__json=b"\x00"), "the tokenizer cannot be read"),
        (_with(special_tokens_map__json=b'{"pad_token": "<pad>"}'), "special token '<pad>' is not in its vocabulary"),
        (_with(special_tokens_map__json=b'{"pad_token": {"lstrip": true}}'), "the tokenizer cannot be read: 'content'"),
        (_with(special_tokens_map__json=b'{"pad_token": 3}'), "the tokenizer cannot be read"),
        (_with(tokenizer_config__json=b'{"added_tokens_decoder": [1]}'), "the tokenizer cannot be read"),
        (_with(tokenizer_config__json=b"3"), "tokenizer_config.json is no JSON object"),
        (_with(added_tokens__json=b'{"<x>": 7}'), "added token '<x>' cannot have the number 7"),
        (_with(added_tokens__json=b'{"<x>": 1e9, "<y>": null}'), "the tokenizer cannot be read"),
        ({"spiece.model": b""}, "'spiece.model' is no file of a tokenizer; allowed: tokenizer.json, vocab.json"),
    ],
)
def test_bad_files_are_named_in_one_line(files, message):
    with pytest.raises(BundleError, match=message) as caught:
        tokenizer_json(files)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
