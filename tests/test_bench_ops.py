"""`pylumiere bench ops`: what it checks, prints, writes and refuses. A process each, since Triton is imported once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pylumiere.bench.ops import OPS

COMMAND = Path(sys.executable).with_name("pylumiere")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def bench(*arguments):
    return subprocess.run([COMMAND, "bench", "ops", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_operators_are_those_of_the_kernels():
    from pylumiere import kernels

    assert set(OPS) == set(kernels.OPS)


def test_smoke_checks_every_operator_by_its_kernels(tmp_path):
    done = bench("--smoke", "--json", tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["op"] for row in rows} == {*OPS, "layers"}
    assert all(row["correct"] and row["smoke"] and "seconds" not in row for row in rows)


@without_gpu
def test_on_a_cpu_the_references_are_timed_against_eager(tmp_path):
    done = bench("--op", "temporal_conv", "--json", tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["provider"] for row in rows} == {"reference", "eager"}
    assert all(row["seconds"] > 0 and row["correct"] and row["cpu"] and row["commit"] for row in rows)
    assert "% of the bound" in done.stdout


@without_gpu
def test_the_search_for_tiles_needs_a_gpu_but_can_be_tried_without():
    refused = bench("--tune")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "there is none" in refused.stderr
    tried = bench("--tune", "--smoke", "--op", "temporal_shift")
    assert tried.returncode == 0, tried.stderr
    assert tried.stdout.count("Row(Config({'BLOCK_S'") == 2


@pytest.mark.parametrize("arguments", [("--op", "conv"), ("--vs", "eager,fastest")])
def test_unknown_names_are_refused_in_one_line(arguments):
    done = bench(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is not one of" in done.stderr


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_wrong_result_is_not_timed(is_wrong, capsys):
    from pylumiere.kernels.cost import Cost

    from pylumiere.bench import harness

    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    run = (lambda: x * 1.01) if is_wrong else (lambda: x * 1)
    case = harness.Case("case", run, {"eager": lambda: x + 0}, lambda: x[:, :2].double(), Cost(32, 256))
    bounds = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e9}
    rows = []
    assert harness.report("op", case, harness.Site("cpu", "small"), bounds, {"eager"}, rows.append) is not is_wrong
    assert [row.get("provider") for row in rows] == ([None] if is_wrong else ["reference", "eager"])
    assert ("WRONG" in capsys.readouterr().out) is is_wrong
