"""The GPU gate without a GPU: its smoke run works, and without --smoke it says what is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def gate(*arguments):
    command = [sys.executable, "benchmarks/gpu_gate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_smoke_run_checks_results_and_times_nothing(tmp_path):
    done = gate("--smoke", "--out", tmp_path, "--only", "norm_affine", "--only", "temporal_conv")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    steps = {step["step"]: step["status"] for step in summary["steps"]}
    assert steps == {"bench norm_affine": "passed", "bench temporal_conv": "passed"}
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["correct"] and "seconds" not in row for row in rows)


def test_smoke_run_of_networks_and_clips(tmp_path):
    done = gate("--smoke", "--out", tmp_path, "--only", "clip", "--only", "forward ssr-l")
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "log.txt").read_text()
    assert "a clip [8, 32, 32, 3]; not timed" in log
    assert "tiny-ssr: equals eager" in log


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_refuses_to_measure(tmp_path):
    done = gate("--out", tmp_path)
    assert done.returncode == 2
    assert "no GPU here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_the_time_is_listed(tmp_path):
    done = gate("--smoke", "--out", tmp_path, "--only", "norm_affine", "--seconds", 0)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == ["0 of 1 steps passed", "bench norm_affine: not started"]


def test_the_table_names_the_best_rival(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_gate

    row = {"op": "conv", "case": "8x8", "bound": 1e-3}
    times = {"pylumiere": 2e-3, "eager": 6e-3, "compile": 3e-3}
    rows = [json.dumps({**row, "provider": name, "seconds": seconds}) for name, seconds in times.items()]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, json.dumps({"op": "conv", "case": "wrong"})]))
    (line,) = gpu_gate.table(tmp_path / "rows.jsonl")
    assert " ".join(line.split()) == "conv 8x8 2.000 ms 50.0 % of the bound, compile takes 1.50 x"


def test_tests_that_want_a_gpu_are_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_gate

    marked = next(step for step in gpu_gate.steps(tmp_path, smoke=False) if step.name == "tests marked gpu")
    assert {"tests/kernels/test_denoise_step.py", "tests/backends/test_triton.py"} <= set(marked.command)


def test_a_step_that_does_not_exist_is_an_error(tmp_path):
    assert gate("--smoke", "--out", tmp_path, "--only", "nothing").returncode == 2
