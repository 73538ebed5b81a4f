"""One .safetensors file with the parameter names of the original Stable Diffusion 1 or 2 code.

The library diffusers translates the names. It does so twice: of the header, whose result must be exactly the networks'
tensors, and then of the tensors themselves. The file holds no configuration and no tokenizer. Configurations of Stable
Diffusion 1.5 and 2.1 are in `layouts/`.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pylumiere.checkpoints.diffusers import COMPONENTS, read_configs, read_diffusers_folder, read_index
from pylumiere.checkpoints.files import (
    DTYPES,
    check_finite,
    check_size,
    described,
    first_few,
    first_line,
    header_length,
)
from pylumiere.checkpoints.shards import PICKLES, check_fit, choose
from pylumiere.errors import BundleError, UnsupportedDevice

MAX_BYTES = 16 * 2**30  # Stable Diffusion 1.5 with its moving averages has 8
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 10_000

_PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
_OPEN_CLIP = "cond_stage_model.model."  # of Stable Diffusion 2
_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
_CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}


class SingleFile:
    """A source of `importing.import_model`. Moving averages and the training's own tensors are left out.

    Args:
        config: diffusers folder whose JSON files describe the networks. None takes those of Stable Diffusion 1.5, or
            of 2.1 where the file has OpenCLIP's text encoder; the channels that the U-Net takes are the file's.
        prediction_type: of the scheduler; None takes the configuration's. Stable Diffusion 2 is taken for the model of
            768 x 768 pixels with "v_prediction", unless this says "epsilon", which is the one of 512 x 512.

    Raises:
        BundleError: not such a file, too large, or truncated.
        UnsupportedDevice: diffusers is not installed.
    """

    def __init__(self, path: Path, config: Path | None = None, prediction_type: str | None = None):
        self._path, self._header = path, _read_header(path)
        if importlib.util.find_spec("diffusers") is None:
            raise UnsupportedDevice(f"{path}: reading it needs diffusers, which is not installed: "
                                    "pip install 'pylumiere[import]'")  # fmt: skip
        self._has_open_clip = any(name.startswith(_OPEN_CLIP) for name in self._header)
        self.tokenizers: tuple[Path, ...] = (path.parent / "tokenizer",)
        self.pad_token: str | None = None
        if config is None:
            self.configs = _layout("sd2" if self._has_open_clip else "sd1")
            self.pad_token = self.configs.pop("pad_token")
            self.configs["unet"]["in_channels"] = self._header[_CONV_IN].shape[1]
            if self._has_open_clip and prediction_type == "epsilon":
                self.configs["unet"]["sample_size"] = 64
            self.classes = {**_CLASSES, "scheduler": ["diffusers", self.configs["scheduler"]["_class_name"]]}
        else:
            read_diffusers_folder(config)
            self.configs = read_configs(config)
            self.classes = read_index(config)
            self.tokenizers = (config / "tokenizer", *self.tokenizers)
        if prediction_type is not None:
            self.configs["scheduler"]["prediction_type"] = prediction_type

    def tensors(self, component: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Exactly the tensors of these names and shapes.

        Raises:
            BundleError: the file has others, or they hold NaN or infinity.
        """
        prefix = _PREFIXES[component]
        header = {name: tensor for name, tensor in self._header.items() if name.startswith(prefix)}
        self._convert(component, header, shapes)
        with safe_open(self._path, "pt") as file:
            tensors = self._convert(component, {name: file.get_tensor(name) for name in header}, shapes)
        check_finite(self._path, tensors)
        return tensors

    def _convert(
        self, component: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """By the network's names. Of a header's tensors, which have no values, too."""
        try:
            converted = self._by_diffusers(component, tensors)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise BundleError(f"{self._path}: its {component} cannot be converted: {first_line(error)}") from error
        converted = {name: tensor for name, tensor in converted.items() if tensor is not None}  # None: a missing one
        if component == "unet":  # whose converter passes over what it does not know
            used = {id(tensor) for tensor in converted.values()}
            if left := [name for name, tensor in tensors.items() if id(tensor) not in used]:
                raise BundleError(
                    f"{self._path} holds {first_few(left)}, which no U-Net of Stable Diffusion 1 or 2 has"
                )
        known = COMPONENTS[component]
        chosen = choose(self._path, converted, shapes, rename=known.rename, ignored=known.ignored)
        check_fit(self._path, shapes, described(chosen))
        return {name: chosen[name].view(shape) for name, shape in shapes.items()}

    def _by_diffusers(self, component: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        from diffusers.loaders import single_file_utils

        if component == "unet":
            return single_file_utils.convert_ldm_unet_checkpoint(tensors, self.configs["unet"])
        if component == "vae":
            return single_file_utils.convert_ldm_vae_checkpoint(tensors, self.configs["vae"])
        if not self._has_open_clip:
            return single_file_utils.convert_ldm_clip_checkpoint(tensors)
        width = SimpleNamespace(hidden_size=self.configs["text_encoder"]["hidden_size"])
        return single_file_utils.convert_open_clip_checkpoint(SimpleNamespace(config=width), tensors, _OPEN_CLIP)


def _read_header(path: Path) -> dict[str, Tensor]:
    """The file's tensors of the three networks, on the meta device."""
    if path.is_dir():
        raise BundleError(f"{path} is neither a diffusers folder (it has no model_index.json) nor a file")
    if path.suffix in PICKLES:
        raise BundleError(f"{path} is a pickle, which can run code; single files are read as .safetensors only")
    size = check_size(path, MAX_BYTES)
    if MAX_HEADER_BYTES < (length := header_length(path)) < size:
        raise BundleError(f"{path} says that its header has {length} bytes; at most {MAX_HEADER_BYTES} are expected")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is truncated or no safetensors file: {first_line(error)}") from error
    if len(found) > MAX_TENSORS:
        raise BundleError(f"{path} has {len(found)} tensors; at most {MAX_TENSORS} are expected")
    found = {name: entry for name, entry in found.items() if name.startswith(tuple(_PREFIXES.values()))}
    for component, prefix in _PREFIXES.items():
        if not any(name.startswith(prefix) for name in found):
            raise BundleError(f"{path} holds no {prefix}* ({component}); supported: Stable Diffusion 1 and 2, complete")
    if wrong := [f"{name} {dtype}" for name, (_, dtype) in found.items() if dtype not in _HEADER_DTYPES]:
        raise BundleError(f"{path}: wrong dtype {first_few(wrong)} (allowed: {', '.join(DTYPES)})")
    if len(found.get(_CONV_IN, ((), ""))[0]) != 4:
        raise BundleError(f"{path} holds no convolution {_CONV_IN}; supported: Stable Diffusion 1 and 2")
    return {
        name: torch.empty(shape, dtype=_HEADER_DTYPES[dtype], device="meta") for name, (shape, dtype) in found.items()
    }


_HEADER_DTYPES = {**DTYPES, "I64": torch.int64}  # numbers of positions, which are left out


def _layout(name: str) -> dict[str, Any]:
    resource = importlib.resources.files("pylumiere.checkpoints") / "layouts" / f"{name}.json"
    return json.loads(resource.read_text())
