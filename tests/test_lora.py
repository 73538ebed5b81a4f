"""LoRA files of a request: the clip of merged weights, bytes that do not depend on the company, and refusals."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from support.testing import rel_rms

from pylumiere.cli import main
from pylumiere.engine import Engine
from pylumiere.errors import InvalidRequest
from pylumiere.request import GenerationRequest

RANK = 3
ATTENTION = "attentions.0.transformer_blocks.0"
# A linear layer of each attention, both kinds of convolution, and the projection of the timestep.
STYLE = (f"down_blocks.0.{ATTENTION}.attn1.to_q", f"mid_block.{ATTENTION}.attn2.to_k", "down_blocks.1.resnets.0.conv1")
HERO = ("down_blocks.1.resnets.0.conv1", "up_blocks.1.attentions.1.proj_in", "up_blocks.0.resnets.0.time_emb_proj")
FIELDS = {"prompt": "a dog and a cat", "num_inference_steps": 3, "sampler": "ddim", "seed": 7}


def factors(weights, modules, seed):
    """{module: (up [O, r, ...], down [r, I, ...])}, of about the size of the weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    made = {}
    for module in modules:
        outputs, inputs, *kernel = weights[f"{module}.weight"].shape
        scale = weights[f"{module}.weight"].std()
        made[module] = normal(outputs, RANK, *[1] * len(kernel)) * scale, normal(RANK, inputs, *kernel)
    return made


def change(pair, scale):
    up, down = pair
    return scale * (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


class Loras:
    """Two files for a folder's U-Net: `style` in kohya's spelling with alpha 2, `hero` in diffusers' without."""

    def __init__(self, folder, unet):
        self.weights = load_file(unet)
        self.style, self.hero = (factors(self.weights, modules, i) for i, modules in enumerate((STYLE, HERO)))
        self.files = {"style": str(folder / "style.safetensors"), "hero": str(folder / "hero.safetensors")}
        tensors = {}
        for module, (up, down) in self.style.items():
            name = "lora_unet_" + module.replace(".", "_")
            tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
        save_file(tensors, self.files["style"])
        save_file({f"unet.{module}.lora.{part}.weight": factor for module, pair in self.hero.items()
                   for part, factor in zip(("up", "down"), pair, strict=True)}, self.files["hero"])  # fmt: skip

    def merged(self, style, hero):
        """The U-Net's weights with both at these strengths."""
        weights = dict(self.weights)
        for pairs, scale in ((self.style, style * 2 / RANK), (self.hero, hero)):
            for module, pair in pairs.items():
                weights[f"{module}.weight"] = weights[f"{module}.weight"] + change(pair, scale)
        return weights


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tiny_sd):
    return tiny_sd(sd2=False)[1]


