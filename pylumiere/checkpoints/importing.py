"""`import_model`: what cannot be read as it lies on disk, written once as a diffusers folder that can be.

Two kinds of sources are known: a single file (see `single_file`), and a diffusers folder with pickled weights. Pickles
are those of torch 1.6 or later, and are unpickled as tensors alone. Nothing is fetched from anywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Size, Tensor

from pylumiere.checkpoints.diffusers import (
    COMPONENTS,
    DECODER,
    INDEX,
    PIPELINES,
    STAGE,
    DiffusersFolder,
    is_diffusers_folder,
    read_configs,
    read_diffusers_folder,
    read_index,
    read_tokenizer,
)
from pylumiere.checkpoints.files import (
    HEADER_BYTES_PER_TENSOR,
    MAX_BYTES_PER_VALUE,
    check_finite,
    check_inside,
    check_size,
    described,
)
from pylumiere.checkpoints.shards import check_fit, choose
from pylumiere.checkpoints.single_file import SingleFile
from pylumiere.errors import BundleError
from pylumiere.networks.text.clip import clip_shapes
from pylumiere.networks.text.clip_tokenizer import tokenizer_json

_PICKLES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "pytorch_model",
}
_MAX_PICKLE_BYTES = 16 * 2**20  # without the tensors' values, which lie beside it


class Source(Protocol):
    """What is asked of a source.

    Attributes:
        configs: content of their JSON files, by component.
        classes: of the components, as in model_index.json.
        tokenizers: folders in which a tokenizer may lie.
        pad_token: that the tokenizer should have; None for its own.
    """

    configs: Mapping[str, dict[str, Any]]
    classes: Mapping[str, list[str]]
    tokenizers: tuple[Path, ...]
    pad_token: str | None

    def tensors(self, component: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Exactly the tensors of these names and shapes."""
        ...


def import_model(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    config: str | os.PathLike | None = None,
    prediction_type: str | None = None,
) -> DiffusersFolder:
    """Writes a diffusers folder with safetensors weights in the dtype of the source.

    Args:
        source: a .safetensors file of Stable Diffusion 1 or 2, or a diffusers folder.
        output: the new folder, which must not exist. It appears when it is complete.
        tokenizer: folder with tokenizer.json, or with vocab.json and merges.txt. None looks in the folder `tokenizer`
            of the source or of `config`, or beside the file.
        config, prediction_type: of a single file; see `SingleFile`.

    Raises:
        BundleError: a source that is malformed, too large or of another kind; no tokenizer.
        UnsupportedDevice: diffusers is needed and not installed.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise BundleError(f"{output} exists; give a folder that does not")
    found: Source
    if is_diffusers_folder(source):
        if config is not None or prediction_type is not None:
            raise BundleError(f"{source} is a folder with its own configuration; that of a single file was given, too")
        found = _PickledFolder(source)
    else:
        found = SingleFile(source, None if config is None else Path(config), prediction_type)
    files = _tokenizer_files(found, tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        _write(staging, found, files)
        os.chmod(staging, 0o755)
        os.rename(staging, output)
    except BaseException:
        shutil.rmtree(staging)
        raise
    return read_diffusers_folder(output)


def _write(folder: Path, source: Source, tokenizer: Mapping[str, bytes]) -> None:
    for component in COMPONENTS:
        (folder / component).mkdir()
    _write_json(folder / INDEX, {"_class_name": PIPELINES[0], **source.classes})
    for component, data in source.configs.items():
        _write_json(folder / component / COMPONENTS[component].config, data)
    for name, data in tokenizer.items():
        (folder / "tokenizer" / name).write_bytes(data)
    checked = read_diffusers_folder(folder)
    shapes = {
        "unet": checked.shapes[STAGE],
        "vae": checked.shapes[DECODER],
        "text_encoder": clip_shapes(checked.text_config),
    }
    for component, expected in shapes.items():  # one at a time: each may be gigabytes
        tensors = source.tensors(component, expected)
        stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(stored, folder / component / f"{COMPONENTS[component].stem}.safetensors", {"format": "pt"})


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def _tokenizer_files(source: Source, folder: str | os.PathLike | None) -> dict[str, bytes]:
    """A tokenizer's files, which are known to be one, with the padding token that the source asks for."""
    folders = source.tokenizers if folder is None else (Path(folder),)
    files = next((files for folder in folders if (files := read_tokenizer(folder, folder))), None)
    if files is None:
        raise BundleError(
            f"no tokenizer in {' or '.join(map(str, folders)) or 'the source'}: give the folder of one, with "
            "tokenizer.json, or with vocab.json and merges.txt"
        )
    tokenizer_json(files)
    if source.pad_token is not None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            settings = json.loads(files.get(name, b"{}"))
            files[name] = json.dumps(settings | {"pad_token": source.pad_token}, indent=1).encode()
        tokenizer_json(files)
    return files


class _PickledFolder:
    """A diffusers folder. A component that has safetensors weights is taken as it is."""

    pad_token = None

    def __init__(self, path: Path):
        self._folder = read_diffusers_folder(path)
        self.configs = read_configs(path)
        self.classes = read_index(path)
        self.tokenizers = (path / "tokenizer",)

    def tensors(self, component: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        folder = self._folder.folder / component
        names = (f"{_PICKLES[component]}.bin", f"{_PICKLES[component]}.fp16.bin")
        path = next((folder / name for name in names if (folder / name).exists()), None)
        if path is None or any(folder.glob("*.safetensors*")):
            return self._folder.component_weights(component, shapes)
        check_inside(path, self._folder.folder)
        known = COMPONENTS[component]
        tensors = choose(path, _unpickle(path, shapes), shapes, rename=known.rename, ignored=known.ignored)
        check_fit(path, shapes, described(tensors))
        check_finite(path, tensors)
        return {name: tensors[name].view(shape) for name, shape in shapes.items()}


def _unpickle(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, not yet read from its mapping where they are not looked at."""
    values = sum(Size(shape).numel() for shape in shapes.values())
    limit = values * MAX_BYTES_PER_VALUE + (len(shapes) + 1) * HEADER_BYTES_PER_TENSOR + _MAX_PICKLE_BYTES
    check_size(path, limit)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise BundleError(f"{path} is no file that torch 1.6 or later has saved") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise BundleError(f"{path} has compressed parts, as torch.save makes none")
    total = sum(entry.file_size for entry in entries)
    pickled = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    if total > limit or pickled > _MAX_PICKLE_BYTES:
        raise BundleError(f"{path} holds {total} bytes, {pickled} of them pickled; at most {limit} and "
                          f"{_MAX_PICKLE_BYTES} are expected")  # fmt: skip
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged or hostile pickle makes of the loader; it runs none of its code
        raise BundleError(f"{path} is damaged or holds more than tensors; nothing of it was run") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise BundleError(f"{path} holds no tensors by name")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
