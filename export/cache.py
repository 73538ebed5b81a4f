"""Finished pieces of bundles, kept under a hash of everything that they were made from.

An entry is a folder. It is built aside, under a lock, and renamed into place when it is complete, so two builds at once
share one entry and a build that dies leaves none. The cache lies in the user's own folder and is refused where others
could write: what is in it is copied into bundles.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pylumiere.errors import BundleError

_FORMAT = 1  # raise when the content of entries changes
_CONTENTS = "contents.json"


def default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pylumiere" / "export"


def key_of(kind: str, facts: dict[str, Any]) -> str:
    """A name for what `facts` (JSON values) describe completely."""
    text = json.dumps([_FORMAT, kind, facts], sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:40]}"


def hash_sources(paths: Iterable[Path]) -> str:
    """Hash of the content of files and of the Python files in folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


class Cache:
    """Entries by key. Safe for several processes.

    Raises:
        BundleError: a folder that belongs to somebody else, that others may write to, or that cannot be made.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder or default_folder()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            facts = self.folder.lstat()
        except OSError as error:
            raise BundleError(f"cache folder {self.folder} cannot be made: {error.strerror}") from error
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
            raise BundleError(f"cache folder {self.folder} is not a folder of this user; set XDG_CACHE_HOME")
        if facts.st_mode & 0o022:
            raise BundleError(f"cache folder {self.folder} can be written by others; chmod 700 it, or remove it")

    def get(self, key: str, build: Callable[[Path], None]) -> tuple[Path, bool]:
        """The folder of an entry, and whether it was there already; `build` fills an empty folder where it was not."""
        from filelock import FileLock

        entry = self.folder / key
        with FileLock(self.folder / f"{key}.lock", mode=0o600):
            if _is_whole(entry):
                return entry, True
            shutil.rmtree(entry, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=self.folder))
            try:
                build(partial)
                (partial / _CONTENTS).write_text(json.dumps(_contents(partial)))
                os.replace(partial, entry)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        return entry, False


def _contents(folder: Path) -> dict[str, list]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _CONTENTS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest]
    return found


def _is_whole(entry: Path) -> bool:
    """Whether an entry is there with all its bytes as they were written."""
    try:
        listed = json.loads((entry / _CONTENTS).read_text())
    except (OSError, ValueError):
        return False
    return _contents(entry) == listed
