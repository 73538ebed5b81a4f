"""What a model folder's `config.json` says: stages, each a network with its schedule and defaults, and a decoder.

`ModelConfig.from_dict` also reads the first version of the schema, which knew a `base` and an `ssr` network.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

from pylumiere.config.fields import Config, build, check
from pylumiere.config.networks import COLOURS, DecodingConfig, NetworkConfig, network_from
from pylumiere.config.sampling import SamplerConfig, ScheduleConfig
from pylumiere.config.stunet import from_version_1

WINDOW_WEIGHTS = ("flat", "linear", "gaussian")
SCHEMA_VERSION = 2
MAX_STAGES = 8
DECODER = "decoder"  # its place among the networks
RESERVED_STAGES = (DECODER, "encoder", "text", "total")


@dataclass(frozen=True)
class WindowConfig(Config):
    """How a clip that is longer than a network's window is cut.

    Attributes:
        frames, overlap: of a window; frames that it shares with the next.
        halo: frames on either side that a window reads as context and does not write. Advised where a network shifts
            channels in time: a shifted channel at a window's end would otherwise see zeros.
        weights: how the outputs of overlapping windows are weighed, "flat", "linear" or "gaussian".
    """

    frames: int
    overlap: int = 0
    halo: int = 0
    weights: str = "flat"

    def __post_init__(self):
        check(self.frames >= 1, f"windows: frames={self.frames} is not positive")
        check(0 <= self.overlap < self.frames, f"windows: overlap={self.overlap} is not in 0..{self.frames - 1}")
        check(0 <= self.halo <= 64, f"windows: halo={self.halo} is not in 0..64")
        check(
            self.weights in WINDOW_WEIGHTS,
            f"windows: weights {self.weights!r} is not one of {', '.join(WINDOW_WEIGHTS)}",
        )


@dataclass(frozen=True)
class StageConfig(Config):
    """A network with its schedule, its defaults, and how long clips are cut for it.

    Attributes:
        name: of the stage; the name of its weights' file, too.
        windows: None: the network's own number of frames, longer clips in windows that share half of theirs.
        augmentation: noise level (0..1) put on the frames of the stage before.
    """

    name: str
    network: NetworkConfig
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampling: SamplerConfig = field(default_factory=SamplerConfig)
    windows: WindowConfig | None = None
    augmentation: float = 0.0

    def __post_init__(self):
        check(
            re.fullmatch(r"[a-z][a-z0-9_]{0,31}", self.name) is not None and self.name not in RESERVED_STAGES,
            f"stage name {self.name!r} should be a lower-case word of at most 32 letters, digits and _, and none of "
            f"{', '.join(RESERVED_STAGES)}",
        )
        check(0 <= self.augmentation <= 1, f"stage {self.name}: augmentation={self.augmentation} is not in 0..1")

    def to_dict(self) -> dict:
        data = super().to_dict()
        return {"name": data.pop("name"), "family": self.network.family, **data}

    @classmethod
    def from_dict(cls, data: dict):
        check(isinstance(data, dict), f"a stage should be an object, not {type(data).__name__}")
        data = dict(data)
        return build(cls, data, network=network_from(data, NetworkConfig, f"stage {data.get('name')}"))


@dataclass(frozen=True)
class DecoderConfig(Config):
    """What turns the last stage's latents into pixels: a stage without steps.

    Attributes:
        group_frames: most frames of one call; a small memory budget makes it fewer.
        tile, tile_overlap: larger frames are decoded in tiles, in latents along a side.
    """

    network: DecodingConfig
    group_frames: int = 8
    tile: int = 96
    tile_overlap: int = 16

    def __post_init__(self):
        check(1 <= self.group_frames <= 1024, f"decoder: group_frames={self.group_frames} is not in 1..1024")
        check(8 <= self.tile <= 4096, f"decoder: tile={self.tile} is not in 8..4096")
        check(0 <= self.tile_overlap < self.tile, f"decoder: tile_overlap={self.tile_overlap} is not in 0..tile-1")

    def to_dict(self) -> dict:
        return {"family": self.network.family, **super().to_dict()}

    @classmethod
    def from_dict(cls, data: dict):
        check(isinstance(data, dict), f"the decoder should be an object, not {type(data).__name__}")
        data = dict(data)
        return build(cls, data, network=network_from(data, DecodingConfig, "decoder"))


@dataclass(frozen=True)
class ModelConfig(Config):
    """Everything `config.json` of a model folder says.

    Attributes:
        stages: in the order in which they run. The first makes a whole clip from noise; each later one enlarges the
            frames of the one before by a whole number.
        decoder: None where the last stage computes pixels.
        fps: frames per second of the training clips.
        text_encoder: "minilm", "hash", or "t5:FOLDER" / "clip:FOLDER".
        text_tokens: length that prompts are padded or cut to.
    """

    name: str
    stages: tuple[StageConfig, ...]
    decoder: DecoderConfig | None = None
    fps: int = 16
    text_encoder: str = "minilm"
    text_tokens: int = 24

    def __post_init__(self):
        check(1 <= self.fps <= 240, f"fps={self.fps} is not in 1..240")
        check(1 <= self.text_tokens <= 512, f"text_tokens={self.text_tokens} is not in 1..512")
        check(1 <= len(self.stages) <= MAX_STAGES, f"{len(self.stages)} stages, allowed are 1..{MAX_STAGES}")
        names = [stage.name for stage in self.stages]
        check(len(set(names)) == len(names), f"two stages have one name: {', '.join(names)}")
        first = self.first.network
        makes_pixels = first.out_channels == COLOURS
        allowed = f"alone, or {2 * COLOURS + 1} with given pixels and their mask" if makes_pixels else "alone"
        check(
            first.given_channels == 0 or (first.takes_given and makes_pixels),
            f"stage {self.first.name} takes {first.in_channels} channels and gives {first.out_channels}: the first "
            f"stage takes the noisy ones {allowed}",
        )
        for before, stage in itertools.pairwise(self.stages):
            _check_follows(before, stage)
        made = self.last.network.out_channels
        if self.decoder is None:
            check(
                made == COLOURS,
                f"stage {self.last.name} makes frames of {made} channels; without a decoder they should be {COLOURS}",
            )
        else:
            takes, gives = self.decoder.network.latent_channels, self.decoder.network.out_channels
            check(made == takes, f"the decoder takes {takes} channels, and stage {self.last.name} makes {made}")
            check(gives == COLOURS, f"the decoder makes frames of {gives} channels; they should be {COLOURS}")

    @property
    def first(self) -> StageConfig:
        return self.stages[0]

    @property
    def last(self) -> StageConfig:
        """The last stage that samples; a decoder may follow."""
        return self.stages[-1]

    def stage(self, name: str) -> StageConfig:
        """Raises KeyError for a name that no stage has."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    @property
    def networks(self) -> dict[str, NetworkConfig | DecodingConfig]:
        """All networks by the name of their stage; the decoder's is "decoder"."""
        found = {stage.name: stage.network for stage in self.stages}
        return found if self.decoder is None else {**found, DECODER: self.decoder.network}

    @property
    def decoder_scale(self) -> int:
        """Pixels of a result over values of the last stage, on a side."""
        return 1 if self.decoder is None else self.decoder.network.scale

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result that the model is made for."""
        return self.last.network.height * self.decoder_scale, self.last.network.width * self.decoder_scale

    @property
    def scales(self) -> tuple[int, ...]:
        """For each stage, pixels of the result over values of its frames, on a side."""
        height = self.size[0]
        return tuple(height // stage.network.height for stage in self.stages)

    def to_dict(self) -> dict:
        return {"schema_version": SCHEMA_VERSION, **super().to_dict()}

    @classmethod
    def from_dict(cls, data: dict):
        check(isinstance(data, dict), f"{cls.__name__}: expected an object, got {type(data).__name__}")
        data = dict(data)
        version = data.pop("schema_version", SCHEMA_VERSION if "stages" in data else 1)
        check(version in (1, SCHEMA_VERSION), f"schema_version {version!r} is not one of 1, {SCHEMA_VERSION}")
        return super().from_dict(from_version_1(data) if version == 1 else data)


def _check_follows(before: StageConfig, stage: StageConfig) -> None:
    """Whether a stage can read the frames of the one before it."""
    small, large = before.network, stage.network
    where = f"stage {stage.name} cannot follow {before.name}:"
    check(
        large.given_channels == large.out_channels == small.out_channels,
        f"{where} it should take {2 * small.out_channels} channels and give {small.out_channels}, and it takes "
        f"{large.in_channels} and gives {large.out_channels}",
    )
    scale = large.height // small.height
    check(
        scale >= 1 and (large.height, large.width) == (scale * small.height, scale * small.width),
        f"{where} its {large.width} x {large.height} (width x height) is no whole multiple of "
        f"{small.width} x {small.height}",
    )
