"""`pylumiere bench e2e`: a clip, from a cold command to the finished file, beside rivals that make the same clip.

Every provider is a program of its own, started anew for each round, in turn. Ours is `pylumiere generate`; the rivals'
is `rival_clip.py`, whose graphs and compiled blobs were prepared beforehand and are not timed. Before the clock starts
each clip is compared with ours in fp32: the same weights, noise, steps and windows must give the same pixels.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pylumiere.bench import against as comparison
from pylumiere.bench import check_names
from pylumiere.bench.facts import append_row, package_version, source_hash
from pylumiere.bench.rival_clip import DENOISERS, prepare
from pylumiere.errors import InvalidRequest

PROMPT = "a red circle moves right over grass"
LEAST_PSNR = 35.0  # dB against ours in fp32; bf16 gives 50 to 65, another seed 16
SOURCES = ("pylumiere", "kernels", "runtime")


def run(
    model: str = "demo",
    *,
    vs: Iterable[str] | None = None,
    rounds: int = 3,
    seed: int = 7,
    steps: int | None = None,
    path: Path | None = None,
    against: Path | None = None,
) -> int:
    """Checks and times whole clips; 0 if all were right, else 1.

    Args:
        model: a shipped name or a model folder.
        vs: families of denoisers: eager, compile, onnxruntime, openvino. None means all but compile, whose cold start
            takes most of a minute.
        steps: of the first stage; the model's own if None.
        rounds: of each provider; the first is dropped where there are more than two.
        path: append rows here.
        against: rows of an earlier run; 1 is returned too where we have become slower beside eager PyTorch.

    Raises:
        InvalidRequest: an unknown rival, or a model that the rivals cannot make clips of.
    """
    known = sorted({name.split("-")[0] for name in DENOISERS})
    families = [name for name in known if name != "compile"] if vs is None else list(vs)
    check_names("--vs", families, known)
    if rounds < 1:
        raise InvalidRequest(f"--rounds {rounds} should be at least 1")
    earlier = comparison.read(against) if against else None
    wanted = [name for name in DENOISERS if name.split("-")[0] in families]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        missing = _missing_packages(wanted)
        missing |= prepare(model, folder, [name for name in wanted if name not in missing])
        for name, reason in missing.items():
            print(f"rival {name}: left out, {reason}", flush=True)
        commands = {"pylumiere": _ours(model, seed, folder)}
        commands |= {f"rival {n}": _rival(n, seed, folder) for n in wanted if n not in missing}
        if steps is not None:
            commands = {name: [*command, "--steps", str(steps)] for name, command in commands.items()}
        wrong, facts = _check(model, commands, seed, steps, folder)
        seconds: dict[str, list[dict]] = {name: [] for name in facts}
        for number in range(rounds):
            for name in facts:
                seconds[name].append(_timed(commands[name]))
                print(f"round {number + 1}: {name} {seconds[name][-1]['seconds']:.2f} s", flush=True)
    case = f"{model}, cold command to mp4" + ("" if steps is None else f", {steps} steps")
    rows = _rows(case, facts, seconds, rounds)
    if path is not None:
        for row in rows:
            append_row(path, row)
    slower = comparison.report(rows, earlier) if earlier is not None else 0
    return 1 if wrong or slower else 0


def _missing_packages(names: list[str]) -> dict[str, str]:
    needed = {"diffusers": names, "transformers": names}
    needed |= {package: [n for n in names if n.startswith(package)] for package in ("onnxruntime", "openvino")}
    return {
        name: f"the package {package} is not installed; see pylumiere[bench]"
        for package, rivals in needed.items()
        if package_version(package) is None
        for name in rivals
    }


def _ours(model: str, seed: int, folder: Path) -> list[str]:
    output = str(folder / "pylumiere.mp4")
    return [sys.executable, "-P", "-m", "pylumiere.cli", "generate", PROMPT, "--model", model, "--seed", str(seed),
            "-o", output, "--json"]  # fmt: skip


def _rival(name: str, seed: int, folder: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "pylumiere.bench.rival_clip", str(folder), "--denoiser", name,
            "--prompt", PROMPT, "--seed", str(seed), "-o", str(folder / f"{name}.mp4")]  # fmt: skip


def _check(
    model: str, commands: dict[str, list[str]], seed: int, steps: int | None, folder: Path
) -> tuple[int, dict[str, dict]]:
    """PSNR of each provider's clip; those that are wrong or do not run are named and left out."""
    import pylumiere

    def clip(precision: str) -> np.ndarray:
        with pylumiere.Engine.load(model, backend="torch", device="cpu", precision=precision) as engine:
            video = engine.generate(PROMPT, seed=seed, num_inference_steps=steps, output_type="float")
        return video.frames * 2 - 1

    expected, wrong, facts = clip("fp32"), 0, {}
    for name, command in commands.items():
        if name == "pylumiere":
            frames = clip("auto")
        else:
            saved = folder / "frames.npy"
            saved.unlink(missing_ok=True)
            done = subprocess.run([*command, "--frames", str(saved)], capture_output=True, text=True, check=False)
            if done.returncode or not saved.exists():
                lines = done.stderr.strip().splitlines() or ["no message"]
                print(f"{name}: left out, {lines[-1][:160]}", flush=True)
                continue
            frames = np.clip(np.load(saved), -1, 1)
        error = float(np.square(frames - expected, dtype=np.float64).mean())
        psnr = math.inf if error == 0 else 10 * math.log10(4 / error)
        print(f"{name}: {psnr:.1f} dB from ours in fp32", flush=True)
        if psnr >= LEAST_PSNR:
            facts[name] = {"psnr": round(psnr, 2) if math.isfinite(psnr) else None}
        else:
            wrong += name == "pylumiere"
            print(f"{name}: WRONG, not timed", flush=True)
    return wrong, facts


def _timed(command: list[str]) -> dict:
    """One cold run: wall seconds, processor seconds, and what the program says of itself."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[3]} failed with status {process.returncode} after it had succeeded once")
    return {
        "seconds": took, "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "parts": json.loads(output.strip().splitlines()[-1]).get("seconds", {}),
    }  # fmt: skip


def _rows(case: str, facts: dict[str, dict], seconds: dict[str, list[dict]], rounds: int) -> list[dict]:
    source = source_hash(SOURCES)
    rows = []
    for name in facts:
        counted = seconds[name][1:] if rounds > 2 else seconds[name]
        values = [run["seconds"] for run in counted]
        middle = min(counted, key=lambda run: abs(run["seconds"] - statistics.median(values)))
        parts = {part: round(value, 3) for part, value in middle["parts"].items()}
        rows.append(
            {
                "bench": "e2e", "case": case, "device": "cpu", "provider": name,
                **facts[name], "seconds": statistics.median(values), "spread": max(values) - min(values),
                "best": min(values), "rounds": len(values), "cpu_seconds": round(middle["cpu_seconds"], 2),
                "parts": parts, "source": source,
                "versions": {p: package_version(p) for p in ("diffusers", "transformers", "onnxruntime", "openvino")},
            }
        )  # fmt: skip
    ours = next((row["seconds"] for row in rows if row["provider"] == "pylumiere"), math.nan)
    for row in sorted(rows, key=lambda row: row["seconds"]):
        print(
            f"{row['provider']:24} {row['seconds']:6.2f} s +- {row['spread']:.2f} | "
            f"{row['seconds'] / ours:5.2f} x ours | {row['parts']}",
            flush=True,
        )
    return rows
