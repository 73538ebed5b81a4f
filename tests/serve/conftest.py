"""A server with a tiny random model, in this process for most tests and in its own for those that kill it."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

for _name in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "openai", "httpx"):
    pytest.importorskip(_name, reason="the serve extra and its test packages are not installed")

import httpx  # noqa: E402
import openai  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from support.testing import random_weights, write_random_model  # noqa: E402
from support.tiny_diffusers import write_tiny_sd  # noqa: E402

from pylumiere.checkpoints.adapters import fingerprint, save_style  # noqa: E402
from pylumiere.checkpoints.native import load_checkpoint  # noqa: E402
from pylumiere.engine import Engine  # noqa: E402
from pylumiere.networks.families import expected_shapes  # noqa: E402
from pylumiere.networks.stunet.presets import model_preset  # noqa: E402
from pylumiere.serve.app import Limits, Service  # noqa: E402
from pylumiere.serve.jobs import LocalWorker  # noqa: E402
from pylumiere.serve.keys import KeyRing  # noqa: E402
from pylumiere.serve.loras import find_loras  # noqa: E402
from pylumiere.serve.server import listening_socket, make_server  # noqa: E402
from pylumiere.serve.store import Store  # noqa: E402

SLOW = {"num_inference_steps": 1000}  # a clip that is still running when it is cancelled


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The tiny model, with a style "bold"."""
    folder, network = write_random_model(tmp_path_factory.mktemp("model")), model_preset("tiny").first.network
    other = {"conv_out.weight": random_weights(network, 5)["conv_out.weight"]}
    save_style(
        folder / "styles" / "bold.safetensors", other, network, fingerprint(load_checkpoint(folder).weights["base"])
    )
    return folder


@pytest.fixture(scope="session")
def engine(model):
    with Engine.load(model, precision="fp32") as engine:
        yield engine


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """Like Stable Diffusion, as diffusers saves it: pictures of 16 x 16."""
    folder = tmp_path_factory.mktemp("folders") / "tiny-sd"
    write_tiny_sd(folder)
    return folder


@pytest.fixture(scope="session")
def shift_engine(sd_folder):
    """The same folder shifted in time: clips of 16 frames."""
    with Engine.load(sd_folder, precision="fp32", temporal_shift=8) as engine:
        yield engine


@pytest.fixture(scope="session")
def loras(shift_engine, model, tmp_path_factory):
    """A folder with two LoRA files for the shifted model, one for another model, and others."""
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder / "look.safetensors", shift_engine.config.first.network)
    write_lora(folder / "Ink wash.v2.safetensors", shift_engine.config.first.network, seed=1)
    write_lora(folder / "other.safetensors", load_checkpoint(model).config.first.network)
    (folder / "notes.txt").write_text("")
    (folder / "sub").mkdir()
    write_lora(folder / "sub" / "below.safetensors", shift_engine.config.first.network)
    return folder


def write_lora(path, network, seed=0):
    """Rank 2 on the weights of all linear layers."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in expected_shapes(network).items():
        if name.endswith(".weight") and len(shape) == 2:
            module = f"unet.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(2, shape[1], generator=draw)
            tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], 2, generator=draw)
    save_file(tensors, path)


class Running:
    """A served service: `url`, the service itself, and an httpx client."""

    def __init__(self, engine, folder, *, keys=None, limits=None, concurrency=2, loras=None, **store):
        loras = find_loras(loras)
        self.service = Service(
            engine.config, Store(folder, **store), keys, limits or Limits(), concurrency,
            styles=tuple(engine.styles()), loras=tuple(loras), takes_adapters=engine.takes_adapters,
        )  # fmt: skip
        worker = LocalWorker(engine, loras)
        worker.watch(self.service.metrics)
        listener = listening_socket("127.0.0.1", 0)
        self.server = make_server(self.service, on_start=lambda: self.service.start(worker))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=30)
        wait_until(lambda: self.server.started)

    def openai(self, key="any", **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def create(self, **fields):
        answer = self.http.post("/v1/videos", json={"prompt": "a red circle", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def wait(self, id, *statuses):
        statuses = statuses or ("completed",)
        wait_until(lambda: self.http.get(f"/v1/videos/{id}").json()["status"] in statuses)
        return self.http.get(f"/v1/videos/{id}").json()

    def close(self):
        self.http.close()
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def shared_server(engine, tmp_path_factory):
    with warnings.catch_warnings(), contextlib.closing(Running(engine, tmp_path_factory.mktemp("data"))) as running:
        yield running


@pytest.fixture(scope="session")
def shared_shift_server(shift_engine, loras, tmp_path_factory):
    with contextlib.closing(Running(shift_engine, tmp_path_factory.mktemp("data"), loras=loras)) as running:
        yield running


@pytest.fixture
def server(shared_server):
    yield shared_server
    _empty(shared_server)


@pytest.fixture
def shift_server(shared_shift_server):
    """With the folder that is shifted in time, and its LoRA files."""
    yield shared_shift_server
    _empty(shared_shift_server)


def _empty(server):
    for video in server.http.get("/v1/videos?limit=100").json()["data"]:
        server.http.delete(f"/v1/videos/{video['id']}")
    wait_until(lambda: server.service.runner.num_running == 0)


@pytest.fixture
def serve(engine, tmp_path):
    """Starts further servers: serve(keys=..., limits=...)."""
    with contextlib.ExitStack() as stack:

        def start(folder=tmp_path / "data", engine=engine, **options):
            return stack.enter_context(contextlib.closing(Running(engine, folder, **options)))

        yield start


@pytest.fixture
def ring():
    from pylumiere.serve.keys import _parse, make_key

    def make(**limits):
        key, line = make_key("alice", **limits)
        other, line_other = make_key("bob", **limits)
        return key, other, KeyRing([_parse(line, "line"), _parse(line_other, "line")])

    return make


class Process:
    """`pylumiere serve` in a process of its own, on a folder that outlives it."""

    def __init__(self, model: Path, folder: Path, *arguments: str):
        self._command = [
            sys.executable, "-P", "-m", "pylumiere.cli", "serve", "--model", str(model), "--port", "0",
            "--data", str(folder), *arguments,
        ]  # fmt: skip
        self.process = None

    def start(self) -> str:
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        line = self.process.stdout.readline() if ready else ""
        match = re.search(r"http://\S+", line)
        assert match, line + (self.process.communicate(timeout=5)[0] if self.process.poll() is not None else "")
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        self.url = match[0]
        with httpx.Client() as client:
            wait_until(lambda: _answers(client, f"{self.url}/readyz"))
        return self.url

    def kill(self, number=signal.SIGKILL) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()


def _answers(client, url):
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def process(model, tmp_path):
    with contextlib.ExitStack() as stack:

        def make(*arguments, folder=tmp_path / "data"):
            return stack.enter_context(contextlib.closing(Process(model, folder, *arguments)))

        yield make
