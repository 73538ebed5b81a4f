"""A bundle: one folder with a model and what was built from it for each GPU, described by a manifest.

    name.plm/
      manifest.json          what is in it: every file with size and SHA-256, every artefact with its target
      manifest.sig           Ed25519 signature over the bytes of manifest.json, optional; 64 bytes
      model/ text/ onnx/ kernels/ engines/

A bundle is untrusted until it is checked, and a plan or a graph is code to the library that parses it. So the order is
fixed: the manifest's size, its signature, its JSON, its fields; then the folder against the manifest, names and sizes;
then every file's hash; and only then may a native library see a byte. `Bundle.read` hands out the very bytes that it
hashed, so a file that changes later changes nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pylumiere.config import ModelConfig
from pylumiere.errors import BundleError, IntegrityError

SCHEMA_VERSION = 1
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"

# Limits on what an untrusted bundle may make us do before its hashes are known to be right.
MAX_MANIFEST_BYTES = 2 * 2**20
MAX_MANIFEST_VALUES = 2**16  # numbers, texts, lists and objects; each costs about a kilobyte if it is wrong
MAX_FILES = 4096
MAX_BYTES = 256 * 2**30
MAX_PATH = 240
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".onnx", ".data", ".plan", ".cache", ".cubin")

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+.-]*")
_CHUNK = 2**20

Stage = Literal["base", "ssr", "text"]
Precision = Literal["fp32", "bf16", "fp16"]
Name = Annotated[str, Field(min_length=1, max_length=120, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_+.-]*$")]
Text = Annotated[str, Field(max_length=1000)]
Size = Annotated[int, Field(ge=0, le=2**50)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Axis = Annotated[int, Field(ge=1, le=2**31)]
Shape = Annotated[tuple[Axis, ...], Field(max_length=8)]
Sm = Annotated[int, Field(ge=50, le=999)]


def _safe_path(path: str) -> str:
    """Relative, plain parts of ASCII, no `..`, a known ending."""
    parts = path.split("/")
    if len(path) > MAX_PATH or len(parts) > 8 or not all(_PART.fullmatch(part) and part[-1] != "." for part in parts):
        raise ValueError(
            f"{path[:80]!r} is no path of a bundle: relative, parts of letters, digits and _ + . - only, none of them "
            f"'..' or hidden, at most {MAX_PATH} characters"
        )
    if path in (MANIFEST, SIGNATURE):
        raise ValueError(f"{path!r} cannot be listed: it describes the others")
    if not path.endswith(SUFFIXES):
        raise ValueError(f"{path[:80]!r} has no ending of a bundle's files: {', '.join(SUFFIXES)}")
    return path


BundlePath = Annotated[str, Field(max_length=MAX_PATH)]


class _Strict(BaseModel):
    """Unknown fields and wrong types are refused; nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Strict):
    """A file's size in bytes and the SHA-256 of its content, in lower-case hexadecimal."""

    size: Size
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TensorSpec(_Strict):
    """An input or output of an artefact, by the name it has there. "int64" is for token numbers."""

    name: Name
    dtype: Literal["fp32", "fp16", "bf16", "bool", "int32", "int64"]


class ShapeRange(_Strict):
    """Shapes that an input may have; axes with min == max are fixed."""

    min: Shape
    opt: Shape
    max: Shape

    @model_validator(mode="after")
    def _ordered(self) -> ShapeRange:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise ValueError(f"min, opt and max have {len(self.min)}, {len(self.opt)} and {len(self.max)} axes")
        if any(not low <= best <= high for low, best, high in zip(self.min, self.opt, self.max, strict=True)):
            raise ValueError(f"not min <= opt <= max: {self.min}, {self.opt}, {self.max}")
        return self

    def holds(self, shape: Iterable[int]) -> bool:
        """Whether a tensor of this shape may be given."""
        shape = tuple(shape)
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


class Target(_Strict):
    """What an artefact runs on.

    Attributes:
        sku: of one card (a name from the SKU table), or None.
        sms: compute capabilities as numbers (89 is 8.9); several for a portable GPU artefact, none for one that needs
            no GPU.
        platform: "linux-x86_64" and the like for compiled plans; "any" otherwise.
    """

    sku: Name | None = None
    sms: Annotated[tuple[Sm, ...], Field(max_length=64)] = ()
    platform: Name = "any"

    @property
    def label(self) -> str:
        if self.sku is not None:
            return self.sku
        return f"sm_{self.sms[0]}" if len(self.sms) == 1 else "portable"


