"""One tiny model is exported once, for real; the tests look at the bundle, and at what happens when things go wrong."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from pylumiere.export import build, steps, to_onnx
from pylumiere.export.build import ExportOptions, export_bundle
from pylumiere.export.spec import network_specs
from safetensors.torch import load_file, save_file

from pylumiere.checkpoints.bundle import make_key_pair, open_bundle
from pylumiere.errors import BundleError, IntegrityError, InvalidRequest, UnsupportedDevice
from pylumiere.networks.families import build_network
from pylumiere.networks.stunet.presets import model_preset

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
onnx = pytest.importorskip("onnx", reason="needs pip install 'pylumiere[export]'")


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_bundle_opens_and_its_graphs_were_compared_at_three_sizes(exported):
    output, report = exported
    opened = open_bundle(output)
    graphs = [a for a in opened.manifest.artefacts if a.kind == "onnx"]
    assert {a.stage for a in graphs} == {"base", "ssr"}
    specs = network_specs(model_preset("tiny"))
    for artefact in graphs:
        spec = specs[artefact.stage]
        assert [one.values for one in artefact.receipt.compared] == [
            int(np.prod(spec.output.shape(sizes))) for _, sizes in spec.check_sizes()
        ]
        assert all(0 < one.rel_rms < artefact.receipt.tolerance for one in artefact.receipt.compared)
        assert {port.name for port in artefact.inputs} == set(artefact.profiles[0])
    assert {row["name"] for row in report["artefacts"]} == {a.name for a in opened.manifest.artefacts}
    assert report["bytes"] == sum(entry.size for entry in opened.manifest.files.values())
    assert not [name for name in _names(output.parent) if name != output.name]


def test_weights_are_stored_once_as_they_were(exported, tiny_model):
    output, _ = exported
    for stage in ("base", "ssr"):
        stored = (output / "model" / f"{stage}.safetensors").read_bytes()
        assert stored == (tiny_model / f"{stage}.safetensors").read_bytes()
        model = onnx.load(output / "onnx" / f"{stage}.onnx", load_external_data=False)
        outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert {t.name for t in outside} == set(load_file(output / "model" / f"{stage}.safetensors"))
        locations = {entry.value for t in outside for entry in t.external_data if entry.key == "location"}
        assert locations == {f"../model/{stage}.safetensors"}
        inside = sum(len(t.raw_data) for t in model.graph.initializer)
        assert inside < 4096


def test_graphs_hold_no_operator_that_tensorrt_is_wrong_on_and_no_path_of_this_machine(exported):
    output, _ = exported
    for stage in ("base", "ssr"):
        raw = (output / "onnx" / f"{stage}.onnx").read_bytes()
        model = onnx.load_from_string(raw)
        assert "GroupNormalization" not in {node.op_type for node in model.graph.node}
        assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 18)}
        assert b".py" not in raw
        assert onnx.TensorProto.DOUBLE not in {t.data_type for t in model.graph.initializer}


def test_a_graph_gives_what_the_model_gives_at_a_size_that_was_not_checked(exported):
    output, _ = exported
    spec = network_specs(model_preset("tiny"))["base"]
    weights = output / "model" / "base.safetensors"
    session = to_onnx.open_session(output / "onnx" / "base.onnx", {"../model/base.safetensors": weights}, 1)
    network = build_network(
        model_preset("tiny").first.network, {name: tensor.float() for name, tensor in load_file(weights).items()}
    )
    feed = to_onnx.example_inputs(spec, {"B": 2, "T": 4, "H": 12, "W": 8}, seed=5)
    (found,) = session.run(None, feed)
    with torch.inference_mode():
        expected = network(**{name: torch.from_numpy(value) for name, value in feed.items()}).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max() + 1e-6


def test_the_second_export_takes_everything_from_the_cache(exported, tiny_model, cache_folder, tmp_path):
    output, first = exported
    options = ExportOptions(skus=("gb10",) if HAS_RTX else ())
    report = export_bundle(str(tiny_model), tmp_path / "again.plm", options, cache_folder=cache_folder)
    assert report["cached"] == report["steps"] == first["steps"]
    old, new = (open_bundle(path).manifest for path in (output, tmp_path / "again.plm"))
    assert old == new


@pytest.mark.skipif(not HAS_RTX, reason="TensorRT-RTX is not installed: pip install 'pylumiere[export]'")
def test_plans_are_built_without_a_gpu_and_say_what_they_run_on(exported):
    output, report = exported
    plans = [a for a in open_bundle(output).manifest.artefacts if a.kind == "plan"]
    assert {a.stage for a in plans} == {"base", "ssr"}
    for artefact in plans:
        assert artefact.target.sms == (80, 86, 89, 120, 121)
        assert artefact.target.platform.startswith("linux-")
        assert artefact.library.version == sys.modules["tensorrt_rtx"].__version__
        assert (output / artefact.files[0]).stat().st_size > 10_000
        assert artefact.receipt.layers["total"] > 100
        assert artefact.receipt.layers["type.half"] > artefact.receipt.layers["type.float"]
        assert not artefact.receipt.compared  # nothing was run on a GPU
        assert "the plan itself was not run" in artefact.receipt.notes[1]
    assert any("sm_121: no cubins" in note for note in report["notes"])


def test_other_weights_are_compared_again_but_traced_once(tiny_model, cache_folder, exported, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "other")
    path = tmp_path / "other" / "ssr.safetensors"
    weights = load_file(path)
    save_file({name: tensor * 0.5 for name, tensor in weights.items()}, path, {"format": "pt"})
    report = export_bundle(str(tmp_path / "other"), tmp_path / "other.plm", cache_folder=cache_folder)
    cached = {row["name"]: row["cached"] for row in report["artefacts"]}
    assert cached == {"base-onnx-fp32": True, "ssr-onnx-fp32": False}
    assert report["steps"] - report["cached"] == 1


def test_a_model_whose_output_says_nothing_is_refused_and_leaves_nothing(tiny_model, cache_folder, exported, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "zero")
    path = tmp_path / "zero" / "base.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(BundleError, match="zeros everywhere, which compares nothing"):
        export_bundle(str(tmp_path / "zero"), tmp_path / "zero.plm", cache_folder=cache_folder)
    assert _names(tmp_path) == ["zero"]


def test_a_bundle_is_never_overwritten_without_force(exported, tiny_model, cache_folder, tmp_path):
    output, _ = exported
    target = tmp_path / "a.plm"
    shutil.copytree(output, target)
    before = (target / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="exists; --force replaces it"):
        export_bundle(str(tiny_model), target, cache_folder=cache_folder)
    assert (target / "manifest.json").read_bytes() == before
    export_bundle(str(tiny_model), target, force=True, cache_folder=cache_folder)
    assert {a.kind for a in open_bundle(target).manifest.artefacts} == {"onnx"}
    assert _names(tmp_path) == ["a.plm"]


def test_force_replaces_bundles_only(tiny_model, tmp_path):
    (tmp_path / "thesis.plm").mkdir()
    (tmp_path / "thesis.plm" / "chapter1.txt").write_text("dear to me")
    with pytest.raises(BundleError, match="is no bundle, and --force replaces nothing else"):
        export_bundle(str(tiny_model), tmp_path / "thesis.plm", force=True)
    assert (tmp_path / "thesis.plm" / "chapter1.txt").exists()


def test_a_signed_bundle_opens_with_its_key_and_with_no_other(exported, tiny_model, cache_folder, tmp_path):
    for name in ("a", "b"):
        make_key_pair(tmp_path / f"{name}.pem", tmp_path / f"{name}.pub")
    export_bundle(str(tiny_model), tmp_path / "s.plm", sign_key=tmp_path / "a.pem", cache_folder=cache_folder)
    assert open_bundle(tmp_path / "s.plm", tmp_path / "a.pub").is_trusted
    with pytest.raises(IntegrityError):
        open_bundle(tmp_path / "s.plm", tmp_path / "b.pub")


def test_a_bundle_is_finished_from_itself(exported, cache_folder, tmp_path):
    output, _ = exported
    export_bundle(str(output), tmp_path / "more.plm", ExportOptions(batch=1), cache_folder=cache_folder)
    old, new = (open_bundle(path).manifest for path in (output, tmp_path / "more.plm"))
    assert {a.name for a in new.artefacts} == {a.name for a in old.artefacts}
    base = next(a for a in new.artefacts if a.name == "base-onnx-fp32")
    assert base.profiles[0]["sample"].max[0] == 1  # built anew
    kept = [a for a in old.artefacts if a.kind == "plan"]
    assert kept == [a for a in new.artefacts if a.kind == "plan"]


@pytest.mark.parametrize("where", ["copyfile", "mkdtemp"])
def test_a_full_or_read_only_disk_is_one_line_and_leaves_nothing(
    where, exported, tiny_model, cache_folder, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC if where == "copyfile" else errno.EROFS, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build.shutil if where == "copyfile" else build.tempfile, where, fail)
    with pytest.raises(BundleError, match="No space left on device") as caught:
        export_bundle(str(tiny_model), tmp_path / "a.plm", cache_folder=cache_folder)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert not _names(tmp_path)


def test_a_step_that_is_killed_says_what_may_help_and_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    start = subprocess.Popen
    monkeypatch.setattr(steps.subprocess, "Popen", lambda _, **options: start(command, **options))
    with pytest.raises(BundleError, match="killed, most likely for want of memory; try smaller --frames"):
        export_bundle(str(tiny_model), tmp_path / "a.plm", cache_folder=tmp_path / "cache")
    monkeypatch.undo()
    assert _names(tmp_path) == ["cache"]


def test_a_missing_library_is_named_with_its_extra(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UnsupportedDevice, match=r"onnxscript.*pip install 'pylumiere\[export\]'"):
        export_bundle(str(tiny_model), tmp_path / "a.plm")
    assert not _names(tmp_path)


def test_plans_without_their_library_are_refused_before_anything_is_built(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UnsupportedDevice, match=r"tensorrt_rtx is not installed.*pylumiere\[export\]"):
        export_bundle(str(tiny_model), tmp_path / "a.plm", ExportOptions(skus=("l4",)))
    assert not _names(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sku", "rtx9"], "SKU 'rtx9' is unknown"),
        (["--sku", "this"], "--sku this needs an NVIDIA GPU"),
        (["--size", "100x100"], "--size (height) 100 is not a multiple"),
        (["--frames", "7"], "--frames 7 is not a multiple"),
        (["--precision", "int8"], "--precision 'int8' is not one of"),
        (["--memory-budget", "much"], "--memory-budget 'much' is no size"),
        (["--sign", "nowhere.pem"], "nowhere.pem cannot be read"),
        (["--model", "nowhere"], "model 'nowhere' does not exist"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="--sku this works here")
def test_the_users_mistakes_are_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    from pylumiere.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["export", "-o", "a.plm", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out
    assert not _names(tmp_path)


@pytest.mark.parametrize("output", ["a.zip", "missing/a.plm"])
def test_an_output_that_cannot_be_a_bundle_is_refused(output, tiny_model, tmp_path):
    with pytest.raises((InvalidRequest, BundleError), match=r"does not end in \.plm|does not exist"):
        export_bundle(str(tiny_model), tmp_path / output)


def test_an_interrupted_export_leaves_nothing(tiny_model, tmp_path):
    command = [sys.executable, "-P", "-m", "pylumiere.cli", "export", "--model", str(tiny_model), "-o", "a.plm"]
    cache = tmp_path / "cache"
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    process = subprocess.Popen(
        command, cwd=tmp_path / "work", env=environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    begun = time.monotonic()
    while time.monotonic() - begun < 60 and not list(cache.rglob(".trace-*")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "pylumiere: interrupted; nothing was written\n"
    assert not _names(tmp_path / "work")
    assert [p.name for p in (cache / "pylumiere" / "export").iterdir() if p.suffix != ".lock"] == []


def test_the_report_is_json_on_request(exported, tiny_model, tmp_path, monkeypatch, capsys):
    from pylumiere.cli import main

    output, report = exported
    monkeypatch.setattr(build, "export_bundle", lambda *_, **__: report)
    assert main(["export", "--model", str(tiny_model), "-o", str(tmp_path / "a.plm"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report
    assert main(["export", "--model", str(tiny_model), "-o", str(tmp_path / "a.plm")]) == 0
    assert "base-onnx-fp32" in capsys.readouterr().out
