"""Bundles that are wrong in one known way each, for tests and for `benchmarks/fuzz_bundle.py`.

Every mutation leaves a bundle that must be refused. Where a change keeps the manifest valid (another letter in a name),
only a signature can tell; such mutations say that they need the trusted key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from pylumiere.checkpoints.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    Artefact,
    Library,
    Manifest,
    Receipt,
    ShapeRange,
    Target,
    TensorSpec,
    TextEncoder,
    describe_files,
    make_key_pair,
    write_manifest,
)
from pylumiere.networks.stunet.presets import model_preset

MUTATIONS: dict[str, tuple[Callable, bool]] = {}
_BAD_PATHS = (
    "../base.onnx", "onnx/../../base.onnx", "/etc/passwd", "//etc/passwd.json", "onnx//base.onnx", "./onnx/base.onnx",
    "onnx/./base.onnx", "onnx\\base.onnx", "C:/base.onnx", "~/base.onnx", "onnx/base.onnx\0.json",
    "onnx/..base/.onnx",
    "", "onnx/", "manifest.json", "manifest.sig", "ünïcode.onnx", "a" * 300 + ".onnx", "/".join("a" * 12) + ".onnx",
    "onnx/base.pkl", "onnx/base.pt", "onnx/base", ".hidden.onnx", "onnx/base.onnx ", "onnx/%2e%2e/base.onnx",
    "\u202e.onnx",
)  # fmt: skip


def mutation(function: Callable) -> Callable:
    """Registers a mutation that is refused even without a key."""
    MUTATIONS[function.__name__] = (function, False)
    return function


def mutation_against_key(function: Callable) -> Callable:
    """Registers a mutation that only the signature may reveal."""
    MUTATIONS[function.__name__] = (function, True)
    return function


def write_sample(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A small signed bundle with an artefact of every kind, of random bytes; and its public key.

    No library could parse its files, which is the point: none may try before they are verified.
    """
    rng = random.Random(seed)
    bundle, config = folder / "sample.plm", model_preset("tiny")
    names = ["model/base.safetensors", "model/ssr.safetensors", "onnx/base.onnx", "onnx/base.data", "onnx/ssr.onnx",
             "engines/sm_89/base.plan", "kernels/sm_90/index.json", "kernels/sm_90/a.cubin",
             "text/tokenizer.json"]  # fmt: skip
    for name in names:
        path = bundle / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(1, 3000)))
    shape = ShapeRange(min=(1, 8, 16, 16, 7), opt=(1, 8, 16, 16, 7), max=(2, 8, 16, 16, 7))
    common = dict(
        precision="fp32", inputs=(TensorSpec(name="sample", dtype="fp32"),),
        outputs=(TensorSpec(name="prediction", dtype="fp32"),), profiles=({"sample": shape},),
        receipt=Receipt(build_seconds=1.5, tolerance=1e-4, layers={"total": 3}, notes=("made for tests",)),
    )  # fmt: skip
    plan = Target(sms=(89,), platform="linux-x86_64")
    onnx, rtx = Library(name="onnx", version="1.0"), Library(name="tensorrt_rtx", version="1.7.1.116")
    artefacts = (
        Artefact(name="onnx-base", kind="onnx", backend="onnxruntime", stage="base", target=Target(), library=onnx,
                 files=("onnx/base.onnx", "onnx/base.data"), **common),
        Artefact(name="onnx-ssr", kind="onnx", backend="onnxruntime", stage="ssr", target=Target(), library=onnx,
                 files=("onnx/ssr.onnx",), **common),
        Artefact(name="plan-base", kind="plan", backend="tensorrt_rtx", stage="base", target=plan, library=rtx,
                 files=("engines/sm_89/base.plan",), **common),
        Artefact(name="cubins", kind="cubins", backend="triton", stage="base", target=Target(sms=(90,)),
                 library=Library(name="triton", version="3.9.0"), precision="fp32", receipt=Receipt(build_seconds=2.0),
                 files=("kernels/sm_90/index.json", "kernels/sm_90/a.cubin")),
    )  # fmt: skip
    manifest = Manifest(
        name="sample", created_by="pylumiere tests", model=config.to_dict(),
        weights={"base": names[0], "ssr": names[1]}, files=describe_files(bundle), artefacts=artefacts,
        text=TextEncoder(kind="minilm", width=32, tokenizer="text/tokenizer.json"),
    )  # fmt: skip
    make_key_pair(folder / "private.pem", folder / "public.pem")
    write_manifest(bundle, manifest, folder / "private.pem")
    return bundle, folder / "public.pem"


