"""Styles: other weights for the base network's image path, mixed with its own by a strength.

    W = a * W_style + (1 - a) * W_orig        on spatial weights; temporal weights stay as they are

A style's file is a safetensors file that holds, for each changed weight, either the whole W_style under the weight's
name, or a low-rank change under two names: W_style = W_orig + up @ down, with `NAME.up` [O, r] and `NAME.down` [r, I],
I the values of one output. Its metadata may name the model that it was made for (`save_style` writes that): a style
whose weights have the right shapes but that was trained on another model is refused, not applied.

Source: Bar-Tal et al. 2024, "Lumiere", section 4 ("Stylized generation").
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pylumiere.config import NetworkConfig
from pylumiere.errors import InvalidRequest
from pylumiere.networks.families import expected_shapes, family_of

FOLDER = "styles"  # of a model folder
_DTYPES = ("F32", "F16", "BF16")
_MAX_HEADER = 2**20


@dataclass(frozen=True)
class Style:
    """A style in memory. Equal styles have equal files.

    Attributes:
        name: the file's, without its ending.
        digest: SHA-256 of the file.
        tensors: as in the file.
    """

    name: str = field(compare=False)
    digest: str
    tensors: Mapping[str, Tensor] = field(compare=False, repr=False)

    def weights(self, original: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
        """The changed weights at a strength, in the dtype and on the device of the original ones. 0 gives those."""
        mixed = {}
        for name in self.names:
            weight = original[name]
            if name in self.tensors:
                styled = self.tensors[name].to(weight.device, torch.float32)
            else:
                up, down = (self.tensors[f"{name}.{part}"].to(weight.device, torch.float32) for part in ("up", "down"))
                styled = weight.float() + (up @ down).view(weight.shape)
            mixed[name] = (strength * styled + (1 - strength) * weight.float()).to(weight.dtype)
        return mixed

    @property
    def names(self) -> list[str]:
        """Names of the changed weights."""
        return sorted({re.sub(r"\.(up|down)$", "", name) if _is_factor(name) else name for name in self.tensors})


@dataclass(frozen=True)
class StyleChoice:
    """A style and its strength: what a network's weights depend on."""

    style: Style
    strength: float


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """What tells one network from another of the same shape: a hash of its first and last convolutions' weights."""
    digest = hashlib.sha256()
    for name in ("conv_in.weight", "conv_out.weight"):  # every family has them
        digest.update(weights[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def find_style(source: str | os.PathLike, folder: Path | None) -> Path:
    """The file of a style that the model brings, by name, or of a path.

    Raises:
        InvalidRequest: there is none; the names are listed.
    """
    names = style_names(folder)
    if str(source) in names:
        return folder / FOLDER / f"{source}.safetensors"
    path = Path(source)
    if not path.is_file():
        raise InvalidRequest(f"style={str(source)!r}: no such file, and no style of this model; "
                             f"it has: {', '.join(names) or 'none'}")  # fmt: skip
    return path


def style_names(folder: Path | None) -> list[str]:
    """The styles that a model folder brings."""
    if folder is None or not (folder / FOLDER).is_dir():
        return []
    return sorted(path.stem for path in (folder / FOLDER).glob("*.safetensors"))


def read_style(path: str | os.PathLike, config: NetworkConfig, model: str | None = None) -> Style:
    """Reads and checks a style for a base network.

    Args:
        config: of the base network.
        model: the `fingerprint` of its weights; None to compare shapes only.

    Raises:
        InvalidRequest: damaged, too large, made for another model, or it changes a temporal weight.
    """
    path = Path(path)
    shapes, is_temporal = _network(config)
    values = sum(torch.Size(shape).numel() for shape in shapes.values())

    def refuse(text: str) -> InvalidRequest:
        return InvalidRequest(f"style={str(path)!r} {text}")

    try:
        size = path.stat().st_size
        if size > 4 * values + _MAX_HEADER:
            raise refuse(f"has {size} bytes; a style of this model has at most {4 * values + _MAX_HEADER}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            _check(found, shapes, is_temporal, refuse)
            tensors = {name: file.get_tensor(name) for name in found}
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise refuse("is truncated or no safetensors file") from error
    made_for = metadata.get("model")
    if model is not None and made_for is not None and made_for != model:
        raise refuse("was made for another model: its weights are of the same shape, but not those it was trained on")
    spoiled = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if spoiled:
        raise refuse(f"holds NaN or infinity in {spoiled[0]}")
    return Style(path.stem, digest, tensors)


def save_style(path: str | os.PathLike, tensors: Mapping[str, Tensor], config: NetworkConfig, model: str) -> None:
    """Writes a style's file: whole weights by name, or their `.up` and `.down`; stored in the tensors' own dtype.

    Raises:
        InvalidRequest: `read_style` would refuse it.
    """
    path = Path(path)
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    found = {name: (tuple(t.shape), names.get(t.dtype, str(t.dtype))) for name, t in tensors.items()}
    _check(found, *_network(config), lambda text: InvalidRequest(f"style={str(path)!r} {text}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, temporary, {"format": "pt", "model": model})
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def _network(config: NetworkConfig) -> tuple[dict[str, tuple[int, ...]], Callable[[str], bool]]:
    return expected_shapes(config), functools.partial(family_of(config).is_temporal, config)


def _is_factor(name: str) -> bool:
    return name.endswith((".weight.up", ".weight.down"))


def _check(found: Mapping[str, tuple], shapes: Mapping[str, tuple], is_temporal, refuse) -> None:
    """Names, shapes and dtypes, from the header alone."""
    if not found:
        raise refuse("changes no weight")
    for name, (shape, dtype) in found.items():
        weight = name.rpartition(".")[0] if _is_factor(name) else name
        if weight not in shapes:
            raise refuse(f"was made for another model: this one has no weight {weight[:80]!r}")
        if is_temporal(weight):
            raise refuse(f"changes the temporal weight {weight!r}; only spatial weights can be styled")
        if dtype not in _DTYPES:
            raise refuse(f"holds {name!r} as {dtype}; allowed are {', '.join(_DTYPES)}")
        if not _is_factor(name):
            if shape != shapes[name]:
                raise refuse(f"was made for another model: {name} is {list(shape)}, here {list(shapes[name])}")
            continue
        up, down = (found.get(f"{weight}.{part}", ((), ""))[0] for part in ("up", "down"))
        outputs, inputs = shapes[weight][0], torch.Size(shapes[weight][1:]).numel()
        if len(up) != 2 or len(down) != 2 or up[1] != down[0] or not 1 <= up[1] <= min(outputs, inputs):
            raise refuse(f"holds no pair of factors for {weight}: up is {list(up)}, down is {list(down)}")
        if (up[0], down[1]) != (outputs, inputs):
            raise refuse(f"was made for another model: {weight} is {up[0]} x {down[1]}, here {outputs} x {inputs}")
        if weight in found:
            raise refuse(f"holds {weight} both whole and as factors")
