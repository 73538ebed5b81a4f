"""LoRA files in their three spellings, against the formula, diffusers' conversion and peft; and what is refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_diffusers import tiny_unet

from pylumiere.checkpoints.adapters import AdapterChoice
from pylumiere.checkpoints.lora import read_lora
from pylumiere.errors import InvalidRequest

UNET = tiny_unet()
WEIGHTS = UNET.state_dict()
SHAPES = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR, OUT, POINT, CONV = (
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn2.to_out.0",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
)
LAYERS = sorted(
    name.removesuffix(".weight")
    for name, shape in SHAPES.items()
    if len(shape) > 1 and name.endswith(".weight") and name not in ("conv_in.weight", "conv_out.weight")
)


def factors(module, rank=3, seed=0, flat=False):
    """`up` and `down` as a trainer makes them; `flat` for a 1 x 1 convolution that is treated as linear."""
    generator = torch.Generator().manual_seed(seed + hash_of(module))
    outputs, *rest = SHAPES[f"{module}.weight"]
    up = torch.randn(outputs, rank, *(1 for _ in rest[1:]), generator=generator)
    down = torch.randn(rank, *rest, generator=generator)
    return (up.flatten(1), down.flatten(1)) if flat else (up, down)


def hash_of(text):
    return sum(map(ord, text))


def change(module, up, down, scale):
    """The formula, in float64."""
    product = up.double().flatten(1) @ down.double().flatten(1)
    return WEIGHTS[f"{module}.weight"].double() + scale * product.view(SHAPES[f"{module}.weight"])


def peft_names(modules, **options):
    tensors = {}
    for module in modules:
        up, down = factors(module, **options)
        tensors |= {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
    return tensors


def diffusers_names(modules, **options):
    tensors = {}
    for module in modules:
        up, down = factors(module, **options)
        base = f"unet.{module}.lora"
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            if module.endswith(part):
                base = f"unet.{module.removesuffix(part)}processor.{part.removesuffix('.0')}_lora"
        tensors |= {f"{base}.down.weight": down, f"{base}.up.weight": up}
    return tensors


def kohya_names(modules, alpha=None, **options):
    tensors = {}
    for module in modules:
        up, down = factors(module, **options)
        name = "lora_unet_" + module.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


SPELLINGS = {"peft": peft_names, "diffusers": diffusers_names, "kohya": kohya_names}


def write(path, tensors, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "look.safetensors"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_is_the_formula(file, spelling):
    lora = read_lora(write(file, SPELLINGS[spelling](LAYERS)), SHAPES)
    assert lora.name == "look" and lora.names == [f"{module}.weight" for module in LAYERS]
    for strength in (0.0, 0.5, 1.0, -1.0):
        changed = lora.weights(WEIGHTS, strength)
        for module in LAYERS:
            expected = change(module, *factors(module), strength)
            torch.testing.assert_close(changed[f"{module}.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(weight, WEIGHTS[name]) for name, weight in lora.weights(WEIGHTS, 0.0).items())


def test_kinds_of_layers_and_the_scale_by_alpha(file):
    tensors = kohya_names([LINEAR, OUT, CONV], alpha=6.0) | kohya_names([POINT], alpha=1.5, flat=True)
    lora = read_lora(write(file, tensors), SHAPES)
    assert {name: factors.scale for name, factors in lora.factors.items()} == {
        f"{LINEAR}.weight": 2.0, f"{OUT}.weight": 2.0, f"{CONV}.weight": 2.0, f"{POINT}.weight": 0.5
    }  # fmt: skip
    changed = lora.weights(WEIGHTS, 0.7)
    for module, scale in ((LINEAR, 1.4), (OUT, 1.4), (CONV, 1.4), (POINT, 0.35)):
        expected = change(module, *factors(module), scale)
        torch.testing.assert_close(changed[f"{module}.weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_names_without_unet_and_a_number_in_a_list(file):
    up, down = factors(LINEAR)
    lora = read_lora(
        write(file, {f"{LINEAR}.lora.up.weight": up, f"{LINEAR}.lora.down.weight": down, f"{LINEAR}.alpha":
                     torch.tensor([9.0])}), SHAPES
    )  # fmt: skip
    assert lora.names == [f"{LINEAR}.weight"] and lora.factors[f"{LINEAR}.weight"].scale == 3.0


def test_dtype_of_the_originals_and_one_rounding(file):
    lora = read_lora(write(file, {name: t.half() for name, t in peft_names([LINEAR, CONV]).items()}), SHAPES)
    original = {name: weight.bfloat16() for name, weight in WEIGHTS.items()}
    changed = lora.weights(original, 0.3)
    exact = lora.weights({name: weight.float() for name, weight in original.items()}, 0.3)
    assert all(torch.equal(changed[name], exact[name].bfloat16()) for name in lora.names)


def test_alpha_from_metadata(file):
    said = {"unet.lora_alpha": 6, "unet.alpha_pattern": {f"^{CONV}": 1.5, "attn2.to_out.0": 12}, "unet.r": 3}
    tensors = peft_names([LINEAR, CONV, OUT])
    lora = read_lora(write(file, tensors, {"lora_adapter_metadata": json.dumps(said)}), SHAPES)
    assert [lora.factors[f"{m}.weight"].scale for m in (LINEAR, CONV, OUT)] == [2.0, 0.5, 4.0]
    said |= {"unet.use_rslora": True, "unet.alpha_pattern": {}}
    lora = read_lora(write(file, tensors, {"lora_adapter_metadata": json.dumps(said)}), SHAPES)
    assert lora.factors[f"{LINEAR}.weight"].scale == pytest.approx(6 / 3**0.5)


def test_our_names_are_those_of_diffusers_conversion(file):
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    tensors = kohya_names(LAYERS, alpha=1.0)
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(dict(tensors))
    theirs = convert_unet_state_dict_to_peft(converted)
    lora = read_lora(write(file, tensors), SHAPES)
    assert len(theirs) == 2 * len(lora.factors) and len(alphas) == len(LAYERS)
    for weight, ours in lora.factors.items():
        module = f"unet.{weight.removesuffix('.weight')}"
        assert torch.equal(ours.down, theirs[f"{module}.lora_A.weight"])
        assert torch.equal(ours.up, theirs[f"{module}.lora_B.weight"])


def fused_by_peft(path, scale):
    """The U-Net's weights with a LoRA that diffusers and peft read and fuse."""
    import copy

    from diffusers import StableDiffusionPipeline

    unet = copy.deepcopy(UNET)
    state, alphas = StableDiffusionPipeline.lora_state_dict(path)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, adapter_name="look")
    unet.fuse_lora(lora_scale=scale)
    unet.unload_lora()
    return unet.state_dict()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_weights_are_those_that_peft_fuses(file, spelling):
    pytest.importorskip("peft")
    options = {"alpha": 2.0} if spelling == "kohya" else {}
    ranks = {module: 2 if i % 2 else 4 for i, module in enumerate(LAYERS)}
    tensors = {}
    for rank in set(ranks.values()):
        tensors |= SPELLINGS[spelling]([module for module in LAYERS if ranks[module] == rank], rank=rank, **options)
    lora = read_lora(write(file, tensors), SHAPES)
    theirs, ours = fused_by_peft(file, 0.6), lora.weights(WEIGHTS, 0.6)
    assert theirs.keys() == WEIGHTS.keys()
    for name, weight in theirs.items():
        assert torch.equal(weight, WEIGHTS[name]) == (name not in ours)
        torch.testing.assert_close(ours.get(name, WEIGHTS[name]), weight, rtol=1e-5, atol=1e-5)


