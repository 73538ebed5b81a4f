"""Plots of measured rows: python benchmarks/plots.py benchmarks/results/cpu.jsonl -o docs/images

Makes what the rows allow: `networks-DEVICE.png` (times of all providers, by network), `kinds-DEVICE.png` (where the
time of a call goes, and each kind of operation against the machine's two rates), `scaling-DEVICE.png` (threads), and
`clip-DEVICE.png` (whole clips, cold, by their parts). Rows of operators on a GPU give `roofline-DEVICE.png`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from pylumiere.bench.facts import read_rows
from pylumiere.errors import InvalidRequest

OURS, OTHERS = "#c2410c", "#64748b"
STAGES = ("#c2410c", "#f59e0b", "#0f766e", "#7c3aed", "#be185d", "#4d7c0f", "#0369a1", "#a16207", "#57534e")
NO_STAGES = ("imports", "load", "text", "total", "all", "file")  # parts of a clip's seconds that are no stage's


def last_run(rows: list[dict], *keys: str) -> list[dict]:
    """The last row of each combination of these fields."""
    found = {}
    for row in rows:
        found[tuple(row.get(key) for key in keys)] = row
    return list(found.values())


def is_ours(row: dict) -> bool:
    return str(row["provider"]).startswith("pylumiere")


def networks(rows: list[dict], path: Path) -> bool:
    """Bars: milliseconds of a call, by provider, one panel a network."""
    timed = [row for row in rows if row.get("bench") == "model" and "family" in row and "seconds" in row]
    timed = last_run(timed, "case", "provider")
    cases = list(dict.fromkeys(row["case"] for row in timed))
    if not cases:
        return False
    figure, axes = pyplot.subplots(1, len(cases), figsize=(7 * len(cases), 6), layout="constrained", squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        own = sorted((row for row in timed if row["case"] == case), key=lambda row: -row["seconds"])
        names, values = [row["provider"] for row in own], [1e3 * row["seconds"] for row in own]
        bars = axis.barh(names, values, color=[OURS if is_ours(row) else OTHERS for row in own])
        axis.bar_label(bars, [f"{value:.0f}" for value in values], padding=3)
        axis.set(title=case, xlabel="ms a call")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return True


def kinds(rows: list[dict], path: Path) -> bool:
    """Left: shares of a call's time. Right: each kind's rate as a share of the best product and copy measured there."""
    found = last_run([row for row in rows if row.get("bench") == "model" and "kind" in row], "case", "kind")
    cases = list(dict.fromkeys(row["case"] for row in found))
    if not cases:
        return False
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.6), layout="constrained", width_ratios=(1, 1.4))
    names = list(dict.fromkeys(row["kind"] for row in found))
    colors = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))
    for place, case in enumerate(cases):
        start = 0.0
        for row in sorted((row for row in found if row["case"] == case), key=lambda row: -row["share"]):
            left.barh(place, 100 * row["share"], left=start, color=colors[row["kind"]])
            start += 100 * row["share"]
    left.set(yticks=range(len(cases)), yticklabels=[case.split()[0] for case in cases], xlabel="% of a call's time")
    left.legend([pyplot.Rectangle((0, 0), 1, 1, color=colors[name]) for name in names], names, frameon=False,
                loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)  # fmt: skip
    markers = dict(zip(cases, "os^v", strict=False))
    for row in found:
        if "of_matmul" in row:
            right.scatter(100 * row["of_copy"], 100 * row["of_matmul"], color=colors[row["kind"]],
                          marker=markers[row["case"]], s=60)  # fmt: skip
    for case in cases:
        right.scatter([], [], color="black", marker=markers[case], label=case.split()[0])
    right.axhline(100, color="black", linewidth=0.8, linestyle=":")
    right.axvline(100, color="black", linewidth=0.8, linestyle=":")
    right.set(xscale="log", yscale="log", xlabel="% of the copy rate", ylabel="% of the product's rate")
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)
    return True


def scaling(rows: list[dict], path: Path) -> bool:
    """Gain by threads."""
    found = last_run([row for row in rows if row.get("bench") == "model" and "scaling" in row], "case", "scaling")
    if not found:
        return False
    figure, axis = pyplot.subplots(figsize=(5, 4), layout="constrained")
    for case in dict.fromkeys(row["case"] for row in found):
        own = sorted((row for row in found if row["case"] == case), key=lambda row: row["scaling"])
        threads = [row["scaling"] for row in own]
        axis.plot(threads, [own[0]["seconds"] / row["seconds"] for row in own], marker="o", label=case)
    axis.plot(threads, threads, color="black", linewidth=0.8, linestyle=":", label="ideal")
    axis.set(xlabel="threads", ylabel="times one thread", xticks=threads)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    return True


def clips(rows: list[dict], path: Path) -> bool:
    """Stacked bars: where the seconds of a cold command go."""
    found = last_run([row for row in rows if row.get("bench") == "e2e"], "case", "provider")
    if not found:
        return False
    found = [row for row in found if row["case"] == found[-1]["case"]]
    found.sort(key=lambda row: -row["seconds"])
    figure, axis = pyplot.subplots(figsize=(9, 0.5 * len(found) + 1.8), layout="constrained")
    stages = [part for part in found[0]["parts"] if part not in NO_STAGES]
    rest = "start, imports, loading, text, file"
    colors = dict(zip(stages, STAGES, strict=False)) | {rest: "#94a3b8"}
    for place, row in enumerate(found):
        values = {stage: row["parts"].get(stage, 0.0) for stage in stages}
        values[rest] = row["seconds"] - sum(values.values())
        start = 0.0
        for part, value in values.items():
            axis.barh(place, value, left=start, color=colors[part], label=part if place == 0 else None)
            start += value
        axis.text(start, place, f" {row['seconds']:.1f} s", va="center")
    axis.set(yticks=range(len(found)), yticklabels=[row["provider"] for row in found], xlabel="seconds",
             title=found[0]["case"])  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=110)
    return True


def roofline(rows: list[dict], path: Path) -> bool:
    """Operators on a GPU: rate against arithmetic intensity, under the two measured ceilings."""
    found = [row for row in rows if row.get("bench") == "ops" and row.get("device") == "cuda" and "flops" in row]
    found = [row for row in found if row.get("provider") == "pylumiere"]
    found = last_run(found, "op", "case")
    if not found:
        return False
    copy, matmul = found[-1]["copy_bytes_per_s"], found[-1]["matmul_flops_per_s"]
    figure, axis = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in found]
    span = (min(intensities) / 2, max(*intensities, matmul / copy) * 2)
    points = sorted((span[0], matmul / copy, span[1]))
    axis.plot(points, [min(matmul, copy * x) / 1e12 for x in points], color="black")
    for op in dict.fromkeys(row["op"] for row in found):
        own = [row for row in found if row["op"] == op]
        axis.scatter([r["flops"] / r["bytes"] for r in own], [r["flops"] / r["seconds"] / 1e12 for r in own], label=op)
    axis.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    return True


PLOTS = {"networks": networks, "kinds": kinds, "scaling": scaling, "clip": clips, "roofline": roofline}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("-o", "--output", type=Path, default=Path("."), help="folder of the plots")
    parser.add_argument("--name", help="of the device in the files' names; taken from the first file if not given")
    options = parser.parse_args()
    try:
        rows = [row for path in options.rows for row in read_rows(path)]
    except InvalidRequest as error:
        print(error, file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    made = []
    for kind, plot in PLOTS.items():
        path = options.output / f"{kind}-{options.name or options.rows[0].stem}.png"
        if plot(rows, path):
            made.append(str(path))
    if not made:
        print(f"no row in {', '.join(map(str, options.rows))} can be plotted", file=sys.stderr)
        return 2
    print("\n".join(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
