"""The safetensors weights of one component of a diffusers folder: a file, a 16-bit variant of it, or shards.

Of a stem such as "diffusion_pytorch_model", these are looked for in this order, and the first one is read:

    STEM.safetensors                    STEM.safetensors.index.json
    STEM.fp16.safetensors               STEM.safetensors.index.fp16.json

So where full and 16-bit weights are both there, the full ones are taken. Pickles are never opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from pylumiere.checkpoints.files import (
    HEADER_BYTES_PER_TENSOR,
    MAX_BYTES_PER_VALUE,
    check_finite,
    check_inside,
    check_size,
    check_tensors,
    first_few,
    first_line,
    header_length,
    printable,
    read_json,
)
from pylumiere.errors import BundleError

MAX_INDEX_BYTES = 4 * 2**20
_METADATA_BYTES = 2**16  # of a header, beside its tensors
_VARIANTS = ("", "fp16")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")

Piece = TypeVar("Piece")


@dataclass(frozen=True)
class Weights:
    """Where a component's weights lie.

    Attributes:
        path: the file, or the index of the shards; errors name it.
        files: those that hold tensors, in order of name.
        shard_of: the file of each tensor, as the index says; None for a single file.
    """

    path: Path
    files: tuple[Path, ...]
    shard_of: Mapping[str, Path] | None = None


def find_weights(folder: Path, stem: str, root: Path | None = None) -> Weights:
    """The weights of a component's folder.

    Args:
        stem: "diffusion_pytorch_model", or "model" of transformers.
        root: folder that links may not leave; None: `folder`.

    Raises:
        BundleError: none, only pickles, or an index that cannot be what it says.
    """
    root = folder if root is None else root
    for variant in _VARIANTS:
        dotted = f".{variant}" if variant else ""
        if (file := folder / f"{stem}{dotted}.safetensors").exists():
            check_inside(file, root)
            return Weights(file, (file,))
        if (index := folder / f"{stem}.safetensors.index{dotted}.json").exists():
            check_inside(index, root)
            return _from_index(index, root)
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise BundleError(
            f"{folder} has only pickled weights ({first_few(pickles)}), which can run code; convert them with "
            "`pylumiere import`"
        )
    raise BundleError(f"{folder} has no {stem}.safetensors")


def read_tensors(
    folder: Path,
    stem: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rename: Callable[[str], str] | None = None,
    ignored: tuple[str, ...] = (),
    root: Path | None = None,
) -> dict[str, Tensor]:
    """Reads exactly the tensors of `shapes`, in the dtype of the files and as views of their mappings.

    Args:
        stem, root: see `find_weights`.
        shapes: name and shape of each tensor that the network takes. A matrix may be stored as a 1 x 1 convolution.
        rename: the network's name of a tensor, from the file's.
        ignored: beginnings of (the network's) names of tensors that may be there and are not read. All of them
            together may be as large and as many as those of `shapes`.

    Raises:
        BundleError: see `find_weights`; too large, truncated, tensors that are missing, unexpected, twice there, of
            another shape or dtype, or hold NaN or infinity.
    """
    weights = find_weights(folder, stem, root)
    _check_sizes(weights, shapes, 2 if ignored else 1)
    with ExitStack() as stack:
        pieces = choose(weights.path, _open_all(weights, stack), shapes, rename=rename, ignored=ignored)
        headers = {name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in pieces.items()}
        check_fit(weights.path, shapes, headers)
        tensors = {name: pieces[name][:].view(shape) for name, shape in shapes.items()}
    check_finite(weights.path, tensors)
    return tensors


def choose(
    path: Path,
    pieces: Mapping[str, Piece],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rename: Callable[[str], str] | None = None,
    ignored: tuple[str, ...] = (),
) -> dict[str, Piece]:
    """What a file holds, by the network's names and without what is ignored; see `read_tensors`."""
    chosen: dict[str, Piece] = {}
    for name, piece in pieces.items():
        ours = name if rename is None else rename(name)
        if ours in chosen:
            raise BundleError(f"{path} holds {printable(ours)} under two names")
        if ours in shapes or not ours.startswith(ignored):
            chosen[ours] = piece
    return chosen


def check_fit(path: Path, shapes: Mapping[str, tuple], found: Mapping[str, tuple[tuple, str]]) -> None:
    """`check_tensors`, where a matrix may also be a 1 x 1 convolution."""

    def flat(name: str, shape: tuple) -> tuple:
        expected = shapes.get(name, ())
        return expected if len(expected) == 2 and shape == (*expected, 1, 1) else shape

    check_tensors(path, shapes, {name: (flat(name, shape), dtype) for name, (shape, dtype) in found.items()})


def _from_index(path: Path, root: Path) -> Weights:
    places = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise BundleError(f"{path} has no weight_map of names of tensors to names of files")
    names = sorted(set(places.values()))
    if strange := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise BundleError(f"{path} names {first_few(strange)}; shards are safetensors files in the same folder")
    files = {name: path.parent / name for name in names}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise BundleError(f"{path}: shard {first_few(missing)} is missing")
    for file in files.values():
        check_inside(file, root)
    return Weights(path, tuple(files.values()), {tensor: files[name] for tensor, name in places.items()})


def _check_sizes(weights: Weights, shapes: Mapping[str, tuple], times: int) -> None:
    values = sum(Size(shape).numel() for shape in shapes.values())
    header = times * (len(shapes) + 1) * HEADER_BYTES_PER_TENSOR + _METADATA_BYTES
    limit = times * values * MAX_BYTES_PER_VALUE + header * len(weights.files)
    total = sum(check_size(path, limit) for path in weights.files)
    if total > limit:
        raise BundleError(f"the shards of {weights.path} have {total} bytes; at most {limit} are expected")
    for path in weights.files:
        if (length := header_length(path)) > header:
            raise BundleError(f"{path} says that its header has {length} bytes; at most {header} are expected")


def _open_all(weights: Weights, stack: ExitStack) -> dict[str, Any]:
    """The slices of all files by name. Each tensor is in one file, the one that the index says."""
    found: dict[str, Any] = {}
    for path in weights.files:
        for name, piece in _open(path, stack).items():
            said = path if weights.shard_of is None else weights.shard_of.get(name)
            if said != path:
                where = "does not list" if said is None else f"places in {said.name}"
                raise BundleError(f"{path} holds {printable(name)}, which {weights.path.name} {where}")
            found[name] = piece
    if missing := [name for name in weights.shard_of or () if name not in found]:
        raise BundleError(f"{weights.path} lists {first_few(missing)}, and no shard holds it")
    return found


def _open(path: Path, stack: ExitStack) -> dict[str, Any]:
    try:
        file = stack.enter_context(safe_open(path, "pt"))
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is truncated or no safetensors file: {first_line(error)}") from error
