"""From names of GPUs to what is built for them: plans, cubins, and what is left out, with the reason."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pylumiere.backends.choice import precision_of
from pylumiere.checkpoints.skus import (
    CUBIN_SMS,
    RTX_PORTABLE_SMS,
    RTX_SMS,
    SKUS,
    has_bf16,
    match_device,
    sms_of,
)
from pylumiere.errors import InvalidRequest, UnsupportedDevice
from pylumiere.networks.families import AnyConfig

PRECISIONS = ("auto", "fp16", "bf16", "fp32")


@dataclass(frozen=True)
class ExportOptions:
    """What to build.

    Attributes:
        skus: names from the table, sm_NN, "all" or "this"; () for the portable graphs alone.
        precision: of plans and cubins: "fp16", "bf16" or "fp32"; "auto" is fp16 for plans, and for cubins what the
            Triton backend computes in: bf16 where the chip has it.
        batch, frames, sizes: see `network_specs`.
        per_sm: a plan for each capability, not only the portable one.
        memory_budget: most bytes of workspace of a layer of a plan.
        jobs: processes at once.
    """

    skus: tuple[str, ...] = ()
    precision: str = "auto"
    batch: int = 2
    frames: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    per_sm: bool = False
    memory_budget: int | None = None
    jobs: int = 2


@dataclass(frozen=True)
class PlanTarget:
    """One plan of each network: flavour, capabilities it runs on, folder below engines/, precision."""

    flavour: str
    sms: tuple[int, ...]
    folder: str
    precision: str
    sku: str | None = None

    @property
    def sm(self) -> int | None:
        """To build for; None for a portable plan."""
        return self.sms[0] if len(self.sms) == 1 else None


@dataclass
class Targets:
    """What the SKUs come to: plans, (capability, precision) of cubins, and what is not built, with the reason."""

    plans: list[PlanTarget] = field(default_factory=list)
    cubins: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fit(self, networks: Mapping[str, AnyConfig]) -> None:
        """Leaves out the plans for chips that lack what one of the networks must be computed in: a model runs by plans
        of all its networks or of none."""
        own = [stage for stage, network in networks.items() if precision_of(network, "fp16") != "fp16"]
        precisions = {plan.precision for plan in self.plans} | {precision for _, precision in self.cubins}
        if not own or precisions <= {"fp32"}:
            return
        named = ", ".join(own)
        self.notes.append(f"{named}: in fp32, whatever the precision of the others; its configuration asks for it")
        lacking = [p for p in self.plans if p.flavour == "tensorrt_rtx" and _possible(p.sms[0], "fp32") is None]
        for plan in lacking:
            self.plans.remove(plan)
            self.notes.append(
                f"sm_{plan.sms[0]}: no plans; {named} is for fp32, and TensorRT-RTX has no fp32 matrix products there"
            )


def choose_targets(options: ExportOptions, gpu: tuple[str, int] | None) -> Targets:
    """From names to plans and cubins.

    Args:
        gpu: the driver's name and the capability of this machine's GPU, if it has one.

    Raises:
        InvalidRequest: an unknown SKU or precision.
        UnsupportedDevice: "this" without a GPU.
    """
    if options.precision not in PRECISIONS:
        raise InvalidRequest(f"--precision {options.precision!r} is not one of {', '.join(PRECISIONS)}")
    names = [name for name in options.skus if name != "this"]
    sms = set(sms_of(names))
    is_this = "this" in options.skus
    if is_this and gpu is None:
        raise UnsupportedDevice(
            "--sku this needs an NVIDIA GPU in this machine, and none was found; name the GPU instead, for example "
            "--sku rtx4090 (its TensorRT plan can be finished there later, with --sku this)"
        )
    found = Targets()
    if is_this:
        name, sm = gpu
        _add_this(found, options, name, sm)
        sms.add(sm)
    wanted = "fp16" if options.precision == "auto" else options.precision
    per_sm = options.per_sm or "all" in names
    ordered = sorted(sms)
    if any(sm in RTX_PORTABLE_SMS for sm in ordered):
        found.plans.append(PlanTarget("tensorrt_rtx", RTX_PORTABLE_SMS, "portable", wanted))
    for sm in ordered:
        precision = _possible(sm, wanted)
        if sm in RTX_SMS and (per_sm or sm not in RTX_PORTABLE_SMS):
            if precision is None:
                found.notes.append(f"sm_{sm}: no {wanted} plan, TensorRT-RTX has no {wanted} matrix products there")
            else:
                found.plans.append(PlanTarget("tensorrt_rtx", (sm,), f"sm_{sm}", precision))
        if sm not in RTX_SMS and not (is_this and gpu[1] == sm):
            cards = ", ".join(sku.name for sku in SKUS if sku.sm == sm)
            found.notes.append(
                f"sm_{sm} ({cards}): TensorRT-RTX builds no plans for it; TensorRT's is finished on the GPU itself: "
                "pylumiere export --model NAME.plm --sku this -o NAME-there.plm"
            )
        if sm in CUBIN_SMS:
            auto = "bf16" if has_bf16(sm) else "fp16"
            found.cubins.append((sm, auto if options.precision == "auto" else _possible(sm, wanted) or wanted))
        else:
            found.notes.append(f"sm_{sm}: no cubins; Triton compiles its kernels there when they are first used")
    return found


def _possible(sm: int, precision: str) -> str | None:
    """The precision itself, fp16 for bf16 where the chip has none, None for what TensorRT-RTX refuses there."""
    if precision == "bf16" and not has_bf16(sm):
        return "fp16"
    return None if precision == "fp32" and sm < 80 else precision


def _add_this(found: Targets, options: ExportOptions, name: str, sm: int) -> None:
    if importlib.util.find_spec("tensorrt") is None:
        found.notes.append(f"{name}: no TensorRT plan, the library is not here: pip install 'pylumiere[tensorrt]'")
        return
    sku = match_device(name, sm)
    precision = "fp16" if options.precision == "auto" else options.precision
    precision = "fp16" if precision == "bf16" and not has_bf16(sm) else precision
    folder = f"sm_{sm}" if sku is None else sku.name
    found.plans.append(PlanTarget("tensorrt", (sm,), folder, precision, None if sku is None else sku.name))


def local_gpu() -> tuple[str, int] | None:
    """Name and capability of the first NVIDIA GPU, as PyTorch sees it."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return torch.cuda.get_device_name(0), 10 * major + minor


def sku_table() -> list[dict[str, Any]]:
    """The SKUs with what is built for them without their GPU; docs/exporting.md shows it."""
    return [
        {
            "sku": sku.name, "family": sku.family, "sm": sku.sm, "cubins": sku.sm in CUBIN_SMS,
            "tensorrt_rtx": sku.sm in RTX_SMS, "portable_plan": sku.sm in RTX_PORTABLE_SMS, "bf16": sku.has_bf16,
        }
        for sku in SKUS
    ]  # fmt: skip
