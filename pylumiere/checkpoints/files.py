"""What every reader of weights does first: sizes before reading, names, shapes and dtypes from a header before tensors.

Each refusal is a BundleError of one line that names the file and the first few culprits.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pylumiere.errors import BundleError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_BYTES_PER_VALUE = 4
HEADER_BYTES_PER_TENSOR = 512  # name, dtype, shape, offsets; ours take about 120


def check_size(path: Path, limit: int) -> int:
    """The size of a file, which may have `limit` bytes at most."""
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise BundleError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not path.is_file():
        raise BundleError(f"{path} is not a file")
    if size > limit:
        raise BundleError(f"{path} has {size} bytes; at most {limit} are expected")
    return size


def header_length(path: Path) -> int:
    """What a safetensors file says in its first eight bytes. A parser would believe 100 MB."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def check_inside(path: Path, folder: Path) -> None:
    """A link may not lead out of a model folder; but in Hugging Face's cache, all files are links to blobs."""
    target, root = path.resolve(), folder.resolve()
    if target.is_relative_to(root):
        return
    if root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs":
        return
    raise BundleError(f"{path} is a link out of the folder, to {target}")


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes."""
    check_size(path, limit)
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise BundleError(f"{path}: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path} holds no JSON object")
    return data


def check_tensors(path: Path, shapes: Mapping[str, tuple], found: Mapping[str, tuple[tuple, str]]) -> None:
    """Whether what a header lists (shape and dtype by name) is exactly what a network takes."""
    problems = []
    if missing := [name for name in shapes if name not in found]:
        problems.append(f"missing {first_few(missing)}")
    if extra := [name for name in found if name not in shapes]:
        problems.append(f"unexpected {first_few(extra)}")
    both = [name for name in shapes if name in found]
    if wrong := [f"{n} {list(found[n][0])} (expected {list(shapes[n])})" for n in both if found[n][0] != shapes[n]]:
        problems.append(f"wrong shape {first_few(wrong)}")
    if wrong := [f"{n} {found[n][1]}" for n in both if found[n][1] not in DTYPES]:
        problems.append(f"wrong dtype {first_few(wrong)} (allowed: {', '.join(DTYPES)})")
    if problems:
        raise BundleError(f"{path} does not fit the model: {'; '.join(problems)}")


def described(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[tuple, str]]:
    """Shape and dtype by name, as a header of these tensors would list them."""
    names = {value: name for name, value in DTYPES.items()}
    return {name: (tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype))) for name, tensor in tensors.items()}


def check_finite(path: Path | str, tensors: Mapping[str, torch.Tensor]) -> None:
    spoiled = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if spoiled:
        raise BundleError(f"{path}: NaN or infinity in {first_few(spoiled)}")


def is_finite(tensor: torch.Tensor) -> bool:
    """`isfinite(tensor).all()`, in one pass without temporaries: on a CPU twenty times as fast."""
    if tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())  # a NaN is the least and the largest


def first_few(items: Iterable[str], count: int = 3) -> str:
    """Names from a file, fit for one line of text."""
    items = list(items)
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(printable(item) for item in items[:count]) + more


def printable(text: str, length: int = 120) -> str:
    cut = text if len(text) <= length else text[:length] + "..."
    return "".join(letter if letter.isprintable() else "?" for letter in cut)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def replace_file(path: Path, write: Callable[[str], Any]) -> None:
    """Writes a file aside and renames it: no reader sees half of it."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