class Library(_Strict):
    """What built the artefact, and for plans the only version that loads it. For example tensorrt_rtx 1.7.1.116."""

    name: Name
    version: Annotated[str, Field(min_length=1, max_length=60)]


class Comparison(_Strict):
    """Outputs at one set of input shapes against the eager model, all of them: `values` is how many.

    Attributes:
        shapes: of each input.
        max_abs: largest absolute difference.
        rel_rms: root mean square of the difference over that of the eager output.
    """

    shapes: dict[Name, Shape]
    values: Annotated[int, Field(ge=1)]
    max_abs: Number
    rel_rms: Number


class Receipt(_Strict):
    """How an artefact was built and checked.

    Attributes:
        build_seconds: wall time of its build.
        compared: one per set of shapes; empty where it could not be run (a plan built without the GPU).
        tolerance: most relative RMS error that was allowed.
        reference: what it was compared with, for example "torch 2.13.0 eager fp32 cpu".
        layers: counts by kind from the library's own report, for example {"total": 214, "fp16": 190}.
        notes: anything else worth a line.
    """

    build_seconds: Seconds
    compared: Annotated[tuple[Comparison, ...], Field(max_length=64)] = ()
    tolerance: Number | None = None
    reference: Text | None = None
    layers: Annotated[dict[Name, Annotated[int, Field(ge=0)]], Field(max_length=64)] = {}
    notes: Annotated[tuple[Text, ...], Field(max_length=64)] = ()


class Artefact(_Strict):
    """Something that was built from one network for one target.

    Attributes:
        name: unique within the bundle.
        backend: what runs it.
        stage: which network; "text" is the text encoder.
        precision: in which it computes.
        files: what it needs; the first is the one that a library opens (for cubins: their JSON index).
        inputs, outputs: by the names and dtypes that the artefact has for them.
        profiles: sets of shapes, one range per input. Calls must fit one of them.
    """

    name: Name
    kind: Literal["onnx", "plan", "cubins"]
    backend: Literal["onnxruntime", "tensorrt", "tensorrt_rtx", "triton"]
    stage: Stage
    target: Target
    precision: Precision
    library: Library
    files: Annotated[tuple[BundlePath, ...], Field(min_length=1, max_length=MAX_FILES)]
    inputs: Annotated[tuple[TensorSpec, ...], Field(max_length=32)] = ()
    outputs: Annotated[tuple[TensorSpec, ...], Field(max_length=32)] = ()
    profiles: Annotated[tuple[dict[Name, ShapeRange], ...], Field(max_length=64)] = ()
    receipt: Receipt

    @model_validator(mode="after")
    def _fits_together(self) -> Artefact:
        runs = {"onnx": ("onnxruntime",), "plan": ("tensorrt", "tensorrt_rtx"), "cubins": ("triton",)}[self.kind]
        if self.backend not in runs:
            raise ValueError(f"artefact {self.name}: {self.kind} is not run by {self.backend}")
        if self.kind != "onnx" and not self.target.sms:
            raise ValueError(f"artefact {self.name}: {self.kind} names no compute capability")
        if self.target.sku is not None and len(self.target.sms) != 1:
            raise ValueError(f"artefact {self.name}: a SKU has one compute capability")
        if self.kind != "cubins":
            names = [spec.name for spec in self.inputs]
            if not names or not self.outputs or not self.profiles:
                raise ValueError(f"artefact {self.name}: inputs, outputs and profiles are needed")
            for profile in self.profiles:
                if sorted(profile) != sorted(names):
                    raise ValueError(f"artefact {self.name}: a profile should name exactly its inputs")
        return self


class TextEncoder(_Strict):
    """The text encoder that the networks were trained with.

    Attributes:
        kind: "minilm", "t5", "clip", or "hash", which needs no files.
        width: of one token's embedding; the length is the model config's text_tokens.
        tokenizer: a tokenizers JSON file; its padding and truncation are set by the loader.
        pad_token: number that fills up short prompts.
        weights: safetensors for the torch backend, if any. The artefacts of stage "text" are for the others: inputs
            input_ids and attention_mask, int64 [N, L]; output embeddings [N, L, D].
    """

    kind: Literal["minilm", "t5", "clip", "hash"]
    width: Annotated[int, Field(ge=1, le=65536)]
    tokenizer: BundlePath | None = None
    pad_token: Annotated[int, Field(ge=0, le=2**31)] = 0
    weights: BundlePath | None = None

    @model_validator(mode="after")
    def _has_tokenizer(self) -> TextEncoder:
        if (self.tokenizer is None) != (self.kind == "hash"):
            raise ValueError(f"text encoder {self.kind} {'has no' if self.kind == 'hash' else 'needs a'} tokenizer")
        return self


