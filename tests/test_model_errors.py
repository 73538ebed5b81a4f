"""Models that cannot be: one clear line from the configuration, from Engine.load and from the command line."""

from __future__ import annotations

import json

import pytest
from support.testing import write_random_model
from support.toy import latent_model, three_stages

from pylumiere.cli import main
from pylumiere.config import ModelConfig
from pylumiere.engine import Engine
from pylumiere.errors import BundleError


def changed(config, change):
    data = json.loads(json.dumps(config.to_dict()))
    change(data)
    return data


WRONG = {
    "an unknown family": (latent_model, lambda d: d["stages"][0].update(family="unet9"), "family 'unet9' is not one"),
    "an unknown decoder": (latent_model, lambda d: d["decoder"].update(family="stunet"), "family 'stunet' is not one"),
    "a decoder without latents": (
        three_stages,
        lambda d: d.update(decoder=latent_model().to_dict()["decoder"]),
        "the decoder takes 4 channels, and stage last makes 3",
    ),
    "latents without a decoder": (latent_model, lambda d: d.update(decoder=None), "without a decoder they should be 3"),
    "other channels than the stage before": (
        three_stages,
        lambda d: d["stages"][1]["network"].update(in_channels=7, skip_input=-1),
        "stage middle cannot follow base: it should take 6 channels",
    ),
    "no multiple of the stage before": (
        three_stages,
        lambda d: d["stages"][2]["network"].update(width=80),
        "stage last cannot follow middle: its 80 x 64",
    ),
    "one name twice": (three_stages, lambda d: d["stages"][2].update(name="base"), "two stages have one name"),
    "a reserved name": (three_stages, lambda d: d["stages"][2].update(name="decoder"), "stage name 'decoder' should"),
    "no stage": (three_stages, lambda d: d.update(stages=[]), "0 stages, allowed are 1..8"),
    "a newer schema": (three_stages, lambda d: d.update(schema_version=3), "schema_version 3 is not one of 1, 2"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_it_is_named_in_one_line_at_every_edge(kind, tmp_path, capsys):
    model, change, message = WRONG[kind]
    data = changed(model(), change)
    with pytest.raises(ValueError) as told:
        ModelConfig.from_dict(data)
    assert message in str(told.value) and "\n" not in str(told.value)
    folder = write_random_model(tmp_path / "model", model())
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(BundleError) as refused:
        Engine.load(folder)
    assert message in str(refused.value)
    assert main(["generate", "a dog", "--model", str(folder), "-o", str(tmp_path / "clip.mp4")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err and not (tmp_path / "clip.mp4").exists()
