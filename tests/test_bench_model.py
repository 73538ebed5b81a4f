"""`bench model` and `bench e2e`: results are checked first, rows say what was measured, ratios are compared, mistakes
are named; and predictions from rows."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.latent import latent_config
from support.testing import write_random_model

from pylumiere.bench import against, networks, predict, rival_clip, rivals
from pylumiere.bench.facts import source_hash
from pylumiere.bench.plan import plan_clip, plan_network
from pylumiere.checkpoints.native import load_checkpoint
from pylumiere.errors import InvalidRequest
from pylumiere.networks.stunet.presets import stage_preset

COMMAND = Path(sys.executable).with_name("pylumiere")


def bench(*arguments):
    return subprocess.run([COMMAND, "bench", *map(str, arguments)], capture_output=True, text=True, check=False)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    assert networks.run(str(tiny_model), vs=["eager"], repeats=2, path=path) == 0
    return path


def test_rows_say_what_was_measured(measured):
    rows = read(measured)
    timed = [row for row in rows if "seconds" in row and "scaling" not in row]
    names = {row["provider"] for row in timed}
    assert {"pylumiere fp32", "pylumiere bf16", "eager fp32", "eager bf16 channels-last"} <= names
    assert all(row["correct"] and row["error"] < networks.ALLOWED[row["precision"]] for row in timed)
    assert {row["case"] for row in timed} == {"base 2x8x16x16x7", "ssr 2x4x32x32x6"}
    assert all(row["source"] and row["commit"] and row["cpu"] for row in rows)
    for stage in ("base", "ssr"):
        kinds = [row for row in rows if row.get("stage") == stage]
        assert sum(row["share"] for row in kinds) == pytest.approx(1, abs=0.02)
        assert {"spatial conv", "norm and activation", predict.OTHER} <= {row["kind"] for row in kinds}


def test_stages_of_a_latent_model_and_its_decoder_are_measured(tmp_path):
    folder, path = write_random_model(tmp_path / "latent", latent_config()), tmp_path / "rows.jsonl"
    assert networks.run(str(folder), vs=["eager"], precisions=["fp32"], repeats=2, path=path) == 0
    rows = read(path)
    assert {row["case"] for row in rows} == {"unet 2x4x8x8x4", "decoder 2x1x8x8x4"}
    assert {"pylumiere fp32", "pylumiere bf16", "eager fp32"} <= {row["provider"] for row in rows}
    for stage, kind in (("unet", "norm and activation"), ("decoder", "attention in space and to text")):
        kinds = {row["kind"]: row for row in rows if row.get("stage") == stage}
        assert {"spatial conv", "linear", kind} <= set(kinds)
        assert all(row["flops"] > 0 for row in kinds.values() if row["kind"] != predict.OTHER)
    with pytest.raises(InvalidRequest, match="--stage 'ssr' is not one of unet, decoder"):
        networks.run(str(folder), stages=["ssr"])


def test_a_wrong_network_is_not_timed(tiny_model, monkeypatch, capsys):
    checkpoint = load_checkpoint(tiny_model)
    site = networks.make_site(checkpoint, "ssr")
    right = rivals.Rival("right", "eager", "fp32", lambda: site.expected.float(), 0.0)
    wrong = rivals.Rival("wrong", "eager", "fp32", lambda: site.expected.float() * 1.01, 0.0)
    monkeypatch.setattr(networks, "make_rivals", lambda *_, **__: [right, wrong, rivals.Missing("absent", "no such")])
    bounds = {"copy_bytes_per_s": 1e9} | {f"matmul_{p}_flops_per_s": 1e9 for p in ("fp32", "bf16")}
    rows, bad = networks._time(site, (), ("fp32",), False, 1, False, 2, bounds)
    assert bad == 0 and {"right"} == {row["provider"] for row in rows} - {"pylumiere fp32", "pylumiere bf16"}
    printed = capsys.readouterr().out
    assert "wrong: WRONG, not timed" in printed and "absent: left out, no such" in printed


@pytest.mark.parametrize("family", rivals.FAMILIES)
def test_rivals_compute_the_same(tiny_model, family):
    """Each form of each rival, one row a thread and all rows in one call."""
    for package in rivals.PACKAGES.get(family, ()):
        pytest.importorskip(package)
    checkpoint = load_checkpoint(tiny_model)
    site = networks.make_site(checkpoint, "ssr")
    torch.use_deterministic_algorithms(False)  # compilers fill nothing
    forms = rivals.make_rivals(site.network, site.weights, site.operands, (family,), threads=2, precisions=("fp32",))
    made = list(itertools.islice(forms, 1 if family == "compile" else None))  # half a minute each
    assert made and all(isinstance(rival, rivals.Rival) for rival in made), made
    for rival in made:
        assert networks.rel_rms(rival.run(), site.expected) < networks.ALLOWED["fp32"], rival.name


def test_slower_than_before_is_found_by_ratio(measured, tmp_path, capsys):
    rows = read(measured)
    earlier = against.read(measured)
    assert against.report(rows, earlier) == 0
    # Twice the time of everything: a slower machine, not a slower program.
    doubled = [{**row, "seconds": 2 * row["seconds"]} if "seconds" in row else row for row in rows]
    assert against.report(doubled, earlier) == 0
    ours = [{**row, "seconds": 2 * row["seconds"]} if row.get("provider") in against.OURS and "seconds" in row else row
            for row in rows]  # fmt: skip
    assert against.report(ours, earlier) == len(earlier)
    assert "SLOWER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "No such file"), ("{", "line 1 is no JSON"), ("[1]", "is no row"), ('{"a": 1}', "no row of ours")],
)
def test_files_to_compare_with_are_checked(tmp_path, content, told):
    path = tmp_path / "earlier.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidRequest, match=told):
        against.read(path)


def test_mistakes_are_named_in_one_line(tmp_path):
    for arguments, told in (
        (("model", "--vs", "magic"), "is not one of eager, compile, onnxruntime, openvino"),
        (("model", "--stage", "third"), "is not one of base, ssr"),
        (("model", "--model", tmp_path / "absent"), "absent"),
        (("model", "--against", tmp_path / "absent"), "No such file"),
        (("e2e", "--vs", "magic"), "is not one of"),
        (("plan", "--rates", tmp_path / "absent"), "No such file"),
        (("ops", "--smoke", "--against", tmp_path / "absent"), "--against compares times"),
    ):
        done = bench(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert told in done.stderr


def test_hash_of_sources_follows_their_content(monkeypatch, tmp_path):
    from pylumiere.bench import facts

    monkeypatch.setattr(facts, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("1")
    first = source_hash(["a.py"])
    assert source_hash(["a.py"]) == first and source_hash(["b.py"]) is None
    (tmp_path / "a.py").write_text("2")
    assert source_hash(["a.py"]) != first


# ---- predictions -----------------------------------------------------------------------------------------------------


def test_a_prediction_of_what_was_measured_is_the_measurement(measured):
    found = predict.measured_networks(_as_preset(measured), "tiny")
    for network in found.values():
        seconds = sum(network.seconds.values()) / network.lanes
        assert network.predict(network.plan, network.rows) == pytest.approx(seconds)


def test_twice_the_rows_take_twice_as_long(measured):
    network = predict.measured_networks(_as_preset(measured), "tiny")["base"]
    config = stage_preset("tiny-base").network
    twice = plan_network(config, 2 * network.rows, config.num_frames, config.height, config.width, text_tokens=8)
    once = network.predict(network.plan, network.rows)
    # Weights and texts are read once whatever the rows: a little of a tiny network's bytes.
    assert 1.6 * once < network.predict(twice, 2 * network.rows) <= 2.01 * once


def test_what_the_smallest_size_takes_is_not_scaled(measured):
    network = predict.measured_networks(_as_preset(measured), "tiny")["base"]
    fixed = dataclasses.replace(network, least=network.seconds)
    config = stage_preset("tiny-base").network
    larger = plan_network(config, network.rows, 4 * config.num_frames, config.height, config.width, text_tokens=8)
    assert fixed.predict(larger, network.rows) == pytest.approx(fixed.predict(network.plan, network.rows))
    assert network.predict(larger, network.rows) > network.predict(network.plan, network.rows)


def test_clips_are_predicted_and_rows_without_use_refused(measured):
    rows = _as_preset(measured)
    seconds = predict.predict_clip(predict.measured_networks(rows, "tiny"), plan_clip("tiny"))
    assert set(seconds) == {"base", "ssr"} and all(value > 0 for value in seconds.values())
    with pytest.raises(InvalidRequest, match="no row"):
        predict.measured_networks(rows, "demo")
    broken = [{**row, "shape": "none"} if "kind" in row else row for row in rows]
    with pytest.raises(InvalidRequest, match="not as it should be"):
        predict.measured_networks(broken, "tiny")


def _as_preset(path):
    """The fixture's model is the preset `tiny` under its own name."""
    return [{**row, "model": "tiny"} for row in read(path)]