def test_a_file_that_peft_writes(tmp_path):
    peft = pytest.importorskip("peft")
    unet = tiny_unet()
    unet.load_state_dict(WEIGHTS)
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_out.0", "conv1"],
                             alpha_pattern={"conv1": 2, "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 6},
                             init_lora_weights=False)  # fmt: skip
    unet.add_adapter(config, adapter_name="look")
    unet.save_lora_adapter(tmp_path, adapter_name="look")
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors", SHAPES)
    assert {factors.scale for factors in lora.factors.values()} == {2.5, 0.5, 1.5}
    unet.fuse_lora()
    unet.unload_lora()
    changed = lora.weights(WEIGHTS, 1.0)
    for name, weight in unet.state_dict().items():
        torch.testing.assert_close(changed.get(name, WEIGHTS[name]), weight, rtol=1e-5, atol=1e-5)


def test_several_adapters_add_up_in_order(tmp_path):
    one = read_lora(write(tmp_path / "one.safetensors", peft_names([LINEAR, CONV])), SHAPES)
    two = read_lora(write(tmp_path / "two.safetensors", kohya_names([LINEAR, OUT], seed=5)), SHAPES)
    both = AdapterChoice(((one, 0.5), (two, 2.0))).weights(WEIGHTS)
    assert sorted(both) == sorted({*one.names, *two.names})
    expected = change(LINEAR, *factors(LINEAR), 0.5) - WEIGHTS[f"{LINEAR}.weight"] + change(
        LINEAR, *factors(LINEAR, seed=5), 2.0
    )  # fmt: skip
    torch.testing.assert_close(both[f"{LINEAR}.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(both[f"{CONV}.weight"], one.weights(WEIGHTS, 0.5)[f"{CONV}.weight"])


def test_a_choice_is_a_key(tmp_path):
    path = write(tmp_path / "one.safetensors", peft_names([LINEAR]))
    same = tmp_path / "copy.safetensors"
    same.write_bytes(path.read_bytes())
    other = write(tmp_path / "other.safetensors", peft_names([LINEAR], seed=1))
    one, copy, other = (read_lora(p, SHAPES) for p in (path, same, other))
    choice = AdapterChoice(((one, 1.0),))
    assert choice == AdapterChoice(((copy, 1.0),)) and hash(choice) == hash(AdapterChoice(((copy, 1.0),)))
    pairs = [[(one, 0.9)], [(other, 1.0)], [(one, 1.0), (other, 1.0)], [(other, 1.0), (one, 1.0)]]
    assert len({choice, *(AdapterChoice(tuple(pair)) for pair in pairs)}) == 5


def test_changes_of_text_encoders_are_left_out_with_a_warning(file, caplog):
    text = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.full((4, 2), torch.nan),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 4),
        "lora_te1_x.alpha": torch.ones(()),
    }
    with caplog.at_level(logging.WARNING, logger="pylumiere"):
        lora = read_lora(write(file, kohya_names([LINEAR]) | text), SHAPES)
    assert lora.names == [f"{LINEAR}.weight"]
    assert [record.getMessage() for record in caplog.records] == [
        f"lora={str(file)!r}: its 3 tensors for text encoders are not used"
    ]
    with pytest.raises(InvalidRequest, match="changes no weight of the network"):
        read_lora(write(file, text), SHAPES)


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def replaced(tensors, part, tensor):
    return {name: tensor if part in name else old for name, old in tensors.items()}


