"""CLIP's text model against transformers, and parts that do not fit each other."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.clip import END, tokenizer_files, vocabulary
from support.testing import rel_rms

from pylumiere.errors import BundleError
from pylumiere.networks.text import TextEncoder
from pylumiere.networks.text.clip import (
    ClipTextConfig,
    ClipTextEncoder,
    clip_shapes,
    fit_clip_weights,
)
from pylumiere.networks.text.clip_tokenizer import TOKENIZER_FILES, tokenizer_json
from pylumiere.networks.text.encoder import load_tokenizer

TINY_FILES = {
    "vocab.json": b'{"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}',
    "merges.txt": b"#version: 0.2\n",
}
PROMPTS = ["a red circle moves right over grass", "", "Chien! 狗 naïve", "license " * 100]


def _config(**changes):
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_hidden_layers": 3}
    return ClipTextConfig(**{"vocab_size": len(vocabulary()[0]), **sizes, **changes})


def _oracle(config):
    """transformers' model with weights large enough that each of them shows."""
    import transformers

    torch.manual_seed(0)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config.to_dict())).eval()
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.3)
    return model.requires_grad_(False)


def _weights(oracle, prefix="text_model."):
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in oracle.state_dict().items()}


@pytest.fixture(scope="module")
def oracle():
    return _oracle(_config())


@pytest.fixture(scope="module")
def encoder(oracle):
    return ClipTextEncoder(_config(), tokenizer_files(), _weights(oracle))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_the_hidden_state_is_that_of_transformers(activation, prefix):
    config = _config(hidden_act=activation, layer_norm_eps=1e-3)
    oracle = _oracle(config)
    encoder = ClipTextEncoder(config, tokenizer_files(), _weights(oracle, prefix))
    embeddings, _ = encoder.encode(PROMPTS)
    tokenizer = load_tokenizer(tokenizer_json(tokenizer_files()), 77)
    ids = torch.tensor([tokenizer.encode(prompt).ids for prompt in PROMPTS])
    assert rel_rms(embeddings, oracle(ids).last_hidden_state) < 1e-5

    other = _config(hidden_act="gelu" if activation == "quick_gelu" else "quick_gelu", layer_norm_eps=1e-3)
    changed, _ = ClipTextEncoder(other, tokenizer_files(), _weights(oracle, prefix)).encode(PROMPTS)
    assert rel_rms(changed, embeddings) > 1e-3, "the activation must show"


@pytest.mark.parametrize("pad", [END, "!"])
def test_a_folder_that_transformers_saved(pad, oracle, tmp_path):
    """Both libraries from the same files: its own config.json, weights and tokenizer, as diffusers calls them."""
    from transformers import CLIPTextModel, CLIPTokenizerFast

    oracle.save_pretrained(tmp_path)
    for name, data in tokenizer_files(pad).items():
        (tmp_path / name).write_bytes(data)
    tokenizer = CLIPTokenizerFast.from_pretrained(tmp_path)
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        expected = CLIPTextModel.from_pretrained(tmp_path)(tokens.input_ids).last_hidden_state

    config = ClipTextConfig.from_json(json.loads((tmp_path / "config.json").read_text()))
    assert config == _config()
    files = {name: (tmp_path / name).read_bytes() for name in TOKENIZER_FILES if (tmp_path / name).exists()}
    weights = load_file(tmp_path / "model.safetensors")
    for tokenizer in (files, {"tokenizer.json": tokenizer_json(files)}):
        embeddings, _ = ClipTextEncoder(config, tokenizer, weights).encode(PROMPTS)
        assert rel_rms(embeddings, expected) < 1e-5


def test_it_keeps_the_protocol(encoder):
    assert isinstance(encoder, TextEncoder)
    assert (encoder.name, encoder.max_length, encoder.width) == ("clip", 77, 48)
    embeddings, mask = encoder.encode(PROMPTS)
    assert embeddings.shape == (4, 77, 48) and embeddings.dtype == torch.float32
    assert mask.shape == (4, 77) and mask.dtype == torch.bool and mask.all(), "networks attend to the padding, too"


def test_a_prompt_does_not_depend_on_its_batch(encoder):
    together, _ = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(encoder.encode([prompt])[0][0], together[row])


def test_a_position_sees_itself_and_what_is_before_it(encoder):
    ids = torch.randint(0, 500, (1, 77), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 40] = 501
    before, after = encoder.model(ids), encoder.model(changed)
    torch.testing.assert_close(after[:, :40], before[:, :40], rtol=1e-5, atol=1e-5)
    assert ((after - before)[0, 40:].abs().amax(1) > 1e-3).all()