@pytest.fixture(scope="module")
def loras(folder, tmp_path_factory):
    return Loras(tmp_path_factory.mktemp("lora"), folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.load(folder, precision="fp32") as engine:
        yield engine


def latents_of(engine, **fields):
    return torch.from_numpy(engine.generate(output_type="latent", **{**FIELDS, **fields}).frames)


@pytest.mark.parametrize(("style", "hero"), [(1, 0), (0.8, 0), (-1.5, 0), (0, 0.5), (0.7, -0.4)])
def test_a_request_with_lora_is_that_of_merged_weights(engine, loras, folder, tmp_path, style, hero):
    chosen = {"style": style, "hero": hero}
    made = latents_of(engine, lora=[f"{loras.files[name]}:{share}" for name, share in chosen.items() if share])
    copy = shutil.copytree(folder, tmp_path / "merged")
    save_file(loras.merged(style, hero), copy / "unet" / "diffusion_pytorch_model.safetensors")
    with Engine.load(copy, precision="fp32") as merged:
        assert rel_rms(made, latents_of(merged)) < 5e-6  # guidance enlarges the last bits of the weights
    assert rel_rms(made, latents_of(engine)) > 1e-2


def test_merged_weights_in_diffusers_make_the_same(engine, loras, tiny_sd):
    pipeline, folder = tiny_sd(sd2=False)
    merged = type(pipeline.unet).from_config(pipeline.unet.config).eval()
    merged.load_state_dict(loras.merged(1, 0.25))
    start = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    theirs = StableDiffusionPipeline(**{**pipeline.components, "unet": merged}, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False)
    expected = theirs(FIELDS["prompt"], num_inference_steps=3, output_type="latent",
                      latents=torch.from_numpy(start).permute(0, 3, 1, 2)).images  # fmt: skip
    made = latents_of(engine, latents=start, lora={loras.files["style"]: 1, loras.files["hero"]: 0.25})
    assert rel_rms(made, expected.permute(0, 2, 3, 1)) < 1e-5


def test_requests_with_and_without_lora_give_together_what_each_gives_alone(folder, loras):
    """More choices than the backend keeps networks for, twice each, in one engine of two lanes."""
    style, hero = loras.files["style"], loras.files["hero"]
    choices = [None, [style], [f"{style}:0.5"], [hero], [style, hero], [hero, style], [f"{hero}:-1"]]
    fields = {**FIELDS, "num_frames": 3}
    torch.set_num_threads(2)
    with Engine.load(folder, precision="fp32", temporal_shift=8, max_batch=2) as engine:
        torch.set_num_threads(1)
        alone = [engine.generate(**fields, lora=lora).frames.tobytes() for lora in choices]
        jobs = [engine.submit(**fields, lora=lora) for lora in choices * 2]
        together = [job.result(120).frames.tobytes() for job in jobs]
        assert jobs[1].metadata["lora"] == [[style, 1.0]] and jobs[0].metadata["lora"] is None
    assert together == alone * 2
    assert len(set(alone[:5])) == 5, "each choice counts"


# ---- refusals --------------------------------------------------------------------------------------------------------


def of_another_network(loras):
    return {f"unet.{STYLE[0]}.lora.{part}.weight": torch.zeros(5, 5) for part in ("up", "down")}


REFUSED = {
    "missing": (None, "no such file"),
    "of another network": (of_another_network, "was made for another model"),
    "of no layer here": (
        lambda loras: {f"unet.up_blocks.7.conv.lora.{part}.weight": torch.zeros(3, 3) for part in ("up", "down")},
        "this one has no layer up_blocks.7.conv",
    ),
    "not finite": (
        lambda loras: {name: tensor * torch.nan for name, tensor in load_file(loras.files["hero"]).items()},
        "holds NaN or infinity",
    ),
    "text": (b"not a safetensors file" * 10, "no safetensors file"),
}


@pytest.mark.parametrize(("content", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_lora_of_this_network_is_one_line_and_exit_code_2(
    engine, loras, folder, tmp_path, capsys, content, text
):
    path = tmp_path / "file.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content(loras), path)
    with pytest.raises(InvalidRequest, match=text) as caught:
        engine.generate(**FIELDS, lora=[f"{path}:0.5"])
    assert str(caught.value).startswith(f"lora='{path}'") and "\n" not in str(caught.value)
    assert main(["generate", "a dog", "--model", str(folder), "-o", str(tmp_path / "a.png"), "--lora", str(path)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"pylumiere: --lora='{path}'") and text in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("lora", "text"),
    [
        (["a:5"], "'a' has strength 5; allowed are -4..4"),
        ({"a": float("nan")}, "'a' has strength nan"),
        (["a"] * 9, "has 9 files; allowed are 1..8"),
        ([3], 'should be "FILE" or "FILE:STRENGTH", not int'),
        ([], "has 0 files"),
    ],
)
def test_what_names_no_files_is_refused(lora, text):
    with pytest.raises(InvalidRequest, match="lora") as caught:
        GenerationRequest(prompt="x", lora=lora)
    assert text in str(caught.value)


def test_a_model_of_another_family_refuses_a_lora_of_a_u_net(loras):
    with (
        Engine.load("demo", precision="fp32") as engine,
        pytest.raises(InvalidRequest, match="was made for another model"),
    ):
        engine.generate("a red circle", lora=loras.files["style"])
