"""Kills a server again and again while clients send jobs, half of them with pictures; then counts what became of every
job that was accepted.

As a command, with the demo model: python -P tests/serve/chaos.py --kills 20 --json row.jsonl
"""

from __future__ import annotations

import base64
import hashlib
import io
import random
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image


def _picture() -> dict:
    """A cinemagraph's picture and mask."""
    urls = []
    for shape in ((32, 32, 3), (32, 32)):
        pixels = np.zeros(shape, np.uint8)
        pixels[8:24, 8:24] = 255
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return {"input_reference": {"image_url": urls[0]}, "mask": urls[1]}


PICTURE = _picture()


def run_chaos(server, *, kills: int, clients: int, seconds_between: float, fields=None, patience=120.0) -> dict:
    """`server` has start() -> url, kill(), close(). A job that was accepted must end, and its file must be whole."""
    accepted: dict[str, dict] = {}
    errors: list[str] = []
    lock, stop, begun = threading.Lock(), threading.Event(), time.monotonic()
    address = {"url": server.start()}

    def client(number: int) -> None:
        draw = random.Random(number)
        while not stop.is_set():
            prompt = f"a {draw.choice(['red', 'blue'])} circle"
            request = {"prompt": prompt, "seed": draw.randrange(4), **(fields or {})}
            if draw.random() < 0.5:
                request |= PICTURE
            try:
                with httpx.Client(base_url=address["url"], timeout=10) as http:
                    answer = http.post("/v1/videos", json=request)
                    if answer.status_code == 200:
                        with lock:
                            accepted[answer.json()["id"]] = request
                    elif answer.status_code != 429:
                        errors.append(answer.text)
                    http.get("/v1/videos?limit=5")
            except httpx.TransportError:
                pass  # the server is being killed
            stop.wait(0.2)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    draw = random.Random(0)
    for _ in range(kills):
        time.sleep(seconds_between * draw.uniform(0.5, 1.5))
        server.kill()
        address["url"] = server.start()
    time.sleep(seconds_between)
    stop.set()
    for thread in threads:
        thread.join()

    report = {"kills": kills, "clients": clients, "accepted": len(accepted), "completed": 0, "failed_with_reason": 0,
              "lost": 0, "broken": 0, "errors": errors}  # fmt: skip
    files: dict[str, set[bytes]] = {}
    with httpx.Client(base_url=address["url"], timeout=30) as http:
        for id, request in accepted.items():
            end = time.monotonic() + patience
            while (answer := http.get(f"/v1/videos/{id}")).status_code == 200 and time.monotonic() < end:
                if answer.json()["status"] in ("completed", "failed"):
                    break
                time.sleep(0.1)
            video = answer.json()
            if answer.status_code != 200 or video["status"] in ("queued", "in_progress"):
                report["lost"] += 1
            elif video["status"] == "failed":
                report["failed_with_reason" if video["error"]["message"] else "lost"] += 1
            else:
                report["completed"] += 1
                content = http.get(f"/v1/videos/{id}/content")
                if content.status_code != 200 or not _is_whole(content.content):
                    report["broken"] += 1
                files.setdefault(str(sorted(request.items())), set()).add(content.content)
    # Runs again after a kill from its stored seed: the same request gives the same bytes.
    report["requests_with_different_bytes"] = sum(len(group) > 1 for group in files.values())
    report["files"] = [file for group in files.values() for file in group]
    report["seconds"] = round(time.monotonic() - begun, 1)
    return report


def _is_whole(data: bytes) -> bool:
    from pylumiere.errors import VideoError
    from pylumiere.media.readers import VideoReader

    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(data)
        file.flush()
        try:
            with VideoReader(file.name) as reader:
                return sum(1 for _ in reader) > 0
        except VideoError:
            return False


def main() -> None:
    import argparse
    import importlib.util
    import json

    from pylumiere.bench.facts import append_row

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds-between", type=float, default=8.0)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", help="append the row to this file")
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("serve_conftest", Path(__file__).with_name("conftest.py"))
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    with tempfile.TemporaryDirectory() as folder:
        server = conftest.Process(options.model, Path(folder), "--concurrency", "2", "--queue-limit", "64")
        fields = {"num_frames": options.frames, "num_inference_steps": options.steps}
        try:
            report = run_chaos(
                server, kills=options.kills, clients=options.clients, seconds_between=options.seconds_between,
                fields=fields, patience=900,
            )  # fmt: skip
        finally:
            server.close()
    hashes = sorted(hashlib.sha256(file).hexdigest()[:12] for file in report.pop("files"))
    row = {"bench": "chaos", "model": options.model, **fields, **report, "different_files": len(hashes)}
    print(json.dumps(row, indent=1))
    if options.json:
        append_row(Path(options.json), row)


if __name__ == "__main__":
    main()