def mutate(bundle: Path, name: str, rng: random.Random) -> bool:
    """Applies a mutation to a bundle on disk. Returns whether a trusted key is needed to see it.

    A mutation that happens to change nothing is applied again.
    """
    function, needs_key = MUTATIONS[name]
    before = fingerprint(bundle)
    for _ in range(20):
        function(bundle, rng)
        if fingerprint(bundle) != before:
            return needs_key
    raise AssertionError(f"mutation {name} changed nothing in twenty attempts")


def fingerprint(bundle: Path) -> str:
    """Of names, kinds and contents."""
    digest = hashlib.sha256()
    for path in sorted(bundle.rglob("*")):
        digest.update(f"{path.relative_to(bundle)}|{path.lstat().st_mode}|".encode("utf-8", "surrogateescape"))
        if path.is_file() and not path.is_symlink():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@contextlib.contextmanager
def native_loaders_refused() -> Iterator[list[str]]:
    """Makes every native library that reads a bundle's files raise AssertionError; yields the names of those called."""
    import onnxruntime
    import safetensors
    import safetensors.torch
    import tokenizers
    import torch

    from pylumiere.checkpoints import native
    from pylumiere.networks.text import minilm

    called: list[str] = []

    def refuse(name: str):
        def loader(*_, **__):
            called.append(name)
            raise AssertionError(f"{name} was called")

        return loader

    targets = [
        (onnxruntime, "InferenceSession"), (safetensors, "safe_open"), (safetensors.torch, "load"),
        (safetensors.torch, "load_file"), (tokenizers, "Tokenizer"), (torch, "load"), (native, "load"),
        (native, "safe_open"), (minilm, "load_tokenizer"),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for module, name in targets:
            stack.enter_context(mock.patch.object(module, name, refuse(f"{module.__name__}.{name}")))
        yield called


# ---- files -----------------------------------------------------------------------------------------------------------


def _files(bundle: Path) -> list[Path]:
    found = [path for path in sorted(bundle.rglob("*")) if path.is_file() and not path.is_symlink()]
    return [path for path in found if path.name not in (MANIFEST, SIGNATURE)]


@mutation
def flip_bytes(bundle, rng):
    path = rng.choice(_files(bundle))
    data = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 9)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@mutation
def truncate_file(bundle, rng):
    path = rng.choice(_files(bundle))
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


@mutation
def extend_file(bundle, rng):
    path = rng.choice(_files(bundle))
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


@mutation
def swap_files(bundle, rng):
    first, second = rng.sample(_files(bundle), 2)
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


@mutation
def same_size_file(bundle, rng):
    path = rng.choice(_files(bundle))
    path.write_bytes(rng.randbytes(path.stat().st_size))


@mutation
def remove_file(bundle, rng):
    rng.choice([*_files(bundle), bundle / MANIFEST]).unlink()


@mutation
def add_file(bundle, rng):
    name = rng.choice(["extra.onnx", ".hidden", "model/x.pkl", "onnx/base.onnx.bak", "engines/new.plan", "a\nb", "-rf"])
    (bundle / name).write_bytes(rng.randbytes(10))


@mutation
def add_folder(bundle, rng):
    (bundle / rng.choice(["empty", "model/deep/er", ".git", "a" * 200])).mkdir(parents=True)