class Manifest(_Strict):
    """What manifest.json says.

    Attributes:
        schema_version: of this description; see SCHEMA_VERSION.
        name: of the model.
        created_by: for example "pylumiere 0.1.0".
        model: a ModelConfig as JSON values.
        weights: safetensors of each network, by stage.
        files: every file of the bundle but the manifest and its signature, by relative path.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: Name
    created_by: Annotated[str, Field(max_length=120)]
    model: dict[str, Any]
    weights: dict[Literal["base", "ssr"], BundlePath]
    text: TextEncoder
    files: Annotated[dict[BundlePath, FileEntry], Field(min_length=1, max_length=MAX_FILES)]
    artefacts: Annotated[tuple[Artefact, ...], Field(max_length=MAX_FILES)] = ()

    @functools.cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.model)

    @field_validator("model")
    @classmethod
    def _plain(cls, model: dict[str, Any]) -> dict[str, Any]:
        ModelConfig.from_dict(model)  # a ValueError names the field
        return json.loads(json.dumps(model))  # lists, as they will be read back

    @field_validator("files")
    @classmethod
    def _paths(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        seen: dict[str, str] = {}
        for path in files:
            _safe_path(path)
            other = seen.setdefault(path.lower(), path)
            if other != path:
                raise ValueError(f"{path!r} and {other!r} are one file where case does not count")
        folders = {path.rsplit("/", depth)[0] for path in seen for depth in range(1, path.count("/") + 1)}
        if both := sorted(folders & set(seen)):
            raise ValueError(f"{both[0]!r} is both a file and a folder")
        return files

    @model_validator(mode="after")
    def _fits_together(self) -> Manifest:
        config = self.config
        stages = {"base"} if config.ssr is None else {"base", "ssr"}
        if set(self.weights) != stages:
            raise ValueError(f"weights are given for {', '.join(sorted(self.weights)) or 'nothing'}; the model has "
                             f"{', '.join(sorted(stages))}")  # fmt: skip
        if config.base.network.text_dim not in (0, self.text.width):
            raise ValueError(f"text encoder: {self.text.width} wide; the model expects {config.base.network.text_dim}")
        names = [artefact.name for artefact in self.artefacts]
        if len(set(names)) != len(names):
            raise ValueError(f"artefact {next(n for n in names if names.count(n) > 1)} is there twice")
        for artefact in self.artefacts:
            if artefact.stage == "ssr" and config.ssr is None:
                raise ValueError(f"artefact {artefact.name}: the model has no ssr stage")
        for path in self._named():
            if path not in self.files:
                raise ValueError(f"{path[:80]!r} is used, but not listed under files")
        if any(not path.endswith(".safetensors") for path in self.weights.values()):
            raise ValueError("weights are .safetensors files")
        return self

    def _named(self) -> Iterable[str]:
        yield from self.weights.values()
        yield from (path for path in (self.text.tokenizer, self.text.weights) if path is not None)
        for artefact in self.artefacts:
            yield from artefact.files


# ---- reading ---------------------------------------------------------------------------------------------------------


class Bundle:
    """An open bundle. `open_bundle` makes it; it may be shared between threads.

    Attributes:
        path: of the folder.
        manifest: what it says.
        is_signed: a manifest.sig is there.
        is_trusted: it was checked against a trusted key.
    """

    def __init__(self, path: Path, root: int, manifest: Manifest, is_signed: bool, is_trusted: bool):
        self.path, self.manifest, self.is_signed, self.is_trusted = path, manifest, is_signed, is_trusted
        self.config = manifest.config
        # Files are opened below this descriptor: a bundle that is replaced by name stays the one that was checked.
        self._root = root
        weakref.finalize(self, os.close, root)

    def read(self, name: str) -> bytes:
        """A listed file's bytes, hashed as they are in memory.

        Raises:
            IntegrityError: they are not those of the manifest.
            BundleError: the file is not listed, or cannot be read.
        """
        entry = self._entry(name)
        with _open_below(self._root, name, self.path) as file:
            if os.fstat(file.fileno()).st_size != entry.size:  # before that much is allocated
                raise self._changed(name)
            data = file.read(entry.size)
            if len(data) != entry.size or file.read(1):
                raise self._changed(name)
        self._check(name, entry, hashlib.sha256(data).hexdigest())
        return data

    def check_hashes(self, on_file: Callable[[str, int], None] | None = None) -> None:
        """Compares every file with its size and hash. `on_file(path, bytes)` is called after each.

        Raises:
            IntegrityError, BundleError: as `read`; the first file that differs is named.
        """
        piece = bytearray(_CHUNK)
        for name, entry in self.manifest.files.items():
            digest, size = hashlib.sha256(), 0
            with _open_below(self._root, name, self.path) as file:
                while size <= entry.size and (count := file.readinto(piece)):
                    digest.update(memoryview(piece)[:count])
                    size += count
            if size != entry.size:
                raise self._changed(name)
            self._check(name, entry, digest.hexdigest())
            if on_file is not None:
                on_file(name, entry.size)

    def _entry(self, name: str) -> FileEntry:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name!r} is not listed in the manifest")
        return self.manifest.files[name]

    def _check(self, name: str, entry: FileEntry, digest: str) -> None:
        if digest != entry.sha256:
            raise IntegrityError(f"{self.path}: {name} is damaged or was changed: its SHA-256 is not the manifest's")

    def _changed(self, name: str) -> IntegrityError:
        return IntegrityError(f"{self.path}: {name} changed its size while it was read")


def is_bundle(path: str | os.PathLike) -> bool:
    """Whether a path is meant as a bundle: it ends in .plm, or is a folder with a manifest."""
    return Path(path).suffix == ".plm" or (Path(path) / MANIFEST).is_file()


def open_bundle(
    path: str | os.PathLike, trusted_key: Any = None, *, check_hashes: bool = True, max_bytes: int = MAX_BYTES
) -> Bundle:
    """Opens a bundle after checking all of it; nothing in it is parsed but the manifest.

    Args:
        path: the folder.
        trusted_key: an Ed25519 public key (of `cryptography`), or the path of one in PEM. Given, the bundle must carry
            that key's signature; without one, a signature is not looked at.
        check_hashes: False leaves the files' content to `Bundle.check_hashes` and `Bundle.read`.
        max_bytes: of all files together; more is refused before any is read.

    Raises:
        IntegrityError: a file's size or hash, or the signature, is not as it should be.
        BundleError: everything else that is wrong with it.
    """
    path = Path(path)
    key = None if trusted_key is None else load_public_key(trusted_key)
    try:
        root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise BundleError(f"bundle {str(path)!r} cannot be opened: {getattr(error, 'strerror', error)}") from None
    try:
        raw = _read_limited(root, MANIFEST, MAX_MANIFEST_BYTES, path)
        found = _walk(root, path)
        is_signed = SIGNATURE in found
        if key is not None:
            _check_signature(root, raw, is_signed, key, path)
        manifest = parse_manifest(raw, str(path))
        _compare(manifest, found, max_bytes, path)
        bundle = Bundle(path, root, manifest, is_signed, key is not None)
    except BaseException:
        os.close(root)
        raise
    if check_hashes:
        bundle.check_hashes()
    return bundle


def _check_signature(root: int, raw: bytes, is_signed: bool, key: Any, path: Path) -> None:
    from cryptography.exceptions import InvalidSignature

    if not is_signed:
        raise IntegrityError(f"{path} is not signed ({SIGNATURE} is missing), and a trusted key was given")
    signature = _read_limited(root, SIGNATURE, 64, path)
    try:
        key.verify(signature, raw)
    except InvalidSignature:
        raise IntegrityError(f"{path}: {SIGNATURE} is not the trusted key's signature of {MANIFEST}") from None


def _walk(root: int, path: Path) -> dict[str, int]:
    """Relative path and size of every file. Anything but plain files and folders is refused."""
    found: dict[str, int] = {}
    folders = [""]
    for folder in folders:  # grows
        if len(folders) > MAX_FILES:
            raise BundleError(f"{path} has more than {MAX_FILES} folders")
        handle = _open_folder(root, folder, path)
        try:
            with os.scandir(handle) as entries:
                names = [entry.name for _, entry in zip(range(MAX_FILES + 3), entries, strict=False)]
            if len(names) > MAX_FILES + 2:
                raise BundleError(f"{path} has more than {MAX_FILES} files")
            for name in names:
                where = f"{folder}{name}"
                facts = os.stat(name, dir_fd=handle, follow_symlinks=False)
                if stat.S_ISDIR(facts.st_mode):
                    if where.count("/") >= 8:
                        raise BundleError(f"{path}: folders are nested too deep: {where[:80]!a}")
                    folders.append(f"{where}/")
                elif stat.S_ISREG(facts.st_mode):
                    found[where] = facts.st_size
                else:
                    raise BundleError(f"{path}: {where[:80]!a} is a link or a device, which no bundle holds")
        except OSError as error:
            raise BundleError(f"{path}: {folder[:80]!a} cannot be read: {error.strerror}") from None
        finally:
            os.close(handle)
        if len(found) > MAX_FILES + 2:
            raise BundleError(f"{path} has more than {MAX_FILES} files")
    listed = {name.rsplit("/", depth)[0] + "/" for name in found for depth in range(1, name.count("/") + 1)}
    if empty := sorted(set(folders) - listed - {""}):
        raise BundleError(f"{path}: folder {empty[0][:80]!a} is empty")
    return found


def _compare(manifest: Manifest, found: Mapping[str, int], max_bytes: int, path: Path) -> None:
    """The folder against the manifest: names, then sizes, before a byte is read."""
    total = sum(entry.size for entry in manifest.files.values())
    if total > max_bytes:
        raise BundleError(f"{path}: its files add up to {total} bytes; at most {max_bytes} are allowed")
    present = set(found) - {MANIFEST, SIGNATURE}
    if missing := sorted(set(manifest.files) - present):
        raise BundleError(f"{path}: {missing[0]} is missing" + _more(missing))
    if unlisted := sorted(present - set(manifest.files)):
        raise BundleError(f"{path}: {unlisted[0][:80]!a} is not listed in the manifest" + _more(unlisted))
    for name, entry in manifest.files.items():
        if found[name] != entry.size:
            raise IntegrityError(f"{path}: {name} has {found[name]} bytes; the manifest says {entry.size}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _open_folder(root: int, folder: str, path: Path) -> int:
    """A descriptor of a folder below `root`; no part of the way may be a link."""
    handle = os.dup(root)
    try:
        for part in folder.split("/"):
            if part:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
                os.close(handle)
                handle = below
    except OSError as error:
        os.close(handle)
        raise BundleError(f"{path}: {folder[:80]!a} cannot be opened: {error.strerror}") from None
    # A descriptor of its own place in the folder: that of `root` is shared by its copies.
    own = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=handle)
    os.close(handle)
    return own


def _open_below(root: int, name: str, path: Path):
    """A plain file below `root`, for reading."""
    folder, _, last = name.rpartition("/")
    above = _open_folder(root, folder, path)
    try:
        # O_NONBLOCK: a pipe that took the file's place must not make us wait.
        handle = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=above)
    except OSError as error:
        raise BundleError(f"{path}: {name} cannot be opened: {error.strerror}") from None
    finally:
        os.close(above)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BundleError(f"{path}: {name} is no plain file")
    return open(handle, "rb")


def _read_limited(root: int, name: str, limit: int, path: Path) -> bytes:
    with _open_below(root, name, path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(limit + 1)
    if max(size, len(data)) > limit:
        raise BundleError(f"{path}: {name} has {size} bytes; at most {limit} are read")
    return data


# ---- writing ---------------------------------------------------------------------------------------------------------


def file_entry(path: str | os.PathLike) -> FileEntry:
    """Size and SHA-256 of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            size += len(piece)
    return FileEntry(size=size, sha256=digest.hexdigest())


