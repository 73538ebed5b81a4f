"""Sends malformed requests, each drawn anew, and counts the answers.

As a command, against a server of its own: python -P tests/serve/malformed.py --count 10000 --json row.jsonl
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import string
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

CREATE = ["/v1/videos", "/v1/videos/edits", "/v1/videos/extensions"]
PATHS = [*CREATE, "/v1/videos", "/v1/videos", "/v1/videos/video_{hex}", "/v1/videos/{junk}/remix",
         "/v1/videos/video_{hex}/content?variant={junk}", "/v1/videos?limit=x{junk}", "/v1/videos/{junk}/events",
         "/v1/models/{junk}", "/v1/{junk}"]  # fmt: skip
FIELDS = ["prompt", "seconds", "size", "seed", "num_frames", "fps", "sampler", "model", "input_reference",
          "guidance_scale", "num_inference_steps", "negative_prompt", "window_overlap", "junk", "video", "mask",
          "keyframes", "expand", "fit", "strength", "style", "style_strength", "lora", "lora[]", "loop",
          "timeout"]  # fmt: skip


def run_malformed(url: str, *, count: int, seed: int, memory_of: int | None = None) -> dict:
    draw, answers = random.Random(seed), Counter()
    address = urlsplit(url)
    resident = []
    begun = time.monotonic()
    for index in range(count):
        status, has_message = _send(address, _request(draw, address.netloc))
        answers["answered"] += status is not None
        answers[f"{(status or 0) // 100}xx"] += 1
        answers["without_message"] += not has_message
        if memory_of is not None and index % max(1, count // 50) == 0:
            resident.append(_resident(memory_of))
    report = {name: answers[name] for name in ("answered", "2xx", "4xx", "5xx", "0xx", "without_message")}
    report |= {"count": count, "seconds": round(time.monotonic() - begun, 1)}
    if resident:
        marks = [resident[round(part * (len(resident) - 1))] / 2**20 for part in (0, 0.25, 0.5, 0.75, 1)]
        report["resident_MiB_at_quarters"] = [round(mark, 1) for mark in marks]
    return report


def _junk(draw: random.Random, most: int = 40) -> str:
    letters = string.printable + "äöü€\u202e\u0000😀"
    return "".join(draw.choice(letters) for _ in range(draw.randrange(1, most)))


def _value(draw: random.Random):
    return draw.choice([
        None, True, [], {}, -1, 0, 10**30, 1.5, "", "1e999", _junk(draw), "../../etc/passwd", "x" * 30_000, [[[[]]]],
        {"image_url": "file:///etc/passwd"}, {"image_url": "data:image/png;base64," + "A" * draw.randrange(200)},
        {"image_url": 7}, {"file_id": "../x"}, {"id": "../x"}, "data:video/mp4;base64,AAAA", {"0": "../x"},
        {"../x": "data:image/png;base64,AAAA"}, {"left": -1}, {"left": 10**30}, "left=1,top=",
    ])  # fmt: skip


def _json(draw: random.Random) -> bytes:
    kind = draw.randrange(5)
    if kind == 0:
        return draw.randbytes(draw.randrange(2000))
    if kind == 1:
        return b'{"a":' * draw.randrange(1, 5000) + b"1"
    fields = {"prompt": "a", draw.choice(FIELDS): _value(draw), "junk": _value(draw)}
    text = json.dumps(fields).encode()
    if kind == 2:
        return text[: draw.randrange(len(text))]
    if kind == 3:
        place = draw.randrange(len(text))
        return text[:place] + draw.randbytes(3) + text[place:]
    return text


def _form(draw: random.Random) -> bytes:
    parts = []
    for _ in range(draw.randrange(1, 5)):
        name = draw.choice(
            [
                *FIELDS,
                "input_reference[image_url]",
                "input_reference[",
                "a[b][c]",
                "keyframes[0]",
                "keyframes[../x]",
                "video[id]",
                "expand[left]",
                _junk(draw, 9),
            ]
        )
        file = draw.choice(["", '; filename="../../x.png"', "; filename*=utf-16''%ff"])
        head = f'Content-Disposition: form-data; name="{name}"{file}\r\n'
        data = draw.randbytes(draw.randrange(300))
        parts.append(b"--x\r\n" + head.encode("utf-8", "replace") + b"\r\n" + data + b"\r\n")
    text = b"".join(parts) + b'--x\r\nContent-Disposition: form-data; name="junk"\r\n\r\n1\r\n--x--\r\n'
    return text if draw.random() < 0.5 else text[: draw.randrange(len(text))]


def _request(draw: random.Random, host: str) -> bytes:
    """A request that is wrong in at least one way; its length is stated truly, so that an answer is due."""
    path = draw.choice(PATHS).format(hex=f"{draw.getrandbits(128):032x}", junk="".join(
        f"%{byte:02x}" for byte in draw.randbytes(draw.randrange(1, 12))))  # fmt: skip
    methods = ["POST"] if path in CREATE else ["GET", "POST", "DELETE", "PATCH", "XX"]
    method = draw.choice(methods)
    body, kind = draw.choice([
        (_json(draw), "application/json"), (_form(draw), "multipart/form-data; boundary=x"),
        (_form(draw), "multipart/form-data"), (_form(draw), "multipart/form-data; boundary=x; charset=utf-7"),
        (draw.randbytes(draw.randrange(500)), "application/x-www-form-urlencoded"),
        (draw.randbytes(50), "text/plain"), (b"", ""), (_json(draw), "application/json; charset=nonsense"),
    ])  # fmt: skip
    extra = draw.choice(["", "Idempotency-Key: a b\r\n", "Range: bytes=9-1\r\n", "X-Long: " + "y" * 8000 + "\r\n",
                         "Authorization: \xff\xfe\r\n", "Cookie: a=\r\n"])  # fmt: skip
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}"
    return head.encode("latin-1") + b"Connection: close\r\n\r\n" + body


def _send(address, request: bytes) -> tuple[int | None, bool]:
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # an early answer
            connection.sendall(request)
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        return None, False
    try:
        has_message = bool(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        has_message = bool(body.strip())
    return int(head[9:12]), has_message


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> None:
    import argparse
    import importlib.util
    import tempfile

    from pylumiere.bench.facts import append_row

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--json", help="append the row to this file")
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("serve_conftest", Path(__file__).with_name("conftest.py"))
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    with tempfile.TemporaryDirectory() as folder:
        server = conftest.Process(options.model, Path(folder))
        try:
            url = server.start()
            report = run_malformed(url, count=options.count, seed=0, memory_of=server.process.pid)
        finally:
            server.close()
    row = {"bench": "malformed", "model": options.model, **report}
    print(json.dumps(row))
    if options.json:
        append_row(Path(options.json), row)


if __name__ == "__main__":
    main()
