"""LoRA: low-rank changes of a network's weights, in the three spellings of public files.

    W = W_orig + strength * (alpha / rank) * up @ down

    peft        unet.MODULE.lora_A.weight (down)          unet.MODULE.lora_B.weight (up)
    diffusers   unet.MODULE.lora.down.weight              unet.MODULE.lora.up.weight
                unet.ATTENTION.processor.to_q_lora.down.weight, for to_q, to_k, to_v and to_out
    kohya       lora_unet_MODULE.lora_down.weight         lora_unet_MODULE.lora_up.weight
                with the dots of MODULE as underscores

"unet." may be missing. `down` is [r, I, ...] and `up` [O, r] of a weight [O, I, ...], a linear layer or a convolution.
alpha is the tensor MODULE.alpha, or what the metadata says that diffusers and peft write, or the rank.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pylumiere.checkpoints.adapters import Adapter, read_adapter_file
from pylumiere.checkpoints.files import DTYPES, first_few, printable
from pylumiere.errors import InvalidRequest

logger = logging.getLogger("pylumiere")

_MAX_HEADER = 4 * 2**20  # trainers write lists of tags into it
_OF_TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")
_PART = re.compile(
    r"(?P<module>.+?)(?:(?P<down>\.lora_A|[._]lora[._]down)\.weight|(?P<up>\.lora_B|[._]lora[._]up)\.weight|\.alpha)"
)
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Factors:
    """A change scale * up @ down of one weight."""

    up: Tensor
    down: Tensor
    scale: float


@dataclass(frozen=True)
class Lora(Adapter):
    """A LoRA in memory.

    Attributes:
        factors: by the name of the weight that they change.
    """

    factors: Mapping[str, Factors] = field(compare=False, repr=False)

    @property
    def names(self) -> list[str]:
        return sorted(self.factors)

    def change(self, name: str, weight: Tensor, strength: float) -> Tensor:
        factors = self.factors[name]
        up, down = (factor.to(weight.device, torch.float32).flatten(1) for factor in (factors.up, factors.down))
        return torch.addmm(weight.flatten(1), up, down, alpha=strength * factors.scale).view(weight.shape)


def find_lora(source: str | os.PathLike) -> Path:
    """Raises InvalidRequest for a path that is no file."""
    path = Path(source)
    if not path.is_file():
        raise InvalidRequest(f"lora={str(source)!r}: no such file")
    return path


def read_lora(path: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]]) -> Lora:
    """Reads and checks a LoRA for a network. What a file holds for text encoders is left out, with a warning.

    Args:
        shapes: name and shape of each of the network's tensors.

    Raises:
        InvalidRequest: damaged, too large, of another kind (DoRA, LoHa, ...), or made for another network.
    """
    path = Path(path)
    parts: dict[str, dict[str, str]] = {}  # of a weight: "up", "down" and "alpha", by their names in the file

    def refuse(text: str) -> InvalidRequest:
        return InvalidRequest(f"lora={str(path)!r} {text}")

    def choose(found: Mapping[str, tuple[tuple[int, ...], str]]) -> list[str]:
        ours = [name for name in found if not name.startswith(_OF_TEXT_ENCODERS)]
        parts.update(_sort_out(ours, shapes, refuse))
        if not parts:
            raise refuse("changes no weight of the network")
        for weight, names in parts.items():
            _check_factors(weight, names, found, shapes[weight], refuse)
        if len(ours) < len(found):
            logger.warning("lora=%r: its %d tensors for text encoders are not used", str(path), len(found) - len(ours))
        return ours

    file = read_adapter_file(path, "LoRA", shapes, choose, refuse, max_header=_MAX_HEADER)
    said = _Alphas.from_metadata(file.metadata, refuse)
    factors = {}
    for weight, names in parts.items():
        up, down = file.tensors[names["up"]], file.tensors[names["down"]]
        alpha = file.tensors[names["alpha"]].item() if "alpha" in names else None
        factors[weight] = Factors(up, down, said.scale(weight.removesuffix(".weight"), len(down), alpha))
    if strange := said.unused():
        raise refuse(f"gives an alpha to {first_few(strange)}, which it does not change")
    return Lora(path.stem, file.digest, factors)


def _sort_out(names: list[str], shapes: Mapping[str, tuple], refuse: Callable) -> dict[str, dict[str, str]]:
    """The parts of each changed weight; raises for what is no part of a LoRA of this network."""
    modules = {name.removesuffix(".weight") for name in shapes if name.endswith(".weight")}
    spelled = {"lora_unet_" + module.replace(".", "_"): module for module in modules}
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        match = _PART.fullmatch(name)
        if match is None:
            raise refuse(f"holds {printable(name)}: no factor of a LoRA, or of a kind that is not read (DoRA, LoHa, "
                         "LoKr, biases)")  # fmt: skip
        module = match["module"]
        module = spelled.get(module, module.removeprefix("unet.").replace(".processor.", "."))
        if module.endswith(".to_out"):
            module += ".0"
        if module not in modules:
            raise refuse(f"was made for another model: this one has no layer {printable(module)}")
        part = "down" if match["down"] else "up" if match["up"] else "alpha"
        if part in parts.setdefault(f"{module}.weight", {}):
            raise refuse(f"holds two spellings of {module}: {printable(parts[f'{module}.weight'][part])} and "
                         f"{printable(name)}")  # fmt: skip
        parts[f"{module}.weight"][part] = name
    return parts


def _check_factors(
    weight: str,
    names: Mapping[str, str],
    found: Mapping[str, tuple[tuple[int, ...], str]],
    shape: tuple[int, ...],
    refuse: Callable[[str], InvalidRequest],
) -> None:
    for name in names.values():
        if found[name][1] not in DTYPES:
            raise refuse(f"holds {printable(name)} as {found[name][1]}; allowed are {', '.join(DTYPES)}")
    if math.prod(found[names["alpha"]][0] if "alpha" in names else ()) != 1:
        raise refuse(f"holds no number in {printable(names['alpha'])}")
    up, down = (found[names[part]][0] if part in names else () for part in ("up", "down"))
    if min(len(up), len(down)) < 2 or up[1] != down[0] or not 1 <= up[1] <= max(shape[0], math.prod(shape[1:])):
        raise refuse(f"holds no pair of factors for {weight}: up is {list(up)}, down is {list(down)}")
    if len(shape) < 2 or _core(up[2:]) or (up[0], *_core(down[1:])) != (shape[0], *_core(shape[1:])):
        raise refuse(f"was made for another model: {weight} is {list(shape)}, and its factors are {list(up)} (up) and "
                     f"{list(down)} (down)")  # fmt: skip


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without ones at its end: a linear layer's factor and a 1 x 1 convolution's hold the same values."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


class _Alphas:
    """What a file's metadata says of alphas, as peft's LoraConfig: one, exceptions by module, and how it is used."""

    def __init__(self, alpha: float | None, exceptions: Mapping[str, float], by_root: bool):
        self._alpha, self._exceptions, self._by_root = alpha, exceptions, by_root
        self._used: set[str] = set()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], refuse: Callable[[str], InvalidRequest]) -> _Alphas:
        try:
            data = json.loads(metadata.get(_METADATA, "{}"))
            data = {name.removeprefix("unet."): value for name, value in data.items()}
            alpha, exceptions = data.get("lora_alpha"), data.get("alpha_pattern") or {}
            alpha = None if alpha is None else _number(alpha)
            exceptions = {name: _number(value) for name, value in exceptions.items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise refuse(f"has metadata {_METADATA} that cannot be understood") from error
        if data.get("use_dora"):
            raise refuse("is a DoRA; only plain LoRA is read")
        return cls(alpha, exceptions, bool(data.get("use_rslora")))

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        """Of a module, whose own alpha goes before what the metadata says."""
        for name, value in self._exceptions.items():
            plain = name.removeprefix("^").replace("\\.", ".")
            if module == plain or (module.endswith(f".{plain}") and not name.startswith("^")):
                self._used.add(name)
                alpha = value if alpha is None else alpha
                break
        alpha = self._alpha if alpha is None else alpha
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self._by_root else rank)

    def unused(self) -> list[str]:
        """Exceptions that fit no module: a pattern that is not understood would scale a change wrongly."""
        return [name for name in self._exceptions if name not in self._used]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError("not a number")
    return float(value)