def test_a_prompt_that_is_cut_says_so(encoder, caplog):
    with caplog.at_level(logging.WARNING, logger="pylumiere"):
        encoder.encode(PROMPTS[:3])
        assert not caplog.records
        encoder.encode(PROMPTS[3:])
    assert "longer than 77 tokens" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_16_bits_are_computed_with_in_float32(dtype, oracle):
    stored = {name: tensor.to(dtype) for name, tensor in _weights(oracle).items()}
    rounded = {name: tensor.float() for name, tensor in stored.items()}
    embeddings, _ = ClipTextEncoder(_config(), tokenizer_files(), stored).encode(PROMPTS)
    expected, _ = ClipTextEncoder(_config(), tokenizer_files(), rounded).encode(PROMPTS)
    assert embeddings.dtype == torch.float32 and torch.equal(embeddings, expected)


def test_what_public_files_hold_besides_is_left_out(oracle):
    weights = _weights(oracle)
    more = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.zeros(48, 48),
        "vision_model.post_layernorm.weight": torch.zeros(8),
    }
    fitting = fit_clip_weights(_config(), weights | more)
    assert fitting.keys() == clip_shapes(_config()).keys()
    assert {name: tuple(tensor.shape) for name, tensor in fitting.items()} == clip_shapes(_config())


def test_weights_that_do_not_fit_are_named(oracle):
    missing = {name: tensor for name, tensor in _weights(oracle).items() if "layers.1." not in name}
    with pytest.raises(BundleError, match=r"missing (text_model\.encoder\.layers\.1\.\S+, ){2}\S+ and 13 more$"):
        fit_clip_weights(_config(), missing)
    wrong = _weights(oracle, "") | {
        "final_layer_norm.bias": torch.zeros(3),
        "encoder.layers.0.mlp.fc1.weight": torch.zeros(80, 48, dtype=torch.int8),
    }
    with pytest.raises(BundleError) as caught:
        ClipTextEncoder(_config(), tokenizer_files(), wrong)
    assert str(caught.value) == (
        "clip text encoder: the weights do not fit its configuration: "
        "wrong shape text_model.final_layer_norm.bias [3] (expected [48]); "
        "wrong dtype text_model.encoder.layers.0.mlp.fc1.weight torch.int8"
    )


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(oracle):
    config = _config(vocab_size=len(vocabulary()[0]) - 1)
    with pytest.raises(BundleError, match=rf"has a token {config.vocab_size}, the model only {config.vocab_size} tok"):
        ClipTextEncoder(config, tokenizer_files(), _weights(oracle))


def test_what_config_json_leaves_out_is_as_in_transformers():
    from transformers import CLIPTextConfig

    assert ClipTextConfig.from_json({}) == ClipTextConfig.from_json(CLIPTextConfig().to_dict())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "its configuration is no JSON object"),
        ({"model_type": "t5"}, "model_type 't5' is not supported; allowed: clip_text_model"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; allowed: quick_gelu, gelu"),
        ({"hidden_act": None}, "hidden_act: expected str, got None"),
        ({"hidden_size": 100}, "hidden_size 100 is not a multiple of num_attention_heads 8"),
        ({"hidden_size": "512"}, "hidden_size: expected int, got '512'"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers 0 is outside 1\.\.128"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is outside"),
        ({"max_position_embeddings": 1}, r"max_position_embeddings 1 is outside 2\.\.4096"),
        ({"layer_norm_eps": 0}, "layer_norm_eps 0.0 is outside"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps: nan is not finite"),
    ],
)
def test_a_configuration_that_is_not_supported_is_named(data, message):
    with pytest.raises(BundleError, match=message):
        ClipTextConfig.from_json(data)


def test_the_model_exports_with_any_batch(encoder):
    tokenizer = load_tokenizer(tokenizer_json(tokenizer_files()), 77)
    ids = torch.tensor([tokenizer.encode(prompt).ids for prompt in PROMPTS])
    batch = {"input_ids": {0: torch.export.Dim("B", min=1, max=8)}}
    with torch.no_grad():
        graph = torch.export.export(encoder.model, (ids[:2],), dynamic_shapes=batch).module()
    embeddings, _ = encoder.encode(PROMPTS)
    for rows in (1, 4):
        assert rel_rms(graph(ids[:rows]), embeddings[:rows]) < 1e-5


def test_it_does_not_import_transformers():
    code = (
        "import sys, torch; from pylumiere.networks.text.clip import *;"
        "config = ClipTextConfig(vocab_size=4, hidden_size=8, num_hidden_layers=1);"
        "weights = {name: torch.zeros(shape) for name, shape in clip_shapes(config).items()};"
        f"ClipTextEncoder(config, {TINY_FILES!r}, weights).encode(['a']); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