# ---- end to end ------------------------------------------------------------------------------------------------------


def test_a_whole_clip_is_that_of_the_rivals(tmp_path):
    pytest.importorskip("diffusers")
    done = bench("e2e", "--vs", "eager", "--rounds", 1, "--steps", 2, "--json", tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["provider"]: row for row in read(tmp_path / "rows.jsonl")}
    assert set(rows) == {"pylumiere", "rival eager-fp32", "rival eager-bf16"}
    # The same function: the rival's fp32 loop gives our fp32 clip but for rounding; bf16 is further off.
    assert rows["rival eager-fp32"]["psnr"] > 90 and rows["pylumiere"]["psnr"] > 40
    assert all(row["seconds"] > row["parts"]["base"] > 0 and row["source"] for row in rows.values())


def test_rivals_make_clips_only_of_models_like_the_demo(tiny_model, tmp_path):
    with pytest.raises(InvalidRequest, match="model 'tiny': rivals make clips of models that are arranged"):
        rival_clip.prepare(str(tiny_model), tmp_path, ["eager-fp32"])


def test_plots_are_made_of_rows_and_refused_without(measured, tmp_path):
    pytest.importorskip("matplotlib")
    root = Path(__file__).resolve().parent.parent
    plots = [sys.executable, "benchmarks/plots.py"]
    done = subprocess.run([*plots, measured, "-o", tmp_path, "--name", "x"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"networks-x.png", "kinds-x.png", "scaling-x.png"}
    (tmp_path / "empty.jsonl").write_text("{}")
    refused = subprocess.run([*plots, tmp_path / "empty.jsonl"], cwd=root, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


def test_rows_of_other_benchmarks_carry_a_hash_of_everything(tmp_path):
    from pylumiere.bench.facts import append_row

    append_row(tmp_path / "rows.jsonl", {"a": 1})
    append_row(tmp_path / "rows.jsonl", {"a": 2, "source": "own"})
    whole, own = read(tmp_path / "rows.jsonl")
    assert len(whole["source"]) == 12 and own["source"] == "own" and whole["cpu"]
