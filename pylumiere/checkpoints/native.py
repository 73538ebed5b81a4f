"""A model folder: `config.json` and a safetensors file for each of its networks, named as its stage.

Everything is checked before it is used: file sizes before reading, names, shapes and dtypes from the header before the
tensors, and the tensors for NaN and infinity. Each refusal is one line that names the file and the first few culprits.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from pylumiere.config import ModelConfig
from pylumiere.errors import BundleError
from pylumiere.networks.families import AnyConfig, expected_shapes
from pylumiere.networks.text import TextEncoder, load_text_encoder

MAX_CONFIG_BYTES = 2**20
SHIPPED = ("demo",)

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_BYTES_PER_VALUE = 4
_HEADER_BYTES_PER_TENSOR = 512  # name, dtype, shape, offsets; ours take about 120


@dataclass(frozen=True)
class Checkpoint:
    """A model folder in memory.

    Attributes:
        weights: state dicts by the name of their network (see `ModelConfig.networks`), in the dtype of the files.
    """

    folder: Path
    config: ModelConfig
    weights: Mapping[str, Mapping[str, torch.Tensor]]

    @property
    def parameters(self) -> int:
        """Values in all networks."""
        return sum(tensor.numel() for network in self.weights.values() for tensor in network.values())

    @property
    def facts(self) -> dict[str, Any]:
        """For `Engine.info`; a bundle has more to say."""
        return {}

    def text_encoder(self) -> TextEncoder:
        """The encoder that the config names."""
        return load_text_encoder(
            self.config.text_encoder, max_length=self.config.text_tokens, width=self.config.first.network.text_dim
        )


def find_model(source: str | os.PathLike) -> Path:
    """The folder of a shipped model's name, or of a path. A folder of a shipped name is given as ./demo.

    Raises:
        BundleError: no such name or folder; the shipped names are listed.
    """
    path = Path(source)
    if str(source) in SHIPPED:
        path = Path(str(importlib.resources.files("pylumiere") / str(source)))
        if not (path / "config.json").is_file():
            raise BundleError(f"model {str(source)!r} is not part of this installation: {path} has no config.json")
    if not path.exists():
        raise BundleError(
            f"model {str(source)!r} does not exist; give a folder, a bundle or one of: {', '.join(SHIPPED)}"
        )
    if not path.is_dir():
        raise BundleError(f"model {str(source)!r} is not a folder; give one with config.json and its weights")
    return path


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads and checks a model folder.

    Raises:
        BundleError: anything missing, malformed, truncated, too large or unexpected.
    """
    config = read_config(folder)
    for path in sorted(folder.glob("*.safetensors")):
        if path.stem not in config.networks:
            raise BundleError(f"{path} is there, but config.json has no {path.stem} stage")
    weights = {
        name: read_weights(folder / f"{name}.safetensors", network) for name, network in config.networks.items()
    }
    return Checkpoint(folder, config, weights)


def read_config(folder: Path) -> ModelConfig:
    """Raises BundleError for a config.json that is missing, larger than 1 MiB, no JSON, or refused by ModelConfig."""
    path = folder / "config.json"
    _check_size(path, MAX_CONFIG_BYTES)
    try:
        return ModelConfig.from_dict(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise BundleError(f"{path}: {_first_line(error)}") from error


def read_weights(path: Path, config: AnyConfig, data: bytes | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, which must be exactly those of the network.

    `data` is the file's content where a bundle has read it already; `path` then only names it.

    Raises:
        BundleError: see `load_checkpoint`.
    """
    shapes = expected_shapes(config)
    values = sum(torch.Size(shape).numel() for shape in shapes.values())
    limit = values * _MAX_BYTES_PER_VALUE + (len(shapes) + 1) * _HEADER_BYTES_PER_TENSOR
    if data is None:
        _check_size(path, limit)
        tensors = _read_file(path, shapes)
    else:
        if len(data) > limit:
            raise BundleError(f"{path} has {len(data)} bytes; at most {limit} are expected")
        try:
            tensors = load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise BundleError(f"{path} is truncated or no safetensors file: {_first_line(error)}") from None
        names = {value: name for name, value in _DTYPES.items()}
        found = {name: (tuple(t.shape), names.get(t.dtype, str(t.dtype))) for name, t in tensors.items()}
        _check_tensors(path, shapes, found)
    spoiled = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if spoiled:
        raise BundleError(f"{path}: NaN or infinity in {_first_few(spoiled)}")
    return tensors


def _read_file(path: Path, shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            _check_tensors(path, shapes, {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in found.items()})
            return {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is truncated or no safetensors file: {_first_line(error)}") from error


def save_checkpoint(
    folder: str | os.PathLike,
    config: ModelConfig,
    weights: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a model folder that `load_checkpoint` accepts. Each file is written aside and renamed, config.json last.

    Args:
        folder: made if missing.
        weights: state dicts of the networks of `config`, by their names.
        dtype: stored dtype (float32, bfloat16 or float16); None keeps the tensors' own.

    Raises:
        BundleError: state dicts that are not exactly the networks' tensors, or hold NaN or infinity.
    """
    folder = Path(folder)
    if set(weights) != set(config.networks):
        raise BundleError(
            f"weights are given for {', '.join(sorted(weights)) or 'nothing'}; the model has "
            f"{', '.join(config.networks)}"
        )
    checked = {}
    for stage, network in config.networks.items():
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights[stage].items()}
        names = {value: name for name, value in _DTYPES.items()}
        found = {name: (tuple(t.shape), names.get(t.dtype, str(t.dtype))) for name, t in tensors.items()}
        _check_tensors(Path(f"{stage} weights"), expected_shapes(network), found)
        spoiled = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if spoiled:
            raise BundleError(f"{stage} weights: NaN or infinity in {_first_few(spoiled)}")
        checked[f"{stage}.safetensors"] = tensors
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in checked.items():
        _replace(folder / name, lambda path, tensors=tensors: save_file(tensors, path, {"format": "pt"}))
    text = json.dumps(config.to_dict(), indent=1) + "\n"
    _replace(folder / "config.json", lambda path: Path(path).write_text(text))


def _check_size(path: Path, limit: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    if not path.is_file():
        raise BundleError(f"{path} is not a file")
    if size > limit:
        raise BundleError(f"{path} has {size} bytes; at most {limit} are expected")


def _check_tensors(path: Path, shapes: dict[str, tuple], found: dict[str, tuple[tuple, str]]) -> None:
    problems = []
    if missing := [name for name in shapes if name not in found]:
        problems.append(f"missing {_first_few(missing)}")
    if extra := [name for name in found if name not in shapes]:
        problems.append(f"unexpected {_first_few(extra)}")
    both = [name for name in shapes if name in found]
    if wrong := [f"{n} {list(found[n][0])} (expected {list(shapes[n])})" for n in both if found[n][0] != shapes[n]]:
        problems.append(f"wrong shape {_first_few(wrong)}")
    if wrong := [f"{n} {found[n][1]}" for n in both if found[n][1] not in _DTYPES]:
        problems.append(f"wrong dtype {_first_few(wrong)} (allowed: {', '.join(_DTYPES)})")
    if problems:
        raise BundleError(f"{path} does not fit the model: {'; '.join(problems)}")


def _first_few(items: Iterable[str], count: int = 3) -> str:
    items = list(items)
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _replace(path: Path, write) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
