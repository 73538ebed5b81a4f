"""Many prompts to clips with Ray Data: one engine an actor, as many actors as there is room for. Needs pylumiere[ray].

Run: python examples/batch_ray_data.py prompts.txt clips/ --actors 2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ray

import pylumiere


class MakeClips:
    """Ray Data makes one object in each actor and calls it with batches of rows."""

    def __init__(self, model: str, folder: str, fields: dict[str, Any]):
        self.engine = pylumiere.Engine.load(model)
        self.folder, self.fields = Path(folder), fields

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        # All rows at once: the engine's calls are shared by the clips.
        rows = zip(batch["id"].tolist(), batch["prompt"].tolist(), strict=True)
        jobs = [(id, self.engine.submit(prompt, seed=id, **self.fields)) for id, prompt in rows]
        files, errors = [], []
        for id, job in jobs:
            path = self.folder / f"{id:06d}.mp4"
            try:
                job.result().save(path)
                files.append(str(path))
                errors.append("")
            except (ValueError, RuntimeError) as error:
                files.append("")
                errors.append(str(error))
        return {**batch, "file": files, "error": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="a text file, one prompt a line; the line's number is the seed")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    prompts = [line.strip() for line in options.prompts.read_text().splitlines() if line.strip()]
    options.folder.mkdir(parents=True, exist_ok=True)
    fields = {"num_frames": options.frames, "num_inference_steps": options.steps}
    rows = ray.data.from_items([{"id": id, "prompt": prompt} for id, prompt in enumerate(prompts)])
    made = rows.map_batches(
        MakeClips, batch_size=4, compute=ray.data.ActorPoolStrategy(size=options.actors),
        fn_constructor_args=[options.model, str(options.folder.absolute()), fields],
    )  # fmt: skip
    made.select_columns(["id", "prompt", "file", "error"]).write_csv(str(options.folder.absolute() / "rows"))


if __name__ == "__main__":
    main()