def describe_files(folder: str | os.PathLike) -> dict[str, FileEntry]:
    """Every file below a folder but the manifest and its signature, sorted by path: `Manifest.files`."""
    folder = Path(folder)
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    return {name: file_entry(found[name]) for name in sorted(found) if name not in (MANIFEST, SIGNATURE)}


def write_manifest(folder: str | os.PathLike, manifest: Manifest, sign_key: Any = None) -> None:
    """Writes manifest.json, and manifest.sig where a key is given, into a folder that has all the files already.

    Args:
        sign_key: an Ed25519PrivateKey of `cryptography`, or the path of one in PEM.

    Raises:
        BundleError: a manifest that no loader would take, or a key that is none.
    """
    folder = Path(folder)
    raw = (manifest.model_dump_json(indent=1) + "\n").encode()
    parse_manifest(raw)
    signature = None if sign_key is None else load_private_key(sign_key).sign(raw)
    (folder / SIGNATURE).unlink(missing_ok=True)
    _write(folder / MANIFEST, raw)
    if signature is not None:
        _write(folder / SIGNATURE, signature)


def parse_manifest(raw: bytes, where: str = "manifest") -> Manifest:
    """The manifest from its bytes. `where` is the bundle's name in an error.

    Raises:
        BundleError: too large, no JSON, a name twice in one object, an unknown schema version, or a field that is
            missing, unknown, of the wrong type or outside its limits; the field is named.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{where}: {MANIFEST} has {len(raw)} bytes; at most {MAX_MANIFEST_BYTES} are read")
    if (count := sum(raw.count(mark) for mark in (b",", b"[", b"{"))) > MAX_MANIFEST_VALUES:
        raise BundleError(f"{where}: {MANIFEST} holds {count} values; at most {MAX_MANIFEST_VALUES} are read")
    try:
        data = json.loads(raw, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: {MANIFEST} is no JSON: {_one_line(error)}") from None
    if not isinstance(data, dict):
        raise BundleError(f"{where}: {MANIFEST} holds no JSON object")
    version = data.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int):
        raise BundleError(f"{where}: {MANIFEST} has no schema_version")
    if version != SCHEMA_VERSION:
        remedy = "update pylumiere" if version > SCHEMA_VERSION else "export the bundle again"
        raise BundleError(
            f"{where}: {MANIFEST}: schema version {str(version)[:20]} is not known; this pylumiere reads version "
            f"{SCHEMA_VERSION}: {remedy}"
        )
    for name, most in (("files", MAX_FILES), ("artefacts", MAX_FILES), ("weights", 2), ("fields", 20)):
        found = data if name == "fields" else data.get(name)
        if isinstance(found, (dict, list)) and len(found) > most:
            raise BundleError(f"{where}: {MANIFEST} has {len(found)} {name}; at most {most} are allowed")
    del data, found
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:80] for part in first["loc"])
        raise BundleError(f"{where}: {MANIFEST}: {place + ': ' if place else ''}{_one_line(first['msg'])}") from None


def load_public_key(key: Any):
    """An Ed25519 public key from a PEM file.

    Raises:
        BundleError: no such file, or no such key in it.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if isinstance(key, Ed25519PublicKey):
        return key
    try:
        loaded = serialization.load_pem_public_key(_read_small(Path(key)))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BundleError(f"{key} is no public key in PEM: {_one_line(error)[:120]}") from None
    if not isinstance(loaded, Ed25519PublicKey):
        raise BundleError(f"{key} is no Ed25519 key")
    return loaded