@mutation
def link_file(bundle, rng):
    path = rng.choice([*_files(bundle), bundle / MANIFEST])
    aside = bundle.parent / f"aside-{rng.randrange(10**9)}"
    relative = os.path.relpath(aside, path.parent)
    target = rng.choice([str(aside), relative, "/dev/zero", "/etc/passwd", "nothing", path.name])
    shutil.move(path, aside)
    path.symlink_to(target)


@mutation
def link_folder(bundle, rng):
    folder = rng.choice([bundle / "model", bundle / "onnx", bundle / "engines" / "sm_89"])
    aside = bundle.parent / f"aside-{rng.randrange(10**9)}"
    shutil.move(folder, aside)
    folder.symlink_to(rng.choice([str(aside), "/", "..", "."]), target_is_directory=True)


@mutation
def special_file(bundle, rng):
    path = rng.choice([*_files(bundle), bundle / MANIFEST, bundle / "onnx" / "pipe.onnx"])
    path.unlink(missing_ok=True)
    if rng.random() < 0.5:
        os.mkfifo(path)
        return
    with socket.socket(socket.AF_UNIX) as end:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is at most 108 bytes long
        try:
            end.bind(path.name)
        finally:
            os.chdir(here)


@mutation
def folder_for_file(bundle, rng):
    path = rng.choice([*_files(bundle), bundle / MANIFEST])
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "inside.onnx").write_bytes(b"x")


# ---- the manifest's text ---------------------------------------------------------------------------------------------


def _raw(bundle: Path) -> bytes:
    path = bundle / MANIFEST
    if path.is_symlink() or not path.is_file():  # an earlier mutation; reading a pipe would wait for ever
        raise FileNotFoundError(path)
    return path.read_bytes()


def _rewrite(bundle: Path, raw: bytes) -> None:
    (bundle / MANIFEST).write_bytes(raw)


