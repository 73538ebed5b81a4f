"""The GPUs that bundles are built for, as data: names, compute capabilities, and what can be built without them.

A compute capability is a number: 89 is 8.9. `sm_89` is a name too, for any GPU of that capability.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pylumiere.errors import InvalidRequest

# Machine code of our kernels is compiled for these.
CUBIN_SMS = (75, 80, 86, 89, 90, 100, 120)
# TensorRT-RTX builds plans for these without the GPU, and its portable plans run on those from Ampere on.
RTX_SMS = (75, 80, 86, 89, 120, 121)
RTX_PORTABLE_SMS = tuple(sm for sm in RTX_SMS if sm >= 80)

FAMILIES = {75: "Turing", 80: "Ampere", 86: "Ampere", 89: "Ada", 90: "Hopper", 100: "Blackwell", 120: "Blackwell",
            121: "Blackwell"}  # fmt: skip


@dataclass(frozen=True)
class Sku:
    """One card.

    Attributes:
        name: as it is typed; aliases mean the same.
        device: a pattern that the driver's device name matches, in lower case.
        sm: compute capability.
        memory_gib: of the usual version.
    """

    name: str
    device: str
    sm: int
    memory_gib: int
    aliases: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        return FAMILIES[self.sm]

    @property
    def has_bf16(self) -> bool:
        return has_bf16(self.sm)


SKUS = (
    Sku("t4", r"\bt4\b", 75, 16),
    Sku("rtx2080ti", r"rtx 2080 ti", 75, 11),
    Sku("a100", r"\ba100\b", 80, 80, ("a100-40", "a100-80")),
    Sku("a30", r"\ba30\b", 80, 24),
    Sku("a10", r"\ba10g?\b", 86, 24, ("a10g",)),
    Sku("a40", r"\ba40\b", 86, 48),
    Sku("rtxa6000", r"rtx a6000", 86, 48, ("a6000",)),
    Sku("rtx3090", r"rtx 3090(?: ti)?$", 86, 24, ("rtx3090ti",)),
    Sku("l4", r"\bl4\b", 89, 24),
    Sku("l40s", r"\bl40s?\b", 89, 48, ("l40",)),
    Sku("rtx6000ada", r"rtx 6000 ada", 89, 48),
    Sku("rtx4090", r"rtx 4090(?: d)?$", 89, 24),
    Sku("h100", r"\bh100\b", 90, 80),
    Sku("h200", r"\bh200\b", 90, 141),
    Sku("gh200", r"\bgh200\b", 90, 96),
    Sku("b200", r"\bb200\b", 100, 180),
    Sku("gb200", r"\bgb200\b", 100, 186),
    Sku("rtx5090", r"rtx 5090(?: d)?$", 120, 32),
    Sku("rtx5080", r"rtx 5080$", 120, 16),
    Sku("rtxpro6000", r"rtx pro 6000", 120, 96),
    Sku("gb10", r"\bgb10\b", 121, 128, ("dgx-spark",)),
)

_BY_NAME = {alias: sku for sku in SKUS for alias in (sku.name, *sku.aliases)}
ALL_SMS = tuple(sorted({sku.sm for sku in SKUS}))


def has_bf16(sm: int) -> bool:
    return sm >= 80


def find_sku(name: str) -> Sku | int:
    """The card of a name or alias, or the capability of "sm_89" (also "sm89").

    Raises:
        InvalidRequest: an unknown name; the known ones are listed.
    """
    plain = re.sub(r"[\s_]", "", name.strip().lower())
    if plain in _BY_NAME:
        return _BY_NAME[plain]
    if (match := re.fullmatch(r"sm(\d{2,3})", plain)) and int(match[1]) in ALL_SMS:
        return int(match[1])
    close = difflib.get_close_matches(plain, _BY_NAME, 1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    known = ", ".join([*(sku.name for sku in SKUS), *(f"sm_{sm}" for sm in ALL_SMS)])
    raise InvalidRequest(f"SKU {name[:60]!r} is unknown{hint}; known are {known}, all, this")


def sms_of(names: Iterable[str]) -> tuple[int, ...]:
    """Distinct capabilities of names, ascending; "all" means every one in the table.

    Raises:
        InvalidRequest: an unknown name.
    """
    found: set[int] = set()
    for name in names:
        if name == "all":
            found.update(ALL_SMS)
        else:
            sku = find_sku(name)
            found.add(sku if isinstance(sku, int) else sku.sm)
    return tuple(sorted(found))


def match_device(device_name: str, sm: int) -> Sku | None:
    """The card that a driver calls so, for example "NVIDIA GeForce RTX 4090"; None for one that is not listed."""
    name = device_name.lower()
    return next((sku for sku in SKUS if sku.sm == sm and re.search(sku.device, name)), None)
