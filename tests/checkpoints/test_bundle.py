"""Bundles: what is written is read, and everything that can be wrong with one is refused before it is parsed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fuzzing import MUTATIONS, mutate, native_loaders_refused, write_sample

import pylumiere
from pylumiere.checkpoints.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_MANIFEST_VALUES,
    Bundle,
    describe_files,
    is_bundle,
    make_key_pair,
    open_bundle,
    parse_manifest,
    write_manifest,
)
from pylumiere.checkpoints.bundle.manifest import _safe_path
from pylumiere.errors import BundleError, IntegrityError
from pylumiere.loading import load_model, make_backend


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def sample(original, tmp_path):
    """A copy that a test may spoil, and the public key."""
    path, key = original
    shutil.copytree(path, tmp_path / "sample.plm")
    return tmp_path / "sample.plm", key


def load(path, key=None):
    """What an engine does with a bundle before the first network call."""
    model, choice = load_model(path, "onnxruntime", "cpu", "fp32", key)
    make_backend(model, choice)
    model.text_encoder()


def edit(path, change):
    data = json.loads((path / MANIFEST).read_bytes())
    change(data)
    (path / MANIFEST).write_text(json.dumps(data))


def assert_refused(path, error, text, key=None):
    with pytest.raises(error, match=text) as caught:
        open_bundle(path, key)
    assert "\n" not in str(caught.value)


# ---- what is right ---------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(sample):
    path, key = sample
    bundle = open_bundle(path, key)
    assert bundle.is_trusted and bundle.is_signed
    assert bundle.manifest.files == describe_files(path)
    assert bundle.manifest == parse_manifest((path / MANIFEST).read_bytes())
    assert bundle.config.name == "tiny"
    for name in bundle.manifest.files:
        assert bundle.read(name) == (path / name).read_bytes()


def test_without_a_key_the_signature_is_not_looked_at(sample):
    path, _ = sample
    (path / "manifest.sig").write_bytes(b"anything")
    assert not open_bundle(path).is_trusted
    (path / "manifest.sig").unlink()
    assert not open_bundle(path).is_signed


def test_openssl_agrees_with_the_signature(sample, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program")
    path, key = sample
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(key), "-rawin", "-in", str(path / MANIFEST),
               "-sigfile", str(path / "manifest.sig")]  # fmt: skip
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes() + b" ")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_keys_are_not_overwritten_and_the_private_one_is_private(tmp_path):
    make_key_pair(tmp_path / "a.pem", tmp_path / "a.pub.pem")
    assert (tmp_path / "a.pem").stat().st_mode & 0o077 == 0
    for names in (("a.pem", "b.pub.pem"), ("b.pem", "a.pub.pem")):
        with pytest.raises(BundleError, match=r"exists|cannot be written"):
            make_key_pair(*(tmp_path / name for name in names))
    assert not (tmp_path / "b.pem").exists()


def test_what_counts_as_a_bundle(sample, tmp_path):
    assert is_bundle(sample[0])
    assert is_bundle("nowhere.plm")
    shutil.copytree(sample[0], tmp_path / "other-name")
    assert is_bundle(tmp_path / "other-name")
    assert not is_bundle(tmp_path)


def test_a_manifest_that_no_loader_takes_is_not_written(sample):
    path, _ = sample
    manifest = open_bundle(path).manifest
    broken = manifest.model_copy(update={"files": {}})
    before = (path / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match="files"):
        write_manifest(path, broken)
    assert (path / MANIFEST).read_bytes() == before


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version, text", [(3, "version 3 is not known.*update"), (0, "version 0 .*export the bundle"),
                                           ("1", "no schema_version"), (True, "no schema_version")])  # fmt: skip
def test_other_schema_versions_are_refused_by_name(sample, version, text):
    edit(sample[0], lambda data: data.update(schema_version=version))
    assert_refused(sample[0], BundleError, text)


@pytest.mark.parametrize("kind, change, text", [
    ("clip", {}, "text encoder clip needs a config"),
    ("minilm", {"config": "text/config.json"}, "text encoder minilm has no config"),
    ("clip", {"config": "text/nowhere.json"}, "text/nowhere.json' is used, but not listed"),
])  # fmt: skip
def test_clip_has_a_configuration_and_no_other_text_encoder_has(sample, kind, change, text):
    edit(sample[0], lambda data: data["text"].update(kind=kind, tokenizer="text/tokenizer.json", **change))
    assert_refused(sample[0], BundleError, text)


@pytest.mark.parametrize("name", ["../x.onnx", "/etc/x.onnx", "a/../x.onnx", "a//x.onnx", "./x.onnx", "a\\x.onnx",
                                  ".x.onnx", "x.pkl", "x", "manifest.json", "a" * 241 + ".onnx",
                                  "x.onnx\0.onnx"])  # fmt: skip
def test_paths_that_lead_elsewhere_are_refused(sample, name):
    edit(sample[0], lambda data: data["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    assert_refused(sample[0], BundleError, "path|ending|listed|at most")


def test_each_refusal_names_its_culprit(sample):
    path, key = sample
    onnx = path / "onnx" / "base.onnx"
    right = onnx.read_bytes()
    onnx.write_bytes(right[:-1])
    assert_refused(path, IntegrityError, r"onnx/base.onnx has \d+ bytes; the manifest says")
    onnx.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    assert_refused(path, IntegrityError, "onnx/base.onnx is damaged or was changed")
    onnx.unlink()
    assert_refused(path, BundleError, "onnx/base.onnx is missing")
    onnx.symlink_to("/etc/passwd")
    assert_refused(path, BundleError, "'onnx/base.onnx' is a link")
    onnx.unlink()
    onnx.write_bytes(right)
    (path / "onnx" / "extra.onnx").write_bytes(b"x")
    assert_refused(path, BundleError, "'onnx/extra.onnx' is not listed")
    (path / "onnx" / "extra.onnx").unlink()
    open_bundle(path, key)
    (path / "manifest.sig").unlink()
    assert_refused(path, IntegrityError, "is not signed", key)


def test_another_key_is_refused(sample, tmp_path):
    make_key_pair(tmp_path / "other.pem", tmp_path / "other.pub.pem")
    assert_refused(sample[0], IntegrityError, "not the trusted key's signature", tmp_path / "other.pub.pem")
    assert_refused(sample[0], BundleError, "cannot be read", tmp_path / "nowhere.pem")
    assert_refused(sample[0], BundleError, "no public key", sample[0] / MANIFEST)


def test_a_name_twice_is_refused_wherever_it_stands(sample):
    path, _ = sample
    text = (path / MANIFEST).read_text()
    for name in ('"name"', '"size"', '"kind"', '"num_groups"'):
        (path / MANIFEST).write_text(text.replace(f"{name}:", f"{name}: 1, {name}:", 1))
        assert_refused(path, BundleError, "stands twice")


def test_sizes_are_bounded_before_anything_is_hashed(sample, monkeypatch):
    path, _ = sample
    monkeypatch.setattr(Bundle, "check_hashes", lambda self: pytest.fail("files were hashed"))
    with pytest.raises(BundleError, match="at most 100 are allowed"):
        open_bundle(path, max_bytes=100)
    edit(path, lambda data: data["files"]["onnx/base.onnx"].update(size=2**49))
    assert_refused(path, BundleError, "add up to")
    with (path / MANIFEST).open("ab") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    assert_refused(path, BundleError, f"at most {MAX_MANIFEST_BYTES} are read")


def test_a_hostile_manifest_costs_little_memory():
    wide = MAX_MANIFEST_VALUES - 10
    hostile = [
        b'{"schema_version":1,"model":{"a":[' + b"[]," * (wide // 2) + b"1]}}",
        b'{"schema_version":1,"files":{' + b",".join(b'"%d.onnx":1' % i for i in range(4000)) + b"}}",
        b'{"schema_version":1,"artefacts":[' + b",".join([b"{}"] * 4000) + b"]}",
        b'{"schema_version":1,' + b",".join(b'"%d":1' % i for i in range(wide)) + b"}",
        b"[" * wide,
    ]
    for raw in hostile:
        tracemalloc.start()
        try:
            with pytest.raises(BundleError):
                parse_manifest(raw)
            assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
        finally:
            tracemalloc.stop()


def test_bytes_are_hashed_as_they_are_handed_out(sample):
    path, _ = sample
    bundle = open_bundle(path)
    file = path / "onnx" / "base.onnx"
    right = file.read_bytes()
    file.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="base.onnx"):
        bundle.read("onnx/base.onnx")
    file.write_bytes(right + b"x")
    with pytest.raises(IntegrityError, match="changed its size"):
        bundle.read("onnx/base.onnx")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(BundleError, match="no plain file"):
        bundle.read("onnx/base.onnx")
    with pytest.raises(BundleError, match="not listed"):
        bundle.read("../private.pem")


def test_an_open_bundle_survives_its_replacement(sample, tmp_path):
    path, _ = sample
    bundle = open_bundle(path)
    right = (path / "onnx" / "base.onnx").read_bytes()
    path.rename(tmp_path / "old.plm")
    shutil.copytree(tmp_path / "old.plm", path)
    (path / "onnx" / "base.onnx").write_bytes(b"another bundle's")
    assert bundle.read("onnx/base.onnx") == right


def test_a_link_on_the_way_to_a_file_is_refused_at_reading_too(sample, tmp_path):
    path, _ = sample
    bundle = open_bundle(path)
    (path / "onnx").rename(tmp_path / "aside")
    (path / "onnx").symlink_to(tmp_path / "aside")
    with pytest.raises(BundleError, match="cannot be opened"):
        bundle.read("onnx/base.onnx")


# ---- mutations -------------------------------------------------------------------------------------------------------


def test_an_intact_sample_reaches_a_native_library(original):
    """Without this, the next two tests could pass because nothing is ever loaded."""
    path, key = original
    with native_loaders_refused() as called, contextlib.suppress(BundleError, AssertionError):
        load(path, key)
    assert called == ["onnxruntime.InferenceSession"]


def assert_mutation_refused(path, key, kind, rng):
    needs_key = mutate(path, kind, rng)
    with native_loaders_refused() as called:
        with pytest.raises(BundleError) as caught:
            load(path, key if needs_key else None)
        assert called == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", MUTATIONS)
def test_every_kind_of_mutation_is_refused_unparsed(original, tmp_path, kind):
    path, key = original
    for seed in range(3):
        copy = tmp_path / str(seed) / "sample.plm"
        shutil.copytree(path, copy)
        assert_mutation_refused(copy, key, kind, random.Random(seed))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(MUTATIONS)), rng=st.randoms(use_true_random=False))
def test_mutated_bundles_are_refused_unparsed(original, tmp_path, kind, rng):
    path, key = original
    work = tmp_path / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(path, work / "sample.plm")
    assert_mutation_refused(work / "sample.plm", key, kind, rng)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300) | _JSON.map(lambda value: json.dumps(value).encode())
       | st.dictionaries(st.sampled_from(["schema_version", "name", "model", "weights", "text", "files", "artefacts"]),
                         _JSON | st.just(1)).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_no_random_manifest_is_taken(raw):
    with pytest.raises(BundleError) as caught:
        parse_manifest(raw)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.from_regex(r"[a-z./\\]{1,30}\.onnx", fullmatch=True))
def test_no_path_leads_out_of_the_folder(name):
    try:
        _safe_path(name)
    except ValueError:
        return
    root = Path("/a/bundle")
    assert os.path.normpath(root / name) == str(root / name)
    assert Path(os.path.normpath(root / name)).is_relative_to(root) and name.isascii() and name.isprintable()


# ---- the ways in -----------------------------------------------------------------------------------------------------


def test_engine_refuses_a_bad_bundle(sample):
    path, key = sample
    (path / "onnx" / "base.onnx").write_bytes(b"bad")
    with pytest.raises(IntegrityError):
        pylumiere.Engine.load(path)
    with pytest.raises(BundleError, match="cannot be opened"):
        pylumiere.Engine.load("nowhere.plm")
    with pytest.raises(BundleError, match="only a bundle can be signed"):
        pylumiere.Engine.load("demo", trusted_key=key)


def test_command_line_says_it_in_one_line(sample, capsys):
    from pylumiere.cli import main

    path, key = sample
    (path / "onnx" / "base.onnx").unlink()
    for command in (["inspect", str(path)], ["verify", str(path)], ["verify", str(path), "--key", str(path / "no.pem")],
                    ["inspect", "nowhere.plm"], ["generate", "a ball", "--model", str(path)]):  # fmt: skip
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("pylumiere: ")


def test_inspect_shows_what_is_there_and_why_it_is_not_taken(sample, capsys):
    from pylumiere.cli import main

    path, key = sample
    assert main(["inspect", str(path), "--key", str(key), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trusted"] and report["bytes"] == sum(e.size for e in describe_files(path).values())
    assert {entry["name"] for entry in report["artefacts"]} == {"onnx-base", "onnx-ssr", "plan-base", "cubins"}
    assert "sm_89" in report["passed_over"]["plan-base"] and "cubins" in report["passed_over"]
    assert main(["inspect", str(path), "--sku", "rtx4090", "--backend", "tensorrt_rtx"]) == 0
    text = capsys.readouterr().out
    assert "do not cover every stage" in text and "plan-base" in text
    assert main(["inspect", str(path), "--sku", "rtx9999"]) == 2
    assert "rtx4090" in capsys.readouterr().err


def test_keygen_and_signing_from_the_command_line(sample, tmp_path, capsys):
    from pylumiere.cli import main

    path, _ = sample
    assert main(["keygen", str(tmp_path / "mine.pem")]) == 0
    write_manifest(path, open_bundle(path).manifest, tmp_path / "mine.pem")
    assert main(["inspect", str(path), "--key", str(tmp_path / "mine.pub.pem")]) == 0
    assert "the trusted key's" in capsys.readouterr().out
    assert main(["keygen", str(tmp_path / "mine.pem")]) == 2