def make_key_pair(private: str | os.PathLike, public: str | os.PathLike) -> None:
    """Writes a new Ed25519 key pair as PEM files, the private one for its owner's eyes only. Nothing is overwritten.

    Raises:
        BundleError: a file is there already, or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    shown = key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    if Path(public).exists():
        raise BundleError(f"{public} exists; it is not overwritten")
    for path, data, mode in ((private, secret, 0o600), (public, shown, 0o644)):
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except OSError as error:
            raise BundleError(f"{path} cannot be written: {error.strerror}") from None
        with os.fdopen(handle, "wb") as file:
            file.write(data)


def load_private_key(key: Any):
    """An Ed25519 private key from a PEM file.

    Raises:
        BundleError: no such file, or no such key in it.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if isinstance(key, Ed25519PrivateKey):
        return key
    try:
        loaded = serialization.load_pem_private_key(_read_small(Path(key)), password=None)
    except (ValueError, TypeError) as error:
        raise BundleError(f"{key} is no private key in PEM without a password: {_one_line(error)}") from None
    if not isinstance(loaded, Ed25519PrivateKey):
        raise BundleError(f"{key} is no Ed25519 key")
    return loaded


def _read_small(path: Path, limit: int = 2**16) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise BundleError(f"{path} is larger than {limit} bytes")
    return data


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} stands twice in one object")
        found[name] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
