"""The comparison of two commits, without building any: its table, its fingerprints, its cases on this checkout."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_a_case_that_differs_or_is_missing_is_no_agreement(benchmarks):
    from compare_commits import table

    assert table({"a": "11", "b": "22"}, {"a": "11", "b": "22"})[1]
    lines, agree = table({"a": "11", "b": "22"}, {"a": "11", "b": "23"})
    assert not agree
    assert [line.split() for line in lines] == [["a", "same", "11"], ["b", "DIFFERENT", "22", "|", "23"]]
    lines, agree = table({"a": "11"}, {"c": "33"})
    assert not agree
    assert [line.split()[1:] for line in lines] == [
        ["DIFFERENT", "11", "|", "missing"],
        ["DIFFERENT", "missing", "|", "33"],
    ]


def test_a_fingerprint_is_of_values_shape_and_type(benchmarks):
    from _commit_cases import fingerprint

    frames = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    others = [frames + 1, frames.reshape(4, 2, 3), frames.astype(np.int8), frames[:1], frames.tobytes()]
    assert len({fingerprint(array) for array in [frames, *others]}) == 6
    assert fingerprint(np.asfortranarray(frames)) == fingerprint(frames)
    assert fingerprint("a text is kept") == "a text is kept"


def test_the_cases_run_on_what_is_installed_and_say_where_it_lies(tmp_path):
    command = [sys.executable, "-P", BENCHMARKS / "_commit_cases.py", "100 rows", "gif, streamed"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report["results"]) == ["100 rows", "command: gif, streamed"]
    assert report["results"]["100 rows"].startswith("height=100")
    assert len(report["results"]["command: gif, streamed"]) == 64
    assert any(Path(file).stem.startswith("_runtime") for file in report["modules"])


def test_an_unknown_commit_is_named(tmp_path):
    command = [sys.executable, BENCHMARKS / "compare_commits.py", "no-such-commit", "HEAD"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no-such-commit" in done.stderr
