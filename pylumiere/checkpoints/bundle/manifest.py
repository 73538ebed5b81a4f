"""What manifest.json may say: its fields, their limits, and how its bytes become them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pylumiere.config import MAX_STAGES, ModelConfig
from pylumiere.errors import BundleError, one_line

SCHEMA_VERSION = 2
OLDER_VERSIONS = (1,)  # read too: there the model was a base and a super-resolution network
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"

# Limits on what an untrusted bundle may make us do before its hashes are known to be right.
MAX_MANIFEST_BYTES = 2 * 2**20
MAX_MANIFEST_VALUES = 2**16  # numbers, texts, lists and objects; each costs about a kilobyte if it is wrong
MAX_FILES = 4096
MAX_BYTES = 256 * 2**30
MAX_PATH = 240
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".onnx", ".data", ".plan", ".cache", ".cubin")

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+.-]*")

Stage = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
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
        tokenizer: a tokenizers JSON file; its truncation and the length that it fills up to are set by the loader.
        pad_token: not read: the tokenizer's own file says what fills up short prompts.
        config: of "clip" alone: a JSON file with the fields of `networks.text.clip.ClipTextConfig`.
        weights: safetensors for the torch backend, if any. The artefacts of stage "text" are for the others: input
            input_ids, and attention_mask where the encoder reads it, int64 [N, L]; output embeddings [N, L, D].
    """

    kind: Literal["minilm", "t5", "clip", "hash"]
    width: Annotated[int, Field(ge=1, le=65536)]
    tokenizer: BundlePath | None = None
    pad_token: Annotated[int, Field(ge=0, le=2**31)] = 0
    config: BundlePath | None = None
    weights: BundlePath | None = None

    @model_validator(mode="after")
    def _has_its_files(self) -> TextEncoder:
        if (self.tokenizer is None) != (self.kind == "hash"):
            raise ValueError(f"text encoder {self.kind} {'has no' if self.kind == 'hash' else 'needs a'} tokenizer")
        if (self.config is None) != (self.kind != "clip"):
            raise ValueError(f"text encoder {self.kind} {'needs a' if self.kind == 'clip' else 'has no'} config")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """All that it names."""
        return tuple(path for path in (self.tokenizer, self.config, self.weights) if path is not None)


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

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    name: Name
    created_by: Annotated[str, Field(max_length=120)]
    model: dict[str, Any]
    weights: Annotated[dict[Stage, BundlePath], Field(max_length=64)]
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
        stages = set(config.networks)
        if set(self.weights) != stages:
            raise ValueError(f"weights are given for {', '.join(sorted(self.weights)) or 'nothing'}; the model has "
                             f"{', '.join(sorted(stages))}")  # fmt: skip
        for stage in config.stages:
            if stage.network.text_dim not in (0, self.text.width):
                expected = stage.network.text_dim
                raise ValueError(f"text encoder: {self.text.width} wide; stage {stage.name} expects {expected}")
        names = [artefact.name for artefact in self.artefacts]
        if len(set(names)) != len(names):
            raise ValueError(f"artefact {next(n for n in names if names.count(n) > 1)} is there twice")
        for artefact in self.artefacts:
            if artefact.stage not in {*stages, "text"}:
                raise ValueError(f"artefact {artefact.name}: the model has no stage {artefact.stage!r}")
        for path in self._named():
            if path not in self.files:
                raise ValueError(f"{path[:80]!r} is used, but not listed under files")
        if any(not path.endswith(".safetensors") for path in self.weights.values()):
            raise ValueError("weights are .safetensors files")
        return self

    def _named(self) -> Iterable[str]:
        yield from self.weights.values()
        yield from self.text.files
        for artefact in self.artefacts:
            yield from artefact.files


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
        raise BundleError(f"{where}: {MANIFEST} is no JSON: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise BundleError(f"{where}: {MANIFEST} holds no JSON object")
    version = data.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int):
        raise BundleError(f"{where}: {MANIFEST} has no schema_version")
    if version not in (*OLDER_VERSIONS, SCHEMA_VERSION):
        remedy = "update pylumiere" if version > SCHEMA_VERSION else "export the bundle again"
        raise BundleError(
            f"{where}: {MANIFEST}: schema version {str(version)[:20]} is not known; this pylumiere reads version "
            f"{SCHEMA_VERSION}: {remedy}"
        )
    for name, most in (("files", MAX_FILES), ("artefacts", MAX_FILES), ("weights", MAX_STAGES + 1), ("fields", 20)):
        found = data if name == "fields" else data.get(name)
        if isinstance(found, (dict, list)) and len(found) > most:
            raise BundleError(f"{where}: {MANIFEST} has {len(found)} {name}; at most {most} are allowed")
    del data, found
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:80] for part in first["loc"])
        raise BundleError(f"{where}: {MANIFEST}: {place + ': ' if place else ''}{one_line(first['msg'])}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} stands twice in one object")
        found[name] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")
