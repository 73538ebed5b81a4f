"""Mutated bundles against the loader. Run: python benchmarks/fuzz_bundle.py --count 10000 --json out.jsonl

Each case is a copy of a small bundle with one to three mutations (tests/support/fuzzing.py). It passes when loading it
raises BundleError or IntegrityError, no native library was called, and Python allocated less than the bound.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import random
import shutil
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

from _record import append_row

from pylumiere.errors import BundleError, IntegrityError
from pylumiere.loading import load_model, make_backend
from pylumiere.scheduling.memory import peak_resident_bytes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # the mutations are a test helper
from support.fuzzing import MUTATIONS, mutate, native_loaders_refused, write_sample

BOUND_BYTES = 64 * 2**20  # of Python's allocations in one load; the manifest alone may be 2 MiB


def load(bundle: Path, key: Path | None) -> None:
    """All of what an engine does with a bundle before its first network call."""
    model, choice = load_model(bundle, "onnxruntime", "cpu", "fp32", key)
    make_backend(model, choice)
    model.text_encoder()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="for the copies; a memory file system is much faster than a disk")
    parser.add_argument("--json", type=Path, help="append a row here")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    tally: collections.Counter[str] = collections.Counter()
    refused: collections.Counter[str] = collections.Counter()
    failures, peak, begun = [], 0, time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as name, native_loaders_refused() as called:
        sample, key = write_sample(Path(name), options.seed)
        with contextlib.suppress(AssertionError, BundleError):
            load(sample, key)
        if not called:
            print("the sample itself reached no native library: this fuzzer would see nothing", file=sys.stderr)
            return 1
        called.clear()
        tracemalloc.start()
        for case in range(options.count):
            work = Path(name) / f"case{case}"
            bundle = work / "sample.plm"
            shutil.copytree(sample, bundle)
            kinds = rng.choices(list(MUTATIONS), k=rng.choices([1, 2, 3], [8, 1, 1])[0])
            applied, needs_key = [], True
            for kind in kinds:
                try:
                    needs_key &= mutate(bundle, kind, rng)
                    applied.append(kind)
                except Exception:  # it has nothing left to change after the ones before
                    if not applied:
                        raise
            given = key if needs_key or rng.random() < 0.3 else None
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                load(bundle, given)
                outcome = "accepted"
            except (BundleError, IntegrityError) as error:
                outcome = type(error).__name__
                if "\n" in str(error) or not str(error):
                    outcome = f"not one line: {error!r}"
            except BaseException as error:
                outcome = f"{type(error).__name__}: {error}"
            grown = tracemalloc.get_traced_memory()[1] - before
            peak = max(peak, grown)
            tally.update(applied)
            refused[outcome] += 1
            if outcome not in ("BundleError", "IntegrityError") or called or grown > BOUND_BYTES:
                failures.append((case, applied, outcome, list(called), grown))
                print(f"case {case} {applied}: {outcome}; called {called}; {grown} bytes", file=sys.stderr)
                called.clear()
            shutil.rmtree(work)
        tracemalloc.stop()
    row = {
        "bench": "fuzz_bundle", "count": options.count, "seed": options.seed, "refused": dict(refused),
        "failures": len(failures), "native_calls_before_verified": sum(len(f[3]) for f in failures),
        "peak_python_bytes": peak, "bound_bytes": BOUND_BYTES,
        "peak_resident_bytes": peak_resident_bytes(),
        "seconds": round(time.monotonic() - begun, 1), "mutations": dict(sorted(tally.items())),
    }  # fmt: skip
    print(row)
    if options.json:
        append_row(options.json, row)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
