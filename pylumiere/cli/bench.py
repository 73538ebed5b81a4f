"""`bench ops`, `model`, `e2e` and `plan`: measurements and predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pylumiere.cli.console import print_table
from pylumiere.cli.options import Model, Overlap, Window

Against = Annotated[Path | None, typer.Option(help="Rows of an earlier run; exit code 1 if we became slower.")]


def bench_ops(
    op: Annotated[list[str] | None, typer.Option(help="An operator; may be repeated. All if not given.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few values, checked but not timed.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Search tiles on this GPU; prints rows for a table.")] = False,
    rows: Annotated[Path | None, typer.Option("--json", help="Append a JSON line per measurement here.")] = None,
    vs: Annotated[str | None, typer.Option(help="Rivals: eager,compile,diffusers.")] = None,
    against: Against = None,
) -> int:
    """Times each operator against PyTorch, after checking its result."""
    from pylumiere.bench.ops import run

    return run(op or (), smoke=smoke, tune=tune, path=rows, vs=vs.split(",") if vs else None, against=against)


def bench_model(
    model: Model = "demo",
    stage: Annotated[list[str] | None, typer.Option(help="base or ssr; may be repeated. Both if not given.")] = None,
    vs: Annotated[str | None, typer.Option(help="Rivals: eager,compile,onnxruntime,openvino.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Of the rivals: fp32, bf16. Both if not given.")] = None,
    max_autotune: Annotated[bool, typer.Option("--max-autotune", help="torch.compile also in this mode.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Check the results, time nothing.")] = False,
    repeats: Annotated[int | None, typer.Option(min=2, help="Of each provider.")] = None,
    rows: Annotated[Path | None, typer.Option("--json", help="Append a JSON line per measurement here.")] = None,
    against: Against = None,
) -> int:
    """Times a model's networks on the CPU beside other software, after checking their results."""
    from pylumiere.bench.networks import run

    return run(
        model, stages=stage or (), vs=vs.split(",") if vs else None, precisions=precision or (), smoke=smoke,
        max_autotune=max_autotune, repeats=repeats, path=rows, against=against,
    )  # fmt: skip


def bench_e2e(
    model: Model = "demo",
    vs: Annotated[str | None, typer.Option(help="Rivals: eager,compile,onnxruntime,openvino.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each provider; the first is dropped of three or more.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the clip.")] = 7,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of the base network.")] = None,
    rows: Annotated[Path | None, typer.Option("--json", help="Append a JSON line per provider here.")] = None,
    against: Against = None,
) -> int:
    """Times a clip from a cold command to the finished mp4, beside other software that makes the same clip."""
    from pylumiere.bench.e2e import run

    families = vs.split(",") if vs else None
    return run(model, vs=families, rounds=rounds, seed=seed, steps=steps, path=rows, against=against)


def bench_plan(
    model: Annotated[str, typer.Option(help="A preset: demo, stunet-b or stunet-l.")] = "stunet-l",
    sku: Annotated[list[str] | None, typer.Option(help="A GPU; may be repeated. All with known rates if none.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the clip.")] = None,
    size: Annotated[int | None, typer.Option(help="Height and width of the result.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the base network.")] = None,
    ssr_steps: Annotated[int | None, typer.Option(help="Denoising steps of the super-resolution network.")] = None,
    window: Window = None,
    overlap: Overlap = None,
    doubling: Annotated[bool, typer.Option("--doubling", help="Also: cost of twice T, H and W.")] = False,
    rates: Annotated[Path | None, typer.Option(help="Rows of bench model and e2e: predicts for their machine.")] = None,
    rows: Annotated[Path | None, typer.Option("--json", help="Append a JSON line per GPU here.")] = None,
) -> None:
    """Counts a clip's arithmetic and memory, and the time that a GPU's peak rates allow. Runs nothing on a GPU."""
    from pylumiere.bench import plan, predict
    from pylumiere.bench.facts import append_row, read_rows

    chips = plan.find_chips(sku or [])
    options = dict(frames=frames, size=size, steps=steps, ssr_steps=ssr_steps, window=window, overlap=overlap)
    clip = plan.plan_clip(model, **options)
    predicted = None
    if rates is not None:
        known = read_rows(rates)
        seconds = predict.predict_clip(predict.measured_networks(known, model), clip)
        own_size = all(value is None for value in options.values())
        measured = predict.measured_clip(known, model) if own_size else None
        predicted = {"machine": predict.machine_of(known), "predicted": seconds, "measured": measured}
    for table in plan.to_tables(model, clip, chips, plan.doubling(model) if doubling else None, predicted):
        print_table(table)
    if rows is not None:
        if predicted is not None:
            append_row(rows, {"benchmark": "plan", "model": model, **options, **predicted})
        for row in plan.to_rows(clip, chips):
            append_row(rows, {"benchmark": "plan", "model": model, **options, **row})
