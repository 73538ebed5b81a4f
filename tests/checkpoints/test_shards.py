"""Weights of a component as they lie on disk: a file, a variant, shards; and what is refused in one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pylumiere.checkpoints.shards import find_weights, read_tensors
from pylumiere.errors import BundleError

STEM = "diffusion_pytorch_model"
TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2), "b.weight": torch.randn(3, 3)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def write_shards(folder, shards, places=None):
    """Shards `{file: {name: tensor}}` and their index; `places` replaces its weight_map."""
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    places = {name: file for file, tensors in shards.items() for name in tensors} if places is None else places
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def two_shards(folder, places=None):
    first, second = {name: TENSORS[name] for name in ("a.weight", "a.bias")}, {"b.weight": TENSORS["b.weight"]}
    return write_shards(folder, {"one.safetensors": first, "two.safetensors": second}, places)


def refusal(folder, shapes=SHAPES, **options) -> str:
    with pytest.raises(BundleError) as caught:
        read_tensors(folder, STEM, shapes, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def test_one_file_and_shards_hold_the_same_tensors(tmp_path):
    save_file(TENSORS, tmp_path / f"{STEM}.safetensors")
    (tmp_path / "sharded").mkdir()
    for folder in (tmp_path, two_shards(tmp_path / "sharded")):
        read = read_tensors(folder, STEM, SHAPES)
        assert list(read) == list(SHAPES) and all(torch.equal(read[name], TENSORS[name]) for name in read)


def test_full_weights_are_taken_before_a_variant(tmp_path):
    half = {name: tensor.half() for name, tensor in TENSORS.items()}
    save_file(half, tmp_path / f"{STEM}.fp16.safetensors")
    assert read_tensors(tmp_path, STEM, SHAPES)["a.bias"].dtype == torch.float16
    two_shards(tmp_path)
    assert read_tensors(tmp_path, STEM, SHAPES)["a.bias"].dtype == torch.float32


def test_what_diffusers_saves_is_read(tmp_path):
    from support.tiny_diffusers import tiny_unet

    unet = tiny_unet()
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    for i, options in enumerate(
        [{}, {"variant": "fp16"}, {"max_shard_size": "200KB"}, {"max_shard_size": "200KB", "variant": "fp16"}]
    ):
        unet.save_pretrained(tmp_path / str(i), **options)
        read = read_tensors(tmp_path / str(i), STEM, shapes)
        assert len(find_weights(tmp_path / str(i), STEM).files) == (1 if i < 2 else 18)
        assert all(torch.equal(read[name], tensor) for name, tensor in unet.state_dict().items())


def test_tensors_are_views_of_the_mapped_file(tmp_path):
    save_file(TENSORS, tmp_path / f"{STEM}.safetensors")
    read = read_tensors(tmp_path, STEM, SHAPES)
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in maps if str(tmp_path) in line]
    assert mapped
    spans = [(int(start, 16), int(end, 16)) for start, end in mapped]
    assert all(any(start <= tensor.data_ptr() < end for start, end in spans) for tensor in read.values())


def test_names_are_translated_and_other_tensors_ignored(tmp_path):
    conv = TENSORS["a.weight"].view(2, 3, 1, 1)
    save_file({"old.weight": conv, "encoder.x": torch.ones(5)}, tmp_path / f"{STEM}.safetensors")
    options = {"rename": lambda name: name.replace("old.", "a."), "ignored": ("encoder.",)}
    read = read_tensors(tmp_path, STEM, {"a.weight": (2, 3)}, **options)
    assert list(read) == ["a.weight"] and torch.equal(read["a.weight"], TENSORS["a.weight"])
    assert "unexpected encoder.x" in refusal(tmp_path, {"a.weight": (2, 3)}, rename=options["rename"])
    save_file({"old.weight": conv, "a.weight": conv.clone()}, tmp_path / f"{STEM}.safetensors")
    assert "holds a.weight under two names" in refusal(tmp_path, {"a.weight": (2, 3)}, **options)


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"a.weight": 1}, "has no weight_map"),
        ({"a.weight": "../one.safetensors"}, "names ../one.safetensors; shards are"),
        ({"a.weight": "/etc/one.safetensors"}, "names /etc/one.safetensors; shards are"),
        ({"a.weight": ".."}, "names ..; shards are"),
        ({"a.weight": "one.bin"}, "names one.bin; shards are"),
        ({"a.weight": "three.safetensors"}, "shard three.safetensors is missing"),
        ({"a.weight": "nul\0.safetensors"}, "shard nul?.safetensors is missing"),
        ({"a.weight": "one.safetensors"}, "one.safetensors holds a.bias, which"),
        (
            {"a.weight": "one.safetensors", "a.bias": "two.safetensors", "b.weight": "two.safetensors"},
            "one.safetensors holds a.bias, which diffusion_pytorch_model.safetensors.index.json places in two",
        ),
        (
            {"a.weight": "one.safetensors", "a.bias": "one.safetensors", "b.weight": "two.safetensors",
             "c.weight": "two.safetensors"},
            "lists c.weight, and no shard holds it",
        ),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_shards(tmp_path, places, text):
    assert text in refusal(two_shards(tmp_path, places))


def test_a_tensor_in_two_shards(tmp_path):
    write_shards(tmp_path, {"one.safetensors": TENSORS, "two.safetensors": {"a.bias": TENSORS["a.bias"]}})
    assert "one.safetensors holds a.bias, which" in refusal(tmp_path)


def test_an_index_that_is_no_json_or_too_large(tmp_path):
    index = tmp_path / f"{STEM}.safetensors.index.json"
    for text in ("{", "[]", "[" * 100_000):
        index.write_text(text)
        assert str(index) in refusal(tmp_path)
    with index.open("wb") as file:
        file.truncate(2**33)
    assert "has 8589934592 bytes; at most 4194304 are expected" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({**TENSORS, "a.bias": torch.ones(3)}, "wrong shape a.bias [3] (expected [2])"),
        ({**TENSORS, "a.bias": torch.ones(2).double()}, "wrong dtype a.bias F64"),
        ({**TENSORS, "a.bias": torch.ones(2, dtype=torch.int8)}, "wrong dtype a.bias I8"),
        ({**TENSORS, "a.bias": torch.tensor([1, torch.nan])}, "NaN or infinity in a.bias"),
        ({**TENSORS, "a.bias": torch.tensor([1, torch.inf])}, "NaN or infinity in a.bias"),
        ({**TENSORS, "line\nbreak": torch.ones(1)}, "unexpected line?break"),
        ({**TENSORS, "x" * 500: torch.ones(1)}, "unexpected " + "x" * 120 + "..."),
        ({"a.weight": TENSORS["a.weight"]}, "missing a.bias, b.weight"),
        ({**TENSORS, "more": torch.ones(1000, 1000)}, "bytes; at most"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, tensors, text):
    save_file(tensors, tmp_path / f"{STEM}.safetensors")
    assert text in refusal(tmp_path)


def test_sizes_are_summed_over_the_shards_before_one_is_read(tmp_path):
    """Each shard alone is small enough, and neither is a safetensors file."""
    two_shards(tmp_path)
    shapes = {"a": (1000, 1000)}
    for name in ("one", "two"):
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            file.truncate(3_000_000)
    assert "the shards of" in (text := refusal(tmp_path, shapes)) and "have 6000000 bytes" in text


@pytest.mark.parametrize("length", [100 * 2**20, 2**62, 2**64 - 1])
def test_a_header_that_claims_to_be_huge_is_not_parsed(tmp_path, length):
    path = tmp_path / f"{STEM}.safetensors"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(110 * 2**20)
    shapes = {"a": (6000, 5000)}
    assert f"says that its header has {length} bytes" in refusal(tmp_path, shapes)


def test_a_truncated_file(tmp_path):
    path = tmp_path / f"{STEM}.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    for data in (b"", b"text", whole[:-5], whole[:20], b"PK\x03\x04" + bytes(60)):
        path.write_bytes(data)
        refusal(tmp_path)


class _Opened:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "unet.pt", "pytorch_model.bin"])
def test_pickles_are_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(_Opened()))
    assert f"has only pickled weights ({name})" in (text := refusal(tmp_path)) and "`pylumiere import`" in text
    save_file(TENSORS, tmp_path / f"{STEM}.safetensors")
    assert read_tensors(tmp_path, STEM, SHAPES)


def test_nothing_there(tmp_path):
    assert f"has no {STEM}.safetensors" in refusal(tmp_path)
    assert "is not a folder" in refusal(tmp_path / "none")
    (tmp_path / f"{STEM}.safetensors").mkdir()
    assert "is not a file" in refusal(tmp_path)


def test_links_may_not_leave_the_folder(tmp_path):
    model, other = tmp_path / "model", tmp_path / "other"
    for folder in (model / "unet", other):
        folder.mkdir(parents=True)
    save_file(TENSORS, other / "weights")
    link = model / "unet" / f"{STEM}.safetensors"
    link.symlink_to(other / "weights")
    assert "is a link out of the folder" in refusal(model / "unet", root=model)
    link.unlink()
    two_shards(model / "unet")
    (model / "unet" / "two.safetensors").unlink()
    (model / "unet" / "two.safetensors").symlink_to(other / "weights")
    assert "is a link out of the folder" in refusal(model / "unet", root=model)


def test_links_of_hugging_face_s_cache_are_followed(tmp_path):
    blobs, unet = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0123" / "unet"
    for folder in (blobs, unet):
        folder.mkdir(parents=True)
    save_file(TENSORS, blobs / "abc")
    (unet / f"{STEM}.safetensors").symlink_to("../../../blobs/abc")
    read = read_tensors(unet, STEM, SHAPES, root=unet.parent)
    assert torch.equal(read["b.weight"], load_file(blobs / "abc")["b.weight"])
