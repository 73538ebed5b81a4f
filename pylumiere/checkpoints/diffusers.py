"""A folder as diffusers saves it, read as it lies on disk: latent pictures of Stable Diffusion's kind, with or without
the temporal shift of Latent-Shift. The library diffusers is not needed.

    model_index.json                   the class of the pipeline and of each component
    unet/                              config.json, weights (see `shards`)
    vae/                               the same; the model's decoder
    text_encoder/, tokenizer/          CLIP's
    scheduler/scheduler_config.json    noise schedule and sampler

unet/config.json may hold two fields more than diffusers writes: `temporal_shift` (an object, see
`pylumiere.config.TemporalShiftConfig`) and `num_frames`, the length of clips that the U-Net is made for. What no file
says has diffusers' own defaults (50 steps, a guidance of 7.5) or ours: 16 frames with the shift and 1 without, at 8
frames per second.

Everything is checked as in `native`. Weights are safetensors; links that leave the folder are refused.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pylumiere.checkpoints.files import check_inside, check_size, first_few, first_line, printable, read_json
from pylumiere.checkpoints.native import Checkpoint
from pylumiere.checkpoints.scheduler_config import schedule_from_diffusers
from pylumiere.checkpoints.shards import find_weights, read_tensors
from pylumiere.config import (
    DECODER,
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    DecoderConfig,
    ModelConfig,
    SamplerConfig,
    StageConfig,
    TemporalShiftConfig,
    UNet2DConfig,
)
from pylumiere.errors import BundleError
from pylumiere.networks.families import expected_shapes
from pylumiere.networks.text.clip import ClipTextConfig, ClipTextEncoder, clip_shapes
from pylumiere.networks.text.clip_tokenizer import TOKENIZER_FILES

logger = logging.getLogger("pylumiere")

INDEX = "model_index.json"
MAX_JSON_BYTES = 2**20
STAGE = "unet"
FPS = 8
FRAMES_WITH_SHIFT = 16
LATENT_SIZE = 64  # where unet/config.json has no sample_size
SAMPLING = {"num_inference_steps": 50, "guidance_scale": 7.5}  # StableDiffusionPipeline's

PIPELINES = ("StableDiffusionPipeline",)
AUTOENCODERS = {"AutoencoderKL": AutoencoderKLConfig, "AutoencoderTiny": AutoencoderTinyConfig}
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _new_attention_name(name: str) -> str:
    """diffusers' present name of an autoencoder's parameter; its attention had others once."""
    match = re.fullmatch(rf"(.+)\.({'|'.join(_OLD_ATTENTION)})\.(weight|bias)", name)
    return name if match is None else f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}"


def _prefixed(name: str) -> str:
    """A text model's parameters have one prefix, which transformers 5 leaves out."""
    return "text_model." + name.removeprefix("text_model.")


@dataclass(frozen=True)
class Component:
    """What is expected in a component's folder.

    Attributes:
        classes: that are supported; none where its own JSON file says.
        config: name of its JSON file; None for the tokenizer.
        stem: of its weights' file; None without weights.
        rename, ignored: see `shards.read_tensors`.
    """

    classes: tuple[str, ...]
    config: str | None
    stem: str | None = None
    rename: Callable[[str], str] | None = None
    ignored: tuple[str, ...] = ()


COMPONENTS = {
    "unet": Component(("UNet2DConditionModel",), "config.json", "diffusion_pytorch_model"),
    "vae": Component(tuple(AUTOENCODERS), "config.json", "diffusion_pytorch_model", _new_attention_name),
    "text_encoder": Component(
        ("CLIPTextModel",),
        "config.json",
        "model",
        _prefixed,
        ("text_model.embeddings.position_ids", "text_model.text_projection."),
    ),
    "tokenizer": Component(("CLIPTokenizer", "CLIPTokenizerFast"), None),
    "scheduler": Component((), "scheduler_config.json"),
}


