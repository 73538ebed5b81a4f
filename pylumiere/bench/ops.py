"""`pylumiere bench ops`: measure operators here, or search for tiles."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from pylumiere.bench import against as comparison
from pylumiere.bench import check_names
from pylumiere.bench.facts import append_row, source_hash
from pylumiere.errors import InvalidRequest, UnsupportedDevice

OPS = (
    "spatial_conv",
    "temporal_conv",
    "factorized_conv",
    "norm_affine",
    "groupnorm_silu",
    "layer_norm",
    "geglu",
    "temporal_attention",
    "temporal_shift",
    "denoise_step",
)
LAYERS = "layers"  # made of operators, beside those of other libraries
RIVALS = ("eager", "compile", "diffusers")


def run(
    ops: Iterable[str] = (),
    *,
    smoke: bool = False,
    tune: bool = False,
    path: Path | None = None,
    vs: Iterable[str] | None = None,
    against: Path | None = None,
) -> int:
    """Check and time operators; 0 if all results were right, else 1.

    Args:
        ops: names; none means all.
        smoke: a few values, checked but not timed; without a GPU by the kernels in Triton's interpreter.
        tune: time candidate tiles and print the best as rows for kernels/tuning.py.
        path: append a JSON line per measurement here.
        vs: rivals, of RIVALS; None means all on a GPU, and all but "compile" on a CPU.
        against: rows of an earlier run; 1 is returned too where we have become slower beside eager PyTorch.

    Raises:
        InvalidRequest: an unknown operator or rival.
        UnsupportedDevice: tiles cannot be searched for without a GPU, or Triton is missing.
    """
    check_names("--op", ops, (*OPS, LAYERS))
    check_names("--vs", vs or (), RIVALS)
    if tune and LAYERS in ops:
        raise InvalidRequest(f"--tune --op {LAYERS}: tiles are the operators'; name one of {', '.join(OPS)}")
    if against is not None and (smoke or tune):
        raise InvalidRequest("--against compares times; --smoke and --tune give none")
    earlier = comparison.read(against) if against is not None else None
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedDevice("bench ops needs the package triton; install pylumiere[export]")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if tune and device == "cpu" and not smoke:
        raise UnsupportedDevice("--tune times tiles on a GPU, and there is none; --smoke tries the search without one")
    if smoke and device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is now
    from pylumiere.bench import harness

    site = harness.Site(device, "smoke" if smoke else "full" if device == "cuda" else "small")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rivals = set(vs) if vs is not None else {*RIVALS} - (set() if device == "cuda" else {"compile"})
    bounds = {} if smoke or tune else harness.measure_device(device)
    if bounds:
        copy, matmul = bounds["copy_bytes_per_s"], bounds["matmul_flops_per_s"]
        print(f"bounds measured here: copy {copy / 1e9:.4g} GB/s, matmul {matmul / 1e12:.3g} TFLOP/s", flush=True)
    wrong, rows = 0, []

    def emit(row: dict) -> None:
        rows.append(row | {"source": source_hash(_sources(row["op"]))})
        if path is not None:
            append_row(path, rows[-1])

    with torch.inference_mode():
        for op in ops or (OPS if tune else (*OPS, LAYERS)):
            module = importlib.import_module(f"pylumiere.bench.cases.{op}")
            torch.manual_seed(0)
            for case in module.cases(site):
                if device == "cuda":
                    torch.cuda.empty_cache()  # of the case before
                if tune:
                    harness.tune(module.TABLE, case, site, path)
                else:
                    wrong += not harness.report(op, case, site, bounds, rivals, emit)
    slower = comparison.report(rows, earlier) if earlier is not None else 0
    return 1 if wrong or slower else 0


def _sources(op: str) -> tuple[str, ...]:
    shared = ("kernels/implicit_gemm.py", "kernels/launching.py", "kernels/tuning.py", f"pylumiere/bench/cases/{op}.py")
    return ("kernels", "pylumiere/networks", shared[-1]) if op == LAYERS else (f"kernels/{op}.py", *shared)


def main(op: str) -> int:
    """The command line of one operator's script in benchmarks/."""
    import argparse
    import sys

    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="a few values, checked but not timed; works without a GPU")
    parser.add_argument("--tune", action="store_true", help="measure candidate tiles and print rows for tuning.py")
    parser.add_argument("--vs", help="rivals: eager, compile, diffusers, with commas between")
    parser.add_argument("--json", type=Path, help="append rows here")
    parser.add_argument("--against", type=Path, help="rows of an earlier run; status 1 if we became slower")
    options = parser.parse_args()
    vs = options.vs.split(",") if options.vs else None
    try:
        return run([op], smoke=options.smoke, tune=options.tune, path=options.json, vs=vs, against=options.against)
    except (InvalidRequest, UnsupportedDevice) as error:
        print(error, file=sys.stderr)
        return 2
