"""Adapters: other weights for a network, made from its own by a strength. Here: styles; LoRA is in `lora`.

A style changes the base network's image path:

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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pylumiere.checkpoints.files import DTYPES, described, header_length, is_finite, printable
from pylumiere.config import NetworkConfig
from pylumiere.errors import InvalidRequest
from pylumiere.networks.families import expected_shapes, family_of

FOLDER = "styles"  # of a model folder
_MAX_HEADER = 2**20


@dataclass(frozen=True)
class Adapter(ABC):
    """Other weights for a network, read from a file. Equal adapters have equal files.

    Attributes:
        name: the file's, without its ending.
        digest: SHA-256 of the file.
    """

    name: str = field(compare=False)
    digest: str

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of the changed weights."""

    @abstractmethod
    def change(self, name: str, weight: Tensor, strength: float) -> Tensor:
        """One of these weights at a strength. Float32 in and out, on the device of `weight`."""

    def weights(self, original: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
        """The changed weights at a strength, in the dtype and on the device of the original ones. 0 gives those."""
        return AdapterChoice(((self, strength),)).weights(original)


@dataclass(frozen=True)
class AdapterChoice:
    """Adapters and their strengths, in the order in which they change the weights: what these depend on."""

    adapters: tuple[tuple[Adapter, float], ...]

    def weights(self, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The changed weights in the dtype and on the device of the original ones; each is rounded once, at the end."""
        users: dict[str, list[tuple[Adapter, float]]] = {}
        for adapter, strength in self.adapters:
            for name in adapter.names:
                users.setdefault(name, []).append((adapter, strength))
        changed = {}
        for name, adapters in users.items():
            weight = original[name].float()
            for adapter, strength in adapters:
                weight = adapter.change(name, weight, strength)
            changed[name] = weight.to(original[name].dtype)
        return changed


@dataclass(frozen=True)
class Style(Adapter):
    """A style in memory.

    Attributes:
        tensors: as in the file.
    """

    tensors: Mapping[str, Tensor] = field(compare=False, repr=False)

    @property
    def names(self) -> list[str]:
        return sorted({re.sub(r"\.(up|down)$", "", name) if _is_factor(name) else name for name in self.tensors})

    def change(self, name: str, weight: Tensor, strength: float) -> Tensor:
        if name in self.tensors:
            styled = self.tensors[name].to(weight.device, torch.float32)
        else:
            up, down = (self.tensors[f"{name}.{part}"].to(weight.device, torch.float32) for part in ("up", "down"))
            styled = weight + (up @ down).view(weight.shape)
        return strength * styled + (1 - strength) * weight


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

    def refuse(text: str) -> InvalidRequest:
        return InvalidRequest(f"style={str(path)!r} {text}")

    def choose(found: Mapping[str, tuple]) -> list[str]:
        _check(found, shapes, is_temporal, refuse)
        return list(found)

    file = read_adapter_file(path, "style", shapes, choose, refuse, max_header=_MAX_HEADER)
    made_for = file.metadata.get("model")
    if model is not None and made_for is not None and made_for != model:
        raise refuse("was made for another model: its weights are of the same shape, but not those it was trained on")
    return Style(path.stem, file.digest, file.tensors)


@dataclass(frozen=True)
class AdapterFile:
    """What was read of an adapter's file."""

    digest: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]


def read_adapter_file(
    path: Path,
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    choose: Callable[[Mapping[str, tuple[tuple[int, ...], str]]], Iterable[str]],
    refuse: Callable[[str], InvalidRequest],
    *,
    max_header: int,
) -> AdapterFile:
    """Reads tensors of a safetensors file that holds no more than a network does.

    Args:
        kind: what the file is, for the text of errors.
        shapes: of all the network's tensors.
        choose: from shapes and dtypes by name, as in the header, the names of the tensors to read; refuses others.
        refuse: the error of a text.
        max_header: bytes.
    """
    limit = 4 * sum(torch.Size(shape).numel() for shape in shapes.values()) + max_header
    try:
        size = path.stat().st_size
        if size > limit:
            raise refuse(f"has {size} bytes; a {kind} of this model has at most {limit}")
        if max_header < (length := header_length(path)) < size:
            raise refuse(f"says that its header has {length} bytes; at most {max_header} are read")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            chosen = choose({name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()})
            tensors = {name: file.get_tensor(name) for name in chosen}
            metadata = file.metadata() or {}
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise refuse("is truncated or no safetensors file") from error
    spoiled = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if spoiled:
        raise refuse(f"holds NaN or infinity in {printable(spoiled[0])}")
    return AdapterFile(digest, metadata, tensors)


def save_style(path: str | os.PathLike, tensors: Mapping[str, Tensor], config: NetworkConfig, model: str) -> None:
    """Writes a style's file: whole weights by name, or their `.up` and `.down`; stored in the tensors' own dtype.

    Raises:
        InvalidRequest: `read_style` would refuse it.
    """
    path = Path(path)
    _check(described(tensors), *_network(config), lambda text: InvalidRequest(f"style={str(path)!r} {text}"))
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
        if dtype not in DTYPES:
            raise refuse(f"holds {name!r} as {dtype}; allowed are {', '.join(DTYPES)}")
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
