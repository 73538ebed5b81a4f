"""One process: options, engine, uvicorn."""

from __future__ import annotations

import copy
import logging
import re
import socket
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import uvicorn

from pylumiere.errors import BudgetExceeded, InvalidRequest
from pylumiere.serve.app import Limits, Service, create_app
from pylumiere.serve.hub import Hub
from pylumiere.serve.jobs import LocalWorker
from pylumiere.serve.keys import KeyRing, read_keys
from pylumiere.serve.loras import find_loras
from pylumiere.serve.store import Store

logger = logging.getLogger("pylumiere")

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class ServeOptions:
    """What `pylumiere serve` takes; see its --help.

    Attributes:
        concurrency: jobs in the engine at once.
        keep_seconds, keep_bytes: retention; None keeps.
        memory_budget: bytes of the engine.
        trusted_key: PEM file of a public key; only a bundle that it signed is served.
        temporal_shift: for a folder as diffusers saves it; see `Engine.load`.
        loras: folder of the LoRA files that requests may name.
    """

    model: str = "demo"
    aliases: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    data: Path = Path("pylumiere-data")
    api_keys: Path | None = None
    backend: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    memory_budget: int | None = None
    trusted_key: str | None = None
    temporal_shift: int | None = None
    loras: Path | None = None
    concurrency: int = 4
    limits: Limits = field(default_factory=Limits)
    keep_seconds: float | None = None
    keep_bytes: int | None = None


def parse_bytes(name: str, text: str) -> int:
    """4GiB, 500MB, 1048576."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise InvalidRequest(f"{name} {text!r} should be a size, such as 4GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_seconds(name: str, text: str) -> float:
    """7d, 12h, 30m, 45s."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)\s*([smhd])", text.strip())
    if match is None or float(match[1]) == 0:
        raise InvalidRequest(f"{name} {text!r} should be a time, such as 7d, 12h, 30m or 45s")
    return float(match[1]) * _TIMES[match[2]]


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def listening_socket(host: str, port: int) -> socket.socket:
    """Bound before the model is loaded, so that a taken port is known at once.

    Raises:
        InvalidRequest: the address cannot be used.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(512)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidRequest(f"cannot listen on {host} port {port}: {reason}") from None
    return listener


class Server(uvicorn.Server):
    """uvicorn, which ends the open event streams before it waits for the connections."""

    def __init__(self, config: uvicorn.Config, hub: Hub):
        super().__init__(config)
        self._hub = hub

    async def shutdown(self, sockets=None) -> None:
        self._hub.close()
        await super().shutdown(sockets)


def make_server(service: Service, app=None, *, on_start=None) -> Server:
    """A server for a service whose worker is set, or will be."""
    config = uvicorn.Config(
        create_app(service, on_start=on_start) if app is None else app,
        lifespan="on", log_config=_log_config(), access_log=False, server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=10, timeout_keep_alive=30, limit_concurrency=1000,
        h11_max_incomplete_event_size=2**15, http="h11", ws="none",
    )  # fmt: skip
    return Server(config, service.hub)


def serve(options: ServeOptions) -> None:
    """Runs until SIGINT or SIGTERM. Jobs that run then are queued again, for the next start.

    Raises:
        InvalidRequest: options that do not fit together or the model, an address or a folder that cannot be used.
        BundleError, UnsupportedDevice, BudgetExceeded: as Engine.load.
    """
    from pylumiere.engine import Engine

    if options.api_keys is None and not is_loopback(options.host):
        raise InvalidRequest(
            f"--host {options.host!r} is reachable from other machines; give --api-keys FILE "
            "(pylumiere serve-key NAME --file FILE makes one)"
        )
    keys = None if options.api_keys is None else KeyRing(read_keys(options.api_keys))
    loras = find_loras(options.loras)
    listener = listening_socket(options.host, options.port)
    store = None
    try:
        store = Store(options.data, keep_seconds=options.keep_seconds, keep_bytes=options.keep_bytes)
        engine = Engine.load(
            options.model, backend=options.backend, device=options.device, precision=options.precision,
            memory_budget=options.memory_budget, max_running=options.concurrency, trusted_key=options.trusted_key,
            temporal_shift=options.temporal_shift,
        )  # fmt: skip
        service = Service(
            engine.config, store, keys, options.limits, options.concurrency,
            (engine.config.name, *(name for name in options.aliases if name != engine.config.name)),
            tuple(engine.styles()), tuple(loras), engine.takes_adapters,
        )  # fmt: skip
        worker = LocalWorker(engine, loras)
        worker.watch(service.metrics)

        def start() -> None:
            try:
                engine.warm_up()
            except BudgetExceeded as error:
                logger.warning("no warm-up for the model's default clip: %s", error)
            service.start(worker)

        server = make_server(service, on_start=start)
        address, port = listener.getsockname()[:2]
        host = f"[{address}]" if ":" in address else address
        print(f"pylumiere: serving {engine.config.name} on http://{host}:{port} (data in {store.folder})", flush=True)
        server.run(sockets=[listener])
        engine.close()
    finally:
        listener.close()
        if store is not None:
            store.close()


def _log_config() -> dict:
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["loggers"]["pylumiere"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    config["loggers"]["uvicorn"]["level"] = "WARNING"
    config["loggers"]["uvicorn.error"] = {"level": "WARNING"}
    return config