@mutation_against_key
def flip_manifest(bundle, rng):
    data = bytearray(_raw(bundle))
    for _ in range(rng.randrange(1, 5)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    _rewrite(bundle, bytes(data))


@mutation_against_key
def cut_manifest(bundle, rng):
    data = _raw(bundle)
    start = rng.randrange(len(data))
    _rewrite(bundle, data[:start] + data[start + rng.randrange(1, 200) :])


@mutation_against_key
def repeat_manifest(bundle, rng):
    data = _raw(bundle)
    start = rng.randrange(len(data))
    _rewrite(bundle, data[:start] + data[start : start + rng.randrange(1, 200)] + data[start:])


@mutation
def truncate_manifest(bundle, rng):
    data = _raw(bundle).rstrip()
    _rewrite(bundle, data[: rng.randrange(len(data))])


@mutation
def other_manifest(bundle, rng):
    deep = rng.randrange(100, 10**5)
    wide = MAX_MANIFEST_BYTES // 3 - 100
    _rewrite(bundle, rng.choice([
        lambda: b"", lambda: rng.randbytes(rng.randrange(1, 500)), lambda: b"[" * deep, lambda: b'{"a":' * deep,
        lambda: b"null", lambda: b"[]", lambda: b"1" * deep, lambda: b'"' + b"a" * deep + b'"', lambda: b"{}",
        lambda: _raw(bundle) + b" " * MAX_MANIFEST_BYTES, lambda: b"\xef\xbb\xbf" + _raw(bundle),
        lambda: _raw(bundle).decode().encode("utf-16"), lambda: _raw(bundle) + b"{}", lambda: b"\xff" + _raw(bundle),
        lambda: b'{"schema_version":1,"model":{"a":[' + b"[]," * wide + b"1]}}",
        lambda: b'{"schema_version":1,"files":{' + b",".join(b'"%d":1' % i for i in range(wide // 5)) + b"}}",
    ])())  # fmt: skip


@mutation
def duplicate_key(bundle, rng):
    """The same name twice in one object, with the same value or another."""
    lines = _raw(bundle).decode().split("\n")
    keyed = [i for i, line in enumerate(lines) if '": ' in line and line.rstrip().endswith(",")
             and not line.rstrip(",").rstrip().endswith(("{", "["))]  # fmt: skip
    index = rng.choice(keyed)
    line = lines[index]
    if rng.random() < 0.5:
        line = line.split('": ')[0] + '": ' + rng.choice(["null", "1", '"x"', "{}", "[]"]) + ","
    lines.insert(index + rng.randrange(2), line)
    _rewrite(bundle, "\n".join(lines).encode())


@mutation
def not_json_number(bundle, rng):
    text = _raw(bundle).decode()
    other = rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "0x10", "01"])
    _rewrite(bundle, text.replace("1.5", other, 1).encode())


# ---- the manifest's values -------------------------------------------------------------------------------------------


def _data(bundle: Path) -> dict:
    return json.loads(_raw(bundle))


def _store(bundle: Path, data: dict) -> None:
    _rewrite(bundle, json.dumps(data, indent=1).encode())


def _nodes(value, path=()) -> Iterator[tuple]:
    """Every place below the top, as keys from the top."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _nodes(item, (*path, key))


def _at(data, path):
    for key in path:
        data = data[key]
    return data


@mutation
def wrong_type(bundle, rng):
    data = _data(bundle)
    path = rng.choice(list(_nodes(data)))
    value = _at(data, path)
    if isinstance(value, bool):
        other = "yes"
    elif isinstance(value, (int, float)):
        other = rng.choice([str(value), [value], {"a": value}, True])
    elif isinstance(value, str):
        other = rng.choice([7, [value], {"a": value}, 1.5, True])
    elif isinstance(value, list):
        other = rng.choice(["text", 7, {"a": 1}, None])
    elif isinstance(value, dict):
        other = rng.choice(["text", 7, [value], None if path != ("model", "ssr") else 7])
    else:
        other = rng.choice([[], {}])
    _at(data, path[:-1])[path[-1]] = other
    _store(bundle, data)


@mutation
def unknown_field(bundle, rng):
    data = _data(bundle)
    dicts = [path for path in [(), *_nodes(data)] if isinstance(_at(data, path), dict)]
    free = {("receipt", "layers"), ("weights",), ("files",)}
    path = rng.choice([p for p in dicts if p[-2:] not in free and p[-1:] not in free and "profiles" not in p])
    _at(data, path)["".join(rng.choices(string.ascii_lowercase, k=9))] = rng.choice([1, None, "x", {}])
    _store(bundle, data)


@mutation
def missing_field(bundle, rng):
    data = _data(bundle)
    required = [("name",), ("created_by",), ("model",), ("weights",), ("text",), ("files",), ("schema_version",),
                ("model", "base"), ("model", "name"), ("weights", "base"), ("weights", "ssr"), ("text", "kind"),
                ("text", "width"), ("text", "tokenizer")]  # fmt: skip
    for index in range(len(data["artefacts"])):
        required += [("artefacts", index, key) for key in ("name", "kind", "backend", "stage", "target", "files",
                                                            "receipt", "library", "precision")]  # fmt: skip
    required += [("files", name) for name in data["files"]]
    required += [("files", name, key) for name in data["files"] for key in ("size", "sha256")]
    path = rng.choice(required)
    del _at(data, path[:-1])[path[-1]]
    _store(bundle, data)


@mutation
def wrong_size(bundle, rng):
    data = _data(bundle)
    entry = data["files"][rng.choice(list(data["files"]))]
    size = entry["size"]
    entry["size"] = rng.choice([2**40, 2**50, 2**63, 2**64 + size, 10**30, 10**4000, -1, -size, 0, size + 1, size - 1])
    _store(bundle, data)


@mutation
def wrong_hash(bundle, rng):
    data = _data(bundle)
    first, second = (data["files"][name] for name in rng.sample(list(data["files"]), 2))
    value = first["sha256"]
    first["sha256"] = rng.choice([
        second["sha256"], value.upper() + "A", value[:-1], value + "0", "", "0" * 64, "g" * 64,
        hashlib.sha256().hexdigest(), f"{int(value, 16) ^ (1 << rng.randrange(256)):064x}",
    ])  # fmt: skip
    _store(bundle, data)


@mutation
def bad_path(bundle, rng):
    """A listed file under a path that leads elsewhere, or that no bundle may hold; also where it is used."""
    data = _data(bundle)
    old, new = rng.choice(list(data["files"])), rng.choice(_BAD_PATHS)
    data["files"] = {new if name == old else name: entry for name, entry in data["files"].items()}
    if rng.random() < 0.7:
        data = json.loads(json.dumps(data).replace(json.dumps(old), json.dumps(new)))
    _store(bundle, data)


@mutation
def case_twins(bundle, rng):
    data = _data(bundle)
    name = rng.choice(list(data["files"]))
    data["files"][name.upper().replace(name.upper().rsplit(".", 1)[1], name.rsplit(".", 1)[1])] = data["files"][name]
    _store(bundle, data)


@mutation
def wrong_schema(bundle, rng):
    data = _data(bundle)
    data["schema_version"] = rng.choice([0, 2, 3, 99, -1, 10**18, 10**4000, "1", 1.0, 1.5, True, None, [1], {}])
    _store(bundle, data)


@mutation
def contradiction(bundle, rng):
    """Right types, values that do not go together."""
    data = _data(bundle)
    onnx, _, plan, cubins = data["artefacts"]
    changes: list[Callable[[], object]] = [
        lambda: onnx.update(name=plan["name"]), lambda: onnx.update(backend="tensorrt"),
        lambda: plan.update(backend="onnxruntime"), lambda: plan["target"].update(sms=[]),
        lambda: plan["target"].update(sku="rtx4090", sms=[89, 90]), lambda: onnx.update(files=["onnx/nowhere.onnx"]),
        lambda: onnx.update(files=[]), lambda: onnx.update(profiles=[]), lambda: onnx.update(profiles=[{}]),
        lambda: onnx.update(inputs=[]), lambda: onnx.update(outputs=[]), lambda: onnx.update(precision="int3"),
        lambda: onnx["profiles"][0]["sample"].update(min=[9, 9, 99, 99, 9]),
        lambda: onnx["profiles"][0]["sample"].update(max=[1]),
        lambda: onnx["profiles"][0]["sample"].update(opt=[0] * 5),
        lambda: cubins["target"].update(sms=[]), lambda: cubins["target"].update(sms=[-1]),
        lambda: onnx["receipt"].update(build_seconds=-1.0), lambda: data["weights"].update(base="text/tokenizer.json"),
        lambda: data["text"].update(kind="hash"), lambda: data["text"].update(width=0),
        lambda: data["text"].update(width=33), lambda: data["model"].update(text_tokens=0),
        lambda: data["model"]["base"]["network"].update(num_groups=5), lambda: data["model"].update(ssr=None),
        lambda: data.update(files={}), lambda: data.update(name="../x"), lambda: data.update(name=""),
        lambda: data.update(files={f"onnx/{i}.onnx": {"size": 1, "sha256": "0" * 64} for i in range(5000)}),
    ]  # fmt: skip
    rng.choice(changes)()
    _store(bundle, data)


# ---- the signature ---------------------------------------------------------------------------------------------------


@mutation_against_key
def no_signature(bundle, rng):
    (bundle / SIGNATURE).unlink()


@mutation_against_key
def wrong_signature(bundle, rng):
    path = bundle / SIGNATURE
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[rng.randrange(64)] ^= 1 << rng.randrange(8)
    others = [bytes(flipped), data[: rng.randrange(64)], data + b"\0", b"", rng.randbytes(64), data * 999]
    path.write_bytes(rng.choice(others))


@mutation_against_key
def other_key(bundle, rng):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    (bundle / SIGNATURE).write_bytes(Ed25519PrivateKey.from_private_bytes(rng.randbytes(32)).sign(_raw(bundle)))


@mutation_against_key
def old_signature(bundle, rng):
    """A changed manifest with the signature that it had before; the files agree with it."""
    data = _data(bundle)
    data["created_by"] = f"somebody {rng.randrange(10**9)}"
    _store(bundle, data)