@dataclass(frozen=True)
class TextParts:
    """What a text encoder is made from: the arguments of `ClipTextEncoder`."""

    config: ClipTextConfig
    tokenizer: Mapping[str, bytes]
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class DiffusersFolder:
    """A folder whose JSON files have been read and checked. Weights are read when they are asked for.

    Attributes:
        config: one stage, "unet", and a decoder.
        text_config: of the text encoder.
    """

    folder: Path
    config: ModelConfig
    text_config: ClipTextConfig

    @functools.cached_property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Name and shape of each tensor, by the name of the network."""
        return {name: expected_shapes(network) for name, network in self.config.networks.items()}

    @property
    def parameters(self) -> int:
        """Values in all networks."""
        return sum(math.prod(shape) for shapes in self.shapes.values() for shape in shapes.values())

    @property
    def facts(self) -> dict[str, Any]:
        """For `Engine.info`; a bundle has more to say."""
        return {}

    def checkpoint(self) -> Checkpoint:
        """The networks' weights, for PyTorch and our kernels."""
        return Checkpoint(self.folder, self.config, self.weights())

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """State dicts in the dtype of the files, by the name of the network: "unet" and "decoder".

        Raises:
            BundleError: see `shards.read_tensors`.
        """
        return {
            STAGE: self.component_weights("unet", self.shapes[STAGE]),
            DECODER: self.component_weights("vae", self.shapes[DECODER]),
        }

    def text_parts(self) -> TextParts:
        """Raises BundleError for parts that are missing, too large or malformed."""
        files = read_tokenizer(self.folder / "tokenizer", self.folder)
        return TextParts(self.text_config, files, self.component_weights("text_encoder", clip_shapes(self.text_config)))

    def text_encoder(self) -> ClipTextEncoder:
        """Raises BundleError for parts that are malformed or do not fit each other."""
        parts = self.text_parts()
        return ClipTextEncoder(parts.config, parts.tokenizer, parts.weights)

    def component_weights(self, component: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The tensors of a component's folder."""
        known = COMPONENTS[component]
        return read_tensors(
            self.folder / component, known.stem, shapes, rename=known.rename, ignored=known.ignored, root=self.folder
        )


def is_diffusers_folder(path: str | os.PathLike) -> bool:
    """Whether it has a model_index.json."""
    return (Path(path) / INDEX).is_file()


def read_diffusers_folder(
    path: str | os.PathLike, *, temporal_shift: TemporalShiftConfig | None = None
) -> DiffusersFolder:
    """Reads and checks all of a folder but its weights.

    Args:
        temporal_shift: instead of the one in unet/config.json.

    Raises:
        BundleError: a file that is missing, too large or malformed; a pipeline, component or setting that is not
            supported, by name and with what is.
    """
    folder = Path(path)
    classes = read_index(folder)
    configs = read_configs(folder)
    unet = configs["unet"]
    num_frames = unet.pop("num_frames", None)
    size = unet.get("sample_size") or LATENT_SIZE
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    has_shift = temporal_shift is not None or unet.get("temporal_shift") is not None
    with _naming(folder, "scheduler"):
        schedule, sampler = schedule_from_diffusers(configs["scheduler"])
    with _naming(folder, "text_encoder"):
        text_config = ClipTextConfig.from_json(configs["text_encoder"])
    with _naming(folder, "vae"):
        vae = AUTOENCODERS[classes["vae"][1]].from_diffusers(configs["vae"])
    with _naming(folder, "unet"):
        network = UNet2DConfig.from_diffusers(
            unet,
            num_frames=(FRAMES_WITH_SHIFT if has_shift else 1) if num_frames is None else num_frames,
            height=height,
            width=width,
            temporal_shift=temporal_shift,
        )
    with _naming(folder):
        config = ModelConfig(
            name=folder.resolve().name,
            stages=(StageConfig(STAGE, network, schedule, SamplerConfig(sampler=sampler, **SAMPLING)),),
            decoder=DecoderConfig(vae),
            fps=FPS,
            text_encoder="clip",
            text_tokens=text_config.max_position_embeddings,
        )
    if text_config.hidden_size != network.text_dim:
        raise BundleError(
            f"{folder}: the text encoder is {text_config.hidden_size} wide; the U-Net expects {network.text_dim}"
        )
    return DiffusersFolder(folder, config, text_config)


@contextlib.contextmanager
def _naming(folder: Path, component: str | None = None) -> Iterator[None]:
    """Says in errors which file they are about."""
    try:
        yield
    except ValueError as error:
        path = folder if component is None else folder / component / COMPONENTS[component].config
        raise BundleError(f"{path}: {first_line(error)}") from error


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON files of all components that have one."""
    paths = {name: folder / name / component.config for name, component in COMPONENTS.items() if component.config}
    for path in paths.values():
        check_inside(path, folder)
    return {name: read_json(path, MAX_JSON_BYTES) for name, path in paths.items()}


def read_tokenizer(folder: Path, root: Path) -> dict[str, bytes]:
    """The files of a tokenizer's folder that are known, by name. Links may not leave `root`."""
    files = {}
    for name, limit in TOKENIZER_FILES.items():
        if (path := folder / name).exists():
            check_inside(path, root)
            check_size(path, limit)
            files[name] = path.read_bytes()
    return files


def read_index(folder: Path) -> dict[str, list[str]]:
    """Library and class of each component that is used, from model_index.json."""
    path = folder / INDEX
    check_inside(path, folder)
    index = read_json(path, MAX_JSON_BYTES)
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise BundleError(f"{path}: pipeline {_quoted(pipeline)} is not supported; supported: {', '.join(PIPELINES)}")
    listed = {name: value for name, value in index.items() if isinstance(value, list)}
    present = {name: value for name, value in listed.items() if value != [None, None]}
    if missing := [name for name in COMPONENTS if name not in present]:
        raise BundleError(f"{path}: {first_few(missing)} is missing")
    if unused := [name for name in UNUSED if name in present]:
        logger.info("%s: %s is not used", folder, ", ".join(unused))
    if other := [name for name in present if name not in COMPONENTS and name not in UNUSED]:
        raise BundleError(f"{path}: component {first_few(other)} is not supported; supported: {', '.join(COMPONENTS)}")
    for name, component in COMPONENTS.items():
        library, kind = present[name] if len(present[name]) == 2 else (None, None)
        if library not in ("diffusers", "transformers") or not isinstance(kind, str):
            raise BundleError(f"{path}: {name} {_quoted(present[name])} is no class of diffusers or transformers")
        if component.classes and kind not in component.classes:
            supported = ", ".join(component.classes)
            raise BundleError(f"{path}: {name} {_quoted(kind)} is not supported; supported: {supported}")
    return {name: present[name] for name in COMPONENTS}


def list_components(folder: Path) -> dict[str, dict[str, Any]]:
    """What a folder's model_index.json lists, whether it is supported or not, and where its weights are concerned
    whether they are there. By name: `class`, `is_used`, `bytes` of weights (None where there are none) and `problem`
    (None where there is none).

    Raises:
        BundleError: model_index.json is missing, too large or malformed.
    """
    check_inside(folder / INDEX, folder)
    listed = read_json(folder / INDEX, MAX_JSON_BYTES)
    found = {}
    for name in dict.fromkeys([*COMPONENTS, *(name for name, value in listed.items() if isinstance(value, list))]):
        value = listed.get(name)
        kind = value[1] if isinstance(value, list) and len(value) == 2 else value
        if kind is None and name not in COMPONENTS:  # an optional one that was left out
            continue
        size, problem = None, None
        try:
            size = _component_bytes(folder, name, kind)
        except BundleError as error:
            problem = str(error)
        found[printable(name)] = {
            "class": None if kind is None else printable(str(kind)), "is_used": name in COMPONENTS, "bytes": size,
            "problem": problem,
        }  # fmt: skip
    return found


def _component_bytes(folder: Path, name: str, kind: Any) -> int | None:
    """Bytes of a component's weights; BundleError for what is missing or not supported."""
    component = COMPONENTS.get(name)
    if component is None:
        if name in UNUSED:
            return None
        raise BundleError(f"not supported; supported: {', '.join(COMPONENTS)}")
    if component.classes and kind not in component.classes:
        raise BundleError(f"not supported; supported: {', '.join(component.classes)}")
    if component.stem is None:
        return None
    return sum(file.stat().st_size for file in find_weights(folder / name, component.stem, folder).files)


def _quoted(value: Any) -> str:
    return printable(repr(value))
