"""One request after the other, and N at once: seconds a clip. Run: python benchmarks/bench_engine.py [--json FILE]"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from _record import append_row

from pylumiere.engine import Engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="append rows here")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--smoke", action="store_true", help="the short clips only")
    options = parser.parse_args()
    with Engine.load("demo") as engine:
        for frames in (16,) if options.smoke else (16, 80):
            fields = dict(num_frames=frames, num_inference_steps=options.steps)
            engine.generate("warm up", **fields)
            for at_once in (1, options.requests):
                begun = time.perf_counter()
                if at_once == 1:
                    for seed in range(options.requests):
                        engine.generate("a red circle", seed=seed, **fields)
                else:
                    for job in [engine.submit("a red circle", seed=seed, **fields) for seed in range(at_once)]:
                        job.result()
                seconds = (time.perf_counter() - begun) / options.requests
                row = {"bench": "engine", "frames": frames, "at_once": at_once, "seconds_per_clip": seconds}
                print(f"{frames} frames, {at_once} at once: {seconds:.3f} s a clip", flush=True)
                if options.json:
                    append_row(options.json, {**row, "steps": options.steps})


if __name__ == "__main__":
    main()
