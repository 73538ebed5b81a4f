"""API keys: made from 256 random bits, kept as SHA-256, compared in constant time.

A key file has one key a line; `pylumiere serve-key NAME --file keys.txt` adds one and prints the key once:

    # name  hash  limits
    alice   sha256:9f86d081...  jobs=8  requests_per_minute=600

`jobs` bounds what a key has queued and running at once. SHA-256 without salt or stretching is right for keys of full
entropy and for nothing else: never write the hash of a password here.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from pylumiere.errors import InvalidRequest

PREFIX = "pyl-"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_FILE_BYTES = 2**20


@dataclass(frozen=True)
class Key:
    name: str
    digest: bytes
    jobs: int = 16
    requests_per_minute: int = 1200


def make_key(name: str, jobs: int = Key.jobs, requests_per_minute: int = Key.requests_per_minute) -> tuple[str, str]:
    """A new key, and its line for the key file."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"name {name!r} should be 1 to 64 letters, digits, '.', '_' or '-'")
    key = PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    return key, f"{name}  sha256:{digest}  jobs={jobs}  requests_per_minute={requests_per_minute}"


def append_key(path: str | os.PathLike, line: str) -> None:
    """Adds a line to a key file, which is made readable for its owner only if it is new.

    Raises:
        InvalidRequest: the name is taken, or the file cannot be written.
    """
    name = line.split()[0]
    if Path(path).exists() and any(key.name == name for key in read_keys(path, may_be_empty=True)):
        raise InvalidRequest(
            f"key file {str(path)!r} has a key named {name!r}; choose another name, or remove its line"
        )
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode() + b"\n")
    except OSError as error:
        raise InvalidRequest(f"key file {str(path)!r} cannot be written: {error.strerror}") from error


def read_keys(path: str | os.PathLike, *, may_be_empty: bool = False) -> list[Key]:
    """The keys of a file.

    Raises:
        InvalidRequest: it cannot be read, holds none, or a line is wrong; the line is named, never its hash.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise InvalidRequest(f"key file {str(path)!r} has more than {_MAX_FILE_BYTES} bytes")
        text = data.decode()
    except OSError as error:
        raise InvalidRequest(f"key file {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise InvalidRequest(f"key file {str(path)!r} is no text") from None
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            keys.append(_parse(line, f"key file {str(path)!r}, line {number}"))
            if len({key.name for key in keys}) < len(keys):
                raise InvalidRequest(f"key file {str(path)!r}, line {number}: the name {keys[-1].name!r} is taken")
    if not keys and not may_be_empty:
        raise InvalidRequest(f"key file {str(path)!r} holds no key; make one: pylumiere serve-key NAME --file FILE")
    return keys


def _parse(line: str, where: str) -> Key:
    name, digest, *options = [*line.split(), "", ""][: max(2, len(line.split()))]
    if not _NAME.fullmatch(name) or not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise InvalidRequest(f"{where}: should be NAME sha256:HEX, as pylumiere serve-key prints it")
    limits: dict[str, int] = {}
    for option in options:
        match = re.fullmatch(r"(jobs|requests_per_minute)=([1-9][0-9]{0,8})", option)
        if match is None:
            raise InvalidRequest(f"{where}: {option[:40]!r} is not jobs=N or requests_per_minute=N")
        limits[match[1]] = int(match[2])
    return Key(name, bytes.fromhex(digest.removeprefix("sha256:")), **limits)


class KeyRing:
    """Finds the owner of a key. Every key is compared, so the time tells nothing about which one, or whether any."""

    def __init__(self, keys: list[Key]):
        self.keys = {key.name: key for key in keys}

    def find(self, presented: str) -> Key | None:
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self.keys.values():
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found


class RateLimit:
    """A bucket of requests for each key: full it holds a minute's worth, and it fills evenly."""

    def __init__(self):
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: Key) -> float:
        """Seconds to wait; 0 if the request may go on."""
        rate, now = key.requests_per_minute / 60, time.monotonic()
        with self._lock:
            level, then = self._buckets.get(key.name, (float(key.requests_per_minute), now))
            level = min(float(key.requests_per_minute), level + (now - then) * rate)
            wait = 0.0 if level >= 1 else (1 - level) / rate
            self._buckets[key.name] = (level if wait else level - 1, now)
        return wait
