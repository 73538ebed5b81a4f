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


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_refuses_to_measure(tmp_path):
    done = gate("--out", tmp_path)
    assert done.returncode == 2
    assert "no GPU here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_step_that_does_not_exist_is_an_error(tmp_path):
    assert gate("--smoke", "--out", tmp_path, "--only", "nothing").returncode == 2