PEFT = peft_names([LINEAR])


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({}, "changes no weight of the network"),
        (without(PEFT, "lora_A"), "holds no pair of factors for .*to_q.weight: up is \\[32, 3\\], down is \\[\\]"),
        ({f"unet.{LINEAR}.alpha": torch.ones(())}, "holds no pair of factors"),
        (replaced(PEFT, "lora_A", torch.ones(4, 32)), "holds no pair of factors .* down is \\[4, 32\\]"),
        (replaced(PEFT, "lora_A", torch.ones(3, 31)), "made for another model: .* is \\[32, 32\\], and its factors"),
        (replaced(PEFT, "lora_B", torch.ones(31, 3)), "made for another model: .* is \\[32, 32\\], and its factors"),
        (replaced(PEFT, "lora_B", torch.ones(32, 3, 2, 2)), "made for another model"),
        (replaced(PEFT, "lora_B", torch.ones(32)), "holds no pair of factors"),
        (peft_names([LINEAR], rank=33), "holds no pair of factors"),
        (peft_names([LINEAR], rank=0), "holds no pair of factors"),
        (replaced(peft_names([CONV]), "lora_A", torch.ones(3, 32 * 9)), "made for another model"),
        (replaced(PEFT, "lora_A", torch.ones(3, 32).double()), "lora_A.weight as F64; allowed are F32, F16, BF16"),
        (replaced(PEFT, "lora_A", torch.full((3, 32), torch.nan)), "holds NaN or infinity in unet.down"),
        (PEFT | {f"unet.{LINEAR}.alpha": torch.tensor(torch.inf)}, "holds NaN or infinity in unet.down.*alpha"),
        (PEFT | {f"unet.{LINEAR}.alpha": torch.ones(2)}, "holds no number in unet.down.*alpha"),
        (PEFT | {f"unet.{LINEAR}.alpha": torch.tensor(1)}, "alpha as I64; allowed"),
        (PEFT | diffusers_names([LINEAR]), "holds two spellings of .*to_q"),
        (PEFT | {f"unet.{LINEAR}.lora_magnitude_vector": torch.ones(32)}, "no factor of a LoRA, or of a kind .*DoRA"),
        (PEFT | {f"unet.{LINEAR}.lora_B.bias": torch.ones(32)}, "no factor of a LoRA"),
        ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "no factor of a LoRA"),
        ({"conv_in.weight": torch.ones(2)}, "no factor of a LoRA"),
        ({"two\nlines": torch.ones(2)}, "holds two\\?lines: no factor"),
        ({"lora_unet_input_blocks_1_1_proj_in.lora_up.weight": torch.ones(2, 2)}, "this one has no layer lora_unet_in"),
        ({"unet.other.lora_A.weight": torch.ones(2, 2)}, "made for another model: this one has no layer other"),
        ({"unet.conv_norm_out.lora_A.weight": torch.ones(1, 1), "unet.conv_norm_out.lora_B.weight": torch.ones(32, 1)},
         "made for another model: conv_norm_out.weight is \\[32\\]"),
    ],
)  # fmt: skip
def test_files_that_are_refused_in_one_line(file, tensors, text):
    with pytest.raises(InvalidRequest, match=text) as caught:
        read_lora(write(file, tensors), SHAPES)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("lora=")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("{", "cannot be understood"),
        ("[1]", "cannot be understood"),
        ('{"lora_alpha": "4"}', "cannot be understood"),
        ('{"lora_alpha": NaN}', "cannot be understood"),
        ('{"lora_alpha": true}', "cannot be understood"),
        ('{"alpha_pattern": [1]}', "cannot be understood"),
        ('{"use_dora": true}', "is a DoRA; only plain LoRA is read"),
        ('{"alpha_pattern": {"(a+)+b": 2}}', r"gives an alpha to \(a\+\)\+b, which it does not change"),
    ],
)
def test_metadata_that_is_refused(file, said, text):
    with pytest.raises(InvalidRequest, match=text):
        read_lora(write(file, PEFT, {"lora_adapter_metadata": said}), SHAPES)


def test_damaged_and_huge_files(file):
    good = write(file, PEFT).read_bytes()
    for data in (b"", b"text", good[:-5], b"\xff" * 100, b"PK\x03\x04" + bytes(100)):
        file.write_bytes(data)
        with pytest.raises(InvalidRequest, match="truncated or no safetensors file"):
            read_lora(file, SHAPES)
    with file.open("wb") as stream:
        stream.truncate(2**32)
    with pytest.raises(InvalidRequest, match="has 4294967296 bytes; a LoRA of this model has at most"):
        read_lora(file, SHAPES)
    with file.open("wb") as stream:
        stream.write((5 * 2**20).to_bytes(8, "little"))
        stream.truncate(6 * 2**20)
    with pytest.raises(InvalidRequest, match="header has 5242880 bytes; at most 4194304 are read"):
        read_lora(file, SHAPES)
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        read_lora(file.with_name("none"), SHAPES)
